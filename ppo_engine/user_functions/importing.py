"""Functions by name, found as `python file.py` and `python -m package.module` find them.

A file's folder stands first on the path, and the file is imported under its own name, so that it
finds its neighbours, and so that processes which it starts find what they are sent.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import site
import sys
import sysconfig
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from ppo_engine.errors import UserError
from ppo_engine.messages import did_you_mean, nearest_path, shown

_folders: set[Path] = set()  # of users' files and modules


def import_function(spec: str) -> Callable[..., Any]:
    """The function that "file.py:name" or "package.module:name" names, or a UserError."""
    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise UserError(f"{spec!r} names no function: write file.py:name or module:name.")
    module = _import_file(source) if source.endswith(".py") else _import_module(source)
    found = getattr(module, name, None)
    if found is None:
        known = [key for key, value in vars(module).items() if callable(value)]
        raise UserError(f"{source} has no function {name!r}.{did_you_mean(name, known)}")
    if not callable(found):
        raise UserError(f"{name!r} in {source} is not a function, but {shown(found)}.")
    return found


def function_file(source: str) -> Path:
    """The whole path of a file of functions; a UserError where it is not there."""
    path = Path(source).expanduser().resolve()
    if not path.is_file():
        raise UserError(f"The function's file {source!r} does not exist.{nearest_path(source)}")
    return path


def _import_file(source: str) -> ModuleType:
    path = function_file(source)
    return _run_file(path, path.stat().st_mtime_ns)


@functools.cache
def _run_file(path: Path, changed: int) -> ModuleType:
    """Once for all functions of a file, which may load a judge; again if it has `changed`."""
    name = path.stem
    hidden = _hidden_by(name, path.parent)
    if hidden is not None:
        raise UserError(
            f"{path} has the name of the module {name!r} ({hidden}): each would hide the other "
            "from what imports it. Rename the file."
        )
    _stand_first(path.parent)
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None and module_spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script without a main guard may exit
        sys.modules.pop(name, None)
        hint = ""
        if isinstance(error, ImportError) and "relative import" in str(error):
            hint = f" Name it as a module of its package: {_dotted(path)}:FUNCTION."
        raise UserError(
            f"{str(path)!r} could not be imported: {type(error).__name__}: {error}.{hint}"
        ) from error
    return module


def _dotted(path: Path) -> str:
    """The name of a file as a module of its outermost package."""
    parts = [path.stem, path.parent.name]
    for folder in itertools.takewhile(lambda f: (f / "__init__.py").exists(), path.parent.parents):
        parts.append(folder.name)
    return ".".join(reversed(parts))


def _import_module(source: str) -> ModuleType:
    if _offers(Path.cwd(), source.partition(".")[0]):
        _stand_first(Path.cwd())
    try:
        return importlib.import_module(source)
    except (Exception, SystemExit) as error:
        raise UserError(
            f"The module {source!r} could not be imported: {type(error).__name__}: {error}. Is it "
            "in the working folder, or installed? A file is named by its path, ending in .py."
        ) from error


def _stand_first(folder: Path) -> None:
    """Put `folder` first on the path, and forget what other users' folders called by names that it
    has too: `import utils` is each file's own. What was imported from there goes on working."""
    importlib.invalidate_caches()
    sys.path[:] = [str(folder), *(entry for entry in sys.path if entry != str(folder))]
    others = _folders - {folder}
    for name in [name for name in sys.modules if others and "." not in name]:
        if _home(sys.modules[name]) in others and _offers(folder, name):
            for part in [n for n in sys.modules if n == name or n.startswith(f"{name}.")]:
                del sys.modules[part]
    _folders.add(folder)


def _hidden_by(name: str, folder: Path) -> str | None:
    """Where Python or what is installed has a module that a file `name`.py in `folder` would hide,
    or that would hide the file."""
    if name in sys.stdlib_module_names:
        return "of Python's library"
    loaded = _home(sys.modules[name]) if name in sys.modules else None
    if loaded is not None and loaded not in _folders | {folder}:
        return f"in {loaded}"
    installed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    installed |= {*site.getsitepackages(), site.getusersitepackages()}
    found = PathFinder.find_spec(name, sorted(installed - {str(folder)}))
    return f"in {found.origin}" if found is not None and found.origin else None


def _offers(folder: Path, name: str) -> bool:
    """Whether `import name` finds something in `folder`."""
    return PathFinder.find_spec(name, [str(folder)]) is not None


def _home(module: ModuleType) -> Path | None:
    """The folder in which a top-level module, or a package's folder, stands."""
    known = vars(module)  # not its attributes: a lazy module may import something to have them
    file = known.get("__file__")
    if file is not None:
        path = Path(file).resolve()
        return path.parent.parent if path.name == "__init__.py" else path.parent
    places = list(known.get("__path__", ()))  # a package without __init__.py
    return Path(places[0]).resolve().parent if places else None

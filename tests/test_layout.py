"""The rooms of `ppo_engine`: imports run down one list. Nothing imports in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

import ppo_engine
import ppo_kernels

ROOT = Path(ppo_engine.__file__).parent

# Lowest first. What stands together on a line is one floor; a room may import within itself.
ORDER = (
    ("errors", "messages", "sealed", "spans", "memory", "user_functions"),
    ("settings",),
    ("text",),
    ("data",),
    ("pretrained",),
    ("models",),
    ("rollout",),
    ("rewards",),
    ("run",),
    ("ppo",),
    ("pages",),
    ("training",),
    ("demo",),
    ("generate", "inspection", "doctor"),
    ("cli",),
    ("__main__", "__init__"),
)
FLOOR = {room: floor for floor, rooms in enumerate(ORDER) for room in rooms}


def modules(root: Path) -> dict[str, Path]:
    """Files by the dotted names of their modules, within the package; folders by their names, and
    the package itself, which hands out names of all rooms, as "__init__"."""
    found = {}
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        name = parts if parts[-1] != "__init__" or len(parts) == 1 else parts[:-1]
        found[".".join(name)] = file
    return found


def imports(files: dict[str, Path], root: Path) -> Iterator[tuple[str, str]]:
    """(module, module that it imports), wherever the import stands: in a function or for types
    too."""
    for name, file in files.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            for target in _targets(node, root.name):
                # The module itself, or the one that a name is from.
                while target and target not in files:
                    target = target.rpartition(".")[0]
                if (target or "__init__") != name:
                    yield name, target or "__init__"


def _targets(node: ast.AST, package: str) -> list[str]:
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        assert not node.level, "imports are absolute"
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
        return []
    whole = [name.split(".") for name in names]
    return [".".join(parts[1:]) for parts in whole if parts[0] == package]


def rises(arrows: Iterable[tuple[str, str]]) -> list[str]:
    """Imports that run up the list, or sideways into another room of the same floor, but the
    ground's."""
    found = []
    for source, target in arrows:
        rooms = source.partition(".")[0], target.partition(".")[0]
        here, there = (FLOOR[room] for room in rooms)
        sideways = here == there and here > 0 and rooms[0] != rooms[1]
        if there > here or sideways:
            found.append(f"{source} imports {target}")
    return sorted(set(found))


def circle(arrows: Iterable[tuple[str, str]]) -> list[str]:
    """The modules of one circle, or none."""
    below: dict[str, set[str]] = {}
    for source, target in arrows:
        below.setdefault(source, set()).add(target)
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        for target in sorted(below.get(name, ())):
            if found := walk(target, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(below) if (found := walk(name, []))), [])


def test_every_room_has_its_place_in_the_order() -> None:
    rooms = {name.partition(".")[0] for name in modules(ROOT)}
    assert rooms == set(FLOOR)


def test_imports_run_down() -> None:
    assert rises(imports(modules(ROOT), ROOT)) == []


@pytest.mark.parametrize("package", [ppo_engine, ppo_kernels], ids=lambda x: str(x.__name__))
def test_no_imports_in_a_circle(package: ModuleType) -> None:
    root = Path(str(package.__file__)).parent
    assert circle(imports(modules(root), root)) == []


def test_a_planted_arrow_is_seen(tmp_path: Path) -> None:
    """In a function, for types, of a module or of a name, by way of the package itself."""
    package = tmp_path / "ppo_engine"
    for name, text in {
        "models/passes.py": "def f():\n    from ppo_engine.rollout import batch\n",
        "rollout/batch.py": "from ppo_engine.models.passes import f\n",
        "text/prompt.py": "if TYPE_CHECKING:\n    import ppo_engine.data.rows\n",
        "data/rows.py": "from ppo_engine.errors import UserError\n",
        "rewards/model.py": "from ppo_engine import PPOTrainer\n",
        "run/report.py": "def f():\n    import ppo_engine\n",
        "errors.py": "",
        "__init__.py": "from ppo_engine.training.ppo import PPOTrainer\n",
        "training/ppo.py": "import ppo_engine_tools\n",
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    arrows = list(imports(modules(package), package))
    assert rises(arrows) == [
        "models.passes imports rollout.batch",
        "rewards.model imports __init__",
        "run.report imports __init__",
        "text.prompt imports data.rows",
    ]
    assert circle(arrows) == ["models.passes", "rollout.batch"]

"""What the installation depends on, as far as it can be tested without installing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_kernels_is_no_package() -> None:
    """A top-level `kernels` would be found where transformers wants Hugging Face's package."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert packages["packages"]["find"]["namespaces"] is False
    code = (
        "import importlib.util as u, transformers.integrations.hub_kernels as h\n"
        "found = u.find_spec('kernels')\n"
        "assert found is None or found.origin, f'{found} is our source folder'\n"
        if _has("kernels")
        else "import transformers.integrations.hub_kernels\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr


def _has(distribution: str) -> bool:
    from importlib.metadata import PackageNotFoundError, version

    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


def test_both_packages_import_from_any_folder(tmp_path: Path) -> None:
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    code = "import ppo_kernels, ppo_engine; print(ppo_kernels.__name__, ppo_engine.__name__)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    assert result.stdout.strip() == "ppo_kernels ppo_engine", result.stderr


def test_the_kernels_need_torch_only() -> None:
    code = (
        "import sys; sys.modules['transformers'] = sys.modules['ppo_engine'] = None\n"
        "import ppo_kernels"
    )
    paths = [str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_all_that_a_package_holds_is_installed() -> None:
    """Files that are no modules, as a page's, are named as the package's data."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    root = ROOT / packages["package-dir"]["ppo_engine"]
    named = {file for glob in packages["package-data"]["ppo_engine"] for file in root.glob(glob)}
    there = {file for file in root.rglob("*") if file.is_file() and file.suffix != ".py"}
    assert {file for file in there if "__pycache__" not in file.parts} == named


def test_no_torch_in_compiled_code() -> None:
    for source in (ROOT / "csrc").rglob("*"):
        if source.suffix in (".h", ".cpp", ".cu", ".cuh"):
            assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", source.read_text()), source


def test_kernel_sources_share_no_inline_code_between_instruction_sets() -> None:
    """An inline function outside an anonymous namespace would be merged by the linker, and might
    run one instruction set's code on a machine without it; so would the standard library's."""
    allowed = {"cfloat", "cmath", "cstdint", "cstring"}  # functions of C, and numbers
    for source in (ROOT / "csrc" / "cpu").iterdir():
        if source.stem in ("isa", "threads"):
            continue
        text = source.read_text()
        standard = set(re.findall(r"#include <(\w+)>", text))
        assert standard <= allowed, f"{source.name} includes {standard - allowed}"


def test_constraints_pin_every_dependency_but_torchs_own() -> None:
    pinned = {
        _normal(line.split("==")[0])
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    optional = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *optional["dev"], *optional["demo"], *optional["bench"]]
    missing = {_normal(re.split(r"[<>=!~;\[ ]", name)[0]) for name in wanted} - pinned
    assert missing == {"triton"}  # torch's builds for CUDA want one exact version, each its own


def test_the_minimum_is_tested_as_it_is_declared() -> None:
    """`make test-minimum` runs with the first of the versions that each dependency admits."""
    pinned = dict(
        line.split("==") for line in (ROOT / "tests/minimum.txt").read_text().splitlines()
        if "==" in line
    )  # fmt: skip
    declared = dict(name.split(">=") for name in PROJECT["dependencies"] if ">=" in name)
    assert pinned.keys() == declared.keys()
    for name, version in declared.items():
        assert pinned[name] == version or pinned[name].startswith(f"{version}.")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize(
    "group",
    ["lora", "quant", "data", "math", "json", "tensorboard", "wandb", "trackio", "pages", "demo",
     "bench", "dev"],
)  # fmt: skip
def test_optional_groups(group: str) -> None:
    assert PROJECT["optional-dependencies"][group]

"""Builds the compiled CPU kernels with CMake and Ninja; everything else is in pyproject.toml.

In place, for work on the kernels: `python setup.py build_ext --inplace`.

Without a C++ compiler the installation still succeeds, in pure Python: the reason goes to
`ppo_kernels/_build_info.json`, from where `ppo_kernels.implementations()` reports it.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path(__file__).parent.resolve() / "csrc"
INFO = "_build_info.json"  # beside the module, in ppo_kernels/
SANITIZE = os.environ.get("PPO_KERNELS_SANITIZE") == "1"  # set by tests/sanitize.py


class CMakeBuild(build_ext):
    """Builds `_cpu` in the CMake project `csrc/`, and records the outcome beside it."""

    built = False  # read by Wheel

    def build_extension(self, ext: Extension) -> None:
        if SANITIZE and self.inplace:
            raise SystemExit("PPO_KERNELS_SANITIZE=1 would replace the normal build: unset it.")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        info: dict[str, object] = {"built": True}
        try:
            module, compiler = self.run_cmake(Path(self.build_temp).resolve() / "cpu")
            shutil.copyfile(module, target)
            info |= compiler
        except BuildError as error:
            info = {"built": False, "reason": str(error)}
            print(
                f"\nppo-engine: the compiled CPU kernels were NOT built.\n  {error}\n"
                "  Without them every op runs in plain PyTorch, several times slower. Mend that\n"
                "  (it takes a C++17 compiler) and install again.\n",
                file=sys.stderr,
                flush=True,
            )
        CMakeBuild.built = bool(info["built"])
        target.with_name(INFO).write_text(json.dumps(info, indent=2) + "\n")

    def get_outputs(self) -> list[str]:
        """What is installed: the record always, the module only where it was built."""
        module = Path(self.get_ext_fullpath(self.extensions[0].name))
        return [str(module)] * CMakeBuild.built + [str(module.with_name(INFO))]

    def get_output_mapping(self) -> dict[str, str]:
        """Built file to its place in the source tree, where that is what is installed."""
        return dict(self.in_place_files()) if self.inplace else {}

    def copy_extensions_to_source(self) -> None:
        if not CMakeBuild.built:
            if not self.editable_mode:
                raise SystemExit("Nothing was built.")
            # An older build would run in place of the sources that do not compile.
            for module in Path(self.package_source()).glob("_cpu*"):
                module.unlink()
        for built, place in self.in_place_files():
            self.copy_file(built, place)

    def package_source(self) -> str:
        return str(self.get_finalized_command("build_py").get_package_dir("ppo_kernels"))

    def in_place_files(self) -> list[tuple[str, str]]:
        built, package = Path(self.build_lib) / "ppo_kernels", Path(self.package_source())
        names = [Path(self.get_ext_filename("_cpu")).name] * CMakeBuild.built + [INFO]
        return [(str(built / name), str(package / name)) for name in names]

    def run_cmake(self, build: Path) -> tuple[Path, dict[str, object]]:
        """Return the compiled module and what `compiler.json` says about it."""
        try:
            import pybind11
        except ImportError:
            raise BuildError("the Python package pybind11 is missing") from None
        # Beside the interpreter too: a virtual environment need not be activated.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        cmake, ninja = (shutil.which(tool, path=path) for tool in ("cmake", "ninja"))
        if cmake is None or ninja is None:
            missing = "cmake" if cmake is None else "ninja"
            raise BuildError(f"{missing} is missing (the Python package of that name has it)")
        configure = [
            cmake, "-S", str(SOURCES), "-B", str(build), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPPO_KERNELS_SANITIZE={'ON' if SANITIZE else 'OFF'}",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        # A cache made by another environment's cmake or ninja would be reused with their paths.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        run(configure, "CMake could not set up a C++17 build")
        run([cmake, "--build", str(build)], "the C++ compiler failed")
        (module,) = build.glob("_cpu*" + (".pyd" if os.name == "nt" else ".so"))
        return module, json.loads((build / "compiler.json").read_text())


class Wheel(bdist_wheel):
    """A wheel without the compiled module is a pure one, and named so."""

    def run(self) -> None:
        self.run_command("build")
        self.root_is_pure = not CMakeBuild.built
        super().run()


class BuildError(Exception):
    """The compiled kernels cannot be built here; the message says why."""


def run(command: list[str], failure: str) -> None:
    """Run `command`; if it fails, print its output and raise with the first error in it."""
    result = subprocess.run(command, capture_output=True, text=True)
    print(result.stdout, end="")
    if result.returncode == 0:
        return
    print(result.stderr, file=sys.stderr, end="")
    lines = [line.strip() for line in (result.stderr + result.stdout).splitlines() if line.strip()]
    first = next((i for i, line in enumerate(lines) if "error" in line.lower()), 0)
    raise BuildError(f"{failure}: {' '.join(lines[first : first + 2])}")


setup(
    ext_modules=[Extension("ppo_kernels._cpu", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)

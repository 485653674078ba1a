"""Builds the compiled kernels with CMake and Ninja: those of the CPU, and of NVIDIA's GPUs where
there is an nvcc. Everything else is in pyproject.toml.

In place, for work on the kernels: `python setup.py build_ext --inplace`.

Without a C++ compiler, or an nvcc, the installation still succeeds: the reason goes to
`ppo_kernels/_build_info.json`, from where `ppo_kernels.implementations()` reports it.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path(__file__).parent.resolve() / "csrc"
INFO = "_build_info.json"  # beside the module, in ppo_kernels/
NVCC_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
# What is printed where a module was not built, for the reason given.
MISSING = {
    "_cpu": "the compiled CPU kernels were NOT built.\n  {}\n"
    "  Without them every op runs in plain PyTorch, several times slower. Fix that\n"
    "  (it takes a C++17 compiler) and install again, with pip's --no-cache-dir\n"
    "  --force-reinstall --no-deps, as pip may keep what it has built now.",
    "_cuda": "no CUDA kernels: {}.\n  On a GPU the Triton kernels run instead.",
}
SANITIZE = os.environ.get("PPO_KERNELS_SANITIZE") == "1"  # set by tests/sanitize.py


class CMakeBuild(build_ext):
    """Builds `_cpu` in the CMake project csrc/ and `_cuda` in csrc/cuda/, and records the outcomes
    beside them."""

    built: ClassVar[list[str]] = []  # read by Wheel

    def run(self) -> None:
        if SANITIZE and self.inplace:
            raise SystemExit("PPO_KERNELS_SANITIZE=1 would replace the normal build: unset it.")
        CMakeBuild.built = []
        self.info: dict[str, object] = {}
        super().run()

    def build_extensions(self) -> None:
        super().build_extensions()
        info = Path(self.get_ext_fullpath(self.extensions[0].name)).with_name(INFO)
        info.write_text(json.dumps(self.info, indent=2) + "\n")

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rpartition(".")[2]
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            module, compiler = self.run_cmake(name, Path(self.build_temp).resolve() / name)
            shutil.copyfile(module, target)
            self.info[name.removeprefix("_")] = {"built": True} | compiler
            CMakeBuild.built.append(name)
        except BuildError as error:
            self.info[name.removeprefix("_")] = {"built": False, "reason": str(error)}
            print(f"\nppo-engine: {MISSING[name].format(error)}\n", file=sys.stderr, flush=True)

    def get_outputs(self) -> list[str]:
        """What is installed: the record always, the modules only where they were built."""
        folder = Path(self.get_ext_fullpath(self.extensions[0].name)).parent
        return [str(folder / name) for name in self.file_names()]

    def get_output_mapping(self) -> dict[str, str]:
        """Built file to its place in the source tree, where that is what is installed."""
        return dict(self.in_place_files()) if self.inplace else {}

    def copy_extensions_to_source(self) -> None:
        if "_cpu" not in CMakeBuild.built and not self.editable_mode:
            raise SystemExit("Nothing was built.")
        # An older build would run instead of the sources that do not compile.
        for name in {ext.name.rpartition(".")[2] for ext in self.extensions} - {*CMakeBuild.built}:
            for module in Path(self.package_source()).glob(f"{name}*"):
                module.unlink()
        for built, place in self.in_place_files():
            self.copy_file(built, place)

    def package_source(self) -> str:
        return str(self.get_finalized_command("build_py").get_package_dir("ppo_kernels"))

    def file_names(self) -> list[str]:
        return [Path(self.get_ext_filename(name)).name for name in CMakeBuild.built] + [INFO]

    def in_place_files(self) -> list[tuple[str, str]]:
        built, package = Path(self.build_lib) / "ppo_kernels", Path(self.package_source())
        return [(str(built / name), str(package / name)) for name in self.file_names()]

    def run_cmake(self, name: str, build: Path) -> tuple[Path, dict[str, object]]:
        """Return the compiled module and what `compiler.json` says about it."""
        try:
            import pybind11
        except ImportError:
            raise BuildError("the Python package pybind11 is missing") from None
        # Next to the interpreter too: a virtual environment need not be activated.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        cmake, ninja = (shutil.which(tool, path=path) for tool in ("cmake", "ninja"))
        if cmake is None or ninja is None:
            missing = "cmake" if cmake is None else "ninja"
            raise BuildError(f"{missing} is missing (the Python package of that name has it)")
        sources, options, compiler = SOURCES, [], "C++"
        if name == "_cpu":
            options.append(f"-DPPO_KERNELS_SANITIZE={'ON' if SANITIZE else 'OFF'}")
        else:
            sources, compiler = SOURCES / "cuda", "CUDA"
            nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc", path=NVCC_PATH)
            if nvcc is None:
                raise BuildError("nvcc, of NVIDIA's CUDA toolkit, is not on the PATH")
            options.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
        configure = [
            cmake, "-S", str(sources), "-B", str(build), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release", *options,
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        # A cache made by another environment's cmake or ninja would be reused with their paths.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        run(configure, f"CMake could not set up a {compiler} build")
        run([cmake, "--build", str(build)], f"the {compiler} compiler failed")
        (module,) = build.glob(f"{name}*" + (".pyd" if os.name == "nt" else ".so"))
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


modules = ["_cpu"] if SANITIZE else ["_cpu", "_cuda"]
setup(
    ext_modules=[Extension(f"ppo_kernels.{name}", sources=[]) for name in modules],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)

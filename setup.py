"""Builds the C++ library with CMake: in place for an editable install, into the wheel otherwise."""

import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Runs CMake instead of a compiler; what it makes is no Python extension."""

    def build_extension(self, ext: Extension) -> None:
        """Build the library into the tree that is being built; setuptools copies it in place."""
        out = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = ROOT / "build" / "cmake"
        cmake = _cmake()
        subprocess.check_call(
            [
                *cmake,
                *("-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"),
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out}",
            ]
        )
        subprocess.check_call([*cmake, "--build", str(build), "--parallel", "2"])

    def get_ext_filename(self, fullname: str) -> str:
        """One name for every Python: it is loaded by ctypes."""
        return str(Path(*fullname.split(".")[:-1]) / "libvivace_cpu.so")


class PlatformWheel(bdist_wheel):
    """One wheel for every Python 3 of a platform."""

    def finalize_options(self) -> None:
        """The library makes it a platform's."""
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        """No ABI: nothing links to Python."""
        return "py3", "none", super().get_tag()[2]


def _cmake() -> list[str]:
    """The system's CMake, or pip's."""
    if found := shutil.which("cmake"):
        return [found]
    return [sys.executable, "-m", "cmake"]


setup(
    packages=find_packages("src"),
    package_dir={"": "src"},
    include_package_data=False,
    package_data={
        "vivace": ["py.typed"],
        "vivace.engine.models": ["architectures/*.toml", "*.toml"],
        "vivace.kernels": ["tuned/*.json"],
        "vivace.serving.protos.vivace.v1": ["*.proto", "*.pyi"],
    },
    ext_modules=[Extension("vivace.kernels.vivace_cpu", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
    setup_requires=[] if shutil.which("cmake") else ["cmake>=3.22"],
)

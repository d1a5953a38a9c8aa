"""What pyproject.toml cannot say: kernels/ is installed as fpdarts.kernels, and CMake builds the native kernels.

FPDARTS_NATIVE=require makes a failed build an error; FPDARTS_NATIVE=off leaves it out. Otherwise the installation
succeeds without a compiler, and the native back end says why it cannot run when it is asked for.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
LIBRARY = "libfpdarts_kernels.so"
NATIVE = os.environ.get("FPDARTS_NATIVE", "auto")


class BuildWithCMake(build_ext):
    built = False

    def get_ext_filename(self, fullname):
        # a plain library, loaded by ctypes: no Python in its name
        return os.path.join(*fullname.split(".")[:-1], LIBRARY)

    def build_extension(self, extension):
        out = Path(self.get_ext_fullpath(extension.name)).resolve().parent
        build = Path(self.build_temp).resolve() / "kernels"
        for folder in (out, build):
            folder.mkdir(parents=True, exist_ok=True)
        configure = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", build, f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out}"]
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", build], check=True)
            self.built = True
        except (OSError, subprocess.CalledProcessError) as error:
            message = f"fpdarts: the native CPU kernels were not built ({error})"
            if NATIVE == "require":
                raise RuntimeError(message) from error
            told = f"WARNING: {message}; install a C++17 compiler and install fpdarts again to have them"
            print(told, file=sys.stderr)

    def copy_extensions_to_source(self):  # of an editable installation
        if self.built:
            super().copy_extensions_to_source()

    def get_outputs(self):
        return [path for path in super().get_outputs() if os.path.exists(path)]

    def get_output_mapping(self):
        return {path: source for path, source in super().get_output_mapping().items() if os.path.exists(path)}


class PlatformWheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]  # of any Python 3, for this platform


setup(
    packages=["fpdarts", "fpdarts.data", "fpdarts.kernels", "fpdarts.kernels.native", "fpdarts.kernels.triton"],
    package_dir={"fpdarts": "fpdarts", "fpdarts.kernels": "kernels"},
    ext_modules=[] if NATIVE == "off" else [Extension("fpdarts.kernels.native.library_file", sources=[])],
    cmdclass={"build_ext": BuildWithCMake, "bdist_wheel": PlatformWheel},
)

"""What pyproject.toml cannot say: kernels/ is installed as fpdarts.kernels, and CMake builds the native kernels.

FPDARTS_NATIVE=require makes a failed build an error; FPDARTS_NATIVE=off leaves it out. Otherwise the installation
succeeds without a compiler, and the native back end says why it cannot run when it is asked for.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
LIBRARY = "libfpdarts_kernels.so"
NATIVE = os.environ.get("FPDARTS_NATIVE") or "auto"
if NATIVE not in ("auto", "require", "off"):
    sys.exit(f"FPDARTS_NATIVE is {NATIVE!r}; set it to require or off, or not at all")
IN_PLACE = ROOT / "kernels" / "native" / LIBRARY  # of an editable installation
if NATIVE == "off" and "editable_wheel" in sys.argv:
    IN_PLACE.unlink(missing_ok=True)


class BuildWithCMake(build_ext):
    built = False

    def get_ext_filename(self, fullname):
        # a plain library, loaded by ctypes: no Python in its name
        return os.path.join(*fullname.split(".")[:-1], LIBRARY)

    def build_extension(self, extension):
        out = Path(self.get_ext_fullpath(extension.name)).resolve().parent
        build = Path(self.build_temp).resolve() / "kernels"
        cache = build / "CMakeCache.txt"
        if cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text():
            shutil.rmtree(build)  # of a checkout that was moved, or copied
        for folder in (out, build):
            folder.mkdir(parents=True, exist_ok=True)
        (out / LIBRARY).unlink(missing_ok=True)  # of an earlier build: where this one fails, none is to be installed
        configure = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", build, f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out}"]
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", build], check=True)
            self.built = True
        except (OSError, subprocess.CalledProcessError) as error:
            message = f"fpdarts: the native CPU kernels were not built ({error})"
            if NATIVE == "require":
                raise RuntimeError(message) from error
            cure = "install cmake and a C++17 compiler, and fpdarts again, to have them"
            if platform.machine() not in ("x86_64", "AMD64"):
                cure = f"they are for x86-64, not for {platform.machine()}"
            print(f"WARNING: {message}; {cure}", file=sys.stderr)

    def copy_extensions_to_source(self):  # of an editable installation
        IN_PLACE.unlink(missing_ok=True)
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
    include_package_data=False,  # sources of the native kernels are for the source distribution only
    ext_modules=[] if NATIVE == "off" else [Extension("fpdarts.kernels.native.library_file", sources=[])],
    cmdclass={"build_ext": BuildWithCMake, "bdist_wheel": PlatformWheel},
)

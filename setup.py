"""Only what pyproject.toml cannot say: kernels/ at the top level is installed as fpdarts.kernels."""

from setuptools import setup

setup(
    packages=["fpdarts", "fpdarts.data", "fpdarts.kernels", "fpdarts.kernels.triton"],
    package_dir={"fpdarts": "fpdarts", "fpdarts.kernels": "kernels"},
)

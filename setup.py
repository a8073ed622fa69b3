"""Names the cffi builder, which pyproject.toml cannot; everything else is there."""

from setuptools import setup

setup(cffi_modules=["ninepd/_vring_build.py:ffibuilder"])

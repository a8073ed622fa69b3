"""The sanitizers of gcc, where it has them."""

import os
import shutil
import subprocess

import pytest


def asan_runtime() -> str:
    """Path of AddressSanitizer's library; skips the test that asks without it."""
    if not shutil.which("gcc"):
        pytest.skip("no gcc")
    command = ["gcc", "-print-file-name=libasan.so"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(path):
        pytest.skip("gcc has no libasan")
    return path

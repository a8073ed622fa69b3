"""The ring's tests once more, on an extension that checks every address and every shift."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.asan import asan_runtime

ROOT = Path(__file__).resolve().parent.parent
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g"


def test_ring_tests_pass_under_the_sanitizers(tmp_path: Path) -> None:
    runtime = asan_runtime()
    (tmp_path / "ninepd").mkdir()
    (tmp_path / "tests/support").mkdir(parents=True)
    for source in (ROOT / "ninepd").iterdir():
        if source.suffix in (".py", ".c") and source.name != "_libvring.c":
            shutil.copy(source, tmp_path / "ninepd")
    tests = sorted(path.name for path in (ROOT / "tests").glob("test_vring*.py"))
    for name in ("support/driver.py", "support/vring_rig.py", *tests):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests" / name)
    # Not the project's pyproject.toml: building needs no more than the builder.
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\n")
    environment = dict(os.environ, NINEPD_CFLAGS=SANITIZE, NINEPD_WERROR="1")
    build = [sys.executable, "ninepd/_vring_build.py"]
    result = subprocess.run(
        build, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr

    # CPython leaks at exit by design. SIGBUS is ninepd's own business: guest memory may vanish.
    environment |= {
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0:handle_sigbus=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "NINEPD_SANITIZED_TREE": str(tmp_path),
    }
    run = [
        sys.executable,
        "-m",
        "pytest",
        "--import-mode=importlib",
        "-rs",
        "-q",
        *(f"tests/{name}" for name in tests),
    ]
    result = subprocess.run(
        run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "an ordinary run" not in result.stdout

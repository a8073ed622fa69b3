"""Each input that fuzzing has left in the tree, once more through its harness.

Those in C are built with the sanitizers of gcc. The others run in a process of their own, as a user
would replay them.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz import build
from fuzz.harnesses import HARNESSES, ROOT, Harness, Kind
from fuzz.traffic import Record, check_answer, join, parse
from ninepd.p9.messages import Rlerror, Tgetattr, encode
from tests.support.asan import asan_runtime

IN_C = [harness for harness in HARNESSES.values() if harness.kind is Kind.C]
OTHERS = [harness for harness in HARNESSES.values() if harness.kind is not Kind.C]


def corpus(harness: Harness) -> list[Path]:
    paths = sorted(harness.corpus.iterdir())
    assert paths
    return paths


def run(command: list[str | Path], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("harness", IN_C, ids=lambda harness: harness.name)
def test_corpus_in_c(harness: Harness, tmp_path: Path) -> None:
    asan_runtime()
    program = build.program(harness.name, build.Purpose.REPLAY, tmp_path)
    paths = corpus(harness)
    result = run([program, *paths])
    assert result.returncode == 0, result.stdout[-200:] + result.stderr
    assert len(result.stdout.splitlines()) == len(paths)


@pytest.mark.parametrize("harness", OTHERS, ids=lambda harness: harness.name)
def test_corpus_in_python(harness: Harness) -> None:
    paths = corpus(harness)
    result = run([sys.executable, "-m", "fuzz.replay", "--as", harness.name, *paths])
    assert result.returncode == 0, result.stdout[-200:] + result.stderr
    assert len(result.stdout.splitlines()) == len(paths)


# The oracles themselves


def test_a_harness_in_c_sees_a_write_out_of_bounds(tmp_path: Path) -> None:
    """What the sanitizers are for: here in a harness that has nothing else."""
    asan_runtime()
    (tmp_path / "bad.c").write_text(
        '#include "harness.h"\n'
        "int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {\n"
        "    uint8_t *room = exactly(size);\n"
        "    *(volatile uint8_t *)(room + size) = *data;\n"
        "    free(room);\n"
        "    return 0;\n"
        "}\n"
    )
    here = ROOT / "fuzz"
    compiler, *flags = build.Purpose.REPLAY.value
    command = [compiler, *flags, f"-I{here}", "bad.c", str(here / "replay.c"), "-o", "bad"]
    subprocess.run(command, cwd=tmp_path, check=True)
    (tmp_path / "input").write_bytes(b"some bytes")
    result = run([tmp_path / "bad", tmp_path / "input"])
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr


REQUEST = Record(encode(5, Tgetattr(0, 0)))


@pytest.mark.parametrize(
    ("reply", "complaint"),
    [
        (b"", "not answered"),
        (encode(6, Rlerror(2)), "another tag"),
        (encode(5, Tgetattr(0, 0)), "another type"),
        (encode(5, Rlerror(2)) + b"x", "size"),
    ],
)
def test_a_wrong_answer_is_seen(reply: bytes, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        check_answer(REQUEST, reply)


def test_a_right_answer() -> None:
    assert check_answer(REQUEST, encode(5, Rlerror(2))) == (24, 7, 2)
    assert check_answer(REQUEST._replace(room=10), b"") == (24, 0, 0)


def test_traffic_is_what_was_written() -> None:
    records = [REQUEST, Record(b"", 0), Record(b"", 1), Record(b"odd", 7)]
    assert parse(join(records)) == records
    assert parse(join(records)[:-1])[:3] == records[:3]

"""The check of every reply, tests/support/audit.py, on replies that are wrong."""

from typing import Any

import pytest

from ninepd.p9.messages import (
    Qid,
    Rread,
    Rreaddir,
    Rreadlink,
    Rversion,
    Rwalk,
    Rwrite,
    Tread,
    Treaddir,
    Treadlink,
    Tversion,
    Twalk,
    Twrite,
)
from tests.support.audit import check_reply
from tests.support.client import ROOT, Client, P9Error

QID = Qid(0, 0, 1)


def entry(name: bytes) -> bytes:
    return bytes(22) + len(name).to_bytes(2, "little") + name


LISTED = entry(b"a") + entry(b"bc")


@pytest.mark.parametrize(
    ("message", "reply", "data"),
    [
        (Tread(1, 0, 4), Rread(5), b"12345"),
        (Tread(1, 0, 4), Rread(0xFFFFFFFF), b"1234"),
        (Tread(1, 0, 4), Rread(4), b"123"),
        (Twrite(1, 0, 4), Rwrite(0xFFFFFFFF), b""),
        (Twalk(0, 1, (b"a",)), Rwalk((QID, QID)), b""),
        (Treaddir(1, 0, 10), Rreaddir(len(LISTED)), LISTED),
        (Treaddir(1, 0, 100), Rreaddir(30), LISTED[:30]),
        (Treaddir(1, 0, 100), Rreaddir(27), entry(b"a/b")),
        (Treaddir(1, 0, 100), Rreaddir(26), entry(b"a\0")),
        (Treaddir(1, 0, 100), Rreaddir(24), entry(b"")),
        (Treadlink(1), Rreadlink(b"a\0b"), b""),
        (Tversion(4096, b"9P2000.L"), Rversion(8192, b"9P2000.L"), b""),
    ],
)
def test_what_is_wrong_is_noticed(message: Any, reply: Any, data: bytes) -> None:
    with pytest.raises(AssertionError):
        check_reply(message, reply, data)


@pytest.mark.threat("t_reply_audit")
def test_replies_that_every_test_gets_are_checked(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a daemon that said too much would fail whichever test asks."""
    checked = []
    monkeypatch.setattr("tests.support.client.check_reply", lambda *of: checked.append(of[1]))
    client.create(ROOT, 1, b"f")
    client.write(1, 0, b"text")
    client.read(1, 0, 100)
    with pytest.raises(P9Error):
        client.walk(ROOT, 2, b"missing")
    client.readdir(client.open(ROOT, 3) and 3)
    kinds = [type(reply).__name__ for reply in checked]
    assert kinds == ["Rwalk", "Rlcreate", "Rwrite", "Rread", "Rwalk", "Rlopen", "Rreaddir"]

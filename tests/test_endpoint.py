"""Where metrics may be offered."""

import pytest

from ninepd.config import Config
from ninepd.endpoint import Endpoint, parse_endpoint
from ninepd.errors import UsageError


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("127.0.0.1:9564", Endpoint(None, "127.0.0.1", 9564)),
        ("127.1.2.3:1", Endpoint(None, "127.1.2.3", 1)),
        ("[::1]:65535", Endpoint(None, "::1", 65535)),
        ("unix:/run/metrics", Endpoint("/run/metrics")),
    ],
)
def test_places(text: str, endpoint: Endpoint) -> None:
    assert parse_endpoint("metrics-listen", text) == endpoint


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0.0.0.0:9564", "can be reached from other computers"),
        ("[::]:9564", "can be reached from other computers"),
        ("192.168.1.1:9564", "can be reached from other computers"),
        ("localhost:9564", "is neither ADDR:PORT"),
        ("9564", "is neither ADDR:PORT"),
        ("127.0.0.1:", "is neither ADDR:PORT"),
        ("127.0.0.1:0", "not between 1 and 65535"),
        ("127.0.0.1:65536", "not between 1 and 65535"),
        ("127.0.0:1", "is neither ADDR:PORT"),
        ("", "is neither ADDR:PORT"),
        ("unix:", "this is no path"),
        ("unix:/" + "x" * 107, "too long for a socket"),
    ],
)
def test_no_places(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=rf"^--metrics-listen: .*{words}"):
        Config((), metrics_listen=text)


@pytest.mark.parametrize("path", ["", "a\0b", "/" + "x" * 107])
def test_the_control_tree_needs_a_path(path: str) -> None:
    with pytest.raises(UsageError, match=r"^--control-path: "):
        Config((), control_path=path)

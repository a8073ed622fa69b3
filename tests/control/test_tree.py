"""The control tree and the metrics of a live daemon, through its sockets."""

import http.client
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from ninepd.control.client import Client as ControlClient
from ninepd.control.client import ControlError
from ninepd.control.names import name_of
from ninepd.p9.messages import LockType, Twalk
from tests.conftest import StartDaemon
from tests.support.client import ROOT, Client, Daemon, children
from tests.support.locking import lock
from tests.support.waiting import eventually

FOREVER = 20


class Watched(NamedTuple):
    daemon: Daemon
    path: str
    metrics: str

    def read(self, *names: str) -> str:
        with ControlClient(self.path) as client:
            return client.read(*names).decode()

    def table(self, what: str) -> list[dict[str, str]]:
        """Of the export: rows by the names of their columns."""
        head, *rows = self.read("exports", "test", what).splitlines()
        names = head.split()
        return [dict(zip(names, row.split(None, len(names) - 1), strict=True)) for row in rows]

    def numbers(self) -> dict[str, int]:
        text = self.read("exports", "test", "stats").partition("\n\n")[0]
        return {name: int(value) for name, value in map(str.split, text.splitlines())}

    def process(self, name: str) -> int:
        """Soon after its start it has its name."""
        found: list[int] = []

        def look() -> bool:
            found[:] = [pid for pid in children(self.daemon.pid) if title(pid) == f"ninepd: {name}"]
            return len(found) == 1

        eventually(look, f"a process for {name}", FOREVER)
        return found[0]


def title(pid: int) -> str:
    with suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0")
    return ""


@pytest.fixture
def watched(start_daemon: StartDaemon, tmp_path: Path) -> Watched:
    path, metrics = str(tmp_path / "control.sock"), str(tmp_path / "metrics.sock")
    listen = f"unix:{metrics}"
    options = ("--control-path", path, "--metrics-listen", listen, "--log-level", "info")
    return Watched(start_daemon(*options), path, metrics)


@pytest.fixture
def guest(watched: Watched) -> Iterator[Client]:
    with Client(watched.daemon.socket) as client:
        client.attach()
        yield client


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def get(path: str, request: str = "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n") -> tuple[int, str]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(FOREVER)
        connection.connect(path)
        with suppress(BrokenPipeError):  # it was answered before it was over
            for char in request:
                connection.sendall(char.encode())
        response = http.client.HTTPResponse(connection, method=request.split(" ")[0])
        response.begin()
        return response.status, response.read().decode()


def samples(text: str) -> dict[str, float]:
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


# What there is


def test_the_tree(watched: Watched) -> None:
    with ControlClient(watched.path) as client:
        assert client.names() == ["ctl", "exports", "metrics"]
        assert client.names("exports") == ["test"]
        files = ["clients", "config", "fids", "locks", "stats", "trace"]
        assert client.names("exports", "test") == files
        with pytest.raises(ControlError, match="there is no exports/other/stats"):
            client.read("exports", "other", "stats")
    assert stat.S_IMODE(os.stat(watched.path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(watched.metrics).st_mode) == 0o600


def test_the_configuration(watched: Watched, export: Path) -> None:
    lines = watched.read("exports", "test", "config").splitlines()
    assert f'export = "{export}"' in lines
    assert "readonly = false" in lines
    assert "# socket-group" in lines


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        ("a-b_c.d", "a-b_c.d"),
        ("..", "%2E%2E"),
        ("a/b", "a%2Fb"),
        ("ü", "%C3%BC"),
        ("\udcff", "%FF"),
    ],
)
def test_names_of_exports(tag: str, name: str) -> None:
    assert name_of(tag) == name


def test_sockets_go_with_the_daemon(watched: Watched) -> None:
    assert watched.daemon.stop() == 0
    assert not os.path.exists(watched.path)
    assert not os.path.exists(watched.metrics)


# Counters


def test_counters_of_a_guest(watched: Watched, guest: Client) -> None:
    guest.create(ROOT, 1, b"file")
    guest.write(1, 0, bytes(1000))
    for _ in range(5):
        guest.getattr(ROOT)
    numbers = watched.numbers()
    assert (numbers["front_end_connected"], numbers["front_ends"]) == (1, 1)
    assert (numbers["fids"], numbers["open_files"], numbers["requests_in_flight"]) == (2, 1, 0)
    found = samples(watched.read("metrics"))
    label = 'export="test",message="Tgetattr"'
    assert found[f"ninepd_request_duration_seconds_count{{{label}}}"] == 5
    assert found[f"ninepd_sent_bytes_total{{{label}}}"] == 5 * 160
    assert found['ninepd_received_bytes_total{export="test",message="Twrite"}'] == 1023
    assert found['ninepd_up{export="test"}'] == 1


def test_errors_are_told_by_their_names(watched: Watched, guest: Client) -> None:
    assert guest.error(Twalk(ROOT, 1, (b"nothing",))) == "ENOENT"
    text = watched.read("exports", "test", "stats")
    assert re.search(r"^Twalk +ENOENT +1$", text, re.MULTILINE)
    found = samples(watched.read("metrics"))
    key = 'ninepd_request_errors_total{errno="ENOENT",export="test",message="Twalk"}'
    assert found[key] == 1


def test_a_guest_that_leaves_holds_nothing(watched: Watched) -> None:
    with Client(watched.daemon.socket) as guest:
        guest.attach()
        guest.walk(ROOT, 1)
    eventually(lambda: watched.numbers()["fids"] == 0, "the daemon to show it", FOREVER)
    numbers = watched.numbers()
    assert (numbers["front_end_connected"], numbers["descriptors"]) == (0, 1)  # the root's


def test_counters_outlive_the_process(watched: Watched) -> None:
    with Client(watched.daemon.socket) as guest:
        guest.attach()
        before = watched.numbers()
        os.kill(watched.process("test"), signal.SIGKILL)
    eventually(
        lambda: watched.numbers().get("process_restarts") == 1, "the daemon to show it", FOREVER
    )
    eventually(lambda: watched.numbers()["process"] > 0, "the daemon to show it", FOREVER)
    after = watched.numbers()
    assert after["process"] != before["process"]
    assert after["ring_requests"] >= before["ring_requests"] > 0
    assert (after["fids"], after["front_end_connected"]) == (0, 0)
    assert watched.table("fids") == []


def test_counters_are_read_without_asking(watched: Watched, guest: Client) -> None:
    """And what has to be asked for says that nobody answers."""
    guest.getattr(ROOT)
    with stopped(watched.process("test")):
        assert watched.numbers()["fids"] == 1
        assert 'ninepd_fids{export="test"} 1.0' in watched.read("metrics")
        assert watched.read("exports", "test", "fids") == "test: its process does not answer\n"
    eventually(lambda: len(watched.table("fids")) == 1, "the daemon to show it", FOREVER)


# What only the process knows


def test_fids(watched: Watched, guest: Client, export: Path) -> None:
    (export / "folder").mkdir()
    (export / "folder" / "a\n\x1b[2J b").touch()
    guest.walk(ROOT, 1, b"folder", b"a\n\x1b[2J b")
    guest.open(ROOT, 2, b"folder")
    rows = watched.table("fids")
    assert [row["fid"] for row in rows] == ["0", "1", "2"]
    assert [row["kind"] for row in rows] == ["dir", "file", "dir"]
    assert [row["open"] for row in rows] == ["-", "-", "r"]
    assert rows[2]["path"] == "/folder"
    text = watched.read("exports", "test", "fids")
    assert "\x1b" not in text
    assert "/folder/a\\x0a\\x1b[2J b" in text


def test_a_long_list_comes_in_pieces(watched: Watched, guest: Client) -> None:
    numbers = [*range(1, 200), 5000, 1 << 20, 1 << 31]
    for number in numbers:
        guest.walk(ROOT, number)
    assert [int(row["fid"]) for row in watched.table("fids")] == [ROOT, *numbers]


def test_locks_and_clients(watched: Watched, guest: Client) -> None:
    guest.create(ROOT, 1, b"file")
    lock(guest, 1, LockType.WRLCK, 10, 5, owner=7)
    lock(guest, 1, LockType.RDLCK, 100, 0, owner=7)
    rows = watched.table("locks")
    assert [(row["type"], row["start"], row["end"], row["process"]) for row in rows] == [
        ("WRLCK", "10", "15", "7"),
        ("RDLCK", "100", "EOF", "7"),
    ]
    assert {row["path"] for row in rows} == {"/file"}
    [client] = watched.table("clients")
    assert (client["pid"], client["uid"]) == (str(os.getpid()), str(os.getuid()))
    assert (client["dialect"], client["fids"]) == ("9P2000.L", "2")


def test_nobody_is_there(watched: Watched) -> None:
    assert [watched.table(what) for what in ("fids", "locks", "clients")] == [[], [], []]


# Commands


def test_reload_reaches_the_supervisor(watched: Watched) -> None:
    with ControlClient(watched.path) as client:
        assert client.read("ctl") == b"nothing was written yet\n"
        client.write(b"reload\n", "ctl")
        assert client.read("ctl") == b"reload: the supervisor has been told\n"
        with pytest.raises(ControlError, match="Invalid argument"):
            client.write(b"what", "ctl")
        assert client.read("ctl") == b"unknown: 'what'; write one of: reload\n"
    watched.daemon.stop()
    assert watched.daemon.log.count("asked to reload") == 1


Ninepd = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def ninepd(watched: Watched) -> Ninepd:
    """The command, which finds the daemon by its environment."""

    def run(*arguments: str, path: str = watched.path) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "ninepd", *arguments],
            env=os.environ | {"NINEPD_CONTROL_PATH": path},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


def test_commands(watched: Watched, ninepd: Ninepd) -> None:
    assert ninepd("stats", "test").stdout == watched.read("exports", "test", "stats")
    assert ninepd("stats").stdout.startswith("export test\nprocess ")
    assert ninepd("fids", "test").stdout == watched.read("exports", "test", "fids")
    assert ninepd("ctl", "reload").stdout == "reload: the supervisor has been told\n"
    for arguments, words in (
        (("fids", "other"), f"ninepd: {watched.path}: there is no exports/other/fids\n"),
        (("ctl", "what"), "ninepd: unknown: 'what'; write one of: reload\n"),
    ):
        wrong = ninepd(*arguments)
        assert (wrong.returncode, wrong.stderr, wrong.stdout) == (2, words, "")
    nobody = ninepd("stats", path="/nowhere")
    assert nobody.returncode == 2
    assert re.fullmatch(r"ninepd: --control-path: /nowhere: .*\n", nobody.stderr)


# The process that serves it


def test_it_is_shut_in(watched: Watched) -> None:
    assert watched.numbers()  # it serves
    pid = watched.process("control")
    status = Path(f"/proc/{pid}/status").read_text()
    for kind in ("CapPrm", "CapEff", "CapBnd" if os.geteuid() == 0 else "CapInh"):
        assert re.search(rf"^{kind}:\t0+$", status, re.MULTILINE), status
    assert re.search(r"^Seccomp:\t2$", status, re.MULTILINE)
    assert re.search(r"^NoNewPrivs:\t1$", status, re.MULTILINE)
    if os.geteuid() == 0:
        assert os.listdir(f"/proc/{pid}/root") == []
        assert os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")
    mappings = Path(f"/proc/{pid}/maps").read_text()
    assert re.findall(r"(\S+) \S+ \S+ \S+ +/memfd:ninepd stats", mappings) == ["r--s"]


def test_another_takes_its_place(watched: Watched, guest: Client) -> None:
    guest.walk(ROOT, 1)
    assert len(watched.table("fids")) == 2
    first = watched.process("control")
    os.kill(first, signal.SIGKILL)
    eventually(
        lambda: watched.read("exports", "test", "fids").count("\n") == 3,
        "the daemon to show it",
        20,
    )
    assert watched.process("control") != first
    assert watched.numbers()["process_restarts"] == 0


def test_what_only_it_needs_is_loaded_for_it_only() -> None:
    program = (
        "import ninepd.cli, sys; print({'pyroute2', 'prometheus_client'}.intersection(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "set()\n"


def test_without_the_options_there_is_none(daemon: Daemon) -> None:
    assert "ninepd: control" not in map(title, children(daemon.pid))


# Metrics by HTTP


def test_metrics_by_http(watched: Watched) -> None:
    status, body = get(watched.metrics)
    assert status == 200
    assert samples(body)['ninepd_up{export="test"}'] == 1
    assert get(watched.metrics, "HEAD /metrics?x=y HTTP/1.0\r\n\r\n") == (200, "")


def test_what_is_not_served_by_http(watched: Watched) -> None:
    for request, status in (
        ("GET / HTTP/1.1\r\n\r\n", 404),
        ("POST /metrics HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 405),
        ("GET /metrics\r\n\r\n", 400),
        ("nonsense\r\n\r\n", 400),
        ("GET /metrics HTTP/1.1\r\n" + "x" * 8192, 431),
    ):
        assert get(watched.metrics, request)[0] == status, request


def test_metrics_at_an_address(start_daemon: StartDaemon) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start_daemon("--metrics-listen", f"127.0.0.1:{port}")
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=FOREVER)) as connection:
        connection.request("GET", "/metrics")
        assert b"ninepd_up" in connection.getresponse().read()


@pytest.mark.parametrize("option", ["--control-path", "--metrics-listen"])
def test_a_place_that_is_taken_is_told_at_the_start(
    start_daemon: StartDaemon, tmp_path: Path, option: str
) -> None:
    path = tmp_path / "taken"
    path.touch()
    value = str(path) if option == "--control-path" else f"unix:{path}"
    with pytest.raises(AssertionError, match=rf"ninepd: {option}: {path} exists and is no socket"):
        start_daemon(option, value)


def test_it_follows_a_reload(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """Exports come and go; what the others have counted stays."""
    path = str(tmp_path / "control.sock")
    config = tmp_path / "config.toml"

    def write(*tags: str) -> None:
        text = f'control-path = "{path}"\nmetrics-listen = "unix:{tmp_path}/metrics.sock"\n'
        for tag in tags:
            (tmp_path / tag).mkdir(exist_ok=True)
            text += f'[[export]]\nexport = "{tmp_path}/{tag}"\ntag = "{tag}"\n'
            text += f'socket-path = "{tmp_path}/{tag}.sock"\n'
        config.write_text(text)

    def follow(*tags: str) -> None:
        write(*tags)
        with ControlClient(path) as client:
            client.write(b"reload", "ctl")
        eventually(lambda: names(path) == sorted(tags), "the tree to follow", FOREVER)

    def requests(tag: str) -> float:
        status, body = get(f"{tmp_path}/metrics.sock")
        assert status == 200
        return samples(body)[f'ninepd_ring_requests_total{{export="{tag}"}}']

    write("one")
    start_daemon(config=str(config))
    with Client(f"{tmp_path}/one.sock") as guest:
        guest.attach()
        counted = requests("one")
        assert counted > 0
        follow("one", "two")
        with Client(f"{tmp_path}/two.sock") as other:
            other.attach()
            assert requests("two") > 0
        assert requests("one") == counted
    follow("two")
    with ControlClient(path) as client:
        assert b"process_restarts 0\n" in client.read("exports", "two", "stats")


def names(path: str) -> list[str]:
    """Of the exports; none while another process takes the place of the one that shows them."""
    try:
        with ControlClient(path) as client:
            return client.names("exports")
    except ControlError:
        return []


def test_without_a_file_there_is_nothing_to_read_again(watched: Watched) -> None:
    watched.daemon.process.send_signal(signal.SIGHUP)
    assert watched.numbers()["process"]
    watched.daemon.stop()
    assert "reload: there is no configuration file to read again" in watched.daemon.log

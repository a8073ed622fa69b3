"""The command line: what it prints, and one line with exit status 2 for whatever is wrong."""

import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ninepd import __version__
from tests.support.client import Client, Readiness

VHOST_USER_9P = "from ninepd.cli import vhost_user_9p; vhost_user_9p()"


def run(
    *arguments: str | Path, env: dict[str, str] | None = None, prefix: tuple[str, ...] = ()
) -> "subprocess.CompletedProcess[str]":
    clean = {name: value for name, value in os.environ.items() if not name.startswith("NINEPD_")}
    return subprocess.run(
        [*prefix, sys.executable, "-m", "ninepd", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=10,
        env=clean | (env or {}),
    )


def refusal(*arguments: str | Path, env: dict[str, str] | None = None) -> str:
    """The one line on standard error of a command that is refused."""
    result = run(*arguments, env=env)
    assert result.returncode == 2, result
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("ninepd: ")
    return line.removeprefix("ninepd: ")


@pytest.fixture
def options(tmp_path: Path, export: Path) -> dict[str, str]:
    return {"--socket-path": str(tmp_path / "s"), "--export": str(export), "--tag": "t"}


def flat(options: dict[str, str]) -> list[str]:
    return [word for pair in options.items() for word in pair]


# Asking


def test_version() -> None:
    result = run("--version")
    assert (result.returncode, result.stderr) == (0, "")
    assert __version__ in result.stdout


def back_end(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """``vhost-user-9p``, as management software asks it."""
    command = [sys.executable, "-c", VHOST_USER_9P, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=10)


def test_version_of_the_back_end() -> None:
    result = back_end("--version")
    expected = (0, f"vhost-user-9p, version {__version__}\n", "")
    assert (result.returncode, result.stdout, result.stderr) == expected


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_of_the_back_end(option: str) -> None:
    """It names what QEMU's conventions ask for."""
    result = back_end(option)
    assert (result.returncode, result.stderr) == (0, "")
    for name in ("--socket-path", "--fd", "--print-capabilities", "--version", "-h, --help"):
        assert name in result.stdout


def test_the_back_end_has_no_option_of_its_own_on_serve() -> None:
    assert "--print-capabilities" in refusal("serve", "--print-capabilities")


@pytest.mark.parametrize(
    "arguments", [("--help",), ("-h",), ("serve", "--help"), ("qemu-args", "-h")]
)
def test_help(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert (result.returncode, result.stderr) == (0, "")
    assert "Usage" in result.stdout


@pytest.mark.parametrize(
    ("command", "more"),
    [
        (["-m", "ninepd"], []),
        (["-c", VHOST_USER_9P], []),
        (["-c", VHOST_USER_9P], ["--socket-path", "/nowhere/s"]),
        (["-c", VHOST_USER_9P], ["--fd=77", "--socket-path=/s", "--no-such-option", "word"]),
    ],
)
def test_print_capabilities(command: list[str], more: list[str]) -> None:
    """QEMU's conventions: JSON on standard output, other options ignored, exit status 0."""
    result = subprocess.run(
        [sys.executable, *command, "--print-capabilities", *more],
        capture_output=True,
        text=True,
        timeout=10,
    )
    assert (result.returncode, result.stderr) == (0, "")
    printed = json.loads(result.stdout)
    assert printed["type"] == "9p"
    assert printed["features"] == []


def test_other_entry_point_serves(tmp_path: Path, export: Path) -> None:
    path = tmp_path / "s"
    readiness = Readiness()
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", VHOST_USER_9P),
            *("--socket-path", path, "--export", export, "--tag", "t", "--once"),
        ],
        env=os.environ | {"NOTIFY_SOCKET": readiness.address},
    )
    try:
        assert readiness.wait(process.pid)
        with Client(str(path)) as client:
            client.attach()
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        readiness.close()


# Refusals


def test_nobody_can_connect_to_what_is_refused(options: dict[str, str]) -> None:
    """QEMU's conventions: it fails before it listens."""
    Path(options["--export"]).rmdir()
    assert "--export" in refusal("serve", *flat(options))
    assert not os.path.lexists(options["--socket-path"])


@pytest.mark.parametrize("missing", ["--socket-path", "--export", "--tag"])
def test_missing_option(options: dict[str, str], missing: str) -> None:
    del options[missing]
    assert missing in refusal("serve", *flat(options))


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--export", "/nowhere/at/all", "does not exist"),
        ("--export", "", "--export"),
        ("--tag", "", "empty"),
        ("--tag", "t" * 255, "too long"),
        ("--fmode", "888", "octal"),
        ("--fmode", "rw-r--r--", "octal"),
        ("--dmode", "0o", "octal"),
        ("--dmode", "", "octal"),
        ("--security-model", "mapped", "--security-model"),
        ("--security-model", "Passthrough", "unknown"),
        ("--security-model", "", "--security-model"),
        ("--writeout", "later", "immediate"),
        ("--msize-max", "4095", "4095 is not between 4096 and 4294967295"),
        ("--msize-max", "-1", "--msize-max"),
        ("--msize-max", "many", "--msize-max"),
        ("--msize-max", "8k", "--msize-max"),
        ("--fids-max", "15", "--fids-max: 15 is not between 16 and 4294967295"),
        ("--fids-max", "-1", "--fids-max"),
        ("--fids-max", "all", "--fids-max"),
        ("--xattrs-max", "65537", "--xattrs-max: 65537 is not between 16 and 65536"),
        ("--locks-max", "0", "--locks-max: 0 is not between 1 and 65536"),
        ("--cookies-max", "8191", "--cookies-max: 8191 is not between 8192 and 1073741824"),
        ("--workers-max", "1", "--workers-max: 1 is not between 2 and 1024"),
        ("--poll-us", "-1", "--poll-us"),
        ("--poll-us", "1000000", "--poll-us"),
        ("--poll-us", "x", "--poll-us"),
        ("--socket-path", "/" + "x" * 107, "too long"),
        ("--socket-path", "/nowhere/at/all/s", "No such file"),
        ("--socket-path", "", "--socket-path"),
        ("--socket-group", "no such", "no group"),
        ("--allow-uid", "-1", "between"),
        ("--allow-uid", "root", "--allow-uid"),
        ("--allow-uid", "", "--allow-uid"),
        ("--socket-mode", "1777", "no octal number"),
        ("--fd", "3", "--fd"),
        ("--fd", "x", "--fd"),
        ("--throttle-bps-total", "1k", "integer"),
        ("--throttle-iops-size", "4096", "operations"),
        ("--log-level", "loud", "error, warning, info, debug"),
        ("--log-level", "", "--log-level"),
        ("--log-format", "xml", "text, json, journal"),
        ("--config", "/nowhere/config.toml", "--config"),
        ("--colour", "red", "--colour"),
    ],
)
def test_bad_value(options: dict[str, str], option: str, value: str, words: str) -> None:
    line = refusal("serve", *flat(options | {option: value}))
    assert words in line
    assert option in line


def test_export_that_is_a_file(options: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = refusal("serve", *flat(options | {"--export": str(tmp_path / "file")}))
    assert "--export" in line
    assert "not a directory" in line


def test_export_that_may_not_be_read(options: dict[str, str], other_user: tuple[str, ...]) -> None:
    Path(options["--export"]).chmod(0o700)
    result = run("serve", *flat(options), prefix=other_user)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "--export" in line
    assert "cannot be read" in line


def test_socket_path_in_use(options: dict[str, str]) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(options["--socket-path"])
        sock.listen()
        line = refusal("serve", *flat(options))
    assert "--socket-path" in line
    assert "in use" in line


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_socket_path_that_is_something_else(options: dict[str, str], kind: str) -> None:
    path = Path(options["--socket-path"])
    match kind:
        case "file":
            path.write_text("precious")
        case "directory":
            path.mkdir()
        case "link":
            path.symlink_to("precious")
    line = refusal("serve", *flat(options))
    assert "--socket-path" in line
    assert os.path.lexists(path)
    if kind == "file":
        assert path.read_text() == "precious"


@pytest.mark.parametrize("kind", [socket.AF_INET, None])
def test_descriptor_that_is_no_unix_socket(options: dict[str, str], kind: int | None) -> None:
    del options["--socket-path"]
    with socket.socket(kind if kind is not None else socket.AF_INET) as sock:
        read, write = os.pipe()
        fd = read if kind is None else sock.fileno()
        result = subprocess.run(
            [sys.executable, "-m", "ninepd", "serve", *flat(options), "--fd", str(fd)],
            capture_output=True,
            text=True,
            timeout=10,
            pass_fds=[fd],
        )
        os.close(read)
        os.close(write)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "--fd" in result.stderr


def test_datagram_socket(options: dict[str, str]) -> None:
    """It can neither listen nor be connected as a stream: refused, not found out later."""
    del options["--socket-path"]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        result = subprocess.run(
            [sys.executable, "-m", "ninepd", "serve", *flat(options), "--fd", str(ours.fileno())],
            capture_output=True,
            text=True,
            timeout=10,
            pass_fds=[ours.fileno()],
        )
    assert result.returncode == 2
    assert "--fd" in result.stderr


def test_stream_socket_that_neither_listens_nor_is_connected(options: dict[str, str]) -> None:
    del options["--socket-path"]
    with socket.socket(socket.AF_UNIX) as sock:
        result = subprocess.run(
            [sys.executable, "-m", "ninepd", "serve", *flat(options), "--fd", str(sock.fileno())],
            capture_output=True,
            text=True,
            timeout=10,
            pass_fds=[sock.fileno()],
        )
    assert result.returncode == 2
    assert "--fd" in result.stderr


def test_config_and_options_at_once(options: dict[str, str], tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text(f'[[export]]\nexport = "{tmp_path}"\ntag = "x"\nsocket-path = "/x"\n')
    assert "--config" in refusal("serve", "--config", config, *flat(options))


@pytest.mark.parametrize(
    "more",
    [
        ["--readonly"],
        ["--socket-path", "/x"],
        ["--security-model", "none"],
        ["--msize-max", "8192"],
    ],
)
def test_option_that_a_config_file_would_make_void(tmp_path: Path, more: list[str]) -> None:
    """Nothing that the user asks for is ignored in silence, least of all --readonly."""
    config = tmp_path / "c.toml"
    config.write_text(f'[[export]]\nexport = "{tmp_path}"\ntag = "x"\nsocket-path = "/nowhere/s"\n')
    line = refusal("serve", "--config", config, *more)
    assert more[0] in line or "--config" in line
    assert "/nowhere" not in line


def test_bad_config_is_one_line(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    for text in ("[[export", "[[export]]\ncolour = 1\n", "", "[[export]]\ntag = 1\n"):
        config.write_text(text)
        assert "--config" in refusal("serve", "--config", config)


@pytest.mark.parametrize(
    ("line", "place"),
    [
        ("socket-path = '/nowhere/s'", "line 6 (export 2): --socket-path: /nowhere/s"),
        ("fd = 9", "line 6 (export 2): --fd: descriptor 9 is not open"),
    ],
)
def test_what_turns_out_when_it_starts_has_its_place(
    tmp_path: Path, export: Path, line: str, place: str
) -> None:
    config = tmp_path / "c.toml"
    config.write_text(
        f"[[export]]\ntag = 'x'\nsocket-path = '{tmp_path}/s'\nexport = '{export}'\n"
        f"[[export]]\n{line}\ntag = 't'\nexport = '{export}'\n"
    )
    assert refusal("serve", "--config", config).startswith(f"--config: {config}, {place}")


def test_daemon_options_go_before_the_file(tmp_path: Path, export: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text(
        "log-level = 'error'\nlog-format = 'json'\n"
        f"[[export]]\nexport = '{export}'\ntag = 't'\nsocket-path = '{tmp_path}/s'\n"
    )

    def log(*options: str, env: dict[str, str] | None = None) -> str:
        readiness = Readiness()
        process = subprocess.Popen(
            [sys.executable, "-m", "ninepd", "serve", "--config", config, *options],
            env=os.environ | {"NOTIFY_SOCKET": readiness.address} | (env or {}),
            stderr=subprocess.PIPE,
            text=True,
        )
        assert readiness.wait(process.pid)
        process.terminate()
        _, log = process.communicate(timeout=20)
        readiness.close()
        return log

    assert log() == ""
    assert '"message": "serving' in log("-v")
    text = log("--log-level", "info", "--log-format", "text")
    assert text.startswith("ninepd: serving") or "\nninepd: serving" in text
    assert "serving" in log(env={"NINEPD_LOG_LEVEL": "info"})


@pytest.mark.parametrize("arguments", [["fly"], ["serve", "extra"], ["serve", "--tag"]])
def test_words_that_make_no_sense(arguments: list[str]) -> None:
    refusal(*arguments)


def test_no_command_at_all() -> None:
    result = run()
    assert result.returncode in {0, 2}
    assert "serve" in result.stdout + result.stderr


# Environment


def test_environment_gives_options(tmp_path: Path, options: dict[str, str]) -> None:
    env = {
        "NINEPD_" + name.strip("-").replace("-", "_").upper(): value
        for name, value in options.items()
    }
    assert "NINEPD_SOCKET_PATH" in env
    assert "'mapped'" in refusal("serve", env=env | {"NINEPD_SECURITY_MODEL": "mapped"})
    assert "--msize-max" in refusal("serve", env=env | {"NINEPD_MSIZE_MAX": "1"})
    assert "--allow-uid: -1 is" in refusal("serve", env=env | {"NINEPD_ALLOW_UID": "0 -1"})
    assert "does not exist" in refusal("serve", "--export", "/nowhere", env=env)
    assert "'loud'" in refusal("serve", env=env | {"NINEPD_LOG_LEVEL": "loud"})
    assert "'xml'" in refusal("serve", env=env | {"NINEPD_LOG_FORMAT": "xml"})


@pytest.mark.parametrize("value", ["1", "true"])
def test_environment_gives_flags(
    tmp_path: Path, export: Path, options: dict[str, str], value: str
) -> None:
    readiness = Readiness()
    process = subprocess.Popen(
        [sys.executable, "-m", "ninepd", "serve", *flat(options)],
        env=os.environ
        | {
            "NOTIFY_SOCKET": readiness.address,
            "NINEPD_READONLY": value,
            "NINEPD_ONCE": value,
        },
    )
    try:
        assert readiness.wait(process.pid)
        with Client(options["--socket-path"]) as client:
            client.attach()
            with pytest.raises(OSError, match="Read-only"):
                client.create(0, 1, b"f")
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        readiness.close()


def test_bad_environment_is_refused_like_an_option(options: dict[str, str]) -> None:
    assert "msize-max" in refusal("serve", *flat(options), env={"NINEPD_MSIZE_MAX": "x"}).lower()


def test_environment_gives_a_config_file(tmp_path: Path, options: dict[str, str]) -> None:
    env = {"NINEPD_CONFIG": "/nowhere/c.toml"}
    assert "/nowhere/c.toml" in refusal("serve", env=env)
    assert "/nowhere/c.toml" in refusal("qemu-args", env=env)
    assert "--config" in refusal("serve", *flat(options), env=env)


# qemu-args


def test_qemu_args_for_one_export() -> None:
    result = run("qemu-args", "--socket-path", "/run/a,b", "--tag", "home")
    assert (result.returncode, result.stderr) == (0, "")
    words = shlex.split(result.stdout)
    assert "memory-backend-memfd,id=mem,size=1G,share=on" in words
    assert "q35,memory-backend=mem" in words
    assert "socket,id=ninepd0,path=/run/a,,b" in words
    (device,) = [word for word in words if word.startswith("vhost-user")]
    assert device.split(",") == [
        "vhost-user-test-device-pci",
        "chardev=ninepd0",
        "virtio-id=9",
        "num_vqs=1",
        "vq_size=128",
        "config_size=6",
    ]


def test_qemu_args_for_two_exports(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text(
        "".join(
            f'[[export]]\nexport = "{tmp_path}"\ntag = "{tag}"\nsocket-path = "/run/{tag}"\n'
            for tag in ("a", "longer")
        )
    )
    result = run("qemu-args", "--config", config, "--memory", "2G")
    words = shlex.split(result.stdout)
    assert words.count("-chardev") == words.count("-device") == 2
    assert words.count("-object") == 1
    assert sum("size=2G" in word for word in words) == 1
    sizes = [word.rpartition("config_size=")[2] for word in words if "config_size" in word]
    assert sizes == ["3", "8"]
    assert "socket,id=ninepd0,path=/run/a" in words
    assert "socket,id=ninepd1,path=/run/longer" in words


def test_qemu_args_for_microvm(tmp_path: Path) -> None:
    result = run("qemu-args", "--socket-path", "/run/s", "--tag", "t", "--machine", "microvm")
    words = shlex.split(result.stdout)
    assert any(word.startswith("vhost-user-test-device,") for word in words)
    assert words.count("virtio-mmio.force-legacy=false") == 1
    assert "microvm,memory-backend=mem" in words


@pytest.mark.parametrize("machine", ["q35,accel=kvm", "pc", "virt", "microvm,pic=off"])
def test_qemu_args_keep_machine_options(machine: str) -> None:
    result = run("qemu-args", "--socket-path", "/s", "--tag", "t", "--machine", machine)
    assert f"{machine},memory-backend=mem" in shlex.split(result.stdout)


@pytest.mark.parametrize(
    ("machine", "device"),
    [
        ("pc-q35-10.2", "vhost-user-test-device-pci,"),
        ("pc-i440fx-10.2,accel=kvm", "vhost-user-test-device-pci,"),
        ("virt-10.2", "vhost-user-test-device-pci,"),
    ],
)
def test_qemu_args_know_versioned_machines(machine: str, device: str) -> None:
    result = run("qemu-args", "--socket-path", "/s", "--tag", "t", "--machine", machine)
    words = shlex.split(result.stdout)
    assert f"{machine},memory-backend=mem" in words
    assert any(word.startswith(device) for word in words)


@pytest.mark.parametrize(
    ("memory", "both"), [("4096", "4096M"), ("512m", "512m"), ("1.5G", "1.5G"), ("64K", "64K")]
)
def test_qemu_args_name_one_size(memory: str, both: str) -> None:
    """A number alone means MiB to -m and bytes to the memory backend."""
    result = run("qemu-args", "--socket-path", "/s", "--tag", "t", "--memory", memory)
    words = shlex.split(result.stdout)
    assert words[words.index("-m") + 1] == both
    assert f"memory-backend-memfd,id=mem,size={both},share=on" in words


@pytest.mark.parametrize("memory", ["", "much", "-1", "4 G", "4G,slots=2", "4GB"])
def test_qemu_args_refuse_what_is_no_size(memory: str) -> None:
    line = refusal("qemu-args", "--socket-path", "/s", "--tag", "t", "--memory", memory)
    assert line.startswith("--memory: ")


@pytest.mark.parametrize("reader", ["eval", "xargs"])
def test_qemu_args_survive_a_shell(reader: str) -> None:
    """With blanks, commas, quotes and dollars in the path."""
    path = '/run/a b,c\'s "$HOME".sock'
    result = run("qemu-args", "--socket-path", path, "--tag", "t")
    show = f"{sys.executable} -c 'import sys; print(*sys.argv[1:], sep=chr(10))'"
    script = {"eval": 'eval "$SHOW $ARGS"', "xargs": 'printf %s "$ARGS" | eval "xargs $SHOW"'}
    shown = subprocess.run(
        ["sh", "-c", script[reader]],
        capture_output=True,
        text=True,
        timeout=10,
        env={**os.environ, "SHOW": show, "ARGS": result.stdout},
    )
    words = shown.stdout.splitlines()
    assert words == shlex.split(result.stdout)
    assert "socket,id=ninepd0,path=" + path.replace(",", ",,") in words


def test_qemu_args_refusals(tmp_path: Path) -> None:
    assert "--socket-path" in refusal("qemu-args", "--tag", "t")
    assert "--tag" in refusal("qemu-args", "--socket-path", "/s")
    assert "--machine" in refusal(
        "qemu-args", "--socket-path", "/s", "--tag", "t", "--machine", "toaster"
    )
    assert "--tag" in refusal("qemu-args", "--socket-path", "/s", "--tag", "t" * 255)
    assert "--tag" in refusal("qemu-args", "--socket-path", "/s", "--tag", "")
    config = tmp_path / "c.toml"
    config.write_text(f'[[export]]\nexport = "{tmp_path}"\ntag = "x"\nfd = 0\n')
    assert "--fd" in refusal("qemu-args", "--config", config)


def test_demo_of_what_is_no_directory(tmp_path: Path) -> None:
    assert "not a directory" in refusal("demo", tmp_path / "missing")

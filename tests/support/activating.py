"""As systemd starts a daemon: with sockets that listen already, from descriptor 3 on."""

import sys

_LAUNCHER = """
import fcntl, os, socket, sys
end = sys.argv.index("--")
names = []
for number, argument in enumerate(sys.argv[1:end]):
    name, _, path = argument.partition("=")
    kind, _, path = path.rpartition("@")
    sock = socket.socket(socket.AF_UNIX, getattr(socket, "SOCK_" + (kind or "STREAM")))
    sock.bind(path)
    if not kind:
        sock.listen()
    os.dup2(fcntl.fcntl(sock.detach(), fcntl.F_DUPFD, 100), 3 + number)
    names.append(name)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(names))}
if any(names):
    os.environ["LISTEN_FDNAMES"] = ":".join(names)
os.execvp(sys.argv[end + 1], sys.argv[end + 1 :])
"""
"""Arguments: NAME=PATH for each socket, or NAME=DGRAM@PATH, then -- and the command."""


def activating(*sockets: str) -> tuple[str, ...]:
    """A launcher that listens on ``NAME=PATH``; without any name there are no names at all."""
    return (sys.executable, "-c", _LAUNCHER, *sockets, "--")

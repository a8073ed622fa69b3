"""Lends the user's terminal to a program in the guest."""

import contextlib
import os
import select
import signal
import socket
import sys
import termios
import tty
from collections.abc import Callable, Iterator

from .channel import Channel


def interact(channel: Channel, command: str = "") -> int:
    """Runs the command, or a login shell, on a terminal of the guest; returns its status."""
    size = _size()
    with _raw_terminal(), _wakeup() as (woken, wake):
        job = channel.start("tty", command.encode(), *size, sink=_show)
        job.status.add_done_callback(lambda _: wake())
        watched: list[int | socket.socket] = [0, woken]
        while not job.status.done():
            # An end of input is said again until it is heard: a shell that is only just setting its
            # terminal up throws away what came before.
            ready = select.select(watched, [], [], None if 0 in watched else 0.5)[0]
            if woken in ready:
                woken.recv(64)
                if _size() != size:
                    size = _size()
                    channel.send("win", job.ident, *size)
            if 0 in ready:
                data = os.read(0, 4096)
                if not data:
                    watched.remove(0)
                else:
                    channel.send("in", job.ident, data)
            if 0 not in watched:
                channel.send("in", job.ident, b"\x04")
        return job.status.result()


def _show(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _size() -> tuple[int, int]:
    try:
        size = os.get_terminal_size(0)
    except OSError:
        return 24, 80  # input comes from a file or a pipe
    return size.lines, size.columns


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    """Every key, ^C too, is the guest's."""
    if not os.isatty(0):
        yield
        return
    before = termios.tcgetattr(0)
    tty.setraw(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


@contextlib.contextmanager
def _wakeup() -> Iterator[tuple[socket.socket, Callable[[], None]]]:
    """Something to watch, and what wakes its watcher; so does a change of the terminal's size."""
    woken, waker = socket.socketpair()
    waker.setblocking(False)

    def wake(*_: object) -> None:
        with contextlib.suppress(OSError):  # full, so awake already; or nobody watches any more
            waker.send(b".")

    before = signal.signal(signal.SIGWINCH, wake)
    try:
        yield woken, wake
    finally:
        signal.signal(signal.SIGWINCH, before)
        woken.close()
        waker.close()

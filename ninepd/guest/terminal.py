"""Lends the user's terminal to a program in the guest."""

import contextlib
import os
import select
import signal
import sys
import termios
import tty
from collections.abc import Iterator
from types import FrameType

from .channel import Channel


def interact(channel: Channel, command: str = "") -> int:
    """Runs the command, or a login shell, on a terminal of the guest; returns its status."""
    size = _size()
    with _raw_terminal(), _wakeup() as (woken, wake):
        job = channel.start("tty", command.encode(), *size, sink=_show)
        job.status.add_done_callback(lambda _: os.write(wake, b"."))
        watched = [0, woken]
        while not job.status.done():
            ready = select.select(watched, [], [])[0]
            if woken in ready:
                os.read(woken, 64)
                if _size() != size:
                    size = _size()
                    channel.send("win", job.ident, *size)
            if 0 in ready:
                data = os.read(0, 4096)
                if not data:
                    watched.remove(0)
                channel.send("in", job.ident, data or b"\x04")
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
def _wakeup() -> Iterator[tuple[int, int]]:
    """A pipe that also becomes readable when the terminal's size changes."""
    woken, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def resized(_number: int, _frame: FrameType | None) -> None:
        os.write(wake, b".")

    before = signal.signal(signal.SIGWINCH, resized)
    try:
        yield woken, wake
    finally:
        signal.signal(signal.SIGWINCH, before)
        os.close(woken)
        os.close(wake)

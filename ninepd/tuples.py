"""Named tuples, made fast."""

from typing import Any, TypeVar

T = TypeVar("T", bound=tuple[Any, ...])


def made(kind: type[T], fields: tuple[Any, ...]) -> T:
    """A named tuple of as many fields as it has. Its own constructor runs in the interpreter, which
    takes longer than all the rest of decoding a message.
    """
    return tuple.__new__(kind, fields)

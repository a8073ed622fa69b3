"""Named tuples, made fast."""

from typing import Any, Final, TypeVar, cast

T = TypeVar("T", bound=tuple[Any, ...])

_new: Final[Any] = tuple.__new__


def made(kind: type[T], fields: tuple[Any, ...]) -> T:
    """A named tuple of as many fields as it has. Its own constructor runs in the interpreter, which
    takes longer than all the rest of decoding a message.
    """
    return cast("T", _new(kind, fields))

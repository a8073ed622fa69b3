"""How messages go to bytes and back, whatever their fields: made from a list of wire types.

A body of numbers only is one Struct call. Any other is a few steps: a run of numbers together with
the count that begins the string or list behind it. mypyc compiles this module, which cannot be done
to the declarations in messages.py, because it drops their annotations.
"""

from struct import Struct
from typing import Any, Final, NamedTuple, TypeAlias

from ninepd.errors import ProtocolError
from ninepd.p9.limits import MAX_WALK
from ninepd.tuples import made

Buffer: TypeAlias = bytes | bytearray | memoryview


class Qid(NamedTuple):
    """What the server calls one file: type bits, version of its content, unique path number."""

    type: int
    version: int
    path: int


HEADER: Final = Struct("<IBH")
HEADER_SIZE: Final = 7
QID: Final = Struct("<BIQ")
_pack_qid: Final = QID.pack
_QID_KIND: Final = "BIQ"

STRING: Final = "string"
NAMES: Final = "names"
QIDS: Final = "qids"
VARIABLE: Final = (STRING, NAMES, QIDS)


class Codec:
    """How one message class goes to bytes and back. Numbers are those of struct's format."""

    def __init__(self, message: Any, number: int, kinds: list[str]) -> None:
        """``kinds``: for each field a letter of struct, "BIQ" for a qid, or one of VARIABLE."""
        self.message = message
        self.number = number
        self.count = len(kinds)
        self.required = self.count - len(message._field_defaults)
        self.size = sum([2 if kind in VARIABLE else Struct("<" + kind).size for kind in kinds])
        """Bytes of the shortest body: strings and lists empty, optional fields there."""

    def decode(self, buffer: Buffer, start: int, end: int) -> Any:
        """The message whose body stands there; raises ProtocolError."""
        raise NotImplementedError

    def encode(self, value: Any) -> bytes:
        """The bytes of a message's body."""
        raise NotImplementedError


class FixedCodec(Codec):
    """Of a body without strings and lists."""

    def __init__(self, message: Any, number: int, kinds: list[str]) -> None:
        super().__init__(message, number, kinds)
        layout = "".join(kinds)
        self._qid = kinds.index(_QID_KIND) if _QID_KIND in kinds else -1
        fields = Struct("<" + layout)
        self._unpack_from = fields.unpack_from
        self._pack = fields.pack
        self._pack_into = fields.pack_into
        self._least = Struct("<" + layout[: len(layout) - len(message._field_defaults)])

    def decode(self, buffer: Buffer, start: int, end: int) -> Any:
        if end - start < self.size:
            if end - start == self._least.size:
                return self.message(*self._least.unpack_from(buffer, start))
            raise ProtocolError(f"{self.message.__name__} is {self.size - (end - start)} short")
        values: tuple[Any, ...] = self._unpack_from(buffer, start)
        at = self._qid
        if at >= 0:
            values = (*values[:at], made(Qid, values[at : at + 3]), *values[at + 3 :])
        return made(self.message, values)

    def _flat(self, value: Any) -> Any:
        at = self._qid
        return value if at < 0 else (*value[:at], *value[at], *value[at + 1 :])

    def encode(self, value: Any) -> bytes:
        return self._pack(*self._flat(value))

    def place(self, buffer: memoryview, at: int, value: Any) -> None:
        """Write the body of a message."""
        if self.size:
            self._pack_into(buffer, at, *self._flat(value))


class _Step:
    """A run of numbers, and the variable field behind it if ``kind`` names one."""

    def __init__(self, layout: str, kind: str) -> None:
        self.width = len(layout)
        self.kind = kind
        fields = Struct("<" + layout + ("H" if kind else ""))
        self.size: int = fields.size
        self.unpack_from = fields.unpack_from
        self.pack = fields.pack


class VariableCodec(Codec):
    """Of a body with strings or lists."""

    def __init__(self, message: Any, number: int, kinds: list[str]) -> None:
        super().__init__(message, number, kinds)
        self._steps: list[_Step] = []
        run = ""
        for at, kind in enumerate(kinds):
            if at == self.required and run:  # a message may end here
                self._steps.append(_Step(run, ""))
                run = ""
            if kind in VARIABLE:
                self._steps.append(_Step(run, kind))
                run = ""
            else:
                run += kind
        if run:
            self._steps.append(_Step(run, ""))

    def decode(self, buffer: Buffer, start: int, end: int) -> Any:
        # Bytes, because slices of a memoryview cost twice as much.
        data = bytes(buffer[start:end])
        at, end = 0, len(data)
        values: list[Any] = []
        for step in self._steps:
            if at == end and len(values) == self.required:
                break
            stop = at + step.size
            if stop > end:
                raise ProtocolError(f"{self.message.__name__} is cut short")
            values.extend(step.unpack_from(data, at))
            at = stop
            if not step.kind:
                continue
            count: int = values.pop()
            if step.kind == STRING:
                stop = at + count
                if stop > end:
                    raise ProtocolError("a string runs past the end of the message")
                values.append(data[at:stop])
                at = stop
            elif step.kind == NAMES:
                names, at = _names(data, at, end, count)
                values.append(names)
            else:
                stop = at + count * int(QID.size)
                if stop > end:
                    raise ProtocolError("the qids run past the end of the message")
                values.append(tuple([made(Qid, qid) for qid in QID.iter_unpack(data[at:stop])]))
                at = stop
        if len(values) < self.count:  # what may be missing
            return self.message(*values)
        return made(self.message, tuple(values))

    def encode(self, value: Any) -> bytes:
        parts: list[bytes] = []
        at = 0
        for step in self._steps:
            stop = at + step.width
            numbers = value[at:stop]
            at = stop
            if not step.kind:
                parts.append(step.pack(*numbers))
                continue
            field = value[at]
            at += 1
            parts.append(step.pack(*numbers, len(field)))
            if step.kind == STRING:
                parts.append(field)
            elif step.kind == NAMES:
                parts.extend([len(name).to_bytes(2, "little") + name for name in field])
            else:
                parts.extend([_pack_qid(kind, version, path) for kind, version, path in field])
        return b"".join(parts)


def _names(data: bytes, at: int, end: int, count: int) -> tuple[tuple[bytes, ...], int]:
    if count > MAX_WALK:
        raise ProtocolError(f"{count} names in one walk, {MAX_WALK} are allowed")
    names: list[bytes] = []
    for _ in range(count):
        start = at + 2
        if start > end:
            raise ProtocolError("the message ends inside a string length")
        at = start + (data[start - 2] | data[start - 1] << 8)
        if at > end:
            raise ProtocolError("a string runs past the end of the message")
        names.append(data[start:at])
    return tuple(names), at

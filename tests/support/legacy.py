"""9P2000.u and 9P2000, as a client speaks them."""

from ninepd.p9.messages import NOFID, Qid, Tattach, Tstat, Tversion
from ninepd.p9.stat import UNTOUCHED_32, UNTOUCHED_64, LegacyStat, decode_stat
from tests.support.client import ROOT, Client

NOTHING = LegacyStat(
    Qid(0xFF, UNTOUCHED_32, UNTOUCHED_64), UNTOUCHED_32, UNTOUCHED_32, UNTOUCHED_32,
    UNTOUCHED_64, b"", b"", b"", b"",
)  # fmt: skip
DIALECTS = [b"9P2000.u", b"9P2000"]


def attach(client: Client, version: bytes, uname: bytes = b"", uid: int = 0) -> None:
    assert client.rpc(Tversion(8192, version)).version == version
    client.rpc(Tattach(ROOT, NOFID, uname, b"", uid))


def stat_of(client: Client, fid: int, extended: bool = True) -> LegacyStat:
    return decode_stat(client.rpc(Tstat(fid)).stat, extended)

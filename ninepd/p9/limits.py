"""Bounds of the protocol."""

from typing import Final

MIN_MSIZE: Final = 4096
"""Linux refuses to mount below this (net/9p/client.c, p9_client_version)."""
MAX_WALK: Final = 16
"""Names in one Twalk (walk(5))."""

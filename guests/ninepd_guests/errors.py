"""What can go wrong around a guest; the text is a sentence for the person at the terminal."""


class GuestError(Exception):
    """A guest, or the tools to make one, failed; the text says how and what to do."""


class GuestTimeout(GuestError):
    """Something in the guest took longer than its limit."""

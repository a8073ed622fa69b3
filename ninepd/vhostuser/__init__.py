"""The vhost-user protocol without I/O.

``messages`` is the wire, ``state`` is what the guest relies on, ``session`` moves it.
"""

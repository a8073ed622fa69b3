"""The control tree and the metrics: what an administrator can see of a running daemon.

    counters    written by the processes of the exports into shared memory, read here (stats.py)
    trace       messages, which the process of an export tells as long as somebody follows
    questions   what only the process of an export knows: asked through a socket, in bounded pieces
    tree        files of both, over 9P2000 on a unix socket; metrics over HTTP as well

A process of its own serves it, which holds nothing of the exports and can reach nothing. Packages
that only it needs are loaded by ``process``, which only a supervisor imports who was asked for it.
"""

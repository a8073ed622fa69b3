#!/usr/bin/python3 -I
"""The program by whose name this is called, with Python packages of its own before Debian's."""

import os
import sys

sys.path.insert(0, "/usr/lib/ninepd")

from ninepd import cli

if os.path.basename(sys.argv[0]) == "vhost-user-9p":
    cli.vhost_user_9p()
cli.main()

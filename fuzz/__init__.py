"""Inputs that machines make up, and what must hold whatever they are: docs/fuzzing.md."""

import os

os.environ["NINEPD_CHECKS"] = "1"  # read when ninepd is imported, and inherited by daemons

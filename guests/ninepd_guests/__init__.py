"""Throw-away Linux guests for the demo and the tests: see ``boot`` and ``machine``."""

"""Drives a harness in Python by coverage: ``python -m fuzz.guide NAME [libFuzzer argument...]``.

The modules of ninepd must be interpreted ones, for it is their byte code that is counted: see
``build.interpreted_tree``.
"""

import sys
from importlib import import_module

import atheris


def main() -> None:
    name = sys.argv.pop(1)
    with atheris.instrument_imports(include=["ninepd"]):
        harness = import_module(f"fuzz.{name}")

    def mutator(data: bytes, max_size: int, seed: int) -> bytes:
        mutated: bytes = harness.mutator(data, max_size, seed, atheris.Mutate)
        return mutated

    atheris.Setup(sys.argv, harness.one_input, custom_mutator=mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

"""Drives ``live``: ``python -m fuzz.soak SECONDS``. A case that brings a new answer is kept.

New is a pair of a request's type and what it was answered with: that is all that is seen of the
daemon's inside from here.
"""

import sys
import tempfile
import time
from pathlib import Path
from random import Random, SystemRandom
from statistics import quantiles

from .harnesses import CRASHES, HARNESSES
from .live import Feature, Live
from .traffic import join, mutated, parse


def main() -> int:
    seconds = float(sys.argv[1])
    seed = SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    harness = HARNESSES["live"]
    folders = (harness.corpus, harness.found)
    cases = [parse(path.read_bytes()) for folder in folders for path in sorted(folder.glob("*"))]
    harness.found.mkdir(parents=True, exist_ok=True)
    rng = Random(seed)
    seen: set[Feature] = set()
    count = 0
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, Live(Path(folder)) as live:
        for case in cases:
            seen |= live.run(case)
        print(f"INITED cov: {len(seen)}", flush=True)
        kept = 0
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            case = mutated(rng, rng.choice(cases), rng.choice(cases))
            try:
                features = live.run(case)
            except Exception:
                CRASHES.mkdir(parents=True, exist_ok=True)
                (CRASHES / f"live-{seed}-{count}").write_bytes(join(case))
                raise
            finally:
                count += 1
            if not features <= seen:
                seen |= features
                cases.append(case)
                (harness.found / f"{seed}-{count}").write_bytes(join(case))
                kept += 1
        live.inspect()
        print(f"DONE cov: {len(seen)}")
        print(f"stat::number_of_executed_units: {count}")
        print(f"stat::new_units_added: {kept}")
        if len(live.latencies) > 1:
            median, late = (quantiles(live.latencies, n=100)[at] * 1e6 for at in (49, 98))
            print(
                f"note: {live.requests} requests; a read of 16 KiB from the other export took "
                f"{median:.0f} us, one in a hundred more than {late:.0f} us"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Random calls of adopted Triton kernels against Triton itself: `scripts/fuzz_adopted.py [CALLS]`.

Dtypes, alignments, strides, empty tensors, integers at the edges of 16, 32 and 64 bits, None, floats that are not finite,
options, constants that are equal and not the same. Each call must return the object that Triton compiled for its own key of
that call; one in seven is made by Triton too, and compared parameter by parameter as it reaches the driver. On the CPU, with
the null driver and Triton's real compiler and launcher over a libcuda that records. Exits with 1 if any call is wrong; a seed
gives them again.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))

import adopted_random
import torch
import triton
import triton_stub

SHOWN = 20  # wrong calls that are printed


def main() -> int:
    """Prints a line a kernel and the sums."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calls", nargs="?", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", type=int, default=30, help="of calls of a kernel with many arguments; each is compiled")
    parser.add_argument("--json", type=Path, help="write the counts here")
    given = parser.parse_args()
    began = time.monotonic()
    with triton_stub.installed() as stub:
        made = adopted_random.kernels_of(adopted_random.ALL)
        tally = adopted_random.check(stub, made, random.Random(given.seed), given.calls, given.kinds)
    for name, counts in sorted(tally.by_kernel.items()):
        print(f"{name:24} {dict(counts)}")
    sums = {
        "kernels": len(made), "calls": tally.calls, "from C++": tally.served, "compared": tally.compared,
        "refused, as Triton does": tally.refused, "of no blocks": tally.empty, "wrong": len(tally.wrong),
    }  # fmt: skip
    print("  ".join(f"{name}: {count}" for name, count in sums.items()), f"in {time.monotonic() - began:.0f} s")
    for each in tally.wrong[:SHOWN]:
        print(f"wrong (seed {given.seed}): {each}")
    if given.json:
        versions = {"triton": triton.__version__, "torch": torch.__version__, "python": sys.version.split()[0]}
        by_kernel = {name: dict(counts) for name, counts in sorted(tally.by_kernel.items())}
        given.json.write_text(json.dumps({**versions, "seed": given.seed, **sums, "by kernel": by_kernel}, indent=1) + "\n")
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())

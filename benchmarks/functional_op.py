"""What returning a tensor costs over writing one that is given: host time of a call, out-variant and functional, in one run.

    python benchmarks/functional_op.py [--device cpu] [--json FILE]

The op squares [16, 256] in float16; its kernel is Helion's and allocates its result (tests/support/returned_square). On a GPU
the calls are made in batches between synchronizations, as in `hdispatch bench dispatch`; on the CPU the null driver serves.
torch's own `empty_like` and a Helion call stand beside them, and what the result costs by itself, from a C loop: torch's
allocator alone (malloc and free), the tensor around it, the Python object around that.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hdispatch
import torch
from hdispatch import _C
from hdispatch.bench.machine import describe
from hdispatch.compile import build

#: Helion's call is timed, not its choice of a config, which takes minutes; read when Helion is imported.
os.environ.setdefault("HELION_AUTOTUNE_EFFORT", "none")
NAME = "returned_square"
ROUNDS, CALLS = 60, 200
STAGES = ("allocator", "tensor", "wrapped")


def measure(paths: dict[str, Callable[[], object]], on_gpu: bool) -> dict[str, float]:
    """Median ns of a call by path; every round has all of them, in random order."""
    found: dict[str, list[float]] = {name: [] for name in paths}
    order = list(paths)
    for call in paths.values():
        call()
    gc.disable()
    for _ in range(ROUNDS):
        random.shuffle(order)
        for name in order:
            call = paths[name]
            if on_gpu:
                torch.cuda.synchronize()
            start = time.perf_counter_ns()
            for _ in range(CALLS):
                call()
            found[name].append((time.perf_counter_ns() - start) / CALLS)
    gc.enable()
    return {name: statistics.median(times) for name, times in found.items()}


def measure_result(like: torch.Tensor) -> dict[str, float]:
    """Median ns of making and dropping one result, by how much of it is made."""
    return {stage: statistics.median(_C.bench_empty_ns(like, stage, CALLS) for _ in range(ROUNDS)) for stage in STAGES}


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    on_gpu = given.device != "cpu"
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
    hdispatch.registry.define_package(NAME)
    with tempfile.TemporaryDirectory() as folder:
        build([NAME], "native" if on_gpu else "h200", Path(folder, "bundle"), cache=Path(folder, "cache"), extra=[NAME])
        hdispatch.load(Path(folder, "bundle"), driver="cuda" if on_gpu else "null")
    op: Any = hdispatch.ops.returned_square
    x = torch.randn(16, 256, device=given.device).half()
    out = torch.empty_like(x)
    paths: dict[str, Callable[[], object]] = {
        "out-variant": lambda: op.out(x, out),
        "functional": lambda: op(x),
        "functional, torch.ops….default": lambda: torch.ops.hdispatch.returned_square.default(x),
        "torch.empty_like": lambda: torch.empty_like(x),
    }
    if on_gpu:
        from returned_square.helion import KERNEL  # type: ignore[import-not-found]

        paths["helion"] = lambda: KERNEL(x)
    with hdispatch.strict():
        medians = measure(paths, on_gpu)
    result = measure_result(out)
    over = medians["functional"] - medians["out-variant"]
    for name, ns in medians.items():
        print(f"{name:32} {ns:9.0f} ns")
    for stage, ns in result.items():
        print(f"{'a result alone, ' + stage:32} {ns:9.0f} ns")
    print(f"{'functional over out-variant':32} {over:9.0f} ns (at most 600)")
    print(f"{'  beyond the allocator':32} {over - result['allocator']:9.0f} ns")
    if given.json:
        found = {"machine": describe(), "median_ns": medians, "result_ns": result, "over_ns": over}
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What returning a tensor costs over writing one that is given: host time of a call, out-variant and functional, in one run.

    python benchmarks/functional_op.py [--device cpu] [--json FILE]

The op squares [16, 256] in float16; its kernel is Helion's and allocates its result (tests/support/returned_square). On a GPU
the calls are made in batches between synchronizations, as in `hdispatch bench dispatch`; on the CPU the null driver serves.
torch's own `empty_like` and a Helion call stand beside them.

What a result costs by itself is measured from a C loop, made and dropped: torch's allocator alone (malloc and free), the tensor
around it, the Python object around that; in a loop of their own, and each after the out-variant's call, whose launch leaves
the caches to them. The last is the floor: no op that returns a tensor of torch's can cost less over one that writes into one
that is given. The functional op is measured in the same C loop.
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
#: ns over the out-variant: the target, and how far from the floor where that is more.
TARGET, NEAR = 600, 60


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


def measure_pieces(op: Any, x: torch.Tensor, out: torch.Tensor) -> dict[str, dict[str, float]]:
    """Median ns of a turn of a C loop: each piece of a result alone; over the out-variant's call the pieces, and the op."""
    given = {"nothing": (None, ()), "after a call": (op.out, (x, out))}
    turns: dict[tuple[str, str], tuple[Any, ...]] = {
        (where, stage): (stage, before, args) for where, (before, args) in given.items() for stage in ("nothing", *STAGES)
    }
    turns["functional", ""] = ("nothing", op, (x,))
    found: dict[tuple[str, str], list[float]] = {name: [] for name in turns}
    order = list(turns)
    gc.disable()
    for _ in range(ROUNDS):
        random.shuffle(order)
        for name in order:
            stage, before, args = turns[name]
            if x.is_cuda:
                torch.cuda.synchronize()
            found[name].append(_C.bench_empty_ns(out, stage, CALLS, before, args))
    gc.enable()
    medians = {name: statistics.median(times) for name, times in found.items()}
    call = medians["after a call", "nothing"]
    after = {stage: medians["after a call", stage] - call for stage in STAGES}
    return {
        "alone": {stage: medians["nothing", stage] for stage in STAGES},
        "after a call": after,
        "over the out-variant": {"floor": after["wrapped"], "functional": medians["functional", ""] - call},
    }


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
    into = op.out  # not looked up in each call
    x = torch.randn(16, 256, device=given.device).half()
    out = torch.empty_like(x)
    paths: dict[str, Callable[[], object]] = {
        "out-variant": lambda: into(x, out),
        "functional": lambda: op(x),
        "functional, torch.ops….default": lambda: torch.ops.hdispatch.returned_square.default(x),
        "torch.empty_like": lambda: torch.empty_like(x),
    }
    if on_gpu:
        from returned_square.helion import KERNEL  # type: ignore[import-not-found]

        paths["helion"] = lambda: KERNEL(x)
    with hdispatch.strict():
        medians = measure(paths, on_gpu)
        pieces = measure_pieces(op, x, out)
    over, floor = pieces["over the out-variant"]["functional"], pieces["over the out-variant"]["floor"]
    for name, ns in medians.items():
        print(f"{name:32} {ns:9.0f} ns")
    for where in ("alone", "after a call"):
        for stage, ns in pieces[where].items():
            print(f"{f'a result {where}, {stage}':32} {ns:9.0f} ns")
    is_near = over <= TARGET or over - floor <= NEAR
    print(f"{'over the out-variant, floor':32} {floor:9.0f} ns")
    print(
        f"{'over the out-variant, functional':32} {over:9.0f} ns  {'pass' if is_near else 'MISS'}: {TARGET}, or floor + {NEAR}"
    )
    print(f"{'  from Python':32} {medians['functional'] - medians['out-variant']:9.0f} ns")
    if given.json:
        found = {"machine": describe(torch.device("cuda", 0) if on_gpu else None), "median_ns": medians, "pieces_ns": pieces}
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

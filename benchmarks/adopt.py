"""Adopted kernels against Triton's and Helion's own launches and the bare driver call: host time per call, in one run.

Kernels of TritonBench's launch latency: 0, 19 and 58 arguments; and a Helion add, M fixed, cycling and never seen before. The
floor of each is its own cuLaunchKernelEx in a C loop; what a result costs after a launch (torch's allocator, the tensor around
it, the Python object around that, made and dropped) is measured beside them, and is part of a second floor of calls that
allocate. Every path in random order in every round; the ratios are of medians. No launch is more times faster than Triton's
than Triton's is slower than the floor: "most".

    python benchmarks/adopt.py [--rounds 30] [--json FILE]        needs a GPU, Triton and Helion
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hdispatch
import helion
import helion.language as hl
import torch
import triton
from hdispatch import _C
from hdispatch.bench import machine
from hdispatch.testing import host_timer

SUPPORT = str(Path(__file__).resolve().parents[1] / "tests" / "support")
CALLS = 60  # of a batch: the queue of launches holds them
#: kernel -> at most this many times the floor; all at least FASTER times as fast as Triton's own launch
TARGETS = {"0 arguments": 1.2, "19 arguments": 1.5, "58 arguments": 2.0, "helion add": 1.3, "helion add, out given": 1.3}
FASTER = 4.0


@helion.kernel(static_shapes=False, config=helion.Config(block_sizes=[32, 32]))
def add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A result that the call allocates."""
    out = torch.empty_like(x)
    for tile in hl.tile(x.size()):
        out[tile] = x[tile] + y[tile]
    return out


@helion.kernel(static_shapes=False, config=helion.Config(block_sizes=[32, 32]))
def add_out(out: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The same into a result that is given."""
    for tile in hl.tile(x.size()):
        out[tile] = x[tile] + y[tile]
    return out


def triton_kernels(device: str) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Each kernel (tests/support/adopted_kernels.py) with its arguments; integers above 1, which Triton would compile in."""
    if SUPPORT not in sys.path:
        sys.path.insert(0, SUPPORT)
    import adopted_kernels as kernels  # type: ignore[import-not-found]

    tensors = [torch.zeros(64, device=device) for _ in range(14)]
    return {
        "0 arguments": (kernels.nop, ()),
        "19 arguments": (kernels.nineteen, (*tensors[:5], *range(2, 11), *[32] * 5)),
        "58 arguments": (kernels.fifty_eight, (*tensors, *range(2, 28), *[32] * 18)),
    }


def entry(kernel: Any) -> Any:
    """What stands for an adopted kernel in C++."""
    return vars(kernel)["_hdispatch_adopted"]


def copy_of(kernel: Any) -> Any:
    """A kernel of its own, which is not adopted."""
    return triton.jit(kernel.fn)


def floor_batch(kernel: Any, args: tuple[Any, ...], synchronize: Callable[[], object]) -> host_timer.Batch:
    """The bare driver call of a kernel that has been launched."""

    def run() -> float:
        synchronize()
        ns = _C.bench_adopted_ns(entry(kernel), args, (1, 1, 1), CALLS)
        synchronize()
        return ns

    return run


class NeverSeen:
    """Arguments of Ms that no call has had, from 1,000 on; of all kinds that Triton compiles for."""

    def __init__(self, make: Callable[[int], tuple[Any, ...]]) -> None:
        self.make, self.next = make, 1000

    def __call__(self) -> list[tuple[Any, ...]]:
        """Of one batch."""
        self.next += CALLS
        return [self.make(self.next + i) for i in range(CALLS)]


def batches(device: str, driver: Any, synchronize: Callable[[], object]) -> dict[tuple[str, str, str], host_timer.Batch]:
    """(kernel, path, m) -> a batch."""
    made: dict[tuple[str, str, str], host_timer.Batch] = {}
    for name, (kernel, args) in triton_kernels(device).items():
        adopted = hdispatch.adopt(copy_of(kernel), driver=driver)
        for each in (kernel, adopted):
            each[(1,)](*args)
            each[(1,)](*args)
        for path, launched in (("Triton", kernel), ("adopted", adopted)):
            call = lambda *given, launched=launched: launched[(1,)](*given)  # noqa: E731
            made[name, path, "fixed"] = host_timer.call_batch(call, lambda args=args: [args] * CALLS, [args] * 10, synchronize)
        made[name, "floor", "fixed"] = floor_batch(adopted, args, synchronize)
    made |= helion_batches(device, driver, synchronize)
    return made


def helion_batches(device: str, driver: Any, synchronize: Callable[[], object]) -> dict[tuple[str, str, str], host_timer.Batch]:
    """Of the Helion kernels."""
    made: dict[tuple[str, str, str], host_timer.Batch] = {}

    def tensors(count: int) -> Callable[[int], tuple[Any, ...]]:
        memory = [torch.zeros(1 << 16, 64, device=device) for _ in range(count)]
        return lambda m: tuple(each[:m] for each in memory)

    for name, kernel, make in (("helion add", add, tensors(2)), ("helion add, out given", add_out, tensors(3))):
        ours = hdispatch.adopt(helion.Kernel(kernel.fn, configs=kernel.configs, settings=kernel.settings), driver=driver)
        for each in (kernel, ours):
            for m in (7, 7, 16, 16, 33, 33):
                each(*make(m))
        for path, called in (("Helion", kernel), ("adopted", ours)):
            arguments: dict[str, Callable[[], Sequence[tuple[Any, ...]]]] = {
                "fixed": lambda make=make: [make(17)] * CALLS,
                "cycling": lambda make=make: [make(m) for m in (2, 3, 7, 16)] * (CALLS // 4),
                "never seen": NeverSeen(make),
            }
            for kind, given in arguments.items():
                made[name, path, kind] = host_timer.call_batch(called, given, [make(17)] * 10, synchronize)
    return made


def summarize(samples: dict[Any, list[float]], result_ns: float) -> list[dict[str, Any]]:
    """A row of each path; ratios to the floor of its kernel (of Helion's, that of three tensors and no more).

    result_ns   what a result costs after a launch
    """
    found = {key: host_timer.summarize(values) for key, values in samples.items()}
    rows = []
    for (kernel, path, m), stats in found.items():
        floor = found.get((kernel, "floor", "fixed"), found["19 arguments", "floor", "fixed"])
        row = {"kernel": kernel, "path": path, "m": m, "median_ns": stats.median_ns, "q1_ns": stats.q1_ns, "q3_ns": stats.q3_ns}
        row["floor_ratio"] = stats.median_ns / floor.median_ns
        if path == "adopted":
            own = found[kernel, "Helion" if "helion" in kernel else "Triton", m].median_ns
            row["times_faster"], row["most_times_faster"] = own / stats.median_ns, own / floor.median_ns
            if kernel == "helion add":
                row["floor_with_result_ratio"] = stats.median_ns / (floor.median_ns + result_ns)
            row["verdict"] = "pass" if row["floor_ratio"] <= TARGETS[kernel] and row["times_faster"] >= FASTER else "MISS"
        rows.append(row)
    return rows


def measure_result(rounds: int, synchronize: Callable[[], object]) -> dict[str, float]:
    """Median ns of making and dropping one result of the Helion add after a launch, by how much of it is made."""
    args = tuple(torch.zeros(17, 64, device="cuda") for _ in range(3))
    launch = hdispatch.adopt(helion.Kernel(add_out.fn, configs=add_out.configs, settings=add_out.settings), driver="cuda")
    for _ in range(3):
        launch(*args)
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        for stage in ("nothing", "allocator", "tensor", "wrapped"):
            synchronize()
            found.setdefault(stage, []).append(_C.bench_empty_ns(args[0], stage, CALLS, launch, args))
    medians = {stage: statistics.median(times) for stage, times in found.items()}
    return {stage: ns - medians["nothing"] for stage, ns in medians.items() if stage != "nothing"}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="batches of each path")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    made = batches("cuda", "cuda", torch.cuda.synchronize)
    with host_timer.quiet():
        samples, failed = host_timer.interleave(made, options.rounds, random.Random(0))
        result_ns = measure_result(options.rounds, torch.cuda.synchronize)
    rows = summarize(samples, result_ns["wrapped"])
    print(
        f"{'kernel':<24}{'path':<10}{'M':<12}{'us':>8}{'x floor':>9}{'x faster':>10}{'most':>7}{'x with result':>15}  verdict"
    )
    for row in rows:
        faster, most, beside = (
            f"{row[name]:.{digits}f}" if name in row else ""
            for name, digits in (("times_faster", 1), ("most_times_faster", 1), ("floor_with_result_ratio", 2))
        )
        print(
            f"{row['kernel']:<24}{row['path']:<10}{row['m']:<12}{row['median_ns'] / 1000:>8.2f}{row['floor_ratio']:>9.2f}"
            f"{faster:>10}{most:>7}{beside:>15}  {row.get('verdict', '')}"
        )
    for stage, ns in result_ns.items():
        print(f"a result after a launch, {stage:<19}{ns / 1000:>8.2f}")
    for key, error in failed.items():
        print(f"failed: {key}: {error}")
    counted = {name: each for name, each in hdispatch.stats().items() if name.startswith("adopted ")}
    if options.json:
        result = {
            "machine": machine.describe(),
            "rows": rows,
            "result_ns": result_ns,
            "stats": counted,
            "failed": {str(k): str(e) for k, e in failed.items()},
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What the processes of the op benchmark do in place of compiling; functions of a module, as spawned processes need them."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

from benchmarks.ops import compiled
from benchmarks.ops.grid import Cell


def fails_at_2(cell: Cell) -> float:
    """Takes M seconds, it says."""
    if cell["m"] == 2:
        raise ValueError("cannot compile 2\nand more")
    return float(cell["m"])


def hangs_at_1(cell: Cell) -> float:
    if cell["m"] == 1:
        time.sleep(1000)
    return 0.0


def dies(_cell: Cell) -> float:
    os._exit(3)


def measure_once(lock: Path, spans: multiprocessing.Queue[tuple[float, float]]) -> None:
    """Makes Inductor's measurement take a while, and then measures as a compiler would."""
    from torch._inductor.runtime import benchmarking

    def benchmark_gpu() -> None:
        begin = time.monotonic()
        time.sleep(0.2)
        spans.put((begin, time.monotonic()))

    benchmarking.benchmarker.benchmark_gpu = benchmark_gpu
    compiled._take_turns(lock)
    benchmarking.benchmarker.benchmark_gpu()


def measured_in_turn(lock: Path, processes: int) -> list[tuple[float, float]]:
    """When the measurement of each process began and ended, in order."""
    spawn = multiprocessing.get_context("spawn")
    spans = spawn.Queue()
    started = [spawn.Process(target=measure_once, args=(lock, spans)) for _ in range(processes)]
    for process in started:
        process.start()
    found = [spans.get(timeout=300) for _ in started]
    for process in started:
        process.join()
    return sorted(found)

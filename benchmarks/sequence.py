"""Host time of a launch in a sequence: all layers of a decoder as one call, against the same ops called from Python.

Host time per launch, enqueue only, in ns: median and quartiles over rounds in random order. With --driver null (the default
where there is no GPU) everything but the driver call; with cuda also a C loop of bare launches, the floor.

    python benchmarks/sequence.py BUNDLE [--driver null|cuda] [--rows 1 8 32 128] [--layers 36] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import hdispatch
import torch
from hdispatch import _C
from hdispatch.bench import machine

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.decoder import Layers, Shape

ROUNDS, CALLS = 30, 4
FLOOR_OP = "rms_norm_dynamic_per_token_quant"


def timed(call: Callable[[], object], launches: int, synchronize: Callable[[], object]) -> float:
    """ns per launch of calls that the queue holds."""
    synchronize()
    begin = time.perf_counter_ns()
    for _ in range(CALLS):
        call()
    taken = time.perf_counter_ns() - begin
    synchronize()
    return taken / launches / CALLS


def paths(layers: Layers, m: int, driver: str) -> tuple[dict[str, Callable[[], float]], int]:
    """Name -> ns per launch, and the number of launches."""
    synchronize: Callable[[], object] = torch.cuda.synchronize if driver == "cuda" else lambda: None
    sequence = layers.sequence(f"layers, {m} rows", max_rows=max(m, 128))
    residual, positions = layers.inputs(m)
    others = [layers.inputs(m, seed) for seed in range(2)]
    single = layers.single(residual, positions)
    with hdispatch.strict():
        sequence(residual, positions)
        for op, arguments in single:
            op(*arguments)
    synchronize()
    launches, turn = len(single), [0]

    def ops_loop() -> None:
        for op, arguments in single:
            op(*arguments)

    def moved() -> None:
        turn[0] ^= 1
        sequence(*others[turn[0]])

    floor_op, floor_arguments = next((op, arguments) for op, arguments in single if op.name == FLOOR_OP)

    def floor() -> float:
        synchronize()
        ns: float = _C.bench_launch_ns(floor_op, floor_arguments, launches * CALLS, True)
        synchronize()
        return ns

    made = {
        "bare launches, C loop": floor,
        "sequence": lambda: timed(lambda: sequence(residual, positions), launches, synchronize),
        "sequence, slots that move": lambda: timed(moved, launches, synchronize),
        "hdispatch.ops from Python": lambda: timed(ops_loop, launches, synchronize),
    }
    return made, launches


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--driver", choices=("null", "cuda"), default="cuda" if torch.cuda.is_available() else "null")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    hdispatch.load(options.bundle, driver=options.driver)
    # Without a launch nobody reads the weights: one set will do.
    device, distinct = ("cuda", None) if options.driver == "cuda" else ("cpu", 1)
    layers = Layers(torch.device(device), Shape(layers=options.layers), distinct)
    found = []
    for m in options.rows:
        made, launches = paths(layers, m, options.driver)
        taken: dict[str, list[float]] = {name: [] for name in made}
        for _ in range(ROUNDS):
            for name in random.sample(list(made), len(made)):
                taken[name].append(made[name]())
        for name, each in taken.items():
            low, median, high = statistics.quantiles(each, n=4)
            above = median - statistics.median(taken["bare launches, C loop"])
            print(f"M {m:5}  {name:28}{median:9.1f} ns a launch ({low:.1f} to {high:.1f}), above bare launches {above:8.1f}")
            found.append({"M": m, "path": name, "launches": launches, "ns": median, "low": low, "high": high})
    if options.json:
        here = machine.describe(layers.device if options.driver == "cuda" else None)
        facts = {"machine": here, "driver": options.driver, "layers": options.layers, "paths": found}
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()

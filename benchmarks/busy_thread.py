"""Host time of a launch while another Python thread is busy: every door of hdispatch beside torch.add, in one run.

A launch gives the GIL away, so that a full launch queue stops nobody, and asks for it again. Prints for each path the
median and quartiles of single calls, alone and beside a thread that computes without a pause, and their ratio; the
verdict is "miss" for a door of hdispatch whose ratio is above torch.add's. `.default` and vLLM's own op are torch's doors.

    python benchmarks/busy_thread.py BUNDLE [--vllm-ops LIBRARY] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import hdispatch
import torch
from hdispatch.bench import machine

OP = "rms_norm_dynamic_per_token_quant"
#: The doors that are ours.
OURS = ("hdispatch.ops", "torch.ops.hdispatch", "torch.ops._C, overridden")
BATCH, ROUNDS = 60, 8


@contextmanager
def busy_thread():
    """A Python thread that never gives the GIL away by itself."""
    stop = False

    def work() -> None:
        count = 0
        while not stop:
            count += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop = True
        thread.join()


def single_calls(call: Callable[[], object]) -> list[int]:
    """ns of each call of a batch that the queue holds."""
    taken = []
    for _ in range(BATCH):
        begin = time.perf_counter_ns()
        call()
        taken.append(time.perf_counter_ns() - begin)
    torch.cuda.synchronize()
    return taken


def paths(vllm_ops: Path | None) -> dict[str, Callable[[], object]]:
    """Every path, by name."""
    spec = hdispatch.registry.spec(OP)
    variant = spec.variant("bfloat16+residual")
    args = spec.sample(variant, {"M": 16, "K": 4096}, torch.device("cuda"), torch.Generator("cuda").manual_seed(0))
    ours, packet = getattr(hdispatch.ops, OP), getattr(torch.ops.hdispatch, OP)
    x, y = torch.zeros(16, 4096, device="cuda"), torch.zeros(16, 4096, device="cuda")
    made: dict[str, Callable[[], object]] = {
        "torch.add": lambda: torch.add(x, y, out=x),
        "hdispatch.ops": lambda: ours(*args),
        "torch.ops.hdispatch": lambda: packet(*args),
        "torch.ops.hdispatch.default": lambda: packet.default(*args),
    }
    if vllm_ops:
        torch.ops.load_library(str(vllm_ops))
        theirs = getattr(torch.ops._C, OP)
        made["torch.ops._C"] = lambda: theirs.default(*args)

        def overridden() -> None:
            theirs(*args)

        made["torch.ops._C, overridden"] = overridden
    return made


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--vllm-ops", type=Path, help="vLLM's compiled ops")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    hdispatch.load(options.bundle)
    made = paths(options.vllm_ops)
    override = hdispatch.override_vllm_ops([OP]) if options.vllm_ops else None
    for call in made.values():
        single_calls(call)
    found: dict[tuple[str, bool], list[int]] = {(name, busy): [] for name in made for busy in (False, True)}
    order, shuffle = list(found), random.Random(0)
    for _ in range(ROUNDS):
        shuffle.shuffle(order)
        for name, busy in order:
            if busy:
                with busy_thread():
                    found[name, busy] += single_calls(made[name])
            else:
                found[name, busy] += single_calls(made[name])
    if override:
        override.undo()
    rows = []
    for name in made:
        alone, beside = (statistics.quantiles(found[name, busy], n=4) for busy in (False, True))
        rows.append({"path": name, "alone_ns": alone, "busy_ns": beside, "ratio": beside[1] / alone[1]})
    allowed = rows[0]["ratio"]
    print(f"{'path':30} {'alone, ns':>24} {'beside a busy thread':>24} {'ratio':>7}")
    for row in rows:
        row["verdict"] = "" if row["path"] not in OURS else "ok" if row["ratio"] <= allowed else "miss"
        quartiles = [" / ".join(f"{value:.0f}" for value in row[key]) for key in ("alone_ns", "busy_ns")]
        print(f"{row['path']:30} {quartiles[0]:>24} {quartiles[1]:>24} {row['ratio']:7.2f} {row['verdict']}")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine.describe(torch.device("cuda")), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

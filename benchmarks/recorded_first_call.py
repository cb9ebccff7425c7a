"""First calls of recorded keys in fresh processes with cold caches: ms on the host, from a bundle and as Triton makes them.

    python benchmarks/recorded_first_call.py [--processes 3] [--device cpu] [--json FILE]

Two kernels (tests/support/recorded_kernels.py), ten keys each: elements, alignments, dtypes; no key has been seen by the
process, and its compile caches are empty. A first process records, `hdispatch build --record` makes the bundle.

compiled           Triton as it is
recorded           after hdispatch.load of the bundle
recorded, adopted  the same with hdispatch.adopt()

Exits with 1 if a first call from the bundle takes longer than 2 ms, in the median of the processes. With --device cpu Triton's
own launcher calls a libcuda that records (tests/support/triton_stub.py): the host's part alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import hdispatch
from hdispatch import recorded
from hdispatch.bench import machine
from hdispatch.compile import build

SUPPORT = Path(__file__).resolve().parents[1] / "tests" / "support"
ARMS = ("compiled", "recorded", "recorded, adopted")
LIMIT_MS = 2.0


def run(arm: str, folder: Path, device: str) -> dict[str, Any]:
    """What one process shows: ms of each first call, and of `load`; with the arm "record" it records instead."""
    import recorded_kernels  # type: ignore[import-not-found]
    import torch

    torch.zeros(1, device=device)  # the process has a context, as a server has
    found: dict[str, Any] = {}
    compiled = count_compilations()
    if arm.startswith("recorded"):
        began = time.perf_counter()
        bundle = hdispatch.load(folder / "bundle", driver="cuda" if device == "cuda" else "null")
        if device == "cpu":
            recorded.serve(0, bundle._recorded)  # the stub's device is 0; the null driver's is none
        found["load_ms"] = 1e3 * (time.perf_counter() - began)
    if arm.endswith("adopted"):
        for kernel in (recorded_kernels.add, recorded_kernels.scale):
            hdispatch.adopt(kernel, driver="cuda" if device == "cuda" else "null")
    with hdispatch.record(folder / "recorded.jsonl") if arm == "record" else nullcontext():
        found["first_ms"] = recorded_kernels.run(device, check=device == "cuda")
    found["second_ms"] = recorded_kernels.run(device, check=device == "cuda")
    found["compiled"] = len(compiled)
    return found


def count_compilations() -> list[str]:
    """The names of kernels that Triton compiles from here on; the list grows."""
    from triton import knobs  # type: ignore[import-untyped]

    names: list[str] = []
    knobs.runtime.jit_post_compile_hook = lambda **given: names.append(str(given["fn"].name))
    return names


def run_child(arm: str, folder: Path, device: str) -> None:
    """Prints what `run` finds, on the device or on the stub of one."""
    if device == "cuda":
        print(json.dumps(run(arm, folder, device)))
        return
    import triton_stub  # type: ignore[import-not-found]

    with triton_stub.installed():
        print(json.dumps(run(arm, folder, device)))


def ask(arm: str, folder: Path, device: str) -> dict[str, Any]:
    """The same of a fresh process with cold caches."""
    cold = {name: tempfile.mkdtemp(dir=folder) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
    path = os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, "--child", arm, str(folder), "--device", device]
    done = subprocess.run(
        command, env={**os.environ, **cold, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one arm: each key's median of the processes, the longest of them, the first of the process, later calls."""
    keys = {key: statistics.median(each["first_ms"][key] for each in runs) for key in runs[0]["first_ms"]}
    return {
        "keys_ms": keys,
        "median_ms": statistics.median(keys.values()),
        "longest_ms": max(keys.values()),
        "first_of_process_ms": statistics.median(next(iter(each["first_ms"].values())) for each in runs),
        "later_ms": statistics.median(value for each in runs for value in each["second_ms"].values()),
        "load_ms": statistics.median(each.get("load_ms", 0.0) for each in runs),
        "compiled": max(each["compiled"] for each in runs),
    }


def main() -> int:
    """Record, build, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=3, help="of each arm")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        run_child(given.child[0], Path(given.child[1]), given.device)
        return 0
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        ask("record", folder, given.device)
        sys.path.insert(0, str(SUPPORT))
        report = build(
            [], "native" if given.device == "cuda" else "h100", folder / "bundle", cache=folder / "cache",
            record=[folder / "recorded.jsonl"],
        )  # fmt: skip
        assert not report.notes, report.notes
        arms = {arm: summarize([ask(arm, folder, given.device) for _ in range(given.processes)]) for arm in ARMS}
    print(f"{'ms on the host':20}{'median':>9}{'longest':>9}{'1st':>9}{'later':>9}{'load':>9}{'compiled':>10}")
    for arm, found in arms.items():
        figures = (found[name] for name in ("median_ms", "longest_ms", "first_of_process_ms", "later_ms", "load_ms"))
        print(f"{arm:20}" + "".join(f"{each:9.3f}" for each in figures) + f"{found['compiled']:10}")
    if given.json:
        given.json.write_text(json.dumps({"machine": machine.describe(), "arms": arms}, indent=1) + "\n")
    served = [found for arm, found in arms.items() if arm.startswith("recorded")]
    return 1 if any(found["longest_ms"] > LIMIT_MS or found["compiled"] for found in served) else 0


if __name__ == "__main__":
    sys.exit(main())

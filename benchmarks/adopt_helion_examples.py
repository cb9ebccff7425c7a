"""What `hdispatch.adopt` makes of the kernels of Helion's repository: served for every M, shape by shape, or the launch alone.

Each kernel runs in a process of its own, on the CPU, with the null driver and Triton's real compiler, and with Helion's
heuristics as on an H100. It is called at Ms that it has seen (fixed, cycling) and at Ms that it has not, and is counted by how
often C++ made the whole call or the launch. A kernel of static shapes is looked at twice: as its author wrote it, and with
`static_shapes=False`, which a user may set. Helion compiles a static kernel anew for every M, so that no M can be served from
another's compilation.

    git clone https://github.com/pytorch/helion DIR
    PYTHONPATH=tests/support python benchmarks/adopt_helion_examples.py DIR [--json FILE] [--only NAME]
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import random
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("HELION_AUTOTUNE_EFFORT", "none")  # its default configuration: nothing can be measured here

import hdispatch
import helion_stub
import torch
import triton_stub
from hdispatch.bench import machine
from hdispatch.testing import null

from benchmarks.helion_examples import EXAMPLES, Example

EVERY, SHAPES, LAUNCH, HELION, BROKEN = "every M", "shape by shape", "its launch alone", "Helion's", "does not run"
CLASSES = (EVERY, SHAPES, LAUNCH, HELION)
WAYS = ("static_shapes=False", "as written")
#: of those that run; issue of the feature
TARGETS = {"every M": 0.60, "at least the launch": 0.95}

#: every power of two up to 32 divides one of them and odd multiples of it: what Triton tells apart is then known
SEEN = (7, 9, 12, 16, 20, 24, 32, 33, 48, 64)
CYCLES = 3
UNSEEN, LARGEST = 20, 160
#: Choices of heuristics, times the powers of two that divide M: more are those of a kernel without heuristics, one for each M.
MOST_CHOICES = 70
#: the same of static kernels, which Helion compiles for seconds at each
SEEN_STATIC, UNSEEN_STATIC = (7, 16, 33), 3
SECONDS = 240


def unseen(example: Example) -> list[int]:
    """Ms that are not among those seen, the same in each run."""
    rng = random.Random(example.kernel)
    return rng.sample([m for m in range(2, LARGEST) if m not in SEEN], UNSEEN)


def seen_of(example: Example, kernel: Any) -> tuple[int, ...]:
    """Ms to warm up with: of an AOT kernel also some of each choice, which is a compilation of its own."""
    if kernel._key_fn is None:
        return SEEN
    new, kinds = unseen(example), dict[Any, int]()
    for m in range(2, LARGEST):
        if m not in new:
            kinds.setdefault((kernel._key_fn(*example.arguments(m)), min(m & -m, 32)), m)
    return tuple(dict.fromkeys((*SEEN, *kinds.values()))) if len(kinds) <= MOST_CHOICES else SEEN


class Calls:
    """Calls of one adopted kernel, counted by who made them."""

    def __init__(self, example: Example, kernel: Any, stub: triton_stub.Stub) -> None:
        self._example, self._kernel, self._stub = example, kernel, stub
        self._name = f"adopted {kernel.fn.__module__}.{kernel.fn.__qualname__}"

    def counts(self) -> dict[str, Any]:
        """hits and misses of the whole call."""
        found: dict[str, Any] = hdispatch.stats()[self._name]
        return found

    def make(self, ms: Sequence[int]) -> dict[str, int]:
        """How many calls of these Ms were made by C++ as a whole, and how many launches by C++ and by Triton."""
        made = Counter(calls=0, whole=0, launches=0, of_triton=0)
        for m in ms:
            arguments, hits, before = self._example.arguments(m), self.counts()["hits"], self._stub.launches
            with null.recording():
                self._kernel(*arguments)
                made["launches"] += len(null.launches())
            made["calls"] += 1
            made["whole"] += self.counts()["hits"] - hits
            made["of_triton"] += self._stub.launches - before
        return dict(made)


def classify(phases: dict[str, dict[str, int]]) -> str:
    """By the phases after the warm-up: `seen` and `unseen`."""
    seen, new = phases["seen"], phases["unseen"]
    if new["whole"] == new["calls"] and seen["whole"] == seen["calls"]:
        return EVERY
    if seen["whole"] == seen["calls"]:
        return SHAPES
    if seen["launches"] and not seen["of_triton"]:
        return LAUNCH
    return HELION


def look_at(example: Example, is_dynamic: bool) -> dict[str, Any]:
    """One kernel, in this process."""
    with triton_stub.installed() as stub, helion_stub.on_h100():
        try:
            kernel = getattr(importlib.import_module(example.module), example.kernel)
            written = kernel.settings.static_shapes
            if is_dynamic:
                kernel.settings.static_shapes = False
            kernel(*example.arguments(SEEN[0]))  # before it is adopted: does it run at all?
        except Exception as error:
            return {"class": BROKEN, "reason": f"{type(error).__name__}: {error}".splitlines()[0][:160]}
        is_static = kernel.settings.static_shapes
        seen, new = (SEEN_STATIC, unseen(example)[:UNSEEN_STATIC]) if is_static else (seen_of(example, kernel), unseen(example))
        hdispatch.adopt(kernel, driver="null")
        calls = Calls(example, kernel, stub)
        phases = {"warm-up": calls.make([m for m in seen for _ in range(2)])}
        phases["seen"] = calls.make(list(seen) * CYCLES)
        phases["unseen"] = calls.make(new)
        return {
            "class": classify(phases),
            "reason": reason(hdispatch.explain(kernel) or "", calls.counts()) or of_numbers(example),
            "static_shapes": written,
            "phases": phases,
            "misses": calls.counts()["misses"],
        }


def reason(explained: str, counts: dict[str, Any]) -> str:
    """Why it is not served for every M."""
    lines = explained.splitlines()
    said = [line.removeprefix("Helion's  ") for line in lines if line.startswith("Helion's")]
    said += [line.partition(": ")[2] for line in lines if line.startswith("served    calls of one shape")]
    others = [miss for miss in counts["misses"] if miss != "first call of a key"]
    return next(iter([*said, *others]), "")


def of_numbers(example: Example) -> str:
    """Whether numbers among the arguments, which are part of the key, differ from M to M."""
    few, many = ([each for each in example.arguments(m) if not isinstance(each, torch.Tensor)] for m in SEEN[:2])
    return "" if few == many else "M is a number among its arguments too"


def isolated(example: Example, is_dynamic: bool) -> dict[str, Any]:
    """`look_at` in a process of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work(channel: Connection) -> None:
        try:
            channel.send(look_at(example, is_dynamic))
        except BaseException:
            channel.send({"class": "failed", "reason": traceback.format_exc()})

    process = context.Process(target=work, args=(sender,))
    process.start()
    sender.close()
    try:
        if not receiver.poll(SECONDS):
            return {"class": "failed", "reason": f"not done in {SECONDS} s"}
        found: dict[str, Any] = receiver.recv()
    except EOFError:
        return {"class": "failed", "reason": "its process died"}
    finally:
        process.kill()
        process.join()
    return found


def shares(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of the kernels that run at all."""
    ran = [row for row in rows if row["class"] in CLASSES]
    if not ran:
        return {}
    return {
        "every M": sum(row["class"] == EVERY for row in ran) / len(ran),
        "at least the launch": sum(row["class"] != HELION for row in ran) / len(ran),
    }


def merged(result: dict[str, Any], former: dict[str, Any]) -> dict[str, Any]:
    """`former` with the kernels of `result` in the place of theirs; each row names its revision."""
    made = {"machine": result["machine"]}
    for way in WAYS:
        each_of = [(each["machine"]["revision"], row) for each in (former, result) for row in each[way]["kernels"]]
        rows = {row["kernel"]: {"revision": revision, **row} for revision, row in each_of}
        made[way] = of_rows([rows[name] for example in EXAMPLES if (name := f"{example.module}.{example.kernel}") in rows])
    return made


def of_rows(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The shares and the rows of one way."""
    return {"shares": shares(rows), "classes": dict(Counter(row["class"] for row in rows)), "kernels": rows}


def main() -> int:
    """Prints a line a kernel and the shares; 1 if a target is missed or a kernel failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("helion", type=Path, help="a checkout of Helion's repository")
    parser.add_argument("--json", type=Path, help="write the results here; with --only into those that are there")
    parser.add_argument("--only", default="", help="kernels whose names hold this")
    given = parser.parse_args()
    if not (given.helion / "examples").is_dir():
        parser.error(f"{given.helion} holds no examples/; it takes a checkout of Helion's repository")
    sys.path.insert(0, str(given.helion))
    torch.set_num_threads(1)  # forked
    result: dict[str, Any] = {"machine": machine.describe()}
    ways: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for example in EXAMPLES:
        name = f"{example.module.rpartition('.')[2]}.{example.kernel}"
        if given.only not in name:
            continue
        for way, rows in ways.items():
            is_same = way == WAYS[1] and ways[WAYS[0]][-1].get("static_shapes") is False
            found = ways[WAYS[0]][-1] if is_same else isolated(example, way == WAYS[0])
            rows.append({"kernel": f"{example.module}.{example.kernel}", "revision": result["machine"]["revision"], **found})
            print(f"{name:58} {way:20} {found['class']:18} {found['reason'][:120]}", flush=True)
    result |= {way: of_rows(rows) for way, rows in ways.items()}
    if given.json and given.only and given.json.is_file():
        result = merged(result, json.loads(given.json.read_text()))
    for way in WAYS:
        print(f"\n{way}: {result[way]['classes']}")
        for what, share in result[way]["shares"].items():
            print(f"  {what}: {share:.1%} of those that run")
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    failed = any("failed" in result[way]["classes"] for way in WAYS)
    return int(failed or any(result[WAYS[0]]["shares"].get(what, 0) < share for what, share in TARGETS.items()))


if __name__ == "__main__":
    sys.exit(main())

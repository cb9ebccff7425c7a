#!/usr/bin/env python3
"""Attention over K and V in tensors on a GPU: hdispatch.attention beside torch's SDPA (FlashAttention, cuDNN), causal.

GPU time per call in CUDA graphs whose arguments go past L2, all paths of a cell in turn, in random order in every round; median
and quartiles. 32 query heads and 8 kv heads; one sequence of 128 to 8192 tokens, eight of up to 1024, one and 16 queries of
4096 keys, and packed sequences. A line for each cell: microseconds, TFLOP/s, and the fastest of torch's / hdispatch. The JSON
file is one of those that benchmarks/regress.py compares.

    python benchmarks/attention_dense.py BUNDLE [--json FILE] [--rounds N] [--leave-losses CONFIGS]

--leave-losses rewrites a config file of attention_dense, configs/attention_dense/<gpu>.json: buckets in which torch is faster
by more than 2 % (geometric mean over the bucket's cells) are left to the fallback, the others keep their configs. A bucket that
is not measured goes with the one below it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import hdispatch
import torch
from hdispatch.bench import machine
from hdispatch.kernels.lib.sdpa import Rule, attend
from hdispatch.testing.device_timer import Replay, interleave, rotation_count
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

HEADS, KV_HEADS = 32, 8
OURS = "hdispatch"
PEERS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
#: How much slower than torch a bucket may be and keep its row.
LOSS = 1.02
#: Largest difference of an output from the float32 reference.
TOLERANCE = 1e-2
Call = Callable[[], object]


class Cell(NamedTuple):
    """A shape; the fields name a row of the result."""

    op: str
    m: int
    head_dim: int
    queries: int
    keys: int

    @property
    def flops(self) -> int:
        """Of both products, for the keys that queries see."""
        seen = self.keys * self.queries - self.queries * (self.queries - 1) // 2
        return 4 * self.m * HEADS * self.head_dim * seen


def cells() -> list[Cell]:
    """All of them."""
    found = []
    for dim in (64, 128):
        found += [Cell("attention_dense", 1, dim, n, 4096) for n in (1, 16)]
        found += [Cell("attention_dense", 1, dim, n, n) for n in (128, 512, 1024, 2048, 4096, 8192)]
        found += [Cell("attention_dense", 8, dim, n, n) for n in (128, 512, 1024)]
        found += [Cell("attention_varlen", 8, dim, n, n) for n in (128, 1024)]
    return found


class Arguments:
    """q, k, v and out of a cell."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        shapes = ((HEADS, cell.queries), (KV_HEADS, cell.keys), (KV_HEADS, cell.keys))
        dense = [torch.randn(cell.m, n, t, cell.head_dim, device="cuda").bfloat16() for n, t in shapes]
        if cell.op == "attention_varlen":
            dense = [each.transpose(1, 2).reshape(-1, each.size(1), cell.head_dim) for each in dense]
        self.q, self.k, self.v = dense
        self.out = torch.empty_like(self.q)
        self.starts = torch.arange(0, cell.m + 1, dtype=torch.int32, device="cuda") * cell.queries

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(each.nbytes for each in (self.q, self.k, self.v, self.out))

    def ours(self) -> Call:
        """hdispatch.attention."""
        packed = {"cu_seqlens_q": self.starts, "max_seqlen_q": self.cell.queries} if self.q.dim() == 3 else {}
        return lambda: hdispatch.attention(self.q, self.k, self.v, causal=True, out=self.out, **packed)

    def torchs(self, backend: SDPBackend) -> Call:
        """SDPA by one of its kernels. One query sees every key; 16 see all but 15: that is left out of torch's work."""
        is_causal = self.cell.queries == self.cell.keys

        def call() -> object:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(self.q, self.k, self.v, is_causal=is_causal, enable_gqa=True)

        return call

    def error(self) -> float:
        """The largest difference of ours from float32, of numbers above 1 relative."""
        self.out.fill_(float("nan"))
        self.ours()()
        q, k, v, out = self.q, self.k, self.v, self.out
        if q.dim() == 3:
            q, k, v, out = (each.unflatten(0, (self.cell.m, -1)).transpose(1, 2) for each in (q, k, v, out))
        want = attend(q, k, v, Rule(self.cell.head_dim**-0.5, causal=True))
        return float(((out.float() - want).abs() / want.abs().clamp(min=1)).max())


def measure(cell: Cell, rounds: int, order: random.Random) -> list[dict[str, Any]]:
    """The rows of a cell, one for each path that can be used."""
    first = Arguments(cell)
    wrong = first.error()
    if not wrong <= TOLERANCE:
        raise SystemExit(f"{cell}: hdispatch differs from float32 by {wrong}; at most {TOLERANCE} is allowed")
    sets = [first, *(Arguments(cell) for _ in range(rotation_count(first.nbytes, cap_sets=16) - 1))]
    calls: dict[str, list[Call]] = {OURS: [each.ours() for each in sets]}
    for name, backend in PEERS.items() if cell.op == "attention_dense" else ():
        made = [each.torchs(backend) for each in sets]
        try:
            made[0]()
        except RuntimeError as error:
            print(f"{cell}: without {name}: {str(error).splitlines()[0]}")
        else:
            calls[name] = made
    replays = {name: Replay(made, max(len(made), 8)) for name, made in calls.items()}
    times = interleave(replays, rounds, order, in_a_row=2)
    for replay in replays.values():
        replay.close()
    choice = hdispatch.select_attention(cell.head_dim, cell.queries, packed=cell.op == "attention_varlen")
    return [row(cell, name, taken, choice.kernel if name == OURS else name) for name, taken in times.items()]


def row(cell: Cell, path: str, taken: list[float], label: str) -> dict[str, Any]:
    """A row of the result; label: what served it."""
    low, middle, high = statistics.quantiles(taken, n=4, method="inclusive")
    times = {"median_us": middle, "q1_us": low, "q3_us": high}
    return {**cell._asdict(), "path": path, **times, "flops": cell.flops, "label": label}


def show(rows: list[dict[str, Any]]) -> str:
    """A cell as a line."""
    us = {each["path"]: each["median_us"] for each in rows}
    ours = next(each for each in rows if each["path"] == OURS)
    name = f"{ours['op'][10:]} {ours['m']} x {ours['queries']} of {ours['keys']}, D {ours['head_dim']}"
    columns = "".join(f"{us[path]:10.2f}" if path in us else "         -" for path in (OURS, *PEERS))
    ratio = ratio_of(rows)
    shown = "      -" if ratio is None else f"{ratio:7.3f}"
    return f"{name:36s}{columns}{ours['flops'] / us[OURS] / 1e6:9.1f}{shown}  {ours['label']}"


def ratio_of(rows: list[dict[str, Any]]) -> float | None:
    """The fastest of torch's / ours; None where torch's were not measured."""
    us = {each["path"]: each["median_us"] for each in rows}
    best = min((us[path] for path in PEERS if path in us), default=None)
    return None if best is None else best / us[OURS]


def leave_losses(file: Path, measured: list[list[dict[str, Any]]]) -> None:
    """Rewrites a config file of attention_dense, as the module's text says."""
    from hdispatch.compile import configs

    spec = hdispatch.registry.spec("attention_dense")
    read = configs.read(file, spec)
    ratios: dict[tuple[int, int], list[float]] = defaultdict(list)
    for rows in measured:
        if rows[0]["op"] == spec.name and (ratio := ratio_of(rows)) is not None:
            ratios[rows[0]["head_dim"], spec.ladders.index(1, rows[0]["queries"])].append(ratio)
    lines = []
    for shape in spec.shapes:
        lost = list[float]()
        for bucket in range(spec.ladders.count):
            edges = spec.ladders.edges(bucket)
            entry = read.pick(spec, shape, edges)
            key = {"head_dim": shape["K"], "num_sequences": edges["M"], "max_seqlen_q": edges["max_seqlen_q"]}
            lost = ratios.get((shape["K"], bucket), lost)
            kept = {"config": entry.config} if entry.backend is None else {"backend": entry.backend, "config": entry.config}
            if lost and math.exp(statistics.fmean(map(math.log, lost))) * LOSS < 1:
                kept = {"backend": configs.NO_ROW, "config": {}}
            lines.append(json.dumps({"key": key, **kept}))
    file.write_text("[\n  " + ",\n  ".join(lines) + "\n]\n")


def main() -> int:
    """Measures all cells and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--leave-losses", type=Path, metavar="CONFIGS")
    given = parser.parse_args()
    torch.manual_seed(0)
    hdispatch.load(given.bundle)
    print(f"{torch.cuda.get_device_name()}, us per call; TFLOP/s of hdispatch; the fastest of torch's / hdispatch")
    print(f"{'':36s}{''.join(f'{path:>10s}' for path in (OURS, *PEERS))}  TFLOP/s  ratio", flush=True)
    order, measured = random.Random(0), []
    for cell in cells():
        measured.append(measure(cell, given.rounds, order))
        print(show(measured[-1]), flush=True)
    if given.json:
        timings = [each for rows in measured for each in rows]
        whole = {"machine": machine.describe(torch.device("cuda")), "timings": timings}
        given.json.write_text(json.dumps(whole, indent=1) + "\n")
    if given.leave_losses:
        leave_losses(given.leave_losses, measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())

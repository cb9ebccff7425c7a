"""Decode attention on a GPU: hdispatch's two ops beside vLLM's FlashAttention 3 and its Triton kernel, and what the host pays.

GPU time per call in CUDA graphs that go through as many caches as exceed L2 by far, so that K and V come from memory; all
kernels of a cell in turn, in random order in every round, median. FA3 gets scheduler metadata made once, as vLLM does. The
layer's half is q/k norm, rope, cache write and attention: three launches of vLLM's, one of attention_half. Host time is enqueue
only; its floor is the same kernel launched by cuLaunchKernelEx from a C loop in the same run.

A cell of which the bundle has no row says so: build it with more variants (`hdispatch build --variants`).

Every cell says which kernel is fastest, and the last lines how often that is hdispatch's: the verdict is "miss" below 1.0 of
the best peer in any cell, below 1.25 as geometric mean at M <= 8 and contexts up to 1024, or above 1.3 of the floor.

    python benchmarks/attention.py BUNDLE --vllm DIR [--json FILE] [--rounds N] [--seconds S]

DIR is a folder that holds the package vllm with its libraries, and what it imports where that is not installed; several, with
colons. What of it cannot be used is said and left out.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import hdispatch
import torch
from hdispatch import _C
from hdispatch.bench import machine
from hdispatch.kernels.lib.paged_kv import Rule, attend
from hdispatch.testing.device_timer import Replay, interleave

DIM, PAGE = 128, 16
HEADS = ((32, 8), (16, 8), (64, 8))
BATCHES, CONTEXTS, QUERIES = (1, 8, 32, 128), (128, 1024, 8192), (1, 4)
#: Bytes of K and V that a graph goes through at least, and elements of all caches at most.
ROTATED, MOST = 200_000_000, 9_000_000_000 // 2
OURS, HALF, FA3, TRITON = "hdispatch", "hdispatch half", "FA3", "vLLM Triton"
IN_SEQUENCE, LAYERS = "half in a sequence", 36
VLLM_HALF = "vLLM half"
Call = Callable[[], object]


class Cell(NamedTuple):
    """A shape: query and kv heads, requests, tokens of each, queries of each."""

    heads: int
    kv_heads: int
    batch: int
    context: int
    queries: int = 1

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V that a call reads."""
        return self.batch * self.context * self.kv_heads * 2 * DIM * 2

    def __str__(self) -> str:
        more = f", {self.queries} queries" if self.queries > 1 else ""
        return f"{self.heads}/{self.kv_heads} {self.batch} x {self.context}{more}"


class Peers:
    """vLLM's kernels, as far as they can be used here; `missing` says why not the others."""

    def __init__(self, folders: list[Path]) -> None:
        self.missing: dict[str, str] = {}
        sys.path[:0] = [str(folder) for folder in folders]
        self.fa3 = self._take(FA3, lambda: self._flash(folders))
        self.unified = self._take(
            TRITON, lambda: importlib.import_module("vllm.v1.attention.ops.triton_unified_attention").unified_attention
        )
        self.ops = self._take(VLLM_HALF, lambda: self._cuda_ops(folders)) if self.fa3 else None

    def _take(self, name: str, find: Callable[[], Any]) -> Any:
        try:
            return find()
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            self.missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            return None

    @staticmethod
    def _flash(folders: list[Path]) -> Any:
        """torch.ops of FA3's library."""
        for folder in folders:
            for library in sorted(folder.glob("vllm/vllm_flash_attn/_vllm_fa3_C*.so")):
                torch.ops.load_library(str(library))
        return torch.ops._vllm_fa3_C.fwd and torch.ops._vllm_fa3_C

    @staticmethod
    def _cuda_ops(folders: list[Path]) -> Any:
        """torch.ops._C, with the ops of a layer's half."""
        for folder in folders:
            for library in sorted(folder.glob("vllm/_C*.so")):
                torch.ops.load_library(str(library))
        torch.ops._C_cache_ops.reshape_and_cache_flash  # noqa: B018 -- AttributeError where it is not
        return torch.ops._C.fused_qk_norm_rope and torch.ops._C


class Case:
    """The arguments of a cell: `layers` caches of one pool, of which every graph takes one after the other."""

    def __init__(self, cell: Cell, pool: torch.Tensor) -> None:
        self.cell = cell
        heads, kv_heads, batch, context, queries = cell
        pages = -(-context // PAGE)
        block = PAGE * kv_heads * 2 * DIM
        self.layers = max(2, min(128, -(-ROTATED // cell.kv_bytes), pool.numel() // (batch * pages * block)))
        whole = pool[: self.layers * batch * pages * block].view(self.layers, batch * pages, PAGE, kv_heads, 2 * DIM)
        #: In the order in which the ops take it: [blocks, kv heads, page, 2 * DIM].
        self.caches = [whole[layer].transpose(1, 2) for layer in range(self.layers)]
        width = -(-(pages + 4) // 16) * 16
        self.table = torch.zeros(batch, width, dtype=torch.int32, device="cuda")
        self.table[:, :pages] = torch.randperm(batch * pages, device="cuda").int().view(batch, pages)
        self.seq_lens = torch.full((batch,), context, dtype=torch.int32, device="cuda")
        self.qkv = torch.randn(batch * queries, (heads + 2 * kv_heads) * DIM, device="cuda").bfloat16()
        self.q = torch.randn(batch, queries, heads, DIM, device="cuda").bfloat16()
        self.out = torch.empty_like(self.q)
        self.weights = [torch.rand(DIM, device="cuda").bfloat16() + 0.5 for _ in "qk"]
        angles = 6.2832 * torch.rand(context + 1, DIM // 2, device="cuda")
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), -1).bfloat16()
        self.positions = (self.seq_lens - 1).long()
        at = (self.positions // PAGE)[:, None]
        self.slots = self.table.gather(1, at)[:, 0].long() * PAGE + self.positions % PAGE
        self.starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * queries
        self.scale = DIM**-0.5
        self.ones = torch.ones(1, device="cuda")
        self.descale = self.ones.expand(batch, kv_heads)

    def k_and_v(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As vLLM's kernels take them, [blocks, page, kv heads, DIM]."""
        k, v = self.caches[layer].transpose(1, 2).split(DIM, dim=-1)
        return k, v

    def ours(self, layer: int) -> Call:
        """paged_attention_decode."""
        cell, queries = self.cell, next(q for q in (1, 4, 8) if q >= self.cell.queries)
        args = (
            *(self.out, self.q, self.caches[layer], self.table, self.seq_lens, None, cell.context, self.scale),
            *(0.0, 0, 1.0, 1.0, cell.heads // cell.kv_heads, queries),
        )
        return lambda: hdispatch.ops.paged_attention_decode(*args)

    def half_args(self, layer: int) -> tuple[Any, ...]:
        """The arguments of attention_half."""
        return (
            *(self.out[:, 0], self.qkv, *self.weights, self.cos_sin, self.positions, self.slots, self.caches[layer]),
            *(self.table, self.seq_lens, self.cell.context, self.scale, 1e-6, self.cell.heads // self.cell.kv_heads, True),
        )

    def half(self, layer: int) -> Call:
        """attention_half."""
        args = self.half_args(layer)
        return lambda: hdispatch.ops.attention_half(*args)

    def fa3(self, layer: int, ops: Any, metadata: torch.Tensor, q: torch.Tensor | None = None) -> Call:
        """FlashAttention 3 as vLLM calls it."""
        k, v = self.k_and_v(layer)
        cell = self.cell
        q, out = (self.q if q is None else q).view(-1, cell.heads, DIM), self.out.view(-1, cell.heads, DIM)
        args = (
            *(q, k, v, None, None, None, out, self.starts, None, None, None, self.seq_lens, cell.queries, cell.context),
            *(self.table, None, None, None, None, None, self.descale, self.descale, self.descale, self.scale, True, -1, -1),
            *(0.0, True, metadata, 0, None, 0, None, 1, 0, None),
        )
        return lambda: ops.fwd(*args)

    def metadata(self, ops: Any) -> torch.Tensor:
        """FA3's schedule, which vLLM makes once a step."""
        cell = self.cell
        return ops.get_scheduler_metadata(
            *(cell.batch, cell.queries, cell.context, cell.heads, cell.kv_heads, DIM, DIM, torch.bfloat16, self.seq_lens),
            *(self.starts, None, None, None, None, PAGE, 0, True, -1, -1, False, 0, None, 0),
        )

    def unified(self, layer: int, function: Callable[..., object]) -> Call:
        """vLLM's Triton kernel as its backend calls it."""
        k, v = self.k_and_v(layer)
        cell, segments = self.cell, 16
        threshold = 128 // cell.kv_heads
        rows = threshold * min(cell.queries, 8)
        parts = torch.empty(rows, cell.heads, segments, DIM, device="cuda")
        sums = [torch.empty(rows, cell.heads, segments, device="cuda") for _ in range(2)]
        given = {
            "q": self.q.view(-1, cell.heads, DIM), "k": k, "v": v, "out": self.out.view(-1, cell.heads, DIM),
            "cu_seqlens_q": self.starts, "max_seqlen_q": cell.queries, "seqused_k": self.seq_lens,
            "max_seqlen_k": cell.context, "softmax_scale": self.scale, "causal": True, "window_size": (-1, -1),
            "block_table": self.table, "softcap": 0, "q_descale": None, "k_descale": self.descale, "v_descale": self.descale,
            "seq_threshold_3D": threshold, "num_par_softmax_segments": segments, "softmax_segm_output": parts,
            "softmax_segm_max": sums[0], "softmax_segm_expsum": sums[1],
        }  # fmt: skip
        return lambda: function(**given)

    def vllm_half(self, layer: int, peers: Peers, metadata: torch.Tensor) -> Call:
        """vLLM's three launches of a layer's half."""
        cell, (k, v) = self.cell, self.k_and_v(layer)
        q, new_k, new_v = self.qkv.split([n * DIM for n in (cell.heads, cell.kv_heads, cell.kv_heads)], dim=-1)
        new_k, new_v = (new.unflatten(1, (cell.kv_heads, DIM)) for new in (new_k, new_v))
        attend_ = self.fa3(layer, peers.fa3, metadata, q.unflatten(1, (cell.heads, DIM)))
        norm = (self.qkv, cell.heads, cell.kv_heads, cell.kv_heads, DIM, 1e-6, *self.weights, self.cos_sin, True)

        def call() -> None:
            peers.ops.fused_qk_norm_rope(*norm, self.positions, -1)
            torch.ops._C_cache_ops.reshape_and_cache_flash(new_k, new_v, k, v, self.slots, "auto", self.ones, self.ones)
            attend_()

        return call

    def error(self, call: Call, layer: int) -> float:
        """The largest difference from float32 of the first, the middle and the last request."""
        self.out.fill_(float("nan"))
        call()
        some = torch.tensor(sorted({0, self.cell.batch // 2, self.cell.batch - 1}), device="cuda")
        args = self.caches[layer], self.table[some], self.seq_lens[some], self.cell.context
        want = attend(self.q[some].float(), *args, Rule(self.scale))
        return float((self.out[some].float() - want).abs().max())


def paths(case: Case, peers: Peers) -> dict[str, Callable[[int], Call]]:
    """The paths of a cell that are timed, by name: one call for each layer."""
    found: dict[str, Callable[[int], Call]] = {OURS: case.ours}
    metadata = case.metadata(peers.fa3) if peers.fa3 else None
    if metadata is not None:
        found[FA3] = lambda layer: case.fa3(layer, peers.fa3, metadata)
    if peers.unified:
        found[TRITON] = lambda layer: case.unified(layer, peers.unified)
    if case.cell.queries == 1:
        found[HALF] = case.half
        if peers.ops and metadata is not None:
            found[VLLM_HALF] = lambda layer: case.vllm_half(layer, peers, metadata)
    return found


def no_row(call: Call) -> str:
    """Why hdispatch has no row for a call, or ""."""
    try:
        call()
    except hdispatch.MissError as error:
        return str(error).partition(";")[0]
    return ""


def measure(case: Case, peers: Peers, rounds: int, order: random.Random) -> dict[str, Any]:
    """A row of the result: median microseconds and quartiles by path, errors, and the ratios to the best peers."""
    made = paths(case, peers)
    if absent := no_row(made[OURS](0)):
        return {"cell": case.cell._asdict(), "no_row": absent}
    if HALF in made and no_row(made[HALF](0)):
        made.pop(HALF)
    errors = {name: case.error(make(0), 0) for name, make in made.items() if name in (OURS, FA3, TRITON)}
    replays = {name: Replay([make(layer) for layer in range(case.layers)], case.layers) for name, make in made.items()}
    times = interleave(replays, rounds, order, in_a_row=2)
    for replay in replays.values():
        replay.close()
    us = {name: statistics.median(taken) for name, taken in times.items()}
    peer = min((us[name] for name in (FA3, TRITON) if name in us), default=None)
    limit = max(2 * errors.get(FA3, 0.0), 0.012)
    return {
        "cell": case.cell._asdict(),
        "layers": case.layers,
        "us": us,
        "quartiles_us": {name: statistics.quantiles(taken, n=4)[::2] for name, taken in times.items()},
        "errors": errors,
        "right": bool(errors[OURS] <= limit),
        "ratio": peer / us[OURS] if peer else None,
        "half_ratio": us[VLLM_HALF] / us[HALF] if {HALF, VLLM_HALF} <= set(us) else None,
    }


def timings(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each cell and path, as `benchmarks/regress.py` compares them."""
    return [
        {"op": "decode attention", **row["cell"], "path": path, "median_us": us, "q1_us": low, "q3_us": high}
        for row in rows
        for path, us in row.get("us", {}).items()
        for low, high in (row["quartiles_us"][path],)
    ]


def layers_in_sequence(case: Case) -> Call:
    """attention_half of LAYERS layers as one call, as the plug-in's steps have it: what a step brings is slots."""
    s = hdispatch.Sequence("attention_half in layers")
    cell = case.cell
    out = s.slot("out", ("M", cell.heads, DIM), torch.bfloat16, written=True)
    qkv = s.slot("qkv", ("M", case.qkv.size(1)), torch.bfloat16)
    positions, slots = (s.slot(name, ("M",), torch.int64) for name in ("positions", "slot_mapping"))
    table = s.slot("block_table", ("M", case.table.size(1)), torch.int32)
    seq_lens, longest = s.slot("seq_lens", ("M",), torch.int32), s.int_slot("max_seq_len")
    for layer in range(LAYERS):
        s.add(
            hdispatch.registry.get("attention_half"), out, qkv, *case.weights, case.cos_sin, positions, slots,
            case.caches[layer % case.layers], table, seq_lens, longest, case.scale, 1e-6, cell.heads // cell.kv_heads, True,
        )  # fmt: skip
    sequence = s.freeze()
    given = (case.out[:, 0], case.qkv, case.positions, case.slots, case.table, case.seq_lens, cell.context)
    return lambda: sequence(*given)


def host(peers: Peers, pool: torch.Tensor, rounds: int) -> dict[str, float]:
    """Microseconds of host time per call, enqueue only, of the layer's half at 32/8 heads, 1 x 1024; and the floor.

    IN_SEQUENCE is a layer's share of a step of LAYERS layers.
    """
    case = Case(Cell(32, 8, 1, 1024), pool)
    calls: dict[str, Call] = {HALF: case.half(0), OURS: case.ours(0)}
    for name in [name for name, call in calls.items() if no_row(call)]:
        calls.pop(name)
    if peers.fa3:
        metadata = case.metadata(peers.fa3)
        calls[FA3] = case.fa3(0, peers.fa3, metadata)
        if peers.ops:
            calls[VLLM_HALF] = case.vllm_half(0, peers, metadata)
    if peers.unified:
        calls[TRITON] = case.unified(0, peers.unified)
    batches = dict.fromkeys(calls, (100, 1))
    if HALF in calls:
        calls[IN_SEQUENCE], batches[IN_SEQUENCE] = layers_in_sequence(case), (4, LAYERS)
    op, args, batch = hdispatch.registry.get("attention_half"), case.half_args(0), 100
    taken: dict[str, list[float]] = {name: [] for name in (*calls, "floor")}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            torch.cuda.synchronize()
            count, layers = batches[name]
            begin = time.perf_counter()
            for _ in range(count):
                call()
            taken[name].append((time.perf_counter() - begin) / count / layers * 1e6)
        torch.cuda.synchronize()
        if HALF in calls:
            taken["floor"].append(_C.bench_launch_ns(op, args, batch, False) / 1e3)
    torch.cuda.synchronize()
    return {name: statistics.median(each) for name, each in taken.items() if each}


def show(row: dict[str, Any]) -> str:
    """A cell as a line."""
    if "no_row" in row:
        return f"{Cell(**row['cell'])!s:26s}  no row: {row['no_row']}"
    us = row["us"]
    columns = [f"{us[name]:9.2f}" if name in us else "        -" for name in (OURS, FA3, TRITON, HALF, VLLM_HALF)]
    ratios = [f"{row[name]:7.2f}" if row[name] else "      -" for name in ("ratio", "half_ratio")]
    wrong = "" if row["right"] else f"  WRONG by {row['errors'][OURS]:.4f}"
    return f"{Cell(**row['cell'])!s:26s}{''.join(columns)}{''.join(ratios)}{wrong}"


def verdicts(rows: list[dict[str, Any]], host_us: dict[str, float]) -> list[dict[str, Any]]:
    """Each target, the measured value, and whether it is met; None without a peer to compare with."""
    absent, rows = [row for row in rows if "no_row" in row], [row for row in rows if "no_row" not in row]
    ratios = [row["ratio"] for row in rows if row["ratio"]]
    short = [r["ratio"] for r in rows if r["ratio"] and r["cell"]["batch"] <= 8 and r["cell"]["context"] <= 1024]
    mean = math.exp(statistics.fmean(map(math.log, short))) if short else None
    single, over = (host_us[name] / host_us["floor"] if HALF in host_us else None for name in (HALF, IN_SEQUENCE))
    at_least = {
        "the best peer / hdispatch, worst cell, at least": (min(ratios, default=None), 1.0),
        "the same, geometric mean at M <= 8 and contexts to 1024, at least": (mean, 1.25),
    }
    at_most = {
        "host time of attention_half in a step of layers / floor, at most": (over, 1.3),
        "the same of a call from Python, at most": (single, 1.3),
        "cells with a wrong result, at most": (float(sum(not row["right"] for row in rows)), 0.0),
        "cells without a row, at most": (float(len(absent)), 0.0),
    }
    met = {what: None if got is None else got >= limit for what, (got, limit) in at_least.items()}
    met |= {what: None if got is None else got <= limit for what, (got, limit) in at_most.items()}
    return [
        {"what": what, "got": got, "limit": limit, "met": met[what]} for what, (got, limit) in {**at_least, **at_most}.items()
    ]


def main() -> int:
    """Runs the grid, as far as the time goes, and prints a line for each cell; 1 if a result is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--vllm", default="", help="folders with vllm and what it imports, with colons")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--queries", type=int, nargs="+", default=QUERIES, choices=QUERIES, help="of each request")
    parser.add_argument("--cells", nargs="+", default=[], metavar="CELL", help="only these: 32/8,128x1024,1 for one query each")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=400.0, help="begin no cell after that")
    given = parser.parse_args()
    cells = [
        Cell(heads, kv_heads, batch, context, queries)
        for queries in given.queries for heads, kv_heads in HEADS for context in CONTEXTS for batch in BATCHES
    ]  # fmt: skip
    if given.cells:
        named = {f"{each.heads}/{each.kv_heads},{each.batch}x{each.context},{each.queries}": each for each in cells}
        if unknown := [name for name in given.cells if name not in named]:
            parser.error(f"--cells: no cell {', '.join(unknown)}; the grid has {', '.join(named)}")
        cells = [named[name] for name in dict.fromkeys(given.cells)]
    begin, order = time.monotonic(), random.Random(0)
    torch.manual_seed(0)
    hdispatch.load(given.bundle)
    peers = Peers([Path(folder) for folder in given.vllm.split(":") if folder])
    for name, why in peers.missing.items():
        print(f"without {name}: {why}")
    pool = torch.empty(MOST, dtype=torch.bfloat16, device="cuda").normal_()
    print(
        f"{torch.cuda.get_device_name()}, us per call, K and V from memory; ratios: best peer / hdispatch, vLLM's half / ours"
    )
    names = "".join(f"{name[-9:]:>9s}" for name in (OURS, FA3, TRITON, HALF, VLLM_HALF))
    print(f"{'heads, batch x context':26s}{names}  ratio   half", flush=True)
    rows = []
    with hdispatch.strict():
        host_us = host(peers, pool, given.rounds)
        for cell in cells:
            if time.monotonic() - begin > given.seconds or cell.kv_bytes > MOST:
                print(f"{cell}: not measured, {'too large' if cell.kv_bytes > MOST else 'no time left'}")
                continue
            rows.append(measure(Case(cell, pool), peers, given.rounds, order))
            print(show(rows[-1]), flush=True)
    print("host us per call, enqueue only, 32/8 1 x 1024: " + ", ".join(f"{name} {us:.2f}" for name, us in host_us.items()))
    judged = verdicts(rows, host_us)
    for verdict in judged:
        got = "-" if verdict["got"] is None else f"{verdict['got']:.3f}"
        word = {None: "not measured", True: "met", False: "miss"}[verdict["met"]]
        print(f"{word:12s} {verdict['what']} {verdict['limit']}: {got}")
    if given.json:
        whole = {
            "machine": machine.describe(torch.device("cuda")), "timings": timings(rows), "cells": rows, "host_us": host_us,
            "verdicts": judged, "missing": peers.missing,
        }  # fmt: skip
        given.json.write_text(json.dumps(whole, indent=1))
    return int(any(not row.get("right", True) for row in rows))


if __name__ == "__main__":
    sys.exit(main())

"""Cells, arguments and results of the op benchmark, as its tests make them up."""

from __future__ import annotations

import hdispatch
import torch

from benchmarks.ops import grid, peers
from benchmarks.ops.grid import Cell

QUANT = "dynamic_per_token_scaled_fp8_quant"
SMALL = {"M": 5, "K": 1024, "N": 512}
#: The ops that are measured, of those that are installed.
MEASURED = [op for op in grid.OPS if op in hdispatch.registry.names()]


def arguments_of(op: str, sizes: dict[str, int] = SMALL) -> list:
    """An op's arguments, on the CPU, as vLLM has them."""
    spec = hdispatch.registry.spec(op)
    arguments = spec.sample(spec.typical_variant(), sizes, torch.device("cpu"), torch.Generator().manual_seed(1))
    return peers.arrange(spec, arguments)


def cell(op: str = QUANT, m: int = 16, label: str = "hidden", model: str = "Qwen3-8B", mode: str = "warm", **sizes) -> Cell:
    variant = hdispatch.registry.spec(op).typical_variant().name if op in hdispatch.registry.names() else "bfloat16"
    return {"op": op, "variant": variant, "model": model, "label": label, "K": 64, "N": 0, "m": m, "mode": mode, **sizes}


def timing(path: str, us: float, moved: int = 0, flops: int = 0, **given) -> dict:
    return {
        **cell(**given),
        "path": path,
        "median_us": us,
        "q1_us": us * 0.9,
        "q3_us": us * 1.1,
        "bytes": moved,
        "flops": flops,
    }


def result(timings=(), eager=(), stats=None, gpu="NVIDIA H200", modes=("warm",), **changes) -> dict:
    machine = {
        "gpu": gpu, "driver": "580", "cpu": "Xeon", "cores": 16, "python": "3.12", "torch": "2.11", "triton": "3.6",
        "helion": None, "hdispatch": "0.1", "revision": "abcdef0123456789+changes", "date": "2026-11-21", "seconds": 99.0,
        "rounds": 11, "seed": 0, "ops": [QUANT], "ms": list(grid.MS), "modes": list(modes), "models": [], "vllm_ops": None,
        "bundle": {"target": "h200", "rows": 10, "records": 3, "tools": {}},
    }  # fmt: skip
    stats = {QUANT: {"hits": 10, "empty": 0, "fallbacks": 0, "misses": {}}} if stats is None else stats
    whole = {
        "machine": machine, "copy_bandwidth": 4.2e12, "timings": list(timings), "eager": list(eager), "stats": stats,
        "compile": None, "failures": [], "skipped": {},
    }  # fmt: skip
    return whole | changes


def pair(ours: float, theirs: float, peer: str = peers.VLLM, **given) -> list[dict]:
    return [timing(peers.OURS, ours, **given), timing(peer, theirs, **given)]


def eager(path: str, us: float, label: str = "hidden", op: str = QUANT) -> dict:
    return {"op": op, "variant": "bfloat16", "label": label, "m": 16, "path": path, "median_us": us, "q1_us": us, "q3_us": us}


def whole_result() -> dict:
    """A result with something of everything."""
    gemms = [
        timing(path, us, moved=25 * 10**6, flops=10**6, op="scaled_mm", label="qkv", m=m, mode=mode)
        for m in (1, 8192) for mode in ("warm", "rotated") for path, us in ((peers.OURS, 7), (peers.VLLM, 6.5))
    ]  # fmt: skip
    quants = [each for m in (1, 16, 8192) for each in pair(2, 3 - m / 8192 * 2, m=m)]
    quants += [timing(peers.COMPILE, 5, m=1), timing(peers.OURS, 30, moved=100 * 10**6, m=8192, mode="rotated")]
    rows = [eager(peers.OURS, 2.5), eager(peers.OURS_TORCH, 2.6), eager(peers.VLLM, 7)]
    compile_ = {"options": {}, "processes": 4, "cells": 1, "of": 2, "ms": [1], "seconds": 20.0, "seconds_per_cell": 3.5}
    failed = [{**cell(m=m), "path": peers.COMPILE, "reason": "it broke"} for m in (16, 64)]
    skipped = {"3 warm cells": "--seconds 60 had passed"}
    return result([*gemms, *quants], rows, compile=compile_, failures=failed, skipped=skipped)


def sample_few(op: str, m: int = 3, k: int = 64, n: int = 32, variant: str = "") -> list[torch.Tensor]:
    """Arguments of a GEMM of a few tokens, on the CPU."""
    spec = hdispatch.registry.spec(op)
    chosen = spec.variant(variant) if variant else spec.typical_variant()
    return spec.sample(chosen, {"M": m, "K": k, "N": n}, torch.device("cpu"), torch.Generator().manual_seed(1))

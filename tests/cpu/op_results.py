"""Cells and results of the op benchmark, as test_bench_ops.py and test_bench_low_latency.py make them up."""

from __future__ import annotations

import hdispatch
import torch
from hdispatch.bench import ops_grid, peers
from hdispatch.bench.ops_grid import Cell

QUANT = "dynamic_per_token_scaled_fp8_quant"


def cell(op: str = QUANT, m: int = 16, label: str = "hidden", model: str = "Qwen3-8B", mode: str = "warm", **sizes) -> Cell:
    variant = hdispatch.ops.spec(op).typical_variant().name if op in hdispatch.ops.names() else "bfloat16"
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
        "rounds": 11, "seed": 0, "ops": [QUANT], "ms": list(ops_grid.MS), "modes": list(modes), "models": [], "vllm_ops": None,
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


def sample_few(op: str, m: int = 3, k: int = 64, n: int = 32, variant: str = "") -> list[torch.Tensor]:
    """Arguments of a GEMM of a few tokens, on the CPU."""
    spec = hdispatch.ops.spec(op)
    chosen = spec.variant(variant) if variant else spec.typical_variant()
    return spec.sample(chosen, {"M": m, "K": k, "N": n}, torch.device("cpu"), torch.Generator().manual_seed(1))

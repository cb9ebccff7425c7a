"""Kernels whose first calls from a bundle of a recorded run are timed: a test on a GPU, benchmarks/recorded_first_call.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

SIZES = ((1, 0), (16, 0), (1000, 0), (1000, 1), (4096, 0))  # elements, and from which on: 1 is not aligned
DTYPES = (torch.float32, torch.bfloat16)


@triton.jit
def add(out, x, y, elements, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, at < elements) + tl.load(y + at, at < elements), at < elements)


@triton.jit
def scale(out, x, factor, elements, rows, stride, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = (at < elements) & (rows > 0) & (stride > 0)
    tl.store(out + at, tl.load(x + at, keep) * factor, keep)


@triton.autotune([triton.Config({"BLOCK": b}) for b in (128, 256)], key=["elements"])
@triton.jit
def double(out, x, elements, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, at < elements) * 2, at < elements)


@triton.autotune([triton.Config({"BLOCK": b}) for b in (16, 64, 1024)], key=["stride"])
@triton.jit
def product(out, x, stride, BLOCK: tl.constexpr):
    """Of its configs one is refused by the compiler, one needs more shared memory than a GPU has."""
    tl.static_assert(BLOCK >= 64)
    rows = tl.arange(0, 64)
    a = tl.load(x + rows[:, None] * stride + tl.arange(0, BLOCK)[None, :])
    tl.store(out + rows[:, None] * 64 + rows[None, :], tl.dot(a, tl.trans(a)))


def calls(device: str) -> list[tuple[str, Callable[[], Any], Callable[[], bool]]]:
    """(key, its call, whether the result is right), each another key of `add` or `scale`."""
    made: list[tuple[str, Callable[[], Any], Callable[[], bool]]] = []
    for n, offset in SIZES:
        for dtype in DTYPES:
            x, y = (torch.randn(n + offset, device=device).to(dtype)[offset:] for _ in range(2))
            out = torch.full_like(x, float("nan"))
            key = f"{n}{' misaligned' * offset} {dtype}".replace("torch.", "")
            grid = (triton.cdiv(n, 128),)
            made.append(
                (
                    f"add {key}",
                    lambda grid=grid, out=out, x=x, y=y, n=n: add[grid](out, x, y, n, BLOCK=128),
                    lambda out=out, x=x, y=y: torch.equal(out, x + y),
                )
            )
            twice = torch.full_like(x, float("nan"))
            made.append(
                (
                    f"scale {key}",
                    lambda grid=grid, out=twice, x=x, n=n: scale[grid](out, x, 2.0, n, 3, 5, BLOCK=128),
                    lambda out=twice, x=x: torch.equal(out, x * 2),
                )
            )
    return made  # fmt: skip


def run(device: str = "cuda", *, check: bool = True) -> dict[str, float]:
    """Milliseconds of each key's first call, on the host; and its result's check."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    times = {}
    for key, call, is_right in calls(device):
        synchronize()
        start = time.perf_counter()
        call()
        times[key] = 1e3 * (time.perf_counter() - start)
        assert not check or is_right(), key
    return times


def run_tuned() -> None:
    """Autotuned kernels, on a GPU: every config that they try is recorded."""
    x = torch.randn(1000, device="cuda")
    out = torch.empty_like(x)
    double[lambda meta: (triton.cdiv(1000, meta["BLOCK"]),)](out, x, 1000)
    assert torch.equal(out, x * 2)
    ones = torch.ones(64, 1024, device="cuda")
    out = torch.full((64, 64), float("nan"), device="cuda")
    product[(1,)](out, ones, 1024)
    assert product.best_config.kwargs["BLOCK"] == 64
    assert torch.equal(out, torch.full_like(out, 64))

"""The Triton kernel of ll_gemm_bf16_argmax, interpreted on the CPU, against its reference; prints failures as JSON.

Run as a program, since the interpreter is switched on by the environment: test_ll_gemm_bf16_argmax.py does. Each case runs
twice on the same workspace, whose counters must be zero afterwards.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from hdispatch.kernels.ll_gemm_bf16_argmax import triton as kernels
from hdispatch.kernels.ll_gemm_bf16_argmax.spec import SPEC
from hdispatch.opspec import WORKSPACE_COUNTERS
from interpreted import report
from special_values import like_the_gpu

CPU, BF16 = torch.device("cpu"), torch.bfloat16
(VARIANT,) = SPEC.variants()
#: By the tokens of a tile: the last of a bucket, one below, and the first of the next; what takes several tiles.
EDGES = {8: (1, 7, 8, 9, 32), 16: (9, 16, 32), 32: (17, 31, 32)}


def config(block_m: int, block_n: int = 16, block_k: int = 16, programs: int = 3) -> dict[str, Any]:
    tile = {"block_m": block_m, "block_n": block_n, "block_k": block_k, "programs": programs}
    return {**tile, "prefetch": 0, "num_warps": 1, "num_stages": 1, "pdl": False}


def multiply_bfloat16() -> None:
    """The interpreter keeps bfloat16 as integers, and would multiply those."""
    builder: Any = interpreter.InterpreterBuilder
    own = builder.create_dot

    def wide(x: Any) -> Any:
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    builder.create_dot = lambda self, a, b, d, *more: own(self, wide(a), wide(b), d, *more)


def launcher(kernel: Any, grid: tuple[int, ...], *values: Any, **options: Any) -> None:
    kernel[grid](*values, **{k: v for k, v in options.items() if k.isupper()})


def run(given: dict[str, Any], x: torch.Tensor, w: torch.Tensor, workspace: torch.Tensor) -> None:
    """The kernel twice; the second call has what the first left in the workspace."""
    wanted = torch.full((x.size(0),), -7)
    SPEC.reference(wanted, x, w)
    for _ in range(2):
        out = torch.full_like(wanted, -7)
        kernels.launch(out, x, w, workspace, config=given, _launcher=launcher)
        assert not workspace[:WORKSPACE_COUNTERS].any(), "counters are left"
        assert torch.equal(out, wanted), (out.tolist(), wanted.tolist())


def padded(rows: torch.Tensor) -> torch.Tensor:
    """The same rows of a wider tensor of NaN, which the kernel must not read."""
    wide = torch.full((rows.size(0) + 1, rows.size(1) + 24), float("nan"), dtype=rows.dtype)
    inner = wide[: rows.size(0), 8 : 8 + rows.size(1)]
    return inner.copy_(rows)


def logits_of(values: list[float], n: int, at: int, fill: float = float("-inf")) -> tuple[torch.Tensor, torch.Tensor]:
    """x and w whose logits are `fill`, and from `at` on these values again and again; of every other token times -2."""
    w = torch.zeros(n, 8)
    w[:, 0] = torch.tensor([fill] * at + values * n)[:n]
    x = torch.zeros(9, 8)
    x[:, 0] = torch.tensor([1.0, -2.0] * 9)[:9]
    return x.to(BF16), w.to(BF16)


def special() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Logits that are hard to compare, from the first column on and in later tiles, blocks and lanes."""
    nan, infinity, most = float("nan"), float("inf"), torch.finfo(BF16).max
    rows = {
        "zeros": [-0.0, 0.0, -0.0, 0.0],
        "nan": [1.0, nan, infinity, nan],
        "minus nan": [infinity, -nan, most, 0.0],
        "infinities": [-infinity, infinity, infinity, most],
        "all the least": [-infinity] * 4,
        "all nan": [nan] * 4,
        "all equal": [1.5] * 4,
        "negative": [-3.0, -1.0, -1.0, -2.0],
        "extremes": [-most / 4, most / 4, most / 4, torch.finfo(BF16).tiny],
    }
    found = {f"{name} at {at}": logits_of(row, 150, at) for name, row in rows.items() for at in (0, 47, 130)}
    found |= {f"{name} at {at} of zeros": logits_of(row, 150, at, 0.0) for name, row in rows.items() for at in (1, 149)}
    # The second one is larger, but for what rounding to bfloat16 leaves of it: in one tile and in another block.
    for second in (1, 60):
        x, w = torch.zeros(9, 8), torch.zeros(100, 8)
        x[:, :2], w[:, 0], w[second, 1] = 1.0, 1.0, 2.0**-10
        found[f"rounded {second}"] = x.to(BF16), w.to(BF16)
    return found


def main() -> None:
    like_the_gpu()
    multiply_bfloat16()
    workspace = torch.zeros(SPEC.workspace_bytes(VARIANT), dtype=torch.uint8)
    workspace[WORKSPACE_COUNTERS:] = 0x77
    cases: list[tuple[str, dict[str, Any], torch.Tensor, torch.Tensor]] = []

    def sampled(m: int, k: int, n: int) -> list[torch.Tensor]:
        return SPEC.sample(VARIANT, {"M": m, "K": k, "N": n}, CPU, torch.Generator().manual_seed(m + k + n))[1:]

    for block_m, ms in EDGES.items():
        for m in ms:
            for k, n in ((8, 1), (16, 15), (24, 16), (40, 17), (64, 300)):
                cases.append((f"M={m} K={k} N={n}", config(block_m), *sampled(m, k, n)))
            x, w = sampled(m, 40, 70)
            cases.append((f"strided M={m}", config(block_m), padded(x), padded(w)))
    for given in (config(16, programs=1), config(16, 32, 32, 2), config(16, 16, 64, 64), config(16, 64, 16, 4)):
        cases.append((f"random {given}", given, *sampled(9, 40, 300)))
        cases += [(f"{name} {given}", given, x, w) for name, (x, w) in special().items()]
    report((name, partial(run, given, x, w, workspace)) for name, given, x, w in cases)


if __name__ == "__main__":
    main()

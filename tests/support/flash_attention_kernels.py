"""The Triton kernel of attention_dense and attention_varlen, interpreted on the CPU, against the float32 references.

Run as a program, since the interpreter is switched on by the environment: test_attention_dense.py does. Prints failures as
JSON. Outputs are poisoned; memory that no sequence has, between heads and behind the last token, holds NaN.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from attention_kernels import TOLERANCE, generator, launched, refer
from special_values import copied, like_the_gpu

CONFIG = {"block_m": 32, "block_n": 16, "num_warps": 4, "stages": 2}


def apart(*shape: int, dtype: torch.dtype, random: torch.Generator, dims: tuple[int, ...] = ()) -> torch.Tensor:
    """Random numbers in memory with 16 NaNs behind each of the last dimension's rows; `dims` is the order in memory."""
    order = dims or tuple(range(len(shape)))
    whole = torch.full((*(shape[i] for i in order[:-1]), shape[order[-1]] + 16), float("nan"), dtype=dtype)
    inner = whole[..., :-16]
    inner.copy_(torch.randn(inner.shape, generator=random))
    return inner.permute(*(order.index(i) for i in range(len(shape))))


def dense(
    queries: int,
    keys: int | None = None,
    sequences: int = 1,
    group: int = 2,
    kv_heads: int = 2,
    dim: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    dims: tuple[int, ...] = (0, 1, 2, 3),
) -> dict[str, Any]:
    """Arguments of attention_dense by name."""
    keys = queries if keys is None else keys
    random = generator(queries + keys + group + dim)
    q, k, v = (
        apart(sequences, heads, tokens, dim, dtype=dtype, random=random, dims=dims)
        for heads, tokens in ((kv_heads * group, queries), (kv_heads, keys), (kv_heads, keys))
    )
    out = torch.full_like(q, float("nan"))
    return {
        "out": out, "q": q, "k": k, "v": v, "max_seqlen_q": max(1, queries), "scale": dim**-0.5, "softcap": softcap,
        "window": window, "causal": causal, "limits": bool(window or softcap),
    }  # fmt: skip


def packed(
    lengths: list[int],
    keys: list[int] | None = None,
    group: int = 2,
    kv_heads: int = 2,
    dim: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    more: int = 3,
) -> dict[str, Any]:
    """Arguments of attention_varlen by name; `more` rows behind the last sequence, NaN in k and v."""
    keys = lengths if keys is None else keys
    random = generator(sum(lengths) + sum(keys) + group + dim)
    starts = [torch.tensor([0, *each]).cumsum(0).int() for each in (lengths, keys)]
    q, k, v = (
        apart(sum(counts) + more, heads, dim, dtype=dtype, random=random)
        for counts, heads in ((lengths, kv_heads * group), (keys, kv_heads), (keys, kv_heads))
    )
    k[sum(keys) :] = v[sum(keys) :] = float("nan")
    return {
        "out": torch.full_like(q, float("nan")), "q": q, "k": k, "v": v, "cu_seqlens_q": starts[0],
        "cu_seqlens_k": starts[1], "max_seqlen_q": max(1, *lengths), "max_seqlen_k": max(1, *keys), "scale": dim**-0.5,
        "softcap": softcap, "window": window, "causal": causal, "limits": bool(window or softcap),
    }  # fmt: skip


TMA = {**CONFIG, "tma": True}
DENSE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{f"{n} queries": (dense(n), CONFIG) for n in (1, 15, 16, 17, 31, 32, 33, 64, 65)},
    **{f"{n} queries, not causal": (dense(n, causal=False), CONFIG) for n in (1, 16, 17, 33)},
    **{f"{n} queries, TMA": (dense(n, sequences=2), TMA) for n in (1, 16, 33)},
    "TMA, not causal": (dense(33, 50, causal=False, sequences=2), TMA),
    "one query of many keys": (dense(1, 70, sequences=3), CONFIG),
    "fewer queries than keys": (dense(20, 70), CONFIG),
    "more queries than keys": (dense(40, 17), CONFIG),
    "more queries than keys, not causal": (dense(40, 17, causal=False), CONFIG),
    "group 1": (dense(40, group=1), CONFIG),
    "group 3": (dense(40, group=3), CONFIG),
    "group 7, float16": (dense(40, group=7, kv_heads=1, dtype=torch.float16), CONFIG),
    "group 40": (dense(3, 20, group=40, kv_heads=1), CONFIG),
    "tokens before heads": (dense(33, sequences=2, dims=(0, 2, 1, 3)), CONFIG),
    "head_dim 64": (dense(40, dim=64), CONFIG),
    "head_dim 128": (dense(40, dim=128, group=1, kv_heads=1), {**CONFIG, "block_n": 32}),
    "head_dim 256": (dense(20, dim=256, group=1, kv_heads=1), CONFIG),
    "window": (dense(50, window=10), CONFIG),
    "window of one": (dense(40, window=1), CONFIG),
    "window of all": (dense(40, window=40), CONFIG),
    "window, more keys": (dense(20, 70, window=18), CONFIG),
    "softcap": (dense(40, softcap=1.5), CONFIG),
    "softcap, not causal": (dense(40, softcap=1.5, causal=False), CONFIG),
    "softcap and window": (dense(40, softcap=1.5, window=9), CONFIG),
}
VARLEN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one": (packed([33]), CONFIG),
    "ragged": (packed([1, 33, 16, 17, 0, 5]), CONFIG),
    "ragged, TMA": (packed([1, 33, 16, 17, 0, 5]), TMA),
    "ragged, not causal": (packed([1, 33, 16, 17, 0, 5], causal=False), CONFIG),
    "empty ones at both ends": (packed([0, 0, 20, 0]), CONFIG),
    "all empty": (packed([0, 0]), CONFIG),
    "other keys": (packed([1, 20, 5, 3], [40, 33, 5, 0]), CONFIG),
    "other keys, TMA, not causal": (packed([1, 20, 5, 3], [40, 33, 5, 0], causal=False), TMA),
    "window": (packed([1, 40, 9], window=7), CONFIG),
    "softcap, float16": (packed([1, 40, 9], softcap=2.0, dtype=torch.float16), CONFIG),
    "group 5": (packed([1, 20, 9], group=5), CONFIG),
    "head_dim 64": (packed([40, 3], dim=64), CONFIG),
}


def check(op: str, before: dict[str, Any], config: dict[str, Any]) -> None:
    """Everything a sequence has is written and right, everything else as it was."""
    want, got = copied(before), copied(before)
    refer(op, want)
    launched(op, config)(got)
    assert torch.equal(got["out"].isnan(), want["out"].isnan()), "rows of no sequence are written, or others not"
    error = (got["out"].float() - want["out"].float()).nan_to_num().abs().max() if got["out"].numel() else 0.0
    assert error <= TOLERANCE, f"out differs by {error:.4f}"


def check_neighbours() -> None:
    """A sequence's result is the same to the bit, whatever the sequences beside it hold."""
    for config in (CONFIG, TMA):
        results = []
        for value in (0.0, float("nan"), float("inf")):
            args = packed([20, 33, 9])
            for name in ("q", "k", "v"):
                args[name][:20] = args[name][53:] = value
            launched("attention_varlen", config)(args)
            results.append(args["out"][20:53].clone())
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


def failures() -> dict[str, str | None]:
    found: dict[str, str | None] = {}

    def note(name: str, check_: Callable[[], None]) -> None:
        try:
            check_()
            found[name] = None
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"

    for op, cases in (("attention_dense", DENSE), ("attention_varlen", VARLEN)):
        for name, (args, config) in cases.items():
            note(f"{op}: {name}", lambda op=op, args=args, config=config: check(op, args, config))
    note("attention_varlen: neighbours", check_neighbours)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    like_the_gpu()
    json.dump(failures(), sys.stdout)
    sys.stdout.write("\n")

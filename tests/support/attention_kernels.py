"""The attention ops' Triton kernels, interpreted on the CPU, against the float32 references; prints failures as JSON.

Run as a program, since the interpreter is switched on by the environment: test_attention.py does. A cache has NaN wherever no
token was written, tables have blocks that do not exist behind a request's end, outputs are poisoned, and every kernel runs
twice on the same workspace, whose counters must be zero afterwards.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from hdispatch.kernels.lib.attention import split_chunk
from hdispatch.kernels.lib.paged_kv import Paged, random_paged
from hdispatch.kernels.lib.workspace import size
from hdispatch.opspec import WORKSPACE_COUNTERS
from hdispatch.testing.numeric import assert_no_poison
from special_values import copied, like_the_gpu

CPU = torch.device("cpu")
#: What the outputs may differ by from float32's: as the seed of the ops asks for.
TOLERANCE = 0.012


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def launcher(kernel: Any, grid: tuple[int, ...], *values: Any, **options: Any) -> None:
    kernel[grid](*values, **{k: v for k, v in options.items() if k.isupper()})


def launched(op: str, config: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    """The kernel as a call of arguments by name; config["chunk"] is what a split has here."""
    module = importlib.import_module(f"hdispatch.kernels.{op}.triton")

    def call(args: dict[str, Any]) -> None:
        own = {"pdl": False}
        if "chunk" in config:
            wanted, rows = config["chunk"], args["group"] * args.get("max_queries", 1)
            own["chunk"] = next(chunk for chunk in (wanted, wanted // 2) if split_chunk(chunk, rows) == wanted)
        module.launch(*args.values(), config={**config, **own}, _launcher=launcher)

    return call


def refer(op: str, args: dict[str, Any]) -> None:
    """Calls the op's reference, which has no workspace."""
    reference = importlib.import_module(f"hdispatch.kernels.{op}.spec").reference
    reference(*(value for name, value in args.items() if name != "workspace"))


def only_written(paged: Paged, lengths: list[int], page: int) -> None:
    """NaN in every place of the cache where no token is, and blocks behind a request's end that do not exist."""
    kv, table = paged.kv_cache, paged.block_table
    written = torch.zeros(kv.size(0), page, dtype=torch.bool)
    for request, length in enumerate(lengths):
        at = torch.arange(length)
        written[table[request, at // page].long(), at % page] = True
        table[request, -(-length // page) :] = 2**31 - 1
    nan = torch.full((), float("nan")).to(kv.dtype).view(torch.uint8 if kv.dtype.itemsize == 1 else torch.int16)
    kv.view(nan.dtype).masked_fill_(~written[:, None, :, None], nan)


def half(
    lengths: list[int],
    group: int = 4,
    dim: int = 64,
    kv_heads: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    norm: bool = True,
    rotary: int | None = None,
    page: int = 16,
    longer: int = 0,
    angles: torch.dtype | None = None,
) -> dict[str, Any]:
    """Arguments of attention_half by name; max_seq_len is `longer` than the longest request."""
    spec, random = importlib.import_module("hdispatch.kernels.attention_half.spec"), generator(sum(lengths) + group + dim)
    heads, m = kv_heads * group, len(lengths)
    real = torch.tensor(lengths).clamp(min=1)
    paged = random_paged(real, kv_heads, dim, page, dtype, CPU, random)
    only_written(paged, real.tolist(), page)
    # The new token is not there yet.
    for slot in paged.slots.tolist():
        paged.kv_cache[slot // page, :, slot % page] = float("nan")
    slots = torch.where(torch.tensor(lengths) > 0, paged.slots, -1)
    turns = spec.random_cache(dim if rotary is None else rotary, angles or dtype, CPU, random)
    weights = [spec.random_weight(dim, dtype, CPU, random) if norm else None for _ in "qk"]
    rows = torch.randn(m, (heads + 2 * kv_heads) * dim + 16, generator=random).to(dtype)
    return {
        "out": torch.full((m, heads, dim), float("nan"), dtype=dtype),
        "qkv": rows[:, :-16],
        "q_weight": weights[0],
        "k_weight": weights[1],
        "cos_sin_cache": turns,
        "positions": real - 1,
        "slot_mapping": slots,
        "kv_cache": paged.kv_cache,
        "block_table": paged.block_table,
        "seq_lens": torch.tensor(lengths).int(),
        "max_seq_len": max(*lengths, 1) + longer,
        "scale": dim**-0.5,
        "eps": 1e-6,
        "group": group,
        "is_neox": True,
        "workspace": torch.zeros(WORKSPACE_COUNTERS + size(group), dtype=torch.uint8),
    }


TILE = {"tile": 32, "num_warps": 4, "stages": 2}
HALF: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one split": (half([100]), {**TILE, "chunk": 128}),
    "length 1": (half([1]), {**TILE, "chunk": 32}),
    "ragged, with and without splits": (half([129, 33, 5, 1, 97]), {**TILE, "chunk": 32}),
    "page boundaries": (half([16, 17, 15, 32, 33], kv_heads=1), {**TILE, "chunk": 32}),
    "splits that end at a tile": (half([65, 64, 66, 129], kv_heads=1), {**TILE, "chunk": 64}),
    "many splits": (half([700], kv_heads=1), {**TILE, "chunk": 32}),
    "padding": (half([70, 0, 0]), {**TILE, "chunk": 32}),
    "padding alone": (half([0, 0]), {**TILE, "chunk": 32}),
    "longer than the longest": (half([70, 40], longer=500), {**TILE, "chunk": 32}),
    "fewer splits than chunks": (half([200] * 3, group=16, kv_heads=1, longer=40000), {**TILE, "chunk": 32}),
    "group 1": (half([70, 40], group=1), {**TILE, "chunk": 32}),
    "group 2": (half([70, 40], group=2), {**TILE, "chunk": 32}),
    "group 5": (half([70, 40], group=5), {**TILE, "chunk": 32}),
    "group 7, float16": (half([70, 40], group=7, dtype=torch.float16), {**TILE, "chunk": 32}),
    "group 8": (half([70, 40], group=8, kv_heads=1), {**TILE, "chunk": 32}),
    "group 16": (half([70, 40], group=16, kv_heads=1), {**TILE, "chunk": 32}),
    "head_dim 128": (half([70, 40], dim=128), {**TILE, "chunk": 32, "tile": 64}),
    "head_dim 256": (half([70, 40], dim=256, kv_heads=1), {**TILE, "chunk": 32}),
    "no norm": (half([70, 40], norm=False), {**TILE, "chunk": 32}),
    "partial rotary, angles in float32": (half([70, 40], rotary=32, angles=torch.float32), {**TILE, "chunk": 32}),
    "pages of 48": (half([100, 48, 49, 300], page=48, kv_heads=1), {**TILE, "chunk": 64}),
    "read after the wait": (half([70, 40]), {**TILE, "chunk": 32, "early": False}),
}


def check_half(before: dict[str, Any], call: Callable[[dict[str, Any]], None]) -> None:
    want, got = copied(before), copied(before)
    refer("attention_half", want)
    for _ in range(2):
        got["out"].fill_(float("nan"))
        call(got)
    check_output(got, want)
    # What is in the cache is what fused_qk_norm_rope makes of k, and v as it is.
    k_and_v = want["kv_cache"].view(torch.int16).int() - got["kv_cache"].view(torch.int16).int()
    assert k_and_v.abs().max() <= 1, f"the cache differs by {k_and_v.abs().max()} units"
    assert (k_and_v != 0).float().mean() < 1e-3, f"{int((k_and_v != 0).sum())} elements of the cache differ"
    dim = got["out"].size(2)
    assert not k_and_v[..., dim:].any(), "v is not in the cache as it is"


def check_output(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert_no_poison(got["out"], "out")
    error = (got["out"].float() - want["out"].float()).abs().max()
    assert error <= TOLERANCE, f"out differs by {error:.4f}"
    counters = got["workspace"][:WORKSPACE_COUNTERS].view(torch.int32)
    assert not counters.any(), f"{int(counters.count_nonzero())} counters are not back at zero"


def decode(
    lengths: list[int],
    group: int = 4,
    dim: int = 64,
    kv_heads: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    cache: torch.dtype | None = None,
    queries: int = 1,
    max_queries: int = 1,
    window: int = 0,
    softcap: float = 0.0,
    sinks: bool = False,
    page: int = 16,
    longer: int = 0,
) -> dict[str, Any]:
    """Arguments of paged_attention_decode by name; q is part of rows of q, k and v, as models have it."""
    random = generator(sum(lengths) + group + dim + queries)
    heads, m = kv_heads * group, len(lengths)
    paged = random_paged(torch.tensor(lengths).clamp(min=1), kv_heads, dim, page, cache or dtype, CPU, random)
    only_written(paged, lengths, page)
    rows = torch.randn(m, queries, heads + 2 * kv_heads, dim, generator=random).to(dtype)
    q = rows[:, :, :heads]
    return {
        "out": torch.full((m, queries, heads, dim), float("nan"), dtype=dtype),
        "q": q,
        "kv_cache": paged.kv_cache,
        "block_table": paged.block_table,
        "seq_lens": torch.tensor(lengths).int(),
        "sinks": torch.randn(heads, generator=random).to(dtype) if sinks else None,
        "max_seq_len": max(*lengths, 1) + longer,
        "scale": dim**-0.5,
        "softcap": softcap,
        "window": window,
        "k_scale": 0.5 if cache else 1.0,
        "v_scale": 0.25 if cache else 1.0,
        "group": group,
        "max_queries": max_queries,
        "workspace": torch.zeros(WORKSPACE_COUNTERS + size(group * max_queries), dtype=torch.uint8),
    }


FP8 = torch.float8_e4m3fn
DECODE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one split": (decode([100]), {**TILE, "chunk": 128}),
    "length 1": (decode([1]), {**TILE, "chunk": 32}),
    "ragged, with and without splits": (decode([129, 33, 5, 1, 97]), {**TILE, "chunk": 32}),
    "splits that end at a tile": (decode([65, 64, 63, 128], kv_heads=1), {**TILE, "chunk": 64}),
    "many splits": (decode([700], kv_heads=1), {**TILE, "chunk": 32}),
    "as many splits as parts at once, and one more": (decode([128, 129], kv_heads=1), {**TILE, "chunk": 32, "at_once": 4}),
    "one part at once": (decode([70, 33], kv_heads=1), {**TILE, "chunk": 32, "at_once": 1}),
    "padding": (decode([70, 0, 0]), {**TILE, "chunk": 32}),
    "longer than the longest": (decode([70, 40], longer=500), {**TILE, "chunk": 32}),
    "fewer splits than chunks": (decode([200] * 3, group=16, kv_heads=1, longer=40000), {**TILE, "chunk": 32}),
    "group 1": (decode([70, 40], group=1), {**TILE, "chunk": 32}),
    "group 5": (decode([70, 40], group=5), {**TILE, "chunk": 32}),
    "group 7, float16": (decode([70, 40], group=7, dtype=torch.float16), {**TILE, "chunk": 32}),
    "group 16": (decode([70, 40], group=16, kv_heads=1), {**TILE, "chunk": 32}),
    "head_dim 128": (decode([70, 40], dim=128, group=2), {**TILE, "chunk": 32}),
    "head_dim 256": (decode([70, 40], dim=256, group=8, kv_heads=1), {**TILE, "chunk": 32}),
    "window": (decode([100, 50, 5], window=20), {**TILE, "chunk": 32}),
    "window over splits": (decode([200, 77], window=90, kv_heads=1), {**TILE, "chunk": 32}),
    "window of one": (decode([65, 64], window=1, kv_heads=1), {**TILE, "chunk": 32}),
    "softcap": (decode([100, 50], softcap=5.0), {**TILE, "chunk": 32}),
    "sinks": (decode([100, 1, 0], group=8, kv_heads=1, sinks=True), {**TILE, "chunk": 32}),
    "sinks and a window": (decode([100, 50], group=8, kv_heads=1, sinks=True, window=30), {**TILE, "chunk": 32}),
    "3 queries": (decode([100, 33, 3], queries=3, max_queries=4), {**TILE, "chunk": 32}),
    "3 queries of one token": (decode([1, 2, 65], queries=3, max_queries=4, kv_heads=1), {**TILE, "chunk": 32}),
    "1 query where 4 may be": (decode([100, 33], queries=1, max_queries=4, kv_heads=1), {**TILE, "chunk": 32}),
    "8 queries of group 8": (decode([100, 8], group=8, queries=8, max_queries=8, kv_heads=1), {**TILE, "chunk": 32}),
    "5 queries of group 5 in a window": (
        decode([100, 33], group=5, queries=5, max_queries=8, kv_heads=1, window=30),
        {**TILE, "chunk": 32},
    ),
    "fp8": (decode([100, 50], cache=FP8), {**TILE, "chunk": 32}),
    "fp8, pages of 48": (decode([100, 50], cache=FP8, page=48, queries=2, max_queries=4), {**TILE, "chunk": 32}),
}


def check_decode(before: dict[str, Any], call: Callable[[dict[str, Any]], None]) -> None:
    want, got = copied(before), copied(before)
    refer("paged_attention_decode", want)
    for _ in range(2):
        got["out"].fill_(float("nan"))
        call(got)
    check_output(got, want)


#: Other ways of the same sums, and cases that each of them gets.
FORMS: dict[str, dict[str, Any]] = {
    "tokens first": {"form": "tokens", "tile": 64, "heads_first": True},
    "by warps": {"form": "warps", "tile": 64},
    "by eight warps": {"form": "warps", "tile": 128, "num_warps": 8, "heads_first": True},
}
HALF_IN_FORMS = ("length 1", "ragged, with and without splits", "padding", "group 7, float16", "group 16", "no norm")
DECODE_IN_FORMS = (
    *("length 1", "ragged, with and without splits", "padding", "fewer splits than chunks", "group 1", "window over splits"),
    *("softcap", "sinks and a window", "3 queries of one token", "8 queries of group 8", "5 queries of group 5 in a window"),
    "fp8, pages of 48",
)
for form, options in FORMS.items():
    HALF |= {f"{name}, {form}": (HALF[name][0], {**HALF[name][1], **options}) for name in HALF_IN_FORMS}
    DECODE |= {f"{name}, {form}": (DECODE[name][0], {**DECODE[name][1], **options}) for name in DECODE_IN_FORMS}


def sampled(op: str, variant: str, m: int, k: int, n: int = 0) -> dict[str, Any]:
    """Sample arguments by name; what is written has NaN where nothing is."""
    spec = importlib.import_module(f"hdispatch.kernels.{op}.spec").SPEC
    values = spec.sample(spec.variant(variant), {"M": m, "K": k, "N": n}, CPU, generator(m + k + n))
    args = dict(zip((arg.name for arg in spec.args), values, strict=True))
    for name in ("kv_cache", "key_cache", "value_cache"):
        if name in args:
            (args[name].view(torch.uint8) if args[name].dtype.itemsize == 1 else args[name].view(torch.int16)).fill_(0x7F)
    return args


WRITES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {}
for name, dtypes in {"bfloat16": "bfloat16-bfloat16", "float16": "float16-float16"}.items():
    args = sampled("reshape_and_cache_flash", f"{dtypes}+kv_cache_dtype=auto", 7, 64, 3)
    WRITES[f"reshape_and_cache_flash: {name}"] = ("reshape_and_cache_flash", args, {"tokens": 2, "block": 128, "num_warps": 1})
for cache in ("uint8", "float8_e4m3fn"):
    args = sampled("reshape_and_cache_flash", f"bfloat16-{cache}+kv_cache_dtype=fp8", 5, 64, 2)
    args["key"][1, 0, :3] = torch.tensor([float("nan"), float("inf"), -1e30])
    WRITES[f"reshape_and_cache_flash: {cache}"] = ("reshape_and_cache_flash", args, {"tokens": 1, "block": 256, "num_warps": 1})
for flags in ("head_dim=64+is_neox", "head_dim=64", "q_weight+k_weight+head_dim=64+is_neox", "q_weight+k_weight+head_dim=64"):
    args = sampled("fused_qk_norm_rope_cache", f"bfloat16-bfloat16+{flags}", 5, 10 * 64)
    WRITES[f"fused_qk_norm_rope_cache: {flags}"] = ("fused_qk_norm_rope_cache", args, {"tokens": 2, "num_warps": 1})


def check_writes(op: str, before: dict[str, Any], call: Callable[[dict[str, Any]], None]) -> None:
    """Every byte is the reference's, or of q and k, whose sums have another order, one unit away."""
    want, got = copied(before), copied(before)
    refer(op, want)
    call(got)
    for name, tensor in want.items():
        if isinstance(tensor, torch.Tensor) and tensor.dtype.itemsize <= 2:
            bits = torch.uint8 if tensor.dtype.itemsize == 1 else torch.int16
            apart = (got[name].view(bits).int() - tensor.view(bits).int()).abs()
            most = 1 if op.startswith("fused") else 0
            assert apart.max() <= most, f"{name} differs by {int(apart.max())} units"
            assert (apart != 0).float().mean() < 1e-3, f"{int((apart != 0).sum())} elements of {name} differ"


def check_neighbours() -> None:
    """A request's result is the same to the bit, whatever the requests beside it and however long the longest may be."""
    together = half([129, 33, 70])
    for index, longer in ((0, 0), (1, 500), (2, 0)):
        alone = copied(together)
        for name, value in alone.items():
            if isinstance(value, torch.Tensor) and value.size(0) == 3 and name != "kv_cache":
                alone[name] = value[index : index + 1]
        alone["max_seq_len"] += longer
        results = []
        for args in (alone, copied(together)):
            launched("attention_half", {**TILE, "chunk": 32})(args)
            results.append(args["out"])
        assert torch.equal(results[0][0], results[1][index]), f"request {index} differs alone"


def failures() -> dict[str, str | None]:
    found: dict[str, str | None] = {}

    def note(name: str, check: Callable[[], None]) -> None:
        try:
            check()
            found[name] = None
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"

    for name, (args, config) in HALF.items():
        note(f"attention_half: {name}", lambda args=args, config=config: check_half(args, launched("attention_half", config)))
    for name, (args, config) in DECODE.items():
        note(
            f"paged_attention_decode: {name}",
            lambda args=args, config=config: check_decode(args, launched("paged_attention_decode", config)),
        )
    for name, (op, args, config) in WRITES.items():
        note(name, lambda op=op, args=args, config=config: check_writes(op, args, launched(op, config)))
    note("attention_half: neighbours", check_neighbours)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    like_the_gpu()
    json.dump(failures(), sys.stdout)
    sys.stdout.write("\n")

"""The attention ops on the GPU: against float32 over the grid of models, against FlashAttention 3's error, bits, neighbours.

test_ops.py has every variant at every bucket; here are long contexts, real shapes, and what must be the same to the bit.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import hdispatch
import pytest
import torch
from hdispatch.kernels.lib.paged_kv import Rule, attend, random_paged, write

DIM, PAGE = 128, 16
#: What an output may differ by from float32's, if FlashAttention 3 is not there to be twice as exact as.
TOLERANCE = 0.012


@pytest.fixture(autouse=True)
def strictly(bundle):
    """Every call is a hit."""
    with hdispatch.strict():
        yield


def generator(seed: int) -> torch.Generator:
    return torch.Generator("cuda").manual_seed(seed)


@contextmanager
def no_synchronization():
    """An error if the host waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def paged(lengths: torch.Tensor, kv_heads: int, dim: int = DIM, dtype: torch.dtype = torch.bfloat16, page: int = PAGE):
    return random_paged(lengths, kv_heads, dim, page, dtype, torch.device("cuda"), generator(int(lengths.sum())))


def half_args(
    lengths: list[int], heads: int, kv_heads: int, dim: int = DIM, norm: bool = True, dtype=torch.bfloat16
) -> list[Any]:
    """Arguments of attention_half."""
    spec, random, device = hdispatch.registry.spec("attention_half"), generator(len(lengths)), torch.device("cuda")
    made = paged(torch.tensor(lengths), kv_heads, dim, dtype)
    qkv = torch.randn(len(lengths), (heads + 2 * kv_heads) * dim, generator=random, device=device).to(dtype)
    weights = [torch.rand(dim, generator=random, device=device).to(dtype) + 0.5 if norm else None for _ in "qk"]
    angles = 6.2832 * torch.rand(max(lengths), dim // 2, generator=random, device=device)
    out = torch.full((len(lengths), heads, dim), float("nan"), dtype=dtype, device=device)
    assert spec.name == "attention_half"
    return [
        out, qkv, *weights, torch.cat((angles.cos(), angles.sin()), -1).to(dtype), (made.seq_lens - 1).long(), made.slots,
        made.kv_cache, made.block_table, made.seq_lens, max(lengths), dim**-0.5, 1e-6, heads // kv_heads, True,
    ]  # fmt: skip


def decode_args(lengths: list[int], heads: int, kv_heads: int, queries: int = 1, dim: int = DIM) -> list[Any]:
    """Arguments of paged_attention_decode."""
    made = paged(torch.tensor(lengths), kv_heads, dim)
    q = torch.randn(len(lengths), queries, heads, dim, generator=generator(7), device="cuda").bfloat16()
    most = next(n for n in (1, 4, 8) if n >= queries)
    return [
        torch.full_like(q, float("nan")), q, made.kv_cache, made.block_table, made.seq_lens, None, max(lengths), dim**-0.5,
        0.0, 0, 1.0, 1.0, heads // kv_heads, most,
    ]  # fmt: skip


def want_decode(args: list[Any]) -> torch.Tensor:
    _out, q, cache, table, lengths, sinks, longest, scale, softcap, window = args[:10]
    return attend(q.float(), cache, table, lengths, longest, Rule(scale, softcap, window, sinks))


def fa3_error(args: list[Any], want: torch.Tensor) -> float:
    """The largest error of vLLM's FlashAttention 3 on the same call; 0 where it is not installed."""
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except (ImportError, OSError):
        return 0.0
    _, q, cache, table, lengths, _, longest, scale = args[:8]
    k, v = cache.transpose(1, 2).split(q.size(3), dim=-1)
    starts = torch.arange(len(q) + 1, dtype=torch.int32, device="cuda") * q.size(1)
    got = flash_attn_varlen_func(
        q=q.flatten(0, 1), k=k, v=v, cu_seqlens_q=starts, max_seqlen_q=q.size(1), seqused_k=lengths, max_seqlen_k=longest,
        softmax_scale=scale, causal=True, block_table=table, fa_version=3,
    )  # fmt: skip
    return float((got.view(want.shape).float() - want).abs().max())


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert not got.isnan().any(), f"{int(got.isnan().sum())} elements are NaN"
    return float((got.float() - want.float()).abs().max())


GRID = [(batch, context) for batch in (1, 8, 32, 128) for context in (1, 128, 1024, 8192) if batch * context <= 2**18]


@pytest.mark.parametrize("heads", [(32, 8), (16, 8), (64, 8), (8, 8), (10, 2), (14, 2), (16, 1)], ids=str)
@pytest.mark.parametrize(("batch", "context"), GRID)
def test_decode_against_float32(heads: tuple[int, int], batch: int, context: int) -> None:
    args = decode_args([context] * batch, *heads)
    want = want_decode(args)
    for _ in range(2):  # the second call finds the counters as the first one leaves them
        args[0].fill_(float("nan"))
        hdispatch.ops.paged_attention_decode(*args)
        assert error(args[0], want) <= max(2 * fa3_error(args, want), TOLERANCE)


@pytest.mark.parametrize("queries", [2, 3, 4, 5, 8])
@pytest.mark.parametrize(("batch", "context"), [(1, 1024), (8, 100), (8, 8192)])
@pytest.mark.parametrize("heads", [(32, 8), (64, 8)], ids=str)
def test_several_queries_against_float32(heads: tuple[int, int], batch: int, context: int, queries: int) -> None:
    args = decode_args([context] * batch, *heads, queries=queries)
    want = want_decode(args)
    hdispatch.ops.paged_attention_decode(*args)
    assert error(args[0], want) <= max(2 * fa3_error(args, want), TOLERANCE)


@pytest.mark.parametrize("window", [0, 1, 100, 1000])
@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_what_models_add_against_float32(window: int, softcap: float, sinks: bool) -> None:
    args = decode_args([3000, 1, 64, 777], 64, 8, dim=64)
    args[5] = torch.randn(64, generator=generator(3), device="cuda").bfloat16() if sinks else None
    args[8], args[9] = softcap, window
    hdispatch.ops.paged_attention_decode(*args)
    assert error(args[0], want_decode(args)) <= TOLERANCE


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("heads", [(32, 8), (16, 8), (64, 8), (40, 8), (28, 4), (8, 8), (16, 1)], ids=str)
@pytest.mark.parametrize(("batch", "context"), [(1, 1), (1, 128), (1, 1025), (8, 1024), (32, 129), (128, 1024), (2, 20000)])
def test_half_against_float32(heads: tuple[int, int], batch: int, context: int, norm: bool) -> None:
    args = half_args([context] * batch, *heads, norm=norm)
    want = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
    want[7] = args[7].transpose(1, 2).clone().transpose(1, 2)
    hdispatch.registry.spec("attention_half").reference(*want)
    for _ in range(2):
        args[0].fill_(float("nan"))
        hdispatch.ops.attention_half(*args)
        assert error(args[0], want[0]) <= TOLERANCE


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("rotary", [1.0, 0.5])
def test_the_cache_gets_what_fused_qk_norm_rope_makes(dim: int, rotary: float) -> None:
    """K and V in the cache equal those of three launches, to the bit."""
    heads, kv_heads, lengths = 16, 4, list(range(1, 400, 7))
    args = half_args(lengths, heads, kv_heads, dim)
    args[4] = args[4][:, : int(dim * rotary)].contiguous()
    qkv, cache = args[1].clone(), args[7].transpose(1, 2).clone().transpose(1, 2)
    hdispatch.ops.fused_qk_norm_rope(qkv, heads, kv_heads, kv_heads, dim, 1e-6, *args[2:4], args[4], True, args[5], -1)
    k, v = qkv.unflatten(1, (-1, dim))[:, heads:].split(kv_heads, dim=1)
    write(cache, args[6], torch.cat((k, v), -1))
    hdispatch.ops.attention_half(*args)
    assert torch.equal(args[7].view(torch.int16), cache.view(torch.int16))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("tokens", [1, 5, 64, 1000, 4097])
def test_fused_cache_equals_its_two_launches(tokens: int, norm: bool) -> None:
    """fused_qk_norm_rope_cache equals fused_qk_norm_rope, then reshape_and_cache_flash, to the bit."""
    heads, kv_heads, random = 32, 8, generator(tokens)
    spec = hdispatch.registry.spec("fused_qk_norm_rope_cache")
    variant = spec.variant(f"bfloat16-bfloat16{'+q_weight+k_weight' if norm else ''}+head_dim=128+is_neox")
    args = spec.sample(variant, {"M": tokens, "K": (heads + 2 * kv_heads) * DIM}, torch.device("cuda"), random)
    qkv, (q_weight, k_weight, turns, _, positions, slots, cache) = args[0].clone(), args[5:]
    expected = cache.transpose(1, 2).clone()
    if norm:
        ours = (qkv, heads, kv_heads, kv_heads, DIM, 1e-6, q_weight, k_weight, turns, True, positions, -1)
        hdispatch.ops.fused_qk_norm_rope(*ours)
    else:
        q, k = (qkv[:, first * DIM : last * DIM] for first, last in ((0, heads), (heads, heads + kv_heads)))
        hdispatch.ops.rotary_embedding(positions, q, k, DIM, turns, True)
    k, v = (qkv.unflatten(1, (-1, DIM))[:, heads + of * kv_heads :][:, :kv_heads] for of in (0, 1))
    ones = torch.ones(1, device="cuda")
    hdispatch.ops.reshape_and_cache_flash(k, v, *expected.split(DIM, -1), slots, "auto", ones, ones)
    hdispatch.ops.fused_qk_norm_rope_cache(*args)
    assert torch.equal(args[0][:, : heads * DIM].view(torch.int16), qkv[:, : heads * DIM].view(torch.int16))
    assert torch.equal(cache.transpose(1, 2).view(torch.int16), expected.view(torch.int16))


def test_ten_thousand_random_lengths() -> None:
    for seed in range(40):
        lengths = torch.randint(
            1, (60, 300, 2000, 5000)[seed % 4], (250,), generator=torch.Generator().manual_seed(seed)
        ).tolist()
        args = decode_args(lengths, *((32, 8), (16, 8))[seed % 2])
        hdispatch.ops.paged_attention_decode(*args)
        assert error(args[0], want_decode(args)) <= TOLERANCE, seed


@pytest.mark.parametrize("op", ["attention_half", "paged_attention_decode"])
def test_neighbours_change_no_bit(op: str) -> None:
    """A request's result is the same, whatever else is in the batch, as long as batch and longest are of one bucket."""
    make = half_args if op == "attention_half" else decode_args
    lengths, outs = [1500, 70, 3, 2048], []
    args = make(lengths, 32, 8)
    seq_lens = args[9] if op == "attention_half" else args[4]
    for others in ((70, 3, 2048), (1, 1, 1100), (1500, 1500, 1500)):
        if op == "paged_attention_decode":
            seq_lens[1:].copy_(torch.tensor(others).clamp(max=torch.tensor(lengths[1:])).int())
        else:  # rows that are not written stay as they are
            args[6][1:] = -1
            seq_lens[1:].copy_(torch.tensor(others).clamp(max=torch.tensor(lengths[1:])).int())
        args[0].fill_(float("nan"))
        getattr(hdispatch.ops, op)(*args)
        outs.append(args[0][0].clone())
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_a_captured_graph_takes_longer_requests() -> None:
    args = decode_args([4000] * 3, 32, 8)
    lengths = args[4]
    lengths.fill_(100)
    hdispatch.ops.paged_attention_decode(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hdispatch.ops.paged_attention_decode(*args)
    for each in ((1, 2, 3), (64, 65, 4000), (0, 4000, 17)):
        lengths.copy_(torch.tensor(each))
        args[0].fill_(float("nan"))
        graph.replay()
        assert error(args[0], want_decode(args)) <= TOLERANCE


def test_two_streams_at_once() -> None:
    streams = [torch.cuda.Stream() for _ in range(2)]
    calls = [decode_args([2000, 999], 32, 8), decode_args([3000], 32, 8)]
    torch.cuda.synchronize()
    for _ in range(50):
        for stream, args in zip(streams, calls, strict=True):
            with torch.cuda.stream(stream):
                hdispatch.ops.paged_attention_decode(*args)
    torch.cuda.synchronize()
    for args in calls:
        assert error(args[0], want_decode(args)) <= TOLERANCE


@pytest.mark.parametrize(
    "op", ["attention_half", "paged_attention_decode", "reshape_and_cache_flash", "fused_qk_norm_rope_cache"]
)
def test_neither_kernel_nor_fallback_waits_for_the_gpu(op: str) -> None:
    spec = hdispatch.registry.spec(op)
    sizes = {"M": 5, "K": 48 * 128 if op.startswith("fused") else 128, "N": 32}
    args = spec.sample(spec.typical_variant(), sizes, torch.device("cuda"), generator(1))
    getattr(hdispatch.ops, op)(*args)
    spec.reference(*args)
    torch.cuda.synchronize()
    with no_synchronization():
        getattr(hdispatch.ops, op)(*args)
        spec.reference(*args)

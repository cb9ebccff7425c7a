"""attention over K and V in tensors without a GPU: references, fallbacks, the kernel in Triton's interpreter, what serves.

flash_attention_kernels.py interprets the kernel; it runs in a process of its own, once.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hdispatch
import pytest
import shared
import torch
from hdispatch.compile import build, configs, op_package
from hdispatch.compile.builder import Selection
from hdispatch.errors import ArgumentError, BuildError, MissError
from hdispatch.kernels.lib import sdpa
from hdispatch.kernels.lib.sdpa import LENGTHS, Rule, attend, serve
from hdispatch.sdpa import FALLBACK
from hdispatch.testing import null
from torch.nn.functional import scaled_dot_product_attention

PROGRAM = Path(__file__).parents[1] / "support" / "flash_attention_kernels.py"
OPS = ("attention_dense", "attention_varlen")
#: What the seed of the ops allows.
TOLERANCE = 1e-2


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    return shared.value(tmp_path_factory, "attention_dense", interpreted)


def interpreted() -> dict[str, str | None]:
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(PROGRAM)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_kernels_agree_with_the_references(outcomes: dict[str, str | None]) -> None:
    assert {name: why for name, why in outcomes.items() if why} == {}
    for op, least in zip(OPS, (30, 12), strict=True):
        assert len([name for name in outcomes if name.startswith(op)]) >= least, op


def looped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: Rule) -> torch.Tensor:
    """Attention of one sequence [heads, tokens, head_dim] in float64, a head and query at a time."""
    heads, queries, dim = q.shape
    out = torch.zeros(heads, queries, dim, dtype=torch.float64)
    for head in range(heads):
        own_k, own_v = (each[head * each.size(0) // heads].double() for each in (k, v))
        for query in range(queries):
            position = query + k.size(1) - queries
            end = min(k.size(1), position + 1) if rule.causal else k.size(1)
            begin = max(0, position + 1 - rule.window) if rule.window else 0
            scores = [float(q[head, query].double() @ own_k[t]) * rule.scale for t in range(begin, end)]
            if rule.softcap:
                scores = [rule.softcap * math.tanh(s / rule.softcap) for s in scores]
            total = sum(map(math.exp, scores))
            for t, s in zip(range(begin, end), scores, strict=False):
                out[head, query] += math.exp(s) / total * own_v[t]
    return out


RULES = {
    "plain": Rule(0.3),
    "causal": Rule(0.3, causal=True),
    "window": Rule(0.3, window=4, causal=True),
    "softcap": Rule(0.6, softcap=1.5),
    "all": Rule(0.6, 1.5, 3, True),
}
SHAPES = [(5, 5), (1, 7), (6, 9), (9, 6), (4, 0), (1, 1)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("queries", "keys"), SHAPES)
def test_reference_and_fallback_are_a_loop_in_float64(queries: int, keys: int, rule: str) -> None:
    q, k, v = randn(2, 4, queries, 8), randn(2, 2, keys, 8, seed=1), randn(2, 2, keys, 8, seed=2)
    want = torch.stack([looped(q[i], k[i], v[i], RULES[rule]) for i in range(2)])
    assert torch.allclose(attend(q, k, v, RULES[rule]).double(), want, atol=2e-6)
    assert (serve(q, k, v, RULES[rule]).double() - want).abs().max() <= TOLERANCE


@pytest.mark.parametrize("rule", RULES)
def test_torch_gets_vectors_of_16_bytes(monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    """cuDNN's kernel reads from addresses rounded down."""
    given = []

    def seen(*args: torch.Tensor, **more: object) -> torch.Tensor:
        given.extend(args)
        return scaled_dot_product_attention(*args, **more)

    monkeypatch.setattr(sdpa, "scaled_dot_product_attention", seen)
    plain = [randn(2, heads, 5, 8, seed=seed).half() for seed, heads in enumerate((4, 2, 2))]
    shifted = [torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x) for x in plain]
    odd_rows = [torch.cat((x, x[..., :1]), -1)[..., :-1] for x in plain]
    turned = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in plain]
    want = serve(*plain, RULES[rule])
    for args in (shifted, odd_rows, turned):
        assert torch.equal(serve(*args, RULES[rule]), want)
    for x in given:
        assert x.data_ptr() % 16 == 0
        assert x.stride(-1) == 1
        assert all(step * 2 % 16 == 0 for step in x.stride()[:-1])


@pytest.mark.parametrize("held", [sdpa.HELD, 1])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("fallback", [False, True])
def test_packed_sequences_are_dense_ones(monkeypatch: pytest.MonkeyPatch, fallback: bool, rule: str, held: int) -> None:
    """One after the other in float64; what lies behind them is neither read nor written."""
    monkeypatch.setattr(sdpa, "HELD", held)
    queries, keys = [3, 0, 5, 1], [3, 4, 7, 0]
    q, k, v = randn(12, 4, 8), randn(16, 2, 8, seed=1), randn(16, 2, 8, seed=2)
    k[14:] = v[14:] = q[9:] = float("nan")
    starts = [torch.tensor([0, *each]).cumsum(0).int() for each in (queries, keys)]
    out = torch.full_like(q, 7.0)
    spec, asked = hdispatch.registry.spec("attention_varlen"), RULES[rule]
    call = spec.fallback_function if fallback else spec.reference
    assert call is not None
    call(out, q, k, v, *starts, 5, 7, asked.scale, asked.softcap, asked.window, asked.causal, True)
    assert (out[9:] == 7).all()
    for i in range(4):
        mine, its = (slice(int(each[i]), int(each[i + 1])) for each in starts)
        want = looped(*(x.transpose(0, 1) for x in (q[mine], k[its], v[its])), asked).transpose(0, 1)
        assert torch.allclose(out[mine].double(), want, atol=TOLERANCE)


# ---- hdispatch.attention ----


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_is_torchs(causal: bool, kv_heads: int) -> None:
    q, k, v = randn(2, 4, 9, 64), randn(2, kv_heads, 9, 64, seed=1), randn(2, kv_heads, 9, 64, seed=2)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    got = hdispatch.attention(q, k, v, causal=causal)
    assert torch.equal(got, want)
    out = torch.full_like(q, float("nan"))
    assert hdispatch.attention(q, k, v, causal=causal, out=out, scale=0.125) is out
    assert torch.equal(out, want)
    strided = (each.transpose(1, 2).contiguous().transpose(1, 2) for each in (q, k, v))
    assert (hdispatch.attention(*strided, causal=causal).float() - want.float()).abs().max() <= TOLERANCE


def test_packed_attention_is_torchs() -> None:
    q, k, v = randn(12, 4, 64), randn(12, 2, 64, seed=1), randn(12, 2, 64, seed=2)
    starts = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
    got = hdispatch.attention(q, k, v, causal=True, cu_seqlens_q=starts, max_seqlen_q=7)
    assert torch.equal(got, hdispatch.attention(q, k, v, causal=True, cu_seqlens_q=starts, cu_seqlens_k=starts,
                                                max_seqlen_q=7, max_seqlen_k=7))  # fmt: skip
    for first, last in ((0, 5), (5, 12)):
        dense = (each[first:last].transpose(0, 1).unsqueeze(0) for each in (q, k, v))
        want = hdispatch.attention(*dense, causal=True)[0].transpose(0, 1)
        assert (got[first:last].float() - want.float()).abs().max() <= TOLERANCE


def test_nothing_to_do() -> None:
    for shape in ((0, 4, 9, 64), (2, 0, 9, 64), (2, 4, 0, 64)):
        empty = randn(*shape)
        assert hdispatch.attention(empty, empty, empty).shape == shape
    no_keys = randn(2, 4, 0, 64)
    assert not hdispatch.attention(randn(2, 4, 3, 64), no_keys, no_keys).any()
    none, starts = randn(0, 4, 64), torch.zeros(3, dtype=torch.int32)
    assert hdispatch.attention(none, none, none, cu_seqlens_q=starts, max_seqlen_q=0).shape == none.shape


Q, K, V = randn(2, 4, 9, 64), randn(2, 2, 9, 64, seed=1), randn(2, 2, 9, 64, seed=2)
P, STARTS = randn(9, 4, 64), torch.tensor([0, 9], dtype=torch.int32)
REFUSED: dict[str, tuple[tuple[torch.Tensor, ...], dict[str, Any]]] = {
    "heads": ((Q, randn(2, 3, 9, 64), randn(2, 3, 9, 64)), {}),
    "keys of v": ((Q, K, V[:, :, 1:]), {}),
    "sequences": ((Q, K[:1], V[:1]), {}),
    "head_dim": ((Q, K[..., :32], V), {}),
    "dtype": ((Q, K.half(), V), {}),
    "float64": ((Q.double(), K.double(), V.double()), {}),
    "out": ((Q, K, V), {"out": Q.new_zeros(2, 4, 8, 64)}),
    "overlap": ((Q, K, V), {"out": Q}),
    "rank": ((P, P, P), {}),
    "negative window": ((Q, K, V), {"window": -3, "causal": True}),
    "negative scale": ((Q, K, V), {"scale": -1.0}),
    "lengths without starts": ((P, P, P), {"max_seqlen_q": 9}),
    "starts without lengths": ((P, P, P), {"cu_seqlens_q": STARTS}),
    "one length": ((P, P, P), {"cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS, "max_seqlen_q": 9}),
    "starts of int64": ((P, P, P), {"cu_seqlens_q": STARTS.long(), "max_seqlen_q": 9}),
    "other numbers of starts": (
        (P, P, P),
        {"cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS[:1], "max_seqlen_q": 9, "max_seqlen_k": 9},
    ),
    "a gradient": ((Q.clone().requires_grad_(), K, V), {}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    args, given = REFUSED[name]
    with pytest.raises(ArgumentError):
        hdispatch.attention(*args, **given)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rank", [0, 1, 2, 5])
def test_what_is_no_attention_is_refused_in_the_functions_words(rank: int, packed: bool) -> None:
    odd = torch.zeros([2] * rank, dtype=torch.bfloat16)
    given: dict[str, Any] = {"cu_seqlens_q": STARTS, "max_seqlen_q": 9} if packed else {}
    right = (P, P, P) if packed else (Q, K, V)
    expected = r"\[tokens, heads, head_dim\] with" if packed else r"\[sequences, heads, tokens, head_dim\] without"
    for at, name in enumerate("qkv"):
        args = [*right[:at], odd, *right[at + 1 :]]
        with pytest.raises(ArgumentError, match=rf"attention: {name} is \[.*\]; expected {expected} cu_seqlens_q"):
            hdispatch.attention(*args, **given)
    wide = [each.double() for each in right]
    with pytest.raises(ArgumentError, match="attention: q is float64; expected one of bfloat16, float16, float32"):
        hdispatch.attention(*wide, **given)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [0, 1, 3, 20])
def test_float32_and_windows_without_causal_are_torchs(window: int, causal: bool) -> None:
    """Against scores that are masked by hand, dense and packed."""
    at = torch.arange(9)
    mask = (at[None] > at[:, None] - window) | (window == 0)
    mask &= (at[None] <= at[:, None]) | (not causal)
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = (each.to(dtype) for each in (Q, K, V))
        y, z = (each.repeat_interleave(2, 1).float() for each in (k, v))
        scores = (q.float() @ y.transpose(-1, -2) / 8).masked_fill(~mask, float("-inf"))
        want = scores.softmax(-1) @ z
        tolerance = 1e-5 if dtype == torch.float32 else TOLERANCE
        got = hdispatch.attention(q, k, v, window=window, causal=causal)
        assert got.dtype == dtype
        assert (got.float() - want).abs().max() <= tolerance
        rows = [each.transpose(1, 2).flatten(0, 1) for each in (q, k, v)]
        starts = torch.tensor([0, 9, 18], dtype=torch.int32)
        packed = hdispatch.attention(*rows, window=window, causal=causal, cu_seqlens_q=starts, max_seqlen_q=9)
        assert (packed.unflatten(0, (2, 9)).transpose(1, 2).float() - want).abs().max() <= tolerance


def test_no_gradient_is_asked_for_without_grad() -> None:
    with torch.no_grad():
        assert hdispatch.attention(Q.clone().requires_grad_(), K, V).shape == Q.shape


# ---- rows ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose kernels serve every length: the config files leave to torch where it is faster."""
    out = tmp_path_factory.mktemp("attention")
    rows = ((16, {"block_m": 16, "num_warps": 4, "stages": 3}), (16384, {"block_m": 128, "num_warps": 8, "stages": 2}))
    entries = [
        {"key": {"head_dim": 64, "num_sequences": 4, "max_seqlen_q": edge}, "config": {"block_n": 64} | config}
        for edge, config in rows
    ]
    (out / "nvidia_h200.json").write_text(json.dumps(entries))
    chosen = Selection(shapes=lambda _: [{"K": 64}], variants=lambda _: ["bfloat16+causal"])
    usual = op_package.config_folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op_package, "config_folder", lambda name: out if name.endswith("dense") else usual(name))
        build(list(OPS), "h100", out / "bundle", select=chosen)
    return out / "bundle"


def grids(*args: torch.Tensor, **given: Any) -> list[tuple[int, int, int]]:
    with null.recording(), hdispatch.strict():
        hdispatch.attention(*args, causal=True, **given)
    return [launch["grid"] for launch in null.launches()]


@pytest.mark.usefixtures("bundle")
@pytest.mark.parametrize("queries", sorted({n for edge in LENGTHS[:5] for n in (edge - 1, edge, edge + 1)} - {0}))
def test_dense_calls_are_hits_at_every_edge(queries: int) -> None:
    q, k = randn(3, 8, queries, 64), randn(3, 2, queries, 64)
    rows = 16 if queries <= 16 else 128
    assert grids(q, k, k.clone()) == [(-(-4 * queries // rows), 2, 3)]
    apart = randn(3, queries, 8, 80)[..., :64].transpose(1, 2)
    assert grids(apart, k, k.clone()) == [(-(-4 * queries // rows), 2, 3)]


@pytest.mark.usefixtures("bundle")
@pytest.mark.parametrize("longest", sorted({n for edge in LENGTHS for n in (edge - 1, edge, edge + 1)} - {0} | {2**31 - 1}))
def test_packed_calls_are_hits_at_every_edge(longest: int) -> None:
    q, k = randn(20, 8, 64), randn(20, 2, 64)
    starts = torch.tensor([0, 5, 5, 20], dtype=torch.int32)
    rows = 16 if longest <= 16 else 128
    found = grids(q, k, k.clone(), cu_seqlens_q=starts, max_seqlen_q=longest)
    assert found == [(-(-4 * min(longest, 20) // rows), 2, 3)], "a block for more rows than there are"


@pytest.mark.usefixtures("bundle")
def test_what_the_kernel_does_not_take_is_the_fallbacks() -> None:
    shifted = randn(2 * 4 * 9 * 64 + 1)[1:].view(2, 4, 9, 64)
    backwards = randn(2, 4, 64, 9).transpose(2, 3)
    odd = randn(2, 4, 9, 65)[..., :64]
    one_head = randn(2, 4, 9, 96)
    for q in (shifted, backwards, odd, one_head, Q.half()):
        args = (q, q.clone(), q.clone())
        got = hdispatch.attention(*args, causal=True)
        want = torch.nn.functional.scaled_dot_product_attention(*args, is_causal=True)
        assert (got.float() - want.float()).abs().max() <= TOLERANCE
        with hdispatch.strict(), pytest.raises(MissError):
            hdispatch.attention(*args, causal=True)
    found = hdispatch.stats()["attention_dense"]
    assert found["hits"] == 0
    assert found["fallbacks"] == 5


@pytest.mark.usefixtures("bundle")
def test_explain_says_what_serves() -> None:
    args = (torch.empty_like(Q), Q, K, V, 9, 0.125, 0.0, 0, True, False)
    assert "attention" in hdispatch.explain(hdispatch.ops.attention_dense, *args)
    said = hdispatch.explain(hdispatch.ops.attention_dense, *args[:-2], False, False)
    assert "no row" in said


# ---- what serves which sizes ----


def test_without_a_bundle_torch_serves() -> None:
    assert hdispatch.select_attention(128, 1024).kernel == FALLBACK
    assert "no bundle" in hdispatch.select_attention(128, 1024).why


@pytest.mark.usefixtures("bundle")
@pytest.mark.parametrize("packed", [False, True])
def test_the_selector_says_what_the_table_has(packed: bool) -> None:
    for seq_len, rows in ((1, 16), (16, 16), (17, 128), (100_000, 128)):
        found = hdispatch.select_attention(64, seq_len, causal=True, packed=packed)
        assert (found.kernel, found.config["block_m"]) == ("triton", rows)
        assert hdispatch.select_attention(64, seq_len, (9, 0), causal=True, packed=packed) == found
    for capability, why in (((7, 5), "8.0 and newer"), ((8, 0), "is for 9.0"), ((10, 0), "is for 9.0")):
        found = hdispatch.select_attention(64, 512, capability, causal=True, packed=packed)
        assert found.kernel == FALLBACK
        assert why in found.why
    for other in ({"dtype": torch.float16}, {"causal": False}, {"limits": True}, {"dtype": torch.float32}):
        assert hdispatch.select_attention(64, 512, packed=packed, **{"causal": True} | other).kernel == FALLBACK
    assert hdispatch.select_attention(64, 512, packed=packed).kernel == FALLBACK, "as a call without causal"
    assert "no row" in hdispatch.select_attention(96, 512, causal=True, packed=packed).why


def test_buckets_that_a_config_file_leaves_to_the_fallback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They have no row; the others have one, the bundle has no gap, and calls are served by torch."""
    small = {"block_m": 16, "block_n": 64, "num_warps": 4, "stages": 3}
    entries: list[dict[str, Any]] = [
        {"key": {"head_dim": dim, "num_sequences": 4, "max_seqlen_q": edge}, **what}
        for dim in (64, 128, 256)
        for edge, what in ((16, {"config": small}), (16384, {"config": {}, "backend": "fallback"}))
    ]
    (tmp_path / "nvidia_h200.json").write_text(json.dumps(entries))
    monkeypatch.setattr("hdispatch.compile.op_package.config_folder", lambda _: tmp_path)
    spec = hdispatch.registry.spec("attention_dense")
    typical = spec.typical_variant()
    monkeypatch.setattr("hdispatch.opspec.OpSpec.served_variants", lambda _: [typical])
    report = build(["attention_dense"], "h100", tmp_path / "bundle")
    assert report.rows == 3 * 2
    loaded = hdispatch.load(tmp_path / "bundle", driver="null")
    try:
        assert hdispatch.select_attention(64, 16, causal=True).kernel == "triton"
        assert hdispatch.select_attention(64, 17, causal=True).kernel == FALLBACK
        q = randn(1, 2, 17, 64)
        want = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        assert torch.equal(hdispatch.attention(q, q.clone(), q.clone(), causal=True), want)
    finally:
        loaded.unload()
    entries[1]["config"] = small
    (tmp_path / "nvidia_h200.json").write_text(json.dumps(entries))
    with pytest.raises(BuildError, match=r"it takes \{\}"):
        configs.read(tmp_path / "nvidia_h200.json", spec)

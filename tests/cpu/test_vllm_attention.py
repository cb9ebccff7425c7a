"""Attention of a step through the plug-in's layers: decode, mixed, chunks, replays, caches."""

from __future__ import annotations

from types import SimpleNamespace as Object

import hdispatch
import pytest
import torch
import toy
import vllm_layers
from hdispatch import HdispatchError
from hdispatch.integrations.vllm import attention as attention_module
from hdispatch.integrations.vllm import layers, schemes, support
from hdispatch.ladders import Ladders
from vllm_layers import (
    HIDDEN,
    LONG,
    PAGE,
    SWITCHES,
    _OneRank,
    decode,
    decode_step,
    example,
    is_whole,
    make_attention,
    make_layers,
    make_weights,
    mixed_step,
    with_caches,
)


def test_padded_rows_of_a_decode_step_are_harmless():
    """Rows with requests of no token, as in full graphs, and rows without requests: the same bits and caches as without."""
    lengths = [1, 17, 40, 64]
    _, expected, caches = decode(with_caches(make_weights(schemes.PerTokenFp8())), lengths, 4)
    assert expected.isfinite().all()
    assert not torch.equal(*caches)
    for each in ([*lengths, 0, 0], lengths):
        _, padded, padded_caches = decode(with_caches(make_weights(schemes.PerTokenFp8())), each, 6)
        assert torch.equal(padded[:4], expected)
        assert padded.isfinite().all()
        assert all(torch.equal(mine, other) for mine, other in zip(padded_caches, caches, strict=True))


@pytest.mark.parametrize("reduce", [None, torch.clone, _OneRank()])
def test_decode_steps_in_chunks_and_with_sums(monkeypatch, reduce):
    """More requests than the arena has rows, and sums over ranks: the bits of a step without either; caches too."""
    lengths = [1 + 7 * request % 60 for request in range(150)]
    monkeypatch.setattr(vllm_layers, "BLOCKS", 4 * len(lengths) + 1)

    def run(reduce):
        rows, found, caches = decode(with_caches(make_weights(schemes.PerTokenFp8())), lengths, 150, reduce)
        return rows, [found, *caches]

    rows, expected = run(None)
    assert rows == 512
    assert all(each.isfinite().all() for each in expected)
    for limit in (128, 512):
        monkeypatch.setattr(layers, "rows_within", lambda *_, limit=limit: limit)
        rows, found = run(reduce)
        assert rows == limit
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.usefixtures("flash_attention")
@pytest.mark.parametrize("scheme", [schemes.Scheme(), schemes.PerTokenFp8(), schemes.BlockFp8()])
@pytest.mark.parametrize("written", [True, False])
def test_steps_with_flash_attention(monkeypatch, scheme, written):
    """Prompts beside decoding requests: the same bits in chunks, with sums over ranks, with rows that vLLM has no slots for."""
    if not written:
        monkeypatch.setattr(attention_module, "objection", lambda *_: "no row")
        monkeypatch.setattr(attention_module, "loaded_ladders", lambda *_: Ladders((1,)))
    queries, lengths = [1, 60, 33, 1, 50, 64], [40, 60, 64, 1, 61, 64]
    metadata, slots, positions = mixed_step(queries, lengths)
    tokens = len(positions)
    embedded = torch.randn(tokens + 5, HIDDEN, generator=torch.Generator().manual_seed(6)).bfloat16()

    def run(limit, reduce, padding=0):
        monkeypatch.setattr(layers, "rows_within", lambda *_: limit)
        bound = with_caches(make_weights(scheme))
        names = [layer.attention.layer_name for layer in bound.layers]
        context = Object(attn_metadata=dict.fromkeys(names, metadata), slot_mapping=dict.fromkeys(names, slots))
        fused = make_layers(bound, reduce, context)
        given = torch.nn.functional.pad(positions, (0, padding), value=7)
        found = fused.forward(None, given, embedded[: tokens + padding])[:tokens]
        whole = reduce is None or (isinstance(reduce, _OneRank) and is_whole(fused, len(given)))
        assert set(fused._steps) == {(attention_module.Kind.FLASH, False, whole)}
        assert (fused.attention.write_reason is None) is written
        return [found, *(layer.attention.kv_cache.clone() for layer in bound.layers)]

    expected = run(512, None)
    assert all(each.isfinite().all() for each in expected)
    summed = ((512, _OneRank()), (128, _OneRank()), (512, _OneRank(), 5))
    for changes in ((128, None), (512, torch.clone), (128, torch.clone), (512, None, 5), (128, torch.clone, 5), *summed):
        found = run(*changes)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), changes


@pytest.mark.usefixtures("flash_attention")
def test_decode_steps_of_both_kinds_are_near(monkeypatch):
    lengths = [1, 17, 40, 64]
    _, half, half_caches = decode(with_caches(make_weights(schemes.Scheme())), lengths, 4)
    metadata, slots, positions = mixed_step([1] * 4, lengths)
    monkeypatch.setenv("HDISPATCH_ATTENTION", "fa3")
    bound = with_caches(make_weights(schemes.Scheme()))
    names = [layer.attention.layer_name for layer in bound.layers]
    context = Object(attn_metadata=dict.fromkeys(names, metadata), slot_mapping=dict.fromkeys(names, slots))
    embedded = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(6)).bfloat16()
    flash = make_layers(bound, None, context).forward(None, positions, embedded)
    assert (flash.float() - half.float()).norm() < 0.01 * flash.float().norm()
    for mine, layer in zip(half_caches, bound.layers, strict=True):
        assert (mine.float() - layer.attention.kv_cache.float()).norm() < 0.01 * mine.float().norm()


def test_caches_that_are_replaced_are_those_that_steps_write():
    """vLLM makes new caches after profiling and on waking up."""
    bound = with_caches(make_weights(schemes.PerTokenFp8()))
    metadata, slots = decode_step([5, 16])
    names = [layer.attention.layer_name for layer in bound.layers]
    context = Object(attn_metadata=dict.fromkeys(names, metadata), slot_mapping=dict.fromkeys(names, slots))
    fused = make_layers(bound, None, context)
    embedded = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(6)).bfloat16()
    expected = fused.forward(None, torch.tensor([4, 15]), embedded)
    written = [layer.attention.kv_cache for layer in bound.layers]
    kept = [each.clone() for each in written]
    with_caches(bound)
    assert torch.equal(fused.forward(None, torch.tensor([4, 15]), embedded), expected)
    for layer, old, copy in zip(bound.layers, written, kept, strict=True):
        assert torch.equal(old, copy)
        assert torch.equal(layer.attention.kv_cache, copy)


@pytest.mark.parametrize(
    ("edges", "limit", "expected"),
    [
        ((128, 256), 500, {1: 128, 128: 128, 129: 256, 256: 256, 257: 500, 500: 500}),
        ((128, 256), 5000, {257: 1024, 1024: 1024, 1025: 2048, 4999: 5000}),
        ((), 500, {1: 500, 500: 500}),
    ],
    ids=["to the longest", "behind the last edge", "no rows"],
)
def test_lengths_that_attention_half_is_told(monkeypatch, edges, limit, expected):
    """The ends of buckets, so that a step is seldom resolved for it; never more than the longest request may have."""
    monkeypatch.setattr(attention_module, "loaded_ladders", lambda *_: Object(m=(), second=edges))
    attention = make_attention(with_caches(make_weights(schemes.Scheme())), limit)
    attention.bind()
    told = {}
    for longest in expected:
        found = Object(max_seq_len=longest, block_table=torch.zeros(1, 1), seq_lens=torch.ones(1))
        told[longest] = attention.given(attention_module.Kind.HALF, torch.zeros(1), found, torch.zeros(1))[-1]
    assert told == expected


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize(("value", "on"), [(None, True), ("", True), ("1", True), ("0", False)])
def test_replays_and_runner_are_on_unless_switched_off(monkeypatch, name, value, on):
    monkeypatch.delenv(name, raising=False)
    if value is not None:
        monkeypatch.setenv(name, value)
    assert SWITCHES[name]() is on


@pytest.mark.parametrize("name", SWITCHES)
def test_another_value_of_a_switch_is_refused(monkeypatch, name):
    monkeypatch.setenv(name, "yes")
    with pytest.raises(HdispatchError, match=f"{name} is 'yes'; it takes 1"):
        SWITCHES[name]()


def test_a_decode_step_writes_the_new_tokens_alone():
    bound = with_caches(make_weights(schemes.Scheme()))
    before = [layer.attention.kv_cache.clone() for layer in bound.layers]
    _, _, caches = decode(bound, [5, 16], 2)
    _, slots = decode_step([5, 16])
    for old, new in zip(before, caches, strict=True):
        other = (old != new).any(-1).any(1).nonzero().tolist()
        assert sorted(block * PAGE + place for block, place in other) == sorted(slots.tolist())


@pytest.mark.parametrize(
    ("setting", "longest", "change", "taken"),
    [
        ("auto", 512, {}, True),
        ("fa3", 512, {}, False),
        ("auto", 512, {"max_query_len": 2}, False),
        ("auto", 512, {"num_actual_tokens": 3}, False),
        ("auto", 512, {"max_seq_len": 512}, True),  # a graph of a short model
        ("auto", LONG, {}, True),
        ("auto", LONG, {"max_seq_len": LONG - 1}, True),
        ("auto", LONG, {"max_seq_len": LONG}, False),  # a graph of a long one
        ("half", LONG, {"max_seq_len": LONG}, True),
    ],
)
def test_steps_that_take_attention_half(monkeypatch, setting, longest, change, taken):
    monkeypatch.setenv("HDISPATCH_ATTENTION", setting)
    attention = make_attention(with_caches(make_weights(schemes.Scheme())), longest)
    assert not attention._is_decode(decode_step([5, 16])[0])  # before the caches are known
    attention.bind()
    assert attention._is_decode(decode_step([5, 16], **change)[0]) is taken


def test_steps_keep_flash_attention_and_vllms_write_where_rows_are_missing(monkeypatch, caplog):
    """Every bucket is asked for, up to the rows of a step and the longest request; said once."""
    asked = []

    def refuse(op, *arguments):
        hdispatch.explain(op, *arguments)  # raises for a wrong call
        half = op.name == "attention_half"
        asked.append((arguments[0].size(0), arguments[10] if half else None))
        return f"no row of {op.name}" if arguments[0].size(0) == (64 if half else 256) else None

    monkeypatch.setattr(
        attention_module,
        "loaded_ladders",
        lambda op, _: Ladders((1, 8, 64, 256), *(("max_seq_len", (64, 1024)) if op == "attention_half" else ())),
    )
    monkeypatch.setattr(attention_module, "objection", refuse)
    caplog.set_level("INFO", logger="vllm.hdispatch")
    bound = with_caches(make_weights(schemes.Scheme()))
    attention = make_attention(bound)
    attention.bind()
    assert asked == [(1, 64), (1, 512), (8, 64), (8, 512), (64, 64), (1, None), (8, None), (64, None), (256, None)]
    assert (attention.decode_reason, attention.write_reason) == (
        "no row of attention_half",
        "no row of fused_qk_norm_rope_cache",
    )
    attention.bind()
    said = (
        "decode steps take FlashAttention 3: no row of attention_half; others FlashAttention 3 after vLLM's cache write: no row"
    )
    assert caplog.text.count(said) == 1
    monkeypatch.setattr(attention_module, "objection", lambda *_: None)
    assert attention.is_bound()
    bound.layers[-1].attention.kv_cache = bound.layers[-1].attention.kv_cache.clone()
    assert not attention.is_bound()
    attention.bind()
    assert (attention.decode_reason, attention.write_reason) == (None, None)
    assert "decode steps take attention_half; others FlashAttention 3 after fused_qk_norm_rope_cache" in caplog.text


def test_why_the_table_does_not_serve_a_call():
    found = support.objection(hdispatch.ops.attention_half, *example())
    assert found.startswith(
        "attention_half(bfloat16-bfloat16+group=2, M=3, K=64, N=4, max_seq_len=100): no bundle with this op"
    )
    found = support.objection(hdispatch.ops.attention_half, *example(neox=False))
    assert found == "attention_half: no variant has these values: is_neox is 0, served are 1"


def test_rows_of_a_loaded_bundle(tmp_path):
    """Served, no row, a guard that fails: of the bundle that serves the tensors' device."""
    op = hdispatch.ops.toy
    bundle = hdispatch.load(toy.write(tmp_path / "toy"), driver="null")
    try:
        assert support.loaded_ladders("toy", torch.device("cpu")) == Ladders((1, 2, 4, 8, 16))
        assert support.loaded_ladders("attention_half", torch.device("cpu")) == Ladders(())
        assert support.objection(op, *toy.arguments()) is None
        assert support.objection(op, *toy.arguments(4, 513)) == (
            "toy(bfloat16, M=4, K=513, N=0): the launch table has no row for it"
        )
        strided = toy.arguments()
        strided[1] = torch.zeros(4, 72, dtype=torch.bfloat16)[:, :64]
        assert "guard: input.stride(0) % 16 == 0 does not hold" in support.objection(op, *strided)
    finally:
        bundle.unload()
    assert support.loaded_ladders("toy", torch.device("cpu")) == Ladders(())

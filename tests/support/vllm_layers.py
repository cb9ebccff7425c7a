"""Weights, layers, attention and steps of a small model, for tests of the plug-in without vLLM."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import pathlib
from types import SimpleNamespace as Object

import hdispatch
import torch
from hdispatch.integrations.vllm import attention as attention_module
from hdispatch.integrations.vllm import layers, schemes, settings, weights

FP8 = torch.float8_e4m3fn
HIDDEN, HEADS, KV_HEADS, HEAD, INTERMEDIATE = 256, 4, 2, 64, 384
SHAPE = weights.Shape(HIDDEN, HEADS, KV_HEADS, HEAD, INTERMEDIATE)


def make_weights(scheme, count=2, shape=SHAPE, make=None):
    """Weights of `count` layers without norms of q and k; random, unless `make` makes tensors of their sizes."""
    generator = torch.Generator().manual_seed(5)
    hidden = shape.hidden

    def normal(*sizes):
        return torch.randn(sizes, generator=generator) if make is None else make(sizes)

    def matrix(k, n):
        if make is not None and scheme.quantized:
            blocks = isinstance(scheme, schemes.BlockFp8)
            scale = torch.ones((-(-k // 128), -(-n // 128)) if blocks else (n, 1))
            return schemes.Linear(make((n, k), dtype=FP8).t(), scale, None, torch.ones(1))
        if make is not None:
            return schemes.Linear(make((n, k), dtype=torch.bfloat16))
        if not scheme.quantized:
            return schemes.Linear((normal(n, k) / k**0.5).bfloat16(), bias=normal(n).bfloat16())
        weight = (100 * normal(n, k)).to(FP8).t()
        shape = (-(-k // 128), -(-n // 128)) if isinstance(scheme, schemes.BlockFp8) else (n, 1)
        scale = (0.5 + torch.rand(shape, generator=generator)) / (100 * k**0.5)
        given = torch.tensor([0.01]) if isinstance(scheme, schemes.StaticFp8) else None
        return schemes.Linear(weight, scale, normal(n).bfloat16(), given)

    found = [
        weights.Layer(
            *((1 + 0.1 * normal(hidden)).bfloat16() for _ in range(2)),
            *(None, None),
            matrix(hidden, shape.qkv),
            matrix(shape.attended, hidden),
            matrix(hidden, 2 * shape.intermediate),
            matrix(shape.intermediate, hidden),
            attention_layer(f"layer {n}", shape),
        )
        for n in range(count)
    ]
    rope = normal(512, shape.head_size).bfloat16()
    norm = (1 + 0.1 * normal(hidden)).bfloat16()
    embedding = normal(64, hidden).bfloat16()
    return weights.Weights(shape, scheme, torch.bfloat16, 1e-6, embedding, norm, rope, True, tuple(found))


def attention_layer(name, shape):
    """An attention layer of vLLM's that has no cache yet."""
    size = shape.head_size
    return Object(layer_name=name, impl=Object(scale=size**-0.5), head_size=size, kv_cache=torch.tensor([]))


def make_attention(bound, longest=512):
    return attention_module.Attention(bound, lambda: longest, (64, 512), lambda x: x)


class _OneRank:
    """The custom all-reduce of a single rank: what was summed is NaN after it."""

    def __init__(self, rows=1000):
        self.memory, self.reason = torch.full((rows, HIDDEN), float("nan"), dtype=torch.bfloat16), None

    def objection(self):
        return self.reason

    def handle(self):
        return 7

    def add(self, s, _, shared, total):
        s.add_torch(torch.ops.aten.copy_.default, total, shared)
        s.add_torch(torch.ops.aten.fill_.Scalar, shared, float("nan"))

    def sum(self, rows, out):
        out.copy_(self.memory[:rows])
        self.memory.fill_(float("nan"))


def make_layers(bound, reduce, context=None, most=512, former=None):
    """Layers whose arena is NaN in every type."""
    context = context or Object(attn_metadata=None)
    summed, all_reduce = (torch.clone, reduce) if isinstance(reduce, _OneRank) else (reduce, None)
    fused = layers.FusedLayers(Object(), bound, most, make_attention(bound), lambda: context, summed, former, all_reduce)
    fused.workspace.memory.fill_(255)
    return fused


def run_step(bound, rows, reduce, most=512):
    """A step without attention, as vLLM's memory profile makes it."""
    fused = make_layers(bound, reduce, most=most)
    embedded = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(6)).bfloat16()
    found = [fused.forward(None, torch.arange(rows), embedded).clone() for _ in range(2)]
    if isinstance(reduce, _OneRank):
        few = not bound.scheme.quantized and rows <= 32
        assert set(fused._steps) == {(attention_module.Kind.NOTHING, few, is_whole(fused, rows))}
    return found


def is_whole(fused, rows):
    """Whether a step is one sequence."""
    most = min(layers.REPLAYED_ROWS, fused.workspace.rows, fused.all_reduce.memory.size(0))
    return rows <= most and fused.all_reduce.reason is None


@contextlib.contextmanager
def simulated_embedding():
    """vLLM's op, as the simulated engine has it."""
    with torch.library._scoped_library("_C", "FRAGMENT") as library:
        library.define(
            "vocab_parallel_embedding(Tensor! out, Tensor input_ids, Tensor weight, int org_vocab_start_index, "
            "int org_vocab_end_index, int num_org_vocab_padding, int added_vocab_start_index, int added_vocab_end_index) -> ()"
        )
        library.impl("vocab_parallel_embedding", simulated_ops().embedding, "CPU")
        yield


PAGE, BLOCKS = 16, 40


def simulated_ops():
    path = pathlib.Path(__file__).parents[1] / "vllm" / "simulated_ops.py"
    spec = importlib.util.spec_from_file_location("simulated_ops", path)
    simulated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(simulated)
    return simulated


def with_caches(bound):
    """The same layers with caches of random tokens."""
    generator = torch.Generator().manual_seed(9)
    for layer in bound.layers:
        sizes = BLOCKS, PAGE, bound.shape.kv_heads, 2 * bound.shape.head_size
        cache = torch.randn(sizes, generator=generator).bfloat16().transpose(1, 2)
        layer.attention.kv_cache = cache
        layer.attention._k_scale = layer.attention._v_scale = torch.ones(1)
    return bound


def decode_step(lengths, slots=None, **changes):
    """Metadata and slots of a step of one new token per request; 0: a padded row. Blocks of a request are its own."""
    width = max(4, -(-max(lengths) // PAGE))
    table = torch.arange(1, len(lengths) * width + 1, dtype=torch.int32).view(len(lengths), width)
    last = torch.tensor(lengths) - 1
    at = table[torch.arange(len(lengths)), last.clamp(min=0) // PAGE].long() * PAGE + last % PAGE
    found = Object(
        max_query_len=1,
        num_actual_tokens=len(lengths),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        max_seq_len=max(lengths),
        block_table=table,
    )
    slots = torch.where(last < 0, -1, at) if slots is None else slots
    return changed(found, changes), slots


def decode(bound, lengths, rows, reduce=None):
    """The hidden states of a decode step with `rows` tokens and as many requests as lengths; and the caches after it."""
    metadata, slots = decode_step(lengths)
    positions = torch.cat((metadata.seq_lens.long() - 1, torch.full((rows - len(lengths),), 7))).clamp(min=0)
    names = [layer.attention.layer_name for layer in bound.layers]
    context = Object(attn_metadata=dict.fromkeys(names, metadata), slot_mapping=dict.fromkeys(names, slots))
    fused = make_layers(bound, reduce, context)
    embedded = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(6)).bfloat16()
    before = hdispatch.stats()["attention_half"]["fallbacks"]
    found = fused.forward(None, positions, embedded)
    assert hdispatch.stats()["attention_half"]["fallbacks"] - before == len(bound.layers)
    assert fused.attention.decode_reason is None
    whole = reduce is None or (isinstance(reduce, _OneRank) and is_whole(fused, rows))
    assert set(fused._steps) == {(attention_module.Kind.HALF, not bound.scheme.quantized and rows <= 32, whole)}
    return fused.workspace.rows, found, [layer.attention.kv_cache.clone() for layer in bound.layers]


def mixed_step(queries, lengths):
    """Metadata, slots and positions of a step with so many new tokens of requests that have `lengths` after it."""
    found, _ = decode_step(lengths)
    starts = torch.tensor([0, *itertools.accumulate(queries)], dtype=torch.int32)
    places = [(row, at) for row, (q, n) in enumerate(zip(queries, lengths, strict=True)) for at in range(n - q, n)]
    slots = torch.tensor([int(found.block_table[row, at // PAGE]) * PAGE + at % PAGE for row, at in places])
    more = {"max_query_len": max(queries), "num_actual_tokens": len(places), "query_start_loc": starts, "causal": True}
    more |= {"scheduler_metadata": None, "max_num_splits": 0}
    return changed(found, more), slots, torch.tensor([at for _, at in places])


SWITCHES = {"HDISPATCH_REPLAY": settings.replay, "HDISPATCH_RUNNER": settings.runner, "HDISPATCH_SCHEDULER": settings.scheduler}
LONG = attention_module.GRAPH_TOKENS + 1


def example(neox=True):
    bound = with_caches(make_weights(schemes.Scheme()))
    attention = make_attention(dataclasses.replace(bound, neox=neox))
    attention.bind()
    return attention._half_example(3, 100)


def changed(found, changes):
    for path, value in changes.items():
        *owners, name = path.split("__")
        owner = found
        for each in owners:
            owner = getattr(owner, each)
        setattr(owner, name, value)
    return found

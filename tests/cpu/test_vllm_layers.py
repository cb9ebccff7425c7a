"""A step through the plug-in's layers: sums over ranks, chunks."""

from __future__ import annotations

from types import SimpleNamespace as Object

import pytest
import torch
from hdispatch.integrations.vllm import layers, schemes
from vllm_layers import (
    HIDDEN,
    _OneRank,
    make_layers,
    make_weights,
    run_step,
    simulated_embedding,
)


@pytest.mark.parametrize("scheme", [schemes.Scheme(), schemes.StaticFp8(), schemes.PerTokenFp8(), schemes.BlockFp8()])
@pytest.mark.parametrize("rows", [1, 7, 130])
def test_sums_over_ranks_are_read_where_they_are(scheme, rows):
    """A sum that is a new tensor, or the same one, and chunks of rows: the bits of the step without sums."""
    bound = make_weights(scheme)
    (expected, again) = run_step(bound, rows, None)
    assert expected.isfinite().all()
    assert torch.equal(expected, again)
    summed = []

    def copied(x):
        summed.append(x.clone())
        x.fill_(float("nan"))  # nothing reads what was summed
        return summed[-1]

    assert all(torch.equal(each, expected) for each in run_step(bound, rows, copied))
    assert len(summed) == 2 * 2 * 2  # halves, layers, steps
    assert all(torch.equal(each, expected) for each in run_step(bound, rows, lambda x: x))


@pytest.mark.parametrize("scheme", [schemes.Scheme(), schemes.StaticFp8(), schemes.PerTokenFp8(), schemes.BlockFp8()])
@pytest.mark.parametrize("rows", [1, 7, 32, 33, 256, 257])
def test_sums_over_ranks_are_steps_of_one_sequence(scheme, rows):
    """Up to 256 rows, as many as ranks share memory for, while vLLM has no other all-reduce: the bits of the step without."""
    bound = make_weights(scheme)
    (expected, again) = run_step(bound, rows, None)
    assert expected.isfinite().all()
    assert torch.equal(expected, again)
    other = _OneRank()
    other.reason = "another comes first"
    for all_reduce in (_OneRank(), _OneRank(rows), _OneRank(rows - 1), other):
        assert all(torch.equal(each, expected) for each in run_step(bound, rows, all_reduce))
    assert _OneRank().memory.size(0) > rows  # the first one had more


def test_a_step_without_rows_sums_nothing():
    all_reduce = _OneRank()
    fused = make_layers(make_weights(schemes.PerTokenFp8()), all_reduce)
    embedded = torch.empty(0, HIDDEN, dtype=torch.bfloat16)
    assert fused.forward(None, torch.arange(0), embedded).shape == (0, HIDDEN)
    assert all_reduce.memory.isnan().all()


@pytest.mark.parametrize("shard", [True, False])
def test_the_embedding_of_a_rank_is_summed(shard):
    """In the memory that ranks share, where vLLM's embedding is no more than its op and a sum; else by vLLM's module."""
    bound = make_weights(schemes.PerTokenFp8())
    ids = torch.tensor([3, 0, 63, 9])
    expected = make_layers(bound, None).forward(ids, torch.arange(4), None)
    fused = make_layers(bound, _OneRank())
    asked = []

    def embed(given):
        asked.append(given)
        return bound.embedding[given]

    embed.use_fused_embedding, embed.reduce_results, embed.parallel_group = shard, True, None
    embed.weight = bound.embedding
    embed.shard_indices = Object(
        org_vocab_start_index=0,
        org_vocab_end_index=64,
        num_org_vocab_padding=0,
        added_vocab_start_index=64,
        added_vocab_end_index=64,
    )
    fused.model.embed_tokens = embed
    with simulated_embedding():
        assert torch.equal(fused.forward(ids, torch.arange(4), None), expected)
    assert len(asked) == (0 if shard else 1)


@pytest.mark.parametrize("reduce", [None, torch.clone])
@pytest.mark.parametrize("scheme", [schemes.Scheme(), schemes.StaticFp8(), schemes.PerTokenFp8(), schemes.BlockFp8()])
def test_chunks_of_a_step(monkeypatch, scheme, reduce):
    bound = make_weights(scheme)
    expected, _ = run_step(bound, 300, None)
    monkeypatch.setattr(layers, "rows_within", lambda *_: 128)
    assert all(torch.equal(each, expected) for each in run_step(bound, 300, reduce))

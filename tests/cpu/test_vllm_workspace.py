"""The memory of the plug-in's layers: limits, arenas, copies that graphs have."""

from __future__ import annotations

from types import SimpleNamespace as Object

import pytest
import torch
from hdispatch.integrations.vllm import attention as attention_module
from hdispatch.integrations.vllm import layers, schemes, weights, workspace
from hdispatch.integrations.vllm.workspace import rows_within
from vllm_layers import (
    _OneRank,
    make_attention,
    make_layers,
    make_weights,
    with_caches,
)

#: hidden, heads, kv heads, intermediate of Qwen3 8B, 1.7B, Llama 70B on one of four ranks.
SHAPES = {"8b": (4096, 32, 8, 12288), "1.7b": (2048, 16, 8, 6144), "70b": (8192, 16, 2, 7168)}


@pytest.mark.parametrize("scheme", [schemes.Scheme(), schemes.StaticFp8(), schemes.PerTokenFp8(), schemes.BlockFp8()])
@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.usefixtures("flash_attention")
def test_layers_stay_within_the_limit(model, scheme):
    """All kinds of steps, all layers or halves of them, take what the workspace was made for."""
    hidden, heads, kv_heads, intermediate = SHAPES[model]
    bound = with_caches(make_weights(scheme, 3, weights.Shape(hidden, heads, kv_heads, 128, intermediate), torch.empty))
    for reduce, whole in ((None, True), (torch.clone, False), (_OneRank(), False), (_OneRank(), True)):
        attention = make_attention(bound)
        summed, all_reduce = (torch.clone, reduce) if isinstance(reduce, _OneRank) else (reduce, None)
        fused = layers.FusedLayers(Object(), bound, 8192, attention, lambda: None, summed, None, all_reduce)
        space = fused.workspace
        assert space.memory.numel() == space.rows * space.row_bytes + workspace.ALIGNMENT
        assert space.memory.numel() <= workspace.LIMIT_BYTES + workspace.ALIGNMENT < 100e6
        assert space.rows >= 512
        assert space.rows % 128 == 0
        attention.bind()
        for kind in attention_module.Kind:
            found = fused._make_steps(kind, few=False, whole=whole)
            assert len(found) == (1 if whole else 6)
            taken = max(each.arena_bytes for each in found)
            assert taken == space.rows * space.row_bytes or (taken < space.rows * space.row_bytes and all_reduce)


def test_rows_within_a_limit():
    assert rows_within(100, 100) == 128
    assert rows_within(100, 129) == 256
    assert rows_within(workspace.LIMIT_BYTES // 300, 4096) == 256
    assert rows_within(1 << 24, 4096) == 128  # whatever they take


def test_the_arena_stays_where_weights_of_the_same_shape_come():
    """Graphs may have been captured with it."""
    bound = make_weights(schemes.PerTokenFp8())
    first = make_layers(bound, None)
    assert make_layers(make_weights(schemes.PerTokenFp8()), None, former=first).workspace is first.workspace
    assert make_layers(make_weights(schemes.BlockFp8()), None, former=first).workspace is not first.workspace


def test_copies_stay_where_graphs_have_them():
    """Weights that are loaded again leave captured graphs as they are, so that what those read and write must be there."""
    device, first = torch.device("cpu"), torch.rand(8, 4)
    own = weights.bind_rope(Object(cos_sin_cache=first), torch.float32, device, None)
    assert own.data_ptr() == first.data_ptr()
    copy = weights.bind_rope(Object(cos_sin_cache=first), torch.bfloat16, device, None)
    again = weights.bind_rope(Object(cos_sin_cache=first + 1), torch.bfloat16, device, copy)
    assert again.data_ptr() == copy.data_ptr()
    assert torch.equal(again, (first + 1).bfloat16())
    other = weights.bind_rope(Object(cos_sin_cache=torch.rand(9, 4)), torch.bfloat16, device, copy)
    assert other.data_ptr() != copy.data_ptr()
    replaced = weights.bind_rope(Object(cos_sin_cache=first.clone()), torch.float32, device, own)
    assert replaced.data_ptr() != own.data_ptr()

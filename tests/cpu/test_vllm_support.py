"""Configurations, attention and steps of vLLM that the plug-in refuses, and why."""

from __future__ import annotations

from types import SimpleNamespace as Object

import pytest
import torch
from hdispatch.integrations.vllm import support
from vllm_layers import (
    changed,
)


def config(**changes):
    """A VllmConfig that is served, with changes given as parallel_config__enable=… ."""
    found = Object(
        lora_config=None,
        kv_transfer_config=None,
        parallel_config=Object(
            pipeline_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            use_ubatching=False,
        ),
        cache_config=Object(kv_sharing_fast_prefill=False),
        model_config=Object(dtype=torch.bfloat16),
    )
    return changed(found, changes)


def attention(**changes):
    impl = type("FlashAttentionImpl", (Object,), {})(
        vllm_flash_attn_version=3,
        kv_cache_dtype="auto",
        attn_type="decoder",
        sliding_window=(-1, -1),
        alibi_slopes=None,
        logits_soft_cap=0,
        sinks=None,
        batch_invariant_enabled=False,
    )
    return changed(Object(impl=impl, query_quant=None, kv_sharing_target_layer_name=None), changes)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"lora_config": Object()}, "LoRA is on"),
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline parallel over 2 ranks"),
        ({"parallel_config__decode_context_parallel_size": 2}, "decode context parallel over 2 ranks"),
        ({"parallel_config__prefill_context_parallel_size": 4}, "prefill context parallel over 4 ranks"),
        ({"parallel_config__use_ubatching": True}, "micro-batches"),
        ({"kv_transfer_config": Object(kv_connector="NixlConnector")}, "a KV connector is configured"),
        ({"cache_config__kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill is on"),
        ({"model_config__dtype": torch.float32}, "the model's dtype is torch.float32; expected bfloat16 or float16"),
    ],
)
def test_configurations_that_are_refused(change, reason):
    support.check_config(config())
    with pytest.raises(support.UnsupportedError, match=reason):
        support.check_config(config(**change))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"impl": Object()}, "the attention backend is SimpleNamespace; expected FlashAttention"),
        ({"impl__vllm_flash_attn_version": 2}, "FlashAttention 2 is in use; expected 3"),
        ({"impl__kv_cache_dtype": "fp8"}, "the KV cache is fp8; expected auto"),
        ({"impl__attn_type": "encoder_only"}, "attention is encoder_only"),
        ({"impl__sliding_window": (4095, 0)}, "sliding window"),
        ({"impl__alibi_slopes": torch.ones(4)}, "ALiBi"),
        ({"impl__logits_soft_cap": 30.0}, "soft cap, 30.0"),
        ({"impl__sinks": torch.ones(4)}, "sinks"),
        ({"impl__batch_invariant_enabled": True}, "VLLM_BATCH_INVARIANT is on"),
        ({"query_quant": Object()}, "queries are quantized"),
        ({"kv_sharing_target_layer_name": "model.layers.0"}, "the KV cache is shared with model.layers.0"),
    ],
)
def test_attention_that_is_refused(change, reason):
    support.check_attention(attention())
    with pytest.raises(support.UnsupportedError, match=reason):
        support.check_attention(attention(**change))


def test_steps_that_are_refused():
    model = Object(aux_hidden_state_layers=())
    ours = Object(model=model)
    positions = torch.zeros(4, dtype=torch.int64)
    assert support.step_reason(ours, positions, None) is None
    assert "intermediate tensors" in support.step_reason(ours, positions, Object())
    assert "2 dimensions" in support.step_reason(ours, positions.expand(3, 4), None)
    model.aux_hidden_state_layers = (2, 18)
    assert "hidden states of layers in between" in support.step_reason(ours, positions, None)

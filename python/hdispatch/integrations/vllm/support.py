"""Which of vLLM's configurations the fused layers serve, and the reason why any other takes vLLM's own path."""

from __future__ import annotations

import re
from typing import Any

import torch

from ... import _C, runtime
from ...ladders import Ladders
from ...manifest import ladders_of

DTYPES = (torch.bfloat16, torch.float16)
#: Head sizes that fused_qk_norm_rope and rotary_embedding have rows for.
HEAD_SIZES = (64, 128, 256)


#: The compute capability, its first number, for which vLLM takes FlashAttention 3.
HOPPER = 9


class UnsupportedError(Exception):
    """Why a model's layers take vLLM's own path. Never leaves the plug-in."""


def require(condition: object, reason: str) -> None:
    """Raise `UnsupportedError` with `reason` unless `condition` holds."""
    if not condition:
        raise UnsupportedError(reason)


def check_config(config: Any) -> None:
    """Raise `UnsupportedError` for a vllm.config.VllmConfig whose features need vLLM's own layers."""
    parallel = config.parallel_config
    require(config.lora_config is None, "LoRA is on")
    require(parallel.pipeline_parallel_size == 1, f"pipeline parallel over {parallel.pipeline_parallel_size} ranks")
    for name, words in (("decode_context_parallel_size", "decode"), ("prefill_context_parallel_size", "prefill")):
        ranks = getattr(parallel, name, 1)
        require(ranks == 1, f"{words} context parallel over {ranks} ranks")
    require(not getattr(parallel, "use_ubatching", False), "micro-batches (dual batch overlap) are on")
    transfer = config.kv_transfer_config
    require(transfer is None or not transfer.kv_connector, "a KV connector is configured")
    require(not getattr(config.cache_config, "kv_sharing_fast_prefill", False), "kv_sharing_fast_prefill is on")
    dtype = config.model_config.dtype
    require(dtype in DTYPES, f"the model's dtype is {dtype}; expected bfloat16 or float16")


def gpu_objection() -> str:
    """Why no layer can be served on the GPU that is here, whatever the model; empty if one can, or there is no GPU."""
    if not torch.cuda.is_available():
        return ""
    major, minor = torch.cuda.get_device_capability()
    if major == HOPPER:
        return ""
    name = torch.cuda.get_device_name()
    return f"{name} has compute capability {major}.{minor}; FlashAttention 3, which they need, takes {HOPPER}.0"


def check_attention(attention: Any) -> None:
    """Raise `UnsupportedError` unless a layer's vllm Attention is plain causal FlashAttention 3 over a 16-bit cache."""
    impl = attention.impl
    kind = type(impl).__name__
    require(kind == "FlashAttentionImpl", f"the attention backend is {kind}; expected FlashAttention")
    version = impl.vllm_flash_attn_version
    require(version == 3, f"FlashAttention {version} is in use; expected 3")
    require(impl.kv_cache_dtype in ("auto", "bfloat16", "float16"), f"the KV cache is {impl.kv_cache_dtype}; expected auto")
    require(attention.query_quant is None, "queries are quantized")
    require(str(getattr(impl.attn_type, "value", impl.attn_type)) == "decoder", f"attention is {impl.attn_type}")
    require(tuple(impl.sliding_window) == (-1, -1), f"attention has a sliding window, {impl.sliding_window}")
    require(impl.alibi_slopes is None, "attention has ALiBi slopes")
    require(not impl.logits_soft_cap, f"attention has a soft cap, {impl.logits_soft_cap}")
    require(impl.sinks is None, "attention has sinks")
    shared = attention.kv_sharing_target_layer_name
    require(shared is None, f"the KV cache is shared with {shared}")
    require(not impl.batch_invariant_enabled, "VLLM_BATCH_INVARIANT is on")


def check_rope(rope: Any, plain_forward: object, head_size: int) -> None:
    """Raise `UnsupportedError` unless rotary embedding is a look-up in a cache: `plain_forward` is RotaryEmbedding's own."""
    require(head_size in HEAD_SIZES, f"heads have {head_size} elements; expected one of {HEAD_SIZES}")
    kind = type(rope).__name__
    require(getattr(type(rope), "forward_cuda", None) is plain_forward, f"{kind} computes positions in its own way")
    require(not rope.use_flashinfer, "rotary embedding runs in FlashInfer")
    require(rope.head_size == head_size, f"{kind} is for heads of {rope.head_size}; the model's have {head_size}")


def check_model(model: Any, layer_type: type) -> None:
    """Raise `UnsupportedError` unless a decoder (model.embed_tokens, layers, norm) is made of `layer_type` alone."""
    kinds = {type(layer) for layer in model.layers}
    require(kinds == {layer_type}, f"layers are {', '.join(sorted(kind.__name__ for kind in kinds))}")
    for norm in (model.norm, *(n for layer in model.layers for n in (layer.input_layernorm, layer.post_attention_layernorm))):
        require(type(norm).__name__ == "RMSNorm", f"a norm is {type(norm).__name__}; expected RMSNorm")
        require(norm.weight is not None and norm.variance_size_override is None, "a norm is over part of a row")


def step_reason(layers: Any, positions: torch.Tensor, intermediate_tensors: object) -> str | None:
    """Why one step takes vLLM's own path though the model's layers are ours; None if it need not."""
    if intermediate_tensors is not None:
        return "the step gets intermediate tensors of another pipeline stage"
    if positions.dim() != 1:
        return f"positions have {positions.dim()} dimensions"
    if layers.model.aux_hidden_state_layers:
        return "hidden states of layers in between are asked for"
    return None


def loaded_ladders(op: str, device: torch.device) -> Ladders:
    """The buckets of an op in the bundle that serves a device's tensors; empty without one."""
    index = -1 if device.type != "cuda" else torch.cuda.current_device() if device.index is None else device.index
    for bundle in runtime.loaded():
        if bundle.device == index and op in bundle.manifest["ops"]:
            return ladders_of(bundle.manifest["ops"][op])
    return Ladders(())


def objection(op: _C.Op, *arguments: Any) -> str | None:
    """Why the launch table would not serve a call; None if it would. Launches nothing. Raises what a wrong call raises."""
    *_, last = runtime.explain(op, *arguments).splitlines()
    kind, _, reason = last.partition(" ")
    if kind not in ("miss", "fallback"):
        return None
    # How to continue, and how to leave strict mode, concerns the caller alone.
    return re.sub(r"; (nearest rows: .*|leave strict mode .*)$", "", reason.strip())

"""vLLM's compiled ops on CPU tensors, by hdispatch's references: `torch.ops._C`, `_C_cache_ops`, `_vllm_fa3_C`."""

from __future__ import annotations

import sys
import types
from typing import Any

import torch
from hdispatch import ops, registry

LIBRARIES = (
    "vllm._C_stable_libtorch",
    "vllm._moe_C_stable_libtorch",
    "vllm._moe_C",
    "vllm.vllm_flash_attn._vllm_fa3_C",
    "vllm.vllm_flash_attn._vllm_fa2_C",
)
#: Ops of `_C` with the schema of ours.
SAME = (
    "rms_norm",
    "fused_add_rms_norm",
    "silu_and_mul",
    "rotary_embedding",
    "dynamic_per_token_scaled_fp8_quant",
    "static_scaled_fp8_quant",
    "dynamic_scaled_fp8_quant",
    "rms_norm_dynamic_per_token_quant",
    "per_token_group_fp8_quant",
    "rms_norm_per_block_quant",
    "silu_and_mul_per_block_quant",
    "fused_qk_norm_rope",
)
FWD = (
    "fwd(Tensor! q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? q_v, Tensor(a!)? out, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, Tensor? seqused_k, int? max_seqlen_q, "
    "int? max_seqlen_k, Tensor? page_table, Tensor? kv_batch_idx, Tensor? leftpad_k, Tensor? rotary_cos, Tensor? rotary_sin, "
    "Tensor? seqlens_rotary, Tensor? q_descale, Tensor? k_descale, Tensor? v_descale, float softmax_scale, bool is_causal, "
    "int window_size_left, int window_size_right, float softcap, bool is_rotary_interleaved, Tensor? scheduler_metadata, "
    "int num_splits, bool? pack_gqa, int sm_margin, Tensor? s_aux, int cp_world_size, int cp_rank, "
    "Tensor? cp_tot_seqused_k) -> Tensor[]"
)
KEPT: list[torch.library.Library] = []


def define() -> None:
    """Define the ops, and empty modules in the place of the libraries."""
    for name in LIBRARIES:
        sys.modules[name] = types.ModuleType(name)
    _define_c()
    cache, attention = (torch.library.Library(name, "FRAGMENT") for name in ("_C_cache_ops", "_vllm_fa3_C"))
    define_cache_and_attention(cache, attention)
    KEPT.extend((cache, attention))


def _define_c() -> None:
    library = torch.library.Library("_C", "FRAGMENT")
    KEPT.append(library)
    for name in SAME:
        schema = str(getattr(torch.ops.hdispatch, name).default._schema).split(f"hdispatch::{name}", 1)[1]
        library.define(name + schema.replace(", bool scale_ue8m0=False", ""))
        library.impl(name, _caller(registry.get(name)), "CPU")
    library.define("cutlass_scaled_mm(Tensor! out, Tensor a, Tensor b, Tensor a_scales, Tensor b_scales, Tensor? bias) -> ()")
    library.impl("cutlass_scaled_mm", scaled_mm, "CPU")
    for name in ("scaled_mm_supports_fp8", "scaled_mm_supports_block_fp8", "group_gemm_supported"):
        library.define(f"cutlass_{name}(int x) -> bool")
        library.impl(f"cutlass_{name}", lambda _: True, "CompositeExplicitAutograd")
    library.define(
        "vocab_parallel_embedding(Tensor! out, Tensor input_ids, Tensor weight, int org_vocab_start_index, "
        "int org_vocab_end_index, int num_org_vocab_padding, int added_vocab_start_index, int added_vocab_end_index) -> ()"
    )
    library.impl("vocab_parallel_embedding", embedding, "CPU")


def define_custom_all_reduce() -> None:
    """vLLM's custom all-reduce as a sum over gloo; without captures, which a CPU has none of."""
    library = torch.library.Library("_C_custom_ar", "FRAGMENT")
    KEPT.append(library)
    library.define("meta_size() -> int")
    library.impl("meta_size", lambda: 0, "CompositeExplicitAutograd")
    library.define("init_custom_ar(int[] ipc_tensors, Tensor rank_data, int rank, bool fully_connected) -> int")
    library.impl("init_custom_ar", lambda *_: 1, "CompositeExplicitAutograd")
    library.define("register_buffer(int fa, int[] ipc_tensors) -> ()")
    library.impl("register_buffer", lambda *_: None, "CompositeExplicitAutograd")
    library.define("all_reduce(int fa, Tensor inp, Tensor! out, int reg_buffer, int reg_buffer_sz_bytes) -> ()")
    library.impl("all_reduce", all_reduce, "CPU")


def all_reduce(handle: int, given: torch.Tensor, out: torch.Tensor, buffer: int, size: int) -> None:
    from vllm.distributed import get_tp_group

    assert (handle, buffer, size) == (1, 0, 0)
    torch.distributed.all_reduce(out.copy_(given), group=get_tp_group().device_group)
    given.fill_(float("nan"))  # nobody reads it again


def _caller(op: Any) -> Any:
    return lambda *given: op(*given)


def scaled_mm(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, sa: torch.Tensor, sb: torch.Tensor, bias: Any) -> None:
    blocks = (sa.dim() == 2 and sa.size(1) > 1) or (sb.dim() == 2 and sb.size(1) > 1 and sb.size(0) > 1)
    if blocks:
        ops.scaled_mm_blockwise(out, a, b, sa, sb)
    else:
        ops.scaled_mm(out, a, b, sa, sb, bias)


def embedding(out: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor, first: int, end: int, *_: int) -> None:
    here = (ids >= first) & (ids < end)
    out.copy_(weight[(ids.long() - first).clamp(0, weight.size(0) - 1)] * here[:, None].to(weight.dtype))


def define_cache_and_attention(cache: torch.library.Library, attention: torch.library.Library) -> None:
    """Ops of the libraries `_C_cache_ops` and `_vllm_fa3_C`."""
    cache.define(
        "reshape_and_cache_flash(Tensor key, Tensor value, Tensor! key_cache, Tensor! value_cache, Tensor slot_mapping, "
        "str kv_cache_dtype, Tensor k_scale, Tensor v_scale) -> ()"
    )
    cache.impl("reshape_and_cache_flash", write_cache, "CPU")
    attention.define(FWD)
    attention.impl("fwd", attend, "CPU")
    attention.define("get_scheduler_metadata(int a) -> Tensor")


def write_cache(
    k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, *_: Any
) -> None:
    page = keys.size(1)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            keys[slot // page, slot % page] = k[token]
            values[slot // page, slot % page] = v[token]


def attend(*given: Any) -> list[torch.Tensor]:
    q, k, v, out, starts, lengths, table, scale = (given[i] for i in (0, 1, 2, 6, 7, 11, 14, 23))
    group, page = q.size(1) // k.size(2), k.size(1)
    for request in range(starts.numel() - 1):
        first, end, n = int(starts[request]), int(starts[request + 1]), int(lengths[request])
        if end == first:
            continue
        pages = table[request, : -(-n // page)].long()
        keys, values = (x[pages].reshape(-1, *x.shape[2:])[:n].float().repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[first:end].float(), keys) * scale
        last_seen = torch.arange(end - first)[:, None] + n - (end - first)
        scores.masked_fill_(torch.arange(n)[None] > last_seen, float("-inf"))
        out[first:end] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(out.dtype)
    return [out, out, out, out]

"""Attention for callers whose K and V lie in tensors, and which kernel serves it: `attention`, `select_attention`."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from . import registry
from .errors import ArgumentError
from .opspec import dtype_name
from .runtime import loaded

#: The backend for calls that no row serves.
FALLBACK = "scaled_dot_product_attention"
#: Of q, k and v.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: GPUs before this compute capability have no asynchronous copies, which the kernels are made of.
OLDEST = (8, 0)

# In torch's namespace the ops are calls that torch.compile knows; otherwise they take the same way.
_DENSE, _VARLEN = torch.ops.hdispatch.attention_dense, torch.ops.hdispatch.attention_varlen


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q k^T * scale) v, forward only, in the layout of torch's scaled_dot_product_attention or packed; returns out.

    q        bfloat16, float16 or float32 [sequences, heads, queries, head_dim]; with cu_seqlens [tokens, heads, head_dim]
    k, v     [sequences, kv heads, keys, head_dim], dtype of q; with cu_seqlens [tokens, kv heads, head_dim]. heads is a
             multiple of kv heads
    causal   a query sees no key behind its own; the last query's own is the last key (SDPA's `is_causal` where there are as
             many keys as queries)
    scale    factor of q k^T; default 1 / sqrt(head_dim)
    window   w > 0: a query sees no key that is w or more behind its own; with causal these are the newest w
    softcap  c > 0: scores s become c * tanh(s / c)
    cu_seqlens_q, cu_seqlens_k
             int32 [packed sequences + 1] on q's device: where each begins, and the number of tokens; cu_seqlens_k is
             cu_seqlens_q where it is left out
    max_seqlen_q, max_seqlen_k
             with cu_seqlens: at least the most queries and keys of a sequence, known on the host; max_seqlen_k is
             max_seqlen_q where it is left out
    out      where to write; default a new tensor like q

    Served from the launch table where it has a row (head_dim 64, 128, 256 of 16 bits; `select_attention` says which), else by
    torch's SDPA, as float32 and a window without causal are: counted in `stats()` under attention_dense and attention_varlen.
    Never waits for the GPU. A query that sees no key
    gives zeros. ArgumentError for wrong shapes and dtypes, and for tensors of which a gradient is asked for.
    """
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ArgumentError("attention: q, k or v requires a gradient; the op has none: call it under torch.no_grad()")
    _check(("q", q), ("k", k), ("v", v), rank=3 if cu_seqlens_q is not None else 4)
    out = torch.empty_like(q) if out is None else out
    factor = 1 / math.sqrt(max(1, q.size(-1))) if scale is None else scale
    rule = (factor, softcap, window, causal, bool(softcap or window))
    if cu_seqlens_q is None:
        if cu_seqlens_k is not None or max_seqlen_q is not None or max_seqlen_k is not None:
            raise ArgumentError("attention: cu_seqlens_k, max_seqlen_q and max_seqlen_k are given; they go with cu_seqlens_q")
        _DENSE(out, q, k, v, max(1, q.size(-2)), *rule)
        return out
    if max_seqlen_q is None or (cu_seqlens_k is not None and max_seqlen_k is None):
        raise ArgumentError("attention: cu_seqlens without max_seqlen_q or max_seqlen_k; give the most of a sequence's tokens")
    starts_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    longest = max_seqlen_q if max_seqlen_k is None else max_seqlen_k
    _VARLEN(out, q, k, v, cu_seqlens_q, starts_k, max(1, max_seqlen_q), max(1, longest), *rule)
    return out


def _check(*tensors: tuple[str, torch.Tensor], rank: int) -> None:
    """ArgumentError, in this function's words, for tensors that are of no attention at all."""
    dims = "[tokens, heads, head_dim]" if rank == 3 else "[sequences, heads, tokens, head_dim]"
    for name, tensor in tensors:
        if tensor.dim() != rank:
            how = "with" if rank == 3 else "without"
            raise ArgumentError(f"attention: {name} is {list(tensor.shape)}; expected {dims} {how} cu_seqlens_q")
        if tensor.dtype not in DTYPES:
            expected = ", ".join(map(dtype_name, DTYPES))
            raise ArgumentError(f"attention: {name} is {str(tensor.dtype).removeprefix('torch.')}; expected one of {expected}")


class AttentionChoice(NamedTuple):
    """The choice that serves a call of `attention`.

    kernel   the backend of the row's kernel, "triton"; or "scaled_dot_product_attention", the fallback
    config   the config of the row's kernel; {} of the fallback
    why      in words
    """

    kernel: str
    config: dict[str, Any]
    why: str


def select_attention(
    head_dim: int,
    seq_len: int,
    capability: tuple[int, int] | None = None,
    *,
    num_sequences: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    causal: bool = False,
    limits: bool = False,
    packed: bool = False,
) -> AttentionChoice:
    """Which kernel serves attention of these sizes: that of the loaded bundle's row, or the fallback.

    seq_len        queries of the longest sequence
    capability     compute capability of the GPU; default that of the loaded bundle
    num_sequences  sequences of a batch; packed: tokens of all of them
    causal         as in the call, whose default it has
    limits         whether a window or a softcap is asked for
    packed         whether sequences are packed, with cu_seqlens

    Looks the row up as a call does; its guards (alignment, strides) are tested by calls: `explain` says how one fares.
    """
    op = registry.get("attention_varlen" if packed else "attention_dense")
    if capability is not None and tuple(capability) < OLDEST:
        return _fallback(f"compute capability {_dotted(capability)}; the kernels take {_dotted(OLDEST)} and newer")
    bundle = next((each for each in loaded() if op.name in each.manifest["ops"]), None)
    if bundle is None:
        return _fallback(f"no bundle with {op.name} is loaded")
    built = tuple(bundle.manifest["target"]["compute_capability"])
    if capability is not None and tuple(capability) != built:
        return _fallback(f"compute capability {_dotted(capability)}; the bundle is for {_dotted(built)}")
    if built < OLDEST:
        return _fallback(f"the bundle is for compute capability {_dotted(built)}; the kernels take {_dotted(OLDEST)}")
    wanted = {"q": dtype_name(dtype), "causal": int(causal), "limits": int(limits)}
    variants = list(registry.spec(op.name).variant_arguments().items())
    index = next((i for i, (_, has) in enumerate(variants) if has.items() >= wanted.items()), None)
    if index is None:
        return _fallback(f"{op.name} has no variant of {wanted}")
    row = op.pick(num_sequences, head_dim, 0, index, seq_len)
    where = f"{op.name} {variants[index][0]}, head_dim {head_dim}, seq_len {seq_len}"
    if row is None:
        return _fallback(f"no row serves {where}")
    rows = bundle.manifest["rows"]
    if row >= len(rows):
        return AttentionChoice("function", {}, f"a registered function serves {where}")
    record = bundle.manifest["records"][rows[row]["record"]]
    return AttentionChoice(record["backend"], dict(record["config"]), f"{record['kernel']} serves {where}")


def _fallback(why: str) -> AttentionChoice:
    return AttentionChoice(FALLBACK, {}, why)


def _dotted(capability: tuple[int, ...]) -> str:
    return ".".join(map(str, capability))

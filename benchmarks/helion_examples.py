"""Calls of the kernels of Helion's repository (`examples/` and `pretuned_kernels/`), each as a function of one size M.

M is the size that differs from call to call where the kernel serves: rows, tokens, a batch of sequences. Tensors are those of
the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

HALF, BF16, FP32, FP8 = torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn


class Example(NamedTuple):
    """A kernel and its arguments for an M."""

    module: str
    kernel: str
    arguments: Callable[[int], tuple[Any, ...]]


def t(*sizes: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    """A tensor of random numbers."""
    return torch.randn(sizes).to(dtype)


def h(*sizes: int) -> torch.Tensor:
    """The same of bfloat16."""
    return t(*sizes, dtype=BF16)


def ints(high: int, *sizes: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Random integers from 0."""
    return torch.randint(0, high, sizes, dtype=dtype)


def offsets(m: int, longest: int = 5, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Where each of m sequences of 1 to `longest` begins, and the end."""
    lengths = torch.arange(m) % longest + 1
    return torch.cat([torch.zeros(1, dtype=dtype), lengths.cumsum(0).to(dtype)])


def jagged(m: int, *sizes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of m sequences, and their offsets."""
    where = offsets(m)
    return t(int(where[-1]), *sizes), where


def qkv(m: int) -> tuple[torch.Tensor, ...]:
    """Query, key and value of 2 sequences of M."""
    return tuple(t(2, 3, m, 64, dtype=HALF) for _ in range(3))


def gemm(m: int, dtype: torch.dtype = HALF) -> tuple[torch.Tensor, torch.Tensor]:
    """M x 64 and 64 x 96."""
    return t(m, 64, dtype=dtype), t(64, 96, dtype=dtype)


def hstu(m: int) -> tuple[Any, ...]:
    """4 sequences of M."""
    where = torch.tensor([0, m, 2 * m, 3 * m, 4 * m], dtype=torch.int32)
    return m, 0.5, *(h(4 * m, 4, 32) for _ in range(3)), where


def hstu_2(m: int) -> tuple[Any, ...]:
    """2 sequences of M."""
    where = torch.tensor([0, m, 2 * m], dtype=torch.int32)
    return m, 1.25, 4.5, *(t(2 * m, 4, 64) for _ in range(3)), where


def moe(m: int) -> tuple[Any, ...]:
    """M tokens of 2 experts."""
    counts = torch.tensor([m - m // 2, m // 2], dtype=torch.int32)
    begins = torch.tensor([0, m - m // 2, m], dtype=torch.int32)
    return t(m, 64, dtype=HALF), t(2, 64, 48, dtype=HALF), counts, begins, torch.arange(m, dtype=torch.int32), m


def mamba_state(m: int) -> tuple[Any, ...]:
    """M sequences of 2 chunks of 64."""
    return t(m, 128, 1, 32), t(m, 128, 4, 64), t(m, 4, 2, 64), t(m, 4, 2, 64)


def mamba_scan(m: int) -> tuple[Any, ...]:
    """M sequences of 2 chunks of 64."""
    return (
        t(m, 2, 1, 64, 64, dtype=HALF), t(m, 128, 4, 64, dtype=HALF), t(m, 4, 2, 64, dtype=HALF), t(m, 4, 2, 64, dtype=HALF),
        t(m, 128, 1, 32, dtype=HALF), t(m, 2, 4, 64, 32, dtype=HALF), t(4, dtype=HALF),
    )  # fmt: skip


def grpo_forward(m: int) -> tuple[Any, ...]:
    """M sequences of 8."""
    each = t(m, 8), t(m, 8), t(m, 8)
    return h(m, 9, 128), each[0], each[1], each[2], t(m), torch.ones(m, 8), 0.9, 0.04, 0.2, 0.4


def grpo_backward(m: int) -> tuple[Any, ...]:
    """M sequences of 8."""
    logits, selected, old, ref, advantages, mask, *rest = grpo_forward(m)
    return t(m, 8), logits, selected, ints(128, m, 8), old, ref, advantages, mask, t(m, 8), *rest


def gdn(m: int) -> tuple[Any, ...]:
    """M sequences of 2 chunks of 64."""
    return h(m, 128, 4, 16), h(m, 128, 4, 16), h(m, 128, 4, 32), t(m, 128, 4), 64


def attention_back(m: int) -> tuple[Any, ...]:
    """A sequence of 64 M: its blocks divide it."""
    q = [t(1, 2, 64 * m, 64, dtype=HALF) for _ in range(4)]
    return *q, t(1, 2, 64 * m), t(1, 2, 64 * m, 64, dtype=HALF), t(1, 2, 64 * m), 0.125


def squeeze(m: int) -> tuple[torch.Tensor, ...]:
    """x, a, b, c, d."""
    return t(m, 64, dtype=HALF), t(64, 32, dtype=HALF), t(32, 64, dtype=HALF), t(m, 32, dtype=HALF), t(m, 64, dtype=HALF)


def quant_rows(m: int) -> tuple[Any, ...]:
    """M rows of 256."""
    return torch.empty(m, 256, dtype=FP8), h(m, 256), torch.empty(m, 1), None


def qk_rope(m: int) -> tuple[Any, ...]:
    """M tokens of 6 heads."""
    return h(m, 6 * 64), 2, 2, 2, 64, 1e-6, h(64), h(64), h(512, 64), True, ints(512, m), -1


EXAMPLES = [
    Example("examples.add", "add", lambda m: (t(m, 48), t(m, 48))),
    Example("examples.aot_compile_example", "add_2d", lambda m: (t(m, 48), t(m, 48))),
    Example("examples.aot_example", "vector_scale", lambda m: (t(m), 2.5)),
    Example("examples.aot_example", "row_softmax", lambda m: (t(m, 96),)),
    Example("examples.aot_example", "col_reduce_sum", lambda m: (t(m, 96),)),
    Example("examples.aot_example", "rms_norm_batched", lambda m: (t(m, 96), 1e-5)),
    Example("examples.aot_example", "rms_norm_oneshot", lambda m: (t(m, 96), 1e-5)),
    Example("examples.aot_example", "matmul_custom_key", gemm),
    Example("examples.aot_example", "sum_aot", lambda m: (t(m, 96),)),
    Example("examples.attention", "attention", qkv),
    Example("examples.attention", "causal_attention", qkv),
    Example("examples.attention", "attention_output", qkv),
    Example("examples.attention", "causal_attention_output", qkv),
    Example("examples.attention", "biased_attention", lambda m: (*qkv(m), t(2, 3, m, m, dtype=HALF))),
    Example("examples.attention", "biased_attention_output", lambda m: (*qkv(m), t(2, 3, m, m, dtype=HALF))),
    Example("examples.attention", "attention_dynamic", qkv),
    Example("examples.attention", "_attention_bwd_preprocess", lambda m: qkv(m)[:2]),
    Example("examples.attention", "attention_backward", attention_back),
    Example("examples.batch_softmax", "batch_softmax", lambda m: (t(m, 12, 96),)),
    Example("examples.bf16xint16_gemm", "_bf16xint16_gemm", lambda m: (h(m, 64), ints(99, 64, 96, dtype=torch.int16))),
    Example("examples.bf16xint16_gemm", "_int16xbf16_gemm", lambda m: (ints(99, m, 64, dtype=torch.int16), h(64, 96))),
    Example("examples.blackwell_attention", "_bwd_preprocess", lambda m: qkv(m)[:2]),
    Example("examples.bmm", "bmm", lambda m: (t(m, 32, 64, dtype=HALF), t(m, 64, 48, dtype=HALF))),
    Example("examples.broadcast_matmul", "broadcast_matmul", lambda m: (t(m, 32, 64, dtype=HALF), t(64, 48, dtype=HALF))),
    Example("examples.concatenate", "concat2d_dim1_simple", lambda m: (t(m, 48), t(m, 80))),
    Example("examples.concatenate", "concat2d_dim1", lambda m: (t(m, 48), t(m, 80))),
    Example("examples.cross_entropy", "cross_entropy", lambda m: (t(m, 1000), ints(1000, m))),
    Example("examples.embedding", "embedding", lambda m: (ints(99, m, 3, dtype=torch.int32), t(99, 64))),
    Example(
        "examples.epilogue_subtiling", "matmul_bias_residual_gelu_cast",
        lambda m: (*gemm(m), t(96, dtype=HALF), t(m, 96, dtype=HALF)),
    ),
    Example("examples.epilogue_subtiling", "matmul_bias_gelu_aux", lambda m: (*gemm(m), t(96, dtype=HALF))),
    Example("examples.exp", "exp_fwd", lambda m: (t(m),)),
    Example("examples.exp", "exp_bwd", lambda m: (t(m), t(m))),
    Example(
        "examples.fp8_attention", "fp8_attention_kernel",
        lambda m: (t(2 * m, 128, 64, dtype=FP8), t(2 * m, 128, 64, dtype=FP8), t(2 * m, 64, 128, dtype=FP8), m, 2),
    ),
    Example("examples.fp8_gemm", "fp8_gemm", lambda m: (t(m, 64, dtype=FP8), t(96, 64, dtype=FP8).T)),
    Example(
        "examples.fp8_matmul", "fp8_matmul",
        lambda m: (t(m, 64, dtype=FP8), t(96, 64, dtype=FP8).T, t(m, 1).expand(m, 96), t(96)),
    ),
    Example("examples.fused_linear_jsd", "jsd_kernel", lambda m: (0.5, 1, 2.0, t(m, 128), t(m, 128))),
    Example("examples.fused_linear_jsd", "fused_linear_jsd_kernel", lambda m: (0.5, 1, 2.0, t(m, 128), t(m, 128))),
    Example("examples.gather_gemv", "gather_gemv", lambda m: (t(4, 64, 64), ints(4, m, dtype=torch.int32), t(64))),
    Example("examples.gdn_fwd_h", "helion_gdn_fwd_h", gdn),
    Example("examples.geglu", "_geglu", lambda m: (h(m, 96), h(m, 96))),
    Example("examples.geglu", "geglu_bwd", lambda m: (h(m, 96), h(m, 96), h(m, 96))),
    Example("examples.grouped_gemm", "grouped_gemm_jagged", lambda m: (h(int(offsets(m)[-1]), 64), h(64, 96), offsets(m))),
    Example(
        "examples.grouped_gemm", "grouped_gemm_jagged_persistent",
        lambda m: (h(int(offsets(m)[-1]), 64), h(64, 96), offsets(m)),
    ),
    Example("examples.grpo_loss", "grpo_loss_forward", grpo_forward),
    Example("examples.grpo_loss", "grpo_loss_backward", grpo_backward),
    Example("examples.int4_gemm", "matmul_bf16_int4", lambda m: (h(m, 128), ints(99, 64, 96, dtype=torch.int8))),
    Example("examples.jagged_dense_add", "jagged_dense_add_2d", lambda m: (t(int(offsets(m)[-1])), offsets(m), t(m, 64))),
    Example(
        "examples.jagged_dense_bmm", "jagged_dense_bmm",
        lambda m: (offsets(m), t(int(offsets(m)[-1]), 32), t(m, 32, 48), t(m, 48)),
    ),
    Example("examples.jagged_hstu_attn", "_helion_jagged_attention_kernel", hstu),
    Example("examples.jagged_hstu_attn_2", "jagged_hstu_attention", hstu_2),
    Example("examples.jagged_layer_norm", "jagged_layer_norm_kernel", lambda m: (*jagged(m, 64), 1e-6)),
    Example("examples.jagged_mean", "jagged_mean_kernel", lambda m: (*jagged(m, 8), ints(8, m, dtype=torch.int32), 8)),
    Example("examples.jagged_softmax", "jagged_softmax_kernel", lambda m: jagged(m, 64)),
    Example("examples.jagged_sum", "jagged_sum_kernel", lambda m: jagged(m, 64)),
    Example("examples.jsd", "jsd_forward", lambda m: (t(m, 128), t(m, 128), None, 0.5, -100)),
    Example("examples.kl_div", "kl_div_forward", lambda m: (t(m, 128), t(m, 128), False, "batchmean", 1e-10)),
    Example("examples.layer_norm", "layer_norm_fwd", lambda m: (t(m, 96), [96], t(96), t(96), 1e-5)),
    Example("examples.layer_norm", "layer_norm_bwd", lambda m: (t(m, 96), t(m, 96), t(m), t(m), t(96), True)),
    Example("examples.long_sum", "longsum", lambda m: (t(m, 4096),)),
    Example("examples.long_sum", "longsum_w_red_loop", lambda m: (t(m, 65536),)),
    Example("examples.long_sum", "longsum_manual", lambda m: (t(m, 65536),)),
    Example("examples.low_mem_dropout", "low_mem_dropout", lambda m: (0.25, t(m), 123)),
    Example("examples.low_mem_dropout", "low_mem_dropout_bwd", lambda m: (0.25, t(m), 123)),
    Example("examples.mamba2_chunk_scan", "helion_mamba2_chunk_scan_kernel", mamba_scan),
    Example("examples.mamba2_chunk_state", "helion_mamba2_chunk_state_kernel", mamba_state),
    Example("examples.matmul", "matmul", gemm),
    Example("examples.matmul_layernorm", "matmul_layernorm", lambda m: (*gemm(m), t(96, dtype=HALF), t(96, dtype=HALF))),
    Example("examples.matmul_split_k", "matmul_split_k", lambda m: gemm(m, FP32)),
    Example("examples.moe_matmul_ogs", "moe_matmul_ogs", moe),
    Example("examples.rms_norm", "rms_norm_fwd", lambda m: (h(m, 96), h(96), 1e-5)),
    Example("examples.rms_norm", "rms_norm_bwd", lambda m: (h(m, 96), h(m, 96), h(96), t(m, 1))),
    Example("examples.rope", "rope_fwd", lambda m: (h(m, 4, 16, 64), h(m, 2, 16, 64), h(m, 16, 64), h(m, 16, 64))),
    Example("examples.rope", "rope_bwd", lambda m: (h(m, 4, 16, 64), h(m, 2, 16, 64), h(m, 16, 64), h(m, 16, 64))),
    Example("examples.se_block", "se_block_fwd", lambda m: (t(m, 64, dtype=HALF), t(64, 64, dtype=HALF))),
    Example(
        "examples.se_block", "se_block_bwd_dx",
        lambda m: (t(m, 64, dtype=HALF), t(m, 64, dtype=HALF), t(64, 64, dtype=HALF), t(m, 64, dtype=HALF)),
    ),
    Example("examples.se_block", "se_block_bwd_dw", lambda m: tuple(t(m, 64, dtype=HALF) for _ in range(3))),
    Example("examples.segment_reduction", "segmented_reduction_helion", lambda m: (ints(20, m).sort()[0], t(m, 32), 20)),
    Example("examples.softmax", "softmax", lambda m: (h(m, 96),)),
    Example("examples.softmax", "softmax_decomposed", lambda m: (h(m, 96),)),
    Example("examples.softmax", "softmax_two_pass", lambda m: (h(m, 96),)),
    Example("examples.softmax", "softmax_bwd", lambda m: (h(m, 96), h(m, 96))),
    Example("examples.split_k_barrier", "split_k_matmul", lambda m: (t(m, 512), t(512, 64))),
    Example("examples.squeeze_and_excitation_net", "squeeze_and_excitation_net_fwd", lambda m: squeeze(m)[:3]),
    Example(
        "examples.squeeze_and_excitation_net", "squeeze_and_excitation_net_bwd_dx",
        lambda m: (t(m, 64, dtype=HALF), *squeeze(m)),
    ),
    Example(
        "examples.squeeze_and_excitation_net", "squeeze_and_excitation_net_bwd_da",
        lambda m: (t(m, 64, dtype=HALF), squeeze(m)[0], *squeeze(m)[2:]),
    ),
    Example(
        "examples.squeeze_and_excitation_net", "squeeze_and_excitation_net_bwd_db",
        lambda m: (t(m, 64, dtype=HALF), squeeze(m)[0], squeeze(m)[4], squeeze(m)[3]),
    ),
    Example("examples.sum", "sum_kernel", lambda m: (t(m, 96),)),
    Example("examples.swiglu", "_swiglu_fwd", lambda m: (h(m, 96), h(m, 96))),
    Example("examples.swiglu", "swiglu_bwd", lambda m: (h(m, 96), h(m, 96), h(m, 96))),
    Example("examples.welford", "welford", lambda m: (t(96), t(96), t(m, 96), 1e-5)),
    Example("examples.xsa", "xsa_kernel", lambda m: (*qkv(m), 1e-6)),
    Example("pretuned_kernels.vector_add.vector_add", "vector_add", lambda m: (t(m), t(m))),
    Example("pretuned_kernels.softmax.softmax", "softmax", lambda m: (h(m, 96),)),
    Example("pretuned_kernels.rms_norm.rms_norm", "rms_norm", lambda m: (h(m, 96), h(96), 1e-5)),
    Example("pretuned_kernels.layer_norm.layer_norm", "layer_norm", lambda m: (h(m, 96), h(96), h(96))),
    Example("pretuned_kernels.cross_entropy.cross_entropy", "cross_entropy", lambda m: (t(m, 1000), ints(1000, m))),
    Example("pretuned_kernels.silu_mul_fp8.silu_mul_fp8", "silu_mul_fp8", lambda m: (h(m, 256), t(1))),
    Example(
        "pretuned_kernels.dynamic_per_token_scaled_fp8_quant.dynamic_per_token_scaled_fp8_quant",
        "dynamic_per_token_scaled_fp8_quant", quant_rows,
    ),
    Example(
        "pretuned_kernels.per_token_group_fp8_quant.per_token_group_fp8_quant", "per_token_group_fp8_quant",
        lambda m: (h(m, 256), torch.empty(m, 256, dtype=FP8), torch.empty(m, 2), 128, 1e-10, -448.0, 448.0, False),
    ),
    Example(
        "pretuned_kernels.rms_norm_per_block_quant.rms_norm_per_block_quant", "rms_norm_per_block_quant",
        lambda m: (torch.empty(m, 256, dtype=FP8), h(m, 256), h(256), torch.empty(m, 2), 1e-6, None, None, 128, False),
    ),
    Example(
        "pretuned_kernels.rms_norm_dynamic_per_token_quant.rms_norm_dynamic_per_token_quant",
        "rms_norm_dynamic_per_token_quant",
        lambda m: (torch.empty(m, 256, dtype=FP8), h(m, 256), h(256), torch.empty(m, 1), 1e-6, None, None),
    ),
    Example(
        "pretuned_kernels.silu_and_mul_per_block_quant.silu_and_mul_per_block_quant", "silu_and_mul_per_block_quant",
        lambda m: (torch.empty(m, 256, dtype=FP8), h(m, 512), torch.empty(m, 2), 128, None, False),
    ),
    Example(
        "pretuned_kernels.rope.rope", "rope_fwd", lambda m: (h(m, 4, 16, 64), h(m, 2, 16, 64), h(m, 16, 64), h(m, 16, 64))
    ),
    Example("pretuned_kernels.fused_qk_norm_rope.fused_qk_norm_rope", "fused_qk_norm_rope", qk_rope),
    Example(
        "pretuned_kernels.scaled_mm.scaled_mm", "scaled_mm",
        lambda m: (torch.empty(m, 96, dtype=BF16), t(m, 64, dtype=FP8), t(96, 64, dtype=FP8).T, t(m, 1), t(96, 1), None),
    ),
]  # fmt: skip

"""The Triton kernel of ll_gemm_bf16_argmax: weights stream through TMA, and no logit leaves the block that made it."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from hdispatch.opspec import WORKSPACE_COUNTERS, Variant
from triton.tools.tensor_descriptor import TensorDescriptor

from ..lib.hopper import SMS
from ..lib.triton_argmax import column_of, keyed, ranked
from ..lib.triton_launch import launch_options
from ..lib.triton_tiles import prefetch
from .spec import PROGRAMS, TOKENS

#: One record serves all K and N that are multiples of 16.
GENERIC = ("K", "N")

_COUNTERS = tl.constexpr(WORKSPACE_COUNTERS // 8)
#: Programs whose results are compared at once.
_AT_ONCE = tl.constexpr(32)


@triton.jit(do_not_specialize=["M", "N", "K", "stride_w"])
def head_argmax(
    out, x, w, weights, workspace, M, N, K, stride_w,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (blocks, tiles of tokens). x and w are descriptors; what lies beyond M, N and K is read as 0.

    A program takes every num_programs-th tile of BLOCK_N weights, which are the 64-row side of the tensor core, and keeps the
    best logit of each of a tile's rows and tokens in registers. Its best of each token go to the workspace; the last program
    compares all. The loops are fused: the next tile's loads run under this one's comparison.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    first_m = tl.program_id(1) * BLOCK_M
    row = tl.arange(0, BLOCK_N)
    if PREFETCH > 0:
        # With PDL the kernel before this one may still run; but what is asked for here is not read before the wait.
        first = weights + tl.minimum(program * BLOCK_N + row, N - 1).to(tl.int64) * stride_w
        prefetch(first, tl.zeros((BLOCK_N,), tl.int32) + 2 * K // 16 * 16, PREFETCH, BLOCK_N)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    best = tl.full([BLOCK_N, BLOCK_M], -0x80000000, tl.int32)
    where = tl.full([BLOCK_N, BLOCK_M], 0x7FFFFFFF, tl.int32)
    for tile in tl.range(program, tl.cdiv(N, BLOCK_N), programs, flatten=True):
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for at in range(0, K, BLOCK_K):
            acc = tl.dot(w.load([tile * BLOCK_N, at]), x.load([first_m, at]).T, acc)
        # As a tensor of logits has them.
        rank = ranked(acc.to(tl.bfloat16))
        column = (tile * BLOCK_N + row)[:, None]
        # A lane's columns ascend: of equal ones it keeps the first.
        better = (rank > best) & (column < N)
        best = tl.where(better, rank, best)
        where = tl.where(better, column, where)
    m = tl.arange(0, BLOCK_M)
    counter = workspace.to(tl.pointer_type(tl.int32)) + tl.program_id(1)
    found = workspace + _COUNTERS + first_m * programs
    tl.store(found + program * BLOCK_M + m, tl.max(keyed(best, where), axis=0))
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1:
        tl.store(counter, 0)
        most = tl.full([BLOCK_M], -0x8000000000000000, tl.int64)
        for begin in range(0, programs, _AT_ONCE):
            each = begin + tl.arange(0, _AT_ONCE)[:, None]
            others = tl.load(
                found + each * BLOCK_M + m[None, :], each < programs, other=-0x8000000000000000, cache_modifier=".cg"
            )
            most = tl.maximum(most, tl.max(others, axis=0))
        tl.store(out + first_m + m, column_of(most), first_m + m < M)


def launch(out, x, w, workspace, *, config, _launcher):
    """config["programs"] blocks at once for each block_m tokens; tiles have block_n weights and block_k of K.

    More tokens than block_m read all weights again: a config is for as many.
    """
    (m, k), n = x.shape, w.shape[0]
    block_m, block_n, block_k = config["block_m"], config["block_n"], config["block_k"]
    if m > TOKENS:
        raise ValueError(f"ll_gemm_bf16_argmax: {m} rows; the kernel is for up to {TOKENS}")
    if k < 1 or n < 1 or n >= 2**31 - 2**16:
        raise ValueError(
            f"ll_gemm_bf16_argmax: weights [{n}, {k}]; the kernel takes 1 to {2**31 - 2**16 - 1} rows of at least 1"
        )
    if config["programs"] > PROGRAMS:
        raise ValueError(f"ll_gemm_bf16_argmax: {config['programs']} programs; the workspace has memory for {PROGRAMS}")
    x_tiles = TensorDescriptor(x, [m, k], [x.stride(0), 1], [block_m, block_k])
    w_tiles = TensorDescriptor(w, [n, k], [w.stride(0), 1], [block_n, block_k])
    grid = (torch.sym_min((n + block_n - 1) // block_n, config["programs"]), (m + block_m - 1) // block_m)
    options = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "PREFETCH": config["prefetch"]}
    options |= launch_options(config, config["num_stages"])
    _launcher(head_argmax, grid, out, x_tiles, w_tiles, w, workspace.view(torch.int64), m, n, k, w.stride(0), **options)


#: Bytes of shared memory that a ring may take on an SM, beside what comparing takes.
_SHARED = 208 * 1024

#: Weights of a tile, elements of K in a stage, programs on an SM, warps.
_TILES = (
    (64, 128, 1, 4),
    (128, 128, 1, 4),
    (64, 256, 1, 4),
    (64, 128, 2, 4),
    (128, 64, 1, 4),
    (128, 128, 1, 8),
    (64, 64, 2, 4),
)


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring: with as many stages as there is shared memory for.

    Tiles of 8 tokens leave Hopper's products of warpgroups, which Triton has for 16 and more.
    """
    tokens = (16, 8) if sizes["M"] <= 8 else (16,) if sizes["M"] <= 16 else (32,)
    return [
        {
            "block_m": block_m,
            "block_n": block_n,
            "block_k": block_k,
            "programs": SMS * blocks,
            "prefetch": 1024,
            "num_warps": warps,
            "num_stages": _SHARED // blocks // (2 * block_k * (block_n + block_m)),
        }
        for block_m in tokens
        for block_n, block_k, blocks, warps in _TILES
    ]

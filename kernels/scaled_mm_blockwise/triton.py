"""The Triton kernels of scaled_mm_blockwise: `dot` is for one or two rows of a, `stream` for few, those fed by TMA for many.

The tensor core sums 128 products at a time, from zero, `dot` 16; the scaled sums are added in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from hdispatch.opspec import Variant
from triton.tools.tensor_descriptor import TensorDescriptor

from ..scaled_mm.tiles import add_splits, dot_vectors, load_tokens, prefetch, stack, tile_at
from .pair import pair_kernel

#: One record serves all K and N that are multiples of 16.
GENERIC = ("K", "N")
INDEX_BITS = 64
#: Read before the wait for the kernel before this one, which seldom writes weights: a launch after one that does waits whole.
EARLY_READS = ("b", "b_scales")


@triton.jit
def load_scales(scales, at, stride, COUNT: tl.constexpr, end):
    """The scales of one row for COUNT vectors of 16 numbers from the int32 `at` of `end` on: [COUNT], zeros beyond the end."""
    word = at + 4 * tl.arange(0, COUNT)
    return tl.load(scales + (word // 32).to(tl.int64) * stride, mask=word < end, other=0.0)


@triton.jit(do_not_specialize=["M", "stride_am", "stride_ak", "stride_bk", "stride_bn"])
def dot_kernel(
    out,
    a,
    b,
    a_scales,
    b_scales,
    M,
    N,
    K,
    stride_out,
    stride_a,
    stride_b,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = a @ weights.T on the plain cores, as in `scaled_mm`. BLOCK_N divides 128: a program's weights share their scales.

    A thread's 16 products at a time are of one group: it scales their sum.
    """
    if PDL:
        # Dependents start when the last program of this kernel has. They too ask for weights, then wait for this one's end.
        tl.extra.cuda.gdc_launch_dependents()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Four fp8 numbers are an int32. K is a multiple of 16, so that a thread's four of them are all there or none is.
    WORDS: tl.constexpr = BLOCK_K // 4
    VECTORS: tl.constexpr = BLOCK_K // 16
    words = tl.multiple_of(K // 4, 4)
    word = tl.arange(0, WORDS)
    rows = b + tl.minimum(n, N - 1).to(tl.int64) * stride_b
    weights = rows[:, None].to(tl.pointer_type(tl.int32)) + word[None, :]
    w = tl.load(weights, mask=word[None, :] < words, other=0)
    b_scales += (tl.program_id(0) * BLOCK_N // 128).to(tl.int64) * stride_bn
    b_scale = load_scales(b_scales, 0, stride_bk, VECTORS, words)
    if PDL:
        tl.extra.cuda.gdc_wait()

    first = tl.program_id(1) * BLOCK_M
    x = load_tokens(a, first, M, stride_a, word, words, BLOCK_M)
    accs = (tl.zeros((BLOCK_N, VECTORS), tl.float32),) * BLOCK_M
    for at in range(0, words, WORDS):
        scales = ()
        for i in tl.static_range(BLOCK_M):
            row = a_scales + (first + i).to(tl.int64) * stride_am
            end = tl.where(first + i < M, words, 0)
            scales += (load_scales(row, at, stride_ak, VECTORS, end),)
        found = dot_vectors(w, x, BLOCK_M)
        sums = ()
        for i in tl.static_range(BLOCK_M):
            sums += (accs[i] + found[i] * (scales[i] * b_scale)[None, :],)
        accs = sums
        later = at + WORDS
        w = tl.load(weights + later, mask=(later + word)[None, :] < words, other=0)
        b_scale = load_scales(b_scales, later, stride_bk, VECTORS, words)
        x = load_tokens(a, first, M, stride_a, later + word, words, BLOCK_M)

    m = first + tl.arange(0, BLOCK_M)
    target = out + m.to(tl.int64)[None, :] * stride_out + n[:, None]
    result = tl.sum(stack(accs, BLOCK_M), axis=1)
    tl.store(target, result.to(out.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit(do_not_specialize=["M", "stride_am", "stride_ak", "stride_bk", "stride_bn"])
def stream_kernel(
    out,
    a,
    b,
    a_scales,
    b_scales,
    M,
    N,
    K,
    stride_out,
    stride_a,
    stride_b,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    PREFETCH: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """out.T = weights @ a.T, as in `scaled_mm`. BLOCK_N / SPLIT divides 128: the weights of a tile share their scales."""
    GROUP_SIZE: tl.constexpr = 128
    ROWS: tl.constexpr = BLOCK_N // SPLIT
    tile_m, tile_n = tile_at(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, ROWS), GROUP)
    piece = tl.cdiv(K, SPLIT * GROUP_SIZE) * GROUP_SIZE
    k = tl.arange(0, GROUP_SIZE)

    row = tl.arange(0, BLOCK_N)
    row_k = row // ROWS * piece
    weights = b + tl.minimum(tile_n * ROWS + row % ROWS, N - 1).to(tl.int64) * stride_b + row_k
    if PREFETCH > 0:
        # With PDL the kernel before this one may still run; but what is asked for here is not read before the wait.
        prefetch(weights, tl.minimum(piece, K - row_k), PREFETCH, BLOCK_N)
    if PDL:
        tl.extra.cuda.gdc_wait()
        # Dependents wait for all of this kernel anyway; started now, they can fetch weights of their own.
        tl.extra.cuda.gdc_launch_dependents()

    column = tl.arange(0, SPLIT * BLOCK_M)
    column_k = column // BLOCK_M * piece
    column_m = tile_m * BLOCK_M + column % BLOCK_M
    tokens = a + column_m.to(tl.int64) * stride_a + column_k
    # Off the diagonal nothing is right anyway: a column's own piece of K says which scale of the weights it takes.
    first = column_k // GROUP_SIZE
    a_scale = a_scales + column_m.to(tl.int64) * stride_am + first.to(tl.int64) * stride_ak
    b_scale = b_scales + (tile_n * ROWS // GROUP_SIZE).to(tl.int64) * stride_bn + first.to(tl.int64) * stride_bk

    acc = tl.zeros((BLOCK_N, SPLIT * BLOCK_M), tl.float32)
    # num_stages here, not only at the launch: it is what makes the scales' loads run ahead too.
    for at in tl.range(0, piece, GROUP_SIZE, num_stages=STAGES):
        w = tl.load(weights[:, None] + (at + k)[None, :], mask=(row_k + at)[:, None] + k[None, :] < K, other=0.0)
        valid = (column_m < M) & (column_k + at < K)
        x_valid = (column_m < M)[:, None] & ((column_k + at)[:, None] + k[None, :] < K)
        x = tl.load(tokens[:, None] + (at + k)[None, :], mask=x_valid, other=0.0)
        block = at // GROUP_SIZE
        scale = tl.load(a_scale + block * stride_ak.to(tl.int64), mask=valid, other=0.0)
        scale *= tl.load(b_scale + block * stride_bk.to(tl.int64), mask=valid, other=0.0)
        acc += tl.dot(w, x.T) * scale[None, :]
    acc = add_splits(acc, SPLIT, ROWS, BLOCK_M)

    n = tile_n * ROWS + tl.arange(0, ROWS)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    target = out + m.to(tl.int64)[None, :] * stride_out + n[:, None]
    tl.store(target, acc.to(out.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit(do_not_specialize=["M", "stride_am", "stride_ak", "stride_bk", "stride_bn"])
def tma_kernel(
    out,
    a,
    b,
    weights,
    a_scales,
    b_scales,
    M,
    N,
    K,
    stride_b,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICES: tl.constexpr,
    GROUP: tl.constexpr,
    PREFETCH: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = a @ weights.T. out, a and b are descriptors; what lies beyond M, N and K is read as 0 and not written.

    Rows of the last two tiles may be made twice, with the same result.

    A program takes every num_programs-th tile of SLICES * BLOCK_N columns. The loops are fused: the next tile's loads run
    under this one's stores. The slices' products come one after the other, so that they need the registers of one.
    """
    GROUP_SIZE: tl.constexpr = 128
    COLUMNS: tl.constexpr = SLICES * BLOCK_N
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, COLUMNS)
    if PREFETCH > 0:
        _, start = tile_at(tl.program_id(0), tiles_m, tiles_n, GROUP)
        rows = tl.minimum(start * COLUMNS + tl.arange(0, COLUMNS), N - 1).to(tl.int64)
        prefetch(weights + rows * stride_b, tl.zeros((COLUMNS,), tl.int32) + K, PREFETCH, COLUMNS)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        tile_m, tile_n = tile_at(index, tiles_m, tiles_n, GROUP)
        # The last tile ends with M, if M has one: rows that are not there take the copy engine longer.
        first_row = tl.minimum(tile_m * BLOCK_M, tl.maximum(M - BLOCK_M, 0))
        m = first_row + tl.arange(0, BLOCK_M)
        a_scale = a_scales + m.to(tl.int64) * stride_am
        # One scale of weights per tile and k, but loaded once per row: so it comes by the same asynchronous copies.
        first = tile_n * COLUMNS // GROUP_SIZE
        last = (N - 1) // GROUP_SIZE
        accs = (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),) * SLICES
        for at in tl.range(0, K, GROUP_SIZE, num_stages=STAGES):
            x = a.load([first_row, at])
            scale = tl.load(a_scale + (at // GROUP_SIZE) * stride_ak.to(tl.int64), mask=m < M, other=0.0)
            sums = ()
            for i in tl.static_range(SLICES):
                w = b.load([tile_n * COLUMNS + i * BLOCK_N, at])
                if i * BLOCK_N % GROUP_SIZE == 0:
                    block = tl.minimum(first + i * BLOCK_N // GROUP_SIZE, last).to(tl.int64)
                    block = block * stride_bn + (at // GROUP_SIZE) * stride_bk.to(tl.int64)
                    both = scale * tl.load(b_scales + block + tl.zeros((BLOCK_M,), tl.int64))
                sums += (accs[i] + tl.dot(x, w.T) * both[:, None],)
            accs = sums
        for i in tl.static_range(SLICES):
            out.store([first_row, tile_n * COLUMNS + i * BLOCK_N], accs[i].to(out.dtype))


def launch(
    out: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    a_scales: torch.Tensor,
    b_scales: torch.Tensor,
    *,
    config: Mapping[str, Any],
    _launcher: Callable[..., None],
) -> None:
    """One launch of the kernel that the config names; `dot`, `stream`, `tma` and `pair` say what a config holds."""
    m, k, n = a.size(0), a.size(1), b.size(1)
    block_m, block_n = config["block_m"], config["block_n"]
    strides = (a_scales.stride(0), a_scales.stride(1), b_scales.stride(0), b_scales.stride(1))
    shared = {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "PDL": config.get("pdl", True),
        "num_warps": config["num_warps"],
        "launch_pdl": config.get("pdl", True),
    }
    sizes = (m, n, k, out.stride(0), a.stride(0), b.stride(1))
    if config["kernel"] == "dot":
        tiles = ((n + block_n - 1) // block_n, (m + block_m - 1) // block_m)
        if "registers" in config:
            shared["maxnreg"] = config["registers"]
        _launcher(dot_kernel, tiles, out, a, b, a_scales, b_scales, *sizes, *strides, BLOCK_K=config["block_k"], **shared)
        return
    stages = config["num_stages"]
    shared |= {"GROUP": config["group"], "PREFETCH": config["prefetch"], "STAGES": stages, "num_stages": stages}
    if config["kernel"] == "stream":
        rows = block_n // config["split"]
        tiles = ((m + block_m - 1) // block_m) * ((n + rows - 1) // rows)
        _launcher(stream_kernel, (tiles,), out, a, b, a_scales, b_scales, *sizes, *strides, SPLIT=config["split"], **shared)
        return
    if config["kernel"] == "pair":
        out_tiles = TensorDescriptor(out, [m, n], [out.stride(0), 1], [64, min(block_n, 128)])
        a_tiles = TensorDescriptor(a, [m, k], [a.stride(0), 1], [64, 128])
        b_tiles = TensorDescriptor(b, [n, k], [b.stride(1), 1], [block_n, 128])
        tiles = ((m + block_m - 1) // block_m) * ((n + block_n - 1) // block_n)
        del shared["PREFETCH"]
        grid = (min(tiles, config["programs"]),)
        _launcher(pair_kernel, grid, out_tiles, a_tiles, b_tiles, a_scales, b_scales, m, n, k, *strides, **shared)
        return
    columns = config["slices"] * block_n
    out_tiles = TensorDescriptor(out, [m, n], [out.stride(0), 1], [block_m, block_n])
    a_tiles = TensorDescriptor(a, [m, k], [a.stride(0), 1], [block_m, 128])
    b_tiles = TensorDescriptor(b, [n, k], [b.stride(1), 1], [block_n, 128])
    tiles = ((m + block_m - 1) // block_m) * ((n + columns - 1) // columns)
    grid = (min(tiles, config["programs"]),)
    args = (out_tiles, a_tiles, b_tiles, b, a_scales, b_scales, m, n, k, b.stride(1), *strides)
    _launcher(tma_kernel, grid, *args, SLICES=config["slices"], **shared)


def dot(block_m: int, block_n: int, block_k: int, num_warps: int = 4, registers: int | None = None) -> dict[str, Any]:
    """A config of `dot_kernel`. block_m is 1 or 2, block_n divides 128; block_k is at least 512 * num_warps.

    A program holds block_n * block_k bytes of weights. `registers` is the most a thread may have, to fit more programs: best
    is one wave of them, so that all ask for their first weights while the kernel before this one runs.
    """
    config: dict[str, Any] = {
        "kernel": "dot",
        "block_m": block_m,
        "block_n": block_n,
        "block_k": block_k,
        "num_warps": num_warps,
    }
    return config if registers is None else {**config, "registers": registers}


def stream(
    block_m: int, block_n: int, num_stages: int, split: int = 1, prefetch: int = 1024, num_warps: int = 4
) -> dict[str, Any]:
    """A config of `stream_kernel`. `prefetch` is in bytes per row of weights; a stage takes (block_n + split * block_m) * 128
    bytes of shared memory.
    """
    return {
        "kernel": "stream",
        "block_m": block_m,
        "block_n": block_n,
        "split": split,
        "group": 8,
        "prefetch": prefetch,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


def tma(
    block_m: int,
    block_n: int,
    num_stages: int,
    slices: int = 1,
    programs: int = 132,
    group: int = 8,
    prefetch: int = 0,
    num_warps: int = 4,
) -> dict[str, Any]:
    """A config of `tma_kernel`. A GPU's 132 SMs hold two blocks of 113 KB each or three of 75 KB; a block takes
    (block_m + slices * block_n) * 128 bytes per stage and block_m * block_n * 2 for out.
    """
    return {
        "kernel": "tma",
        "block_m": block_m,
        "block_n": block_n,
        "slices": slices,
        "group": group,
        "programs": programs,
        "prefetch": prefetch,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


def pair(block_m: int, block_n: int, num_stages: int, programs: int = 132, group: int = 8) -> dict[str, Any]:
    """A config of `pair_kernel`, one block per SM: (block_m + block_n) * 128 bytes of shared memory per stage and
    min(block_n, 128) * 256 for out, at most 227 KB. num_warps is that of one of the two groups.
    """
    return {
        "kernel": "pair",
        "block_m": block_m,
        "block_n": block_n,
        "group": group,
        "programs": programs,
        "prefetch": 0,
        "num_warps": 4,
        "num_stages": num_stages,
    }


_THIN_TMA = (
    tma(64, 32, 8, programs=264, prefetch=1024),
    tma(64, 64, 6, programs=264, prefetch=1024),
    tma(64, 64, 3, slices=2, programs=264, prefetch=1024),
    tma(64, 128, 3, programs=264, prefetch=1024),
)

#: By the M that they are for. With more rows of a the plain cores, not the memory, set the pace: `stream` is faster.
_DOTS = {
    1: (
        dot(1, 8, 2048),
        dot(1, 4, 2048),
        dot(1, 2, 2048),
        dot(1, 2, 4096),
        dot(1, 4, 4096),
        dot(1, 4, 4096, num_warps=8),
        dot(1, 8, 1024, num_warps=2),
        dot(1, 8, 4096, registers=128),
        dot(1, 4, 2048, registers=56),
        dot(1, 4, 2048, num_warps=2),
    ),
    2: (
        dot(2, 8, 2048),
        dot(2, 4, 2048),
        dot(2, 2, 2048),
        dot(2, 8, 1024, num_warps=2),
        dot(2, 4, 1024, num_warps=2),
    ),
}

#: By the largest M that they are for. Weights per tile (block_n / split) from 16 to 128.
_STREAMS = {
    8: (
        stream(8, 64, 8, split=2),
        stream(8, 64, 8, split=2, prefetch=4096),
        stream(8, 64, 8, split=2, prefetch=0),
        stream(8, 64, 6, split=4),
        stream(8, 64, 6, split=2),
        stream(8, 128, 6, split=2),
        stream(8, 128, 5, split=4),
        stream(16, 64, 8),
        stream(16, 64, 8, prefetch=4096),
        stream(16, 128, 6),
        stream(8, 32, 8),
        stream(8, 32, 12),
        stream(8, 16, 12),
    ),
    16: (
        stream(16, 64, 8),
        stream(16, 64, 8, prefetch=4096),
        stream(16, 64, 6, split=2),
        stream(16, 64, 6, split=2, prefetch=4096),
        stream(16, 64, 6, split=4),
        stream(16, 128, 5, split=2),
        stream(16, 128, 6),
        stream(16, 32, 8),
        stream(16, 32, 12),
        stream(16, 16, 12),
    ),
    32: (
        stream(32, 64, 6),
        stream(32, 64, 6, prefetch=4096),
        stream(32, 64, 6, split=2),
        stream(32, 64, 4, split=4),
        stream(32, 128, 5),
        stream(32, 128, 4, split=2),
        stream(32, 32, 8),
    ),
    64: (
        stream(64, 64, 6),
        stream(64, 64, 6, prefetch=4096),
        stream(64, 64, 4, split=2),
        stream(64, 128, 4, num_warps=8),
    ),
    128: (
        stream(128, 64, 4, num_warps=8),
        stream(128, 128, 4, num_warps=8),
    ),
}

_MIDDLE = (
    pair(128, 128, 6),
    pair(256, 64, 5),
    pair(128, 64, 8),
    pair(256, 128, 4),
    pair(128, 256, 4),
    tma(64, 128, 3, programs=264, prefetch=1024),
    tma(64, 64, 3, slices=2, programs=264, prefetch=1024),
    tma(64, 64, 6, programs=264, prefetch=1024),
    tma(128, 64, 3, programs=264, prefetch=1024),
    tma(128, 128, 4, num_warps=8, prefetch=1024),
)

_LARGE = (
    pair(256, 128, 4),
    pair(256, 128, 4, group=4),
    pair(256, 128, 4, group=16),
    pair(128, 256, 4),
    pair(128, 256, 4, group=16),
    pair(128, 256, 4, group=32),
    pair(256, 128, 3),
    pair(128, 256, 3, group=16),
    pair(128, 128, 6),
    tma(128, 128, 5, num_warps=8),
    tma(64, 128, 3, programs=264),
)


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring, the same ones for every K. The first one is never far behind."""
    m, n = sizes["M"], sizes.get("N", 6144)
    if m > 256:
        return [*_LARGE, pair(256, 64, 5), tma(64, 128, 3, programs=264, prefetch=1024)] if m <= 1024 else list(_LARGE)
    if m > 64:
        return [*_MIDDLE, *_STREAMS[128], *_STREAMS[64][3:]]
    streams = next(found for most, found in _STREAMS.items() if m <= most)
    # Tiles of 16 weights are too many of a large N, those of 128 too few of a small one.
    rows = (32, 128) if n > 16384 else (16, 64) if n <= 6144 else (16, 128)
    found = [c for c in streams if rows[0] <= c["block_n"] // c["split"] <= rows[1]]
    found += _DOTS.get(m, ())
    return found + [c for c in _THIN_TMA if rows[0] <= c["block_n"] * c["slices"] <= rows[1]]

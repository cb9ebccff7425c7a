"""The Triton kernels of scaled_mm_blockwise: `dot` is for one or two rows of a, `stream` for few, those fed by TMA for many.

The tensor core sums 128 products at a time, from zero, `dot` 16; the scaled sums are added in float32.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from hdispatch.opspec import Variant

from ..lib import triton_gemm as gemm
from ..lib import triton_tiles as tiles
from ..lib.triton_gemm import pair, stream
from .pair import pair_kernel

#: One record serves all K and N that are multiples of 16.
GENERIC = ("K", "N")
#: Read before the wait for the kernel before this one, which seldom writes weights: a launch after one that does waits whole.
EARLY_READS = ("b", "b_scales")


@triton.jit
def load_scales(scales, at, stride, COUNT: tl.constexpr, end):
    """The scales of one row for COUNT vectors of 16 numbers from the int32 `at` of `end` on: [COUNT], zeros beyond the end."""
    word = at + 4 * tl.arange(0, COUNT)
    return tl.load(scales + (word // 32).to(tl.int64) * stride, mask=word < end, other=0.0)


@triton.jit(do_not_specialize=["M", "stride_am", "stride_ak", "stride_bk", "stride_bn"])
def dot_kernel(
    out, a, b, a_scales, b_scales, M, N, K, stride_out, stride_a, stride_b, stride_am, stride_ak, stride_bk, stride_bn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = a @ weights.T on the plain cores, as in `scaled_mm`. BLOCK_N divides 128: a program's weights share their scales.

    A thread's 16 products at a time are of one group: it scales their sum.
    """
    if PDL:
        # Dependents start when the last program of this kernel has. They too ask for weights, then wait for this one's end.
        tl.extra.cuda.gdc_launch_dependents()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    VECTORS: tl.constexpr = BLOCK_K // 16
    WORDS: tl.constexpr = BLOCK_K // 4
    word, words, weights, w = tiles.start_dot(b, n, N, K, stride_b, WORDS)
    b_scales += (tl.program_id(0) * BLOCK_N // 128).to(tl.int64) * stride_bn
    b_scale = load_scales(b_scales, 0, stride_bk, VECTORS, words)
    if PDL:
        tl.extra.cuda.gdc_wait()

    first = tl.program_id(1) * BLOCK_M
    x = tiles.load_tokens(a, first, M, stride_a, word, words, BLOCK_M)
    accs = (tl.zeros((BLOCK_N, VECTORS), tl.float32),) * BLOCK_M
    for at in range(0, words, WORDS):
        scales = ()
        for i in tl.static_range(BLOCK_M):
            row = a_scales + (first + i).to(tl.int64) * stride_am
            end = tl.where(first + i < M, words, 0)
            scales += (load_scales(row, at, stride_ak, VECTORS, end),)
        found = tiles.dot_vectors(w, x, BLOCK_M)
        sums = ()
        for i in tl.static_range(BLOCK_M):
            sums += (accs[i] + found[i] * (scales[i] * b_scale)[None, :],)
        accs = sums
        later = at + WORDS
        w = tl.load(weights + later, mask=(later + word)[None, :] < words, other=0)
        b_scale = load_scales(b_scales, later, stride_bk, VECTORS, words)
        x = tiles.load_tokens(a, first, M, stride_a, later + word, words, BLOCK_M)

    m = first + tl.arange(0, BLOCK_M)
    tiles.store_transposed(out, n, m, tl.sum(tiles.stack(accs, BLOCK_M), axis=1), N, M, stride_out)


@triton.jit(do_not_specialize=["M", "stride_am", "stride_ak", "stride_bk", "stride_bn"])
def stream_kernel(
    out, a, b, a_scales, b_scales, M, N, K, stride_out, stride_a, stride_b, stride_am, stride_ak, stride_bk, stride_bn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr, PREFETCH: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out.T = weights @ a.T, as in `scaled_mm`. BLOCK_N / SPLIT divides 128: the weights of a tile share their scales."""
    GROUP_SIZE: tl.constexpr = 128
    ROWS: tl.constexpr = BLOCK_N // SPLIT
    tile_m, tile_n, piece, k, row_k, weights = tiles.start_stream(
        b, M, N, K, stride_b, BLOCK_M, BLOCK_N, GROUP_SIZE, SPLIT, GROUP, PREFETCH, PDL
    )
    column_m, column_k, tokens = tiles.stacked_rows(a, tile_m, piece, stride_a, BLOCK_M, SPLIT)
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
    acc = tiles.add_splits(acc, SPLIT, ROWS, BLOCK_M)

    n = tile_n * ROWS + tl.arange(0, ROWS)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    tiles.store_transposed(out, n, m, acc, N, M, stride_out)


@triton.jit(do_not_specialize=["M", "stride_am", "stride_ak", "stride_bk", "stride_bn"])
def tma_kernel(
    out, a, b, weights, a_scales, b_scales, M, N, K, stride_b, stride_am, stride_ak, stride_bk, stride_bn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLICES: tl.constexpr, GROUP: tl.constexpr, PREFETCH: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = a @ weights.T. out, a and b are descriptors; what lies beyond M, N and K is read as 0 and not written.

    Rows of the last two tiles may be made twice, with the same result.

    A program takes every num_programs-th tile of SLICES * BLOCK_N columns. The loops are fused: the next tile's loads run
    under this one's stores. The slices' products come one after the other, so that they need the registers of one.
    """
    GROUP_SIZE: tl.constexpr = 128
    COLUMNS: tl.constexpr = SLICES * BLOCK_N
    tiles_m, tiles_n = tiles.start_tiles(weights, M, N, K, stride_b, BLOCK_M, COLUMNS, GROUP, PREFETCH, PDL)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        tile_m, tile_n = tiles.tile_at(index, tiles_m, tiles_n, GROUP)
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


def launch(out, a, b, a_scales, b_scales, *, config, _launcher):
    """One launch of the kernel that the config names; see lib/triton_gemm.py."""
    strides = (a_scales.stride(0), a_scales.stride(1), b_scales.stride(0), b_scales.stride(1))
    call = gemm.Call(out, a, b, (a_scales, b_scales), strides)
    block_n = config["block_n"]
    if config["kernel"] == "dot":
        gemm.launch_plain(dot_kernel, call, config, _launcher, BLOCK_K=config["block_k"])
        return
    stages = {"STAGES": config["num_stages"]}
    if config["kernel"] == "stream":
        gemm.launch_plain(stream_kernel, call, config, _launcher, SPLIT=config["split"], **stages)
    elif config["kernel"] == "pair":
        gemm.launch_tiles(pair_kernel, call, config, _launcher, block_n, min(block_n, 128), **stages)
    else:
        slices = config["slices"]
        gemm.launch_tiles(tma_kernel, call, config, _launcher, slices * block_n, block_n, SLICES=slices, **stages)


def tma(block_m: int, block_n: int, num_stages: int, slices: int = 1, **others: int) -> dict[str, Any]:
    """See `gemm.tma`. A block takes (block_m + slices * block_n) * 128 bytes per stage and block_m * block_n * 2 for out."""
    return gemm.tma(block_m, block_n, num_stages, slices=slices, **others)


# fmt: off
_THIN_TMA = (
    tma(64, 32, 8, programs=264, prefetch=1024), tma(64, 64, 6, programs=264, prefetch=1024),
    tma(64, 64, 3, slices=2, programs=264, prefetch=1024), tma(64, 128, 3, programs=264, prefetch=1024),
)

#: Those of scaled_mm, but for the ones of 64 registers a thread.
_DOTS = {m: [config for config in found if config.get("registers") != 64] for m, found in gemm.DOTS.items()}

#: By the largest M that they are for. Weights per tile (block_n / split) from 16 to 128.
_STREAMS = {
    8: (
        stream(8, 64, 8, split=2), stream(8, 64, 8, split=2, prefetch=4096), stream(8, 64, 8, split=2, prefetch=0),
        stream(8, 64, 6, split=4), stream(8, 64, 6, split=2), stream(8, 128, 6, split=2), stream(8, 128, 5, split=4),
        stream(16, 64, 8), stream(16, 64, 8, prefetch=4096), stream(16, 128, 6), stream(8, 32, 8), stream(8, 32, 12),
        stream(8, 16, 12),
    ),
    16: (
        stream(16, 64, 8), stream(16, 64, 8, prefetch=4096), stream(16, 64, 6, split=2),
        stream(16, 64, 6, split=2, prefetch=4096), stream(16, 64, 6, split=4), stream(16, 128, 5, split=2),
        stream(16, 128, 6), stream(16, 32, 8), stream(16, 32, 12), stream(16, 16, 12),
    ),
    32: (
        stream(32, 64, 6), stream(32, 64, 6, prefetch=4096), stream(32, 64, 6, split=2), stream(32, 64, 4, split=4),
        stream(32, 128, 5), stream(32, 128, 4, split=2), stream(32, 32, 8),
    ),
    64: (
        stream(64, 64, 6), stream(64, 64, 6, prefetch=4096), stream(64, 64, 4, split=2), stream(64, 128, 4, num_warps=8),
    ),
    128: (
        stream(128, 64, 4, num_warps=8), stream(128, 128, 4, num_warps=8),
    ),
}

_MIDDLE = (
    pair(128, 128, 6), pair(256, 64, 5), pair(128, 64, 8), pair(256, 128, 4), pair(128, 256, 4),
    tma(64, 128, 3, programs=264, prefetch=1024), tma(64, 64, 3, slices=2, programs=264, prefetch=1024),
    tma(64, 64, 6, programs=264, prefetch=1024), tma(128, 64, 3, programs=264, prefetch=1024),
    tma(128, 128, 4, num_warps=8, prefetch=1024),
)

_LARGE = (
    pair(256, 128, 4), pair(256, 128, 4, group=4), pair(256, 128, 4, group=16), pair(128, 256, 4),
    pair(128, 256, 4, group=16), pair(128, 256, 4, group=32), pair(256, 128, 3), pair(128, 256, 3, group=16),
    pair(128, 128, 6), tma(128, 128, 5, num_warps=8), tma(64, 128, 3, programs=264),
)
# fmt: on


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

"""The Triton kernels of scaled_mm: `dot` is for one or two rows of a, `stream` for few, those fed by TMA for many.

All but `dot` accumulate in the tensor core from the first k to the last, as CUTLASS's kernels with fast accumulation do.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from hdispatch.opspec import Variant

from ..lib import triton_gemm as gemm
from ..lib import triton_tiles as tiles
from .pair import pair_kernel

#: One record serves all K and N that are multiples of 16.
GENERIC = ("K", "N")
#: Read before the wait for the kernel before this one, which seldom writes weights: a launch after one that does waits whole.
EARLY_READS = ("b", "b_scales", "bias")


@triton.jit(do_not_specialize=["M", "stride_as", "stride_bs"])
def dot_kernel(
    out, a, b, a_scales, b_scales, bias, M, N, K, stride_out, stride_a, stride_b, stride_as, stride_bs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = a @ weights.T on the plain cores: a program's BLOCK_N weights go to its registers, BLOCK_K bytes of each at once.

    The first of them are asked for while the kernel before this one still runs. Programs are many, small and resident at
    once: while one computes, the others wait for memory, which always has requests.
    """
    if PDL:
        # Dependents start when the last program of this kernel has. They too ask for weights, then wait for this one's end.
        tl.extra.cuda.gdc_launch_dependents()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    WORDS: tl.constexpr = BLOCK_K // 4
    word, words, weights, w = tiles.start_dot(b, n, N, K, stride_b, WORDS)
    b_scale = tl.load(b_scales + n * stride_bs, mask=n < N, other=0.0)
    if bias is not None:
        shift = tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()

    first = tl.program_id(1) * BLOCK_M
    x = tiles.load_tokens(a, first, M, stride_a, word, words, BLOCK_M)
    m = first + tl.arange(0, BLOCK_M)
    a_scale = tl.load(a_scales + m.to(tl.int64) * stride_as, mask=m < M, other=0.0)
    accs = (tl.zeros((BLOCK_N, BLOCK_K // 16), tl.float32),) * BLOCK_M
    for at in range(WORDS, words + WORDS, WORDS):
        found = tiles.dot_vectors(w, x, BLOCK_M)
        sums = ()
        for i in tl.static_range(BLOCK_M):
            sums += (accs[i] + found[i],)
        accs = sums
        w = tl.load(weights + at, mask=(at + word)[None, :] < words, other=0)
        x = tiles.load_tokens(a, first, M, stride_a, at + word, words, BLOCK_M)

    result = a_scale[None, :] * (b_scale[:, None] * tl.sum(tiles.stack(accs, BLOCK_M), axis=1))
    if bias is not None:
        result += shift[:, None]
    tiles.store_transposed(out, n, m, result, N, M, stride_out)


@triton.jit(do_not_specialize=["M", "stride_as", "stride_bs"])
def stream_kernel(
    out, a, b, a_scales, b_scales, bias, M, N, K, stride_out, stride_a, stride_b, stride_as, stride_bs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr,
    PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out.T = weights @ a.T: the weights are the 64-row side of the tensor core, the rows of a the side that may be narrow.

    See `start_stream` for SPLIT.
    """
    ROWS: tl.constexpr = BLOCK_N // SPLIT
    tile_m, tile_n, piece, k, row_k, weights = tiles.start_stream(
        b, M, N, K, stride_b, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT, GROUP, PREFETCH, PDL
    )
    column_m, column_k, tokens = tiles.stacked_rows(a, tile_m, piece, stride_a, BLOCK_M, SPLIT)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    a_scale = tl.load(a_scales + m.to(tl.int64) * stride_as, mask=m < M, other=0.0)
    n = tile_n * ROWS + tl.arange(0, ROWS)
    b_scale = tl.load(b_scales + n * stride_bs, mask=n < N, other=0.0)
    if bias is not None:
        shift = tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)

    acc = tl.zeros((BLOCK_N, SPLIT * BLOCK_M), tl.float32)
    for at in range(0, piece, BLOCK_K):
        w = tl.load(weights[:, None] + (at + k)[None, :], mask=(row_k + at)[:, None] + k[None, :] < K, other=0.0)
        valid = (column_m < M)[:, None] & ((column_k + at)[:, None] + k[None, :] < K)
        x = tl.load(tokens[:, None] + (at + k)[None, :], mask=valid, other=0.0)
        acc = tl.dot(w, x.T, acc)
    acc = tiles.add_splits(acc, SPLIT, ROWS, BLOCK_M)

    result = a_scale[None, :] * (b_scale[:, None] * acc)
    if bias is not None:
        result += shift[:, None]
    tiles.store_transposed(out, n, m, result, N, M, stride_out)


@triton.jit(do_not_specialize=["M", "stride_as", "stride_bs"])
def tma_kernel(
    out, a, b, weights, a_scales, b_scales, bias, M, N, K, stride_b, stride_as, stride_bs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
    PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = a @ weights.T. out, a and b are descriptors; what lies beyond M, N and K is read as 0 and not written.

    Rows of the last two tiles may be made twice, with the same result.

    A program takes every num_programs-th tile. The loops are fused: the next tile's loads run under this one's stores.
    out leaves in PARTS pieces of BLOCK_N / PARTS columns, each through the same shared memory.
    """
    tiles_m, tiles_n = tiles.start_tiles(weights, M, N, K, stride_b, BLOCK_M, BLOCK_N, GROUP, PREFETCH, PDL)
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        tile_m, tile_n = tiles.tile_at(index, tiles_m, tiles_n, GROUP)
        # The last tile ends with M, if M has one: rows that are not there take the copy engine longer.
        first_row = tl.minimum(tile_m * BLOCK_M, tl.maximum(M - BLOCK_M, 0))
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for at in range(0, K, BLOCK_K):
            x = a.load([first_row, at])
            w = b.load([tile_n * BLOCK_N, at])
            acc = tl.dot(x, w.T, acc)
        m = first_row + tl.arange(0, BLOCK_M)
        a_scale = tl.load(a_scales + m.to(tl.int64) * stride_as, mask=m < M, other=0.0)
        parts = acc.reshape(BLOCK_M, 2, WIDTH).permute(0, 2, 1).split() if PARTS == 2 else (acc,)
        for part in tl.static_range(PARTS):
            n = tile_n * BLOCK_N + part * WIDTH + tl.arange(0, WIDTH)
            b_scale = tl.load(b_scales + n * stride_bs, mask=n < N, other=0.0)
            result = a_scale[:, None] * (b_scale[None, :] * parts[part])
            if bias is not None:
                result += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
            out.store([first_row, tile_n * BLOCK_N + part * WIDTH], result.to(out.dtype))


def launch(out, a, b, a_scales, b_scales, bias, *, config, _launcher):
    """One launch of the kernel that the config names; see lib/triton_gemm.py."""
    call = gemm.Call(out, a, b, (a_scales, b_scales, bias), (a_scales.stride(0), b_scales.stride(0)))
    block_n, k_tile = config["block_n"], {"BLOCK_K": config["block_k"]}
    if config["kernel"] == "dot":
        gemm.launch_plain(dot_kernel, call, config, _launcher, **k_tile)
    elif config["kernel"] == "stream":
        gemm.launch_plain(stream_kernel, call, config, _launcher, SPLIT=config["split"], **k_tile)
    elif config["kernel"] == "pair":
        gemm.launch_tiles(pair_kernel, call, config, _launcher, block_n, block_n, STAGES=config["num_stages"], **k_tile)
    else:
        parts = config["parts"]
        gemm.launch_tiles(tma_kernel, call, config, _launcher, block_n, block_n // parts, PARTS=parts, **k_tile)


def stream(block_m: int, block_n: int, block_k: int, num_stages: int, **others: int) -> dict[str, Any]:
    """See `gemm.stream`."""
    return gemm.stream(block_m, block_n, num_stages, block_k=block_k, **others)


def tma(block_m: int, block_n: int, block_k: int, num_stages: int, parts: int = 1, **others: int) -> dict[str, Any]:
    """See `gemm.tma`. A block takes (block_m + block_n) * block_k bytes per stage and block_m * block_n / parts * 2 for out."""
    return gemm.tma(block_m, block_n, num_stages, block_k=block_k, parts=parts, **others)


def pair(block_m: int, block_n: int, num_stages: int, **others: int) -> dict[str, Any]:
    """See `gemm.pair`. out takes block_n * 256 bytes."""
    return gemm.pair(block_m, block_n, num_stages, block_k=128, **others)


# fmt: off
#: Up to 64 rows: TMA tiles of 64 rows, all but the tile's weights being read as zeros or from L2.
_THIN_TMA = (
    tma(64, 32, 128, 8, programs=264, prefetch=1024), tma(64, 32, 256, 6, prefetch=1024),
    tma(64, 64, 128, 6, programs=264, prefetch=1024), tma(64, 128, 128, 4, parts=2, programs=264, prefetch=1024),
)

#: By the largest M that they are for. Tiles of fewer than 64 weights are multiplied as float16, which is exact, and fill the
#: GPU where N is small. Weights per tile (block_n / split) from 16 to 128; up to 16384 columns split them finely.
_STREAMS = {
    8: (
        stream(8, 64, 256, 4, split=2), stream(8, 64, 256, 4, split=2, prefetch=4096),
        stream(8, 64, 256, 4, split=2, prefetch=0), stream(8, 64, 512, 4, split=2), stream(8, 64, 128, 8, split=2),
        stream(8, 64, 256, 4, split=4), stream(8, 64, 256, 3, split=2), stream(8, 64, 512, 3, split=4),
        stream(8, 128, 256, 3, split=2), stream(8, 128, 128, 6, split=2), stream(16, 64, 256, 4), stream(16, 64, 512, 4),
        stream(16, 128, 128, 6), stream(8, 32, 256, 6), stream(8, 32, 512, 4), stream(8, 32, 1024, 3, num_warps=8),
        stream(8, 16, 512, 4),
    ),
    16: (
        stream(16, 64, 256, 4), stream(16, 64, 256, 4, prefetch=4096), stream(16, 64, 512, 4),
        stream(16, 64, 256, 3, split=2), stream(16, 64, 256, 3, split=2, prefetch=4096), stream(16, 64, 128, 4, split=4),
        stream(16, 64, 256, 3, split=4), stream(16, 128, 128, 5, split=2), stream(16, 128, 128, 6), stream(16, 32, 256, 6),
        stream(16, 32, 512, 4), stream(16, 32, 512, 3, prefetch=4096), stream(16, 32, 1024, 3, num_warps=8),
        stream(16, 16, 512, 4), stream(16, 16, 1024, 3),
    ),
    32: (
        stream(32, 64, 256, 4), stream(32, 64, 256, 4, prefetch=4096), stream(32, 64, 128, 8),
        stream(32, 64, 256, 3, split=2), stream(32, 64, 128, 4, split=4), stream(32, 128, 128, 5),
        stream(32, 128, 128, 4, split=2), stream(32, 32, 256, 5), stream(32, 32, 512, 3), stream(32, 16, 512, 3),
    ),
    64: (
        stream(64, 64, 128, 6), stream(64, 64, 128, 6, prefetch=4096), stream(64, 64, 256, 3),
        stream(64, 64, 128, 4, split=2), stream(64, 128, 128, 4), stream(64, 128, 128, 4, num_warps=8),
        stream(64, 32, 256, 4), stream(64, 32, 256, 4, num_warps=8), stream(32, 32, 512, 3), stream(32, 64, 256, 4),
    ),
    128: (
        stream(128, 64, 128, 4), stream(128, 128, 128, 3, num_warps=8),
    ),
}

_MIDDLE = (
    pair(128, 128, 6), pair(256, 64, 5), pair(128, 64, 8), pair(256, 128, 4),
    tma(64, 128, 128, 4, parts=2, programs=264, prefetch=1024), tma(64, 64, 128, 6, programs=264, prefetch=1024),
    tma(128, 64, 128, 4, programs=264, parts=2, prefetch=1024), tma(128, 128, 128, 3, parts=2, programs=264),
    tma(128, 128, 128, 5, num_warps=8, prefetch=1024), tma(256, 64, 128, 4, num_warps=8, prefetch=1024),
)

#: 129 to 192 rows: three groups multiply 64 each, so that each weight is read once.
_THREE = (pair(192, 64, 6), pair(192, 128, 4), pair(192, 32, 7))

_LARGE = (
    pair(256, 128, 4), pair(256, 128, 4, group=4), pair(256, 128, 4, group=16), pair(128, 256, 3),
    pair(128, 256, 3, group=16), pair(128, 256, 3, group=32), pair(128, 128, 6),
    tma(128, 128, 128, 3, parts=2, programs=264), tma(128, 256, 128, 4, parts=2, num_warps=8),
    tma(128, 256, 128, 4, parts=2, group=16, num_warps=8), tma(256, 128, 128, 4, parts=2, num_warps=8),
    tma(256, 128, 128, 4, parts=2, group=4, num_warps=8),
)
# fmt: on


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring, the same ones for every K. The first one is never far behind."""
    m, n = sizes["M"], sizes.get("N", 6144)
    if m > 256:
        return [*_LARGE, pair(256, 64, 5), _MIDDLE[4]] if m <= 1024 else list(_LARGE)
    if 128 < m <= 192:
        return [*_MIDDLE[:2], *_THREE, *_MIDDLE[2:]]
    if m > 64:
        return [*_MIDDLE, *_STREAMS[128], *_STREAMS[64][3:5]]
    streams = next(found for most, found in _STREAMS.items() if m <= most)
    # Tiles of 16 weights are too many of a large N, those of 128 too few of a small one.
    rows = (32, 128) if n > 16384 else (16, 64) if n <= 6144 else (16, 128)
    found = [c for c in streams if rows[0] <= c["block_n"] // c["split"] <= rows[1]]
    found += gemm.DOTS.get(m, ())
    return found + [c for c in _THIN_TMA if rows[0] <= c["block_n"] <= rows[1]]

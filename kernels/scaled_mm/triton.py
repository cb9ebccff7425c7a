"""The Triton kernels of scaled_mm: `dot` is for one or two rows of a, `stream` for few, those fed by TMA for many.

All but `dot` accumulate in the tensor core from the first k to the last, as CUTLASS's kernels with fast accumulation do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from hdispatch.opspec import Variant
from triton.tools.tensor_descriptor import TensorDescriptor

from .pair import pair_kernel
from .tiles import add_splits, dot_vectors, load_tokens, prefetch, stack, tile_at

#: One record serves all K and N that are multiples of 16.
GENERIC = ("K", "N")
INDEX_BITS = 64
#: Read before the wait for the kernel before this one, which seldom writes weights: a launch after one that does waits whole.
EARLY_READS = ("b", "b_scales", "bias")


@triton.jit(do_not_specialize=["M", "stride_as", "stride_bs"])
def dot_kernel(
    out,
    a,
    b,
    a_scales,
    b_scales,
    bias,
    M,
    N,
    K,
    stride_out,
    stride_a,
    stride_b,
    stride_as,
    stride_bs,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = a @ weights.T on the plain cores: a program's BLOCK_N weights go to its registers, BLOCK_K bytes of each at once.

    The first of them are asked for while the kernel before this one still runs. Programs are many, small and resident at
    once: while one computes, the others wait for memory, which always has requests.
    """
    if PDL:
        # Dependents start when the last program of this kernel has. They too ask for weights, then wait for this one's end.
        tl.extra.cuda.gdc_launch_dependents()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Four fp8 numbers are an int32. K is a multiple of 16, so that a thread's four of them are all there or none is.
    WORDS: tl.constexpr = BLOCK_K // 4
    words = tl.multiple_of(K // 4, 4)
    word = tl.arange(0, WORDS)
    rows = b + tl.minimum(n, N - 1).to(tl.int64) * stride_b
    weights = rows[:, None].to(tl.pointer_type(tl.int32)) + word[None, :]
    w = tl.load(weights, mask=word[None, :] < words, other=0)
    b_scale = tl.load(b_scales + n * stride_bs, mask=n < N, other=0.0)
    if bias is not None:
        shift = tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()

    first = tl.program_id(1) * BLOCK_M
    x = load_tokens(a, first, M, stride_a, word, words, BLOCK_M)
    m = first + tl.arange(0, BLOCK_M)
    a_scale = tl.load(a_scales + m.to(tl.int64) * stride_as, mask=m < M, other=0.0)
    accs = (tl.zeros((BLOCK_N, BLOCK_K // 16), tl.float32),) * BLOCK_M
    for at in range(WORDS, words + WORDS, WORDS):
        found = dot_vectors(w, x, BLOCK_M)
        sums = ()
        for i in tl.static_range(BLOCK_M):
            sums += (accs[i] + found[i],)
        accs = sums
        w = tl.load(weights + at, mask=(at + word)[None, :] < words, other=0)
        x = load_tokens(a, first, M, stride_a, at + word, words, BLOCK_M)

    result = a_scale[None, :] * (b_scale[:, None] * tl.sum(stack(accs, BLOCK_M), axis=1))
    if bias is not None:
        result += shift[:, None]
    target = out + m.to(tl.int64)[None, :] * stride_out + n[:, None]
    tl.store(target, result.to(out.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit(do_not_specialize=["M", "stride_as", "stride_bs"])
def stream_kernel(
    out,
    a,
    b,
    a_scales,
    b_scales,
    bias,
    M,
    N,
    K,
    stride_out,
    stride_a,
    stride_b,
    stride_as,
    stride_bs,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    """out.T = weights @ a.T: the weights are the 64-row side of the tensor core, the rows of a the side that may be narrow.

    With SPLIT > 1 a tile takes BLOCK_N / SPLIT weights and cuts K into SPLIT pieces, which are stacked: as rows of the
    weights and as columns of a. Blocks off the diagonal mix two pieces and are dropped. So more programs share the stream.
    """
    ROWS: tl.constexpr = BLOCK_N // SPLIT
    tile_m, tile_n = tile_at(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, ROWS), GROUP)
    piece = tl.cdiv(K, SPLIT * BLOCK_K) * BLOCK_K
    k = tl.arange(0, BLOCK_K)

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
    acc = add_splits(acc, SPLIT, ROWS, BLOCK_M)

    result = a_scale[None, :] * (b_scale[:, None] * acc)
    if bias is not None:
        result += shift[:, None]
    target = out + m.to(tl.int64)[None, :] * stride_out + n[:, None]
    tl.store(target, result.to(out.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit(do_not_specialize=["M", "stride_as", "stride_bs"])
def tma_kernel(
    out,
    a,
    b,
    weights,
    a_scales,
    b_scales,
    bias,
    M,
    N,
    K,
    stride_b,
    stride_as,
    stride_bs,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = a @ weights.T. out, a and b are descriptors; what lies beyond M, N and K is read as 0 and not written.

    Rows of the last two tiles may be made twice, with the same result.

    A program takes every num_programs-th tile. The loops are fused: the next tile's loads run under this one's stores.
    out leaves in PARTS pieces of BLOCK_N / PARTS columns, each through the same shared memory.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    if PREFETCH > 0:
        _, first = tile_at(tl.program_id(0), tiles_m, tiles_n, GROUP)
        rows = tl.minimum(first * BLOCK_N + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
        prefetch(weights + rows * stride_b, tl.zeros((BLOCK_N,), tl.int32) + K, PREFETCH, BLOCK_N)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        tile_m, tile_n = tile_at(index, tiles_m, tiles_n, GROUP)
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


def launch(
    out: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    a_scales: torch.Tensor,
    b_scales: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    config: Mapping[str, Any],
    _launcher: Callable[..., None],
) -> None:
    """One launch of the kernel that the config names; `dot`, `stream`, `tma` and `pair` say what a config holds."""
    m, k, n = a.size(0), a.size(1), b.size(1)
    block_m, block_n, block_k = config["block_m"], config["block_n"], config["block_k"]
    scales = (a_scales, b_scales, bias)
    strides = (a_scales.stride(0), b_scales.stride(0))
    shared = {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "PDL": config.get("pdl", True),
        "num_warps": config["num_warps"],
        "launch_pdl": config.get("pdl", True),
    }
    sizes = (m, n, k, out.stride(0), a.stride(0), b.stride(1))
    if config["kernel"] == "dot":
        tiles = ((n + block_n - 1) // block_n, (m + block_m - 1) // block_m)
        if "registers" in config:
            shared["maxnreg"] = config["registers"]
        _launcher(dot_kernel, tiles, out, a, b, *scales, *sizes, *strides, **shared)
        return
    shared |= {"GROUP": config["group"], "PREFETCH": config["prefetch"], "num_stages": config["num_stages"]}
    if config["kernel"] == "stream":
        rows = block_n // config["split"]
        tiles = ((m + block_m - 1) // block_m) * ((n + rows - 1) // rows)
        _launcher(stream_kernel, (tiles,), out, a, b, *scales, *sizes, *strides, SPLIT=config["split"], **shared)
        return
    if config["kernel"] == "pair":
        out_tiles = TensorDescriptor(out, [m, n], [out.stride(0), 1], [64, block_n])
        a_tiles = TensorDescriptor(a, [m, k], [a.stride(0), 1], [64, block_k])
        b_tiles = TensorDescriptor(b, [n, k], [b.stride(1), 1], [block_n, block_k])
        tiles = ((m + block_m - 1) // block_m) * ((n + block_n - 1) // block_n)
        del shared["PREFETCH"]
        grid, stages = (min(tiles, config["programs"]),), config["num_stages"]
        _launcher(pair_kernel, grid, out_tiles, a_tiles, b_tiles, *scales, m, n, k, *strides, STAGES=stages, **shared)
        return
    parts = config["parts"]
    out_tiles = TensorDescriptor(out, [m, n], [out.stride(0), 1], [block_m, block_n // parts])
    a_tiles = TensorDescriptor(a, [m, k], [a.stride(0), 1], [block_m, block_k])
    b_tiles = TensorDescriptor(b, [n, k], [b.stride(1), 1], [block_n, block_k])
    tiles = ((m + block_m - 1) // block_m) * ((n + block_n - 1) // block_n)
    grid = (min(tiles, config["programs"]),)
    sizes = (m, n, k, b.stride(1))
    _launcher(tma_kernel, grid, out_tiles, a_tiles, b_tiles, b, *scales, *sizes, *strides, PARTS=parts, **shared)


def dot(block_m: int, block_n: int, block_k: int, num_warps: int = 4, registers: int | None = None) -> dict[str, Any]:
    """A config of `dot_kernel`. block_m is 1 or 2; block_k is at least 512 * num_warps: 16 bytes per thread.

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
    block_m: int, block_n: int, block_k: int, num_stages: int, split: int = 1, prefetch: int = 1024, num_warps: int = 4
) -> dict[str, Any]:
    """A config of `stream_kernel`. `prefetch` is in bytes per row of weights; a stage takes
    (block_n + split * block_m) * block_k bytes of shared memory.
    """
    return {
        "kernel": "stream",
        "block_m": block_m,
        "block_n": block_n,
        "block_k": block_k,
        "split": split,
        "group": 8,
        "prefetch": prefetch,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


def tma(
    block_m: int,
    block_n: int,
    block_k: int,
    num_stages: int,
    parts: int = 1,
    programs: int = 132,
    group: int = 8,
    prefetch: int = 0,
    num_warps: int = 4,
) -> dict[str, Any]:
    """A config of `tma_kernel`. A GPU's 132 SMs hold two blocks of 113 KB each or three of 75 KB; a block takes
    (block_m + block_n) * block_k bytes per stage and block_m * block_n / parts * 2 for out.
    """
    return {
        "kernel": "tma",
        "block_m": block_m,
        "block_n": block_n,
        "block_k": block_k,
        "parts": parts,
        "group": group,
        "programs": programs,
        "prefetch": prefetch,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


def pair(
    block_m: int, block_n: int, num_stages: int, block_k: int = 128, programs: int = 132, group: int = 8
) -> dict[str, Any]:
    """A config of `pair_kernel`, one block per SM: (block_m + block_n) * block_k bytes of shared memory per stage and
    block_n * 256 for out, at most 227 KB. num_warps is that of one of the two groups.
    """
    return {
        "kernel": "pair",
        "block_m": block_m,
        "block_n": block_n,
        "block_k": block_k,
        "group": group,
        "programs": programs,
        "prefetch": 0,
        "num_warps": 4,
        "num_stages": num_stages,
    }


#: Up to 64 rows: TMA tiles of 64 rows, all but the tile's weights being read as zeros or from L2.
_THIN_TMA = (
    tma(64, 32, 128, 8, programs=264, prefetch=1024),
    tma(64, 32, 256, 6, prefetch=1024),
    tma(64, 64, 128, 6, programs=264, prefetch=1024),
    tma(64, 128, 128, 4, parts=2, programs=264, prefetch=1024),
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
        dot(1, 8, 2048, registers=64),
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
        dot(2, 4, 2048, registers=64),
    ),
}

#: By the largest M that they are for. Tiles of fewer than 64 weights are multiplied as float16, which is exact, and fill the
#: GPU where N is small. Weights per tile (block_n / split) from 16 to 128; up to 16384 columns split them finely.
_STREAMS = {
    8: (
        stream(8, 64, 256, 4, split=2),
        stream(8, 64, 256, 4, split=2, prefetch=4096),
        stream(8, 64, 256, 4, split=2, prefetch=0),
        stream(8, 64, 512, 4, split=2),
        stream(8, 64, 128, 8, split=2),
        stream(8, 64, 256, 4, split=4),
        stream(8, 64, 256, 3, split=2),
        stream(8, 64, 512, 3, split=4),
        stream(8, 128, 256, 3, split=2),
        stream(8, 128, 128, 6, split=2),
        stream(16, 64, 256, 4),
        stream(16, 64, 512, 4),
        stream(16, 128, 128, 6),
        stream(8, 32, 256, 6),
        stream(8, 32, 512, 4),
        stream(8, 32, 1024, 3, num_warps=8),
        stream(8, 16, 512, 4),
    ),
    16: (
        stream(16, 64, 256, 4),
        stream(16, 64, 256, 4, prefetch=4096),
        stream(16, 64, 512, 4),
        stream(16, 64, 256, 3, split=2),
        stream(16, 64, 256, 3, split=2, prefetch=4096),
        stream(16, 64, 128, 4, split=4),
        stream(16, 64, 256, 3, split=4),
        stream(16, 128, 128, 5, split=2),
        stream(16, 128, 128, 6),
        stream(16, 32, 256, 6),
        stream(16, 32, 512, 4),
        stream(16, 32, 512, 3, prefetch=4096),
        stream(16, 32, 1024, 3, num_warps=8),
        stream(16, 16, 512, 4),
        stream(16, 16, 1024, 3),
    ),
    32: (
        stream(32, 64, 256, 4),
        stream(32, 64, 256, 4, prefetch=4096),
        stream(32, 64, 128, 8),
        stream(32, 64, 256, 3, split=2),
        stream(32, 64, 128, 4, split=4),
        stream(32, 128, 128, 5),
        stream(32, 128, 128, 4, split=2),
        stream(32, 32, 256, 5),
        stream(32, 32, 512, 3),
        stream(32, 16, 512, 3),
    ),
    64: (
        stream(64, 64, 128, 6),
        stream(64, 64, 128, 6, prefetch=4096),
        stream(64, 64, 256, 3),
        stream(64, 64, 128, 4, split=2),
        stream(64, 128, 128, 4),
        stream(64, 128, 128, 4, num_warps=8),
        stream(64, 32, 256, 4),
        stream(64, 32, 256, 4, num_warps=8),
        stream(32, 32, 512, 3),
        stream(32, 64, 256, 4),
    ),
    128: (
        stream(128, 64, 128, 4),
        stream(128, 128, 128, 3, num_warps=8),
    ),
}

_MIDDLE = (
    pair(128, 128, 6),
    pair(256, 64, 5),
    pair(128, 64, 8),
    pair(256, 128, 4),
    tma(64, 128, 128, 4, parts=2, programs=264, prefetch=1024),
    tma(64, 64, 128, 6, programs=264, prefetch=1024),
    tma(128, 64, 128, 4, programs=264, parts=2, prefetch=1024),
    tma(128, 128, 128, 3, parts=2, programs=264),
    tma(128, 128, 128, 5, num_warps=8, prefetch=1024),
    tma(256, 64, 128, 4, num_warps=8, prefetch=1024),
)

_LARGE = (
    pair(256, 128, 4),
    pair(256, 128, 4, group=4),
    pair(256, 128, 4, group=16),
    pair(128, 256, 3),
    pair(128, 256, 3, group=16),
    pair(128, 256, 3, group=32),
    pair(128, 128, 6),
    tma(128, 128, 128, 3, parts=2, programs=264),
    tma(128, 256, 128, 4, parts=2, num_warps=8),
    tma(128, 256, 128, 4, parts=2, group=16, num_warps=8),
    tma(256, 128, 128, 4, parts=2, num_warps=8),
    tma(256, 128, 128, 4, parts=2, group=4, num_warps=8),
)


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring, the same ones for every K. The first one is never far behind."""
    m, n = sizes["M"], sizes.get("N", 6144)
    if m > 256:
        return [*_LARGE, pair(256, 64, 5), _MIDDLE[4]] if m <= 1024 else list(_LARGE)
    if m > 64:
        return [*_MIDDLE, *_STREAMS[128], *_STREAMS[64][3:5]]
    streams = next(found for most, found in _STREAMS.items() if m <= most)
    # Tiles of 16 weights are too many of a large N, those of 128 too few of a small one.
    rows = (32, 128) if n > 16384 else (16, 64) if n <= 6144 else (16, 128)
    found = [c for c in streams if rows[0] <= c["block_n"] // c["split"] <= rows[1]]
    found += _DOTS.get(m, ())
    return found + [c for c in _THIN_TMA if rows[0] <= c["block_n"] <= rows[1]]

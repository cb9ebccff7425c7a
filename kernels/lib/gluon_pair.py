"""What the Gluon kernels of the fp8 matrix products share: one warp loads by TMA, groups of four warps multiply.

Triton 3.7 does not specialise warps on Hopper by itself; in Gluon a kernel says which warps do what.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .triton_tiles import find_tile

tile_of = gluon.jit(find_tile)

# Triton 3.8 and later have the first names, 3.6 and 3.7 the others.
load_by_tma = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_by_tma = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def row_of(tile_m, piece, M, BLOCK_M: gl.constexpr):
    """Where 64 rows of a tile begin. No piece reaches beyond M, if M is 64 or more: the last ones are the last 64 rows again.

    The copy engine takes some five times as long for a row that is not there: M = 129 took 52 us where M = 256 takes 24.
    """
    return gl.minimum(tile_m * BLOCK_M + piece * 64, gl.maximum(M - 64, 0))


@gluon.jit
def load_tiles(a, b, a_tiles, b_tiles, ready, free, M, N, K, BLOCK_M: gl.constexpr, GROUP: gl.constexpr, PDL: gl.constexpr):
    """Fills the stages, one after the other, as the groups free them. A stage of a has BLOCK_M / 64 pieces in a row.

    With PDL the kernel before this one may still write `a`; the first weights are asked for while it runs.
    """
    STAGES: gl.constexpr = b_tiles.shape[0]
    PIECES: gl.constexpr = BLOCK_M // 64
    BLOCK_N: gl.constexpr = b_tiles.shape[1]
    BLOCK_K: gl.constexpr = b_tiles.shape[2]
    BYTES: gl.constexpr = (BLOCK_M + BLOCK_N) * BLOCK_K
    tiles_m = gl.cdiv(M, BLOCK_M)
    tiles_n = gl.cdiv(N, BLOCK_N)
    early = 0
    if PDL:
        _, tile_n = tile_of(gl.program_id(0), tiles_m, tiles_n, GROUP)
        for i in gl.static_range(STAGES):
            wanted = i * BLOCK_K < K
            mbarrier.expect(ready.index(i), BYTES, pred=wanted)
            load_by_tma(b, [tile_n * BLOCK_N, i * BLOCK_K], ready.index(i), b_tiles.index(i), pred=wanted)
        gdc_wait()
        gdc_launch_dependents()
        early = STAGES * BLOCK_K
    stage = 0
    phase = 1
    for index in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = tile_of(index, tiles_m, tiles_n, GROUP)
        for at in range(0, K, BLOCK_K):
            mbarrier.wait(free.index(stage), phase)
            late = at >= early
            mbarrier.expect(ready.index(stage), BYTES, pred=late)
            for i in gl.static_range(PIECES):
                piece = a_tiles.index(stage * PIECES + i)
                load_by_tma(a, [row_of(tile_m, i, M, BLOCK_M), at], ready.index(stage), piece)
            load_by_tma(b, [tile_n * BLOCK_N, at], ready.index(stage), b_tiles.index(stage), pred=late)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        early = 0


@gluon.jit
def allocate(
    out, a, b, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    GROUPS: gl.constexpr = 2,
):  # fmt: skip
    """Shared memory: the stages of a and of b, a group's part of out for each group, and the stages' barriers.

    One barrier per stage says that it is loaded, one that all groups are done with it.
    """
    a_tiles = gl.allocate_shared_memory(a.dtype, [STAGES * (BLOCK_M // 64), 64, BLOCK_K], a.layout)
    b_tiles = gl.allocate_shared_memory(b.dtype, [STAGES, BLOCK_N, BLOCK_K], b.layout)
    out_tiles = gl.allocate_shared_memory(out.dtype, [GROUPS, 64, out.block_shape[1]], out.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=GROUPS)
    fence_async_shared()
    return a_tiles, b_tiles, out_tiles, ready, free


@gluon.jit
def store_tile(out, m, n, out_tile, result):
    """Write a group's part of out, once its part before has left shared memory."""
    tma.store_wait(0)
    out_tile.store(result.to(out.dtype))
    fence_async_shared()
    store_by_tma(out, [m, n], out_tile)

"""The Gluon kernel of scaled_mm: one warp loads by TMA, groups of four warps multiply, each at its own pace."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_wait

from ..lib.gluon_pair import allocate, load_tiles, row_of, store_tile, tile_of


@gluon.jit
def multiply(
    tensors, sizes, out_tile, SHARE: gl.constexpr, GROUPS: gl.constexpr, BLOCK_M: gl.constexpr, GROUP: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """One of the GROUPS equal shares of each tile, the upper one first, in parts of 64 rows."""
    out, a_scales, b_scales, bias, a_tiles, b_tiles, ready, free = tensors
    M, N, K, stride_as, stride_bs = sizes
    if PDL:
        gdc_wait()
    STAGES: gl.constexpr = b_tiles.shape[0]
    BLOCK_N: gl.constexpr = b_tiles.shape[1]
    BLOCK_K: gl.constexpr = b_tiles.shape[2]
    PARTS: gl.constexpr = BLOCK_M // 64 // GROUPS
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 32])
    tiles_m = gl.cdiv(M, BLOCK_M)
    tiles_n = gl.cdiv(N, BLOCK_N)
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
    stage = 0
    phase = 0
    # Not `stage`: Triton would take the two for one, and never change this one in the loop.
    before = STAGES - 1
    for index in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = tile_of(index, tiles_m, tiles_n, GROUP)
        accs = (gl.zeros((64, BLOCK_N), gl.float32, LAYOUT),) * PARTS
        for at in range(0, K, BLOCK_K):
            mbarrier.wait(ready.index(stage), phase)
            sums = ()
            for i in gl.static_range(PARTS):
                x = a_tiles.index((stage * GROUPS + SHARE) * PARTS + i)
                w = b_tiles.index(stage).permute((1, 0))
                sums += (warpgroup_mma(x, w, accs[i], is_async=True),)
            # These products run on; the ones before them are done with their stage.
            accs = (warpgroup_mma_wait(1, deps=sums),) if PARTS == 1 else warpgroup_mma_wait(PARTS, deps=sums)
            mbarrier.arrive(free.index(before), pred=at > 0)
            before = stage
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        accs = (warpgroup_mma_wait(0, deps=accs),) if PARTS == 1 else warpgroup_mma_wait(0, deps=accs)
        mbarrier.arrive(free.index(before))
        n = gl.minimum(tile_n * BLOCK_N + column, N - 1)
        b_scale = gl.load(b_scales + n * stride_bs)
        for i in gl.static_range(PARTS):
            first = row_of(tile_m, SHARE * PARTS + i, M, BLOCK_M)
            m = gl.minimum(first + row, M - 1)
            a_scale = gl.load(a_scales + m * stride_as)
            result = gl.expand_dims(a_scale, 1) * (gl.expand_dims(b_scale, 0) * accs[i])
            if bias is not None:
                result += gl.expand_dims(gl.load(bias + n).to(gl.float32), 0)
            store_tile(out, first, tile_n * BLOCK_N, out_tile, result)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "stride_as", "stride_bs"])
def pair_kernel(
    out, a, b, a_scales, b_scales, bias, M, N, K, stride_as, stride_bs,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """out = a @ b.T. out, a and b are descriptors with blocks of [64, BLOCK_N], [64, BLOCK_K] and [BLOCK_N, BLOCK_K].

    A program takes every num_programs-th tile; BLOCK_M is 128, 192 or 256. What lies beyond M, N and K is read as 0 and not
    written. Some of the last 64 rows may be made, and written, several times, with the same result. Two groups multiply, or
    three 64 rows each, which reads the weights of up to 192 rows once and multiplies nothing that is not there.
    """
    THREE: gl.constexpr = BLOCK_M == 192
    GROUPS: gl.constexpr = 3 if THREE else 2
    a_tiles, b_tiles, out_tiles, ready, free = allocate(out, a, b, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, GROUPS)
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    THIRD: gl.constexpr = 2
    tensors = (out, a_scales, b_scales, bias, a_tiles, b_tiles, ready, free)
    sizes = (M, N, K, stride_as, stride_bs)
    if THREE:
        gl.warp_specialize(
            [
                (multiply, (tensors, sizes, out_tiles.index(0), FIRST, GROUPS, BLOCK_M, GROUP, PDL)),
                (multiply, (tensors, sizes, out_tiles.index(1), SECOND, GROUPS, BLOCK_M, GROUP, PDL)),
                (multiply, (tensors, sizes, out_tiles.index(2), THIRD, GROUPS, BLOCK_M, GROUP, PDL)),
                (load_tiles, (a, b, a_tiles, b_tiles, ready, free, M, N, K, BLOCK_M, GROUP, PDL)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )
    else:
        gl.warp_specialize(
            [
                (multiply, (tensors, sizes, out_tiles.index(0), FIRST, GROUPS, BLOCK_M, GROUP, PDL)),
                (multiply, (tensors, sizes, out_tiles.index(1), SECOND, GROUPS, BLOCK_M, GROUP, PDL)),
                (load_tiles, (a, b, a_tiles, b_tiles, ready, free, M, N, K, BLOCK_M, GROUP, PDL)),
            ],
            [4, 1],
            [240, 24],
        )

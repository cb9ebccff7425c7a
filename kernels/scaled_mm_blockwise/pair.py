"""The Gluon kernel of scaled_mm_blockwise: one warp loads by TMA, two warp groups multiply and scale independently.

While one group adds its scaled sums, the other one's products keep the tensor core busy.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_wait

from ..lib.gluon_pair import allocate, load_tiles, row_of, store_tile, tile_of


@gluon.jit
def add_scaled(acc, products, factor):
    """acc + products * factor, here and not later: before the next products take the registers of these."""
    products, factor = gl.broadcast(products, factor)
    return gl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [products, factor, acc], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def multiply_now(x, y):
    """x * y, here and not later."""
    x, y = gl.broadcast(x, y)
    return gl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def multiply(tensors, sizes, out_tile, HALF: gl.constexpr, BLOCK_M: gl.constexpr, GROUP: gl.constexpr, PDL: gl.constexpr):
    """Upper or lower half of each tile, in parts of 64 rows and at most 128 columns."""
    out, a_scales, b_scales, a_tiles, b_tiles, ready, free = tensors
    M, N, K, stride_am, stride_ak, stride_bk, stride_bn = sizes
    if PDL:
        gdc_wait()
    STAGES: gl.constexpr = b_tiles.shape[0]
    BLOCK_N: gl.constexpr = b_tiles.shape[1]
    WIDTH: gl.constexpr = out_tile.shape[1]
    PARTS_M: gl.constexpr = BLOCK_M // 128
    PARTS_N: gl.constexpr = BLOCK_N // WIDTH
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH, 32])
    tiles_m = gl.cdiv(M, BLOCK_M)
    tiles_n = gl.cdiv(N, BLOCK_N)
    last = (N - 1) // 128
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    # Zero, but to ptxas it differs from thread to thread: it waits for a uniform register at once, amid the products.
    zero = gl.where(M < 0, row, 0)
    none = gl.zeros((64, WIDTH), gl.float32, LAYOUT)
    products = none
    stage = 0
    phase = 0
    for index in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = tile_of(index, tiles_m, tiles_n, GROUP)
        firsts = ()
        rows = ()
        factors = ()
        for i in gl.static_range(PARTS_M):
            firsts += (row_of(tile_m, HALF * PARTS_M + i, M, BLOCK_M),)
            m = gl.minimum(firsts[i] + row, M - 1)
            rows += (a_scales + m.to(gl.int64) * stride_am,)
            factors += (gl.load(a_scales + m.to(gl.int64) * stride_am),)
        columns = ()
        weights = ()
        for j in gl.static_range(PARTS_N):
            n = gl.minimum((tile_n * BLOCK_N + j * WIDTH) // 128, last)
            columns += (b_scales + n.to(gl.int64) * stride_bn + zero,)
            weights += (gl.load(columns[j]),)
        accs = (none,) * (PARTS_M * PARTS_N)
        for at in range(0, K, 128):
            # The scales of the next 128 go where these are, which are not needed any more once they are multiplied; they
            # arrive while the products are summed. The last ones are loaded twice.
            both = ()
            for i in gl.static_range(PARTS_M):
                for j in gl.static_range(PARTS_N):
                    both += (multiply_now(factors[i], weights[j]),)
            next_k = (gl.minimum(at + 128, K - 1) // 128).to(gl.int64)
            factors = ()
            for i in gl.static_range(PARTS_M):
                factors += (gl.load(rows[i] + next_k * stride_ak),)
            weights = ()
            for j in gl.static_range(PARTS_N):
                weights += (gl.load(columns[j] + next_k * stride_bk),)
            mbarrier.wait(ready.index(stage), phase)
            sums = ()
            for i in gl.static_range(PARTS_M):
                for j in gl.static_range(PARTS_N):
                    x = a_tiles.index((stage * 2 + HALF) * PARTS_M + i)
                    w = b_tiles.index(stage).slice(j * WIDTH, WIDTH).permute((1, 0))
                    # Never true, but ptxas must not know: else it takes other registers for each part, and runs out of them.
                    products = warpgroup_mma(x, w, products, use_acc=M < 0, is_async=True)
                    products = warpgroup_mma_wait(0, deps=(products,))
                    if i == PARTS_M - 1 and j == PARTS_N - 1:
                        mbarrier.arrive(free.index(stage))
                    factor = gl.expand_dims(both[i * PARTS_N + j], 1)
                    sums += (add_scaled(accs[i * PARTS_N + j], products, factor),)
            accs = sums
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        for i in gl.static_range(PARTS_M):
            for j in gl.static_range(PARTS_N):
                store_tile(out, firsts[i], tile_n * BLOCK_N + j * WIDTH, out_tile, accs[i * PARTS_N + j])
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "stride_am", "stride_ak", "stride_bk", "stride_bn"])
def pair_kernel(
    out, a, b, a_scales, b_scales, M, N, K, stride_am, stride_ak, stride_bk, stride_bn,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """out = a @ b.T. out, a and b are descriptors with blocks of [64, min(BLOCK_N, 128)], [64, 128] and [BLOCK_N, 128].

    A program takes every num_programs-th tile; BLOCK_M is 128 or 256. What lies beyond M, N and K is read as 0 and not
    written. Some of the last 64 rows may be made, and written, several times, with the same result.
    """
    a_tiles, b_tiles, out_tiles, ready, free = allocate(out, a, b, BLOCK_M, BLOCK_N, 128, STAGES)
    UPPER: gl.constexpr = 0
    LOWER: gl.constexpr = 1
    tensors = (out, a_scales, b_scales, a_tiles, b_tiles, ready, free)
    sizes = (M, N, K, stride_am, stride_ak, stride_bk, stride_bn)
    gl.warp_specialize(
        [
            (multiply, (tensors, sizes, out_tiles.index(0), UPPER, BLOCK_M, GROUP, PDL)),
            (multiply, (tensors, sizes, out_tiles.index(1), LOWER, BLOCK_M, GROUP, PDL)),
            (load_tiles, (a, b, a_tiles, b_tiles, ready, free, M, N, K, BLOCK_M, GROUP, PDL)),
        ],
        [4, 1],
        [240, 24],
    )

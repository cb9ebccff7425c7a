"""The Gluon kernel of scaled_mm_blockwise: one warp loads by TMA, two warp groups multiply and scale independently.

While one group adds its scaled sums, the other one's products keep the tensor core busy.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_wait

from ..lib.gluon_pair import allocate, barrier, load_tiles, row_of, store_tile, tile_of


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
def load_scales(rows, columns, k, K, stride_ak, stride_bk):
    """The scales of each part's rows and columns at `k`, or the last ones: two tuples."""
    block = (gl.minimum(k, K - 1) // 128).to(gl.int64)
    return load_block(rows, columns, block * stride_ak, block * stride_bk)


@gluon.jit
def load_block(rows, columns, offset_a, offset_b):
    """The scales at these offsets."""
    factors = ()
    for i in gl.static_range(len(rows)):
        factors += (gl.load(rows[i] + offset_a),)
    weights = ()
    for j in gl.static_range(len(columns)):
        weights += (gl.load(columns[j] + offset_b),)
    return factors, weights


@gluon.jit
def next_stage(stage, phase, SPLIT: gl.constexpr, STAGES: gl.constexpr):
    """The stage after this one, or with SPLIT the one after that, and its phase."""
    stage += SPLIT
    if SPLIT == 1:
        if stage == STAGES:
            stage = 0
            phase ^= 1
    elif stage >= STAGES:
        stage -= STAGES
        phase ^= 1
    return stage, phase


@gluon.jit
def sum_parts(
    tiles, accs, scales, pointers, place, M, K, strides, PART: gl.constexpr, SPLIT: gl.constexpr, AHEAD: gl.constexpr
):  # fmt: skip
    """accs + what the parts' products are, scaled, over a group's stages of a tile: one part after the other.

    Returns the sums, and the stage and phase that come next. `scales` are those of the first AHEAD stages.
    """
    a_tiles, b_tiles, ready, free = tiles
    rows, columns = pointers
    stage, phase, products = place
    stride_ak, stride_bk = strides
    STAGES: gl.constexpr = b_tiles.shape[0]
    WIDTH: gl.constexpr = accs[0].shape[1]
    PARTS_M: gl.constexpr = len(rows)
    PARTS_N: gl.constexpr = len(columns)
    HALVES: gl.constexpr = 2 // SPLIT
    FIRST: gl.constexpr = PART * 128 if SPLIT == 2 else 0
    UPPER: gl.constexpr = 0 if SPLIT == 2 else PART
    for start in range(FIRST, whole_k(K, SPLIT, AHEAD), AHEAD * SPLIT * 128):
        later = ()
        for d in gl.static_range(AHEAD):
            at = start + d * SPLIT * 128
            # The scales of a later stage go where these are, which are not needed any more once they are multiplied; they
            # arrive while the products are summed. The last ones are loaded again.
            factors, weights = scales[d]
            both = ()
            for i in gl.static_range(PARTS_M):
                for j in gl.static_range(PARTS_N):
                    both += (scale_at(factors[i], weights[j], at, K, SPLIT * AHEAD == 1),)
            later += (load_scales(rows, columns, at + AHEAD * SPLIT * 128, K, stride_ak, stride_bk),)
            mbarrier.wait(ready.index(stage), phase)
            sums = ()
            for i in gl.static_range(PARTS_M):
                for j in gl.static_range(PARTS_N):
                    x = a_tiles.index((stage * HALVES + UPPER) * PARTS_M + i)
                    w = b_tiles.index(stage).slice(j * WIDTH, WIDTH).permute((1, 0))
                    # Never true, but ptxas must not know: else it takes other registers for each part, and runs out of them.
                    products = warpgroup_mma(x, w, products, use_acc=M < 0, is_async=True)
                    products = warpgroup_mma_wait(0, deps=(products,))
                    if i == PARTS_M - 1 and j == PARTS_N - 1:
                        mbarrier.arrive(free.index(stage))
                    sums += (add_scaled(accs[i * PARTS_N + j], products, gl.expand_dims(both[i * PARTS_N + j], 1)),)
            accs = sums
            stage, phase = next_stage(stage, phase, SPLIT, STAGES)
        scales = later
    return accs, (stage, phase, products)


@gluon.jit
def scale_at(factor, weight, at, K, WHOLE: gl.constexpr):
    """The product of two scales; 0 beyond K, be the last scale infinite. With WHOLE nothing is beyond."""
    both = multiply_now(factor, weight)
    return both if WHOLE else gl.where(at < K, both, 0.0)


@gluon.jit
def multiply(
    tensors, sizes, out_tile, shared, PART: gl.constexpr, BLOCK_M: gl.constexpr, GROUP: gl.constexpr, SPLIT: gl.constexpr,
    AHEAD: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Upper or lower half of each tile, or with SPLIT the products of every other stage, in parts of 64 rows, 128 columns.

    The scales of AHEAD stages are on their way while the products of one are summed: where the memory is busy, they take
    longer than a small tile's products.
    """
    out, a_scales, b_scales, a_tiles, b_tiles, ready, free = tensors
    M, N, K, stride_am, stride_ak, stride_bk, stride_bn = sizes
    if PDL:
        gdc_wait()
    BLOCK_N: gl.constexpr = b_tiles.shape[1]
    WIDTH: gl.constexpr = out_tile.shape[1]
    UPPER: gl.constexpr = 0 if SPLIT == 2 else PART
    PARTS_M: gl.constexpr = BLOCK_M // 64 // (2 // SPLIT)
    PARTS_N: gl.constexpr = BLOCK_N // WIDTH
    FIRST: gl.constexpr = PART if SPLIT == 2 else 0
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH, 32])
    tiles_m = gl.cdiv(M, BLOCK_M)
    tiles_n = gl.cdiv(N, BLOCK_N)
    last = (N - 1) // 128
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    # Zero, but to ptxas it differs from thread to thread: it waits for a uniform register at once, amid the products.
    zero = gl.where(M < 0, row, 0)
    none = gl.zeros((64, WIDTH), gl.float32, LAYOUT)
    place = (FIRST, 0, none)
    turn = 0
    for index in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = tile_of(index, tiles_m, tiles_n, GROUP)
        firsts = ()
        rows = ()
        for i in gl.static_range(PARTS_M):
            firsts += (row_of(tile_m, UPPER * PARTS_M + i, M, BLOCK_M),)
            rows += (a_scales + gl.minimum(firsts[i] + row, M - 1).to(gl.int64) * stride_am,)
        columns = ()
        for j in gl.static_range(PARTS_N):
            n = gl.minimum((tile_n * BLOCK_N + j * WIDTH) // 128, last)
            columns += (b_scales + n.to(gl.int64) * stride_bn + zero,)
        scales = ()
        for d in gl.static_range(AHEAD):
            if FIRST + d == 0:
                scales += (load_block(rows, columns, 0, 0),)
            else:
                scales += (load_scales(rows, columns, (FIRST + d * SPLIT) * 128, K, stride_ak, stride_bk),)
        accs = (none,) * (PARTS_M * PARTS_N)
        tiles = (a_tiles, b_tiles, ready, free)
        strides = (stride_ak, stride_bk)
        accs, place = sum_parts(tiles, accs, scales, (rows, columns), place, M, K, strides, PART, SPLIT, AHEAD)
        if SPLIT == 2:
            accs = add_halves(accs, shared, turn, PART)
            turn ^= 1
        if FIRST == 0:
            for i in gl.static_range(PARTS_M):
                for j in gl.static_range(PARTS_N):
                    store_tile(out, firsts[i], tile_n * BLOCK_N + j * WIDTH, out_tile, accs[i * PARTS_N + j])
    tma.store_wait(0)


@gluon.jit
def add_halves(accs, shared, turn, PART: gl.constexpr):
    """The second group gives its sums, the first takes them and adds them to its own. `turn` is a tile's, 0 and 1 by turns."""
    sums, given, taken = shared
    added = ()
    if PART == 1:
        mbarrier.wait(taken, turn ^ 1)
        for i in gl.static_range(len(accs)):
            sums.index(i).store(accs[i])
            added += (accs[i],)
        barrier()
        mbarrier.arrive(given)
    else:
        mbarrier.wait(given, turn)
        for i in gl.static_range(len(accs)):
            added += (accs[i] + sums.index(i).load(accs[i].type.layout),)
        barrier()
        mbarrier.arrive(taken)
    return added


@gluon.jit
def whole_k(K, SPLIT: gl.constexpr, AHEAD: gl.constexpr):
    """K, rounded up to what the groups take in a turn of their loops: beyond K, tiles are zeros."""
    return K if SPLIT * AHEAD == 1 else gl.cdiv(K, SPLIT * AHEAD * 128) * (SPLIT * AHEAD * 128)


@gluon.jit(do_not_specialize=["M", "stride_am", "stride_ak", "stride_bk", "stride_bn"])
def pair_kernel(
    out, a, b, a_scales, b_scales, M, N, K, stride_am, stride_ak, stride_bk, stride_bn,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr,
    AHEAD: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """out = a @ b.T. out, a and b are descriptors with blocks of [64, min(BLOCK_N, 128)], [64, 128] and [BLOCK_N, 128].

    A program takes every num_programs-th tile; BLOCK_M is 128 or 256. What lies beyond M, N and K is read as 0 and not
    written. Some of the last 64 rows may be made, and written, several times, with the same result.

    With SPLIT = 2 the groups take turns with the stages of a tile, whose BLOCK_M is 64 or 128, and the first adds the sums of
    the second to its own: for few rows of a, where halves of tiles would be too many or too small.
    """
    GROUPS: gl.constexpr = 2 // SPLIT
    a_tiles, b_tiles, out_tiles, ready, free = allocate(out, a, b, BLOCK_M, BLOCK_N, 128, STAGES, GROUPS)
    UPPER: gl.constexpr = 0
    LOWER: gl.constexpr = 1
    shared = ()
    if SPLIT == 2:
        shared = share_sums(out, (BLOCK_M // 64) * (BLOCK_N // out.block_shape[1]))
    tensors = (out, a_scales, b_scales, a_tiles, b_tiles, ready, free)
    sizes = (M, N, K, stride_am, stride_ak, stride_bk, stride_bn)
    upper_out, lower_out = out_tiles.index(0), out_tiles.index(GROUPS - 1)
    end = whole_k(K, SPLIT, AHEAD)
    gl.warp_specialize(
        [
            (multiply, (tensors, sizes, upper_out, shared, UPPER, BLOCK_M, GROUP, SPLIT, AHEAD, PDL)),
            (multiply, (tensors, sizes, lower_out, shared, LOWER, BLOCK_M, GROUP, SPLIT, AHEAD, PDL)),
            (load_tiles, (a, b, a_tiles, b_tiles, ready, free, M, N, end, BLOCK_M, GROUP, PDL)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def share_sums(out, PARTS: gl.constexpr):
    """Shared memory for the sums of one group, PARTS of them, and two barriers: they are given, and they are taken."""
    WIDTH: gl.constexpr = out.block_shape[1]
    LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(vec=4, per_phase=1, max_phase=8, order=[1, 0])
    sums = gl.allocate_shared_memory(gl.float32, [PARTS, 64, WIDTH], LAYOUT)
    given = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(given, count=1)
    mbarrier.init(taken, count=1)
    fence_async_shared()
    return sums, given, taken

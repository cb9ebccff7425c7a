"""What the kernels of the two fp8 matrix products share; called from device code.

a is [M, K], the weights are [N, K] (b is their transpose), out is [M, N].
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_at(index, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of the tile of that index: GROUP rows of tiles are walked column by column, so that L2 holds them."""
    first = index // (GROUP * tiles_n) * GROUP
    rows = tl.minimum(tiles_m - first, GROUP)
    within = index % (GROUP * tiles_n)
    return first + within % rows, within // rows


@triton.jit
def prefetch(rows, left, BYTES: tl.constexpr, COUNT: tl.constexpr):
    """Ask for the first BYTES bytes at each of the addresses `rows` [COUNT] in L2, but for at most `left` [COUNT] of them.

    `left` is a multiple of 16, and may be negative. A warp's threads ask for a piece each; nothing waits for the bytes.
    """
    PIECES: tl.constexpr = 128 // COUNT if COUNT < 128 else 1
    at = tl.arange(0, PIECES)[None, :] * (BYTES // PIECES)
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.gt.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r",
        [(rows[:, None] + at).to(tl.int64), tl.minimum(left[:, None] - at, BYTES // PIECES)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def add_splits(acc, SPLIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum of the SPLIT blocks [ROWS, COLUMNS] on the diagonal of `acc` [SPLIT * ROWS, SPLIT * COLUMNS]."""
    if SPLIT == 1:
        return acc
    blocks = tl.reshape(acc, (SPLIT, ROWS, SPLIT, COLUMNS))
    split = tl.arange(0, SPLIT)
    diagonal = (split[:, None] == split[None, :])[:, None, :, None]
    return tl.sum(tl.sum(tl.where(diagonal, blocks, 0.0), axis=2), axis=0)

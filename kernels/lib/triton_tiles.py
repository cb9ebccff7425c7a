"""What the kernels of the two fp8 matrix products share; called from device code.

a is [M, K], the weights are [N, K] (b is their transpose), out is [M, N].
"""

from __future__ import annotations

import itertools

import triton
import triton.language as tl

from .triton_fp8 import APPROXIMATE


def find_tile(index, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of the tile of that index: GROUP rows of tiles are walked column by column, so that L2 holds them."""
    first = index // (GROUP * tiles_n) * GROUP
    rows = tl.minimum(tiles_m - first, GROUP)
    within = index % (GROUP * tiles_n)
    return first + within % rows, within // rows


#: For Triton's kernels; Gluon's, which call none of Triton's functions, have theirs in gluon_pair.py.
tile_at = triton.jit(find_tile)


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
def start_stream(
    b, M, N, K, stride_b, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    GROUP: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Finds a program's tile, asks for its first weights, and waits for the kernel before this one.

    With SPLIT > 1 a tile takes BLOCK_N / SPLIT weights and cuts K into SPLIT pieces, which are stacked: as rows of the
    weights and as columns of a. Blocks off the diagonal mix two pieces and are dropped. So more programs share the stream.

    Returns the tile's row and column, the K of a piece, the numbers below BLOCK_K, and of each row of weights where its K
    begins and its address.
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
    return tile_m, tile_n, piece, k, row_k, weights


@triton.jit
def stacked_rows(a, tile_m, piece, stride_a, BLOCK_M: tl.constexpr, SPLIT: tl.constexpr):
    """Of each column of a tile of `start_stream`: its row of a, where its K begins, and its address."""
    column = tl.arange(0, SPLIT * BLOCK_M)
    column_k = column // BLOCK_M * piece
    column_m = tile_m * BLOCK_M + column % BLOCK_M
    return column_m, column_k, a + column_m.to(tl.int64) * stride_a + column_k


@triton.jit
def start_tiles(
    weights, M, N, K, stride_b, BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Asks for the weights of a program's first tile [BLOCK_M, COLUMNS], and waits for the kernel before this one.

    Returns how many tiles there are in a column and in a row.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, COLUMNS)
    if PREFETCH > 0:
        _, start = tile_at(tl.program_id(0), tiles_m, tiles_n, GROUP)
        rows = tl.minimum(start * COLUMNS + tl.arange(0, COLUMNS), N - 1).to(tl.int64)
        prefetch(weights + rows * stride_b, tl.zeros((COLUMNS,), tl.int32) + K, PREFETCH, COLUMNS)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    return tiles_m, tiles_n


@triton.jit
def add_splits(acc, SPLIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum of the SPLIT blocks [ROWS, COLUMNS] on the diagonal of `acc` [SPLIT * ROWS, SPLIT * COLUMNS]."""
    if SPLIT == 1:
        return acc
    blocks = tl.reshape(acc, (SPLIT, ROWS, SPLIT, COLUMNS))
    split = tl.arange(0, SPLIT)
    diagonal = (split[:, None] == split[None, :])[:, None, :, None]
    return tl.sum(tl.sum(tl.where(diagonal, blocks, 0.0), axis=2), axis=0)


@triton.jit
def store_transposed(out, n, m, result, N, M, stride_out):
    """Stores result [rows n of the weights, rows m of a], transposed, in out [M, N]."""
    target = out + m.to(tl.int64)[None, :] * stride_out + n[:, None]
    tl.store(target, result.to(out.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


@triton.constexpr_function
def _with_halves(word, first, second):
    """PTX that makes float32 u and v of the first two fp8 numbers in `word` and does `first`, then of the others, `second`."""
    return (
        f"{{.reg .b16 l, h; .reg .b32 p; .reg .f16 x, y; .reg .f32 u, v; mov.b32 {{l, h}}, {word}; "
        f"cvt.rn.f16x2.e4m3x2 p, l; mov.b32 {{x, y}}, p; cvt.f32.f16 u, x; cvt.f32.f16 v, y; {first} "
        f"cvt.rn.f16x2.e4m3x2 p, h; mov.b32 {{x, y}}, p; cvt.f32.f16 u, x; cvt.f32.f16 v, y; {second}}} "
    )


@triton.constexpr_function
def _unpack():
    """PTX that makes four float32 of the four fp8 numbers in a word."""
    return _with_halves("$4", "mov.f32 $0, u; mov.f32 $1, v;", "mov.f32 $2, u; mov.f32 $3, v;")


@triton.constexpr_function
def _dot_16(count):
    """PTX for four words of weights times 16 float32 of each of `count` tokens, and its constraints.

    Operands come in fours, by word: count sums (the first of four counts), the weights, numbers 0 to 3 of each token's words.
    """
    code = "".join(f"mov.f32 ${i}, 0f00000000; " for i in range(4 * count))
    for word in range(4):
        halves = ["", ""]
        for half, i in itertools.product(range(2), range(count)):
            number = 4 * (count + 1) + 16 * i + 8 * half + word
            halves[half] += f"fma.rn.f32 ${4 * i}, u, ${number}, ${4 * i}; fma.rn.f32 ${4 * i}, v, ${number + 4}, ${4 * i}; "
        code += _with_halves(f"${4 * count + word}", *halves)
    constraints = ",".join(["=&f"] * (4 * count) + ["r"] * 4 + ["f"] * (16 * count))
    return code, constraints


@triton.jit
def unpack(codes):
    """The four fp8 numbers in each int32 of `codes` as four float32 tensors, the lowest byte first."""
    if APPROXIMATE:
        # The dtypes have no name: as a tl.constexpr, each of them would be one to Triton 3.8.
        return tl.inline_asm_elementwise(_unpack(), "=f,=f,=f,=f,r", [codes], dtype=(tl.float32,) * 4, is_pure=True, pack=1)
    numbers = ()
    for i in tl.static_range(4):
        code = ((codes >> (8 * i)) & 255).to(tl.uint8)
        numbers += (code.to(tl.float8e4nv, bitcast=True).to(tl.float32),)
    return numbers


@triton.jit
def dot_vectors(weights, tokens, COUNT: tl.constexpr):
    """weights [ROWS, K / 4] times each of COUNT tokens [K / 4], int32s of four fp8 numbers: COUNT tensors [ROWS, K / 16].

    They hold the sums of 16 products each, in float32. 16 bytes are what a thread loads at once: no thread needs another's.
    """
    VECTORS: tl.constexpr = weights.shape[1] // 4
    operands = (weights,)
    for i in tl.static_range(COUNT):
        x = unpack(tokens[i])
        for j in tl.static_range(4):
            operands += (x[j][None, :],)
    sums = ()
    if APPROXIMATE:
        # One piece of PTX for 16 products of all tokens: Triton's own code has all weights of a tile unpacked at a time.
        code: tl.constexpr = _dot_16(COUNT)
        found = tl.inline_asm_elementwise(code[0], code[1], operands, (tl.float32,) * COUNT, is_pure=True, pack=4)
        for i in tl.static_range(COUNT):
            sums += (found[i].reshape(weights.shape[0], VECTORS, 2, 2).split()[0].split()[0],)
    else:
        w = unpack(weights)
        for i in tl.static_range(COUNT):
            products = w[0] * operands[4 * i + 1] + w[1] * operands[4 * i + 2]
            products += w[2] * operands[4 * i + 3] + w[3] * operands[4 * i + 4]
            sums += (tl.sum(products.reshape(weights.shape[0], VECTORS, 4), axis=2),)
    return sums


@triton.jit
def start_dot(b, n, N, K, stride_b, WORDS: tl.constexpr):
    """Loads the first WORDS int32s of the weights n; K is a multiple of 16, so that a thread's four are all there or none is.

    Returns the numbers of the int32s, how many a row has, their addresses, and what is loaded. Four fp8 numbers are an int32.
    """
    words = tl.multiple_of(K // 4, 4)
    word = tl.arange(0, WORDS)
    rows = b + tl.minimum(n, N - 1).to(tl.int64) * stride_b
    weights = rows[:, None].to(tl.pointer_type(tl.int32)) + word[None, :]
    return word, words, weights, tl.load(weights, mask=word[None, :] < words, other=0)


@triton.jit
def load_tokens(a, m, M, stride_a, word, words, COUNT: tl.constexpr):
    """Rows m to m + COUNT - 1 of `a` at the int32s `word` of `words`: COUNT tensors like `word`, zeros beyond M and `words`."""
    tokens = ()
    for i in tl.static_range(COUNT):
        row = (a + (m + i).to(tl.int64) * stride_a).to(tl.pointer_type(tl.int32))
        tokens += (tl.load(row + word, mask=(m + i < M) & (word < words), other=0),)
    return tokens


@triton.jit
def stack(tensors, COUNT: tl.constexpr):
    """COUNT tensors [X, Y], one or two, as one [X, Y, COUNT]."""
    return tensors[0][:, :, None] if COUNT == 1 else tl.join(tensors[0], tensors[1])

"""The split form of the low-latency GEMMs: a block multiplies one tile in the tensor core, its warps each a piece of K.

See program.py for what all forms have in common.
"""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass import BFloat16, Constexpr, Float16, Float32, Int32, Int64, Numeric, cute
from cutlass.cute.nvgpu import warp
from cutlass.utils import SmemAllocator

from .base import VECTOR, Gemm
from .configs import COLUMNS

#: Bytes of a row that the four threads which share it copy at once.
STEP = 64

#: Rows of weights in a tile of the tensor core.
ROWS = 16

#: More turns than this are a loop.
UNROLLED = 16


class Split(Gemm):
    """The tensor core's form: a tile of 16 * rows weights, 8 * columns tokens and a piece of K per warp.

    rows      16-row tiles of weights per block
    columns   8-column tiles of tokens: 8 * columns is the largest M
    warps     warps of a block, each with its own pieces of K
    cluster   blocks that share a tile, each with its own pieces of K; divides 16 * rows
    steps     64-byte steps of a row in a piece
    direct    whether weights go straight to registers, all of them at once

    A thread copies 16 bytes of a row where the tensor core wants 4 from each of four places: K is permuted within a step,
    for weights and tokens alike, which changes nothing but the order of the sum.
    """

    def __init__(
        self, element: type[Numeric], k: int | None, rows: int, columns: int, warps: int, cluster: int, steps: int,
        depth: int, trigger: int = 0, direct: int = 0,
    ) -> None:  # fmt: skip
        self.step = 8 * STEP // element.width
        super().__init__(element, k, self.step * steps * warps * cluster, depth, trigger)
        self.rows, self.columns, self.warps, self.cluster, self.steps = rows, columns, warps, cluster, steps
        self.threads = 32 * warps
        self.direct = direct
        if direct and self.turns != 1:
            raise ValueError(f"weights go straight to registers where one piece is all of them; here are {self.turns}")
        if ROWS * rows % cluster:
            raise ValueError(f"{cluster} blocks cannot share {ROWS * rows} rows evenly")
        #: Outputs of a tile that each block of its cluster sums up, and the distance of tokens in shared memory: lanes that
        #: write at once meet different banks.
        self.own = ROWS * rows // cluster
        self.pitch = self.own + 4 if self.own >= ROWS else self.own
        self.tokens = COLUMNS * columns
        self.parts = warps * cluster

    @property
    def largest_m(self) -> int:
        """See `Gemm`."""
        return self.tokens

    @property
    def shared_bytes(self) -> int:
        """See `Gemm`."""
        vectors = (0 if self.direct else 2 * self.rows) + self.columns
        copied = VECTOR * vectors * self.steps * self.threads * self.slots
        return copied + 4 * self.parts * self.tokens * self.pitch + 8

    def grid(self, n: Int32) -> list[Any]:
        """See `Gemm`."""
        return [cute.ceil_div(n, ROWS * self.rows), self.cluster, 1]

    @cute.kernel
    def kernel(
        self, out: cute.Tensor, x: cute.Tensor, w: cute.Tensor, x_scale: cute.Tensor | None, w_scale: cute.Tensor | None,
        bias: cute.Tensor | None,
    ) -> None:  # fmt: skip
        """The kernel: see the class."""
        tid, _, _ = cute.arch.thread_idx()
        tile, rank, _ = cute.arch.block_idx()
        warp_index = cute.arch.warp_idx()
        group, quad = cute.arch.lane_idx() // 4, cute.arch.lane_idx() % 4
        m, n, k = x.shape[0], w.shape[0], w.shape[1]
        first_n = tile * (ROWS * self.rows)
        shared = SmemAllocator()
        if cutlass.const_expr(self.direct):
            registers = cute.make_rmem_tensor((4, 2 * self.rows * self.steps, 1), Int32)
            weights = cute.recast_tensor(registers, self.element)
        else:
            weights = self.ring(shared, 2 * self.rows * self.steps, self.slots)
        tokens = self.ring(shared, self.columns * self.steps, self.slots)
        parts = shared.allocate_array(Int32, self.parts * self.tokens * self.pitch, byte_alignment=VECTOR)
        arrived = shared.allocate_array(Int64, 1, byte_alignment=8)
        if cutlass.const_expr(self.cluster > 1):
            self.expect(arrived, tid, m)

        # Rows past the last are read as the last; what comes of them is not stored.
        w_rows = [w[(cutlass.min(first_n + group + 8 * row, n - 1), None)].iterator for row in range(2 * self.rows)]
        x_rows = [x[(cutlass.min(group + 8 * row, m - 1), None)].iterator for row in range(self.columns)]
        begin = (rank * self.warps + warp_index) * (self.step * self.steps) + quad * self.vector
        if cutlass.const_expr(self.direct):
            for row in cutlass.range_constexpr(2 * self.rows):
                for step in cutlass.range_constexpr(self.steps):
                    self.load(w_rows[row], begin + step * self.step, registers[(None, row * self.steps + step, 0)], 0, True)
        else:
            for turn in cutlass.range_constexpr(self.depth):
                self.fetch_rows(w_rows, begin + turn * self.stride, k, weights[(None, None, turn)], turn)
        self.await_predecessor()
        for turn in cutlass.range_constexpr(self.depth):
            self.fetch_rows(x_rows, begin + turn * self.stride, k, tokens[(None, None, turn)], turn, group, m)
            cute.arch.cp_async_commit_group()

        # Scales are asked for now: after the sum there would be nothing to hide the wait behind.
        scales = cute.make_rmem_tensor((-(-self.tokens * self.own // self.threads),), Float32)
        scales.fill(1.0)
        if cutlass.const_expr(x_scale is not None):
            for i in cutlass.range_constexpr(cute.size(scales)):
                token, column = (tid + i * self.threads) // self.own, (tid + i * self.threads) % self.own
                column = cutlass.min(first_n + rank * self.own + column, n - 1)
                scales[i] = x_scale[cutlass.min(token, m - 1)] * w_scale[column]

        # Two chains of sums: a product need not wait for the one before it.
        acc = [cute.make_rmem_tensor((4, self.rows, self.columns), Float32) for _ in range(2)]
        acc[0].fill(0.0)
        acc[1].fill(0.0)
        if cutlass.const_expr(self.turns is not None and self.turns <= UNROLLED):
            for turn in cutlass.range_constexpr(self.turns):
                cute.arch.cp_async_wait_group(self.depth - 1)
                self.multiply(acc, weights[(None, None, turn % self.slots)], tokens[(None, None, turn % self.slots)])
                ahead = turn + self.depth
                if cutlass.const_expr(ahead < self.turns):
                    slot = (None, None, ahead % self.slots)
                    self.fetch_rows(w_rows, begin + ahead * self.stride, k, weights[slot], ahead)
                    self.fetch_rows(x_rows, begin + ahead * self.stride, k, tokens[slot], ahead, group, m)
                cute.arch.cp_async_commit_group()
        else:
            for turn in cutlass.range(cute.ceil_div(k, self.stride), unroll=1):
                cute.arch.cp_async_wait_group(self.depth - 1)
                self.multiply(acc, weights[(None, None, turn % self.slots)], tokens[(None, None, turn % self.slots)])
                ahead = turn + self.depth
                slot = (None, None, ahead % self.slots)
                self.fetch_rows(w_rows, begin + ahead * self.stride, k, weights[slot], None)
                self.fetch_rows(x_rows, begin + ahead * self.stride, k, tokens[slot], None, group, m)
                cute.arch.cp_async_commit_group()

        acc[0].store(acc[0].load() + acc[1].load())
        self.release_successor()
        if cutlass.const_expr(self.cluster > 1):
            cute.arch.cluster_wait()
        self.share(acc[0], parts, arrived, group, quad, rank * self.warps + warp_index, m, 0)
        self.store(out, parts, scales, bias, tid, first_n + rank * self.own, m, n)

    @cute.jit
    def store(
        self, out: cute.Tensor, parts: Any, scales: cute.Tensor, bias: cute.Tensor | None, tid: Int32, first: Int32,
        m: Int32, n: Int32,
    ) -> None:  # fmt: skip
        """Sums up this block's own outputs, from the first on, and stores them."""
        layout = cute.make_layout((self.tokens, self.own, self.parts), stride=(self.pitch, 1, self.tokens * self.pitch))
        sums = cute.make_tensor(cute.recast_ptr(parts, dtype=Float32), layout)
        for i in cutlass.range_constexpr(cute.size(scales)):
            token, column = (tid + i * self.threads) // self.own, (tid + i * self.threads) % self.own
            if token < m and first + column < n and token < self.tokens:
                total = sums[token, column, 0]
                for part in cutlass.range_constexpr(1, self.parts):
                    total = total + sums[token, column, part]
                self.put(out, token, first + column, total * scales[i], bias)

    @cute.jit
    def fetch_rows(
        self, rows: list, begin: Int32, k: Int32, slot: cute.Tensor, turn: Constexpr, group: Any = None, m: Any = None
    ) -> None:
        """Begins to copy a piece of these rows: [in a vector, step of a row]. With `m`: zeros for tokens that there are not."""
        for row in cutlass.range_constexpr(len(rows)):
            for step in cutlass.range_constexpr(self.steps):
                at = begin + step * self.step
                within = None
                if cutlass.const_expr(m is not None):
                    within = group + 8 * row < m
                if cutlass.const_expr(self.may_pass(turn)):
                    within = at < k if m is None else within and at < k
                self.fetch(rows[row], at, slot[(None, row * self.steps + step)], within)

    @cute.jit
    def multiply(self, acc: list, some_weights: cute.Tensor, some_tokens: cute.Tensor) -> None:
        """Adds the products of a piece. Hopper has no tensor core for fp8 in registers: fp8 becomes float16, exactly."""
        kind = BFloat16 if self.element is BFloat16 else Float16
        atom = cute.make_mma_atom(warp.MmaF16BF16Op(kind, Float32, (16, 8, 16)))
        products = 2 * BFloat16.width // self.element.width
        for step in cutlass.range_constexpr(self.steps):
            # [a word of row i, one of row i + 8, the next two likewise; tile; product]
            weights = cute.make_rmem_tensor((4, self.rows, products), Int32)
            tokens = cute.make_rmem_tensor((2, self.columns, products), Int32)
            for row in cutlass.range_constexpr(2 * self.rows):
                words = self.halves(some_weights[(None, row * self.steps + step)], kind)
                for word in cutlass.range_constexpr(2 * products):
                    weights[word % 2 * 2 + row % 2, row // 2, word // 2] = words[word]
            for column in cutlass.range_constexpr(self.columns):
                words = self.halves(some_tokens[(None, column * self.steps + step)], kind)
                for word in cutlass.range_constexpr(2 * products):
                    tokens[word % 2, column, word // 2] = words[word]
            a, b = cute.recast_tensor(weights, kind), cute.recast_tensor(tokens, kind)
            for i in cutlass.range_constexpr(products):
                cute.gemm(atom, acc[i % 2], a[(None, None, i)], b[(None, None, i)], acc[i % 2])

    @cute.jit
    def halves(self, vector: cute.Tensor, kind: Constexpr) -> cute.Tensor:
        """A vector's elements as 16 bits each, two to a word."""
        elements = cute.make_rmem_tensor((self.vector,), kind)
        elements.store(vector.load().to(kind))
        return cute.recast_tensor(elements, Int32)

    @cute.jit
    def expect(self, arrived: Any, tid: Int32, m: Int32) -> None:
        """Says how many bytes the cluster will send here, and that it may, once `cluster_wait` has returned."""
        if tid == 0:
            cute.arch.mbarrier_init(arrived, 1)
            cute.arch.mbarrier_init_fence()
            cute.arch.mbarrier_arrive_and_expect_tx(arrived, cutlass.min(m, self.tokens) * (4 * self.own * self.parts))
        cute.arch.cluster_arrive_relaxed()

    @cute.jit
    def share(
        self, acc: cute.Tensor, parts: Any, arrived: Any, group: Int32, quad: Int32, part: Int32, m: Int32, phase: Int32
    ) -> None:
        """Gives each sum of a piece to the block that owns the output, and waits for what is given to this one."""
        words = cute.recast_tensor(acc, Int32)
        for column in cutlass.range_constexpr(self.columns):
            for pair in cutlass.range_constexpr(2):
                token = column * COLUMNS + quad * 2 + pair
                if token < m:
                    for row in cutlass.range_constexpr(2 * self.rows):
                        output = row * 8 + group
                        place = parts + ((part * self.tokens + token) * self.pitch + output % self.own)
                        value = words[row % 2 * 2 + pair, row // 2, column]
                        if cutlass.const_expr(self.cluster > 1):
                            cute.arch.store_async_dsmem(place, value, arrived, output // self.own)
                        else:
                            cute.arch.store(place, value, ss="cta")
        if cutlass.const_expr(self.cluster > 1):
            cute.arch.mbarrier_wait(arrived, phase)
        else:
            cute.arch.sync_threads()

"""The stream form of the low-latency GEMMs: `Split` with blocks that stay.

See ll_gemm.py for what all forms have in common.
"""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass import Constexpr, Float32, Int32, Int64, Numeric, cute
from cutlass.utils import SmemAllocator

from .ll_gemm_base import VECTOR
from .ll_gemm_split import ROWS, Split


class Stream(Split):
    """`Split` with blocks that stay: each takes every so manieth tile, and its copies never pause between two of them.

    The tokens stay in shared memory. K is compiled in.

    blocks  blocks that there are at once
    """

    def __init__(self, element: type[Numeric], k: int | None, blocks: int, **options: int) -> None:
        if k is None:
            raise ValueError("the stream form takes a K that is compiled in")
        depth = options.pop("depth")
        super().__init__(element, k, depth=1, **options)
        self.depth, self.slots, self.blocks = depth, depth + 1, blocks
        #: Outputs that a thread sums up, and tiles whose scales are there or on their way.
        self.mine = -(-self.tokens * self.own // self.threads)
        self.tiles_ahead = -(-depth // self.turns) + 1

    @property
    def shared_bytes(self) -> int:
        """See `Gemm`."""
        tokens = VECTOR * self.columns * self.steps * self.turns * self.threads
        weights = VECTOR * 2 * self.rows * self.steps * self.threads * self.slots
        scales = 4 * self.threads * self.mine * self.tiles_ahead
        return tokens + weights + scales + 2 * 4 * self.parts * self.tokens * self.pitch + 16

    def grid(self, n: Int32) -> list[Any]:
        """See `Gemm`."""
        return [cutlass.min(cute.ceil_div(n, ROWS * self.rows), self.blocks // self.cluster), self.cluster, 1]

    @cute.kernel
    def kernel(
        self,
        out: cute.Tensor,
        x: cute.Tensor,
        w: cute.Tensor,
        x_scale: cute.Tensor | None,
        w_scale: cute.Tensor | None,
        bias: cute.Tensor | None,
    ) -> None:
        """The kernel: see the class."""
        tid, _, _ = cute.arch.thread_idx()
        first, rank, _ = cute.arch.block_idx()
        every, _, _ = cute.arch.grid_dim()
        warp_index = cute.arch.warp_idx()
        group, quad = cute.arch.lane_idx() // 4, cute.arch.lane_idx() % 4
        m, n, k = x.shape[0], w.shape[0], w.shape[1]
        shared = SmemAllocator()
        tokens = self.ring(shared, self.columns * self.steps, self.turns)
        weights = self.ring(shared, 2 * self.rows * self.steps, self.slots)
        parts = shared.allocate_array(Int32, 2 * self.parts * self.tokens * self.pitch, byte_alignment=VECTOR)
        arrived = shared.allocate_array(Int64, 2, byte_alignment=8)
        if cutlass.const_expr(self.cluster > 1):
            if tid == 0:
                cute.arch.mbarrier_init(arrived, 1)
                cute.arch.mbarrier_init(arrived + 1, 1)
                cute.arch.mbarrier_init_fence()
            cute.arch.cluster_arrive_relaxed()

        begin = (rank * self.warps + warp_index) * (self.step * self.steps) + quad * self.vector
        tiles = cute.ceil_div(n, ROWS * self.rows)
        w_scales = shared.allocate_array(Float32, self.threads * self.mine * self.tiles_ahead, byte_alignment=4)
        w_scales = cute.make_tensor(
            w_scales + tid,
            cute.make_layout((self.mine, self.tiles_ahead), stride=(self.threads, self.threads * self.mine)),
        )
        for ahead in cutlass.range_constexpr(self.depth):
            tile = first + ahead // self.turns * every
            if cutlass.const_expr(w_scale is not None and ahead % self.turns == 0):
                self.fetch_scales(w_scale, tile, rank, tid, w_scales[(None, ahead // self.turns)])
            self.fetch_tile(w, tile, begin, group, weights[(None, None, ahead)], ahead % self.turns)
            cute.arch.cp_async_commit_group()
        self.await_predecessor()
        x_rows = [x[(cutlass.min(group + 8 * row, m - 1), None)].iterator for row in range(self.columns)]
        for turn in cutlass.range_constexpr(self.turns):
            self.fetch_rows(x_rows, begin + turn * self.stride, k, tokens[(None, None, turn)], turn, group, m)
        cute.arch.cp_async_commit_group()
        x_scales = cute.make_rmem_tensor((self.mine,), Float32)
        ones = cute.make_rmem_tensor((self.mine,), Float32)
        x_scales.fill(1.0)
        ones.fill(1.0)
        if cutlass.const_expr(x_scale is not None):
            for i in cutlass.range_constexpr(self.mine):
                x_scales[i] = x_scale[cutlass.min((tid + i * self.threads) // self.own, m - 1)]
        # The tokens, and with them the first weights.
        cute.arch.cp_async_wait_group(0)
        if cutlass.const_expr(self.cluster > 1):
            cute.arch.cluster_wait()

        acc = [cute.make_rmem_tensor((4, self.rows, self.columns), Float32) for _ in range(2)]
        bytes_per_tile = cutlass.min(m, self.tokens) * (4 * self.own * self.parts)
        for round in cutlass.range(cute.ceil_div(tiles - first, every), unroll=1):
            tile = first + round * every
            acc[0].fill(0.0)
            acc[1].fill(0.0)
            for turn in cutlass.range_constexpr(self.turns):
                count = round * self.turns + turn
                cute.arch.cp_async_wait_group(self.depth - 1)
                self.multiply(acc, weights[(None, None, count % self.slots)], tokens[(None, None, turn)])
                ahead = turn + self.depth
                if cutlass.const_expr(w_scale is not None and ahead % self.turns == 0):
                    scales = w_scales[(None, (round + ahead // self.turns) % self.tiles_ahead)]
                    self.fetch_scales(w_scale, tile + ahead // self.turns * every, rank, tid, scales)
                slot = weights[(None, None, (count + self.depth) % self.slots)]
                self.fetch_tile(w, tile + ahead // self.turns * every, begin, group, slot, ahead % self.turns)
                cute.arch.cp_async_commit_group()
            acc[0].store(acc[0].load() + acc[1].load())
            # Two buffers in turn: who writes the next sums cannot be two tiles ahead of who still reads.
            side = parts + round % 2 * (self.parts * self.tokens * self.pitch)
            bell = arrived + round % 2
            if cutlass.const_expr(self.cluster > 1):  # noqa: SIM102  (decided now; the next one in the kernel)
                if tid == 0:
                    cute.arch.mbarrier_arrive_and_expect_tx(bell, bytes_per_tile)
            self.share(acc[0], side, bell, group, quad, rank * self.warps + warp_index, m, round // 2 % 2)
            scales = ones
            if cutlass.const_expr(w_scale is not None):
                scales = w_scales[(None, round % self.tiles_ahead)]
            self.store(out, side, x_scales, scales, bias, tid, tile * (ROWS * self.rows) + rank * self.own, m, n)
        self.release_successor()

    @cute.jit
    def fetch_scales(self, w_scale: cute.Tensor, tile: Int32, rank: Int32, tid: Int32, into: cute.Tensor) -> None:
        """Begins to copy a tile's scales: those of the outputs that this thread will sum up."""
        for i in cutlass.range_constexpr(self.mine):
            column = tile * (ROWS * self.rows) + rank * self.own + (tid + i * self.threads) % self.own
            self.fetch_scale(w_scale, cutlass.min(column, w_scale.shape[0] - 1), into.iterator + i * self.threads)

    @cute.jit
    def fetch_tile(self, w: cute.Tensor, tile: Int32, begin: Int32, group: Int32, slot: cute.Tensor, turn: Constexpr) -> None:
        """Begins to copy a piece of a tile's weights. Nothing where there is no such tile."""
        n, k = w.shape[0], w.shape[1]
        for row in cutlass.range_constexpr(2 * self.rows):
            index = tile * (ROWS * self.rows) + group + 8 * row
            start = w[(cutlass.min(index, n - 1), None)].iterator
            for step in cutlass.range_constexpr(self.steps):
                at = begin + turn * self.stride + step * self.step
                within = index < n
                if cutlass.const_expr(self.may_pass(turn)):
                    within = within and at < k
                self.fetch(start, at, slot[(None, row * self.steps + step)], within)

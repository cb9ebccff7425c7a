"""The tile form of the CuteDSL GEMMs where scales are per 128 of K: see tile_gemm.py.

Imports cutlass, which reads CUTE_DSL_ARCH as it is imported: import this module after it is set.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import cutlass
from cutlass import Constexpr, Float32, Int32, Int64, Numeric, cute
from cutlass.cute.nvgpu import cpasync, warpgroup

from .tile_gemm import CHUNK, OTHER_REGISTERS, PRODUCTS, TALL, TileGemm

#: Chunks that a turn of the loop over them takes: 1 to 3 % faster than one.
UNROLLED = 4


class BlockTileGemm(TileGemm):
    """The tile form where scales are per token and 128 of K, and per 128 outputs and 128 of K.

    Each chunk's products are summed from zero; that sum, times both scales, is added to the total in float32.

    early    chunks of a turn of the loop in which each chunk's products begin before the last one's sums are added, 0 for none,
             as where a block's chunks are not known or no multiple; ptxas lets no product overlap where one is under way as a
             turn ends. Takes registers for both sums
    at_once  outputs whose products are summed at once, 0 for as many as there are registers for; two such sums are made in
             turn, one being added while the other is multiplied, where a thread has registers for both

    Scales come with the stage that they are for: see `BlockScaled`, which has the same. A tile need not begin where 128
    outputs do: it keeps a scale for each `step` outputs, which all have the same one.
    """

    grouped = True

    def __init__(
        self, element: type[Numeric], k: int | None, tile_m: int, tile_n: int, *others: Any, at_once: int = 0,
        early: int = 0, **named: Any,
    ) -> None:  # fmt: skip
        super().__init__(element, k, tile_m, tile_n, *others, **named)
        if early and (self.mine is None or self.mine % early):  # a config is also that of a K nearby
            early = 0
        total = self.slabs * self.sums
        halves = [self.columns // parts for parts in (1, 2, 4) if self.columns % (8 * parts) == 0]
        fitting = [each for each in halves if total + (each if early else each // 2) + OTHER_REGISTERS <= self.registers]
        self.at_once = min(at_once, self.columns) or max(fitting, default=self.columns)
        if self.at_once < 0 or self.columns % self.at_once or self.at_once % 8:
            raise ValueError(f"{at_once} outputs at once, of {self.columns}; it can be one of {halves}")
        #: Sums of a thread that are made at once, and how often in a chunk.
        self.part = self.at_once // 2
        self.parts = self.slabs * (self.columns // self.at_once)
        needed = total + self.part + OTHER_REGISTERS
        if needed > self.registers:
            raise ValueError(f"a {tile_m} x {tile_n} tile takes {needed} registers of a thread, which has {self.registers}")
        #: Chunks in a turn of a loop whose products overlap the sums of the ones before.
        self.early = early
        if early and needed + self.part > self.registers:
            said = f"{needed + self.part} registers of a thread, which has {self.registers}"
            raise ValueError(f"products that begin early in a {tile_m} x {tile_n} tile take {said}")
        self.buffers = 2 if self.early or (self.parts % 2 == 0 and needed + self.part <= self.registers) else 1
        self.step = gcd(self.at_once, CHUNK)
        self.w_kept = tile_n // self.step
        #: Scales of a chunk, in whole vectors.
        self.slot = -(-(tile_m + self.w_kept) // 4) * 4
        self.kept = self.slot * self.stages
        #: The lanes of the warp that copies scales arrive too, each when its copies have.
        self.arrivals = 33

    def scale_shapes(self, m: Any, n: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:  # noqa: ARG002
        """See `Gemm`: [M, K / 128] and [K / 128, N / 128], as the op has them."""
        return (m, cute.sym_int()), (cute.sym_int(), cute.sym_int())

    @cute.jit
    def copy_scale(self, scales: cute.Tensor, at: Any, into: Any) -> None:
        """Begins to copy one scale."""
        atom = cute.make_copy_atom(cpasync.CopyG2SOp(), Float32, num_bits_per_copy=32)
        one = cute.make_layout((1, 1))
        source = cute.make_tensor(scales.iterator + at, one)
        cute.copy(atom, source, cute.make_tensor(into, one))

    @cute.jit
    def copy_scales(
        self, x_scale: cute.Tensor, w_scale: cute.Tensor, scales: Any, full: Any, free: Any, first: Int32, every: Int32,
        rank: Int32, start: Int32, turns: Any, m: Int32, n: Int32, order: Any,
    ) -> None:  # fmt: skip
        """See `TileGemm`. Those of tokens and outputs that there are not are the last one's."""
        lane = cute.arch.lane_idx()
        places = cute.make_rmem_tensor((self.tile_m // 32 + 1,), Int64)
        # Found before the wait, and each next tile's before its chunks: a hundred instructions, for which the products wait.
        self.find_scales(places, x_scale, w_scale, first, m, n, rank, lane, order)
        self.await_predecessor()
        stage, phase = Int32(0), Int32(1)
        tiles_m, tiles_n = self.tiles(m, n)
        for index in cutlass.range(first, tiles_m * tiles_n, every, unroll=1):
            for turn in cutlass.range(turns, unroll=1):
                cute.arch.mbarrier_wait(free + stage, phase)
                into = scales + (stage * self.slot + lane)
                for i in cutlass.range_constexpr(self.tile_m // 32):
                    self.copy_scale(x_scale, places[i] + (start + turn) * x_scale.stride[1], into + 32 * i)
                if lane < self.w_kept:
                    at = places[self.tile_m // 32] + (start + turn) * w_scale.stride[0]
                    self.copy_scale(w_scale, at, into + self.tile_m)
                cute.arch.cp_async_mbarrier_arrive_noinc(full + stage)
                stage, phase = self.following(stage, phase)
            self.find_scales(places, x_scale, w_scale, index + every, m, n, rank, lane, order)

    @cute.jit
    def find_scales(
        self, places: cute.Tensor, x_scale: cute.Tensor, w_scale: cute.Tensor, index: Int32, m: Int32, n: Int32, rank: Int32,
        lane: Int32, order: Any,
    ) -> None:  # fmt: skip
        """Where a lane's scales of a tile begin: of its tokens, and of its outputs."""
        tile_m, tile_n = self.tile_at(index, m, n, rank, order)
        for i in cutlass.range_constexpr(self.tile_m // 32):
            token = cutlass.min(tile_m * self.tile_m + (lane + 32 * i), m - 1)
            places[i] = Int64(token) * x_scale.stride[0]
        group = cutlass.min((tile_n * self.tile_n + lane * self.step) // CHUNK, w_scale.shape[1] - 1)
        places[self.tile_m // 32] = Int64(group) * w_scale.stride[1]

    def fetch_scales(self, x_scale: Any, w_scale: Any, scales: Any, first_m: Any, first_n: Any, odd: Any, tid: Any) -> None:
        """See `TileGemm`: they come with the chunks."""

    def await_scales(self, tid: Any) -> None:
        """See `TileGemm`."""

    @cute.jit
    def sum_tile(
        self, totals: cute.Tensor, x_ring: Any, w_ring: Any, scales: Any, full: Any, free: Any, row: Int32,
        column: Int32, stage: Int32, phase: Int32, turns: Any, slice: Int32, tid: Int32, follows: Any,  # noqa: ARG002
    ) -> Any:  # fmt: skip
        """See `TileGemm`. Nothing is being multiplied where a chunk begins: ptxas would make each product wait for another.

        Scales are read before the products, which hide the wait for them: those of 64 tokens before theirs. All read at once,
        the first products begin later: 1 % more cycles. A stage is handed back before its sums are added.
        """
        mma = self.mma(self.at_once)
        tokens, weights = self.operands(mma, x_ring, w_ring, row, column, self.at_once)
        shape = mma.get_slice(0).partition_shape_C((TALL, self.at_once))
        buffers = [cute.make_rmem_tensor(shape, Float32) for _ in range(self.buffers)]
        x_scales = cute.make_rmem_tensor((2 * self.slabs,), Float32)
        w_scales = cute.make_rmem_tensor((self.columns // self.step,), Float32)
        totals.fill(0.0)
        if cutlass.const_expr(self.early):
            return self.sum_early(
                mma, tokens, weights, buffers, totals, scales, full, free, row, column, stage, phase, slice, tid
            )
        for _ in cutlass.range(turns, unroll=UNROLLED):
            self.add_chunk(
                mma, tokens, weights, buffers, x_scales, w_scales, totals, scales, full, free, row, column, slice, tid, stage,
                phase,
            )  # fmt: skip
            stage, phase = self.following(stage, phase)
        return stage, phase

    @cute.jit
    def sum_early(
        self, mma: Any, tokens: list, weights: list, buffers: list, totals: cute.Tensor, scales: Any, full: Any, free: Any,
        row: Int32, column: Int32, stage: Int32, phase: Int32, slice: Int32, tid: Int32,
    ) -> Any:  # fmt: skip
        """A tile's sums, each chunk's products beginning before the sums of the one before it are added."""
        kept = [
            (cute.make_rmem_tensor((2 * self.slabs,), Float32), cute.make_rmem_tensor((self.columns // self.step,), Float32))
            for _ in range(2)
        ]
        items = [(chunk, part) for chunk in range(self.early) for part in range(self.parts)]
        for _ in cutlass.range(self.mine // self.early, unroll=1):
            before = stage
            for at in cutlass.range_constexpr(len(items)):
                chunk, part = items[at]
                if cutlass.const_expr(part == 0):
                    if cutlass.const_expr(chunk > 0):
                        before = stage
                        stage, phase = self.following(stage, phase)
                    cute.arch.mbarrier_wait(full + stage, phase)
                    x_scales, w_scales = kept[chunk % 2]
                    self.load_w_scales(w_scales, scales + stage * self.slot, column)
                    for slab in cutlass.range_constexpr(self.slabs):
                        self.load_x_scales(x_scales, scales + stage * self.slot, row, slab, tid)
                self.multiply_part(mma, buffers[at % 2], tokens, weights, stage, part)
                if cutlass.const_expr(at > 0):
                    warpgroup.wait_group(1)
                    if cutlass.const_expr(part == 0):
                        self.hand_back(free + before, slice, tid)
                    last, done = items[at - 1]
                    self.add_part(totals, buffers[(at - 1) % 2], *kept[last % 2], done)
            warpgroup.wait_group(0)
            self.hand_back(free + stage, slice, tid)
            last, done = items[-1]
            self.add_part(totals, buffers[(len(items) - 1) % 2], *kept[last % 2], done)
            stage, phase = self.following(stage, phase)
        return stage, phase

    @cute.jit
    def add_chunk(
        self, mma: Any, tokens: list, weights: list, buffers: list, x_scales: cute.Tensor, w_scales: cute.Tensor,
        totals: cute.Tensor, scales: Any, full: Any, free: Any, row: Int32, column: Int32, slice: Int32, tid: Int32,
        stage: Int32, phase: Int32,
    ) -> None:  # fmt: skip
        """Waits for a chunk, makes its sums and adds them to the total; hands its stage back once all are made."""
        cute.arch.mbarrier_wait(full + stage, phase)
        of_chunk, across = scales + stage * self.slot, self.columns // self.at_once
        self.load_w_scales(w_scales, of_chunk, column)
        for part in cutlass.range_constexpr(self.parts):
            if cutlass.const_expr(part % across == 0):
                self.load_x_scales(x_scales, of_chunk, row, part // across, tid)
            self.multiply_part(mma, buffers[part % self.buffers], tokens, weights, stage, part)
            if cutlass.const_expr(part + 1 >= self.buffers):
                warpgroup.wait_group(self.buffers - 1)
                done = part + 1 - self.buffers
                if cutlass.const_expr(done == self.parts - 1):
                    self.hand_back(free + stage, slice, tid)
                self.add_part(totals, buffers[done % self.buffers], x_scales, w_scales, done)
        if cutlass.const_expr(self.buffers == 2):
            warpgroup.wait_group(0)
            self.hand_back(free + stage, slice, tid)
            self.add_part(totals, buffers[1], x_scales, w_scales, self.parts - 1)

    @cute.jit
    def load_x_scales(self, x_scales: cute.Tensor, scales: Any, row: Int32, slab: Constexpr, tid: Int32) -> None:
        """Reads a chunk's scales of a thread's two rows in a slab."""
        first = row + (tid % 128 // 32 * 16 + tid % 32 // 4)
        ours = cute.make_tensor(scales + (first + slab * TALL), cute.make_layout(2, stride=8))
        for i in cutlass.range_constexpr(2):
            x_scales[2 * slab + i] = ours[i]

    @cute.jit
    def load_w_scales(self, w_scales: cute.Tensor, scales: Any, column: Int32) -> None:
        """Reads a chunk's scales of a group's outputs."""
        theirs = cute.make_tensor(scales + (self.tile_m + column // self.step), cute.make_layout(self.columns // self.step))
        for i in cutlass.range_constexpr(self.columns // self.step):
            w_scales[i] = theirs[i]

    @cute.jit
    def multiply_part(self, mma: Any, sums: Any, tokens: list, weights: list, stage: Int32, part: Constexpr) -> None:
        """Begins to make the sums of a part of a chunk, from zero."""
        across = self.columns // self.at_once
        warpgroup.fence()
        for product in cutlass.range_constexpr(PRODUCTS):
            a = tokens[part // across][(None, None, product, stage)]
            b = weights[part % across][(None, None, product, stage)]
            mma.set(warpgroup.Field.ACCUMULATE, product > 0)
            cute.gemm(mma, sums, a, b, sums)
        warpgroup.commit_group()

    @cute.jit
    def add_part(
        self, totals: cute.Tensor, sums: cute.Tensor, x_scales: cute.Tensor, w_scales: cute.Tensor, part: Constexpr
    ) -> None:
        """Adds the sums of a part of a chunk to the total, times their scales."""
        across = self.columns // self.at_once
        slab, beside = part // across, part % across
        start = slab * self.sums + beside * self.part
        # A thread has two columns of every eight, in two rows.
        each = self.step // 2
        for first in cutlass.range_constexpr(0, self.part, each):
            w_scale = w_scales[(2 * first + beside * self.at_once) // self.step]
            both = [x_scales[2 * slab + row] * w_scale for row in range(2)]
            for i in cutlass.range_constexpr(first, first + each):
                totals[start + i] = totals[start + i] + sums[i] * both[i // 2 % 2]

    @cute.jit
    def results(
        self, sums: cute.Tensor, piece: Constexpr, bias: Any, scales: Any, first_n: Int32, row: Any, column: Any,  # noqa: ARG002
        odd: Int32, tid: Int32, n: Int32,  # noqa: ARG002
    ) -> cute.Tensor:  # fmt: skip
        """See `TileGemm`."""
        values = cute.make_rmem_tensor((self.width // 2,), Float32)
        for i in cutlass.range_constexpr(self.width // 2):
            values[i] = sums[piece * (self.width // 2) + i]
        return values

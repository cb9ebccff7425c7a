"""The tile form of the CuteDSL GEMMs where scales are per 128 of K: see tile_gemm.py.

Imports cutlass, which reads CUTE_DSL_ARCH as it is imported: import this module after it is set.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import cutlass
from cutlass import Boolean, Constexpr, Float32, Int32, Int64, Numeric, cute
from cutlass.cute.nvgpu import cpasync, warpgroup

from .tile_gemm import CHUNK, OTHER_REGISTERS, PRODUCTS, TALL, TileGemm

#: Chunks that a turn of the loop over them takes: 1 to 3 % faster than one.
UNROLLED = 4

#: The most loops over a tile's chunks that are compiled, one for each place among 128 outputs where a tile can begin.
MOST_LOOPS = 4

#: Outputs of a group from which on each instruction beside its products counts: what `busy` chooses makes tiles of 128 x 64 3 %
#: faster, and those of 128 x 32, which wait for their chunks, up to 23 % slower.
LEAST_BUSY = 64


class BlockTileGemm(TileGemm):
    """The tile form where scales are per token and 128 of K, and per 128 outputs and 128 of K.

    Each chunk's products are summed from zero; that sum, times both scales, is added to the total in float32.

    early    chunks of a turn of the loop in which each chunk's products begin before the last one's sums are added, 0 for none,
             as where a block's chunks are not known or no multiple; ptxas lets no product overlap where one is under way as a
             turn ends. Takes registers for both sums
    at_once  outputs whose products are summed at once, 0 for as many as there are registers for; two such sums are made in
             turn, one being added while the other is multiplied, where a thread has registers for both

    Scales come with the stage that they are for: see `BlockScaled`, which has the same. A tile need not begin where 128
    outputs do. One of 160 or 192 outputs, which has two scales, has a loop for each number of outputs that the first of them is
    for: each instruction beside the products counts, as they take the tensor core's registers' ports. Other tiles keep a scale
    for each `unit` outputs, which all have the same one.
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
        step = gcd(self.columns, CHUNK)
        formers = sorted({min(CHUNK - begin, self.columns) for begin in range(0, CHUNK, step)})
        loops = len(formers) <= MOST_LOOPS and CHUNK < self.columns <= CHUNK + step
        #: Outputs of a scale that is kept.
        self.unit = CHUNK if loops else step
        #: Outputs of a group that its first scale is for: there is a loop for each.
        self.formers = formers if loops else [step]
        #: Scales of w that a tile has, at most.
        self.w_kept = (self.unit - gcd(tile_n, self.unit) + tile_n - 1) // self.unit + 1
        #: Whether what a thread does beside its products takes time. Where it waits for chunks, what follows takes more: a tile
        #: of 128 x 32, of 128 rows and K = 6144, took 8.5 us, not 6.9.
        busy = not early and tile_m > TALL and self.columns >= LEAST_BUSY
        #: Whether the next stage is looked at while products are under way.
        self.looks = busy
        #: Whether a tile's chunks are whole turns of the ring, so that each stage's addresses are constants.
        self.whole = busy and self.mine is not None and self.mine % self.stages == 0
        #: Whether a thread's scales of its two rows lie side by side, to be read at once: 1 % fewer cycles, but of two slabs
        #: 5 to 15 % more, whose sums leave few registers in pairs.
        self.adjacent = busy and self.slabs == 1
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
        slot = lane // 16 * 16 + lane % 8 * 2 + lane // 8 % 2 if self.adjacent else lane
        places = cute.make_rmem_tensor((self.tile_m // 32 + 1,), Int64)
        # Found before the wait, and each next tile's before its chunks: a hundred instructions, for which the products wait.
        self.find_scales(places, x_scale, w_scale, first, m, n, rank, lane, order)
        self.await_predecessor()
        stage, phase = Int32(0), Int32(1)
        tiles_m, tiles_n = self.tiles(m, n)
        for index in cutlass.range(first, tiles_m * tiles_n, every, unroll=1):
            for turn in cutlass.range(turns, unroll=1):
                cute.arch.mbarrier_wait(free + stage, phase)
                of_chunk = scales + stage * self.slot
                for i in cutlass.range_constexpr(self.tile_m // 32):
                    self.copy_scale(x_scale, places[i] + (start + turn) * x_scale.stride[1], of_chunk + (32 * i + slot))
                if lane < self.w_kept:
                    at = places[self.tile_m // 32] + (start + turn) * w_scale.stride[0]
                    self.copy_scale(w_scale, at, of_chunk + (self.tile_m + lane))
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
        begin = tile_n * self.tile_n // self.unit * self.unit
        group = cutlass.min((begin + lane * self.unit) // CHUNK, w_scale.shape[1] - 1)
        places[self.tile_m // 32] = Int64(group) * w_scale.stride[1]

    def fetch_scales(self, x_scale: Any, w_scale: Any, scales: Any, first_m: Any, first_n: Any, odd: Any, tid: Any) -> None:
        """See `TileGemm`: they come with the chunks."""

    def await_scales(self, tid: Any) -> None:
        """See `TileGemm`."""

    @cute.jit
    def sum_tile(
        self, totals: cute.Tensor, x_ring: Any, w_ring: Any, scales: Any, full: Any, free: Any, row: Int32, column: Int32,
        first_n: Int32, stage: Int32, phase: Int32, turns: Any, slice: Int32, tid: Int32, follows: Any,  # noqa: ARG002
    ) -> Any:  # fmt: skip
        """See `TileGemm`. Of the loops that were compiled it runs the one for where the group's outputs begin."""
        #: Where a chunk's scales of the group's outputs begin, among all its scales.
        place = Int32(self.tile_m)
        if cutlass.const_expr(self.halves):
            place = place + (first_n // self.unit - (first_n - column) // self.unit)
        if cutlass.const_expr(len(self.formers) == 1):
            stage, phase = self.sum_chunks(
                totals, x_ring, w_ring, scales, full, free, row, column, place, stage, phase, turns, slice, tid,
                self.formers[0],
            )  # fmt: skip
        else:
            former = cutlass.min(CHUNK - first_n % CHUNK, self.columns)
            for at in cutlass.range_constexpr(len(self.formers)):
                if former == self.formers[at]:
                    stage, phase = self.sum_chunks(
                        totals, x_ring, w_ring, scales, full, free, row, column, place, stage, phase, turns, slice, tid,
                        self.formers[at],
                    )  # fmt: skip
        return stage, phase

    @cute.jit
    def sum_chunks(
        self, totals: cute.Tensor, x_ring: Any, w_ring: Any, scales: Any, full: Any, free: Any, row: Int32, column: Int32,
        place: Int32, stage: Int32, phase: Int32, turns: Any, slice: Int32, tid: Int32, former: Constexpr,
    ) -> Any:  # fmt: skip
        """A tile's sums. Nothing is being multiplied where a chunk begins: ptxas would make each product wait for another.

        Scales are read before the products, which hide the wait for them: those of 64 tokens before theirs. All read at once,
        the first products begin later: 1 % more cycles. A stage is handed back before its sums are added. While products are
        under way the next stage is looked at, so that its products begin as soon as these sums are added: 1 to 2 % fewer
        cycles. Constant stages save 8 to 18 of 126 instructions of a chunk of 128 x 160, 2 % of its cycles.
        """
        mma = self.mma(self.at_once)
        tokens, weights = self.operands(mma, x_ring, w_ring, row, column, self.at_once)
        shape = mma.get_slice(0).partition_shape_C((TALL, self.at_once))
        buffers = [cute.make_rmem_tensor(shape, Float32) for _ in range(self.buffers)]
        x_scales = cute.make_rmem_tensor((2 * self.slabs,), Float32)
        w_scales = cute.make_rmem_tensor((self.scales_of(former),), Float32)
        totals.fill(0.0)
        if cutlass.const_expr(self.early):
            return self.sum_early(
                tokens, weights, buffers, totals, scales, full, free, row, place, stage, phase, slice, tid, former
            )
        ready = Boolean(False)
        if cutlass.const_expr(self.whole):
            for _ in cutlass.range(self.mine // self.stages, unroll=1):
                for at in cutlass.range_constexpr(self.stages):
                    after = (Int32(at + 1), phase) if at + 1 < self.stages else (Int32(0), phase ^ 1)
                    ready = self.add_chunk(
                        tokens, weights, buffers, x_scales, w_scales, totals, scales, full, free, row, place,
                        (Int32(at), phase), after, ready, slice, tid, former,
                    )  # fmt: skip
                phase = phase ^ 1
        else:
            for _ in cutlass.range(turns, unroll=UNROLLED):
                after = self.following(stage, phase)
                ready = self.add_chunk(
                    tokens, weights, buffers, x_scales, w_scales, totals, scales, full, free, row, place, (stage, phase), after,
                    ready, slice, tid, former,
                )  # fmt: skip
                stage, phase = after
        return stage, phase

    @cute.jit
    def sum_early(
        self, tokens: list, weights: list, buffers: list, totals: cute.Tensor, scales: Any, full: Any, free: Any,
        row: Int32, place: Int32, stage: Int32, phase: Int32, slice: Int32, tid: Int32, former: Constexpr,
    ) -> Any:  # fmt: skip
        """A tile's sums, each chunk's products beginning before the sums of the one before it are added."""
        kept = [
            (cute.make_rmem_tensor((2 * self.slabs,), Float32), cute.make_rmem_tensor((self.scales_of(former),), Float32))
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
                    self.load_w_scales(w_scales, scales + stage * self.slot, place)
                    for slab in cutlass.range_constexpr(self.slabs):
                        self.load_x_scales(x_scales, scales + stage * self.slot, row, slab, tid)
                self.multiply_part(buffers[at % 2], tokens, weights, stage, part)
                if cutlass.const_expr(at > 0):
                    warpgroup.wait_group(1)
                    if cutlass.const_expr(part == 0):
                        self.hand_back(free + before, slice, tid)
                    last, done = items[at - 1]
                    self.add_part(totals, buffers[(at - 1) % 2], *kept[last % 2], done, former)
            warpgroup.wait_group(0)
            self.hand_back(free + stage, slice, tid)
            last, done = items[-1]
            self.add_part(totals, buffers[(len(items) - 1) % 2], *kept[last % 2], done, former)
            stage, phase = self.following(stage, phase)
        return stage, phase

    @cute.jit
    def add_chunk(
        self, tokens: list, weights: list, buffers: list, x_scales: cute.Tensor, w_scales: cute.Tensor, totals: cute.Tensor,
        scales: Any, full: Any, free: Any, row: Int32, place: Int32, now: Any, after: Any, ready: Boolean, slice: Int32,
        tid: Int32, former: Constexpr,
    ) -> Boolean:  # fmt: skip
        """Waits for a chunk, makes its sums and adds them to the total; hands its stage back once all are made.

        now, after  the stage and the phase of the chunk, and of the next one
        ready       whether the chunk was seen to be there; returned is the same of the next one
        """
        stage, phase = now
        if cutlass.const_expr(self.looks):
            if not ready:
                cute.arch.mbarrier_wait(full + stage, phase)
        else:
            cute.arch.mbarrier_wait(full + stage, phase)
        of_chunk, across = scales + stage * self.slot, self.columns // self.at_once
        self.load_w_scales(w_scales, of_chunk, place)
        for part in cutlass.range_constexpr(self.parts):
            if cutlass.const_expr(part % across == 0):
                self.load_x_scales(x_scales, of_chunk, row, part // across, tid)
            self.multiply_part(buffers[part % self.buffers], tokens, weights, stage, part)
            if cutlass.const_expr(self.looks and part == self.parts - 1):
                ready = cute.arch.mbarrier_test_wait(full + after[0], after[1])
            if cutlass.const_expr(part + 1 >= self.buffers):
                warpgroup.wait_group(self.buffers - 1)
                done = part + 1 - self.buffers
                if cutlass.const_expr(done == self.parts - 1):
                    self.hand_back(free + stage, slice, tid)
                self.add_part(totals, buffers[done % self.buffers], x_scales, w_scales, done, former)
        if cutlass.const_expr(self.buffers == 2):
            warpgroup.wait_group(0)
            self.hand_back(free + stage, slice, tid)
            self.add_part(totals, buffers[1], x_scales, w_scales, self.parts - 1, former)
        return ready

    def scales_of(self, former: int) -> int:
        """Scales of a group's outputs, of which the first is for so many."""
        return (self.columns - former + self.unit - 1) // self.unit + 1

    def runs(self, column: int, former: int) -> list[tuple[int, int, int]]:
        """Of a part's sums, from a column on: each scale and the first and last + 1 of a thread's sums that it is for."""
        # A thread has two columns of every eight, in two rows.
        scale_of = [(column + 2 * i - former + self.unit) // self.unit for i in range(0, self.part, 4)]
        starts = {each: 4 * scale_of.index(each) for each in sorted(set(scale_of))}
        return [(each, start, start + 4 * scale_of.count(each)) for each, start in starts.items()]

    @cute.jit
    def load_x_scales(self, x_scales: cute.Tensor, scales: Any, row: Int32, slab: Constexpr, tid: Int32) -> None:
        """Reads a chunk's scales of a thread's two rows in a slab."""
        first, eighth = row + (tid % 128 // 32 * 16 + slab * TALL), tid % 32 // 4
        if cutlass.const_expr(self.adjacent):
            ours = cute.make_tensor((scales + (first + 2 * eighth)).align(8), cute.make_layout(2))
        else:
            ours = cute.make_tensor(scales + (first + eighth), cute.make_layout(2, stride=8))
        for i in cutlass.range_constexpr(2):
            x_scales[2 * slab + i] = ours[i]

    @cute.jit
    def load_w_scales(self, w_scales: cute.Tensor, scales: Any, place: Int32) -> None:
        """Reads a chunk's scales of a group's outputs."""
        theirs = cute.make_tensor(scales + place, cute.make_layout(cute.size(w_scales)))
        for i in cutlass.range_constexpr(cute.size(w_scales)):
            w_scales[i] = theirs[i]

    @cute.jit
    def multiply_part(self, sums: Any, tokens: list, weights: list, stage: Int32, part: Constexpr) -> None:
        """Begins to make the sums of a part of a chunk, from zero."""
        across, mma = self.columns // self.at_once, self.mma(self.at_once)
        warpgroup.fence()
        for product in cutlass.range_constexpr(PRODUCTS):
            a = tokens[part // across][(None, None, product, stage)]
            b = weights[part % across][(None, None, product, stage)]
            mma.set(warpgroup.Field.ACCUMULATE, product > 0)
            cute.gemm(mma, sums, a, b, sums)
        warpgroup.commit_group()

    @cute.jit
    def add_part(
        self, totals: cute.Tensor, sums: cute.Tensor, x_scales: cute.Tensor, w_scales: cute.Tensor, part: Constexpr,
        former: Constexpr,
    ) -> None:  # fmt: skip
        """Adds the sums of a part of a chunk to the total, times their scales."""
        across = self.columns // self.at_once
        slab, beside = part // across, part % across
        start = slab * self.sums + beside * self.part
        runs = self.runs(beside * self.at_once, former)
        for at in cutlass.range_constexpr(len(runs)):
            scale, begin, end = runs[at]
            both = [x_scales[2 * slab + row] * w_scales[scale] for row in range(2)]
            for i in cutlass.range_constexpr(begin, end):
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

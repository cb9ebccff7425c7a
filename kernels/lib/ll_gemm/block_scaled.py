"""The block-scaled form of the low-latency GEMMs: the warpgroup form with a scale per 128 of K, which each chunk's sums take.

See program.py for what all forms have in common.
"""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass import Boolean, Constexpr, Float32, Int32, Numeric, cute
from cutlass.cute.nvgpu import cpasync, warpgroup

from .configs import COLUMNS
from .warpgroup import PRODUCTS, TALL, Warpgroup

#: Rows of weights, and elements of K, that share a scale. The latter are a chunk.
GROUP = 128

#: Registers of a thread beside its sums.
_OTHERS = 40


class BlockScaled(Warpgroup):
    """The warpgroup form for fp8 where scales are per token and 128 of K, and per 128 outputs and 128 of K.

    Each chunk's products are summed from zero; that sum, times both scales, is added to the total in float32. Two buffers take
    turns with the sums, so that one is multiplied while the other is added, where a turn's sums are of an even number: of
    `steps` chunks, or of twice as many where the tokens are halved.

    Scales come with the stage that they are for, by copies of the warp that asks for all else: a slot for each chunk, of
    tokens' scales and then of weights'. A scale of K's end is 0 past the last group: there the sum is 0, and so is what it
    adds, whatever the last scale is.

    Nothing is being multiplied where a turn begins: ptxas would make each product wait for the one before it.

    The arguments are those of `Warpgroup`.
    """

    grouped = True

    def __init__(self, element: type[Numeric], k: int | None, rows: int, columns: int, *others: Any, **named: Any) -> None:
        super().__init__(element, k, rows, columns, *others, **named)
        if self.chunk != GROUP:
            raise ValueError(f"a chunk has {self.chunk} elements; scales are of {GROUP}, which takes elements of 8 bits")
        #: Whether the rows of a tile share their scale. Those of eight do: no tile begins within eight.
        self.even = GROUP % rows == 0
        self.w_kept = 1 if self.even else TALL // COLUMNS * self.groups
        #: Scales of a chunk, in whole vectors.
        self.slot = -(-(self.tokens + self.w_kept) // 4) * 4
        self.kept = self.slot * self.w_slots
        #: The warp's lanes arrive too, each when its copies have.
        self.arrivals = 33
        self.chains = 1
        #: In how many halves tokens are multiplied, and into how many buffers in turn.
        self.halves, self.buffers = self.divide()
        #: Tokens and sums that are multiplied at once, and how often in a turn.
        self.width = self.tokens // self.halves
        self.part = self.sums // self.halves
        self.parts = self.steps * self.halves

    def divide(self) -> tuple[int, int]:
        """In how many halves, and into how many buffers: two where a turn's sums are even in number and registers hold them."""
        # Each of the four parts of an SM has 16384 registers, and every fourth warp of a block.
        most = min(255, 16384 // (32 * -(-self.threads // 128)) // 8 * 8)
        for halves, buffers in ((1, 2), (2, 2), (1, 1), (2, 1)):
            needed = self.sums + buffers * self.sums // halves + _OTHERS
            if self.columns % halves == 0 and self.steps * halves % buffers == 0 and needed <= most:
                return halves, buffers
        raise ValueError(f"{self.columns} columns take {needed} registers of a thread, which has {most}; choose fewer")

    def scale_shapes(self, m: Any, n: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:  # noqa: ARG002
        """See `Gemm`: [M, K / 128] and [K / 128, N / 128], as the op has them."""
        return (m, cute.sym_int()), (cute.sym_int(), cute.sym_int())

    @cute.jit
    def copy_scale(self, scales: cute.Tensor, row: Any, column: Any, into: Any, within: Any) -> None:
        """Begins to copy one scale; 0 if not `within`."""
        atom = cute.make_copy_atom(cpasync.CopyG2SOp(), Float32, num_bits_per_copy=32)
        one = cute.make_layout((1, 1))
        source = cute.make_tensor(scales.iterator + (row * scales.stride[0] + column * scales.stride[1]), one)
        flag = cute.make_rmem_tensor((1,), Boolean)
        flag[0] = within
        pred = cute.make_tensor(flag.iterator, cute.make_layout((1, 1), stride=(0, 0)))
        cute.copy(atom, source, cute.make_tensor(into, one), pred=pred)

    @cute.jit
    def copy_w_scales(self, w_scale: cute.Tensor, scales: Any, tile: Any, turn: Any, stage: Any) -> None:
        """See `Warpgroup`. A lane copies those of eight rows, or one those of all."""
        lane = cute.arch.lane_idx()
        group = cutlass.min((tile * self.rows + lane * COLUMNS) // GROUP, w_scale.shape[1] - 1)
        last = w_scale.shape[0] - 1
        for step in cutlass.range_constexpr(self.steps):
            chunk = turn * self.steps + step
            into = scales + ((stage * self.steps + step) * self.slot + self.tokens + lane)
            if lane < self.w_kept:
                self.copy_scale(w_scale, cutlass.min(chunk, last), group, into, chunk <= last)

    @cute.jit
    def copy_x_scales(self, x_scale: cute.Tensor, scales: Any, bell: Any, turn: Any, stage: Any) -> None:
        """See `Warpgroup`. Those of tokens that there are not are the last one's."""
        lane = cute.arch.lane_idx()
        m, last = x_scale.shape[0], x_scale.shape[1] - 1
        for i in cutlass.range_constexpr(-(-self.tokens // 32)):
            column = lane + 32 * i
            token = column
            if cutlass.const_expr(self.wide):
                token = self.first_token(column // self.piece, m) + column % self.piece
            token = cutlass.min(token, m - 1)
            for step in cutlass.range_constexpr(self.steps):
                chunk = turn * self.steps + step
                into = scales + ((stage * self.steps + step) * self.slot + column)
                if column < self.tokens:
                    self.copy_scale(x_scale, token, cutlass.min(chunk, last), into, chunk <= last)
        cute.arch.cp_async_mbarrier_arrive_noinc(bell)

    @cute.jit
    def multiply_all(
        self, out: cute.Tensor, x_scale: cute.Tensor, w_scale: cute.Tensor, bias: cute.Tensor | None,  # noqa: ARG002
        w_ring: Any, x_ring: Any, scales: Any, pool: Any, parts: Any, full: Any, free: Any, arrived: Any, first: Int32,
        every: Int32, rank: Int32, turns: Any, rounds: Int32, m: Int32, n: Int32,
    ) -> None:  # fmt: skip
        """Four warps multiply 64 rows of what has come, and store what has been summed up."""
        tid, _, _ = cute.arch.thread_idx()
        way = cute.arch.make_warp_uniform(tid // self.takers)
        tid = tid % self.takers
        mma = self.mma()
        whole = mma.get_slice(0)
        mine = w_ring
        if cutlass.const_expr(self.groups > 1):
            mine = w_ring + cute.arch.make_warp_uniform(tid // 128) * (TALL * self.chunk)
        w_chunks = cute.make_tensor(mine, self.chunks(TALL, self.w_slots, self.rows))
        weights = mma.make_fragment_A(whole.partition_A(w_chunks))
        tokens = []
        for half in cutlass.range_constexpr(self.halves):
            start = x_ring + half * (self.width * self.chunk)
            x_chunks = cute.make_tensor(start, self.chunks(self.width, self.x_slots, self.tokens))
            tokens.append(mma.make_fragment_B(whole.partition_B(x_chunks)))
        shape = whole.partition_shape_C((TALL, self.width))
        buffers = [cute.make_rmem_tensor(shape, Float32) for _ in range(self.buffers)]
        total = cute.make_rmem_tensor((self.sums,), Float32)
        self.await_predecessor()
        if cutlass.const_expr(self.cluster > 1):
            cute.arch.cluster_wait()

        row = tid // 32 * 16 + tid % 32 // 4
        for round in cutlass.range(rounds, unroll=1):
            total.fill(0.0)
            for i in cutlass.range(turns // self.ways, unroll=1):
                turn = way + i * self.ways
                self.multiply_turn(mma, buffers, total, weights, tokens, scales, full, free, round * turns + turn, turn, tid)
            if cutlass.const_expr(self.ways > 1):
                self.gather(total, pool, tid, way, round)
            if way == 0:
                if cutlass.const_expr(self.cluster > 1):
                    self.share(total, parts, arrived, tid, rank, round)
                self.store(out, total, None, None, None, bias, tid, rank, (first + round * every) * self.rows, row, m, n)

    @cute.jit
    def multiply_turn(
        self, mma: Any, buffers: list, total: cute.Tensor, weights: cute.Tensor, tokens: list, scales: Any, full: Any,
        free: Any, count: Int32, turn: Int32, tid: Int32,
    ) -> None:  # fmt: skip
        """Waits for a stage and multiplies it. While a part is multiplied, the one before it is added."""
        stage = count % self.stages
        cute.arch.mbarrier_wait(full + stage, count // self.stages % 2)
        slot = turn if cutlass.const_expr(self.resident) else stage
        for part in cutlass.range_constexpr(self.parts):
            step, half = part // self.halves, part % self.halves
            buffer = buffers[part % self.buffers]
            warpgroup.fence()
            for product in cutlass.range_constexpr(PRODUCTS):
                a = weights[(None, None, product, stage * self.steps + step)]
                b = tokens[half][(None, None, product, slot * self.steps + step)]
                mma.set(warpgroup.Field.ACCUMULATE, product > 0)
                cute.gemm(mma, buffer, a, b, buffer)
            warpgroup.commit_group()
            if cutlass.const_expr(self.buffers == 1):
                warpgroup.wait_group(0)
                self.add_part(buffer, total, scales, stage, part, tid)
            elif cutlass.const_expr(part > 0):
                warpgroup.wait_group(1)
                self.add_part(buffers[(part - 1) % 2], total, scales, stage, part - 1, tid)
        if cutlass.const_expr(self.buffers == 2):
            warpgroup.wait_group(0)
            self.add_part(buffers[1], total, scales, stage, self.parts - 1, tid)
        self.hand_back(free + stage)

    @cute.jit
    def add_part(self, sums: cute.Tensor, total: cute.Tensor, scales: Any, stage: Int32, part: Constexpr, tid: Int32) -> None:
        """Adds the sums of a part of a turn to the total, times their scales."""
        step, half = part // self.halves, part % self.halves
        start = scales + (stage * self.steps + step) * self.slot
        # Two tokens of every eight, and two rows of the tile.
        pairs = cute.make_tensor(
            (start + half * self.width + tid % 4 * 2).align(8), cute.make_layout((2, self.part // 4), stride=(1, COLUMNS))
        )
        x_scales = cute.make_rmem_tensor((2, self.part // 4), Float32)
        cute.autovec_copy(pairs, x_scales)
        w_start = start + self.tokens
        if cutlass.const_expr(self.even):
            ours = [cute.make_tensor(w_start, cute.make_layout(1))[0]] * 2
        else:
            two = cute.make_tensor(w_start + tid // 32 * 2, cute.make_layout(2))
            ours = [two[0], two[1]]
        for i in cutlass.range_constexpr(self.part):
            scale = x_scales[i % 2, i // 4] * ours[i // 2 % 2]
            total[half * self.part + i] = total[half * self.part + i] + sums[i] * scale

    @cute.jit
    def hand_back(self, bell: Any) -> None:
        """Says that this warp has read a stage: all its lanes have their scales."""
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(bell)

    def mma(self) -> Any:
        """See `Warpgroup`; of half of the tokens where they are halved."""
        shape, major = (TALL, self.width, self.chunk // PRODUCTS), warpgroup.OperandMajorMode.K
        op = warpgroup.MmaF8Op(self.element, self.element, Float32, shape, warpgroup.OperandSource.SMEM, major, major)
        return cute.make_tiled_mma(cute.make_mma_atom(op))

"""The warpgroup form of the low-latency GEMMs: weights stream through TMA into a ring of shared memory, wgmma reads them there.

See program.py for what all forms have in common.
"""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass import BFloat16, Constexpr, Float32, Int32, Int64, Numeric, cute
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.utils import SmemAllocator

from ..hopper import SMS
from .base import Gemm
from .configs import COLUMNS, WIDE, pieces_of

#: Bytes of a row in a chunk: what one TMA copy brings of it, and what its swizzle spans.
CHUNK = 128

#: Rows of weights that wgmma multiplies.
TALL = 64

#: wgmma's K is a quarter of a chunk.
PRODUCTS = 4


class Warpgroup(Gemm):
    """Blocks that stay: one warp asks for weights, as many as the ring holds, and four, eight or sixteen multiply them.

    rows      rows of weights in a tile: a multiple of 8, at most 128; more than 64 take eight warps for four
    columns   8-column tiles of tokens: 8 * columns is the largest M; 1 to 16, or 18, 20 or 24
    steps     chunks of 128 bytes of a row in a stage
    stages    stages of the ring
    cluster   blocks that share a tile, each with its own piece of K: 1, 2 or 4
    blocks    blocks that there are at once
    resident  whether the tokens stay in shared memory; K is compiled in then. Otherwise they come with the weights.
    ways      1, or 2: then twice as many warps take turns with the stages. With PDL the ring is full when the tokens come,
              and the time from there on is what the products take.

    Four warps multiply 64 rows of weights. Where there are fewer, they read into the next stage, and what comes of that is
    dropped: rows do not mix. What lies past M, N and K are zeros that TMA writes, and is not read.

    More than 16 columns are *wide*: tokens come in two or three pieces, the last of which end with M, as rows that are not
    there take the copy engine longer. What is multiplied twice so is stored once. Scales of tokens are shared by a block, and
    the sums of a cluster are given in as many parts: shared memory is what wide tiles lack.
    """

    def __init__(
        self, element: type[Numeric], k: int | None, rows: int, columns: int, steps: int, stages: int, cluster: int = 1,
        blocks: int = SMS, resident: int = 0, ways: int = 1, trigger: int = 0,
    ) -> None:  # fmt: skip
        self.chunk = 8 * CHUNK // element.width
        super().__init__(element, k, self.chunk * steps * cluster, 1, trigger)
        if rows % 8 or not 0 < rows <= 2 * TALL:
            raise ValueError(f"a tile has {rows} rows; it can have 8 to {2 * TALL}, in steps of 8")
        if cluster not in (1, 2, 4):
            raise ValueError(f"{cluster} blocks cannot share a tile; 1, 2 and 4 can")
        if ways not in (1, 2) or (ways == 2 and (self.turns is None or self.turns % 2)):
            raise ValueError(f"{self.turns} turns for {ways} sets of warps; it can be 1, or 2 where there are as many for each")
        # Each set of warps must own fixed stages: a stage that changed its owner would look full while it is empty.
        if stages <= ways or stages % ways:
            raise ValueError(f"{stages} stages for {ways} sets of warps; there must be more, and as many for each")
        if columns > WIDE and (columns % pieces_of(columns) or ways == 2 or resident):
            raise ValueError(f"{columns} columns; more than {WIDE} come in equal pieces, in the ring, for one way")
        if resident and k is None:
            raise ValueError("tokens stay in shared memory where K is compiled in")
        self.rows, self.columns, self.steps, self.stages = rows, columns, steps, stages
        self.cluster, self.blocks, self.resident, self.ways = cluster, blocks, resident, ways
        self.tokens = COLUMNS * columns
        #: Groups of four warps that multiply a stage, and their threads; as many for each way; one more warp copies.
        self.groups = -(-rows // TALL)
        self.takers = 128 * self.groups
        self.threads = self.takers * ways + 32
        #: Sums that a thread has, and those of them that it adds up for its cluster.
        self.sums = 4 * columns
        self.own = self.sums // cluster
        self.wide = columns > WIDE
        self.pieces = pieces_of(columns) if self.wide else 1
        #: Tokens of a piece.
        self.piece = self.tokens // self.pieces
        #: In how many parts they are given, and the sums of one.
        self.exchanges = self.pieces
        self.given = self.own // self.exchanges
        #: Scales of tokens that are kept: of the tile's, or of those of each thread. All scales that are.
        self.x_kept = self.tokens if self.wide else self.takers * 2 * columns
        self.kept = 2 * self.takers + self.x_kept
        #: Arrivals that fill a stage.
        self.arrivals = 1
        #: Sums of several chains are shorter and so more exact, and one chain need not wait for another.
        self.chains = PRODUCTS if columns <= 4 else 2 if columns <= 8 else 1
        #: Whether a row is whole chunks: then a copy brings a stage's at once.
        self.whole = k is not None and k % self.chunk == 0
        #: Whether K fits a stage. There is but one copy along K then, and the DSL, which knows it, would make that one again in
        #: the place of what lies past K, for a block that shares the tile, instead of zeros: it is told K as code runs.
        self.short = k is not None and k <= self.chunk * steps
        self.w_slots = stages * steps
        self.x_slots = self.turns * steps if resident else self.w_slots
        # The last stage is read past its end, into the tokens.
        self.x_bytes = max(CHUNK * self.tokens * self.x_slots, CHUNK * (TALL * self.groups - rows))

    @property
    def largest_m(self) -> int:
        """See `Gemm`."""
        return self.tokens

    @property
    def shared_bytes(self) -> int:
        """See `Gemm`."""
        sums = 2 * 4 * self.takers * (self.given * (self.cluster - 1) + self.sums * (self.ways - 1))
        return 1024 + CHUNK * self.rows * self.w_slots + self.x_bytes + 4 * self.kept + sums + 16 * self.stages + 16

    def grid(self, n: Int32) -> list[Any]:
        """See `Gemm`."""
        return [cutlass.min(cute.ceil_div(n, self.rows), self.blocks // self.cluster), self.cluster, 1]

    @cute.jit
    def launch(
        self, out: cute.Tensor, x: cute.Tensor, w: cute.Tensor, x_scale: cute.Tensor | None, w_scale: cute.Tensor | None,
        bias: cute.Tensor | None, pdl: Int32, stream: Any,
    ) -> None:  # fmt: skip
        """See `Gemm`."""
        w_atom, w_tensor = self.copier(w, self.rows)
        x_atom, x_tensor = self.copier(x, self.piece, False) if cutlass.const_expr(self.wide) else self.copier(x, self.tokens)
        self.kernel(out, w_atom, w_tensor, x_atom, x_tensor, x_scale, w_scale, bias).launch(
            grid=self.grid(w.shape[0]),
            block=[self.threads, 1, 1],
            cluster=[1, self.cluster, 1],
            stream=stream,
            use_pdl=pdl,
        )

    def copier(self, tensor: cute.Tensor, rows: int, at_once: bool = True) -> Any:
        """What copies chunks of so many rows: those of a stage at once where rows are whole chunks, else one."""
        at_once = at_once and self.whole
        if at_once:
            shape = tensor.shape[0], self.chunk, Int32(self.k // self.chunk) if self.short else self.k // self.chunk
            layout = cute.make_layout(shape, stride=(tensor.stride[0], 1, self.chunk))
            tensor = cute.make_tensor(tensor.iterator, layout)
        elif self.short:
            layout = cute.make_layout((tensor.shape[0], Int32(self.k)), stride=(tensor.stride[0], 1))
            tensor = cute.make_tensor(tensor.iterator, layout)
        box = cute.make_composed_layout(self.swizzled().inner, 0, self.chunks(rows, self.steps if at_once else 0, rows))
        tile = (rows, self.chunk, self.steps) if at_once else (rows, self.chunk)
        return cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), tensor, box, tile)

    def swizzled(self) -> Any:
        """How eight rows of a chunk do."""
        return warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, self.element)

    def chunks(self, rows: int, slots: int, pitch: int) -> cute.Layout:
        """Chunks of `rows` rows in shared memory, one every `pitch` rows: [row, element, slot]; one without slots."""
        shape, stride = ((8, rows // 8), self.chunk), ((self.chunk, 8 * self.chunk), 1)
        if slots:
            return cute.make_layout((*shape, slots), stride=(*stride, pitch * self.chunk))
        return cute.make_layout(shape, stride=stride)

    def mma(self) -> Any:
        """The product of a quarter of a chunk of weights and one of tokens."""
        shape, major = (TALL, self.tokens, self.chunk // PRODUCTS), warpgroup.OperandMajorMode.K
        if self.element is BFloat16:
            op = warpgroup.MmaF16BF16Op(self.element, Float32, shape, warpgroup.OperandSource.SMEM, major, major)
        else:
            op = warpgroup.MmaF8Op(self.element, self.element, Float32, shape, warpgroup.OperandSource.SMEM, major, major)
        return cute.make_tiled_mma(cute.make_mma_atom(op))

    @cute.kernel
    def kernel(
        self, out: cute.Tensor, w_atom: cute.CopyAtom, w: cute.Tensor, x_atom: cute.CopyAtom, x: cute.Tensor,
        x_scale: cute.Tensor | None, w_scale: cute.Tensor | None, bias: cute.Tensor | None,
    ) -> None:  # fmt: skip
        """The kernel: see the class."""
        first, rank, _ = cute.arch.block_idx()
        every, _, _ = cute.arch.grid_dim()
        warp_index = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        m, n = x.shape[0], w.shape[0]
        turns = self.turns
        if cutlass.const_expr(self.turns is None):
            turns = cute.ceil_div(w.shape[1], self.stride)
        tiles = cute.ceil_div(n, self.rows)
        rounds = cute.ceil_div(tiles - first, every)

        shared = SmemAllocator()
        swizzle = self.swizzled().inner
        w_ring = shared.allocate_tensor(
            self.element,
            cute.make_layout((self.chunk * self.rows * self.w_slots + self.x_bytes * 8 // self.element.width,)),
            byte_alignment=1024,
            swizzle=swizzle,
        ).iterator
        x_ring = w_ring + self.chunk * self.rows * self.w_slots
        scales = shared.allocate_array(Float32, self.kept, byte_alignment=16)
        pool = shared.allocate_array(Float32, max(1, 2 * self.takers * self.sums * (self.ways - 1)), byte_alignment=16)
        parts = shared.allocate_array(Int32, max(1, 2 * self.takers * self.given * (self.cluster - 1)), byte_alignment=16)
        full = shared.allocate_array(Int64, self.stages, byte_alignment=8)
        free = shared.allocate_array(Int64, self.stages, byte_alignment=8)
        arrived = shared.allocate_array(Int64, 2, byte_alignment=8)
        copies = warp_index == 4 * self.groups * self.ways
        if copies:
            cpasync.prefetch_descriptor(w_atom)
            cpasync.prefetch_descriptor(x_atom)
            with cute.arch.elect_one():
                for stage in cutlass.range_constexpr(self.stages):
                    cute.arch.mbarrier_init(full + stage, self.arrivals)
                    cute.arch.mbarrier_init(free + stage, 4 * self.groups)
                cute.arch.mbarrier_init(arrived, 1)
                cute.arch.mbarrier_init(arrived + 1, 1)
            cute.arch.mbarrier_init_fence()
            cute.arch.barrier_arrive(barrier_id=1, number_of_threads=self.threads, aligned=False)
        if cutlass.const_expr(self.cluster > 1):
            cute.arch.cluster_arrive_relaxed()
        if copies:
            self.copy_all(
                w_atom, w, x_atom, x, x_scale, w_scale, w_ring, x_ring, scales, full, free, first, every, rank, turns, rounds
            )
            if cutlass.const_expr(self.cluster > 1):
                cute.arch.cluster_wait()
        else:
            cute.arch.barrier(barrier_id=1, number_of_threads=self.threads)
            self.multiply_all(
                out, x_scale, w_scale, bias, w_ring, x_ring, scales, pool, parts, full, free, arrived,
                first, every, rank, turns, rounds, m, n,
            )  # fmt: skip
        self.release_successor()

    @cute.jit
    def copy_all(
        self, w_atom: cute.CopyAtom, w: cute.Tensor, x_atom: cute.CopyAtom, x: cute.Tensor, x_scale: cute.Tensor | None,
        w_scale: cute.Tensor | None, w_ring: Any, x_ring: Any, scales: Any, full: Any, free: Any, first: Int32, every: Int32,
        rank: Int32, turns: Any, rounds: Int32,
    ) -> None:  # fmt: skip
        """One warp asks for everything, in the order in which it is multiplied."""
        w_to, w_from = self.partition(w_atom, w, w_ring, self.rows, self.w_slots)
        if cutlass.const_expr(self.wide):
            x_to, x_from = self.partition_pieces(x_atom, x, x_ring)
        else:
            x_to, x_from = self.partition(x_atom, x, x_ring, self.tokens, self.x_slots)
        total = rounds * turns
        # The first weights of all, while the kernel before this one may still run. Tokens are what that one writes.
        for count in cutlass.range_constexpr(self.stages):
            if count < total:
                self.expect(full + count, count, turns)
                tile, turn = first + count // turns * every, count % turns
                self.copy_stage(w_atom, w_from, w_to, full + count, tile, rank * turns + turn, Int32(count))
                self.copy_w_scales(w_scale, scales, tile, rank * turns + turn, Int32(count))
        self.await_predecessor()
        for count in cutlass.range_constexpr(self.stages):
            if count < total:
                self.copy_tokens(x_atom, x_from, x_to, full + count, Int32(count), rank, turns)
                self.copy_x_scales(x_scale, scales, full + count, rank * turns + count % turns, Int32(count))
        for count in cutlass.range(self.stages, total, unroll=1):
            stage = count % self.stages
            cute.arch.mbarrier_wait(free + stage, (count // self.stages - 1) % 2)
            self.expect(full + stage, count, turns)
            tile, turn = first + count // turns * every, count % turns
            self.copy_stage(w_atom, w_from, w_to, full + stage, tile, rank * turns + turn, stage)
            self.copy_w_scales(w_scale, scales, tile, rank * turns + turn, stage)
            self.copy_tokens(x_atom, x_from, x_to, full + stage, count, rank, turns)
            self.copy_x_scales(x_scale, scales, full + stage, rank * turns + turn, stage)

    def copy_w_scales(self, w_scale: Any, scales: Any, tile: Any, turn: Any, stage: Any) -> None:
        """Begins to copy a turn's scales of weights into its stage, in forms that have some of each turn."""

    def copy_x_scales(self, x_scale: Any, scales: Any, bell: Any, turn: Any, stage: Any) -> None:
        """The same of tokens."""

    @cute.jit
    def expect(self, bell: Any, count: Any, turns: Any) -> None:
        """Announces how many bytes a stage will receive."""
        weights = CHUNK * self.rows * self.steps
        tokens = CHUNK * self.tokens * self.steps
        with cute.arch.elect_one():
            if cutlass.const_expr(self.resident):
                cute.arch.mbarrier_arrive_and_expect_tx(bell, weights + tokens if count < turns else Int32(weights))
            else:
                cute.arch.mbarrier_arrive_and_expect_tx(bell, weights + tokens)

    @cute.jit
    def copy_tokens(self, atom: Any, source: Any, target: Any, bell: Any, count: Int32, rank: Int32, turns: Any) -> None:
        """Asks for a stage's tokens; where they stay, only in the first tile's turns."""
        if cutlass.const_expr(self.resident):
            if count < turns:
                self.copy_stage(atom, source, target, bell, 0, rank * turns + count, count)
        elif cutlass.const_expr(self.wide):
            stage, turn = count % self.stages, rank * turns + count % turns
            for step in cutlass.range_constexpr(self.steps):
                for piece in cutlass.range_constexpr(self.pieces):
                    place = target[piece][(None, stage * self.steps + step)]
                    cute.copy(atom, source[piece][(None, 0, turn * self.steps + step)], place, tma_bar_ptr=bell)
        else:
            stage = count % self.stages
            self.copy_stage(atom, source, target, bell, 0, rank * turns + count % turns, stage)

    @cute.jit
    def copy_stage(self, atom: Any, source: Any, target: Any, bell: Any, tile: Any, turn: Any, stage: Any) -> None:
        """Asks for the chunks of a turn."""
        if cutlass.const_expr(self.whole):
            cute.copy(atom, source[(None, tile, 0, turn)], target[(None, stage)], tma_bar_ptr=bell)
        else:
            for step in cutlass.range_constexpr(self.steps):
                place, chunk = stage * self.steps + step, turn * self.steps + step
                cute.copy(atom, source[(None, tile, chunk)], target[(None, place)], tma_bar_ptr=bell)

    def partition(self, atom: Any, tensor: Any, start: Any, rows: int, slots: int) -> Any:
        """What TMA writes [copied at once, place], and reads [copied at once, tile of rows, …, place in K]."""
        if self.whole:
            modes, tile = 3, (rows, self.chunk, self.steps)
            shape, stride = ((8, rows // 8), self.chunk, self.steps), ((self.chunk, 8 * self.chunk), 1, rows * self.chunk)
            ring = cute.make_layout((*shape, slots // self.steps), stride=(*stride, rows * self.chunk * self.steps))
        else:
            modes, tile, ring = 2, (rows, self.chunk), self.chunks(rows, slots, rows)
        target = cute.group_modes(cute.make_tensor(start, ring), 0, modes)
        source = cute.group_modes(cute.local_tile(tensor, tile, (None,) * modes), 0, modes)
        return cpasync.tma_partition(atom, 0, cute.make_layout(1), target, source)

    @cute.jit
    def partition_pieces(self, atom: Any, tensor: Any, start: Any) -> Any:
        """The same of each piece of a wide tile's tokens; it reads [copied at once, 0, chunk of K]."""
        targets, sources = [], []
        for piece in cutlass.range_constexpr(self.pieces):
            ring = self.chunks(self.piece, self.x_slots, self.tokens)
            target = cute.group_modes(cute.make_tensor(start + piece * (self.piece * self.chunk), ring), 0, 2)
            moved = cute.domain_offset((self.first_token(piece, tensor.shape[0]), 0), tensor)
            source = cute.group_modes(cute.local_tile(moved, (self.piece, self.chunk), (None, None)), 0, 2)
            found = cpasync.tma_partition(atom, 0, cute.make_layout(1), target, source)
            targets.append(found[0])
            sources.append(found[1])
        return targets, sources

    def first_token(self, piece: int, m: Any) -> Any:
        """The first token of a piece of a wide tile: no piece reaches beyond M, if it has as many tokens."""
        return cutlass.min(piece * self.piece, cutlass.max(m - self.piece, 0))

    @cute.jit
    def multiply_all(
        self,
        out: cute.Tensor,
        x_scale: cute.Tensor | None,
        w_scale: cute.Tensor | None,
        bias: cute.Tensor | None,
        w_ring: Any,
        x_ring: Any,
        scales: Any,
        pool: Any,
        parts: Any,
        full: Any,
        free: Any,
        arrived: Any,
        first: Int32,
        every: Int32,
        rank: Int32,
        turns: Any,
        rounds: Int32,
        m: Int32,
        n: Int32,
    ) -> None:
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
        x_chunks = cute.make_tensor(x_ring, self.chunks(self.tokens, self.x_slots, self.tokens))
        weights = mma.make_fragment_A(whole.partition_A(w_chunks))
        tokens = mma.make_fragment_B(whole.partition_B(x_chunks))
        chains = [cute.make_rmem_tensor(whole.partition_shape_C((TALL, self.tokens)), Float32) for _ in range(self.chains)]

        # A thread has two rows of a tile, and two tokens of every eight.
        row = tid // 32 * 16 + tid % 32 // 4
        if cutlass.const_expr(self.wide):
            x_scales = cute.make_tensor(scales, cute.make_layout(self.tokens))
        else:
            x_scales = cute.make_tensor(scales + tid, cute.make_layout(2 * self.columns, stride=self.takers))
        w_scales = cute.make_tensor(scales + (self.x_kept + tid), cute.make_layout(2, stride=self.takers))
        if cutlass.const_expr(w_scale is not None):  # noqa: SIM102  (decided now; the next one in the kernel)
            if way == 0:
                self.fetch_rows(w_scale, first * self.rows + row, w_scales)
        self.await_predecessor()
        if cutlass.const_expr(x_scale is not None):
            if cutlass.const_expr(self.wide):
                for column in cutlass.range(tid, self.tokens, self.takers, unroll=1):
                    first_token = self.first_token(column // self.piece, m)
                    token = cutlass.min(first_token + column % self.piece, m - 1)
                    self.fetch_scale(x_scale, token, x_scales.iterator + column)
            elif way == 0:
                for i in cutlass.range_constexpr(2 * self.columns):
                    token = cutlass.min(i // 2 * COLUMNS + tid % 4 * 2 + i % 2, m - 1)
                    self.fetch_scale(x_scale, token, x_scales.iterator + i * self.takers)
        cute.arch.cp_async_commit_group()
        if cutlass.const_expr(self.cluster > 1):
            cute.arch.cluster_wait()

        for round in cutlass.range(rounds, unroll=1):
            # The first turn by itself: a loop that might not run at all would keep the products from overlapping.
            self.multiply(mma, chains, weights, tokens, full, round * turns + way, way, True)
            for i in cutlass.range(1, turns // self.ways, unroll=1):
                turn = way + i * self.ways
                self.multiply(mma, chains, weights, tokens, full, round * turns + turn, turn, False)
                warpgroup.wait_group(1)
                self.hand_back(free + (round * turns + turn - self.ways) % self.stages)
            warpgroup.wait_group(0)
            self.hand_back(free + (round * turns + turns - self.ways + way) % self.stages)

            acc = chains[0]
            for chain in cutlass.range_constexpr(1, self.chains):
                acc.store(acc.load() + chains[chain].load())
            if cutlass.const_expr(self.ways > 1):
                self.gather(acc, pool, tid, way, round)
            if way == 0:
                if cutlass.const_expr(self.cluster > 1):
                    self.share(acc, parts, arrived, tid, rank, round)
                cute.arch.cp_async_wait_group(0)
                if cutlass.const_expr(self.wide):
                    # A thread's scales of tokens were fetched by others.
                    cute.arch.barrier(barrier_id=2, number_of_threads=self.takers)
                tile = first + round * every
                self.store(out, acc, x_scale, x_scales, w_scales, bias, tid, rank, tile * self.rows, row, m, n)
                if cutlass.const_expr(w_scale is not None):
                    self.fetch_rows(w_scale, (tile + every) * self.rows + row, w_scales)
                    cute.arch.cp_async_commit_group()

    @cute.jit
    def multiply(
        self,
        mma: Any,
        chains: list,
        weights: cute.Tensor,
        tokens: cute.Tensor,
        full: Any,
        count: Int32,
        turn: Int32,
        first: Constexpr,
    ) -> None:
        """Waits for a stage and begins to add its products; the first ones are not added to anything."""
        stage = count % self.stages
        cute.arch.mbarrier_wait(full + stage, count // self.stages % 2)
        warpgroup.fence()
        slot = turn if cutlass.const_expr(self.resident) else stage
        for step in cutlass.range_constexpr(self.steps):
            for part in cutlass.range_constexpr(PRODUCTS):
                a = weights[(None, None, part, stage * self.steps + step)]
                b = tokens[(None, None, part, slot * self.steps + step)]
                mma.set(warpgroup.Field.ACCUMULATE, not (first and step == 0 and part < self.chains))
                cute.gemm(mma, chains[part % self.chains], a, b, chains[part % self.chains])
        warpgroup.commit_group()

    @cute.jit
    def fetch_rows(self, w_scale: cute.Tensor, row: Int32, into: cute.Tensor) -> None:
        """Begins to copy the scales of this thread's two rows of a tile."""
        for i in cutlass.range_constexpr(2):
            self.fetch_scale(w_scale, cutlass.min(row + 8 * i, w_scale.shape[0] - 1), into.iterator + i * self.takers)

    @cute.jit
    def hand_back(self, bell: Any) -> None:
        """Says that this warp has read a stage."""
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(bell)

    @cute.jit
    def gather(self, acc: cute.Tensor, pool: Any, tid: Int32, way: Int32, round: Int32) -> None:
        """Adds the second way's sums to the first one's. Two buffers in turn, as one round may still be read in the next."""
        start = pool + (round % 2 * (self.takers * self.sums) + tid)
        given = cute.make_tensor(start, cute.make_layout(self.sums, stride=self.takers))
        if way == 1:
            for i in cutlass.range_constexpr(self.sums):
                given[i] = acc[i]
        cute.arch.barrier(barrier_id=2, number_of_threads=2 * self.takers)
        if way == 0:
            for i in cutlass.range_constexpr(self.sums):
                acc[i] = acc[i] + given[i]

    @cute.jit
    def share(self, acc: cute.Tensor, parts: Any, arrived: Any, tid: Int32, rank: Int32, round: Int32) -> None:
        """Gives each sum to the block that owns it, and adds what is given to this one to its own.

        Two buffers alternate: a block waits for its peers' sums, so it cannot overwrite a buffer that a peer still reads.
        """
        for part in cutlass.range_constexpr(self.exchanges):
            count = round
            if cutlass.const_expr(self.exchanges > 1):
                count = round * self.exchanges + part
            self.exchange(acc, parts, arrived, tid, rank, count, part * self.given)

    @cute.jit
    def exchange(
        self, acc: cute.Tensor, parts: Any, arrived: Any, tid: Int32, rank: Int32, count: Int32, first: Constexpr
    ) -> None:
        """Does so with `given` of the sums that each block owns, from `first` on, for the `count`th time, from 0."""
        others = self.cluster - 1
        side = parts + count % 2 * (self.takers * self.given * others)
        bell = arrived + count % 2
        if tid == 0:
            cute.arch.mbarrier_arrive_and_expect_tx(bell, 4 * self.takers * self.given * others)
        words = cute.recast_tensor(acc, Int32)
        for owner in cutlass.range_constexpr(self.cluster):
            if rank != owner:
                # Blocks before the owner come first in its buffer.
                place = rank if rank < owner else rank - 1
                for i in cutlass.range_constexpr(self.given):
                    at = side + ((place * self.given + i) * self.takers + tid)
                    cute.arch.store_async_dsmem(at, words[owner * self.own + first + i], bell, Int32(owner))
        cute.arch.mbarrier_wait(bell, count // 2 % 2)
        layout = cute.make_layout((self.given, others), stride=(self.takers, self.takers * self.given))
        given = cute.make_tensor(cute.recast_ptr(side + tid, dtype=Float32), layout)
        for owner in cutlass.range_constexpr(self.cluster):
            if rank == owner:
                for i in cutlass.range_constexpr(self.given):
                    total = acc[owner * self.own + first + i]
                    for other in cutlass.range_constexpr(others):
                        total = total + given[i, other]
                    acc[owner * self.own + first + i] = total

    @cute.jit
    def store(
        self, out: cute.Tensor, acc: cute.Tensor, x_scale: Constexpr, x_scales: Any, w_scales: Any,
        bias: cute.Tensor | None, tid: Int32, rank: Int32, first: Int32, row: Int32, m: Int32, n: Int32,
    ) -> None:  # fmt: skip
        """Stores the sums that this block owns."""
        for i in cutlass.range_constexpr(self.sums):
            token, within = i // 4 * COLUMNS + tid % 4 * 2 + i % 2, row + i // 2 % 2 * 8
            if cutlass.const_expr(self.wide):
                # Tokens of the pieces before this one are theirs to store.
                column, piece = token, i // 4 * COLUMNS // self.piece
                token = self.first_token(piece, m) + (column - piece * self.piece)
                mine = token >= piece * self.piece and token < m and within < self.rows and first + within < n
            else:
                mine = token < m and within < self.rows and first + within < n
            if cutlass.const_expr(self.cluster > 1):
                mine = mine and rank == i // self.own
            if mine:
                value = acc[i]
                if cutlass.const_expr(x_scale is not None):
                    if cutlass.const_expr(self.wide):
                        value = value * x_scales[column] * w_scales[i // 2 % 2]
                    else:
                        value = value * x_scales[i // 4 * 2 + i % 2] * w_scales[i // 2 % 2]
                self.put(out, token, first + within, value, bias)

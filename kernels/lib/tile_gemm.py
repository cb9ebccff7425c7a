"""The tile form of the CuteDSL GEMMs: many tokens, fp8, tiles that blocks take in turn. See ll_gemm/program.py.

Imports cutlass, which reads CUTE_DSL_ARCH as it is imported: import this module after it is set.
"""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass import Constexpr, Float32, Int16, Int32, Int64, Numeric, cute
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.utils import SmemAllocator

from .ll_gemm.base import Gemm

#: Elements of K in a chunk, and bytes: what one TMA copy brings of a row, and what its swizzle spans.
CHUNK = 128

#: Rows that wgmma multiplies, and columns of out that a copy stores.
TALL = 64

#: wgmma's K is a quarter of a chunk.
PRODUCTS = 4

#: Threads that multiply: two groups of four warps. Four warps more copy, though one does.
TAKERS = 256

#: Registers of a thread that copies, and of one that multiplies: together those of an SM.
_FEW, _MANY = 40, 232

#: Registers of a thread that multiplies, beside its sums.
_OTHERS = 40

#: Shared memory of a block on Hopper.
_SHARED = 232448


class TileGemm(Gemm):
    """Blocks that stay, and take tile after tile: one warp asks for chunks of x and w, eight multiply them.

    tile_m   tokens of a tile: 64, 128 or 256; two groups of warps share them, of 64 both take all and half of the outputs
    tile_n   outputs of a tile, a multiple of 64
    stages   chunks of the ring
    cluster  blocks that share what they read: 1 or 2
    shared   of a cluster, what both read, each copying half of it to both: "x", and their tiles lie side by side along N, or
             "w", and they do along M
    band     tiles, of a cluster, along M that are taken before the next ones along N; 1: all along N first
    blocks   blocks that there are at once

    What lies past M, N and K are zeros that TMA writes, and is not stored. Out's rows begin at multiples of 16 bytes.
    """

    out_vector = 8
    threads = TAKERS + 128
    #: The elements of out, which a call of `launch` tells.
    kind: type[Numeric]

    def __init__(
        self, element: type[Numeric], k: int | None, tile_m: int, tile_n: int, stages: int, cluster: int = 1,
        shared: str = "w", band: int = 8, blocks: int = 132, trigger: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(element, k, CHUNK, 1, trigger)
        if element.width != 8:
            raise ValueError(f"elements have {element.width} bits; tiles take those of 8")
        if tile_m not in (64, 128, 256) or tile_n % TALL or not 0 < tile_n <= 256 or (tile_m == 64 and tile_n % 128):
            raise ValueError(f"a tile is {tile_m} x {tile_n}; it can be 64, 128 or 256 x 64 to 256, of 64 tokens x 128 or 256")
        if cluster not in (1, 2) or shared not in ("x", "w"):
            raise ValueError(f"{cluster} blocks share {shared!r}; 1 or 2 can share 'x' or 'w'")
        if stages < 2 or band < 1:
            raise ValueError(f"{stages} stages, bands of {band}; there must be 2 and 1 or more")
        self.tile_m, self.tile_n, self.stages, self.cluster = tile_m, tile_n, stages, cluster
        self.band, self.blocks = band, blocks
        self.shares_x, self.shares_w = cluster == 2 and shared == "x", cluster == 2 and shared == "w"
        #: Rows that a block copies.
        self.x_box = tile_m // 2 if self.shares_x else tile_m
        self.w_box = tile_n // 2 if self.shares_w else tile_n
        #: Tiles of wgmma that a group has, one above the other, and their columns.
        self.slabs = max(1, tile_m // 128)
        self.columns = tile_n // 2 if tile_m == 64 else tile_n
        #: Sums of a thread in each.
        self.sums = self.columns // 2
        #: Arrivals that fill a stage.
        self.arrivals = 1
        #: Scales that are kept: of this tile and the next.
        self.kept = 2 * (tile_m + tile_n)
        if self.slabs * self.sums + _OTHERS > _MANY:
            raise ValueError(f"a thread has {self.slabs * self.sums} sums of a {tile_m} x {tile_n} tile; it can have 128")

    @property
    def largest_m(self) -> int:
        """See `Gemm`: no M is too large."""
        return 2**31 - 1

    @property
    def outs(self) -> int:
        """Pieces of out that a group has under way: two where a tile has an even number and shared memory room for both."""
        even = self.slabs * (self.columns // TALL) % 2 == 0
        return 2 if even and self.bytes_with(2) <= _SHARED else 1

    @property
    def shared_bytes(self) -> int:
        """See `Gemm`."""
        return self.bytes_with(self.outs)

    def bytes_with(self, outs: int) -> int:
        """Shared memory of a block with so many pieces of out."""
        ring = CHUNK * (self.tile_m + self.tile_n) * self.stages
        return 1024 + ring + 2 * outs * TALL * TALL * 2 + 4 * self.kept + 16 * self.stages + 16

    @cute.jit
    def launch(
        self, out: cute.Tensor, x: cute.Tensor, w: cute.Tensor, x_scale: cute.Tensor | None, w_scale: cute.Tensor | None,
        bias: cute.Tensor | None, pdl: Int32, stream: Any,
    ) -> None:  # fmt: skip
        """See `Gemm`."""
        self.kind = out.element_type
        x_atom, x_tensor = self.copier(x, self.x_box, self.shares_x)
        w_atom, w_tensor = self.copier(w, self.w_box, self.shares_w)
        swizzle = self.swizzled(out.element_type)
        piece = cute.make_composed_layout(swizzle, 0, self.chunks(TALL, TALL, 0, TALL))
        out_atom, out_tensor = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileS2GOp(), out, piece, (TALL, TALL))
        tiles_m, tiles_n = self.tiles(x.shape[0], w.shape[0])
        self.kernel(out_atom, out_tensor, x_atom, x_tensor, w_atom, w_tensor, x_scale, w_scale, bias).launch(
            grid=[cutlass.min(tiles_m * tiles_n, self.blocks // self.cluster), self.cluster, 1],
            block=[self.threads, 1, 1],
            cluster=[1, self.cluster, 1],
            # Without it ptxas does not know the registers at entry, and gives no warp more of them.
            min_blocks_per_mp=1,
            stream=stream,
            use_pdl=pdl,
        )

    def copier(self, tensor: cute.Tensor, rows: int, to_both: bool) -> Any:
        """What copies a chunk of so many rows, to this block or to both of a cluster."""
        op = cpasync.CopyBulkTensorTileG2SMulticastOp() if to_both else cpasync.CopyBulkTensorTileG2SOp()
        box = cute.make_composed_layout(self.swizzled(self.element), 0, self.chunks(rows, CHUNK, 0, rows))
        return cpasync.make_tiled_tma_atom(op, tensor, box, (rows, CHUNK))

    def swizzled(self, kind: type[Numeric]) -> Any:
        """How eight rows of 128 bytes of such elements lie."""
        return warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, kind).inner

    def chunks(self, rows: int, width: int, slots: int, pitch: int) -> cute.Layout:
        """Chunks of `rows` rows in shared memory, one every `pitch` rows: [row, element, slot]; one without slots."""
        shape, stride = ((8, rows // 8), width), ((width, 8 * width), 1)
        if slots:
            return cute.make_layout((*shape, slots), stride=(*stride, pitch * width))
        return cute.make_layout(shape, stride=stride)

    def tiles(self, m: Any, n: Any) -> tuple[Any, Any]:
        """A cluster's tiles along M and along N."""
        return (
            cute.ceil_div(m, self.tile_m * (2 if self.shares_w else 1)),
            cute.ceil_div(n, self.tile_n * (2 if self.shares_x else 1)),
        )

    @cute.jit
    def tile_at(self, index: Int32, m: Int32, n: Int32, rank: Int32) -> Any:
        """Which tile this block takes of the cluster's index-th: along M, along N."""
        tiles_m, tiles_n = self.tiles(m, n)
        first = index // (self.band * tiles_n) * self.band
        height = cutlass.min(self.band, tiles_m - first)
        within = index - first * tiles_n
        tile_m, tile_n = first + within % height, within // height
        if cutlass.const_expr(self.shares_w):
            tile_m = 2 * tile_m + rank
        if cutlass.const_expr(self.shares_x):
            tile_n = 2 * tile_n + rank
        return tile_m, tile_n

    @cute.kernel
    def kernel(
        self, out_atom: cute.CopyAtom, out: cute.Tensor, x_atom: cute.CopyAtom, x: cute.Tensor, w_atom: cute.CopyAtom,
        w: cute.Tensor, x_scale: cute.Tensor | None, w_scale: cute.Tensor | None, bias: cute.Tensor | None,
    ) -> None:  # fmt: skip
        """The kernel: see the class."""
        first, rank, _ = cute.arch.block_idx()
        every, _, _ = cute.arch.grid_dim()
        warp_index = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        turns = self.turns
        if cutlass.const_expr(self.turns is None):
            turns = cute.ceil_div(w.shape[1], CHUNK)
        tiles_m, tiles_n = self.tiles(x.shape[0], w.shape[0])
        rounds = cute.ceil_div(tiles_m * tiles_n - first, every)

        shared = SmemAllocator()
        ring = cute.make_layout((CHUNK * (self.tile_m + self.tile_n) * self.stages,))
        swizzle = self.swizzled(self.element)
        x_ring = shared.allocate_tensor(self.element, ring, byte_alignment=1024, swizzle=swizzle).iterator
        w_ring = x_ring + CHUNK * self.tile_m * self.stages
        pieces = shared.allocate_array(self.kind, 2 * self.outs * TALL * TALL, byte_alignment=1024)
        scales = shared.allocate_array(Float32, self.kept, byte_alignment=16)
        full = shared.allocate_array(Int64, self.stages, byte_alignment=8)
        free = shared.allocate_array(Int64, self.stages, byte_alignment=8)
        if warp_index == TAKERS // 32:
            cpasync.prefetch_descriptor(x_atom)
            cpasync.prefetch_descriptor(w_atom)
            cpasync.prefetch_descriptor(out_atom)
            with cute.arch.elect_one():
                for stage in cutlass.range_constexpr(self.stages):
                    cute.arch.mbarrier_init(full + stage, self.arrivals)
                    cute.arch.mbarrier_init(free + stage, TAKERS // 32 * self.cluster)
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        if cutlass.const_expr(self.cluster > 1):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        if warp_index >= TAKERS // 32:
            cute.arch.setmaxregister_decrease(_FEW)
            if warp_index == TAKERS // 32:
                self.copy_all(
                    x_atom,
                    x,
                    w_atom,
                    w,
                    x_scale,
                    w_scale,
                    x_ring,
                    w_ring,
                    scales,
                    full,
                    free,
                    first,
                    every,
                    rank,
                    turns,
                    rounds,
                )
        else:
            cute.arch.setmaxregister_increase(_MANY)
            self.multiply_all(
                out_atom, out, x_scale, w_scale, bias, x_ring, w_ring, pieces, scales, full, free, first, every, rank,
                turns, rounds, x.shape[0], w.shape[0],
            )  # fmt: skip
        self.release_successor()
        if cutlass.const_expr(self.cluster > 1):
            # The other block may yet write to this one's memory, and arrive at its barriers.
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()

    @cute.jit
    def copy_all(
        self, x_atom: cute.CopyAtom, x: cute.Tensor, w_atom: cute.CopyAtom, w: cute.Tensor, x_scale: cute.Tensor | None,
        w_scale: cute.Tensor | None, x_ring: Any, w_ring: Any, scales: Any, full: Any, free: Any, first: Int32, every: Int32,
        rank: Int32, turns: Any, rounds: Int32,
    ) -> None:  # fmt: skip
        """One warp asks for everything, in the order in which it is multiplied."""
        m, n = x.shape[0], w.shape[0]
        x_to, x_from = self.partition(x_atom, x, x_ring, self.x_box, self.tile_m, rank)
        w_to, w_from = self.partition(w_atom, w, w_ring, self.w_box, self.tile_n, rank)
        total = rounds * turns
        # The first weights of all, while the kernel before this one may still run. Tokens are what that one writes.
        for count in cutlass.range_constexpr(self.stages):
            if count < total:
                self.expect(full + count)
                _, tile_n = self.tile_at(first + count // turns * every, m, n, rank)
                self.copy(w_atom, w_from, w_to, full + count, self.shares_w, tile_n, count % turns, Int32(count), rank)
                self.copy_w_scales(w_scale, scales, tile_n, count % turns, Int32(count))
        self.await_predecessor()
        for count in cutlass.range_constexpr(self.stages):
            if count < total:
                tile_m, _ = self.tile_at(first + count // turns * every, m, n, rank)
                self.copy(x_atom, x_from, x_to, full + count, self.shares_x, tile_m, count % turns, Int32(count), rank)
                self.copy_x_scales(x_scale, scales, full + count, tile_m, count % turns, Int32(count))
        for count in cutlass.range(self.stages, total, unroll=1):
            stage, turn = count % self.stages, count % turns
            cute.arch.mbarrier_wait(free + stage, (count // self.stages - 1) % 2)
            self.expect(full + stage)
            tile_m, tile_n = self.tile_at(first + count // turns * every, m, n, rank)
            self.copy(w_atom, w_from, w_to, full + stage, self.shares_w, tile_n, turn, stage, rank)
            self.copy_w_scales(w_scale, scales, tile_n, turn, stage)
            self.copy(x_atom, x_from, x_to, full + stage, self.shares_x, tile_m, turn, stage, rank)
            self.copy_x_scales(x_scale, scales, full + stage, tile_m, turn, stage)

    @cute.jit
    def expect(self, bell: Any) -> None:
        """Announces how many bytes a stage will receive: those that this block loads, and those that the other one sends."""
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(bell, CHUNK * (self.tile_m + self.tile_n))

    @cute.jit
    def copy(
        self, atom: Any, source: Any, target: Any, bell: Any, to_both: Constexpr, tile: Any, turn: Any, stage: Any, rank: Int32
    ) -> None:
        """Asks for a chunk of a tile, or for this block's half of it, to both blocks."""
        if cutlass.const_expr(to_both):
            place = source[(None, 2 * tile + rank, turn)]
            cute.copy(atom, place, target[(None, stage)], tma_bar_ptr=bell, mcast_mask=Int16(3))
        else:
            cute.copy(atom, source[(None, tile, turn)], target[(None, stage)], tma_bar_ptr=bell)

    def copy_w_scales(self, w_scale: Any, scales: Any, tile: Any, turn: Any, stage: Any) -> None:
        """Begins to copy a chunk's scales of weights into its stage, in the form that has some of each chunk."""

    def copy_x_scales(self, x_scale: Any, scales: Any, bell: Any, tile: Any, turn: Any, stage: Any) -> None:
        """The same of tokens."""

    @cute.jit
    def partition(self, atom: Any, tensor: Any, ring: Any, rows: int, pitch: int, rank: Int32) -> Any:
        """What TMA writes [copied at once, stage], and reads [copied at once, tile or half of one, chunk]."""
        start = ring
        if cutlass.const_expr(rows < pitch):
            start = ring + rank * (rows * CHUNK)
        target = cute.group_modes(cute.make_tensor(start, self.chunks(rows, CHUNK, self.stages, pitch)), 0, 2)
        source = cute.group_modes(cute.local_tile(tensor, (rows, CHUNK), (None, None)), 0, 2)
        return cpasync.tma_partition(atom, 0, cute.make_layout(1), target, source)

    @cute.jit
    def multiply_all(
        self, out_atom: cute.CopyAtom, out: cute.Tensor, x_scale: Any, w_scale: Any, bias: Any, x_ring: Any, w_ring: Any,
        pieces: Any, scales: Any, full: Any, free: Any, first: Int32, every: Int32, rank: Int32, turns: Any, rounds: Int32,
        m: Int32, n: Int32,
    ) -> None:  # fmt: skip
        """A group's four warps multiply their part of what has come, and store what has been summed up."""
        tid, _, _ = cute.arch.thread_idx()
        group = cute.arch.make_warp_uniform(tid // 128)
        row, column = group * (TALL * self.slabs), Int32(0)
        if cutlass.const_expr(self.tile_m == TALL):
            row, column = Int32(0), group * self.columns
        totals = [cute.make_rmem_tensor((self.sums,), Float32) for _ in range(self.slabs)]
        self.await_predecessor()
        for round in cutlass.range(rounds, unroll=1):
            tile_m, tile_n = self.tile_at(first + round * every, m, n, rank)
            self.fetch_scales(x_scale, w_scale, scales, tile_m * self.tile_m, tile_n * self.tile_n, round, tid)
            self.sum_tile(totals, x_ring, w_ring, scales, full, free, row, column, round * turns, turns, tid)
            self.await_scales()
            self.store(out_atom, out, totals, bias, pieces, scales, tile_m, tile_n, row, column, round, tid, n)
        # A block's memory lasts until its pieces have been read.
        if tid % 128 < 32:
            cute.arch.cp_async_bulk_wait_group(0, read=True)

    @cute.jit
    def fetch_scales(
        self, x_scale: cute.Tensor, w_scale: cute.Tensor, scales: Any, first_m: Int32, first_n: Int32, round: Int32, tid: Int32
    ) -> None:
        """Begins to copy the scales of a tile. Two buffers in turn: one tile's may be read yet while the next one begins."""
        into = scales + round % 2 * (self.tile_m + self.tile_n)
        if tid < self.tile_m:
            self.fetch_scale(x_scale, cutlass.min(first_m + tid, x_scale.shape[0] - 1), into + tid)
        if tid < self.tile_n:
            self.fetch_scale(w_scale, cutlass.min(first_n + tid, w_scale.shape[0] - 1), into + (self.tile_m + tid))
        cute.arch.cp_async_commit_group()

    @cute.jit
    def await_scales(self) -> None:
        """Waits for the scales that all threads have asked for."""
        cute.arch.cp_async_wait_group(0)
        cute.arch.barrier(barrier_id=3, number_of_threads=TAKERS)

    def operands(self, mma: Any, x_ring: Any, w_ring: Any, row: Any, column: Any, columns: int) -> tuple[list, list]:
        """Of each slab the tokens, and of each `columns` the weights: [row, element, quarter of a chunk, stage]."""
        whole = mma.get_slice(0)
        tokens, weights = [], []
        for slab in range(self.slabs):
            start = x_ring + (row + slab * TALL) * CHUNK
            rows = cute.make_tensor(start, self.chunks(TALL, CHUNK, self.stages, self.tile_m))
            tokens.append(mma.make_fragment_A(whole.partition_A(rows)))
        for part in range(self.columns // columns):
            start = w_ring + (column + part * columns) * CHUNK
            rows = cute.make_tensor(start, self.chunks(columns, CHUNK, self.stages, self.tile_n))
            weights.append(mma.make_fragment_B(whole.partition_B(rows)))
        return tokens, weights

    def mma(self, columns: int) -> Any:
        """The product of a quarter of a chunk of 64 tokens and one of so many weights."""
        shape, major = (TALL, columns, CHUNK // PRODUCTS), warpgroup.OperandMajorMode.K
        op = warpgroup.MmaF8Op(self.element, self.element, Float32, shape, warpgroup.OperandSource.SMEM, major, major)
        return cute.make_tiled_mma(cute.make_mma_atom(op))

    @cute.jit
    def sum_tile(
        self, totals: list, x_ring: Any, w_ring: Any, scales: Any, full: Any, free: Any, row: Int32,  # noqa: ARG002
        column: Int32, start: Int32, turns: Any, tid: Int32,
    ) -> None:  # fmt: skip
        """Sums up a tile, all of K in the tensor core; start: of all chunks before it."""
        mma = self.mma(self.columns)
        tokens, (weights,) = self.operands(mma, x_ring, w_ring, row, column, self.columns)
        shape = mma.get_slice(0).partition_shape_C((TALL, self.columns))
        accs = [cute.make_tensor(total.iterator, cute.make_layout(shape)) for total in totals]
        # The first turn by itself: a loop that might not run at all would keep the products from overlapping.
        self.multiply(mma, accs, tokens, weights, full, start, True)
        for turn in cutlass.range(1, turns, unroll=1):
            self.multiply(mma, accs, tokens, weights, full, start + turn, False)
            warpgroup.wait_group(1)
            self.hand_back(free + (start + turn - 1) % self.stages, tid)
        warpgroup.wait_group(0)
        self.hand_back(free + (start + turns - 1) % self.stages, tid)

    @cute.jit
    def multiply(self, mma: Any, accs: list, tokens: list, weights: Any, full: Any, count: Int32, first: Constexpr) -> None:
        """Waits for a stage and begins to add its products; the first ones are not added to anything."""
        stage = count % self.stages
        cute.arch.mbarrier_wait(full + stage, count // self.stages % 2)
        warpgroup.fence()
        for product in cutlass.range_constexpr(PRODUCTS):
            for slab in cutlass.range_constexpr(self.slabs):
                a, b = tokens[slab][(None, None, product, stage)], weights[(None, None, product, stage)]
                mma.set(warpgroup.Field.ACCUMULATE, not (first and product == 0))
                cute.gemm(mma, accs[slab], a, b, accs[slab])
        warpgroup.commit_group()

    @cute.jit
    def hand_back(self, bell: Any, tid: Int32) -> None:
        """Says that this warp has read a stage, to each block that copies into it."""
        cute.arch.sync_warp()
        if tid % 32 < self.cluster:
            if cutlass.const_expr(self.cluster > 1):
                cute.arch.mbarrier_arrive(bell, tid % 32)
            else:
                cute.arch.mbarrier_arrive(bell)

    @cute.jit
    def store(
        self, out_atom: cute.CopyAtom, out: cute.Tensor, totals: list, bias: Any, pieces: Any, scales: Any, tile_m: Int32,
        tile_n: Int32, row: Int32, column: Int32, round: Int32, tid: Int32, n: Int32,
    ) -> None:  # fmt: skip
        """Stores a tile in pieces of 64 x 64, by way of shared memory."""
        group, copies = tid // 128, tid % 128 < 32
        mine = pieces + cute.arch.make_warp_uniform(group) * (self.outs * TALL * TALL)
        swizzled = cute.recast_ptr(mine, self.swizzled(self.kind), dtype=self.kind)
        source = cute.group_modes(cute.make_tensor(swizzled, self.chunks(TALL, TALL, self.outs, TALL)), 0, 2)
        target = cute.group_modes(cute.local_tile(out, (TALL, TALL), (None, None)), 0, 2)
        source, target = cpasync.tma_partition(out_atom, 0, cute.make_layout(1), source, target)
        across = self.columns // TALL
        for slab in cutlass.range_constexpr(self.slabs):
            for part in cutlass.range_constexpr(across):
                buffer = (slab * across + part) % self.outs
                if copies:
                    cute.arch.cp_async_bulk_wait_group(self.outs - 1, read=True)
                cute.arch.barrier(barrier_id=1 + group, number_of_threads=128)
                values = self.results(totals[slab], bias, scales, tile_n, row + slab * TALL, column, part, round, tid, n)
                self.write(values, mine + buffer * (TALL * TALL), tid)
                cute.arch.fence_view_async_shared()
                cute.arch.barrier(barrier_id=1 + group, number_of_threads=128)
                if copies:
                    at_m = tile_m * (self.tile_m // TALL) + row // TALL + slab
                    at_n = tile_n * (self.tile_n // TALL) + column // TALL + part
                    cute.copy(out_atom, source[(None, buffer)], target[(None, at_m, at_n)])
                    cute.arch.cp_async_bulk_commit_group()

    @cute.jit
    def results(
        self, total: cute.Tensor, bias: Any, scales: Any, tile_n: Int32, row: Int32, column: Int32, part: Constexpr,
        round: Int32, tid: Int32, n: Int32,
    ) -> cute.Tensor:  # fmt: skip
        """A thread's results in a piece: of two rows, two columns of every eight."""
        start = scales + round % 2 * (self.tile_m + self.tile_n)
        x_scales = cute.make_tensor(start + (row + tid % 128 // 32 * 16 + tid % 32 // 4), cute.make_layout(2, stride=8))
        first = column + part * TALL + tid % 4 * 2
        w_scales = cute.make_tensor(start + (self.tile_m + first), cute.make_layout((2, TALL // 8), stride=(1, 8)))
        values = cute.make_rmem_tensor((TALL // 2,), Float32)
        for i in cutlass.range_constexpr(TALL // 2):
            value = total[part * (TALL // 2) + i] * x_scales[i // 2 % 2] * w_scales[i % 2, i // 4]
            if cutlass.const_expr(bias is not None):
                at = tile_n * self.tile_n + first + (i // 4 * 8 + i % 2)
                value = value + bias[cutlass.min(at, n - 1)].to(Float32)
            values[i] = value
        return values

    @cute.jit
    def write(self, values: cute.Tensor, piece: Any, tid: Int32) -> None:
        """Writes a thread's results to a piece, swizzled as TMA reads it: eight rows meet all banks once."""
        rounded = cute.make_rmem_tensor((TALL // 2,), self.kind)
        rounded.store(values.load().to(self.kind))
        words = cute.recast_tensor(rounded, Int32)
        eighth = tid % 32 // 4
        into = cute.make_tensor(cute.recast_ptr(piece, dtype=Int32), cute.make_layout(TALL * TALL // 2))
        for i in cutlass.range_constexpr(TALL // 4):
            row = tid % 128 // 32 * 16 + eighth + i % 2 * 8
            into[row * (TALL // 2) + (((i // 2) ^ eighth) * 4 + tid % 4)] = words[i]


class BlockTileGemm(TileGemm):
    """The tile form where scales are per token and 128 of K, and per 128 outputs and 128 of K.

    Each chunk's products are summed from zero; that sum, times both scales, is added to the total in float32.

    at_once  outputs whose products are summed at once, 64 or 128: two such sums are made in turn, one being added while the
             other is multiplied, where a thread has registers for both

    Scales come with the stage that they are for: see `BlockScaled`, which has the same.
    """

    grouped = True

    def __init__(
        self, element: type[Numeric], k: int | None, tile_m: int, tile_n: int, *others: Any, at_once: int = 128, **named: Any
    ) -> None:
        super().__init__(element, k, tile_m, tile_n, *others, **named)
        if tile_n not in (64, 128, 256) or at_once not in (64, 128):
            raise ValueError(f"{tile_n} outputs, {at_once} at once; it can be 64, 128 or 256, and 64 or 128 at once")
        self.at_once = min(at_once, self.columns)
        #: Sums of a thread that are made at once, and how often in a chunk.
        self.part = self.at_once // 2
        self.parts = self.slabs * (self.columns // self.at_once)
        needed = self.slabs * self.sums + self.part + _OTHERS
        if needed > _MANY:
            raise ValueError(f"a {tile_m} x {tile_n} tile takes {needed} registers of a thread, which has {_MANY}")
        self.buffers = 2 if self.parts % 2 == 0 and needed + self.part <= _MANY else 1
        self.w_kept = max(1, tile_n // CHUNK)
        #: Scales of a chunk, in whole vectors.
        self.slot = -(-(tile_m + self.w_kept) // 4) * 4
        self.kept = self.slot * self.stages
        #: The warp's lanes arrive too, each when its copies have.
        self.arrivals = 33

    def scale_shapes(self, m: Any, n: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:  # noqa: ARG002
        """See `Gemm`: [M, K / 128] and [K / 128, N / 128], as the op has them."""
        return (m, cute.sym_int()), (cute.sym_int(), cute.sym_int())

    @cute.jit
    def copy_scale(self, scales: cute.Tensor, row: Any, column: Any, into: Any) -> None:
        """Begins to copy one scale."""
        atom = cute.make_copy_atom(cpasync.CopyG2SOp(), Float32, num_bits_per_copy=32)
        one = cute.make_layout((1, 1))
        source = cute.make_tensor(scales.iterator + (row * scales.stride[0] + column * scales.stride[1]), one)
        cute.copy(atom, source, cute.make_tensor(into, one))

    @cute.jit
    def copy_w_scales(self, w_scale: cute.Tensor, scales: Any, tile: Any, turn: Any, stage: Any) -> None:
        """See `TileGemm`. A lane copies that of 128 outputs; past N the last one's."""
        lane = cute.arch.lane_idx()
        if lane < self.w_kept:
            group = cutlass.min(tile * self.tile_n // CHUNK + lane, w_scale.shape[1] - 1)
            self.copy_scale(w_scale, turn, group, scales + (stage * self.slot + self.tile_m + lane))

    @cute.jit
    def copy_x_scales(self, x_scale: cute.Tensor, scales: Any, bell: Any, tile: Any, turn: Any, stage: Any) -> None:
        """See `TileGemm`. Those of tokens that there are not are the last one's."""
        lane = cute.arch.lane_idx()
        for i in cutlass.range_constexpr(self.tile_m // 32):
            token = cutlass.min(tile * self.tile_m + (lane + 32 * i), x_scale.shape[0] - 1)
            self.copy_scale(x_scale, token, turn, scales + (stage * self.slot + lane + 32 * i))
        cute.arch.cp_async_mbarrier_arrive_noinc(bell)

    def fetch_scales(self, x_scale: Any, w_scale: Any, scales: Any, first_m: Any, first_n: Any, round: Any, tid: Any) -> None:
        """See `TileGemm`: they come with the chunks."""

    def await_scales(self) -> None:
        """See `TileGemm`."""

    @cute.jit
    def sum_tile(
        self, totals: list, x_ring: Any, w_ring: Any, scales: Any, full: Any, free: Any, row: Int32,
        column: Int32, start: Int32, turns: Any, tid: Int32,
    ) -> None:  # fmt: skip
        """See `TileGemm`. Nothing is being multiplied where a chunk begins: ptxas would make each product wait for another."""
        mma = self.mma(self.at_once)
        tokens, weights = self.operands(mma, x_ring, w_ring, row, column, self.at_once)
        shape = mma.get_slice(0).partition_shape_C((TALL, self.at_once))
        buffers = [cute.make_rmem_tensor(shape, Float32) for _ in range(self.buffers)]
        for total in totals:
            total.fill(0.0)
        for turn in cutlass.range(turns, unroll=1):
            stage = (start + turn) % self.stages
            cute.arch.mbarrier_wait(full + stage, (start + turn) // self.stages % 2)
            for part in cutlass.range_constexpr(self.parts):
                self.multiply_part(mma, buffers[part % self.buffers], tokens, weights, stage, part)
                if cutlass.const_expr(part + 1 >= self.buffers):
                    warpgroup.wait_group(self.buffers - 1)
                    done = part + 1 - self.buffers
                    self.add_part(totals, buffers[done % self.buffers], scales, stage, row, column, done, tid)
            if cutlass.const_expr(self.buffers == 2):
                warpgroup.wait_group(0)
                self.add_part(totals, buffers[1], scales, stage, row, column, self.parts - 1, tid)
            self.hand_back(free + stage, tid)

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
        self, totals: list, sums: cute.Tensor, scales: Any, stage: Int32, row: Int32, column: Int32, part: Constexpr, tid: Int32
    ) -> None:
        """Adds the sums of a part of a chunk to the total, times their scales."""
        across = self.columns // self.at_once
        slab, beside = part // across, part % across
        start = scales + stage * self.slot
        first = row + (slab * TALL + tid % 128 // 32 * 16 + tid % 32 // 4)
        ours = cute.make_tensor(start + first, cute.make_layout(2, stride=8))
        theirs = cute.make_tensor(start + self.tile_m, cute.make_layout(self.w_kept))
        w_scale = theirs[(column + beside * self.at_once) // CHUNK]
        both = [ours[0] * w_scale, ours[1] * w_scale]
        total = totals[slab]
        for i in cutlass.range_constexpr(self.part):
            at = beside * self.part + i
            total[at] = total[at] + sums[i] * both[i // 2 % 2]

    @cute.jit
    def results(
        self, total: cute.Tensor, bias: Any, scales: Any, tile_n: Int32, row: Int32, column: Int32,  # noqa: ARG002
        part: Constexpr, round: Int32, tid: Int32, n: Int32,  # noqa: ARG002
    ) -> cute.Tensor:  # fmt: skip
        """See `TileGemm`."""
        values = cute.make_rmem_tensor((TALL // 2,), Float32)
        for i in cutlass.range_constexpr(TALL // 2):
            values[i] = total[part * (TALL // 2) + i]
        return values

"""The tile form of the CuteDSL GEMMs: many tokens, fp8, tiles that blocks take in turn. See ll_gemm/program.py.

Imports cutlass, which reads CUTE_DSL_ARCH as it is imported: import this module after it is set.
"""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass import Constexpr, Float32, Int16, Int32, Int64, Numeric, cute
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.utils import SmemAllocator

from .hopper import SHARED_BYTES, SMS
from .ll_gemm.base import VECTOR, Gemm

#: Elements of K in a chunk, and bytes: what one TMA copy brings of a row, and what its swizzle spans.
CHUNK = 128

#: Rows that wgmma multiplies.
TALL = 64

#: Columns of out that a copy may store, widest first, and how its rows of 32, 64 and 128 bytes are swizzled.
_PIECES = {
    64: warpgroup.SmemLayoutAtomKind.K_SW128,
    32: warpgroup.SmemLayoutAtomKind.K_SW64,
    16: warpgroup.SmemLayoutAtomKind.K_SW32,
}

#: wgmma's K is a quarter of a chunk.
PRODUCTS = 4

#: Threads of a group that multiplies: four warps. Of the warps more one copies chunks and one scales.
GROUP = 128

#: Registers of a thread that copies, and of one that multiplies: together those of an SM.
_FEW, MOST_REGISTERS = 40, 232

#: Registers of a thread that multiplies, beside its sums.
OTHER_REGISTERS = 40


class TileGemm(Gemm):
    """Blocks that stay, and take tile after tile: one warp asks for chunks of x and w, eight multiply them.

    tile_m   tokens of a tile: 64, 128 or 256; two groups of warps share them, of 64 both take all and half of the outputs
    tile_n   outputs of a tile, a multiple of 16, of 32 where tokens are 64: so that there are tiles for all SMs at once
    stages   chunks of the ring
    cluster  blocks that share what they read: 1 or 2
    shared   of a cluster, what both read, each copying half of it to both: "x", and their tiles lie side by side along N, or
             "w", and they do along M
    band     tiles, of a cluster, along M that are taken before the next ones along N; 1: all along N first
    blocks   blocks that there are at once, 0 for as many as the GPU holds
    slices   blocks that share a tile's chunks, in one cluster; each adds up its share of the sums
    groups   groups of four warps that multiply: 2, or 1 where tokens are 64; that one has all of them and all outputs
    per_sm   blocks that an SM holds at once, 1 or 2; of two, of one kernel or of two, one loads while the other ends
    ahead    stages whose weights are asked for while the kernel before this one may still run, 0 for all of them
    pingpong whether each group takes whole tiles, in turn with the other: one multiplies while the other stores. A tile's sums
             are then in half as many threads, so that it is half as large

    What lies past M, N and K are zeros that TMA writes, and is not stored. Out's rows begin at multiples of 16 bytes.
    """

    out_vector = 8
    #: The elements of out, which a call of `launch` tells.
    kind: type[Numeric]

    def __init__(
        self, element: type[Numeric], k: int | None, tile_m: int, tile_n: int, stages: int, cluster: int = 1,
        shared: str = "w", band: int = 8, blocks: int = 0, trigger: int = 0, slices: int = 1, groups: int = 2,
        per_sm: int = 1, ahead: int = 0, pingpong: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(element, k, CHUNK, 1, trigger)
        self.tile_m, self.tile_n, self.stages, self.cluster = tile_m, tile_n, stages, cluster
        self.band, self.slices, self.groups, self.per_sm = band, slices, groups, per_sm
        self.blocks, self.ahead, self.pingpong = blocks or SMS * per_sm, ahead or stages, pingpong
        self.shares_x, self.shares_w = cluster == 2 and shared == "x", cluster == 2 and shared == "w"
        #: Groups that multiply a tile.
        self.sharers = 1 if pingpong else groups
        self.check(shared)
        #: Chunks of a tile that a block takes, where K is known and all slices take as many.
        self.mine = None if self.turns is None or self.turns % slices else self.turns // slices
        #: Threads that multiply, and all: those that copy are four warps where they give registers to the others.
        self.takers = GROUP * groups
        self.gives = groups == 2 and per_sm == 1
        self.threads = self.takers + (GROUP if self.gives else 64)
        #: Registers of a thread that multiplies.
        self.registers = MOST_REGISTERS if per_sm == 1 else 65536 // (per_sm * self.threads) // 8 * 8
        #: Rows that a block copies.
        self.x_box = tile_m // 2 if self.shares_x else tile_m
        self.w_box = tile_n // 2 if self.shares_w else tile_n
        #: Tiles of wgmma that a group has, one above the other, and their columns.
        self.slabs = max(1, tile_m // (TALL * self.sharers))
        self.columns = tile_n // 2 if self.halves else tile_n
        #: Sums of a thread in each.
        self.sums = self.columns // 2
        self.width = self.piece_width()
        #: Pieces of out that a group stores.
        self.pieces = self.slabs * (self.columns // self.width) // slices
        #: Sums of a thread that its block stores.
        self.own = self.pieces * self.width // 2
        #: Arrivals that fill a stage.
        self.arrivals = 1
        #: Rows of a group's part of a tile, and its scales; those of this tile and the next are kept.
        self.rows = TALL * self.slabs
        self.group_scales = self.rows + self.columns
        self.kept = 2 * groups * self.group_scales
        if self.slabs * self.sums + OTHER_REGISTERS > self.registers:
            said = f"a thread has {self.slabs * self.sums} sums of a {tile_m} x {tile_n} tile"
            raise ValueError(f"{said}; it can have {self.registers - OTHER_REGISTERS}")

    @property
    def halves(self) -> bool:
        """Whether both groups have the same tokens, and each has half of the outputs."""
        return self.tile_m == TALL and self.sharers == 2

    def check(self, shared: str) -> None:
        """ValueError for what no tile is."""
        step = 32 if self.halves else 16
        if self.element.width != 8:
            raise ValueError(f"elements have {self.element.width} bits; tiles take those of 8")
        if self.tile_m not in (64, 128, 256) or self.tile_n % step or not 0 < self.tile_n <= 256:
            said = f"a tile is {self.tile_m} x {self.tile_n}"
            raise ValueError(f"{said}; it can be 64, 128 or 256 x a multiple of {step} to 256")
        if self.cluster not in (1, 2) or shared not in ("x", "w"):
            raise ValueError(f"{self.cluster} blocks share {shared!r}; 1 or 2 can share 'x' or 'w'")
        if self.stages < 2 or self.band < 1:
            raise ValueError(f"{self.stages} stages, bands of {self.band}; there must be 2 and 1 or more")
        if self.groups not in (1, 2) or (self.groups == 1 and self.tile_m != TALL):
            raise ValueError(f"{self.groups} groups for {self.tile_m} tokens; there can be 2, and 1 for {TALL} tokens")
        if self.per_sm not in (1, 2):
            raise ValueError(f"{self.per_sm} blocks on an SM; there can be 1 or 2")
        if not 0 < self.ahead <= self.stages:
            raise ValueError(f"weights of {self.ahead} stages ahead; there are {self.stages} stages, 0 for all")
        if self.pingpong not in (False, True):
            raise ValueError(f"pingpong is {self.pingpong!r}; it can be true or false")
        if self.pingpong and (self.groups, self.slices, self.grouped) != (2, 1, False):
            scales = "128 of K" if self.grouped else "row"
            said = f"groups that take tiles in turn: {self.groups}, {self.slices} slices, scales per {scales}"
            raise ValueError(f"{said}; there must be 2, 1 slice and scales per row")
        if self.slices not in (1, 2, 4, 8):
            raise ValueError(f"{self.slices} slices of a tile; there can be 1, 2, 4 or 8")

    def piece_width(self) -> int:
        """Columns that a copy stores: as many as divide a group's, its pieces being shared by the slices."""
        fitting = [
            each for each in _PIECES
            if self.columns % each == 0 and self.slabs * self.columns // each % self.slices == 0
        ]  # fmt: skip
        if self.slices * self.cluster > 8 or not fitting:
            said = f"{self.slices} slices of {self.tile_m} x {self.tile_n} tiles, {self.cluster} blocks sharing"
            raise ValueError(f"{said}; a cluster has 8 blocks, each a piece of 16")
        if self.slices > 1 and not self.grouped:
            said = f"{self.slices} slices of a tile whose scales are per row"
            raise ValueError(f"{said}; it is one block's, slices are block_tile's")
        return fitting[0]

    @property
    def largest_m(self) -> int:
        """See `Gemm`: no M is too large."""
        return 2**31 - 1

    def cluster_shape(self) -> list[int] | None:
        """Of a launch; None where a block is alone.

        Launched as clusters of one, blocks lie elsewhere on an H200 than without: fewer requests meet on the way to L2, and up
        to twice as much is read from it (512 tokens, K = 8192, N = 5120: 294 MB, 142 without; 34.7 and 33.6 µs). The forms of
        few rows are launched as clusters of one: without, `dot` took 4.71 µs for one row of 4096 x 4096, not 3.91, and the
        others the same within 2 %.
        """
        return [1, self.cluster * self.slices, 1] if self.cluster * self.slices > 1 else None

    @property
    def outs(self) -> int:
        """Pieces of out that a group writes at once: all of a tile if shared memory has room for them."""
        room = [each for each in range(2, self.pieces + 1) if self.bytes_with(each) <= SHARED_BYTES[self.per_sm]]
        return max((each for each in room if self.pieces % each == 0), default=1)

    @property
    def shared_bytes(self) -> int:
        """See `Gemm`."""
        return self.bytes_with(self.outs)

    def bytes_with(self, outs: int) -> int:
        """Shared memory of a block with so many pieces of out."""
        ring = CHUNK * (self.tile_m + self.tile_n) * self.stages
        given = 4 * self.takers * self.own * (self.slices - 1)
        return 1024 + ring + self.groups * outs * TALL * self.width * 2 + given + 4 * self.kept + 16 * self.stages + 8 + 16

    @cute.jit
    def launch(
        self, out: cute.Tensor, x: cute.Tensor, w: cute.Tensor, x_scale: cute.Tensor | None, w_scale: cute.Tensor | None,
        bias: cute.Tensor | None, pdl: Int32, stream: Any,
    ) -> None:  # fmt: skip
        """See `Gemm`."""
        self.kind = out.element_type
        x_atom, x_tensor = self.copier(x, self.x_box, self.shares_x)
        w_atom, w_tensor = self.copier(w, self.w_box, self.shares_w)
        piece = cute.make_composed_layout(self.piece_swizzle(), 0, self.chunks(TALL, self.width, 0, TALL))
        out_atom, out_tensor = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileS2GOp(), out, piece, (TALL, self.width))
        tiles_m, tiles_n = self.tiles(x.shape[0], w.shape[0])
        clusters = tiles_m * tiles_n
        # Slices take one tile and end: what they give each other would else have to wait until it has been read.
        if cutlass.const_expr(self.slices == 1):
            clusters = cutlass.min(clusters, self.blocks // self.cluster)
        whole = cute.fast_divmod_create_divisor_v2(self.band * tiles_n)
        last = cute.fast_divmod_create_divisor_v2(cutlass.max(tiles_m % self.band, 1))
        self.kernel(out_atom, out_tensor, x_atom, x_tensor, w_atom, w_tensor, x_scale, w_scale, bias, whole, last).launch(
            grid=[clusters, self.cluster * self.slices, 1],
            block=[self.threads, 1, 1],
            cluster=self.cluster_shape(),
            # Without it ptxas does not know the registers at entry, and gives no warp more of them.
            min_blocks_per_mp=self.per_sm,
            # Two blocks want all of an SM's shared memory; told so, the DSL need not ask a GPU.
            preferred_smem_carveout=100 if self.per_sm > 1 else None,
            stream=stream,
            use_pdl=pdl,
        )

    def copier(self, tensor: cute.Tensor, rows: int, to_both: bool) -> Any:
        """What copies a chunk of so many rows, to this block or to both of a cluster."""
        op = cpasync.CopyBulkTensorTileG2SMulticastOp() if to_both else cpasync.CopyBulkTensorTileG2SOp()
        box = cute.make_composed_layout(self.chunk_swizzle(), 0, self.chunks(rows, CHUNK, 0, rows))
        return cpasync.make_tiled_tma_atom(op, tensor, box, (rows, CHUNK))

    def chunk_swizzle(self) -> Any:
        """How eight rows of a chunk, of 128 bytes, lie."""
        return warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, self.element).inner

    def piece_swizzle(self) -> Any:
        """How eight rows of a piece of out lie."""
        return warpgroup.make_smem_layout_atom(_PIECES[self.width], self.kind).inner

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
    def tile_at(self, index: Int32, m: Int32, n: Int32, rank: Int32, order: Any) -> Any:
        """Which tile this block takes of the cluster's index-th: along M, along N.

        The host has prepared `order`, to divide by a band's tiles and by the height of the last one: a division takes some
        hundred cycles, and ptxas moves it to where its result is needed, between the sums and their store.
        """
        tiles_m, _ = self.tiles(m, n)
        whole, last = order
        band, within = divmod(index, whole)
        first = band * self.band
        tile_n, tile_m = within // self.band, within % self.band
        if first + self.band > tiles_m:
            tile_n, tile_m = divmod(within, last)
        tile_m = first + tile_m
        if cutlass.const_expr(self.shares_w):
            tile_m = 2 * tile_m + rank
        if cutlass.const_expr(self.shares_x):
            tile_n = 2 * tile_n + rank
        return tile_m, tile_n

    @cute.kernel
    def kernel(
        self, out_atom: cute.CopyAtom, out: cute.Tensor, x_atom: cute.CopyAtom, x: cute.Tensor, w_atom: cute.CopyAtom,
        w: cute.Tensor, x_scale: cute.Tensor | None, w_scale: cute.Tensor | None, bias: cute.Tensor | None,
        whole: cute.FastDivmodDivisorV2, last: cute.FastDivmodDivisorV2,
    ) -> None:  # fmt: skip
        """The kernel: see the class."""
        first, place, _ = cute.arch.block_idx()
        rank, slice = place, Int32(0)
        if cutlass.const_expr(self.slices > 1):
            rank, slice = place % self.cluster, place // self.cluster
        every, _, _ = cute.arch.grid_dim()
        warp_index = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        m, n, order = x.shape[0], w.shape[0], (whole, last)
        start, turns = self.turns_of(w, slice)
        memory = self.allocate()
        x_ring, w_ring, pieces, scales, full, free, given, arrived = memory
        self.set_up(warp_index, (x_atom, w_atom, out_atom), full, free, arrived)
        if warp_index >= self.takers // 32:
            if cutlass.const_expr(self.gives):
                cute.arch.setmaxregister_decrease(_FEW)
            if warp_index == self.takers // 32:
                self.copy_all(x_atom, x, w_atom, w, x_ring, w_ring, full, free, first, every, rank, slice, start, turns, order)
            if warp_index == self.takers // 32 + 1:
                self.copy_scales(x_scale, w_scale, scales, full, free, first, every, rank, start, turns, m, n, order)
        else:
            if cutlass.const_expr(self.gives):
                cute.arch.setmaxregister_increase(MOST_REGISTERS)
            self.multiply_all(
                out_atom, out, x_scale, w_scale, bias, x_ring, w_ring, pieces, scales, full, free, given, arrived, first,
                every, rank, slice, turns, m, n, order,
            )  # fmt: skip
        self.release_successor()
        if cutlass.const_expr(self.cluster * self.slices > 1):
            # Another block may yet write to this one's memory, and arrive at its barriers.
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()

    @cute.jit
    def turns_of(self, w: cute.Tensor, slice: Int32) -> Any:
        """A slice's first chunk of a tile, and its number of them."""
        if cutlass.const_expr(self.mine is not None):
            return slice * self.mine, self.mine
        turns = cute.ceil_div(w.shape[1], CHUNK)
        share = cute.ceil_div(turns, self.slices)
        start = slice * share
        return start, cutlass.max(cutlass.min(turns - start, share), 0)

    def allocate(self) -> tuple[Any, ...]:
        """Shared memory: rings of x and w, pieces of out, scales, barriers of full and free stages, and what slices give."""
        shared = SmemAllocator()
        ring = cute.make_layout((CHUNK * (self.tile_m + self.tile_n) * self.stages,))
        x_ring = shared.allocate_tensor(self.element, ring, byte_alignment=1024, swizzle=self.chunk_swizzle()).iterator
        w_ring = x_ring + CHUNK * self.tile_m * self.stages
        pieces = shared.allocate_array(self.kind, self.groups * self.outs * TALL * self.width, byte_alignment=1024)
        scales = shared.allocate_array(Float32, self.kept, byte_alignment=16)
        full = shared.allocate_array(Int64, self.stages, byte_alignment=8)
        free = shared.allocate_array(Int64, self.stages, byte_alignment=8)
        given, arrived = None, None
        if self.slices > 1:
            given = shared.allocate_array(Int32, self.takers * self.own * (self.slices - 1), byte_alignment=16)
            arrived = shared.allocate_array(Int64, 1, byte_alignment=8)
        return x_ring, w_ring, pieces, scales, full, free, given, arrived

    @cute.jit
    def set_up(self, warp_index: Int32, atoms: Any, full: Any, free: Any, arrived: Any) -> None:
        """Fetches the tensor maps and makes the barriers, for all threads of the block and of its cluster."""
        if warp_index == self.takers // 32:
            for atom in atoms:
                cpasync.prefetch_descriptor(atom)
            with cute.arch.elect_one():
                for stage in cutlass.range_constexpr(self.stages):
                    cute.arch.mbarrier_init(full + stage, self.arrivals)
                    cute.arch.mbarrier_init(free + stage, self.sharers * GROUP // 32 * self.cluster)
                if cutlass.const_expr(self.slices > 1):
                    cute.arch.mbarrier_init(arrived, 1)
                    cute.arch.mbarrier_arrive_and_expect_tx(arrived, 4 * self.takers * self.own * (self.slices - 1))
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        if cutlass.const_expr(self.cluster * self.slices > 1):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()

    @cute.jit
    def copy_all(
        self, x_atom: cute.CopyAtom, x: cute.Tensor, w_atom: cute.CopyAtom, w: cute.Tensor, x_ring: Any, w_ring: Any,
        full: Any, free: Any, first: Int32, every: Int32, rank: Int32, slice: Int32, start: Int32, turns: Any, order: Any,
    ) -> None:  # fmt: skip
        """One warp asks for everything, in the order in which it is multiplied: of each tile the chunks from `start` on.

        What a tile has in common is found once: found anew for each chunk it took longer than the products did.
        """
        m, n = x.shape[0], w.shape[0]
        x_to, x_from = self.partition(x_atom, x, x_ring, self.x_box, self.tile_m, rank)
        w_to, w_from = self.partition(w_atom, w, w_ring, self.w_box, self.tile_n, rank)
        # The first weights of all, while the kernel before this one may still run. Tokens are what that one writes.
        tile_m, tile_n = self.tile_at(first, m, n, rank, order)
        for turn in cutlass.range_constexpr(self.ahead):
            if turn < turns:
                self.expect(full + turn)
                self.copy(w_atom, w_from, w_to, full + turn, self.shares_w, tile_n, start + turn, Int32(turn), rank, slice)
        self.await_predecessor()
        for turn in cutlass.range_constexpr(self.stages):
            if turn < turns:
                if cutlass.const_expr(turn >= self.ahead):
                    self.expect(full + turn)
                    self.copy(w_atom, w_from, w_to, full + turn, self.shares_w, tile_n, start + turn, Int32(turn), rank, slice)
                self.copy(x_atom, x_from, x_to, full + turn, self.shares_x, tile_m, start + turn, Int32(turn), rank, slice)
        begin = cutlass.min(Int32(self.stages), turns)
        # The stage after those, and the phase that its last readers end: none of a stage that has not been filled yet.
        stage, phase = begin % self.stages, 1 - begin // self.stages
        tiles_m, tiles_n = self.tiles(m, n)
        for index in cutlass.range(first, tiles_m * tiles_n, every, unroll=1):
            tile_m, tile_n = self.tile_at(index, m, n, rank, order)
            for turn in cutlass.range(begin, turns, unroll=1):
                cute.arch.mbarrier_wait(free + stage, phase)
                self.expect(full + stage)
                self.copy(w_atom, w_from, w_to, full + stage, self.shares_w, tile_n, start + turn, stage, rank, slice)
                self.copy(x_atom, x_from, x_to, full + stage, self.shares_x, tile_m, start + turn, stage, rank, slice)
                stage, phase = self.following(stage, phase)
            begin = Int32(0)

    @cute.jit
    def expect(self, bell: Any) -> None:
        """Announces how many bytes a stage will receive: those that this block loads, and those that the other one sends."""
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(bell, CHUNK * (self.tile_m + self.tile_n))

    @cute.jit
    def copy(
        self, atom: Any, source: Any, target: Any, bell: Any, to_both: Constexpr, tile: Any, turn: Any, stage: Any,
        rank: Int32, slice: Int32,
    ) -> None:  # fmt: skip
        """Asks for a chunk of a tile, or for this block's half of it, to both blocks that share it."""
        if cutlass.const_expr(to_both):
            piece = source[(None, 2 * tile + rank, turn)]
            both = Int16(3)
            if cutlass.const_expr(self.slices > 1):
                both = (Int32(3) << (2 * slice)).to(Int16)
            cute.copy(atom, piece, target[(None, stage)], tma_bar_ptr=bell, mcast_mask=both)
        else:
            cute.copy(atom, source[(None, tile, turn)], target[(None, stage)], tma_bar_ptr=bell)

    def copy_scales(
        self, x_scale: Any, w_scale: Any, scales: Any, full: Any, free: Any, first: Any, every: Any, rank: Any, start: Any,
        turns: Any, m: Any, n: Any, order: Any,
    ) -> None:  # fmt: skip
        """Another warp copies each chunk's scales into its stage, in the form that has some."""

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
        pieces: Any, scales: Any, full: Any, free: Any, given: Any, arrived: Any, first: Int32, every: Int32, rank: Int32,
        slice: Int32, turns: Any, m: Int32, n: Int32, order: Any,
    ) -> None:  # fmt: skip
        """A group's four warps multiply their part of what has come, and store what has been summed up."""
        tid, _, _ = cute.arch.thread_idx()
        # Through a shuffle: ptxas would read the special register anew for every chunk, and wait for it.
        tid = cute.arch.shuffle_sync(tid, cute.arch.lane_idx())
        group = cute.arch.make_warp_uniform(tid // GROUP)
        row, column = group * (TALL * self.slabs), Int32(0)
        if cutlass.const_expr(self.halves):
            row, column = Int32(0), group * self.columns
        if cutlass.const_expr(self.pingpong):
            row = Int32(0)
        totals = cute.make_rmem_tensor((self.slabs * self.sums,), Float32)
        self.await_predecessor()
        stage, phase, odd = Int32(0), Int32(0), Int32(0)
        tiles_m, tiles_n = self.tiles(m, n)
        step = every
        if cutlass.const_expr(self.pingpong):
            first, step = first + group * every, 2 * every
            if group == 1:
                stage, phase = self.after(stage, phase, turns)
                self.give_turn(Int32(0), True)
        for index in cutlass.range(first, tiles_m * tiles_n, step, unroll=1):
            tile_m, tile_n = self.tile_at(index, m, n, rank, order)
            first_m, first_n = tile_m * self.tile_m + row, tile_n * self.tile_n + column
            self.fetch_scales(x_scale, w_scale, scales, first_m, first_n, odd, tid)
            if cutlass.const_expr(self.pingpong):
                self.await_turn(group)
            stage, phase = self.sum_tile(
                totals, x_ring, w_ring, scales, full, free, row, column, first_n, stage, phase, turns, slice, tid,
                index + every < tiles_m * tiles_n,
            )  # fmt: skip
            if cutlass.const_expr(self.pingpong):
                stage, phase = self.after(stage, phase, turns)
            own = totals
            if cutlass.const_expr(self.slices > 1):
                own = self.share(totals, given, arrived, rank, slice, tid)
            self.await_scales(tid)
            self.store(out_atom, out, own, bias, pieces, scales, tile_m, tile_n, row, column, slice, odd, tid, n)
            odd = 1 - odd
        # A block's memory lasts until its pieces have been read.
        if tid % 128 < 32:
            cute.arch.cp_async_bulk_wait_group(0, read=True)

    @cute.jit
    def share(self, totals: cute.Tensor, given: Any, arrived: Any, rank: Int32, slice: Int32, tid: Int32) -> cute.Tensor:
        """Gives each slice the sums that it stores, and adds up those given to this one: always in the same order."""
        words = cute.recast_tensor(totals, Int32)
        sums = cute.make_rmem_tensor((self.own,), Float32)
        for other in cutlass.range_constexpr(self.slices):
            if slice == other:
                for i in cutlass.range_constexpr(self.own):
                    sums[i] = totals[other * self.own + i]
            else:
                source = slice - Int32(slice > other)
                start = given + (source * (self.takers * self.own) + tid * 4)
                for i in cutlass.range_constexpr(0, self.own, 4):
                    four = tuple(words[other * self.own + i + word] for word in range(4))
                    into = (start + i * self.takers).align(VECTOR)
                    cute.arch.store_async_dsmem(into, four, arrived, other * self.cluster + rank)
        cute.arch.mbarrier_wait(arrived, 0)
        theirs = cute.recast_ptr(given, dtype=Float32)
        for source in cutlass.range_constexpr(self.slices - 1):
            for i in cutlass.range_constexpr(0, self.own, 4):
                start = theirs + (source * (self.takers * self.own) + i * self.takers + tid * 4)
                four = cute.make_tensor(start.align(VECTOR), cute.make_layout(4)).load()
                for word in cutlass.range_constexpr(4):
                    sums[i + word] = sums[i + word] + four[word]
        return sums

    @cute.jit
    def fetch_scales(
        self, x_scale: cute.Tensor, w_scale: cute.Tensor, scales: Any, first_m: Int32, first_n: Int32, odd: Int32, tid: Int32
    ) -> None:
        """Begins to copy the scales of a group's part of a tile.

        Two buffers in turn: one tile's may be read yet while the next one begins. Each group has its own: neither waits for
        the other, so that one multiplies while the other stores.
        """
        group, thread = tid // GROUP, tid % GROUP
        into = scales + (odd * self.groups + group) * self.group_scales
        for at in cutlass.range_constexpr(0, self.rows, GROUP):
            if thread + at < self.rows:
                self.fetch_scale(x_scale, cutlass.min(first_m + at + thread, x_scale.shape[0] - 1), into + (at + thread))
        for at in cutlass.range_constexpr(0, self.columns, GROUP):
            if thread + at < self.columns:
                output = self.rows + at + thread
                self.fetch_scale(w_scale, cutlass.min(first_n + at + thread, w_scale.shape[0] - 1), into + output)
        cute.arch.cp_async_commit_group()

    @cute.jit
    def await_scales(self, tid: Int32) -> None:
        """Waits for the scales that a group's threads have asked for."""
        cute.arch.cp_async_wait_group(0)
        cute.arch.barrier(barrier_id=1 + cute.arch.make_warp_uniform(tid // GROUP), number_of_threads=GROUP)

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
        self, totals: cute.Tensor, x_ring: Any, w_ring: Any, scales: Any, full: Any, free: Any, row: Int32,  # noqa: ARG002
        column: Int32, first_n: Int32, stage: Int32, phase: Int32, turns: Any, slice: Int32, tid: Int32,  # noqa: ARG002
        follows: Any,
    ) -> Any:  # fmt: skip
        """Sums up a tile, all of K in the tensor core, from a stage and its phase on: those after the tile's.

        first_n  the first output of the group's part of the tile
        follows  whether the block has a tile after this one, which with `pingpong` is the other group's
        """
        mma = self.mma(self.columns)
        tokens, (weights,) = self.operands(mma, x_ring, w_ring, row, column, self.columns)
        shape = mma.get_slice(0).partition_shape_C((TALL, self.columns))
        accs = [cute.make_tensor(totals.iterator + slab * self.sums, cute.make_layout(shape)) for slab in range(self.slabs)]
        # The first turn by itself: a loop that might not run at all would keep the products from overlapping.
        self.multiply(mma, accs, tokens, weights, full, stage, phase, True)
        before = stage
        for _ in cutlass.range(1, turns, unroll=1):
            stage, phase = self.following(stage, phase)
            self.multiply(mma, accs, tokens, weights, full, stage, phase, False)
            warpgroup.wait_group(1)
            self.hand_back(free + before, slice, tid)
            before = stage
        if cutlass.const_expr(self.pingpong):
            self.give_turn(1 - tid // GROUP, follows)
        warpgroup.wait_group(0)
        self.hand_back(free + before, slice, tid)
        return self.following(stage, phase)

    @cute.jit
    def give_turn(self, group: Int32, follows: Any) -> None:
        """Lets a group multiply, once the last products of the other's tile have begun: none waits for the other."""
        if follows:
            cute.arch.barrier_arrive(barrier_id=1 + self.groups + group, number_of_threads=2 * GROUP)

    def await_turn(self, group: Int32) -> None:
        """Waits until the other group has seen all chunks of the tile before.

        Only then does a stage's phase tell this tile's chunk: a barrier knows whether a phase is even or odd, and stages are
        filled many times while the other group multiplies.
        """
        cute.arch.barrier(barrier_id=1 + self.groups + group, number_of_threads=2 * GROUP)

    def following(self, stage: Int32, phase: Int32) -> tuple[Int32, Int32]:
        """The stage after one, and its phase."""
        wraps = Int32(stage == self.stages - 1)
        return (stage + 1) * (1 - wraps), phase ^ wraps

    def after(self, stage: Int32, phase: Int32, turns: Any) -> tuple[Int32, Int32]:
        """The stage so many chunks after one, and its phase."""
        further = stage + turns
        return further % self.stages, phase ^ (further // self.stages % 2)

    @cute.jit
    def multiply(
        self, mma: Any, accs: list, tokens: list, weights: Any, full: Any, stage: Int32, phase: Int32, first: Constexpr
    ) -> None:
        """Waits for a stage and begins to add its products; the first ones are not added to anything."""
        cute.arch.mbarrier_wait(full + stage, phase)
        warpgroup.fence()
        for product in cutlass.range_constexpr(PRODUCTS):
            for slab in cutlass.range_constexpr(self.slabs):
                a, b = tokens[slab][(None, None, product, stage)], weights[(None, None, product, stage)]
                mma.set(warpgroup.Field.ACCUMULATE, not (first and product == 0))
                cute.gemm(mma, accs[slab], a, b, accs[slab])
        warpgroup.commit_group()

    @cute.jit
    def hand_back(self, bell: Any, slice: Int32, tid: Int32) -> None:
        """Says that this warp has read a stage, to each block that copies into it."""
        cute.arch.sync_warp()
        if tid % 32 < self.cluster:
            if cutlass.const_expr(self.cluster > 1):
                cute.arch.mbarrier_arrive(bell, slice * self.cluster + tid % 32)
            else:
                cute.arch.mbarrier_arrive(bell)

    @cute.jit
    def store(
        self, out_atom: cute.CopyAtom, out: cute.Tensor, sums: cute.Tensor, bias: Any, pieces: Any, scales: Any,
        tile_m: Int32, tile_n: Int32, row: Int32, column: Int32, slice: Int32, odd: Int32, tid: Int32, n: Int32,
    ) -> None:  # fmt: skip
        """Stores this block's pieces of a tile, of 64 rows each, by way of shared memory, `outs` at once."""
        group, copies = tid // 128, tid % 128 < 32
        size = TALL * self.width
        mine = pieces + cute.arch.make_warp_uniform(group) * (self.outs * size)
        swizzled = cute.recast_ptr(mine, self.piece_swizzle(), dtype=self.kind)
        source = cute.group_modes(cute.make_tensor(swizzled, self.chunks(TALL, self.width, self.outs, TALL)), 0, 2)
        target = cute.group_modes(cute.local_tile(out, (TALL, self.width), (None, None)), 0, 2)
        source, target = cpasync.tma_partition(out_atom, 0, cute.make_layout(1), source, target)
        across = self.columns // self.width
        first_n = tile_n * self.tile_n + column
        for batch in cutlass.range_constexpr(0, self.pieces, self.outs):
            if copies:
                cute.arch.cp_async_bulk_wait_group(0, read=True)
            cute.arch.barrier(barrier_id=1 + group, number_of_threads=128)
            for buffer in cutlass.range_constexpr(self.outs):
                piece = slice * self.pieces + (batch + buffer) if cutlass.const_expr(self.slices > 1) else batch + buffer
                at_m, at_n = piece // across * TALL, piece % across * self.width
                values = self.results(sums, batch + buffer, bias, scales, first_n, at_m, at_n, odd, tid, n)
                self.write(values, mine + buffer * size, tid)
            cute.arch.fence_view_async_shared()
            cute.arch.barrier(barrier_id=1 + group, number_of_threads=128)
            if copies:
                for buffer in cutlass.range_constexpr(self.outs):
                    piece = slice * self.pieces + (batch + buffer) if cutlass.const_expr(self.slices > 1) else batch + buffer
                    at_m = tile_m * (self.tile_m // TALL) + row // TALL + piece // across
                    at_n = tile_n * (self.tile_n // self.width) + column // self.width + piece % across
                    cute.copy(out_atom, source[(None, buffer)], target[(None, at_m, at_n)])
                cute.arch.cp_async_bulk_commit_group()

    @cute.jit
    def results(
        self, sums: cute.Tensor, piece: Constexpr, bias: Any, scales: Any, first_n: Int32, row: Any, column: Any,
        odd: Int32, tid: Int32, n: Int32,
    ) -> cute.Tensor:  # fmt: skip
        """A thread's results in a piece, from a row and a column of its group's part on: two rows, two of eight columns."""
        start = scales + (odd * self.groups + tid // GROUP) * self.group_scales
        x_scales = cute.make_tensor(start + (row + tid % 128 // 32 * 16 + tid % 32 // 4), cute.make_layout(2, stride=8))
        first = column + tid % 4 * 2
        w_scales = cute.make_tensor(start + (self.rows + first), cute.make_layout((2, self.width // 8), stride=(1, 8)))
        values = cute.make_rmem_tensor((self.width // 2,), Float32)
        for i in cutlass.range_constexpr(self.width // 2):
            value = sums[piece * (self.width // 2) + i] * x_scales[i // 2 % 2] * w_scales[i % 2, i // 4]
            if cutlass.const_expr(bias is not None):
                at = first_n + first + (i // 4 * 8 + i % 2)
                value = value + bias[cutlass.min(at, n - 1)].to(Float32)
            values[i] = value
        return values

    @cute.jit
    def write(self, values: cute.Tensor, piece: Any, tid: Int32) -> None:
        """Writes a thread's results to a piece, swizzled as TMA reads it: of 64 columns eight rows meet all banks once."""
        rounded = cute.make_rmem_tensor((self.width // 2,), self.kind)
        rounded.store(values.load().to(self.kind))
        words = cute.recast_tensor(rounded, Int32)
        eighth = tid % 32 // 4
        # Rows that the swizzle tells apart: all eight, every two, every four.
        turn = eighth // (TALL // self.width)
        into = cute.make_tensor(cute.recast_ptr(piece, dtype=Int32), cute.make_layout(TALL * self.width // 2))
        for i in cutlass.range_constexpr(self.width // 4):
            row = tid % 128 // 32 * 16 + eighth + i % 2 * 8
            into[row * (self.width // 2) + (((i // 2) ^ turn) * 4 + tid % 4)] = words[i]

"""The CuteDSL kernels of ll_gemm_bf16 and ll_gemm_fp8: few tokens times a matrix of weights, as fast as the weights stream.

Two forms. `Split` multiplies in the tensor core and cuts K over the warps of a block and the blocks of a cluster; `Dot`
gives a block a few outputs and all of K, multiplies in the ordinary cores and serves the fewest tokens. In both a thread
copies, through shared memory of its own, just what it multiplies: the copies are asynchronous and many, and there is nothing
to wait for but they themselves. The first weights are under way before the predecessor's results are asked for.

Imports cutlass, which reads CUTE_DSL_ARCH as it is imported: import this module after it is set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import BFloat16, Boolean, Constexpr, Float8E4M3FN, Float16, Float32, Int32, Int64, Numeric, cute
from cutlass._mlir import ir
from cutlass.cute.nvgpu import cpasync, warp
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor
from cutlass.utils import SmemAllocator

#: Bytes that a thread copies at once, and bytes of a row that the four threads which share it copy at once.
VECTOR, STEP = 16, 64

#: Rows of weights and columns of tokens in a tile of the tensor core.
ROWS, COLUMNS = 16, 8

#: More turns than this are a loop.
UNROLLED = 16


class Gemm:
    """out = x @ w.T, times a scale per token and per output where there are scales.

    element  BFloat16 or Float8E4M3FN, of x and w
    k        the size of K that is compiled in, or None
    stride   elements of K that all threads which share outputs take in one turn
    depth    turns whose copies are under way while one is multiplied
    trigger  when the next kernel may begin: 0 at once, 1 when the one before this has ended, 2 when all is loaded

    Rows of x and w begin at multiples of 16 bytes, and K is a multiple of 16 bytes.
    """

    threads: int
    cluster = 1

    def __init__(self, element: type[Numeric], k: int | None, stride: int, depth: int, trigger: int) -> None:
        self.element, self.k = element, k
        self.size = element.width // 8
        self.vector = VECTOR // self.size
        self.stride = stride
        self.trigger = trigger
        self.turns = None if k is None else -(-k // stride)
        self.depth = depth if self.turns is None else min(depth, self.turns)
        #: A piece is copied where none has been read since the last turn.
        self.slots = self.depth + 1 if self.turns is None else min(self.depth + 1, self.turns)
        #: Whether the last turn is past the end of a row for some threads.
        self.ragged = k is None or k % stride != 0

    @property
    def largest_m(self) -> int:
        """The most tokens that it takes."""
        raise NotImplementedError

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        raise NotImplementedError

    def grid(self, n: Int32) -> list[Any]:
        """Blocks for n outputs."""
        raise NotImplementedError

    def may_pass(self, turn: int | None) -> bool:
        """Whether a turn may begin past the end of a row; None for any turn of a loop."""
        return turn is None or self.turns is None or (self.ragged and turn == self.turns - 1)

    @cute.jit
    def scaled(
        self,
        out: cute.Tensor,
        x: cute.Tensor,
        w: cute.Tensor,
        x_scale: cute.Tensor,
        w_scale: cute.Tensor,
        pdl: Int32,
        stream: Any,
    ) -> None:
        """The host function with scales. pdl: 1 if the launch may begin before its predecessor has ended."""
        self.kernel(out, x, w, x_scale, w_scale).launch(
            grid=self.grid(w.shape[0]),
            block=[self.threads, 1, 1],
            cluster=[1, self.cluster, 1],
            stream=stream,
            use_pdl=pdl,
        )

    @cute.jit
    def plain(self, out: cute.Tensor, x: cute.Tensor, w: cute.Tensor, pdl: Int32, stream: Any) -> None:
        """The host function without scales. pdl as in `scaled`."""
        self.kernel(out, x, w, None, None).launch(
            grid=self.grid(w.shape[0]),
            block=[self.threads, 1, 1],
            cluster=[1, self.cluster, 1],
            stream=stream,
            use_pdl=pdl,
        )

    def ring(self, shared: SmemAllocator, vectors: int, slots: int) -> cute.Tensor:
        """Shared memory for `slots` pieces of `vectors` vectors: the calling thread's elements [in a vector, vector, slot]."""
        tid, _, _ = cute.arch.thread_idx()
        start = shared.allocate_array(self.element, self.vector * self.threads * vectors * slots, byte_alignment=VECTOR)
        # Threads side by side have their vectors side by side: no bank is asked twice.
        whole = self.vector * self.threads
        layout = cute.make_layout((self.vector, vectors, slots), stride=(1, whole, whole * vectors))
        return cute.make_tensor((start + tid * self.vector).align(VECTOR), layout)

    @cute.jit
    def fetch(self, row: Any, at: Int32, into: cute.Tensor, within: Any) -> None:
        """Begins to copy the vector at an offset of a row; zeros where `within` is given and false."""
        atom = cute.make_copy_atom(
            cpasync.CopyG2SOp(cache_mode=cpasync.LoadCacheMode.GLOBAL), self.element, num_bits_per_copy=8 * VECTOR
        )
        source = cute.make_tensor((row + at).align(VECTOR), cute.make_layout((self.vector, 1)))
        target = cute.make_tensor(into.iterator.align(VECTOR), cute.make_layout((self.vector, 1)))
        if cutlass.const_expr(within is None):
            cute.copy(atom, source, target)
        else:
            flag = cute.make_rmem_tensor((1,), Boolean)
            flag[0] = within
            whole = cute.make_tensor(flag.iterator, cute.make_layout((self.vector, 1), stride=(0, 0)))
            cute.copy(atom, source, target, pred=whole)

    @cute.jit
    def fetch_scale(self, scales: cute.Tensor, index: Int32, into: Any) -> None:
        """Begins to copy one scale. A load would be moved down to where the scale is used, and be waited for there."""
        atom = cute.make_copy_atom(cpasync.CopyG2SOp(), Float32, num_bits_per_copy=32)
        one = cute.make_layout((1, 1))
        source = cute.make_tensor(scales.iterator + index * scales.stride[0], one)
        cute.copy(atom, source, cute.make_tensor(into, one))

    @cute.jit
    def load(self, row: Any, at: Int32, into: cute.Tensor, turn: Constexpr, once: Constexpr) -> None:
        """Loads the vector at an offset of a row, as 4 words; zeros past the row's end. `once`: keeps it out of L1."""
        kind = ir.VectorType.get([4], Int32.mlir_type)
        start = at
        if cutlass.const_expr(self.may_pass(turn)):
            start = cutlass.min(at, self.k - self.vector)
        if cutlass.const_expr(once):
            loaded = cute.arch.load(row + start, kind, level1_eviction_priority="evict_no_allocate")
        else:
            loaded = cute.arch.load(row + start, kind)
        vector = cute.TensorSSA(loaded, (4,), Int32)
        for word in cutlass.range_constexpr(4):
            value = vector[word]
            if cutlass.const_expr(self.may_pass(turn)):
                value = value if at < self.k else Int32(0)
            into[word] = value

    @cute.jit
    def await_predecessor(self) -> None:
        """Waits for the kernel before this one to end, and lets the one after this begin, in the order that `trigger` says.

        That one waits for all of this kernel anyway; begun early, it can load weights of its own.
        """
        if cutlass.const_expr(self.trigger == 0):
            cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
        if cutlass.const_expr(self.trigger == 1):
            cute.arch.griddepcontrol_launch_dependents()

    @cute.jit
    def release_successor(self) -> None:
        """See `await_predecessor`."""
        if cutlass.const_expr(self.trigger == 2):
            cute.arch.griddepcontrol_launch_dependents()


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
        self,
        element: type[Numeric],
        k: int | None,
        rows: int,
        columns: int,
        warps: int,
        cluster: int,
        steps: int,
        depth: int,
        trigger: int = 0,
        direct: int = 0,
    ) -> None:
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
        self,
        out: cute.Tensor,
        x: cute.Tensor,
        w: cute.Tensor,
        x_scale: cute.Tensor | None,
        w_scale: cute.Tensor | None,
    ) -> None:
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
        ones = cute.make_rmem_tensor(scales.layout, Float32)
        ones.fill(1.0)
        self.store(out, parts, scales, ones, tid, first_n + rank * self.own, m, n)

    @cute.jit
    def store(
        self,
        out: cute.Tensor,
        parts: Any,
        x_scales: cute.Tensor,
        w_scales: cute.Tensor,
        tid: Int32,
        first: Int32,
        m: Int32,
        n: Int32,
    ) -> None:
        """Sums up this block's own outputs, from the first on, and stores them."""
        layout = cute.make_layout((self.tokens, self.own, self.parts), stride=(self.pitch, 1, self.tokens * self.pitch))
        sums = cute.make_tensor(cute.recast_ptr(parts, dtype=Float32), layout)
        for i in cutlass.range_constexpr(cute.size(x_scales)):
            token, column = (tid + i * self.threads) // self.own, (tid + i * self.threads) % self.own
            if token < m and first + column < n and token < self.tokens:
                total = sums[token, column, 0]
                for part in cutlass.range_constexpr(1, self.parts):
                    total = total + sums[token, column, part]
                out[token, first + column] = (total * x_scales[i] * w_scales[i]).to(out.element_type)

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
            self.store(out, side, x_scales, scales, tid, tile * (ROWS * self.rows) + rank * self.own, m, n)
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


class Dot(Gemm):
    """The form without the tensor core: a block has a few outputs and all of K, a thread a vector of every `threads`.

    Everything goes into registers at once: K is compiled in, and a few vectors per thread.

    outputs   rows of weights per block
    tokens    the largest M; it is cheap up to 4
    warps     warps of a block
    """

    def __init__(
        self, element: type[Numeric], k: int | None, outputs: int, tokens: int, warps: int, trigger: int = 2, staged: int = 0
    ) -> None:
        if k is None:
            raise ValueError("the dot form takes a K that is compiled in")
        self.threads = 32 * warps
        super().__init__(element, k, 8 * VECTOR // element.width * self.threads, 1, trigger)
        self.outputs, self.tokens, self.warps, self.staged = outputs, tokens, warps, staged
        if outputs * tokens > self.threads:
            raise ValueError(f"{outputs} outputs of {tokens} tokens are more than {self.threads} threads")

    @property
    def largest_m(self) -> int:
        """See `Gemm`."""
        return self.tokens

    @property
    def shared_bytes(self) -> int:
        """See `Gemm`."""
        copied = VECTOR * self.threads * self.tokens * self.turns if self.staged else 0
        return copied + 8 * self.threads + 4 * self.outputs * self.tokens * self.warps

    def grid(self, n: Int32) -> list[Any]:
        """See `Gemm`."""
        return [cute.ceil_div(n, self.outputs), 1, 1]

    @cute.kernel
    def kernel(
        self,
        out: cute.Tensor,
        x: cute.Tensor,
        w: cute.Tensor,
        x_scale: cute.Tensor | None,
        w_scale: cute.Tensor | None,
    ) -> None:
        """The kernel: see the class."""
        tid, _, _ = cute.arch.thread_idx()
        tile, _, _ = cute.arch.block_idx()
        warp_index = cute.arch.warp_idx()
        m, n = x.shape[0], w.shape[0]
        first_n = tile * self.outputs
        weights = cute.make_rmem_tensor((4, self.turns, self.outputs), Int32)
        tokens = cute.make_rmem_tensor((4, self.turns, self.tokens), Int32)
        # Rows past the last are read as the last; what comes of them is not stored.
        for row in cutlass.range_constexpr(self.outputs):
            start = w[(cutlass.min(first_n + row, n - 1), None)].iterator
            for turn in cutlass.range_constexpr(self.turns):
                self.load(start, tid * self.vector + turn * self.stride, weights[(None, turn, row)], turn, True)
        # Thread i sums up output i % outputs of token i // outputs.
        token, column = tid // self.outputs, tid % self.outputs
        shared = SmemAllocator()
        if cutlass.const_expr(self.staged):
            copies = self.ring(shared, self.turns, self.tokens)
        if cutlass.const_expr(w_scale is not None):
            scales = shared.allocate_array(Float32, 2 * self.threads, byte_alignment=4) + tid
            self.fetch_scale(w_scale, cutlass.min(first_n + column, n - 1), scales)
        self.await_predecessor()
        if cutlass.const_expr(x_scale is not None):
            self.fetch_scale(x_scale, cutlass.min(token, m - 1), scales + self.threads)
        cute.arch.cp_async_commit_group()
        if cutlass.const_expr(self.staged):
            for row in cutlass.range_constexpr(self.tokens):
                start = x[(cutlass.min(row, m - 1), None)].iterator
                for turn in cutlass.range_constexpr(self.turns):
                    at = tid * self.vector + turn * self.stride
                    self.fetch(start, at, copies[(None, turn, row)], at < self.k if self.may_pass(turn) else None)
            cute.arch.cp_async_commit_group()
            cute.arch.cp_async_wait_group(0)
        for row in cutlass.range_constexpr(0 if self.staged else self.tokens):
            start = x[(cutlass.min(row, m - 1), None)].iterator
            for turn in cutlass.range_constexpr(self.turns):
                self.load(start, tid * self.vector + turn * self.stride, tokens[(None, turn, row)], turn, False)
        acc = cute.make_rmem_tensor((self.outputs, self.tokens), Float32)
        acc.fill(0.0)
        for turn in cutlass.range_constexpr(self.turns):
            xs = [
                copies[(None, turn, row)].load().to(Float32) if self.staged else self.values(tokens[(None, turn, row)])
                for row in range(self.tokens)
            ]
            for output in cutlass.range_constexpr(self.outputs):
                ws = self.values(weights[(None, turn, output)])
                for row in cutlass.range_constexpr(self.tokens):
                    for i in cutlass.range_constexpr(self.vector):
                        acc[output, row] = acc[output, row] + ws[i] * xs[row][i]

        self.release_successor()
        start = shared.allocate_array(Float32, self.outputs * self.tokens * self.warps, byte_alignment=4)
        sums = cute.make_tensor(start, cute.make_layout((self.outputs, self.tokens, self.warps)))
        for output in cutlass.range_constexpr(self.outputs):
            for row in cutlass.range_constexpr(self.tokens):
                total = cute.arch.warp_reduction_sum(acc[output, row])
                if tid % 32 == 0:
                    sums[output, row, warp_index] = total
        cute.arch.sync_threads()
        cute.arch.cp_async_wait_group(0)
        if token < m and token < self.tokens and first_n + column < n:
            total = sums[column, token, 0]
            for part in cutlass.range_constexpr(1, self.warps):
                total = total + sums[column, token, part]
            if cutlass.const_expr(w_scale is not None):
                both = cute.make_tensor(scales, cute.make_layout(2, stride=self.threads))
                total = total * both[0] * both[1]
            out[token, first_n + column] = total.to(out.element_type)

    def values(self, words: cute.Tensor) -> cute.TensorSSA:
        """A vector's elements as float32."""
        return cute.recast_tensor(words, self.element).load().to(Float32)


def make(element: type[Numeric], k: int | None, config: Mapping[str, Any]) -> Split | Dot:
    """The kernel that a config describes: its "kernel", "split", "stream" or "dot", and that form's arguments."""
    form = {"split": Split, "stream": Stream, "dot": Dot}[config["kernel"]]
    return form(element, k, **{name: value for name, value in config.items() if name != "kernel"})


@dataclass(frozen=True)
class Program:
    """What a bundle's builder compiles: see `hdispatch.build.cutedsl_backend`."""

    host: Callable[..., None]
    arguments: dict[str, Any]
    largest_m: int
    shared_bytes: int
    multiples: dict[str, int]
    views: dict[str, list[int]]


#: What ll_gemm_fp8 calls its tensors; ll_gemm_bf16 has the first three.
NAMES = ("out", "x", "w", "x_scale", "w_scale")


def program(
    element: type[Numeric],
    out: type[Numeric],
    sizes: Mapping[str, int],
    config: Mapping[str, Any],
    names: tuple[str, ...] = NAMES,
    transposed: bool = False,
) -> Program:
    """The host function of a config, for any M and N, and any K unless `sizes` has it.

    names       what the op calls out, x, w and the scales
    transposed  whether the op's weights are [K, N], columns contiguous
    """
    gemm = make(element, sizes.get("K"), config)
    m, n = cute.sym_int(), cute.sym_int()
    k = sizes.get("K") or cute.sym_int(divisibility=gemm.vector)

    def matrix(kind: type[Numeric], shape: tuple[Any, Any], divisor: int, align: int) -> Any:
        return make_fake_tensor(kind, shape, (cute.sym_int64(divisibility=divisor), 1), assumed_align=align)

    arguments = {
        names[0]: matrix(out, (m, n), 1, out.width // 8),
        names[1]: matrix(element, (m, k), gemm.vector, VECTOR),
        names[2]: matrix(element, (n, k), gemm.vector, VECTOR),
    }
    scaled = element is Float8E4M3FN
    if scaled:
        for name, size in zip(names[3:], (m, n), strict=True):
            arguments[name] = make_fake_tensor(Float32, (size,), (cute.sym_int64(),), assumed_align=4)
    arguments |= {"pdl": Int32(0), "stream": make_fake_stream()}
    if gemm.k is not None and gemm.k % gemm.vector:
        raise ValueError(f"K is {gemm.k}, no multiple of {gemm.vector} elements, which are loaded at once")
    return Program(
        host=gemm.scaled if scaled else gemm.plain,
        arguments=arguments,
        largest_m=gemm.largest_m,
        shared_bytes=gemm.shared_bytes,
        multiples=dict.fromkeys(("K", f"{names[1]}.stride(0)", f"{names[2]}.stride({int(transposed)})"), gemm.vector),
        views={names[2]: [1, 0]} if transposed else {},
    )


def split(
    warps: int, cluster: int, steps: int, rows: int = 1, columns: int = 1, depth: int = 0, trigger: int = 0
) -> dict[str, Any]:
    """A config of `Split`; without a depth the weights go straight to registers."""
    form = {"kernel": "split", "rows": rows, "columns": columns, "warps": warps, "cluster": cluster, "steps": steps}
    return form | {"depth": depth or 1, "direct": int(not depth), "trigger": trigger}


def stream(
    warps: int, steps: int, depth: int, rows: int = 1, columns: int = 1, cluster: int = 1, blocks: int = 132, trigger: int = 0
) -> dict[str, Any]:
    """A config of `Stream`."""
    form = {"kernel": "stream", "blocks": blocks, "rows": rows, "columns": columns, "warps": warps, "cluster": cluster}
    return form | {"steps": steps, "depth": depth, "trigger": trigger}


def dot(warps: int, outputs: int = 1, tokens: int = 1, trigger: int = 0) -> dict[str, Any]:
    """A config of `Dot`."""
    return {"kernel": "dot", "outputs": outputs, "tokens": tokens, "warps": warps, "trigger": trigger}


def columns_for(m: int) -> int:
    """The columns of a config that takes m tokens: 1, 2 or 4."""
    return 1 if m <= COLUMNS else 2 if m <= 2 * COLUMNS else 4

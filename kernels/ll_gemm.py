"""The CuteDSL kernels of ll_gemm_bf16 and ll_gemm_fp8: few tokens times a matrix of weights, as fast as the weights stream.

Two forms. `Split` multiplies in the tensor core and cuts K over the warps of a block and the blocks of a cluster; `Dot`
gives a block a few outputs and all of K, multiplies in the ordinary cores and serves the fewest tokens. In both a thread
copies, through shared memory of its own, just what it multiplies: the copies are asynchronous and many, and there is nothing
to wait for but they themselves. The first weights are under way before the predecessor's results are asked for.

Imports cutlass, which reads CUTE_DSL_ARCH as it is imported: import this module after it is set.
"""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass import BFloat16, Boolean, Constexpr, Float8E4M3FN, Float16, Float32, Int32, Int64, Numeric, cute
from cutlass.cute.nvgpu import cpasync, warp
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
    piece    elements of K that a thread's warp or block takes at once, of which this form's threads begin `spread` apart
    depth    pieces that are under way while one is multiplied
    """

    threads: int
    cluster = 1

    def __init__(self, element: type[Numeric], k: int | None, stride: int, depth: int) -> None:
        self.element, self.k = element, k
        self.size = element.width // 8
        self.vector = VECTOR // self.size
        #: Elements of K that all threads which share outputs take in one turn.
        self.stride = stride
        self.turns = None if k is None else -(-k // stride)
        self.depth = depth if self.turns is None else min(depth, self.turns)
        #: A piece is copied where none has been read since the last turn.
        self.slots = self.depth + 1 if self.turns is None else min(self.depth + 1, self.turns)
        #: Whether the last turn is past the end of a row for some threads.
        self.ragged = k is None or k % stride != 0

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

    def ring(self, shared: SmemAllocator, vectors: int) -> cute.Tensor:
        """Shared memory for pieces of `vectors` vectors: the calling thread's elements [in a vector, vector, slot]."""
        tid, _, _ = cute.arch.thread_idx()
        start = shared.allocate_array(self.element, self.vector * self.threads * vectors * self.slots, byte_alignment=VECTOR)
        # Threads side by side have their vectors side by side: no bank is asked twice.
        whole = self.vector * self.threads
        layout = cute.make_layout((self.vector, vectors, self.slots), stride=(1, whole, whole * vectors))
        return cute.make_tensor((start + tid * self.vector).align(VECTOR), layout)

    @cute.jit
    def fetch(self, row: Any, at: Int32, k: Int32, into: cute.Tensor, check: Constexpr) -> None:
        """Begins to copy the vector at an offset of a row; zeros where `check` and it is past the row's end."""
        atom = cute.make_copy_atom(
            cpasync.CopyG2SOp(cache_mode=cpasync.LoadCacheMode.GLOBAL), self.element, num_bits_per_copy=8 * VECTOR
        )
        source = cute.make_tensor((row + at).align(VECTOR), cute.make_layout((self.vector, 1)))
        target = cute.make_tensor(into.iterator.align(VECTOR), cute.make_layout((self.vector, 1)))
        if cutlass.const_expr(check):
            within = cute.make_rmem_tensor((1,), Boolean)
            within[0] = at < k
            whole = cute.make_tensor(within.iterator, cute.make_layout((self.vector, 1), stride=(0, 0)))
            cute.copy(atom, source, target, pred=whole)
        else:
            cute.copy(atom, source, target)


class Split(Gemm):
    """The tensor core's form: a tile of 16 * rows weights, 8 * columns tokens and a piece of K per warp.

    rows      16-row tiles of weights per block
    columns   8-column tiles of tokens: 8 * columns is the largest M
    warps     warps of a block, each with its own pieces of K
    cluster   blocks that share a tile, each with its own pieces of K; divides 16 * rows
    steps     64-byte steps of a row in a piece

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
    ) -> None:
        self.step = 8 * STEP // element.width
        super().__init__(element, k, self.step * steps * warps * cluster, depth)
        self.rows, self.columns, self.warps, self.cluster, self.steps = rows, columns, warps, cluster, steps
        self.threads = 32 * warps
        if ROWS * rows % cluster:
            raise ValueError(f"{cluster} blocks cannot share {ROWS * rows} rows evenly")
        #: Outputs of a tile that each block of its cluster sums up, and the distance of tokens in shared memory: lanes that
        #: write at once meet different banks.
        self.own = ROWS * rows // cluster
        self.pitch = self.own + 4 if self.own >= ROWS else self.own
        self.tokens = COLUMNS * columns
        self.parts = warps * cluster

    def grid(self, n: Int32) -> list[Any]:
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
        elements = self.ring(shared, (2 * self.rows + self.columns) * self.steps)
        parts = shared.allocate_array(Int32, self.parts * self.tokens * self.pitch, byte_alignment=VECTOR)
        arrived = shared.allocate_array(Int64, 1, byte_alignment=8)
        if cutlass.const_expr(self.cluster > 1):
            self.expect(arrived, tid, m)

        # Rows past the last are read as the last; what comes of them is not stored.
        w_rows = [w[(cutlass.min(first_n + group + 8 * row, n - 1), None)].iterator for row in range(2 * self.rows)]
        x_rows = [x[(cutlass.min(group + 8 * row, m - 1), None)].iterator for row in range(self.columns)]
        begin = (rank * self.warps + warp_index) * (self.step * self.steps) + quad * self.vector
        for turn in cutlass.range_constexpr(self.depth):
            self.fetch_rows(w_rows, begin + turn * self.stride, k, elements[(None, None, turn)], 0, turn)
        cute.arch.griddepcontrol_wait()
        # Dependents wait for all of this kernel anyway; started now, they can copy weights of their own.
        cute.arch.griddepcontrol_launch_dependents()
        for turn in cutlass.range_constexpr(self.depth):
            self.fetch_rows(x_rows, begin + turn * self.stride, k, elements[(None, None, turn)], len(w_rows), turn)
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
                self.multiply(acc, elements[(None, None, turn % self.slots)])
                ahead = turn + self.depth
                if cutlass.const_expr(ahead < self.turns):
                    slot = elements[(None, None, ahead % self.slots)]
                    self.fetch_rows(w_rows, begin + ahead * self.stride, k, slot, 0, ahead)
                    self.fetch_rows(x_rows, begin + ahead * self.stride, k, slot, len(w_rows), ahead)
                cute.arch.cp_async_commit_group()
        else:
            for turn in cutlass.range(cute.ceil_div(k, self.stride), unroll=1):
                cute.arch.cp_async_wait_group(self.depth - 1)
                self.multiply(acc, elements[(None, None, turn % self.slots)])
                ahead = turn + self.depth
                slot = elements[(None, None, ahead % self.slots)]
                self.fetch_rows(w_rows, begin + ahead * self.stride, k, slot, 0, None)
                self.fetch_rows(x_rows, begin + ahead * self.stride, k, slot, len(w_rows), None)
                cute.arch.cp_async_commit_group()

        acc[0].store(acc[0].load() + acc[1].load())
        self.share(acc[0], parts, arrived, group, quad, rank * self.warps + warp_index, m)
        sums = cute.make_tensor(
            cute.recast_ptr(parts, dtype=Float32),
            cute.make_layout((self.tokens, self.own, self.parts), stride=(self.pitch, 1, self.tokens * self.pitch)),
        )
        for i in cutlass.range_constexpr(cute.size(scales)):
            token, column = (tid + i * self.threads) // self.own, (tid + i * self.threads) % self.own
            row = first_n + rank * self.own + column
            if token < m and row < n and token < self.tokens:
                total = sums[token, column, 0]
                for part in cutlass.range_constexpr(1, self.parts):
                    total = total + sums[token, column, part]
                out[token, row] = (total * scales[i]).to(out.element_type)

    @cute.jit
    def fetch_rows(self, rows: list, begin: Int32, k: Int32, slot: cute.Tensor, first: Constexpr, turn: Constexpr) -> None:
        """Begins to copy a piece of these rows to a slot's vectors from the first * steps-th on."""
        check = self.may_pass(turn)
        for row in cutlass.range_constexpr(len(rows)):
            for step in cutlass.range_constexpr(self.steps):
                vector = slot[(None, (first + row) * self.steps + step)]
                self.fetch(rows[row], begin + step * self.step, k, vector, check)

    @cute.jit
    def multiply(self, acc: list, slot: cute.Tensor) -> None:
        """Adds the products of a piece. Hopper has no tensor core for fp8 in registers: fp8 becomes float16, exactly."""
        kind = BFloat16 if self.element is BFloat16 else Float16
        atom = cute.make_mma_atom(warp.MmaF16BF16Op(kind, Float32, (16, 8, 16)))
        products = 2 * BFloat16.width // self.element.width
        for step in cutlass.range_constexpr(self.steps):
            # [a word of row i, one of row i + 8, the next two likewise; tile; product]
            weights = cute.make_rmem_tensor((4, self.rows, products), Int32)
            tokens = cute.make_rmem_tensor((2, self.columns, products), Int32)
            for row in cutlass.range_constexpr(2 * self.rows):
                words = self.halves(slot[(None, row * self.steps + step)], kind)
                for word in cutlass.range_constexpr(2 * products):
                    weights[word % 2 * 2 + row % 2, row // 2, word // 2] = words[word]
            for column in cutlass.range_constexpr(self.columns):
                words = self.halves(slot[(None, (2 * self.rows + column) * self.steps + step)], kind)
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
    def share(self, acc: cute.Tensor, parts: Any, arrived: Any, group: Int32, quad: Int32, part: Int32, m: Int32) -> None:
        """Gives each sum of a piece to the block that owns the output, and waits for what is given to this one."""
        if cutlass.const_expr(self.cluster > 1):
            cute.arch.cluster_wait()
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
            cute.arch.mbarrier_wait(arrived, 0)
        else:
            cute.arch.sync_threads()


class Dot(Gemm):
    """The form without the tensor core: a block has a few outputs and all of K, a thread a vector of every `threads`.

    outputs   rows of weights per block
    tokens    the largest M; it is cheap up to 4
    warps     warps of a block
    """

    def __init__(self, element: type[Numeric], k: int | None, outputs: int, tokens: int, warps: int, depth: int) -> None:
        self.threads = 32 * warps
        super().__init__(element, k, 8 * VECTOR // element.width * self.threads, depth)
        self.outputs, self.tokens, self.warps = outputs, tokens, warps

    def grid(self, n: Int32) -> list[Any]:
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
        m, n, k = x.shape[0], w.shape[0], w.shape[1]
        first_n = tile * self.outputs
        shared = SmemAllocator()
        elements = self.ring(shared, self.outputs + self.tokens)
        w_rows = [w[(cutlass.min(first_n + row, n - 1), None)].iterator for row in range(self.outputs)]
        x_rows = [x[(cutlass.min(row, m - 1), None)].iterator for row in range(self.tokens)]
        begin = tid * self.vector
        for turn in cutlass.range_constexpr(self.depth):
            self.fetch_rows(w_rows, begin + turn * self.stride, k, elements[(None, None, turn)], 0, turn)
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        for turn in cutlass.range_constexpr(self.depth):
            self.fetch_rows(x_rows, begin + turn * self.stride, k, elements[(None, None, turn)], self.outputs, turn)
            cute.arch.cp_async_commit_group()
        # Thread i sums up output i % outputs of token i // outputs.
        scale = Float32(1.0)
        token, column = tid // self.outputs, tid % self.outputs
        if cutlass.const_expr(x_scale is not None):
            scale = x_scale[cutlass.min(token, m - 1)] * w_scale[cutlass.min(first_n + column, n - 1)]

        acc = cute.make_rmem_tensor((self.outputs, self.tokens), Float32)
        acc.fill(0.0)
        if cutlass.const_expr(self.turns is not None and self.turns <= UNROLLED):
            for turn in cutlass.range_constexpr(self.turns):
                cute.arch.cp_async_wait_group(self.depth - 1)
                self.multiply(acc, elements[(None, None, turn % self.slots)])
                ahead = turn + self.depth
                if cutlass.const_expr(ahead < self.turns):
                    slot = elements[(None, None, ahead % self.slots)]
                    self.fetch_rows(w_rows, begin + ahead * self.stride, k, slot, 0, ahead)
                    self.fetch_rows(x_rows, begin + ahead * self.stride, k, slot, self.outputs, ahead)
                cute.arch.cp_async_commit_group()
        else:
            for turn in cutlass.range(cute.ceil_div(k, self.stride), unroll=1):
                cute.arch.cp_async_wait_group(self.depth - 1)
                self.multiply(acc, elements[(None, None, turn % self.slots)])
                ahead = turn + self.depth
                slot = elements[(None, None, ahead % self.slots)]
                self.fetch_rows(w_rows, begin + ahead * self.stride, k, slot, 0, None)
                self.fetch_rows(x_rows, begin + ahead * self.stride, k, slot, self.outputs, None)
                cute.arch.cp_async_commit_group()

        start = shared.allocate_array(Float32, self.outputs * self.tokens * self.warps, byte_alignment=4)
        sums = cute.make_tensor(start, cute.make_layout((self.outputs, self.tokens, self.warps)))
        for output in cutlass.range_constexpr(self.outputs):
            for row in cutlass.range_constexpr(self.tokens):
                total = cute.arch.warp_reduction_sum(acc[output, row])
                if tid % 32 == 0:
                    sums[output, row, warp_index] = total
        cute.arch.sync_threads()
        if token < m and token < self.tokens and first_n + column < n:
            total = sums[column, token, 0]
            for part in cutlass.range_constexpr(1, self.warps):
                total = total + sums[column, token, part]
            out[token, first_n + column] = (total * scale).to(out.element_type)

    @cute.jit
    def fetch_rows(self, rows: list, begin: Int32, k: Int32, slot: cute.Tensor, first: Constexpr, turn: Constexpr) -> None:
        """Begins to copy a vector of each of these rows to a slot's vectors from the first on."""
        check = self.may_pass(turn)
        for row in cutlass.range_constexpr(len(rows)):
            self.fetch(rows[row], begin, k, slot[(None, first + row)], check)

    @cute.jit
    def multiply(self, acc: cute.Tensor, slot: cute.Tensor) -> None:
        """Adds the products of a piece."""
        tokens = [slot[(None, self.outputs + row)].load().to(Float32) for row in range(self.tokens)]
        for output in cutlass.range_constexpr(self.outputs):
            weights = slot[(None, output)].load().to(Float32)
            for row in cutlass.range_constexpr(self.tokens):
                for i in cutlass.range_constexpr(self.vector):
                    acc[output, row] = acc[output, row] + weights[i] * tokens[row][i]

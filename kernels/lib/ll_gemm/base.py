"""What the forms of the low-latency GEMMs have in common: see program.py."""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass import Boolean, Constexpr, Float32, Int32, Numeric, cute
from cutlass._mlir import ir
from cutlass.cute.nvgpu import cpasync
from cutlass.utils import SmemAllocator

#: Bytes that a thread copies at once.
VECTOR = 16


class Gemm:
    """out = x @ w.T, times a scale per token and per output where there are scales, plus a bias per output where there is one.

    element  BFloat16 or Float8E4M3FN, of x and w
    k        the size of K that is compiled in, or None
    stride   elements of K that all threads which share outputs take in one turn
    depth    turns whose copies are under way while one is multiplied
    trigger  when the next kernel may begin: 0 at once, 1 when the one before this has ended, 2 when all is loaded

    With 0 the kernels after the next may start too, so that several prefetch their weights; but in long chains their blocks can
    pile up on some SMs. Between kernels that wait before they release, 0 and 1 are the same.

    Rows of x and w begin at multiples of 16 bytes, and K is a multiple of 16 bytes.
    """

    threads: int
    cluster = 1
    #: Of what number of elements the row stride of out is a multiple.
    out_vector = 1
    #: Whether there is a scale per 128 of K, as `scaled_mm_blockwise` has them, and not one per row.
    grouped = False

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

    def scale_shapes(self, m: Any, n: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The shapes of x_scale and w_scale."""
        return (m,), (n,)

    def may_pass(self, turn: int | None) -> bool:
        """Whether a turn may begin past the end of a row; None for any turn of a loop."""
        return turn is None or self.turns is None or (self.ragged and turn == self.turns - 1)

    @cute.jit
    def scaled(
        self, out: cute.Tensor, x: cute.Tensor, w: cute.Tensor, x_scale: cute.Tensor, w_scale: cute.Tensor, pdl: Int32,
        stream: Any,
    ) -> None:  # fmt: skip
        """The host function with scales. pdl: 1 if the launch may begin before its predecessor has ended."""
        self.launch(out, x, w, x_scale, w_scale, None, pdl, stream)

    @cute.jit
    def biased(
        self, out: cute.Tensor, x: cute.Tensor, w: cute.Tensor, x_scale: cute.Tensor, w_scale: cute.Tensor,
        bias: cute.Tensor, pdl: Int32, stream: Any,
    ) -> None:  # fmt: skip
        """The host function with scales and a bias per output. pdl as in `scaled`."""
        self.launch(out, x, w, x_scale, w_scale, bias, pdl, stream)

    @cute.jit
    def plain(self, out: cute.Tensor, x: cute.Tensor, w: cute.Tensor, pdl: Int32, stream: Any) -> None:
        """The host function without scales. pdl as in `scaled`."""
        self.launch(out, x, w, None, None, None, pdl, stream)

    @cute.jit
    def launch(
        self, out: cute.Tensor, x: cute.Tensor, w: cute.Tensor, x_scale: cute.Tensor | None, w_scale: cute.Tensor | None,
        bias: cute.Tensor | None, pdl: Int32, stream: Any,
    ) -> None:  # fmt: skip
        """Launches the kernel."""
        self.kernel(out, x, w, x_scale, w_scale, bias).launch(
            grid=self.grid(w.shape[0]),
            block=[self.threads, 1, 1],
            cluster=[1, self.cluster, 1],
            stream=stream,
            use_pdl=pdl,
        )

    @cute.jit
    def put(self, out: cute.Tensor, token: Int32, column: Int32, value: Float32, bias: Any) -> None:
        """Stores an output, with its bias."""
        if cutlass.const_expr(bias is not None):
            value = value + bias[column].to(Float32)
        out[token, column] = value.to(out.element_type)

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

"""The dot form of the low-latency GEMMs: a block has a few outputs and all of K, multiplied in the ordinary cores.

See program.py for what all forms have in common.
"""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass import Float32, Int32, Numeric, cute
from cutlass.utils import SmemAllocator

from .base import VECTOR, Gemm


class Dot(Gemm):
    """The form without the tensor core: a block has a few outputs and all of K, a thread a vector of every `threads`.

    Everything goes into registers at once: K is compiled in, and a few vectors per thread.

    outputs   rows of weights per block
    tokens    the largest M; it is cheap up to 4
    warps     warps of a block
    """

    def __init__(self, element: type[Numeric], k: int | None, outputs: int, tokens: int, warps: int, trigger: int = 2) -> None:
        if k is None:
            raise ValueError("the dot form takes a K that is compiled in")
        self.threads = 32 * warps
        super().__init__(element, k, 8 * VECTOR // element.width * self.threads, 1, trigger)
        self.outputs, self.tokens, self.warps = outputs, tokens, warps
        if outputs * tokens > self.threads:
            raise ValueError(f"{outputs} outputs of {tokens} tokens are more than {self.threads} threads")

    @property
    def largest_m(self) -> int:
        """See `Gemm`."""
        return self.tokens

    @property
    def shared_bytes(self) -> int:
        """See `Gemm`."""
        return 8 * self.threads + 4 * self.outputs * self.tokens * self.warps

    def grid(self, n: Int32) -> list[Any]:
        """See `Gemm`."""
        return [cute.ceil_div(n, self.outputs), 1, 1]

    @cute.kernel
    def kernel(
        self, out: cute.Tensor, x: cute.Tensor, w: cute.Tensor, x_scale: cute.Tensor | None, w_scale: cute.Tensor | None,
        bias: cute.Tensor | None,
    ) -> None:  # fmt: skip
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
        if cutlass.const_expr(w_scale is not None):
            scales = shared.allocate_array(Float32, 2 * self.threads, byte_alignment=4) + tid
            self.fetch_scale(w_scale, cutlass.min(first_n + column, n - 1), scales)
        self.await_predecessor()
        if cutlass.const_expr(x_scale is not None):
            self.fetch_scale(x_scale, cutlass.min(token, m - 1), scales + self.threads)
        cute.arch.cp_async_commit_group()
        for row in cutlass.range_constexpr(self.tokens):
            start = x[(cutlass.min(row, m - 1), None)].iterator
            for turn in cutlass.range_constexpr(self.turns):
                self.load(start, tid * self.vector + turn * self.stride, tokens[(None, turn, row)], turn, False)
        acc = cute.make_rmem_tensor((self.outputs, self.tokens), Float32)
        acc.fill(0.0)
        for turn in cutlass.range_constexpr(self.turns):
            xs = [self.values(tokens[(None, turn, row)]) for row in range(self.tokens)]
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
            self.put(out, token, first_n + column, total, bias)

    def values(self, words: cute.Tensor) -> cute.TensorSSA:
        """A vector's elements as float32."""
        return cute.recast_tensor(words, self.element).load().to(Float32)

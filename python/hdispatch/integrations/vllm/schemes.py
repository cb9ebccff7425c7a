"""How a model's matrices are quantized, and which steps of a sequence serve each scheme: norms, activations, products."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ... import ops, runtime
from ...sequence import Sequence, SequenceTensor

FP8 = torch.float8_e4m3fn
GROUP = 128


@dataclass(frozen=True)
class Linear:
    """A matrix of a layer as vLLM's loader leaves it: weight, and scales if it is quantized.

    weight       [N, K] in 16 bits, or fp8 [K, N] with columns contiguous
    scale        float32: N or one element; [K/128, N/128] for blocks; None in 16 bits
    bias         [N] or None
    input_scale  float32 with one element where the inputs' scale is fixed
    """

    weight: torch.Tensor
    scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None

    @property
    def sizes(self) -> tuple[int, int]:
        """(K, N)."""
        rows, columns = self.weight.shape
        return (rows, columns) if self.weight.dtype == FP8 else (columns, rows)


@dataclass(frozen=True)
class Operand:
    """The input of a product: values [M, K], scales where they are fp8, and the 16-bit tensor they are made of, if any."""

    values: SequenceTensor
    scales: SequenceTensor | None = None
    plain: SequenceTensor | None = None


@dataclass(frozen=True)
class Norm:
    """A norm of a layer: its weight [K], epsilon, and the residual [M, K] that is added before, if any."""

    weight: torch.Tensor
    epsilon: float
    residual: SequenceTensor | None


class Scheme:
    """A way to run the parts of a layer: methods add the steps to a sequence. Subclasses name their ops."""

    name = "16 bits"
    #: Whether values are fp8, how many scales a row of `width` has, and whether a 16-bit tensor stands beside them.
    quantized = False
    #: Norms work in place in 16 bits before anything is quantized.
    norms_in_place = True

    def scale_width(self, width: int) -> int:
        """Scales of a row of `width` elements; 0: none."""
        del width
        return 0

    def norm(self, s: Sequence, x: SequenceTensor, to: Operand, norm: Norm, linear: Linear) -> None:
        """`x`, plus a residual, normalized into `to`. Where norms work in place, `x` is `to.plain` if there is a residual."""
        del linear
        norm_in_place(s, x, to.values, norm)

    def quantize(self, s: Sequence, x: SequenceTensor, to: Operand, linear: Linear) -> None:
        """The 16-bit `x` into `to`; nothing where `to` is x."""
        del s, x, to, linear

    def activate(self, s: Sequence, gate_up: SequenceTensor, to: Operand, linear: Linear) -> None:
        """silu(gate) * up into `to`."""
        del linear
        s.add(ops.silu_and_mul, to.values, gate_up)

    def product(self, s: Sequence, out: SequenceTensor, x: Operand, linear: Linear, few: bool) -> None:
        """`x` times the matrix, plus the bias, into `out` [M, N].

        few  whether the steps have at most LOW_LATENCY_ROWS rows
        """
        if few and linear.bias is None and has_row("ll_gemm_bf16", linear):
            s.add(ops.ll_gemm_bf16, out, x.values, linear.weight)
        elif linear.bias is None:
            s.add_torch(torch.ops.aten.mm.out, x.values, linear.weight.t(), out=out, by_rows=True)
        else:
            s.add_torch(torch.ops.aten.addmm.out, linear.bias, x.values, linear.weight.t(), out=out, by_rows=True)


#: Most rows that `ll_gemm_bf16` serves.
LOW_LATENCY_ROWS = 32


def has_row(op: str, linear: Linear) -> bool:
    """Whether a bundle loaded for the matrix's device has rows of the op for exactly its sizes."""
    weight, (k, n) = linear.weight, linear.sizes
    if weight.dtype != torch.bfloat16 or not weight.is_cuda:
        return False
    device = torch.cuda.current_device() if weight.device.index is None else weight.device.index
    for bundle in runtime.loaded():
        if bundle.device == device:
            return any(row["op"] == op and row["K"] == k and row["N"] == n for row in bundle.manifest["rows"])
    return False


def norm_in_place(s: Sequence, x: SequenceTensor, to: SequenceTensor, norm: Norm) -> None:
    """The 16-bit norm: of `x` into `to`, or with a residual in place in x."""
    if norm.residual is None:
        s.add(ops.rms_norm, to, x, norm.weight, norm.epsilon)
    else:
        s.add(ops.fused_add_rms_norm, x, norm.residual, norm.weight, norm.epsilon)


class StaticFp8(Scheme):
    """fp8 with one scale for all inputs of a matrix, fixed in the checkpoint."""

    name = "fp8, one fixed scale for the inputs"
    quantized = True

    def norm(self, s: Sequence, x: SequenceTensor, to: Operand, norm: Norm, linear: Linear) -> None:
        """In 16 bits, then quantized."""
        normed = x if norm.residual is not None else to.plain
        assert normed is not None
        norm_in_place(s, x, normed, norm)
        self.quantize(s, normed, to, linear)

    def quantize(self, s: Sequence, x: SequenceTensor, to: Operand, linear: Linear) -> None:
        """With the matrix's scale."""
        s.add(ops.static_scaled_fp8_quant, to.values, x, linear.input_scale)

    def activate(self, s: Sequence, gate_up: SequenceTensor, to: Operand, linear: Linear) -> None:
        """In 16 bits, then quantized."""
        assert to.plain is not None
        s.add(ops.silu_and_mul, to.plain, gate_up)
        self.quantize(s, to.plain, to, linear)

    def product(self, s: Sequence, out: SequenceTensor, x: Operand, linear: Linear, few: bool) -> None:
        """Scaled by the scale of the inputs and those of the matrix."""
        del few
        s.add(ops.scaled_mm, out, x.values, linear.weight, linear.input_scale, linear.scale, linear.bias)


class PerTokenFp8(Scheme):
    """fp8 with a scale for each row of the inputs, and one for each column of a matrix or for all of it."""

    name = "fp8, a scale per token"
    quantized = True
    norms_in_place = False

    def scale_width(self, width: int) -> int:
        """One scale a row."""
        del width
        return 1

    def norm(self, s: Sequence, x: SequenceTensor, to: Operand, norm: Norm, linear: Linear) -> None:
        """Norm and quantization in one kernel, the sum with the residual not rounded in between."""
        del linear
        s.add(ops.rms_norm_dynamic_per_token_quant, to.values, x, norm.weight, to.scales, norm.epsilon, None, norm.residual)

    def quantize(self, s: Sequence, x: SequenceTensor, to: Operand, linear: Linear) -> None:
        """Each row with its own scale."""
        del linear
        s.add(ops.dynamic_per_token_scaled_fp8_quant, to.values, x, to.scales, None)

    def activate(self, s: Sequence, gate_up: SequenceTensor, to: Operand, linear: Linear) -> None:
        """Activation and quantization in one kernel."""
        del linear
        s.add(ops.silu_and_mul_dynamic_per_token_quant, to.values, gate_up, to.scales, None)

    def product(self, s: Sequence, out: SequenceTensor, x: Operand, linear: Linear, few: bool) -> None:
        """Scaled by rows and columns."""
        del few
        s.add(ops.scaled_mm, out, x.values, linear.weight, x.scales, linear.scale, linear.bias)


class BlockFp8(Scheme):
    """fp8 with a scale for each 128 elements of a row of the inputs, and for each 128 x 128 of a matrix."""

    name = "fp8, blocks of 128 x 128"
    quantized = True
    norms_in_place = False

    def scale_width(self, width: int) -> int:
        """A scale for each 128 elements."""
        return -(-width // GROUP)

    def norm(self, s: Sequence, x: SequenceTensor, to: Operand, norm: Norm, linear: Linear) -> None:
        """Norm and quantization in one kernel, the sum with the residual not rounded in between."""
        del linear
        given = (to.values, x, norm.weight, to.scales, norm.epsilon, None, norm.residual)
        s.add(ops.rms_norm_per_block_quant, *given, GROUP, True)

    def quantize(self, s: Sequence, x: SequenceTensor, to: Operand, linear: Linear) -> None:
        """Each group of 128 with its own scale."""
        del linear
        s.add(ops.per_token_group_fp8_quant, x, to.values, to.scales, GROUP, 1e-10, -448.0, 448.0, False, True, False)

    def activate(self, s: Sequence, gate_up: SequenceTensor, to: Operand, linear: Linear) -> None:
        """Activation and quantization in one kernel."""
        del linear
        s.add(ops.silu_and_mul_per_block_quant, to.values, gate_up, to.scales, GROUP, None, True)

    def product(self, s: Sequence, out: SequenceTensor, x: Operand, linear: Linear, few: bool) -> None:
        """Scaled by blocks; a bias is added after rounding, as vLLM does."""
        del few
        s.add(ops.scaled_mm_blockwise, out, x.values, linear.weight, x.scales, linear.scale)
        if linear.bias is not None:
            s.add_torch(torch.ops.aten.add_.Tensor, out, linear.bias, by_rows=True)

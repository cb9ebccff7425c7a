"""Numeric comparison for tests: fp8 codes, row scales, everything else by dtype; and poison, to see that outputs are written.

Every function raises `MismatchError`, an `AssertionError`, whose message holds counts, the first mismatch and its values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import HdispatchError
from ..opspec import OpSpec, Variant

#: (rtol, atol) of `assert_close_by_dtype`: a few units in the last place of each dtype.
TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (2e-6, 1e-6),
    torch.float16: (2e-3, 1e-4),
    torch.bfloat16: (1.6e-2, 1e-4),
}


class MismatchError(AssertionError):
    """Two tensors differ by more than is allowed, or an output still holds poison."""


#: Relative error in the Frobenius norm that outputs may have, by dtype.
NORM_ERRORS: dict[torch.dtype, float] = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 4e-3}


def compare_fp8(actual: torch.Tensor, expected: torch.Tensor, min_equal: float = 0.999) -> float:
    """Compare two float8_e4m3fn tensors of one shape bit by bit and return the share of elements that are equal.

    Raises `MismatchError` if that share is below `min_equal`, if any element is more than one code away (of 253 values;
    -0 and 0 count as unequal but not as apart), or if a NaN faces a number. A share of elements one code apart is expected
    of two correct computations: their last bits differ, and some quotients lie next to a tie.
    """
    _check_alike(actual, expected)
    if actual.dtype != torch.float8_e4m3fn:
        raise MismatchError(f"expected float8_e4m3fn, found {actual.dtype}")
    got, want = (t.detach().contiguous().view(torch.uint8).to(torch.int16) for t in (actual, expected))
    unequal = got != want
    count = int(unequal.sum())
    if not count:
        return 1.0
    share = 1 - count / got.numel()
    apart = (_ordinal(got) - _ordinal(want)).abs()
    got_nan, want_nan = (got & 0x7F) == 0x7F, (want & 0x7F) == 0x7F
    apart[got_nan & want_nan] = 0
    apart[got_nan != want_nan] = 1000
    worst = int(apart.max())
    if worst > 1 or share < min_equal:
        far = apart > 1 if worst > 1 else unequal
        raise MismatchError(
            f"{count} of {got.numel()} fp8 codes differ ({share:.6f} equal, at least {min_equal} wanted), "
            f"{int((apart > 1).sum())} of them by more than one code; "
            + _first(far, actual.detach().float(), expected.detach().float(), got, want)
        )
    return share


def compare_scale(
    actual: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-6, outliers: float = 0.0, outlier_rtol: float = 2**-6
) -> None:
    """Check that row scales agree to `rtol`, relative to `expected`; NaN and infinity never agree with anything.

    Where a scale is taken from values that were rounded to 16 bits, two correct computations can round the largest one
    to different neighbours, once in some ten thousand rows: at most the share `outliers` of the elements may therefore
    differ by up to `outlier_rtol`. Its default is what follows from two such roundings in a row, to bfloat16 of a quotient
    and of its product with a weight: each moves a value by one unit, 2**-7 of it at most.
    """
    _check_alike(actual, expected)
    got, want = (t.detach().double() for t in (actual, expected))
    error = (got - want).abs() / want.abs()
    error[got == want] = 0
    error[~(got.isfinite() & want.isfinite())] = float("inf")
    over = error > rtol
    if int(over.sum()) > outliers * got.numel() or bool((error > (outlier_rtol if outliers else rtol)).any()):
        raise MismatchError(
            f"{int(over.sum())} of {got.numel()} scales differ by more than {rtol:g} (share allowed to, by up to "
            f"{outlier_rtol:g}: {outliers:g}), the worst by {float(error.max()):.3g}; " + _first(over, got, want)
        )


def assert_close_by_dtype(
    actual: torch.Tensor, expected: torch.Tensor, rtol: float | None = None, atol: float | None = None
) -> None:
    """Check |actual - expected| <= atol + rtol * |expected|, by default with the `TOLERANCES` of the dtype.

    Shapes and dtypes must agree. Integers and booleans must be equal, float8_e4m3fn goes to `compare_fp8`. NaN agrees with
    NaN, an infinity with itself.
    """
    _check_alike(actual, expected)
    if actual.dtype == torch.float8_e4m3fn:
        compare_fp8(actual, expected)
        return
    default_rtol, default_atol = TOLERANCES.get(actual.dtype, (0.0, 0.0))
    rtol, atol = default_rtol if rtol is None else rtol, default_atol if atol is None else atol
    got, want = (t.detach().double() for t in (actual, expected))
    agree = ((got - want).abs() <= atol + rtol * want.abs()) | (got == want) | (got.isnan() & want.isnan())
    agree &= ~want.isinf() | (got == want)
    if not agree.all():
        raise MismatchError(
            f"{int((~agree).sum())} of {got.numel()} elements of {actual.dtype} differ (rtol {rtol:g}, atol {atol:g}), "
            f"the worst by {float((got - want).abs().nan_to_num(float('inf')).max()):.6g}; " + _first(~agree, got, want)
        )


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill `tensor` in place with what no correct result holds, NaN or the least integer, and return it."""
    if tensor.dtype == torch.float8_e4m3fn:
        tensor.view(torch.uint8).fill_(0x7F)
    elif tensor.dtype.is_floating_point:
        tensor.fill_(float("nan"))
    else:
        tensor.fill_(torch.iinfo(tensor.dtype).min)
    return tensor


def assert_no_poison(tensor: torch.Tensor, name: str = "tensor") -> None:
    """Check that no element of `tensor` holds what `poison` writes; the message calls it `name`."""
    if tensor.dtype == torch.float8_e4m3fn:
        left = (tensor.detach().contiguous().view(torch.uint8) & 0x7F) == 0x7F
    elif tensor.dtype.is_floating_point:
        left = tensor.detach().isnan()
    else:
        left = tensor.detach() == torch.iinfo(tensor.dtype).min
    if left.any():
        at = tuple(left.nonzero()[0].tolist())
        raise MismatchError(f"{int(left.sum())} of {left.numel()} elements of {name} hold poison, the first at {at}")


def _ordinal(code: torch.Tensor) -> torch.Tensor:
    """Position of an e4m3 code among the values in ascending order, 0 for both zeros."""
    magnitude = code & 0x7F
    return torch.where(code >= 0x80, -magnitude, magnitude)


def _check_alike(actual: torch.Tensor, expected: torch.Tensor) -> None:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise MismatchError(f"found {actual.dtype} {list(actual.shape)}, expected {expected.dtype} {list(expected.shape)}")


def _first(where: torch.Tensor, *values: torch.Tensor) -> str:
    """`first at (i, j): found …, expected …`, with the fp8 codes where they are given too."""
    at = tuple(where.nonzero()[0].tolist())
    found, expected, *codes = (value[at].item() for value in values)
    text = f"first at {at}: found {found:.9g}, expected {expected:.9g}"
    return text + (f" (codes {codes[0]:#04x}, {codes[1]:#04x})" if codes else "")


def compare_outputs(spec: OpSpec, variant: Variant, got: Sequence[Any], want: Sequence[Any], min_equal: float = 0.999) -> None:
    """Check every tensor that an op writes, in two lists of its arguments after the call: `want` is the reference's.

    fp8 codes: `compare_fp8` with `min_equal`. float32 is taken for scales: `compare_scale`, a thousandth of them (at least
    one) allowed to be outliers where the inputs have 16 bits. 16-bit floats, and float32 of ops whose spec has
    `accumulation`: within two roundings, or where sums cancel within as much of the tensor's root mean square (of the row's,
    where that is more and the spec has `own_scales`), and the whole within NORM_ERRORS in the Frobenius norm; to both is
    added what the spec says of the kernels' `accumulation`. Everything
    else is equal.
    """
    narrow = any(dtype.itemsize == 2 and dtype.is_floating_point for dtype in variant.dtypes.values())
    lost = spec.accumulation * _bound_size(spec, want, spec.summed) ** 0.5 if spec.accumulation else 0.0
    for arg, actual, expected in zip(spec.args, got, want, strict=True):
        if getattr(arg, "mutated", False) and expected is not None:
            try:
                _compare_output(actual, expected, narrow, lost, min_equal, spec.own_scales)
            except MismatchError as error:
                raise MismatchError(f"{arg.name}: {error}") from None


def _bound_size(spec: OpSpec, args: Sequence[Any], symbol: str) -> int:
    """A size of a call, from the tensor that gives it."""
    binder = spec.binder(symbol)
    if binder is None:
        raise HdispatchError(f"{spec.name} has no size {symbol}, which its accumulation is about; name the size that is summed")
    arg, dim = binder
    return int(args[spec.args.index(arg)].size(dim))


def _compare_output(
    actual: torch.Tensor, expected: torch.Tensor, narrow: bool, lost: float, min_equal: float, own_scales: bool
) -> None:
    if not expected.numel():
        _check_alike(actual, expected)
    elif expected.dtype == torch.float8_e4m3fn:
        compare_fp8(actual, expected, min_equal)
    elif expected.dtype == torch.float32 and not lost:
        compare_scale(actual, expected, outliers=max(1e-3, 1 / expected.numel()) if narrow else 0.0)
    elif expected.dtype in NORM_ERRORS:
        _compare_rounded(actual, expected, lost, own_scales)
    else:
        assert_close_by_dtype(actual, expected)


def _compare_rounded(actual: torch.Tensor, expected: torch.Tensor, lost: float, own_scales: bool) -> None:
    """`lost` is the root mean square of the error that is allowed besides rounding, relative to the output's."""
    _check_alike(actual, expected)
    got, want = (t.detach().float() for t in (actual, expected))
    size = float(torch.linalg.vector_norm(want, dtype=torch.float64))
    error = (got - want).abs_()
    rtol, _ = TOLERANCES[expected.dtype]
    # Rows and columns may have scales of their own: the largest element, some four times the root mean square where scales
    # are large, says what is lost there; twice that is eight standard deviations. A large sum S loses more than others. A
    # tensor core drops bits toward zero, of units of at most 2**-13 of the sum so far, which on the way to S is S * t / K: over
    # K products a standard deviation of at most 2**-13 * |S| * sqrt(K) / 3 = 1.6 * lost * |S|, and, as more of the products
    # have the sign of S, a mean of at most 0.75 * z * lost * |S| where S is z times as large as sums are. Units are half of
    # that on average: simulated for K = 25600, sums of z = 5 lose 1.5 * lost * |S|, give or take 0.75. Twice lost * |S|
    # is allowed for it. A kernel that keeps fewer bits fails by the norm.
    scale = torch.tensor(size / want.numel() ** 0.5, device=want.device)
    if own_scales:
        scale = torch.maximum(scale, torch.linalg.vector_norm(want, dim=-1, keepdim=True) / want.size(-1) ** 0.5)
    slack = rtol * scale
    if lost:
        slack = slack + 2 * lost * (want.abs().max() + want.abs())
    over = error > rtol * want.abs() + slack
    over |= got.isfinite() != want.isfinite()
    if over.any():
        raise MismatchError(
            f"{int(over.sum())} of {got.numel()} elements of {actual.dtype} differ by more than two roundings, "
            f"the worst by {float(error.nan_to_num(float('inf')).max()):.6g}; " + _first(over, got, want)
        )
    relative = float(torch.linalg.vector_norm(error, dtype=torch.float64)) / max(size, 1e-30)
    if not relative <= (limit := math.hypot(NORM_ERRORS[expected.dtype], lost)):
        raise MismatchError(f"the relative error in the Frobenius norm is {relative:.3g}; at most {limit:.3g} is allowed")

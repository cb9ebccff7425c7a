"""Comparing an op's outputs with the reference's: by roundings and norm, by codes, exactly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hdispatch.errors import HdispatchError
from hdispatch.opspec import OpSpec, TensorArg
from hdispatch.testing import numeric


def outputs(dtype: torch.dtype) -> tuple[OpSpec, torch.Tensor]:
    spec = OpSpec(
        name="toy_compare",
        args=(TensorArg("out", ("M", "K"), (dtype,), mutated=True), TensorArg("x", ("M", "K"), (torch.bfloat16,))),
        reference=lambda *_args: None,
        sample=lambda *_args: [],
        shapes=({"K": 64},),
        config_key={"width": "K", "rows": "M"},
    )
    return spec, torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)


def compare(spec: OpSpec, got: torch.Tensor, want: torch.Tensor) -> None:
    numeric.compare_outputs(spec, spec.variants()[0], [got, None], [want, None])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_compared_by_roundings_and_norm(dtype):
    spec, want = outputs(dtype)
    eps = torch.finfo(dtype).eps
    other = want.clone()
    other[::4] = (want[::4].float() * (1 + eps / 2)).to(dtype)
    compare(spec, other, want)
    small = want.clone()
    small[0, 0] += 0.5 * eps  # cancelled to nearly nothing: what counts is the tensor's magnitude
    compare(spec, small, want)
    for index, value in (((3, 4), 1.0), ((0, 0), float("nan"))):
        bad = want.clone()
        bad[index] += value
        with pytest.raises(numeric.MismatchError, match="out: 1 of 4096 elements"):
            compare(spec, bad, want)
    if dtype == torch.bfloat16:
        with pytest.raises(numeric.MismatchError, match="relative error in the Frobenius norm"):
            compare(spec, (want.float() * 1.01).to(dtype), want)


def test_rows_may_have_scales_of_their_own():
    spec, want = outputs(torch.bfloat16)
    want[1:] /= 32
    want[0, 0] = 0.002
    other = want.clone()
    other[0, 0] += torch.finfo(torch.bfloat16).eps
    with pytest.raises(numeric.MismatchError, match="1 of 4096"):
        compare(spec, other, want)
    spec = replace(spec, own_scales=True)
    compare(spec, other, want)
    other[1, 0] += torch.finfo(torch.bfloat16).eps
    with pytest.raises(numeric.MismatchError, match="1 of 4096"):
        compare(spec, other, want)


def test_scales_may_have_a_few_outliers():
    spec, want = outputs(torch.float32)
    want = want.abs() + 1
    one = want.clone()
    one[0, 0] *= 1 + 2**-8
    compare(spec, one, want)
    one[:2] *= 1 + 2**-8
    with pytest.raises(numeric.MismatchError, match="scales differ"):
        compare(spec, one, want)


def test_integers_are_equal():
    spec, want = outputs(torch.float32)
    spec = replace(spec, args=(TensorArg("out", ("M", "K"), (torch.int32,), mutated=True), spec.args[1]))
    want = want.to(torch.int32)
    compare(spec, want.clone(), want)
    with pytest.raises(numeric.MismatchError, match="out: "):
        compare(spec, want + 1, want)


def tensor_core(a: torch.Tensor, b: torch.Tensor, bits: int) -> torch.Tensor:
    """a @ b, 32 products at a time, keeping `bits` after the binary point of the largest of these and the sum so far."""
    total = torch.zeros(a.size(0), b.size(1))
    for k in range(0, a.size(1), 32):
        products = a[:, k : k + 32, None] * b[None, k : k + 32]
        largest = torch.maximum(products.abs().amax(1), total.abs())
        unit = torch.exp2(torch.frexp(largest)[1] - 1.0 - bits)
        total = ((products / unit[:, None]).trunc().sum(1) + (total / unit).trunc()) * unit
    return total


def test_large_sums_may_lose_more_in_a_tensor_core():
    k, count = 25600, 32
    spec, _ = outputs(torch.float16)
    args = (TensorArg("out", ("M", "N"), (torch.float16,), mutated=True), TensorArg("x", ("M", "K"), (torch.bfloat16,)))
    spec = replace(spec, args=args, accumulation=2.6e-5)
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(k, count, generator=generator) for _ in range(2))
    a[:, :12] += 5 / k**0.5 * b[:, :12]  # 12 sums, some five times as large as sums are
    a, b = ((100 * x).to(torch.float8_e4m3fn).float() for x in (a.t(), b))
    exact, hopper, coarser = ((found / 1e6).half() for found in (a @ b, tensor_core(a, b, 13), tensor_core(a, b, 12)))
    assert float(((hopper - exact).abs() / exact.abs()).flatten()[:: count + 1][:12].max()) > 0.01
    wrong = exact.clone()
    wrong[20, 3] += 0.02 * exact.abs().max()
    variant = spec.variants()[0]
    numeric.compare_outputs(spec, variant, [hopper, a], [exact, a])
    for bad, why in ((coarser, "norm is 0.00"), (wrong, "out: 1 of 1024 elements")):
        with pytest.raises(numeric.MismatchError, match=why):
            numeric.compare_outputs(spec, variant, [bad, a], [exact, a])


def test_float32_sums_of_another_order_agree():
    """Over the size that the spec names; without it float32 is a scale, of which no bits may be lost where sums cancel."""
    spec, _ = outputs(torch.float32)
    args = (TensorArg("out", ("M", "N"), (torch.float32,), mutated=True), TensorArg("x", ("M", "A", "N"), (torch.float32,)))
    spec = replace(spec, args=args, accumulation=1e-7, summed="A")
    x = torch.randn(8, 640, 256, generator=torch.Generator().manual_seed(2))
    forward, exact = torch.zeros(8, 256), x.double().sum(1).float()
    for index in range(x.size(1)):
        forward += x[:, index]
    assert float(((forward - exact) / exact).abs().max()) > 1e-5
    variant = spec.variants()[0]
    numeric.compare_outputs(spec, variant, [forward, x], [exact, x])
    with pytest.raises(numeric.MismatchError, match="scales differ"):
        numeric.compare_outputs(replace(spec, accumulation=0.0), variant, [forward, x], [exact, x])
    with pytest.raises(numeric.MismatchError, match="out: "):
        numeric.compare_outputs(spec, variant, [exact + 0.01 * exact.abs().max(), x], [exact, x])
    with pytest.raises(HdispatchError, match="has no size K, which its accumulation is about"):
        numeric.compare_outputs(replace(spec, summed="K"), variant, [exact, x], [exact, x])

"""How exact the low-latency GEMMs are: in the Frobenius norm, against the float32 product and cuBLAS; the largest logit."""

from __future__ import annotations

import hdispatch
import pytest
import torch

from .test_ops import OPS, copy, make, sizes_of, spec_of

#: Of outputs in 16 bits, which are rounded once; what float32 outputs lose is the order of the sum.
ERRORS = {torch.bfloat16: 4e-3, torch.float32: 1e-4}
#: cuBLAS's error times this is the most.
CUBLAS = 1.1
#: Ragged in every size: a last turn that is not whole, outputs that are no tile's, tokens that are no bucket's edge.
RAGGED = ({"K": 1040, "N": 80}, {"K": 4112, "N": 1552}, {"K": 64, "N": 16})

CASES = [
    pytest.param(op, variant.name, sizes, id=f"{op}-{variant.name}-{sizes['K']}x{sizes['N']}")
    for op in OPS
    if op in ("ll_gemm_bf16", "ll_gemm_fp8")
    for variant in spec_of(op).served_variants()
    for sizes in (*(sizes_of(spec_of(op), shape) for shape in spec_of(op).shapes), *RAGGED)
]


def error(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize(("op", "variant", "sizes"), CASES)
def test_errors(bundle, op, variant, sizes):
    spec = spec_of(op)
    for m in (1, 2, 3, 4, 8, 9, 16, 17, 32):
        args = make(op, variant, sizes, m, seed=m)
        cublas, exact = copy(args), copy(args)
        exact[0] = torch.empty_like(exact[0], dtype=torch.float32)
        with hdispatch.strict():
            getattr(hdispatch.ops, op)(*args)
        spec.fallback_function(*cublas)
        spec.reference(*exact)
        ours, theirs = error(args[0], exact[0]), error(cublas[0], exact[0])
        assert ours <= ERRORS[args[0].dtype], f"M={m}: {ours:.3g}"
        assert args[0].dtype == torch.float32 or ours <= CUBLAS * theirs, f"M={m}: {ours:.3g}, cuBLAS {theirs:.3g}"


@pytest.mark.parametrize("op", sorted({case.values[0] for case in CASES}))
def test_more_tokens_run_the_fallback(bundle, op):
    spec = spec_of(op)
    args = make(op, spec.typical_variant().name, sizes_of(spec, spec.shapes[0]), 33)
    exact = copy(args)
    getattr(hdispatch.ops, op)(*args)
    spec.reference(*exact)
    assert error(args[0], exact[0]) <= ERRORS[torch.bfloat16]
    assert (hdispatch.stats()[op]["hits"], hdispatch.stats()[op]["fallbacks"]) == (0, 1)


@pytest.mark.parametrize(
    "change", ["out's row stride", "x's row stride", "addresses of scales", "address of x", "address of w"]
)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 336, 3936), (1, 16, 16), (2, 336, 3936), (33, 80, 1040)])
def test_the_fallback_of_ll_gemm_fp8_takes_what_the_schema_takes(m, n, k, change):
    """cuBLAS refuses strides and addresses that the op takes: of a single row a stride means nothing, to cuBLAS it does."""
    spec = hdispatch.registry.spec("ll_gemm_fp8")
    args = make("ll_gemm_fp8", spec.typical_variant().name, {"K": k, "N": n}, m)

    def moved(tensor, elements=4):
        whole = torch.empty(tensor.numel() + elements, dtype=tensor.dtype, device="cuda")
        return whole[elements:].view(tensor.shape).copy_(tensor)

    if change == "out's row stride":
        args[0] = torch.empty(m, n + 3, dtype=torch.bfloat16, device="cuda")[:, :n]
    elif change == "x's row stride":
        args[1] = torch.empty(m, k + 5, dtype=args[1].dtype, device="cuda")[:, :k].copy_(args[1])
    elif change == "addresses of scales":
        args[3], args[4] = moved(args[3], 1), moved(args[4], 1)
    else:
        index = 1 if change == "address of x" else 2
        args[index] = moved(args[index])
    exact = copy(args)
    exact[0] = torch.empty_like(exact[0], dtype=torch.float32)
    spec.fallback_function(*args)
    spec.reference(*exact)
    assert error(args[0], exact[0]) <= ERRORS[torch.bfloat16]


@pytest.mark.skipif("ll_gemm_bf16_argmax" not in OPS, reason="the bundle has no such op")
@pytest.mark.parametrize(
    "sizes", [{"K": 4096, "N": 151936}, {"K": 2048, "N": 128256}, {"K": 1008, "N": 8464}, {"K": 16, "N": 16}]
)
def test_the_largest_logit(bundle, sizes):
    """Of whole numbers, whose sums are exact, and of which many are equal when they are rounded."""
    spec = spec_of("ll_gemm_bf16_argmax")
    (variant,) = spec.variants()
    for m in (1, 2, 8, 9, 16, 17, 32):
        args = make(spec.name, variant.name, sizes, m, seed=m)
        wanted = copy(args)
        spec.reference(*wanted)
        for _ in range(2):
            args[0].fill_(-7)
            with hdispatch.strict():
                hdispatch.ops.ll_gemm_bf16_argmax(*args)
            assert torch.equal(args[0], wanted[0]), f"M={m}"
        args[2][sizes["N"] // 2] = float("nan")
        hdispatch.ops.ll_gemm_bf16_argmax(*args)
        assert args[0].tolist() == [sizes["N"] // 2] * m

"""Our ops against vLLM's CUDA ops of the same name, argument for argument; $HDISPATCH_VLLM_OPS is the library behind
torch.ops._C, and without it there is nothing to compare with."""

from __future__ import annotations

import collections
import os

import hdispatch
import pytest
import torch
from hdispatch.testing.numeric import compare_fp8

from .test_ops import FULL, STRIDED, check, copy, elements, make, most_rows, sizes_of, spec_of, typical_case, widened, written
from .test_ops import OPS as ALL_OPS

LIBRARY = os.environ.get("HDISPATCH_VLLM_OPS")
pytestmark = pytest.mark.skipif(not LIBRARY, reason="HDISPATCH_VLLM_OPS names no library of vLLM's ops")

#: Our name -> vLLM's, where another; None: there is no counterpart in torch.ops._C.
THEIRS = {
    "scaled_mm": "cutlass_scaled_mm",
    "scaled_mm_blockwise": "cutlass_scaled_mm",
    "silu_and_mul_dynamic_per_token_quant": None,
    "ll_gemm_bf16": None,
    "ll_gemm_bf16_argmax": None,
    "ll_gemm_fp8": None,
}
OPS = [op for op in ALL_OPS if THEIRS.get(op, op)]


@pytest.fixture(autouse=True)
def library():
    torch.ops.load_library(LIBRARY)


def call_theirs(op, args):
    """vLLM's op with the arguments that its schema has: ours may have flags of their own at the end."""
    theirs = getattr(torch.ops._C, THEIRS.get(op, op)).default
    count = len(theirs._schema.arguments)
    theirs(*args[:count], *([None] * (count - len(args))))


MS = (1, 2, 3, 15, 16, 17, 64, 127, 128, 1000, 4096)
GEMMS = ("scaled_mm", "scaled_mm_blockwise")


def cases(op):
    """(variant, sizes, M) of every variant and size that vLLM has; M in every class and on both sides of the edges."""
    spec = spec_of(op)
    for variant in spec.served_variants():
        if variant.static.get("scale_ue8m0") and op.endswith("per_block_quant"):
            continue  # our own
        for shape in spec.shapes:
            sizes = sizes_of(spec, shape)
            for m in MS:
                if m <= most_rows(op, sizes) and elements(spec, variant, sizes, m) <= FULL:
                    yield variant, sizes, m


@pytest.mark.parametrize("op", [op for op in OPS if op not in GEMMS])
def test_same_results(bundle, op):
    """Of all fp8 codes of a variant 99.9 % are equal, and none is more than one code apart."""
    equal, total = collections.Counter(), collections.Counter()
    for variant, sizes, m in cases(op):
        args = make(op, variant.name, sizes, m, seed=m)
        inputs, expected = copy(args), copy(args)
        call_theirs(op, expected)
        with hdispatch.strict():
            getattr(hdispatch.ops, op)(*args)
        torch.cuda.synchronize()
        check(op, variant.name, args, expected, f"against vLLM, {variant.name} {sizes} M={m}", inputs, min_equal=0.99)
        for index in written(op):
            if args[index] is not None and args[index].dtype == torch.float8_e4m3fn:
                count = args[index].numel()
                equal[variant.name] += compare_fp8(args[index], expected[index], min_equal=0.0) * count
                total[variant.name] += count
    shares = {name: equal[name] / total[name] for name in total}
    assert all(share >= 0.999 for share in shares.values()), shares


@pytest.mark.parametrize("op", [op for op in OPS if op in GEMMS])
def test_no_less_exact_than_cutlass(bundle, op):
    """Against the float32 reference, in the Frobenius norm; both round to 16 bits, and add as the tensor core does."""
    spec = spec_of(op)
    for variant, sizes, m in cases(op):
        if m not in (1, 16, 128, 1000):
            continue
        args = make(op, variant.name, sizes, m, seed=m)
        theirs, want = copy(args), copy(args)
        call_theirs(op, theirs)
        with hdispatch.strict():
            getattr(hdispatch.ops, op)(*args)
        spec.reference(*want)
        error, their_error = (float((x[0].float() - want[0].float()).norm() / want[0].float().norm()) for x in (args, theirs))
        assert error <= 1.05 * their_error + 1e-4, f"{variant.name} {sizes} M={m}: {error:.3g}, CUTLASS {their_error:.3g}"


# CUTLASS through vLLM takes packed operands only.
@pytest.mark.parametrize(("op", "index"), [(op, index) for op, index in STRIDED if op in OPS and op not in GEMMS])
def test_same_results_on_strided_rows(bundle, op, index):
    variant, sizes = typical_case(op)
    for m in (1, 16, 77):
        args = make(op, variant, sizes, m)
        if args[index] is None:
            pytest.skip("absent in this variant")
        args[index] = widened(args[index], 32, 32)
        inputs, expected = copy(args), copy(args)
        call_theirs(op, expected)
        with hdispatch.strict():
            getattr(hdispatch.ops, op)(*args)
        torch.cuda.synchronize()
        check(op, variant, args, expected, f"against vLLM, strided, M={m}", inputs, min_equal=0.99)

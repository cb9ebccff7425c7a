"""Our ops against vLLM's CUDA ops of the same name, argument for argument; $HDISPATCH_VLLM_OPS is the library behind
torch.ops._C, and without it there is nothing to compare with."""

from __future__ import annotations

import os

import hdispatch
import pytest
import torch

from .test_ops import FULL, STRIDED, check, copy, elements, first_case, make, sizes_of, spec_of, widened

LIBRARY = os.environ.get("HDISPATCH_VLLM_OPS")
pytestmark = pytest.mark.skipif(not LIBRARY, reason="HDISPATCH_VLLM_OPS names no library of vLLM's ops")

#: Our name -> vLLM's, where another; None: there is no counterpart in torch.ops._C.
THEIRS = {
    "scaled_mm": "cutlass_scaled_mm",
    "scaled_mm_blockwise": "cutlass_scaled_mm",
    "silu_and_mul_dynamic_per_token_quant": None,
}
OPS = [op for op in hdispatch.ops.names() if THEIRS.get(op, op)]


@pytest.fixture(autouse=True)
def library():
    torch.ops.load_library(LIBRARY)


def call_theirs(op, args):
    """vLLM's op with the arguments that its schema has: ours may have flags of their own at the end."""
    theirs = getattr(torch.ops._C, THEIRS.get(op, op)).default
    count = len(theirs._schema.arguments)
    theirs(*args[:count], *([None] * (count - len(args))))


@pytest.mark.parametrize("op", OPS)
def test_same_results(bundle, op):
    """Every variant and size that vLLM has; M in every class and on both sides of the edges."""
    spec = spec_of(op)
    for variant in spec.served_variants():
        if variant.static.get("scale_ue8m0") and op.endswith("per_block_quant"):
            continue  # our own
        for shape in spec.shapes:
            sizes = sizes_of(spec, shape)
            for m in (1, 2, 3, 15, 16, 17, 64, 127, 128, 1000, 4096):
                if elements(spec, variant, sizes, m) > FULL:
                    continue
                args = make(op, variant.name, sizes, m, seed=m)
                inputs, expected = copy(args), copy(args)
                call_theirs(op, expected)
                with hdispatch.strict():
                    getattr(hdispatch.ops, op)(*args)
                torch.cuda.synchronize()
                check(op, variant.name, args, expected, f"against vLLM, {variant.name} {sizes} M={m}", inputs)


@pytest.mark.parametrize(("op", "index"), [case for case in STRIDED if case[0] in OPS])
def test_same_results_on_strided_rows(bundle, op, index):
    variant, sizes = first_case(op)
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
        check(op, variant, args, expected, f"against vLLM, strided, M={m}", inputs)

"""Our ops against vLLM's CUDA ops of the same name, argument for argument; $HDISPATCH_VLLM_OPS is the library behind
torch.ops._C, and without it there is nothing to compare with."""

from __future__ import annotations

import os

import hdispatch
import pytest
import torch

from .test_ops import check, copy, make

LIBRARY = os.environ.get("HDISPATCH_VLLM_OPS")
pytestmark = pytest.mark.skipif(not LIBRARY, reason="HDISPATCH_VLLM_OPS names no library of vLLM's ops")

#: silu_and_mul_dynamic_per_token_quant has no counterpart in torch.ops._C
OPS = ["dynamic_per_token_scaled_fp8_quant", "rms_norm_dynamic_per_token_quant"]


@pytest.fixture(autouse=True)
def library():
    torch.ops.load_library(LIBRARY)


@pytest.mark.parametrize("op", OPS)
def test_same_results(bundle, op):
    """Every variant and size; M in every class and on both sides of the edges."""
    for variant in hdispatch.ops.spec(op).variants():
        for shape in hdispatch.ops.spec(op).shapes:
            for m in (1, 2, 3, 15, 16, 17, 64, 127, 128, 1000, 4096):
                args = make(op, variant.name, shape, m, seed=m)
                inputs, expected = copy(args), copy(args)
                getattr(torch.ops._C, op)(*expected)
                with hdispatch.strict():
                    getattr(hdispatch.ops, op)(*args)
                torch.cuda.synchronize()
                check(op, args, expected, f"against vLLM, {variant.name} {shape} M={m}", inputs)


@pytest.mark.parametrize("op", OPS)
def test_same_results_on_strided_rows(bundle, op):
    shape = hdispatch.ops.spec(op).shapes[1]
    index = next(i for i, a in enumerate(hdispatch.ops.spec(op).args) if a.name == "input")
    for m in (1, 16, 77):
        args = make(op, "bfloat16", shape, m)
        wide = torch.full((m, args[index].shape[1] + 64), float("nan"), device="cuda", dtype=args[index].dtype)
        wide[:, 32:-32] = args[index]
        args[index] = wide[:, 32:-32]
        inputs, expected = copy(args), copy(args)
        expected[index] = args[index]
        getattr(torch.ops._C, op)(*expected)
        with hdispatch.strict():
            getattr(hdispatch.ops, op)(*args)
        torch.cuda.synchronize()
        check(op, args, expected, f"against vLLM, strided, M={m}", inputs)

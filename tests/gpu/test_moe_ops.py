"""The ops of a mixture of experts on the GPU: the cases of the interpreter's tests, and vLLM's own kernel where it is there."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import hdispatch
import pytest
import torch
from moe_kernels import CASES, equal_to_the_reference, room

from .test_ops import OPS, copy, make, spec_of

LIBRARY = os.environ.get("HDISPATCH_VLLM_OPS")
LIBRARIES = sorted(Path(LIBRARY).parent.glob("_moe_C*.so")) if LIBRARY else []


@pytest.mark.parametrize("op", [op for op in CASES if op in OPS])
def test_special_cases(bundle, op):
    """Of the variants that bundles hold: ties, NaN, infinities, no expert, all rows to one, edges of buckets."""
    spec, count = spec_of(op), 0
    served = {variant.name for variant in spec.served_variants()}
    for what, variant, _, given in CASES[op](spec):
        if variant.name not in served:
            continue
        expected = copy(given)
        got = [each.cuda() if isinstance(each, torch.Tensor) else each for each in given]
        spec.reference(*expected)
        # Rows of any size are for multiples of 16.
        wide = given[spec.args.index(spec.binder("N")[0])].size(-1) if spec.binder("N") else 16
        with contextlib.nullcontext() if wide % 16 else hdispatch.strict():
            getattr(hdispatch.ops, op)(*got)
        found = [each.cpu() if isinstance(each, torch.Tensor) else each for each in got]
        try:
            equal_to_the_reference(spec, variant, found, expected)
        except AssertionError as error:
            raise AssertionError(f"{variant.name} {what}: {error}") from error
        count += wide % 16 == 0
    assert hdispatch.stats()[op]["hits"] == count > 30


@pytest.mark.skipif(not LIBRARIES, reason="no _moe_C library lies beside HDISPATCH_VLLM_OPS")
@pytest.mark.parametrize("block", [16, 64, 128])
@pytest.mark.parametrize("m", [1, 8, 64, 127, 128, 2048])
@pytest.mark.parametrize("variant", ["int32", "int32+maybe_expert_map"])
def test_rows_are_aligned_as_vllm_does(bundle, variant, m, block):
    """The same blocks, experts and counts; in vLLM an expert's rows are in any order, so they are sorted first."""
    torch.ops.load_library(str(LIBRARIES[0]))
    for experts in (8, 128, 256):
        given = make("moe_align_block_size", variant, {"num_experts": experts, "A": 8}, m)
        given[2:6] = [block, *(each.cuda() for each in room(given[0], experts, block))]
        ours, theirs = copy(given), copy(given)
        with hdispatch.strict():
            hdispatch.ops.moe_align_block_size(*ours)
        torch.ops._moe_C.moe_align_block_size(*theirs, None)
        assert torch.equal(ours[5], theirs[5])
        assert torch.equal(ours[4], theirs[4])
        of_rows = theirs[4].repeat_interleave(block)[: theirs[3].numel()].long()
        for each in (ours, theirs):
            keys = of_rows * (given[0].numel() + 1) + each[3].long()
            each[3] = torch.where(of_rows < 0, each[3].long(), keys).sort().values
        assert torch.equal(ours[3], theirs[3])

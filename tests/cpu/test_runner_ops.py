"""The ops of vLLM's model runner without a GPU: kernels in Triton's interpreter, no rows, what is refused."""

from __future__ import annotations

from typing import Any

import hdispatch
import pytest
import torch
from hdispatch import ArgumentError
from interpreted import ask

CPU = torch.device("cpu")


def sampled(op: str, m: int) -> list[Any]:
    spec = hdispatch.registry.spec(op)
    return spec.sample(spec.variants()[0], {"M": m, "N": 70, "K": 50}, CPU, torch.Generator().manual_seed(m))


def test_kernels_in_the_interpreter() -> None:
    """Against the references: random calls, ties, NaN, infinities, zeros of both signs, edges of blocks and parts."""
    count, failures = ask("runner_kernels.py")
    assert count > 200
    assert failures == []


@pytest.mark.parametrize("op", ["decode_inputs", "decode_update", "argmax"])
def test_no_rows_are_nothing(op: str) -> None:
    given = sampled(op, 0)
    hdispatch.registry.get(op)(*given)


def refused(op: str, given: list[Any], message: str) -> None:
    before = [each.clone() if isinstance(each, torch.Tensor) else each for each in given]
    with pytest.raises(ArgumentError, match=message):
        hdispatch.registry.get(op)(*given)
    for each, known in zip(given, before, strict=True):
        if isinstance(each, torch.Tensor):
            assert torch.equal(each, known)


@pytest.mark.parametrize("index", [-1, 10**6])
@pytest.mark.parametrize(
    ("op", "position", "message"),
    [
        ("decode_inputs", 6, "idx_mapping has"),
        ("decode_inputs", 7, "num_computed_tokens // page_size has"),
        ("decode_update", 5, "idx_mapping has"),
        ("decode_update", 6, "sampled_tokens has"),
        ("decode_update", 2, "total_len has"),
    ],
)
def test_what_is_outside_of_a_tensor_is_refused(op: str, position: int, message: str, index: int) -> None:
    given = sampled(op, 5)
    given[position].fill_(index)
    refused(op, given, message)


def test_a_page_has_tokens() -> None:
    given = sampled("decode_inputs", 5)
    refused("decode_inputs", [*given[:-1], 0], "page_size")


def test_argmax_is_torchs_and_takes_strided_rows() -> None:
    logits = torch.randn(4, 2, 1000)[:, 0]
    out = torch.full((4,), -7)
    hdispatch.ops.argmax(out, logits)
    assert torch.equal(out, logits.argmax(dim=-1))


def test_a_row_has_numbers() -> None:
    refused("argmax", [torch.full((2,), -7), torch.zeros(2, 0)], "rows of 0; expected at least 1")

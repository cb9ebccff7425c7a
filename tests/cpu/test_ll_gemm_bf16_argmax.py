"""lm_head's product with its argmax, without a GPU: the kernel in Triton's interpreter, what rows serve, the fallback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hdispatch
import pytest
import torch
from hdispatch import ArgumentError
from hdispatch.compile import Selection, build
from hdispatch.testing import null
from interpreted import ask

OP = "ll_gemm_bf16_argmax"
SPEC = hdispatch.registry.spec(OP)
BF16 = torch.bfloat16


def test_kernel_in_the_interpreter() -> None:
    """Against the reference: ties, NaN, infinities, zeros of both signs, what rounding makes equal, edges of all sizes."""
    count, failures = ask("head_argmax_kernels.py")
    assert count > 200
    assert failures == []


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "h200"
    build([OP], "h200", folder, select=Selection())
    return folder


@pytest.fixture
def loaded(bundle):
    live = hdispatch.load(bundle, driver="null")
    yield
    live.unload()


def matrix(rows: int, k: int, padding: int = 0, offset: int = 0) -> torch.Tensor:
    """Random whole numbers, with `padding` elements after each row and `offset` elements before the first."""
    flat = torch.empty(rows * (k + padding) + offset + 64, dtype=BF16)
    skew = -flat.data_ptr() % 64 // 2
    found = flat[skew + offset :][: rows * (k + padding)].view(rows, k + padding)[:, :k]
    return found.copy_(torch.randint(-4, 5, (rows, k), generator=torch.Generator().manual_seed(rows + k)))


def arguments(m: int = 4, k: int = 1008, n: int = 80, x: Any = None, w: Any = None) -> list[torch.Tensor]:
    return [torch.full((m,), -7), matrix(m, k, **x or {}), matrix(n, k, **w or {})]


def is_served(*args: torch.Tensor) -> bool:
    """Whether a call launches a kernel; else its result is the reference's."""
    with null.recording():
        getattr(hdispatch.ops, OP)(*args)
    launches = null.launches()
    if launches:
        assert len(launches) == 1
        assert launches[0]["pdl"]
        return True
    wanted = torch.full_like(args[0], -7)
    SPEC.reference(wanted, *args[1:])
    assert torch.equal(args[0], wanted)
    return False


@pytest.mark.parametrize("m", [1, 2, 7, 8, 9, 16, 17, 31, 32])
def test_few_tokens_are_served_with_any_weights(loaded, m: int) -> None:
    for k, n in ((4096, 1536), (1008, 80), (16, 16), (48, 304)):
        assert is_served(*arguments(m, k, n)), (k, n)
    assert is_served(*arguments(m, 1008, 80, x={"padding": 8}, w={"padding": 16})), "rows begin at multiples of 16 bytes"


@pytest.mark.parametrize(
    "case",
    [
        {"m": 33},
        {"m": 300, "k": 64},
        {"k": 1009},
        {"k": 1004},
        {"n": 77},
        {"n": 1},
        {"x": {"padding": 4}},
        {"w": {"padding": 4}},
        {"x": {"offset": 4}},
        {"w": {"offset": 4}},
        {"k": 0},
    ],
    ids=str,
)
def test_what_the_kernel_cannot_take_goes_to_the_fallback(loaded, case: dict[str, Any]) -> None:
    assert not is_served(*arguments(**case))


def test_the_grid_is_as_many_blocks_as_there_are_tiles_or_sms(loaded) -> None:
    for m, n, blocks in ((1, 16, 1), (8, 64, 1), (9, 80, 2), (17, 8448, 132), (32, 20000, 132)):
        with null.recording():
            getattr(hdispatch.ops, OP)(*arguments(m, 64, n))
        assert null.launches()[0]["grid"] == (blocks, 1, 1)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(4, dtype=torch.int32), "out"),
        (0, torch.zeros(5, dtype=torch.int64), "out"),
        (1, torch.zeros(4, 64), "x"),
        (1, torch.zeros(4, 64, dtype=torch.float16), "x"),
        (2, torch.zeros(80, 72, dtype=BF16), "w"),
        (2, torch.zeros(64, 80, dtype=BF16).t(), "w"),
        (2, torch.zeros(80, 64, dtype=torch.float8_e4m3fn), "w"),
    ],
)
def test_wrong_arguments_are_refused(position: int, value: torch.Tensor, message: str) -> None:
    args = arguments(4, 64, 80)
    args[position] = value
    with pytest.raises(ArgumentError, match=message):
        getattr(hdispatch.ops, OP)(*args)


def test_no_rows_are_nothing_and_no_weights_are_refused() -> None:
    getattr(hdispatch.ops, OP)(*arguments(0, 64, 80))
    args = arguments(2, 64, 80)
    args[2] = args[2][:0]
    for call in (SPEC.reference, getattr(hdispatch.ops, OP)):
        with pytest.raises(ArgumentError, match="w has 0 rows, which make no logits; expected at least 1"):
            call(*args)
    assert args[0].tolist() == [-7, -7]


def test_it_is_the_argmax_of_the_logits_that_ll_gemm_bf16_writes() -> None:
    """Where rounding makes two equal, the first, though the second's sum is larger."""
    x, w = torch.zeros(1, 16, dtype=BF16), torch.zeros(9, 16, dtype=BF16)
    x[0, :2] = 1.0
    w[3, 0], w[5, 0], w[5, 1] = 1.0, 1.0, 2.0**-10
    logits, out = torch.empty(1, 9, dtype=BF16), torch.full((1,), -7)
    hdispatch.ops.ll_gemm_bf16(logits, x, w)
    getattr(hdispatch.ops, OP)(out, x, w)
    assert out.tolist() == logits.argmax(-1).tolist() == [3]

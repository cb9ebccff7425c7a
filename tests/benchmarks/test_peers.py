"""torch._scaled_mm as a peer of scaled_mm, with torch's function replaced: how it is called, and what is not its."""

from __future__ import annotations

from typing import Any

import hdispatch
import pytest
import torch

from benchmarks.ops import peers

OP = "scaled_mm"
CPU = torch.device("cpu")


def arguments(m: int, k: int = 64, n: int = 48, variant: str = "bfloat16") -> list[Any]:
    spec = hdispatch.registry.spec(OP)
    sampled = spec.sample(spec.variant(variant), {"M": m, "K": k, "N": n}, CPU, torch.Generator().manual_seed(m))
    return peers.arrange(spec, sampled)


@pytest.fixture
def calls(monkeypatch) -> list[dict[str, Any]]:
    """Multiplies, and refuses what torch refuses of scales per row."""
    seen: list[dict[str, Any]] = []

    def scaled_mm(a, b, scale_a, scale_b, bias=None, scale_result=None, out_dtype=None, use_fast_accum=False, *, out):
        (m, k), n = a.shape, b.shape[1]
        assert a.dtype == b.dtype == torch.float8_e4m3fn
        assert a.is_contiguous()
        assert b.shape == (k, n)
        assert b.t().is_contiguous()
        assert (scale_a.shape, scale_b.shape) == ((m, 1), (1, n))
        for scale in (scale_a, scale_b):
            assert scale.dtype == torch.float32
            assert scale.is_contiguous()
        assert scale_result is None
        assert out_dtype == out.dtype == torch.bfloat16
        assert bias is None or (bias.dtype == out_dtype and bias.shape == (n,))
        seen.append({"out": out, "a": a, "b": b, "fast": use_fast_accum})
        sums = (a.float() @ b.float()) * scale_a * scale_b
        return out.copy_(sums if bias is None else sums + bias)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    return seen


@pytest.mark.parametrize("variant", ["bfloat16", "bfloat16+bias"])
@pytest.mark.parametrize("m", [1, 5])
def test_it_is_called_as_torch_takes_scales_per_row(calls, m, variant):
    given = arguments(m, variant=variant)
    bound = peers.bind_torch_scaled_mm(OP, given)
    assert bound is not None
    call, taken = bound
    call(*taken)
    (seen,) = calls
    assert seen["fast"]
    assert [seen[name].data_ptr() for name in ("out", "a", "b")] == [each.data_ptr() for each in given[:3]]
    wanted = torch.empty_like(given[0])
    hdispatch.registry.spec(OP).reference(wanted, *given[1:])
    torch.testing.assert_close(given[0], wanted, rtol=1e-2, atol=1e-2)


def test_one_scale_for_all_rows_is_repeated(calls):
    out, a, b, *_ = arguments(3)
    one = torch.tensor([0.5])
    call, taken = peers.bind_torch_scaled_mm(OP, [out, a, b, one, one, None])  # type: ignore[misc]
    call(*taken)
    assert len(calls) == 1


def test_what_torch_does_not_multiply_is_not_its(calls):
    for op, given in (
        (OP, arguments(2, variant="float16")),
        (OP, arguments(2, k=72)),
        (OP, arguments(2, n=40)),
        ("ll_gemm_fp8", []),
        ("scaled_mm_blockwise", []),
    ):
        assert peers.bind_torch_scaled_mm(op, given) is None
    assert not calls


def test_torch_has_the_overload_that_is_called():
    names = {each.name for each in torch.ops.aten._scaled_mm.out._schema.arguments}
    assert {"bias", "out_dtype", "use_fast_accum", "out"} <= names

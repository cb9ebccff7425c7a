"""Ops that return tensors on a GPU: right results in memory of torch's allocator, eager, captured, compiled."""

from __future__ import annotations

from pathlib import Path

import hdispatch
import pytest
import torch
from hdispatch.compile import build
from returned_rows.spec import SPEC
from returned_square.spec import SPEC as SQUARE

NAMES = (SPEC.name, SQUARE.name)
for _spec in (SPEC, SQUARE):
    if _spec.name not in hdispatch.registry.names():
        hdispatch.registry.define(_spec)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "native"
    build(NAMES, "native", out, extra=NAMES)
    return out


@pytest.fixture(autouse=True)
def loaded(folder):
    bundle = hdispatch.load(folder)
    hdispatch.stats(reset=True)
    with hdispatch.strict():
        yield bundle
    bundle.unload()


def check(x: torch.Tensor, scale: torch.Tensor, results: tuple[torch.Tensor, torch.Tensor]) -> None:
    out, total = results
    expected = (x.double() * scale.double()[:, None]).to(x.dtype)
    torch.testing.assert_close(out, expected, equal_nan=True)
    assert total.tolist() == [x.shape[0]] * ((x.shape[1] + 63) // 64)


@pytest.mark.parametrize("m", [1, 2, 15, 16, 17, 127, 1000, 4096])
@pytest.mark.parametrize("k", [256, 1008])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_results_are_right_at_every_bucket(m, k, dtype):
    x, scale = torch.randn(m, k, device="cuda").to(dtype), torch.randn(m, device="cuda")
    x.view(-1)[:3] = torch.tensor([float("inf"), float("nan"), 0.0])
    torch.empty(m * k, device="cuda", dtype=dtype).fill_(float("nan"))  # what the allocator gives next is poisoned
    for door in (hdispatch.ops.returned_rows, torch.ops.hdispatch.returned_rows.default):
        check(x, scale, door(x, scale))


def test_strided_rows_and_no_rows():
    x, scale = torch.randn(33, 512, device="cuda")[:, :256], torch.randn(33, device="cuda")
    check(x, scale, hdispatch.ops.returned_rows(x, scale))
    out, total = hdispatch.ops.returned_rows(x[:0], scale[:0])
    assert (out.shape, total.tolist()) == ((0, 256), [0] * 4)


def test_a_helion_kernel():
    x = torch.randn(77, 256, device="cuda").half()
    torch.testing.assert_close(hdispatch.ops.returned_square(x), (x.float() ** 2).half())


def test_memory_is_of_the_current_stream():
    side, scale = torch.cuda.Stream(), torch.randn(64, device="cuda")
    for _ in range(50):
        x = torch.randn(64, 256, device="cuda")
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            results = hdispatch.ops.returned_rows(x, scale)
            del x
        side.synchronize()
        assert results[1].tolist() == [64] * 4


def test_captured():
    x, scale = torch.randn(64, 256, device="cuda"), torch.randn(64, device="cuda")
    hdispatch.ops.returned_rows(x, scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = hdispatch.ops.returned_rows(x, scale)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        check(x, scale, results)


def test_compiled():
    def f(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return hdispatch.ops.returned_rows(x * 2, scale)[0] + 1

    x, scale = torch.randn(64, 256, device="cuda"), torch.randn(64, device="cuda")
    torch.testing.assert_close(torch.compile(f, fullgraph=True)(x, scale), f(x, scale))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_memory_is_on_the_device_of_the_arguments(folder):
    other = hdispatch.load(folder, device=1)
    x, scale = torch.randn(5, 256, device="cuda:1"), torch.randn(5, device="cuda:1")
    assert torch.cuda.current_device() == 0
    for _ in range(2):
        results = hdispatch.ops.returned_rows(x, scale)
        assert results[0].device == x.device
        check(x, scale, results)
    other.unload()

"""TMA descriptors on a GPU: what was copied and multiplied through them, eager, captured, and with the same memory reshaped."""

from __future__ import annotations

from pathlib import Path

import hdispatch
import pytest
import tma_copy.spec
import tma_matmul.spec
import torch
from hdispatch.compile import build

PACKAGES = ("tma_copy", "tma_matmul")
MS = (1, 2, 15, 16, 31, 32, 33, 127, 1000, 4096)

for module in (tma_copy.spec, tma_matmul.spec):
    if module.SPEC.name not in hdispatch.registry.names():
        hdispatch.registry.define(module.SPEC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "native"
    build(PACKAGES, "native", out, extra=PACKAGES)
    return out


@pytest.fixture(autouse=True)
def loaded(folder):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("TMA needs compute capability 9.0")
    bundle = hdispatch.load(folder)
    hdispatch.stats(reset=True)
    yield bundle
    bundle.unload()


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(torch.bfloat16)


def unwritten(m: int, k: int) -> torch.Tensor:
    return torch.full((m, k), float("nan"), dtype=torch.bfloat16, device="cuda")


def copy(result: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
    with hdispatch.strict():
        hdispatch.ops.tma_copy(result, input)
    return result


@pytest.mark.parametrize("k", [192, 1000])
@pytest.mark.parametrize("padding", [0, 8, 24])
def test_a_copy_is_the_input(k, padding):
    for m in MS:
        input = random(m, k + 8 + padding)[:, : k + 8]
        guarded = torch.full((m + 2, k), 7.0, dtype=torch.bfloat16, device="cuda")
        copy(guarded[1 : m + 1], input)
        assert torch.equal(guarded[1 : m + 1], input[:, 8:]), (m, k, padding)
        assert (guarded[0] == 7).all(), (m, k, padding)  # nothing is written outside
        assert (guarded[m + 1] == 7).all(), (m, k, padding)


def test_the_same_memory_in_other_shapes():
    memory, target = random(512 * 208).flatten(), unwritten(512, 192).flatten()
    for _ in range(3):
        for m, stride in ((512, 200), (7, 200), (512, 208), (1, 200), (7, 208), (500, 200)):
            input = memory.as_strided((m, 200), (stride, 1))
            target.fill_(float("nan"))
            assert torch.equal(copy(target[: m * 192].view(m, 192), input), input[:, 8:]), (m, stride)


def test_more_memory_than_the_cache_holds():
    inputs = random(400, 33, 200)
    for _ in range(2):
        results = torch.full((400, 33, 192), float("nan"), dtype=torch.bfloat16, device="cuda")
        for input, result in zip(inputs, results, strict=True):
            copy(result, input)
        assert torch.equal(results, inputs[:, :, 8:])


@pytest.mark.parametrize("m", [1, 16, 33, 1000])
def test_captured_in_a_graph(m):
    """The first call of a shape is the captured one: its descriptor is made during the capture."""
    input, result = random(m, 200), unwritten(m, 192)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        copy(result, input)
    # Other maps take the place of this one in the cache; the graph keeps its own.
    others = random(300, 3, 200)
    for _ in range(3):
        input.copy_(random(m, 200))
        result.fill_(float("nan"))
        graph.replay()
        assert torch.equal(result, input[:, 8:])
        for other in others:
            copy(unwritten(3, 192), other)


@pytest.mark.parametrize(("k", "n"), [(256, 128), (64, 64), (272, 1000), (2048, 4096), (16, 8)])
@pytest.mark.parametrize("padding", [0, 8])
def test_a_product_with_a_column_major_weight(k, n, padding):
    for m in (1, 7, 64, 65, 300):
        input, weight = random(m, k + padding)[:, :k], random(n, k + padding)[:, :k].t()
        result, wanted = unwritten(m, n), unwritten(m, n)
        with hdispatch.strict():
            hdispatch.ops.tma_matmul(result, input, weight)
        tma_matmul.spec.reference(wanted, input, weight)
        torch.testing.assert_close(result, wanted, rtol=2**-7, atol=2**-7 * k**0.5)


@pytest.mark.parametrize(("offset", "stride", "reason"), [(4, 200, "aligned"), (0, 204, "TMA"), (0, 201, "TMA")])
def test_what_tma_cannot_read_runs_the_reference(offset, stride, reason):
    input = random(9 * 256).flatten()[offset:].as_strided((7, 200), (stride, 1))
    result = unwritten(7, 192)
    hdispatch.ops.tma_copy(result, input)
    assert torch.equal(result, input[:, 8:])
    counted = hdispatch.stats()["tma_copy"]
    assert (counted["hits"], counted["fallbacks"]) == (0, 1)
    assert [why for why in counted["misses"] if reason in why], counted

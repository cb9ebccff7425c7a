"""Sequences on a GPU: layers of a decoder as one call, bit for bit what single ops give; captured, chunked, threaded."""

from __future__ import annotations

import threading
from typing import Any

import hdispatch
import pytest
import torch
from hdispatch import ops

from benchmarks.decoder import Layers, Shape

pytestmark = pytest.mark.usefixtures("bundle")
LAYERS = 3
ROWS = sorted({max(1, edge + by) for edge in (1, 2, 16, 64, 128) for by in (-1, 0, 1)} | {300})


@pytest.fixture(scope="module")
def layers() -> Layers:
    made = Layers(torch.device("cuda"), Shape(layers=LAYERS))
    torch.cuda.synchronize()  # tests read it on other streams
    return made


def one_by_one(layers: Layers, residual: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    result = residual.clone()
    for op, arguments in layers.single(result, positions):
        op(*arguments)
    return result


def is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bits, so that NaNs compare."""
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


def test_any_number_of_rows(layers: Layers) -> None:
    sequence = layers.sequence("gpu rows")
    with hdispatch.strict():
        for m in ROWS:
            for seed in range(3):
                residual, positions = layers.inputs(m, seed)
                expected = one_by_one(layers, residual, positions)
                sequence(residual, positions)
                assert is_same(residual, expected), m
    assert hdispatch.stats()["gpu rows"] == {"hits": 3 * len(ROWS), "empty": 0, "fallbacks": 0, "misses": {}}


def test_many_calls_without_waiting(layers: Layers) -> None:
    """The queue fills; what a call reads is what the one in front of it wrote."""
    sequence = layers.sequence("gpu queue")
    residual, positions = layers.inputs(4)
    expected = residual.clone()
    for _ in range(100):
        sequence(residual, positions)
        residual.clamp_(-50, 50)
    for _ in range(100):
        for op, arguments in layers.single(expected, positions):
            op(*arguments)
        expected.clamp_(-50, 50)
    assert is_same(residual, expected)


def test_chunks(layers: Layers) -> None:
    sequence = layers.sequence("gpu chunks", max_rows=48)
    for m in (48, 49, 96, 100, 257):
        residual, positions = layers.inputs(m)
        # Rows of one bucket alone are served by one kernel: as calls of the same chunks, which have a multiple of 16 rows.
        count = -(-m // 48)
        size = -(-m // count // 16) * 16
        expected = [one_by_one(layers, residual[i : i + size], positions[i : i + size]) for i in range(0, m, size)]
        sequence(residual, positions)
        assert is_same(residual, torch.cat(expected)), m


@pytest.mark.parametrize("warm", [True, False])
def test_captured(layers: Layers, warm: bool) -> None:
    """Also where the arena is made in the capture itself: it is then of the graph's pool."""
    sequence = layers.sequence("gpu captured")
    residual, positions = layers.inputs(16)
    given = residual.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        if warm:
            sequence(residual, positions)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            sequence(residual, positions)
    torch.cuda.synchronize()
    for seed in range(3):
        other, places = layers.inputs(16, seed)
        residual.copy_(other)
        positions.copy_(places)
        graph.replay()
        assert is_same(residual, one_by_one(layers, other, positions))
    # The arena serves eager calls on that stream too.
    residual.copy_(given)
    expected = one_by_one(layers, given, positions)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        sequence(residual, positions)
    torch.cuda.synchronize()
    assert is_same(residual, expected)


def test_threads_on_streams_of_their_own(layers: Layers) -> None:
    sequence = layers.sequence("gpu threads")
    faults: list[str] = []

    def work(seed: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for i in range(20):
                    residual, positions = layers.inputs(1 + (i + seed) % 5, seed)
                    expected = one_by_one(layers, residual, positions)
                    sequence(residual, positions)
                    if not is_same(residual, expected):
                        raise AssertionError(f"another result in call {i}")
        except BaseException as error:
            faults.append(repr(error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


@pytest.mark.parametrize("served", [True, False])
def test_threads_on_one_stream(layers: Layers, served: bool) -> None:
    """They take turns: between two launches of one call none of another's writes the temporaries that both have."""
    sequence = layers.sequence(f"gpu one stream {served}")
    given = [layers.inputs(3, seed) for seed in range(4)]
    if not served:  # misaligned slots are made one by one
        given = [(misaligned(residual), positions) for residual, positions in given]
    expected = [one_by_one(layers, *each) for each in given]
    torch.cuda.synchronize()
    faults: list[str] = []

    def work(i: int) -> None:
        try:
            for call in range(100):
                residual = misaligned(given[i][0]) if not served else given[i][0].clone()
                sequence(residual, given[i][1])
                if not is_same(residual, expected[i]):
                    raise AssertionError(f"another result in call {call}")
        except BaseException as error:
            faults.append(repr(error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


def misaligned(x: torch.Tensor) -> torch.Tensor:
    """A copy that begins one element behind an aligned address."""
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)


def test_misaligned_slots_are_made_one_by_one(layers: Layers) -> None:
    sequence = layers.sequence("gpu misaligned")
    residual, positions = layers.inputs(8)
    expected = one_by_one(layers, residual, positions)
    memory = torch.empty(residual.numel() + 1, dtype=residual.dtype, device="cuda")
    shifted = memory[1:].view_as(residual).copy_(residual)
    sequence(shifted, positions)
    stats = hdispatch.stats()["gpu misaligned"]
    assert stats["hits"] + stats["fallbacks"] == 1
    if stats["hits"]:
        assert is_same(shifted.contiguous(), expected)
    else:
        assert torch.allclose(shifted.float(), expected.float(), rtol=0.1, atol=1.0)


def test_foreign_steps(layers: Layers) -> None:
    """Products of torch between ops of ours, on the same stream."""
    hidden = layers.shape.hidden
    weight = torch.randn(hidden, hidden, device="cuda").mul_(0.01).bfloat16()
    norm = layers.layers[0]["input_norm"]
    s = hdispatch.Sequence("gpu foreign")
    x, out = (s.slot(name, ("M", hidden), torch.bfloat16, written=True) for name in ("x", "out"))
    a = s.temp(("M", hidden), torch.bfloat16)
    s.add_torch(torch.ops.aten.mm.out, x, weight, out=a)
    s.add(ops.fused_add_rms_norm, a, x, norm, 1e-6)
    s.add_torch(torch.ops.aten.copy_.default, out, s.add_torch(torch.ops.aten.mm.default, a, weight))
    sequence = s.freeze()
    for m in (1, 7, 64):
        given, result = torch.randn(m, hidden, device="cuda").bfloat16(), torch.full((m, hidden), torch.nan, device="cuda")
        result = result.bfloat16()
        residual, product = given.clone(), given @ weight
        ops.fused_add_rms_norm(product, residual, norm, 1e-6)
        expected: Any = product @ weight
        with hdispatch.strict():
            sequence(given, result)
        assert is_same(result, expected)
        assert is_same(given, residual)


def test_slots_are_checked(layers: Layers) -> None:
    sequence = layers.sequence("gpu checked")
    residual, positions = layers.inputs(4)
    with pytest.raises(hdispatch.ArgumentError, match=r"position_ids is on cpu; .* all tensors are on one device"):
        sequence(residual, positions.cpu())
    with pytest.raises(hdispatch.ArgumentError, match="slot residual has dtype float32; it takes bfloat16"):
        sequence(residual.float(), positions)
    sequence(residual[:0], positions[:0])
    assert hdispatch.stats()["gpu checked"]["empty"] == 1

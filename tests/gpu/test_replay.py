"""Replays on a GPU: the bits of the sequence itself, captured when a call comes again, and only then."""

from __future__ import annotations

from pathlib import Path

import hdispatch
import pytest
import torch

from benchmarks.decoder import Layers, Shape

pytestmark = pytest.mark.usefixtures("bundle")


@pytest.fixture(scope="module")
def layers() -> Layers:
    made = Layers(torch.device("cuda"), Shape(layers=3))
    torch.cuda.synchronize()
    return made


def run(replays, layers: Layers, residual: torch.Tensor, positions: torch.Tensor, m: int, seed: int) -> torch.Tensor:
    """A call on inputs of a seed in the same memory."""
    values, places = layers.inputs(m, seed)
    residual.copy_(values)
    positions.copy_(places)
    replays(residual, positions)
    return residual.clone()


def expected(sequence, layers: Layers, m: int, seed: int) -> torch.Tensor:
    values, places = layers.inputs(m, seed)
    sequence(values, places)
    return values


@pytest.mark.parametrize("m", [1, 7, 64, 129])
def test_a_call_that_comes_again_is_replayed(layers: Layers, m: int) -> None:
    sequence = layers.sequence(f"replayed {m}")
    replays = hdispatch.Replays(sequence)
    residual, positions = layers.inputs(m)
    for seed in range(6):
        found = run(replays, layers, residual, positions, m, seed)
        assert torch.equal(found, expected(sequence, layers, m, seed)), seed
    assert (replays.captures, replays.replays) == (1, 4)


def test_a_replay_is_a_call_of_the_sequence_that_writes(layers: Layers) -> None:
    replays = hdispatch.Replays(layers.sequence("written"))
    residual, positions = layers.inputs(4)
    hdispatch.stats(reset=True)
    for calls in range(1, 7):
        before = residual._version, positions._version
        replays(residual, positions)
        assert (residual._version, positions._version) == (before[0] + 1, before[1])
        assert hdispatch.stats()["written"] == {"hits": calls, "empty": 0, "fallbacks": 0, "misses": {}}
    assert (replays.captures, replays.replays) == (1, 4)
    assert hdispatch.explain(replays, residual, positions).startswith("replayed: it has a graph")


def test_other_memory_other_sizes_and_other_streams_are_other_calls(layers: Layers) -> None:
    sequence = layers.sequence("others")
    replays = hdispatch.Replays(sequence)
    kept = [layers.inputs(m) for m in (4, 4, 5)]
    for _ in range(3):
        for residual, positions in kept:
            m = positions.size(0)
            assert torch.equal(run(replays, layers, residual, positions, m, 3), expected(sequence, layers, m, 3))
    assert (replays.captures, replays.replays) == (3, 3)
    aside = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(aside):
        found = run(replays, layers, *kept[0], 4, 5)
    torch.cuda.synchronize()
    assert torch.equal(found, expected(sequence, layers, 4, 5))
    assert replays.captures == 3


def test_a_new_table_is_another_call(layers: Layers, bundle_dir: Path) -> None:
    sequence = layers.sequence("new table")
    replays = hdispatch.Replays(sequence)
    residual, positions = layers.inputs(2)
    for seed in range(4):
        run(replays, layers, residual, positions, 2, seed)
    assert replays.captures == 1
    hdispatch.load(bundle_dir)
    for seed in range(4):
        assert torch.equal(run(replays, layers, residual, positions, 2, seed), expected(sequence, layers, 2, seed))
    assert replays.captures == 2


def test_under_a_capture_it_launches(layers: Layers) -> None:
    sequence = layers.sequence("outer")
    replays = hdispatch.Replays(sequence)
    residual, positions = layers.inputs(3)
    for seed in range(3):
        run(replays, layers, residual, positions, 3, seed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replays(residual, positions)
    assert replays.replays == 1
    values, places = layers.inputs(3, 9)
    residual.copy_(values)
    positions.copy_(places)
    graph.replay()
    assert torch.equal(residual, expected(sequence, layers, 3, 9))


def test_places_are_not_given_away_while_they_are_used(layers: Layers) -> None:
    sequence = layers.sequence("places")
    replays = hdispatch.Replays(sequence, most=2)
    kept = [layers.inputs(m) for m in (1, 2, 3)]
    for _ in range(5):
        for residual, positions in kept:
            replays(residual, positions)
    assert replays.captures == 2

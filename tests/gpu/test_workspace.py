"""Memory of the runtime's on a GPU, and two ladders: many streams and threads, graph capture, every bucket edge."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import counting_rows.spec
import hdispatch
import pytest
import torch
import two_ladders.spec
from hdispatch.compile import build

PACKAGES = ("counting_rows", "two_ladders")
COUNTING, LADDERS = counting_rows.spec.SPEC, two_ladders.spec.SPEC

for module in (counting_rows.spec, two_ladders.spec):
    if module.SPEC.name not in hdispatch.registry.names():
        hdispatch.registry.define(module.SPEC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "native"
    build(PACKAGES, "native", out, extra=PACKAGES)
    return out


@pytest.fixture(autouse=True)
def loaded(folder):
    bundle = hdispatch.load(folder)
    hdispatch.stats(reset=True)
    with hdispatch.strict():
        yield bundle
    bundle.unload()


def arguments(m: int, doubled: bool = False, seed: int = 0) -> list[Any]:
    generator = torch.Generator("cuda").manual_seed(seed)
    return COUNTING.sample(
        COUNTING.variant("any+doubled" if doubled else "any"), {"M": m, "K": 64}, torch.device("cuda"), generator
    )


def check(args: list[Any]) -> None:
    want = [torch.empty_like(args[0]), *args[1:]]
    COUNTING.reference(*want)
    torch.testing.assert_close(args[0], want[0], atol=1e-4, rtol=1e-4)


def test_counters_are_zero_again():
    for turn, m, doubled in itertools.product(range(3), (1, 2, 15, 16, 17, 63, 64), (False, True)):
        args = arguments(m, doubled, turn)
        hdispatch.ops.counting_rows(*args)
        check(args)


def test_streams_do_not_share():
    """Launches of different rows overlap on two streams, a thousand times."""
    streams = [torch.cuda.Stream() for _ in range(2)]
    calls = [[arguments(64, seed=10 * s + i) for i in range(8)] for s in range(2)]
    torch.cuda.synchronize()
    for turn in range(1000):
        for stream, own in zip(streams, calls, strict=True):
            with torch.cuda.stream(stream):
                hdispatch.ops.counting_rows(*own[turn % 8])
    torch.cuda.synchronize()
    for args in itertools.chain(*calls):
        check(args)


def test_threads_on_streams_of_their_own():
    failed: list[BaseException] = []

    def run(seed: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()), hdispatch.strict():
                own = [arguments(m, seed=seed) for m in (1, 17, 64)]
                for _ in range(300):
                    for args in own:
                        hdispatch.ops.counting_rows(*args)
                torch.cuda.current_stream().synchronize()
                for args in own:
                    check(args)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


@pytest.mark.parametrize("mode", ["global", "thread_local", "relaxed"])
def test_the_first_use_is_captured(mode):
    """On a stream that has no block yet; nothing of its making is in the graph, which is replayed on another stream."""
    args = arguments(33, seed=5)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode=mode):
        for _ in range(3):
            hdispatch.ops.counting_rows(*args)
    for seed in range(3):
        args[1].copy_(arguments(33, seed=seed)[1])
        args[0].fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        check(args)


def test_a_capture_that_forks_has_a_block_for_each_branch():
    """Two branches of one graph run at once."""
    graph, main, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.Stream()
    first, second = arguments(64, seed=1), arguments(64, seed=2)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=main):
        side.wait_stream(main)
        for _ in range(20):
            hdispatch.ops.counting_rows(*first)
        with torch.cuda.stream(side):
            for _ in range(20):
                hdispatch.ops.counting_rows(*second)
        main.wait_stream(side)
    for _ in range(50):
        graph.replay()
    torch.cuda.synchronize()
    check(first)
    check(second)


def test_every_edge_of_both_ladders():
    ms = sorted({m for edge in LADDERS.ladder for m in (edge - 1, edge, edge + 1)} - {0})
    values = sorted({v for edge in two_ladders.spec.LENGTHS for v in (edge - 1, edge, edge + 1)} | {1, 63, 64, 65})
    for m, longest in itertools.product(ms, values):
        generator = torch.Generator("cuda").manual_seed(m)
        args = LADDERS.sample(LADDERS.variants()[0], {"M": m, "K": 64, "longest": longest}, torch.device("cuda"), generator)
        args[0].zero_()  # chunks add to it
        hdispatch.ops.two_ladders(*args)
        want = [torch.empty_like(args[0]), *args[1:]]
        LADDERS.reference(*want)
        torch.testing.assert_close(args[0], want[0], atol=1e-4, rtol=1e-4)

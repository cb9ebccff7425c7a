"""hdispatch.adopt: what reaches the driver is what Triton would have sent, and what is unusual goes to Triton."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import adopted_kernels as kernels
import hdispatch
import pytest
import torch
import triton
import triton.language as tl
import triton_stub
from hdispatch import _C
from hdispatch.testing import null
from triton import knobs
from triton.runtime import jit


@pytest.fixture(scope="module")
def stub() -> Iterator[triton_stub.Stub]:
    with triton_stub.installed() as made:
        yield made


@pytest.fixture(autouse=True)
def left_alone(stub: triton_stub.Stub) -> Iterator[None]:
    hdispatch.stats(reset=True)
    yield
    hdispatch.unadopt()


def misses(kernel: Any) -> dict[str, int]:
    return dict(counts(kernel)["misses"])


def counts(kernel: Any) -> dict[str, Any]:
    function = kernel
    while not isinstance(function, triton.JITFunction):
        function = function.fn
    return hdispatch.stats()[f"adopted {function.fn.__module__}.{function.fn.__qualname__}"]


def launched(call: Callable[[], Any]) -> tuple[Any, dict[str, Any] | None]:
    """What a call returned, and what it launched from C++; None if Triton launched."""
    with null.recording():
        result = call()
        found = null.launches()
    assert len(found) <= 1
    return result, found[0] if found else None


def fresh(function: Any, **options: Any) -> Any:
    """A kernel of its own."""
    return triton.jit(function.fn, **options)


X, Y, O = (torch.zeros(4096) for _ in range(3))


# ---- the same launch ----


def as_null(launch: triton_stub.Launch) -> dict[str, Any]:
    cluster = launch.attributes.get(4, (1, 1, 1))
    return {
        "grid": (launch.grid[0] // cluster[0] * cluster[0], *launch.grid[1:]),
        "block": launch.block,
        "shared": launch.shared,
        "pdl": launch.attributes.get(6, (0,))[0] == 1,
        "cooperative": launch.attributes.get(2, (0,))[0] == 1,
        "cluster": cluster,
        "params": launch.params,
    }


def compare(stub: triton_stub.Stub, kernel: Any, grid: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
    """Makes a call, which is launched as Triton launches it. Whether C++ launched it; the first call of a key is Triton's."""
    result, got = launched(lambda: kernel[grid](*args, **keywords))
    stub.expect([kind for kind in result.src.signature.values() if kind != "constexpr"])
    with_triton = kernel
    hdispatch.unadopt(with_triton)
    before = stub.launches
    wanted = kernel[grid](*args, **keywords)
    hdispatch.adopt(with_triton, driver="null")
    assert stub.launches == before + 1
    assert result is wanted, (args, keywords)
    if got is None:
        return False
    assert {key: got[key] for key in as_null(stub.last())} == as_null(stub.last()), (args, keywords)
    return True


@pytest.mark.parametrize(
    "options",
    [{}, {"num_warps": 8}, {"launch_pdl": True}, {"launch_cooperative_grid": True}, {"num_ctas": 2}, {"num_stages": 2}],
    ids=str,
)
def test_options_reach_the_driver(stub, options):
    add = hdispatch.adopt(fresh(kernels.add), driver="null")
    call = (stub, add, (4,), (X, Y, O, 1024), {"BLOCK": 256, **options})
    assert [compare(*call), compare(*call)] == [False, True]


def random_tensor(rng: random.Random) -> torch.Tensor:
    base = rng.choice((X, Y, O))
    return base[rng.choice((0, 0, 4, 8, 1, 3)) :].view(rng.choice((torch.float32, torch.float32, torch.int32)))


INTEGERS = (0, 1, 2, 15, 16, 17, 32, 1000, 1024, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**40, -16, -1)
FLOATS = (0.0, 1.0, -0.0, 2.5, 1e-30, 1e300, float("inf"), float("nan"), -3.14159)


def integer(rng: random.Random) -> int:
    return rng.choice(INTEGERS) if rng.random() < 0.5 else rng.randrange(0, 4000)


def calls(rng: random.Random) -> dict[str, Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]]:
    """A random call of each kernel: arguments, keywords."""
    t, n = (lambda: random_tensor(rng)), (lambda: integer(rng))
    f, b, block = (lambda: rng.choice(FLOATS)), (lambda: rng.random() < 0.5), (lambda: rng.choice((32, 64)))
    return {
        "nop": lambda: ((), {"num_warps": rng.choice((1, 4))}),
        "add": lambda: ((t(), t(), t()), {"BLOCK": block(), "n": n()}),
        "scalars": lambda: ((X, n(), f(), b(), n()), rng.choice(({}, {"BLOCK": 64}))),
        "typed": lambda: ((X, rng.choice((f(), 1, 16, 7)), rng.choice((1, 2, 16, 48)), b(), f()), {}),
        "unspecialized": lambda: ((X, n(), n()), {"k": n()}),
        "unaligned": lambda: ((t(), X), {"n": n()}),
        "optional": lambda: ((X, *rng.choice(((None,), (Y,), (Y[1:],))), O), {}),
        "cast": lambda: ((X, t(), rng.choice((tl.float32, tl.int32)), rng.choice((0, 1, 1.0, True, 0.5))), {}),
        "strides": lambda: ((X, O, n(), rng.choice((1, 2, 16)), 16, 1, 1), {"columns": n(), "BLOCK": 32}),
        "function_argument": lambda: ((t(), O, kernels.double), {}),
        "captured": lambda: ((t(), t()), {}),
        "pointers_last": lambda: ((n(), f(), t(), t()), {}),
    }


def triton_key(kernel: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> str:
    """Triton's own key of a call."""
    keywords = {**keywords, "debug": kernel.debug or knobs.runtime.debug, "instrumentation_mode": ""}
    _, keys, _, _, binder = kernel.device_caches[0]
    _, specialization, options = binder(*args, **keywords)
    return jit.compute_cache_key(keys, specialization, options)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_random_calls_have_tritons_key_and_parameters(stub, seed):
    rng = random.Random(seed)
    made = {name: fresh(getattr(kernels, name)) for name in calls(rng)}
    made["unspecialized"] = fresh(kernels.unspecialized, do_not_specialize=["n", "m"])
    made["unaligned"] = fresh(kernels.unaligned, do_not_specialize_on_alignment=["n", "x"])
    for kernel in made.values():
        hdispatch.adopt(kernel, driver="null")
    keys: dict[str, dict[Any, str]] = {name: {} for name in made}
    served = 0
    for count in range(100_000):
        name = rng.choice(list(made))
        kernel = made[name]
        args, keywords = calls(rng)[name]()
        if name == "optional":
            keywords = {"HAS_BIAS": args[1] is not None, **rng.choice(({}, {"ACTIVATION": "none"}))}
        grid = (rng.randrange(1, 9), rng.randrange(1, 3))[: rng.randrange(1, 3)]
        try:
            wanted = triton_key(kernel, args, keywords)
        except OverflowError:
            continue
        result, got = launched(lambda: kernel[grid](*args, **keywords))
        # What Triton compiled for its own key of this very call.
        assert result is kernel.device_caches[0][0][wanted], (name, args, keywords)
        if got is None:
            continue
        served += 1
        if count % 7 == 0 or len(keys[name]) < 40:
            assert compare(stub, kernel, grid, args, keywords), (name, args, keywords)
        keys[name][wanted] = wanted
    assert served > 95_000
    for name, kernel in made.items():
        assert counts(kernel)["hits"] > 5000, (name, counts(kernel))
        assert set(misses(kernel)) <= {"first call of a key", "argument of type i32 is made otherwise"}, misses(kernel)

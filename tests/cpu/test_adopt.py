"""hdispatch.adopt: what reaches the driver is what Triton would have sent; adopting and giving back."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import random
import threading
import weakref
from collections.abc import Callable
from typing import Any

import adopted_kernels as kernels
import hdispatch
import pytest
import torch
import triton
import triton.language as tl
import triton_stub
from adopted_calls import ADD, OUT, X, Y, counts, fresh, launched, misses, served, wrapper
from hdispatch import _C
from triton import knobs
from triton.runtime import jit

pytest_plugins = ("adopted_fixtures",)
pytestmark = pytest.mark.usefixtures("left_alone")


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
    call = (stub, add, (4,), (X, Y, OUT, 1024), {"BLOCK": 256, **options})
    assert [compare(*call), compare(*call)] == [False, True]


def random_tensor(rng: random.Random) -> torch.Tensor:
    base = rng.choice((X, Y, OUT))
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
        "optional": lambda: ((X, *rng.choice(((None,), (Y,), (Y[1:],))), OUT), {}),
        "cast": lambda: ((X, t(), rng.choice((tl.float32, tl.int32)), rng.choice((0, 1, 1.0, True, 0.5))), {}),
        "strides": lambda: ((X, OUT, n(), rng.choice((1, 2, 16)), 16, 1, 1), {"columns": n(), "BLOCK": 32}),
        "function_argument": lambda: ((t(), OUT, kernels.double), {}),
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
        result, got = launched(functools.partial(kernel[grid], *args, **keywords))
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


# ---- adopting ----


def test_unadopt_gives_the_kernel_back(add, stub):
    hdispatch.unadopt(add)
    before = stub.launches
    assert not served(add, *ADD, BLOCK=256)
    assert stub.launches == before + 1
    hdispatch.adopt(add)
    assert served(add, *ADD, BLOCK=256)


def test_a_block_adopts_and_gives_back(stub):
    kernel = fresh(kernels.add)
    with hdispatch.adopting(kernel, driver="null"):
        assert not served(kernel, *ADD, BLOCK=256)
        assert served(kernel, *ADD, BLOCK=256)
    assert not served(kernel, *ADD, BLOCK=256)


def test_all_kernels_of_the_process(stub):
    kernel = fresh(kernels.add)
    with hdispatch.adopting(driver="null"):
        late = fresh(kernels.add)
        for each in (kernel, late):
            assert not served(each, *ADD, BLOCK=256)
            assert served(each, *ADD, BLOCK=256)
        tuned = wrapper(kernels.tuned)
        tuned[(1,)](X, OUT, 1000)
        assert launched(lambda: tuned[(1,)](X, OUT, 1000))[1] is not None
    assert not served(kernel, *ADD, BLOCK=256)


def test_unadopting_all_leaves_tritons_classes_as_they_were(stub):
    hdispatch.unadopt()
    before = {each: (each.__getitem__, each.run) for each in (jit.JITFunction, triton.runtime.Autotuner)}
    own = set(vars(jit.JITFunction))
    hdispatch.adopt(driver="null")
    assert jit.JITFunction.run is not before[jit.JITFunction][1]
    hdispatch.unadopt()
    assert {each: (each.__getitem__, each.run) for each in before} == before
    assert set(vars(jit.JITFunction)) == own


def test_a_host_functions_kernels(stub):
    hdispatch.adopt(kernels.host_function, driver="null")
    kernels.host_function(X)
    _, got = launched(lambda: kernels.host_function(X))
    assert got is not None
    assert got["grid"] == (16, 1, 1)


def test_as_a_decorator(stub):
    @hdispatch.adopt
    @triton.jit
    def kernel(x, n):
        tl.store(x, n)

    assert isinstance(kernel, triton.JITFunction)


@pytest.mark.parametrize("given", [3, "kernel", lambda: None, torch.add])
def test_what_is_no_kernel_is_refused(given):
    with pytest.raises(hdispatch.HdispatchError, match="kernel"):
        hdispatch.adopt(given)


def test_a_kernel_that_nobody_holds_is_freed(add):

    kernel = fresh(kernels.add)
    gone = weakref.ref(kernel)
    hdispatch.adopt(kernel, driver="null")
    for _ in range(2):
        kernel[lambda meta: (meta["n"],)](*ADD, BLOCK=256)
    getattr(jit, "_triton_jit_function_registry", {}).clear()  # Triton 3.6 has none
    del kernel
    gc.collect()
    assert gone() is None


def test_a_kept_launch_stays_one(add):
    launch = add[(4,)]
    for _ in range(3):
        assert launched(lambda: launch(*ADD, BLOCK=256))[1] is not None


def test_copies_of_a_kernel_are_kernels_of_their_own(add):
    other = copy.copy(add)
    assert not served(other, *ADD, BLOCK=256)
    hdispatch.adopt(other, driver="null")
    assert not served(other, *ADD, BLOCK=256)
    assert served(other, *ADD, BLOCK=256)
    assert served(add, *ADD, BLOCK=256)
    assert pickle.loads(pickle.dumps(vars(add)["_hdispatch_adopted"])) is None


def test_threads_share_rows(add):
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(300):
                add[(4,)](X, Y, OUT, rng.choice((1, 16, 1000, 1001)), BLOCK=rng.choice((64, 256)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    keys = [tuple(words) for words, _, _ in _C.adopted_keys(vars(add)["_hdispatch_adopted"])]
    assert len(keys) == len(set(keys)) <= 7
    assert counts(add)["hits"] + counts(add)["fallbacks"] == 4 * 300 + 2


def test_keys_are_bounded_by_what_differs(add):
    for n in range(2, 400):
        add[(4,)](X, Y, OUT, n, BLOCK=256)
    assert len(_C.adopted_keys(vars(add)["_hdispatch_adopted"])) == 2


def test_explain_says_what_was_learnt(add):
    text = hdispatch.explain(add)
    assert text.splitlines()[0] == "adopted, 1 key(s)"
    assert "served    block 128, shared 0 bytes" in text

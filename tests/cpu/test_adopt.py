"""hdispatch.adopt: what reaches the driver is what Triton would have sent, and what is unusual goes to Triton."""

from __future__ import annotations

import copy
import functools
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


X, Y, OUT = (torch.zeros(4096) for _ in range(3))


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


# ---- callable grids ----


N = 1000


def grid_of_many(meta):
    return (triton.cdiv(N, meta["BLOCK"]), max(1, 2), min(N // 500, meta["n"]))


class GridObject:
    """A callable that is no function."""

    def __call__(self, meta: dict[str, Any]) -> tuple[int, ...]:
        """As many blocks as arguments."""
        return (len(meta),)


def odd_grids() -> dict[str, tuple[Any, tuple[int, ...]]]:
    n, rows = 1000, torch.zeros(5, 7)
    called = []

    def counts_calls(meta):
        called.append(meta["n"])
        return (len(called),)

    def branches(meta):
        return (3,) if meta["n"] > 5 else (4,)

    return {
        "closure": (lambda meta: (triton.cdiv(n, meta["BLOCK"]),), (4, 1, 1)),
        "global": (grid_of_many, (4, 2, 2)),
        "default": (lambda meta, rows=6: (rows, meta["n"] % 7 + 1), (6, 7, 1)),
        "tensor": (lambda _meta: (rows.shape[0], rows.size(-1), rows.stride(0)), (5, 7, 7)),
        "argument": (lambda meta: (meta["x"].numel() // meta["BLOCK"],), (16, 1, 1)),
        "power": (lambda _meta: (triton.next_power_of_2(n), -(-n // 3)), (1024, 334, 1)),
        "list": (lambda _meta: [2, 3], (2, 3, 1)),
        "effect": (counts_calls, (1, 1, 1)),
        "branch": (branches, (3, 1, 1)),
        "float": (lambda meta: (int(meta["n"] / 3),), (333, 1, 1)),
        "object": (GridObject(), (5, 1, 1)),
        "comprehension": (lambda _meta: tuple(i for i in (2, 2)), (2, 2, 1)),
        "is None": (lambda meta: (1 if meta["x"] is None else 2,), (2, 1, 1)),
    }


@pytest.mark.parametrize("name", list(odd_grids()))
def test_callable_grids_give_what_python_gives(stub, name):
    add = hdispatch.adopt(fresh(kernels.add), driver="null")
    add[(1,)](X, Y, OUT, 1000, BLOCK=256)
    for turn in range(3):
        grid, wanted = odd_grids()[name]
        _, got = launched(lambda grid=grid: add[grid](X, Y, OUT, 1000, BLOCK=256))
        assert got is not None
        assert got["grid"] == wanted, turn


def test_a_grid_follows_what_it_reads(stub):
    add = hdispatch.adopt(fresh(kernels.add), driver="null")
    for block in (64, 128):
        add[(1,)](X, Y, OUT, 1000, BLOCK=block)
    for n in (1, 64, 65, 4096, 2**31 + 5):
        for block in (64, 128):
            _, got = launched(
                lambda n=n, block=block: add[lambda meta: (triton.cdiv(n, meta["BLOCK"]),)](X, Y, OUT, 1000, BLOCK=block)
            )
            assert got is not None
            assert got["grid"] == (-(-n // block), 1, 1)


def test_a_grid_that_reads_a_global_sees_it_change(stub, monkeypatch):
    add = hdispatch.adopt(fresh(kernels.add), driver="null")
    for value in (1000, 2000, 2000):
        monkeypatch.setitem(globals(), "N", value)
        _, got = launched(lambda: add[grid_of_many](X, Y, OUT, 1000, BLOCK=256))
        if got is not None:
            assert got["grid"][0] == -(-value // 256)
    assert counts(add)["hits"] == 2


def test_a_grid_that_raises_raises(stub):
    add = hdispatch.adopt(fresh(kernels.add), driver="null")
    add[(1,)](X, Y, OUT, 1000, BLOCK=256)
    zero = 0
    with pytest.raises(ZeroDivisionError):
        add[lambda meta: (meta["n"] // zero,)](X, Y, OUT, 1000, BLOCK=256)
    with pytest.raises(KeyError, match="NO_SUCH"):
        add[lambda meta: (meta["NO_SUCH"],)](X, Y, OUT, 1000, BLOCK=256)


@pytest.mark.parametrize("grid", [(0,), (4, 0), (1, 1, 0)])
def test_an_empty_grid_launches_nothing(stub, grid):
    add = hdispatch.adopt(fresh(kernels.add), driver="null")
    before = stub.launches
    for _ in range(2):
        result, got = launched(lambda: add[grid](X, Y, OUT, 1000, BLOCK=256))
        assert got is None
        assert result.metadata.num_warps == 4
    assert counts(add)["empty"] == 1
    assert stub.launches == before


@pytest.mark.parametrize("grid", [4, (1.5,), (-1,), (2**31,), "x", None])
def test_a_grid_that_is_none_is_refused_as_triton_does(stub, grid):
    add, plain = hdispatch.adopt(fresh(kernels.add), driver="null"), fresh(kernels.add)
    for kernel in (plain, add):
        kernel[(1,)](X, Y, OUT, 1000, BLOCK=256)
    try:
        plain[grid](X, Y, OUT, 1000, BLOCK=256)
    except Exception as error:
        with pytest.raises(type(error)):
            add[grid](X, Y, OUT, 1000, BLOCK=256)
    else:
        add[grid](X, Y, OUT, 1000, BLOCK=256)
    assert misses(add).get("grid") == 1


# ---- autotuners and heuristics ----


def wrapper(kernel: Any) -> Any:
    """A copy of an autotuner or of heuristics, around a kernel of its own."""
    made = copy.copy(kernel)
    made.fn = fresh(kernel.fn)
    if hasattr(kernel, "cache"):
        made.cache = {}
    return made


def test_an_autotuned_kernel_is_served_by_its_key(stub):
    tuned = hdispatch.adopt(wrapper(kernels.tuned), driver="null")
    grid = lambda meta: (triton.cdiv(meta["n"], meta["BLOCK"]),)  # noqa: E731
    for n in (1000, 1000, 17, 1000, 17):
        result, got = launched(lambda n=n: tuned[grid](X, OUT, n))
        config = tuned.cache[(n, "torch.float32", "torch.float32")]
        assert tuned.best_config is config
        assert result.metadata.num_warps == config.num_warps
        if got is not None:
            assert got["grid"] == (-(-n // config.kwargs["BLOCK"]), 1, 1)
            assert got["block"] == (32 * config.num_warps, 1, 1)
    assert counts(tuned)["hits"] == 3
    tuned.cache.clear()  # to be tuned anew
    _, got = launched(lambda: tuned[grid](X, OUT, 1000))
    assert got is None
    assert misses(tuned)["autotuner's choices taken back"] == 1


def test_heuristics_follow_their_arguments(stub):
    kernel = hdispatch.adopt(wrapper(kernels.heuristic), driver="null")
    for turn in range(2):
        for n, warps, even in ((1000, 8, False), (1024, 8, True), (64, 4, True), (65, 4, False)):
            result, got = launched(lambda n=n: kernel[(4,)](X, OUT, n, BLOCK=64))
            assert (got is not None) == (turn == 1)
            assert result.metadata.num_warps == warps
            assert result.src.constants[(3,)] is even
    assert counts(kernel)["hits"] == 4


def test_heuristics_that_cannot_be_followed_are_called(stub):
    called = []

    def even(args):
        called.append(args["n"])
        return args["n"] % args["BLOCK"] == 0

    kernel = triton.heuristics({"EVEN": even})(fresh(kernels.heuristic.fn))
    hdispatch.adopt(kernel, driver="null")
    for n in (64, 64, 65, 64):
        result, _ = launched(lambda n=n: kernel[(4,)](X, OUT, n, BLOCK=64))
        assert result.src.constants[(3,)] is (n % 64 == 0)
    assert called == [64, 64, 64, 65, 65, 64]  # by both where a key is new
    assert counts(kernel)["hits"] == 2


# ---- what goes to Triton ----


def served(kernel: Any, *args: Any, **keywords: Any) -> bool:
    return launched(lambda: kernel[(4,)](*args, **keywords))[1] is not None


ADD = (X, Y, OUT, 1000)


@pytest.fixture
def add(stub: triton_stub.Stub) -> Any:
    kernel = hdispatch.adopt(fresh(kernels.add), driver="null")
    assert not served(kernel, *ADD, BLOCK=256)
    assert served(kernel, *ADD, BLOCK=256)
    return kernel


def test_launch_hooks_get_their_calls(add, stub):
    seen = []
    hook = lambda metadata: seen.append(metadata.get()["name"])  # noqa: E731
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        assert not served(add, *ADD, BLOCK=256)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert seen == ["add"]
    assert served(add, *ADD, BLOCK=256)
    with knobs.runtime.scope():
        knobs.runtime.launch_exit_hook = lambda _metadata: seen.append("exit")
        assert not served(add, *ADD, BLOCK=256)
    assert served(add, *ADD, BLOCK=256)
    assert seen == ["add", "exit"]
    assert misses(add)["launch hook"] == 2


def test_pre_run_hooks_get_their_calls(add):
    seen = []
    add.add_pre_run_hook(lambda *args, **_keywords: seen.append(args[3]))
    assert not served(add, *ADD, BLOCK=256)
    add.pre_run_hooks.clear()
    assert served(add, *ADD, BLOCK=256)
    add.pre_run_hooks = [lambda *_args, **_keywords: seen.append("another list")]
    assert not served(add, *ADD, BLOCK=256)
    assert seen == [1000, "another list"]
    assert misses(add)["pre-run hook"] == 2


def test_knobs_of_the_code_are_part_of_the_key(add):
    with knobs.runtime.scope():
        knobs.runtime.debug = True
        assert not served(add, *ADD, BLOCK=256)
        assert served(add, *ADD, BLOCK=256)
    assert served(add, *ADD, BLOCK=256)
    assert misses(add) == {"first call of a key": 2}


def test_a_captured_global_that_changed_is_tritons_to_refuse(stub, monkeypatch):
    captured = hdispatch.adopt(fresh(kernels.captured), driver="null")
    assert not served(captured, X, OUT)
    assert served(captured, X, OUT)
    monkeypatch.setitem(kernels.__dict__, "FACTOR", tl.constexpr(4))
    with pytest.raises(RuntimeError, match="Global variable FACTOR has changed"):
        served(captured, X, OUT)
    assert misses(captured)["captured global changed"] == 1
    monkeypatch.undo()
    assert served(captured, X, OUT)


def test_a_source_that_changed_is_compiled_anew(add):
    add._unsafe_update_src(add.src.replace("+ tl.load(y", "- tl.load(y"))
    assert not served(add, *ADD, BLOCK=256)
    assert served(add, *ADD, BLOCK=256)


def test_warm_up_launches_nothing(add):
    result, got = launched(lambda: add.warmup(torch.float32, torch.float32, torch.float32, 1000, BLOCK=64, grid=(1,)))
    assert got is None
    assert result.metadata.num_warps == 4
    assert misses(add)["warm-up"] == 1


def test_run_is_served_as_the_launch_is(add):
    call = lambda: add.run(*ADD, grid=(4,), warmup=False, BLOCK=256)  # noqa: E731
    result, got = launched(call)
    assert got is not None
    assert result is add[(4,)](*ADD, BLOCK=256)
    assert counts(add)["hits"] == 3


@pytest.mark.parametrize(
    ("args", "keywords", "error"),
    [
        ((X, Y), {"BLOCK": 256}, TypeError),
        (ADD, {"BLOCK": 256, "n": 3}, TypeError),
        (ADD, {"BLOCK": 256, "nosuch": 3}, KeyError),
    ],
)
def test_wrong_arguments_raise_as_triton_does(add, args, keywords, error):
    for _ in range(2):
        with pytest.raises(error):
            add[(4,)](*args, **keywords)


def test_tensors_that_only_torch_knows_are_tritons(add):
    class Sub(torch.Tensor):
        pass

    assert not served(add, X.as_subclass(Sub), Y, OUT, 1000, BLOCK=256)
    assert served(add, torch.nn.Parameter(X), Y, OUT, 1000, BLOCK=256)
    assert not served(add, triton.reinterpret(X, tl.float32), Y, OUT, 1000, BLOCK=256)
    with torch.overrides.BaseTorchFunctionMode():
        assert not served(add, *ADD, BLOCK=256)
    assert {"subclass of a tensor", "argument's type", "torch mode"} <= set(misses(add))


def test_a_refusal_of_the_driver_is_tritons_to_raise(add, stub):
    with stub.refusing(), pytest.raises(RuntimeError, match="stub refuses"):
        add[(4,)](X, Y, OUT, 1000, BLOCK=128)
    assert not served(add, X, Y, OUT, 1000, BLOCK=128)  # what was not launched is no row


def test_compile_time_values_without_a_hash_are_tritons(stub):
    cast = hdispatch.adopt(fresh(kernels.cast), driver="null")
    with pytest.raises(Exception):  # noqa: B017, PT011  Triton's own, of a list as a constexpr
        cast[(1,)](X, OUT, tl.float32, [1])
    assert misses(cast) == {"compile-time value that cannot be hashed, or one of too many": 1}


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
    gone = weakref.ref(fresh(kernels.add))
    kernel = fresh(kernels.add)
    gone = weakref.ref(kernel)
    hdispatch.adopt(kernel, driver="null")
    for _ in range(2):
        kernel[lambda meta: (meta["n"],)](*ADD, BLOCK=256)
    jit._triton_jit_function_registry.clear()
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

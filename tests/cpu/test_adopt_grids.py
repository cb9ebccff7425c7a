"""Adopted kernels: callable grids, autotuners and heuristics give what Python gives."""

from __future__ import annotations

import gc
import threading
from typing import Any

import adopted_kernels as kernels
import hdispatch
import pytest
import torch
import triton
from adopted_calls import OUT, X, Y, counts, fresh, launched, misses, wrapper

pytest_plugins = ("adopted_fixtures",)
pytestmark = pytest.mark.usefixtures("left_alone")


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

REPLACED = "autotuner's kernel, keys, configurations or run replaced"


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


@pytest.mark.parametrize("way", ["cleared", "popped", "set", "another dict"])
def test_an_autotuner_that_is_tuned_anew_launches_what_it_chose_last(stub, way):
    times = iter([1.0, 2.0, 1.0, 2.0, 2.0, 1.0])  # of BLOCK=64 and 128, for 17, for 1000, for 17 again
    tuned = wrapper(kernels.tuned)
    tuned._do_bench = tuned.do_bench = lambda call, **_keywords: (call(), [next(times)] * 3)[1]
    hdispatch.adopt(tuned, driver="null")
    call = lambda n: launched(lambda: tuned[(1,)](X, OUT, n))  # noqa: E731
    for n in (17, 1000, 17, 1000):
        _, got = call(n)
    assert got["block"] == (64, 1, 1)
    key = (17, "torch.float32", "torch.float32")
    if way == "cleared":
        tuned.cache.clear()
    elif way == "popped":
        del tuned.cache[key]
    elif way == "set":
        tuned.cache[key] = tuned.configs[1]
    else:
        tuned.cache = {}
    for turn in range(3):
        result, got = call(17)
        assert (got is None) == (turn == 0)
        assert result.metadata.num_warps == 4
        assert tuned.best_config is tuned.cache[key] is tuned.configs[1]
    assert got["block"] == (128, 1, 1)
    assert misses(tuned)["autotuner's choices taken back"] == 1
    assert len(hdispatch.explain(tuned).splitlines()) == 3


@pytest.mark.parametrize("way", ["cleared", "set", "replaced"])
def test_a_choice_that_is_taken_back_right_after_the_first_call(stub, way):
    times = iter([1.0, 2.0, 2.0, 1.0])
    tuned = wrapper(kernels.tuned)
    tuned._do_bench = tuned.do_bench = lambda call, **_keywords: (call(), [next(times)] * 3)[1]
    hdispatch.adopt(tuned, driver="null")
    call = lambda: launched(lambda: tuned[(1,)](X, OUT, 17))  # noqa: E731
    call()
    if way == "cleared":
        tuned.cache.clear()
    elif way == "set":
        tuned.cache[17, "torch.float32", "torch.float32"] = tuned.configs[1]
    else:
        tuned.cache = {}
    _, got = call()
    assert got is None
    _, got = call()
    assert got["block"] == (128, 1, 1)
    assert misses(tuned)["autotuner's choices taken back"] == 1


class Odd:
    """A key that cannot be compared."""

    def __hash__(self):
        return 1

    def __eq__(self, other):
        raise ValueError("not to be compared")


def test_choices_whose_comparison_fails_are_not_taken_for_the_same(stub):
    tuned = wrapper(kernels.tuned)
    tuned._do_bench = tuned.do_bench = lambda call, **_keywords: (call(), [1.0] * 3)[1]
    hdispatch.adopt(tuned, driver="null")
    call = lambda: launched(lambda: tuned[(1,)](X, OUT, 17))  # noqa: E731
    call()
    tuned.cache[Odd()] = tuned.configs[0]
    assert call()[1] is not None
    chosen = {key: config for key, config in tuned.cache.items() if not isinstance(key, Odd)}
    tuned.cache = {Odd(): tuned.configs[0], **chosen}
    with pytest.raises(ValueError, match="not to be compared"):
        call()
    assert [call()[1] is None for _ in range(2)] == [True, False]


def test_a_run_that_is_put_over_an_autotuner_gets_its_launches(stub):
    tuned = wrapper(kernels.tuned)
    tuned._do_bench = tuned.do_bench = lambda call, **_keywords: (call(), [1.0] * 3)[1]
    hdispatch.adopt(tuned, driver="null")
    for _ in range(2):
        _, got = launched(lambda: tuned[(1,)](X, OUT, 17))
    assert got is not None
    seen = []
    tuned.run = lambda *args, **keywords: seen.append((args, keywords))
    tuned[(1,)](X, OUT, 17)
    assert len(seen) == 1
    del tuned.run
    _, got = launched(lambda: tuned[(1,)](X, OUT, 17))
    assert got is not None


def test_an_autotuner_whose_configurations_are_a_tuple_stays_tritons(stub):
    tuned = wrapper(kernels.tuned)
    tuned.configs = tuple(tuned.configs)
    tuned._do_bench = tuned.do_bench = lambda call, **_keywords: (call(), [1.0] * 3)[1]
    hdispatch.adopt(tuned, driver="null")
    for _ in range(2):
        assert tuned[(1,)](X, OUT, 17) is not None
    assert "Triton's  every call: an autotuner whose configs are a tuple" in hdispatch.explain(tuned)


def test_an_autotuner_that_is_tuned_again_and_again_keeps_no_more_rows_than_configurations(stub):
    tuned = wrapper(kernels.tuned)
    hdispatch.adopt(tuned, driver="null")
    launched(lambda: tuned[(1,)](X, OUT, 17))
    key = (17, "torch.float32", "torch.float32")
    for turn in range(8):
        tuned.cache[key] = tuned.configs[turn % 2]
        assert launched(lambda: tuned[(1,)](X, OUT, 17))[1] is None or turn == 0
        _, got = launched(lambda: tuned[(1,)](X, OUT, 17))
        assert got["block"] == ((64, 128)[turn % 2], 1, 1)
    entry = tuned.__dict__["_hdispatch_adopted"]
    assert sum(type(each) is triton.Config for each in gc.get_referents(entry)) == 2


def test_an_autotuner_whose_configurations_are_replaced_is_tritons(stub):
    tuned = hdispatch.adopt(wrapper(kernels.tuned), driver="null")
    for _ in range(2):
        _, got = launched(lambda: tuned[(1,)](X, OUT, 17))
    assert got is not None
    tuned.configs = [triton.Config({"BLOCK": 32}, num_warps=1)]
    result, got = launched(lambda: tuned[(1,)](X, OUT, 17))
    assert got is None
    assert result.metadata.num_warps == 1
    assert misses(tuned)[REPLACED] == 1


def replace_kernel(tuned):
    tuned.fn = fresh(tuned.fn)


def replace_keys(tuned):
    tuned.keys = [*tuned.keys]


def replace_a_key(tuned):
    tuned.keys[0] = "BLOCK"


def replace_configurations(tuned):
    tuned.configs = [*tuned.configs]


@pytest.mark.parametrize("replace", [replace_kernel, replace_keys, replace_a_key, replace_configurations])
def test_what_is_replaced_in_an_autotuner_is_tritons(stub, replace):
    tuned = wrapper(kernels.tuned)
    tuned.keys = [*tuned.keys]
    hdispatch.adopt(tuned, driver="null")
    former = dict(vars(tuned), keys=[*tuned.keys])
    for _ in range(2):
        _, got = launched(lambda: tuned[(1,)](X, OUT, 17))
    assert got is not None
    replace(tuned)
    for _ in range(2):
        result, got = launched(lambda: tuned[(1,)](X, OUT, 17))
        assert got is None
        assert result.src.fn is tuned.fn
    assert misses(tuned)[REPLACED] == 2
    tuned.fn, tuned.configs = former["fn"], former["configs"]
    if replace is replace_a_key:
        tuned.keys[0] = former["keys"][0]
        assert launched(lambda: tuned[(1,)](X, OUT, 17))[1] is not None


def only_configuration() -> Any:
    """An autotuner that has nothing to choose."""
    return triton.autotune([triton.Config({"BLOCK": 64}, num_warps=2)], key=["n"])(fresh(kernels.tuned.fn))


def another_configuration(tuned):
    tuned.configs[0] = triton.Config({"BLOCK": 64}, num_warps=4)


def another_option(tuned):
    tuned.configs[0].num_warps = 4


def other_keywords(tuned):
    tuned.configs[0].kwargs = {"BLOCK": 64, "num_warps": 4}
    tuned.configs[0].num_warps = None


@pytest.mark.parametrize("write", [another_configuration, another_option, other_keywords])
def test_an_only_configuration_that_is_replaced_in_place_is_launched(stub, write):
    tuned = hdispatch.adopt(only_configuration(), driver="null")
    for _ in range(2):
        _, got = launched(lambda: tuned[(1,)](X, OUT, 17))
    assert got["block"] == (64, 1, 1)
    write(tuned)
    for turn in range(3):
        result, got = launched(lambda: tuned[(1,)](X, OUT, 17))
        assert (got is None) == (turn == 0)
        assert result.metadata.num_warps == 4
        assert tuned.best_config is tuned.configs[0]
    assert got["block"] == (128, 1, 1)
    assert misses(tuned) == {"first call of a key": 1, "autotuner's choices taken back": 1}


def test_a_value_of_a_configuration_that_is_written_to_is_launched(stub):
    tuned = hdispatch.adopt(wrapper(kernels.tuned), driver="null")
    tuned.configs = [triton.Config({"BLOCK": 64}), triton.Config({"BLOCK": 128})]
    hdispatch.unadopt(tuned)
    tuned = hdispatch.adopt(wrapper(tuned), driver="null")
    grid = lambda meta: (triton.cdiv(meta["n"], meta["BLOCK"]),)  # noqa: E731
    for _ in range(2):
        _, got = launched(lambda: tuned[grid](X, OUT, 1000))
    assert got["grid"] == (16, 1, 1)
    tuned.best_config.kwargs["BLOCK"] = 32
    for _ in range(2):
        result, got = launched(lambda: tuned[grid](X, OUT, 1000))
        assert result.src.constants[(3,)] == 32
    assert got["grid"] == (32, 1, 1)


@pytest.mark.parametrize("way", ["written", "chosen"])
def test_a_pre_hook_that_a_choice_has_later_is_called(stub, way):
    hooked = []
    tuned = hdispatch.adopt(wrapper(kernels.tuned), driver="null")
    for _ in range(2):
        tuned[(1,)](X, OUT, 17)
    config = triton.Config({"BLOCK": 64}, num_warps=2)
    tuned.cache[17, "torch.float32", "torch.float32"] = config
    assert [launched(lambda: tuned[(1,)](X, OUT, 17))[1] is None for _ in range(2)] == [True, False]
    hook = lambda given: hooked.append(given["n"])  # noqa: E731
    if way == "written":
        config.pre_hook = hook
    else:
        config = triton.Config({"BLOCK": 64}, num_warps=2, pre_hook=hook)
        tuned.cache[17, "torch.float32", "torch.float32"] = config
    for _ in range(3):
        assert launched(lambda: tuned[(1,)](X, OUT, 17))[1] is None
    assert hooked == [17] * 3
    assert misses(tuned)["a configuration with a pre_hook"] == 2
    config.pre_hook = None
    assert [launched(lambda: tuned[(1,)](X, OUT, 17))[1] is None for _ in range(2)] == [True, False]


@pytest.mark.parametrize("way", ["cleared", "set", "another dict"])
def test_a_choice_that_another_thread_takes_back_during_the_compile_of_a_first_call(stub, way):
    tuned = wrapper(kernels.tuned)
    function = tuned.fn
    key = (32, "torch.float32", "torch.float32")
    tuned._do_bench = tuned.do_bench = lambda _call, **_keywords: [1.0] * 3  # so that the launch compiles, after the choice

    def take_back():
        """What another thread does while Triton compiles without the GIL."""
        assert tuned.cache[key] is tuned.configs[0]
        if way == "set":
            tuned.cache[key] = tuned.configs[1]
        elif way == "cleared":
            tuned.cache.clear()
        else:
            tuned.cache = {}

    def compile_once(*args, **keywords):
        function.__dict__.pop("_do_compile")
        thread = threading.Thread(target=take_back)
        thread.start()
        thread.join()
        return function._do_compile(*args, **keywords)

    hdispatch.adopt(tuned, driver="null")
    tuned[(1,)](X, OUT, 1000)  # the code's hash is known from now on, and the compile is that of another key
    function._do_compile = compile_once
    result, _ = launched(lambda: tuned[(1,)](X, OUT, 32))
    assert result.metadata.num_warps == 2
    for turn in range(2):
        result, got = launched(lambda: tuned[(1,)](X, OUT, 32))
        assert (got is None) == (turn == 0)
        assert result.metadata.num_warps == tuned.cache[key].num_warps == (4 if way == "set" else 2)
    assert misses(tuned) == {"first call of a key": 3}


def test_knobs_that_another_thread_writes_during_the_compile_of_a_first_call(stub):
    kernel = fresh(kernels.tuned.fn)
    call = lambda n: launched(lambda: kernel[(1,)](X, OUT, n, BLOCK=64))  # noqa: E731
    hdispatch.adopt(kernel, driver="null")
    call(17)

    def compile_once(*args, **keywords):
        kernel.__dict__.pop("_do_compile")
        made = kernel._do_compile(*args, **keywords)
        triton.knobs.runtime.debug = True
        return made

    kernel._do_compile = compile_once
    try:
        result, _ = call(32)
        assert not result.metadata.debug
        for turn in range(2):
            result, got = call(32)
            assert (got is None) == (turn == 0)
            assert result.metadata.debug
    finally:
        triton.knobs.runtime.debug = False


def replace_run(kernel, seen):
    plain = kernel.run
    kernel.run = lambda *args, **keywords: (seen.append(args[2]), plain(*args, **keywords))[1]


def replace_a_function(kernel, seen):
    kernel.values["num_warps"] = lambda args: (seen.append(args["n"]), 2)[1]


def replace_all_functions(kernel, seen):
    kernel.values = {**kernel.values, "num_warps": lambda args: (seen.append(args["n"]), 2)[1]}


def replace_inner(kernel, seen):
    kernel.fn = fresh(kernel.fn)
    replace_run(kernel.fn, seen)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("replace", [replace_run, replace_a_function, replace_all_functions, replace_inner])
def test_what_is_replaced_in_heuristics_gets_its_calls(stub, replace, depth):
    inner = triton.heuristics({**kernels.heuristic.values})(fresh(kernels.heuristic.fn))
    kernel = triton.heuristics({"num_stages": lambda _args: 2})(inner) if depth else inner
    hdispatch.adopt(kernel, driver="null")
    call = lambda: launched(lambda: kernel[(4,)](X, OUT, 1000, BLOCK=64))[1]  # noqa: E731
    for _ in range(2):
        got = call()
    assert got is not None
    former, seen = dict(vars(inner), values={**inner.values}), []
    replace(inner, seen)
    for turn in range(1, 3):
        assert call() is None
        assert seen == [1000] * turn
    vars(inner).pop("run", None)
    inner.fn, inner.values = former["fn"], kernels.heuristic.values
    if replace is replace_run:
        assert call() is None  # the values are another dict
        assert "heuristics or their kernel replaced" in misses(kernel)


def test_an_autotuner_shows_the_choice_of_the_last_call(stub):
    times = {17: [1.0, 2.0], 1000: [2.0, 1.0]}  # of BLOCK=64 and 128
    left = [time for each in times.values() for time in each]
    tuned = wrapper(kernels.tuned)
    tuned._do_bench = tuned.do_bench = lambda call, **_keywords: (call(), [left.pop(0)] * 3)[1]
    hdispatch.adopt(tuned, driver="null")
    for turn, n in enumerate((17, 17, 1000, 17, 1000)):  # the one that Triton chose comes between two of ours
        result, got = launched(lambda n=n: tuned[(1,)](X, OUT, n))
        assert (got is None) == (turn in (0, 2))
        assert tuned.best_config is tuned.cache[(n, "torch.float32", "torch.float32")]
        assert tuned.best_config.kwargs["BLOCK"] == {17: 64, 1000: 128}[n]
        assert result.metadata.num_warps == tuned.best_config.num_warps
    assert not left


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

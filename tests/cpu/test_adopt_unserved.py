"""Adopted kernels: what is unusual goes to Triton, is counted by its reason, and is right."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import adopted_kernels as kernels
import hdispatch
import pytest
import torch
import triton
import triton.language as tl
from adopted_calls import ADD, OUT, X, Y, counts, fresh, launched, misses, served
from hdispatch.errors import HdispatchError
from triton import knobs

pytest_plugins = ("adopted_fixtures",)
pytestmark = pytest.mark.usefixtures("left_alone")


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


def test_a_python_that_does_not_tell_of_writes_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 13, 0, "final", 0))
    with pytest.raises(HdispatchError, match="adopt takes 3"):
        hdispatch.adopt(kernels.add)


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


def test_more_forms_of_keywords_than_are_kept_are_tritons(stub):
    kernel = hdispatch.adopt(fresh(kernels.add), driver="null")
    given = dict(zip(["x", "y", "o", "n", "BLOCK"], (*ADD, 256), strict=True))
    before = stub.launches
    orders = list(itertools.permutations(given))
    for order in orders:
        ordered = {name: given[name] for name in order}
        assert kernel.run(grid=(4,), warmup=False, **ordered) is kernel[(4,)](**ordered)
    assert stub.launches - before + counts(kernel)["hits"] == 2 * len(orders) == 240
    assert misses(kernel)["arguments"] == 240 - 64


# ---- somebody else's `run` ----


def calls_of(plain: Callable[..., Any]) -> tuple[list[Any], Callable[..., Any]]:
    """`run` with a note of each call's `n`."""
    seen: list[Any] = []

    def run(*args: Any, **keywords: Any) -> Any:
        seen.append(args[-1])
        return plain(*args, **keywords)

    return seen, run


def test_a_run_put_over_tritons_gets_the_launches_of_its_kernel(add):
    seen, add.run = calls_of(add.run)
    assert not served(add, *ADD, BLOCK=256)
    del add.run
    assert served(add, *ADD, BLOCK=256)
    assert seen == [1000]


def test_a_run_put_over_that_of_the_class_gets_all_launches(add, monkeypatch):
    launch = add[(4,)]
    seen, run = calls_of(triton.JITFunction.run)
    monkeypatch.setattr(triton.JITFunction, "run", run)
    assert not served(add, *ADD, BLOCK=256)
    assert launched(lambda: launch(*ADD, BLOCK=256))[1] is None
    assert seen == [1000, 1000]
    assert "run was replaced" in misses(add)
    monkeypatch.undo()
    assert served(add, *ADD, BLOCK=256)


def test_a_class_with_a_run_of_its_own_stays_tritons(stub):
    seen = []

    class Noting(triton.JITFunction):
        def run(self, *args: Any, **keywords: Any) -> Any:
            seen.append(args[3])
            return super().run(*args, **keywords)

    for adopt in (hdispatch.adopt, lambda _kernel, driver: hdispatch.adopt(driver=driver)):
        hdispatch.stats(reset=True)
        kernel = Noting(kernels.add.fn)
        adopt(kernel, driver="null")
        for n in (1, 2, 2):
            assert not served(kernel, X, Y, OUT, n, BLOCK=256)
        why = "a class of its own kind, Noting, with a run of its own"
        assert counts(kernel) == {"hits": 0, "empty": 0, "fallbacks": 3, "misses": {why: 3}}
        assert hdispatch.explain(kernel) == f"adopted\nTriton's  every call: {why}"
        kernel.run(X, Y, OUT, 3, grid=(4,), warmup=False, BLOCK=256)
        assert misses(kernel) == {why: 4}
        hdispatch.unadopt(kernel)
    assert seen == [1, 2, 2, 3] * 2


def test_an_autotuner_with_a_pre_hook_stays_tritons_and_its_kernel_is_served(stub):
    hooked: list[int] = []
    configs = [triton.Config({"BLOCK": 64}, pre_hook=lambda given: hooked.append(given["n"]))]
    tuned = triton.autotune(configs, key=["n"])(fresh(kernels.tuned.fn))
    assert hdispatch.explain(tuned) == "not adopted"
    hdispatch.adopt(tuned, driver="null")
    assert not served(tuned, X, OUT, 17)
    assert served(tuned, X, OUT, 17)
    assert hooked == [17, 17]
    why = "a configuration with a pre_hook"
    assert misses(tuned) == {why: 2, "first call of a key": 1}
    first, second, third, *rest = hdispatch.explain(tuned).splitlines()
    assert (first, second, third) == ("adopted", f"Triton's  every call: {why}", "the kernel inside:")
    assert rest[0] == "  adopted, 1 key(s)"
    assert rest[1].startswith("  served    block ")
    hdispatch.unadopt(tuned)
    assert not served(tuned, X, OUT, 17)
    assert hdispatch.explain(tuned).startswith("adopted before")
    assert misses(tuned) == {why: 2, "first call of a key": 1}


def test_a_block_gives_back_what_is_inside_a_wrapper_that_stays_tritons(stub):
    tuned = triton.autotune([triton.Config({"BLOCK": 64}, pre_hook=lambda _given: None)], key=["n"])(fresh(kernels.tuned.fn))
    with hdispatch.adopting(tuned, driver="null"):
        served(tuned, X, OUT, 17)
        assert served(tuned, X, OUT, 17)
    assert not served(tuned, X, OUT, 17)
    hdispatch.adopt(tuned.fn, driver="null")
    with hdispatch.adopting(tuned, driver="null"):
        assert served(tuned, X, OUT, 17)
    assert served(tuned, X, OUT, 17)  # as before the block


def test_compile_time_values_without_a_hash_are_tritons(stub):
    cast = hdispatch.adopt(fresh(kernels.cast), driver="null")
    with pytest.raises(Exception):  # noqa: B017, PT011  Triton's own, of a list as a constexpr
        cast[(1,)](X, OUT, tl.float32, [1])
    assert misses(cast) == {"compile-time value that cannot be hashed, or one of too many": 1}

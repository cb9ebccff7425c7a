"""hdispatch.adopt: what reaches the driver is what Triton would have sent; adopting and giving back."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import random
import threading
import weakref
from typing import Any, NamedTuple

import adopted_kernels as kernels
import adopted_random
import hdispatch
import pytest
import torch
import triton
import triton.language as tl
from adopted_calls import ADD, OUT, X, Y, counts, fresh, launched, misses, served, wrapper
from adopted_random import compare
from hdispatch import _C
from triton.runtime import jit

pytest_plugins = ("adopted_fixtures",)
pytestmark = pytest.mark.usefixtures("left_alone")


# ---- the same launch ----


@pytest.mark.parametrize(
    "options",
    [{}, {"num_warps": 8}, {"launch_pdl": True}, {"launch_cooperative_grid": True}, {"num_ctas": 2}, {"num_stages": 2}],
    ids=str,
)
def test_options_reach_the_driver(stub, options):
    add = hdispatch.adopt(fresh(kernels.add), driver="null")
    call = (stub, add, (4,), (X, Y, OUT, 1024), {"BLOCK": 256, **options})
    assert [compare(*call), compare(*call)] == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_random_calls_have_tritons_key_and_parameters(stub, seed):
    made = adopted_random.kernels_of(adopted_random.NAMED)
    tally = adopted_random.check(stub, made, random.Random(seed), 100_000)
    assert not tally.wrong
    assert tally.served > 95_000
    for kernel in made.values():
        assert counts(kernel)["hits"] > 5000, counts(kernel)
        assert set(misses(kernel)) <= {"first call of a key", "argument of type i32 is made otherwise"}, misses(kernel)


@pytest.mark.slow
def test_random_calls_of_more_kernels(stub):
    made = adopted_random.kernels_of(adopted_random.ALL)
    assert len(made) - len(adopted_random.TRITONS) >= 30
    tally = adopted_random.check(stub, made, random.Random(1), 20_000)
    assert not tally.wrong
    assert set(tally.by_kernel) == set(made)
    for name, of_kernel in tally.by_kernel.items():
        assert (of_kernel["served"] > 100) == (name not in adopted_random.TRITONS), (name, of_kernel)


def test_tuples_are_values_of_their_own(stub):
    kernel = hdispatch.adopt(fresh(kernels.tuples), driver="null")
    grid = lambda meta: (meta["pair"][1],)  # noqa: E731

    def call(*pair):
        return launched(lambda: kernel[grid](pair, OUT, 7))

    for turn in range(2):
        for pair in ((X, 5), (X[1:], 5), (X, 16), (X, 1), (X.to(torch.int32), 5), (X, 32), (X, 5, 2.0, None)):
            result, got = call(*pair)
            assert (got is not None) == (turn == 1 or pair[1] == 32), pair
            if got is not None:
                assert got["grid"] == (pair[1], 1, 1)
                addresses = [pair[0].data_ptr().to_bytes(8, "little"), OUT.data_ptr().to_bytes(8, "little")]
                assert [each for each in got["params"] if each in addresses] == addresses
            assert result is call(*pair)[0]
    assert call(Y, 5)[1]["params"][0] == Y.data_ptr().to_bytes(8, "little")
    assert set(misses(kernel)) == {"first call of a key"}

    class Pair(NamedTuple):
        x: torch.Tensor
        n: int

    for odd, reason in (((X, 5, (1, 2)), "tuple"), (Pair(X, 5), "tuple"), ((X, 5, *range(250)), "tuple")):
        before = misses(kernel).get(reason, 0)
        with contextlib.suppress(Exception):  # Triton may refuse it
            kernel[(1,)](odd, OUT, 7)
        assert misses(kernel)[reason] == before + 1


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


def test_a_kept_launch_is_given_back_with_its_kernel(add, stub):
    launch, before = add[(4,)], stub.launches
    hdispatch.unadopt(add)
    assert launched(lambda: launch(*ADD, BLOCK=256))[1] is None
    assert stub.launches == before + 1
    hdispatch.adopt(add)
    assert launched(lambda: launch(*ADD, BLOCK=256))[1] is not None


def test_what_keeps_a_launch_that_leads_back_to_it_is_freed(add):
    class Layer:
        def __init__(self) -> None:
            self.launch = add[self.grid]

        def grid(self, _meta: dict[str, Any]) -> tuple[int]:
            return (4,)

    layer = Layer()
    for _ in range(2):
        layer.launch(*ADD, BLOCK=256)
    gone = weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None


def test_a_block_leaves_what_is_adopted_in_it(stub):
    kernel = fresh(kernels.add)
    with hdispatch.adopting(driver="null"):
        served(kernel, *ADD, BLOCK=256)
        hdispatch.adopt(kernel, driver="null")
    assert served(kernel, *ADD, BLOCK=256)
    hdispatch.adopt(driver="null")
    other = fresh(kernels.add)
    served(other, *ADD, BLOCK=256)
    hdispatch.unadopt()
    hdispatch.adopt(other, driver="null")
    with hdispatch.adopting(driver="null"):
        pass
    assert served(other, *ADD, BLOCK=256)


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

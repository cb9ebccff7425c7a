"""Adopting code that launches Triton kernels: which kernels it names, and giving them back."""

from __future__ import annotations

import types
from typing import Any

import adopted_kernels as kernels
import hdispatch
import host_code
import pytest
import torch
from adopted_calls import X, launched
from hdispatch.adopted import adoption
from hdispatch.adopted.host_code import kernels_named_by

pytest_plugins = ("adopted_fixtures",)
pytestmark = pytest.mark.usefixtures("left_alone")


def adopted_by(given: Any) -> set[str]:
    """Names of the kernels that are adopted."""
    return {each.fn.__name__ for each in adoption._kernels_of(given) if adoption._is_adopted(each)}


@pytest.mark.parametrize("case", host_code.CASES)
def test_the_kernels_that_code_names_are_adopted_and_given_back(stub, case):
    given, names = host_code.CASES[case]
    assert adopted_by(given) == set()
    assert hdispatch.adopt(given, driver="null") is given
    assert adopted_by(given) == names
    found = hdispatch.explain(given).splitlines()
    assert {line.rpartition(".")[2] for line in found if not line.startswith(" ")} == {f"{name}:" for name in names}
    assert {line.split(",")[0] for line in found if line.startswith("  ")} >= {"  adopted"}
    hdispatch.unadopt(given)
    assert adopted_by(given) == set()
    with hdispatch.adopting(given, driver="null"):
        assert adopted_by(given) == names
    assert adopted_by(given) == set()


def test_calls_through_an_autograd_function_are_served(stub):
    hdispatch.adopt(host_code.Scale.apply, driver="null")
    x = X.double().requires_grad_()  # no other test does
    for turn in range(2):
        out, got = launched(lambda: host_code.Scale.apply(x))
        assert (got is not None) == (turn == 1)
        _, got = launched(lambda out=out: out.sum().backward())
        assert (got is not None) == (turn == 1)


def test_a_function_that_names_itself_before_it_is_there_is_looked_into():
    @hdispatch.adopt
    def recursive(n: int) -> None:
        host_code.add[(1,)](n)
        recursive(n - 1)

    assert adopted_by(recursive) == {"add"}


@pytest.mark.parametrize("given", [torch.nn.Linear(4, 4), object(), str, torch.autograd.Function, len])
def test_code_without_kernels_is_refused(given):
    with pytest.raises(hdispatch.HdispatchError, match="kernel"):
        hdispatch.adopt(given)


def test_kernels_that_are_not_adopted_say_so(stub):
    assert hdispatch.explain(host_code.launch).endswith(".add:\n  not adopted") or "adopted before" in hdispatch.explain(
        host_code.launch
    )
    with pytest.raises(TypeError, match="hdispatch op"):
        hdispatch.explain(len)


def test_kernels_of_modules_in_modules_are_named():
    inner, outer = types.ModuleType("somebody.inner"), types.ModuleType("somebody")
    inner.kernel, inner.somebody, outer.inner, outer.somebody = kernels.add, outer, inner, outer
    scope = {"__name__": "user", "somebody": outer}
    exec("def run(x): return somebody.inner.kernel[(1,)](x)", scope)
    assert kernels_named_by(scope["run"], lambda value: value is kernels.add) == [kernels.add]


def test_a_call_that_is_wrapped_is_looked_into_with_its_object():
    class Layer:
        def __init__(self):
            self.kernel = kernels.add

        @torch.no_grad()
        def __call__(self, x):
            return self.kernel[(1,)](x)

    assert kernels_named_by(Layer(), lambda value: value is kernels.add) == [kernels.add]

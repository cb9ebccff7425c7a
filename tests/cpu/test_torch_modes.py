"""Calls that are not plain: subclasses, modes, functorch, meta and fake tensors go through torch."""

from __future__ import annotations

import dataclasses
from typing import Any

import hdispatch
import pytest
import torch
import toy
from doors import (
    DOORS,
    EPSILON,
    FULL,
    INPUT,
    RESULT,
    WEIGHT,
    Args,
    bf16,
    counted,
    counts,
    replaced,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.usefixtures("bundle")


class Subclass(torch.Tensor):
    """A subclass that adds nothing."""


class Logged(torch.Tensor):
    """A subclass with its own __torch_function__."""

    seen: list[Any] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


class Wrapped(torch.Tensor):
    """A wrapper with its own __torch_dispatch__."""

    @staticmethod
    def __new__(cls, inner):  # noqa: D102
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return func(*(a.inner if isinstance(a, Wrapped) else a for a in args), **(kwargs or {}))


def test_subclasses(door):
    door(*replaced(INPUT, bf16(4, 64).as_subclass(Subclass)))
    Logged.seen.clear()
    door(*replaced(INPUT, bf16(4, 64).as_subclass(Logged)))
    assert Logged.seen
    wrapped = Wrapped(torch.randn(4, 64).bfloat16())
    door(*replaced(INPUT, wrapped))
    assert counts() == counted(hits=3)
    args = replaced(INPUT, Wrapped(torch.randn(4, 513).bfloat16()), k=513)
    door(*args)
    plain = [a.inner if isinstance(a, Wrapped) else a for a in toy.arguments(4, 513)]
    plain[INPUT] = args[INPUT].inner
    toy.reference(*plain)
    assert torch.equal(args[RESULT].float(), plain[RESULT].float())


def test_duck_types(door):
    class Duck:
        """No tensor, but it takes part in torch's functions."""

        def __torch_function__(self, func, types, args=(), kwargs=None):
            return "quack"

    if door is not DOORS["torch.ops default"]:
        assert door(*replaced(INPUT, Duck())) == "quack"


def test_dispatch_modes_see_the_call(door):
    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append((func, len(args)))
            return func(*args, **(kwargs or {}))

    seen: list[Any] = []
    with Log():
        args = toy.arguments()
        seen.clear()
        door(*args)
    assert seen == [(torch.ops.hdispatch.toy.default, 5)]  # torch leaves trailing defaults out
    assert counts() == counted(hits=1)


def test_function_modes_see_the_call(door):
    class Log(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list[Any] = []
    args = toy.arguments()
    with Log():
        door(*args)
    assert len(seen) == 1
    assert "toy" in str(seen[0])
    assert counts() == counted(hits=1)


def test_functorch(door):
    args = toy.arguments()
    with pytest.raises(RuntimeError, match="Batching rule not implemented for hdispatch::toy"):
        torch.vmap(lambda x: (door(args[0], x, *args[2:]), x)[1])(bf16(2, 4, 64))
    # Not one of the mapped tensors: served as ever.
    torch.vmap(lambda x: (door(*args), x)[1])(torch.zeros(2))
    assert counts() == counted(hits=1)
    with pytest.raises(hdispatch.ArgumentError, match="input requires grad"):
        torch.func.grad(lambda x: (door(args[0], x, *args[2:]), x.float().sum())[1])(bf16(4, 64))
    assert counts() == counted(hits=1)


def test_autocast_and_profiler_change_nothing(door):
    with torch.autocast("cpu", torch.bfloat16):
        door(*toy.arguments())
    with torch.profiler.profile():
        door(*toy.arguments())
    assert counts() == counted(hits=2)


def test_meta_tensors(door):
    def meta(args: Args) -> Args:
        return [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]

    door(*meta(toy.arguments()))
    door(*meta(toy.arguments(0)))
    door(*meta(toy.arguments(4, 513, FULL)))
    with pytest.raises(hdispatch.ArgumentError, match=r"weight has size\(0\) = 65"):
        door(*meta(replaced(WEIGHT, bf16(65))))
    with pytest.raises(hdispatch.ArgumentError, match="epsilon is -1"):
        door(*meta(replaced(EPSILON, -1.0)))
    assert counts() == counted()


def test_fake_tensors(door):
    with FakeTensorMode():
        args = toy.arguments(4, 64, FULL)
        door(*args)
        with pytest.raises(hdispatch.ArgumentError, match="input has dtype float32"):
            door(*replaced(INPUT, torch.zeros(4, 64)))
    door(*args)
    assert counts() == counted()


def test_opcheck():
    # The checks compute with what is written, which torch cannot do in fp8: the same op with a float32 result.
    result = dataclasses.replace(toy.SPEC.args[RESULT], dtypes=(torch.float32,))
    hdispatch.registry.define(dataclasses.replace(toy.SPEC, name="toy_float", args=(result, *toy.SPEC.args[1:])))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for variant, m, k in (("bfloat16", 4, 64), (FULL, 16, 512), ("float16", 4, 64), ("bfloat16", 0, 64)):
        args = toy.arguments(m, k, variant)
        args[RESULT] = args[RESULT].float()
        found = torch.library.opcheck(torch.ops.hdispatch.toy_float.default, tuple(args), test_utils=checks)
        assert set(found.values()) == {"SUCCESS"}

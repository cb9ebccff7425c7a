"""Gradients, versions and views of what a call through a door writes; no reference is kept."""

from __future__ import annotations

import gc
import weakref

import hdispatch
import pytest
import torch
import toy
from doors import (
    FULL,
    INPUT,
    RESIDUAL,
    RESULT,
    SCALE,
    WEIGHT,
    bf16,
    counted,
    counts,
    replaced,
)

pytestmark = pytest.mark.usefixtures("bundle")


def test_gradients(door):
    leaf = bf16(4, 64, requires_grad=True)
    with torch.no_grad():
        door(*replaced(INPUT, leaf))
        door(*replaced(SCALE, torch.zeros(4, 1, requires_grad=True)))
    door(*replaced(INPUT, leaf.detach()))
    with torch.inference_mode():
        door(*replaced(INPUT, leaf))
        door(*toy.arguments())
    assert counts() == counted(hits=5)
    with pytest.raises(hdispatch.ArgumentError, match="input requires grad"):
        door(*replaced(INPUT, leaf * 2))  # not a leaf
    with pytest.raises(hdispatch.ArgumentError, match="input requires grad"):
        door(*replaced(INPUT, torch.nn.Parameter(bf16(4, 513)), k=513))  # before the fallback, too


def test_parameters(door):
    door(*replaced(WEIGHT, torch.nn.Parameter(bf16(64), requires_grad=False)))
    with torch.no_grad():
        door(*replaced(WEIGHT, torch.nn.Parameter(bf16(64))))
    assert counts() == counted(hits=2)
    with pytest.raises(hdispatch.ArgumentError, match="weight requires grad"):
        door(*replaced(WEIGHT, torch.nn.Parameter(bf16(64))))


@pytest.mark.parametrize("k", [64, 513])
def test_what_is_written_has_a_new_version(door, k):
    args = toy.arguments(4, k, FULL)
    tensors = {i: a for i, a in enumerate(args) if isinstance(a, torch.Tensor)}
    before = {i: a._version for i, a in tensors.items()}
    door(*args)
    for i, tensor in tensors.items():
        assert (tensor._version > before[i]) == (i in (RESULT, SCALE, RESIDUAL))


def test_backward_through_an_overwritten_tensor_is_noticed(door):
    args = toy.arguments(4, 64, FULL)
    x = torch.ones(4, 64, dtype=torch.bfloat16, requires_grad=True)
    y = x * args[RESIDUAL]
    door(*args)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_inference_tensors(door):
    with torch.inference_mode():
        args = toy.arguments(4, 64, FULL)
    door(*args)
    with torch.inference_mode():
        door(*args)
    assert counts() == counted(hits=2)


def test_lazy_clones_are_made_real_only_where_written(door):
    args = toy.arguments(4, 64, FULL)
    kept = args[RESIDUAL]
    args[RESIDUAL], args[INPUT] = torch._lazy_clone(kept), torch._lazy_clone(args[INPUT])
    door(*args)
    assert not torch._C._is_cow_tensor(args[RESIDUAL])
    assert torch._C._is_cow_tensor(args[INPUT])
    assert args[RESIDUAL].data_ptr() != kept.data_ptr()
    assert counts() == counted(hits=1)


@pytest.mark.parametrize("k", [64, 513])
def test_no_reference_is_kept(door, k):
    args = toy.arguments(4, k, FULL)
    for _ in range(3):
        door(*args)
        with pytest.raises((hdispatch.ArgumentError, RuntimeError)):
            door(*args[:5], wrong=1)
        with pytest.raises(hdispatch.ArgumentError):
            door(*args[:4], -1.0, *args[5:])
    watched = [weakref.ref(a) for a in args if isinstance(a, torch.Tensor)]
    del args
    gc.collect()
    assert [w() for w in watched] == [None] * len(watched)

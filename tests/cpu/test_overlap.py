"""What a call may pass as memory: no overlap with what is written, no freed storage, through every door; and no rows."""

from __future__ import annotations

import hdispatch
import pytest
import torch
import toy
from hdispatch.integrations.vllm import ROUTES
from standin import SCHEMAS, TOY, Library, counts, write_bundle

#: What writes the bundle in `folder` (conftest.py).
WRITE = write_bundle

pytestmark = pytest.mark.usefixtures("bundle")

RESULT, INPUT, WEIGHT, SCALE, EPSILON, SCALE_UB, RESIDUAL = range(7)
FULL = "bfloat16+scale_ub+residual"
DOORS = {
    "hdispatch.ops": lambda name: getattr(hdispatch.ops, name),
    "torch.ops": lambda name: getattr(torch.ops.hdispatch, name),
    "torch.ops default": lambda name: getattr(torch.ops.hdispatch, name).default,
}


@pytest.fixture(params=DOORS)
def door(request: pytest.FixtureRequest):
    return DOORS[request.param]


def shared(first: torch.Tensor, second: torch.Tensor, apart: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in one storage, the second `apart` bytes after the first; as they were otherwise."""
    memory = torch.zeros(apart + second.nbytes + first.nbytes, dtype=torch.uint8)
    views = []
    for tensor, at in ((first, 0), (second, apart)):
        views.append(memory[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor))
    return views[0], views[1]


@pytest.mark.parametrize("read", [INPUT, WEIGHT, SCALE_UB, SCALE, RESIDUAL])
@pytest.mark.parametrize("written", [RESULT, SCALE, RESIDUAL])
def test_what_is_written_shares_no_memory(door, written, read):
    if read == written:
        pytest.skip("one argument")
    for apart, overlaps in ((0, True), (4, True), (4096, False)):
        args = toy.arguments(4, 64, FULL)
        if apart == 4 and min(args[written].nbytes, args[read].nbytes) <= 4:
            continue
        args[written], args[read] = shared(args[written], args[read], apart)
        before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        hdispatch.stats(reset=True)
        if overlaps:
            with pytest.raises(hdispatch.ArgumentError, match=r"is written and shares memory with \w+; call .clone\(\)"):
                door("toy")(*args)
            assert counts()["hits"] == counts()["fallbacks"] == 0
        else:
            door("toy")(*args)
            assert counts()["hits"] == 1
        tensors = [(a, b) for a, b in zip(args, before, strict=True) if isinstance(a, torch.Tensor)]
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in tensors)


def test_parts_of_a_row_are_apart(door):
    """q and k of a row of q, k and v: one storage, the same rows, other columns."""
    qkv = torch.randn(5, 3 * 128).bfloat16()
    positions, cache = torch.arange(5), torch.randn(8, 64).bfloat16()
    door("rotary_embedding")(positions, qkv[:, :128], qkv[:, 128:256], 64, cache, True, 0, False)
    with pytest.raises(hdispatch.ArgumentError, match="rotary_embedding: query is written and shares memory with key"):
        door("rotary_embedding")(positions, qkv[:, :128], qkv[:, 64:192], 64, cache, True, 0, False)
    with pytest.raises(hdispatch.ArgumentError, match="query is written and shares memory with key"):
        door("rotary_embedding")(positions, qkv[:, :128], qkv[:, :128], 64, cache, True, 0, False)


def test_in_place(door):
    """rms_norm says that its result may be its input; as the same view only."""
    x, weight = torch.randn(4, 64).bfloat16(), torch.randn(64).bfloat16()
    wanted = torch.empty_like(x)
    hdispatch.registry.spec("rms_norm").reference(wanted, x, weight, 1e-6)
    wide = torch.cat((x, x))
    with pytest.raises(hdispatch.ArgumentError, match="result is written and shares memory with input"):
        door("rms_norm")(wide[1:5], wide[:4], weight, 1e-6)
    door("rms_norm")(x, x, weight, 1e-6)
    assert torch.equal(x, wanted)


def test_written_scales_do_not_overlap_themselves(door):
    x, q = torch.randn(4, 256).bfloat16(), torch.zeros(4, 256, dtype=torch.float8_e4m3fn)
    rest = (128, 1e-10, -448.0, 448.0, False, False, False)
    for strides in ((2, 1), (1, 4), (1, 7), (3, 1), (1, 8)):
        door("per_token_group_fp8_quant")(x, q, torch.empty_strided((4, 2), strides), *rest)
    for strides in ((1, 1), (1, 3), (1, 2)):
        with pytest.raises(hdispatch.ArgumentError, match=r"output_s with sizes .* may overlap itself"):
            door("per_token_group_fp8_quant")(x, q, torch.empty_strided((4, 2), strides), *rest)


@pytest.mark.parametrize("index", [RESULT, INPUT, WEIGHT, SCALE, SCALE_UB, RESIDUAL])
@pytest.mark.parametrize("k", [64, 513])
def test_a_freed_storage_is_refused(door, index, k):
    args = toy.arguments(4, k, FULL)
    for offset in (0, 1):
        whole = torch.zeros(args[index].numel() + offset, dtype=args[index].dtype)
        args[index] = whole[offset:].view(args[index].shape)
        whole.untyped_storage().resize_(0)
        with pytest.raises(hdispatch.ArgumentError, match=rf"{toy.SPEC.args[index].name} has sizes .* its storage was freed"):
            door("toy")(*args)
        args = toy.arguments(4, k, FULL)
    assert counts() == {"hits": 0, "empty": 0, "fallbacks": 0, "misses": {}}


def test_overridden_ops_leave_such_calls_to_the_other_library():
    library = Library(TOY)
    args = toy.arguments(4, 64, FULL)
    args[RESIDUAL], args[INPUT] = shared(args[RESIDUAL], args[INPUT], 0)
    with library.override():
        for call in (library.ops.toy, library.ops.toy.default):
            call(*args)
    assert library.calls == ["toy"] * 2
    assert counts()["misses"] == {"override: residual: overlap": 2}


def test_an_output_without_rows(door):
    """M = 0: the scale of no elements is 0, whether or not there is a table; in strict mode too."""
    for k in (0, 64):
        result, x = torch.zeros(0, k, dtype=torch.float8_e4m3fn), torch.zeros(0, k).bfloat16()
        scale = torch.full((1,), float("nan"))
        with hdispatch.strict():
            door("dynamic_scaled_fp8_quant")(result, x, scale)
        assert scale.item() == 0
    assert hdispatch.stats()["dynamic_scaled_fp8_quant"] == {"hits": 0, "empty": 2, "fallbacks": 0, "misses": {}}


def test_an_output_without_rows_under_the_override():
    library = Library(*SCHEMAS)
    result, x = torch.zeros(0, 64, dtype=torch.float8_e4m3fn), torch.zeros(0, 64).bfloat16()
    with library.override(ROUTES):
        library.ops.dynamic_scaled_fp8_quant(result, x, torch.ones(1))
        library.ops.dynamic_scaled_fp8_quant.default(result, x, torch.ones(1))
        library.ops.silu_and_mul(torch.zeros(0, 32).bfloat16(), x)  # nothing to write: nobody need run
    assert library.calls == ["dynamic_scaled_fp8_quant"] * 2
    assert counts("dynamic_scaled_fp8_quant") == {"hits": 0, "empty": 2, "fallbacks": 0, "misses": {}}


@pytest.mark.parametrize("name", hdispatch.registry.names())
def test_every_op_without_rows(door, name):
    """An op that has an output without rows writes it; no other op needs to be told."""
    spec = hdispatch.registry.spec(name)
    if not spec.reference.__module__.startswith("hdispatch.kernels"):
        pytest.skip("an op of the tests")
    sizes = {"M": 0, "K": 128, "N": 32} if "head_dim" in spec.config_key else dict.fromkeys(spec.symbols(), 1024) | {"M": 0}
    for variant in spec.served_variants()[:2]:
        args = spec.sample(variant, sizes, torch.device("cpu"), torch.Generator().manual_seed(0))
        before = [value.clone() if isinstance(value, torch.Tensor) else value for value in args]
        door(name)(*args)
        for arg, value, was in zip(spec.args, args, before, strict=True):
            if getattr(arg, "mutated", False) and value is not None and value.numel():
                # What is read too, as a cache is, stays; the others are poisoned.
                assert bool((value.float() == 0).all()) or torch.equal(value, was), arg.name
    assert hdispatch.stats()[name]["misses"] == {}

"""Fallbacks: they take what the schema takes or refuse it by name, and no state of the caller's changes their answer."""

from __future__ import annotations

import contextlib

import hdispatch
import pytest
import torch
from hdispatch.errors import ArgumentError
from hdispatch.opspec import TensorArg

REAL = [
    n for n in hdispatch.registry.names() if hdispatch.registry.spec(n).reference.__module__.startswith("hdispatch.kernels")
]
DOORS = {
    "hdispatch.ops": lambda name: getattr(hdispatch.ops, name),
    "torch.ops": lambda name: getattr(torch.ops.hdispatch, name),
    "torch.ops default": lambda name: getattr(torch.ops.hdispatch, name).default,
}


@pytest.fixture(params=DOORS)
def door(request: pytest.FixtureRequest):
    return DOORS[request.param]


@contextlib.contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


STATES = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "grad": torch.enable_grad,
    "float64 by default": default_dtype,
    "deterministic": deterministic,
}


def arguments(name: str, sizes: dict[str, int], variant: str | None = None) -> list:
    spec = hdispatch.registry.spec(name)
    chosen = spec.typical_variant() if variant is None else spec.variant(variant)
    return spec.sample(chosen, sizes, torch.device("cpu"), torch.Generator().manual_seed(0))


def sizes_of(name: str, m: int) -> dict[str, int]:
    """Sizes that every op takes: K is a head's elements and N a number of heads for some, and a row's length for the others."""
    heads = "head_dim" in hdispatch.registry.spec(name).config_key
    return {"M": m, "K": 128, "N": 32} if heads else {"M": m, "K": 1024, "N": 1024}


def outputs(name: str, args: list) -> list[torch.Tensor]:
    pairs = zip(hdispatch.registry.spec(name).args, args, strict=True)
    found = [a for arg, a in pairs if isinstance(arg, TensorArg) and arg.mutated and a is not None]
    return [a.contiguous().flatten().view(torch.uint8) for a in found]


def same(name: str, got: list, want: list) -> bool:
    return all(map(torch.equal, outputs(name, got), outputs(name, want)))


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", REAL)
def test_the_callers_state_changes_nothing(door, name, state):
    sizes = sizes_of(name, 5)
    wanted, args = arguments(name, sizes), arguments(name, sizes)
    hdispatch.registry.spec(name).reference(*wanted)
    with STATES[state]():
        door(name)(*args)
    if hdispatch.registry.spec(name).fallback is None:
        assert same(name, args, wanted)
    else:
        torch.testing.assert_close(args[0].float(), wanted[0].float(), rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("name", REAL)
def test_inference_tensors_outside_inference_mode(door, name):
    """A kernel can write to them, so the fallback can."""
    sizes = sizes_of(name, 3)
    with torch.inference_mode():
        args = arguments(name, sizes)
    wanted = arguments(name, sizes)
    hdispatch.registry.spec(name).fallback is None and hdispatch.registry.spec(name).reference(*wanted)
    door(name)(*args)
    assert hdispatch.registry.spec(name).fallback is not None or same(name, args, wanted)


def test_versions_are_bumped(door):
    args = arguments("silu_and_mul", {"M": 3, "N": 64})
    before = args[0]._version
    door("silu_and_mul")(*args)
    assert args[0]._version > before


#: Ops that find something in a row, of which there is none in nothing, and the size that is 0.
NOTHING = {
    ("argmax", "N"): "argmax: logits has rows of 0; expected at least 1 number",
    ("ll_gemm_bf16_argmax", "N"): "ll_gemm_bf16_argmax: w has 0 rows, which make no logits; expected at least 1",
    ("topk_softmax", "N"): "topk_softmax: topk_weights has 8 columns; expected at most 0",
}


@pytest.mark.parametrize("empty", ["K", "N"])
@pytest.mark.parametrize("name", REAL)
def test_rows_without_elements(door, name, empty):
    spec = hdispatch.registry.spec(name)
    if empty not in spec.symbols():
        pytest.skip(f"no {empty}")
    if "head_dim" in {*spec.config_key, *spec.typical_variant().static} and name != "fused_qk_norm_rope":
        pytest.skip("what it takes has heads in dimensions of any size")
    if name == "decode_inputs":
        pytest.skip("a request has at least one block, of which the sample's source_block_table tells")
    args = spec.sample(spec.typical_variant(), sizes_of(name, 4), torch.device("cpu"), torch.Generator())
    sizes = {"A": 8, **sizes_of(name, 4), empty: 0}
    for i, arg in enumerate(spec.args):
        if isinstance(arg, TensorArg) and args[i] is not None and not any(str(dim) == "*" for dim in arg.dims):
            shape = spec.tensor_sizes(arg, sizes, spec.typical_variant().static)
            made = torch.full(shape, 1.0).to(args[i].dtype)
            args[i] = made.t().contiguous().t() if arg.layout == "columns" else made
    if name == "fused_qk_norm_rope":
        args[1:4] = 0, 0, 0
    wanted = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    if (name, empty) in NOTHING:
        for call in (spec.reference, door(name)):
            with pytest.raises(ArgumentError, match=NOTHING[name, empty]):
                call(*args)
        assert same(name, args, wanted)
        return
    spec.reference(*wanted)
    door(name)(*args)
    assert same(name, args, wanted)


def test_the_scale_of_a_row_without_elements(door):
    scale = torch.full((4, 1), float("nan"))
    door("dynamic_per_token_scaled_fp8_quant")(
        torch.zeros(4, 0, dtype=torch.float8_e4m3fn), torch.zeros(4, 0).bfloat16(), scale, None
    )
    assert torch.equal(scale, torch.full((4, 1), 1 / (448 * 512)))


def test_what_is_refused_by_name(door):
    x, positions = torch.randn(4, 128).bfloat16(), torch.arange(4)

    def rope(cache=64, head_size=64, offset=0):
        door("rotary_embedding")(positions, x, None, head_size, torch.randn(8, cache).bfloat16(), True, offset, False)

    with pytest.raises(hdispatch.ArgumentError, match="cos_sin_cache has rows of 63 elements"):
        rope(63)
    with pytest.raises(hdispatch.ArgumentError, match="cos_sin_cache rotates 66 elements"):
        rope(66)
    for size in (0, -1):
        with pytest.raises(hdispatch.ArgumentError, match=rf"head_size is {size}; it takes at least 1"):
            rope(head_size=size)
    with pytest.raises(hdispatch.ArgumentError, match="rope_dim_offset is -1; it takes at least 0"):
        rope(32, offset=-1)
    with pytest.raises(hdispatch.ArgumentError, match="rows of 128 elements; expected a multiple of head_size, 80"):
        rope(head_size=80)

    q, before = x.clone(), x.clone()
    with pytest.raises(hdispatch.ArgumentError, match="rows of 100 elements"):
        door("rotary_embedding")(positions, q, x[:, :100], 64, torch.randn(8, 64).bfloat16(), True, 0, False)
    assert torch.equal(q, before)  # nothing is written before all is checked

    def qk(cache, head_dim):
        weights = torch.ones(64).bfloat16(), torch.ones(64).bfloat16()
        cache = torch.randn(8, cache).bfloat16()
        door("fused_qk_norm_rope")(x.clone(), 1, 1, 0, head_dim, 1e-6, *weights, cache, True, positions, -1)

    with pytest.raises(hdispatch.ArgumentError, match="cos_sin_cache rotates 63 elements; expected an even number"):
        qk(63, 64)
    with pytest.raises(hdispatch.ArgumentError, match="head_dim is 0; it takes at least 1"):
        qk(64, 0)
    packed = torch.zeros(4, 1, dtype=torch.int32)
    q = torch.zeros(4, 128, dtype=torch.float8_e4m3fn)
    with pytest.raises(hdispatch.ArgumentError, match="group_size is 64; expected 128"):
        door("per_token_group_fp8_quant_packed")(x, q, packed, 64, 1e-10, -448.0, 448.0)
    with pytest.raises(hdispatch.ArgumentError, match="scale has 4 elements in one dimension"):
        door("static_scaled_fp8_quant")(q, x, torch.ones(4), None)
    for scale, group in ((torch.ones(0), None), (torch.ones(0), [1, -1]), (torch.ones(3), [1, -1]), (torch.ones(3, 2), None)):
        with pytest.raises(hdispatch.ArgumentError, match="static_scaled_fp8_quant: scale has "):
            door("static_scaled_fp8_quant")(q, x, scale, group)


def test_another_shape_of_a_residual(door):
    """What the door takes as [M, K] the fallback takes."""
    x, residual, weight = torch.randn(9, 64).bfloat16(), torch.randn(9, 64).bfloat16(), torch.ones(64).bfloat16()
    wanted = x.clone(), residual.clone()
    hdispatch.registry.spec("fused_add_rms_norm").reference(*wanted, weight, 1e-6)
    for shape in ((9, 64), (1, 9, 64), (9, 64, 1), (9, 1, 64), (3, 3, 64)):
        got = x.clone(), residual.clone().view(shape)
        door("fused_add_rms_norm")(*got, weight, 1e-6)
        assert all(torch.equal(a.view(9, 64), b) for a, b in zip(got, wanted, strict=True))


def test_rows_of_another_rank_are_one_thing(door):
    """[M, 1, K] is [M, K] for every argument that the declaration pads or merges, whichever has which."""
    x, weight = torch.randn(6, 64).bfloat16(), torch.randn(64).bfloat16()
    wanted = torch.empty_like(x)
    hdispatch.registry.spec("rms_norm").reference(wanted, x, weight, 1e-6)
    for given, written in (((6, 1, 64), (6, 64)), ((6, 64), (6, 1, 64)), ((2, 3, 1, 64), (6, 64)), ((6, 64), (2, 3, 1, 64))):
        for call in (door("rms_norm"), hdispatch.registry.spec("rms_norm").reference):
            out = torch.full(written, float("nan"), dtype=x.dtype)
            call(out, x.view(given), weight, 1e-6)
            assert torch.equal(out.view(6, 64), wanted)


def test_a_group_of_any_size(door):
    """A group that is longer than a row costs no memory."""
    x, q, scales = torch.randn(4, 64).bfloat16(), torch.zeros(4, 64, dtype=torch.float8_e4m3fn), torch.zeros(4, 1)
    door("per_token_group_fp8_quant")(x, q, scales, 2**40, 1e-10, -448.0, 448.0, False, False, False)
    assert torch.equal(scales, x.float().abs().amax(-1, keepdim=True) / 448)

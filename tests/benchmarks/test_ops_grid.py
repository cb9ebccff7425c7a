"""What the op benchmark measures: cells of models, shapes and variants, and the bytes that a call must move."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import hdispatch
import pytest
import torch
import toy
from hdispatch import models
from hdispatch.compile import op_package
from hdispatch.errors import HdispatchError
from hdispatch.kernels.lib.model_sizes import products
from hdispatch.opspec import OpSpec, TensorArg
from ops_results import MEASURED, QUANT, SMALL, arguments_of, cell

from benchmarks.ops import grid
from benchmarks.ops.grid import MODELS

# ---- the ops ----


def test_every_op_is_reported_or_says_why_not():
    """A new op goes to one of the two."""
    reported, left_out = set(grid.OPS), set(grid.LEFT_OUT)
    assert len(grid.OPS) == len(reported)
    assert not reported & left_out
    assert reported | left_out == set(op_package.available_ops())
    root = Path(grid.__file__).parents[2]
    for why in grid.LEFT_OUT.values():
        assert all((root / file).is_file() for file in re.findall(r"benchmarks/\w+\.py", why)), why


# ---- the grid ----


def test_coarse_first_spans_the_range_however_short_it_is_cut():
    assert grid.coarse_first(grid.MS)[:5] == [1, 8192, 64, 512, 8]
    assert sorted(grid.coarse_first(grid.MS)) == list(grid.MS)
    assert grid.coarse_first([4, 4]) == [4]
    assert grid.coarse_first([]) == []


def test_shapes_of_the_models():
    spec = hdispatch.registry.spec(QUANT)
    shapes = grid.op_shapes(spec, spec.variant("bfloat16"))
    assert [(s.model, s.label, s.k, s.n) for s in shapes] == [
        ("Qwen3-1.7B", "hidden", 2048, 0),
        ("Qwen3-1.7B", "intermediate", 6144, 0),
        ("Qwen3-8B", "hidden", 4096, 0),
        ("Qwen3-8B", "intermediate", 12288, 0),
        ("Qwen3-32B", "hidden", 5120, 0),
        ("Qwen3-32B", "intermediate", 25600, 0),
    ]


@pytest.mark.parametrize("op", [op for op in MEASURED if op not in (*grid.LOW_LATENCY, *grid.OF_MIXTURES)])
def test_every_model_has_shapes_of_every_op(op):
    spec = hdispatch.registry.spec(op)
    shapes = grid.op_shapes(spec, spec.typical_variant())
    assert {shape.model for shape in shapes} == {model.name for model in MODELS}


@pytest.mark.parametrize(("op", "wanted"), [("topk_softmax", 128), ("moe_align_block_size", 0), ("moe_sum", 2048)])
def test_a_mixture_has_shapes_of_its_ops(op, wanted):
    spec = hdispatch.registry.spec(op)
    shapes = grid.op_shapes(spec, spec.typical_variant())
    assert [(shape.model, shape.k, shape.n) for shape in shapes] == [("Qwen3-30B-A3B", 0, wanted)]
    assert grid.model_names(["qwen3-30b-a3b", "8B"]) == ["Qwen3-30B-A3B", "Qwen3-8B"]
    for each in grid.cells([spec], (1, 64), ("warm",), ["Qwen3-30B-A3B"], ["default"]):
        generator = torch.Generator().manual_seed(1)
        arguments = spec.sample(spec.typical_variant(), grid.sizes_of(each), torch.device("cpu"), generator)
        assert grid.call_bytes(spec, arguments, each["m"]) > 0


def test_gemm_shapes_are_those_of_the_post():
    wanted = {
        "Qwen3-1.7B": {"qkv": (2048, 4096), "out": (2048, 2048), "gate_up": (2048, 12288), "down": (6144, 2048)},
        "Qwen3-8B": {"qkv": (4096, 6144), "out": (4096, 4096), "gate_up": (4096, 24576), "down": (12288, 4096)},
        "Qwen3-32B": {"qkv": (5120, 10240), "out": (8192, 5120), "gate_up": (5120, 51200), "down": (25600, 5120)},
    }
    for model in MODELS:
        shapes = products(model)
        assert {label: (sizes["K"], sizes["N"]) for label, sizes in shapes.items()} == wanted[model.name]


@pytest.mark.parametrize("op", grid.GEMMS)
def test_gemm_shapes_are_what_the_models_configs_say(op):
    """Those that have rows of their own, which are tuned: heads times head_dim need not be the hidden size."""
    spec = hdispatch.registry.spec(op)
    wanted = [
        [(sizes["K"], sizes["N"]) for _, sizes in models.calls_of(spec, models.find([model.name])).rows] for model in MODELS
    ]
    assert {(shape["K"], shape["N"]) for shape in spec.shapes if shape} == {each for found in wanted for each in found}
    measured = grid.op_shapes(spec, spec.typical_variant())
    assert "other" not in {shape.model for shape in measured}
    assert {(shape.label, shape.k, shape.n) for shape in measured if shape.model == "Qwen3-32B"} >= {("out", 8192, 5120)}


def spec_with(shapes, name="toy_op", dims=("M", "K")) -> OpSpec:
    tensor = TensorArg("x", dims, (torch.float16, torch.bfloat16))
    return replace(toy.SPEC, name=name, args=(tensor,), shapes=shapes)


def test_shapes_that_no_model_has_are_kept_apart():
    spec = spec_with(({"K": 100}, {}))
    found = grid.op_shapes(spec, spec.variant("bfloat16"))
    assert [(s.model, s.label, s.k) for s in found] == [("other", "K=100", 100)]


def test_where_every_shape_is_generic_the_models_sizes_are_measured():
    spec = replace(
        spec_with(({"K": 4096}, {"K": 128}, {}), dims=("M", "N", "K")),
        calls=lambda model: {
            "hidden": {"K": model.hidden, "N": 1},
            "q heads": {"K": 128, "N": model.heads},
            "head": {"K": 128},
        },
    )
    found = {(s.label, s.k, s.n) for s in grid.op_shapes(spec, spec.variant("bfloat16")) if s.model == "Qwen3-8B"}
    assert found == {("hidden", 4096, 1), ("q heads", 128, 32)}


def test_typical_variant_is_what_vllm_calls():
    assert hdispatch.registry.spec("rms_norm_dynamic_per_token_quant").typical_variant().name == "bfloat16"
    for op in MEASURED:
        variant = hdispatch.registry.spec(op).typical_variant()
        assert "residual" not in variant.dtypes or op == "fused_add_rms_norm"
        assert "scale_ub" not in variant.dtypes
        assert torch.float16 not in variant.dtypes.values()
        assert variant.static.get("group_size", 128) == 128
        assert variant.static.get("is_neox", True) is True
        assert not variant.static.get("scale_ue8m0", False)
    if "rotary_embedding" in MEASURED:
        assert "key" in hdispatch.registry.spec("rotary_embedding").typical_variant().dtypes


def test_variants_by_name():
    spec = hdispatch.registry.spec("rms_norm_dynamic_per_token_quant")
    names = [v.name for v in grid.chosen_variants(spec, ["default", "bfloat16+residual", "int4"])]
    assert names == ["bfloat16", "bfloat16+residual"]
    assert [v.name for v in grid.chosen_variants(spec, ["int4"])] == ["bfloat16"]


def test_cells_are_the_whole_grid():
    specs = [hdispatch.registry.spec(QUANT)]
    found = grid.cells(specs, (1, 16, 8192), ("warm", "rotated"), ["Qwen3-8B"], ["default"])
    assert len(found) == 3 * 2 * 2
    assert {(each["m"], each["mode"], each["label"]) for each in found} >= {
        (1, "warm", "hidden"),
        (16, "rotated", "intermediate"),
    }
    assert [each["m"] for each in found] == [1] * 4 + [8192] * 4 + [16] * 4
    roofs = grid.roof_cells(specs, (1, 8192), ["Qwen3-8B"], ["default"])
    assert {(each["m"], each["mode"]) for each in roofs} == {(8192, "rotated")}


def test_model_names():
    assert grid.model_names(None)[-1] == "other"
    assert grid.model_names(["8b", "qwen3-32B"]) == ["Qwen3-8B", "Qwen3-32B"]
    with pytest.raises(HdispatchError, match=r"there are Qwen3-1\.7B"):
        grid.model_names(["70B"])


# ---- what a call must move ----


def moved(op: str, m: int = 5) -> int:
    return grid.call_bytes(hdispatch.registry.spec(op), arguments_of(op), m)


def test_bytes_are_those_of_every_tensor_once():
    assert moved(QUANT) == 5 * 1024 * (2 + 1) + 5 * 4
    assert moved("rms_norm_dynamic_per_token_quant") == 5 * 1024 * 3 + 1024 * 2 + 5 * 4
    assert moved("silu_and_mul_dynamic_per_token_quant") == 5 * 512 * (4 + 1) + 5 * 4


def test_a_residual_is_read_and_written():
    spec = hdispatch.registry.spec("rms_norm_dynamic_per_token_quant")
    arguments = spec.sample(spec.variant("bfloat16+residual"), SMALL, torch.device("cpu"), torch.Generator())
    assert grid.call_bytes(spec, arguments, 5) == moved("rms_norm_dynamic_per_token_quant") + 5 * 1024 * 2 * 2


@pytest.mark.skipif("fused_add_rms_norm" not in MEASURED, reason="no such op yet")
def test_what_is_changed_in_place_is_read_and_written():
    assert moved("fused_add_rms_norm") == 2 * 2 * 5 * 1024 * 2 + 1024 * 2


@pytest.mark.skipif("fused_qk_norm_rope" not in MEASURED, reason="no such op yet")
def test_rope_moves_the_heads_of_q_and_k_and_gathers_rows():
    spec = hdispatch.registry.spec("fused_qk_norm_rope")
    named = dict(zip((arg.name for arg in spec.args), arguments_of("fused_qk_norm_rope"), strict=True))
    heads = named["num_heads_q"] + named["num_heads_k"]
    assert named["num_heads_v"] > 0
    small = named["q_weight"].nbytes + named["k_weight"].nbytes + named["position_ids"].nbytes
    rows = 5 * named["cos_sin_cache"].stride(0) * named["cos_sin_cache"].element_size()
    assert moved("fused_qk_norm_rope") == 2 * 5 * heads * 128 * 2 + small + rows


def test_operations_are_counted_for_gemms_only():
    assert grid.call_flops(cell("scaled_mm", m=3, K=128, N=256)) == 2 * 3 * 128 * 256
    assert grid.call_flops(cell(m=3)) == 0

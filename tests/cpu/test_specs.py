"""The ops' declarations, torch references, sample inputs and committed configs, and the numeric helpers that tests use."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hdispatch.configs
import hdispatch.kernels
import pytest
import torch
from hdispatch.compile import available_ops, configs
from hdispatch.compile.versions import OPTIONAL
from hdispatch.opspec import OpSpec, Variant
from hdispatch.testing.numeric import (
    MismatchError,
    assert_close_by_dtype,
    assert_no_poison,
    compare_fp8,
    compare_scale,
    poison,
)

CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn
#: As `torch.ops._C.<op>.default._schema` of vLLM 0.33 has them; the third is not in vLLM and follows the first.
VLLM_SCHEMAS = {
    "dynamic_per_token_scaled_fp8_quant": "Tensor(a!) result, Tensor input, Tensor(b!) scale, Tensor? scale_ub",
    "rms_norm_dynamic_per_token_quant": "Tensor(a!) result, Tensor input, Tensor weight, Tensor(b!) scale, float epsilon, "
    "Tensor? scale_ub, Tensor(c!)? residual",
    "silu_and_mul_dynamic_per_token_quant": "Tensor(a!) result, Tensor input, Tensor(b!) scale, Tensor? scale_ub",
}
SIZES = {
    "dynamic_per_token_scaled_fp8_quant": ("K", {2048, 4096, 5120, 6144, 12288, 25600}),
    "rms_norm_dynamic_per_token_quant": ("K", {2048, 4096, 5120}),
    "silu_and_mul_dynamic_per_token_quant": ("N", {6144, 12288, 25600}),
}
OPS = tuple(VLLM_SCHEMAS)
#: Ops without a kernel for large tensors: there, no config can be measured, and none is used.
SMALL = {"dynamic_scaled_fp8_quant"}
ALL = [pytest.param(op, id=op) for op in OPS]


def spec_of(op: str) -> OpSpec:
    return importlib.import_module(f"hdispatch.kernels.{op}.spec").SPEC


def sample(op: str, variant: Variant, m: int, size: int = 256) -> dict[str, Any]:
    spec = spec_of(op)
    values = spec.sample(variant, {"M": m, "K": size, "N": size}, CPU, torch.Generator().manual_seed(m + size))
    return dict(zip((arg.name for arg in spec.args), values, strict=True))


def variants(present: str | None = None) -> list[Any]:
    """(op, variant) pairs, those only in which the argument `present` is given."""
    found = [(op, v) for op in OPS for v in spec_of(op).variants() if present is None or present in v.dtypes]
    return [pytest.param(op, v, id=f"{op}-{v.name}") for op, v in found]


@pytest.mark.parametrize("op", ALL)
def test_schema_is_vllms_with_defaults_for_trailing_none(op: str) -> None:
    schema = spec_of(op).schema()
    assert schema.replace("=None", "") == f"{op}({VLLM_SCHEMAS[op]}) -> ()"
    assert torch._C.parse_schema(schema).is_mutable


@pytest.mark.parametrize("op", ALL)
def test_sizes_and_variants(op: str) -> None:
    spec = spec_of(op)
    symbol, sizes = SIZES[op]
    *listed, last = spec.shapes
    assert last == {}, "a row for every other size"
    assert {tuple(shape) for shape in listed} == {(symbol,)}
    assert {shape[symbol] for shape in listed} == sizes
    assert spec.ladder == (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    options = {"scale_ub", "residual"} if op.startswith("rms") else {"scale_ub"}
    names = {v.name for v in spec.variants()}
    assert len(names) == 2 * 2 ** len(options)
    assert {"bfloat16", "float16", "bfloat16+scale_ub"} <= names
    assert spec.variant("bfloat16").none == options


def test_op_is_named_as_its_folder_and_documented() -> None:
    for op in OPS:
        assert spec_of(op).name == op
        assert "float8_e4m3fn" in (spec_of(op).reference.__doc__ or "")


@pytest.mark.parametrize(("op", "variant"), variants())
@pytest.mark.parametrize("m", [0, 1, 2, 7])
def test_sample_fits_the_declaration(op: str, variant: Variant, m: int) -> None:
    spec, args = spec_of(op), sample(op, variant, m)
    for arg in spec.tensors():
        value = args[arg.name]
        if arg.name in variant.none:
            assert value is None
            continue
        assert list(value.shape) == spec.tensor_sizes(arg, {"M": m, "K": 256, "N": 256})
        assert value.dtype == variant.dtypes[arg.name]
        assert value.is_contiguous()
    assert (args["result"].view(torch.uint8) == 0x7F).all()
    assert args["scale"].isnan().all()


@pytest.mark.parametrize(("op", "variant"), variants())
def test_reference_writes_everything_and_nothing_else(op: str, variant: Variant) -> None:
    args = sample(op, variant, 9)
    kept = {name: args[name].clone() for name in ("input", "weight", "scale_ub") if args.get(name) is not None}
    assert spec_of(op).reference(*args.values()) is None
    assert_no_poison(args["result"], "result")
    assert_no_poison(args["scale"], "scale")
    for name, value in kept.items():
        assert torch.equal(args[name], value), name


@pytest.mark.parametrize("op", ["attention_half", "paged_attention_decode"])
def test_reference_takes_samples_at_every_edge_of_the_second_ladder(op: str) -> None:
    """Positions and tables of a sample are of its length: an index past them is a fault that kills a GPU's process."""
    spec = spec_of(op)
    variant = next(variant for variant in spec.variants() if variant.name == spec.typical)
    for edge in spec.second.ladder:
        sizes = {"M": 1, "K": 64, "N": 4, spec.second.name: edge}
        arguments = spec.sample(variant, sizes, torch.device("cpu"), torch.Generator().manual_seed(0))
        spec.reference(*arguments)
        assert not arguments[0].isnan().any()


@pytest.mark.parametrize(("op", "variant"), variants())
def test_reference_takes_strided_rows_and_no_rows(op: str, variant: Variant) -> None:
    args = sample(op, variant, 5)
    strided = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in args.items()}
    wide = torch.full((5, args["input"].shape[1] + 16), float("nan"), dtype=args["input"].dtype)
    wide[:, :-16] = args["input"]
    strided["input"] = wide[:, :-16]
    spec_of(op).reference(*args.values())
    spec_of(op).reference(*strided.values())
    assert torch.equal(args["result"].view(torch.uint8), strided["result"].view(torch.uint8))
    assert torch.equal(args["scale"], strided["scale"])

    empty = {name: value[:0] if isinstance(value, torch.Tensor) and value.dim() == 2 else value for name, value in args.items()}
    spec_of(op).reference(*empty.values())


@pytest.mark.parametrize("op", ALL)
def test_zero_row_has_the_least_scale(op: str) -> None:
    args = sample(op, spec_of(op).variant("bfloat16"), 4)
    assert (args["input"][1] == 0).all(), "the sample has a zero row"
    spec_of(op).reference(*args.values())
    assert args["scale"][1].item() == torch.tensor(1 / (448 * 512), dtype=torch.float32).item()
    assert (args["result"][1].float() == 0).all()


@pytest.mark.parametrize(("op", "variant"), variants("scale_ub"))
def test_scale_ub_clamps_some_rows_to_the_limit(op: str, variant: Variant) -> None:
    args = sample(op, variant, 33)
    spec_of(op).reference(*args.values())
    limit = args["scale_ub"].double() / 448
    clamped = (args["scale"].double() / limit - 1).abs() < 1e-6
    assert 0 < clamped.sum() < 33
    assert (args["scale"].double() <= limit * (1 + 1e-6)).all()
    assert (args["result"].float().abs().amax(dim=1, keepdim=True)[clamped] == 448).all()

    scalar = {**args, "scale_ub": args["scale_ub"].reshape(()), "scale": poison(args["scale"].clone())}
    if "residual" in variant.dtypes:
        scalar["residual"] = sample(op, variant, 33)["residual"]
    spec_of(op).reference(*scalar.values())
    assert torch.equal(scalar["scale"], args["scale"]), "rank 0 is accepted too"


@pytest.mark.parametrize(("op", "variant"), variants("residual"))
def test_residual_receives_the_rounded_sum(op: str, variant: Variant) -> None:
    args = sample(op, variant, 6)
    residual, pointer = args["residual"], args["residual"].data_ptr()
    wanted = (args["input"].double() + residual.double()).to(residual.dtype)
    spec_of(op).reference(*args.values())
    assert residual.data_ptr() == pointer
    assert torch.equal(residual, wanted)


@pytest.mark.parametrize(("op", "variant"), [p for p in variants() if "scale_ub" not in p.values[1].dtypes])
def test_dequantized_result_is_within_half_a_code(op: str, variant: Variant) -> None:
    args = sample(op, variant, 8)
    x = args["input"].double()
    if op.startswith("rms"):
        x = x if args["residual"] is None else x + args["residual"].double()
        x = x / (x.square().mean(dim=1, keepdim=True) + args["epsilon"]).sqrt() * args["weight"].double()
    elif op.startswith("silu"):
        gate, up = x.chunk(2, dim=1)
        x = gate * torch.sigmoid(gate) * up
    spec_of(op).reference(*args.values())
    scale = args["scale"].double()
    # Half a step of e4m3 is 1/16 of the value, or 2**-10 below the least normal; the norm also rounds twice to 16 bits.
    error = (args["result"].double() * scale - x).abs()
    assert (error <= x.abs() * (1 / 16 + 2**-7) + scale * 2**-10 * 1.01).all()


def test_unrounded_sum_is_normalized() -> None:
    """The residual is written rounded, but what is normalized is not: here that moves the largest element by one bit."""
    spec = spec_of("rms_norm_dynamic_per_token_quant")
    args = sample(spec.name, spec.variant("bfloat16+residual"), 1, size=1024)
    args["input"].fill_(1.3125)[0, 0] = 1.0
    args["residual"].zero_()[0, 0] = 0.003845
    args["weight"].fill_(1.0)[0] = 16.0
    spec.reference(*args.values())
    assert args["residual"][0, 0] == 1.0
    assert args["scale"].item() == pytest.approx(16 * 196 / 256 / 448, rel=1e-6), "195 / 256 is what the rounded sum gives"


def test_activation_is_not_rounded_to_16_bits() -> None:
    spec = spec_of("silu_and_mul_dynamic_per_token_quant")
    args = sample(spec.name, spec.variant("bfloat16"), 5)
    gate, up = args["input"].double().chunk(2, dim=1)
    activated = gate / (1 + torch.exp(-gate)) * up
    spec.reference(*args.values())
    compare_scale(args["scale"][[0, 2, 3, 4]], (activated.abs().amax(dim=1, keepdim=True) / 448).float()[[0, 2, 3, 4]])
    rounded = (activated.bfloat16().double().abs().amax(dim=1, keepdim=True) / 448).float()
    with pytest.raises(MismatchError):
        compare_scale(args["scale"][[0, 2, 3, 4]], rounded[[0, 2, 3, 4]])


#: An op's first one is its default.
BACKENDS = ("triton", "helion", "cutedsl")


#: Shapes with configs of their own that a bundle holds on request only.
ON_REQUEST = {
    "attention_half": [{"K": 256}],
    "paged_attention_decode": [{"K": 256}],
    # Of models whose lm_head has no row of its own in every bundle.
    "ll_gemm_bf16": [{"K": k, "N": n} for k, n in ((2048, 151936), (5120, 151936), (7168, 129280), (8192, 128256))],
}


@pytest.mark.parametrize("op", available_ops())
def test_configs_serve_every_shape_and_each_serves_some_bucket(op: str) -> None:
    spec, folder = spec_of(op), Path(hdispatch.configs.__path__[0]) / op
    backends = {path.stem for path in Path(hdispatch.kernels.__path__[0], op).glob("*.py")} & set(BACKENDS)
    file = configs.read(folder / "nvidia_h200.json", spec)
    default = [entry for entry in file.entries if not entry.sizes]
    symbols = set(spec.config_key.values()) - {"M"}
    #: Variants that have entries of their own.
    served, own = spec.served_variants(), [entry.arguments for entry in file.entries if entry.arguments]
    special = [v for v in served if any(all(configs.argument_of(v, n) == x for n, x in each.items()) for each in own)]
    picked = [*default]
    first, *others = (name for name in BACKENDS if name in backends)
    for installed in ([first, *others], [name for name in (first, *others) if name not in OPTIONAL]):
        part = file.available(installed, first)
        for shape in (*spec.shapes, *ON_REQUEST.get(op, ())):
            sizes = {symbol: size for symbol, size in shape.items() if symbol in symbols}
            for edges in map(spec.ladders.edges, range(spec.ladders.count)):
                entry, edge = part.pick(spec, shape, edges), edges["M"]
                picked.append(entry)
                picked += [part.pick(spec, shape, edges, variant) for variant in special]
                if not default:
                    assert entry.shape == sizes, f"{file.path}: {shape} is served by the config of another shape: {entry}"
                    assert op in SMALL or entry.sizes["M"] >= edge, f"{file.path}: no config is for {shape} and M = {edge}"
    for entry in file.entries:
        assert entry in picked, f"{file.path}: serves nothing: {entry}"
        assert entry.backend in {None, *backends, configs.NO_ROW}
        if entry.backend == configs.NO_ROW:
            continue
        text = json.dumps(entry.config).replace('"host_tensor_descriptors": false', "")
        assert "tensor_descriptor" not in text, f"{file.path}: descriptors need scratch memory"
        if (entry.backend or next(name for name in BACKENDS if name in backends)) != "cutedsl":
            assert entry.config["num_warps"] in (1, 2, 4, 8, 16, 32)


def fp8(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).to(FP8)


def test_compare_fp8_counts_codes() -> None:
    many = torch.zeros(2000, dtype=torch.uint8)
    one_off = many.clone()
    one_off[7] = 1
    assert compare_fp8(many.view(FP8), many.view(FP8)) == 1.0
    assert compare_fp8(one_off.view(FP8), many.view(FP8)) == pytest.approx(0.9995)
    with pytest.raises(
        MismatchError, match=r"1 of 2000 .* first at \(7,\): found 0.001953125, expected 0 \(codes 0x01, 0x00\)"
    ):
        compare_fp8(one_off.view(FP8), many.view(FP8), min_equal=1.0)
    one_off[7] = 2
    with pytest.raises(MismatchError, match="1 of them by more than one code"):
        compare_fp8(one_off.view(FP8), many.view(FP8))
    assert compare_fp8(fp8(-0.0), fp8(0.0), min_equal=0.0) == 0.0
    with pytest.raises(MismatchError, match="more than one code"):
        compare_fp8(fp8(float("nan")), fp8(448.0), min_equal=0.0)
    assert compare_fp8(fp8(), fp8()) == 1.0


@pytest.mark.parametrize(
    "call",
    [
        lambda: compare_fp8(torch.zeros(2), torch.zeros(2)),
        lambda: compare_fp8(fp8(1.0), fp8(1.0, 2.0)),
        lambda: compare_scale(torch.ones(3), torch.ones(3) * (1 + 3e-6)),
        lambda: compare_scale(torch.full((3,), float("nan")), torch.full((3,), float("nan"))),
        lambda: compare_scale(torch.tensor([1.0, 1.02]), torch.ones(2), outliers=0.5),
        lambda: assert_close_by_dtype(torch.ones(2), torch.tensor([1.0, 1.1])),
        lambda: assert_close_by_dtype(torch.tensor([1.0]), torch.tensor([float("inf")])),
        lambda: assert_close_by_dtype(torch.tensor([1]), torch.tensor([2])),
    ],
)
def test_comparisons_raise(call: Callable[[], object]) -> None:
    with pytest.raises(MismatchError):
        call()


def test_comparisons_accept() -> None:
    compare_scale(torch.tensor([1.0, 1.004]), torch.ones(2), outliers=0.5)
    compare_scale(torch.zeros(2), torch.zeros(2))
    assert_close_by_dtype(torch.tensor([1.0, float("nan")]), torch.tensor([1.0 + 1e-7, float("nan")]))
    assert_close_by_dtype(torch.tensor([float("-inf")]), torch.tensor([float("-inf")]))
    assert_close_by_dtype(fp8(1.0), fp8(1.0))


@pytest.mark.parametrize("dtype", [FP8, torch.bfloat16, torch.float32, torch.int32])
def test_poison_is_found_until_the_last_element_is_written(dtype: torch.dtype) -> None:
    tensor = poison(torch.zeros(2, 6, dtype=torch.float32).to(dtype)[:, ::2])
    tensor[:, :2] = torch.ones(2, 2).to(dtype)
    with pytest.raises(MismatchError, match=re.escape("2 of 6 elements of out hold poison, the first at (0, 2)")):
        assert_no_poison(tensor, "out")
    tensor[:, 2] = torch.ones(2).to(dtype)
    assert_no_poison(tensor, "out")

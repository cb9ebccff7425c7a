"""What the op benchmark measures: models, shapes, variants, the cells of the grid; bytes and operations of one call."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from hdispatch.errors import HdispatchError
from hdispatch.models import Model, named
from hdispatch.opspec import OpSpec, Sizes, TensorArg, Variant
from torch import Tensor

#: warm: the same buffers in every launch; rotated: buffers that together exceed twice L2.
Mode = Literal["warm", "rotated"]
MS = tuple(2**i for i in range(14))


MODELS = named("Qwen3-1.7B", "Qwen3-8B", "Qwen3-32B")
#: Mixtures of experts, for the ops that no other model calls.
MIXTURES = named("Qwen3-30B-A3B")
ALL_MODELS = (*MODELS, *MIXTURES)
EAGER_MODEL = MODELS[1].name
EAGER_M = 16

GEMMS = ("scaled_mm", "scaled_mm_blockwise")
#: GEMMs of a few tokens, whose peers and targets are their own. They end at M = 32, the last edge of their ladder.
LOW_LATENCY = ("ll_gemm_bf16", "ll_gemm_fp8")
#: The product of lm_head whose logits are compared at once.
WITH_ARGMAX = "ll_gemm_bf16_argmax"
#: All ops that multiply matrices.
PRODUCTS = (*GEMMS, *LOW_LATENCY, WITH_ARGMAX)
#: Ops whose weights no server finds in L2: all their Ms are measured on rotated buffers, whatever the mode.
ALWAYS_ROTATED = ("ll_gemm_fp8",)
#: Labels of shapes whose weights no L2 holds: they are measured at every M on rotated buffers, and on no others.
STREAMED = ("lm_head",)
#: The ops in the order of the report.
OPS = (
    "dynamic_per_token_scaled_fp8_quant",
    "rms_norm_dynamic_per_token_quant",
    "silu_and_mul_dynamic_per_token_quant",
    "fused_qk_norm_rope",
    "per_token_group_fp8_quant",
    "rms_norm_per_block_quant",
    "silu_and_mul_per_block_quant",
    "scaled_mm",
    "scaled_mm_blockwise",
    "ll_gemm_bf16",
    "ll_gemm_fp8",
    "ll_gemm_bf16_argmax",
    "rms_norm",
    "fused_add_rms_norm",
    "silu_and_mul",
    "rotary_embedding",
    "static_scaled_fp8_quant",
    "dynamic_scaled_fp8_quant",
    "per_token_group_fp8_quant_packed",
    "topk_softmax",
    "moe_align_block_size",
    "moe_sum",
)
#: The other ops that hdispatch comes with, and why no report has them.
LEFT_OUT = {
    "paged_attention_decode": "its time goes by contexts, which a cell has not: benchmarks/attention.py",
    "attention_half": "its time goes by contexts, which a cell has not: benchmarks/attention.py",
    "attention_dense": "its time goes by lengths of sequences, which a cell has not: benchmarks/attention_dense.py",
    "attention_varlen": "its time goes by lengths of sequences, which a cell has not: benchmarks/attention_dense.py",
    "fused_qk_norm_rope_cache": "it writes a few rows of a cache, and `call_bytes` counts all; vLLM has no peer",
    "reshape_and_cache_flash": "it writes a few rows of a cache, and `call_bytes` counts all: benchmarks/attention.py",
    "argmax": "a part of the model runner's step, beside vLLM's: benchmarks/vllm_runner.py",
    "decode_inputs": "a part of the model runner's step, beside vLLM's: benchmarks/vllm_runner.py",
    "decode_update": "a part of the model runner's step, beside vLLM's: benchmarks/vllm_runner.py",
}
#: The ops of mixtures of experts alone.
OF_MIXTURES = ("topk_softmax", "moe_align_block_size", "moe_sum")


class Cell(TypedDict):
    """One point of the grid. `label` names the shape within its model; K and N are 0 where the op has none."""

    op: str
    variant: str
    model: str
    label: str
    K: int
    N: int
    m: int
    mode: Mode


def sizes_of(cell: Cell) -> dict[str, int]:
    """The cell's sizes as `OpSpec.sample` takes them."""
    return {"M": cell["m"], "K": cell["K"], "N": cell["N"]}


# ---- variants ----


def chosen_variants(spec: OpSpec, names: Sequence[str]) -> list[Variant]:
    """Those of the op's variants that are named, `default` being the typical one; that one if it has none of them."""
    default = spec.typical_variant()
    served = {variant.name: variant for variant in spec.served_variants()}
    found = {(default if name == "default" else served[name]).name: None for name in names if name in {"default", *served}}
    return [served[name] for name in found] or [default]


# ---- shapes ----


@dataclass(frozen=True)
class Shape:
    """A shape of an op with the model that has it."""

    model: str
    label: str
    k: int
    n: int


def op_shapes(spec: OpSpec, variant: Variant) -> list[Shape]:
    """The models' shapes of an op, of those that its bundle has rows for.

    Where `spec.shapes` gives every size, those shapes and no others; where it has only shapes that serve any size, the
    models' own. A shape that no model has is labelled by its sizes, and its model is "other".
    """
    needed = _needed(spec, variant)
    full = [shape for shape in spec.shapes if needed <= set(shape)]
    known = [(model.name, label, sizes) for model in ALL_MODELS for label, sizes in _model_shapes(spec, model)]
    if not full:
        full = [sizes for _, _, sizes in known if any(_agree(sizes, shape) for shape in spec.shapes)]
        full = [{symbol: sizes[symbol] for symbol in needed} for sizes in full if needed <= sizes.keys()]
    found: dict[tuple[int, int], Shape] = {}
    for shape in full:
        k, n = (shape.get(symbol, 0) for symbol in ("K", "N"))
        words = ", ".join(f"{symbol}={size}" for symbol, size in shape.items())
        model, label = next(((m, label) for m, label, sizes in known if _agree(sizes, shape)), ("other", words))
        found.setdefault((k, n), Shape(model, label, k, n))
    order = [model.name for model in ALL_MODELS] + ["other"]
    return sorted(found.values(), key=lambda shape: order.index(shape.model))


def _needed(spec: OpSpec, variant: Variant) -> set[str]:
    """K and N, as far as a call of the variant has them."""
    binders = {symbol: spec.binder(symbol) for symbol in ("K", "N")}
    return {symbol for symbol, found in binders.items() if found and found[0].name not in variant.none}


def _model_shapes(spec: OpSpec, model: Model) -> Iterable[tuple[str, Sizes]]:
    if spec.calls is None or (model in MIXTURES and spec.name not in OF_MIXTURES):
        return ()
    return spec.calls(model).items()


def _agree(sizes: Mapping[str, int], shape: Mapping[str, int]) -> bool:
    return all(sizes.get(symbol) == size for symbol, size in shape.items())


# ---- cells ----


def cells(
    specs: Sequence[OpSpec], ms: Sequence[int], modes: Sequence[Mode], models: Sequence[str], variants: Sequence[str]
) -> list[Cell]:
    """The grid, coarse first: cut short anywhere, it still spans all of M for every op.

    An op is measured up to the last edge of its ladder, the largest M that its kernels are for.
    """
    found: list[Cell] = []
    for m in coarse_first(ms):
        for mode in modes:
            for spec in sorted(specs, key=lambda spec: report_order(spec.name)):
                if m <= spec.ladder[-1]:
                    found += [
                        _cell(spec, variant, shape, m, mode)
                        for variant, shape in _served(spec, models, variants)
                        if mode == "rotated" or shape.label not in STREAMED
                    ]
    return found


def roof_cells(specs: Sequence[OpSpec], ms: Sequence[int], models: Sequence[str], variants: Sequence[str]) -> list[Cell]:
    """Rotated cells that are compared with the roofs: every op at the largest M, GEMMs at the smallest too.

    And those of `ALWAYS_ROTATED` and `STREAMED` at every M.
    """
    found: list[Cell] = []
    for spec in sorted(specs, key=lambda spec: report_order(spec.name)):
        for m in sorted(set(ms)):
            found += [
                _cell(spec, variant, shape, m, "rotated")
                for variant, shape in _served(spec, models, variants)
                if m in _roof_ms(spec, shape, ms)
            ]
    return found


def _roof_ms(spec: OpSpec, shape: Shape, ms: Sequence[int]) -> list[int]:
    served = sorted({m for m in ms if m <= spec.ladder[-1]})
    if spec.name in ALWAYS_ROTATED or shape.label in STREAMED:
        return served
    return sorted({*served[:1], *served[-1:]} if spec.name in GEMMS else served[-1:])


def _served(spec: OpSpec, models: Sequence[str], variants: Sequence[str]) -> Iterator[tuple[Variant, Shape]]:
    for variant in chosen_variants(spec, variants):
        for shape in op_shapes(spec, variant):
            if shape.model in models:
                yield variant, shape


def _cell(spec: OpSpec, variant: Variant, shape: Shape, m: int, mode: Mode) -> Cell:
    return {
        "op": spec.name,
        "variant": variant.name,
        "model": shape.model,
        "label": shape.label,
        "K": shape.k,
        "N": shape.n,
        "m": m,
        "mode": mode,
    }


def report_order(op: str) -> int:
    """Where the op stands in a report."""
    return OPS.index(op) if op in OPS else len(OPS)


def coarse_first(ms: Sequence[int]) -> list[int]:
    """Every M once: the ends, then the middle of the widest gap, and so on."""
    rest = sorted(set(ms))
    order = list(dict.fromkeys(rest[:1] + rest[-1:]))
    while len(order) < len(rest):
        taken = sorted(rest.index(m) for m in order)
        low, high = max(itertools.pairwise(taken), key=lambda gap: gap[1] - gap[0])
        order.append(rest[(low + high) // 2])
    return order


def model_names(wanted: Sequence[str] | None) -> list[str]:
    """The models named, in full or by their size (8B), `other` being the shapes of none of them; all if None."""
    names = [*(model.name for model in ALL_MODELS), "other"]
    if wanted is None:
        return names
    found = []
    for word in wanted:
        match = next((name for name in names if word.lower() in (name.lower(), name.lower().removeprefix("qwen3-"))), None)
        if match is None:
            raise HdispatchError(f"no model {word!r}; there are {', '.join(names)}")
        found.append(match)
    return found


# ---- what a call must do ----

#: Written tensors that are read first, beyond any op's `residual`.
READ_AND_WRITTEN = {
    "fused_add_rms_norm": {"input"},
    "fused_qk_norm_rope": {"qkv"},
    "rotary_embedding": {"query", "key"},
}
#: Tensors of which a call reads M rows.
GATHERED = {"cos_sin_cache"}


def call_bytes(spec: OpSpec, arguments: Sequence[Any], m: int) -> int:
    """The fewest bytes that a call moves: each tensor once, twice what is read and written, only the rows it gathers."""
    named = dict(zip((arg.name for arg in spec.args), arguments, strict=True))
    total = 0
    for arg in spec.tensors():
        value = named[arg.name]
        if isinstance(value, Tensor):
            total += _moved(spec, arg, value, m, named)
    return total


def _moved(spec: OpSpec, arg: TensorArg, value: Tensor, m: int, named: Mapping[str, Any]) -> int:
    amount = value.numel() * value.element_size()
    if arg.name in GATHERED:
        amount = amount * min(m, value.shape[0]) // value.shape[0]
    if (spec.name, arg.name) == ("fused_qk_norm_rope", "qkv"):  # the heads of v are not touched
        q, k, v = (named[f"num_heads_{which}"] for which in "qkv")
        amount = amount * (q + k) // (q + k + v)
    twice = arg.mutated and arg.name in READ_AND_WRITTEN.get(spec.name, set()) | {"residual"}
    return 2 * amount if twice else amount


def call_flops(cell: Cell) -> int:
    """Operations of the matrix units in a call."""
    return 2 * cell["m"] * cell["K"] * cell["N"] if cell["op"] in PRODUCTS else 0

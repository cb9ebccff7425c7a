"""The Triton kernels of a mixture of experts' ops, interpreted on the CPU, against their references; prints failures as JSON.

Run as a program, since the interpreter is switched on by the environment: test_moe_ops.py does.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import hdispatch
import torch
from hdispatch.opspec import OpSpec, Variant
from hdispatch.testing.numeric import compare_outputs, poison
from interpreted import report
from special_values import like_the_gpu

CPU = torch.device("cpu")
NAN, INFINITY = float("nan"), float("inf")
Case = tuple[str, Variant, dict[str, Any], list[Any]]


def equal_to_the_reference(spec: OpSpec, variant: Variant, found: list[Any], expected: list[Any]) -> None:
    """Every output; where the reference has NaN, infinities or zeros, exactly that."""
    for arg, got, wanted in zip(spec.args, found, expected, strict=True):
        if getattr(arg, "mutated", False) and wanted.is_floating_point():
            odd, zero = ~wanted.isfinite() | (wanted == 0), wanted == 0
            assert torch.equal(got[odd].nan_to_num(7.0), wanted[odd].nan_to_num(7.0)), f"{arg.name}: NaN, infinities or zeros"
            assert torch.equal(got[zero].signbit(), wanted[zero].signbit()), f"{arg.name}: signs of zeros"
            for each in (got, wanted):
                each.masked_fill_(odd, 1.0)
    compare_outputs(spec, variant, found, expected, 1.0)


def launcher(kernel: Any, grid: tuple[int, ...], *values: Any, **options: Any) -> None:
    kernel[grid](*values, **{k: v for k, v in options.items() if k.isupper()})


def run(spec: OpSpec, variant: Variant, config: dict[str, Any], given: list[Any]) -> None:
    """The kernel and the reference on copies of the arguments."""
    module = importlib.import_module(f"hdispatch.kernels.{spec.name}.triton")
    found, expected = ([each.clone() if isinstance(each, torch.Tensor) else each for each in given] for _ in range(2))
    module.launch(*found, config={**config, "pdl": False}, _launcher=launcher)
    spec.reference(*expected)
    equal_to_the_reference(spec, variant, found, expected)
    for arg, before, after in zip(spec.args, given, found, strict=True):
        if isinstance(before, torch.Tensor) and not getattr(arg, "mutated", False):
            assert torch.equal(before.nan_to_num(), after.nan_to_num()), f"{arg.name} was changed"


def edges(spec: OpSpec, most: int) -> list[int]:
    """Every M at an edge of a bucket, and beside it."""
    if spec.fallback is not None and spec.fallback.beyond_ladder:
        most = min(most, spec.ladder[-1])
    return sorted({m for edge in spec.ladder for m in (edge - 1, edge, edge + 1) if 1 <= m <= most})


def configs(spec: OpSpec, variant: Variant, sizes: dict[str, int]) -> list[dict[str, Any]]:
    module = importlib.import_module(f"hdispatch.kernels.{spec.name}.triton")
    found: list[dict[str, Any]] = module.candidates(sizes, variant)
    return found


def made(spec: OpSpec, variant: Variant, sizes: dict[str, int]) -> list[Any]:
    return spec.sample(variant, sizes, CPU, torch.Generator().manual_seed(sum(sizes.values())))


# ---- topk_softmax ----

#: Rows of logits, repeated to the width that is wanted.
LOGITS = {
    "ties": [1.0, 1.0, 0.0, 1.0],
    "zeros of both signs": [0.0, -0.0],
    "nan": [1.0, NAN, 2.0, 3.0],
    "nan and infinity": [INFINITY, NAN, -INFINITY, 0.0],
    "infinity": [1.0, INFINITY, 2.0, 3.0],
    "minus infinity alone": [-INFINITY],
    "minus infinity": [-INFINITY, 1.0, -INFINITY, 2.0],
    "few that are not minus infinity": [0.5] + [-INFINITY] * 63,
    "underflow": [0.0, -200.0, -300.0, -200.0],
    "extremes": [3e38, -3e38, 0.0, 1.0],
    "ascending": [float(n) / 4 for n in range(64)],
}


def topk_softmax(spec: OpSpec) -> Iterator[Case]:
    for variant in spec.variants():
        usual = variant.name == spec.typical_variant().name
        for experts, topk in ((128, 8), (60, 4), (512, 10), (8, 2), (8, 8), (1, 1), (17, 16)) if usual else ((128, 8), (60, 6)):
            for m in edges(spec, 300) if usual and (experts, topk) == (8, 2) else (1, 17) if usual or experts == 60 else (1,):
                sizes = {"M": m, "A": topk, "N": experts}
                given = made(spec, variant, sizes)
                exact = configs(spec, variant, {"M": m, "N": experts})
                for config in (*(exact if m == 17 and usual else exact[-1:]), configs(spec, variant, {"M": m})[-1]):
                    yield f"{experts} experts, {topk}, M={m}", variant, config, given
        given = made(spec, variant, {"M": len(LOGITS), "A": 8, "N": 128})
        for row, logits in zip(given[3], LOGITS.values(), strict=True):
            row.copy_(torch.tensor((logits * 128)[:128]).clamp(-torch.finfo(row.dtype).max, None))
            if INFINITY in logits or -INFINITY in logits:
                row.copy_(torch.tensor((logits * 128)[:128]))
        for config in (configs(spec, variant, {"M": 16, "N": 128})[1], configs(spec, variant, {"M": 512})[0]):
            yield f"special rows {', '.join(LOGITS)}", variant, config, given


# ---- moe_sum ----


def moe_sum(spec: OpSpec) -> Iterator[Case]:
    for variant in spec.variants():
        usual = variant.name == spec.typical_variant().name
        for columns in (2048, 1, 255, 257, 1000) if usual else (257,):
            for topk in (8, 1, 2, 7, 9):
                for m in edges(spec, 70) if (columns, topk) == (255, 2) else (1, 3):
                    given = made(spec, variant, {"M": m, "A": topk, "N": columns})
                    for config in configs(spec, variant, {"M": 1, "N": columns})[:: 1 if m == 3 else 2]:
                        yield f"M={m} {topk} x {columns}", variant, config, given
        given = made(spec, variant, {"M": 6, "A": 8, "N": 64})
        most = torch.finfo(given[0].dtype).max
        for row, value in zip(given[0], (NAN, INFINITY, -INFINITY, most, -0.0, 0.0), strict=True):
            row[3, ::3] = value
            row[5, 1::3] = -value
            row[6, ::9] = -value if abs(value) == INFINITY else 1.0
        given[0][4] = -0.0
        yield "special numbers", variant, configs(spec, variant, {"M": 8})[0], given
        wide = made(spec, variant, {"M": 5, "A": 6, "N": 64})
        wide[0] = poison(torch.empty(5, 7, 64, dtype=wide[0].dtype))[:, :6].copy_(wide[0])
        yield "strided tokens", variant, configs(spec, variant, {"M": 8})[0], wide


# ---- moe_align_block_size ----

#: Ids of M x A rows by what is special about them.
IDS: dict[str, Callable[[int, int, int], torch.Tensor]] = {
    "all to the first": lambda m, a, _: torch.zeros(m, a),
    "all to the last": lambda m, a, n: torch.full((m, a), n - 1),
    "no expert": lambda m, a, _: torch.full((m, a), -1),
    "beyond the last": lambda m, a, n: torch.full((m, a), n),
    "in turns": lambda m, a, n: torch.arange(m * a).view(m, a) % n,
    "in turns, backwards": lambda m, a, n: (n - 1) - torch.arange(m * a).view(m, a) % n,
    "every third one": lambda m, a, n: torch.arange(m * a).view(m, a) * 3 % n,
}


def room(ids: torch.Tensor, experts: int, block: int, more: int = 0) -> list[torch.Tensor]:
    """Poisoned outputs, `more` elements longer than vLLM makes them."""
    rows = ids.numel()
    most = rows + experts * (block - 1)
    size = (min(rows * block, most) if rows < experts else most) + more
    return [torch.full((each,), -7, dtype=torch.int32) for each in (size, (size + block - 1) // block, 1)]


def moe_align_block_size(spec: OpSpec) -> Iterator[Case]:
    def few(experts: int, mine: int = 16, rows: int = 64) -> dict[str, Any]:
        """A config of few programs, each of which is a slow one here."""
        return {"experts": experts, "mine": mine, "rows": rows, "fill": 32, "num_warps": 1}

    for variant in spec.variants():
        usual = variant.name == spec.typical_variant().name
        for experts, topk in ((128, 8), (60, 4), (512, 10), (8, 2), (1, 1), (129, 3)) if usual else ((100, 8), (129, 3)):
            for m in (edges(spec, 520) if experts == 8 else (1, 9, 33)) if usual else (9,):
                for block in (1, 16, 64, 128) if m == 9 else (16,):
                    given = made(spec, variant, {"M": m, "A": topk, "num_experts": experts})
                    given[2:6] = [block, *room(given[0], experts, block, more=0 if m != 33 else 45)]
                    config = few(128 if experts <= 128 else 512, 8 if experts <= 8 else 64, 32 if m < 100 else 256)
                    yield f"{experts} experts, M={m}, block {block}", variant, config, given
        for name, make in IDS.items():
            for m, topk, experts in ((1, 8, 128), (7, 3, 8), (65 if usual else 17, 8, 128)):
                ids = make(m, topk, experts).to(variant.dtypes["topk_ids"])
                placed = made(spec, variant, {"M": 1, "num_experts": experts})[-1]
                yield f"{name}, {m} x {topk}", variant, few(128), [ids, experts, 16, *room(ids, experts, 16), placed]
        if "maybe_expert_map" in variant.dtypes:
            given = made(spec, variant, {"M": 30, "A": 6, "num_experts": 100})
            for number in (-1, 3):
                placed = torch.full((100,), number, dtype=torch.int32)
                yield f"all mapped to {number}", variant, few(128), [*given[:-1], placed]
            yield "a longer map", variant, few(128), [*given[:-1], torch.arange(200, dtype=torch.int32) % 100]
            yield "a shorter map", variant, few(128), [*given[:-1], torch.arange(40, dtype=torch.int32)]
            yield "no map", variant, few(128), [*given[:-1], torch.empty(0, dtype=torch.int32)]
            yield "numbers that are none", variant, few(128), [*given[:-1], torch.arange(100, dtype=torch.int32) + 50]
        given = made(spec, variant, {"M": 9, "A": 4, "num_experts": 100})
        yield "more experts than are counted at once", variant, few(32), given
    # What is built, of few experts.
    variant = spec.typical_variant()
    for m in (1, 8, 65):
        given = made(spec, variant, {"M": m, "A": 8, "num_experts": 20})
        for edge in (128, 512):
            for config in configs(spec, variant, {"M": m, "num_experts": edge}):
                yield f"candidates of M={m}", variant, config, given


CASES: dict[str, Callable[[OpSpec], Iterator[Case]]] = {
    "topk_softmax": topk_softmax,
    "moe_sum": moe_sum,
    "moe_align_block_size": moe_align_block_size,
}


def main(name: str) -> None:
    like_the_gpu()
    spec = hdispatch.registry.spec(name)
    report(
        (f"{variant.name} {what} {config}", partial(run, spec, variant, config, given))
        for what, variant, config, given in CASES[name](spec)
    )


if __name__ == "__main__":
    main(sys.argv[1])

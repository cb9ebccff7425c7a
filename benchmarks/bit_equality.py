"""Are our ops' results vLLM's, bit for bit? Counts what differs over many random elements, on a GPU.

    python benchmarks/bit_equality.py BUNDLE --vllm LIBRARY [--elements 100000000] [--op NAME ...] [--json FILE]

LIBRARY is the one behind torch.ops._C. Of every op that it has too, GEMMs aside, each variant runs on random rows (normal
numbers of row magnitudes from 1/8 to 8, one in 4 rows with an outlier) until as many elements as asked for have been
written. For each output of an op it prints how many elements have other bits, how many of those differ by more than one
unit in the last place (of fp8: by more than one code), the largest relative difference, and the variant and size where most
differ; FILE has every variant and size. Where an op adds squares, vLLM's order of adding is not ours; nothing else may
differ: the exit status is 1 if another op has an element with other bits.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hdispatch
import torch
from hdispatch.bench.machine import describe
from hdispatch.opspec import OpSpec, Variant

#: GEMMs, whose order of adding is a library's own.
GEMMS = ("scaled_mm", "scaled_mm_blockwise", "ll_gemm_bf16", "ll_gemm_fp8")
#: The ops that add: the order of a float32 sum decides the last bit.
SUMS = ("rms_norm", "fused_add_rms_norm", "fused_qk_norm_rope", "rms_norm_dynamic_per_token_quant", "rms_norm_per_block_quant")
#: Rows of one call, many so that few calls are needed, but no more elements of its largest tensor than that.
ROWS, ELEMENTS = 2048, 2**25
#: For the sizes that a row leaves open.
OPEN = {"K": 3072, "N": 1024}
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclasses.dataclass
class Difference:
    """Of one output: elements compared, those with other bits, with others than a neighbour, and the worst."""

    elements: int = 0
    differ: int = 0
    further: int = 0
    worst: float = 0.0

    def add(self, got: torch.Tensor, want: torch.Tensor) -> None:
        """Count the elements of two tensors of one shape and dtype."""
        integer = INTEGERS[got.element_size()]
        bits, wanted = got.contiguous().view(integer), want.contiguous().view(integer)
        self.elements += got.numel()
        unequal = bits != wanted
        count = int(unequal.sum())
        self.differ += count
        if not count:
            return
        places = (_place(bits[unequal], integer) - _place(wanted[unequal], integer)).abs()
        self.further += int((places > 1).sum())
        if got.dtype.is_floating_point:
            ours, theirs = got[unequal].double(), want[unequal].double()
            relative = ((ours - theirs).abs() / theirs.abs()).nan_to_num(float("inf"))
            relative[ours == theirs] = 0  # zeros of other signs
            self.worst = max(self.worst, float(relative.max()))


def _place(bits: torch.Tensor, integer: torch.dtype) -> torch.Tensor:
    """Where a float's bits stand among its values in ascending order."""
    top = torch.iinfo(integer).max // (1 if integer != torch.uint8 else 2)
    wide = bits.long()
    magnitude = wide & top
    negative = wide < 0 if integer != torch.uint8 else wide > top
    return torch.where(negative, -magnitude, magnitude)


def copies(args: Sequence[Any]) -> list[Any]:
    """The arguments with their strides; what lies between their elements is not copied."""

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)

    return [copy(value) if isinstance(value, torch.Tensor) else value for value in args]


def rows_of_a_call(spec: OpSpec, variant: Variant, sizes: dict[str, int]) -> int:
    """M of every call; dynamic_scaled_fp8_quant takes few rows."""
    row = max(abs(math.prod(spec.tensor_sizes(arg, {**sizes, "M": 1}, variant.static))) for arg in spec.tensors())
    most = 64 * 5120 // row if spec.name == "dynamic_scaled_fp8_quant" else min(ROWS, spec.ladder[-1])
    return max(1, min(most, ELEMENTS // row))


def measure(
    spec: OpSpec,
    variant: Variant,
    sizes: dict[str, int],
    elements: int,
    ours: Callable[..., Any],
    theirs: Callable[..., Any],
    device: torch.device,
) -> dict[str, Difference]:
    """Differences by output of one variant; at least one call, `elements` of the largest output."""
    found: dict[str, Difference] = {}
    m, seed, done = rows_of_a_call(spec, variant, sizes), 0, 0
    while not found or done < elements:
        args = spec.sample(variant, {"M": m, **sizes}, device, torch.Generator(device).manual_seed(seed))
        expected = copies(args)
        theirs(*expected)
        ours(*args)
        written = [
            (arg.name, got, want)
            for arg, got, want in zip(spec.args, args, expected, strict=True)
            if getattr(arg, "mutated", False) and got is not None
        ]
        for name, got, want in written:
            found.setdefault(name, Difference()).add(got, want)
        done += max(got.numel() for _, got, _ in written)
        seed += 1
    return found


def their_op(op: str) -> Callable[..., Any]:
    """vLLM's op, called with our arguments: ours may have flags of their own at the end, or fewer optional ones."""
    theirs = getattr(torch.ops._C, op).default
    count = len(theirs._schema.arguments)
    return lambda *args: theirs(*args[:count], *([None] * (count - len(args))))


def cases(spec: OpSpec) -> Iterator[tuple[Variant, dict[str, int]]]:
    """The variants that vLLM has, each with every size that rows are built for."""
    for variant in spec.served_variants():
        if spec.name.endswith("per_block_quant") and variant.static.get("scale_ue8m0"):
            continue  # our own
        sizes = {symbol: OPEN.get(symbol, spec.hint(symbol)) for symbol in spec.symbols() if symbol != "M"}
        for shape in [shape for shape in spec.shapes if shape] or [{}]:
            yield variant, {symbol: shape.get(symbol, size) for symbol, size in sizes.items()}


def summary(op: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each output of an op; rows are those of --json."""
    lines = []
    for output in dict.fromkeys(row["output"] for row in rows):
        own = [row for row in rows if row["output"] == output]
        differ, elements, further = (sum(row[key] for row in own) for key in ("differ", "elements", "further"))
        line = f"{op:36} {output:16} {differ:>9} of {elements} differ"
        if differ:
            worst = max(own, key=lambda row: row["differ"] / row["elements"])
            line += f", {further} by more than one, at most {max(row['worst'] for row in own):.3g} of the value; most of "
            line += f"{worst['variant']} {worst['sizes']}: {worst['differ'] / worst['elements']:.2g}"
        lines.append(line)
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the counts of every op; 1 if an op that adds nothing differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--vllm", type=Path, required=True, metavar="LIBRARY", help="the library behind torch.ops._C")
    parser.add_argument("--elements", type=int, default=10**8, help="of each variant of an op, all sizes together")
    parser.add_argument("--op", action="append", help="only this op; more than once for more")
    parser.add_argument("--json", type=Path, help="write the counts of every variant and size here")
    options = parser.parse_args(arguments)
    torch.ops.load_library(str(options.vllm))
    hdispatch.load(options.bundle)
    manifest = json.loads((options.bundle / "manifest.json").read_text())
    rows: list[dict[str, Any]] = []
    for op in options.op or sorted(manifest["ops"]):
        if op in GEMMS or not hasattr(torch.ops._C, op):
            print(f"{op:36} {'a GEMM' if op in GEMMS else 'not in torch.ops._C'}")
            continue
        with hdispatch.strict():
            ours, theirs = getattr(hdispatch.ops, op), their_op(op)
            found = of_op(hdispatch.registry.spec(op), options.elements, ours, theirs, torch.device("cuda"))
        rows += found
        print(*summary(op, found), sep="\n", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": describe(torch.device("cuda")), "rows": rows}, indent=1) + "\n")
    wrong = sorted({row["op"] for row in rows if row["differ"] and row["op"] not in SUMS})
    print(f"ops that add nothing and differ: {', '.join(wrong)}" if wrong else "no op that adds nothing differs")
    return 1 if wrong else 0


def of_op(
    spec: OpSpec, elements: int, ours: Callable[..., Any], theirs: Callable[..., Any], device: torch.device
) -> list[dict[str, Any]]:
    """The rows of one op: a variant, a size and an output each; `elements` of each variant, all sizes together."""
    rows = []
    sizes_of_a_variant = len([shape for shape in spec.shapes if shape]) or 1
    for variant, sizes in cases(spec):
        for output, found in measure(spec, variant, sizes, elements // sizes_of_a_variant, ours, theirs, device).items():
            where = {"op": spec.name, "variant": variant.name, "sizes": sizes, "output": output}
            rows.append({**where, **dataclasses.asdict(found)})
    return rows


if __name__ == "__main__":
    sys.exit(main())

"""Are our ops' results vLLM's, bit for bit? Counts what differs over many random elements, on a GPU.

    python benchmarks/bit_equality.py BUNDLE --vllm LIBRARY [--elements 100000000] [--op NAME ...] [--json FILE]

LIBRARY is the one behind torch.ops._C. Of every op that it has too, each variant runs on random rows (normal numbers of row
magnitudes from 1/8 to 8, one in 4 rows with an outlier) until as many elements as asked for have been written. Of each
output it prints how many elements have other bits, how many of those differ by more than one unit in the last place (of
fp8: by more than one code), and the largest relative difference. Where an op adds squares, vLLM's order of adding is not
ours; nothing else may differ: the exit status is 1 if another op has an element with other bits.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hdispatch
import torch
from hdispatch.bench.machine import describe
from hdispatch.opspec import OpSpec, Variant

#: Our name -> vLLM's, where another.
THEIRS = {"scaled_mm": None, "scaled_mm_blockwise": None, "ll_gemm_bf16": None, "ll_gemm_fp8": None}
#: The ops that add: the order of a float32 sum decides the last bit.
SUMS = ("rms_norm", "fused_add_rms_norm", "fused_qk_norm_rope", "rms_norm_dynamic_per_token_quant", "rms_norm_per_block_quant")
#: Rows of one call, many so that few calls are needed; dynamic_scaled_fp8_quant takes few.
ROWS = 2048
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


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


def rows_of_a_call(spec: OpSpec, sizes: dict[str, int]) -> int:
    """M of every call."""
    if spec.name == "dynamic_scaled_fp8_quant":
        return 64 * 5120 // sizes["K"]
    return min(ROWS, spec.ladder[-1])


def measure(spec: OpSpec, variant: Variant, sizes: dict[str, int], elements: int) -> dict[str, Difference]:
    """Differences by output of one variant; at least one call, `elements` of the widest output."""
    theirs = getattr(torch.ops._C, THEIRS.get(spec.name) or spec.name).default
    count, device = len(theirs._schema.arguments), torch.device("cuda")
    found: dict[str, Difference] = {}
    m, seed, done = rows_of_a_call(spec, sizes), 0, 0
    while done < elements:
        generator = torch.Generator(device).manual_seed(seed)
        args = spec.sample(variant, {"M": m, **sizes}, device, generator)
        expected = copies(args)
        theirs(*expected[:count], *([None] * (count - len(expected))))
        with hdispatch.strict():
            getattr(hdispatch.ops, spec.name)(*args)
        for arg, got, want in zip(spec.args, args, expected, strict=True):
            if getattr(arg, "mutated", False) and got is not None:
                found.setdefault(arg.name, Difference()).add(got, want)
        done += max(value.numel() for arg, value in zip(spec.args, args, strict=True) if getattr(arg, "mutated", False))
        seed += 1
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the counts of every op; 1 if an op that adds nothing differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--vllm", type=Path, required=True, metavar="LIBRARY", help="the library behind torch.ops._C")
    parser.add_argument("--elements", type=int, default=10**8, help="of each variant of an op, all sizes together")
    parser.add_argument("--op", action="append", help="only this op; more than once for more")
    parser.add_argument("--json", type=Path, help="write the counts here too")
    options = parser.parse_args(arguments)
    torch.ops.load_library(str(options.vllm))
    hdispatch.load(options.bundle)
    manifest = json.loads((options.bundle / "manifest.json").read_text())
    rows, wrong = [], []
    for op in options.op or sorted(manifest["ops"]):
        spec = hdispatch.ops.spec(op)
        if THEIRS.get(op, op) is None or not hasattr(torch.ops._C, op):
            print(f"{op}: not in torch.ops._C")
            continue
        shapes = [shape for shape in spec.shapes if shape]
        for variant in spec.served_variants():
            if op.endswith("per_block_quant") and variant.static.get("scale_ue8m0"):
                continue  # our own
            for shape in shapes:
                for name, found in measure(spec, variant, shape, options.elements // len(shapes)).items():
                    rows.append({"op": op, "variant": variant.name, **shape, "output": name, **dataclasses.asdict(found)})
                    where = f"{op:36} {variant.name:40} {' '.join(f'{k}={v}' for k, v in shape.items()):8} {name:16}"
                    print(f"{where} {found.differ:>9} of {found.elements} differ, {found.further} by more than one", end="")
                    print(f", at most {found.worst:.3g} of the value" if found.differ else "", flush=True)
                    if found.differ and op not in SUMS:
                        wrong.append(where)
    if options.json:
        options.json.write_text(json.dumps({"machine": describe(), "rows": rows}, indent=1) + "\n")
    print(f"{len(wrong)} outputs of ops that add nothing differ" if wrong else "no output of an op that adds nothing differs")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""Helion kernels whose code is not valid for every M, or that cannot become a record; runs inside of `in_worker`."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import helion
import helion.language as hl
import torch
from hdispatch.compile import DESCRIBED, build_unit, record_builder, store
from hdispatch.opspec import BoolArg, OpSpec, TensorArg


@helion.kernel(static_shapes=False)
def double(result: torch.Tensor, input: torch.Tensor) -> None:
    m, k = input.size()
    k = hl.specialize(k)
    for rows, columns in hl.tile([m, k]):
        result[rows, columns] = input[rows, columns] * 2


@helion.kernel(static_shapes=False)
def specialized(result: torch.Tensor, input: torch.Tensor) -> None:
    m, _ = input.size()
    m = hl.specialize(m)
    for rows in hl.tile(m):
        result[rows, :] = input[rows, :] * m


@helion.kernel(static_shapes=False)
def on_row_stride(result: torch.Tensor, input: torch.Tensor) -> None:
    hl.specialize(input.stride(0))
    for rows in hl.tile(input.size(0)):
        result[rows, :] = input[rows, :] * input.stride(0)


@helion.kernel(static_shapes=False)
def allocating(result: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(result)
    for rows in hl.tile(input.size(0)):
        out[rows, :] = input[rows, :]
    return out


@helion.kernel(static_shapes=True)
def static(result: torch.Tensor, input: torch.Tensor) -> None:
    for rows in hl.tile(input.size(0)):
        result[rows, :] = input[rows, :]


@helion.kernel(static_shapes=False)
def ignoring(result: torch.Tensor, input: torch.Tensor, flag: None) -> None:
    for rows in hl.tile(input.size(0)):
        result[rows, :] = input[rows, :]


@helion.kernel(static_shapes=False)
def looking(result: torch.Tensor, input: torch.Tensor, flag: None) -> None:
    for rows in hl.tile(input.size(0)):
        result[rows, :] = input[rows, :] * (2 if flag else 1)


SPEC = OpSpec(
    name="toy_helion",
    args=(
        TensorArg("result", ("M", "K"), (torch.float32,), mutated=True),
        TensorArg("input", ("M", "K"), (torch.float32,), layout="rows"),
    ),
    reference=lambda *_args: None,
    sample=lambda *_args: [],
    shapes=({"K": 64},),
    config_key={"width": "K", "rows": "M"},
    ladder=(1, 16, 256),
)


#: With a flag that every variant accepts.
FLAGGED = replace(SPEC, args=(*SPEC.args, BoolArg("flag", values=None)))


def build(kernel: str, config: dict[str, Any], buckets: list[int], cache: str) -> Any:
    """The records of a kernel, and which buckets each serves."""
    package = types.ModuleType("toy_helion")
    modules = {"toy_helion": package, "toy_helion.spec": types.ModuleType("toy_helion.spec")}
    modules["toy_helion.spec"].SPEC = FLAGGED if kernel in ("ignoring", "looking") else SPEC  # type: ignore[attr-defined]
    modules["toy_helion.helion"] = types.ModuleType("toy_helion.helion")
    modules["toy_helion.helion"].KERNEL = globals()[kernel]  # type: ignore[attr-defined]
    sys.modules.update(modules)
    work = build_unit.Unit("toy_helion", "helion", "any", {"K": 64}, config, tuple(buckets))
    return record_builder.build_records(work, DESCRIBED["h200"], {}, store.Store(Path(cache)))

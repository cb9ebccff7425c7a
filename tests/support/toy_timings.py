"""A toy op to select configs for: lines of its timings, the selection, and the configs that were picked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hdispatch.compile import configs
from hdispatch.compile.op_package import OpPackage
from hdispatch.opspec import OpSpec, TensorArg
from hdispatch.tune import select, timings

SPEC = OpSpec(
    name="toy_select",
    args=(TensorArg("input", ("M", "K"), (torch.float32, torch.float16)),),
    reference=lambda *_args: None,
    sample=lambda *_args: [],
    shapes=({"K": 64}, {"K": 512}, {}),
    config_key={"hidden_size": "K", "num_tokens": "M"},
    ladder=(1, 2, 4, 8),
)


def line(k: int, bucket: int, name: str, us: float | None, **changes: Any) -> timings.Timing:
    content: dict[str, Any] = {
        "op": "toy_select",
        "variant": "float32",
        "K": k,
        "N": 0,
        "bucket": bucket,
        "M": SPEC.ladder[bucket % len(SPEC.ladder)],
        "backend": "triton",
        "config": {"name": name},
        "generic": [],
        "artifacts": [name],
        "status": "ok",
        "why": "",
        **({"us": us, "q1": us, "q3": us} if us is not None else {}),
        "rounds": 9,
        "compile_seconds": 2.0,
        "device_seconds": 0.5,
        "gpu": "NVIDIA H200",
        "versions": {"torch": "2"},
        "time": "2026-01-01T00:00:00+00:00",
    }
    return {**content, **changes}  # type: ignore[typeddict-item]


def table(k: int, **columns: list[float | None]) -> list[timings.Timing]:
    """Lines of one K: by config its time in each bucket, None where it is not a candidate."""
    return [line(k, bucket, name, us) for name, column in columns.items() for bucket, us in enumerate(column) if us is not None]


def run(lines: list[timings.Timing], folder: Path, **options: Any) -> select.OpReport:
    package = toy_package(folder, backends=options.pop("backends", ("triton",)))
    (report,) = select.select(lines, {"toy_select": package}, **options)
    return report


def toy_package(folder: Path, spec: OpSpec = SPEC, backends: tuple[str, ...] = ("triton",)) -> OpPackage:
    where = folder / "toy_select"
    return OpPackage("toy_select", "toy_select", spec, where, backends, dict.fromkeys(backends, frozenset()), where)


def picks(folder: Path, shape: dict[str, int], gpu: str = "h200") -> list[str]:
    file = configs.read(folder / "toy_select" / f"nvidia_{gpu}.json", SPEC)
    return [file.pick(SPEC, shape, {"M": edge}).config["name"] for edge in SPEC.ladder]

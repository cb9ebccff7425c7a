"""A toy op and a hand-made bundle for it: dispatch logic without a compiler and without a GPU."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import hdispatch
import torch
from hdispatch.manifest import ARTIFACTS, CHECKSUM_NAME, MANIFEST_NAME, SCHEMA_VERSION
from hdispatch.opspec import FloatArg, OpSpec, TensorArg, Variant


def reference(result, input, weight, scale, epsilon, scale_ub=None, residual=None):
    """Not the real op: enough to see that the fallback ran, with every argument in place."""
    result.copy_((input.float() * weight.float() + epsilon).to(result.dtype))
    scale.fill_(epsilon if scale_ub is None else float(scale_ub))
    if residual is not None:
        residual.add_(1)


def sample(variant: Variant, sizes: dict[str, int], device: torch.device, generator: torch.Generator) -> list[Any]:
    m, k = sizes["M"], sizes["K"]
    dtype = variant.dtypes["input"]
    return [
        torch.zeros(m, k, dtype=torch.float8_e4m3fn, device=device),
        torch.randn(m, k, generator=generator, device=device).to(dtype),
        torch.randn(k, generator=generator, device=device).to(dtype),
        torch.zeros(m, 1, device=device),
        1e-6,
        None if "scale_ub" in variant.none else torch.ones(1, device=device),
        None if "residual" in variant.none else torch.randn(m, k, generator=generator, device=device).to(dtype),
    ]


SPEC = OpSpec(
    name="toy",
    args=(
        TensorArg("result", ("M", "K"), (torch.float8_e4m3fn,), mutated=True),
        TensorArg("input", ("M", "K"), (torch.bfloat16, torch.float16), layout="rows"),
        TensorArg("weight", ("K",), "input"),
        TensorArg("scale", ("M", 1), (torch.float32,), mutated=True),
        FloatArg("epsilon", minimum=0.0),
        TensorArg("scale_ub", (1,), (torch.float32,), optional=True),
        TensorArg("residual", ("M", "K"), "input", mutated=True, optional=True),
    ),
    reference=reference,
    sample=sample,
    shapes=({"K": 64}, {"K": 512}),
    config_key={"hidden_size": "K", "num_tokens": "M"},
    ladder=(1, 2, 4, 8, 16),
)
OP = hdispatch.registry.define(SPEC) if "toy" not in hdispatch.registry.names() else hdispatch.ops.toy


def arguments(m: int = 4, k: int = 64, variant: str = "bfloat16", seed: int = 0) -> list[Any]:
    """Arguments of a call on the CPU."""
    return sample(SPEC.variant(variant), {"M": m, "K": k}, torch.device("cpu"), torch.Generator().manual_seed(seed))


def record(m_min: int = 1, m_max: int = 2**31 - 1) -> dict[str, Any]:
    """Grid ceil(M / 4); every kind of parameter; a guard on the row stride."""
    code = {
        "function": "toy_kernel",
        "num_warps": 4,
        "shared_bytes": 0,
        "cluster": [1, 1, 1],
        "cooperative": False,
        "pdl": True,
    }
    return {
        "launcher": "cubin",
        "backend": "triton",
        "kernel": "toy_kernel",
        "config": {},
        "m_min": m_min,
        "m_max": m_max,
        "grid": [["M", 3, "+", 4, "//"], [1], [1]],
        "params": [
            {"kind": "ptr", "arg": "result", "align": 16},
            {"kind": "ptr", "arg": "input", "align": 16, "offset": [32]},
            {"kind": "ptr", "arg": "scale", "align": 16},
            {"kind": "i32", "value": ["input.stride(0)"]},
            {"kind": "i32", "value": ["M"]},
            {"kind": "f32", "arg": "epsilon"},
            {"kind": "f64", "const": 0.5},
            {"kind": "i64", "value": ["M", "K", "*"]},
            {"kind": "i1", "value": ["M", 2, ">"]},
        ],
        "guards": [{"expr": ["input.stride(0)", 16, "%", 0, "=="], "text": "input.stride(0) % 16 == 0"}],
        "cubins": {
            "one": {**code, "file": f"{ARTIFACTS}/one.cubin", "params": [0, 1, 2, 3, 5, 6, 7, 8]},
            "mult16": {**code, "file": f"{ARTIFACTS}/mult16.cubin", "params": list(range(9))},
            "other": {**code, "file": f"{ARTIFACTS}/other.cubin", "params": list(range(9))},
        },
    }


def manifest(
    sizes: tuple[int, ...] = (64, 512), variants: tuple[str, ...] = ("bfloat16", "bfloat16+scale_ub+residual")
) -> dict[str, Any]:
    """Rows for every variant, K and bucket."""
    contents = files()
    every = SPEC.variant_arguments()
    return {
        "schema_version": SCHEMA_VERSION,
        "hdispatch": hdispatch.__version__,
        "target": {"name": "h200", "arch": "sm_90a", "compute_capability": [9, 0], "sm_count": 132, "shared_memory": 232448},
        "tools": {"triton": "0"},
        "ops": {"toy": {"schema": SPEC.schema(), "ladder": list(SPEC.ladder), "variants": {v: every[v] for v in variants}}},
        "files": {n: {"sha256": hashlib.sha256(c).hexdigest(), "size": len(c)} for n, c in contents.items()},
        "records": [record()],
        "rows": [
            {"op": "toy", "variant": v, "K": k, "N": 0, "bucket": b, "record": 0, "build_seconds": 0.5, "bytes": 12}
            for v in variants
            for k in sizes
            for b in range(len(SPEC.ladder))
        ],
    }


def files() -> dict[str, bytes]:
    """Artifacts that only the null driver takes."""
    return {f"{ARTIFACTS}/{name}.cubin": name.encode() * 50 for name in ("one", "mult16", "other")}


def write(folder: Path, content: dict[str, Any] | None = None) -> Path:
    """Write a bundle, with a checksum that fits whatever the manifest says."""
    (folder / ARTIFACTS).mkdir(parents=True, exist_ok=True)
    write_text(folder, json.dumps(content or manifest()).encode())
    for name, data in files().items():
        (folder / name).write_bytes(data)
    return folder


def write_text(folder: Path, text: bytes) -> None:
    """Write a manifest of that text, and its checksum."""
    (folder / MANIFEST_NAME).write_bytes(text)
    (folder / CHECKSUM_NAME).write_text(f"{hashlib.sha256(text).hexdigest()}  {MANIFEST_NAME}\n")

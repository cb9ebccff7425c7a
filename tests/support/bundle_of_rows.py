"""A bundle for the null driver with a row of any size for each variant of the ops that serve SGLang's functions."""

from __future__ import annotations

from pathlib import Path

import toy
from hdispatch import registry
from hdispatch.integrations.sglang import FUNCTIONS
from hdispatch.opspec import OpSpec, TensorArg


def write_bundle(folder: Path) -> Path:
    content = toy.manifest()
    content.update(ops={}, records=[], rows=[])
    for name in sorted({function.op for function in FUNCTIONS}):
        spec = registry.spec(name)
        content["records"].append(_record(spec))
        every = spec.variant_arguments()
        content["ops"][name] = {"schema": spec.schema(), "ladder": list(spec.ladder), "variants": every}
        content["rows"] += [
            {"op": name, "variant": v, "K": 0, "N": 0, "bucket": b, "record": len(content["records"]) - 1}
            | {"build_seconds": 0.5, "bytes": 12}
            for v in every
            for b in range(len(spec.ladder))
        ]
    return toy.write(folder, content)


def _record(spec: OpSpec) -> dict[str, object]:
    """One block per row, and the first tensor that the op writes."""
    written = next(arg.name for arg in spec.args if isinstance(arg, TensorArg) and arg.mutated)
    record = toy.record() | {"kernel": spec.name, "grid": [["M"], [1], [1]], "guards": []}
    record["params"] = [{"kind": "ptr", "arg": written, "align": 1}, {"kind": "i32", "value": ["M"]}]
    for cubin in record["cubins"].values():
        cubin.update(params=[0, 1], function=spec.name)
    return record

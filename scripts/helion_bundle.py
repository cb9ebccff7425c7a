"""Builds a bundle whose rows are served by the ops' Helion kernels, whatever the config files pick, for tests on a GPU.

    python scripts/helion_bundle.py --target h100 --out helion-rows
    HDISPATCH_BUNDLE=helion-rows python -m pytest tests/gpu/test_ops.py tests/gpu/test_special_values.py

Rows of the first of each op's sizes, all variants, with the first of the kernel's candidates in each bucket.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

from hdispatch.compile import build, configs, op_package
from hdispatch.compile.builder import Selection
from hdispatch.compile.default_configs import first_candidates
from hdispatch.compile.pool import Pool
from hdispatch.compile.target import resolve
from hdispatch.opspec import OpSpec


def first_shape(spec: OpSpec) -> list[dict[str, int]]:
    """The first of an op's sizes that names all of them; else its first."""
    whole = [shape for shape in spec.shapes if {"M", *shape} >= set(spec.symbols())]
    return [(whole or list(spec.shapes))[0]]


def main() -> None:
    """Write config files of candidates, and build with those."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--target", default="native", metavar="GPU")
    parser.add_argument("--ops", metavar="A,B", help="default: all with a Helion kernel but the attention")
    given = parser.parse_args()
    gpu = resolve(given.target)
    packages = op_package.find(given.ops.split(",") if given.ops else None)
    ops = {n: p for n, p in packages.items() if "helion" in p.backends and (given.ops or n != "paged_attention_decode")}
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        with Pool(gpu, where / "cache") as workers:
            for name, package in ops.items():
                short = replace(package.spec, shapes=tuple(first_shape(package.spec)))
                file, _ = first_candidates(replace(package, spec=short, backends=("helion",)), gpu, workers)
                names = {symbol: key for key, symbol in package.spec.config_key.items()}
                entries = [
                    {
                        "key": {names[s]: size for s, size in e.sizes.items() if s in names},
                        "backend": "helion",
                        "config": e.config,
                    }
                    for e in file.entries
                ]
                (where / name).mkdir()
                (where / name / gpu.config_file).write_text(json.dumps(entries))
        configs.installed = lambda op: where / op
        report = build(list(ops), gpu, given.out, select=Selection(shapes=first_shape))
    print(f"{given.out}: {report.rows} rows, {report.records} records, {report.seconds:.0f} s")


if __name__ == "__main__":
    main()

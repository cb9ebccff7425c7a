"""What does a bundle of CuteDSL rows take? Builds the low-latency GEMMs from an empty cache and again from the full one.

    python benchmarks/cutedsl_rows.py [--ops ll_gemm_bf16,ll_gemm_fp8] [--json FILE]

Needs the build wing with nvidia-cutlass-dsl, and no GPU. Reported: rows, records, object files, seconds of both builds, size
of the shared library and of the bundle, and how long `hdispatch.load` takes with the null driver, which reads and verifies
the whole bundle but does not open the library.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import hdispatch
from hdispatch.bench.machine import describe, package_version
from hdispatch.bundle_reader import read_bundle
from hdispatch.compile import BuildReport, build
from hdispatch.manifest import LIBRARY

#: The ops that are built.
LEAST_ROWS = 50


def timed_build(ops: list[str], target: str, folder: Path, cache: Path, jobs: int) -> tuple[BuildReport, float]:
    """A build's report, and its seconds with everything: the start of its processes, the link, the checksums."""
    start = time.perf_counter()
    report = build(ops, target, folder, cache=cache, jobs=jobs)
    return report, time.perf_counter() - start


def time_load(folder: Path, repeats: int) -> list[float]:
    """Milliseconds per `hdispatch.load` with the null driver."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        hdispatch.load(folder, driver="null")
        found.append((time.perf_counter() - start) * 1e3)
    return found


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Build twice, load, count."""
    cache = scratch / "cache"
    ops = options.ops.split(",")
    cold, cold_seconds = timed_build(ops, options.target, scratch / "cold", cache, options.jobs)
    warm, warm_seconds = timed_build(ops, options.target, scratch / "warm", cache, options.jobs)
    if warm.cache_hits != len(cold.record_seconds):
        raise SystemExit(f"{warm.cache_hits} of {len(cold.record_seconds)} records came from the cache the second time")
    manifest, contents = read_bundle(scratch / "cold")
    rows = [row for row in manifest["rows"] if manifest["records"][row["record"]]["launcher"] == "tvm_ffi"]
    if len(rows) < LEAST_ROWS:
        raise SystemExit(f"the bundle has {len(rows)} CuteDSL rows; the figures are about at least {LEAST_ROWS}")
    times = time_load(scratch / "cold", options.repeats)
    q1, median, q3 = statistics.quantiles(times, n=4)
    each = [seconds for _, seconds in cold.record_seconds]
    return {
        "machine": describe() | {"nvidia-cutlass-dsl": package_version("nvidia-cutlass-dsl")},
        "ops": ops,
        "target": options.target,
        "jobs": options.jobs,
        "rows": len(rows),
        "records": cold.records,
        "objects": sum(path.is_file() for path in (cache / "blob").rglob("*")),
        "cold_seconds": round(cold_seconds, 1),
        "seconds_per_object": {"median": statistics.median(each), "largest": max(each)},
        "warm_seconds": round(warm_seconds, 2),
        "library_bytes": len(contents[LIBRARY]),
        "bundle_bytes": cold.bytes,
        "load_ms": {"driver": "null", "median": median, "q1": q1, "q3": q3, "first": times[0]},
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", default="ll_gemm_bf16,ll_gemm_fp8", help="ops whose kernels are CuteDSL's")
    parser.add_argument("--target", default="h200")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.add_argument("--repeats", type=int, default=7, help="how often the bundle is loaded")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(options, Path(scratch))
    load, per_object = found["load_ms"], found["seconds_per_object"]
    print(f"{found['rows']} rows, {found['records']} records, {found['objects']} object files, for {found['target']}")
    print(f"cold: {found['cold_seconds']} s, {found['jobs']} processes; {per_object['median']:.2f} s per object (median)")
    print(f"warm: {found['warm_seconds']} s")
    print(f"library {found['library_bytes'] / 2**20:.2f} MiB, bundle {found['bundle_bytes'] / 2**20:.2f} MiB")
    print(
        f"load, null driver: {load['median']:.1f} ms (quartiles {load['q1']:.1f}, {load['q3']:.1f}; first {load['first']:.1f})"
    )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

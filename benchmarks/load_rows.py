"""How long does loading take, per row and per module? Makes a bundle of N rows out of a real one and times `hdispatch.load`.

    python benchmarks/load_rows.py bundle --rows 1000 [--json FILE]

Two bundles are timed: one whose new rows share the real one's code, as rows do that have the same config, and the worst
case, in which every row has a record and a cubin of its own: as many modules as rows. Without a GPU the null driver loads.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import hdispatch
import torch
from hdispatch.bench.machine import describe
from hdispatch.manifest import ARTIFACTS, CHECKSUM_NAME, MANIFEST_NAME, Manifest


def widen(manifest: Manifest, contents: dict[str, bytes], rows: int, own_code: bool) -> tuple[Manifest, dict[str, bytes]]:
    """A bundle of `rows` rows: the real ones again and again, under sizes that no op has."""
    made = copy.deepcopy(manifest)
    made["rows"], made["records"], made["files"] = [], [] if own_code else made["records"], dict(made["files"])
    files = {} if own_code else dict(contents)
    for index, row in enumerate(itertools.islice(itertools.cycle(manifest["rows"]), rows)):
        fresh = copy.deepcopy(row)
        fresh["K"] = row["K"] + 2**20 * (index // len(manifest["rows"]))
        if own_code:
            record = copy.deepcopy(manifest["records"][row["record"]])
            # one cubin per row: the first class serves all
            cubin = next(iter(record["cubins"].values()))
            content = contents[cubin["file"]]
            cubin["file"] = f"{ARTIFACTS}/row{index}.cubin"
            record["cubins"] = dict.fromkeys(record["cubins"], cubin)
            files[cubin["file"]] = content
            fresh["record"] = len(made["records"])
            made["records"].append(record)
        made["rows"].append(fresh)
    made["files"] = {n: {"sha256": hashlib.sha256(c).hexdigest(), "size": len(c)} for n, c in files.items()}
    return made, files


def write(folder: Path, manifest: Manifest, files: dict[str, bytes]) -> None:
    """Write a bundle."""
    (folder / ARTIFACTS).mkdir(parents=True)
    text = json.dumps(manifest).encode()
    (folder / MANIFEST_NAME).write_bytes(text)
    (folder / CHECKSUM_NAME).write_text(f"{hashlib.sha256(text).hexdigest()}  {MANIFEST_NAME}\n")
    for name, content in files.items():
        (folder / name).write_bytes(content)


def time_load(folder: Path, driver: str, repeats: int) -> list[float]:
    """Milliseconds per `hdispatch.load`."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        hdispatch.load(folder, driver=driver)
        found.append((time.perf_counter() - start) * 1e3)
    return found


def main() -> None:
    """Make both bundles, load them, print and write the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    driver = "cuda" if torch.cuda.is_available() else "null"
    if driver == "cuda":
        torch.zeros(1, device="cuda")  # the context is torch's, and not what is timed
    manifest, contents = hdispatch.read_bundle(options.bundle)
    result = {"machine": describe(torch.device("cuda") if driver == "cuda" else None), "driver": driver, "rows": []}
    for own_code in (False, True):
        made, files = widen(manifest, contents, options.rows, own_code)
        with tempfile.TemporaryDirectory() as scratch:
            write(Path(scratch) / "bundle", made, files)
            times = time_load(Path(scratch) / "bundle", driver, options.repeats)
        q1, median, q3 = statistics.quantiles(times, n=4)
        what = f"{options.rows} rows, {len(made['records'])} records, {len(files)} modules"
        print(f"{what}: {median:.1f} ms (quartiles {q1:.1f}, {q3:.1f}; first {times[0]:.1f}), {driver} driver")
        entry = {"rows": options.rows, "records": len(made["records"]), "modules": len(files)}
        result["rows"].append({**entry, "median_ms": median, "q1_ms": q1, "q3_ms": q3, "first_ms": times[0]})
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""A bundle with nothing but what the race tests of mixed backends call, for tools that take long over every module."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

import torch
from hdispatch.bundle_reader import read_bundle
from hdispatch.manifest import CHECKSUM_NAME, MANIFEST_NAME, artifacts_of

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.pdl.chains import CHAINS, make_chain


def main(bundle: str, out: str) -> None:
    """Copy the rows of the chains' ops and variants, their records and files."""
    manifest, contents = read_bundle(bundle)
    called = {(step.op, step.variant) for name in CHAINS for step in make_chain(name, 1, torch.device("cpu")).steps}
    rows = [row for row in manifest["rows"] if (row["op"], row["variant"]) in called]
    kept = sorted({row["record"] for row in rows})
    records = [manifest["records"][index] for index in kept]
    files = {file: contents[file] for record in records for file in artifacts_of(record)}
    made = {
        **manifest,
        "ops": {op: entry for op, entry in manifest["ops"].items() if op in {row["op"] for row in rows}},
        "rows": [{**row, "record": kept.index(row["record"])} for row in rows],
        "records": records,
        "files": {file: manifest["files"][file] for file in files},
    }
    for file, content in files.items():
        (Path(out) / file).parent.mkdir(parents=True, exist_ok=True)
        (Path(out) / file).write_bytes(content)
    text = json.dumps(made).encode()
    (Path(out) / MANIFEST_NAME).write_bytes(text)
    (Path(out) / CHECKSUM_NAME).write_text(f"{hashlib.sha256(text).hexdigest()}  {MANIFEST_NAME}\n")
    print(f"{len(rows)} of {len(manifest['rows'])} rows, {len(files)} of {len(contents)} files")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("out", metavar="OUT")
    main(**vars(parser.parse_args()))

"""Freezing: rows, records and artifacts become a bundle folder, whole or not at all. Refuses gaps, duplicates, mixed tools."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import host
from ..bundle_reader import BundleFiles, checksum_line
from ..errors import BuildError
from ..manifest import (
    ARTIFACTS,
    CHECKSUM_NAME,
    LIBRARY,
    MANIFEST_NAME,
    SCHEMA_VERSION,
    Cubin,
    FileEntry,
    Manifest,
    Record,
    Recorded,
    Refused,
    Row,
    Tuned,
    artifacts_of,
    class_of,
)
from ..opspec import OpSpec
from . import ffi_link
from .build_unit import classes_of, serves, serves_second
from .out import check_out, write
from .recorded_kernels import RecordedKernels
from .store import Store, digest, sync_folder
from .target import GpuTarget


@dataclass(frozen=True)
class Entry:
    """A record and the rows of one shape that it serves, as the build made it.

    `file` of cubins is the SHA-256 of bytes in the store; that of a host function, of the object file that has it. Equal
    records of several entries become one; the objects become one shared library. `tuned` is by bucket.
    """

    op: str
    variant: str
    shape: dict[str, int]
    buckets: tuple[int, ...]
    record: Record
    tools: dict[str, str]
    seconds: float
    tuned: Mapping[int, Tuned] = field(default_factory=dict)


@dataclass(frozen=True)
class Frozen:
    """The bundle that was written. `sha256` is the manifest's; `bytes` counts every file of the bundle."""

    manifest: Manifest
    sha256: str
    bytes: int


def freeze(
    specs: Mapping[str, OpSpec],
    entries: Sequence[Entry],
    target: GpuTarget,
    store: Store,
    out: Path,
    *,
    partial: bool = False,
    without: Collection[tuple[str, str, int, int, int]] = (),
    recorded: RecordedKernels | None = None,
    beside: Callable[[Manifest, str], Mapping[str, bytes]] | None = None,
) -> Frozen:
    """Writes the bundle `out`, replacing a bundle that is there.

    `partial` allows variants, shapes and buckets of an op to be absent, for tests and tuning; `without` are rows, by
    (op, variant, K, N, bucket), whose calls are the fallback's. `recorded` are Triton kernels of recordings; their `file` is
    the SHA-256 of bytes in the store. `beside` gives further files for a manifest and its SHA-256.
    BuildError, and nothing written, for a gap, a duplicate row, mixed tool versions, a missing artifact, or an `out` that
    holds something else than a bundle.
    """
    check_out(out)
    entries = sorted(entries, key=_order)
    _check_rows(specs, entries, partial, without)
    blobs = _blobs(entries, store)
    recorded = recorded or RecordedKernels()
    contents = _contents(entries, blobs) | _recorded_contents(recorded.entries, store)
    files: dict[str, FileEntry] = {name: {"sha256": digest(data), "size": len(data)} for name, data in sorted(contents.items())}
    records = {digest(entry.record): entry.record for entry in entries}
    places = {key: index for index, key in enumerate(records)}
    rows = [row for entry in entries for row in _rows(places[digest(entry.record)], entry, blobs)]
    manifest: Manifest = {
        "schema_version": SCHEMA_VERSION,
        "hdispatch": version("hdispatch"),
        "target": target.manifest(),
        "tools": _tools([*(entry.tools for entry in entries), recorded.tools]),
        "ops": {name: specs[name].entry() for name in sorted({entry.op for entry in entries})},
        "files": files,
        "records": [with_files(record) for record in records.values()],
        "rows": sorted(rows, key=_row_order),
    }
    if LIBRARY in files:
        manifest["host"] = host.describe()
    if recorded.entries or recorded.refused:
        _put_recorded(manifest, recorded)
    return _write(out, manifest, contents, beside)


def freeze_onto(base: BundleFiles, recorded: RecordedKernels, store: Store, out: Path) -> Frozen:
    """Writes the bundle `out`: all of `base`, and recorded Triton kernels in the place of those that it has, if any.

    Its rows stay what another build made, with whatever tools. `recorded` and the errors: see `freeze`.
    """
    check_out(out)
    manifest: Manifest = {**base.manifest}
    _put_recorded(manifest, recorded)
    kept = {file for record in manifest["records"] for file in artifacts_of(record)}
    contents = {name: data for name, data in base.contents.items() if name in kept} | _recorded_contents(
        recorded.entries, store
    )
    manifest["files"] = {name: {"sha256": digest(data), "size": len(data)} for name, data in sorted(contents.items())}
    return _write(out, manifest, contents)


def _write(
    out: Path,
    manifest: Manifest,
    contents: dict[str, bytes],
    beside: Callable[[Manifest, str], Mapping[str, bytes]] | None = None,
) -> Frozen:
    text = manifest_text(manifest)
    sha256 = digest(text)
    contents |= {MANIFEST_NAME: text, CHECKSUM_NAME: checksum_line(text)}
    contents |= beside(manifest, sha256) if beside else {}
    write(out, lambda fresh: _fill(fresh, contents))
    return Frozen(manifest, sha256, sum(map(len, contents.values())))


def _put_recorded(manifest: Manifest, recorded: RecordedKernels) -> None:
    """The recorded kernels into a manifest, in the place of those that it has."""

    def order(each: Recorded | Refused) -> tuple[str, str, str]:
        return each["kernel"], each["source_hash"], each["key"]

    manifest.pop("recorded_refused", None)
    manifest["recorded"] = [{**each, "file": _artifact(each["file"])} for each in sorted(recorded.entries, key=order)]
    manifest["recorded_tools"] = dict(recorded.tools)
    if recorded.refused:
        manifest["recorded_refused"] = sorted(recorded.refused, key=order)


def _fill(folder: Path, contents: Mapping[str, bytes]) -> None:
    (folder / ARTIFACTS).mkdir()
    for name, data in contents.items():
        _write_file(folder / name, data)
    sync_folder(folder / ARTIFACTS)


def manifest_text(manifest: Manifest) -> bytes:
    """manifest.json: equal manifests have equal bytes."""
    return (json.dumps(manifest, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False) + "\n").encode()


def _order(entry: Entry) -> tuple[Any, ...]:
    return entry.op, entry.variant, entry.shape.get("K", 0), entry.shape.get("N", 0), entry.buckets


def _row_order(row: Row) -> tuple[Any, ...]:
    return row["op"], row["variant"], row["K"], row["N"], row["bucket"]


def _check_rows(
    specs: Mapping[str, OpSpec],
    entries: Sequence[Entry],
    partial: bool,
    without: Collection[tuple[str, str, int, int, int]],
) -> None:
    seen: dict[tuple[Any, ...], int] = {}
    for entry in entries:
        for bucket in entry.buckets:
            key = (entry.op, entry.variant, entry.shape.get("K", 0), entry.shape.get("N", 0), bucket)
            if key in seen:
                raise BuildError(f"two records serve {_name(key)}")
            seen[key] = 1
            _check_bucket(specs[entry.op], entry, bucket)
    if partial:
        return
    for op in sorted({entry.op for entry in entries}):
        spec = specs[op]
        for variant in spec.served_variants():
            for shape in spec.shapes:
                for bucket in range(spec.ladders.count):
                    row = spec.row_shape(variant.name, shape)
                    key = (op, variant.name, row.get("K", 0), row.get("N", 0), bucket)
                    if key not in seen and key not in without:
                        raise BuildError(
                            f"gap: no record serves {_name(key)}; build all variants, shapes and buckets of the op"
                        )


def _check_bucket(spec: OpSpec, entry: Entry, bucket: int) -> None:
    record = entry.record
    first, last = spec.ladders.bounds(bucket)
    name = _name((entry.op, entry.variant, entry.shape.get("K", 0), entry.shape.get("N", 0), bucket))
    if not serves(record["m_min"], record["m_max"], spec.ladders, bucket, spec.is_closed):
        raise BuildError(
            f"gap: {name} holds M from {first} to {last or 'any'}, "
            f"its record is valid for {record['m_min']} to {record['m_max']} only"
        )
    if spec.second is not None:
        low, high = record.get("second_min"), record.get("second_max")
        if low is None or high is None or not serves_second(low, high, spec.ladders, bucket):
            first_value, last_value = spec.ladders.second_bounds(bucket)
            raise BuildError(
                f"gap: {name} holds {spec.second.name} from {first_value} to {last_value or 'any'}, "
                f"its record is valid for {low} to {high} only"
            )
    if record["launcher"] == "tvm_ffi":
        return
    missing = classes_of(first, last or record["m_max"]) - set(record["cubins"])
    if missing:
        example = next(m for m in range(first, first + 33) if class_of(m) in missing)
        raise BuildError(
            f"gap: {name} holds M = {example}, its record has code for the classes {sorted(record['cubins'])} only"
        )


def _name(key: tuple[Any, ...]) -> str:
    op, variant, k, n, bucket = key
    return f"{op} {variant} K={k} N={n} bucket {bucket}"


def _tools(used: Sequence[Mapping[str, str]]) -> dict[str, str]:
    tools: dict[str, str] = {}
    for each in used:
        for tool, found in each.items():
            if tools.setdefault(tool, found) != found:
                raise BuildError(
                    f"records were built with {tool} {tools[tool]} and {found}; a bundle takes one version: build it in one go"
                )
    return tools


def _blobs(entries: Sequence[Entry], store: Store) -> dict[str, bytes]:
    blobs: dict[str, bytes] = {}
    for entry in entries:
        for sha256 in artifacts_of(entry.record):
            data = store.blob(sha256)
            if data is None:
                raise BuildError(
                    f"artifact {sha256} of {entry.op} is missing or damaged in the cache {store.root}; build again"
                )
            blobs[sha256] = data
    return blobs


def _contents(entries: Sequence[Entry], blobs: Mapping[str, bytes]) -> dict[str, bytes]:
    """The bundle's files: every cubin, and the library of all host functions."""
    objects = {entry.record["file"]: blobs[entry.record["file"]] for entry in entries if entry.record["launcher"] == "tvm_ffi"}
    contents = {_artifact(sha256): data for sha256, data in blobs.items() if sha256 not in objects}
    return contents | ({LIBRARY: ffi_link.link(objects)} if objects else {})


def _recorded_contents(recorded: Sequence[Recorded], store: Store) -> dict[str, bytes]:
    contents: dict[str, bytes] = {}
    for entry in recorded:
        data = store.blob(entry["file"])
        if data is None:
            raise BuildError(
                f"artifact {entry['file']} of {entry['kernel']} is missing or damaged in the cache {store.root}; build again"
            )
        contents[_artifact(entry["file"])] = data
    return contents


def _artifact(sha256: str) -> str:
    return f"{ARTIFACTS}/{sha256}.cubin"


def with_files(record: Record) -> Record:
    """A record as a manifest has it: `file` is the name of a file of the bundle, not an artifact's SHA-256."""

    def renamed(cubin: Cubin) -> Cubin:
        return {**cubin, "file": _artifact(cubin["file"])}

    if record["launcher"] == "tvm_ffi":
        return {**record, "file": LIBRARY}
    return {**record, "cubins": {m_class: renamed(cubin) for m_class, cubin in record["cubins"].items()}}


def _rows(index: int, entry: Entry, blobs: Mapping[str, bytes]) -> list[Row]:
    size = sum(len(blobs[sha256]) for sha256 in artifacts_of(entry.record))
    rows: list[Row] = []
    for bucket in entry.buckets:
        row: Row = {
            "op": entry.op,
            "variant": entry.variant,
            "K": entry.shape.get("K", 0),
            "N": entry.shape.get("N", 0),
            "bucket": bucket,
            "record": index,
            "build_seconds": entry.seconds,
            "bytes": size,
        }
        if bucket in entry.tuned:
            row["tuned"] = entry.tuned[bucket]
        rows.append(row)
    return rows


def _write_file(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())

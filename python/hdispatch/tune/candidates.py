"""candidates.json of a candidate bundle: which records compete for which rows.

A candidate bundle is a bundle, so its records, artifacts and checksums are read and verified as usual; its rows are the
first candidate of each cell. `candidates.json` adds the others. It names the manifest's SHA-256: the two belong together.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypedDict, cast

from .. import registry
from ..bundle_reader import read_files
from ..errors import BundleError
from ..manifest import CANDIDATES_NAME, MANIFEST_NAME, Manifest, Record, artifacts_of, ladders_of
from ..typed_json import Mismatch, check, parse
from .timings import BROKE, CellHead, CellKey, ConfigKey, Timing, canonical, cell_key, config_key

CANDIDATES_VERSION = 1


class Cell(CellHead):
    """A cell, and the records that compete for it, by their index."""

    records: list[int]


class Origin(TypedDict):
    """The origin of a record: the sizes that are not compiled in, and the seconds that generating and compiling it took."""

    generic: list[str]
    seconds: float


class Dropped(TypedDict):
    """A config that could not become a record, or one with the same code as another."""

    op: str
    variant: str
    backend: str
    config: dict[str, Any]
    why: str


class Candidates(TypedDict):
    """The whole of candidates.json. `origins` are by index of the record."""

    version: int
    manifest: str
    cells: list[Cell]
    origins: list[Origin]
    dropped: list[Dropped]


class CandidateBundle(TypedDict):
    """A candidate bundle that was read: the manifest, the bytes of its artifacts by name, the cells."""

    manifest: Manifest
    contents: dict[str, bytes]
    candidates: Candidates


def read_candidates(folder: str | os.PathLike[str]) -> CandidateBundle:
    """Read a candidate bundle and verify all of it. `BundleError` naming the file and what is wrong with it."""
    manifest, sha256, contents, beside = read_files(folder, beside=[CANDIDATES_NAME])
    path = Path(folder) / CANDIDATES_NAME
    if CANDIDATES_NAME not in beside:
        raise BundleError(f"{path}: is missing; a bundle of candidates is made by `hdispatch tune candidates`")
    try:
        data = parse(beside[CANDIDATES_NAME])
        check(data, Candidates)
    except (ValueError, Mismatch) as error:
        raise BundleError(f"{path}: malformed: {error}; make the candidates again") from error
    candidates = cast(Candidates, data)
    if candidates["version"] != CANDIDATES_VERSION:
        raise BundleError(f"{path}: version {candidates['version']}; this hdispatch reads {CANDIDATES_VERSION}")
    if candidates["manifest"] != sha256:
        raise BundleError(f"{path}: made for another {MANIFEST_NAME} than the one beside it; make the candidates again")
    _check_cells(path, manifest, candidates)
    return {"manifest": manifest, "contents": contents, "candidates": candidates}


def _check_cells(path: Path, manifest: Manifest, candidates: Candidates) -> None:
    records, ops = len(manifest["records"]), manifest["ops"]
    if len(candidates["origins"]) != records:
        raise BundleError(f"{path}: tells of {len(candidates['origins'])} records; the manifest has {records}")
    for index, cell in enumerate(candidates["cells"]):
        known = cell["op"] in ops and cell["variant"] in ops[cell["op"]]["variants"]
        if not known or not 0 <= cell["bucket"] < ladders_of(ops[cell["op"]]).count:
            name = f"{cell['op']} {cell['variant']} bucket {cell['bucket']}"
            raise BundleError(f"{path}: cell {index} is of {name}, which the manifest does not have")
        if not cell["records"] or any(not 0 <= record < records for record in cell["records"]):
            raise BundleError(f"{path}: cell {index} names records {cell['records']} of {records}")


def check_ops(folder: Path, bundle: CandidateBundle) -> None:
    """Refuse a bundle whose ops are not the installed ones."""
    for name, entry in bundle["manifest"]["ops"].items():
        spec, where = registry.spec(name), folder / MANIFEST_NAME
        spec.check_same(entry, where, "make the candidates again")
        if (there := ladders_of(entry)) != spec.ladders:
            raise BundleError(
                f"{where}: the buckets of {name} are {there}; the installed op's {spec.ladders}; make the candidates again"
            )


def of_present(bundle: CandidateBundle, timings: Iterable[Timing]) -> list[Timing]:
    """The lines that are of a bundle's candidates: of their cell, config and code, and right wherever that code was checked.

    Others are of kernels as they were, or of configs that no longer compile: no build makes what they measured.
    """
    records, manifest = bundle["manifest"]["records"], bundle["manifest"]
    present = {
        (cell_key_of(cell), config_key_of(records[index])): code_of(manifest, records[index])
        for cell in bundle["candidates"]["cells"]
        for index in cell["records"]
    }
    lines = list(timings)
    wrong = {identity(line) for line in lines if line["status"] in ("wrong", *BROKE)}
    return [
        line
        for line in lines
        if present.get((cell_key(line), config_key(line))) == line["artifacts"]
        and not (line["status"] == "ok" and identity(line) in wrong)
    ]


def identity(timing: Timing) -> tuple[str, ConfigKey, tuple[str, ...]]:
    """Identifies a candidate wherever it competes: its op, config and code."""
    return timing["op"], config_key(timing), tuple(timing["artifacts"])


def cell_key_of(cell: Cell) -> CellKey:
    """The key of a cell's timings."""
    return CellKey(cell["op"], cell["variant"], cell["K"], cell["N"], cell["bucket"])


def config_key_of(record: Record) -> ConfigKey:
    """The key of a record's config."""
    return ConfigKey(record["backend"], canonical(record["config"]))


def code_of(manifest: Manifest, record: Record) -> list[str]:
    """Identifies a record's code: the SHA-256 of its artifacts, or the name of its host function."""
    if record["launcher"] == "tvm_ffi":
        return [record["function"]]  # the library changes with every other candidate; the name holds the hash of this one
    files = manifest["files"]
    return sorted(files[name]["sha256"] for name in artifacts_of(record))

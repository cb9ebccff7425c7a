"""Reads bundles, folders and archives, and verifies all of one before anything is loaded: checksums, schema, structure.

manifest.py says what a bundle holds.
"""

from __future__ import annotations

import hashlib
import os
import stat
import string
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, cast

from .archive import Archive, locate
from .errors import BundleError
from .manifest import (
    CHECKSUM_NAME,
    MANIFEST_NAME,
    MAX_MANIFEST,
    SCHEMA_VERSION,
    CubinRecord,
    FileEntry,
    Manifest,
    Target,
    artifacts_of,
    check_views,
    ladders_of,
)
from .recorder import REFUSALS
from .typed_json import Mismatch, check, parse

#: How often a bundle that is replaced while it is read is read anew.
_MOST_TRIES = 100


class BundleFiles(NamedTuple):
    """A bundle as it was read: `sha256` is the manifest's, `contents` every listed file, `beside` what else was asked for."""

    manifest: Manifest
    sha256: str
    contents: dict[str, bytes]
    beside: dict[str, bytes]


def read_bundle(folder: str | os.PathLike[str], *, sha256: str | None = None) -> tuple[Manifest, dict[str, bytes]]:
    """Read a bundle and verify all of it: checksums, schema, structure. Nothing is loaded on a GPU.

    sha256  the digest that manifest.json must have, in hexadecimal. Without it the checksums tell damage, not who built it

    Returns the manifest and the bytes of every file that it lists. Raises `BundleError` naming the file and what is
    wrong with it.
    """
    found = read_files(folder, sha256=sha256)
    return found.manifest, found.contents


def read_files(folder: str | os.PathLike[str], *, sha256: str | None = None, beside: Sequence[str] = ()) -> BundleFiles:
    """As `read_bundle`; also the digest, and of the files named `beside`, which the manifest does not list, those there are."""
    if sha256 is not None and not (len(sha256) == 64 and set(sha256.lower()) <= set(string.hexdigits)):
        raise BundleError(f"sha256 is {sha256!r}; it takes the 64 hexadecimal digits of a manifest's SHA-256")
    for _ in range(_MOST_TRIES):
        with _open(Path(folder)) as opened:
            try:
                found = _read_all(opened, sha256, beside)
            except BundleError:
                if not opened.is_replaced():
                    raise
            else:  # what is not there beside the manifest may have been removed just now
                if len(found.beside) == len(set(beside)) or not opened.is_replaced():
                    return found
    raise BundleError(f"{folder}: was replaced {_MOST_TRIES} times while it was read")


def checksum_line(manifest: bytes) -> bytes:
    """The content of manifest.sha256 for a manifest."""
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST_NAME}\n".encode()


def _open(path: Path) -> _Folder | Archive:
    return Archive(path) if locate(path) else _Folder(path)


def _read_all(opened: _Folder | Archive, sha256: str | None, beside: Sequence[str]) -> BundleFiles:
    root = opened.root
    text = opened.read(MANIFEST_NAME, most=MAX_MANIFEST)
    found = hashlib.sha256(text).hexdigest()
    if sha256 is not None and found != sha256.lower():
        raise BundleError(f"{root / MANIFEST_NAME}: its SHA-256 is {found}, not {sha256}: another bundle than the one wanted")
    if opened.read(CHECKSUM_NAME, most=MAX_MANIFEST) != checksum_line(text):
        raise BundleError(f"{root / MANIFEST_NAME}: its SHA-256 is not what {CHECKSUM_NAME} says; copy or build it again")
    manifest = _parse(root, text)
    contents = {name: _read_listed(opened, name, entry) for name, entry in manifest["files"].items()}
    _check_rows(root, manifest)
    there = {name: opened.read(name, most=MAX_MANIFEST) for name in beside if opened.has(name)}
    return BundleFiles(manifest, found, contents, there)


class _Folder:
    """An open folder: what is read is in the folder that was opened, whatever takes its name meanwhile."""

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            self._descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        except (OSError, ValueError) as error:
            raise self._unreadable(MANIFEST_NAME, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._descriptor)

    def is_replaced(self) -> bool:
        """Whether another folder has the name now."""
        try:
            now = self.root.stat()
        except OSError:
            return False
        return not os.path.samestat(now, os.fstat(self._descriptor))

    def has(self, name: str) -> bool:
        """Whether there is anything of that name."""
        try:
            os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def read(self, name: str, *, most: int | None = None, size: int | None = None) -> bytes:
        """The whole of a file of at most `most` bytes, or of exactly `size`: no more than that is read."""
        path = self.root / name
        try:
            # First without opening it: a pipe would be waited for, a device may do something.
            place = os.open(name, os.O_PATH, dir_fd=self._descriptor)
            try:
                there = os.fstat(place)
                self._check_inside(name, place)
                if not stat.S_ISREG(there.st_mode):
                    raise BundleError(f"{path}: is not a file")
                if size is not None and there.st_size != size:
                    raise BundleError(f"{path}: {there.st_size} bytes; the manifest says {size}: truncated or changed")
                if most is not None and there.st_size > most:
                    raise BundleError(f"{path}: {there.st_size} bytes; at most {most} are read")
                with Path(f"/proc/self/fd/{place}").open("rb") as file:
                    content = file.read(there.st_size + 1)
            finally:
                os.close(place)
        except (OSError, ValueError) as error:  # a name that no file can have is a ValueError
            raise self._unreadable(name, error) from error
        if len(content) != there.st_size:
            raise BundleError(f"{path}: changed while it was read")
        return content

    def _check_inside(self, name: str, place: int) -> None:
        """Links are followed, but not out of the folder."""
        found, root = (Path(f"/proc/self/fd/{each}").readlink() for each in (place, self._descriptor))
        if not found.is_relative_to(root):
            raise BundleError(f"{self.root / MANIFEST_NAME}: lists {name!r}, which is outside the bundle")

    def _unreadable(self, name: str, error: OSError | ValueError) -> BundleError:
        why = error.strerror if isinstance(error, OSError) else error
        return BundleError(f"{self.root / name}: cannot be read ({why}); is {self.root} a bundle?")


def _parse(root: Path, text: bytes) -> Manifest:
    where = root / MANIFEST_NAME
    try:
        manifest = parse(text)
    except ValueError as error:
        raise BundleError(f"{where}: not JSON: {error}") from error
    except Mismatch as error:
        raise BundleError(f"{where}: malformed: {str(error).lstrip('. ')}") from error
    # The version first: another one may look different in every other way.
    found = manifest.get("schema_version") if isinstance(manifest, dict) else type(manifest).__name__
    if found != SCHEMA_VERSION:
        raise BundleError(f"{where}: schema version {found!r}; this hdispatch reads {SCHEMA_VERSION}; build the bundle again")
    try:
        check(manifest, Manifest)
    except Mismatch as error:
        raise BundleError(f"{where}: malformed: {str(error).lstrip('.')}") from error
    return cast(Manifest, manifest)


def _read_listed(opened: _Folder | Archive, name: str, entry: FileEntry) -> bytes:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise BundleError(f"{opened.root / MANIFEST_NAME}: lists {name!r}, which is outside the bundle")
    content = opened.read(name, size=entry["size"])
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise BundleError(f"{opened.root / name}: its SHA-256 is not the manifest's: changed since the bundle was built")
    return content


def _check_rows(root: Path, manifest: Manifest) -> None:
    """Refuse rows that repeat, or that name what is not there."""
    where = root / MANIFEST_NAME
    ops, records = manifest["ops"], manifest["records"]
    for record in records:
        for file in artifacts_of(record):
            if file not in manifest["files"]:
                raise BundleError(f"{where}: kernel {record['kernel']} uses {file}, which is not listed")
        if record["launcher"] == "tvm_ffi" and "host" not in manifest:
            raise BundleError(f"{where}: kernel {record['kernel']} is a host function, but host, its CPU, is missing")
        if record["launcher"] == "cubin":
            _check_shared(where, record, manifest["target"])
    _check_recorded(where, manifest)
    seen: dict[tuple[str, str, int, int, int], int] = {}
    owners: dict[int, str] = {}
    counts = {op: ladders_of(entry).count for op, entry in ops.items()}
    called: set[tuple[str, str, int]] = set()
    for index, row in enumerate(manifest["rows"]):
        op, key = row["op"], (row["op"], row["variant"], row["K"], row["N"], row["bucket"])
        if op not in ops:
            raise BundleError(f"{where}: row {index} is of op {op!r}, which is not among the bundle's ops")
        if seen.setdefault(key, index) != index:
            raise BundleError(f"{where}: rows {seen[key]} and {index} have the same key {key}")
        if row["variant"] not in ops[op]["variants"]:
            raise BundleError(f"{where}: row {index} is of variant {row['variant']!r}, which is not among those of {op}")
        if not 0 <= row["bucket"] < counts[op]:
            raise BundleError(f"{where}: row {index} names bucket {row['bucket']} of {counts[op]}")
        if not 0 <= row["record"] < len(records):
            raise BundleError(f"{where}: row {index} names record {row['record']} of {len(records)}")
        # A record's arguments are those of one op.
        if owners.setdefault(row["record"], op) != op:
            raise BundleError(
                f"{where}: row {index} of {op} names record {row['record']}, which is one of {owners[row['record']]}"
            )
        if (same := (op, row["variant"], row["record"])) not in called:
            called.add(same)
            record = records[row["record"]]
            if "second" in ops[op] and not {"second_min", "second_max"} <= record.keys():
                raise BundleError(f"{where}: row {index}: {record['kernel']} does not say for which {ops[op]['second']['arg']}")
            if record["launcher"] == "tvm_ffi":
                check_views(f"{where}: row {index}: {record['kernel']}", record["args"], ops[op]["variants"][row["variant"]])


def _check_recorded(where: Path, manifest: Manifest) -> None:
    seen: set[tuple[str, str, str]] = set()
    for entry in manifest.get("recorded", []):
        if entry["file"] not in manifest["files"]:
            raise BundleError(f"{where}: recorded kernel {entry['kernel']} uses {entry['file']}, which is not listed")
        if (key := (entry["kernel"], entry["source_hash"], entry["key"])) in seen:
            raise BundleError(f"{where}: recorded kernel {entry['kernel']} has the key {entry['key']} twice")
        seen.add(key)
        try:
            metadata = parse(entry["metadata"])
        except (ValueError, Mismatch) as error:
            raise BundleError(f"{where}: recorded kernel {entry['kernel']}: its metadata is no JSON: {error}") from error
        if not isinstance(metadata, dict) or not {"name", "hash", "shared", "num_warps"} <= metadata.keys():
            raise BundleError(f"{where}: recorded kernel {entry['kernel']}: its metadata is not Triton's")
    for refused in manifest.get("recorded_refused", []):
        if (key := (refused["kernel"], refused["source_hash"], refused["key"])) in seen:
            raise BundleError(f"{where}: recorded kernel {refused['kernel']} has the key {refused['key']} twice")
        seen.add(key)
        if refused["error"] not in REFUSALS:
            raise BundleError(
                f"{where}: recorded kernel {refused['kernel']} raises {refused['error']}; it is one of {', '.join(REFUSALS)}"
            )


def _check_shared(where: Path, record: CubinRecord, target: Target) -> None:
    for cubin in record["cubins"].values():
        if cubin["shared_bytes"] > target["shared_memory"]:
            raise BundleError(
                f"{where}: {cubin['function']} of kernel {record['kernel']} takes {cubin['shared_bytes']} bytes of shared "
                f"memory; a block of {target['name']} has at most {target['shared_memory']}"
            )

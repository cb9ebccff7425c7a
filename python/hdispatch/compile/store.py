"""The build cache: results by the hash of what went into them, artifacts by the hash of their bytes.

Every file is written beside its place, synced and renamed into it, so a reader sees all of it or nothing, and any number
of processes may build the same thing at once: the last one writes the same bytes. Every file is checked when it
is read: its checksum, that it is the entry of the name that it has, and its type. A damaged, copied or older one counts as
missing, so that it is built and written again, and is listed in `damaged`.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict, TypeVar, cast

from .. import typed_json
from ..errors import BuildError
from ..typed_json import Mismatch, check, parse

Value = TypeVar("Value")


class _Entry(TypedDict):
    """A whole entry: its kind and key, and the result."""

    kind: str
    key: str
    value: Any


def digest(value: object) -> str:
    """SHA-256 in hex: of bytes as they are, of anything else as canonical JSON."""
    data = value if isinstance(value, bytes) else canonical(value)
    return hashlib.sha256(data).hexdigest()


def canonical(value: object) -> bytes:
    """The bytes of `typed_json.canonical`."""
    return typed_json.canonical(value).encode()


def default_root() -> Path:
    """$HDISPATCH_CACHE, else hdispatch under $XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("HDISPATCH_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hdispatch"


def write_atomic(path: Path, data: bytes) -> None:
    """All of `data` at `path`, or what was there before; on disk when this returns. BuildError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise BuildError(f"cannot write {path}: {error}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise BuildError(f"cannot write {path}: {error}") from error
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Store:
    """A cache folder. Entries are JSON objects under a kind and a key; blobs are bytes under their own SHA-256."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.damaged: list[Path] = []

    def get(self, kind: str, key: str, declared: type[Value]) -> Value | None:
        """The value that was put under a kind and a key, if it is of the declared type; or None."""
        path = self._entry(kind, key)
        data = self._read(path)
        if data is None:
            return None
        try:
            return cast(Value, _value(data, kind, key, declared))
        except (ValueError, Mismatch):
            self.damaged.append(path)
            return None

    def put(self, kind: str, key: str, value: Mapping[str, Any]) -> None:
        """Writes an entry, replacing what was there."""
        body = canonical({"kind": kind, "key": key, "value": value})
        write_atomic(self._entry(kind, key), digest(body).encode() + b"\n" + body)

    def blob(self, sha256: str) -> bytes | None:
        """The bytes with that SHA-256, or None."""
        path = self._blob(sha256)
        data = self._read(path)
        if data is not None and digest(data) != sha256:
            self.damaged.append(path)
            return None
        return data

    def has_blob(self, sha256: str) -> bool:
        """Whether `blob` would return bytes."""
        return self.blob(sha256) is not None

    def put_blob(self, data: bytes) -> str:
        """Writes bytes and returns their SHA-256."""
        sha256 = digest(data)
        if not self.has_blob(sha256):
            write_atomic(self._blob(sha256), data)
        return sha256

    def _entry(self, kind: str, key: str) -> Path:
        return self.root / kind / key[:2] / f"{key}.json"

    def _blob(self, sha256: str) -> Path:
        return self.root / "blob" / sha256[:2] / sha256

    def _read(self, path: Path) -> bytes | None:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise BuildError(
                f"cannot read {path} of the build cache: {error}; remove it or choose another cache folder"
            ) from error


def _value(data: bytes, kind: str, key: str, declared: Any) -> object:
    """The value in an entry's file. ValueError or Mismatch if it is not the entry of that kind and key, whole."""
    checksum, _, body = data.partition(b"\n")
    if checksum != digest(body).encode():
        raise ValueError("the checksum does not fit")
    entry = parse(body)
    check(entry, _Entry)
    if (entry["kind"], entry["key"]) != (kind, key):
        raise ValueError(f"the entry of {entry['kind']} {entry['key']}")
    check(entry["value"], declared)
    return entry["value"]

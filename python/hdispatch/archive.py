"""A bundle as one file, a .tar.xz of its folder: written the same for the same bundle, read into memory at once."""

from __future__ import annotations

import io
import lzma
import os
import tarfile
import tempfile
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Self

from .errors import BundleError, HdispatchError

SUFFIX = ".tar.xz"
#: Bytes that an archive unpacks to at most: fifty times the bundle of every op.
MAX_UNPACKED = 2**31


def is_archive(path: str | os.PathLike[str]) -> bool:
    """Whether a path names an archive and no folder: by its name."""
    return Path(path).name.endswith(SUFFIX)


def check_file(file: Path) -> None:
    """Raise `HdispatchError` for a file that no archive can be written to, before one is made."""
    if not is_archive(file):
        raise HdispatchError(f"{file} does not end in {SUFFIX}, by which archives of bundles are known")
    if not file.resolve().parent.is_dir():
        raise HdispatchError(f"cannot write {file}: {file.parent} is not a folder")


def pack(folder: Path, file: Path, top: str = "") -> None:
    """Write a bundle's folder to an archive, the manifest first. `HdispatchError` if the file cannot be written.

    The bytes depend on the names and contents alone, so equal bundles make equal archives. Where two processes write the same
    file, it is whole, and one of the two.

    top  folder of the archive that holds all of it; "": none
    """
    names = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: (len(path.parts), str(path)))
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path in names:
            content = path.read_bytes()
            member = tarfile.TarInfo(PurePosixPath(top, path.relative_to(folder)).as_posix())
            member.size, member.mode = len(content), 0o644
            archive.addfile(member, io.BytesIO(content))
    packed = lzma.compress(raw.getvalue())
    try:
        with tempfile.TemporaryDirectory(prefix=f".{file.name}.", dir=file.parent) as scratch:
            made = Path(scratch, file.name)
            made.write_bytes(packed)
            made.replace(file)
    except OSError as error:
        raise HdispatchError(f"cannot write {file}: {error.strerror}") from error


class Archive:
    """An archive that is read as the folder it was made of: `manifest.json` at its top, or in the one folder there.

    `BundleError` for a file that cannot be read, is damaged, or holds anything but files and folders.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._contents = _unpack(root)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._contents = {}

    def is_replaced(self) -> bool:
        """Whether the file has changed since: no, all of it was read at once."""
        return False

    def has(self, name: str) -> bool:
        """Whether there is a file of that name."""
        return name in self._contents

    def read(self, name: str, *, most: int | None = None, size: int | None = None) -> bytes:
        """The whole of a file of at most `most` bytes, or of exactly `size`."""
        content = self._contents.get(name)
        if content is None:
            raise BundleError(f"{self.root}: holds no {name}; is it an archive of a bundle?")
        if size is not None and len(content) != size:
            raise BundleError(f"{self.root / name}: {len(content)} bytes; the manifest says {size}: truncated or changed")
        if most is not None and len(content) > most:
            raise BundleError(f"{self.root / name}: {len(content)} bytes; at most {most} are read")
        return content


def _unpack(root: Path) -> dict[str, bytes]:
    """Name -> content of every file, names without the archive's one top folder if it has one."""
    try:
        decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ)
        raw = decompressor.decompress(root.read_bytes(), MAX_UNPACKED)
        if not decompressor.eof:
            raise BundleError(f"{root}: ends too early, or unpacks to more than {MAX_UNPACKED} bytes: copy it again")
        found: dict[str, bytes] = {}
        with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isreg() else None
                if content is not None:
                    found[PurePosixPath(member.name).as_posix()] = content.read()
                elif not member.isdir():
                    raise BundleError(f"{root}: {member.name} is neither a file nor a folder")
    except OSError as error:
        raise BundleError(f"{root}: cannot be read ({error.strerror}); it takes a bundle's folder or {SUFFIX}") from error
    except (lzma.LZMAError, tarfile.TarError) as error:
        raise BundleError(f"{root}: is no {SUFFIX} of a bundle, or is damaged ({error}): copy it again") from error
    tops = {name.partition("/")[0] for name in found}
    if len(tops) == 1 and all("/" in name for name in found):
        return {name.partition("/")[2]: content for name, content in found.items()}
    return found

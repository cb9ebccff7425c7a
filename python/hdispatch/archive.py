"""Bundles as one file, a .tar.xz of their folders: written the same for the same bundles, read into memory at once.

`b.tar.xz` is the path of the bundle in an archive of one, `b.tar.xz/h100` of one of several.
"""

from __future__ import annotations

import io
import lzma
import os
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Self

from .errors import BundleError, HdispatchError
from .manifest import MANIFEST_NAME

SUFFIX = ".tar.xz"
#: Bytes that an archive unpacks to at most: fifty times the bundle of every op.
MAX_UNPACKED = 2**31


def is_archive(path: str | os.PathLike[str]) -> bool:
    """Whether a path names an archive and no folder: by its name."""
    return Path(path).name.endswith(SUFFIX)


def locate(path: Path) -> tuple[Path, str] | None:
    """The archive that a bundle's path leads to, and the bundle's name in it, "" if the path has none; None: to a folder."""
    for file, name in ((path, ""), (path.parent, path.name)):
        if is_archive(file) and not file.is_dir():
            return file, name
    return None


def check_file(file: Path) -> None:
    """Raise `HdispatchError` for a file that no archive can be written to, before one is made."""
    if not is_archive(file):
        raise HdispatchError(f"{file} does not end in {SUFFIX}, by which archives of bundles are known")
    if not file.resolve().parent.is_dir():
        raise HdispatchError(f"cannot write {file}: {file.parent} is not a folder")


def pack(folder: Path, file: Path, top: str = "") -> None:
    """Write a bundle's folder to an archive: `pack_together` of one.

    top  folder of the archive that holds all of it; "": none
    """
    pack_together({top: folder}, file)


def pack_together(folders: Mapping[str, Path], file: Path) -> None:
    """Write bundles' folders to one archive, by name, manifests first; content that repeats is in it once, and linked.

    The bytes depend on the names and contents alone, so equal bundles make equal archives. Where two processes write the same
    file, it is whole, and one of the two. `HdispatchError` if the file cannot be written.
    """
    found = [(path.relative_to(folder), top, path) for top, folder in folders.items() for path in folder.rglob("*")]
    raw, links = io.BytesIO(), dict[bytes, str]()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, top, path in sorted(found, key=lambda each: (len(each[0].parts), str(each[0]), each[1])):
            if not path.is_file():
                continue
            content = path.read_bytes()
            member = tarfile.TarInfo(PurePosixPath(top, name).as_posix())
            member.size, member.mode = len(content), 0o644
            if (first := links.setdefault(content, member.name)) != member.name:
                member.type, member.linkname, member.size = tarfile.LNKTYPE, first, 0
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
    """A bundle of an archive, read as the folder it was made of: the one named, or that at the top or in the one folder there.

    `BundleError` for a file that cannot be read, is damaged, or holds anything but files and folders.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        file, name = locate(root) or (root, "")
        self._contents = _bundle_of(file, name, _unpack(file))

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


def _bundle_of(file: Path, name: str, found: dict[str, bytes]) -> dict[str, bytes]:
    """The files of the bundle of that name, or of the only one, by their names in it."""
    bundles = sorted({top for top in (each.partition("/")[0] for each in found) if f"{top}/{MANIFEST_NAME}" in found})
    if not name and MANIFEST_NAME not in found:
        if len(bundles) > 1:
            raise BundleError(f"{file}: holds the bundles {', '.join(bundles)}; name one of them: {file / bundles[0]}")
        name = "".join(bundles)
    elif name and name not in bundles:
        raise BundleError(f"{file}: holds no bundle {name!r}; there are {', '.join(bundles) or 'none by name'}")
    start = f"{name}/" if name else ""
    return {each.removeprefix(start): content for each, content in found.items() if each.startswith(start)}


def _unpack(root: Path) -> dict[str, bytes]:
    """Name -> content of every file."""
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
                elif member.islnk() and (target := PurePosixPath(member.linkname).as_posix()) in found:
                    found[PurePosixPath(member.name).as_posix()] = found[target]
                elif not member.isdir():
                    raise BundleError(f"{root}: {member.name} is neither a file nor a folder")
    except OSError as error:
        raise BundleError(f"{root}: cannot be read ({error.strerror}); it takes a bundle's folder or {SUFFIX}") from error
    except (lzma.LZMAError, tarfile.TarError) as error:
        raise BundleError(f"{root}: is no {SUFFIX} of a bundle, or is damaged ({error}): copy it again") from error
    return found

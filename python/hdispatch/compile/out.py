"""Where a bundle is written: what may be replaced, tried before anything is compiled; and the exchange, in which there is
always a bundle: the old one or the new one.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..bundle_reader import checksum_line
from ..errors import BuildError
from ..manifest import ARTIFACTS, CANDIDATES_NAME, CHECKSUM_NAME, MANIFEST_NAME, MAX_MANIFEST
from ..typed_json import Mismatch, parse
from .store import sync_folder

#: Of linux/fs.h and fcntl.h, for renameat2.
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100

_PREFIX = ".hdispatch-"


def check_out(out: Path) -> None:
    """BuildError unless a bundle can be written to `out`.

    It must be absent, an empty folder, or a bundle of ours with no other file in it; a link is followed. This tries to write
    beside it and, where there is a bundle, to exchange two folders there.
    """
    place = resolve(out)
    here = Path.cwd()
    if place == here or place in here.parents:
        raise BuildError(f"{out} is the folder that this runs in, or holds it: name a folder in it, such as {out / 'bundle'}")
    replaced = _check_replaceable(out, place)
    if replaced and not os.access(place, os.W_OK | os.X_OK):
        raise BuildError(f"{out} cannot be replaced: it is not writable; make it so (chmod u+w), or name another folder")
    with _scratch(out, place) as scratch:
        if replaced:
            for name in ("a", "b"):
                (scratch / name).mkdir()
            _exchange(scratch / "a", scratch / "b", out)


def write(out: Path, fill: Callable[[Path], None]) -> None:
    """Lets `fill` write a folder beside `out`, which then takes its place in one step. BuildError if it cannot.

    A bundle that is there stays whole until then; what was put into it meanwhile is not lost: then it stays.
    """
    place = resolve(out)
    with _scratch(out, place, make_parents=True) as scratch:
        fresh = scratch / "bundle"
        fresh.mkdir()
        fill(fresh)
        sync_folder(fresh)
        while not _put(fresh, place, out):
            pass
        sync_folder(place.parent)


def _put(fresh: Path, place: Path, out: Path) -> bool:
    """Puts `fresh` in its place. False if something has come there meanwhile: another writer's bundle, say."""
    if not _check_replaceable(out, place):
        try:
            fresh.replace(place)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return False
        return True
    _exchange(fresh, place, out)
    try:
        _check_replaceable(out, fresh)
    except BuildError:
        _exchange(fresh, place, out)
        raise
    return True


def resolve(out: Path) -> Path:
    """The folder itself, where `out` is a link. BuildError for one that leads nowhere, or for no path."""
    try:
        if out.is_symlink() and not out.exists():
            raise BuildError(f"{out} is a link to {out.readlink()}, which is not there; remove it or name another folder")
        return Path(os.path.realpath(out))
    except (OSError, ValueError) as error:
        raise BuildError(f"cannot write the bundle {str(out)!r}: {error}") from error


@contextmanager
def _scratch(out: Path, place: Path, *, make_parents: bool = False) -> Iterator[Path]:
    """A folder in the one that `place` is in, or will be in, on the same file system; gone in the end."""
    parent = place.parent
    scratch = handle = None
    try:
        if make_parents:
            parent.mkdir(parents=True, exist_ok=True)
        while not parent.exists():
            parent = parent.parent
        scratch, handle = _made(parent)
        (scratch / place.name).mkdir()  # whether it can have that name
        if place.exists() and place.stat().st_dev != scratch.stat().st_dev:
            raise BuildError(f"{out} is a mount point, which cannot be replaced; name a folder in it")
        (scratch / place.name).rmdir()
        yield scratch
    except OSError as error:
        raise BuildError(f"cannot write the bundle {out}: {error}") from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _made(parent: Path) -> tuple[Path, int]:
    """A new folder in `parent`, and a handle that locks it until it is closed or this process ends.

    Folders of writers that were killed are removed first: nobody locks those. Meanwhile `parent` is locked, so that no folder
    of another writer is seen between its making and its lock.
    """
    outer = os.open(parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: then no folder can be locked, and none is removed
            fcntl.flock(outer, fcntl.LOCK_EX)
        for name in parent.glob(f"{_PREFIX}*"):
            _remove_abandoned(name)
        scratch = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        handle = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY)
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return scratch, handle
    finally:
        os.close(outer)


def _remove_abandoned(folder: Path) -> None:
    """Removes a folder of ours whose writer is gone; leaves what is locked, somebody else's, or no folder."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        if os.fstat(handle).st_uid == os.geteuid():
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:  # locked: its writer works on it
        return
    finally:
        os.close(handle)


def _check_replaceable(out: Path, place: Path) -> bool:
    """Whether there is a bundle to replace. BuildError unless there is one, or an empty folder, or nothing."""
    while True:
        before = _identity(place)
        try:
            return _check_content(out, place)
        except BuildError:
            if _identity(place) == before:  # else another writer has replaced it while it was looked at
                raise


def _identity(place: Path) -> tuple[int, int] | None:
    try:
        found = place.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def _check_content(out: Path, place: Path) -> bool:
    try:
        if not place.exists():
            return False
        if not place.is_dir():
            raise BuildError(f"{out} is a file; name a folder to write the bundle to")
        names = sorted(path.name for path in place.iterdir())
        if not names:
            return False
        if MANIFEST_NAME not in names:
            raise BuildError(f"{out} is not empty and no bundle: it holds {_some(names)}; name another folder, or remove it")
        listed = _listed(place)
        if listed is None:
            raise BuildError(
                f"{out} is not empty and no bundle: its {MANIFEST_NAME} is not one of hdispatch's with its {CHECKSUM_NAME}; "
                "name another folder, or remove it"
            )
        if others := sorted(_others(place, listed)):
            raise BuildError(f"{out} holds more than a bundle: {_some(others)}; move it away, or name another folder")
    except (OSError, ValueError) as error:
        raise BuildError(f"cannot write the bundle {str(out)!r}: {error}") from error
    return True


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _listed(place: Path) -> set[str] | None:
    """The files that a bundle consists of, of whatever version; None if its manifest is not ours."""
    texts = {name: _small_file(place / name) for name in (MANIFEST_NAME, CHECKSUM_NAME, CANDIDATES_NAME)}
    manifest = texts[MANIFEST_NAME]
    if manifest is None or texts[CHECKSUM_NAME] != checksum_line(manifest):
        return None
    read = _json(manifest)
    files = read.get("files")
    if not isinstance(files, dict) or not {"schema_version", "hdispatch", "target", "records", "rows"} <= read.keys():
        return None
    candidates = texts[CANDIDATES_NAME]
    ours = candidates is not None and _json(candidates).get("manifest") == checksum_line(manifest).decode().split()[0]
    return {MANIFEST_NAME, CHECKSUM_NAME, *files, *([CANDIDATES_NAME] if ours else [])}


def _small_file(path: Path) -> bytes | None:
    """Nothing for a link, a folder, or what is larger than any manifest."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_MANIFEST:
        return None
    return path.read_bytes()


def _json(text: bytes) -> dict[str, Any]:
    try:
        found = parse(text)
    except (ValueError, Mismatch):
        return {}
    return found if isinstance(found, dict) else {}


def _others(place: Path, listed: set[str]) -> Iterator[str]:
    """The contents of a folder besides the listed files and their folders."""
    folders = {ARTIFACTS, *(str(parent) for name in listed for parent in Path(name).parents)}
    # Links to folders are not entered. What cannot be listed is not known to be ours.
    for path in (Path(root, name) for root, inner, files in os.walk(place, onerror=_raise) for name in (*inner, *files)):
        name = str(path.relative_to(place))
        plain = not path.is_symlink() and (path.is_dir() if name in folders else path.is_file() and name in listed)
        if not plain:
            yield name


def _raise(error: OSError) -> None:
    raise BuildError(
        f"{error.filename} cannot be listed: {error.strerror}; make it readable, or name another folder"
    ) from error


def _exchange(one: Path, other: Path, out: Path) -> None:
    """Exchanges the names of two folders, in one step. BuildError where the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise BuildError(f"{out} cannot be replaced: this libc has no renameat2; remove it, or name another folder")
    if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV):
        raise BuildError(
            f"{out} cannot be replaced in one step: its file system cannot exchange folders ({os.strerror(number)}); "
            "remove it, or name another folder"
        )
    raise OSError(number, os.strerror(number), str(out))

"""A bundle as one file: read as its folder is, the same bytes each time, refused when it is damaged or something else."""

from __future__ import annotations

import io
import lzma
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import hdispatch
import pytest
import toy
from hdispatch import archive
from hdispatch.bundle_reader import read_bundle
from hdispatch.manifest import MANIFEST_NAME

ONE = "artifacts/one.cubin"


@pytest.fixture(autouse=True)
def nothing_loaded() -> Iterator[None]:
    yield
    for each in hdispatch.loaded():
        each.unload()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return toy.write(tmp_path / "bundle")


@pytest.fixture
def packed(folder: Path, tmp_path: Path) -> Path:
    archive.pack(folder, tmp_path / "packed.tar.xz")
    return tmp_path / "packed.tar.xz"


def write(
    file: Path, members: dict[str, bytes], links: tuple[str, ...] = (), kind: bytes = tarfile.SYMTYPE, target="/x"
) -> Path:
    with tarfile.open(file, "w:xz") as made:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            made.addfile(member, io.BytesIO(content))
        for name in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            made.addfile(member)
    return file


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_it_is_read_as_its_folder_is(folder: Path, packed: Path) -> None:
    assert read_bundle(packed) == read_bundle(folder)
    assert archive.is_archive(packed)
    assert not archive.is_archive(folder)


def test_it_serves(packed: Path) -> None:
    bundle = hdispatch.load(packed, driver="null")
    assert bundle.folder == packed
    with hdispatch.strict():
        toy.OP(*toy.arguments(4, 64))


def test_equal_bundles_make_equal_archives(packed: Path, tmp_path: Path) -> None:
    again = toy.write(tmp_path / "again")
    archive.pack(again, tmp_path / "again.tar.xz")
    assert (tmp_path / "again.tar.xz").read_bytes() == packed.read_bytes()


def test_one_folder_in_it_is_the_bundle(folder: Path, tmp_path: Path) -> None:
    """As `tar cJf bundle.tar.xz bundle` makes it."""
    with tarfile.open(tmp_path / "tarred.tar.xz", "w:xz") as made:
        made.add(folder, "bundle")
    assert read_bundle(tmp_path / "tarred.tar.xz") == read_bundle(folder)


def test_its_digest_is_checked(packed: Path) -> None:
    with pytest.raises(hdispatch.BundleError, match="another bundle than the one wanted"):
        read_bundle(packed, sha256="0" * 64)


@pytest.fixture
def several(folder: Path, tmp_path: Path) -> dict[str, Path]:
    """Two bundles of one and the same code, and other rows."""
    return {"b": folder, "a": toy.write(tmp_path / "another", toy.manifest((64,)))}


def test_several_in_one_are_read_as_their_folders_are(several: dict[str, Path], tmp_path: Path) -> None:
    together = tmp_path / "together.tar.xz"
    archive.pack_together(several, together)
    for name, each in several.items():
        assert read_bundle(together / name) == read_bundle(each)
    with tarfile.open(together) as made:
        links = {member.name: member.linkname for member in made if member.islnk()}
        assert links == {f"b/{name}": f"a/{name}" for name in toy.files()}, "code that repeats is in it once"
        made.extractall(tmp_path / "unpacked", filter="data")
    assert files(tmp_path / "unpacked" / "b") == files(several["b"])
    again = tmp_path / "again.tar.xz"
    archive.pack_together(dict(reversed(several.items())), again)
    assert again.read_bytes() == together.read_bytes()


def test_one_of_several_is_named(several: dict[str, Path], packed: Path, tmp_path: Path) -> None:
    together = tmp_path / "together.tar.xz"
    archive.pack_together(several, together)
    with pytest.raises(hdispatch.BundleError, match=r"holds the bundles a, b; name one of them: .*together.tar.xz/a$"):
        read_bundle(together)
    with pytest.raises(hdispatch.BundleError, match=r"holds no bundle 'c'; there are a, b$"):
        read_bundle(together / "c")
    with pytest.raises(hdispatch.BundleError, match=r"holds no bundle 'a'; there are none by name$"):
        read_bundle(packed / "a")
    with pytest.raises(hdispatch.BundleError, match=r"none.tar.xz: cannot be read"):
        read_bundle(tmp_path / "none.tar.xz" / "a")


def test_a_member_that_repeats_one_of_elsewhere_is_refused(folder: Path, tmp_path: Path) -> None:
    for target in ("/etc/passwd", "../one", "artifacts/later"):
        with pytest.raises(hdispatch.BundleError, match="artifacts/link is neither a file nor a folder"):
            read_bundle(write(tmp_path / "hard.tar.xz", files(folder), ("artifacts/link",), tarfile.LNKTYPE, target))


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_truncated_archive_is_refused(packed: Path, keep: int) -> None:
    packed.write_bytes(packed.read_bytes()[:keep])
    with pytest.raises(hdispatch.BundleError, match=r"packed.tar.xz: (ends too early|is no .tar.xz).*copy it again"):
        read_bundle(packed)


def test_a_changed_byte_is_found(packed: Path) -> None:
    content = bytearray(packed.read_bytes())
    for at in range(0, len(content), 37):
        changed = bytearray(content)
        changed[at] ^= 1
        packed.write_bytes(changed)
        with pytest.raises(hdispatch.BundleError):
            read_bundle(packed)


def test_a_changed_member_is_found(folder: Path, tmp_path: Path) -> None:
    found = files(folder)
    found[ONE] = found[ONE][:-1] + b"?"
    with pytest.raises(hdispatch.BundleError, match=r"one.cubin: its SHA-256 is not the manifest's"):
        read_bundle(write(tmp_path / "changed.tar.xz", found))
    found[ONE] = b"short"
    with pytest.raises(hdispatch.BundleError, match=r"one.cubin: 5 bytes; the manifest says"):
        read_bundle(write(tmp_path / "short.tar.xz", found))
    del found[ONE]
    with pytest.raises(hdispatch.BundleError, match=r"holds no artifacts/one.cubin"):
        read_bundle(write(tmp_path / "missing.tar.xz", found))


def test_links_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(hdispatch.BundleError, match="artifacts/link is neither a file nor a folder"):
        read_bundle(write(tmp_path / "link.tar.xz", files(folder), links=("artifacts/link",)))


def test_something_else_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.tar.xz"
    with pytest.raises(hdispatch.BundleError, match="cannot be read"):
        read_bundle(other)
    other.write_bytes(b"not xz at all")
    with pytest.raises(hdispatch.BundleError, match=r"is no .tar.xz of a bundle"):
        read_bundle(other)
    other.write_bytes(lzma.compress(b"not tar at all" * 100))
    with pytest.raises(hdispatch.BundleError, match=r"is no .tar.xz of a bundle"):
        read_bundle(other)
    with pytest.raises(hdispatch.BundleError, match=f"holds no {MANIFEST_NAME}; is it an archive of a bundle"):
        read_bundle(write(tmp_path / "empty.tar.xz", {}))


def test_it_unpacks_to_so_much_at_most(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_UNPACKED", 1000)
    with pytest.raises(hdispatch.BundleError, match="unpacks to more than 1000 bytes"):
        read_bundle(packed)


def test_a_folder_may_have_such_a_name(tmp_path: Path) -> None:
    assert read_bundle(toy.write(tmp_path / "odd.tar.xz"))[0]["rows"]


def test_where_it_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(hdispatch.HdispatchError, match=r"does not end in .tar.xz"):
        archive.check_file(tmp_path / "bundle.zip")
    with pytest.raises(hdispatch.HdispatchError, match="none is not a folder"):
        archive.check_file(tmp_path / "none" / "bundle.tar.xz")
    with pytest.raises(hdispatch.HdispatchError, match="cannot write"):
        archive.pack(folder, tmp_path / "none" / "bundle.tar.xz")


def test_two_processes_write_the_same_file(tmp_path: Path, folder: Path) -> None:
    """It is whole whenever somebody looks, and nothing is left beside it."""
    file = tmp_path / "out" / "bundle.tar.xz"
    file.parent.mkdir()
    faults: list[BaseException] = []

    def write() -> None:
        try:
            for _ in range(10):
                archive.pack(folder, file)
                archive.Archive(file).read("manifest.json")
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert list(file.parent.iterdir()) == [file]

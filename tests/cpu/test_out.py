"""Where a bundle is written: nothing but a bundle is replaced, and there is always one, for readers and after kills."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import toy
from hdispatch.bundle_reader import read_bundle, read_files
from hdispatch.compile import build, out
from hdispatch.compile.out import check_out, write
from hdispatch.errors import BuildError
from hdispatch.manifest import ARTIFACTS, CANDIDATES_NAME, CHECKSUM_NAME, MANIFEST_NAME
from hdispatch.tune import collect

TEXTS = [json.dumps({**toy.manifest(), "hdispatch": name}).encode() for name in ("0.1", "0.2")]


def fill(text: bytes) -> Callable[[Path], None]:
    """Writes a bundle with that manifest."""

    def write_toy(folder: Path) -> None:
        toy.write(folder)
        toy.write_text(folder, text)

    return write_toy


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put_candidates(folder: Path) -> None:
    sha256 = (folder / CHECKSUM_NAME).read_text().split()[0]
    (folder / CANDIDATES_NAME).write_text(json.dumps({"manifest": sha256}))


@pytest.mark.parametrize("before", ["nothing", "parents", "empty", "bundle", "older", "candidates", "no artifacts", "damaged"])
def test_what_is_replaced(tmp_path, before):
    place = tmp_path / "a" / "b" if before == "parents" else tmp_path / "a"
    if before == "empty":
        place.mkdir()
    elif before not in ("nothing", "parents"):
        toy.write(place, {**toy.manifest(), "schema_version": 1} if before == "older" else None)
    if before == "candidates":
        put_candidates(place)
    if before == "no artifacts":
        for name in toy.files():
            (place / name).unlink()
        (place / ARTIFACTS).rmdir()
    if before == "damaged":
        (place / next(iter(toy.files()))).write_bytes(b"")
    check_out(place)
    write(place, fill(TEXTS[0]))
    assert read_bundle(place)[0] == json.loads(TEXTS[0])
    assert set(snapshot(place)) == {MANIFEST_NAME, CHECKSUM_NAME, *toy.files()}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def extension(folder: Path) -> None:
    """A browser extension, as it was lost."""
    folder.mkdir()
    (folder / MANIFEST_NAME).write_text('{"manifest_version": 3, "background": {"scripts": ["background.js"]}}')
    (folder / "background.js").write_text("")


def foreign_with_checksum(folder: Path) -> None:
    folder.mkdir()
    toy.write_text(folder, b'{"files": {}, "schema_version": 3}')


def with_more(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        toy.write(folder)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("")

    return make


def changed_manifest(folder: Path) -> None:
    toy.write(folder)
    (folder / MANIFEST_NAME).write_bytes(TEXTS[1])


def with_link(folder: Path) -> None:
    toy.write(folder)
    (folder / "data").symlink_to("/tmp")


def artifact_is_a_link(folder: Path) -> None:
    toy.write(folder)
    name = next(iter(toy.files()))
    (folder / name).unlink()
    (folder / name).symlink_to(folder / MANIFEST_NAME)


def other_candidates(folder: Path) -> None:
    toy.write(folder)
    put_candidates(folder)
    toy.write_text(folder, TEXTS[1])


def a_file(folder: Path) -> None:
    folder.write_text("x")


def dangling(folder: Path) -> None:
    folder.symlink_to(folder.parent / "nowhere")


def circle(folder: Path) -> None:
    folder.symlink_to(folder)


REFUSED = {
    "a browser extension": (extension, "not empty and no bundle: its manifest.json is not one of hdispatch's"),
    "no manifest of ours": (foreign_with_checksum, "not empty and no bundle: its manifest.json is not one of hdispatch's"),
    "a changed manifest": (changed_manifest, "its manifest.json is not one of hdispatch's with its manifest.sha256"),
    "a thesis": (with_more("thesis.tex"), "holds more than a bundle: thesis.tex"),
    "a hidden folder": (with_more(".git/config"), r"holds more than a bundle: \.git, \.git/config"),
    "more among the artifacts": (with_more(f"{ARTIFACTS}/mine.txt"), f"holds more than a bundle: {ARTIFACTS}/mine.txt"),
    "a link": (with_link, "holds more than a bundle: data"),
    "an artifact that is a link": (artifact_is_a_link, r"holds more than a bundle: artifacts/\w+\.cubin"),
    "another bundle's candidates": (other_candidates, "holds more than a bundle: candidates.json"),
    "a file": (a_file, "is a file; name a folder"),
    "a link to nowhere": (dangling, "is a link to .*nowhere, which is not there"),
    "a link to itself": (circle, "is a link to .*, which is not there"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_before_anything_is_compiled(tmp_path, monkeypatch, case):
    make, words = REFUSED[case]
    place, cache = tmp_path / "out", tmp_path / "cache"
    make(place)
    before = snapshot(tmp_path)
    steps = {
        "build": lambda: build(["triton_example"], "h200", place, cache=cache, extra=["triton_example"]),
        "candidates": lambda: collect.collect(["triton_example"], "h200", place, cache=cache, extra=["triton_example"]),
        "write": lambda: write(place, lambda _: None),
    }
    monkeypatch.setattr("subprocess.Popen", None)  # nothing is started
    for name, step in steps.items():
        with pytest.raises(BuildError, match=words):
            step()
        assert snapshot(tmp_path) == before, name


@pytest.mark.parametrize(
    ("path", "words"),
    [("x" * 300, "File name too long"), ("a\0b", "null"), ("file/below", "Not a directory|File exists"), ("..", "not empty")],
)
def test_a_path_that_cannot_be_written(tmp_path, path, words):
    (tmp_path / "file").write_text("")
    (tmp_path / "below").mkdir()
    for step in (check_out, lambda place: write(place, fill(TEXTS[0]))):
        with pytest.raises(BuildError, match=words):
            step(tmp_path / "below" / ".." / path if path != ".." else tmp_path / "below" / "..")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["below", "file"]


def test_a_link_is_followed(tmp_path):
    toy.write(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "again").symlink_to(tmp_path / "link")
    write(tmp_path / "again", fill(TEXTS[0]))
    assert (tmp_path / "link").readlink() == Path("real")
    assert (tmp_path / "again").is_symlink()
    assert read_bundle(tmp_path / "real")[0] == json.loads(TEXTS[0]) == read_bundle(tmp_path / "again")[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "link", "real"]


def test_a_file_system_that_cannot_exchange(tmp_path, monkeypatch):
    """Said before anything is compiled; a bundle where none was takes no exchange."""
    monkeypatch.setattr(out, "_RENAME_EXCHANGE", 1 << 20)  # a flag that no kernel knows: EINVAL, as such file systems say
    write(tmp_path / "new", fill(TEXTS[0]))
    for step in (check_out, lambda place: write(place, fill(TEXTS[1]))):
        with pytest.raises(BuildError, match=r"new cannot be replaced in one step: .*Invalid argument.*; remove it, or name"):
            step(tmp_path / "new")
    assert read_bundle(tmp_path / "new")[0] == json.loads(TEXTS[0])


def test_a_failed_write_leaves_the_old_bundle(tmp_path):
    place = toy.write(tmp_path / "out")
    before = snapshot(place)

    def fails(folder: Path) -> None:
        toy.write(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(BuildError, match=r"cannot write the bundle .*out: .*No space left"):
        write(place, fails)
    assert snapshot(place) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_put_into_the_old_bundle_meanwhile_is_not_lost(tmp_path, monkeypatch):
    place = toy.write(tmp_path / "out")
    before = snapshot(place)

    def meddles(folder: Path) -> None:
        toy.write(folder)
        (place / "notes.txt").write_text("mine")

    with pytest.raises(BuildError, match=r"holds more than a bundle: notes\.txt"):
        write(place, meddles)
    assert snapshot(place) == before | {"notes.txt": b"mine"}
    (place / "notes.txt").unlink()
    exchange = out._exchange

    def meddles_late(one: Path, other: Path, said: Path) -> None:
        if not (one / "notes.txt").exists():
            (place / "notes.txt").write_text("mine")
        exchange(one, other, said)

    monkeypatch.setattr(out, "_exchange", meddles_late)
    with pytest.raises(BuildError, match=r"holds more than a bundle: notes\.txt"):
        write(place, fill(TEXTS[0]))
    assert snapshot(place) == before | {"notes.txt": b"mine"}


def test_writers_of_one_place_do_no_harm(tmp_path):
    errors: list[BaseException] = []

    def run(text: bytes) -> None:
        try:
            for _ in range(20):
                write(tmp_path / "out", fill(text))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(text,)) for text in TEXTS * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert read_bundle(tmp_path / "out")[0]["hdispatch"] in ("0.1", "0.2")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def forked(work: Callable[[], None]) -> int:
    """A process that does something, and nothing else in the end; its id."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    finally:
        os._exit(1)


def write_for(place: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for text in TEXTS:
            write(place, fill(text))


def test_readers_beside_a_writer_always_find_a_whole_bundle(tmp_path):
    place = toy.write(tmp_path / "out")
    put_candidates(place)
    child = forked(lambda: write_for(place, 4.0))
    seen: dict[str, int] = {}
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        found = read_files(place, beside=[CANDIDATES_NAME])
        assert found.contents == toy.files()
        assert (CANDIDATES_NAME in found.beside) == (found.manifest == toy.manifest())
        seen[found.manifest["hdispatch"]] = seen.get(found.manifest["hdispatch"], 0) + 1
    assert {"0.1", "0.2"} <= seen.keys(), seen
    assert sum(seen.values()) > 100


def test_there_is_a_bundle_whenever_the_writer_is_killed(tmp_path):
    place, chooser = toy.write(tmp_path / "out"), random.Random(0)
    for _ in range(100):
        child = forked(lambda: write_for(place, 60.0))
        time.sleep(chooser.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert read_bundle(place)[1] == toy.files()
    (tmp_path / ".hdispatch-notes").write_text("a file of somebody's")
    assert any(path.is_dir() for path in tmp_path.glob(".hdispatch-*")), "no writer was killed at work"
    write(place, fill(TEXTS[0]))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hdispatch-notes", "out"], (
        "killed writers' folders are removed"
    )


def test_the_folder_of_a_writer_at_work_stays(tmp_path):
    def slow(folder):
        before = set(tmp_path.glob(".hdispatch-*"))
        write(tmp_path / "other", fill(TEXTS[0]))
        assert before == set(tmp_path.glob(".hdispatch-*")) == {folder.parent}
        fill(TEXTS[1])(folder)

    write(tmp_path / "out", slow)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


@pytest.mark.parametrize("name", [".", "..", "here"])
def test_the_folder_that_the_process_is_in(tmp_path, monkeypatch, name):
    """Exchanging it would leave the caller's shell in a folder that is gone."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    given = tmp_path / "here" if name == "here" else Path(name)
    with pytest.raises(BuildError, match="the folder that this runs in, or holds it: name a folder in it"):
        check_out(given)
    check_out(given / "bundle")


def test_what_cannot_be_listed_is_not_ours(tmp_path, monkeypatch):
    bundle = toy.write(tmp_path / "bundle")
    real = os.scandir

    def scandir(path):
        if Path(path).name == ARTIFACTS:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(BuildError, match="cannot be listed: Permission denied"):
        check_out(bundle)

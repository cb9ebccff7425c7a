"""The build cache: atomic, shared, self-checking; damage costs a rebuild, never a wrong artifact."""

from __future__ import annotations

import json
import subprocess
import threading
from pathlib import Path
from typing import Any, TypedDict

import forked
import pytest
import toy
from hdispatch.bundle_reader import read_bundle
from hdispatch.compile import DESCRIBED, Selection, build, builder
from hdispatch.compile.build_unit import Unit
from hdispatch.compile.store import Store, canonical, default_root, digest, write_atomic
from hdispatch.errors import BuildError
from hdispatch.manifest import MANIFEST_NAME


class Value(TypedDict):
    """What the tests put under a key."""

    x: int


class Values(TypedDict):
    """Likewise."""

    x: list[Any]


HERE = Path(__file__).parent
ONE = Selection(shapes=lambda _spec: [{"K": 64, "N": 72}], variants=lambda _spec: ["any"])


def build_one(out: Path, cache: Path):
    return build(["triton_example"], "h200", out, cache=cache, extra=["triton_example"], select=ONE, jobs=1)


def test_entries_and_blobs_come_back(tmp_path):
    store = Store(tmp_path)
    assert store.get("code", "ab" * 32, Values) is None
    store.put("code", "ab" * 32, {"x": [1, "µ"]})
    assert store.get("code", "ab" * 32, Values) == {"x": [1, "µ"]}
    assert store.blob(digest(b"data")) is None
    assert store.put_blob(b"data") == digest(b"data")
    assert store.blob(digest(b"data")) == b"data"
    assert not store.damaged


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_damage_counts_as_missing_and_is_reported(tmp_path, damage):
    store = Store(tmp_path)
    store.put("code", "cd" * 32, {"x": 1})
    store.put_blob(b"data")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 2
    for path in files:
        whole = bytearray(path.read_bytes())
        whole[len(whole) // 2] ^= 1
        path.write_bytes(bytes(whole) if damage is None else damage)
    assert store.get("code", "cd" * 32, Value) is None
    assert store.blob(digest(b"data")) is None
    assert sorted(store.damaged) == sorted(files)
    store.put("code", "cd" * 32, {"x": 1})
    store.put_blob(b"data")
    assert store.get("code", "cd" * 32, Value) == {"x": 1}
    assert store.blob(digest(b"data")) == b"data"


@pytest.mark.parametrize("body", [b"{}", b"[]", b"null", b'{"x": 1}', b"[" * 100_000, b"\xff", b"", b'{"kind":"code"}'])
def test_an_older_entry_counts_as_missing(tmp_path, body):
    """One whose checksum fits: written by another hdispatch, say."""
    store = Store(tmp_path)
    store.put("code", "cd" * 32, {"x": 1})
    (path,) = (path for path in tmp_path.rglob("*") if path.is_file())
    path.write_bytes(digest(body).encode() + b"\n" + body)
    assert store.get("code", "cd" * 32, Value) is None
    assert store.damaged == [path]


@pytest.mark.parametrize("value", [{}, {"x": "1"}, {"x": 1.0}, {"x": True}, {"y": 1}])
def test_an_entry_of_another_type_counts_as_missing(tmp_path, value):
    store = Store(tmp_path)
    store.put("code", "cd" * 32, value)
    assert store.get("code", "cd" * 32, Value) is None
    assert len(store.damaged) == 1


def test_a_copied_entry_counts_as_missing(tmp_path):
    store = Store(tmp_path)
    store.put("code", "ab" * 32, {"x": 1})
    store.put("code", "cd" * 32, {"x": 2})
    store.put("other", "ab" * 32, {"x": 3})
    for copied in (store._entry("code", "cd" * 32), store._entry("other", "ab" * 32)):
        store._entry("code", "ab" * 32).write_bytes(copied.read_bytes())
        assert store.get("code", "ab" * 32, Value) is None
    assert store.get("code", "cd" * 32, Value) == {"x": 2}
    store.put("code", "ab" * 32, {"x": 4})
    assert store.get("code", "ab" * 32, Value) == {"x": 4}


def test_records_that_serve_other_buckets_are_not_found(tmp_path):
    """An entry whose key and checksum fit, of which a part is gone."""
    store = Store(tmp_path)
    unit = Unit("triton_example", "triton", "any", {}, {}, (0, 1, 2))
    record = toy.record() | {"cubins": {}}
    one, two = ({"record": record, "buckets": buckets, "seconds": 1.0} for buckets in ([0], [1, 2]))
    for built, there in (([one, two], True), ([one], False), ([], False), ([one, one, two], False)):
        store.put("record", "ab" * 32, {"built": built})
        assert (builder.find_built(unit, "ab" * 32, store) == built) == there
    assert not store.damaged
    store.put("record", "ab" * 32, {"built": [one, two | {"record": {}}]})
    assert builder.find_built(unit, "ab" * 32, store) is None
    assert len(store.damaged) == 1


def test_a_write_is_all_or_nothing(tmp_path):
    path = tmp_path / "file"
    contents = [bytes([i]) * 100_000 for i in range(4)]
    write_atomic(path, contents[0])
    done = threading.Event()
    seen = set()

    def watch():
        while not done.is_set():
            seen.add(path.read_bytes())

    def write(data):
        for _ in range(20):
            write_atomic(path, data)

    watcher = threading.Thread(target=watch)
    writers = [threading.Thread(target=write, args=(data,)) for data in contents]
    for thread in (watcher, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    watcher.join()
    assert seen <= set(contents)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_what_cannot_be_written_or_read_says_so(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BuildError, match="cannot write"):
        write_atomic(tmp_path / "file" / "below", b"")
    (tmp_path / "code" / "ef" / ("ef" * 32 + ".json")).mkdir(parents=True)
    with pytest.raises(BuildError, match="choose another cache folder"):
        Store(tmp_path).get("code", "ef" * 32, Value)


def test_canonical_json_does_not_depend_on_order():
    assert canonical({"b": 1, "a": [1.5, None]}) == canonical({"a": [1.5, None], "b": 1}) == b'{"a":[1.5,null],"b":1}'
    with pytest.raises(ValueError, match="JSON"):
        canonical(float("nan"))


def test_the_default_folder(monkeypatch):
    monkeypatch.setenv("HDISPATCH_CACHE", "/x/y")
    assert default_root() == Path("/x/y")
    monkeypatch.delenv("HDISPATCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/z")
    assert default_root() == Path("/z/hdispatch")


@pytest.mark.slow
def test_cards_that_differ_in_name_and_memory_share_code(tmp_path):
    cache = tmp_path / "cache"
    build_one(tmp_path / "h200", cache)
    compiled = {path: path.stat().st_mtime_ns for path in (cache / "code").rglob("*.json")}
    build(["triton_example"], "h100", tmp_path / "h100", cache=cache, extra=["triton_example"], select=ONE, jobs=1)
    assert compiled == {path: path.stat().st_mtime_ns for path in (cache / "code").rglob("*.json")}
    manifests = [read_bundle(tmp_path / card)[0] for card in ("h200", "h100")]
    assert [manifest["target"]["name"] for manifest in manifests] == ["h200", "h100"]
    assert manifests[0]["files"] == manifests[1]["files"]
    assert len({canonical(target.code_key()) for target in DESCRIBED.values()}) == len(DESCRIBED) - 1


@pytest.mark.slow
def test_a_damaged_artifact_is_built_again(tmp_path):
    cache = tmp_path / "cache"
    first = build_one(tmp_path / "a", cache)
    before = (tmp_path / "a" / MANIFEST_NAME).read_bytes()
    assert first.cache_hits == 0
    blobs = [path for path in (cache / "blob").rglob("*") if path.is_file()]
    for path in (*blobs, *(cache / "record").rglob("*.json")):
        path.write_bytes(path.read_bytes()[:-1])
    again = build_one(tmp_path / "b", cache)
    assert again.cache_hits == 0
    assert any("was damaged and has been rebuilt" in note for note in again.notes)
    after = json.loads((tmp_path / "b" / MANIFEST_NAME).read_bytes())
    assert {**after, "rows": []} == {**json.loads(before), "rows": []}
    warm = build_one(tmp_path / "c", cache)
    assert warm.cache_hits == warm.records
    assert (tmp_path / "c" / MANIFEST_NAME).read_bytes() == (tmp_path / "b" / MANIFEST_NAME).read_bytes()


@pytest.mark.slow
def test_two_processes_at_once_do_no_harm(tmp_path):
    program = (
        f"import sys; sys.path += {[str(HERE), str(HERE.parent / 'support')]!r}; from pathlib import Path; "
        "from test_store import build_one; "
        "build_one(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    command = forked.python("-P", "-c", forked.COMPILING + program)
    outs = [tmp_path / "a", tmp_path / "b"]
    processes = [subprocess.Popen([*command, str(out), str(tmp_path / "cache")]) for out in outs]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    manifests = [read_bundle(out)[0] for out in outs]
    for manifest in manifests:
        for row in manifest["rows"]:
            row["build_seconds"] = 0.0
    assert manifests[0] == manifests[1]
    leftovers = [path for path in tmp_path.rglob(".*") if path.is_file()]
    assert not leftovers
    warm = build_one(tmp_path / "c", tmp_path / "cache")
    assert warm.cache_hits == warm.records == len(manifests[0]["records"])

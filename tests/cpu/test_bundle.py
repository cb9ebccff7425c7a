"""Bundles: what is read, what is refused and with which words, and that a refused one changes nothing."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import random
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hdispatch
import pytest
import torch
import toy
from hdispatch import runtime
from hdispatch.manifest import ARTIFACTS, CHECKSUM_NAME, MANIFEST_NAME, SCHEMA_VERSION

ONE = f"{ARTIFACTS}/one.cubin"
ALL_FILES = [MANIFEST_NAME, CHECKSUM_NAME, *toy.files()]


@pytest.fixture(autouse=True)
def nothing_loaded() -> Iterator[None]:
    """Other tests' bundles are none of ours."""
    for each in hdispatch.loaded():
        each.unload()
    yield
    for each in hdispatch.loaded():
        each.unload()


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return toy.write(tmp_path / "bundle")


@pytest.fixture
def good(tmp_path: Path) -> hdispatch.Bundle:
    """A bundle that is loaded and serves while others are refused."""
    return hdispatch.load(toy.write(tmp_path / "good"), driver="null")


def serves(k: int = 64) -> bool:
    """Whether a call is a hit now."""
    before = hdispatch.stats()["toy"]["hits"]
    toy.OP(*toy.arguments(4, k))
    return hdispatch.stats()["toy"]["hits"] == before + 1


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    manifest = copy.deepcopy(toy.manifest())
    change(manifest)
    return manifest


def refusal(action: Callable[[], object]) -> str | None:
    """What the HdispatchError says that the action raises; any other exception goes on."""
    try:
        action()
    except hdispatch.HdispatchError as error:
        return str(error)
    return None


# ---- reading ----


def test_a_whole_bundle_is_read(bundle):
    manifest, contents = hdispatch.read_bundle(bundle)
    assert manifest == toy.manifest()
    assert contents == toy.files()
    assert hdispatch.read_bundle(str(bundle)) == (manifest, contents)


def test_a_file_that_is_not_listed_is_ignored(bundle):
    (bundle / "notes.txt").write_text("hello")
    (bundle / ARTIFACTS / "two.cubin").write_text("hello")
    assert set(hdispatch.read_bundle(bundle)[1]) == set(toy.files())


def test_a_link_within_the_bundle_is_followed(bundle):
    (bundle / ONE).rename(bundle / "elsewhere")
    (bundle / ONE).symlink_to("../elsewhere")
    assert hdispatch.read_bundle(bundle)[1] == toy.files()


def test_no_bundle_at_all(tmp_path):
    for folder in (tmp_path / "nothing", tmp_path):
        with pytest.raises(
            hdispatch.BundleError, match=r"manifest\.json: cannot be read \(No such file or directory\); is .* a bundle"
        ):
            hdispatch.read_bundle(folder)


@pytest.mark.parametrize("name", ALL_FILES)
def test_a_missing_file(bundle, name):
    (bundle / name).unlink()
    with pytest.raises(hdispatch.BundleError, match=f"{name}: cannot be read"):
        hdispatch.read_bundle(bundle)


@pytest.mark.parametrize("name", ALL_FILES)
def test_another_length(bundle, name):
    whole = (bundle / name).read_bytes()
    for content in (b"", whole[:1], whole[: len(whole) // 2], whole[:-1], whole + b"\n", whole + b"\0", whole * 2):
        (bundle / name).write_bytes(content)
        with pytest.raises(hdispatch.BundleError, match=name):
            hdispatch.read_bundle(bundle)


@pytest.mark.parametrize("name", ALL_FILES)
def test_one_bit_flipped_in_every_byte(bundle, name):
    whole = bytearray((bundle / name).read_bytes())
    chooser = random.Random(name)
    missed = []
    for position in range(len(whole)):
        bit = 1 << chooser.randrange(8)
        whole[position] ^= bit
        (bundle / name).write_bytes(whole)
        message = refusal(lambda: hdispatch.read_bundle(bundle))
        if message is None or name not in message:
            missed.append(position)
        whole[position] ^= bit
    assert not missed
    (bundle / name).write_bytes(whole)
    hdispatch.read_bundle(bundle)


def test_flipped_bits_never_reach_the_table(good, bundle):
    chooser = random.Random(1)
    for name in ALL_FILES:
        whole = (bundle / name).read_bytes()
        for _ in range(20):
            content = bytearray(whole)
            content[chooser.randrange(len(content))] ^= 1 << chooser.randrange(8)
            (bundle / name).write_bytes(content)
            with pytest.raises(hdispatch.BundleError, match=name):
                hdispatch.load(bundle, driver="null")
        (bundle / name).write_bytes(whole)
    assert hdispatch.loaded() == [good]
    assert serves()


OTHER_VERSIONS = [0, SCHEMA_VERSION - 1, SCHEMA_VERSION + 1, -1, 10**100, str(SCHEMA_VERSION), None, [], {}, 1.5, True]


@pytest.mark.parametrize("version", [*OTHER_VERSIONS, float(SCHEMA_VERSION)])
def test_another_schema_version(tmp_path, version):
    toy.write(tmp_path, changed(lambda m: m.update(schema_version=version)))
    wanted = rf"manifest\.json: (schema version .*this hdispatch reads {SCHEMA_VERSION};|malformed: schema_version is)"
    with pytest.raises(hdispatch.BundleError, match=wanted):
        hdispatch.read_bundle(tmp_path)


def test_no_schema_version(tmp_path):
    toy.write(tmp_path, changed(lambda m: m.pop("schema_version")))
    with pytest.raises(hdispatch.BundleError, match=f"schema version None; this hdispatch reads {SCHEMA_VERSION};"):
        hdispatch.read_bundle(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b"1",
        b'"x"',
        b"\xff\xfe\x00",
        b"{'a': 1}",
        b"[" * 100_000,
        b'{"schema_version": 1}',
        b"9" * 10_000,
    ],
)
def test_what_is_not_a_manifest(bundle, text):
    toy.write_text(bundle, text)
    with pytest.raises(hdispatch.BundleError, match=r"manifest\.json: (not JSON|schema version|malformed)"):
        hdispatch.read_bundle(bundle)


# ---- paths ----


def relisted(name: str) -> dict[str, Any]:
    """The first artifact under another name."""
    return changed(
        lambda m: (
            m["files"].update({name: m["files"].pop(ONE)}),
            [c.update(file=name) for c in m["records"][0]["cubins"].values()],
        )
    )


def test_paths_that_leave_the_bundle(tmp_path, bundle):
    secret = tmp_path / "secret"
    secret.write_bytes(toy.files()[ONE])
    for name in (
        "../secret",
        str(secret),
        f"{ARTIFACTS}/../../secret",
        "..",
        "../bundle/" + ONE,
        "/",
        "/etc/passwd",
        "/dev/zero",
    ):
        toy.write(bundle, relisted(name))
        with pytest.raises(hdispatch.BundleError, match=r"manifest\.json: lists .*, which is outside the bundle"):
            hdispatch.read_bundle(bundle)


def test_links_that_leave_the_bundle(tmp_path, bundle):
    secret = tmp_path / "secret"
    secret.write_bytes(toy.files()[ONE])
    (bundle / ONE).unlink()
    (bundle / ONE).symlink_to(secret)
    with pytest.raises(hdispatch.BundleError, match=r"lists 'artifacts/one.cubin', which is outside the bundle"):
        hdispatch.read_bundle(bundle)
    (bundle / "out").symlink_to(tmp_path)
    toy.write(tmp_path / "other", relisted("out/secret"))
    (tmp_path / "other" / "out").symlink_to(tmp_path)
    with pytest.raises(hdispatch.BundleError, match="outside the bundle"):
        hdispatch.read_bundle(tmp_path / "other")


def test_names_that_are_no_files(bundle):
    (bundle / "folder").mkdir()
    (bundle / "loop").symlink_to("loop")
    os.mkfifo(bundle / "pipe")
    for name in ("folder", "pipe", "loop", "", ".", "a\0b", "\ud800", "x" * 5000, "missing", "folder/missing", ONE + "/x"):
        toy.write(bundle, relisted(name))
        with pytest.raises(hdispatch.BundleError, match=r"not a file|cannot be read|hold no NUL|half of a character"):
            hdispatch.read_bundle(bundle)


def test_a_folder_in_place_of_a_manifest(tmp_path):
    (tmp_path / MANIFEST_NAME).mkdir()
    with pytest.raises(hdispatch.BundleError, match=r"manifest\.json: is not a file"):
        hdispatch.read_bundle(tmp_path)


# ---- what the manifest says ----


def add_row(**changes: object) -> Callable[[dict[str, Any]], object]:
    return lambda m: m["rows"].append({**m["rows"][0], "K": 1024, **changes})


def record_set(**changes: object) -> Callable[[dict[str, Any]], object]:
    return lambda m: m["records"][0].update(changes)


def cubin_set(**changes: object) -> Callable[[dict[str, Any]], object]:
    return lambda m: m["records"][0]["cubins"]["other"].update(changes)


def param_set(index: int, **changes: object) -> Callable[[dict[str, Any]], object]:
    return lambda m: m["records"][0]["params"].__setitem__(index, changes)


REFUSED = {
    "duplicate row": (add_row(K=64), "rows 0 and 20 have the same key"),
    "row of no record": (add_row(record=1), "row 20 names record 1 of 1"),
    "row of record -1": (add_row(record=-1), "row 20 names record -1 of 1"),
    "row of no op": (add_row(op="other"), "row 20 is of op 'other', which is not among the bundle's ops"),
    "row of no variant": (add_row(variant="other"), "row 20 is of variant 'other', which is not among those of toy"),
    "row of a variant that is not built": (add_row(variant="float16"), "'float16', which is not among those of toy"),
    "row of no bucket": (add_row(bucket=5), "row 20 names bucket 5 of 5"),
    "row of bucket -1": (add_row(bucket=-1), "row 20 names bucket -1 of 5"),
    "K too large": (add_row(K=2**32), "row 20: K = 4294967296, N = 0; sizes are below"),
    "N negative": (add_row(N=-1), "N = -1; sizes are below"),
    "K fractional": (add_row(K=64.0), r"rows\[20\].K is 64.0, of type float; it takes int"),
    "record is a flag": (add_row(record=False), r"rows\[20\].record is False, of type bool"),
    "extra byte of an int": (add_row(bytes=2**63), r"rows\[20\].bytes is .*; integers fit 64 bits"),
    "file is not listed": (lambda m: m["files"].pop(ONE), "kernel toy_kernel uses artifacts/one.cubin, which is not listed"),
    "file entry without size": (lambda m: m["files"][ONE].pop("size"), r"files\['artifacts/one.cubin'\].size is missing"),
    "no rows field": (lambda m: m.pop("rows"), "malformed: rows is missing"),
    "another op": (lambda m: m["ops"].update(other=m["ops"]["toy"]), "holds op 'other', which is not defined here; there are"),
    "another schema": (
        lambda m: m["ops"]["toy"].update(schema="toy(Tensor x) -> ()"),
        r"built for toy\(Tensor x\) -> \(\); the installed op is toy\(",
    ),
    "another variant": (lambda m: m["ops"]["toy"]["variants"].update(other={}), "with other variants or arguments"),
    "another dtype": (
        lambda m: m["ops"]["toy"]["variants"]["bfloat16"].update(scale="float64"),
        "with other variants or arguments",
    ),
    "ladder that descends": (lambda m: m["ops"]["toy"].update(ladder=[1, 4, 2, 8, 16]), "ladder edge 2 is 2"),
    "ladder from 0": (lambda m: m["ops"]["toy"].update(ladder=[0, 1, 2, 3, 4]), "ladder edge 0 is 0"),
    "too long a ladder": (lambda m: m["ops"]["toy"].update(ladder=list(range(1, 66))), "a ladder has 65 edges"),
    "unknown param kind": (
        param_set(4, kind="u32", value=["M"]),
        r"records\[0\].params\[4\].kind is 'u32'; it takes one of ptr, i1",
    ),
    "unknown argument": (param_set(0, kind="ptr", arg="nobody"), 'toy has no tensor argument "nobody"'),
    "float argument as pointer": (param_set(0, kind="ptr", arg="epsilon"), 'toy has no tensor argument "epsilon"'),
    "tensor argument as float": (param_set(5, kind="f32", arg="scale"), 'toy has no float argument "scale"'),
    "pointer of no argument": (param_set(0, kind="ptr"), 'field "arg" is missing'),
    "integer of no value": (param_set(4, kind="i32"), 'field "value" is missing'),
    "absent tensor": (param_set(0, kind="ptr", arg="residual"), "toy_kernel reads residual, which is None in variant bfloat16"),
    "absent tensor's stride": (param_set(4, kind="i32", value=["residual.stride(0)"]), "reads residual, which is None"),
    "dimension of no tensor": (
        param_set(4, kind="i32", value=["weight.size(1)"]),
        "reads dimension 1 of weight, which has rank 1",
    ),
    "constant that does not fit": (param_set(4, kind="i8", value=[300]), "param 4 is 300, which does not fit i8"),
    "alignment of 3": (param_set(0, kind="ptr", arg="result", align=3), "alignment 3 is not a power of two"),
    "negative alignment": (param_set(0, kind="ptr", arg="result", align=-1), 'field "align" is -1, of the wrong type'),
    "unknown token": (param_set(4, kind="i32", value=["M", "**"]), r'unknown token "\*\*"'),
    "unbalanced expression": (param_set(4, kind="i32", value=["M", "K"]), "expression of 2 tokens leaves 2 values"),
    "token that is a float": (param_set(4, kind="i32", value=[1.5]), r"value\[0\] is 1.5; it takes int \| str"),
    "grid of two": (record_set(grid=[[1], [1]]), "toy_kernel: grid has 2 dimensions; it takes 3"),
    "empty range of M": (record_set(m_min=4, m_max=3), r"valid for M in \[4, 3\], which is empty"),
    "no code": (record_set(cubins={}), "toy_kernel: the record has no code"),
    "unknown class": (
        lambda m: m["records"][0]["cubins"].update(two=m["records"][0]["cubins"]["one"]),
        r"cubins\['two'\] is 'two'; it takes one of one, mult16, other",
    ),
    "too many parameters": (
        record_set(params=[{"kind": "i32", "value": [1]}] * 63),
        "63 parameters; a record takes at most 62",
    ),
    "param that is not there": (cubin_set(params=[9]), "code takes param 9; the record has 9"),
    "params out of order": (cubin_set(params=[1, 0]), "takes param 0 after 1; params ascend"),
    "params that repeat": (cubin_set(params=[0] * 100), "takes param 0 after 0; params ascend"),
    "negative param": (cubin_set(params=[-1]), 'field "params" is .*, of the wrong type'),
    "no warps": (cubin_set(num_warps=0), "0 warps per block; it takes 1 to 32"),
    "too many warps": (cubin_set(num_warps=33), "33 warps per block"),
    "cluster of two": (cubin_set(cluster=[2, 1]), 'field "cluster" is .*, of the wrong type'),
    "cluster of 17": (cubin_set(cluster=[17, 1, 1]), "cluster 17x1x1; it takes 1 to 16 blocks"),
    "shared memory beyond the device": (
        cubin_set(shared_bytes=232449),
        "toy_kernel of kernel toy_kernel takes 232449 bytes of shared memory; a block of h200 has at most 232448",
    ),
    "N of an op without N": (param_set(4, kind="i32", value=["N"]), r'expression names "N", which toy has not: toy\('),
    "N of an op without N in a guard": (
        record_set(guards=[{"expr": ["N", 16, "%", 0, "=="], "text": "N % 16 == 0"}]),
        'expression names "N", which toy has not',
    ),
    "row of N of an op without N": (add_row(N=8), r"row of K = 1024, N = 8; toy has no N: toy\("),
    "a guard of a million tokens": (
        record_set(guards=[{"expr": [1, *[1, "and"] * 500_000], "text": "1"}]),
        "expression has 1000001 tokens; it takes at most 1024",
    ),
    "a million guards": (
        record_set(guards=[{"expr": [1], "text": "1"}] * 1_000_000),
        "toy_kernel: 1000000 guards; a record takes at most 256",
    ),
    "NUL in a function's name": (cubin_set(function="toy_kernel\0x"), r"function is 'toy_kernel\\x00x'; strings hold no NUL"),
    "NUL in a kernel's name": (record_set(kernel="\0"), r"kernel is '\\x00'; strings hold no NUL"),
    "NUL in a guard's text": (
        record_set(guards=[{"expr": [1], "text": "a\0"}]),
        r"guards\[0\].text is 'a\\x00'; strings hold no NUL",
    ),
    "a character at the cut": (
        param_set(4, kind="i32", **{"x" * n + "é" * 200: "é" for n in range(8)}),
        'field "value" is missing in',
    ),
    "flag that is a number": (cubin_set(pdl=1), r"cubins\['other'\].pdl is 1, of type int; it takes bool"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_manifests_that_are_refused(good, tmp_path, case):
    change, words = REFUSED[case]
    toy.write(tmp_path / "bad", changed(change))
    with pytest.raises(hdispatch.BundleError, match=words) as caught:
        hdispatch.load(tmp_path / "bad", driver="null")
    assert str(tmp_path / "bad" / MANIFEST_NAME) in str(caught.value)
    assert hdispatch.loaded() == [good]
    assert serves()


def test_a_record_of_two_ops(good, tmp_path):
    if "toy_twin" not in hdispatch.ops.names():
        hdispatch.ops.define(dataclasses.replace(toy.SPEC, name="toy_twin"))

    def share(manifest: dict[str, Any]) -> None:
        manifest["ops"]["toy_twin"] = {**manifest["ops"]["toy"], "schema": hdispatch.ops.spec("toy_twin").schema()}
        manifest["rows"].append({**manifest["rows"][0], "op": "toy_twin"})

    toy.write(tmp_path / "bad", changed(share))
    with pytest.raises(hdispatch.BundleError, match="row 20 of toy_twin names record 0, which is one of toy"):
        hdispatch.load(tmp_path / "bad", driver="null")
    assert serves()


# ---- fuzzing ----

WRONG = (
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    2**70,
    -(2**63),
    1.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "M",
    [],
    [None],
    [[1]],
    {},
    {"x": 1},
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every value in a JSON document."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def put(document: Any, path: tuple[Any, ...], value: object) -> None:
    for key in path[:-1]:
        document = document[key]
    document[path[-1]] = value


def attempt(folder: Path, manifest: dict[str, Any], good: hdispatch.Bundle) -> bool:
    """Load a changed bundle: it is either refused, and changes nothing, or serves calls. Returns which."""
    toy.write(folder, manifest)
    message = refusal(lambda: hdispatch.load(folder, driver="null"))
    if message is not None:
        assert str(folder) in message  # the file is named
        assert hdispatch.loaded() == [good]
        return False
    for m, k in ((1, 64), (4, 64), (16, 512), (100, 512)):
        toy.OP(*toy.arguments(m, k))
        toy.OP(*toy.arguments(m, k, "bfloat16+scale_ub+residual"))
    hdispatch.load(good.folder, driver="null")
    return True


def test_every_value_replaced(good, tmp_path):
    small = toy.manifest(sizes=(64,), variants=("bfloat16",))
    small["rows"] = small["rows"][:2]
    good = hdispatch.load(good.folder, driver="null")
    refused = loaded = 0
    for path in list(places(small)):
        for value in WRONG:
            manifest = copy.deepcopy(small)
            put(manifest, path, value)
            if attempt(tmp_path / "bad", manifest, good):
                loaded += 1
                good = hdispatch.loaded()[0]
            else:
                refused += 1
    assert refused > 1000
    assert loaded > 10  # the tools' versions, another K, …
    assert serves()


def test_every_field_removed_or_repeated(good, tmp_path):
    small = toy.manifest(sizes=(64,), variants=("bfloat16",))
    for path in list(places(small)):
        manifest = copy.deepcopy(small)
        parent = manifest
        for key in path[:-1]:
            parent = parent[key]
        if isinstance(parent, list):
            parent.append(parent[path[-1]])
        else:
            del parent[path[-1]]
        attempt(tmp_path / "bad", manifest, good)
        good = hdispatch.loaded()[0]
    assert serves()


def test_values_swapped_at_random(good, tmp_path):
    chooser = random.Random(2)
    original = toy.manifest(sizes=(64,), variants=("bfloat16",))
    everywhere = list(places(original))
    for _ in range(300):
        manifest = copy.deepcopy(original)
        for _ in range(chooser.randint(1, 4)):
            a, b = chooser.sample(everywhere, 2)
            value = original
            for key in b:
                value = value[key]
            try:
                put(manifest, a, copy.deepcopy(value))
            except (KeyError, IndexError, TypeError):
                continue  # an earlier change took the place away
        attempt(tmp_path / "bad", manifest, good)
        good = hdispatch.loaded()[0]
    assert serves()


# ---- loading ----


def test_loading_replacing_unloading(tmp_path):
    first = hdispatch.load(toy.write(tmp_path / "a", toy.manifest(sizes=(64,))), driver="null")
    assert (first.device, first.rows, first.folder) == (-1, 10, tmp_path / "a")
    assert first.manifest["target"]["name"] == "h200"
    assert hdispatch.loaded() == [first]
    assert serves(64)
    assert not serves(512)
    second = hdispatch.load(toy.write(tmp_path / "b", toy.manifest(sizes=(512,))), driver="null")
    assert hdispatch.loaded() == [second]
    assert not serves(64)
    assert serves(512)
    first.unload()  # it no longer serves: nothing happens
    assert hdispatch.loaded() == [second]
    assert serves(512)
    second.unload()
    assert hdispatch.loaded() == []
    assert not serves(512)
    second.unload()
    assert "manifest" not in repr(second)


def test_a_bundle_serves_again(tmp_path):
    first = hdispatch.load(toy.write(tmp_path / "first"), driver="null")
    second = hdispatch.load(toy.write(tmp_path / "second", toy.manifest(sizes=(64,))), driver="null")
    assert hdispatch.ops.toy.pick(4, 512) is None
    first.publish()
    assert list(hdispatch.loaded()) == [first]
    assert hdispatch.ops.toy.pick(4, 512) is not None
    second.unload()
    assert hdispatch.ops.toy.pick(4, 512) is not None, "what does not serve is not unloaded in the place of what does"
    first.unload()
    assert not hdispatch.loaded()
    with pytest.raises(hdispatch.HdispatchError, match=r"somewhere was not loaded by hdispatch\.load"):
        hdispatch.Bundle(tmp_path / "somewhere", first.manifest, -1).publish()


def test_a_bundle_may_be_deleted_once_loaded(good):
    for name in ALL_FILES:
        (good.folder / name).unlink()
    assert serves()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_here(bundle):
    with pytest.raises(
        hdispatch.BundleError, match=r"no CUDA device here \(.+\); hdispatch.load\(DIR, driver='null'\) loads it"
    ):
        hdispatch.load(bundle)
    assert hdispatch.loaded() == []


def test_a_driver_that_there_is_not(bundle):
    with pytest.raises(hdispatch.HdispatchError, match="driver is 'rocm'; it takes 'cuda' or 'null'"):
        hdispatch.load(bundle, driver="rocm")


@pytest.mark.parametrize(
    ("major", "minor", "sms", "fits"), [(9, 0, 132, True), (9, 0, 114, False), (10, 0, 132, False), (9, 1, 132, False)]
)
def test_another_gpu(monkeypatch, bundle, major, minor, sms, fits):
    here = SimpleNamespace(
        name="Some GPU", major=major, minor=minor, multi_processor_count=sms, shared_memory_per_block_optin=232448
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: here)
    manifest = hdispatch.read_bundle(bundle)[0]
    if fits:
        runtime.check_target(bundle, manifest, 0)
        here.shared_memory_per_block_optin -= 1
        with pytest.raises(hdispatch.BundleError, match="built for 232448 bytes of shared memory per block; cuda:0 has 232447"):
            runtime.check_target(bundle, manifest, 0)
        return
    words = (
        r"manifest\.json: built for h200 \(sm_90a, 132 SMs\); "
        rf"cuda:0 is Some GPU \(compute capability {major}\.{minor}, {sms} SMs\)"
    )
    with pytest.raises(hdispatch.BundleError, match=words):
        runtime.check_target(bundle, manifest, 0)


def test_a_refused_bundle_of_many_modules_leaves_nothing(good, tmp_path):
    manifest = changed(lambda m: m["records"].append(toy.record(m_min=0)))
    manifest["rows"][-1]["record"] = 1
    toy.write(tmp_path / "bad", manifest)
    with pytest.raises(hdispatch.BundleError, match=r"valid for M in \[0, "):
        hdispatch.load(tmp_path / "bad", driver="null")
    assert hdispatch.loaded() == [good]
    assert serves()


def test_what_is_written_is_json_alone(bundle):
    assert json.loads((bundle / MANIFEST_NAME).read_text())["schema_version"] == SCHEMA_VERSION


# ---- before it is read ----


def test_a_file_of_another_size_is_not_read(bundle):
    """Sparse files of 64 GiB: neither read nor held."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, words in (
        (ONE, "68719476736 bytes; the manifest says 150: truncated or changed"),
        (MANIFEST_NAME, "68719476736 bytes; at most 268435456 are read"),
        (CHECKSUM_NAME, "68719476736 bytes; at most"),
    ):
        whole = (bundle / name).read_bytes()
        os.truncate(bundle / name, 64 * 2**30)
        with pytest.raises(hdispatch.BundleError, match=f"{name}: {words}"):
            hdispatch.read_bundle(bundle)
        (bundle / name).write_bytes(whole)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB
    hdispatch.read_bundle(bundle)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"rows":', b'"rows": [], "rows":'),
        (b'"kernel": "toy_kernel"', b'"kernel": "other", "kernel": "toy_kernel"'),
        (b'"toy": {', b'"toy": {}, "toy": {'),
        (b'"m_min": 1', b'"m_min": 1, "m_min": 1'),
    ],
)
def test_a_name_twice_in_one_object(good, bundle, old, new):
    text = (bundle / MANIFEST_NAME).read_bytes()
    assert old in text
    toy.write_text(bundle, text.replace(old, new, 1))
    name = old.split(b'"')[1].decode()
    with pytest.raises(hdispatch.BundleError, match=rf"manifest\.json: malformed: .*repeats the name '{name}'"):
        hdispatch.load(bundle, driver="null")
    assert hdispatch.loaded() == [good]


@pytest.mark.parametrize("shift", range(8))
@pytest.mark.parametrize("letter", ["é", "€", "🙂"])
def test_a_message_is_cut_between_characters(letter, shift):
    """Of what the core refuses, whose text it cuts at 200 bytes."""
    builder = hdispatch._C.TableBuilder(-1, 0, True)
    for record in (
        {"x" * shift + letter * 300: 1},
        {"launcher": [letter * 300, "x" * shift]},
        {"launcher": "x" * shift + letter},
    ):
        with pytest.raises(hdispatch.BundleError, match=r'field "launcher" is|launcher ".*" is not known'):
            builder.add_record(toy.OP, record)


def test_a_name_with_nul_is_refused_by_the_core_too():
    builder = hdispatch._C.TableBuilder(-1, 0, True)
    with pytest.raises(hdispatch.BundleError, match=r"""field "kernel" is 'a\\x00b'; it takes no NUL"""):
        builder.add_record(toy.OP, {**toy.record(), "kernel": "a\0b"})


# ---- which bundle ----


def test_one_manifest_alone(good, bundle):
    wanted = hashlib.sha256((bundle / MANIFEST_NAME).read_bytes()).hexdigest()
    hdispatch.load(bundle, driver="null", sha256=wanted)
    hdispatch.load(bundle, driver="null", sha256=wanted.upper())
    good = hdispatch.load(good.folder, driver="null")
    toy.write(bundle, changed(lambda m: m.update(hdispatch="0.0")))  # a whole bundle, of somebody else
    found = hashlib.sha256((bundle / MANIFEST_NAME).read_bytes()).hexdigest()
    hdispatch.read_bundle(bundle)
    with pytest.raises(hdispatch.BundleError, match=rf"manifest\.json: its SHA-256 is {found}, not {wanted}: another bundle"):
        hdispatch.load(bundle, driver="null", sha256=wanted)
    for wrong in ("", wanted[:-1], wanted + "0", "x" * 64, "٣" * 64):
        with pytest.raises(hdispatch.BundleError, match="it takes the 64 hexadecimal digits"):
            hdispatch.load(bundle, driver="null", sha256=wrong)
    assert hdispatch.loaded() == [good]


# ---- functions ----


def ffi_manifest(**argument: object) -> dict[str, Any]:
    """A function's record in the place of the cubins, with one argument."""

    def change(manifest: dict[str, Any]) -> None:
        head = {name: manifest["records"][0][name] for name in ("backend", "kernel", "config", "m_min", "m_max", "guards")}
        args = [{"kind": "tensor", "arg": "input", **argument}]
        code = {"file": ONE, "function": "f", "args": args, "pdl": False, "env_stream": False}
        manifest["records"][0] = {**head, **code, "launcher": "tvm_ffi"}
        manifest["host"] = {"machine": "x86_64", "features": []}

    return changed(change)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int16"])
def test_a_tensor_passed_as_another_type_of_its_size(good, tmp_path, dtype):
    toy.write(tmp_path / "a", ffi_manifest(dtype=dtype))
    hdispatch.load(tmp_path / "a", driver="null")
    assert serves()


@pytest.mark.parametrize("dtype", ["float32", "uint8", "float8_e4m3fn", "int64", "bool", "nonsense", ""])
def test_a_tensor_passed_as_a_type_of_another_size(good, tmp_path, dtype):
    toy.write(tmp_path / "a", ffi_manifest(dtype=dtype))
    words = f"row 0: toy_kernel is passed input, of bfloat16, as {dtype}; it takes one of float16, bfloat16, int16"
    with pytest.raises(hdispatch.BundleError, match=words):
        hdispatch.load(tmp_path / "a", driver="null")
    assert hdispatch.loaded() == [good]


def test_register_holds_a_type_against_the_argument_too():
    class Function:
        def __chandle__(self) -> int:
            raise AssertionError("it was taken")

    for dtype, own in (("float32", "bfloat16"), ("nonsense", "bfloat16")):
        args = [{"kind": "tensor", "arg": "input", "dtype": dtype}]
        with pytest.raises(
            hdispatch.BundleError, match=rf"\(registered\) is passed input, of {own}, as {dtype}; it takes one of"
        ):
            hdispatch.register("toy", hdispatch.Key("bfloat16"), Function(), args=args, driver="null")
    assert not hdispatch.registered()

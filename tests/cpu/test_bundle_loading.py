"""Bundles as they are loaded, replaced and unloaded; other GPUs, and none."""

from __future__ import annotations

import json
from types import SimpleNamespace

import hdispatch
import pytest
import torch
import toy
from hdispatch import runtime
from hdispatch.manifest import MANIFEST_NAME, SCHEMA_VERSION
from toy_bundles import ALL_FILES, changed, serves

pytestmark = pytest.mark.usefixtures("nothing_loaded")


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
def test_no_gpu_here(written):
    with pytest.raises(
        hdispatch.BundleError, match=r"no CUDA device here \(.+\); hdispatch.load\(DIR, driver='null'\) loads it"
    ):
        hdispatch.load(written)
    assert hdispatch.loaded() == []


def test_a_driver_that_there_is_not(written):
    with pytest.raises(hdispatch.HdispatchError, match="driver is 'rocm'; it takes 'cuda' or 'null'"):
        hdispatch.load(written, driver="rocm")


@pytest.mark.parametrize(
    ("major", "minor", "sms", "fits"), [(9, 0, 132, True), (9, 0, 114, False), (10, 0, 132, False), (9, 1, 132, False)]
)
def test_another_gpu(monkeypatch, written, major, minor, sms, fits):
    here = SimpleNamespace(
        name="Some GPU", major=major, minor=minor, multi_processor_count=sms, shared_memory_per_block_optin=232448
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: here)
    manifest = hdispatch.read_bundle(written)[0]
    if fits:
        runtime.check_target(written, manifest, 0)
        here.shared_memory_per_block_optin -= 1
        with pytest.raises(hdispatch.BundleError, match="built for 232448 bytes of shared memory per block; cuda:0 has 232447"):
            runtime.check_target(written, manifest, 0)
        return
    words = (
        r"manifest\.json: built for h200 \(sm_90a, 132 SMs\); "
        rf"cuda:0 is Some GPU \(compute capability {major}\.{minor}, {sms} SMs\)"
    )
    with pytest.raises(hdispatch.BundleError, match=words):
        runtime.check_target(written, manifest, 0)


def test_a_refused_bundle_of_many_modules_leaves_nothing(good, tmp_path):
    manifest = changed(lambda m: m["records"].append(toy.record(m_min=0)))
    manifest["rows"][-1]["record"] = 1
    toy.write(tmp_path / "bad", manifest)
    with pytest.raises(hdispatch.BundleError, match=r"valid for M in \[0, "):
        hdispatch.load(tmp_path / "bad", driver="null")
    assert hdispatch.loaded() == [good]
    assert serves()


def test_what_is_written_is_json_alone(written):
    assert json.loads((written / MANIFEST_NAME).read_text())["schema_version"] == SCHEMA_VERSION

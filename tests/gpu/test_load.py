"""Loading on a GPU: what the driver says about wrong code, and that a refused bundle leaves the one before in place."""

from __future__ import annotations

import hashlib
import json
import shutil

import hdispatch
import pytest
import torch
from hdispatch.manifest import CHECKSUM_NAME, MANIFEST_NAME

from .test_ops import OPS, make, run_and_check, typical_case


def rewrite(folder, change):
    """Change a bundle's manifest and make its checksum fit again."""
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    change(manifest)
    text = json.dumps(manifest).encode()
    (folder / MANIFEST_NAME).write_bytes(text)
    (folder / CHECKSUM_NAME).write_text(f"{hashlib.sha256(text).hexdigest()}  {MANIFEST_NAME}\n")


def wrong_code(folder, manifest):
    name = sorted(manifest["files"])[0]
    (folder / name).write_bytes(b"not a cubin" * 10)
    manifest["files"][name] = {"sha256": hashlib.sha256(b"not a cubin" * 10).hexdigest(), "size": 110}


def wrong_function(folder, manifest):
    next(iter(manifest["records"][0]["cubins"].values()))["function"] = "no_such_function"


def wrong_params(folder, manifest):
    param = next(p for p in manifest["records"][0]["params"] if p["kind"] == "ptr")
    param.pop("arg"), param.pop("align", None)
    param.update(kind="i32", value=[1])


def other_gpu(folder, manifest):
    manifest["target"].update(name="a100", arch="sm_80", compute_capability=[8, 0], sm_count=108)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (wrong_code, hdispatch.DriverError, "cuModuleLoadData failed with"),
        (wrong_function, hdispatch.DriverError, "CUDA_ERROR_NOT_FOUND"),
        (wrong_params, hdispatch.BundleError, "rebuild"),
        (other_gpu, hdispatch.BundleError, "built for a100"),
    ],
)
def test_refused_bundles_change_nothing(bundle, bundle_dir, tmp_path, change, error, words):
    folder = shutil.copytree(bundle_dir, tmp_path / "changed")
    rewrite(folder, lambda manifest: change(folder, manifest))
    with pytest.raises(error, match=words):
        hdispatch.load(folder)
    with hdispatch.strict():
        variant, sizes = typical_case(OPS[0])
        run_and_check(OPS[0], variant, make(OPS[0], variant, sizes, 7), "after a refused load")


def test_a_refused_load_leaves_the_thread_on_its_device(bundle_dir, tmp_path):
    """Also while the error, and with it everything that was on the way, is still held."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices, there is {torch.cuda.device_count()}")
    folder = shutil.copytree(bundle_dir, tmp_path / "changed")
    rewrite(folder, lambda manifest: wrong_function(folder, manifest))
    with torch.cuda.device(0):
        with pytest.raises(hdispatch.DriverError) as held:
            hdispatch.load(folder, device=1)
        assert torch.cuda.current_device() == 0
        assert torch.ones(4, device="cuda").device.index == 0
        assert "CUDA_ERROR_NOT_FOUND" in str(held.value)


def test_bundle_for_another_gpu_serves_the_null_driver(bundle_dir, tmp_path):
    folder = shutil.copytree(bundle_dir, tmp_path / "other")
    rewrite(folder, lambda manifest: other_gpu(folder, manifest))
    hdispatch.load(folder, driver="null").unload()


def test_launches_without_the_pdl_attribute(bundle_dir):
    loaded = hdispatch.load(bundle_dir, pdl=False)
    try:
        with hdispatch.strict():
            for op in OPS:
                variant, sizes = typical_case(op)
                run_and_check(op, variant, make(op, variant, sizes, 16), "no PDL")
    finally:
        loaded.unload()


def test_a_hundred_loads_keep_no_memory_of_the_gpu(bundle_dir):
    def free() -> int:
        torch.cuda.synchronize()
        return torch.cuda.mem_get_info()[0]

    for _ in range(2):  # what the driver keeps once
        hdispatch.load(bundle_dir).unload()
    before = free()
    for _ in range(100):
        hdispatch.load(bundle_dir).unload()
    assert before - free() <= 50e6

"""Memory of the runtime's that kernels get: declared, built, launched and found again, on the null driver."""

from __future__ import annotations

import dataclasses
import gc
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import hdispatch
import pytest
import torch
from counting_rows.spec import SPEC
from hdispatch import BundleError, HdispatchError, Key
from hdispatch.bundle_reader import read_bundle
from hdispatch.cli.main import main
from hdispatch.compile import build
from hdispatch.errors import BuildError
from hdispatch.manifest import MANIFEST_NAME
from hdispatch.opspec import WorkspaceArg
from hdispatch.testing import null
from toy import write_text

NAME = SPEC.name
OP = hdispatch.registry.define(SPEC) if NAME not in hdispatch.registry.names() else hdispatch.registry.get(NAME)
PLAIN, DOUBLED = 2**16 + 64 * 4 * 4 + 1024, 2**16 + 64 * 4 * 4
SUPPORT = Path(__file__).parents[1] / "support"


def arguments(m: int = 4, doubled: bool = False) -> list[Any]:
    generator = torch.Generator().manual_seed(m)
    return SPEC.sample(SPEC.variant("any+doubled" if doubled else "any"), {"M": m, "K": 64}, torch.device("cpu"), generator)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("workspace") / "bundle"
    build([NAME], "h200", out, cache=tmp_path_factory.mktemp("cache"), extra=["counting_rows"])
    return out


def addresses(*calls: list[Any]) -> list[tuple[int, int]]:
    """Of the counters and the parts, in each launch."""
    with null.recording():
        for args in calls:
            OP(*args)
    found = []
    for launch in null.launches():
        counters, parts = (int.from_bytes(param, "little") for param in launch["params"][2:4])
        found.append((counters, parts))
    return found


# ---- the declaration ----


def test_it_is_no_argument():
    assert SPEC.schema() == "counting_rows(Tensor(a!) out, Tensor x, bool doubled) -> ()"
    assert [SPEC.workspace_bytes(variant) for variant in SPEC.variants()] == [PLAIN, DOUBLED]
    assert SPEC.entry()["workspace"] == {"arg": "memory", "bytes": {"any": PLAIN, "any+doubled": DOUBLED}}
    (made,) = SPEC.make_workspace(SPEC.variants()[0], torch.device("cpu"))
    assert made is not None
    assert (made.dtype, made.shape, int(made.count_nonzero())) == (torch.uint8, (PLAIN,), 0)
    OP(*arguments())  # no table: the reference, which does not see it
    for door in (torch.ops.hdispatch.counting_rows, torch.ops.hdispatch.counting_rows.default):
        args = arguments()
        door(*args)
        assert torch.equal(args[0], args[1].sum(1, keepdim=True))


@pytest.mark.parametrize(
    ("workspace", "words"),
    [
        (WorkspaceArg("x", 8), "argument names repeat"),
        (WorkspaceArg("two words", 8), "is not a name"),
    ],
)
def test_refused_names(workspace, words):
    with pytest.raises(HdispatchError, match=words):
        dataclasses.replace(SPEC, workspace=workspace)


@pytest.mark.parametrize("size", [-1, 2**48, 1.5, "4"])
def test_refused_sizes(size):
    spec = dataclasses.replace(SPEC, name="odd_rows", workspace=WorkspaceArg("memory", lambda _: size))
    with pytest.raises(HdispatchError, match=r"odd_rows: memory of any is .* bytes; it takes 0 or more"):
        hdispatch.registry.define(spec)


# ---- launches ----


def test_every_launch_gets_the_block(bundle):
    found = addresses(*(arguments(m, doubled) for m in (1, 2, 15, 16, 17, 64) for doubled in (False, True)))
    assert len(set(found)) == 1
    counters, parts = found[0]
    assert (counters % 256, parts - counters) == (0, 2**16)
    assert hdispatch.stats()[NAME]["hits"] == 12
    words = hdispatch.explain(OP, *arguments())
    assert f"workspace {PLAIN} bytes of the stream's" in words


def test_it_outlives_tables(bundle, folder):
    (first,) = addresses(arguments())
    bundle.unload()
    gc.collect()
    other = hdispatch.load(folder, driver="null")
    try:
        assert addresses(arguments()) == [first]
    finally:
        other.unload()


def test_more_rows_than_it_is_for_run_the_reference(bundle):
    args = arguments(65)
    OP(*args)
    assert torch.equal(args[0], args[1].sum(1, keepdim=True))
    assert hdispatch.stats()[NAME]["misses"] == {"guard: 1 <= M <= 64": 1}


def test_a_function_uses_it(tmp_path):
    """A counter that every call leaves one higher: of one block, zero at first, on every thread."""
    cpp = pytest.importorskip("tvm_ffi.cpp")
    source = """
    int64_t count(tvm::ffi::TensorView out, tvm::ffi::TensorView x, bool doubled, tvm::ffi::TensorView memory) {
      if (memory.ndim() != 1 || memory.size(0) < 65536 + 1024) TVM_FFI_THROW(ValueError) << memory.size(0);
      int64_t* counter = static_cast<int64_t*>(memory.data_ptr()) + 100;
      static_cast<float*>(out.data_ptr())[0] = static_cast<float>(++*counter);
      return 0;
    }
    """
    module = cpp.load_inline("count", cpp_sources=source, functions=["count"], build_directory=str(tmp_path))
    made = [hdispatch.register(OP, Key(v.name, 64), module.count, driver="null", stream="none") for v in SPEC.variants()]
    try:
        seen: list[float] = []

        def run() -> None:
            for index in range(50):
                args = arguments(3, index % 2 == 1)
                OP(*args)
                seen.append(float(args[0][0, 0]))

        run()
        assert seen == [float(i) for i in range(1, 51)]
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert seen[50:] == [float(i) for i in range(51, 101)]
    finally:
        for each in made:
            each.unregister()
    block = next(iter(addresses()), None)
    assert block is None


def test_the_kernel_leaves_counters_at_zero():
    """In Triton's interpreter, twice on one memory."""
    code = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch
from counting_rows.spec import SPEC
from counting_rows.triton import launch
for variant in SPEC.variants():
    memory = SPEC.make_workspace(variant, torch.device("cpu"))
    for m in (1, 5, 64):
        args = SPEC.sample(variant, {"M": m, "K": 64}, torch.device("cpu"), torch.Generator().manual_seed(m))
        run = lambda kernel, grid, *given, **named: kernel[grid](*given, **named)
        launch(*args, *memory, config={"pdl": False}, _launcher=run)
        want = [torch.zeros(m, 1), *args[1:]]
        SPEC.reference(*want)
        torch.testing.assert_close(args[0], want[0])
        assert int(memory[0][:2**16].count_nonzero()) == 0
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=SUPPORT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- bundles ----


def test_the_manifest(folder, capsys):
    manifest, _ = read_bundle(folder)
    assert manifest["ops"][NAME]["workspace"]["bytes"] == {"any": PLAIN, "any+doubled": DOUBLED}
    params = manifest["records"][0]["params"]
    assert params[2] == {"kind": "ptr", "arg": "memory", "align": 16}
    assert params[3] == {"kind": "ptr", "arg": "memory", "align": 16, "offset": [2**16]}
    assert main(["inspect", str(folder), "--row", "0"]) == 0
    assert "ptr  memory + 65536 bytes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["ops"][NAME]["workspace"]["bytes"].update(any=1), "with other variants or arguments"),
        (lambda m: m["ops"][NAME].pop("workspace"), "with other variants or arguments"),
        (lambda m: m["ops"][NAME]["workspace"].update(arg="other"), "with other variants or arguments"),
        (lambda m: m["records"][0]["params"][2].update(arg="other"), 'counting_rows has no tensor argument "other"'),
        (lambda m: m["records"][0].update(early=["memory"]), 'reads "memory" early'),
    ],
)
def test_damaged_manifests(folder, tmp_path, change, words):
    import shutil

    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    manifest = json.loads((copy / MANIFEST_NAME).read_text())
    change(manifest)
    write_text(copy, json.dumps(manifest).encode())
    with pytest.raises(BundleError, match=words):
        hdispatch.load(copy, driver="null")


def test_it_is_not_read_early(monkeypatch, tmp_path):
    """A module that names it among its early reads is refused."""
    from hdispatch.compile import build_unit

    module = type(sys)("early")
    module.EARLY_READS = ("memory",)
    with pytest.raises(BuildError, match="takes a tuple of tensor arguments of counting_rows"):
        build_unit.early_reads(module, SPEC, SPEC.variants()[0])

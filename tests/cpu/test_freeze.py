"""Freezing: what a bundle holds, that it is whole or absent, and which builds are refused."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import forked
import pytest
import torch
from hdispatch import host
from hdispatch.bundle_reader import read_bundle
from hdispatch.compile import DESCRIBED, BuildReport, Selection, available_ops, build, ffi_link
from hdispatch.compile.freeze import Entry, freeze
from hdispatch.compile.store import Store
from hdispatch.errors import BuildError
from hdispatch.manifest import CHECKSUM_NAME, LIBRARY, MANIFEST_NAME
from hdispatch.opspec import OpSpec, TensorArg

SPEC = OpSpec(
    name="toy_freeze",
    args=(TensorArg("input", ("M", "K"), (torch.float32, torch.float16)),),
    reference=lambda *_args: None,
    sample=lambda *_args: [],
    shapes=({"K": 64}, {"K": 128}),
    config_key={"width": "K", "rows": "M"},
    ladder=(1, 16, 256),
)
SPECS = {SPEC.name: SPEC}
FUNCTIONS = Path(__file__).parents[1] / "core" / "ffi_functions.c"
H200 = DESCRIBED["h200"]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "cache")


def entries(store: Store) -> list[Entry]:
    """All rows of the toy op, one record per variant and shape."""

    def record(data: bytes):
        code = {"function": "f", "params": [], "num_warps": 1, "shared_bytes": 0, "cluster": [1, 1, 1]}
        cubin = {**code, "cooperative": False, "pdl": False, "file": store.put_blob(data)}
        bounds = {"m_min": 1, "m_max": 2**20}
        fields = {
            "launcher": "cubin",
            "backend": "triton",
            "kernel": "f",
            "config": {},
            **bounds,
            "grid": [["M"], [1], [1]],
            "params": [],
            "guards": [],
        }
        return {**fields, "cubins": dict.fromkeys(("one", "mult16", "other"), cubin)}

    tools = {"triton": "3.7.1"}
    return [
        Entry(SPEC.name, variant.name, shape, (0, 1, 2), record(f"{variant.name}{shape}".encode()), tools, 0.25)
        for variant in SPEC.variants()
        for shape in SPEC.shapes
    ]


def test_a_bundle_is_complete_and_reads_back(tmp_path, store):
    frozen = freeze(SPECS, entries(store), H200, store, tmp_path / "out")
    manifest, contents = read_bundle(tmp_path / "out")
    assert manifest == frozen.manifest
    assert sorted(contents) == sorted(manifest["files"])
    assert len(contents) == 4
    assert manifest["target"]["arch"] == "sm_90a"
    assert manifest["tools"] == {"triton": "3.7.1"}
    assert len(manifest["rows"]) == 2 * 2 * 3
    assert manifest["rows"][0] == {
        "op": "toy_freeze",
        "variant": "float16",
        "K": 64,
        "N": 0,
        "bucket": 0,
        "record": 0,
        "build_seconds": 0.25,
        "bytes": len("float16{'K': 64}"),
    }
    assert manifest["ops"]["toy_freeze"]["variants"]["float32"] == {"input": "float32"}
    on_disk = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert frozen.bytes == sum(path.stat().st_size for path in on_disk)
    assert len(on_disk) == 2 + 4
    text = (tmp_path / "out" / MANIFEST_NAME).read_text()
    assert text == json.dumps(manifest, sort_keys=True, indent=1, ensure_ascii=True) + "\n"
    assert (tmp_path / "out" / CHECKSUM_NAME).read_text().endswith(f"  {MANIFEST_NAME}\n")


def test_the_order_of_the_build_does_not_matter(tmp_path, store):
    freeze(SPECS, entries(store), H200, store, tmp_path / "a")
    freeze(SPECS, entries(store)[::-1], H200, store, tmp_path / "b")
    assert (tmp_path / "a" / MANIFEST_NAME).read_bytes() == (tmp_path / "b" / MANIFEST_NAME).read_bytes()


# ---- host functions ----


def host_function(store: Store, entry: Entry, name: str, tmp_path: Path) -> Entry:
    """The entry with a host function in the place of its cubins, from an object file as a backend leaves it in the store."""
    file = tmp_path / f"{name}.o"
    names = {"__tvm_ffi_count": f"__tvm_ffi_{name}"}
    names |= {each: f"{each}_of_{name}" for each in ("__tvm_ffi_broken", "__tvm_ffi_bare")}
    for end in ("cuda_init", "cuda_load_to_device"):
        names[f"__cute_internal_count_{end}"] = f"__cute_internal_{name}_{end}"
        names[f"__cute_internal_broken_{end}"] = f"__cute_internal_broken_of_{name}_{end}"
    defines = [f"-D{old}={new}" for old, new in names.items()]
    subprocess.run([*ffi_link.compiler(), "-c", "-fPIC", *defines, str(FUNCTIONS), "-o", str(file)], check=True)
    head = {name: entry.record[name] for name in ("kernel", "m_min", "m_max", "guards")}
    code = {"file": store.put_blob(file.read_bytes()), "function": name, "args": [], "pdl": True, "env_stream": False}
    record = {**head, "launcher": "tvm_ffi", "backend": "cutedsl", "config": {"name": name}, **code}
    return replace(entry, record=record)


def test_host_functions_become_one_library(tmp_path, store, monkeypatch):
    monkeypatch.setattr(ffi_link, "runtime_archive", lambda: None)  # these objects need no CUDA
    given = entries(store)
    given[1] = host_function(store, given[1], "first", tmp_path)
    given[2] = host_function(store, given[2], "second", tmp_path)
    frozen = freeze(SPECS, given, H200, store, tmp_path / "out")
    manifest, contents = read_bundle(tmp_path / "out")
    assert manifest == frozen.manifest
    assert sorted(name.endswith(".cubin") for name in contents) == [False, True, True]
    assert manifest["host"] == host.describe()
    functions = [record for record in manifest["records"] if record["launcher"] == "tvm_ffi"]
    assert {record["function"] for record in functions} == {"first", "second"}
    assert {record["file"] for record in functions} == {LIBRARY}
    sizes = {(tmp_path / f"{name}.o").stat().st_size for name in ("first", "second")}
    assert {row["bytes"] for row in manifest["rows"] if manifest["records"][row["record"]] in functions} == sizes
    library = ctypes.CDLL(str(tmp_path / "out" / LIBRARY))
    assert library.hdispatch_ffi_version() == 1
    module = ctypes.c_void_p()
    for name in (b"first", b"second"):
        assert library.hdispatch_ffi_prepare(ctypes.c_void_p(library._handle), name, 0, ctypes.byref(module)) == 0
    freeze(SPECS, given[::-1], H200, store, tmp_path / "again")
    assert read_bundle(tmp_path / "again") == (manifest, contents)


def test_objects_that_do_not_link(tmp_path, store, monkeypatch):
    monkeypatch.setattr(ffi_link, "runtime_archive", lambda: None)
    first = host_function(store, entries(store)[1], "first", tmp_path)
    with pytest.raises(BuildError, match="multiple definition"):
        ffi_link.link({"a": store.blob(first.record["file"]), "b": store.blob(first.record["file"])})
    monkeypatch.setenv("CC", "no-such-compiler -x")
    with pytest.raises(BuildError, match="no-such-compiler cannot be run"):
        ffi_link.link({"a": b""})


def test_without_a_host_function_there_is_no_library(tmp_path, store):
    manifest = freeze(SPECS, entries(store), H200, store, tmp_path / "out").manifest
    assert LIBRARY not in manifest["files"]
    assert "host" not in manifest


# ---- what is refused ----


def change(entry: Entry, **fields) -> Entry:
    return replace(entry, record={**entry.record, **fields})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda e: e[1:], "gap: no record serves toy_freeze float32 K=64 N=0 bucket 0"),
        (lambda e: [replace(e[0], buckets=(0, 2)), *e[1:]], "gap: no record serves toy_freeze float32 K=64 N=0 bucket 1"),
        (lambda e: [*e, e[0]], "two records serve toy_freeze float32 K=64 N=0 bucket 0"),
        (lambda e: [change(e[0], m_min=2), *e[1:]], "bucket 0 holds M from 1 to 1, its record is valid for 2 to 1048576 only"),
        (
            lambda e: [change(e[0], m_max=8192), *e[1:]],
            "bucket 2 holds M from 17 to any, its record is valid for 1 to 8192 only",
        ),
        (
            lambda e: [change(e[0], cubins={"one": e[0].record["cubins"]["one"]}), *e[1:]],
            r"bucket 1 holds M = 2, its record has code for the classes \['one'\] only",
        ),
        (
            lambda e: [replace(e[0], tools={"triton": "3.6.0"}), *e[1:]],
            "records were built with triton 3.7.1 and 3.6.0|3.6.0 and 3.7.1",
        ),
        (
            lambda e: [
                change(e[0], cubins={c: {**code, "file": "ab" * 32} for c, code in e[0].record["cubins"].items()}),
                *e[1:],
            ],
            "artifact abab.* is missing or damaged in the cache",
        ),
    ],
)
def test_what_is_refused(tmp_path, store, spoil, message):
    with pytest.raises(BuildError, match=message):
        freeze(SPECS, spoil(entries(store)), H200, store, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_part_can_be_frozen_if_asked_for(tmp_path, store):
    frozen = freeze(SPECS, entries(store)[1:], H200, store, tmp_path / "out", partial=True)
    assert len(frozen.manifest["rows"]) == 9


def test_a_bundle_in_the_way_is_replaced(tmp_path, store):
    first = freeze(SPECS, entries(store)[1:], H200, store, tmp_path / "out", partial=True)
    second = freeze(SPECS, entries(store), H200, store, tmp_path / "out")
    assert read_bundle(tmp_path / "out", sha256=second.sha256)[0] == second.manifest != first.manifest
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["artifacts", MANIFEST_NAME, CHECKSUM_NAME]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out"]


def test_files_beside_the_manifest_come_with_it(tmp_path, store):
    frozen = freeze(SPECS, entries(store), H200, store, tmp_path / "out", beside=lambda _, sha256: {"x": sha256.encode()})
    assert (tmp_path / "out" / "x").read_text() == frozen.sha256


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[BuildReport, Path]:
    """The plain Triton example, whole."""
    folder = tmp_path_factory.mktemp("built")
    return example(folder / "a", folder / "cache"), folder


def example(out: Path, cache: Path, **options) -> BuildReport:
    return build(["triton_example"], "h200", out, cache=cache, extra=["triton_example"], **options)


def test_a_build_of_plain_triton(built):
    report, folder = built
    manifest, _ = read_bundle(folder / "a")
    assert (report.rows, report.records, report.cubins) == (12, 8, len(manifest["files"]))
    assert report.bytes > sum(entry["size"] for entry in manifest["files"].values())
    assert (report.cache_hits, len(report.record_seconds), report.notes) == (0, 8, [])
    record = manifest["records"][manifest["rows"][0]["record"]]
    assert record["config"] == {"ROWS": 4, "num_warps": 2}
    assert record["grid"] == [["M", 3, "+", 4, "//"], [1], [1]]
    assert record["params"][1] == {"kind": "ptr", "arg": "input", "align": 16, "offset": [8 * 4]}
    # Rows of 72 elements are no multiple of 16 when they are contiguous, so the code does not assume it; of 1008 they are.
    guards = {row["K"]: manifest["records"][row["record"]]["guards"] for row in manifest["rows"]}
    assert [guard["text"] for guard in guards[64]] == ["M * input.stride(0) <= 2147483647"]
    assert [guard["text"] for guard in guards[1000]] == ["input.stride(0) % 16 == 0", "M * input.stride(0) <= 2147483647"]
    assert {"torch", "triton", "ptxas"} == set(manifest["tools"])


def test_a_warm_build_is_byte_identical(built):
    _, folder = built
    seen = []
    report = example(folder / "b", folder / "cache", progress=lambda *args: seen.append(args))
    assert report.cache_hits == report.records == 8
    assert seen == [(8, 8, "from the cache")]
    assert (folder / "a" / MANIFEST_NAME).read_bytes() == (folder / "b" / MANIFEST_NAME).read_bytes()


def test_a_cold_build_differs_in_seconds_only(built, monkeypatch):
    """Nor do environment variables that change what Triton and Helion generate reach the code."""
    _, folder = built
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("HELION_INTERPRET", "1")
    monkeypatch.setenv("DISABLE_PTXAS_OPT", "1")
    seen = []
    example(folder / "c", folder / "other cache", progress=lambda *args: seen.append(args), jobs=1)
    first, *rest = seen
    assert first == (0, 8, "compiling in 1 process: triton_example any K=64 N=72 buckets 0-1")
    assert [done for done, _, _ in rest] == list(range(1, 9))
    assert all(total == 8 and label.startswith("triton_example any") for _, total, label in rest)
    manifests = [read_bundle(folder / name)[0] for name in ("a", "c")]
    for manifest in manifests:
        for row in manifest["rows"]:
            assert row["build_seconds"] > 0
            row["build_seconds"] = 0.0
    assert manifests[0] == manifests[1]


def test_another_gpu_is_another_build(built):
    _, folder = built
    report = example(folder / "d", folder / "cache", select=Selection(buckets=lambda _spec: [1]), jobs=1)
    assert report.rows == 4
    one = Selection(shapes=lambda spec: spec.shapes[:1], variants=lambda _spec: ["any"], buckets=lambda _spec: [1])
    report = build(["triton_example"], "a100", folder / "e", cache=folder / "cache", extra=["triton_example"], select=one)
    assert (report.rows, report.cache_hits) == (1, 0)
    assert any("no configs for a100" in note for note in report.notes)
    assert read_bundle(folder / "e")[0]["target"]["arch"] == "sm_80"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ops": ["nonsense"], "target": "h200"}, "no op 'nonsense'; there are"),
        ({"ops": [], "target": "h200"}, "no ops to build"),
        ({"ops": None, "target": "h200", "jobs": 0}, "jobs is 0; it takes at least 1"),
        ({"ops": None, "target": "h300"}, r"no target 'h300'; described targets are \['a100', 'b200', 'h100', 'h200'\]"),
    ],
)
def test_bad_requests(tmp_path, arguments, message):
    with pytest.raises(BuildError, match=message):
        build(out=tmp_path / "out", cache=tmp_path / "cache", **arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_native_needs_a_gpu(tmp_path):
    with pytest.raises(BuildError, match="torch sees no CUDA device"):
        build(None, "native", tmp_path / "out")


def write_op(folder: Path, kernel: str) -> str:
    """A package with a broken kernel beside the example's spec; its name."""
    package = folder / "broken_op"
    (package / "configs").mkdir(parents=True)
    source = Path(__file__).parents[1] / "support" / "triton_example"
    (package / "__init__.py").write_text("")
    (package / "spec.py").write_text((source / "spec.py").read_text().replace('name="triton_example"', 'name="broken_op"'))
    (package / "triton.py").write_text(kernel)
    (package / "configs" / "nvidia_h200.json").write_text('[{"key": {}, "config": {}}]')
    return "broken_op"


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (
            "def launch(*args, config, _launcher):\n    args[0].zero_()\n",
            "broken_op any.* buckets 0-2: .*runs aten.zero_",
        ),
        ("raise ValueError('no luck')", "ValueError: no luck"),
        (
            "import os, sys; print('last words', file=sys.stderr, flush=True); os.abort()",
            "ended with status -6; it said:\\s.*last words",
        ),
    ],
)
def test_a_failure_names_the_record_and_leaves_nothing(tmp_path, kernel, message):
    """In a process of its own, because modules stay imported."""
    package = write_op(tmp_path, kernel)
    program = (
        f"import sys; sys.path.append({str(tmp_path)!r})\n"
        "from pathlib import Path\n"
        "from hdispatch.compile import build\n"
        "from hdispatch.errors import BuildError\n"
        "try:\n"
        f"    here = Path({str(tmp_path)!r})\n"
        f"    build([{package!r}], 'h200', here / 'out', cache=here / 'cache', extra=[{package!r}])\n"
        "except BuildError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        forked.python("-P", "-c", forked.COMPILING + program), capture_output=True, text=True, check=True, timeout=120
    )
    assert re.search(message, done.stdout, re.DOTALL), done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


def test_the_installed_ops_are_known():
    before = dict(os.environ)
    assert "rms_norm_dynamic_per_token_quant" in available_ops()
    assert dict(os.environ) == before

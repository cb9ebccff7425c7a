"""TMA descriptors that a host function makes: against Triton's own encoder, through the null driver, and what is refused."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import hdispatch
import pytest
import tma_copy.spec
import tma_matmul.spec
import torch
from hdispatch.bundle_reader import read_bundle
from hdispatch.compile import build
from hdispatch.manifest import CHECKSUM_NAME, MANIFEST_NAME, TENSOR_MAP_TYPES, Manifest
from hdispatch.testing import null
from in_worker import InWorker

pytestmark = pytest.mark.slow

PACKAGES = ("tma_copy", "tma_matmul")
PAGE = 2**20  # tensor_maps.PAGE, which only the worker can import
COPY = {"K": 192, "N": 200}

for module in (tma_copy.spec, tma_matmul.spec):
    if module.SPEC.name not in hdispatch.registry.names():
        hdispatch.registry.define(module.SPEC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "h200"
    build(PACKAGES, "h200", out, extra=PACKAGES)
    return out


@pytest.fixture(scope="module")
def manifest(folder) -> Manifest:
    return read_bundle(folder)[0]


@pytest.fixture
def loaded(folder):
    bundle = hdispatch.load(folder, driver="null")
    hdispatch.stats(reset=True)
    yield bundle
    bundle.unload()


@pytest.fixture(scope="module")
def worker():
    process = InWorker()
    yield process
    process.close()


def copy_arguments(m: int, shape: dict[str, int], padding: int = 0) -> list[torch.Tensor]:
    whole = torch.zeros(m, shape["N"] + padding, dtype=torch.bfloat16)
    return [torch.zeros(m, shape["K"], dtype=torch.bfloat16), whole[:, : shape["N"]]]


def matmul_arguments(m: int, shape: dict[str, int], padding: int = 0) -> list[torch.Tensor]:
    k, n = shape["K"], shape["N"]
    rows, columns = (torch.zeros(size, k + padding, dtype=torch.bfloat16)[:, :k] for size in (m, n))
    return [torch.zeros(m, n, dtype=torch.bfloat16), rows, columns.t()]


def launched(op: str, args: list[torch.Tensor]) -> dict[str, Any]:
    with hdispatch.strict(), null.recording(), torch.inference_mode():
        getattr(hdispatch.ops, op)(*args)
    (launch,) = null.launches()
    return launch


def test_a_record_holds_maps_and_what_follows_them(manifest):
    record = next(r for r in manifest["records"] if r["kernel"] == "tma_matmul.triton")
    kinds = [param["kind"] for param in record["params"]]
    assert kinds == [*["tensor_map", "i32", "i32", "i64", "i64"] * 3, "i32"]
    maps = [param for param in record["params"] if param["kind"] == "tensor_map"]
    assert [param["arg"] for param in maps] == ["result", "input", "weight"]
    assert [param["map"]["shape"] for param in maps] == [[["M"], ["N"]], [["M"], ["K"]], [["N"], ["K"]]]
    assert [param["map"]["strides"] for param in maps] == [[["N"]], [["input.stride(0)"]], [["weight.stride(1)"]]]
    # The block of the result is 64 x 128; Triton stores it in two halves.
    assert [param["map"]["box"] for param in maps] == [[64, 64], [64, 64], [128, 64]]
    assert {param["map"]["type"] for param in maps} == {"bfloat16"}
    # A descriptor's numbers are never compiled in, so all Ms share the code.
    assert len({cubin["file"] for cubin in record["cubins"].values()}) == 1
    assert set(record["cubins"]) == {"one", "mult16", "other"}


@pytest.mark.parametrize(
    ("op", "shapes", "arguments"),
    [
        ("tma_copy", [COPY, {"K": 1000, "N": 1008}], copy_arguments),
        ("tma_matmul", [{"K": 256, "N": 128}, {"K": 512, "N": 384}, {"K": 64, "N": 1000}], matmul_arguments),
    ],
)
def test_the_driver_gets_what_tritons_launcher_would_give_it(worker, manifest, loaded, op, shapes, arguments):
    for shape in shapes:
        ms = [(1, 0)] + [(m, padding) for m in (2, 16, 33, 300) for padding in (0, 16)]  # one row's stride means nothing
        record = next(r for r in manifest["records"] if r["kernel"] == f"{op}.triton")
        # tma_matmul has one record for every K and N.
        known, other = (shape, {}) if op == "tma_copy" else ({}, shape)
        calls = [[m, padding, other] for m, padding in ms]
        expected = worker.call("tensor_maps:encoded", op, "any", known, record["config"], calls)
        for (m, padding), descriptors in zip(ms, expected, strict=True):
            args = arguments(m, shape, padding)
            params = list(launched(op, args)["params"])
            for (address, swizzle, itemsize, kind, box, sizes, strides, fill), rest in descriptors:
                tensor = args[address // PAGE - 1]
                assert null.tensor_map(params.pop(0)) == {
                    "address": tensor.data_ptr() + address % PAGE,
                    "shape": sizes,
                    "strides": [itemsize * stride for stride in strides[:-1]],
                    "box": box,
                    "type": TENSOR_MAP_TYPES[kind],
                    "swizzle": (0, 32, 64, 128)[swizzle],
                    "fill": ("zero", "nan")[fill],
                }, (shape, m, padding)
                widths = [4] * len(sizes) + [8] * len(strides)
                passed = [value.to_bytes(width, "little") for value, width in zip(rest, widths, strict=True)]
                assert [params.pop(0) for _ in rest] == passed, (shape, m, padding)
            assert params[-2:] == [bytes(8), bytes(8)]
            assert len(params) == (2 if op == "tma_copy" else 3)


def test_the_same_pointer_with_another_shape_is_another_map(loaded):
    memory = torch.zeros(64 * 208, dtype=torch.bfloat16)
    result = torch.zeros(64 * 192, dtype=torch.bfloat16)
    for _ in range(3):
        for m, stride in ((64, 200), (7, 200), (64, 208), (1, 200), (7, 208)):
            args = [result[: m * 192].view(m, 192), memory.as_strided((m, 200), (stride, 1))]
            found = null.tensor_map(launched("tma_copy", args)["params"][5])
            wanted = 400 if m == 1 else 2 * stride
            assert (found["address"], found["shape"], found["strides"]) == (memory.data_ptr() + 16, [m, 192], [wanted])


@pytest.mark.parametrize(
    ("op", "args", "reason"),
    [
        ("tma_copy", lambda: [copy_arguments(7, COPY)[0], torch.zeros(7 * 200 + 4).bfloat16()[4:].view(7, 200)], "aligned"),
        ("tma_copy", lambda: copy_arguments(7, COPY, 1), "input fits a TMA descriptor"),
        ("tma_copy", lambda: copy_arguments(7, COPY, 4), "input fits a TMA descriptor"),
        ("tma_matmul", lambda: matmul_arguments(7, {"K": 64, "N": 100}), "result fits a TMA descriptor"),
        ("tma_matmul", lambda: matmul_arguments(7, {"K": 72, "N": 128}), "K % 16 == 0"),
        ("tma_matmul", lambda: matmul_arguments(7, {"K": 64, "N": 128}, 3), "input fits a TMA descriptor"),
    ],
)
def test_what_tma_cannot_read_runs_the_reference(loaded, op, args, reason):
    given = args()
    for tensor in given[1:]:
        tensor.fill_(1)
    wanted = [torch.empty_like(given[0]), *given[1:]]
    hdispatch.registry.spec(op).reference(*wanted)
    getattr(hdispatch.ops, op)(*given)
    assert torch.equal(given[0], wanted[0])
    counted = hdispatch.stats()[op]
    assert (counted["hits"], counted["fallbacks"]) == (0, 1)
    assert [why for why in counted["misses"] if reason in why], counted
    with hdispatch.strict(), pytest.raises(hdispatch.MissError, match=re.escape(reason)):
        getattr(hdispatch.ops, op)(*given)


def test_a_refusal_says_the_numbers(loaded):
    args = copy_arguments(7, COPY, 1)
    words = hdispatch.explain(hdispatch.ops.tma_copy, *args)
    address = args[1].data_ptr() + 16
    assert f"address {address:#x}, sizes [7, 192], strides [201, 1] of 2-byte elements; it takes sizes from 1 to 2^32" in words


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda map: map.update(type="int4"), 'TMA descriptor of "int4", which is no type'),
        (lambda map: map.update(box=[32]), "2 sizes, 1 strides and a box of 1"),
        (lambda map: map.update(swizzle=48), "a swizzle of 48 bytes"),
        (lambda map: map.update(fill="one"), "map.fill"),
        (lambda map: map.pop("shape"), "map.shape is missing"),
        (lambda map: map.update(strides=[["other.stride(0)"]]), 'the op has no tensor "other"'),
        (lambda map: map.update(shape=[["input.size(2)"], [192]]), "reads dimension 2 of input, which has rank 2"),
    ],
)
def test_wrong_maps_are_refused_when_they_are_loaded(folder, tmp_path, change, words):
    changed = shutil.copytree(folder, tmp_path / "changed")
    content = json.loads((changed / MANIFEST_NAME).read_text())
    change(next(r for r in content["records"] if r["kernel"] == "tma_copy.triton")["params"][5]["map"])
    text = json.dumps(content).encode()
    (changed / MANIFEST_NAME).write_bytes(text)
    (changed / CHECKSUM_NAME).write_text(f"{hashlib.sha256(text).hexdigest()}  {MANIFEST_NAME}\n")
    with pytest.raises(hdispatch.BundleError, match=re.escape(words)):
        hdispatch.load(changed, driver="null")


def test_helions_host_made_descriptors(worker, tmp_path):
    record = worker.call("tensor_maps:helion_record", str(tmp_path))
    assert (record["m_min"], record["m_max"]) == (16, 31)
    maps = {param["arg"]: param["map"] for param in record["params"] if param["kind"] == "tensor_map"}
    same = {"type": "float32", "box": [16, 32], "swizzle": 128, "fill": "zero", "shape": [["M"], [64]]}
    assert maps == {"input": {**same, "strides": [["input.stride(0)"]]}, "result": {**same, "strides": [[64]]}}


def test_both_sides_name_the_types_alike():
    text = (Path(__file__).parents[2] / "csrc" / "record.h").read_text()
    names = re.search(r"kTensorMapTypeNames = \{(.*?)\}", text, re.DOTALL)
    assert names
    assert tuple(re.findall(r'"(\w+)"', names[1])) == TENSOR_MAP_TYPES

"""Sizes A and B, which no row has in its key: checked against one another, traced, and served whatever they are."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import hdispatch
import pytest
import torch
from batched_matmul.spec import SPEC
from fake_device import FakeDevice
from hdispatch import HdispatchError
from hdispatch.bundle_reader import read_bundle
from hdispatch.compile import build, op_package
from hdispatch.testing import null
from hdispatch.tune import collect, measure, select, timings

NAME = SPEC.name
if NAME not in hdispatch.registry.names():
    hdispatch.registry.define(SPEC)
OP = hdispatch.ops.batched_matmul


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sizes")
    build([NAME], "h200", folder / "bundle", cache=folder / "cache", extra=[NAME], jobs=1)
    return folder


@pytest.fixture
def loaded(work):
    bundle = hdispatch.load(work / "bundle", driver="null")
    yield bundle
    bundle.unload()


def arguments(a: int, b: int, m: int, k: int, n: int) -> list[torch.Tensor]:
    sizes = {"A": a, "B": b, "M": m, "K": k, "N": n}
    return SPEC.sample(SPEC.variants()[0], sizes, torch.device("cpu"), torch.Generator().manual_seed(0))[:3]


def test_one_row_per_bucket_serves_every_size(work, loaded):
    manifest, _ = read_bundle(work / "bundle")
    assert [(row["K"], row["N"], row["bucket"]) for row in manifest["rows"]] == [(0, 0, bucket) for bucket in range(3)]
    for a, b, m, k, n in itertools.product((1, 2, 7, 16), (1, 5, 16), (1, 3, 16, 17), (16, 48), (16, 64)):
        given = [torch.empty(a, m, k), torch.empty(a, k, n), torch.empty(b)]
        with hdispatch.strict(), null.recording():
            out = OP(*given)
            (launch,) = null.launches()
        assert out.shape == (a, m, n)
        assert launch["grid"] == ((m + 15) // 16, (n + 31) // 32, a)
        pointers = [int.from_bytes(param, "little") for param in launch["params"][:4]]
        assert pointers == [*(each.data_ptr() for each in given), out.data_ptr()]
        sizes = [int.from_bytes(param, "little") for param in launch["params"][4:-2]]
        assert sizes == ([m, n, k, b] if m > 1 else [n, k, b]), "M = 1 is compiled in, A and B never are"


def test_no_batches_are_the_fallbacks(loaded):
    assert OP(*arguments(0, 2, 4, 16, 16)).shape == (0, 4, 16)
    assert "guard" in str(hdispatch.stats(reset=True)[NAME]["misses"])


def test_the_fallback_is_right_and_sizes_are_checked():
    given = arguments(3, 4, 5, 6, 7)
    torch.testing.assert_close(OP(*given), given[0] @ given[1] * given[2].sum(), rtol=1e-4, atol=1e-4)
    with pytest.raises(hdispatch.ArgumentError, match=r"y has size\(0\) = 2; it takes 3 \(\[A, K, N\] with A = 3\)"):
        OP(given[0], given[1][:2], given[2])
    assert "A=3 B=4" in hdispatch.explain(OP, *given)


def test_they_are_no_part_of_keys():
    with pytest.raises(HdispatchError, match=r"config_key names \['A'\]"):
        dataclasses.replace(SPEC, config_key={"rows": "M", "batches": "A"})
    x, y, weights, out = SPEC.args
    half = dataclasses.replace(weights, dims=("B/2",))
    with pytest.raises(HdispatchError, match=r"no tensor carries the sizes \['B'\] plainly"):
        dataclasses.replace(SPEC, args=(x, y, half, out))


def test_tuned(work, tmp_path, monkeypatch):
    monkeypatch.setattr("hdispatch.compile.op_package.config_folder", lambda _: tmp_path)
    report = collect.collect([NAME], "h200", work / "candidates", cache=work / "cache", extra=[NAME], jobs=1)
    assert report.ops[NAME].cells == 3
    packages = op_package.find([NAME], [NAME])
    done = measure.measure(work / "candidates", tmp_path / "times.jsonl", device=FakeDevice(lambda _: 1.0))
    assert (done.measured, done.failures) == (3, [])
    select.select(timings.read(tmp_path / "times.jsonl", select.refusal(packages)), packages)
    assert (tmp_path / "nvidia_h200.json").is_file()

"""Measuring candidates on the GPU when one of them never ends: a kernel that spins costs its process, and nothing else."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import hdispatch
import pytest
import torch
from hdispatch.tune import measure, measure_process, timings

SPEC = """
import torch
from hdispatch.opspec import OpSpec, TensorArg
def reference(result, x):
    result.copy_(x * 2)
def sample(variant, sizes, device, generator):
    shape = sizes["M"], sizes["K"]
    return [torch.full(shape, 7.0, device=device), torch.randn(shape, generator=generator, device=device)]
SPEC = OpSpec(
    name="spins",
    args=(TensorArg("result", ("M", "K"), (torch.float32,), mutated=True), TensorArg("x", ("M", "K"), (torch.float32,))),
    reference=reference, sample=sample, shapes=({"K": 64},), config_key={"width": "K", "rows": "M"}, ladder=(1, 16),
)
"""

#: With SPIN a kernel loads until what it loads is NaN, which random numbers are not.
KERNEL = """
import triton
import triton.language as tl

@triton.jit
def kernel(result, x, elements, SIZE: tl.constexpr, SPIN: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    if SPIN:
        seen = tl.load(x, volatile=True)
        while seen == seen:
            seen = tl.load(x, volatile=True)
    tl.store(result + at, tl.load(x + at, at < elements) * 2, at < elements)

def launch(result, x, *, config, _launcher):
    elements = x.size(0) * x.size(1)
    size = config["size"]
    grid = ((elements + size - 1) // size,)
    _launcher(kernel, grid, result, x, elements, SIZE=size, SPIN=config["spin"], num_warps=1)

def candidates(sizes, variant):
    return [{"size": 64, "spin": 0}, {"size": 128, "spin": 1}, {"size": 256, "spin": 0}]
"""

WORKER = """
import sys
sys.path.insert(0, {folder!r})
import hdispatch
from spins.spec import SPEC
hdispatch.registry.define(SPEC)
from hdispatch.tune.measure_worker import main
main()
"""

#: Seconds for a step; and until a spinning kernel, its process and the next one's start must be over.
TIMEOUT, ALL = 15.0, 180.0


def make(folder: Path, target: str) -> Path:
    """The bundle of candidates, one of which spins."""
    from hdispatch.tune import collect

    (folder / "spins").mkdir()
    for name, text in (("__init__", ""), ("spec", SPEC), ("triton", KERNEL)):
        (folder / "spins" / f"{name}.py").write_text(text)
    collect.collect(["spins"], target, folder / "cand", extra=["spins"], cache=folder / "cache")
    return folder / "cand"


def test_a_kernel_that_never_ends_costs_its_process_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    bundle, out = make(tmp_path, "native"), tmp_path / "t.jsonl"
    if "spins" not in hdispatch.registry.names():
        hdispatch.registry.define(sys.modules["spins.spec"].SPEC)
    monkeypatch.setattr(measure_process, "COMMAND", ("-P", "-c", WORKER.format(folder=str(tmp_path))))
    start = time.monotonic()
    report = measure.measure(bundle, out, measure.Options(timeout=TIMEOUT))
    assert time.monotonic() - start < ALL
    assert (report.measured, report.left, len(report.failures)) == (2, 0, 1)
    assert "is timeout: it had not ended after 15 s; its process was ended" in report.failures[0]
    found = [(each["M"], each["config"]["size"], each["status"], "us" in each) for each in timings.read(out)]
    assert found == [
        (1, 128, "timeout", False),
        (1, 64, "ok", True),
        (1, 256, "ok", True),
        (16, 64, "ok", True),
        (16, 256, "ok", True),
    ]
    x = torch.randn(1000, device="cuda")
    assert torch.equal((x + x).cpu(), x.cpu() * 2), "this process has its own context, and the GPU is free"
    again = measure.measure(bundle, out, measure.Options(timeout=TIMEOUT))
    assert (again.measured, again.before) == (0, 2)


@pytest.mark.parametrize("op", ["silu_and_mul"])
def test_a_process_of_its_own_measures_an_installed_op(tmp_path, op):
    from hdispatch.tune import collect
    from hdispatch.tune.points import Scope

    scope = Scope(shapes=lambda spec: [spec.shapes[0]], buckets=lambda _spec: [0, 4], radius=-1, spread=0)
    collect.collect([op], "native", tmp_path / "cand", scope=scope)
    report = measure.measure(tmp_path / "cand", tmp_path / "t.jsonl")
    assert (report.measured, report.left, report.failures) == (2, 0, [])
    lines = timings.read(tmp_path / "t.jsonl")
    assert {line["status"] for line in lines} == {"ok"}
    assert {line["gpu"] for line in lines} == {torch.cuda.get_device_name()}
    card = lines[0]["card"]
    assert card["sms"] == torch.cuda.get_device_properties().multi_processor_count
    assert card["sm_mhz"] > 100
    assert card["power_w"] > 30
    assert all(0.5 < line["us"] < 1000 for line in lines)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("how", ["here", "ray"])
def test_all_gpus_measure_at_once(tmp_path, how):
    """Every cell once, with the same candidates right; no worker left out or lost."""
    from hdispatch.tune import collect
    from hdispatch.tune.farm import LocalFarm
    from hdispatch.tune.points import Scope

    if how == "ray":
        pytest.importorskip("ray")
        from hdispatch.tune.farm_ray import RayFarm
    collect.collect(["rms_norm"], "native", tmp_path / "cand", scope=Scope(radius=-1, spread=0))
    gpus = torch.cuda.device_count()
    farm = LocalFarm(gpus) if how == "here" else RayFarm("local", gpus)
    said: list[str] = []
    report = measure.measure(tmp_path / "cand", tmp_path / "t.jsonl", farm=farm, say=said.append)
    assert len(said) == gpus
    assert (report.left, report.failures, report.notes) == (0, [], [])
    lines = timings.read(tmp_path / "t.jsonl")
    assert len((tmp_path / "t.jsonl").read_text().splitlines()) == len(lines)
    assert {line["status"] for line in lines} == {"ok"}

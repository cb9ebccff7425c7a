"""The dispatch benchmark without a GPU: its statistics, its batches, what it reports and what it says it cannot run."""

from __future__ import annotations

import gc
import json
import os
import random
import time
from pathlib import Path

import hdispatch
import pytest
import torch
import toy
from hdispatch.bench import busy, dispatch, machine, paths, plot, results
from hdispatch.bench.workload import CYCLE, M_KINDS, Workload, unseen_pool
from hdispatch.cli import bench, doctor
from hdispatch.compile import available_ops
from hdispatch.errors import HdispatchError
from hdispatch.testing import host_timer

ROW_KEYS = ["path", "op", "m", "median_ns", "q1_ns", "q3_ns", "floor_ratio"]


@pytest.fixture
def toy_bundle(tmp_path) -> Path:
    return toy.write(tmp_path / "toy")


def options(bundle: Path | None = None, **changes) -> dispatch.DispatchOptions:
    given = {"op": "toy", "bundle": bundle, "hidden": 64, "rounds": 3, "calls": 20, "loads": 1, "largest": 200, "device": "cpu"}
    return dispatch.DispatchOptions(**given | changes)


def cells(result) -> dict[tuple[str, str], dict]:
    return {(row["path"], row["m"]): row for row in result["rows"]}


def spin(ns: int) -> None:
    end = time.perf_counter_ns() + ns
    while time.perf_counter_ns() < end:
        pass


# ---- the timer ----


@pytest.mark.parametrize(
    ("samples", "wanted"),
    [
        ([7.0], (7, 7, 7)),
        ([1.0, 3.0], (1.5, 2, 2.5)),
        ([5.0, 1.0, 4.0, 2.0, 3.0], (2, 3, 4)),
        ([2.0, 2.0, 2.0, 900.0], (2, 2, 226.5)),
    ],
)
def test_summarize(samples, wanted):
    stats = host_timer.summarize(samples)
    assert (stats.q1_ns, stats.median_ns, stats.q3_ns) == pytest.approx(wanted)


def test_interleave_runs_every_batch_once_a_round_in_changing_order():
    order: list[str] = []

    def batch(name):
        return lambda: (order.append(name), 1.0)[1]

    samples, failed = host_timer.interleave({name: batch(name) for name in "abcd"}, 20, random.Random(1))
    rounds = [order[i : i + 4] for i in range(0, 80, 4)]
    assert all(sorted(each) == list("abcd") for each in rounds)
    assert len({tuple(each) for each in rounds}) > 5
    assert not failed
    assert {len(taken) for taken in samples.values()} == {20}


def test_interleave_is_repeatable_with_a_seed():
    def run(seed):
        order: list[str] = []
        batches = {name: (lambda name=name: float(order.append(name) is None)) for name in "abc"}
        host_timer.interleave(batches, 10, random.Random(seed))
        return order

    assert run(3) == run(3)
    assert run(3) != run(4)


def test_interleave_drops_what_fails_and_goes_on():
    count = [0]

    def fails_later():
        count[0] += 1
        if count[0] == 3:
            raise ValueError("third")
        return 1.0

    samples, failed = host_timer.interleave({"good": lambda: 1.0, "bad": fails_later}, 5, random.Random(0))
    assert list(samples) == ["good"]
    assert len(samples["good"]) == 5
    assert str(failed["bad"]) == "third"


def test_call_batch_times_the_calls_and_nothing_else():
    seen: list[object] = []

    def arguments():
        spin(20_000_000)
        return [(i,) for i in range(50)]

    batch = host_timer.call_batch(seen.append, arguments, warm=[("warm",)], synchronize=lambda: seen.append("sync"))
    ns = batch()
    assert seen == ["warm", "sync", *range(50), "sync"]
    assert ns * 50 < 20_000_000


def test_a_slower_call_measures_slower():
    calls = [()] * 20
    batches = {
        "empty": host_timer.call_batch(lambda: None, lambda: calls),
        "slow": host_timer.call_batch(lambda: spin(20_000), lambda: calls),
    }
    samples, _ = host_timer.interleave(batches, 7, random.Random(0))
    slow, empty = (host_timer.summarize(samples[name]).median_ns for name in ("slow", "empty"))
    assert slow >= 20_000
    assert slow > 5 * empty


def test_quiet_pins_and_restores():
    before = os.sched_getaffinity(0)
    with host_timer.quiet() as core:
        assert not gc.isenabled()
        assert core is None or os.sched_getaffinity(0) == {core}
    assert gc.isenabled()
    assert os.sched_getaffinity(0) == before


# ---- the workload ----


def workload(m: int = 16, largest: int = 64) -> Workload:
    return Workload(toy.SPEC, toy.SPEC.variant("bfloat16+residual"), {"K": 64}, m, torch.device("cpu"), largest)


def rows_of(batch) -> list[int]:
    return [arguments[1].shape[0] for arguments in batch]


def test_arguments_have_the_sizes_of_m():
    result, input, weight, scale, epsilon, scale_ub, residual = workload().at(5)
    assert (result.shape, input.shape, residual.shape) == ((5, 64), (5, 64), (5, 64))
    assert (scale.shape, weight.shape) == ((5, 1), (64,))
    assert (epsilon, scale_ub) == (1e-6, None)


@pytest.mark.parametrize("op", available_ops())
def test_arguments_of_every_op_are_taken(op):
    spec = hdispatch.registry.spec(op)
    variant = spec.variant(dispatch.choose_variant(spec))
    sizes = {"K": 128, "N": 32} if "head_dim" in spec.config_key else {"K": 512, "N": 256}
    made = Workload(spec, variant, sizes, 16, torch.device("cpu"), 64)
    for m in (1, 5, 16):
        args = made.at(m)
        for arg, value in zip(spec.args, args, strict=True):
            if isinstance(value, torch.Tensor):
                wanted = spec.tensor_sizes(arg, {"A": 8, **sizes, "M": m}, variant.static)
                shape = value.shape if value.dim() == len(wanted) or not arg.flat else (value.numel(),)
                assert [size for size, want in zip(shape, wanted, strict=True) if want not in (size, -1)] == [], arg.name
        before = hdispatch.stats()[op]["misses"].get("no table", 0)
        getattr(hdispatch.ops, op)(*args)
        assert hdispatch.stats()[op]["misses"]["no table"] == before + 1, hdispatch.explain(getattr(hdispatch.ops, op), *args)


def test_shapes_that_a_row_leaves_open_are_as_the_op_hints():
    spec = hdispatch.registry.spec("rms_norm")
    assert dispatch.choose_shape(spec, None, [{"K": 128}]) == {"K": 128, "N": spec.hint("N")}
    assert dispatch.choose_shape(spec, None, [{}]) == {"K": spec.hint("K"), "N": spec.hint("N")}
    assert dispatch.choose_shape(toy.SPEC, None) == {"K": 64}


def test_fixed_and_cycling():
    assert rows_of(workload(m=9).maker("fixed", 5, random.Random(0))()) == [9] * 5
    assert rows_of(workload().maker("cycling", 6, random.Random(0))()) == [2, 3, 7, 16, 2, 3]


def test_unseen_never_repeats_and_never_takes_a_seen_m():
    make = workload(m=20).maker("unseen", 10, random.Random(0))
    drawn = [m for _ in range(5) for m in rows_of(make())]
    assert len(set(drawn)) == 50
    assert not set(drawn) & {1, 20, *CYCLE}
    assert drawn != sorted(drawn)
    with pytest.raises(HdispatchError, match="fewer rounds"):
        [make() for _ in range(5)]


def test_unseen_pool():
    assert unseen_pool(5, 10) == [4, 6, 8, 9, 10]


def test_m_out_of_range():
    with pytest.raises(HdispatchError, match="takes 1 to 64"):
        workload(m=65)


# ---- a run ----


def test_run_reports_what_needs_no_gpu(toy_bundle):
    result = dispatch.run(options(toy_bundle, variant="bfloat16"))
    assert set(result) == {"machine", "rows", "skipped"}
    assert all(list(row) == ROW_KEYS for row in result["rows"])
    found = cells(result)
    for path in ("python-call", "null-driver", "torch.ops.hdispatch-null", "torch.ops.hdispatch.default-null"):
        assert {m for each, m in found if each == path} == set(M_KINDS)
    assert {("config-pick", "cycling"), ("table-probe", "fixed"), ("load-bundle-null", "fixed")} <= set(found)
    assert {(f"tvm-ffi-{each}", "fixed") for each in ("function", "row", "ops")} <= set(found)
    for row in result["rows"]:
        assert 0 < row["q1_ns"] <= row["median_ns"] <= row["q3_ns"]
        assert row["floor_ratio"] is None
    assert set(result["skipped"]) == set(dispatch.ORDER) - {row["path"] for row in result["rows"]}
    assert "CPU" in result["skipped"]["hdispatch.ops"]
    assert json.loads(json.dumps(result)) == result


def test_run_leaves_nothing_loaded_and_no_strict_mode(toy_bundle):
    dispatch.run(options(toy_bundle, variant="bfloat16"))
    assert not hdispatch.loaded()
    arguments = toy.arguments(4, 64)
    hdispatch.ops.toy(*arguments)  # the fallback, which strict mode would refuse
    assert hdispatch.ops.toy.pick(4, 64) is None


def test_run_without_a_bundle_says_so():
    result = dispatch.run(options(None, no_bundle="none was built"))
    assert result["skipped"]["null-driver"] == "none was built"
    assert {"python-call", *dispatch.TABLE} == {row["path"] for row in result["rows"]}


def test_run_takes_a_variant_and_shape_that_the_bundle_has(tmp_path):
    bundle = toy.write(tmp_path, toy.manifest(sizes=(512,), variants=("bfloat16+scale_ub+residual",)))
    result = dispatch.run(options(bundle, hidden=None))
    assert (result["machine"]["variant"], result["machine"]["K"]) == ("bfloat16+scale_ub+residual", 512)
    assert ("null-driver", "fixed") in cells(result)


def test_run_without_a_row_for_the_shape(toy_bundle):
    result = dispatch.run(options(toy_bundle, hidden=128))
    assert "no row of toy for bfloat16, K=128, M=16" in result["skipped"]["null-driver"]


def test_run_with_a_row_for_some_ms_only(tmp_path):
    content = toy.manifest()
    content["records"][0]["m_max"] = 16
    result = dispatch.run(options(toy.write(tmp_path, content)))
    assert ("null-driver", "cycling") in cells(result)
    assert "MissError" in result["skipped"]["null-driver (unseen)"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"op": "nonsense"}, "no op 'nonsense'"),
        ({"variant": "bfloat17"}, "no variant 'bfloat17'"),
        ({"rounds": 0}, "rounds is 0"),
        ({"m": 0}, "M is 0"),
        ({"bundle": Path("/nonexistent")}, "is /nonexistent a bundle"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(HdispatchError, match=message):
        dispatch.run(options(**changes))


def test_a_missing_gpu_is_an_error_only_if_asked_for():
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    with pytest.raises(HdispatchError, match="sees no CUDA device"):
        dispatch.run(options(None, device="cuda"))


def test_machine_header(toy_bundle, monkeypatch):
    monkeypatch.setenv(machine.REVISION_VARIABLE, "r123")
    header = dispatch.run(options(toy_bundle, seed=7))["machine"]
    assert header["torch"] == torch.__version__
    assert header["hdispatch"] == hdispatch.__version__
    assert header["cpu"]
    assert (header["revision"], header["seed"], header["rounds"], header["calls"]) == ("r123", 7, 3, 20)
    assert header["bundle"]["rows"] == 20


# ---- the paths that need a GPU, with the null driver standing in for it ----


@pytest.fixture
def stand_in(monkeypatch):
    """The null driver and the CPU in the place of a GPU: what only a GPU can do fails, the rest runs."""
    real = hdispatch.runtime.load
    monkeypatch.setattr(dispatch, "_device", lambda _name: (torch.device("cpu"), ""))
    monkeypatch.setattr(dispatch.machine, "describe", lambda _device: {"gpu": "stand-in", "cpu": "none"})

    def load(folder, *, device=None, driver="cuda", pdl=True):
        return real(folder, driver="null", pdl=pdl)

    monkeypatch.setattr(dispatch.runtime, "load", load)


@pytest.mark.usefixtures("stand_in")
def test_floors_and_doors_have_ratios_and_peers_that_fail_have_reasons(toy_bundle):
    result = dispatch.run(options(toy_bundle, device=None))
    found = cells(result)
    assert found["cuLaunchKernelEx", "fixed"]["floor_ratio"] == 1
    floor = found["cuLaunchKernelEx", "fixed"]["median_ns"]
    for path in ("hdispatch.ops", "torch.ops.hdispatch", "torch.ops.hdispatch.default"):
        for m in M_KINDS:
            row = found[path, m]
            assert row["floor_ratio"] == pytest.approx(row["median_ns"] / floor, rel=0.01)
    assert found["hdispatch.ops-nopdl", "fixed"]["floor_ratio"] > 1
    assert sum(row["path"] == "cuLaunchKernelEx" for row in result["rows"]) == 1
    assert ("load-bundle-1000-rows", "fixed") in found
    assert found["python-call", "fixed"]["floor_ratio"] is None
    for path in ("helion", "helion-torch-op", "torch.ops._C", "cuda-graph", "chain-hdispatch", "chain-cuda-graph"):
        assert result["skipped"][path]
    assert "not by Helion" in result["skipped"]["helion"]
    assert "--vllm-ops" in result["skipped"]["torch.ops._C"]


@pytest.mark.usefixtures("stand_in")
def test_a_slowed_path_loses(toy_bundle, monkeypatch):
    def slowed(setup):
        def call(*arguments):
            spin(20_000)
            setup.op(*arguments)

        yield from paths.calling(setup, "hdispatch.ops", setup.served("cuda"), call)

    def slow_null(setup):
        yield from paths.calling(
            setup, "null-driver", setup.served("null"), lambda *a: (spin(20_000), setup.op(*a)), launches=False
        )

    monkeypatch.setitem(dispatch.SHIPPED, "hdispatch.ops", slowed)
    monkeypatch.setitem(dispatch.SHIPPED, "null-driver", slow_null)
    result = dispatch.run(options(toy_bundle, device=None))
    found = cells(result)
    assert found["hdispatch.ops", "fixed"]["median_ns"] > 20_000
    assert found["hdispatch.ops", "fixed"]["floor_ratio"] > 5
    verdicts = {judged.target.text: judged.verdict for judged in results.judge(result["rows"])}
    assert verdicts["hdispatch.ops / bare cuLaunchKernelEx"] == "miss"
    assert verdicts["hdispatch.ops, null driver"] == "miss"


# ---- targets ----


def row(path: str, median: float, m: str = "fixed", ratio: float | None = None) -> results.PathTime:
    return {"path": path, "op": "x", "m": m, "median_ns": median, "q1_ns": median, "q3_ns": median, "floor_ratio": ratio}


@pytest.mark.parametrize(
    ("target", "rows", "measured", "verdict"),
    [
        (results.Criterion("t", ("a", "fixed"), 150), [row("a", 150)], 150, "pass"),
        (results.Criterion("t", ("a", "fixed"), 150), [row("a", 151)], 151, "miss"),
        (results.Criterion("t", ("a", "fixed"), 150), [row("a", 1, "unseen")], None, "not run"),
        (results.Criterion("t", ("a", "fixed"), 1.0, floor=True), [row("a", 9, ratio=0.94)], 0.94, "pass"),
        (results.Criterion("t", ("a", "fixed"), 1.0, floor=True), [row("a", 9)], None, "not run"),
        (
            results.Criterion("t", ("a", "fixed"), 6, over=("b", "fixed"), at_least=True),
            [row("a", 50), row("b", 10)],
            5,
            "miss",
        ),
        (
            results.Criterion("t", ("a", "fixed"), 6, over=("b", "fixed"), at_least=True),
            [row("a", 70), row("b", 10)],
            7,
            "pass",
        ),
        (
            results.Criterion("t", ("a", "unseen"), 1.1, over=("a", "fixed")),
            [row("a", 12, "unseen"), row("a", 10)],
            1.2,
            "miss",
        ),
    ],
)
def test_judge(target, rows, measured, verdict):
    (judged,) = results.judge(rows, [target])
    assert judged.measured == (None if measured is None else pytest.approx(measured))
    assert judged.verdict == verdict


def test_every_target_names_a_path():
    for target in results.TARGETS:
        assert target.cell[0] in dispatch.ORDER
        assert target.over is None or target.over[0] in dispatch.ORDER


# ---- the picture ----


def test_plot_is_a_png(tmp_path):
    rows = [row("a", 100.0), row("a", 200.0, "unseen"), row("cuLaunchKernelEx", 2700.0, ratio=1.0), row("load-bundle", 1e8)]
    facts = {"op": "x", "variant": "v", "gpu": None, "cpu": "some CPU"}
    plot.draw({"machine": facts, "rows": rows, "skipped": {}}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_plot_without_matplotlib(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(HdispatchError, match="matplotlib"):
        plot.require()


def test_plot_with_a_suffix_that_is_no_picture(tmp_path):
    facts = {"op": "x", "variant": "v", "gpu": None, "cpu": "some CPU"}
    with pytest.raises(HdispatchError, match="cannot write"):
        plot.draw({"machine": facts, "rows": [row("a", 1.0)], "skipped": {}}, tmp_path / "picture.nonsense")


def test_driver_version_from_either_kernel_module(monkeypatch):
    for text in (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.03  Tue",
        "NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  R",
    ):
        monkeypatch.setattr(Path, "read_text", lambda *_args, text=text, **_kwargs: text)
        assert machine.driver_version() in ("580.159.03", "580.95.05")


# ---- a busy machine ----


def test_a_miss_on_a_busy_machine_says_so():
    late = [results.PathTime(path="null-driver", op="", m="fixed", median_ns=260, q1_ns=250, q3_ns=270, floor_ratio=None)]
    said = bench.describe_targets(late, busy.USUAL_NS * 1.5)
    assert "miss (busy machine)" in said
    assert said.splitlines()[-1].startswith(
        "this machine is busy or slow: an empty Python call takes 62 ns, usually at most 41;"
    )
    assert "not run (busy" not in said
    said = bench.describe_targets(late, busy.USUAL_NS)
    assert "miss" in said
    assert "busy" not in said


def test_an_empty_call_is_timed_with_collection_and_affinity_restored():
    allowed = os.sched_getaffinity(0)
    assert 5 < busy.empty_call_ns() < 100_000
    assert os.sched_getaffinity(0) == allowed
    assert gc.isenabled()


def test_doctor_warns_of_a_busy_machine(monkeypatch):
    monkeypatch.setattr(doctor.busy, "empty_call_ns", lambda: 90.0)
    found = doctor.examine(None)
    assert not found["host"]["ok"]
    assert "host       no: this machine is busy or slow: an empty Python call takes 90 ns" in doctor.describe(found)
    monkeypatch.setattr(doctor.busy, "empty_call_ns", lambda: 30.0)
    assert "host       ok: an empty Python call takes 30 ns" in doctor.describe(doctor.examine(None))

"""Measuring candidates: the control flow, with a toy bundle, the null driver and a fake timer."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hdispatch
import pytest
import torch
import toy
from hdispatch.cli.main import main
from hdispatch.errors import BundleError, HdispatchError
from hdispatch.ladders import Ladders
from hdispatch.manifest import CANDIDATES_NAME, MANIFEST_NAME
from hdispatch.tune import cell_arguments, cell_bench, farm, measure, measure_process, timings
from hdispatch.tune import device as devices
from hdispatch.tune.candidates import of_present, read_candidates
from hdispatch.tune.card import Card

#: config -> µs
TIMES = {"fast": 10.0, "near": 10.3, "slow": 11.5, "loser": 20.0, "hopeless": 50.0}


#: Where a process of its own finds this file, and what it imports.
IMPORTED = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]


def toy_record(name: str, **changes: Any) -> dict[str, Any]:
    record = toy.record()
    return {**record, "config": {"name": name}, **changes}


def write_candidates(folder: Path, records: Sequence[dict[str, Any]], cells: Sequence[dict[str, Any]] | None = None) -> Path:
    """A candidate bundle of the toy op: every record competes in two cells, M = 4 and M = 16 of K = 64."""
    manifest = {**toy.manifest(), "records": list(records), "rows": []}
    toy.write(folder, manifest)
    indices = list(range(len(records)))
    common = {"op": "toy", "variant": "bfloat16", "K": 64, "N": 0, "records": indices}
    content = {
        "version": 1,
        "manifest": hashlib.sha256((folder / MANIFEST_NAME).read_bytes()).hexdigest(),
        "cells": cells or [{**common, "bucket": 2, "M": 4}, {**common, "bucket": 4, "M": 16}],
        "origins": [{"generic": [], "seconds": 1.5} for _ in records],
        "dropped": [],
    }
    (folder / CANDIDATES_NAME).write_text(json.dumps(content))
    return folder


class FakeReplay:
    """Takes the time that it is told."""

    def __init__(self, us: float) -> None:
        self.us, self.open, self.timed, self.in_a_row = us, True, 0, 0

    def time(self, replays: int = 1) -> float:
        """One replay."""
        assert self.open
        self.timed += 1
        self.in_a_row = replays
        return self.us

    def close(self) -> None:
        """No more of it."""
        self.open = False


class HungReplay(FakeReplay):
    """Never ends."""

    def time(self, replays: int = 1) -> float:
        """Waits for ever."""
        hang()
        return super().time(replays)


class BreakingReplay(FakeReplay):
    """Breaks the context, as a kernel does whose fault shows only in many launches."""

    def __init__(self, us: float, device: FakeDevice) -> None:
        super().__init__(us)
        self.device = device

    def time(self, replays: int = 1) -> float:  # noqa: ARG002
        """Fails, and all after it does."""
        self.device.dead = True
        raise RuntimeError("unspecified launch failure")


def hang() -> None:
    """Waits for ever, having said in $PID_FILE who does."""
    if path := os.environ.get("PID_FILE"):
        Path(f"{path}.new").write_text(str(os.getpid()))
        Path(f"{path}.new").rename(path)
    time.sleep(10**6)


class FakeDevice(devices.Device):
    """The null driver, which checks and counts a launch as the real one; then the reference writes what a kernel would."""

    def __init__(self, broken: dict[str, str] | None = None) -> None:
        self.index = -1
        self.torch_device = torch.device("cpu")
        self.broken = broken or {}
        self.current = ""
        self.order: list[tuple[str, int]] = []
        self.replays: list[FakeReplay] = []
        self.dead = False

    def device_count(self) -> int:
        """None: the null driver."""
        return 0

    def publish(self, row: devices.OneRow) -> devices.Serve:
        """Remembers whose row it is."""
        self.current = row.record["config"]["name"]
        assert list(row.record["cubins"]) == ["mult16" if row.bucket == 4 else "other"]
        return super().publish(row)

    def launch(self, op: Any, arguments: Sequence[Any]) -> None:
        """The null driver's launch, then what the candidate is said to do."""
        super().launch(op, arguments)
        self.order.append((self.current, arguments[0].size(0)))
        how = self.broken.get(self.current, "")
        if how in ("hang", f"hang at {arguments[0].size(0)}"):
            hang()
        if how == "hang with the GIL":
            ctypes.PyDLL(None).sleep(10**6)
        if how == "abort":
            os.abort()
        if how == "fatal":
            self.dead = True
            raise RuntimeError("illegal memory access")
        op.fallback(*arguments)
        if how == "wrong":
            arguments[3][0] += 1

    def synchronize(self) -> None:
        """Fails once the context is broken."""
        if self.dead:
            raise RuntimeError("illegal memory access")

    def estimate(self, calls: Sequence[devices.Call]) -> float:
        """As told."""
        assert len(calls) == 64
        return TIMES[self.current]

    def replay(self, calls: Sequence[devices.Call], launches: int) -> FakeReplay:
        """As told; half of it on the same buffers."""
        assert launches >= 64
        if self.broken.get(self.current) == "hang when timed":
            return HungReplay(TIMES[self.current])
        if self.broken.get(self.current) == "fatal when timed":
            return BreakingReplay(TIMES[self.current], self)
        self.replays.append(FakeReplay(TIMES[self.current] / (2 if len(calls) == 1 else 1)))
        return self.replays[-1]

    def queued(self, serve: devices.Serve, calls: Sequence[devices.Call], launches: int) -> FakeReplay:
        """A microsecond more than as told; the one that is near is faster there than all others."""
        assert launches == len(calls) == 64
        serve()
        self.replays.append(FakeReplay(9.0 if self.current == "near" else TIMES[self.current] + 1.0))
        return self.replays[-1]

    def card(self) -> Card:
        """A GPU that is not."""
        return {"name": "NVIDIA Toy", "power_w": 700}


@pytest.fixture
def bundle(tmp_path) -> Path:
    return write_candidates(tmp_path / "cand", [toy_record(name) for name in TIMES])


class OnCpu:
    """A device whose tensors are on the CPU."""

    torch_device = torch.device("cpu")


def test_attention_is_measured_with_random_and_with_equal_lengths_in_turn():
    cell = {"op": "paged_attention_decode", "variant": "bfloat16-bfloat16+group=4+max_queries=1", "K": 64, "N": 32, "M": 5}
    subject = cell_arguments.CellArguments({**cell, "bucket": 0, "second": 128, "records": []}, OnCpu(), seed=0)
    lengths = [arguments[4].tolist() for arguments in subject.sets]
    assert subject.kinds == 2
    assert len(lengths) >= 2
    assert lengths == [lengths[0], [128] * 5] * (len(lengths) // 2)
    assert len(set(lengths[0])) > 2
    assert subject.checked[4].tolist() == lengths[0]
    sets = len(lengths)
    assert [subject.even(launches) for launches in (1, sets + 1, sets + 2)] == [sets, sets + 2, sets + 2]


def by_cell(path: Path) -> dict[int, dict[str, timings.Timing]]:
    found: dict[int, dict[str, timings.Timing]] = {}
    for each in timings.read(path):
        found.setdefault(each["bucket"], {})[each["config"]["name"]] = each
    return found


def test_everything_is_checked_and_the_losers_go_early(bundle, tmp_path):
    device, seen = FakeDevice(), []
    report = measure.measure(
        bundle, tmp_path / "t.jsonl", device=device, versions=lambda: {"torch": "x"}, progress=lambda *step: seen.append(step)
    )
    assert (report.measured, report.before, report.left, report.failures) == (2, 0, 0, [])
    assert device.order == [(name, 4) for name in TIMES] + [(name, 16) for name in TIMES]
    found = by_cell(tmp_path / "t.jsonl")
    assert sorted(found) == [2, 4]
    for cell in found.values():
        assert {name: each["us"] for name, each in cell.items()} == TIMES
        rounds = {"fast": 9, "near": 9, "slow": 4, "loser": 2, "hopeless": 0}
        assert {name: each["rounds"] for name, each in cell.items()} == rounds
    one = found[4]["fast"]
    assert {name: each.get("stream_us") for name, each in found[2].items()} == {
        **dict.fromkeys(TIMES),
        "fast": 11.0,
        "near": 9.0,
    }, "those that are far behind in a graph are not timed in a stream"
    assert {name: each["warm_us"] for name, each in found[2].items() if "warm_us" in each} == {
        "fast": TIMES["fast"] / 2,
        "near": TIMES["near"] / 2,
    }
    assert {(replay.us, replay.in_a_row) for replay in device.replays if replay.timed} == {
        *((us, 1) for us in (*list(TIMES.values())[:4], 11.0, 9.0)),
        *((TIMES[name] / 2, cell_bench.WARM_REPLAYS) for name in ("fast", "near")),
    }
    assert one["versions"] == {"torch": "x", "tools": {"triton": "0"}}
    assert one["artifacts"] == sorted(hashlib.sha256(content).hexdigest() for content in toy.files().values())
    assert one["card"] == {"name": "NVIDIA Toy", "power_w": 700}
    assert (one["compile_seconds"], one["gpu"], one["M"], one["status"]) == (1.5, "NVIDIA Toy", 16, "ok")
    assert "q1" not in found[4]["hopeless"]
    assert not any(replay.open for replay in device.replays)
    assert [(done, total) for done, total, _ in seen] == [(0, 10), (5, 10)]
    assert "toy bfloat16 K=64 N=0 bucket 2" in seen[0][2]
    with hdispatch.strict(), pytest.raises(hdispatch.MissError, match="no bundle"):
        toy.OP(*toy.arguments())


@pytest.mark.parametrize("limit", ["WARM_BYTES", "WARM_WEIGHTS"])
def test_what_no_l2_keeps_is_not_timed_warm(bundle, tmp_path, monkeypatch, limit):
    monkeypatch.setattr(cell_bench, limit, 64)
    measure.measure(bundle, tmp_path / "t.jsonl", measure.Options(limit=1), device=FakeDevice())
    assert not any("warm_us" in each for each in timings.read(tmp_path / "t.jsonl"))


def test_weights_have_the_same_size_for_every_m():
    spec = hdispatch.registry.spec("ll_gemm_fp8")
    names = [arg.name for arg in spec.args]
    assert cell_arguments.weights(spec, names) == ["w", "w_scale"]


def test_short_launches_are_many():
    assert [cell_bench.launch_count(us) for us in (0.0, 1.5, 8.0, 10.0, 100.0, 1e6)] == [256, 256, 256, 50, 5, 4]
    assert [cell_bench.queued_count(us) for us in (0.0, 10.0, 31.0, 100.0, 1e6)] == [64, 64, 64, 20, 4]


def test_a_second_run_does_the_rest(bundle, tmp_path):
    out = tmp_path / "t.jsonl"
    first = measure.measure(bundle, out, measure.Options(limit=1), device=FakeDevice())
    assert (first.measured, first.left) == (1, 1)
    before = out.read_bytes()
    second = measure.measure(bundle, out, device=FakeDevice())
    assert (second.measured, second.before, second.left) == (1, 1, 0)
    assert out.read_bytes().startswith(before)
    third = measure.measure(bundle, out, device=FakeDevice())
    assert (third.measured, third.before) == (0, 2)
    assert len(out.read_bytes().splitlines()) == 10


def test_a_cell_that_was_cut_off_is_measured_again(bundle, tmp_path):
    out = tmp_path / "t.jsonl"
    measure.measure(bundle, out, device=FakeDevice())
    out.write_bytes(out.read_bytes()[:-100])
    report = measure.measure(bundle, out, device=FakeDevice())
    assert (report.measured, report.before) == (1, 1)
    assert all(len(cell) == 5 for cell in by_cell(out).values())


def test_no_time_no_cell(bundle, tmp_path):
    report = measure.measure(bundle, tmp_path / "t.jsonl", measure.Options(seconds=0), device=FakeDevice())
    assert (report.measured, report.left) == (0, 2)


def test_ops_that_are_not_asked_for_are_left(bundle, tmp_path):
    report = measure.measure(bundle, tmp_path / "t.jsonl", measure.Options(ops=["other"]), device=FakeDevice())
    assert (report.measured, report.left) == (0, 0)


def test_other_code_is_measured_again(bundle, tmp_path):
    out = tmp_path / "t.jsonl"
    measure.measure(bundle, out, device=FakeDevice())
    record = toy_record("fast")
    record["cubins"] = {name: {**cubin, "file": record["cubins"]["other"]["file"]} for name, cubin in record["cubins"].items()}
    shutil.rmtree(bundle)
    write_candidates(bundle, [record, toy_record("near")])
    assert measure.measure(bundle, out, device=FakeDevice()).measured == 2


def test_lines_of_other_code_configs_and_sizes_are_none_of_the_present_candidates(bundle, tmp_path):
    """A config that no longer compiles, code that changed, and a size that is not measured; and what was wrong elsewhere."""
    out = tmp_path / "t.jsonl"
    measure.measure(bundle, out, device=FakeDevice())
    assert len(of_present(read_candidates(bundle), timings.read(out))) == 10
    record = toy_record("fast")
    record["cubins"] = {name: {**cubin, "file": record["cubins"]["other"]["file"]} for name, cubin in record["cubins"].items()}
    shutil.rmtree(bundle)
    cell = {"op": "toy", "variant": "bfloat16", "K": 64, "N": 0, "records": [0, 1, 2], "bucket": 2, "M": 4}
    write_candidates(bundle, [record, toy_record("near"), toy_record("slow")], [cell])  # type: ignore[list-item]
    found = of_present(read_candidates(bundle), timings.read(out))
    assert [(line["config"]["name"], line["bucket"]) for line in found] == [("near", 2), ("slow", 2)]
    wrong = [dict(line) for line in timings.read(out) if line["config"]["name"] == "near" and line["bucket"] == 4]
    for line in wrong:
        line.pop("us")
        line["status"] = "wrong"
    found = of_present(read_candidates(bundle), [*timings.read(out), *wrong])  # type: ignore[list-item]
    assert [line["config"]["name"] for line in found] == ["slow"]


def test_what_is_wrong_is_told_and_never_timed(bundle, tmp_path):
    device = FakeDevice({"near": "wrong"})
    report = measure.measure(bundle, tmp_path / "t.jsonl", device=device)
    assert len(report.failures) == 2
    assert 'toy bfloat16 K=64 N=0 bucket 2: triton {"name":"near"} is wrong: scale: 1 of 4 scales differ' in report.failures[0]
    near = by_cell(tmp_path / "t.jsonl")[2]["near"]
    assert (near["status"], near["rounds"]) == ("wrong", 0)
    assert "us" not in near
    assert measure.measure(bundle, tmp_path / "t.jsonl", device=device).measured == 0


def test_what_is_not_launched_is_refused(tmp_path):
    guard = {"expr": ["input.stride(0)", 128, "%", 0, "=="], "text": "input.stride(0) % 128 == 0"}
    bundle = write_candidates(tmp_path / "cand", [toy_record("fast", guards=[guard]), toy_record("near")])
    report = measure.measure(bundle, tmp_path / "t.jsonl", device=FakeDevice())
    assert all("is refused: toy" in failure for failure in report.failures)
    cell = by_cell(tmp_path / "t.jsonl")[2]
    assert (cell["fast"]["status"], cell["near"]["status"]) == ("refused", "ok")
    assert "input.stride(0) % 128 == 0" in cell["fast"]["why"]


def test_a_broken_context_ends_the_run_and_the_next_goes_on_without_the_culprit(bundle, tmp_path):
    out = tmp_path / "t.jsonl"
    with pytest.raises(HdispatchError, match=r'"near".* is fatal: illegal memory access.* run again to continue without it'):
        measure.measure(bundle, out, device=FakeDevice({"near": "fatal"}))
    assert [each["status"] for each in timings.read(out)] == ["fatal"]
    device = FakeDevice()
    report = measure.measure(bundle, out, device=device)
    assert (report.measured, report.before) == (2, 0)
    assert ("near", 4) not in device.order
    assert ("near", 16) not in device.order, "what was the end of a process is tried nowhere"
    assert by_cell(out)[2]["near"]["status"] == "fatal"
    assert sorted(by_cell(out)[4]) == sorted(set(TIMES) - {"near"})
    assert measure.measure(bundle, out, device=FakeDevice()).before == 2


# ---- in a process of its own ----


def command(device: str) -> tuple[str, ...]:
    """The process that measures, on the device that this expression makes."""
    program = f"""
import sys
sys.path[:0] = {IMPORTED!r}
import test_measure
from hdispatch.errors import HdispatchError
from hdispatch.tune import measure_worker
def opened(folder, manifest, index):
    assert manifest["ops"]
    return {device}
measure_worker.main(opened)
"""
    return ("-P", "-c", program)


@pytest.fixture
def in_child(monkeypatch) -> Callable[..., None]:
    """Says what candidates do in the process that measures."""
    monkeypatch.setattr(farm, "current_device", lambda: 0)

    def use(broken: dict[str, str] | None = None, device: str | None = None) -> None:
        monkeypatch.setattr(measure_process, "COMMAND", command(device or f"test_measure.FakeDevice({broken or {}!r})"))

    return use


#: Seconds; every step of a candidate that does end takes a small part of it.
SHORT = measure.Options(timeout=5.0)


def test_another_process_measures_the_same(bundle, tmp_path, in_child):
    in_child()
    report = measure.measure(bundle, tmp_path / "t.jsonl", versions=lambda: {"torch": "x"})
    assert (report.measured, report.left, report.failures) == (2, 0, [])
    measure.measure(bundle, tmp_path / "u.jsonl", device=FakeDevice(), versions=lambda: {"torch": "x"})

    def lines(path: Path) -> list[dict[str, Any]]:
        return [{n: v for n, v in line.items() if n not in ("device_seconds", "time")} for line in timings.read(path)]

    assert lines(tmp_path / "t.jsonl") == lines(tmp_path / "u.jsonl")


@pytest.mark.parametrize("how", ["hang", "hang with the GIL", "hang when timed"])
def test_a_candidate_that_never_ends_is_noted_and_the_rest_goes_on(bundle, tmp_path, in_child, how):
    in_child({"near": how})
    out, start = tmp_path / "t.jsonl", time.monotonic()
    report = measure.measure(bundle, out, SHORT)
    assert (report.measured, report.before, report.left) == (2, 0, 0)
    (failure,) = report.failures
    assert '"near"} is timeout: it had not ended after 5 s; its process was ended' in failure
    assert time.monotonic() - start < 120
    found = by_cell(out)
    assert {name: each["status"] for name, each in found[2].items()} == {**dict.fromkeys(TIMES, "ok"), "near": "timeout"}
    assert "us" not in found[2]["near"]
    assert 5.0 <= found[2]["near"]["device_seconds"] < 60
    assert {name: each["us"] for name, each in found[4].items()} == {name: us for name, us in TIMES.items() if name != "near"}
    assert timings.read(out)[0]["status"] == "timeout", "it was on disk before the others were measured"
    again = measure.measure(bundle, out, SHORT)
    assert (again.measured, again.before, again.failures) == (0, 2, [])


def test_a_candidate_that_never_ends_in_a_later_cell(bundle, tmp_path, in_child):
    in_child({"near": "hang at 16", "slow": "wrong"})
    report = measure.measure(bundle, tmp_path / "t.jsonl", SHORT)
    assert (report.measured, report.left) == (2, 0)
    found = by_cell(tmp_path / "t.jsonl")
    assert (found[2]["near"]["status"], found[4]["near"]["status"]) == ("ok", "timeout")
    assert {cell["slow"]["status"] for cell in found.values()} == {"wrong"}


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("abort", "ended with status -6"),
        ("fatal", "illegal memory access"),
        ("fatal when timed", "while it was timed: unspecified launch failure"),
    ],
)
def test_a_candidate_that_takes_the_process_along(bundle, tmp_path, in_child, how, why):
    in_child({"near": how})
    report = measure.measure(bundle, tmp_path / "t.jsonl")
    assert (report.measured, report.left, len(report.failures)) == (2, 0, 1)
    near = by_cell(tmp_path / "t.jsonl")[2]["near"]
    assert near["status"] == "fatal"
    assert why in near["why"]
    assert sorted(by_cell(tmp_path / "t.jsonl")[4]) == sorted(set(TIMES) - {"near"})


def test_no_candidate_but_such(tmp_path, in_child):
    bundle = write_candidates(tmp_path / "cand", [toy_record("near"), toy_record("fast")])
    in_child({"near": "abort", "fast": "abort"})
    report = measure.measure(bundle, tmp_path / "t.jsonl")
    assert (report.measured, report.left, len(report.failures)) == (2, 0, 2)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("exec('raise HdispatchError(\"no such GPU\")')", "^no such GPU$"),
        ("exec('raise KeyError(7)')", "^KeyError: 7$"),
        ("sys.exit(3)", "a worker process ended with status 3"),
        ("sys.exit('words')", "ended with status 1; it said: words"),
    ],
)
def test_a_process_that_cannot_start_is_an_error(bundle, tmp_path, in_child, device, message):
    in_child(device=device)
    with pytest.raises(HdispatchError, match=message):
        measure.measure(bundle, tmp_path / "t.jsonl")
    assert not (tmp_path / "t.jsonl").exists()


def test_what_is_no_candidates_fault_is_an_error(bundle, tmp_path, in_child):
    in_child(device="(vars(sys.modules['hdispatch.tune.cell_arguments']).update(copied=0), test_measure.FakeDevice())[1]")
    with pytest.raises(HdispatchError, match=r"^TypeError: .int. object is not callable$"):
        measure.measure(bundle, tmp_path / "t.jsonl")
    assert timings.read(tmp_path / "t.jsonl") == []


def run_command(bundle: Path, out: Path, pid_file: Path) -> subprocess.Popen[str]:
    """`hdispatch tune measure`, in a process group of its own; its second cell has a candidate that hangs."""
    program = f"""
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
sys.path[:0] = {IMPORTED!r}
import test_measure
from hdispatch.cli.main import main
from hdispatch.tune import farm, measure_process
measure_process.COMMAND = {command("test_measure.FakeDevice({'near': 'hang at 16'})")!r}
farm.current_device = lambda: 0
sys.exit(main(["tune", "measure", {str(bundle)!r}, "--out", {str(out)!r}, "--timeout", "1000"]))
"""
    environment = {**os.environ, "PID_FILE": str(pid_file)}
    return subprocess.Popen(
        [sys.executable, "-P", "-c", program], stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def hung_pid(pid_file: Path) -> int:
    end = time.monotonic() + 120
    while not pid_file.exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    return int(pid_file.read_text())


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or dead and not collected yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_no_process_and_goes_on_later(bundle, tmp_path, in_child, end):
    out = tmp_path / "t.jsonl"
    process = run_command(bundle, out, tmp_path / "pid")
    pid = hung_pid(tmp_path / "pid")
    if end == signal.SIGINT:
        os.killpg(process.pid, end)  # as a terminal does: the process that measures has it too
    else:
        process.send_signal(end)
    _, said = process.communicate(timeout=60)
    assert process.returncode == (130 if end == signal.SIGINT else -end)
    assert "Traceback" not in said
    assert said.endswith("hdispatch: interrupted\n") == (end == signal.SIGINT)
    limit = time.monotonic() + 30
    while not has_ended(pid):
        assert time.monotonic() < limit
        time.sleep(0.05)
    assert sorted(by_cell(out)) == [2]
    in_child()
    report = measure.measure(bundle, out)
    assert (report.measured, report.before, report.left) == (1, 1, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": -1}, "the limit is -1 cells"),
        ({"seconds": float("nan")}, "the time is nan s"),
        ({"seconds": -1.0}, "the time is -1.0 s"),
        ({"timeout": 0.0}, "the timeout is 0.0 s"),
        ({"timeout": float("nan")}, "the timeout is nan s"),
        ({"timeout": float("inf")}, "the timeout is inf s"),
    ],
)
def test_options_that_say_nothing(options, message):
    with pytest.raises(HdispatchError, match=message):
        measure.Options(**options)


def test_timings_of_another_gpu_are_refused(bundle, tmp_path):
    out = tmp_path / "t.jsonl"
    measure.measure(bundle, out, device=FakeDevice())
    other = FakeDevice()
    other.card = lambda: {"name": "NVIDIA Else"}  # type: ignore[method-assign]
    with pytest.raises(HdispatchError, match="holds timings of 'NVIDIA Toy, 700 W'; this is 'NVIDIA Else'"):
        measure.measure(bundle, out, device=other)


def edit(folder: Path, change: Any) -> None:
    path = folder / CANDIDATES_NAME
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=2), "version 2; this hdispatch reads 1"),
        (lambda c: c.update(manifest="0"), "made for another manifest.json"),
        (lambda c: c.pop("cells"), "malformed: .cells is missing"),
        (lambda c: c["origins"].pop(), "tells of 4 records; the manifest has 5"),
        (lambda c: c["cells"][0].update(records=[5]), r"cell 0 names records \[5\] of 5"),
        (lambda c: c["cells"][0].update(records=[]), r"cell 0 names records \[\] of 5"),
        (lambda c: c["cells"][1].update(bucket=5), "cell 1 is of toy bfloat16 bucket 5"),
        (lambda c: c["cells"][1].update(op="x"), "cell 1 is of x bfloat16 bucket 4"),
    ],
)
def test_malformed_candidates(bundle, change, message):
    edit(bundle, change)
    with pytest.raises(BundleError, match=message):
        read_candidates(bundle)


def test_candidates_with_other_buckets_than_the_installed_op_has_are_refused(bundle, tmp_path, monkeypatch):
    spec = hdispatch.registry.spec("toy")
    monkeypatch.setitem(vars(spec), "ladders", Ladders((*spec.ladders.m[:-1], spec.ladders.m[-1] + 1)))
    with pytest.raises(BundleError, match=r"the buckets of toy are .*; the installed op's .*; make the candidates again"):
        measure.measure(bundle, tmp_path / "t.jsonl", device=FakeDevice())


def test_an_ordinary_bundle_is_no_candidate_bundle(tmp_path):
    with pytest.raises(BundleError, match="made by `hdispatch tune candidates`"):
        read_candidates(toy.write(tmp_path / "b"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_measuring_needs_a_gpu(bundle, tmp_path, capsys):
    assert main(["tune", "measure", str(bundle), "--out", str(tmp_path / "t.jsonl")]) == 1
    assert "candidates are measured on a GPU, and there is none here" in capsys.readouterr().err


def test_fewer_rows_are_checked_of_large_tensors():
    ladder = [1, 2, 16, 32, 8192]
    assert [cell_arguments.checked_rows(ladder, bucket, ladder[bucket], 1000) for bucket in range(5)] == ladder
    assert [cell_arguments.checked_rows(ladder, bucket, ladder[bucket], 2**27) for bucket in range(5)] == [1, 2, 16, 32, 48]

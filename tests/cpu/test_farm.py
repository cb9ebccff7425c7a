"""The farm: workers that measure at once, on GPUs of this host and on a real Ray, with a stand-in for device and timer."""

from __future__ import annotations

import importlib.util
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
from hdispatch.cli.main import main
from hdispatch.errors import BuildError, HdispatchError
from hdispatch.tune import card, farm, measure, measure_process, select, timings
from hdispatch.tune.candidates import read_candidates
from hdispatch.tune.farm import LocalFarm, Started, Task
from hdispatch.tune.measure_process import WorkerLost
from test_measure import IMPORTED, TIMES, FakeDevice, command, toy_record, write_candidates

CELLS = 12
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed: pip install ray")


@pytest.fixture
def bundle(tmp_path) -> Path:
    """Twelve cells of three candidates, with K from 64."""
    common = {"op": "toy", "variant": "bfloat16", "N": 0, "records": [0, 1, 2], "bucket": 2, "M": 4}
    cells = [{**common, "K": 64 * (1 + at)} for at in range(CELLS)]
    return write_candidates(tmp_path / "cand", [toy_record(name) for name in list(TIMES)[:3]], cells)


def lines_of(path: Path) -> Counter[tuple[int, str]]:
    """How often each cell and candidate has a line, those included that a later one replaces."""
    return Counter((line["K"], line["config"]["name"]) for line in map(timings.parse, path.read_bytes().splitlines()))


def each_once() -> Counter[tuple[int, str]]:
    return Counter((64 * (1 + at), name) for at in range(CELLS) for name in list(TIMES)[:3])


# ---- how cells are shared ----


class Hand(farm.Worker):
    """A worker that does what a test says."""

    def __init__(self, name: str, do: Callable[[int, Collection[int]], Any], its: card.Card | None = None) -> None:
        self.name, self.do, self.card, self.versions, self.closed = name, do, its or {"name": "NVIDIA Toy"}, {}, 0

    def measure(self, cell: int, skip: Collection[int]) -> Any:
        """As told."""
        return self.do(cell, skip)

    def close(self) -> None:
        """Counts."""
        self.closed += 1


class Hands:
    """A farm of them."""

    def __init__(self, *workers: Hand) -> None:
        self.workers, self.closed = workers, False

    def start(self, _task: Task) -> Started:
        """They are there."""
        return Started(list(self.workers))

    def close(self) -> None:
        """No more."""
        self.closed = True


@pytest.fixture
def measured(bundle, tmp_path) -> list[list[timings.Timing]]:
    """The lines of each cell, as one process finds them."""
    out = tmp_path / "alone.jsonl"
    measure.measure(bundle, out, device=FakeDevice())
    return [[line for line in timings.read(out) if line["K"] == 64 * (1 + at)] for at in range(CELLS)]


def test_cells_are_shared_and_each_is_measured_once(bundle, tmp_path, measured):
    both = threading.Barrier(2)
    first: set[str] = set()

    def do(name: str) -> Callable[[int, Collection[int]], Any]:
        def cell(at: int, skip: Collection[int]) -> Any:
            if name not in first:
                first.add(name)
                both.wait(30)  # neither has all of it
            return measured[at]

        return cell

    seen: list[tuple[int, int, str]] = []
    workers = Hands(Hand("a", do("a")), Hand("b", do("b")))
    out = tmp_path / "t.jsonl"
    report = measure.measure(bundle, out, farm=workers, progress=lambda *step: seen.append(step))
    assert (report.measured, report.left, report.notes) == (CELLS, 0, [])
    assert lines_of(out) == each_once()
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert {total for _, total, _ in seen} == {3 * CELLS}
    assert workers.closed
    assert measure.measure(bundle, out, farm=Hands(Hand("a", do("a")))).before == CELLS


def test_a_lost_workers_cell_is_measured_again(bundle, tmp_path, measured):
    """And one that waits for nothing else gets it."""
    taken = threading.Event()

    def lose(_at: int, _skip: Collection[int]) -> Any:
        taken.set()
        time.sleep(0.5)  # the other one has done all the rest
        raise WorkerLost("the node is gone")

    def work(at: int, _skip: Collection[int]) -> Any:
        taken.wait(30)
        return measured[at]

    bad, good = Hand("bad", lose), Hand("good", work)
    report = measure.measure(bundle, tmp_path / "t.jsonl", farm=Hands(bad, good))
    assert (report.measured, report.left) == (CELLS, 0)
    assert lines_of(tmp_path / "t.jsonl") == each_once()
    assert report.notes[0] == "bad was lost, its cell is measured again: the node is gone"
    assert 1 <= len(report.notes) <= measure.LOSSES
    assert bad.closed == len(report.notes)


def test_without_any_worker_it_ends_and_the_next_run_goes_on(bundle, tmp_path, measured):
    def do(at: int, _skip: Collection[int]) -> Any:
        if at >= 3:
            raise WorkerLost("the power is out")
        return measured[at]

    out = tmp_path / "t.jsonl"
    with pytest.raises(
        HdispatchError, match=r"every worker was lost, toy bfloat16 K=\d+ .* the power is out; run again to go on"
    ):
        measure.measure(bundle, out, farm=Hands(Hand("a", do), Hand("b", do)))
    assert len(lines_of(out)) == 9
    report = measure.measure(bundle, out, farm=Hands(Hand("a", lambda at, _: measured[at])))
    assert (report.before, report.measured) == (3, CELLS - 3)
    assert lines_of(out) == each_once()


@pytest.mark.parametrize("error", [HdispatchError("out of memory"), KeyboardInterrupt()])
def test_what_is_no_workers_fault_ends_all(bundle, tmp_path, measured, error):
    def fail(_at: int, _skip: Collection[int]) -> Any:
        raise error

    slow = Hand("slow", lambda at, _: (time.sleep(0.2), measured[at])[1])
    with pytest.raises(type(error)):
        measure.measure(bundle, tmp_path / "t.jsonl", farm=Hands(Hand("bad", fail), slow))
    assert slow.closed
    assert sum(lines_of(tmp_path / "t.jsonl").values()) <= 3, "no further cell was begun"


def test_time_and_limit_hold_for_all_workers_together(bundle, tmp_path, measured):
    def workers() -> Hands:
        return Hands(*(Hand(name, lambda at, _: measured[at]) for name in "ab"))

    assert measure.measure(bundle, tmp_path / "t.jsonl", measure.Options(limit=5), farm=workers()).measured == 5
    assert measure.measure(bundle, tmp_path / "t.jsonl", measure.Options(seconds=0), farm=workers()).measured == 0


# ---- cards ----

H100: card.Card = {"name": "NVIDIA H100", "sms": 132, "memory_mib": 81090, "sm_mhz": 1980, "memory_mhz": 2619, "power_w": 700}


@pytest.mark.parametrize("change", [{"name": "NVIDIA H200"}, {"sms": 114}, {"sm_mhz": 1755}, {"power_w": 500}])
def test_unlike_cards_are_left_out(bundle, tmp_path, measured, change):
    other: Any = {**H100, **change}
    odd = Hand("odd", lambda at, _: measured[at], other)
    hands = [Hand(name, lambda at, _: measured[at], H100) for name in "ab"]
    report = measure.measure(bundle, tmp_path / "t.jsonl", farm=Hands(odd, *hands))
    assert report.notes == [f"odd is left out: it has {card.words(other)}, and the timings are of {card.words(H100)}"]
    assert odd.closed == 1
    assert report.measured == CELLS


def test_what_a_file_has_decides_which_cards_are_alike(bundle, tmp_path):
    out = tmp_path / "t.jsonl"
    measure.measure(bundle, out, measure.Options(limit=1), device=FakeDevice())
    there, less = FakeDevice().card(), Hand("less", lambda *_: None, {"name": "NVIDIA Toy", "power_w": 500})
    with pytest.raises(HdispatchError, match="holds timings of 'NVIDIA Toy, 700 W'; this is 'NVIDIA Toy, 500 W'"):
        measure.measure(bundle, out, farm=Hands(less, less, less))
    same = Hand("same", lambda *_: [], there)
    report = measure.measure(bundle, out, measure.Options(limit=0), farm=Hands(less, less, same))
    assert len(report.notes) == 2, "the file counts, not the most"


def test_a_file_of_unlike_cards_is_refused(bundle, tmp_path):
    out = tmp_path / "t.jsonl"
    measure.measure(bundle, out, measure.Options(limit=2), device=FakeDevice())
    lines = timings.read(out)
    lines[0]["card"] = {"name": "NVIDIA Toy", "power_w": 500}
    out.write_text("")
    timings.append(out, lines)
    with pytest.raises(HdispatchError, match="unlike cards, NVIDIA Toy, 500 W and NVIDIA Toy, 700 W"):
        measure.measure(bundle, out, device=FakeDevice())
    with pytest.raises(BuildError, match="unlike cards, NVIDIA Toy, 500 W and NVIDIA Toy, 700 W"):
        select.select(lines, {})


def test_lines_of_earlier_versions_have_a_name_alone():
    assert card.alike({"name": "NVIDIA H100"}, H100)
    assert not card.alike({"name": "NVIDIA H200"}, H100)
    assert card.words(H100) == "NVIDIA H100, 132 SMs, 81090 MiB, 1980 and 2619 MHz, 700 W"


@pytest.mark.parametrize("said", ["1980, 2619, 700.00\n", "[N/A], 2619, 700.00\n", ""])
def test_clocks_come_from_the_driver_where_it_tells_them(monkeypatch, said):
    class Properties:
        name, multi_processor_count, total_memory, uuid = "NVIDIA H100", 132, 81090 * 2**20, "x"

    def run(words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert words[1:3] == ["-i", "GPU-x"]
        if not said:
            raise FileNotFoundError
        return subprocess.CompletedProcess(words, 0, said, "")

    monkeypatch.setattr(card.torch.cuda, "get_device_properties", lambda _index: Properties)
    monkeypatch.setattr(card.subprocess, "run", run)
    assert card.read_card(0) == (
        H100 if "1980" in said else {n: v for n, v in H100.items() if n in ("name", "sms", "memory_mib")}
    )


# ---- processes of this host ----


def test_gpus_of_this_host(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(measure_process, "COMMAND", command("test_measure.FakeDevice({'near': 'abort'})"))
    monkeypatch.setattr(farm.torch.cuda, "device_count", lambda: 2)
    said: list[str] = []
    report = measure.measure(
        bundle, tmp_path / "t.jsonl", farm=LocalFarm(2), versions=lambda: {"driver": "580.1"}, say=said.append
    )
    assert (report.measured, report.left, report.notes) == (CELLS, 0, [])
    assert said == [f"GPU {index}: NVIDIA Toy, 700 W, driver 580.1" for index in (0, 1)]
    found = timings.read(tmp_path / "t.jsonl")
    assert {line["status"] for line in found if line["config"]["name"] != "near"} == {"ok"}
    assert 1 <= sum(line["status"] == "fatal" for line in found) <= 2, "of two processes each may meet it once"


@pytest.mark.parametrize(
    ("gpus", "message"), [(3, "3 GPUs are asked for; there are 2 here"), (0, "0 GPUs; a farm takes at least 1")]
)
def test_gpus_that_are_not_there(bundle, tmp_path, monkeypatch, gpus, message):
    monkeypatch.setattr(farm.torch.cuda, "device_count", lambda: 2)
    with pytest.raises(HdispatchError, match=message):
        measure.measure(bundle, tmp_path / "t.jsonl", farm=LocalFarm(gpus))


# ---- Ray ----


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A Ray of this host that takes itself to have two GPUs; its address."""
    ray = pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    options = {"num_cpus": 2, "num_gpus": 2, "include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    for left in (2, 1, 0):
        try:
            there = ray.init(address="local", **options)
            break
        except Exception as error:  # Ray's own type: it waits for half a minute, which a busy machine may take
            ray.shutdown()
            if "timed out during startup" not in str(error) or not left:
                raise
    yield there.address_info["gcs_address"]
    ray.shutdown()


SLOW_FIRST = """type("Slow", (test_measure.FakeDevice,), {
    "estimate": lambda self, calls: (__import__("time").sleep(0.05), test_measure.FakeDevice.estimate(self, calls))[1]})()"""


@needs_ray
@pytest.mark.slow
def test_on_ray_a_killed_worker_loses_nothing_and_nothing_is_twice(bundle, tmp_path, monkeypatch, cluster):
    from hdispatch.tune.farm_ray import RayFarm

    monkeypatch.setattr(measure_process, "COMMAND", command(SLOW_FIRST))
    out, killed = tmp_path / "t.jsonl", []

    def kill_one(done: int, _total: int, _cell: str) -> None:
        """When a third is done: the process of an actor that measures, as a node's end would."""
        if done >= CELLS and not killed:
            pids = [int(pid) for pid in actors(cluster)]
            killed.append(pids[0])
            os.kill(pids[0], signal.SIGKILL)

    report = measure.measure(bundle, out, farm=RayFarm(cluster), versions=lambda: {"driver": "580.1"}, progress=kill_one)
    assert killed
    assert (report.measured, report.left, report.failures) == (CELLS, 0, [])
    assert len(report.notes) == 1
    assert "was lost, its cell is measured again" in report.notes[0]
    assert lines_of(out) == each_once()
    assert {line["versions"]["driver"] for line in timings.read(out)} == {"580.1"}
    limit = time.monotonic() + 30
    while actors(cluster):
        assert time.monotonic() < limit, "an actor is left"
        time.sleep(0.2)


def actors(address: str) -> list[str]:
    """The processes of a cluster's actors that measure: other tests may have a Ray of their own."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::Measurer"):
                parent = path.with_name("stat").read_text().rpartition(")")[2].split()[1]
                raylet = Path(f"/proc/{parent}/cmdline").read_bytes()
                found += [path.parent.name] if address.encode() in raylet else []
        except OSError:  # it ended meanwhile
            continue
    return found


@needs_ray
@pytest.mark.slow
def test_on_ray_a_candidate_that_breaks_its_process_is_noted(bundle, tmp_path, monkeypatch, cluster):
    from hdispatch.tune.farm_ray import RayFarm

    program = f"""
import sys
sys.path[:0] = {IMPORTED!r}
import test_measure
from hdispatch.cli.main import main
from hdispatch.tune import measure_process
measure_process.COMMAND = {command("test_measure.FakeDevice({'near': 'abort'})")!r}
arguments = ["--out", {str(tmp_path / "t.jsonl")!r}, "--ray", {cluster!r}, "--gpus", "1"]
sys.exit(main(["tune", "measure", {str(bundle)!r}, *arguments]))
"""
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert '"near"} is fatal: it took the process along' in done.stdout
    assert f"{CELLS} cells measured" in done.stdout
    assert "of node" in done.stderr
    assert "NVIDIA Toy, 700 W, driver" in done.stderr
    found = timings.read(tmp_path / "t.jsonl")
    assert len(found) == 2 * CELLS + 1
    assert found[-1]["versions"]["python"] == platform.python_version()
    with pytest.raises(HdispatchError, match="3 GPUs are asked for; the Ray cluster has 2"):
        measure.measure(bundle, tmp_path / "u.jsonl", farm=RayFarm(cluster, gpus=3))
    monkeypatch.setattr(measure_process, "COMMAND", command("exec('raise HdispatchError(\"no such GPU\")')"))
    with pytest.raises(HdispatchError, match=r"^no such GPU$"):
        measure.measure(bundle, tmp_path / "u.jsonl", farm=RayFarm(cluster))


@needs_ray
@pytest.mark.slow
def test_on_ray_candidates_compile_to_the_same(tmp_path, cluster):
    """Tasks without a GPU; what they make is in the cache here, and nothing is left on the node."""
    from hdispatch.tune.collect import collect
    from hdispatch.tune.compile_ray import RayCompilers
    from hdispatch.tune.points import Scope

    scope = Scope(shapes=lambda spec: [spec.shapes[0]], buckets=lambda _spec: [0], spread=0)

    def made(name: str, **options: Any) -> tuple[Any, Any]:
        report = collect(["silu_and_mul"], "h200", tmp_path / name, scope=scope, **options)
        return read_candidates(tmp_path / name), report.ops["silu_and_mul"]

    before = folders_of_compilers()
    there, _ = made("ray", cache=tmp_path / "a", compilers=RayCompilers(cluster))
    assert folders_of_compilers() <= before
    here, _ = made("here", cache=tmp_path / "b", jobs=2)
    assert there["manifest"]["records"] == here["manifest"]["records"]
    assert there["contents"] == here["contents"]
    again, report = made("again", cache=tmp_path / "a", compilers=RayCompilers(cluster))
    assert report.from_cache == report.units >= len(here["manifest"]["records"]), "some have equal code"
    assert again["manifest"] == there["manifest"]


def test_without_ray_the_command_says_how_to_install_it(bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "hdispatch.tune.farm_ray", raising=False)
    assert main(["tune", "measure", str(bundle), "--out", str(tmp_path / "t.jsonl"), "--ray"]) == 1
    assert "pip install 'hdispatch[ray]'" in capsys.readouterr().err


def folders_of_compilers() -> set[Path]:
    """What actors that compile keep on this node: an ended run's that was killed may be among it."""
    return set(Path(tempfile.gettempdir()).glob("hdispatch-compile-*"))

"""The op benchmark without a GPU: its peers' functions, processes, runs and command line."""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import hdispatch
import pytest
import torch
import toy
from hdispatch.bench import compiled, ops, ops_compare, ops_crew, ops_grid, ops_report, ops_timing, ops_worker, peers
from hdispatch.bench.ops_grid import Cell
from hdispatch.cli import bench_ops, bench_ops_text
from hdispatch.cli.main import main
from hdispatch.errors import HdispatchError
from hdispatch.opspec import TensorArg
from hdispatch.testing.numeric import assert_close_by_dtype, compare_fp8
from op_results import MEASURED, QUANT, SMALL, arguments_of, cell, pair, result, timing, whole_result

CPU = torch.device("cpu")


# ---- the functions for torch.compile ----


def outputs_of(op: str, arguments: list) -> list[torch.Tensor]:
    """What the reference wrote, as the function returns it."""
    spec = hdispatch.ops.spec(op)
    spec.reference(*arguments)
    named = dict(zip((arg.name for arg in spec.args), arguments, strict=True))
    if op == "fused_qk_norm_rope":
        q, k, _ = named["qkv"].split([named[f"num_heads_{each}"] * named["head_dim"] for each in "qkv"], dim=-1)
        return [q, k]
    return [named[arg.name] for arg in spec.tensors() if arg.mutated and named[arg.name] is not None]


def returned(function, arguments) -> list[torch.Tensor]:
    got = function(*arguments)
    return [got] if isinstance(got, torch.Tensor) else list(got)


@pytest.mark.parametrize("op", [op for op in MEASURED if op in compiled.FUNCTIONS])
def test_functions_compute_what_the_reference_does(op):
    spec = hdispatch.ops.spec(op)
    for variant in spec.served_variants():
        sizes = SMALL | ({"N": 2, "K": 256} if op == "rms_norm" else {})
        arguments = spec.sample(variant, sizes, CPU, torch.Generator().manual_seed(2))
        before = peers.copied(arguments)
        got = returned(compiled.FUNCTIONS[op], arguments)
        assert all(
            torch.equal(a, b)
            for a, b in zip(arguments, before, strict=True)
            if isinstance(a, torch.Tensor) and a.dtype == torch.int64
        )
        for mine, wanted in zip(got, outputs_of(op, arguments), strict=True):
            if mine.dtype == torch.float8_e4m3fn:
                compare_fp8(mine, wanted, min_equal=0.99)
            elif mine.dtype == torch.int32:
                assert (mine == wanted).float().mean() > 0.99
            else:
                assert_close_by_dtype(mine, wanted.reshape(mine.shape), rtol=2e-2 if mine.dtype != torch.float32 else 1e-6)


@pytest.mark.parametrize("op", [op for op in MEASURED if op in compiled.FUNCTIONS])
def test_functions_are_one_graph(op):
    arguments = arguments_of(op, SMALL | ({"N": 1} if op == "rms_norm" else {}))
    torch.compile(compiled.FUNCTIONS[op], backend="eager", fullgraph=True, dynamic=False)(*arguments)


def test_the_options_are_the_posts_and_torch_takes_them():
    assert compiled.OPTIONS == {
        "enable_auto_functionalized_v2": False,
        "size_asserts": False,
        "alignment_asserts": False,
        "scalar_asserts": False,
        "combo_kernels": True,
        "benchmark_combo_kernel": True,
    }
    assert compiled.compile_op(QUANT) is not compiled.compile_op(QUANT)


# ---- peers ----


def test_vllms_call_takes_our_arguments(monkeypatch):
    schema = SimpleNamespace(_schema=SimpleNamespace(arguments=[None] * 6))
    library = SimpleNamespace(cutlass_scaled_mm=SimpleNamespace(default=schema), rms_norm=SimpleNamespace(default=schema))
    monkeypatch.setattr(peers, "vllm_op", lambda op: getattr(library, peers.VLLM_NAMES.get(op, op), None))
    assert peers.bind_vllm("scaled_mm", [1, 2, 3, 4, 5]) == (library.cutlass_scaled_mm, (1, 2, 3, 4, 5, None))
    assert peers.bind_vllm("scaled_mm_blockwise", range(8))[1] == (0, 1, 2, 3, 4, 5)
    assert peers.bind_vllm("silu_and_mul_dynamic_per_token_quant", []) is None


def test_our_doors():
    call, arguments = peers.bind_ours(QUANT, [1])
    assert call is getattr(hdispatch.ops, QUANT)
    assert arguments == (1,)
    assert peers.bind_ours_torch(QUANT, [])[0] is getattr(torch.ops.hdispatch, QUANT)


def test_a_library_that_is_none(tmp_path):
    (tmp_path / "x.so").write_text("no library")
    with pytest.raises(HdispatchError, match=r"--vllm-ops .*x\.so"):
        peers.load_vllm_ops(tmp_path / "x.so")


@pytest.mark.parametrize("m", [1, 5])
def test_arguments_lie_as_in_vllm(m):
    scales = TensorArg("a_scales", ("M", "K"), (torch.float32,), layout="any")
    spec = replace(toy.SPEC, name="scaled_mm_blockwise", args=(scales,))
    given = torch.randn(m, 3)
    (laid,) = peers.arrange(spec, [given])
    assert laid.stride() == (1, m)
    assert torch.equal(laid, given)
    assert peers.copied([laid])[0].stride() == laid.stride()
    spaced = torch.empty_strided((m, 2), (1, m + 3)).fill_(7)
    assert peers.copied([spaced])[0].stride() == (1, m + 3)
    assert torch.equal(peers.copied([spaced, None])[0], spaced)
    padded = replace(toy.SPEC, args=(TensorArg("x", ("M", "N", "K"), (torch.float32,), pad=True),))
    assert peers.arrange(padded, [torch.zeros(m, 1, 8)])[0].shape == (m, 8)
    assert peers.arrange(padded, [torch.zeros(m, 2, 8)])[0].shape == (m, 2, 8)


# ---- timing a cell ----


class Replayed:
    """In place of a CUDA graph: makes the calls once, and takes 2 µs."""

    made: list[Replayed]

    def __init__(self, calls, launches):
        self.calls, self.launches, self.closed = calls, launches, False
        for call in calls:
            call()
        self.made.append(self)

    def time(self, replays=1):  # noqa: ARG002
        """µs per launch."""
        return 2.0

    def close(self):
        """Free the graph."""
        self.closed = True


@pytest.fixture
def replayed(monkeypatch):
    monkeypatch.setattr(Replayed, "made", [], raising=False)
    monkeypatch.setattr(ops_timing, "Replay", Replayed)
    return Replayed.made


def test_measure_times_every_path_that_has_the_op(replayed):
    def broken(_op, _arguments):
        raise ValueError("no such kernel\nand more")

    binders = {peers.OURS: peers.bind_ours, "missing": lambda *_: None, "broken": broken}
    result = ops_timing.measure(cell(), binders, CPU, 3, random.Random(0))
    (timing,) = result.timings
    assert timing == {
        **cell(),
        "path": peers.OURS,
        "median_us": 2.0,
        "q1_us": 2.0,
        "q3_us": 2.0,
        "bytes": 16 * 64 * 3 + 64,
        "flops": 0,
    }
    assert [(f["path"], f["reason"]) for f in result.failures] == [("broken", "ValueError: no such kernel")]
    assert [(len(r.calls), r.closed) for r in replayed] == [(1, True)]


def test_rotated_buffers_are_apart(replayed):
    seen: list[int] = []

    def bind(_op, arguments):
        return (lambda *given: seen.append(given[1].data_ptr())), tuple(arguments)

    ops_timing.measure(cell(mode="rotated"), {"x": bind}, CPU, 1, random.Random(0))
    assert len(set(seen)) == len(replayed[0].calls) == 64
    assert replayed[0].launches % 64 == 0


def test_a_miss_is_a_failure_not_a_time(replayed):
    with hdispatch.strict():
        result = ops_timing.measure(cell(), {peers.OURS: peers.bind_ours}, CPU, 1, random.Random(0))
    assert not result.timings
    assert "MissError" in result.failures[0]["reason"]


def test_launch_count():
    assert ops_timing.launch_count(100, 0, 1) == 256
    assert ops_timing.launch_count(100, 0, 100) == 200
    assert ops_timing.launch_count(10**10, 0, 3) == 3
    assert ops_timing.launch_count(100, int(1e11), 1) == 4


# ---- processes that compile ----


class FakeWorker:
    """Answers at once; dies, fails or hangs on the Ms that it is told to."""

    def __init__(self, dies=(), fails=(), hangs=()):
        self.dies, self.fails, self.hangs = dies, fails, hangs
        self.asked: list[tuple[str, int]] = []
        self.killed = threading.Event()

    def ask(self, request):
        """The answer."""
        if request["do"] == "stats":
            return {"stats": {"op": {"hits": len(self.asked), "empty": 0, "fallbacks": 0, "misses": {"no row": 1}}}}
        m = request["cell"]["m"]
        self.asked.append((request["do"], m))
        if m in self.hangs:
            self.killed.wait(20)
        if m in self.dies or self.killed.is_set():
            raise ops_crew.WorkerGone(f"gone at {m}")
        if m in self.fails:
            return {"error": f"cannot {request['do']} {m}"}
        time.sleep(0.01)
        if request["do"] == "compile":
            return {"seconds": 1.5}
        path = {"path": peers.COMPILE, "median_us": 3.0, "q1_us": 3.0, "q3_us": 3.0, "bytes": 1, "flops": 0}
        return {"timings": [{**request["cell"], **path}], "failures": []}

    def kill(self):
        """End it."""
        self.killed.set()


def compile_cells(workers, ms, seconds=60.0, grace=0.5):
    ticks: list[int] = []
    made = ops_crew.compile_cells(
        workers, [cell(m=m) for m in ms], time.monotonic() + seconds, lambda: ticks.append(1), grace=grace
    )
    return made, len(ticks)


def test_cells_are_shared_out_and_kept_in_order():
    workers = [FakeWorker() for _ in range(3)]
    made, ticks = compile_cells(workers, range(1, 13))
    assert [each["m"] for each, _ in made.held] == list(range(1, 13))
    assert sorted(m for worker in workers for _, m in worker.asked) == list(range(1, 13))
    assert all(worker.asked for worker in workers)
    assert all(("compile", each["m"]) in worker.asked for each, worker in made.held)
    assert (ticks, made.seconds, made.failed, made.lost) == (12, [1.5] * 12, [], 0)


def test_a_cell_that_fails_and_a_process_that_dies():
    workers = [FakeWorker(dies={3}, fails={2})]
    made, _ = compile_cells(workers, range(1, 6))
    assert not made.held  # what a dead process had compiled is gone with it
    assert [(each["m"], reason) for each, reason in made.failed] == [(2, "cannot compile 2"), (3, "gone at 3")]
    assert made.lost == 1


def test_the_deadline_stops_handing_out():
    made, _ = compile_cells([FakeWorker()], range(1, 1000), seconds=0.1)
    assert 0 < len(made.held) < 50
    assert not compile_cells([FakeWorker()], [1], seconds=-1)[0].held


def test_a_process_that_hangs_is_ended():
    workers = [FakeWorker(hangs={1}), FakeWorker(hangs={1})]
    begin = time.monotonic()
    made, _ = compile_cells(workers, range(1, 5), seconds=0.2, grace=0.3)
    assert time.monotonic() - begin < 10
    assert sum(worker.killed.is_set() for worker in workers) == 1
    assert [each["m"] for each, _ in made.held] == [2, 3, 4]


def test_cells_are_timed_one_at_a_time_as_long_as_there_is_time():
    workers = [FakeWorker(), FakeWorker(dies={4}, fails={3})]
    held = [(cell(m=m), workers[m > 2]) for m in (1, 2, 3, 4, 5)]
    left = [True] * 4 + [False]
    answers = [answer for _, answer in ops_crew.time_cells(held, lambda: left.pop(0))]
    assert [answer.get("error") for answer in answers] == [None, None, "cannot time 3", "gone at 4"]
    assert [m for worker in workers for _, m in worker.asked] == [1, 2, 3, 4]


def test_stats_of_all_processes_are_added():
    total: dict = {}
    for stats in ops_crew.stats_of([FakeWorker(), FakeWorker()]):
        ops_crew.add_stats(total, stats)
    assert total == {"op": {"hits": 0, "empty": 0, "fallbacks": 0, "misses": {"no row": 2}}}


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what it needs where there is no GPU")
def test_a_real_process_says_what_it_needs(tmp_path):
    with ops_crew.crew(1, tmp_path, None, 3, 0) as (process,), pytest.raises(ops_crew.WorkerGone, match="sees no CUDA device"):
        process.ask({"do": "stats"})


PATCHED = """
import torch
from hdispatch.bench import compiled, ops_timing, ops_worker
class Replayed:
    def __init__(self, calls, launches):
        print("noise of a compiler")
        [call() for call in calls]
    def time(self, replays=1):
        return 2.0
    def close(self):
        pass
ops_timing.Replay = Replayed
ops_worker.require_gpu = lambda: torch.device("cpu")
ops_worker.runtime.load = lambda *_, **__: None
torch.cuda.synchronize = lambda *_: None
compiled.compile_op = lambda op: compiled.FUNCTIONS[op]
ops_worker.main()
"""


def test_a_real_process_compiles_times_and_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(ops_crew, "_COMMAND", (sys.executable, "-P", "-c", PATCHED))
    with ops_crew.crew(1, tmp_path, None, 3, 0) as processes:
        made = ops_crew.compile_cells(processes, [cell(m=1), cell(m=2)], time.monotonic() + 100)
        assert [each["m"] for each, _ in made.held] == [1, 2]
        assert not made.failed
        answers = [answer for _, answer in ops_crew.time_cells(made.held, lambda: True)]
        assert [[each["path"] for each in answer["timings"]] for answer in answers] == [[peers.COMPILE]] * 2
        (stats,) = ops_crew.stats_of(processes)
        assert stats[QUANT]["misses"] == {"no table": 2}
        processes[0].kill()
        with pytest.raises(ops_crew.WorkerGone, match="ended with status"):
            processes[0].ask({"do": "stats"})


def test_the_worker_answers_what_it_could_not_do(replayed):
    worker = ops_worker.Worker(ops_worker.Setup("b", None, 3, 0, "lock"), CPU, random.Random(0))
    assert "KeyError" in worker.answer({"do": "time", "cell": cell()})["error"]
    assert "no op 'nonsense'" in worker.answer({"do": "compile", "cell": cell(op="nonsense")})["error"]
    assert worker.answer({"do": "stats"})["stats"] == hdispatch.stats()


def test_the_worker_times_what_it_compiled(replayed, monkeypatch):
    monkeypatch.setattr(compiled, "compile_op", lambda op: compiled.FUNCTIONS[op])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    worker = ops_worker.Worker(ops_worker.Setup("b", None, 3, 0, "lock"), CPU, random.Random(0))
    assert worker.answer({"do": "compile", "cell": cell()})["seconds"] >= 0
    answer = worker.answer({"do": "time", "cell": cell()})
    assert [each["path"] for each in answer["timings"]] == [peers.COMPILE]
    assert [each["path"] for each in answer["failures"]] == [peers.OURS]  # no bundle: a miss
    assert json.loads(json.dumps(answer)) == answer


def test_measurements_of_compilers_take_turns(tmp_path):
    inside, most = [0], [0]

    def measurement():
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.02)
        inside[0] -= 1

    alone = ops_worker._locked(measurement, tmp_path / "lock")
    threads = [threading.Thread(target=alone) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


# ---- a run ----


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A run on no GPU: cells take 2 µs, torch.compile's processes are fake; gives the options and the cells measured."""
    seen: list[Cell] = []

    def measure(each, binders, device, rounds, order):
        seen.append(each)
        paths = [path for path in binders if path != peers.TORCH_MM]  # which has none of these ops
        return ops_timing.Measured([{**timing(path, 2), **each} for path in paths])

    @contextmanager
    def crew(count, *_):
        yield [FakeWorker(fails={4}) for _ in range(count)]

    bundle = SimpleNamespace(
        manifest={"ops": {QUANT: {}}, "target": {"name": "h200"}, "records": [], "tools": {}}, rows=7, unload=lambda: None
    )
    monkeypatch.setattr(ops, "require_gpu", lambda: CPU)
    monkeypatch.setattr(ops.machine, "describe", lambda _: result()["machine"])
    monkeypatch.setattr(ops.runtime, "load", lambda *_, **__: bundle)
    monkeypatch.setattr(ops, "copy_bandwidth", lambda _: 4e12)
    monkeypatch.setattr(ops, "measure", measure)
    monkeypatch.setattr(ops_crew, "crew", crew)
    options = ops.Options(tmp_path, ms=(1, 4, 8192), models=("8B",), workers=2, eager=False)
    return SimpleNamespace(options=options, cells=seen)


def test_run_measures_every_cell_once(measured):
    steps: list[tuple[int, int]] = []
    found = ops.run(measured.options, lambda done, total, _: steps.append((done, total)))
    warm = [each for each in found["timings"] if each["mode"] == "warm"]
    points = [ops_compare.point(each) for each in warm]
    assert len(points) == len(set(points)) == 2 * 3
    assert {each["m"] for each in measured.cells if each["mode"] == "warm"} == {4}  # torch.compile failed there
    assert {each["m"] for each in measured.cells if each["mode"] == "rotated"} == {8192}
    assert found["compile"]["cells"] == 4
    assert found["compile"]["ms"] == [1, 8192]
    assert [each["reason"] for each in found["failures"]] == ["cannot compile 4"] * 2
    assert peers.VLLM in found["skipped"]
    assert steps[-1][0] <= steps[-1][1]
    assert json.loads(json.dumps(found)) == found
    bench_ops_text.describe(found)


def test_ops_with_a_target_are_compiled_first(tmp_path):
    grid = [cell("rms_norm", m=1), cell(m=1), cell("scaled_mm", m=1), cell("rms_norm", m=8), cell(m=8), cell(m=16)]
    found = ops.compile_cells_of(grid, ops.Options(tmp_path, compile_ms=(1, 8)))
    assert [(each["op"], each["m"]) for each in found] == [(QUANT, 1), (QUANT, 8), ("rms_norm", 1), ("rms_norm", 8)]


def test_run_without_torch_compile(measured):
    found = ops.run(replace(measured.options, compile_ms=()))
    assert len(measured.cells) == 2 * 3 + 2
    assert found["compile"] is None
    assert found["skipped"][peers.COMPILE] == "left out"


def test_run_stops_cleanly_when_the_time_is_up(measured):
    found = ops.run(replace(measured.options, seconds=0.0))
    assert not found["timings"]
    assert found["skipped"]["2 rotated cells"] == "--seconds 0 had passed"
    assert found["skipped"]["6 warm cells"] == "--seconds 0 had passed"
    assert "for the others there was no time" in " ".join(found["skipped"].values())


def test_eager_calls_every_door(measured, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(ops, "EAGER_BATCHES", 2)
    monkeypatch.setattr(ops, "EAGER_CALLS", 3)
    monkeypatch.setattr(ops.runtime, "strict", contextmanager(lambda: iter([None])))
    found = ops.run(replace(measured.options, compile_ms=(), eager=True))
    doors = {(each["label"], each["path"]) for each in found["eager"]}
    assert doors == {(label, path) for label in ("hidden", "intermediate") for path in (peers.OURS, peers.OURS_TORCH)}
    assert all(each["m"] == 16 and 0 < each["q1_us"] <= each["q3_us"] for each in found["eager"])


def test_an_op_that_is_not_in_the_bundle(measured):
    with pytest.raises(HdispatchError, match="'rms_norm' is not in the bundle"):
        ops.run(replace(measured.options, ops=("rms_norm",)))


def test_end_to_end_counts_the_wait():
    batch = ops.end_to_end(lambda: None, (), 10, lambda: time.sleep(0.01))
    assert batch() >= 1e6


# ---- the command line ----


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys, tmp_path):
    assert main(["bench", "ops", "--bundle", str(tmp_path)]) == 1
    assert "bench ops measures GPU time, and torch" in capsys.readouterr().err


def test_show_and_check(capsys, tmp_path):
    file = tmp_path / "ops.json"
    ops_report.write_json(whole_result(), file)
    assert main(["bench", "ops", "--show", str(file)]) == 0
    assert "speedups, geometric means" in capsys.readouterr().out
    assert main(["bench", "ops", "--show", str(file), "--check"]) == 1
    ops_report.write_json(result(pair(1, 1.5)), file)
    assert main(["bench", "ops", "--show", str(file), "--check"]) == 0


def test_options(monkeypatch, tmp_path):
    monkeypatch.setattr(ops_timing, "require_gpu", lambda: CPU)
    seen: list[ops.Options] = []
    monkeypatch.setattr(ops, "run", lambda options, _: (seen.append(options), result())[1])
    line = ["bench", "ops", "--bundle", str(tmp_path)]
    assert main(line) == 0
    assert main([*line, "--quick", "--no-compile", "--mode", "both", "--models", "8B", "--ops", "rms_norm, silu_and_mul"]) == 0
    assert (
        main([*line, "--ms", "1,16", "--compile-ms", "16,32", "--seconds", "9", "--workers", "3", "--variants", "default,x"])
        == 0
    )
    plain, quick, cut = seen
    assert (plain.ms, plain.compile_ms, plain.modes, plain.rounds) == (ops_grid.MS, ops_grid.MS, ("warm",), ops.ROUNDS)
    assert (quick.ms, quick.compile_ms, quick.modes, quick.rounds) == (bench_ops.QUICK_MS, (), ("warm", "rotated"), 5)
    assert (quick.ops, quick.models) == (("rms_norm", "silu_and_mul"), ("8B",))
    assert (cut.ms, cut.compile_ms, cut.seconds, cut.workers, cut.variants) == ((1, 16), (16,), 9.0, 3, ("default", "x"))


def test_wrong_command_lines(capsys, tmp_path):
    assert main(["bench", "ops", "--ms", "0"]) == 2
    assert main(["bench", "ops", "--ms", "x"]) == 2
    assert main(["bench", "ops", "--vllm-ops", str(tmp_path / "x.so")]) == 1
    assert "is not a file" in capsys.readouterr().err
    assert main(["bench", "ops", "--json", str(tmp_path / "no" / "x.json")]) == 1
    assert "is not a folder" in capsys.readouterr().err

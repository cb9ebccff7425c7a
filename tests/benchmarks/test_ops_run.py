"""The op benchmark without a GPU: what torch.compile is given, its peers, processes, runs and command line."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import compiling
import hdispatch
import pytest
import torch
import toy
from hdispatch.cli.main import main
from hdispatch.errors import HdispatchError
from hdispatch.opspec import TensorArg
from ops_results import MEASURED, QUANT, SMALL, cell, pair, result, timing, whole_result

from benchmarks import verdict
from benchmarks.ops import check_baselines, command, compiled, grid, peers
from benchmarks.ops import run as ops
from benchmarks.ops import timing as ops_timing
from benchmarks.ops.grid import Cell
from benchmarks.ops.result import point

CPU = torch.device("cpu")


COMPILED = [op for op in MEASURED if op in compiled.OPS]


# ---- the functions for torch.compile ----


def sampled(op: str, variant=None) -> list:
    spec = hdispatch.registry.spec(op)
    sizes = SMALL | ({"N": 2, "K": 256} if op == "rms_norm" else {})
    return spec.sample(variant or spec.typical_variant(), sizes, CPU, torch.Generator().manual_seed(2))


def bits(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous().view(torch.uint8)


@pytest.mark.parametrize("op", COMPILED)
def test_functions_return_what_the_reference_writes_and_write_nothing(op):
    spec = hdispatch.registry.spec(op)
    for variant in spec.served_variants():
        arguments = sampled(op, variant)
        before, written = peers.copied(arguments), peers.copied(arguments)
        got = compiled.functional(spec)(*arguments)
        spec.reference(*written)
        for given, old in zip(arguments, before, strict=True):
            assert not isinstance(given, torch.Tensor) or torch.equal(bits(given), bits(old))
        pairs = zip(spec.args, written, strict=True)
        wanted = [value for arg, value in pairs if isinstance(arg, TensorArg) and arg.mutated and value is not None]
        assert wanted
        for mine, want in zip(got, wanted, strict=True):
            assert torch.equal(bits(mine), bits(want))
            assert mine.stride() == want.stride()


@pytest.mark.parametrize("op", COMPILED)
def test_functions_are_one_graph(op):
    """On meta tensors: of what is on the CPU the references check the indices, which no GPU waits for."""
    arguments = [value.to("meta") if isinstance(value, torch.Tensor) else value for value in sampled(op)]
    torch._dynamo.reset()
    function = compiled.functional(hdispatch.registry.spec(op))
    torch.compile(function, backend="eager", fullgraph=True, dynamic=False)(*arguments)


def test_every_op_but_gemms_is_compared_with_torch_compile():
    assert set(compiled.OPS) == set(grid.OPS) - set(grid.PRODUCTS)
    assert compiled.OPTIONS == {
        "enable_auto_functionalized_v2": False,
        "size_asserts": False,
        "alignment_asserts": False,
        "scalar_asserts": False,
        "combo_kernels": True,
        "benchmark_combo_kernel": True,
    }
    assert compiled.compile_op(QUANT) is not compiled.compile_op(QUANT), "torch knows the options"


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
    assert ops_timing.launch_count(10**9, 0, 1) == 4, "the ends of a graph are some µs"


# ---- processes that compile ----


def compile_cells(tmp_path, ms, function, processes=2, seconds=100.0) -> tuple[compiled.Compiled, int]:
    ticks: list[int] = []
    begin = time.monotonic()
    with compiled.caches():
        made = compiled.compile_cells(
            [cell(m=m) for m in ms], processes, begin + seconds, tmp_path / "lock", lambda: ticks.append(1), function
        )
    assert not multiprocessing.active_children()
    return made, len(ticks)


def test_cells_are_compiled_in_order_and_failures_named(tmp_path):
    made, ticks = compile_cells(tmp_path, range(1, 8), compiling.fails_at_2)
    assert [each["m"] for each in made.cells] == [1, 3, 4, 5, 6, 7]
    assert made.seconds == [1.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert [(each["m"], reason) for each, reason in made.failed] == [(2, "ValueError: cannot compile 2")]
    assert ticks == 7


def test_the_deadline_ends_cells_that_hang(tmp_path):
    begin = time.monotonic()
    made, _ = compile_cells(tmp_path, [5, 1], compiling.hangs_at_1, processes=1, seconds=15.0)
    assert time.monotonic() - begin < 60
    assert ([each["m"] for each in made.cells], made.failed) == ([5], [])
    assert not compile_cells(tmp_path, [5], compiling.hangs_at_1, seconds=-1.0)[0].cells


def test_a_process_that_dies_is_named(tmp_path):
    made, _ = compile_cells(tmp_path, [1], compiling.dies, processes=1)
    assert not made.cells
    assert [reason.partition(":")[0] for _, reason in made.failed] == ["BrokenProcessPool"]


def test_caches_are_the_runs_own(monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "mine")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    with compiled.caches() as folder:
        assert os.environ["TRITON_CACHE_DIR"].startswith(str(folder))
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"].startswith(str(folder))
    assert os.environ["TRITON_CACHE_DIR"] == "mine"
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    assert not folder.exists()


@pytest.mark.slow
def test_measurements_of_compilers_take_turns(tmp_path):
    spans = compiling.measured_in_turn(tmp_path / "lock", processes=3)
    assert len(spans) == 3
    for (_, end), (begin, _) in itertools.pairwise(spans):
        assert end <= begin


def test_a_cell_is_timed_with_what_was_compiled(replayed):
    function = compiled.functional(hdispatch.registry.spec(QUANT))
    measured = ops_timing.measure(cell(), {peers.COMPILE: compiled.binder(function)}, CPU, 1, random.Random(0))
    assert [each["path"] for each in measured.timings] == [peers.COMPILE]


# ---- baselines against others ----

FASTER = """
import time
import torch

def derived_is_slow(result, input, scale, scale_ub=None):
    return torch.zeros_like(result), torch.zeros_like(scale)

FUNCTIONS = {"dynamic_per_token_scaled_fp8_quant": derived_is_slow}
"""


@pytest.mark.parametrize(("given_us", "status"), [(1.0, 1), (1.96, 0), (2.5, 0)])
def test_a_faster_baseline_is_found(monkeypatch, capsys, tmp_path, given_us, status):
    def measure(each, binders, *_):
        assert list(binders) == ["derived", "in place", "given"]
        times = {"derived": 2.0, "in place": 3.0, "given": given_us}
        return ops_timing.Measured([{**timing(path, times[path]), **each} for path in binders])

    (tmp_path / "others.py").write_text(FASTER)
    monkeypatch.setattr(check_baselines, "require_gpu", lambda: CPU)
    monkeypatch.setattr(check_baselines, "measure", measure)
    assert check_baselines.main([str(tmp_path / "others.py"), "--ms", "1,16"]) == status
    out = capsys.readouterr().out
    assert f"{QUANT}" in out
    assert ("faster than the derived one" in out) == bool(status)


def test_a_baseline_that_fails_is_no_pass(monkeypatch, capsys, tmp_path):
    def measure(each, *_):
        return ops_timing.Measured(failures=[{**each, "path": "derived", "reason": "it broke"}])

    (tmp_path / "others.py").write_text(FASTER)
    monkeypatch.setattr(check_baselines, "require_gpu", lambda: CPU)
    monkeypatch.setattr(check_baselines, "measure", measure)
    assert check_baselines.main([str(tmp_path / "others.py"), "--ms", "1"]) == 1
    assert "it broke" in capsys.readouterr().out


# ---- a run ----


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A run on no GPU: cells take 2 µs, torch.compile's processes are fake; gives the options and the cells measured."""
    seen: list[Cell] = []

    def measure(each, binders, device, rounds, order):
        seen.append(each)
        paths = [path for path in binders if path != peers.TORCH_MM]  # which has none of these ops
        return ops_timing.Measured([{**timing(path, 2), **each} for path in paths])

    def compile_cells(cells, processes, deadline, lock, tick):
        failed = [(each, "cannot compile 4") for each in cells if each["m"] == 4]
        done = [each for each in cells if each["m"] != 4] if time.monotonic() < deadline else []
        return compiled.Compiled(done, [1.5] * len(done), failed)

    bundle = SimpleNamespace(
        manifest={"ops": {QUANT: {}}, "target": {"name": "h200"}, "records": [], "tools": {}}, rows=7, unload=lambda: None
    )
    monkeypatch.setattr(ops, "require_gpu", lambda: CPU)
    monkeypatch.setattr(ops.machine, "describe", lambda _: result()["machine"])
    monkeypatch.setattr(ops.runtime, "load", lambda *_, **__: bundle)
    monkeypatch.setattr(ops, "copy_bandwidth", lambda _: 4e12)
    monkeypatch.setattr(ops, "measure", measure)
    monkeypatch.setattr(compiled, "compile_cells", compile_cells)
    monkeypatch.setattr(compiled, "binder", lambda _function: peers.bind_ours)
    options = ops.Options(tmp_path, ms=(1, 4, 8192), models=("8B",), workers=2, eager=False)
    return SimpleNamespace(options=options, cells=seen)


def test_run_measures_every_cell_once(measured):
    steps: list[tuple[int, int]] = []
    found = ops.run(measured.options, lambda done, total, _: steps.append((done, total)))
    warm = [each for each in found["timings"] if each["mode"] == "warm"]
    points = [point(each) for each in warm if each["path"] == peers.OURS]
    assert len(points) == len(set(points)) == 2 * 3
    assert {each["m"] for each in measured.cells if each["mode"] == "rotated"} == {8192}
    with_compile = {each["m"] for each in warm if each["path"] == peers.COMPILE}
    assert with_compile == {1, 8192}, "torch.compile failed at 4"
    assert found["compile"]["cells"] == 4
    assert found["compile"]["ms"] == [1, 8192]
    assert [each["reason"] for each in found["failures"]] == ["cannot compile 4"] * 2
    assert peers.VLLM in found["skipped"]
    assert steps[-1][0] <= steps[-1][1]
    assert json.loads(json.dumps(found)) == found
    command.describe(found)


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
    assert found["skipped"]["torch.compile, 6 of 6 cells"] == "2 failed, for the others there was no time"


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
    verdict.write_json(whole_result(), file)
    assert main(["bench", "ops", "--show", str(file)]) == 0
    assert "over, or where" in capsys.readouterr().out
    assert main(["bench", "ops", "--show", str(file), "--check"]) == 1
    verdict.write_json(result(pair(1, 1.5)), file)
    assert main(["bench", "ops", "--show", str(file), "--check", "--json", str(file)]) == 0
    targets = json.loads(file.read_text())["targets"]
    assert {each["verdict"] for each in targets} == {"pass", "not run"}


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
    assert (plain.ms, plain.compile_ms, plain.modes, plain.rounds) == (grid.MS, grid.MS, ("warm",), ops.ROUNDS)
    assert (quick.ms, quick.compile_ms, quick.modes, quick.rounds) == (command.QUICK_MS, (), ("warm", "rotated"), 5)
    assert (quick.ops, quick.models) == (("rms_norm", "silu_and_mul"), ("8B",))
    assert (cut.ms, cut.compile_ms, cut.seconds, cut.workers, cut.variants) == ((1, 16), (16,), 9.0, 3, ("default", "x"))


def test_wrong_command_lines(capsys, tmp_path):
    assert main(["bench", "ops", "--ms", "0"]) == 2
    assert main(["bench", "ops", "--ms", "x"]) == 2
    assert main(["bench", "ops", "--vllm-ops", str(tmp_path / "x.so")]) == 1
    assert "is not a file" in capsys.readouterr().err
    assert main(["bench", "ops", "--json", str(tmp_path / "no" / "x.json")]) == 1
    assert "is not a folder" in capsys.readouterr().err


def test_help(capsys):
    assert main(["bench", "ops", "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: hdispatch bench ops")
    for words in ("--make-vllm-ll", "--compile-seconds", "targets.toml", "rotated"):
        assert words in out, words


@pytest.mark.parametrize("name", ["ops", "pdl"])
def test_a_wheel_says_where_the_benchmark_is(tmp_path, name):
    """The package alone, as a wheel has it, from a folder where no benchmarks/ is."""
    code = (
        "import sys, pathlib, hdispatch.cli.bench as bench\n"
        f"bench.__file__ = {str(tmp_path / 'site' / 'hdispatch' / 'cli' / 'bench.py')!r}\n"
        "from hdispatch.cli.main import main\n"
        f"sys.exit(main(['bench', {name!r}, '--bundle', 'b', '--help']))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"bench {name} is in a checkout of hdispatch, not in its wheel" in done.stderr


def test_a_checkout_in_pythonpath_is_found(tmp_path):
    checkout = str(Path(__file__).parents[2])
    code = (
        "import sys, hdispatch.cli.bench as bench\n"
        f"bench.__file__ = {str(tmp_path / 'site' / 'hdispatch' / 'cli' / 'bench.py')!r}\n"
        "from hdispatch.cli.main import main\n"
        "sys.exit(main(['bench', 'pdl', '--help']))"
    )
    environment = os.environ | {"PYTHONPATH": checkout}
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

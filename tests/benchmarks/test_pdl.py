"""The PDL benchmark without a GPU: its chains through the null driver, what is timed against what, verdicts, refusals."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path

import hdispatch
import pytest
import torch
from hdispatch.cli.main import main
from hdispatch.compile import Selection, build
from hdispatch.errors import HdispatchError
from hdispatch.manifest import LIBRARY
from hdispatch.testing import device_timer, null
from hdispatch.testing.numeric import poison

from benchmarks.pdl import run as pdl
from benchmarks.pdl.chains import CHAINS, Chain, make_chain
from benchmarks.pdl.command import describe
from benchmarks.verdict import TARGETS

CPU = torch.device("cpu")
HAS_DSL = importlib.util.find_spec("nvidia_cutlass_dsl") is not None
SERVED = tuple(CHAINS) if HAS_DSL else ("cubin",)
needs_dsl = pytest.mark.skipif(not HAS_DSL, reason="nvidia-cutlass-dsl is not installed: no CuteDSL row is built")
#: µs that a launch takes in these tests.
WITH_PDL, WITHOUT = 1.5, 2.4


def chain_of(name: str, m: int = 4) -> Chain:
    chain = make_chain(name, m, CPU)
    chain.restart(chain.start())
    return chain


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """The rows of the chains for M = 1 and 16, through the user's build cache."""
    steps = [step for name in SERVED for step in chain_of(name, 1).steps]

    def shapes(spec):
        wanted = [step for step in steps if step.op == spec.name]
        return [next(shape for shape in spec.shapes if fits(spec, shape, step)) for step in wanted]

    def fits(spec, shape, step):
        return spec.row_shape(step.variant, shape).items() <= dict(step.sizes).items()

    folder = tmp_path_factory.mktemp("pdl") / "bundle"
    selection = Selection(
        shapes=shapes,
        variants=lambda spec: sorted({step.variant for step in steps if step.op == spec.name}),
        buckets=lambda spec: [spec.ladder.index(m) for m in (1, 16)],
    )
    build(sorted({step.op for step in steps}), "h200", folder, select=selection)
    return folder


# ---- the chains ----


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("m", [1, 16])
def test_each_call_reads_what_the_one_before_wrote(name, m):
    steps = chain_of(name, m).steps
    assert len(steps) == 8
    for before, step in zip((steps[-1], *steps), steps, strict=False):
        written = {tensor.data_ptr() for tensor in before.written()}
        fresh = {tensor.data_ptr() for tensor in step.written()} - written
        read = {given.data_ptr() for given in step.arguments if isinstance(given, torch.Tensor)} - fresh
        assert written & read, f"{step.op} after {before.op}"


@pytest.mark.parametrize("name", CHAINS)
def test_no_call_can_be_left_out(name):
    """By the references: without any one of them the results are others."""

    def results(left_out: int | None) -> list[torch.Tensor]:
        chain = make_chain(name, 2, CPU)
        for step in chain.steps:
            for tensor in step.written():
                poison(tensor)
        chain.restart(chain.start())
        for index, call in enumerate(chain.calls()):
            if index != left_out:
                call()
        return [tensor.float() for tensor in chain.state]

    whole = results(None)
    assert all(bool(tensor.isfinite().all()) for tensor in whole)
    for index in range(8):
        got = results(index)
        assert not all(torch.equal(a, b) for a, b in zip(got, whole, strict=True)), index


@pytest.mark.parametrize("name", CHAINS)
def test_the_numbers_stay_numbers(name):
    """As many passes as there are between two restarts."""
    chain = chain_of(name, 1)
    for _ in range(pdl.GRAPH_PASSES * pdl.REPLAYS):
        for call in chain.calls():
            call()
    for tensor in chain.state:
        assert bool(tensor.isfinite().all())
        assert 0.01 < tensor.float().std() < 1e4


def test_weights_and_starts_are_the_same_every_time():
    first, second = (chain_of("mixed") for _ in range(2))
    for a, b in zip(first.start(3), second.start(3), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.start(0)[0], first.start(1)[0])
    for left, right in zip(first.steps, second.steps, strict=True):
        weights = {"ll_gemm_bf16": 2, "fused_add_rms_norm": 2}.get(left.op)
        assert weights is None or torch.equal(left.arguments[weights], right.arguments[weights])


def test_all_that_is_written_is_in_the_memory_given():
    made: list[torch.Tensor] = []

    def empty(shape, dtype):
        made.append(torch.empty(shape, dtype=dtype))
        return made[-1]

    for name in CHAINS:
        made.clear()
        chain = make_chain(name, 3, CPU, empty)
        given = {tensor.untyped_storage().data_ptr() for tensor in made}
        assert {t.untyped_storage().data_ptr() for step in chain.steps for t in step.written()} == given
        assert {tensor.data_ptr() for tensor in chain.state} <= given


def attribute(launch) -> bool:
    """Whether a launch of the null driver has the PDL attribute, or hands a host function the flag."""
    if launch["file"] != LIBRARY:
        return launch["pdl"]
    flags = [value for param in launch["params"] if isinstance(value := null.ffi_argument(param), int)]
    assert len(flags) == 1
    return flags[0] == 1


def addresses(launch) -> set[int]:
    """What a launch points to."""
    if launch["file"] == LIBRARY:
        arguments = [null.ffi_argument(param) for param in launch["params"]]
        return {value["address"] for value in arguments if isinstance(value, dict) and "address" in value}
    return {int.from_bytes(param, "little") for param in launch["params"] if len(param) == 8}


@pytest.mark.parametrize("with_pdl", [True, False])
@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.parametrize("name", SERVED)
def test_eight_launches_of_the_kinds_that_the_chain_is_about(bundle, name, m, with_pdl):
    loaded = hdispatch.load(bundle, driver="null", pdl=with_pdl)
    try:
        chain = chain_of(name, m)
        with hdispatch.strict():
            for call in chain.calls():  # this thread's first launch has no attribute
                call()
            with null.recording():
                for call in chain.calls():
                    call()
        launches = null.launches()
        assert [step.launcher for step in chain.steps] == [
            "tvm_ffi" if launch["file"] == LIBRARY else "cubin" for launch in launches
        ]
        assert [attribute(launch) for launch in launches] == [with_pdl] * 8
        for before, launch in zip(chain.steps, launches[1:], strict=False):
            assert {tensor.data_ptr() for tensor in before.written()} & addresses(launch)
        backends = [each["backend"] for each in pdl.served_by(chain, loaded)]
        assert {"cutedsl" if step.launcher == "tvm_ffi" else "cubin" for step in chain.steps} == {
            "cutedsl" if backend == "cutedsl" else "cubin" for backend in backends
        }
    finally:
        loaded.unload()


def test_kinds_of_rows():
    kinds = {name: [step.launcher for step in chain_of(name).steps] for name in CHAINS}
    assert kinds == {"mixed": ["cubin", "tvm_ffi"] * 4, "cubin": ["cubin"] * 8, "cutedsl": ["tvm_ffi"] * 8}


# ---- a run, with the null driver in the place of a GPU ----


class Clock:
    """In the place of CUDA graphs and events: a launch takes WITH_PDL µs if it has the attribute, else WITHOUT."""

    def __init__(self) -> None:
        self.with_pdl, self.without = WITH_PDL, WITHOUT
        self.modes: list[tuple[str, int]] = []

    def time(self, work) -> float:
        """µs of what is launched."""
        with null.recording():
            work()
        launches = null.launches()
        self.launched = len(launches)
        return sum(self.with_pdl if attribute(launch) else self.without for launch in launches)

    def elapsed_us(self, work, head_start: int = 0) -> float:
        """The host takes as long again."""
        total = self.time(work)
        self.modes.append(("queued" if head_start else "eager", self.launched))
        return total if head_start else 2 * total

    def replay(self, calls, launches):
        """A graph."""
        return Replayed(self, calls, launches)


class Replayed:
    """In the place of a CUDA graph."""

    def __init__(self, clock: Clock, calls, launches: int) -> None:
        self.launches, self.closed = launches, False
        for call in calls:
            call()
        self.each = clock.time(lambda: [call() for call in calls]) / clock.launched
        self.clock = clock

    def time(self, replays: int = 1) -> float:
        """µs per launch."""
        self.clock.modes.append(("graph", self.launches * replays))
        return self.each

    def close(self) -> None:
        """Free the graph."""
        self.closed = True


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made, real = Clock(), hdispatch.runtime.load
    monkeypatch.setattr(pdl, "_require_gpu", lambda: CPU)
    monkeypatch.setattr(pdl, "Replay", made.replay)
    monkeypatch.setattr(pdl, "elapsed_us", made.elapsed_us)
    monkeypatch.setattr(pdl.machine, "describe", lambda _device: dict.fromkeys(HEADER, "none"))

    def load(folder, *, device=None, pdl=True):
        return real(folder, driver="null", pdl=pdl)

    monkeypatch.setattr(pdl.runtime, "load", load)
    return made


HEADER = ("gpu", "driver", "cpu", "cores", "python", "torch", "triton", "hdispatch", "revision", "date")


def options(bundle: Path, **changes) -> pdl.Options:
    return pdl.Options(**{"bundle": bundle, "rounds": 3, **changes})


def test_a_run_times_every_chain_both_ways(bundle, clock, monkeypatch):
    monkeypatch.setattr(pdl, "EAGER_PASSES", 3)
    result = pdl.run(options(bundle))
    assert set(result) == {"machine", "chains", "timings", "skipped"}
    cells = {(each["chain"], each["m"], each["mode"], each["pdl"]): each for each in result["timings"]}
    assert set(cells) == {(c, m, mode, on) for c in SERVED for m in (1, 16) for mode in pdl.MODES for on in (True, False)}
    for (_, _, mode, on), each in cells.items():
        wanted = 8 * (WITH_PDL if on else WITHOUT) * (2 if mode == "eager" else 1)
        assert [each[key] for key in ("median_us", "q1_us", "q3_us")] == pytest.approx([wanted] * 3)
    assert {mode: count for mode, count in clock.modes if count > 256} == {"graph": 8 * pdl.GRAPH_PASSES * pdl.REPLAYS}
    assert {count for mode, count in clock.modes if mode != "graph"} == {24}
    verdicts = pdl.judge(result["timings"])
    assert len(verdicts) == 2 * 2 * len(SERVED)
    for verdict in verdicts:
        assert verdict.measured == pytest.approx(WITHOUT / WITH_PDL)
        assert verdict.word == "pass"
    assert json.loads(json.dumps(result)) == result
    assert not hdispatch.loaded()
    assert set(result["chains"]) == {f"{name}, M={m}" for name in SERVED for m in (1, 16)}
    if not HAS_DSL:
        assert all("no row of ll_gemm_bf16" in result["skipped"][f"mixed, M={m}"] for m in (1, 16))


@pytest.mark.parametrize(("with_pdl", "speedup"), [(2.4, 1.0), (2.2, 1.09), (3.0, 0.8)])
def test_pdl_that_gains_too_little_loses(bundle, clock, with_pdl, speedup):
    clock.with_pdl = with_pdl
    result = pdl.run(options(bundle, chains=("cubin",), ms=(1,)))
    verdicts = pdl.judge(result["timings"])
    assert {verdict.text for verdict in verdicts} == {"cubin, M=1, graph", "cubin, M=1, queued"}
    for verdict in verdicts:
        assert verdict.measured == pytest.approx(speedup, rel=0.01)
        assert verdict.word == "miss"


def test_a_chain_without_rows_is_named_and_the_others_run(bundle, clock):
    result = pdl.run(options(bundle, chains=("cubin",), ms=(1, 700)))
    assert {each["m"] for each in result["timings"]} == {1}
    assert "no row of fused_add_rms_norm" in result["skipped"]["cubin, M=700"]


def test_rows_of_the_other_kind_are_named(bundle, clock, monkeypatch):
    given = CHAINS["cubin"]

    def changed(make):
        steps, state = given(make)
        object.__setattr__(steps[2], "launcher", "tvm_ffi")
        return steps, state

    monkeypatch.setitem(CHAINS, "cubin", changed)
    result = pdl.run(options(bundle, chains=("cubin",), ms=(1,)))
    assert not result["timings"]
    assert "is served by a cubin record; the chain is to have tvm_ffi" in result["skipped"]["cubin, M=1"]


def test_launches_that_race_are_not_timed(bundle, clock, monkeypatch):
    def racing(calls, launches):
        replay = clock.replay(calls, launches)
        time_it = replay.time

        def spoil(replays=1):
            if replay.each == WITH_PDL:
                calls[0].args[0].fill_(float("nan"))
            return time_it(replays)

        replay.time = spoil
        return replay

    monkeypatch.setattr(pdl, "Replay", racing)
    with pytest.raises(HdispatchError, match="4096 of 4096 elements differ between PDL on and off"):
        pdl.run(options(bundle, chains=("cubin",), ms=(1,)))
    assert not hdispatch.loaded()


def test_what_fails_while_it_is_timed_is_named(bundle, clock, monkeypatch):
    def failing(work, head_start=0):
        if head_start:
            raise HdispatchError("too slow")
        return clock.elapsed_us(work, head_start)

    monkeypatch.setattr(pdl, "elapsed_us", failing)
    result = pdl.run(options(bundle, chains=("cubin",), ms=(1,)))
    assert {each["mode"] for each in result["timings"]} == {"graph", "eager"}
    assert result["skipped"]["cubin, M=1, queued, PDL on"] == "HdispatchError: too slow"


def test_the_order_is_random_and_the_seeds(bundle, clock, monkeypatch):
    def order_of(seed: int) -> list[bool]:
        taken: list[bool] = []
        real = hdispatch.runtime.Bundle.publish
        monkeypatch.setattr(hdispatch.runtime.Bundle, "publish", lambda bundle: (taken.append(bundle.pdl), real(bundle)))
        pdl.run(options(bundle, chains=("cubin",), ms=(1,), rounds=20, seed=seed))
        monkeypatch.setattr(hdispatch.runtime.Bundle, "publish", real)
        return taken

    first = order_of(1)
    assert first == order_of(1) != order_of(2)
    assert first.count(True) == first.count(False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chains": ("mixed", "long")}, "no chain 'long'; there are mixed, cubin, cutedsl"),
        ({"rounds": 0}, "rounds is 0"),
        ({"ms": ()}, r"Ms \[\]"),
        ({"ms": (0,)}, r"Ms \[0\]"),
    ],
)
def test_bad_options(clock, tmp_path, changes, message):
    with pytest.raises(HdispatchError, match=message):
        pdl.run(options(tmp_path, **changes))


# ---- the clock itself ----


class Event:
    """In the place of a CUDA event: the sleeping kernel ends after `sleep` cycles of the host's clock."""

    until = 0.0

    def __init__(self) -> None:
        self.at = 0.0

    def record(self) -> None:
        """Happens when all before it is done."""
        self.at = max(time.perf_counter(), Event.until)

    def query(self) -> bool:
        """Whether it has happened."""
        return time.perf_counter() >= self.at

    def synchronize(self) -> None:
        """Waits for it."""
        time.sleep(max(0.0, self.at - time.perf_counter()))

    def elapsed_time(self, end: Event) -> float:
        """ms between two."""
        return (end.at - self.at) * 1e3


@pytest.fixture
def events(monkeypatch) -> list[int]:
    slept: list[int] = []

    def sleep(cycles: int) -> None:
        slept.append(cycles)
        Event.until = time.perf_counter() + cycles * 1e-9

    monkeypatch.setattr(Event, "until", 0.0)
    monkeypatch.setattr(device_timer, "timing_event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep, raising=False)
    return slept


def test_a_head_start_that_is_too_short_is_doubled(events):
    took = device_timer.elapsed_us(lambda: time.sleep(0.01), head_start=2_000_000)
    assert events == [2_000_000, 4_000_000, 8_000_000, 16_000_000]
    assert took < 6_000, "the host's 10 ms are not in the figure"


def test_without_a_head_start_the_host_is_in_the_figure(events):
    assert device_timer.elapsed_us(lambda: time.sleep(0.01)) >= 10_000
    assert not events


def test_a_head_start_has_an_end(events, monkeypatch):
    monkeypatch.setattr(device_timer, "LONGEST_HEAD_START", 1_000_000)
    with pytest.raises(HdispatchError, match="takes longer to enqueue"):
        device_timer.elapsed_us(lambda: time.sleep(0.005), head_start=500_000)
    assert events == [500_000, 1_000_000]


# ---- verdicts and words ----


def timing(on: bool, us: float, mode: pdl.Mode = "graph", chain: str = "mixed", m: int = 1) -> pdl.Timing:
    return {"chain": chain, "m": m, "mode": mode, "pdl": on, "median_us": us, "q1_us": us, "q3_us": us}


@pytest.mark.parametrize(
    ("on", "off", "mode", "verdict"),
    [
        (10.0, 11.6, "graph", "pass"),
        (10.0, 11.4, "graph", "miss"),
        (10.0, 11.4, "queued", "miss"),
    ],
)
def test_judge(on, off, mode, verdict):
    (judged,) = pdl.judge([timing(True, on, mode), timing(False, off, mode)])
    assert judged.measured == pytest.approx(off / on)
    assert judged.word == verdict
    assert not pdl.judge([timing(True, on, "eager"), timing(False, off, "eager")]), "the host's time has no target"


def test_what_was_timed_one_way_only_is_not_judged():
    assert not pdl.judge([timing(True, 1.0), timing(False, 1.0, m=16), timing(False, 2.0, "eager")])


def test_the_report_and_the_exit_code(monkeypatch, capsys, tmp_path):
    step = {"op": "ll_gemm_bf16", "K": 4096, "N": 128, "launcher": "tvm_ffi", "backend": "cutedsl"}
    header = dict.fromkeys(HEADER, "x") | {"pinned_to_core": 3, "rounds": 5, "seed": 0, "bundle": {"target": "h200", "rows": 9}}
    result = {
        "machine": header,
        "chains": {"mixed, M=1": [step]},
        "timings": [timing(True, 12.5), timing(False, 20.0), timing(True, 12.5, m=16), timing(False, 13.0, m=16)],
        "skipped": {},
    }
    taken: list[pdl.Options] = []
    monkeypatch.setattr(pdl, "run", lambda options, _progress: (taken.append(options), result)[1])
    line = ["bench", "pdl", "--bundle", "b", "--quick", "--ms", "1,16", "--chains", "mixed"]
    assert main([*line, "--json", str(tmp_path / "pdl.json")]) == 0
    out = capsys.readouterr().out
    for words in ("1.60 ×", "1.04 ×", "pass", "miss", "12.50 (12.50–12.50)", "ll_gemm_bf16 [K=4096, N=128] cutedsl"):
        assert words in out, words
    assert json.loads((tmp_path / "pdl.json").read_text()) == result
    assert (taken[0].rounds, taken[0].chains, taken[0].ms) == (5, ("mixed",), (1, 16))
    assert main([*line, "--check"]) == 1
    result["timings"] = result["timings"][:2]
    assert main([*line, "--check"]) == 0
    result["skipped"] = {"cutedsl, M=1": "the bundle has no row of ll_gemm_bf16"}
    assert main([*line, "--check"]) == 1
    assert "cutedsl, M=1: the bundle has no row" in describe(result)


def test_help(capsys):
    assert main(["bench", "pdl", "--help"]) == 0
    out = capsys.readouterr().out
    wanted = f"{TARGETS['pdl']['speedup']:.2f}"
    for words in (*CHAINS, *pdl.MODES, "--check", wanted, f"{pdl.GRAPH_PASSES} passes", f"{pdl.REPLAYS} replays"):
        assert words in out, words
    assert f"{pdl.EAGER_PASSES} passes" in out


def test_errors_in_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("HDISPATCH_BUNDLE", raising=False)
    assert main(["bench", "pdl"]) == 1
    assert "needs a bundle" in capsys.readouterr().err
    assert main(["bench", "pdl", "--bundle", "b", "--json", str(tmp_path / "no" / "x.json")]) == 1
    assert "is not a folder" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["bench", "pdl", "--bundle", "b"]) == 1
        assert "sees no CUDA device" in capsys.readouterr().err

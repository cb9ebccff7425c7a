"""Measuring candidates: each cell's candidates against the reference first, then against each other, through the C++ launcher.

A launch table has one row per key, so each candidate gets a table of its own: one row, one class of M, published while the
candidate is called or captured. Tables are never unloaded, so a captured graph keeps its code when the next is published.

`measure` does so in a separate process (measure_process.py): one that a candidate breaks or never leaves is replaced.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import random
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NotRequired, Protocol, TypedDict, get_args

import torch

from .. import _C, ops
from ..errors import BundleError, HdispatchError
from ..ladders import Ladders, bucket_bounds
from ..manifest import MANIFEST_NAME, Manifest, Record, artifacts_of, class_of, ladders_of
from ..opspec import OpSpec, TensorArg
from ..runtime import check_target, strict
from ..testing.device_timer import Queued, Replay, Timed, interleave, rotation_count, timing_event
from ..testing.numeric import MismatchError, compare_outputs
from . import timings
from .candidates import CandidateBundle, Cell, read_candidates
from .measure_process import Lost, MeasureProcess, Setup
from .timings import BROKE, CellKey, ConfigKey, Status, Timing

#: Rounds in which every candidate is timed once, and after how many of them those slower than the best by which factor go.
ROUNDS = 9
EARLY_STOP = {2: 1.25, 4: 1.12}
#: Candidates further behind than this, by a first estimate, are not timed in a graph at all.
HOPELESS = 3.0
#: What one replay takes, in µs, and the fewest and most launches in it.
REPLAY_US, LEAST_LAUNCHES, MOST_LAUNCHES = 500.0, 4, 256
#: An estimate of no more µs may be the host's: the launch takes less.
HOST_US = 8.0
#: Launches that are made one by one.
QUEUED_LAUNCHES = 64
#: Calls that L2 holds are also timed on the same buffers: what the last op wrote is there. Not those with more bytes of
#: weights than an eighth of L2: other layers' have taken their place by the time that the op comes again.
WARM_BYTES, WARM_WEIGHTS = 48 * 2**20, 6 * 2**20
#: Replays in a row of those: under PDL kernels that release their successors at once pile up on some SMs, which shows after
#: some hundred launches and costs up to 20 %.
WARM_REPLAYS = 4
#: Calls that the estimate is taken over.
ESTIMATE_CALLS = 4
#: Tensors with more elements than this are checked with fewer rows, if the bucket has fewer: the reference is slow.
CHECKED_ELEMENTS = 2**26

#: How launches are timed: in a graph whose buffers rotate, one by one in a stream, and in a graph on the same buffers.
How = Literal["graph", "stream", "warm"]
Call = Callable[[], object]
#: Publishes a candidate's table.
Serve = Callable[[], None]


class Timeable(Timed, Protocol):
    """What `device_timer.Replay` is."""

    def close(self) -> None:
        """Free it."""


class Device:
    """The CUDA device that candidates are measured on."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.torch_device = torch.device("cuda", index)

    def publish(self, rows: OneRow) -> Serve:
        """Serve that one row, and nothing else; what is returned does so again, without loading its code once more."""
        builder = _C.TableBuilder(self.index, self.device_count(), True)
        builder.set_ladder(rows.op, rows.ladders.m, rows.ladders.second)
        add = builder.add_library if rows.record["launcher"] == "tvm_ffi" else builder.add_module
        for name, content in rows.files.items():
            add(name, content)
        builder.add_row(rows.op, rows.variant, rows.k, rows.n, rows.bucket, builder.add_record(rows.op, rows.record))
        table = builder.finish()
        _C.publish(table)
        return lambda: _C.publish(table)

    def device_count(self) -> int:
        """GPUs of this process."""
        return torch.cuda.device_count()

    def launch(self, op: _C.Op, arguments: Sequence[Any]) -> None:
        """One call, waited for."""
        op(*arguments)
        self.synchronize()

    def synchronize(self) -> None:
        """Wait; raises if the GPU has failed."""
        torch.cuda.synchronize(self.torch_device)

    def estimate(self, calls: Sequence[Call]) -> float:
        """Microseconds per call, at least what the host takes to make one."""
        start, end = timing_event(), timing_event()
        start.record()
        for index in range(ESTIMATE_CALLS):
            calls[index % len(calls)]()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3 / ESTIMATE_CALLS

    def replay(self, calls: Sequence[Call], launches: int) -> Timeable:
        """A graph of launches."""
        return Replay(calls, launches)

    def queued(self, serve: Serve, calls: Sequence[Call]) -> Timeable:
        """Launches made one by one, while what `serve` is for is served."""
        return Queued(calls, max(QUEUED_LAUNCHES, len(calls)), serve)

    def describe(self) -> str:
        """What results are filed under."""
        return torch.cuda.get_device_name(self.torch_device)


@dataclass(frozen=True)
class OneRow:
    """The launch table of one candidate in one cell."""

    op: _C.Op
    ladders: Ladders
    variant: str
    k: int
    n: int
    bucket: int
    record: Record
    files: dict[str, bytes]


@dataclass(frozen=True)
class Options:
    """What of a bundle is measured, and how long. None: all of it.

    ops      names of ops
    limit    cells
    seconds  after which no further cell is begun
    seed     of the arguments and of the order
    timeout  seconds that a candidate may take for one step: to be loaded, checked and captured, or for one figure
    """

    ops: Sequence[str] | None = None
    limit: int | None = None
    seconds: float | None = None
    seed: int = 0
    timeout: float = 60.0

    def __post_init__(self) -> None:
        """`HdispatchError` for a number that says nothing."""
        if self.limit is not None and self.limit < 0:
            raise HdispatchError(f"the limit is {self.limit} cells; it takes 0 or more")
        if self.seconds is not None and not self.seconds >= 0:
            raise HdispatchError(f"the time is {self.seconds} s; it takes 0 or more")
        if not 0 < self.timeout < 1e6:
            raise HdispatchError(f"the timeout is {self.timeout} s; it takes more than 0, and less than 1e6")


@dataclass
class Report:
    """What a run did: cells done now, cells done before, cells left; seconds; the candidates that gave no time, in words."""

    measured: int = 0
    before: int = 0
    left: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


def measure(
    folder: Path,
    out: Path,
    options: Options | None = None,
    *,
    device: Device | None = None,
    versions: Mapping[str, Any] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Report:
    """Measure the cells of a candidate bundle that `out` has not whole, and append what is found to `out`.

    device    to measure on in this very process, which a candidate may then take along; None: the current CUDA device, from
              processes that are ended where a candidate breaks them or takes longer than the timeout
    versions  goes into every line
    progress  called before each cell with candidates done, candidates in all and the cell's name

    Such a candidate is noted in `out` as fatal or timeout and is not tried again, here or in a later run; the rest goes on.
    Raises `BundleError` for a bundle that cannot be read or is for other ops than the installed ones, `HdispatchError` for one
    that is for another GPU, if `out` holds another GPU's timings or cannot be written, and if what is no candidate's fails.
    """
    chosen = options or Options()
    bundle = read_candidates(folder)
    _check_ops(folder, bundle)
    given = dict(versions or {})
    measurer: _Measurer
    if device is not None:
        measurer = _Here(bundle, device, chosen.seed, given)
    else:
        measurer = MeasureProcess(Setup(str(folder.resolve()), _current_device(), chosen.seed, given), chosen.timeout)
    with contextlib.closing(measurer):
        return _Run(bundle, out, measurer, given, _read_known(out, measurer.gpu)).go(chosen, progress)


class _Measurer(Protocol):
    """What measures a cell at a time."""

    gpu: str

    def measure(self, cell: int, skip: Collection[int]) -> list[Timing] | Lost:
        """The lines of a cell, by its index, without the records to skip; or that of the candidate that was the end of it."""

    def close(self) -> None:
        """Give up what measured last; where another can be had, the next cell gets it."""


class _Here:
    """In this process: the end of it is the end of the run."""

    def __init__(self, bundle: CandidateBundle, device: Device, seed: int, versions: dict[str, Any]) -> None:
        self.gpu = device.describe()
        self._cells = bundle["candidates"]["cells"]
        self._bench = Bench(bundle, device, random.Random(seed), versions)
        self._seed = seed
        self._culprit = ""

    def measure(self, cell: int, skip: Collection[int]) -> list[Timing]:
        """Every line, or that of the candidate that broke the context."""
        if self._culprit:
            raise HdispatchError(
                f"a candidate broke the GPU context: {self._culprit}. It is noted; run again to go on without it"
            )
        found = self._bench.measure(self._cells[cell], set(skip), self._seed)
        self._culprit = next((_failure(timing) for timing in found if timing["status"] in BROKE), "")
        return found

    def close(self) -> None:
        """Serve none of the candidates any more."""
        _C.withdraw(self._bench.device.index)


class _Run:
    """Measures what a file of timings does not have yet."""

    def __init__(
        self,
        bundle: CandidateBundle,
        out: Path,
        measurer: _Measurer,
        versions: dict[str, Any],
        known: Mapping[tuple[CellKey, ConfigKey], Timing],
    ) -> None:
        self.bundle = bundle
        self.out = out
        self.measurer = measurer
        self.versions = versions
        self.known = known
        self.broke = {_identity(line) for line in known.values() if line["status"] in BROKE}
        self.report = Report()

    def go(self, chosen: Options, progress: Callable[[int, int, str], None] | None) -> Report:
        """Cell by cell, as far as the options say."""
        start = time.monotonic()
        report, every = self.report, self.bundle["candidates"]["cells"]
        cells = [at for at, cell in enumerate(every) if chosen.ops is None or cell["op"] in chosen.ops]
        todo = [at for at in cells if not self._complete(every[at])]
        report.before, report.left = len(cells) - len(todo), len(todo)
        done, total = 0, sum(len(every[at]["records"]) for at in todo[: chosen.limit])
        for at in todo[: chosen.limit]:
            if chosen.seconds is not None and time.monotonic() - start >= chosen.seconds:
                break
            if progress:
                progress(done, total, str(_cell_key(every[at])))
            self._measure(at)
            report.measured, report.left = report.measured + 1, report.left - 1
            done += len(every[at]["records"])
        report.seconds = time.monotonic() - start
        return report

    def _measure(self, at: int) -> None:
        """A cell; again without it where a candidate was the end of what measured."""
        cell = self.bundle["candidates"]["cells"][at]
        while (skip := self._broken(cell)) < set(cell["records"]):
            found = self.measurer.measure(at, skip)
            if isinstance(found, Lost):
                found = [self._lost(cell, found)]
            timings.append(self.out, found)
            self.report.failures += [_failure(timing) for timing in found if timing["status"] != "ok"]
            broke = {_identity(timing) for timing in found if timing["status"] in BROKE}
            if not broke:
                return
            self.broke |= broke
            self.measurer.close()

    def _lost(self, cell: Cell, lost: Lost) -> Timing:
        outcome = _Outcome(lost.status, lost.why)
        return line_of(self.bundle, cell, lost.record, outcome, lost.seconds, self.measurer.gpu, self.versions)

    def _broken(self, cell: Cell) -> set[int]:
        """The records of a cell that were the end of a process, here or elsewhere."""
        return {index for index in cell["records"] if self._key(cell, index) in self.broke}

    def _key(self, cell: Cell, index: int) -> tuple[str, ConfigKey, tuple[str, ...]]:
        record = self.bundle["manifest"]["records"][index]
        return cell["op"], _config_key(record), tuple(_artifacts(self.bundle, record))

    def _complete(self, cell: Cell) -> bool:
        """Whether every candidate of a cell has a line, made with the code that it has now, or was the end of a process."""
        return all(self._has(cell, index) for index in set(cell["records"]) - self._broken(cell))

    def _has(self, cell: Cell, index: int) -> bool:
        record = self.bundle["manifest"]["records"][index]
        line = self.known.get((_cell_key(cell), _config_key(record)))
        return line is not None and line["artifacts"] == _artifacts(self.bundle, record)


def _identity(timing: Timing) -> tuple[str, ConfigKey, tuple[str, ...]]:
    """What a candidate is the same by, wherever it competes: its op, its config and its code."""
    return timing["op"], timings.config_key(timing), tuple(timing["artifacts"])


def _check_ops(folder: Path, bundle: CandidateBundle) -> None:
    """Refuse a bundle whose ops are not the installed ones."""
    for name, entry in bundle["manifest"]["ops"].items():
        ops.spec(name).check_same(entry, folder / MANIFEST_NAME, "make the candidates again")


def _current_device() -> int:
    if not torch.cuda.is_available():
        raise HdispatchError(
            f"candidates are measured on a GPU, and there is none here ({_C.driver_missing() or 'torch sees none'}); "
            "take the candidate bundle to one"
        )
    return torch.cuda.current_device() if torch.cuda.is_initialized() else 0  # type: ignore[no-untyped-call]


def open_device(folder: Path, manifest: Manifest, index: int) -> Device:
    """A CUDA device to measure a bundle on, current from now on. `BundleError` if the bundle is for another kind."""
    torch.cuda.init()  # type: ignore[no-untyped-call]
    torch.cuda.set_device(index)
    check_target(folder, manifest, index)
    return Device(index)


def _read_known(out: Path, gpu: str) -> dict[tuple[CellKey, ConfigKey], Timing]:
    if not out.exists():
        timings.append(out, [])  # whether it can be written shows now
        return {}
    lines = timings.read(out)
    if other := next((line["gpu"] for line in lines if line["gpu"] != gpu), None):
        raise HdispatchError(f"{out} holds timings of {other!r}; this is {gpu!r}: name another file")
    return {(timings.cell_key(line), timings.config_key(line)): line for line in lines}


def _cell_key(cell: Cell) -> CellKey:
    return CellKey(cell["op"], cell["variant"], cell["K"], cell["N"], cell["bucket"])


def _config_key(record: Record) -> ConfigKey:
    return ConfigKey(record["backend"], timings.canonical(record["config"]))


def _artifacts(bundle: CandidateBundle, record: Record) -> list[str]:
    if record["launcher"] == "tvm_ffi":
        return [record["function"]]  # the library changes with every other candidate; the name holds the hash of this one
    files = bundle["manifest"]["files"]
    return sorted(files[name]["sha256"] for name in artifacts_of(record))


def _failure(timing: Timing) -> str:
    config = timings.config_key(timing).config
    return f"{timings.cell_key(timing)}: {timing['backend']} {config} is {timing['status']}: {timing['why']}"


@dataclass
class _Outcome:
    """What came of one candidate of a cell."""

    status: Status = "ok"
    why: str = ""
    estimate: float | None = None
    runs: dict[How, Timeable] = field(default_factory=dict)
    times: dict[How, list[float]] = field(default_factory=dict)


class Bench:
    """Measures cells in this process, one at a time. `announce` is told a candidate's record before each of its steps."""

    def __init__(
        self,
        bundle: CandidateBundle,
        device: Device,
        order: random.Random,
        versions: dict[str, Any],
        announce: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.bundle = bundle
        self.device = device
        self.order = order
        self.versions = versions
        self.announce = announce

    def measure(self, cell: Cell, skip: set[int], seed: int) -> list[Timing]:
        """A line for each candidate but those to skip. If one breaks the context, its line alone: the others say nothing."""
        start = time.monotonic()
        outcomes = {index: _Outcome() for index in cell["records"] if index not in skip}
        with strict(), contextlib.ExitStack() as stack:
            subject = _Subject(cell, self.device, seed)
            for index, outcome in outcomes.items():
                self.announce(index)
                self._prepare(cell, index, subject, outcome, _best(outcomes))
                for timeable in outcome.runs.values():
                    stack.callback(timeable.close)
                if outcome.status == "fatal":
                    outcomes = {index: outcome}
                    stack.pop_all()  # nothing can be freed in a broken context
                    break
            self._time(outcomes)
        seconds = (time.monotonic() - start) / max(len(outcomes), 1)
        gpu = self.device.describe()
        return [line_of(self.bundle, cell, index, outcome, seconds, gpu, self.versions) for index, outcome in outcomes.items()]

    def _prepare(self, cell: Cell, index: int, subject: _Subject, outcome: _Outcome, best: float) -> None:
        """Check a candidate; if it is right and not hopelessly behind, capture it."""
        try:
            serve = self.device.publish(self._row(cell, index))
            subject.check()
            calls = subject.calls()
            outcome.estimate = self.device.estimate(calls)
            if outcome.estimate <= HOPELESS * best:
                launches = max(launch_count(outcome.estimate), len(calls))
                outcome.runs["graph"] = self.device.replay(calls, launches)
                outcome.runs["stream"] = self.device.queued(serve, calls)
                if subject.bytes <= WARM_BYTES and subject.weight_bytes <= WARM_WEIGHTS:
                    outcome.runs["warm"] = self.device.replay(calls[:1], launches)
        except MismatchError as error:
            outcome.status, outcome.why = "wrong", str(error)
        except torch.OutOfMemoryError:  # says nothing about the candidate
            raise
        except RuntimeError as error:  # ours, the driver's, torch's: this candidate is out, the others are not
            outcome.status, outcome.why = "refused", str(error)
            try:
                self.device.synchronize()
            except RuntimeError:
                outcome.status = "fatal"

    def _row(self, cell: Cell, index: int) -> OneRow:
        manifest = self.bundle["manifest"]
        record = manifest["records"][index]
        if record["launcher"] == "cubin":
            only = class_of(cell["M"])
            if only not in record["cubins"]:
                raise BundleError(f"record {index} has no code for M = {cell['M']}; make the candidates again")
            record = {**record, "cubins": {only: record["cubins"][only]}}
        return OneRow(
            op=ops.get(cell["op"]),
            ladders=ladders_of(manifest["ops"][cell["op"]]),
            variant=cell["variant"],
            k=cell["K"],
            n=cell["N"],
            bucket=cell["bucket"],
            record=record,
            files={name: self.bundle["contents"][name] for name in artifacts_of(record)},
        )

    def _time(self, outcomes: Mapping[int, _Outcome]) -> None:
        """In graphs; those that are not far behind there in the other ways too."""
        for how in get_args(How):
            running = {
                str(index): _Announced(outcome.runs[how], functools.partial(self.announce, index))
                for index, outcome in outcomes.items()
                if how in outcome.runs and (how == "graph" or len(outcome.times["graph"]) == ROUNDS)
            }
            in_a_row = WARM_REPLAYS if how == "warm" else 1
            for name, times in interleave(running, ROUNDS, self.order, EARLY_STOP, in_a_row).items():
                outcomes[int(name)].times[how] = times


@dataclass(frozen=True)
class _Announced:
    """Launches that say whose they are before they are made."""

    inner: Timeable
    announce: Callable[[], None]

    def time(self, replays: int = 1) -> float:
        """Microseconds per launch."""
        self.announce()
        return self.inner.time(replays)


def line_of(
    bundle: CandidateBundle, cell: Cell, index: int, outcome: _Outcome, seconds: float, gpu: str, versions: Mapping[str, Any]
) -> Timing:
    """The line of a candidate, by its record's index, in a cell."""
    record = bundle["manifest"]["records"][index]
    origin = bundle["candidates"]["origins"][index]
    second: _Second = {"second": cell["second"]} if "second" in cell else {}
    return {
        "op": cell["op"],
        "variant": cell["variant"],
        "K": cell["K"],
        "N": cell["N"],
        "bucket": cell["bucket"],
        "M": cell["M"],
        **second,
        "backend": record["backend"],
        "config": record["config"],
        "generic": origin["generic"],
        "artifacts": _artifacts(bundle, record),
        "status": outcome.status,
        "why": outcome.why,
        **_times(outcome),
        "rounds": len(outcome.times.get("graph", ())),
        "compile_seconds": origin["seconds"],
        "device_seconds": round(seconds, 4),
        "gpu": gpu,
        "versions": {**versions, "tools": bundle["manifest"]["tools"]},
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


class _Second(TypedDict):
    second: NotRequired[int]


class _Times(TypedDict):
    us: NotRequired[float]
    q1: NotRequired[float]
    q3: NotRequired[float]
    stream_us: NotRequired[float]
    warm_us: NotRequired[float]


def _times(outcome: _Outcome) -> _Times:
    """The figures of an outcome, as a line has them."""
    if outcome.status != "ok" or outcome.estimate is None:
        return {}
    if not outcome.times:
        return {"us": round(outcome.estimate, 4)}
    q1, us, q3 = statistics.quantiles(outcome.times["graph"], n=4, method="inclusive")
    found: _Times = {"us": round(us, 4), "q1": round(q1, 4), "q3": round(q3, 4)}
    if "stream" in outcome.times:
        found["stream_us"] = round(statistics.median(outcome.times["stream"]), 4)
    if "warm" in outcome.times:
        found["warm_us"] = round(statistics.median(outcome.times["warm"]), 4)
    return found


def _best(outcomes: Mapping[int, _Outcome]) -> float:
    return min((outcome.estimate for outcome in outcomes.values() if outcome.estimate is not None), default=float("inf"))


class _Subject:
    """What the candidates of one cell are given: arguments to be checked with, and sets of them to rotate through."""

    def __init__(self, cell: Cell, device: Device, seed: int) -> None:
        self.op = ops.get(cell["op"])
        self.device = device
        spec = self.spec = ops.spec(cell["op"])
        self.variant = spec.variant(cell["variant"])
        every = {"K": cell["K"], "N": cell["N"]}
        sizes = {symbol: every[symbol] for symbol in spec.symbols() if symbol != "M"}
        if spec.second is not None:
            sizes[spec.second.name] = cell["second"]
        generator = torch.Generator(device.torch_device).manual_seed(seed)

        def sample(m: int) -> list[Any]:
            return spec.sample(self.variant, {**sizes, "M": m}, device.torch_device, generator)

        arguments = sample(cell["M"])
        bucket_of_m, _ = spec.ladders.split(cell["bucket"])
        checked_m = checked_rows(spec.ladder, bucket_of_m, max((t.numel() for t in _tensors(arguments)), default=0))
        self.checked = arguments if checked_m == cell["M"] else sample(checked_m)
        self.want = copied(self.checked)
        spec.reference(*self.want)
        self.right: list[Any] | None = None
        self.bytes = sum(t.numel() * t.element_size() for t in _tensors(arguments))
        self.weight_bytes = sum(t.numel() * t.element_size() for t in _tensors(weights(spec, arguments)))
        self.sets = [copied(arguments) for _ in range(rotation_count(self.bytes))]

    def check(self) -> None:
        """Call the published candidate once. `MismatchError` if it is not right, `MissError` if it is not launched."""
        got = copied(self.checked)
        self.device.launch(self.op, got)
        if self.right is None or not _equal(self.spec, got, self.right):
            compare_outputs(self.spec, self.variant, got, self.want)
            self.right = got

    def calls(self) -> list[Call]:
        """Calls of the op that cycle through the sets."""
        return [_bind(self.op, arguments) for arguments in self.sets]


def _bind(op: _C.Op, arguments: Sequence[Any]) -> Call:
    return lambda: op(*arguments)


def weights(spec: OpSpec, arguments: Sequence[Any]) -> list[Any]:
    """The tensors that have the same size for every M."""
    return [
        value
        for arg, value in zip(spec.args, arguments, strict=True)
        if isinstance(arg, TensorArg) and "M" not in arg.symbols()
    ]


def _tensors(arguments: Sequence[Any]) -> Iterator[torch.Tensor]:
    return (value for value in arguments if isinstance(value, torch.Tensor))


def copied(arguments: Sequence[Any]) -> list[Any]:
    """The same values in other memory, with the same strides."""
    return [value.clone() if isinstance(value, torch.Tensor) else value for value in arguments]


def _equal(spec: OpSpec, got: Sequence[Any], right: Sequence[Any]) -> bool:
    """Whether everything that the op writes has the same bits: what one candidate got right need not be compared again."""
    written = [
        (a, b) for arg, a, b in zip(spec.args, got, right, strict=True) if getattr(arg, "mutated", False) and a is not None
    ]
    return all(torch.equal(_bits(a), _bits(b)) for a, b in written)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(kinds[tensor.element_size()])


def checked_rows(ladder: Sequence[int], bucket: int, elements: int) -> int:
    """The M to check with: the bucket's edge; for a call with a tensor of very many elements its smallest M of that class."""
    edge = ladder[bucket]
    first, _ = bucket_bounds(ladder, bucket)
    if elements <= CHECKED_ELEMENTS or edge % 16:
        return edge
    return min(edge, (first + 15) // 16 * 16)


def launch_count(estimate: float) -> int:
    """Launches of a replay, by the estimate of one; the most where that may be the host's time."""
    if estimate <= HOST_US:
        return MOST_LAUNCHES
    return max(LEAST_LAUNCHES, min(round(REPLAY_US / estimate), MOST_LAUNCHES))

"""vLLM's real engine in several modes on one model with random weights: processes, rounds, the result.

Each mode runs in its own process (`serve_worker`). Those of one group live at the same time, and every round times each batch
in each of them in turn, so that a machine that slows down slows down all.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypedDict

from ..errors import HdispatchError
from .serve_worker import EngineOptions, environment

#: Mode -> graphs, what hdispatch serves; see `EngineOptions`.
MODES = {
    "eager": ("none", "no"),
    "override": ("none", "override"),
    "ours": ("none", "layers"),
    "graph": ("decode", "no"),
    "ours+graph": ("decode", "layers"),
    "compiled": ("compiled", "no"),
    "ours+compiled": ("compiled", "layers"),
    "ours-launches": ("none", "layers-launches"),
    "ours-vllm-runner": ("none", "layers-vllm-runner"),
    "ours-vllm-scheduler": ("none", "layers-vllm-scheduler"),
    "ours-fa3": ("none", "layers-fa3"),
    "ours-fa3+graph": ("decode", "layers-fa3"),
}
#: The modes that are measured unless others are asked for.
USUAL = tuple(mode for mode, (_, served) in MODES.items() if not served.startswith("layers-"))
#: Requests and tokens of each, for the time to the first token.
PREFILLS = ((1, 128), (1, 1024), (4, 1024))
#: What of a process's log an error quotes.
SAID = 3000


class Mode(TypedDict):
    """Measurements of one mode. Times in ms are medians over rounds; `batches` and `prefills` have strings as keys."""

    started: dict[str, Any]
    batches: dict[str, float]
    prefills: dict[str, float]
    profiles: dict[str, Any]
    logits: dict[str, Any] | None
    finished: dict[str, Any]


class ServeResult(TypedDict):
    """A run, as `--json` writes it. `layers`: None for all of the model's. `failed` says why a mode has no figures."""

    machine: dict[str, Any]
    model: str
    scheme: str
    ranks: int
    layers: int | None
    modes: dict[str, Mode]
    failed: dict[str, str]


@dataclass(frozen=True)
class ServeOptions:
    """Choice of what a run measures.

    together  modes whose engines live at the same time; their memory must fit the GPU
    profiled  batches whose host parts and GPU time are taken
    steps     of which logits are compared with float32; 0: none
    requests  that these steps serve at once
    logs      folder for what each engine says, MODE.log; None: only the end of it, where a mode fails
    limit_s   most seconds for one answer; an engine that takes longer is ended
    """

    model: str
    scheme: str
    modes: tuple[str, ...]
    bundle: Path
    batches: tuple[int, ...]
    rounds: int
    together: int
    ranks: int = 1
    kv_gib: float = 3.5
    layers: int | None = None
    seed: int = 0
    profiled: tuple[int, ...] = ()
    steps: int = 0
    requests: int = 32
    prefills: tuple[tuple[int, int], ...] = PREFILLS
    logs: Path | None = None
    limit_s: float = 600.0


#: Hears what begins, and the result so far.
Tick = Callable[[str, "ServeResult"], None]

#: Command line of an engine's process.
COMMAND = (sys.executable, "-m", "hdispatch.bench.serve_worker")


def measure(options: ServeOptions, machine: dict[str, Any], tick: Tick, command: Sequence[str] = COMMAND) -> ServeResult:
    """All modes, in groups."""
    result: ServeResult = {
        "machine": machine,
        "model": options.model,
        "scheme": options.scheme,
        "ranks": options.ranks,
        "layers": options.layers,
        "modes": {},
        "failed": {},
    }
    for at in range(0, len(options.modes), options.together):
        with _group(options, options.modes[at : at + options.together], result, tick, command) as engines:
            for what in _plan(options):
                _ask_all(engines, what, result, tick)
            _finish(engines, result)
    return result


def _finish(engines: Mapping[str, Process], result: ServeResult) -> None:
    for mode, engine in engines.items():
        try:
            result["modes"][mode]["finished"] = engine.ask({"do": "finish"})
        except EngineError as error:
            result["failed"][mode] = f"finish: {error}"


@contextmanager
def _group(
    options: ServeOptions, modes: Sequence[str], result: ServeResult, tick: Tick, command: Sequence[str]
) -> Iterator[dict[str, Process]]:
    """The processes of some modes that started. They start one after the other: vLLM measures free memory meanwhile."""
    with ExitStack() as stack:
        engines: dict[str, Process] = {}
        for mode in modes:
            tick(f"starting {mode}", result)
            graphs, served = MODES[mode]
            bundle = str(options.bundle.resolve())
            sizes = (options.ranks, options.kv_gib, options.layers, options.seed)
            setup = EngineOptions(mode, graphs, served, options.model, options.scheme, bundle, *sizes)
            caches = stack.enter_context(tempfile.TemporaryDirectory(prefix="hdispatch-serve-", ignore_cleanup_errors=True))
            log = None if options.logs is None else options.logs / f"{mode}.log"
            engine = Process(setup, environment(setup, Path(caches)), command, log, options.limit_s)
            stack.callback(engine.close)
            try:
                started = engine.start()
            except EngineError as error:
                result["failed"][mode] = str(error)
                continue
            engines[mode] = engine
            result["modes"][mode] = {
                "started": started,
                "batches": {},
                "prefills": {},
                "profiles": {},
                "logits": None,
                "finished": {},
            }
        yield engines


@dataclass(frozen=True)
class _Question:
    """A request to every engine: `times` answers, of which `keep` puts what matters into the mode's figures."""

    label: str
    request: Mapping[str, Any]
    times: int
    keep: Callable[[Mode, list[dict[str, Any]]], None]


def _plan(options: ServeOptions) -> Iterator[_Question]:
    for batch in options.batches:
        yield _Question(f"batch {batch}", {"do": "decode", "batch": batch}, options.rounds, _keep_median("batches", str(batch)))
    for requests, tokens in options.prefills:
        request = {"do": "prefill", "requests": requests, "tokens": tokens}
        yield _Question(
            f"prefill {requests}x{tokens}", request, options.rounds, _keep_median("prefills", f"{requests}x{tokens}")
        )
    for batch in options.profiled:
        yield _Question(f"profile of batch {batch}", {"do": "profile", "batch": batch}, 0, _keep_profile(str(batch)))
    if options.steps:
        request = {"do": "logits", "steps": options.steps, "requests": options.requests}
        yield _Question("logits", request, 0, _keep_logits)


def _keep_median(group: str, name: str) -> Callable[[Mode, list[dict[str, Any]]], None]:
    def keep(mode: Mode, answers: list[dict[str, Any]]) -> None:
        figures = mode["batches"] if group == "batches" else mode["prefills"]
        figures[name] = statistics.median(each["ms"] for each in answers)

    return keep


def _keep_profile(name: str) -> Callable[[Mode, list[dict[str, Any]]], None]:
    def keep(mode: Mode, answers: list[dict[str, Any]]) -> None:
        mode["profiles"][name] = answers[0]

    return keep


def _keep_logits(mode: Mode, answers: list[dict[str, Any]]) -> None:
    mode["logits"] = answers[0]


def _ask_all(engines: dict[str, Process], what: _Question, result: ServeResult, tick: Tick) -> None:
    """Every engine in turn, once to warm up and then `times` rounds; with `times` 0 once. One that ends is out."""
    tick(what.label, result)
    answers: dict[str, list[dict[str, Any]]] = {mode: [] for mode in engines}
    for turn in range(what.times + 1):
        for mode in list(engines):
            try:
                answer = engines[mode].ask(what.request)
            except EngineError as error:
                result["failed"][mode] = f"{what.label}: {error}"
                if engines[mode].is_gone():
                    del engines[mode]
                continue
            if turn or not what.times:
                answers[mode].append(answer)
    for mode in engines:
        if answers[mode]:
            what.keep(result["modes"][mode], answers[mode])


class EngineError(HdispatchError):
    """An engine's process ended, or answered with an error."""


class Process:
    """A process of `serve_worker`, asked over pipes."""

    def __init__(
        self, setup: EngineOptions, environment: Mapping[str, str], command: Sequence[str], log: Path | None, limit_s: float
    ) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile() if log is None else log.open("w+b")  # noqa: SIM115
        self._limit_s = limit_s
        self._process = subprocess.Popen(
            [*command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=dict(environment)
        )
        self._setup = setup.to_line()

    def start(self) -> dict[str, Any]:
        """How the engine started. `EngineError` if it did not."""
        return self._exchange(self._setup)

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request. `EngineError` if it is an error."""
        return self._exchange(json.dumps(request) + "\n")

    def _exchange(self, line: str) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        late = threading.Event()
        timer = threading.Timer(self._limit_s, self._end, (late,))
        timer.start()
        try:
            _pipe(stdin).write(line)
            _pipe(stdin).flush()
            answer = _pipe(stdout).readline()
        except BrokenPipeError:
            answer = ""
        finally:
            timer.cancel()
        if late.is_set():
            self._process.wait()
            raise EngineError(f"the engine gave no answer within {self._limit_s:.0f} s and was ended; it said: {self._said()}")
        if not answer:
            raise EngineError(f"the engine ended with status {self._process.wait()}; it said: {self._said()}")
        found: dict[str, Any] = json.loads(answer)
        if "error" in found:
            raise EngineError(f"{found['error']}; it said: {self._said()}")
        return found

    def _end(self, late: threading.Event) -> None:
        late.set()
        self._process.kill()

    def is_gone(self) -> bool:
        """Whether it has ended."""
        return self._process.poll() is not None

    def _said(self) -> str:
        # The process shares the file's position: reading to the end leaves it there.
        self._log.seek(0)
        return self._log.read().decode(errors="replace").strip()[-SAID:]

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        with suppress(BrokenPipeError):
            _pipe(self._process.stdin).close()
        _pipe(self._process.stdout).close()
        self._log.close()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    if pipe is None:
        raise HdispatchError("the engine's process was started without a pipe")
    return pipe

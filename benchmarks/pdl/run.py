"""Gain of programmatic dependent launch: GPU time of chains of dependent small kernels, with it and without.

The bundle is loaded twice, with PDL and with pdl=False. Every chain is timed through both tables in every round, all chains
and both ways in random order; that both compute the same bits is checked before.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

import torch
from hdispatch import registry, runtime
from hdispatch.bench import machine
from hdispatch.bench.paths import Unavailable
from hdispatch.errors import HdispatchError, first_line
from hdispatch.testing.device_timer import Replay, elapsed_us
from hdispatch.testing.host_timer import Batch, interleave, quiet, summarize

from ..verdict import TARGETS, Verdict
from .chains import CHAINS, Chain, make_chain

#: Called with steps done, steps in all, and what is being done.
Progress = Callable[[int, int, str], None]

#: graph    replayed from a CUDA graph of many passes
#: queued   called from Python behind a kernel that waits until all is enqueued: the GPU's time of the same launches
#: eager    called from Python, from the first call to the end of the last kernel: whichever is slower, host or GPU
Mode = Literal["graph", "queued", "eager"]
MODES: tuple[Mode, ...] = get_args(Mode)

#: Passes through a chain in a graph and in a batch of calls, and replays of a graph between two events.
GRAPH_PASSES, EAGER_PASSES, REPLAYS = 32, 25, 4
#: GPU cycles that a batch of calls waits for at first, a millisecond.
HEAD_START = 2_000_000


class Timing(TypedDict):
    """A chain in one mode, with PDL or without: µs per pass through all of its calls."""

    chain: str
    m: int
    mode: Mode
    pdl: bool
    median_us: float
    q1_us: float
    q3_us: float


class Served(TypedDict):
    """The row that serves a call of a chain."""

    op: str
    K: int
    N: int
    launcher: str
    backend: str


class Result(TypedDict):
    """A whole run, as `--json` writes it. `chains` by name and M; `skipped` names what could not run, and why."""

    machine: dict[str, Any]
    chains: dict[str, list[Served]]
    timings: list[Timing]
    skipped: dict[str, str]


@dataclass(frozen=True)
class Options:
    """Choice of what a run measures: chains of CHAINS by name, each for each M."""

    bundle: Path
    chains: tuple[str, ...] = tuple(CHAINS)
    ms: tuple[int, ...] = (1, 16)
    rounds: int = 30
    seed: int = 0


#: A chain, its M, and the mode that it was timed in.
Cell = tuple[str, int, Mode]


def pairs(timings: Sequence[Timing]) -> dict[Cell, tuple[Timing, Timing]]:
    """With PDL and without: of every chain and mode that was timed both ways."""
    off = {(each["chain"], each["m"], each["mode"]): each for each in timings if not each["pdl"]}
    on = {(each["chain"], each["m"], each["mode"]): each for each in timings if each["pdl"]}
    return {cell: (each, off[cell]) for cell, each in on.items() if cell in off}


def judge(timings: Sequence[Timing]) -> list[Verdict]:
    """How much faster a chain is with PDL, in the modes that have a target."""
    target = TARGETS["pdl"]
    return [
        Verdict(f"{chain}, M={m}, {mode}", target["speedup"], off["median_us"] / on["median_us"])
        for (chain, m, mode), (on, off) in pairs(timings).items()
        if mode in target["modes"]
    ]


#: chain and M, mode, with PDL
Label = tuple[str, Mode, bool]


@dataclass
class _Run:
    """A run under way."""

    options: Options
    device: torch.device
    bundles: dict[bool, runtime.Bundle]
    chains: dict[str, Chain] = field(default_factory=dict)
    served: dict[str, list[Served]] = field(default_factory=dict)
    replays: list[Replay] = field(default_factory=list)
    batches: dict[Label, Batch] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def run(options: Options, progress: Progress = lambda _done, _steps, _label: None) -> Result:
    """Measure. The bundle that the process has loaded for the GPU is replaced, then unloaded."""
    device = _require_gpu()
    _check(options)
    current = _Run(options, device, {})
    steps, done = len(options.chains) * len(options.ms) + options.rounds, 0

    def step(label: str) -> None:
        nonlocal done
        done += 1
        progress(done, steps, label)

    try:
        for pdl in (False, True):
            current.bundles[pdl] = runtime.load(options.bundle, device=device, pdl=pdl)
        with runtime.strict():
            for name in options.chains:
                for m in options.ms:
                    step(f"preparing {name}, M={m}")
                    _prepare(current, name, m)
            with quiet() as core:
                order = random.Random(options.seed)
                samples, failed = interleave(current.batches, options.rounds, order, lambda: step("timing"))
    finally:
        for replay in current.replays:
            replay.close()
        for bundle in current.bundles.values():
            bundle.unload()
    for (label, mode, pdl), error in failed.items():
        current.skipped[f"{label}, {mode}, PDL {'on' if pdl else 'off'}"] = first_line(error)
    timings = [_timing(current.chains[label], mode, pdl, taken) for (label, mode, pdl), taken in samples.items()]
    return {
        "machine": _header(current, core),
        "chains": current.served,
        "timings": timings,
        "skipped": current.skipped,
    }


def _require_gpu() -> torch.device:
    if not torch.cuda.is_available():
        raise HdispatchError(
            f"bench pdl measures GPU time, and torch {torch.__version__} sees no CUDA device here; "
            "bench dispatch measures what needs none"
        )
    return torch.device("cuda", torch.cuda.current_device())


def _check(options: Options) -> None:
    unknown = [name for name in options.chains if name not in CHAINS]
    if unknown:
        raise HdispatchError(f"no chain {unknown[0]!r}; there are {', '.join(CHAINS)}")
    if options.rounds < 1 or not options.chains or not options.ms or min(options.ms) < 1:
        raise HdispatchError(
            f"rounds is {options.rounds}, chains {list(options.chains)}, Ms {list(options.ms)}; "
            "at least one of each, and each M at least 1"
        )


# ---- preparing ----


def _prepare(current: _Run, name: str, m: int) -> None:
    """Make a chain, see that it is served as it says and computes the same both ways, and its batches of every mode."""
    label = f"{name}, M={m}"
    try:
        chain = make_chain(name, m, current.device)
        current.served[label] = served_by(chain, current.bundles[True])
        start, calls = chain.start(), chain.calls()
        replays: dict[bool, Replay] = {}
        for pdl, bundle in current.bundles.items():
            bundle.publish()
            chain.restart(start)
            replays[pdl] = Replay(calls, GRAPH_PASSES * len(calls))
            current.replays.append(replays[pdl])
    except Exception as error:  # the bundle has no such row, say; the other chains still run
        current.served.pop(label, None)
        current.skipped[label] = str(error) if isinstance(error, Unavailable) else first_line(error)
        return
    _require_equal(label, chain, replays)
    current.chains[label] = chain
    for pdl, replay in replays.items():
        current.batches[label, "graph", pdl] = _graph_batch(chain, start, replay)
        bundle = current.bundles[pdl]
        current.batches[label, "queued", pdl] = _eager_batch(chain, start, calls, bundle, HEAD_START)
        current.batches[label, "eager", pdl] = _eager_batch(chain, start, calls, bundle, 0)


def served_by(chain: Chain, bundle: runtime.Bundle) -> list[Served]:
    """The row of the loaded bundle for each step. Raises Unavailable if a row is not of the kind that the chain measures."""
    found: list[Served] = []
    for step in chain.steps:
        k, n = step.sizes.get("K", 0), step.sizes.get("N", 0)
        variants = [variant.name for variant in registry.spec(step.op).variants()]
        index = registry.get(step.op).pick(chain.m, k, n, variants.index(step.variant))
        where = f"{step.op}, {step.variant}, K={k}, N={n}, M={chain.m}"
        if index is None:
            raise Unavailable(f"the bundle has no row of {where}")
        record = bundle.manifest["records"][bundle.manifest["rows"][index]["record"]]
        if record["launcher"] != step.launcher:
            raise Unavailable(f"{where} is served by a {record['launcher']} record; the chain is to have {step.launcher}")
        found.append({"op": step.op, "K": k, "N": n, "launcher": record["launcher"], "backend": record["backend"]})
    return found


def _require_equal(label: str, chain: Chain, replays: dict[bool, Replay]) -> None:
    """Times of launches that race are worth nothing."""
    found = {}
    for pdl, replay in replays.items():
        chain.restart(chain.start())
        replay.time()
        found[pdl] = [tensor.clone() for tensor in chain.state]
    for on, off in zip(found[True], found[False], strict=True):
        if not torch.equal(on, off):
            count = int((on != off).sum())
            raise HdispatchError(
                f"{label}: {count} of {on.numel()} elements differ between PDL on and off after {GRAPH_PASSES} passes; "
                "a kernel does not wait for the one before it"
            )


def _graph_batch(chain: Chain, start: list[torch.Tensor], replay: Replay) -> Batch:
    def batch() -> float:
        chain.restart(start)
        return replay.time(REPLAYS) * 1e3 * len(chain.steps)

    return batch


def _eager_batch(
    chain: Chain, start: list[torch.Tensor], calls: list[Callable[[], object]], bundle: runtime.Bundle, head_start: int
) -> Batch:
    def passes(count: int) -> None:
        for _ in range(count):
            for call in calls:
                call()

    def batch() -> float:
        bundle.publish()
        chain.restart(start)
        passes(1)
        return elapsed_us(lambda: passes(EAGER_PASSES), head_start) * 1e3 / EAGER_PASSES

    return batch


# ---- the result ----


def _timing(chain: Chain, mode: Mode, pdl: bool, samples: list[float]) -> Timing:
    stats = summarize(samples)
    median, q1, q3 = (round(ns / 1e3, 4) for ns in (stats.median_ns, stats.q1_ns, stats.q3_ns))
    return {"chain": chain.name, "m": chain.m, "mode": mode, "pdl": pdl, "median_us": median, "q1_us": q1, "q3_us": q3}


def _header(current: _Run, core: int | None) -> dict[str, Any]:
    options, manifest = current.options, current.bundles[True].manifest
    header = machine.describe(current.device)
    header |= {"pinned_to_core": core, "seed": options.seed, "rounds": options.rounds}
    header |= {"graph_passes": GRAPH_PASSES, "graph_replays": REPLAYS, "eager_passes": EAGER_PASSES}
    header["bundle"] = {
        "target": manifest["target"]["name"],
        "rows": current.bundles[True].rows,
        "records": len(manifest["records"]),
        "tools": manifest["tools"],
    }
    return header

"""The op benchmark: GPU time per op over the models' shapes beside its peers, and what a call takes as users feel it.

In order: the machine's copy bandwidth; calls from Python; what DeepGEMM compiles, by many processes; rotated cells that are
compared with the roofs; the cells that torch.compile takes part in, which many processes have compiled before; all others.
"""

from __future__ import annotations

import functools
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hdispatch import registry, runtime
from hdispatch.bench import machine
from hdispatch.errors import HdispatchError, first_line
from hdispatch.opspec import OpSpec
from hdispatch.testing.host_timer import WARM_CALLS, Batch, interleave, quiet, summarize

from ..verdict import TARGETS
from . import compiled, deep_gemm, peers
from .deep_gemm import DeepGemm
from .grid import EAGER_M, EAGER_MODEL, LOW_LATENCY, MS, STREAMED, Cell, Mode, cells, model_names, report_order, roof_cells
from .result import Eager, Result, cell_name
from .timing import Binder, Failure, Measured, Timing, copy_bandwidth, make_arguments, measure, require_gpu
from .vllm_ll import Library

#: Called with steps done, steps in all, and what is being done.
Progress = Callable[[int, int, str], None]
EAGER_CALLS, EAGER_BATCHES = 200, 20
#: A round is one replay of every path.
ROUNDS = 11


@dataclass(frozen=True)
class Options:
    """Choice of what a run measures.

    vllm_ops         vLLM's library behind torch.ops._C
    vllm_ll          vLLM's low-latency GEMMs, as `vllm_ll_build` makes them
    deep_gemm        the package of DeepGEMM, a folder
    ops              names; None for all that the bundle holds
    models           in full or by size (8B); None for all
    variants         of each op those that are named here, `default` being one; the default one where it has none of them
    modes            warm, rotated: how the cells of the grid find their buffers
    compile_ms       Ms of the cells that torch.compile takes part in; () leaves it out
    compile_seconds  how long cells may be compiled, for torch.compile and for DeepGEMM
    workers          processes that compile
    seconds          no cell begins later than this after the start; None for no limit
    """

    bundle: Path
    vllm_ops: Path | None = None
    vllm_ll: Path | None = None
    deep_gemm: Path | None = None
    ops: tuple[str, ...] | None = None
    ms: tuple[int, ...] = MS
    models: tuple[str, ...] | None = None
    variants: tuple[str, ...] = ("default",)
    modes: tuple[Mode, ...] = ("warm",)
    compile_ms: tuple[int, ...] = MS
    compile_seconds: float = 150.0
    workers: int = 14
    eager: bool = True
    rounds: int = ROUNDS
    seconds: float | None = None
    seed: int = 0


@dataclass
class _Run:
    """A run under way."""

    options: Options
    device: torch.device
    specs: list[OpSpec]
    progress: Progress
    order: random.Random
    start: float
    steps: int = 1
    done: int = 0
    timings: list[Timing] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    eager: list[Eager] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    compile: dict[str, Any] | None = None
    vllm_ll: Library | None = None
    deep_gemm: DeepGemm | None = None

    def step(self, label: str) -> None:
        self.done += 1
        self.progress(min(self.done, self.steps), self.steps, label)

    def goes_on(self) -> bool:
        """Whether there is time for another cell."""
        return self.options.seconds is None or time.monotonic() - self.start < self.options.seconds

    def keep(self, measured: Measured) -> None:
        self.timings += measured.timings
        self.failures += measured.failures


def run(options: Options, progress: Progress = lambda _done, _steps, _label: None) -> Result:
    """Measure. The bundle that the process has loaded for the GPU is replaced, then unloaded."""
    device = require_gpu()
    if options.rounds < 1 or not options.ms:
        raise HdispatchError(f"rounds is {options.rounds} and Ms {list(options.ms)}; at least one of each")
    bundle = runtime.load(options.bundle, device=device)
    try:
        current = _Run(
            options,
            device,
            chosen_specs(options.ops, list(bundle.manifest["ops"])),
            progress,
            random.Random(options.seed),
            time.monotonic(),
        )
        _open_peers(current)
        runtime.stats(reset=True)
        with runtime.strict():
            bandwidth = copy_bandwidth(device)
            torch.cuda.empty_cache()
            _measure_all(current)
        stats = runtime.stats()
    finally:
        bundle.unload()
    return {
        "machine": _header(current, bundle),
        "copy_bandwidth": bandwidth,
        "timings": current.timings,
        "eager": current.eager,
        "stats": {op: counts for op, counts in stats.items() if counts["hits"] or counts["misses"]},
        "compile": current.compile,
        "failures": current.failures,
        "skipped": current.skipped,
    }


def _open_peers(current: _Run) -> None:
    """Load the peers' libraries; what is not there, of peers and of ops with targets, is named."""
    options, names = current.options, {spec.name for spec in current.specs}
    if options.vllm_ops:
        peers.load_vllm_ops(options.vllm_ops)
    else:
        current.skipped[peers.VLLM] = "needs vLLM's compiled ops: --vllm-ops PATH/TO/_C….so"
    if options.vllm_ll:
        current.vllm_ll = Library(options.vllm_ll)
    elif "ll_gemm_bf16" in names:
        current.skipped[f"{peers.LL_BF16}, {peers.SKINNY}"] = "need vLLM's kernels compiled: --vllm-ll, made by --make-vllm-ll"
    if deep_gemm.OP in names:
        _open_deep_gemm(current)
    missing = [] if options.ops else [op for op in LOW_LATENCY if op not in names]
    if missing:
        current.skipped[", ".join(missing)] = (
            "not in the bundle; one built with the CuteDSL has them: pip install 'hdispatch[cutedsl]', then hdispatch build"
        )


def _open_deep_gemm(current: _Run) -> None:
    """DeepGEMM, or why it does not take part."""
    package, peer = current.options.deep_gemm, f"{peers.DEEP_GEMM}, {peers.DEEP_GEMM_UE8M0}"
    if package is None:
        current.skipped[peer] = "need the package that vLLM ships: --deep-gemm PATH/TO/vllm/third_party/deep_gemm"
        return
    try:
        current.deep_gemm = DeepGemm(package)
    except HdispatchError as error:
        current.skipped[peer] = str(error)


def chosen_specs(names: Sequence[str] | None, served: Sequence[str]) -> list[OpSpec]:
    """The declarations of the ops named, or of all that are served, in the order of the report."""
    for name in names or ():
        if name not in served:
            raise HdispatchError(f"op {name!r} is not in the bundle; it has {', '.join(sorted(served))}")
    return [registry.spec(name) for name in sorted(names or served, key=report_order)]


def _header(current: _Run, bundle: runtime.Bundle) -> dict[str, Any]:
    options = current.options
    header = machine.describe(current.device)
    header |= {"seconds": round(time.monotonic() - current.start, 1), "rounds": options.rounds, "seed": options.seed}
    header |= {"ops": [spec.name for spec in current.specs], "ms": sorted(options.ms), "modes": list(options.modes)}
    header |= {"models": model_names(options.models), "vllm_ops": options.vllm_ops.name if options.vllm_ops else None}
    header |= {"vllm_ll": options.vllm_ll.name if options.vllm_ll else None}
    header |= {"deep_gemm": current.deep_gemm.version if current.deep_gemm else None}
    header["bundle"] = {
        "target": bundle.manifest["target"]["name"],
        "rows": bundle.rows,
        "records": len(bundle.manifest["records"]),
        "tools": bundle.manifest["tools"],
    }
    return header


# ---- the order of things ----


def _measure_all(current: _Run) -> None:
    options = current.options
    models = model_names(options.models)
    grid = cells(current.specs, options.ms, options.modes, models, options.variants)
    roofs = [cell for cell in roof_cells(current.specs, options.ms, models, options.variants) if cell not in grid]
    with_compile = compile_cells_of(grid, options)
    current.steps = len(grid) + len(roofs) + len(with_compile) + (EAGER_BATCHES if options.eager else 0)
    if options.eager:
        _eager(current, [cell for cell in roofs + grid if is_called_eagerly(cell)])
    _compile_deep_gemm(current, [*grid, *roofs])
    _time(current, roofs)
    with compiled.caches() as folder:
        ready = _compile(current, with_compile, folder)
        _time(current, ready, with_compile=True)
    _time(current, [cell for cell in grid if cell not in ready])


def is_called_eagerly(cell: Cell) -> bool:
    """Whether the calls of a shape are timed from Python: where a kernel takes hundreds of µs, they say nothing of the host."""
    return cell["label"] not in STREAMED and (cell["model"] == EAGER_MODEL or cell["op"] in LOW_LATENCY)


def compile_cells_of(grid: Sequence[Cell], options: Options) -> list[Cell]:
    """The cells that torch.compile takes part in: those of ops with a target first, else in the order of the grid."""
    found = [cell for cell in grid if cell["m"] in options.compile_ms and cell["op"] in compiled.OPS]
    return sorted(found, key=lambda cell: peers.COMPILE not in TARGETS["ops"]["speedups"].get(cell["op"], {}))


def _peer_binders(current: _Run) -> dict[str, Binder]:
    """The peers that a model may call just as they are."""
    binders: dict[str, Binder] = {peers.TORCH_MM: peers.bind_torch_mm}
    if current.options.vllm_ops:
        binders[peers.VLLM] = peers.bind_vllm
    return binders


def _compile_deep_gemm(current: _Run, wanted: Sequence[Cell]) -> None:
    """What does not compile, or not in time, does where it is timed: there it fails, or takes as long before its time."""
    if current.deep_gemm is None:
        return
    options = current.options
    torch.cuda.empty_cache()
    deadline = time.monotonic() + options.compile_seconds
    tick = functools.partial(current.step, "compiling for DeepGEMM")
    deep_gemm.compile_ahead(current.deep_gemm.package, wanted, options.workers, deadline, tick)


def _time(current: _Run, wanted: Sequence[Cell], with_compile: bool = False) -> None:
    binders: dict[str, Binder] = {peers.OURS: peers.bind_ours, **_peer_binders(current)}
    binders[peers.TORCH_SCALED_MM] = peers.bind_torch_scaled_mm
    binders[peers.TORCH_MM_ARGMAX] = peers.bind_torch_mm_argmax
    if current.deep_gemm:
        binders |= {peers.DEEP_GEMM: current.deep_gemm.bind, peers.DEEP_GEMM_UE8M0: current.deep_gemm.bind_ue8m0}
    if current.vllm_ll:
        binders |= {peers.LL_BF16: current.vllm_ll.bind_ll_bf16, peers.SKINNY: current.vllm_ll.bind_skinny}
    for index, cell in enumerate(wanted):
        if not current.goes_on():
            note = Counter(each["mode"] for each in wanted[index:])
            words = ", ".join(f"{count} {mode}" for mode, count in note.items())
            words += " cells with torch.compile" if with_compile else " cells"
            current.skipped[words] = f"--seconds {current.options.seconds:g} had passed"
            return
        current.step(f"{cell['op']} {cell_name(cell)}")
        own = binders | ({peers.COMPILE: compiled.binder(compiled.compile_op(cell["op"]))} if with_compile else {})
        try:
            measured = measure(cell, own, current.device, current.options.rounds, current.order)
            if index % 8 == 7:  # cells differ in size: what one has freed, the next may not find
                torch.cuda.empty_cache()
        except Exception as error:  # the arguments do not fit, say; the other cells still run
            measured = Measured(failures=[{**cell, "path": "arguments", "reason": first_line(error)}])
        current.keep(measured)


def _compile(current: _Run, wanted: Sequence[Cell], folder: Path) -> list[Cell]:
    """Compile into the caches in `folder`; returns the cells that are done."""
    options = current.options
    if not wanted:
        current.skipped[peers.COMPILE] = "left out" if not options.compile_ms else "no op of the run is compared with it"
        return []
    begin = time.monotonic()
    deadline = begin + options.compile_seconds
    if options.seconds is not None:  # as long again for timing what was compiled, and the rest
        deadline = min(deadline, begin + max(0.0, current.start + options.seconds - begin) * 0.5)
    torch.cuda.empty_cache()
    count = max(1, min(options.workers, len(wanted)))
    made = compiled.compile_cells(wanted, count, deadline, folder / "lock", lambda: current.step("compiling"))
    current.failures += [{**cell, "path": peers.COMPILE, "reason": reason} for cell, reason in made.failed]
    current.compile = {
        "options": compiled.OPTIONS,
        "processes": count,
        "cells": len(made.cells),
        "of": len(wanted),
        "ms": sorted({cell["m"] for cell in made.cells}),
        "seconds": round(time.monotonic() - begin, 1),
        "seconds_per_cell": round(sum(made.seconds) / len(made.seconds), 2) if made.seconds else None,
    }
    if left := len(wanted) - len(made.cells):
        reason = f"{len(made.failed)} failed, for the others there was no time"
        current.skipped[f"{peers.COMPILE}, {left} of {len(wanted)} cells"] = reason
    return made.cells


# ---- calls from Python ----


def _eager(current: _Run, candidates: Sequence[Cell]) -> None:
    """Batches of calls of every op and path at M = 16, in random order in every round."""
    points = {(cell["op"], cell["variant"], cell["label"]): Cell(**{**cell, "m": EAGER_M}) for cell in candidates}
    binders: dict[str, Binder] = {peers.OURS: peers.bind_ours, peers.OURS_TORCH: peers.bind_ours_torch}
    binders |= _peer_binders(current)
    batches: dict[tuple[tuple[str, str, str], str], Batch] = {}
    for key, cell in points.items():
        try:
            arguments = make_arguments(cell, current.device)
        except Exception as error:
            current.failures.append({**cell, "path": "eager arguments", "reason": first_line(error)})
            continue
        for path, bind in binders.items():
            if (bound := bind(cell["op"], arguments)) is not None:
                batches[key, path] = end_to_end(*bound, EAGER_CALLS, lambda: torch.cuda.synchronize(current.device))
    with quiet() as core:
        samples, failed = interleave(batches, EAGER_BATCHES, current.order, lambda: current.step("calls from Python"))
    current.skipped |= {} if core is not None else {"pinning": "calls from Python ran without a core of their own"}
    for (key, path), why in failed.items():
        current.failures.append({**points[key], "path": f"eager {path}", "reason": first_line(why)})
    for (key, path), taken in samples.items():
        stats, cell = summarize(taken), points[key]
        current.eager.append(
            {
                "op": cell["op"],
                "variant": cell["variant"],
                "label": cell["label"],
                "m": cell["m"],
                "path": path,
                "median_us": round(stats.median_ns / 1e3, 4),
                "q1_us": round(stats.q1_ns / 1e3, 4),
                "q3_us": round(stats.q3_ns / 1e3, 4),
            }
        )


def end_to_end(call: peers.Call, arguments: tuple[Any, ...], calls: int, synchronize: Callable[[], object]) -> Batch:
    """A batch of calls, timed from the first call until the device has done the last."""

    def run_batch() -> float:
        for _ in range(WARM_CALLS):
            call(*arguments)
        synchronize()
        start = time.perf_counter_ns()
        for _ in range(calls):
            call(*arguments)
        synchronize()
        return (time.perf_counter_ns() - start) / calls

    return run_batch

"""The dispatch benchmark: host time per call of every path in one run, interleaved at random, beside floors and peers.

Three phases, because the launch table of a device is one: the table alone; the bundle as shipped with all peers; the
bundle loaded without PDL. The floor is measured in each phase that launches, and ratios are taken within the phase.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import ops, registry, runtime
from ..bundle_reader import read_bundle
from ..errors import HdispatchError, first_line
from ..opspec import OpSpec
from ..testing.host_timer import interleave, quiet, summarize
from . import busy, machine, paths
from .paths import Case, Maker, Subject, Unavailable
from .results import PathTime, Result
from .workload import LARGEST_M, Workload

#: Called with steps done, steps in all, and what is being done.
Progress = Callable[[int, int, str], None]

FLOOR = ("cuLaunchKernelEx", "fixed")
LOADS = ("load-bundle-null", "load-bundle", "load-bundle-1000-rows")

TABLE: dict[str, Maker] = {
    "config-pick": paths.config_pick,
    "table-probe": paths.table_probe,
    "tvm-ffi-function": paths.ffi_function,
    "tvm-ffi-row": paths.ffi_row,
    "tvm-ffi-ops": paths.ffi_ops,
}
SHIPPED: dict[str, Maker] = {
    "python-call": paths.python_call,
    "null-driver": paths.null_driver,
    "torch.ops.hdispatch-null": paths.torch_null_driver,
    "torch.ops.hdispatch.default-null": paths.torch_default_null_driver,
    "cuLaunchKernelEx": paths.bare_driver,
    "cuLaunchKernelEx-pdl": paths.bare_driver_pdl,
    "hdispatch.ops": paths.ops,
    "torch.ops.hdispatch": paths.torch_ops,
    "torch.ops.hdispatch.default": paths.torch_default,
    "host-function": paths.host_function,
    "triton": paths.triton_jit,
    "helion": paths.helion_direct,
    "helion-torch-op": paths.helion_torch_op,
    "torch.ops._C": paths.vllm_op,
    "cuda-graph": paths.cuda_graph,
    "chain-hdispatch": paths.chain_ops,
    "chain-torch.add": paths.chain_torch_add,
    "chain-cuda-graph": paths.chain_graph,
}
WITHOUT_PDL: dict[str, Maker] = {"cuLaunchKernelEx": paths.bare_driver, "hdispatch.ops-nopdl": paths.ops_without_pdl}
#: Paths in the order of a result's rows.
ORDER = (*SHIPPED, "hdispatch.ops-nopdl", *TABLE, *LOADS)


@dataclass(frozen=True)
class DispatchOptions:
    """Choice of what a run measures. `bundle` is None if there is none; `no_bundle` says why.

    hidden   K (or N) of the calls; None for 4096, or else the first shape of the bundle or the op
    variant  None for bfloat16 with a residual, or else the first variant of the bundle or the op
    device   a CUDA device or "cpu"; None for the current CUDA device if there is one
    """

    op: str
    bundle: Path | None = None
    no_bundle: str = "no bundle is given"
    m: int = 16
    hidden: int | None = None
    variant: str | None = None
    rounds: int = 30
    calls: int = 200
    loads: int = 3
    seed: int = 0
    device: str | None = None
    vllm_ops: Path | None = None
    largest: int = LARGEST_M


@dataclass
class _Run:
    """A run under way."""

    subject: Subject
    progress: Progress
    steps: int
    done: int = 0
    core: int | None = None
    rows: list[PathTime] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[tuple[str, str], str] = field(default_factory=dict)

    def step(self, label: str) -> None:
        self.done += 1
        self.progress(self.done, self.steps, label)

    def finish(self) -> None:
        """Sort the rows, and name each failure: a path, or one way in which M goes where other ways of that path ran."""
        self.rows.sort(key=lambda row: ORDER.index(row["path"]))
        ran = {row["path"] for row in self.rows}
        for (path, m), reason in self.failed.items():
            self.skipped[f"{path} ({m})" if path in ran else path] = reason


def run(options: DispatchOptions, progress: Progress = lambda _done, _steps, _label: None) -> Result:
    """Measure. Bundles that the process has loaded for the device and for the null driver are replaced, then unloaded."""
    subject = _subject(options)
    phases = (TABLE, SHIPPED, WITHOUT_PDL) if subject.gpu else (TABLE, SHIPPED)
    current = _Run(subject, progress, sum(len(makers) + options.rounds for makers in phases))
    facts: dict[str, Any] = {}
    empty_call = busy.empty_call_ns()
    try:
        with runtime.strict():
            paths.publish_pick_table(subject)
            _phase(current, "table", TABLE)
            facts = _load_all(current, options)
            _phase(current, "calls", SHIPPED)
            _phase_without_pdl(current, options)
    finally:
        _unload(subject)
    header = machine.describe(subject.gpu.device if subject.gpu else None)
    header |= {"pinned_to_core": current.core, "seed": options.seed, "rounds": options.rounds, "calls": options.calls}
    header |= {
        "op": options.op,
        "variant": subject.cpu.variant.name,
        **subject.cpu.shape,
        "m": options.m,
        "bundle": facts or None,
    }
    header["empty_call_ns"] = round(max(empty_call, busy.empty_call_ns()), 1)
    current.finish()
    return {"machine": header, "rows": current.rows, "skipped": current.skipped}


# ---- setting up ----


def _subject(options: DispatchOptions) -> Subject:
    spec = registry.spec(options.op)
    if options.rounds < 1 or options.calls < 1:
        raise HdispatchError(f"rounds is {options.rounds} and calls {options.calls}; each is at least 1")
    rows = [row for row in read_bundle(options.bundle)[0]["rows"] if row["op"] == spec.name] if options.bundle else []
    variant = spec.variant(options.variant or choose_variant(spec, [row["variant"] for row in rows]))
    built = [{symbol: row[symbol] for symbol in ("K", "N") if row[symbol]} for row in rows if row["variant"] == variant.name]
    shape = choose_shape(spec, options.hidden, built)
    device, no_gpu = _device(options.device)

    def workload(where: torch.device) -> Workload:
        return Workload(spec, variant, shape, options.m, where, options.largest)

    subject = Subject(
        op=getattr(ops, options.op),
        cpu=workload(torch.device("cpu")),
        gpu=workload(device) if device else None,
        no_gpu=no_gpu,
        calls=options.calls,
        rounds=options.rounds,
        order=random.Random(options.seed),
        vllm_ops=options.vllm_ops,
    )
    if options.bundle is None:
        subject.no_bundle = {"null": options.no_bundle, "cuda": options.no_bundle}
    return subject


def choose_variant(spec: OpSpec, built: Sequence[str] = ()) -> str:
    """Of those that were built, or of all: bfloat16 with a residual (five tensors of vLLM's fused norm), else the typical."""
    names = list(built) or [variant.name for variant in spec.served_variants()]
    return next((name for name in ("bfloat16+residual", spec.typical_variant().name) if name in names), names[0])


def choose_shape(spec: OpSpec, hidden: int | None, built: Sequence[dict[str, int]] = ()) -> dict[str, int]:
    """K and N of the calls: as asked for, else 4096 among those that were built, or all of the op's, else the first.

    Sizes that a row leaves open are as the op hints.
    """
    shapes = list(built) or list(spec.shapes)
    if not shapes:
        raise HdispatchError(f"{spec.name} declares no shapes to measure")
    if hidden is None:
        shape = next((shape for shape in shapes if set(shape.values()) == {4096}), max(shapes, key=len))
        return {symbol: shape.get(symbol, spec.hint(symbol)) for symbol in spec.symbols() if symbol != "M"}
    symbols = sorted({symbol for shape in shapes for symbol in shape})
    if len(symbols) > 1:
        raise HdispatchError(f"{spec.name} has sizes {symbols}; a hidden size alone does not say them")
    return {symbols[0]: hidden}


def _device(name: str | None) -> tuple[torch.device | None, str]:
    """The CUDA device to measure on, or None and why."""
    if name == "cpu":
        return None, "needs a GPU; the device asked for is the CPU"
    if not torch.cuda.is_available():
        if name is not None:
            raise HdispatchError(
                f"device {name!r}: torch {torch.__version__} sees no CUDA device here; 'cpu' runs what needs none"
            )
        return None, "needs a GPU; torch sees none here"
    try:
        device = torch.device(name or "cuda")
        if device.index is not None:
            torch.cuda.set_device(device.index)
    except RuntimeError as error:
        raise HdispatchError(f"device {name!r}: {first_line(error)}") from error
    if device.type != "cuda":
        raise HdispatchError(f"device is {name!r}; it takes a CUDA device or 'cpu'")
    return torch.device("cuda", torch.cuda.current_device()), ""


# ---- loading ----


def _load_all(current: _Run, options: DispatchOptions) -> dict[str, Any]:
    """Load the bundle for the null driver and the GPU, timing both; facts of the bundle for the header."""
    subject = current.subject
    drivers = {"null": LOADS[0]} | ({"cuda": LOADS[1]} if subject.gpu else {})
    for driver, path in drivers.items():
        if options.bundle is not None:
            _load(current, options, driver, path)
        if driver in subject.no_bundle:
            current.skipped[path] = subject.no_bundle[driver]
    if subject.gpu is None:
        current.skipped["load-bundle"] = subject.no_gpu
    if "load-bundle" in current.skipped:
        current.skipped["load-bundle-1000-rows"] = current.skipped["load-bundle"]
    return _read_row(subject) if "null" not in subject.no_bundle else {}


def _load(current: _Run, options: DispatchOptions, driver: str, path: str) -> None:
    subject, samples = current.subject, []
    assert options.bundle is not None
    device = subject.gpu.device if subject.gpu and driver == "cuda" else None
    try:
        for _ in range(options.loads):
            start = time.perf_counter_ns()
            bundle = runtime.load(options.bundle, device=device, driver=driver)
            samples.append(float(time.perf_counter_ns() - start))
    except HdispatchError as error:
        subject.no_bundle[driver] = str(error)
        return
    current.rows.append(_row(Case(path, f"{bundle.rows} rows", "fixed", float), samples, None))
    if driver == "cuda":
        scaled = [sample * 1000 / bundle.rows for sample in samples]
        current.rows.append(_row(Case("load-bundle-1000-rows", f"{bundle.rows} rows", "fixed", float), scaled, None))


def _read_row(subject: Subject) -> dict[str, Any]:
    """Find the row that serves the fixed M: its backend and config are Helion's too."""
    bundle = next(each for each in runtime.loaded() if each.device == -1)
    variants = [variant.name for variant in subject.cpu.spec.variants()]
    shape = {"K": 0, "N": 0, **subject.cpu.shape}
    index = subject.op.pick(subject.cpu.m, shape["K"], shape["N"], variants.index(subject.cpu.variant.name))
    manifest = bundle.manifest
    if index is None:
        sizes = ", ".join(f"{symbol}={size}" for symbol, size in subject.cpu.shape.items())
        reason = f"the bundle has no row of {subject.op.name} for {subject.cpu.variant.name}, {sizes}, M={subject.cpu.m}"
        subject.no_bundle = {"null": reason, "cuda": reason} | subject.no_bundle
    else:
        record = manifest["records"][manifest["rows"][index]["record"]]
        subject.backend, subject.config = record["backend"], record["config"]
    return {
        "target": manifest["target"]["name"],
        "rows": bundle.rows,
        "records": len(manifest["records"]),
        "tools": manifest["tools"],
    }


def _unload(subject: Subject) -> None:
    served = {-1} | ({subject.gpu.device.index} if subject.gpu else set())
    for bundle in runtime.loaded():
        if bundle.device in served:
            bundle.unload()
    paths.withdraw_pick_table()


# ---- measuring ----


def _phase_without_pdl(current: _Run, options: DispatchOptions) -> None:
    subject = current.subject
    if subject.gpu is None or options.bundle is None or "cuda" in subject.no_bundle:
        current.skipped["hdispatch.ops-nopdl"] = subject.no_gpu or subject.no_bundle["cuda"]
        return
    runtime.load(options.bundle, device=subject.gpu.device, pdl=False)
    _phase(current, "calls without PDL", WITHOUT_PDL, hidden={FLOOR})


def _phase(current: _Run, label: str, makers: dict[str, Maker], hidden: Collection[tuple[str, str]] = ()) -> None:
    """Prepare, rehearse and time the paths; `hidden` cells are measured for their ratios, and not reported again."""
    cases = _prepare(current, makers)
    with quiet() as current.core:
        samples, failed = interleave(
            {cell: case.batch for cell, case in cases.items()},
            current.subject.rounds,
            current.subject.order,
            lambda: current.step(label),
        )
    current.failed |= {cell: _reason(error) for cell, error in failed.items()}
    floor = summarize(samples[FLOOR]).median_ns if FLOOR in samples else None
    current.rows += [_row(cases[cell], taken, floor) for cell, taken in samples.items() if cell not in hidden]


def _prepare(current: _Run, makers: dict[str, Maker]) -> dict[tuple[str, str], Case]:
    cases: dict[tuple[str, str], Case] = {}
    for path, maker in makers.items():
        current.step(f"preparing {path}")
        try:
            made = list(maker(current.subject))
        except Exception as error:  # a peer fails in any way it likes, and the others still run
            current.skipped[path] = _reason(error)
            continue
        for case in made:
            try:
                case.batch()
            except Exception as error:
                current.failed[case.path, case.m] = _reason(error)
            else:
                cases[case.path, case.m] = case
    return cases


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, Unavailable) else first_line(error)


def _row(case: Case, samples: list[float], floor: float | None) -> PathTime:
    stats = summarize(samples)
    return {
        "path": case.path,
        "op": case.op,
        "m": case.m,
        "median_ns": round(stats.median_ns, 3),
        "q1_ns": round(stats.q1_ns, 3),
        "q3_ns": round(stats.q3_ns, 3),
        "floor_ratio": round(stats.median_ns / floor, 4) if floor and case.launches else None,
    }

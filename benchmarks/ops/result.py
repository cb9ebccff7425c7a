"""A result of the op benchmark, as a file has it, and how it is compared: cells of two paths, roofs, calls from Python."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from hdispatch.errors import HdispatchError

from .grid import ALWAYS_ROTATED, PRODUCTS, STREAMED, Cell, Mode, report_order
from .peers import OURS, OURS_TORCH, TORCH_MM, VLLM, VLLM_NAMES
from .timing import Failure, Timing


class Eager(TypedDict):
    """One path called from Python: µs per call from the first call to the end of the last kernel."""

    op: str
    variant: str
    label: str
    m: int
    path: str
    median_us: float
    q1_us: float
    q3_us: float


class Result(TypedDict):
    """A whole run, as `--json` writes it.

    machine         the header, with the options
    copy_bandwidth  bytes per second that a device-to-device copy reads and writes in this run
    timings         GPU time under CUDA graphs, by cell and path
    eager           host and GPU together
    stats           `hdispatch.stats()` of the run
    compile         how the torch.compile cells came about; None if they were left out
    failures        paths that could not run in a cell
    skipped         what was left out, and why
    """

    machine: dict[str, Any]
    copy_bandwidth: float
    timings: list[Timing]
    eager: list[Eager]
    stats: dict[str, dict[str, Any]]
    compile: dict[str, Any] | None
    failures: list[Failure]
    skipped: dict[str, str]


def read_json(file: Path) -> Result:
    """A result that `bench ops --json` wrote. HdispatchError for a file that is none."""
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
        return {name: plain[name] for name in Result.__annotations__}  # type: ignore[return-value]
    except OSError as error:
        raise HdispatchError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise HdispatchError(f"{file} is not a result of bench ops: {error}") from error


#: Bytes per second of a copy, read and written, on the GPU that the targets name; on others, what the run measured.
COPY_BANDWIDTH = {"H200": 4.3e12}
#: Dense fp8 operations per second of a Hopper GPU.
FP8_FLOPS = 1979e12


# ---- comparisons ----


@dataclass(frozen=True)
class Comparison:
    """An op against one peer over the cells in which both ran: speedup of hdispatch by cell."""

    peer: str
    speedups: list[tuple[Timing, float]]

    @property
    def geomean(self) -> float:
        """Geometric mean of the speedups."""
        return geomean([speedup for _, speedup in self.speedups])

    @property
    def losses(self) -> list[tuple[Timing, float]]:
        """Cells in which the peer is faster, the worst first."""
        return sorted((each for each in self.speedups if each[1] < 1), key=lambda each: each[1])

    @property
    def worst(self) -> tuple[Timing, float]:
        """The cell with the least speedup."""
        return min(self.speedups, key=lambda each: each[1])


def geomean(values: Sequence[float]) -> float:
    """Geometric mean of positive numbers; at least one."""
    return math.exp(sum(map(math.log, values)) / len(values))


def point(cell: Cell) -> tuple[object, ...]:
    """The key of a cell."""
    return tuple(cell[name] for name in Cell.__annotations__)  # type: ignore[literal-required]


def compare(timings: Iterable[Timing], peer: str) -> Comparison | None:
    """These timings of hdispatch against those of a peer; None if no cell has both."""
    timings = list(timings)
    theirs = {point(each): each["median_us"] for each in timings if each["path"] == peer}
    ours = [each for each in timings if each["path"] == OURS and point(each) in theirs]
    return Comparison(peer, [(each, theirs[point(each)] / each["median_us"]) for each in ours]) if ours else None


def groups(result: Result, mode: Mode) -> dict[tuple[str, str], list[Timing]]:
    """The timings of a mode by op and variant, in the order of the report."""
    found: dict[tuple[str, str], list[Timing]] = {}
    for each in result["timings"]:
        if each["mode"] == mode:
            found.setdefault((each["op"], each["variant"]), []).append(each)
    return dict(sorted(found.items(), key=lambda item: (report_order(item[0][0]), item[0])))


def compared(result: Result) -> dict[Mode, dict[tuple[str, str], list[Timing]]]:
    """The timings to compare, by mode: those of the grid, and of `ALWAYS_ROTATED` and `STREAMED` the rotated ones too."""
    found: dict[Mode, dict[tuple[str, str], list[Timing]]] = {}
    modes: tuple[Mode, ...] = ("warm", "rotated")
    for mode in modes:
        of_grid = mode in result["machine"]["modes"]
        kept = {
            key: [each for each in timings if of_grid or key[0] in ALWAYS_ROTATED or each["label"] in STREAMED]
            for key, timings in groups(result, mode).items()
        }
        if kept := {key: timings for key, timings in kept.items() if timings}:
            found[mode] = kept
    return found


def name_of(result: Result, op: str, variant: str) -> str:
    """The op, with the variant where several of its variants were measured."""
    several = len({each["variant"] for each in result["timings"] if each["op"] == op}) > 1
    return f"{op} ({variant})" if several else op


def main_mode(result: Result) -> Mode:
    """The mode of the geometric means: warm if it was measured over the grid."""
    modes: list[Mode] = result["machine"]["modes"]
    return "warm" if "warm" in modes else "rotated"


def cell_name(cell: Cell) -> str:
    """`8B gate_up M=16`."""
    return f"{shape_name(cell)} M={cell['m']}"


def shape_name(cell: Cell) -> str:
    """`8B gate_up`."""
    return f"{cell['model'].removeprefix('Qwen3-')} {cell['label']}"


# ---- roofs ----


def copy_roof(result: Result) -> float:
    """Bytes per second that the memory roof stands at."""
    gpu = result["machine"]["gpu"] or ""
    return next((rate for name, rate in COPY_BANDWIDTH.items() if name in gpu), result["copy_bandwidth"])


def of_copy(result: Result, timing: Timing) -> float:
    """Fraction of the memory roof that a timing reaches."""
    return timing["bytes"] * 1e6 / timing["median_us"] / copy_roof(result)


@dataclass(frozen=True)
class Roof:
    """How near a timing comes to what bounds it: `fraction` of the memory or the matrix roof, the nearer one."""

    kind: Literal["memory", "matrix"]
    fraction: float


def roof(timing: Timing, bandwidth: float) -> Roof:
    """The roof of a timing, with a memory roof of `bandwidth` bytes per second."""
    memory, matrix = (timing["bytes"] / bandwidth, timing["flops"] / FP8_FLOPS)
    fraction = max(memory, matrix) * 1e6 / timing["median_us"]
    return Roof("matrix" if matrix > memory else "memory", fraction)


def roof_timings(result: Result) -> dict[tuple[str, str, int], list[Timing]]:
    """hdispatch on rotated buffers at each op's largest M, and GEMMs at the smallest, by op, variant and M."""
    found: dict[tuple[str, str, int], list[Timing]] = {}
    for (op, variant), timings in groups(result, "rotated").items():
        ours = [each for each in timings if each["path"] == OURS]
        ms = {each["m"] for each in ours}
        for m in sorted({min(ms), max(ms)} if op in PRODUCTS and ms else {max(ms)} if ms else set()):
            found[op, variant, m] = [each for each in ours if each["m"] == m]
    return found


def by_shape(losses: Sequence[tuple[Timing, float]]) -> dict[str, list[tuple[int, float]]]:
    """Lost cells by shape: M and speedup, M ascending."""
    found: dict[str, list[tuple[int, float]]] = {}
    for timing, speedup in losses:
        found.setdefault(shape_name(timing), []).append((timing["m"], speedup))
    return {name: sorted(each) for name, each in found.items()}


def words_of_peer(op: str, peer: str) -> str:
    """torch.ops._C is CUTLASS where it multiplies matrices."""
    return "CUTLASS" if peer == VLLM and VLLM_NAMES.get(op) == "cutlass_scaled_mm" else peer


# ---- eager ----


def eager_speedups(result: Result) -> dict[tuple[str, str], list[tuple[Eager, float]]]:
    """The slower of our two doors against torch.ops._C or torch.mm, by op and variant, a figure for each shape."""
    found: dict[tuple[str, str], dict[str, dict[str, Eager]]] = {}
    for each in result["eager"]:
        found.setdefault((each["op"], each["variant"]), {}).setdefault(each["label"], {})[each["path"]] = each
    speedups: dict[tuple[str, str], list[tuple[Eager, float]]] = {}
    for key, shapes in found.items():
        for paths in shapes.values():
            ours = [paths[path] for path in (OURS, OURS_TORCH) if path in paths]
            theirs = paths.get(VLLM) or paths.get(TORCH_MM)
            if ours and theirs:
                slower = max(ours, key=lambda each: each["median_us"])
                speedups.setdefault(key, []).append((slower, theirs["median_us"] / slower["median_us"]))
    return speedups

"""What a run of the op benchmark gives, and what it says: comparisons, roofs, targets and their verdicts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from ..errors import HdispatchError
from .ops_grid import EAGER_M, EAGER_MODEL, GEMMS, Cell, Mode, report_order
from .ops_timing import Failure, Timing
from .peers import COMPILE, OURS, OURS_TORCH, VLLM
from .results import Verdict


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
    stats           `hdispatch.stats()` of the run, all processes together
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


#: op -> peer -> speedup to reach, as a geometric mean over the grid: the post's, or better.
SPEEDUPS: dict[str, dict[str, float]] = {
    "dynamic_per_token_scaled_fp8_quant": {COMPILE: 1.24, VLLM: 1.41},
    "rms_norm_dynamic_per_token_quant": {COMPILE: 1.18, VLLM: 1.80},
    "silu_and_mul_dynamic_per_token_quant": {COMPILE: 1.26},
    "fused_qk_norm_rope": {COMPILE: 1.38, VLLM: 1.20},
    "per_token_group_fp8_quant": {COMPILE: 1.42, VLLM: 1.41},
    "rms_norm_per_block_quant": {COMPILE: 1.67, VLLM: 2.06},
    "silu_and_mul_per_block_quant": {COMPILE: 1.73, VLLM: 2.27},
    "scaled_mm": {VLLM: 1.08},
    "scaled_mm_blockwise": {VLLM: 1.00},
}
GEMM_ROOF = 0.75
EAGER_SPEEDUP = 1.5
PEERS = (COMPILE, VLLM)

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


def point(cell: Cell) -> tuple[str, str, str, str, int, int, int, Mode]:
    """What tells a cell from others."""
    return (
        cell["op"],
        cell["variant"],
        cell["model"],
        cell["label"],
        cell["K"],
        cell["N"],
        cell["m"],
        cell["mode"],
    )


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
        for m in sorted({min(ms), max(ms)} if op in GEMMS and ms else {max(ms)} if ms else set()):
            found[op, variant, m] = [each for each in ours if each["m"] == m]
    return found


# ---- eager ----


def eager_speedups(result: Result) -> dict[tuple[str, str], list[tuple[Eager, float]]]:
    """The slower of our two doors against torch.ops._C, by op and variant, a figure for each shape."""
    found: dict[tuple[str, str], dict[str, dict[str, Eager]]] = {}
    for each in result["eager"]:
        found.setdefault((each["op"], each["variant"]), {}).setdefault(each["label"], {})[each["path"]] = each
    speedups: dict[tuple[str, str], list[tuple[Eager, float]]] = {}
    for key, shapes in found.items():
        for paths in shapes.values():
            ours = [paths[path] for path in (OURS, OURS_TORCH) if path in paths]
            if ours and VLLM in paths:
                slower = max(ours, key=lambda each: each["median_us"])
                speedups.setdefault(key, []).append((slower, paths[VLLM]["median_us"] / slower["median_us"]))
    return speedups


# ---- targets ----


@dataclass(frozen=True)
class Judged:
    """A target, None if there is none, with what was measured, None if it did not run. `note` says over what."""

    text: str
    wanted: float | None
    measured: float | None
    note: str = ""

    @property
    def verdict(self) -> Verdict:
        """Whether the target is met."""
        if self.measured is None:
            return "not run"
        return "pass" if self.wanted is None or self.measured >= self.wanted else "miss"


def judge_speedups(result: Result) -> list[tuple[str, dict[str, Judged]]]:
    """Every op of the run, and every op with a target, with its figure and verdict for each peer."""
    found = groups(result, main_mode(result))
    keys = [*found, *((op, "") for op in SPEEDUPS if all(op != each for each, _ in found))]
    lines = []
    for op, variant in sorted(keys, key=lambda key: (report_order(key[0]), key)):
        name = name_of(result, op, variant)
        judged = {}
        for peer in PEERS:
            comparison = compare(found.get((op, variant), ()), peer)
            measured = comparison.geomean if comparison else None
            note = f"{len(comparison.speedups)} cells" if comparison else ""
            judged[peer] = Judged(f"{name} against {words_of_peer(op, peer)}", SPEEDUPS.get(op, {}).get(peer), measured, note)
        lines.append((name, judged))
    return lines


def words_of_peer(op: str, peer: str) -> str:
    """torch.ops._C is CUTLASS where it multiplies matrices."""
    return "CUTLASS" if op in GEMMS and peer == VLLM else peer


def judge_gemms(result: Result) -> list[Judged]:
    """The GEMMs of one model at M = 1, rotated: fraction of the copy bandwidth."""
    judged = []
    for op in GEMMS:
        found = [t for (name, _, m), each in roof_timings(result).items() if (name, m) == (op, 1) for t in each]
        for timing in (each for each in found if each["model"] == EAGER_MODEL):
            fraction = timing["bytes"] * 1e6 / timing["median_us"] / copy_roof(result)
            judged.append(Judged(f"{op}, {cell_name(timing)}: of the copy bandwidth", GEMM_ROOF, fraction))
        if not judged or not judged[-1].text.startswith(f"{op},"):
            judged.append(Judged(f"{op}, {EAGER_MODEL} at M=1: of the copy bandwidth", GEMM_ROOF, None))
    return judged


def judge_eager(result: Result) -> list[Judged]:
    """Every op, called from Python, against torch.ops._C: the geometric mean over its shapes."""
    judged = []
    for (op, variant), speedups in eager_speedups(result).items():
        measured = geomean([speedup for _, speedup in speedups])
        worst, least = min(speedups, key=lambda each: each[1])
        note = f"{len(speedups)} shapes, worst {least:.2f} ({worst['label']})" if len(speedups) > 1 else ""
        judged.append(Judged(f"{name_of(result, op, variant)}, eager, M={EAGER_M}", EAGER_SPEEDUP, measured, note))
    return judged or [Judged(f"every op, eager, M={EAGER_M}, against {VLLM}", EAGER_SPEEDUP, None)]


def judge_hits(result: Result) -> Judged:
    """Share of calls that the table served."""
    hits = sum(counts["hits"] for counts in result["stats"].values())
    misses = sum(sum(counts["misses"].values()) for counts in result["stats"].values())
    fallbacks = sum(counts["fallbacks"] for counts in result["stats"].values())
    share = hits / (hits + misses) if hits + misses else None
    return Judged("calls served by the table", 1.0, share, f"{hits} hits, {misses} misses, {fallbacks} fallbacks")


def judge(result: Result) -> list[Judged]:
    """Every target."""
    speedups = [each for _, judged in judge_speedups(result) for each in judged.values() if each.wanted is not None]
    return [*speedups, *judge_gemms(result), *judge_eager(result), judge_hits(result)]


# ---- files ----


def write_json(result: Result, file: Path) -> None:
    """Write a result, a line for each timing, with the verdicts."""
    plain: dict[str, Any] = dict(result)
    targets = [{"text": j.text, "wanted": j.wanted, "measured": j.measured, "verdict": j.verdict} for j in judge(result)]
    parts = [f'"{name}": {_lines(value)}' for name, value in (plain | {"targets": targets}).items()]
    try:
        file.write_text("{" + ",\n".join(parts) + "}\n", encoding="utf-8")
    except OSError as error:
        raise HdispatchError(f"cannot write {file}: {error.strerror}") from error


def _lines(value: object) -> str:
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(json.dumps(each) for each in value) + "\n]"
    return json.dumps(value)


def read_json(file: Path) -> Result:
    """A result that `write_json` wrote."""
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
        return {name: plain[name] for name in Result.__annotations__}  # type: ignore[return-value]
    except OSError as error:
        raise HdispatchError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise HdispatchError(f"{file} is not a result of bench ops: {error}") from error


def by_shape(losses: Sequence[tuple[Timing, float]]) -> dict[str, list[tuple[int, float]]]:
    """Lost cells by shape: M and speedup, M ascending."""
    found: dict[str, list[tuple[int, float]]] = {}
    for timing, speedup in losses:
        found.setdefault(shape_name(timing), []).append((timing["m"], speedup))
    return {name: sorted(each) for name, each in found.items()}

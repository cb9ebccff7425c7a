"""The targets of the GEMMs of a few tokens: against cuBLAS, vLLM's own low-latency kernels and CUTLASS, and bandwidth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .ops_compare import Comparison, Judged, Result, cell_name, compare, groups, main_mode, name_of, of_copy, words_of_peer
from .ops_grid import ALWAYS_ROTATED, EAGER_MODEL, LOW_LATENCY, Mode
from .ops_timing import Timing
from .peers import LL_BF16, OURS, SKINNY, TORCH_MM, VLLM


@dataclass(frozen=True)
class Target:
    """Speedups to reach over a peer: their geometric mean, and every cell's where `least` is given."""

    op: str
    peer: str
    mean: float
    least: float | None = None


TARGETS = (
    Target("ll_gemm_bf16", TORCH_MM, 1.3, 1.0),
    Target("ll_gemm_bf16", LL_BF16, 1.0, 1.0),
    Target("ll_gemm_bf16", SKINNY, 1.0, 1.0),
    Target("ll_gemm_fp8", VLLM, 1.2),
)
#: The Ms that the speedups are held over; larger ones are measured and shown.
MOST_M = 16
#: Fraction of the copy bandwidth to reach at M = 1, by what shape; the other shapes are shown.
BANDWIDTH = {"gate_up": 0.80, "down": 0.80}
BANDWIDTH_OP = "ll_gemm_fp8"


def mode_of(result: Result, op: str) -> Mode:
    """The mode whose cells are held against the op's targets."""
    return "rotated" if op in ALWAYS_ROTATED else main_mode(result)


def judge(result: Result) -> list[Judged]:
    """Every target."""
    return [*judge_speedups(result), *(each for each in judge_bandwidth(result) if each.wanted is not None)]


def judge_speedups(result: Result) -> list[Judged]:
    """The geometric mean against each peer, then the slowest cell, of every variant that was measured."""
    judged = []
    for target in TARGETS:
        peer, mode = words_of_peer(target.op, target.peer), mode_of(result, target.op)
        found: dict[str, Comparison | None] = dict(_comparisons(result, target, mode))
        for name, comparison in (found or {target.op: None}).items():
            text = f"{name} against {peer}, {mode}, M ≤ {MOST_M}"
            note = f"{len(comparison.speedups)} cells" if comparison else ""
            judged.append(Judged(text, target.mean, comparison.geomean if comparison else None, note))
            if target.least is not None:
                judged.append(_least(f"{text}, every cell", target.least, comparison))
    return judged


def _comparisons(result: Result, target: Target, mode: Mode) -> Iterator[tuple[str, Comparison]]:
    for (op, variant), timings in groups(result, mode).items():
        held = [each for each in timings if op == target.op and each["m"] <= MOST_M]
        if comparison := compare(held, target.peer):
            yield name_of(result, op, variant), comparison


def _least(text: str, wanted: float, comparison: Comparison | None) -> Judged:
    if comparison is None:
        return Judged(text, wanted, None)
    timing, speedup = comparison.worst
    below = sum(each < wanted for _, each in comparison.speedups)
    return Judged(text, wanted, speedup, cell_name(timing) + (f"; {below} cells below" if below else ""))


def judge_bandwidth(result: Result) -> list[Judged]:
    """The shapes of one model at M = 1, rotated: fraction of the copy bandwidth; a target of None where there is none."""
    judged = {label: Judged(f"{BANDWIDTH_OP}, {EAGER_MODEL} {label} M=1", wanted, None) for label, wanted in BANDWIDTH.items()}
    for timing in _at_one_row(result):
        label = timing["label"]
        judged[label] = Judged(f"{BANDWIDTH_OP}, {cell_name(timing)}", BANDWIDTH.get(label), of_copy(result, timing))
    return [Judged(f"{each.text}: of the copy bandwidth", each.wanted, each.measured) for each in judged.values()]


def _at_one_row(result: Result) -> list[Timing]:
    return [
        timing
        for (op, _), timings in groups(result, "rotated").items()
        for timing in timings
        if (op, timing["path"], timing["model"], timing["m"]) == (BANDWIDTH_OP, OURS, EAGER_MODEL, 1)
    ]


def was_measured(result: Result) -> bool:
    """Whether the run has any of these ops."""
    return any(each["op"] in LOW_LATENCY for each in result["timings"])

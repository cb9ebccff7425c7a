"""The verdicts of the op benchmark: what a result says of each target in targets.toml."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..verdict import TARGETS, Verdict
from .grid import ALWAYS_ROTATED, EAGER_M, EAGER_MODEL, LOW_LATENCY, STREAMED, Mode
from .peers import OURS
from .result import (
    Comparison,
    Result,
    cell_name,
    compare,
    eager_speedups,
    geomean,
    groups,
    main_mode,
    name_of,
    of_copy,
    words_of_peer,
)


def judge(result: Result, targets: dict[str, Any] = TARGETS["ops"]) -> list[Verdict]:
    """Every target."""
    speedups = [
        verdict
        for op, peers in targets["speedups"].items()
        for peer, target in peers.items()
        for verdict in _speedups(result, op, peer, **target)
    ]
    bandwidths = [
        _bandwidth(result, op, label, share, m)
        for op, labels in targets["bandwidth"].items()
        for label, target in labels.items()
        for share, m in _shares(target)
    ]
    return [*speedups, *bandwidths, *_eager(result, targets["eager"]), _hits(result, targets["hits"])]


def mode_of(result: Result, op: str) -> Mode:
    """The mode whose cells count."""
    return "rotated" if op in ALWAYS_ROTATED else main_mode(result)


def _speedups(
    result: Result, op: str, peer: str, mean: float, cell: float | None = None, most_m: int | None = None
) -> Iterator[Verdict]:
    """The geometric mean against a peer, then the slowest cell if that counts, of every variant that was measured."""
    mode = mode_of(result, op)
    found: dict[str, Comparison | None] = {}
    for (name, variant), timings in groups(result, mode).items():
        # Weights that stream have targets of their own: of the copy bandwidth.
        counted = [each for each in timings if (most_m is None or each["m"] <= most_m) and each["label"] not in STREAMED]
        if name == op and (comparison := compare(counted, peer)):
            found[name_of(result, op, variant)] = comparison
    for name, each in (found or {op: None}).items():
        text = f"{name} against {words_of_peer(op, peer)}, {mode}" + (f", M ≤ {most_m}" if most_m else "")
        yield Verdict(text, mean, each.geomean if each else None, f"{len(each.speedups)} cells" if each else "")
        if cell is not None:
            yield _every_cell(f"{text}, every cell", cell, each)


def _every_cell(text: str, wanted: float, comparison: Comparison | None) -> Verdict:
    if comparison is None:
        return Verdict(text, wanted, None)
    timing, speedup = comparison.worst
    below = sum(each < wanted for _, each in comparison.speedups)
    return Verdict(text, wanted, speedup, cell_name(timing) + (f"; {below} cells below" if below else ""))


def _shares(target: float | dict[str, Any]) -> list[tuple[float, int]]:
    """A target's share and M: a number is the share at M = 1, a table names it and the Ms."""
    return [(target["share"], m) for m in target["ms"]] if isinstance(target, dict) else [(target, 1)]


def _bandwidth(result: Result, op: str, label: str, share: float, m: int) -> Verdict:
    """A shape of the 8B model at one M, rotated: share of the copy bandwidth, of the slowest of its variants."""
    found = [
        of_copy(result, timing)
        for (name, _), timings in groups(result, "rotated").items()
        for timing in timings
        if (name, timing["path"], timing["model"], timing["label"], timing["m"]) == (op, OURS, EAGER_MODEL, label, m)
    ]
    text = f"{op}, {EAGER_MODEL.removeprefix('Qwen3-')} {label} M={m}: of the copy bandwidth"
    return Verdict(text, share, min(found, default=None), share=True)


def _eager(result: Result, wanted: float) -> list[Verdict]:
    """Every op, called from Python, against torch.ops._C: the geometric mean over its shapes. `LOW_LATENCY` has no target."""
    judged = []
    for (op, variant), speedups in eager_speedups(result).items():
        if op in LOW_LATENCY:
            continue
        worst, least = min(speedups, key=lambda each: each[1])
        note = f"{len(speedups)} shapes, worst {least:.2f} ({worst['label']})" if len(speedups) > 1 else ""
        measured = geomean([speedup for _, speedup in speedups])
        judged.append(Verdict(f"{name_of(result, op, variant)}, eager, M={EAGER_M}", wanted, measured, note))
    return judged or [Verdict(f"every op, eager, M={EAGER_M}", wanted, None)]


def _hits(result: Result, wanted: float) -> Verdict:
    """Share of calls that the table served; the note has the reasons of misses."""
    stats = result["stats"]
    hits, fallbacks = (sum(counts[name] for counts in stats.values()) for name in ("hits", "fallbacks"))
    reasons = [f"{op}: {reason}: {count}" for op, counts in stats.items() for reason, count in counts["misses"].items()]
    misses = sum(sum(counts["misses"].values()) for counts in stats.values())
    note = "; ".join([f"{hits} hits, {misses} misses, {fallbacks} fallbacks", *reasons])
    return Verdict("calls served by the table", wanted, hits / (hits + misses) if hits + misses else None, note, share=True)

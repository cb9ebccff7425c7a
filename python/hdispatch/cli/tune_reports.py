"""What `hdispatch tune` tells of its steps: tables of candidates and of the selection, curves of regret."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HdispatchError
from .text import count, duration, size, table

if TYPE_CHECKING:
    from ..tune.candidates import Dropped
    from ..tune.collect import CandidateReport, Plan
    from ..tune.compare import Share
    from ..tune.measure import Report
    from ..tune.select import OpReport


def describe_plan(plan: Plan) -> str:
    """What is about to be compiled: a table by op and backend, what is left out, and about how long it takes."""
    backends = list(dict.fromkeys(backend for counts in plan.units.values() for backend in counts))
    lines = [[op, *(str(counts.get(backend, "")) for backend in backends)] for op, counts in plan.units.items()]
    sums = {backend: sum(counts.get(backend, 0) for counts in plan.units.values()) for backend in backends}
    every = table(("op", *backends), [*lines, ["all", *map(str, sums.values())]])
    minutes = [f"{math.ceil(seconds / 60)} min" for seconds in (plan.seconds, plan.seconds / max(1, plan.jobs))]
    total = (
        f"{sum(sums.values())} to compile, unless the cache has them: about {minutes[0]} of a CPU, {minutes[1]} by {plan.jobs}"
    )
    return "\n".join([every, *plan.notes, total])


def describe_candidates(report: CandidateReport, packed: Path | None) -> str:
    """The report as text."""
    lines = [
        [op, *map(str, (o.options, o.units, len(o.dropped), o.from_cache, o.records, o.cells, o.pairs)), f"{o.seconds:.0f} s"]
        for op, o in report.ops.items()
    ]
    header = ("op", "configs", "units", "dropped", "cached", "records", "cells", "to measure", "compiling")
    parts = [table(header, lines)]
    dropped = [each for o in report.ops.values() for each in o.dropped]
    if dropped:
        parts.append("\n".join(["dropped", *(f"  {_words_of_dropped(each)}" for each in dropped)]))
    if report.notes:
        parts.append("\n".join(report.notes))
    beside = f", {packed}: {size(packed.stat().st_size)}" if packed else ""
    parts.append(f"{report.out}: {size(report.bytes)} for {report.target.name}{beside}, {duration(report.seconds * 1e9)}")
    return "\n\n".join(parts)


def _words_of_dropped(dropped: Dropped) -> str:
    why = dropped["why"].splitlines()[0]
    return f"{dropped['op']} {dropped['variant']}, {dropped['backend']} {dropped['config']}: {why[:300]}"


def candidates_json(report: CandidateReport) -> dict[str, Any]:
    """The report as plain data."""
    return {
        "out": str(report.out),
        "target": report.target.name,
        "bytes": report.bytes,
        "seconds": round(report.seconds, 3),
        "ops": {op: {**vars(o), "seconds": round(o.seconds, 3)} for op, o in report.ops.items()},
        "notes": report.notes,
    }


def describe_measuring(report: Report, out: Path) -> str:
    """The report as text, a line for each candidate without a time and each worker that was left out or lost."""
    done = f"{count(report.measured, 'cell')} measured in {report.seconds:.1f} s"
    lines = [*report.notes, *(f"not timed: {failure}" for failure in report.failures)]
    lines.append(f"{out}: {done}, {report.before} were there, {report.left} left")
    return "\n".join([*lines, *(["the same command again goes on"] if report.left else [])])


def describe_selection(reports: Sequence[OpReport], dry_run: bool) -> str:
    """The report as text."""
    lines = [
        [
            r.op,
            *map(str, (r.candidates, r.before, r.kept, r.entries)),
            f"{100 * r.mean:.1f} %",
            f"{100 * r.worst:.1f} %",
            f"{r.compile_seconds:.0f} s",
            f"{r.device_seconds:.0f} s",
        ]
        for r in reports
    ]
    totals = [sum(getattr(r, name) for r in reports) for name in ("candidates", "before", "kept", "entries")]
    seconds = [sum(getattr(r, name) for r in reports) for name in ("compile_seconds", "device_seconds")]
    worst = f"{100 * max(r.worst for r in reports):.1f} %"
    lines.append(["all", *map(str, totals), "", worst, *(f"{each:.0f} s" for each in seconds)])
    header = ("op", "candidates", "best everywhere", "kept", "entries", "mean regret", "worst", "compiling", "GPU")
    notes = [f"  {r.op}: {note}" for r in reports for note in r.notes]
    written = "nothing written" if dry_run else "\n".join(f"wrote {r.path}" for r in reports)
    return "\n\n".join([table(header, lines), *(["\n".join(["notes", *notes])] if notes else []), written])


def describe_shares(shares: Sequence[Share]) -> str:
    """A Markdown table: ops down, M across; `worst` where sizes differ by more than 2 %."""
    edges = sorted({share.m for share in shares})
    cells = {(share.op, share.m): share for share in shares}
    lines = ["| op | " + " | ".join(f"M = {m}" for m in edges) + " |", "| --- |" + " --- |" * len(edges)]
    for op in dict.fromkeys(share.op for share in shares):
        found = [_words_of_share(cells[op, m]) if (op, m) in cells else "" for m in edges]
        lines.append(f"| `{op}` | " + " | ".join(found) + " |")
    return "\n".join(lines)


def _words_of_share(share: Share) -> str:
    worst = f" (worst {share.worst:.2f})" if share.worst < 0.98 * share.share else ""
    return f"{share.share:.2f}{worst} of {share.other}"


def draw_curves(reports: Sequence[OpReport], limit: float, file: Path) -> None:
    """Worst and mean regret over the number of configs, a panel per op."""
    import matplotlib.figure

    columns = min(3, len(reports))
    rows = -(-len(reports) // columns)
    figure = matplotlib.figure.Figure(figsize=(4.2 * columns, 2.8 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, report in zip(panels, reports, strict=False):
        number, worst, mean = zip(*report.curve, strict=True)
        panel.plot(number, [100 * each for each in worst], color="#c0392b", marker="o", ms=3, lw=1, label="worst")
        panel.plot(number, [100 * each for each in mean], color="#20639b", marker="o", ms=3, lw=1, label="mean")
        panel.axhline(100 * limit, color="#333333", lw=0.8, ls="--")
        panel.axvline(report.kept, color="#333333", lw=0.8, ls=":")
        panel.set_yscale("symlog", linthresh=1)
        panel.set_ylim(0, 100)
        panel.yaxis.set_major_formatter("{x:g}")
        panel.set_xlim(0.5, len(report.curve) + 0.5)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_title(report.op, fontsize=8, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(reports) :]:
        panel.set_axis_off()
    panels[0].legend(frameon=False, fontsize=8)
    figure.supxlabel("configs (dotted: kept)", fontsize=9)
    figure.supylabel("regret, % (dashed: allowed)", fontsize=9)
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:  # ValueError: a suffix that is no picture's
        raise HdispatchError(f"cannot write {file}: {error}") from error

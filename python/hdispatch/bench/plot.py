"""A picture of a result: a bar per path and way of M, on a logarithmic scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import HdispatchError
from .results import PathTime, Result
from .workload import M_KINDS, MKind

COLORS: dict[MKind, str] = {"fixed": "#20639b", "cycling": "#f2a33a", "unseen": "#c0392b"}
LABELS: dict[MKind, str] = {"fixed": "M fixed", "cycling": "M cycling", "unseen": "M never seen before"}
BAR = 0.26


def draw(result: Result, file: Path) -> None:
    """Write the picture, in the format that the file's suffix says. Loading times are left out: they are no calls."""
    figures = _matplotlib()
    paths: dict[str, list[PathTime]] = {}
    for row in result["rows"]:
        if not row["path"].startswith("load-"):
            paths.setdefault(row["path"], []).append(row)
    order = sorted(paths, key=lambda path: min(row["median_ns"] for row in paths[path]), reverse=True)
    figure = figures.Figure(figsize=(10, 1.6 + 0.42 * len(order)), layout="constrained")
    axes = figure.subplots()
    for at, path in enumerate(order):
        _draw_path(axes, at, paths[path])
    _label(axes, result, order)
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:  # ValueError: a suffix that is no picture's
        raise HdispatchError(f"cannot write {file}: {error}") from error


def require() -> None:
    """Raise unless `draw` can run: asked before a long measurement."""
    _matplotlib()


def _matplotlib() -> Any:
    try:
        import matplotlib.figure
    except ImportError as error:
        raise HdispatchError(
            "--plot needs matplotlib: pip install 'hdispatch[plot]', or use --json and plot elsewhere"
        ) from error
    return matplotlib.figure


def _draw_path(axes: Any, at: int, rows: list[PathTime]) -> None:
    rows = sorted(rows, key=lambda row: M_KINDS.index(row["m"]), reverse=True)
    for index, row in enumerate(rows):
        y = at + (index - (len(rows) - 1) / 2) * BAR
        median = row["median_ns"]
        spread = [[median - row["q1_ns"]], [row["q3_ns"] - median]]
        axes.barh(y, median, BAR * 0.92, color=COLORS[row["m"]], xerr=spread, error_kw={"lw": 0.8, "ecolor": "#333333"})
        axes.annotate(_duration(median), (row["q3_ns"], y), (4, 0), textcoords="offset points", va="center", fontsize=7)


def _label(axes: Any, result: Result, order: list[str]) -> None:
    floor = next((row["median_ns"] for row in result["rows"] if row["path"] == "cuLaunchKernelEx"), None)
    if floor:
        axes.axvline(floor, color="#333333", lw=0.9, ls="--", zorder=0)
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.xaxis.set_major_formatter(lambda ns, _at: _duration(ns, 0))
    axes.xaxis.set_minor_formatter("")
    axes.set_yticks(range(len(order)), order, fontsize=8)
    axes.set_xlabel("host time per call (median; whiskers: quartiles" + ("; dashed: bare driver call)" if floor else ")"))
    shown = {row["m"] for row in result["rows"]}
    for m in M_KINDS:
        if m in shown:
            axes.barh([0], [0], color=COLORS[m], label=LABELS[m])
    axes.figure.legend(loc="outside lower right", ncols=len(M_KINDS), fontsize=8, frameon=False)
    machine = result["machine"]
    axes.set_title(f"{machine['op']}, {machine['variant']}, on {machine['gpu'] or machine['cpu']}", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def _duration(ns: float, digits: int = 2) -> str:
    return f"{ns:.0f} ns" if ns < 1000 else f"{ns / 1000:.{digits}f} µs" if ns < 1e6 else f"{ns / 1e6:.{digits}f} ms"

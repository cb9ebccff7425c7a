"""A picture of a serve result: ms of a decode step by batch, ms to the first token, seconds of start-up; a bar each mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import HdispatchError
from . import plot
from .serve import MODES, ServeResult

PALETTE = (
    *("#95a5a6", "#f2a33a", "#20639b", "#c0392b", "#3caea3", "#8e44ad", "#2c3e50", "#7fb3d5"),
    *("#d4ac0d", "#a3e4d7", "#e59866", "#7b241c"),
)
COLORS = dict(zip(MODES, PALETTE, strict=True))
BARS = 0.84


def draw(result: ServeResult, file: Path) -> None:
    """Write the picture, in the format that the file's suffix says."""
    plot.require()
    from matplotlib.figure import Figure

    modes = {mode: found for mode, found in result["modes"].items() if found["batches"] or found["prefills"]}
    if not modes:
        raise HdispatchError("nothing was measured; there is nothing to draw")
    panels = {
        "ms per decode step, by batch": {mode: found["batches"] for mode, found in modes.items()},
        "ms to the first token, requests x tokens": {mode: found["prefills"] for mode, found in modes.items()},
        "seconds to start": {mode: {"engine": found["started"]["init_s"]} for mode, found in modes.items()},
    }
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    for axes, (title, figures) in zip(figure.subplots(1, 3, width_ratios=(4, 3, 1.4)), panels.items(), strict=True):
        _panel(axes, figures)
        axes.set_title(title, fontsize=9, loc="left")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=len(MODES), fontsize=8, frameon=False)
    gpu = result["machine"]["gpu"]
    figure.suptitle(f"vLLM, {result['model']}, {result['scheme']}, {result['ranks']} x {gpu}", fontsize=10)
    try:
        figure.savefig(file, dpi=130)
    except (OSError, ValueError) as error:  # ValueError: a suffix that is no picture's
        raise HdispatchError(f"cannot write {file}: {error}") from error


def _panel(axes: Any, figures: dict[str, dict[str, float]]) -> None:
    """A group of bars for each name, one bar for each mode."""
    from matplotlib.ticker import LogLocator

    names = list(dict.fromkeys(name for found in figures.values() for name in found))
    width = BARS / len(figures)
    for index, (mode, found) in enumerate(figures.items()):
        at = [names.index(name) + (index - (len(figures) - 1) / 2) * width for name in found]
        bars = axes.bar(at, list(found.values()), width * 0.94, color=COLORS[mode], label=mode)
        axes.bar_label(bars, [f"{value:.3g}" for value in found.values()], fontsize=5, rotation=90, padding=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.margins(y=0.15)
    axes.yaxis.set_major_formatter(lambda value, _at: f"{value:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)

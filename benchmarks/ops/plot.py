"""A picture of an op result: µs against M, a panel for each op and model, a line for each path and shape."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from hdispatch.bench import plot
from hdispatch.errors import HdispatchError

from .grid import ALL_MODELS
from .peers import COMPILE, LL_BF16, OURS, SKINNY, TORCH_MM, TORCH_MM_ARGMAX, TORCH_SCALED_MM, VLLM
from .result import Result, groups, main_mode, name_of, words_of_peer
from .timing import Timing

COLORS = {OURS: "#20639b", VLLM: "#c0392b", COMPILE: "#f2a33a", TORCH_MM: "#3caea3", LL_BF16: "#8e44ad", SKINNY: "#d98cb3"}
COLORS[TORCH_SCALED_MM] = COLORS[TORCH_MM_ARGMAX] = COLORS[TORCH_MM]  # of other ops
DASHES = ("-", "--", "-.", ":")


def draw(result: Result, file: Path) -> None:
    """Write the picture, in the format that the file's suffix says."""
    plot.require()
    from matplotlib.figure import Figure

    panels = groups(result, main_mode(result))
    if not panels:
        raise HdispatchError("nothing was measured; there is nothing to draw")
    models = [model.name for model in ALL_MODELS] + ["other"]
    columns = max(len(_models(timings)) for timings in panels.values())
    figure = Figure(figsize=(1 + 4.6 * columns, 0.8 + 3.1 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), columns, squeeze=False, sharex=True)
    for row, ((op, variant), timings) in zip(grid, panels.items(), strict=True):
        present = sorted(_models(timings), key=models.index)
        for axes, model in itertools.zip_longest(row, present):
            axes.set_visible(model is not None)
            if model is not None:
                _panel(axes, [each for each in timings if each["model"] == model])
                axes.set_title(f"{name_of(result, op, variant)}, {model}", fontsize=8, loc="left")
    for axes in grid[-1]:
        axes.set_xlabel("M")
    figure.suptitle(
        f"µs per launch under a CUDA graph, {main_mode(result)} buffers, on {result['machine']['gpu']}", fontsize=10
    )
    _legend(figure, panels)
    try:
        figure.savefig(file, dpi=100)
    except (OSError, ValueError) as error:  # ValueError: a suffix that is no picture's
        raise HdispatchError(f"cannot write {file}: {error}") from error


def _models(timings: list[Timing]) -> set[str]:
    return {each["model"] for each in timings}


def _panel(axes: Any, timings: list[Timing]) -> None:
    from matplotlib.ticker import LogLocator

    labels = list(dict.fromkeys(each["label"] for each in timings))
    for path, color in COLORS.items():
        for index, label in enumerate(labels):
            line = sorted((each for each in timings if (each["path"], each["label"]) == (path, label)), key=lambda t: t["m"])
            ms, medians = [each["m"] for each in line], [each["median_us"] for each in line]
            axes.plot(ms, medians, DASHES[index % len(DASHES)], color=color, lw=1.2, marker=".", ms=4)
            axes.fill_between(ms, [t["q1_us"] for t in line], [t["q3_us"] for t in line], color=color, alpha=0.15, lw=0)
    for index, label in enumerate(labels if len(labels) > 1 else []):
        axes.plot([], [], DASHES[index % len(DASHES)], color="#333333", label=label)
    if len(labels) > 1:
        axes.legend(fontsize=6, frameon=False)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda m, _at: f"{m:g}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda us, _at: f"{us:g}")
    axes.yaxis.set_minor_formatter("")
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Any, panels: dict[tuple[str, str], list[Timing]]) -> None:
    from matplotlib.lines import Line2D

    paths = {each["path"] for timings in panels.values() for each in timings}
    gemms = any(words_of_peer(op, VLLM) != VLLM for op, _ in panels)
    words = {path: path for path in COLORS} | {VLLM: f"{VLLM}, CUTLASS for GEMMs" if gemms else VLLM}
    handles = [Line2D([], [], color=color, label=words[path]) for path, color in COLORS.items() if path in paths]
    figure.legend(handles=handles, loc="outside lower right", ncols=3, fontsize=8, frameon=False)

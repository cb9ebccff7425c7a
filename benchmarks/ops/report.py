"""The report of the op benchmark as text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from hdispatch.cli.text import table

from ..verdict import not_run, percent, run_lines, verdict_table
from .peers import OURS, OURS_TORCH, PEERS, TORCH_MM, VLLM
from .result import (
    FP8_FLOPS,
    Result,
    by_shape,
    cell_name,
    compare,
    compared,
    copy_roof,
    name_of,
    roof,
    roof_timings,
    words_of_peer,
)
from .verdicts import judge


def describe(result: Result) -> str:
    """The whole report."""
    parts: list[Callable[[Result], str]] = [
        describe_header,
        lambda result: verdict_table(judge(result)),
        describe_comparisons,
        describe_roofs,
        describe_eager,
        describe_losses,
        describe_rest,
    ]
    return "\n\n".join(text for part in parts if (text := part(result)))


def describe_header(result: Result) -> str:
    """The machine, the bundle, how it was measured."""
    machine, compiled = result["machine"], result["compile"]
    own, wanted = result["copy_bandwidth"] / 1e12, copy_roof(result) / 1e12
    modes = " and ".join(
        {"warm": "warm buffers (the same in every launch)", "rotated": "rotated buffers"}[mode] for mode in machine["modes"]
    )
    lines = [
        *run_lines(machine),
        f"copy bandwidth of this machine {own:.2f} TB/s; the memory roof stands at {wanted:.2f} TB/s",
        f"CUDA graphs, {modes}; M = {_range(machine['ms'])}; {machine['seconds']:.0f} s",
    ]
    if compiled:
        lines.append(
            f"torch.compile took part in {compiled['cells']} of {compiled['of']} cells, M = {_range(compiled['ms'])}; "
            f"compiled in {compiled['seconds']:.0f} s by {compiled['processes']} processes"
        )
    return "\n".join(lines)


def _range(ms: Sequence[int]) -> str:
    if len(ms) > 6 and list(ms) == [ms[0] * 2**at for at in range(len(ms))]:
        return f"{ms[0]}, {ms[1]}, {ms[2]} … {ms[-1]}"
    return ", ".join(map(str, ms)) or "none"


def describe_comparisons(result: Result) -> str:
    """Every op against every peer: geometric mean, wins and losses, the worst cell."""
    parts = []
    for mode, measured in compared(result).items():
        lines = []
        for (op, variant), timings in measured.items():
            for peer in PEERS:
                found = compare(timings, peer)
                if found is None:
                    continue
                timing, worst = found.worst
                wins, losses = len(found.speedups) - len(found.losses), len(found.losses)
                figures = [str(len(found.speedups)), f"{found.geomean:.2f}", str(wins), str(losses), f"{worst:.2f}"]
                lines.append([name_of(result, op, variant), words_of_peer(op, peer), *figures, cell_name(timing)])
        if lines:
            header = ("op", "against", "cells", "geomean", "wins", "losses", "worst", "where")
            parts.append(f"speedups by op, {mode} buffers\n" + table(header, lines, left=2))
    return "\n\n".join(parts)


def describe_roofs(result: Result) -> str:
    """hdispatch at its largest M, rotated: fraction of the roof that bounds the op, over its shapes."""
    lines = []
    for (op, variant, m), timings in roof_timings(result).items():
        fractions = [roof(each, copy_roof(result)) for each in timings]
        own = [roof(each, result["copy_bandwidth"]).fraction for each in timings]
        kinds = "/".join(sorted({each.kind for each in fractions}))
        figures = [_span(each.fraction for each in fractions), _span(own) if "memory" in kinds else ""]
        lines.append([name_of(result, op, variant), kinds, str(m), *figures])
    if not lines:
        return ""
    title = f"hdispatch, rotated buffers: fraction of the roof over its shapes (matrix roof {FP8_FLOPS / 1e12:.0f} TFLOPS)\n"
    return title + table(("op", "roof", "M", "of the roof", "of this machine's copy"), lines, left=2)


def _span(values: Iterable[float]) -> str:
    found = sorted(values)
    return percent(found[0]) if len(found) == 1 else f"{percent(found[0])} … {percent(found[-1])}"


def describe_eager(result: Result) -> str:
    """Calls from Python: µs by path."""
    shapes: dict[tuple[str, str, str], dict[str, float]] = {}
    for each in result["eager"]:
        shapes.setdefault((each["op"], each["variant"], each["label"]), {})[each["path"]] = each["median_us"]
    measured = {path for paths in shapes.values() for path in paths}
    paths = [path for path in (OURS, OURS_TORCH, VLLM, TORCH_MM) if path in measured]
    lines = [
        [op, label, *(f"{figures[path]:.2f}" if path in figures else "" for path in paths)]
        for (op, _, label), figures in shapes.items()
    ]
    title = "called from Python, M = 16, 8B: µs per call from the first call of 200 to the end of the last kernel\n"
    return title + table(("op", "shape", *paths), lines, left=2) if lines else ""


def describe_losses(result: Result) -> str:
    """Every cell in which a peer is faster, a line for each shape."""
    lines = []
    modes = compared(result)
    for mode, measured in modes.items():
        for (op, variant), timings in measured.items():
            for peer in PEERS:
                found = compare(timings, peer)
                for shape, cells in by_shape(found.losses if found else []).items():
                    figures = ", ".join(f"M={m} {speedup:.2f}" for m, speedup in cells)
                    where = f"{mode}, {shape}" if len(modes) > 1 else shape
                    lines.append(f"  {name_of(result, op, variant)} against {words_of_peer(op, peer)}, {where}: {figures}")
    return "\n".join(["cells in which a peer is faster:" + ("" if lines else " none"), *lines])


FAILURES_SHOWN = 30


def describe_rest(result: Result) -> str:
    """The paths that were left out, and those that failed."""
    lines = [f"{what}: {reason}" for what, reason in result["skipped"].items()]
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for each in result["failures"]:
        grouped.setdefault((each["op"], each["path"], each["reason"]), []).append(cell_name(each))
    for (op, path, reason), cells in list(grouped.items())[:FAILURES_SHOWN]:
        more = f" and {len(cells) - 1} more" if len(cells) > 1 else ""
        lines.append(f"{op}, {path}, {cells[0]}{more}: {reason}")
    if len(grouped) > FAILURES_SHOWN:
        lines.append(f"and {len(grouped) - FAILURES_SHOWN} more kinds of failure; --json has them all")
    return not_run(lines)

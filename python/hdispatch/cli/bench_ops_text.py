"""The report of `bench ops` in words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..bench.ops_compare import (
    FP8_FLOPS,
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
from ..bench.ops_low_latency import judge_bandwidth, was_measured
from ..bench.ops_low_latency import judge_speedups as judge_low_latency
from ..bench.ops_report import COLUMNS, judge_eager, judge_gemms, judge_hits, judge_speedups
from ..bench.peers import OURS, OURS_TORCH, PEERS, TORCH_MM, VLLM
from .text import table


def describe(result: Any) -> str:
    """The whole report in words."""
    parts: list[Callable[[Any], str]] = [
        describe_header,
        describe_targets,
        describe_low_latency,
        describe_comparisons,
        describe_roofs,
        describe_gemms,
        describe_eager,
        describe_hits,
        describe_losses,
        describe_rest,
    ]
    return "\n\n".join(text for part in parts if (text := part(result)))


def describe_header(result: Any) -> str:
    """The machine, the bundle, how it was measured."""
    machine, compiled = result["machine"], result["compile"]
    versions = ", ".join(
        f"{name} {machine[name]}" for name in ("python", "torch", "triton", "helion", "hdispatch") if machine[name]
    )
    revision = (machine["revision"] or "unknown").partition("+")
    own, roof = result["copy_bandwidth"] / 1e12, copy_roof(result) / 1e12
    lines = [
        f"{machine['gpu']}, driver {machine['driver']}, {machine['cpu']}, {machine['cores']} cores",
        f"{versions}, revision {revision[0][:12]}{''.join(revision[1:])}, {machine['date']}",
        f"bundle for {machine['bundle']['target']}, {machine['bundle']['rows']} rows, "
        f"{machine['bundle']['records']} records; {machine['rounds']} rounds, {machine['seconds']:.0f} s",
        f"copy bandwidth of this machine {own:.2f} TB/s; the memory roof stands at {roof:.2f} TB/s",
        f"geometric means: CUDA graphs, {_words_of_modes(machine['modes'])}; M = {_range(machine['ms'])}",
    ]
    if compiled:
        per_cell = f"{compiled['seconds_per_cell']} s per cell in " if compiled["seconds_per_cell"] else ""
        lines.append(
            f"torch.compile took part in {compiled['cells']} of {compiled['of']} cells, M = {_range(compiled['ms'])}; "
            f"compiled in {compiled['seconds']:.0f} s, {per_cell}{compiled['processes']} processes"
        )
    return "\n".join(lines)


def _words_of_modes(modes: Sequence[str]) -> str:
    warm = "warm buffers (the same in every launch, as in the post)"
    if "warm" not in modes:
        return "buffers rotated past L2"
    return warm + (", then buffers rotated past L2" if "rotated" in modes else "")


def _range(ms: Sequence[int]) -> str:
    if len(ms) > 6 and list(ms) == [ms[0] * 2**at for at in range(len(ms))]:
        return f"{ms[0]}, {ms[1]}, {ms[2]} … {ms[-1]}"
    return ", ".join(map(str, ms)) or "none"


def describe_targets(result: Any) -> str:
    """Each op's speedups: target, measured, verdict; an op without a target has its figure all the same."""
    lines = [[name, *(text for peer in COLUMNS for text in _speedup(judged[peer]))] for name, judged in judge_speedups(result)]
    peers = (COLUMNS[0], f"{COLUMNS[1]} or CUTLASS")
    header = ["op", *(text for peer in peers for text in (f"vs {peer}", "measured", "verdict"))]
    return "speedups, geometric means against their targets\n" + table(header, lines)


def describe_low_latency(result: Any) -> str:
    """The GEMMs of a few tokens against each peer, the mean and the worst cell; their bandwidth at M = 1."""
    if not was_measured(result):
        return ""
    speedups = [[j.text, _least(j.wanted), _ratio(j.measured), j.verdict, j.note] for j in judge_low_latency(result)]
    bandwidth = [
        [j.text, "–" if j.wanted is None else f"≥ {_percent(j.wanted)}", _percent(j.measured), _verdict(j), j.note]
        for j in judge_bandwidth(result)
    ]
    header = ("GEMMs of a few tokens", "target", "measured", "verdict", "over, or where")
    return "speedups, geometric mean and worst cell; bandwidth on rotated buffers\n" + table(header, speedups + bandwidth)


def _speedup(judged: Any) -> tuple[str, str, str]:
    if judged.wanted is not None:
        return f"≥ {judged.wanted:.2f}", _ratio(judged.measured), judged.verdict
    return "–", _ratio(judged.measured), "slower" if judged.measured is not None and judged.measured < 1 else ""


def describe_comparisons(result: Any) -> str:
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
                figures = [str(len(found.speedups)), _ratio(found.geomean), str(wins), str(losses), _ratio(worst)]
                lines.append([name_of(result, op, variant), words_of_peer(op, peer), *figures, cell_name(timing)])
        if lines:
            header = ("op", "against", "cells", "geomean", "wins", "losses", "worst", "where")
            parts.append(f"speedups by op, {mode} buffers\n" + table(header, lines, left=2))
    return "\n\n".join(parts)


def describe_roofs(result: Any) -> str:
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
    return _percent(found[0]) if len(found) == 1 else f"{_percent(found[0])} … {_percent(found[-1])}"


def describe_gemms(result: Any) -> str:
    """The GEMMs of one model at M = 1."""
    lines = [[each.text, f"≥ {_percent(each.wanted)}", _percent(each.measured), each.verdict] for each in judge_gemms(result)]
    return "GEMMs at M = 1, rotated buffers\n" + table(("GEMM", "target", "measured", "verdict"), lines)


def describe_eager(result: Any) -> str:
    """Calls from Python: µs by path, then the verdict of each op."""
    shapes: dict[tuple[str, str, str], dict[str, float]] = {}
    for each in result["eager"]:
        shapes.setdefault((each["op"], each["variant"], each["label"]), {})[each["path"]] = each["median_us"]
    if not shapes:
        return ""
    measured = {path for paths in shapes.values() for path in paths}
    paths = [path for path in (OURS, OURS_TORCH, VLLM, TORCH_MM) if path in {OURS, OURS_TORCH, VLLM} | measured]
    lines = [[op, label, *(_us(figures.get(path)) for path in paths)] for (op, _, label), figures in shapes.items()]
    judged = [[j.text, _least(j.wanted), _ratio(j.measured), _verdict(j), j.note] for j in judge_eager(result)]
    return "\n\n".join(
        [
            "called from Python, M = 16, 8B: µs per call from the first call of 200 to the end of the last kernel\n"
            + table(("op", "shape", "hdispatch.ops", *paths[1:]), lines, left=2),
            f"the slower of the two doors against {' or '.join(paths[2:])}\n"
            + table(("op", "target", "measured", "verdict", "over"), judged),
        ]
    )


def describe_hits(result: Any) -> str:
    """Whether the table served every call."""
    judged = judge_hits(result)
    line = [judged.text, f"≥ {_percent(judged.wanted)}", _percent(judged.measured, 2), judged.verdict, judged.note]
    missed = [
        f"  {op}: {reason}: {count}" for op, counts in result["stats"].items() for reason, count in counts["misses"].items()
    ]
    return "\n".join([table(("stats", "target", "measured", "verdict", ""), [line]), *missed])


def describe_losses(result: Any) -> str:
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


def describe_rest(result: Any) -> str:
    """What was left out, and what failed."""
    lines = [f"  {what}: {reason}" for what, reason in result["skipped"].items()]
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for each in result["failures"]:
        grouped.setdefault((each["op"], each["path"], each["reason"]), []).append(cell_name(each))
    for (op, path, reason), cells in list(grouped.items())[:FAILURES_SHOWN]:
        more = f" and {len(cells) - 1} more" if len(cells) > 1 else ""
        lines.append(f"  {op}, {path}, {cells[0]}{more}: {reason}")
    if len(grouped) > FAILURES_SHOWN:
        lines.append(f"  and {len(grouped) - FAILURES_SHOWN} more kinds of failure; --json has them all")
    return "\n".join(["not run", *lines]) if lines else ""


def _least(wanted: float | None) -> str:
    return "–" if wanted is None else f"≥ {wanted:.2f}"


def _verdict(judged: Any) -> str:
    return "" if judged.wanted is None else str(judged.verdict)


def _us(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} ×"


def _percent(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{100 * value:.{digits}f} %"

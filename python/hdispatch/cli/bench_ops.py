"""`hdispatch bench ops`: GPU time per op over the models' shapes, beside torch.compile, vLLM's kernels and CUTLASS."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import HdispatchError
from .doctor import BUNDLE_VARIABLE, default_bundle
from .text import Progress, table

DESCRIPTION = """\
Measure the GPU time of every op in a bundle over M = 1 … 8192 and the shapes of three models, beside torch.compile with
the options of the post, vLLM's own kernels (torch.ops._C) and CUTLASS through them; each is a CUDA graph of many launches,
and all of a cell are replayed in random order in every round: median and quartiles. Then the same ops called from Python,
from the first call of a batch to the end of its last kernel. What was reached is held against targets and roofs.

  hdispatch bench ops --bundle bundle --vllm-ops PATH/_C.so --json ops.json --plot ops.png
  hdispatch bench ops --quick --no-compile --ops rms_norm,silu_and_mul
  hdispatch bench ops --show ops.json               the report of an earlier run; needs no GPU
"""

EPILOG = """\
modes:
  warm       the same buffers in every launch, as in the post: what fits in L2 is found there
  rotated    buffers that together exceed twice L2: every launch reads its inputs from memory
Roofs are always held against rotated buffers: every op at the largest M, GEMMs at the smallest too.

exit code: with --check, 1 if a target is missed.
"""


def add_ops_parser(kinds: Any) -> None:
    """Declare `bench ops`."""
    parser = kinds.add_parser(
        "ops",
        help="GPU time per op, beside torch.compile, vLLM's kernels and CUTLASS",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what")
    what.add_argument("--bundle", metavar="DIR", type=Path, help=f"bundle to measure (default: ${BUNDLE_VARIABLE})")
    what.add_argument("--ops", metavar="A,B", type=words, help="ops to measure (default: all of the bundle)")
    what.add_argument("--models", metavar="A,B", type=words, help="1.7B, 8B, 32B (default: all)")
    what.add_argument("--ms", metavar="M,M", type=numbers, help="Ms of the grid (default: 1, 2, 4, … 8192)")
    what.add_argument(
        "--variants",
        metavar="V,V",
        type=words,
        default=("default",),
        help="variants, 'default' being what vLLM's forward calls (default: default); an op with none of them keeps its own",
    )
    what.add_argument(
        "--mode", choices=("warm", "rotated", "both"), default="warm", help="buffers over the grid (default: warm)"
    )
    what.add_argument("--no-eager", action="store_true", help="leave out the calls from Python")
    peers = parser.add_argument_group("peers")
    peers.add_argument("--vllm-ops", metavar="PATH", type=Path, help="vLLM's compiled ops, vllm/_C….so")
    peers.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    peers.add_argument(
        "--compile-ms", metavar="M,M", type=numbers, help="Ms at which torch.compile takes part (default: those of the grid)"
    )
    peers.add_argument(
        "--compile-seconds", metavar="S", type=float, default=150.0, help="how long cells are compiled (default: 150)"
    )
    peers.add_argument("--workers", metavar="N", type=int, help="processes that compile (default: one per CPU, at most 14)")
    how = parser.add_argument_group("how")
    how.add_argument("--rounds", metavar="N", type=int, help="rounds (default: 11)")
    how.add_argument("--seconds", metavar="S", type=float, help="begin no cell later than this; coarse Ms come first")
    how.add_argument("--quick", action="store_true", help="5 rounds; M = 1, 16, 256, 2048, 8192")
    how.add_argument("--seed", metavar="N", type=int, default=0, help="seed of the order (default: 0)")
    out = parser.add_argument_group("result")
    out.add_argument("--json", metavar="FILE", type=Path, help="write the result as JSON")
    out.add_argument("--plot", metavar="FILE.png", type=Path, help="draw µs against M (needs matplotlib)")
    out.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    out.add_argument("--show", metavar="FILE", type=Path, help="measure nothing: report on (and draw) a result of --json")
    parser.set_defaults(run=run_ops)


def words(text: str) -> tuple[str, ...]:
    """`a,b` -> ("a", "b")."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def numbers(text: str) -> tuple[int, ...]:
    """`1,16` -> (1, 16); each at least 1."""
    found = tuple(int(word) for word in words(text))
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of Ms of at least 1")
    return found


QUICK_MS, QUICK_ROUNDS = (1, 16, 256, 2048, 8192), 5


def run_ops(arguments: argparse.Namespace) -> int:
    """Measure, print, write."""
    from ..bench import ops, ops_plot, ops_report, plot

    _check(arguments)
    if arguments.plot:
        plot.require()
    if arguments.show:
        result = ops_report.read_json(arguments.show)
    else:
        options = options_of(arguments)
        progress = Progress()
        try:
            result = ops.run(options, progress)
        finally:
            progress.finish()
    if arguments.json:  # first of all: a measurement is dear
        ops_report.write_json(result, arguments.json)
    print(describe(result))
    if arguments.plot:
        ops_plot.draw(result, arguments.plot)
    return 1 if arguments.check and any(each.verdict == "miss" for each in ops_report.judge(result)) else 0


def options_of(arguments: argparse.Namespace) -> Any:
    """The options of a run; HdispatchError without a GPU or a bundle."""
    from ..bench import ops, ops_grid, ops_timing

    ops_timing.require_gpu()
    bundle = default_bundle(arguments.bundle)
    if bundle is None:
        raise HdispatchError(f"bench ops needs a bundle: --bundle DIR or ${BUNDLE_VARIABLE}; hdispatch build makes one")
    ms = arguments.ms or (QUICK_MS if arguments.quick else ops_grid.MS)
    compile_ms = () if arguments.no_compile else tuple(m for m in ms if m in (arguments.compile_ms or ms))
    return ops.Options(
        bundle=bundle,
        vllm_ops=arguments.vllm_ops,
        ops=arguments.ops,
        ms=ms,
        models=arguments.models,
        variants=arguments.variants,
        modes=("warm", "rotated") if arguments.mode == "both" else (arguments.mode,),
        compile_ms=compile_ms,
        compile_seconds=arguments.compile_seconds,
        workers=arguments.workers or min(14, len(os.sched_getaffinity(0))),
        eager=not arguments.no_eager,
        rounds=arguments.rounds or (QUICK_ROUNDS if arguments.quick else ops.ROUNDS),
        seconds=arguments.seconds,
        seed=arguments.seed,
    )


def _check(arguments: argparse.Namespace) -> None:
    """Refuse before anything long what would fail after it."""
    for file in (arguments.json, arguments.plot):
        if file and not file.resolve().parent.is_dir():
            raise HdispatchError(f"cannot write {file}: {file.parent} is not a folder")
    if arguments.vllm_ops and not arguments.vllm_ops.is_file():
        raise HdispatchError(f"--vllm-ops {arguments.vllm_ops} is not a file")


# ---- printing ----


def describe(result: Any) -> str:
    """The whole report in words."""
    parts: list[Callable[[Any], str]] = [
        describe_header,
        describe_targets,
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
    from ..bench.ops_report import copy_roof

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
    from ..bench.ops_report import PEERS, judge_speedups

    lines = [[name, *(text for peer in PEERS for text in _speedup(judged[peer]))] for name, judged in judge_speedups(result)]
    header = ["op", *(text for peer in (PEERS[0], f"{PEERS[1]} or CUTLASS") for text in (f"vs {peer}", "measured", "verdict"))]
    return "speedups, geometric means against their targets\n" + table(header, lines)


def _speedup(judged: Any) -> tuple[str, str, str]:
    if judged.wanted is not None:
        return f"≥ {judged.wanted:.2f}", _ratio(judged.measured), judged.verdict
    return "–", _ratio(judged.measured), "slower" if judged.measured is not None and judged.measured < 1 else ""


def describe_comparisons(result: Any) -> str:
    """Every op against every peer: geometric mean, wins and losses, the worst cell."""
    from ..bench.ops_report import PEERS, cell_name, compare, groups, name_of, words_of_peer

    parts = []
    for mode in result["machine"]["modes"]:
        lines = []
        for (op, variant), timings in groups(result, mode).items():
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
    from ..bench.ops_report import FP8_FLOPS, copy_roof, name_of, roof, roof_timings

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
    from ..bench.ops_report import judge_gemms

    lines = [[each.text, f"≥ {_percent(each.wanted)}", _percent(each.measured), each.verdict] for each in judge_gemms(result)]
    return "GEMMs at M = 1, rotated buffers\n" + table(("GEMM", "target", "measured", "verdict"), lines)


def describe_eager(result: Any) -> str:
    """Calls from Python: µs by path, then the verdict of each op."""
    from ..bench.ops_report import judge_eager
    from ..bench.peers import OURS, OURS_TORCH, VLLM

    shapes: dict[tuple[str, str, str], dict[str, float]] = {}
    for each in result["eager"]:
        shapes.setdefault((each["op"], each["variant"], each["label"]), {})[each["path"]] = each["median_us"]
    if not shapes:
        return ""
    lines = []
    for (op, _, label), paths in shapes.items():
        figures = [f"{paths[path]:.2f}" if path in paths else "" for path in (OURS, OURS_TORCH, VLLM)]
        lines.append([op, label, *figures])
    judged = [[j.text, f"≥ {j.wanted:.2f}", _ratio(j.measured), j.verdict, j.note] for j in judge_eager(result)]
    return "\n\n".join(
        [
            "called from Python, M = 16, 8B: µs per call from the first call of 200 to the end of the last kernel\n"
            + table(("op", "shape", "hdispatch.ops", OURS_TORCH, VLLM), lines, left=2),
            f"the slower of the two doors against {VLLM}\n" + table(("op", "target", "measured", "verdict", "over"), judged),
        ]
    )


def describe_hits(result: Any) -> str:
    """Whether the table served every call."""
    from ..bench.ops_report import judge_hits

    judged = judge_hits(result)
    line = [judged.text, f"≥ {_percent(judged.wanted)}", _percent(judged.measured, 2), judged.verdict, judged.note]
    missed = [
        f"  {op}: {reason}: {count}" for op, counts in result["stats"].items() for reason, count in counts["misses"].items()
    ]
    return "\n".join([table(("stats", "target", "measured", "verdict", ""), [line]), *missed])


def describe_losses(result: Any) -> str:
    """Every cell in which a peer is faster, a line for each shape."""
    from ..bench.ops_report import PEERS, by_shape, compare, groups, name_of, words_of_peer

    lines = []
    for mode in result["machine"]["modes"]:
        for (op, variant), timings in groups(result, mode).items():
            for peer in PEERS:
                found = compare(timings, peer)
                for shape, cells in by_shape(found.losses if found else []).items():
                    figures = ", ".join(f"M={m} {speedup:.2f}" for m, speedup in cells)
                    where = f"{mode}, {shape}" if len(result["machine"]["modes"]) > 1 else shape
                    lines.append(f"  {name_of(result, op, variant)} against {words_of_peer(op, peer)}, {where}: {figures}")
    return "\n".join(["cells in which a peer is faster:" + ("" if lines else " none"), *lines])


FAILURES_SHOWN = 30


def describe_rest(result: Any) -> str:
    """What was left out, and what failed."""
    from ..bench.ops_report import cell_name

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


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} ×"


def _percent(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{100 * value:.{digits}f} %"

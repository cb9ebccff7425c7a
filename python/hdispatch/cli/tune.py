"""`hdispatch tune`: candidates compiled anywhere, measured on the GPU, selected offline."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import archive
from ..errors import HdispatchError
from ..opspec import OpSpec
from . import kernels, numbers
from .build import build_wing, parse_shapes
from .text import Progress, count, duration, print_json, size, split, table

if TYPE_CHECKING:
    from ..tune.candidates import Dropped
    from ..tune.collect import CandidateReport
    from ..tune.points import Scope
    from ..tune.select import OpReport

DESCRIPTION = """\
Choose the configs of ops in three steps, of which only the second needs the GPU:

  hdispatch tune candidates --out cand --archive cand.tar.xz    what to measure, compiled; on any machine
  hdispatch tune measure cand --out timings.jsonl               every candidate at every size, on the GPU; can be resumed
  hdispatch tune select timings.jsonl                           few configs that are nearly the best -> configs/

and another source of candidates, which takes GPU hours:

  hdispatch tune helion --out found                             Helion's own autotuner; then candidates --configs found
"""

CANDIDATES = """\
Collect configs for every op, size and bucket: the kernels' own lists, Helion's default and its neighbours along Helion's
fragments, the present config files, further folders of config files, and what neighbouring buckets have. Each is compiled
once for all sizes that can share it; what does not compile is left out and reported; of configs with the same code one is
kept. No GPU is needed; what was compiled before comes from the build cache.
"""

MEASURE = """\
Measure the candidates of DIR through the C++ launcher: against the reference first (what is wrong is never timed), then
against each other, in random order in every round, losers dropped early: in replayed CUDA graphs on buffers that rotate past
L2; those not far behind there also launched one by one, and on the same buffers where L2 would still hold them.
One line of JSON per candidate and size is appended to FILE; a run that was stopped or killed goes on where it was.
Another process measures: a candidate that breaks it, or takes longer than --timeout for a step, is noted in FILE as fatal or
timeout and left out from then on, and a new process continues with the others.
"""

SELECT = """\
Choose, from timings, few configs per op that stay within the allowed regret (how much slower than the best measured config) at
every size and bucket, and write configs/<op>/<gpu>.json in vLLM's format, with the times and versions
beside it in <gpu>.tuned.json. Entries for sizes without timings are kept.
"""

HELION = """\
Run Helion's autotuner on the GPU that is here, for every size and bucket of the ops that have a Helion kernel, and write
what it finds to DIR/<op>/<gpu>.json. Minutes per point; points that DIR has are skipped.
"""


def add_parser(commands: Any) -> None:
    """Declare the subcommand and its own."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(
        "tune", help="choose configs: candidates, measure, select", description=DESCRIPTION, formatter_class=raw
    )
    steps = parser.add_subparsers(title="steps", metavar="STEP", dest="step", required=True)
    _add_candidates(steps.add_parser("candidates", help="collect and compile configs", description=CANDIDATES))
    _add_measure(steps.add_parser("measure", help="time candidates on the GPU", description=MEASURE))
    _add_select(steps.add_parser("select", help="timings to config files", description=SELECT))
    _add_helion(steps.add_parser("helion", help="Helion's autotuner, a source of candidates", description=HELION))


def _add_scope(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ops", metavar="A,B", help="ops (default: all; with --kernels those of it)")
    kernels.add_argument(parser)
    parser.add_argument("--variants", metavar="V,W", help="variants to measure (default: the typical one of each op)")
    parser.add_argument("--shapes", metavar="K=4096,…", help="only these sizes; every op must have one of them (default: all)")
    parser.add_argument(
        "--buckets",
        metavar="1,16,…",
        help="only the buckets of M with these upper edges; every op must have them (default: all)",
    )


def _add_candidates(parser: argparse.ArgumentParser) -> None:
    _add_scope(parser)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder of the candidate bundle")
    parser.add_argument("--archive", metavar="FILE", type=Path, help="pack it into a .tar.xz too")
    parser.add_argument("--target", metavar="GPU", default="h200", help="h100, h200, b200, a100, native (default: h200)")
    parser.add_argument("--configs", metavar="DIR", type=Path, action="append", default=[], help="more: <op>/*.json in DIR")
    parser.add_argument(
        "--radius", metavar="N", type=numbers.whole, default=1, help="steps along Helion's fragments; -1: none of it"
    )
    parser.add_argument(
        "--spread", metavar="N", type=numbers.whole, default=1, help="try configs N buckets to either side (default: 1)"
    )
    parser.add_argument("--jobs", metavar="N", type=numbers.whole, help="worker processes (default: one per CPU)")
    parser.add_argument("--cache", metavar="DIR", type=Path, help="build cache (default: as for build)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON on stdout")
    parser.set_defaults(run=run_candidates)


def _add_measure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="DIR", type=Path, help="candidate bundle")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="file of timings, .jsonl; appended to")
    parser.add_argument("--ops", metavar="A,B", help="ops (default: all)")
    kernels.add_argument(parser)
    parser.add_argument("--limit", metavar="N", type=numbers.whole, help="at most N cells: sizes and buckets")
    parser.add_argument("--seconds", metavar="N", type=numbers.real, help="begin no further cell after N seconds")
    parser.add_argument(
        "--seed", metavar="N", type=numbers.whole, default=0, help="seed of the arguments and of the order (default: 0)"
    )
    parser.add_argument(
        "--timeout",
        metavar="N",
        type=numbers.real,
        default=60.0,
        help="seconds after which a candidate's step, its check and capture or one of its times, counts as hung (default: 60)",
    )
    parser.set_defaults(run=run_measure)


def _add_select(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("timings", metavar="FILE", type=Path, nargs="+", help="timings; of two lines the later file's counts")
    parser.add_argument("--ops", metavar="A,B", help="ops (default: those with timings)")
    kernels.add_argument(parser)
    parser.add_argument("--regret", metavar="X", type=numbers.real, default=0.02, help="allowed regret (default: 0.02, 2 %%)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder for <op>/<gpu>.json (default: the ops' own)")
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    parser.add_argument("--plot", metavar="FILE.png", type=Path, help="draw regret over number of configs (needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON on stdout")
    parser.set_defaults(run=run_select)


def _add_helion(parser: argparse.ArgumentParser) -> None:
    _add_scope(parser)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder for <op>/<gpu>.json")
    parser.add_argument("--effort", choices=("quick", "full"), default="quick", help="of Helion's search (default: quick)")
    parser.add_argument("--seconds", metavar="N", type=numbers.real, help="begin no further point after N seconds")
    parser.set_defaults(run=run_helion)


# ---- candidates ----


def run_candidates(arguments: argparse.Namespace) -> int:
    """Collect, compile, print the report."""
    with build_wing():
        from ..tune.collect import collect
    if missing := next((folder for folder in arguments.configs if not folder.is_dir()), None):
        raise HdispatchError(f"--configs {missing} is not a folder")
    if arguments.archive:
        archive.check_file(arguments.archive)
    with timed_progress() as progress:
        report = collect(
            kernels.chosen_ops(arguments),
            arguments.target,
            arguments.out,
            scope=_scope(arguments),
            jobs=arguments.jobs,
            cache=arguments.cache,
            extra=kernels.given(arguments),
            progress=progress,
        )
    if arguments.archive:
        archive.pack(arguments.out, arguments.archive, top=arguments.out.resolve().name)
    if arguments.json:
        print_json(_candidates_json(report))
    else:
        print(describe_candidates(report, arguments.archive))
    return 0


def _scope(arguments: argparse.Namespace) -> Scope:
    with build_wing():
        from ..tune.points import Scope

    variants, edges = split(arguments.variants), split(arguments.buckets)
    shapes = parse_shapes(arguments.shapes) if arguments.shapes else None
    return Scope(
        variants=_chosen_variants(variants) if variants else None,
        shapes=_chosen_shapes(shapes) if shapes else None,
        buckets=_chosen_buckets(edges) if edges else None,
        more=tuple(getattr(arguments, "configs", ())),
        radius=getattr(arguments, "radius", -1),
        spread=getattr(arguments, "spread", 0),
    )


def _chosen_variants(names: Sequence[str]) -> Callable[[OpSpec], Iterable[str]]:
    def choose(spec: OpSpec) -> list[str]:
        has = [variant.name for variant in spec.variants()]
        return [name for name in names if name in has] or [spec.typical_variant().name]

    return choose


def _chosen_shapes(shapes: Sequence[dict[str, int]]) -> Callable[[OpSpec], Iterable[dict[str, int]]]:
    def choose(spec: OpSpec) -> list[dict[str, int]]:
        chosen = [shape for shape in shapes if shape in spec.shapes]
        if not chosen:
            raise HdispatchError(f"--shapes has none of {spec.name}, which has {list(spec.shapes)}")
        return chosen

    return choose


def _chosen_buckets(edges: Sequence[str]) -> Callable[[OpSpec], Iterable[int]]:
    def choose(spec: OpSpec) -> list[int]:
        known = [str(edge) for edge in spec.ladder]
        if unknown := [edge for edge in edges if edge not in known]:
            raise HdispatchError(f"--buckets: {unknown[0]!r} is no upper edge of {spec.name}, which has {list(spec.ladder)}")
        return [bucket for edge in edges for bucket in spec.ladders.of_m(known.index(edge))]

    return choose


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
    parts.append(
        f"{report.out}: {size(report.bytes)} for {report.target.name}{beside}, {duration(report.seconds * 1e9)}\n"
        f"next, on the GPU: hdispatch tune measure {report.out} --out timings.jsonl"
    )
    return "\n\n".join(parts)


def _words_of_dropped(dropped: Dropped) -> str:
    why = dropped["why"].splitlines()[0]
    return f"{dropped['op']} {dropped['variant']}, {dropped['backend']} {dropped['config']}: {why[:300]}"


def _candidates_json(report: CandidateReport) -> dict[str, Any]:
    return {
        "out": str(report.out),
        "target": report.target.name,
        "bytes": report.bytes,
        "seconds": round(report.seconds, 3),
        "ops": {op: {**vars(o), "seconds": round(o.seconds, 3)} for op, o in report.ops.items()},
        "notes": report.notes,
    }


# ---- measure ----


def run_measure(arguments: argparse.Namespace) -> int:
    """Measure and say what was wrong."""
    from ..bench.machine import describe
    from ..tune import measure

    machine = describe()
    versions = {name: machine[name] for name in ("driver", "python", "torch", "cuda", "hdispatch", "revision")}
    options = measure.Options(split(arguments.ops), arguments.limit, arguments.seconds, arguments.seed, arguments.timeout)
    with timed_progress() as progress:
        report = measure.measure(
            arguments.bundle, arguments.out, options, versions=versions, kernels=kernels.given(arguments), progress=progress
        )
    for failure in report.failures:
        print(f"not timed: {failure}")
    print(
        f"{arguments.out}: {count(report.measured, 'cell')} measured in {report.seconds:.1f} s, "
        f"{report.before} were there, {report.left} left"
    )
    if report.left:
        print("the same command again goes on")
    return 0


# ---- select ----


def run_select(arguments: argparse.Namespace) -> int:
    """Select, write, print the report."""
    with build_wing():
        from ..compile import op_package
        from ..tune import select, timings
    from ..bench import plot

    if arguments.plot:
        plot.require()
    packages, chosen = op_package.find(None, kernels.given(arguments)), split(arguments.ops)
    if unknown := next((op for op in chosen or () if op not in packages), None):
        raise HdispatchError(f"--ops: no op {unknown!r}; there are {sorted(packages)}")
    refused = select.refusal(packages)
    lines = timings.read_all(arguments.timings, lambda line: refused(line) if chosen is None or line["op"] in chosen else None)
    if chosen is not None:
        lines = [line for line in lines if line["op"] in chosen]
    reports = select.select(lines, packages, arguments.out, limit=arguments.regret, write=not arguments.dry_run)
    if arguments.plot:
        draw_curves(reports, arguments.regret, arguments.plot)
    if arguments.json:
        print_json([{**vars(report), "path": str(report.path)} for report in reports])
    else:
        print(describe_selection(reports, arguments.dry_run))
    return 0


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


# ---- helion ----


def run_helion(arguments: argparse.Namespace) -> int:
    """Tune with Helion and say what failed."""
    with build_wing():
        from ..tune.autotune import autotune
    with timed_progress() as progress:
        failed = autotune(
            kernels.chosen_ops(arguments),
            arguments.out,
            scope=_scope(arguments),
            extra=kernels.given(arguments),
            effort=arguments.effort,
            seconds=arguments.seconds,
            progress=progress,
        )
    for failure in failed:
        print(f"failed: {failure}")
    print(f"next: hdispatch tune candidates --configs {arguments.out} --out DIR")
    return 0


# ---- shared ----


@contextmanager
def timed_progress() -> Iterator[Callable[[int, int, str], None]]:
    """A progress callback that shows the time left: a bar of rich's on a terminal that has it, else one of ours."""
    try:
        from rich import progress as rich
    except ImportError:
        rich = None  # type: ignore[assignment]
    if rich is None or not sys.stderr.isatty():
        plain = Progress()
        start = time.monotonic()
        try:
            yield lambda done, total, label: plain(done, total, f"{label}{time_left(time.monotonic() - start, done, total)}")
        finally:
            plain.finish()
        return
    from rich.console import Console

    columns = (
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
        rich.TextColumn("left"),
        rich.TimeRemainingColumn(),
        rich.TextColumn("{task.description}"),
    )
    with rich.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, label: bar.update(task, completed=done, total=total, description=label)


def time_left(elapsed: float, done: int, total: int) -> str:
    """`, 2 min 5 s left` at the pace so far; nothing before the first step is done."""
    if not done:
        return ""
    minutes, seconds = divmod(round(elapsed / done * (total - done)), 60)
    return f", {f'{minutes} min ' if minutes else ''}{seconds} s left"

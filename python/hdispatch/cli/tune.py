"""`hdispatch tune`: candidates compiled anywhere, measured on the GPU, selected offline."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import archive
from ..errors import HdispatchError
from . import kernels, models, numbers
from .build import build_wing
from .text import count, print_json, split, timed_progress
from .tune_options import add_farm, add_ray, add_scope, farm_of, ops_of, ray_wing, scope_of
from .tune_reports import (
    candidates_json,
    describe_candidates,
    describe_measuring,
    describe_plan,
    describe_selection,
    describe_shares,
    draw_curves,
)

if TYPE_CHECKING:
    from ..tune.collect import CandidateReport
    from ..tune.measure import Options, Report

DESCRIPTION = """\
Choose the configs of ops, for a model on the GPUs that are here in one command:

  hdispatch tune all --models Qwen3-8B

or in its three steps, of which only the second needs the GPU:

  hdispatch tune candidates --out cand --archive cand.tar.xz    what to measure, compiled; on any machine
  hdispatch tune measure cand --out timings.jsonl               every candidate at every size, on the GPU; can be resumed
  hdispatch tune select timings.jsonl                           few configs that are nearly the best -> configs/

and another source of candidates, which takes GPU hours:

  hdispatch tune helion --out found                             Helion's own autotuner; then candidates --configs found
"""

CANDIDATES = """\
Collect configs for every op, size and bucket: the kernels' own lists, Helion's default and its neighbours along Helion's
fragments, the present config files, further folders of config files. Backends that no config file of an op ever chose are left
out, which is told, and of attention, at sizes that have configs, the codes that were never chosen: --backends asks for some,
--whole for all, and for what neighbouring buckets have. Each is compiled once for all sizes that can share it; what does not
compile is left out and reported; of configs with the same code one is kept. No GPU is needed; what was compiled before comes
from the build cache.
"""

MEASURE = """\
Measure the candidates of DIR through the C++ launcher: against the reference first (what is wrong is never timed), then
against each other, in random order in every round, losers dropped early: in replayed CUDA graphs on buffers that rotate past
L2; those not far behind there also launched one by one, and on the same buffers where L2 would still hold them.
One line of JSON per candidate and size is appended to FILE; a run that was stopped or killed goes on where it was.
Another process measures: a candidate that breaks it, or takes longer than --timeout for a step, is noted in FILE as fatal or
timeout and left out from then on, and a new process continues with the others. With --gpus or --ray several GPUs measure, each
cell on one of them; what a lost one was at is measured again, and cards unlike those of FILE, or of most, are left out.
"""

ALL = """\
Candidates, measure, select, one after the other: the configs of all ops, or of what the models call, for the GPU that is here
(or, with --target, those of the farm). The same command again goes on where it was stopped; what was measured of other kernels
and configs than the present ones is not chosen from. The command that is printed at the end makes the bundle.
"""

SELECT = """\
Choose, from timings, few configs per op that stay within the allowed regret (how much slower than the best measured config) at
every size and bucket, and write configs/<op>/<gpu>.json in vLLM's format, with the times and versions
beside it in <gpu>.tuned.json. Entries for sizes without timings are kept, and so is a config that is not slower than the
chosen one by more than the noise of their times: a second run chooses the same.
"""

COMPARE = """\
Say, from timings, what one backend reaches of the best other one: for each op and M the best other backend's time over the best
time of this one, 1 being as fast, as a geometric mean over sizes. A Markdown table. With --tuned, where the timings have no
other backend, its time is that in <gpu>.tuned.json beside the op's configs: of another run, and maybe of older kernels.
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
    _add_all(steps.add_parser("all", help="all three, for a model in one command", description=ALL))
    _add_candidates(steps.add_parser("candidates", help="collect and compile configs", description=CANDIDATES))
    _add_measure(steps.add_parser("measure", help="time candidates on the GPU", description=MEASURE))
    _add_select(steps.add_parser("select", help="timings to config files", description=SELECT))
    _add_compare(steps.add_parser("compare", help="one backend against the best other", description=COMPARE))
    _add_helion(steps.add_parser("helion", help="Helion's autotuner, a source of candidates", description=HELION))


def _add_all(parser: argparse.ArgumentParser) -> None:
    add_scope(parser)
    models.add_arguments(parser)
    _add_compiling(parser, target="native")
    add_farm(parser, "compile on the CPUs and measure on the GPUs")
    parser.add_argument(
        "--work",
        metavar="DIR",
        type=Path,
        default=Path("hdispatch-tune"),
        help="folder for candidates and timings (default: hdispatch-tune)",
    )
    parser.add_argument("--regret", metavar="X", type=numbers.real, default=0.02, help="allowed regret (default: 0.02, 2 %%)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder for <op>/<gpu>.json (default: the ops' own)")
    parser.set_defaults(run=run_all)


def _add_candidates(parser: argparse.ArgumentParser) -> None:
    add_scope(parser)
    models.add_arguments(parser)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder of the candidate bundle")
    parser.add_argument("--archive", metavar="FILE", type=Path, help="pack it into a .tar.xz too")
    _add_compiling(parser, target="h200")
    add_ray(parser, "compile on the CPUs")
    parser.add_argument("--json", action="store_true", help="print the report as JSON on stdout")
    parser.set_defaults(run=run_candidates)


def _add_compiling(parser: argparse.ArgumentParser, target: str) -> None:
    parser.add_argument("--target", metavar="GPU", default=target, help=f"h100, h200, b200, a100, native (default: {target})")
    parser.add_argument(
        "--backends",
        metavar="A,B",
        help="backends whose candidate lists are measured (default: of an op those that a config file of it ever chose, of any "
        "card, or all if it has none); existing configs of all backends are measured too",
    )
    parser.add_argument(
        "--whole",
        action="store_true",
        help="measure the lists of all backends whole, of attention also those of buckets beside: hours, seldom for a gain",
    )
    parser.add_argument("--configs", metavar="DIR", type=Path, action="append", default=[], help="more: <op>/*.json in DIR")
    parser.add_argument(
        "--radius", metavar="N", type=numbers.whole, default=1, help="steps along Helion's fragments; -1: none of it"
    )
    parser.add_argument(
        "--spread",
        metavar="N",
        type=numbers.whole,
        help="try configs N buckets to either side (default: 1; of attention, which has two ladders, 0)",
    )
    parser.add_argument("--jobs", metavar="N", type=numbers.whole, help="worker processes (default: one per CPU)")
    parser.add_argument("--cache", metavar="DIR", type=Path, help="build cache (default: as for build)")


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
    add_farm(parser)
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


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("timings", metavar="FILE", type=Path, nargs="+", help="timings; of two lines the later file's counts")
    kernels.add_argument(parser)
    parser.add_argument("--backend", metavar="A", default="helion", help="the backend that is compared (default: helion)")
    parser.add_argument("--tuned", action="store_true", help="others from the files that `tune select` wrote, too")
    parser.add_argument("--json", action="store_true", help="print the shares as JSON on stdout")
    parser.set_defaults(run=run_compare)


def _add_helion(parser: argparse.ArgumentParser) -> None:
    add_scope(parser)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder for <op>/<gpu>.json")
    parser.add_argument("--effort", choices=("quick", "full"), default="quick", help="of Helion's search (default: quick)")
    parser.add_argument("--seconds", metavar="N", type=numbers.real, help="begin no further point after N seconds")
    parser.set_defaults(run=run_helion)


# ---- candidates ----


def run_candidates(arguments: argparse.Namespace) -> int:
    """Collect, compile, print the report."""
    if arguments.archive:
        archive.check_file(arguments.archive)
    report = _collect(arguments, arguments.out)
    if arguments.archive:
        archive.pack(arguments.out, arguments.archive, top=arguments.out.resolve().name)
    if arguments.json:
        print_json(candidates_json(report))
    else:
        print(describe_candidates(report, arguments.archive))
        print(f"next, on the GPU: hdispatch tune measure {arguments.out} --out timings.jsonl")
    return 0


def _collect(arguments: argparse.Namespace, out: Path) -> CandidateReport:
    with build_wing():
        from ..tune.collect import collect
    if missing := next((folder for folder in arguments.configs if not folder.is_dir()), None):
        raise HdispatchError(f"--configs {missing} is not a folder")
    compilers = None
    if arguments.ray is not None:
        with ray_wing():
            from ..tune.compile_ray import RayCompilers
        compilers = RayCompilers(arguments.ray or None)
    ops, notes = ops_of(arguments)
    with contextlib.ExitStack() as stack:
        if compilers is not None:
            stack.callback(compilers.close)
        report = collect(
            ops,
            arguments.target,
            out,
            scope=scope_of(arguments),
            jobs=arguments.jobs,
            cache=arguments.cache,
            extra=kernels.given(arguments),
            compilers=compilers,
            progress=stack.enter_context(timed_progress()),
            planned=lambda plan: print(describe_plan(plan), file=sys.stderr),
        )
    report.notes += notes
    return report


# ---- measure ----


def run_measure(arguments: argparse.Namespace) -> int:
    """Measure and say what was wrong."""
    from ..tune import measure

    options = measure.Options(split(arguments.ops), arguments.limit, arguments.seconds, arguments.seed, arguments.timeout)
    print(describe_measuring(_measured(arguments, arguments.bundle, arguments.out, options), arguments.out))
    return 0


def _measured(arguments: argparse.Namespace, bundle: Path, out: Path, options: Options) -> Report:
    from ..bench.machine import measured_with
    from ..tune.measure import measure

    with timed_progress() as progress:
        return measure(
            bundle,
            out,
            options,
            farm=farm_of(arguments),
            versions=measured_with,
            kernels=kernels.given(arguments),
            progress=progress,
            say=lambda line: print(line, file=sys.stderr),
        )


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


# ---- all ----


def run_all(arguments: argparse.Namespace) -> int:
    """The three steps; each tells what it did."""
    with build_wing():
        from ..compile import op_package
        from ..tune import select, timings
    from ..tune.candidates import of_present, read_candidates
    from ..tune.measure import Options

    candidates, out = arguments.work / "candidates", arguments.work / "timings.jsonl"
    _say_step(1, "candidates are collected and compiled")
    print(describe_candidates(_collect(arguments, candidates), None))
    _say_step(2, "they are measured")
    report = _measured(arguments, candidates, out, Options(split(arguments.ops)))
    print(describe_measuring(report, out))
    _say_step(3, "configs are selected")
    packages = op_package.find(None, kernels.given(arguments))
    every = timings.read(out)
    lines = of_present(read_candidates(candidates), every)
    if len(lines) < len(every):
        others = count(len(every) - len(lines), "line")
        print(f"{out}: {others} left out: of other sizes, or of configs or kernels that are none of the present candidates")
    print(describe_selection(select.select(lines, packages, arguments.out, limit=arguments.regret), dry_run=False))
    print(f"next: {_build_command(arguments)}")
    return 0


def _build_command(arguments: argparse.Namespace) -> str:
    """The command that builds a bundle with what was chosen."""
    words = ["hdispatch", "build"]
    if arguments.models:
        words += ["--models", arguments.models]
    if arguments.tensor_parallel != 1:
        words += ["--tensor-parallel", str(arguments.tensor_parallel)]
    for each in arguments.kernels:
        words += ["--kernels", each]
    if arguments.variants:  # a variant that is not served otherwise gets rows where it is named, of ops that have it
        words += ["--variants", arguments.variants]
    if arguments.ops and (arguments.kernels or arguments.variants):  # else all ops are built, of which those of --ops are some
        words += ["--ops", arguments.ops]
    if arguments.target != "native":
        words += ["--target", arguments.target]
    if arguments.out:
        words += ["--configs", str(arguments.out)]
    if arguments.cache:
        words += ["--cache", str(arguments.cache)]
    return shlex.join([*words, "--out", "bundle"])


def _say_step(number: int, what: str) -> None:
    print(f"step {number} of 3: {what}", file=sys.stderr)


# ---- helion ----


def run_compare(arguments: argparse.Namespace) -> int:
    """Compare, print the table."""
    with build_wing():
        from ..compile import op_package
        from ..tune import compare, select, timings
    packages = op_package.find(None, kernels.given(arguments))
    lines = timings.read_all(arguments.timings, select.refusal(packages))
    shares = compare.compare(lines, packages, arguments.backend, arguments.tuned)
    if arguments.json:
        print_json([vars(share) for share in shares])
    else:
        print(describe_shares(shares))
    return 0


def run_helion(arguments: argparse.Namespace) -> int:
    """Tune with Helion and say what failed."""
    with build_wing():
        from ..tune.autotune import autotune
    with timed_progress() as progress:
        failed = autotune(
            kernels.chosen_ops(arguments),
            arguments.out,
            scope=scope_of(arguments),
            extra=kernels.given(arguments),
            effort=arguments.effort,
            seconds=arguments.seconds,
            progress=progress,
        )
    for failure in failed:
        print(f"failed: {failure}")
    print(f"next: hdispatch tune candidates --configs {arguments.out} --out DIR")
    return 0

"""`hdispatch build`: kernels and configs become a bundle."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import archive, embedded
from ..errors import HdispatchError
from ..opspec import KEY_SYMBOLS, OpSpec
from . import kernels, models, numbers
from .text import Progress, count, print_json, size, split

if TYPE_CHECKING:
    from ..compile import BuildReport
    from ..models import Calls

#: In --shapes: the rows that serve every size.
ANY = "any"

DESCRIPTION = """\
Generate, compile and freeze the kernels of ops into a bundle: a folder with a manifest and compiled kernels.

No GPU is needed: targets are described. What has been compiled before comes from the cache, whose entries are named by
everything that went into them, so a second build takes seconds. An existing bundle at DIR is replaced in one step once the
new one is whole; any other folder that is not empty is refused, before anything is compiled. The report ends with the digest
of the bundle's manifest, which `hdispatch.load(DIR, sha256=…)` takes.

  hdispatch build --out bundle                                        all ops, for the GPU here, else for an H200
  hdispatch build --ops rms_norm_dynamic_per_token_quant --target h100 --out b
  hdispatch build --kernels my_kernels --out b                        ops outside of hdispatch: a folder, or a package
  hdispatch build --record kernels.jsonl --target h100 --out b        the Triton kernels that `hdispatch record` saw
  hdispatch build --record kernels.jsonl --onto b --out both          the same, with all rows of a bundle that is there
  hdispatch build --configs tuned --out b                             configs that `hdispatch tune all --out tuned` wrote
  hdispatch build --shapes K=4096,N=12288 --variants bfloat16 --out b part of the shapes and variants
"""


def add_parser(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser(
        "build",
        help="compile kernels and configs into a bundle; no GPU needed",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder of the bundle")
    parser.add_argument(
        "--archive", metavar="FILE.tar.xz", type=Path, help="write it as one file too, which loads as the folder does"
    )
    parser.add_argument("--ops", metavar="A,B", help="ops to build (default: all; with --kernels those of it)")
    kernels.add_argument(parser)
    parser.add_argument(
        "--target",
        metavar="GPU",
        default="auto",
        help="h100, h200, b200, a100: a described GPU; native: the one here; auto: the one here, else h200 (default)",
    )
    parser.add_argument("--jobs", metavar="N", type=numbers.whole, help="worker processes (default: one per CPU)")
    parser.add_argument(
        "--cache", metavar="DIR", type=Path, help="build cache (default: $HDISPATCH_CACHE, else ~/.cache/hdispatch)"
    )
    parser.add_argument(
        "--shapes",
        metavar="K=4096,…",
        help="only these sizes, each for the ops that have it (K=…:N=… for both; any: rows of every size; default: all)",
    )
    models.add_arguments(parser, "rows for the sizes that these models call the ops with, too")
    parser.add_argument(
        "--record",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="the Triton kernels of a recording (hdispatch record), and no ops but those of --ops; may be given again",
    )
    parser.add_argument(
        "--onto",
        metavar="BUNDLE",
        type=Path,
        nargs="?",
        const=Path(),
        help="with --record: the bundle whose rows are taken as they are, for its GPU (default: $HDISPATCH_BUNDLE, else the "
        "installation's own)",
    )
    parser.add_argument(
        "--configs", metavar="DIR", type=Path, help="take <op>/<gpu>.json in DIR, where there is one, before the ops' own"
    )
    parser.add_argument("--variants", metavar="V,W", help="only these variants, e.g. bfloat16,bfloat16+residual (default: all)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON on stdout")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Build and print the report."""
    if arguments.jobs is not None and arguments.jobs < 1:
        raise HdispatchError(f"--jobs is {arguments.jobs}; it takes 1 or more")
    if arguments.archive:
        archive.check_file(arguments.archive)
    with build_wing():
        from ..compile import Selection, build
    if arguments.shapes and arguments.models:
        raise HdispatchError("--shapes and --models both say which sizes get rows; give one of them")
    if arguments.onto is not None:
        return _run_onto(arguments)
    choose_shapes = _choose_shapes(parse_shapes(arguments.shapes)) if arguments.shapes else None
    calls = models.chosen_calls(arguments)
    if calls is not None:
        choose_shapes = _with_models(calls)
    variants = split(arguments.variants)
    select = Selection(shapes=choose_shapes, variants=_choose_variants(variants) if variants else None)
    ops = kernels.chosen_ops(arguments)
    progress = Progress()
    try:
        report = build(
            [] if arguments.record and ops is None else ops,
            default_target() if arguments.target == "auto" else arguments.target,
            arguments.out,
            jobs=arguments.jobs,
            cache=arguments.cache,
            select=select,
            extra=kernels.given(arguments),
            record=arguments.record,
            more_configs=arguments.configs,
            progress=progress,
        )
    finally:
        progress.finish()
    return _finish(arguments, report)


def _run_onto(arguments: argparse.Namespace) -> int:
    """Add recorded kernels to a bundle that is there."""
    if not arguments.record:
        raise HdispatchError("--onto takes the rows of a bundle as they are and adds recorded kernels: give --record FILE")
    chosen = {name: getattr(arguments, name) for name in ("ops", "kernels", "shapes", "models", "configs", "variants")}
    chosen["target"] = None if arguments.target == "auto" else arguments.target
    if given := [f"--{name}" for name, value in chosen.items() if value]:
        raise HdispatchError(f"--onto takes the rows of a bundle as they are, for its GPU; it takes no {', '.join(given)}")
    with build_wing():
        from ..compile import build_onto
    import torch

    here = torch.cuda.current_device() if torch.cuda.is_available() else -1
    base = arguments.onto if arguments.onto.parts else embedded.choose(here)
    progress = Progress()
    try:
        report = build_onto(
            base, arguments.record, arguments.out, jobs=arguments.jobs, cache=arguments.cache, progress=progress
        )
    finally:
        progress.finish()
    return _finish(arguments, report)


def _finish(arguments: argparse.Namespace, report: BuildReport) -> int:
    if arguments.archive:
        archive.pack(arguments.out, arguments.archive)
    if arguments.json:
        print_json(to_json(report))
    else:
        print(describe(report))
    return 0


@contextmanager
def build_wing() -> Iterator[None]:
    """For imports of the build wing, which the command line makes late: an `ImportError` inside says how to install it."""
    try:
        yield
    except ImportError as error:
        raise HdispatchError(
            f"the build wing cannot be imported: {error}; install it: pip install 'hdispatch[build]'"
        ) from error


def default_target() -> str:
    """The GPU that is here, else an H200."""
    import torch

    return "native" if torch.cuda.is_available() else "h200"


def parse_shapes(text: str) -> list[dict[str, int]]:
    """`K=4096,K=2048:N=512,any` -> [{"K": 4096}, {"K": 2048, "N": 512}, {}]."""
    found = []
    for item in split(text) or []:
        shape: dict[str, int] = {}
        for part in item.split(":") if item != ANY else ():
            symbol, _, number = part.partition("=")
            if symbol not in KEY_SYMBOLS[1:] or symbol in shape:
                raise HdispatchError(f"--shapes: {item!r} is no shape; it takes K=4096, N=12288, K=4096:N=6144 or {ANY}")
            try:
                shape[symbol] = numbers.size(number)
            except argparse.ArgumentTypeError as error:
                raise HdispatchError(f"--shapes: {item!r} is no shape: {error}") from error
        found.append(shape)
    if not found:
        raise HdispatchError("--shapes is empty; it takes K=4096,N=12288,…")
    return found


def _choose_shapes(shapes: list[dict[str, int]]) -> Callable[[OpSpec], Iterable[dict[str, int]]]:
    def choose(spec: OpSpec) -> list[dict[str, int]]:
        symbols = {frozenset(shape) for shape in spec.shapes}
        chosen = [shape for shape in shapes if frozenset(shape) in symbols]
        if not chosen:
            listed = sorted(symbols, key=lambda each: (-len(each), sorted(each)))
            wanted = [":".join(f"{symbol}=…" for symbol in sorted(each)) or ANY for each in listed]
            raise HdispatchError(f"--shapes has none for {spec.name}, which takes {' or '.join(wanted)}")
        return chosen

    return choose


def _with_models(calls: Callable[[OpSpec], Calls]) -> Callable[[OpSpec], Iterable[dict[str, int]]]:
    """An op's own shapes, and the sizes that models call it with."""

    def choose(spec: OpSpec) -> list[dict[str, int]]:
        called = [sizes for _, sizes in calls(spec).rows]
        # The rows that serve any size come last.
        own = [shape for shape in spec.shapes if shape]
        return [*own, *(sizes for sizes in called if sizes and sizes not in own), *(s for s in spec.shapes if not s)]

    return choose


def _choose_variants(names: list[str]) -> Callable[[OpSpec], Iterable[str]]:
    def choose(spec: OpSpec) -> list[str]:
        has = [variant.name for variant in spec.variants()]
        chosen = [name for name in names if name in has]
        if not chosen:
            raise HdispatchError(f"--variants has none of {spec.name}, which has {', '.join(has)}")
        return chosen

    return choose


def to_json(report: BuildReport) -> dict[str, Any]:
    """The report as plain data."""
    return {
        "out": str(report.out),
        "target": report.target.name,
        "rows": report.rows,
        "records": report.records,
        "cubins": report.cubins,
        "recorded": report.recorded,
        "bytes": report.bytes,
        "sha256": report.sha256,
        "seconds": round(report.seconds, 3),
        "seconds_per_row": round(report.seconds / max(report.rows, 1), 4),
        "from_cache": report.cache_hits,
        "record_seconds": [{"record": name, "seconds": round(seconds, 3)} for name, seconds in report.record_seconds],
        "notes": report.notes,
    }


def describe(report: BuildReport) -> str:
    """The report as text."""
    made = f"{count(report.records, 'record')} ({report.cache_hits} from the cache), {count(report.cubins, 'cubin')}"
    recorded = f", {count(report.recorded, 'recorded kernel')}" if report.recorded else ""
    lines = [
        f"{report.out}: {count(report.rows, 'row')}{recorded} for {report.target.name} ({report.target.arch})",
        f"  {made}, {size(report.bytes)}",
        f"  {report.seconds:.1f} s" + (f", {report.seconds / report.rows:.3f} s per row" if report.rows else ""),
        f"  sha256 {report.sha256}",
        *(f"  note: {note}" for note in report.notes),
        f"next: hdispatch inspect {report.out}",
    ]
    return "\n".join(lines)

"""The command line of `bench pdl`, and its report."""

from __future__ import annotations

import argparse
from pathlib import Path

from hdispatch.cli import numbers
from hdispatch.cli.doctor import BUNDLE_VARIABLE, default_bundle
from hdispatch.cli.text import Progress, table
from hdispatch.errors import HdispatchError

from ..verdict import missed, not_run, ratio, require_folder, run_lines, verdict_table, write_json
from . import run

DESCRIPTION = """\
Measure chains of 8 small calls, hidden size 4096, each of which reads what the one before it wrote, with programmatic
dependent launch (PDL) and without: the bundle is loaded twice, once with pdl=False, and every chain is timed both ways in
every round, all in random order: median and quartiles over rounds of µs per pass through a chain. That both ways compute
the same bits is checked first.

  hdispatch bench pdl --bundle bundle --json pdl.json
  hdispatch bench pdl --quick --chains cubin        a first look; needs no CuteDSL rows
"""

EPILOG = """\
chains:
  mixed      cubin rows and CuteDSL rows in turn: norm, product, gate, product, norm to fp8, product, quantization, product
  cubin      cubin rows only: norms of rows and heads, rotations
  cutedsl    CuteDSL rows only: products 4096 -> 128 -> 4096
A chain of which the bundle has no rows, or rows of the other kind, is named with its reason.

modes:
  graph      replayed from a CUDA graph of 32 passes, 4 replays between two CUDA events
  queued     25 passes called from Python behind a kernel that waits until all are enqueued: the GPU's time alone
  eager      the same without the wait, from the first call to the end of the last kernel: the host's time or the GPU's

Buffers and weights, at most 1 MiB each, are the same in every pass: L2 has them.
The target stands for graph and queued: 1.15 times as fast with PDL.

exit code: with --check, 1 if a target is missed or a chain did not run.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument("--bundle", metavar="DIR", type=Path, help=f"bundle to measure (default: ${BUNDLE_VARIABLE})")
    parser.add_argument("--chains", metavar="A,B", type=numbers.words, help="mixed, cubin, cutedsl (default: all)")
    parser.add_argument("--ms", metavar="M,M", type=numbers.sizes, default=(1, 16), help="rows of a call (default: 1,16)")
    parser.add_argument("--rounds", metavar="N", type=numbers.whole, default=30, help="rounds (default: 30)")
    parser.add_argument("--quick", action="store_true", help="5 rounds")
    parser.add_argument("--seed", metavar="N", type=numbers.whole, default=0, help="seed of the order (default: 0)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the result as JSON")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed or a chain did not run")


def main(arguments: argparse.Namespace) -> int:
    """Measure, print, write."""
    require_folder(arguments.json)
    bundle = default_bundle(arguments.bundle)
    if bundle is None:
        raise HdispatchError(f"bench pdl needs a bundle: --bundle DIR or ${BUNDLE_VARIABLE}; hdispatch build makes one")
    options = run.Options(
        bundle=bundle,
        chains=arguments.chains or run.Options.chains,
        ms=arguments.ms,
        rounds=5 if arguments.quick else arguments.rounds,
        seed=arguments.seed,
    )
    progress = Progress()
    try:
        result = run.run(options, progress)
    finally:
        progress.finish()
    if arguments.json:
        write_json(result, arguments.json)
    print(describe(result))
    return int(arguments.check and (bool(result["skipped"]) or missed(run.judge(result["timings"]))))


def describe(result: run.Result) -> str:
    """The machine, the chains, their times, verdicts, what did not run."""
    parts = ["\n".join(run_lines(result["machine"])), *map(_describe_chain, result["chains"].items())]
    if pairs := run.pairs(result["timings"]):
        lines = [
            [*map(str, cell), _figure(on), _figure(off), ratio(off["median_us"] / on["median_us"])]
            for cell, (on, off) in pairs.items()
        ]
        header = ("chain", "M", "mode", "with PDL, µs per pass", "without", "speedup")
        parts += [table(header, lines, left=3) + "\n(in brackets: quartiles)", verdict_table(run.judge(result["timings"]))]
    parts.append(not_run([f"{what}: {reason}" for what, reason in result["skipped"].items()]))
    return "\n\n".join(part for part in parts if part)


def _describe_chain(chain: tuple[str, list[run.Served]]) -> str:
    label, steps = chain
    calls = [f"{step['op']} [{_sizes(step)}] {step['backend']}" for step in steps]
    return "\n".join([label, *(f"  {number}  {call}" for number, call in enumerate(calls, 1))])


def _sizes(step: run.Served) -> str:
    return ", ".join(f"{symbol}={value}" for symbol, value in (("K", step["K"]), ("N", step["N"])) if value)


def _figure(timing: run.Timing) -> str:
    return f"{timing['median_us']:.2f} ({timing['q1_us']:.2f}–{timing['q3_us']:.2f})"

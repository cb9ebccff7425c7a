"""`hdispatch bench pdl`: GPU time of chains of dependent small kernels, with programmatic dependent launch and without."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..errors import HdispatchError
from . import numbers
from .bench_ops import ms, words
from .doctor import BUNDLE_VARIABLE, default_bundle
from .text import Progress, table

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


def add_pdl_parser(kinds: Any) -> None:
    """Declare `bench pdl`."""
    parser = kinds.add_parser(
        "pdl",
        help="GPU time of chains of small kernels, with PDL and without",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bundle", metavar="DIR", type=Path, help=f"bundle to measure (default: ${BUNDLE_VARIABLE})")
    parser.add_argument("--chains", metavar="A,B", type=words, help="mixed, cubin, cutedsl (default: all)")
    parser.add_argument("--ms", metavar="M,M", type=ms, default=(1, 16), help="rows of a call (default: 1,16)")
    parser.add_argument("--rounds", metavar="N", type=numbers.whole, default=30, help="rounds (default: 30)")
    parser.add_argument("--quick", action="store_true", help="5 rounds")
    parser.add_argument("--seed", metavar="N", type=numbers.whole, default=0, help="seed of the order (default: 0)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the result as JSON")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed or a chain did not run")
    parser.set_defaults(run=run_pdl)


def run_pdl(arguments: argparse.Namespace) -> int:
    """Measure, print, write."""
    from ..bench import pdl

    if arguments.json and not arguments.json.resolve().parent.is_dir():
        raise HdispatchError(f"cannot write {arguments.json}: {arguments.json.parent} is not a folder")
    bundle = default_bundle(arguments.bundle)
    if bundle is None:
        raise HdispatchError(f"bench pdl needs a bundle: --bundle DIR or ${BUNDLE_VARIABLE}; hdispatch build makes one")
    options = pdl.Options(
        bundle=bundle,
        chains=arguments.chains or pdl.Options.chains,
        ms=arguments.ms,
        rounds=5 if arguments.quick else arguments.rounds,
        seed=arguments.seed,
    )
    progress = Progress()
    try:
        result = pdl.run(options, progress)
    finally:
        progress.finish()
    if arguments.json:
        _write(result, arguments.json)
    print(describe(result))
    missed = any(each.verdict == "miss" for each in pdl.judge(result["timings"]))
    return 1 if arguments.check and (missed or result["skipped"]) else 0


def _write(result: Any, file: Path) -> None:
    try:
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise HdispatchError(f"cannot write {file}: {error.strerror}") from error


# ---- printing ----


def describe(result: Any) -> str:
    """The machine, the chains, their times, what did not run."""
    parts = [_describe_machine(result["machine"]), _describe_chains(result["chains"]), _describe_timings(result["timings"])]
    if result["skipped"]:
        parts.append("\n".join(["not run", *(f"  {what}: {reason}" for what, reason in result["skipped"].items())]))
    return "\n\n".join(part for part in parts if part)


def _describe_machine(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "triton", "hdispatch") if machine[name])
    revision = (machine["revision"] or "unknown").partition("+")
    core = f"on core {machine['pinned_to_core']}" if machine["pinned_to_core"] is not None else "not pinned"
    return "\n".join(
        [
            f"{machine['gpu']}, driver {machine['driver']}, {machine['cpu']}, {machine['cores']} cores",
            f"{versions}, revision {revision[0][:12]}{''.join(revision[1:])}, {machine['date']}",
            f"bundle for {machine['bundle']['target']}, {machine['bundle']['rows']} rows; "
            f"{machine['rounds']} rounds, seed {machine['seed']}, {core}",
        ]
    )


def _describe_chains(chains: dict[str, list[Any]]) -> str:
    lines = []
    for label, steps in chains.items():
        calls = [f"{step['op']} [{_sizes(step)}] {step['backend']}" for step in steps]
        lines += [label, *(f"  {number}  {call}" for number, call in enumerate(calls, 1))]
    return "\n".join(lines)


def _sizes(step: Any) -> str:
    return ", ".join(f"{symbol}={step[symbol]}" for symbol in ("K", "N") if step[symbol])


def _describe_timings(timings: list[Any]) -> str:
    from ..bench.pdl import JUDGED, WANTED, judge

    lines = []
    for each in judge(timings):
        wanted = f"≥ {WANTED:.2f} ×" if each.mode in JUDGED else ""
        times = [_figure(each.on), _figure(each.off), f"{each.speedup:.2f} ×", wanted, each.verdict]
        lines.append([each.chain, str(each.m), each.mode, *times])
    if not lines:
        return ""
    header = ("chain", "M", "mode", "with PDL, µs per pass", "without", "speedup", "wanted", "verdict")
    return table(header, lines, left=3) + "\n(in brackets: quartiles)"


def _figure(timing: Any) -> str:
    return f"{timing['median_us']:.2f} ({timing['q1_us']:.2f}–{timing['q3_us']:.2f})"

"""`hdispatch bench`; and `bench dispatch`: what a call costs on the host, beside floors and peers."""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
import tempfile
import textwrap
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import HdispatchError
from . import kernels, numbers
from .bench_serve import add_serve_parser
from .build import build_wing, default_target
from .doctor import default_bundle
from .text import Progress, duration, machine_lines, table

#: Benchmarks that lie in benchmarks/ of the checkout; serving needs none of them.
LABORATORY = {
    "ops": "GPU time per op, beside torch.compile, vLLM's kernels and CUTLASS",
    "pdl": "GPU time of chains of small kernels, with PDL and without",
}

DEFAULT_OP = "rms_norm_dynamic_per_token_quant"

DESCRIPTION = """\
Measure the host time of one call through every path in one run: batches of 200 calls between synchronizations, all paths
in random order in every round, median and quartiles over rounds, one core, no garbage collection. The loop that makes
the calls is in every figure. A path that cannot run here is named with its reason.

  hdispatch bench dispatch --bundle bundle --json result.json --plot result.png
  hdispatch bench dispatch --quick                  a first look; builds a small bundle
  hdispatch bench dispatch --vllm-ops PATH/_C.so    with vLLM's own kernel
"""

PATHS = """\
paths:
  python-call            an empty Python function with as many parameters as the op
  null-driver            hdispatch.ops on CPU tensors: everything but the driver call
  torch.ops.hdispatch-null, torch.ops.hdispatch.default-null    the same through torch
  cuLaunchKernelEx       the bare driver call in a C loop, without launch attributes: the floor
  cuLaunchKernelEx-pdl   the same with the PDL attribute (programmatic dependent launch), which is cheaper
  hdispatch.ops          as shipped; -nopdl: loaded with pdl=False
  torch.ops.hdispatch    as torch op; .default: through torch's argument parser and dispatcher
  host-function          hdispatch.ops of ll_gemm_bf16, which a host function of CuteDSL's launches
  triton                 a Triton kernel with five pointers
  helion                 the Helion kernel and config of the bundle's row, called directly
  helion-torch-op        the same behind a torch op with a key function, as vLLM integrates Helion
  torch.ops._C           vLLM's own kernel of the op (--vllm-ops)
  cuda-graph             replay of a graph of one launch
  chain-…                360 launches, per kernel, from the first launch to the end of the last kernel
  config-pick            sizes to row, 80,000 picks of 8 shapes among 300 keys, from Python
  table-probe            the probe alone among 10,000 rows, in C
  tvm-ffi-function       a TVM-FFI function of three tensors that does nothing, by its pointer in a C loop: a floor
  tvm-ffi-row, -ops      the same function as a row of the table: from C, without a door; through hdispatch.ops
  load-bundle            loading the whole bundle, and scaled to 1,000 rows; -null: without the code

M is fixed, cycles over 2, 3, 7, 16, or is one never seen before in each call (2 to 8192).
× floor: the median over that of cuLaunchKernelEx in the same phase of the same run.
"""


def add_parser(commands: Any) -> None:
    """Declare the subcommand and its own."""
    parser = commands.add_parser("bench", help="measure calls and ops", description="Measure; see bench BENCHMARK --help.")
    kinds = parser.add_subparsers(title="benchmarks", metavar="BENCHMARK", dest="benchmark", required=True)
    add_dispatch_parser(kinds)
    add_serve_parser(kinds)
    for name, text in LABORATORY.items():
        laboratory = kinds.add_parser(name, help=f"{text}; in a checkout", prefix_chars="\0", add_help=False)
        laboratory.add_argument("arguments", nargs="*")  # options too: their prefix is no longer one
        laboratory.set_defaults(run=functools.partial(run_laboratory, name))


def run_laboratory(name: str, given: argparse.Namespace) -> int:
    """Run a benchmark of the checkout, benchmarks/NAME, which declares its own command line. HdispatchError without one."""
    checkout = Path(__file__).resolve().parents[3]
    if (checkout / "benchmarks" / name / "command.py").is_file():
        sys.path.insert(0, str(checkout))  # processes that it starts need it too
    try:
        command = importlib.import_module(f"benchmarks.{name}.command")
    except ModuleNotFoundError as error:
        if error.name not in ("benchmarks", f"benchmarks.{name}", f"benchmarks.{name}.command"):
            raise
        raise HdispatchError(
            f"bench {name} is in a checkout of hdispatch, not in its wheel: run it in a checkout with `pip install -e .`, "
            "or with the checkout's folder in PYTHONPATH"
        ) from error
    parser = argparse.ArgumentParser(f"hdispatch bench {name}", formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_arguments(parser)
    try:
        arguments = parser.parse_args(given.arguments)
    except SystemExit as stop:  # argparse: 0 after --help, 2 for a wrong command line
        return stop.code if isinstance(stop.code, int) else 2
    code: int = command.main(arguments)
    return code


def add_dispatch_parser(kinds: Any) -> None:
    """Declare `bench dispatch`."""
    parser = kinds.add_parser(
        "dispatch",
        help="host time per call, beside floors and peers",
        description=DESCRIPTION,
        epilog=PATHS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--bundle",
        metavar="DIR",
        type=Path,
        help="bundle to measure (default: $HDISPATCH_BUNDLE, else the installation's, else a small one is built)",
    )
    parser.add_argument("--op", metavar="NAME", default=DEFAULT_OP, help=f"op to call (default: {DEFAULT_OP})")
    kernels.add_argument(parser)
    parser.add_argument("--variant", metavar="V", help="variant to call (default: bfloat16+residual, else the op's first)")
    parser.add_argument("--m", metavar="M", type=numbers.size, default=16, help="the fixed M (default: 16)")
    parser.add_argument(
        "--hidden", metavar="K", type=numbers.size, help="hidden size, K or N of the op (default: 4096, else its first)"
    )
    parser.add_argument("--rounds", metavar="N", type=numbers.whole, default=30, help="rounds (default: 30)")
    parser.add_argument(
        "--seed", metavar="N", type=numbers.whole, default=0, help="seed of the order and of the unseen Ms (default: 0)"
    )
    parser.add_argument("--quick", action="store_true", help="5 rounds")
    parser.add_argument("--device", metavar="D", help="cuda, cuda:1, …, or cpu for what needs no GPU (default: the GPU if any)")
    parser.add_argument("--vllm-ops", metavar="PATH", type=Path, help="vLLM's compiled ops, vllm/_C….so")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the result as JSON")
    parser.add_argument("--plot", metavar="FILE.png", type=Path, help="draw the result (needs matplotlib)")
    parser.set_defaults(run=run_dispatch)


def run_dispatch(arguments: argparse.Namespace) -> int:
    """Measure, print, write."""
    from ..bench import dispatch, plot, results

    _check(arguments)
    kernels.define(arguments)
    if arguments.plot:
        plot.require()
    options = dispatch.DispatchOptions(
        op=arguments.op,
        bundle=default_bundle(arguments.bundle),
        m=arguments.m,
        hidden=arguments.hidden,
        variant=arguments.variant,
        rounds=5 if arguments.quick else arguments.rounds,
        seed=arguments.seed,
        device=arguments.device,
        vllm_ops=arguments.vllm_ops,
    )
    with ExitStack() as stack:
        if options.bundle is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="hdispatch-bench-"))
            options = _build_small(options, kernels.given(arguments), Path(folder))
        progress = Progress()
        stack.callback(progress.finish)
        result = dispatch.run(options, progress)
    print(describe(result))
    if arguments.json:
        results.write_json(result, arguments.json)
    if arguments.plot:
        plot.draw(result, arguments.plot)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuse before anything long what would fail after it."""
    for file in (arguments.json, arguments.plot):
        if file and not file.resolve().parent.is_dir():
            raise HdispatchError(f"cannot write {file}: {file.parent} is not a folder")
    if arguments.vllm_ops and not arguments.vllm_ops.is_file():
        raise HdispatchError(f"--vllm-ops {arguments.vllm_ops} is not a file")


def _build_small(options: Any, extra: list[str], folder: Path) -> Any:
    """Options with a bundle of the variant and shape to measure, or with the reason why there is no bundle."""
    from .. import registry
    from ..bench import dispatch

    spec = registry.spec(options.op)
    shape = dispatch.choose_shape(spec, options.hidden)
    variant = spec.variant(options.variant or dispatch.choose_variant(spec)).name
    target = "h200" if options.device == "cpu" else default_target()
    sizes = ", ".join(f"{symbol}={value}" for symbol, value in shape.items())
    print(f"no --bundle: building one with {options.op}, {variant}, {sizes} for {target}", file=sys.stderr)
    progress = Progress()
    try:
        with build_wing():
            from ..compile import Selection, build
        select = Selection(shapes=lambda _spec: [shape], variants=lambda _spec: [variant])
        build([options.op], target, folder / "bundle", select=select, extra=extra, progress=progress)
    except HdispatchError as error:
        return replace(options, no_bundle=f"no bundle, and none could be built: {error}")
    finally:
        progress.finish()
    return replace(options, bundle=folder / "bundle")


# ---- printing ----


def describe(result: Any) -> str:
    """Machine, rows, targets and skipped paths as text."""
    parts = [
        describe_machine(result["machine"]),
        describe_rows(result["rows"], result["machine"]["op"]),
        describe_targets(result["rows"], result["machine"].get("empty_call_ns", 0)),
    ]
    if result["skipped"]:
        parts.append(describe_skipped(result["skipped"]))
    return "\n\n".join(parts)


def describe_machine(machine: dict[str, Any]) -> str:
    """The header: the conditions under which the figures hold."""
    sizes = ", ".join(f"{symbol}={machine[symbol]}" for symbol in ("K", "N") if symbol in machine)
    core = f"on core {machine['pinned_to_core']}" if machine["pinned_to_core"] is not None else "not pinned"
    return "\n".join(
        [
            f"{machine['op']}, {machine['variant']}, {sizes}, M={machine['m']}",
            *machine_lines(machine),
            f"{machine['rounds']} rounds of {machine['calls']} calls, seed {machine['seed']}, {core}",
        ]
    )


def describe_rows(rows: list[Any], own: str) -> str:
    """The table of measured times; rows of the op `own` do not repeat its name."""
    lines = [
        [
            row["path"],
            row["m"],
            row["op"] if row["op"] != own else "",
            *(duration(row[key]) for key in ("median_ns", "q1_ns", "q3_ns")),
            f"{row['floor_ratio']:.2f}" if row["floor_ratio"] is not None else "",
        ]
        for row in rows
    ]
    return table(("path", "M", "of", "median", "quartile 1", "quartile 3", "× floor"), lines, left=3)


def describe_targets(rows: list[Any], empty_call_ns: float = 0) -> str:
    """The targets beside what was measured; of a busy machine, as an empty call tells, that a miss may be its own."""
    from ..bench import busy
    from ..bench.results import judge

    is_busy = busy.is_busy(empty_call_ns)

    lines = []
    for judged in judge(rows):
        target = judged.target

        def figure(value: float, ratio: bool = target.is_ratio) -> str:
            return f"{value:.2f} ×" if ratio else duration(value)

        measured = "" if judged.measured is None else figure(judged.measured)
        bound = "at least" if target.at_least else "at most"
        lines.append([target.text, measured, f"{bound} {figure(target.limit)}", judged.verdict])
        if is_busy and judged.verdict == "miss":
            lines[-1][-1] = "miss (busy machine)"
    told = [busy.describe(empty_call_ns)] if is_busy else []
    return "\n".join([table(("target", "measured", "wanted", "verdict"), lines), *told])


def describe_skipped(skipped: dict[str, str]) -> str:
    """The paths that did not run, grouped by reason."""
    reasons: dict[str, list[str]] = {}
    for path, reason in skipped.items():
        reasons.setdefault(reason, []).append(path)
    wrap = textwrap.TextWrapper(
        110, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False, break_long_words=False
    )
    return "\n".join(["not run", *(wrap.fill(f"{', '.join(paths)}: {reason}") for reason, paths in reasons.items())])

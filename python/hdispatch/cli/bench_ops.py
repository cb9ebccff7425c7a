"""`hdispatch bench ops`: GPU time per op over the models' shapes, beside torch.compile, vLLM's kernels, CUTLASS, cuBLAS."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ..errors import HdispatchError
from . import numbers
from .doctor import BUNDLE_VARIABLE, default_bundle
from .text import Progress, count, size

DESCRIPTION = """\
Measure the GPU time of every op in a bundle over M = 1 … 8192 and the shapes of three models, beside torch.compile with
the options of the post, vLLM's own kernels (torch.ops._C) and CUTLASS through them; each is a CUDA graph of many launches,
and all of a cell are replayed in random order in every round: median and quartiles. Then the same ops called from Python,
from the first call of a batch to the end of its last kernel. What was reached is held against targets and roofs.
ll_gemm_bf16 and ll_gemm_fp8 are measured up to M = 32, beside torch.mm, vLLM's two low-latency GEMMs and CUTLASS.

  hdispatch bench ops --bundle bundle --vllm-ops PATH/_C.so --json ops.json --plot ops.png
  hdispatch bench ops --quick --no-compile --ops rms_norm,silu_and_mul
  hdispatch bench ops --ops ll_gemm_bf16,ll_gemm_fp8 --ms 1,2,4,8,16,32 --vllm-ll ll.so --vllm-ops PATH/_C.so
  hdispatch bench ops --make-vllm-ll SITE_PACKAGES --vllm-ll ll.so     compile vLLM's two; needs the CuteDSL and no GPU
  hdispatch bench ops --show ops.json               the report of an earlier run; needs no GPU
"""

EPILOG = """\
modes:
  warm       the same buffers in every launch, as in the post: what fits in L2 is found there
  rotated    buffers that together exceed twice L2: every launch reads its inputs from memory
Roofs are always held against rotated buffers: every op at the largest M, GEMMs at the smallest too; ll_gemm_fp8, whose
weights no server finds in L2, is measured on them at every M.

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
    what.add_argument(
        "--models", metavar="A,B", type=words, help="1.7B, 8B, 32B, and other for shapes of none of them (default: all)"
    )
    what.add_argument("--ms", metavar="M,M", type=ms, help="Ms of the grid (default: 1, 2, 4, … 8192)")
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
    peers.add_argument("--vllm-ll", metavar="PATH", type=Path, help="library of vLLM's ll_bf16_gemm and skinny_gemm")
    peers.add_argument(
        "--make-vllm-ll",
        metavar="DIR",
        type=Path,
        help="measure nothing: compile the library --vllm-ll from the vLLM 0.33 in this folder, for an H200 and this CPU",
    )
    peers.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    peers.add_argument(
        "--compile-ms", metavar="M,M", type=ms, help="Ms at which torch.compile takes part (default: those of the grid)"
    )
    peers.add_argument(
        "--compile-seconds", metavar="S", type=numbers.real, default=150.0, help="how long cells are compiled (default: 150)"
    )
    peers.add_argument(
        "--workers", metavar="N", type=numbers.whole, help="processes that compile (default: one per CPU, at most 14)"
    )
    how = parser.add_argument_group("how")
    how.add_argument("--rounds", metavar="N", type=numbers.whole, help="rounds (default: 11)")
    how.add_argument("--seconds", metavar="S", type=numbers.real, help="begin no cell later than this; coarse Ms come first")
    how.add_argument("--quick", action="store_true", help="5 rounds; M = 1, 16, 256, 2048, 8192")
    how.add_argument("--seed", metavar="N", type=numbers.whole, default=0, help="seed of the order (default: 0)")
    out = parser.add_argument_group("result")
    out.add_argument("--json", metavar="FILE", type=Path, help="write the result as JSON")
    out.add_argument("--plot", metavar="FILE.png", type=Path, help="draw µs against M (needs matplotlib)")
    out.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    out.add_argument("--show", metavar="FILE", type=Path, help="measure nothing: report on (and draw) a result of --json")
    parser.set_defaults(run=run_ops)


def words(text: str) -> tuple[str, ...]:
    """`a,b` -> ("a", "b")."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def ms(text: str) -> tuple[int, ...]:
    """`1,16` -> (1, 16); each at least 1."""
    if not (found := tuple(numbers.size(word) for word in words(text))):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of Ms of at least 1")
    return found


QUICK_MS, QUICK_ROUNDS = (1, 16, 256, 2048, 8192), 5


def run_ops(arguments: argparse.Namespace) -> int:
    """Measure, print, write."""
    from ..bench import ops, ops_plot, ops_report, plot
    from .bench_ops_text import describe

    _check(arguments)
    if arguments.make_vllm_ll:
        return _make_vllm_ll(arguments.make_vllm_ll, arguments.vllm_ll)
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


def _make_vllm_ll(vllm: Path, library: Path) -> int:
    from ..bench import vllm_ll_build

    progress = Progress()
    try:
        functions = vllm_ll_build.make(vllm, library, progress)
    finally:
        progress.finish()
    print(f"{library}: {count(functions, 'function')}, {size(library.stat().st_size)}")
    return 0


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
        vllm_ll=arguments.vllm_ll,
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
    if arguments.make_vllm_ll and not arguments.vllm_ll:
        raise HdispatchError("--make-vllm-ll writes the library that --vllm-ll names; name one")
    for file in (arguments.json, arguments.plot, arguments.vllm_ll if arguments.make_vllm_ll else None):
        if file and not file.resolve().parent.is_dir():
            raise HdispatchError(f"cannot write {file}: {file.parent} is not a folder")
    if arguments.vllm_ops and not arguments.vllm_ops.is_file():
        raise HdispatchError(f"--vllm-ops {arguments.vllm_ops} is not a file")
    if arguments.vllm_ll and not (arguments.make_vllm_ll or arguments.vllm_ll.is_file()):
        raise HdispatchError(f"--vllm-ll {arguments.vllm_ll} is not a file; --make-vllm-ll makes one")

"""The command line of `bench ops`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from hdispatch.bench import plot
from hdispatch.cli import numbers
from hdispatch.cli.doctor import BUNDLE_VARIABLE, default_bundle
from hdispatch.cli.text import Progress, count, size
from hdispatch.errors import HdispatchError

from .. import verdict
from . import grid, run, timing, vllm_ll_build
from . import plot as picture
from .report import describe
from .result import Result, read_json
from .verdicts import judge

DESCRIPTION = """\
Measure the GPU time of every op in a bundle over M = 1 … 8192 and the shapes of three models, beside torch.compile
(Inductor's defaults and combo kernels), vLLM's own kernels (torch.ops._C) and CUTLASS through them; each is a CUDA graph of
many launches, and all of a cell are replayed in random order in every round: median and quartiles. Then the same ops called
from Python, from the first call of a batch to the end of its last kernel. The result is compared with the targets in
benchmarks/targets.toml and with roofs.
scaled_mm_blockwise is measured beside DeepGEMM too, with scales of float32 and with powers of two; what it computes is
compared with the float32 reference before it is timed, and its kernels are compiled, by nvcc, before anything is.
scaled_mm is measured beside torch._scaled_mm too, with scales per row, in bfloat16.
ll_gemm_bf16 and ll_gemm_fp8 are measured up to M = 32, beside torch.mm, vLLM's two low-latency GEMMs and CUTLASS;
ll_gemm_bf16_argmax beside torch.mm and torch.argmax.

  hdispatch bench ops --bundle bundle --vllm-ops PATH/_C.so --json ops.json --plot ops.png
  hdispatch bench ops --quick --no-compile --ops rms_norm,silu_and_mul
  hdispatch bench ops --ops ll_gemm_bf16,ll_gemm_fp8 --ms 1,2,4,8,16,32 --vllm-ll ll.so --vllm-ops PATH/_C.so
  hdispatch bench ops --ops scaled_mm_blockwise --vllm-ops PATH/_C.so --deep-gemm PATH/vllm/third_party/deep_gemm
  hdispatch bench ops --make-vllm-ll SITE_PACKAGES --vllm-ll ll.so     compile vLLM's two; needs the CuteDSL and no GPU
  hdispatch bench ops --show ops.json               the report of an earlier run; needs no GPU
"""

EPILOG = """\
modes:
  warm       the same buffers in every launch: what fits in L2 is found there
  rotated    buffers that together exceed twice L2: every launch reads its inputs from memory
Roofs are always compared with rotated buffers: every op at the largest M, GEMMs at the smallest too; ll_gemm_fp8, whose
weights no server finds in L2, is measured on them at every M, and lm_head, whose weights fit no L2, on them alone.

exit code: with --check, 1 if a target is missed.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    what = parser.add_argument_group("what")
    what.add_argument("--bundle", metavar="DIR", type=Path, help=f"bundle to measure (default: ${BUNDLE_VARIABLE})")
    what.add_argument("--ops", metavar="A,B", type=numbers.words, help="ops to measure (default: all of the bundle)")
    what.add_argument(
        "--models", metavar="A,B", type=numbers.words, help="1.7B, 8B, 32B, and other for shapes of none of them (default: all)"
    )
    what.add_argument("--ms", metavar="M,M", type=numbers.sizes, help="Ms of the grid (default: 1, 2, 4, … 8192)")
    what.add_argument(
        "--variants",
        metavar="V,V",
        type=numbers.words,
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
    peers.add_argument(
        "--deep-gemm", metavar="DIR", type=Path, help="the package of DeepGEMM: vllm/third_party/deep_gemm of vLLM's wheel"
    )
    peers.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    peers.add_argument(
        "--compile-ms",
        metavar="M,M",
        type=numbers.sizes,
        help="Ms at which torch.compile takes part (default: those of the grid)",
    )
    peers.add_argument(
        "--compile-seconds",
        metavar="S",
        type=numbers.real,
        default=150.0,
        help="how long each may compile (default: 150)",
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


QUICK_MS, QUICK_ROUNDS = (1, 16, 256, 2048, 8192), 5


def main(arguments: argparse.Namespace) -> int:
    """Measure, print, write."""
    _check(arguments)
    if arguments.make_vllm_ll:
        return _make_vllm_ll(arguments.make_vllm_ll, arguments.vllm_ll)
    if arguments.plot:
        plot.require()
    result = read_json(arguments.show) if arguments.show else _measure(arguments)
    verdicts = judge(result)
    if arguments.json:  # first of all: a measurement is dear
        targets = [{"text": v.text, "wanted": v.wanted, "measured": v.measured, "verdict": v.word} for v in verdicts]
        verdict.write_json({**result, "targets": targets}, arguments.json)
    print(describe(result))
    if arguments.plot:
        picture.draw(result, arguments.plot)
    return int(arguments.check and verdict.missed(verdicts))


def _measure(arguments: argparse.Namespace) -> Result:
    options = options_of(arguments)
    progress = Progress()
    try:
        return run.run(options, progress)
    finally:
        progress.finish()


def _make_vllm_ll(vllm: Path, library: Path) -> int:
    progress = Progress()
    try:
        functions = vllm_ll_build.make(vllm, library, progress)
    finally:
        progress.finish()
    print(f"{library}: {count(functions, 'function')}, {size(library.stat().st_size)}")
    return 0


def options_of(arguments: argparse.Namespace) -> run.Options:
    """The options of a run; HdispatchError without a GPU or a bundle."""
    timing.require_gpu()
    bundle = default_bundle(arguments.bundle)
    if bundle is None:
        raise HdispatchError(f"bench ops needs a bundle: --bundle DIR or ${BUNDLE_VARIABLE}; hdispatch build makes one")
    ms = arguments.ms or (QUICK_MS if arguments.quick else grid.MS)
    compile_ms = () if arguments.no_compile else tuple(m for m in ms if m in (arguments.compile_ms or ms))
    return run.Options(
        bundle=bundle,
        vllm_ops=arguments.vllm_ops,
        vllm_ll=arguments.vllm_ll,
        deep_gemm=arguments.deep_gemm,
        ops=arguments.ops,
        ms=ms,
        models=arguments.models,
        variants=arguments.variants,
        modes=("warm", "rotated") if arguments.mode == "both" else (arguments.mode,),
        compile_ms=compile_ms,
        compile_seconds=arguments.compile_seconds,
        workers=arguments.workers or min(14, len(os.sched_getaffinity(0))),
        eager=not arguments.no_eager,
        rounds=arguments.rounds or (QUICK_ROUNDS if arguments.quick else run.ROUNDS),
        seconds=arguments.seconds,
        seed=arguments.seed,
    )


def _check(arguments: argparse.Namespace) -> None:
    """Refuse before anything long what would fail after it."""
    if arguments.make_vllm_ll and not arguments.vllm_ll:
        raise HdispatchError("--make-vllm-ll writes the library that --vllm-ll names; name one")
    verdict.require_folder(arguments.json, arguments.plot, arguments.vllm_ll if arguments.make_vllm_ll else None)
    if arguments.vllm_ops and not arguments.vllm_ops.is_file():
        raise HdispatchError(f"--vllm-ops {arguments.vllm_ops} is not a file")
    if arguments.vllm_ll and not (arguments.make_vllm_ll or arguments.vllm_ll.is_file()):
        raise HdispatchError(f"--vllm-ll {arguments.vllm_ll} is not a file; --make-vllm-ll makes one")

"""`make demo`: nine ops of one model are compiled, loaded, and one of them is timed through every path.

    python scripts/demo.py [BUNDLE]

The ops are those of a decoder layer of Qwen3-8B in bfloat16 with fp8 activations, without matrix products and attention. A GPU
is used where there is one; else kernels are compiled for an H200, and calls do everything but the launch. `make bundle` builds
every op, size and dtype.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from hdispatch import models
from hdispatch.cli import main as command_line
from hdispatch.cli.build import default_target, describe
from hdispatch.cli.text import Progress
from hdispatch.compile import Selection, build
from hdispatch.opspec import OpSpec, Sizes

OPS = (
    "dynamic_per_token_scaled_fp8_quant",
    "fused_add_rms_norm",
    "fused_qk_norm_rope",
    "rms_norm",
    "rms_norm_dynamic_per_token_quant",
    "rotary_embedding",
    "silu_and_mul",
    "silu_and_mul_dynamic_per_token_quant",
    "static_scaled_fp8_quant",
)
(MODEL,) = models.named("Qwen3-8B")
#: CPU seconds of compiling them: two processes that import the compilers, and 28 records.
COMPILING = 21
#: Seconds of the benchmark with 5 rounds.
TIMING = 5


def variants(spec: OpSpec) -> list[str]:
    """The variant that the model calls, and the norm with a residual."""
    names = {variant.name for variant in spec.served_variants()}
    return list(dict.fromkeys([spec.typical_variant().name, *({"bfloat16+residual"} & names)]))


def shapes(spec: OpSpec) -> list[Sizes]:
    """The sizes that the model calls an op with."""
    return [sizes for _, sizes in models.calls_of(spec, [MODEL]).rows]


def say(line: str, start: float) -> None:
    """A line on stderr with the time since the start."""
    print(f"demo, {time.monotonic() - start:.0f} s: {line}", file=sys.stderr, flush=True)


def main() -> int:
    """Build, examine, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", default=Path("build/demo-bundle"), help="default: build/demo-bundle")
    parser.add_argument("--cache", type=Path, help="build cache (default: $HDISPATCH_CACHE, else ~/.cache/hdispatch)")
    options = parser.parse_args()
    start = time.monotonic()
    left = COMPILING / min(len(os.sched_getaffinity(0)), 4) + TIMING
    say(f"compiling nine ops of Qwen3-8B, then timing calls: about {left:.0f} s in all, less what the cache holds", start)
    options.bundle.parent.mkdir(parents=True, exist_ok=True)
    progress = Progress()
    try:
        report = build(
            list(OPS),
            default_target(),
            options.bundle,
            cache=options.cache,
            select=Selection(shapes=shapes, variants=variants),
            progress=progress,
        )
    finally:
        progress.finish()
    print(describe(report), flush=True)
    say(f"what works here (hdispatch doctor {options.bundle})", start)
    status = command_line.main(["doctor", str(options.bundle)])
    say(f"timing calls (hdispatch bench dispatch --quick): about {TIMING} s remain", start)
    status = status or command_line.main(["bench", "dispatch", "--quick", "--bundle", str(options.bundle)])
    say("done; make bundle builds every op, size and dtype", start)
    return status


if __name__ == "__main__":
    sys.exit(main())

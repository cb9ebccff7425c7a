"""`hdispatch bench serve`: vLLM's engine with and without hdispatch, on a model with random weights."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HdispatchError
from . import numbers
from .doctor import BUNDLE_VARIABLE, default_bundle
from .text import table

if TYPE_CHECKING:
    from ..bench.serve_targets import Judged

DESCRIPTION = """\
Measure vLLM's real engine in process, on random weights of a named model: ms of a decode step by batch, time to the first
token, start-up with empty compile caches, memory, host time by part. Each mode is a process; those of one group live at the
same time, and every round times each of them. Needs vLLM and a GPU, no checkpoint and no network.

  hdispatch bench serve --bundle bundle --json serve.json
  hdispatch bench serve --model qwen3-1.7b --scheme block --modes ours,graph --batches 1,32
  hdispatch bench serve --logits 64 --modes eager,ours      the error against a float32 evaluation of the weights
"""

EPILOG = """\
modes:
  eager           vLLM's own layers, enforce_eager
  override        the same with vLLM's ops served by hdispatch.override_vllm_ops
  ours            the same with HDISPATCH=1: the plug-in's layers; HDISPATCH_ATTENTION is passed on
  graph           vLLM's own layers in full CUDA graphs of decode steps, nothing compiled
  ours+graph      the plug-in's layers in the same graphs
  compiled        vLLM's default: torch.compile, full and piecewise graphs
  ours+compiled   the default configuration with the plug-in's layers
  ours-launches   ours with HDISPATCH_REPLAY=0: every kernel is launched, no step that comes again is replayed
  ours-vllm-runner  ours with HDISPATCH_RUNNER=0: vLLM's own model runner and sampler
  ours-vllm-scheduler  ours with HDISPATCH_SCHEDULER=0: vLLM's own scheduler plans all steps
  ours-fa3        ours with HDISPATCH_ATTENTION=fa3: decode steps take FlashAttention 3, not attention_half
  ours-fa3+graph  the same in the graphs

A mode that cannot run is named with its reason.
exit code: with --check, 1 if a mode did not run, the table missed a call, a ratio of times misses its target (those of
benchmarks/targets.toml, in a checkout; not with --layers), or our logits' error, relative or as KL divergence, is above
1.02 times eager's over all steps or at any one. Ratios have their noise, the standard error over requests.
"""

#: At most this times the error of vLLM's own layers, over all steps and at each.
ACCURATE = 1.02
#: Errors of logits: name in `serve_accuracy.Errors` -> text.
ERRORS = {"relative": "relative error", "kl": "KL divergence"}


def add_serve_parser(kinds: Any) -> None:
    """Declare `bench serve`."""
    from ..bench.serve import USUAL
    from ..bench.serve_model import MODELS, SCHEMES

    parser = kinds.add_parser(
        "serve",
        help="vLLM's engine with and without hdispatch",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--bundle", metavar="DIR", type=Path, help=f"bundle to serve from (default: ${BUNDLE_VARIABLE})")
    add("--model", metavar="NAME", choices=MODELS, default="qwen3-8b", help=f"{', '.join(MODELS)} (default: qwen3-8b)")
    add("--scheme", metavar="NAME", choices=SCHEMES, default="token", help=f"{', '.join(SCHEMES)} (default: token)")
    add(
        "--modes",
        metavar="A,B",
        type=numbers.words,
        default=USUAL,
        help="default: those without a setting in their names, see below",
    )
    add("--batches", metavar="N,N", type=numbers.sizes, default=(1, 8, 32, 128), help="requests (default: 1,8,32,128)")
    add("--rounds", metavar="N", type=numbers.whole, default=3, help="rounds (default: 3)")
    add("--together", metavar="N", type=numbers.whole, default=4, help="engines that live at the same time (default: 4)")
    add("--ranks", metavar="N", type=numbers.whole, default=1, help="tensor parallel (default: 1)")
    add("--kv", metavar="GIB", type=numbers.real, default=3.5, help="KV cache of each engine (default: 3.5)")
    add("--layers", metavar="N", type=numbers.whole, help="fewer layers than the model has")
    add("--profile", metavar="N,N", type=numbers.sizes, default=(), help="batches whose host parts and GPU time are taken")
    add("--logits", metavar="N", type=numbers.whole, default=0, help="compare the logits of N steps with float32 (default: 0)")
    add("--requests", metavar="N", type=numbers.whole, default=32, help="requests of --logits, 32 at once (default: 32)")
    add("--json", metavar="FILE", type=Path, help="write the result as JSON")
    add("--plot", metavar="FILE.png", type=Path, help="draw ms by batch, to the first token, and start-up (needs matplotlib)")
    add("--logs", metavar="DIR", type=Path, help="write what each engine says to DIR/MODE.log")
    add("--limit", metavar="S", type=numbers.real, default=600, help="most seconds for an answer of an engine (default: 600)")
    add("--check", action="store_true", help="exit with 1 if something is not as it should be; see below")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, and judge if asked to."""
    import torch

    from ..bench import machine, plot, serve, serve_plot
    from ..bench.serve_model import MODELS

    unknown = [mode for mode in arguments.modes if mode not in serve.MODES]
    if unknown:
        raise HdispatchError(f"no mode {', '.join(unknown)}; there are {', '.join(serve.MODES)}")
    if arguments.requests < 1:
        raise HdispatchError(f"--requests is {arguments.requests}; it takes 1 or more")
    if arguments.logits and arguments.ranks != 1:
        raise HdispatchError(
            f"--logits {arguments.logits} with --ranks {arguments.ranks}: logits are compared on one rank; leave one out"
        )
    has = MODELS[arguments.model].layers
    if arguments.layers is not None and not 1 <= arguments.layers <= has:
        raise HdispatchError(f"--layers is {arguments.layers}; {arguments.model} has {has}, and it takes 1 or more of them")
    bundle = default_bundle(arguments.bundle)
    if bundle is None:
        raise HdispatchError(f"no bundle is named: give --bundle DIR or set ${BUNDLE_VARIABLE}")
    if importlib.util.find_spec("vllm") is None:
        raise HdispatchError("vLLM is not installed; bench serve measures it")
    if arguments.plot:
        plot.require()
    options = serve.ServeOptions(
        arguments.model,
        arguments.scheme,
        arguments.modes,
        bundle,
        arguments.batches,
        arguments.rounds,
        arguments.together,
        arguments.ranks,
        arguments.kv,
        arguments.layers,
        profiled=arguments.profile,
        steps=arguments.logits,
        requests=arguments.requests,
        logs=arguments.logs,
        limit_s=arguments.limit,
    )
    if arguments.logs:
        arguments.logs.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else None
    began = time.monotonic()

    def tick(label: str, result: Any) -> None:
        """Prints each beginning step to stderr, and writes the results so far to the file in case the run is cut short."""
        print(f"{time.monotonic() - began:5.0f} s  {label}", file=sys.stderr, flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=1))

    result = serve.measure(options, machine.describe(device), tick)
    tick("done", result)
    print(describe(result))
    if arguments.plot:
        serve_plot.draw(result, arguments.plot)
    complaints = _complaints(result)
    return 1 if arguments.check and complaints else 0


def _complaints(result: Any) -> list[str]:
    """What is not as it should be, printed with the targets."""
    from ..bench import serve_targets

    targets = serve_targets.load()
    if targets is None:
        print(f"no ratio is judged: {serve_targets.FILE} is in a checkout of hdispatch, not in its wheel")
    judged = serve_targets.judge(result, targets or [])
    if judged:
        print("\n" + table(["target", "measured", "wanted", "verdict"], [_target_row(each) for each in judged]))
    complaints = [*judge(result), *(str(each) for each in judged if not each.met)]
    for complaint in complaints:
        print(f"not as it should be: {complaint}")
    return complaints


def describe(result: Any) -> str:
    """The tables of a result."""
    modes: dict[str, Any] = result["modes"]
    part = f", {result['layers']} of its layers" if result["layers"] is not None else ""
    lines = [f"{result['model']}{part}, {result['scheme']}, {result['ranks']} GPU(s): {result['machine']['gpu']}"]
    for group, words_of in (("batches", "ms per decode step, batch"), ("prefills", "ms to the first token")):
        names = list(dict.fromkeys(name for mode in modes.values() for name in mode[group]))
        rows = [[mode, *(_ms(found[group].get(name)) for name in names)] for mode, found in modes.items()]
        if names and rows:
            lines += ["", table([words_of, *names], rows)]
    lines += ["", table(_START, [_start_row(mode, found) for mode, found in modes.items()])]
    lines += _profile_lines(modes) + _logit_lines(modes)
    lines += [f"{mode} did not run: {reason}" for mode, reason in result["failed"].items()]
    return "\n".join(lines)


_START = [
    "start-up and memory",
    "import s",
    "engine s",
    "weights GB",
    "GPU GB beside weights and KV",
    "torch's own MB",
    "peak in use MB",
    "hits",
    "misses",
]


def _start_row(mode: str, found: Any) -> list[str]:
    started, finished = found["started"], found["finished"]
    held = started["weights_bytes"] + started["kv_bytes"]
    misses = sum(sum(counts.values()) for counts in finished.get("misses", {}).values())
    return [
        mode,
        f"{started['import_s']:.1f}",
        f"{started['init_s']:.1f}",
        f"{started['weights_bytes'] / 1e9:.2f}",
        f"{(started['device_bytes'] - held) / 1e9:.2f}",
        f"{(started['allocated_bytes'] - held) / 1e6:.0f}",
        f"{(finished.get('peak_bytes', held) - held) / 1e6:.0f}",
        str(finished.get("hits", "")),
        str(misses),
    ]


def _profile_lines(modes: dict[str, Any]) -> list[str]:
    lines = []
    for mode, found in modes.items():
        for batch, profile in found["profiles"].items():
            if not profile:
                continue
            parts = ", ".join(f"{name} {us:.0f}" for name, us in list(profile["host_us"].items())[:10])
            busy = ""
            if "gpu_busy_us" in profile:
                busy = f", GPU busy {profile['gpu_busy_us']:.0f} in {profile['launches']:.0f} launches"
            lines.append(f"{mode}, batch {batch}: step {profile['step_us']:.0f} µs{busy}; host µs: {parts}")
    return ["", *lines] if lines else []


def _logit_lines(modes: dict[str, Any]) -> list[str]:
    from ..bench import serve_accuracy as accuracy

    measured = {mode: found["logits"] for mode, found in modes.items() if found["logits"]}
    if not measured:
        return []
    rows = []
    for mode, errors in measured.items():
        for name in ERRORS:
            parts = (slice(1), slice(1, None), slice(-1, None))
            rows.append([f"{mode}, {ERRORS[name]}", *(f"{accuracy.average(errors, name, part):.3g}" for part in parts), ""])
            if mode != "eager" and "eager" in measured:
                ratios = [accuracy.compare(errors, measured["eager"], name, part) for part in parts]
                worst = max(accuracy.compare_steps(errors, measured["eager"], name), key=lambda each: each.value)
                rows.append(["    times eager's", *map(str, ratios), str(worst)])
    return ["", table(["logits against float32", "prefill", "decode", "last step", "worst step"], rows)]


def _target_row(judged: Judged) -> list[str]:
    bound = f"at {'least' if judged.at_least else 'most'} {judged.bound}"
    return [judged.text, f"{judged.ratio:.3f}", bound, "pass" if judged.met else "miss"]


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def judge(result: Any) -> list[str]:
    """Faults of a result: modes that did not run, calls that the table missed, logits worse than eager's."""
    found = [f"{mode} did not run" for mode in result["failed"]]
    modes = result["modes"]
    for mode, figures in modes.items():
        if mode.startswith("ours") and figures["finished"].get("misses"):
            found.append(f"{mode}: the table missed calls: {figures['finished']['misses']}")
    reference = modes.get("eager", {}).get("logits")
    for mode, figures in modes.items():
        if mode.startswith("ours") and figures["logits"] and reference:
            found += [f"{mode}: {complaint}" for complaint in _judge_logits(figures["logits"], reference)]
    return found


def _judge_logits(ours: Any, theirs: Any) -> list[str]:
    """Where our logits' error is above the bound: over all steps, and at any step alone, the prefill and the last included."""
    from ..bench import serve_accuracy as accuracy

    found = []
    for name, words_of in ERRORS.items():
        whole = accuracy.compare(ours, theirs, name)
        if not whole.value <= ACCURATE:  # NaN is no pass
            found.append(f"{words_of} over all steps is {whole} times eager's; at most {ACCURATE}")
        steps = accuracy.compare_steps(ours, theirs, name)
        above = {step: ratio for step, ratio in enumerate(steps) if not ratio.value <= ACCURATE}
        if above:
            clear = sum(not ratio.value - 2 * ratio.noise <= ACCURATE for ratio in above.values())
            step, worst = max(above.items(), key=lambda each: each[1].value)
            found.append(
                f"{words_of} is above {ACCURATE} times eager's at {len(above)} of {len(steps)} steps, at {clear} of them by"
                f" more than twice the noise; the worst is step {step}, {worst}"
            )
    return found

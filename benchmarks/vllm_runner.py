"""Host time of what vLLM's model runner does around a decode step's layers, part by part: vLLM's own code and the plug-in's.

A real engine serves a few tokens; the arguments of its last decode step are then used again and again. Enqueue only, median
and quartiles over rounds in random order, µs per step. On a GPU everything is what it is when serving. Without one the engine
is that of tests/vllm, on CPU tensors: hdispatch's launches go to the null driver, and vLLM's launches of Triton kernels are
counted and left out, so that they cost nothing (on a GPU each takes its 10 to 30 µs).

    HDISPATCH=1 HDISPATCH_BUNDLE=BUNDLE python benchmarks/vllm_runner.py BUNDLE [--rows 1 8 32] [--json FILE]

Without a GPU, vLLM's tree must be on PYTHONPATH, as `make test-vllm` has it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "vllm"))

import engine_run
import hdispatch
import torch
from hdispatch.bench import machine, serve_model

ROUNDS, CALLS = 30, 20
#: Tokens of a prompt and of an answer.
PROMPT, ANSWER = 24, 8
Part = Callable[[], object]


class Uncounted:
    """A Triton kernel whose launches are counted and not made."""

    def __init__(self, counter: list[int]) -> None:
        self._counter = counter

    def __getitem__(self, _grid: Any) -> Callable[..., None]:
        return self._launch

    def _launch(self, *_: Any, **__: Any) -> None:
        self._counter[0] += 1


def leave_triton_out() -> list[int]:
    """Put counters in the place of the runner's Triton kernels. They are those of this module alone."""
    from vllm.v1.worker.gpu import block_table, buffer_utils, input_batch
    from vllm.v1.worker.gpu.sample import gumbel

    counter = [0]
    for module in (block_table, buffer_utils, input_batch, gumbel):
        for name, each in vars(module).items():
            if name.endswith("_kernel") and hasattr(each, "fn"):
                setattr(module, name, Uncounted(counter))
    return counter


def last_decode_step(engine: Any, rows: int) -> SimpleNamespace:
    """The arguments of the parts in the last decode step of `rows` requests."""
    from vllm import SamplingParams

    runner, seen = engine.runner, SimpleNamespace()
    prepare, sample, metadata = runner.prepare_inputs, runner.sample, runner.model_state.prepare_attn

    def note_inputs(*given: Any) -> Any:
        batch = prepare(*given)
        if not given[1].has_prefill and len(given[1].req_ids) == rows:
            seen.inputs, seen.batch = given, batch
        return batch

    def note_metadata(*given: Any, **named: Any) -> Any:
        if given[0] is getattr(seen, "batch", None):
            seen.metadata = given, named
        return metadata(*given, **named)

    def note_sample(hidden: torch.Tensor, batch: Any, grammar: Any) -> Any:
        found = sample(hidden, batch, grammar)
        if batch is getattr(seen, "batch", None):
            seen.logits, seen.sampled = runner.model.compute_logits(hidden), found[0].sampled_token_ids
        return found

    runner.prepare_inputs, runner.sample, runner.model_state.prepare_attn = note_inputs, note_sample, note_metadata
    try:
        fixed = {"ignore_eos": True, "detokenize": False, "temperature": 0.0, "max_tokens": ANSWER}
        prompts = [{"prompt_token_ids": [10 + (7 * i + j) % 900 for j in range(PROMPT)]} for i in range(rows)]
        engine.llm.generate(prompts, SamplingParams(**fixed), use_tqdm=False)
    finally:
        del runner.prepare_inputs, runner.sample, runner.model_state.prepare_attn
    return seen


def parts_of(runner: Any, seen: SimpleNamespace) -> dict[str, dict[str, Part]]:
    """Part -> "vLLM" and "hdispatch" -> a call of it."""
    from hdispatch.integrations.vllm import runner as ours
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState
    from vllm.v1.worker.gpu.sample.sampler import Sampler

    theirs = ours.ORIGINAL.prepare_inputs(runner, *seen.inputs)
    theirs.logits_indices = seen.batch.logits_indices  # which a kernel that was left out has not written
    plain = Sampler.__new__(Sampler)
    plain.__dict__ = runner.sampler.__dict__
    states, rows = runner.req_states, seen.batch.num_reqs
    numbers = [torch.full((rows,), n, dtype=torch.int32, device=runner.device) for n in (1, 0)]
    kept = states.total_len.gpu.clone()

    def inputs(cls: Any) -> Part:
        return lambda: cls.prepare_attn(runner, cls.prepare_inputs(runner, *seen.inputs))

    def metadata(cls: Any, batch: Any) -> Part:
        (_, *given), named = seen.metadata
        return lambda: cls.prepare_attn(runner.model_state, batch, *given, **named)

    def update(cls: Any, numbers: list[torch.Tensor], starts: torch.Tensor) -> Part:
        def call() -> None:
            cls.postprocess_sampled(runner, seen.batch.idx_mapping, seen.sampled, *numbers, starts)
            if runner.device.type == "cuda":
                return
            states.total_len.gpu.copy_(kept)

        return call

    own = [seen.batch.num_sampled, seen.batch.num_rejected]
    return {
        "inputs, block tables, slots": {"vLLM": inputs(ours.ORIGINAL), "hdispatch": inputs(ours.Runner)},
        "attention metadata": {
            "vLLM": metadata(DefaultModelState, theirs),
            "hdispatch": metadata(type(runner.model_state), seen.batch),
        },
        "staged writes of the sampler": {
            "vLLM": plain.apply_staged_writes,
            "hdispatch": runner.sampler.apply_staged_writes,
        },
        "greedy sampling": {
            "vLLM": lambda: plain(seen.logits, theirs),
            "hdispatch": lambda: runner.sampler(seen.logits, seen.batch),
        },
        "sampled tokens kept": {
            "vLLM": update(ours.ORIGINAL, numbers, theirs.query_start_loc),
            "hdispatch": update(ours.Runner, own, seen.batch.query_start_loc),
        },
    }


def timed(call: Part) -> float:
    """µs per call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter_ns()
    for _ in range(CALLS):
        call()
    return (time.perf_counter_ns() - begin) / CALLS / 1e3


@torch.inference_mode()
def measured(runner: Any, seen: SimpleNamespace, counter: list[int]) -> list[dict[str, Any]]:
    """A line of figures for each part and path."""
    calls = {(part, path): call for part, paths in parts_of(runner, seen).items() for path, call in paths.items()}
    launches = {}
    for name, call in calls.items():
        call()
        before = counter[0]
        call()
        launches[name] = counter[0] - before
    taken: dict[tuple[str, str], list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name in random.sample(list(calls), len(calls)):
            taken[name].append(timed(calls[name]))
    found = []
    for (part, path), each in taken.items():
        low, median, high = statistics.quantiles(each, n=4)
        figures = {"M": seen.batch.num_reqs, "part": part, "path": path, "us": median, "low": low, "high": high}
        found.append(figures | {"triton_launches_left_out": launches[part, path]})
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    os.environ.update(HDISPATCH="1", HDISPATCH_BUNDLE=str(options.bundle))
    with tempfile.TemporaryDirectory() as folder:
        serve_model.write_config(Path(folder), "qwen3-1.7b" if gpu else "tiny-qwen3", "token")
        engine = engine_run.Engine(folder, not gpu, {"max_num_seqs": max(8, *options.rows)})
    steps = [last_decode_step(engine, rows) for rows in options.rows]
    counter = [0]
    if not gpu:
        hdispatch.load(options.bundle, driver="null")
        counter = leave_triton_out()
    found = [line for seen in steps for line in measured(engine.runner, seen, counter)]
    for line in found:
        text = "M {M:4}  {part:30}{path:11}{us:8.1f} µs a step ({low:.1f} to {high:.1f})".format(**line)
        more = line["triton_launches_left_out"]
        print(text + (f", without {more} launches of Triton" if more else ""))
    if options.json:
        here = machine.describe(engine.runner.device if gpu else None)
        options.json.write_text(json.dumps({"machine": here, "parts": found}, indent=1) + "\n")
    sys.stdout.flush()
    os._exit(0)  # vLLM's shutdown takes seconds


if __name__ == "__main__":
    main()

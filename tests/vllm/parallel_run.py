"""One tensor parallel engine with weights from a file: generate, and print as JSON what came out. A process of its own.

usage: parallel_run.py FOLDER PARAMETERS     FOLDER holds config.json and gets the weights; PARAMETERS: JSON, see `run`
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # facts are a function that runs in every rank


def run(
    folder: str,
    ranks: int,
    tokens: list[int],
    simulated: bool = False,
    times: int = 1,
    launching_rank: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Tokens and likeliest logprobs of requests that end one after the other, so that the batch changes.

    tokens   of each request's answer
    times    how often all are generated; the last time's are told
    launching_rank  replays nothing, while the others do
    options  arguments of vLLM's LLM
    """
    write_weights(Path(folder))
    limits = {"max_model_len": 512, "max_num_seqs": 64, "max_num_batched_tokens": 4096, "kv_cache_memory_bytes": 1 << 30}
    if simulated:
        import simulation

        simulation.start(ranks, custom_all_reduce=ranks > 1)
        limits |= {"max_num_batched_tokens": 256, "block_size": 16, "worker_cls": "simulation.SimulatedWorker"}
        del limits["kv_cache_memory_bytes"]
    # By a name that a rank's process can import: __main__ is another module there.
    import parallel_run as ranks_own
    from vllm import LLM, SamplingParams

    if "compilation_config" not in options:
        limits["enforce_eager"] = True
    fixed = {"model": folder, "load_format": "safetensors", "skip_tokenizer_init": True, "seed": 0}
    sizes = {"tensor_parallel_size": ranks, "gpu_memory_utilization": 0.2, "enable_prefix_caching": False}
    llm = LLM(**(limits | fixed | sizes | options))
    if launching_rank is not None:
        llm.apply_model(partial(ranks_own.keep_launching, launching_rank))
    prompts = [{"prompt_token_ids": [(13 * i + 5 * j) % 900 + 10 for j in range(5 + 7 * i)]} for i in range(len(tokens))]
    sampling = [
        SamplingParams(max_tokens=each, ignore_eos=True, detokenize=False, temperature=0.0, logprobs=5) for each in tokens
    ]
    for _ in range(times):
        outputs = [each.outputs[0] for each in llm.generate(prompts, sampling, use_tqdm=False)]
    requests = [{"tokens": list(each.token_ids), "top": [top(step) for step in each.logprobs]} for each in outputs]
    return {"requests": requests, "ranks": llm.apply_model(ranks_own.facts)}


def top(step: Any) -> list[tuple[int, float]]:
    return sorted(((int(token), found.logprob) for token, found in step.items()), key=lambda pair: -pair[1])


def keep_launching(rank: int, _: Any) -> None:
    from hdispatch.replay import Replays
    from vllm.distributed import get_tensor_model_parallel_rank

    if get_tensor_model_parallel_rank() == rank:
        Replays._may_capture = lambda *_: False


def facts(model: Any) -> dict[str, Any]:
    """Of a rank: whose layers run and why, how many sequences were one for all layers, and what was replayed."""
    layers = getattr(model, "_layers", None)
    found: dict[str, Any] = {"class": type(model).__module__, "reason": getattr(model, "hdispatch_reason", None)}
    if layers is None:
        return found
    whole = [steps[0] for (*_, is_whole), steps in layers._steps.items() if is_whole]
    counts = {name: sum(getattr(each, name, 0) for each in whole) for name in ("captures", "replays")}
    return found | {"whole": len(whole), "kinds": len(layers._steps)} | counts


def write_weights(folder: Path) -> None:
    """Seeded weights of a Qwen3 quantized per token: those of one model, for any number of ranks."""
    path = folder / "model.safetensors"
    if path.exists():
        return
    from engine_run import checkpoint
    from safetensors.torch import save_file

    config = json.loads((folder / "config.json").read_text())
    found = checkpoint(SimpleNamespace(config=SimpleNamespace(**config)), torch.Generator().manual_seed(7))
    save_file({name: value.contiguous() for name, value in found}, str(path))


if __name__ == "__main__":
    answer = run(sys.argv[1], **json.loads(sys.argv[2]))
    print("ANSWER " + json.dumps(answer), flush=True)
    os._exit(0)  # vLLM's shutdown takes seconds

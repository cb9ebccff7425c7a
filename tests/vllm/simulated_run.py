"""One engine of the simulation: generate, and print as JSON what came out. Run by test_engine.py in a process of its own.

usage: simulated_run.py FOLDER PARAMETERS     FOLDER holds config.json; PARAMETERS: JSON, see `run`
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import simulation
import torch

LENGTHS = (5, 17, 40, 130, 300)


def run(
    folder: str,
    tokens: int = 6,
    ranks: int = 1,
    custom_all_reduce: bool = False,
    layers_off: bool = False,
    rows_off: bool = False,
    arena: int | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Tokens and top logprobs of several requests of different lengths, and what hdispatch decided and did.

    tokens      of each request
    ranks       tensor parallel
    custom_all_reduce  vLLM has its custom all-reduce
    layers_off  the plug-in's classes are registered, but told to take vLLM's own layers
    rows_off    the table is said to have no rows of the attention ops
    arena       most bytes of the workspace, if less than the product's
    more        arguments of vLLM's LLM

    In one process every step runs in vLLM's own layers too, on the same caches; "steps" says how far ours are from them.
    """
    engine = simulation.start(ranks, custom_all_reduce)
    from vllm import SamplingParams
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    fill_on_load()
    if layers_off:
        turn_layers_off()
    elif ranks == 1:
        run_both()
    if rows_off:
        turn_rows_off()
    if arena is not None:
        shrink_arena(arena)
    options = {
        "model": folder,
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": 512,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "enforce_eager": True,
        "block_size": 16,
        "seed": 0,
        "tensor_parallel_size": ranks,
        "worker_cls": "simulation.SimulatedWorker",
    }
    llm = engine(**(options | more))
    prompts = [{"prompt_token_ids": [(13 * i + 5 * j) % 1000 + 10 for j in range(n)]} for i, n in enumerate(LENGTHS)]
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False, temperature=0.0, logprobs=5)
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    return {"requests": [facts(each.outputs[0]) for each in outputs], "models": decisions(), "steps": STEPS}


def facts(output: Any) -> dict[str, Any]:
    top = [sorted(((int(t), v.logprob) for t, v in step.items()), key=lambda pair: -pair[1]) for step in output.logprobs]
    return {"tokens": list(output.token_ids), "top": top}


MODELS: list[Any] = []


def fill_on_load() -> None:
    """Random weights of a realistic spread in every model, before its first step."""
    from hdispatch.bench import serve_model
    from vllm.distributed import get_tensor_model_parallel_rank
    from vllm.model_executor.model_loader import dummy_loader

    loader = dummy_loader.DummyModelLoader
    real = loader.load_model

    def load_model(self: Any, *given: Any, **named: Any) -> torch.nn.Module:
        model = real(self, *given, **named)
        serve_model.fill_weights(model, rank=get_tensor_model_parallel_rank())
        MODELS.append(model)
        return model

    loader.load_model = load_model


STEPS: list[dict[str, Any]] = []


def run_both() -> None:
    """Let every step run in vLLM's own layers first; note how far ours are from them, and how often attention_half runs."""
    from hdispatch import runtime
    from hdispatch.integrations.vllm import models
    from vllm.forward_context import get_forward_context

    for fused in models.ARCHITECTURES.values():
        ours, theirs = fused.forward, fused.__mro__[2].forward

        def forward(self: Any, *given: Any, ours: Any = ours, theirs: Any = theirs, **named: Any) -> torch.Tensor:
            expected = theirs(self, *given, **named).float()
            before = runtime.stats()["attention_half"]["fallbacks"]
            found = ours(self, *given, **named)
            halves = runtime.stats()["attention_half"]["fallbacks"] - before
            metadata = get_forward_context().attn_metadata
            if metadata:
                first = next(iter(metadata.values()))
                rows = first.num_actual_tokens
                difference = (found[:rows].float() - expected[:rows]).norm() / expected[:rows].norm()
                requests = first.seq_lens.numel()
                kind = "decode" if first.max_query_len == 1 else "prefill" if requests == 1 else "mixed"
                step = {"kind": kind, "rows": rows, "requests": requests, "difference": float(difference)}
                STEPS.append(step | {"halves": halves})
            return found

        fused.forward = forward


def shrink_arena(limit: int) -> None:
    from hdispatch.integrations.vllm import layers, workspace

    layers.rows_within = lambda row_bytes, most: workspace.rows_within(row_bytes, most, limit)


def turn_rows_off() -> None:
    from hdispatch.integrations.vllm import attention

    attention.Attention._objection = lambda *_: "the test says so"


def turn_layers_off() -> None:
    from hdispatch.integrations.vllm import support

    def refuse(_: Any) -> None:
        raise support.UnsupportedError("the test says so")

    support.check_config = refuse


def decisions() -> list[dict[str, Any]]:
    """Of each model in this process: its class, why its layers are not ours, the rows of the arena and its bytes."""
    found = []
    for model in MODELS:
        layers = getattr(model, "_layers", None)
        workspace = None if layers is None else layers.workspace
        arena = None if workspace is None else {"rows": workspace.rows, "bytes": workspace.memory.numel()}
        kinds = None if layers is None else sorted({kind.name for kind, *_ in layers._steps})
        reason = getattr(model, "hdispatch_reason", "not ours")
        found.append({"class": type(model).__module__, "reason": reason, "arena": arena, "kinds": kinds})
    return found


if __name__ == "__main__":
    answer = run(sys.argv[1], **json.loads(sys.argv[2]))
    print("ANSWER " + json.dumps(answer), flush=True)
    os._exit(0)  # vLLM's shutdown takes seconds

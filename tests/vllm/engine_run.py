"""One engine with the plug-in, on a GPU or simulated: runs a scenario and prints as JSON what came of it. A process of its own.

usage: engine_run.py FOLDER PARAMETERS     FOLDER holds config.json; PARAMETERS: JSON, {"scenario", "simulated", "options", …}
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
from collections.abc import Callable
from typing import Any

import torch


class Engine:
    """vLLM's LLM on random weights of a realistic spread, and what of it the scenarios need."""

    def __init__(self, folder: str, simulated: bool, options: dict[str, Any], other_code: bool = False) -> None:
        defaults = {"max_model_len": 2048, "max_num_seqs": 160, "max_num_batched_tokens": 4096}
        if simulated:
            import simulation

            simulation.start()
            limits = {"max_model_len": 512, "max_num_seqs": 8, "max_num_batched_tokens": 1024, "block_size": 16}
            defaults |= limits | {"worker_cls": "simulation.SimulatedWorker"}
            if options.get("enable_lora"):
                simulation.mock_lora()
        from hdispatch.bench import serve_model
        from vllm import LLM
        from vllm.plugins import load_general_plugins

        if other_code:
            from hdispatch.integrations.vllm import runner

            runner.STAND_IN.fingerprint = "0" * 64
        load_general_plugins()
        if not options.get("compilation_config"):
            defaults["enforce_eager"] = True
        sizes = {"gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": 1 << 30, "enable_prefix_caching": False}
        fixed = {"model": folder, "load_format": "dummy", "skip_tokenizer_init": True, "seed": 0}
        self.llm: Any = LLM(**(defaults | sizes | fixed | options))
        worker = self.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
        self.runner: Any = getattr(worker, "worker", worker).model_runner
        self.model: Any = self.runner.get_model()
        serve_model.fill_weights(self.model)

    def measure(self, steps: int, requests: int) -> dict[str, float]:
        """Mean errors of the logits against float32, and how many calls of ours that took."""
        from hdispatch import runtime
        from hdispatch.bench import serve_accuracy

        before = runtime.stats()
        errors = serve_accuracy.measure(self.llm, self.runner, self.model, steps, requests)
        found: dict[str, float] = {name: serve_accuracy.average(errors, name) for name in ("relative", "kl")}
        after = runtime.stats()
        return found | {"calls": sum(after[op]["hits"] - before[op]["hits"] for op in before)}

    def facts(self) -> dict[str, Any]:
        """Whose layers run, why, and what the table missed."""
        from hdispatch import runtime

        counts = runtime.stats()
        return {
            "class": type(self.model).__module__,
            "reason": getattr(self.model, "hdispatch_reason", None),
            "runner": type(self.runner).__module__,
            "scheduler": type(self.llm.llm_engine.engine_core.engine_core.scheduler).__name__,
            "sampler": type(self.runner.sampler).__name__,
            "decode": self._decode(),
            "runner_decodes": self._runner_decodes(),
            "hits": sum(each["hits"] for each in counts.values()),
            "misses": {op: each["misses"] for op, each in counts.items() if each["misses"]},
        }

    def _decode(self) -> dict[str, Any] | None:
        """What decode steps of our layers take: why not attention_half, and its calls, launched or not."""
        from hdispatch import runtime

        layers = getattr(self.model, "_layers", None)
        if layers is None:
            return None
        counts = runtime.stats()["attention_half"]
        return {"reason": layers.attention.decode_reason, "calls": counts["hits"] + counts["fallbacks"]}

    def _runner_decodes(self) -> dict[str, Any]:
        """Why the runner's decode steps are vLLM's own, and the calls, launched or not, of the ops in their place."""
        from hdispatch import runtime

        counts = runtime.stats()
        calls = {op: counts[op]["hits"] + counts[op]["fallbacks"] for op in ("decode_inputs", "argmax", "decode_update")}
        return {"reason": getattr(self.runner, "decode_reason", "vLLM's runner"), **calls}


def accuracy(engine: Engine, steps: int, requests: int) -> dict[str, Any]:
    """The logits' errors."""
    return {"errors": [engine.measure(steps, requests)]}


def reload(engine: Engine, steps: int, requests: int) -> dict[str, Any]:
    """The errors before and after other weights are loaded in the checkpoint's format."""
    before = engine.measure(steps, requests)
    layers = engine.model._layers
    first = engine.model.model.layers[0].self_attn.qkv_proj.weight.float().sum().item()
    generator = torch.Generator().manual_seed(7)
    weights = checkpoint(engine.model, generator)
    engine.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    changed = engine.model.model.layers[0].self_attn.qkv_proj.weight.float().sum().item() != first
    after = engine.measure(steps, requests)
    return {"errors": [before, after], "changed": changed, "bound_again": engine.model._layers is not layers}


def checkpoint(model: Any, generator: torch.Generator) -> list[tuple[str, torch.Tensor]]:
    """Weights of a Qwen3 quantized per token, as a file on disk would have them."""
    config = model.config
    hidden, size, middle = config.hidden_size, config.head_dim, config.intermediate_size
    heads, kv_heads = config.num_attention_heads * size, config.num_key_value_heads * size
    shapes = {"self_attn.q_proj": (heads, hidden), "self_attn.k_proj": (kv_heads, hidden)}
    shapes |= {"self_attn.v_proj": (kv_heads, hidden), "self_attn.o_proj": (hidden, heads)}
    shapes |= {"mlp.gate_proj": (middle, hidden), "mlp.up_proj": (middle, hidden), "mlp.down_proj": (hidden, middle)}

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    found = [("model.embed_tokens.weight", normal(config.vocab_size, hidden).bfloat16())]
    found.append(("lm_head.weight", (0.04 * normal(config.vocab_size, hidden)).bfloat16()))
    found.append(("model.norm.weight", (1 + 0.1 * normal(hidden)).bfloat16()))
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for name, width in (("input_layernorm", hidden), ("post_attention_layernorm", hidden)):
            found.append((f"{prefix}{name}.weight", (1 + 0.1 * normal(width)).bfloat16()))
        for name in ("q_norm", "k_norm"):
            found.append((f"{prefix}self_attn.{name}.weight", (1 + 0.1 * normal(size)).bfloat16()))
        for name, (n, k) in shapes.items():
            found.append((f"{prefix}{name}.weight", (100 * normal(n, k)).clamp(-448, 448).to(torch.float8_e4m3fn)))
            gain = 0.35 if name in ("self_attn.o_proj", "mlp.down_proj") else 1.0
            found.append((f"{prefix}{name}.weight_scale", torch.full((n, 1), gain / (100 * k**0.5))))
    return found


def sleep(engine: Engine, steps: int, requests: int) -> dict[str, Any]:
    """The errors before and after the engine slept with its weights kept in host memory."""
    before = engine.measure(steps, requests)
    engine.llm.sleep(level=1)
    engine.llm.wake_up()
    return {"errors": [before, engine.measure(steps, requests)]}


def same_bits(engine: Engine, steps: int, requests: int) -> dict[str, Any]:
    """Whether a second run, and one with the requests in another order, give the same logits."""
    from hdispatch.bench import serve_accuracy

    sizes = serve_accuracy.lengths(requests)
    order = random.Random(3).sample(range(requests), requests)

    def logits(order: list[int] | None = None) -> list[torch.Tensor]:
        return serve_accuracy.forced_logits(engine.llm, engine.runner, sizes, steps, order)

    first, again, other = logits(), logits(), logits(order)

    def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> list[bool]:
        return [all(torch.equal(x[step], y[step]) for x, y in zip(a, b, strict=True)) for step in range(steps)]

    return {"again": same(first, again), "other_order": same(first, other)}


def generate(
    engine: Engine,
    tokens: int,
    lengths: list[int],
    times: int = 1,
    temperature: float = 0.0,
    logprobs: int | None = 5,
    sampling: dict[str, Any] | None = None,
    mixed: bool = False,
    stagger: int = 0,
) -> dict[str, Any]:
    """Tokens of the last of several times, and logprobs of the likeliest. Prompts repeat themselves: n-grams are found.

    sampling  more of vLLM's SamplingParams
    mixed     whether every other request is not greedy
    stagger   tokens that each request gets more than the one before it, so that they end one by one
    """
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": [(13 * i + 5 * (j % 8)) % 1000 + 10 for j in range(n)]} for i, n in enumerate(lengths)]
    fixed = {"ignore_eos": True, "detokenize": False, "seed": 5, "logprobs": logprobs} | (sampling or {})
    sampled = [
        SamplingParams(temperature=0.9 if mixed and not i % 2 else temperature, max_tokens=tokens + i * stagger, **fixed)
        for i in range(len(lengths))
    ]
    found = []
    for _ in range(times):
        outputs = engine.llm.generate(prompts, sampled, use_tqdm=False)
    for each in outputs:
        output = each.outputs[0]
        steps = output.logprobs or []
        top = [sorted(((int(t), v.logprob) for t, v in step.items()), key=lambda pair: -pair[1]) for step in steps]
        found.append({"tokens": list(output.token_ids), "top": top})
    return {"requests": found}


def storm(engine: Engine, steps: int, most: int, longest: int) -> dict[str, Any]:
    """Requests of random lengths that come at random, through a cache too small for them; memory at the start and the end.

    steps    of the engine
    most     requests at once
    longest  tokens of a prompt, and of an answer
    """
    from vllm import SamplingParams

    core, chance = engine.llm.llm_engine, random.Random(11)
    scheduler = core.engine_core.engine_core.scheduler
    preempted, real = [0], scheduler._preempt_request

    def count(*given: Any, **named: Any) -> Any:
        preempted[0] += 1
        return real(*given, **named)

    scheduler._preempt_request = count
    number = done = 0
    memory: list[tuple[int, int]] = []

    def drain(limit: int) -> int:
        taken = 0
        while core.has_unfinished_requests() and taken < limit:
            core.step()
            taken += 1
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        memory.append((torch.cuda.memory_allocated(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
        return taken

    active: set[str] = set()
    for step in range(steps):
        if step == steps // 5:
            drain(10 * longest)
            active.clear()
        while len(active) < chance.randint(1, most):
            prompt = {"prompt_token_ids": [chance.randint(10, 900) for _ in range(chance.randint(1, longest))]}
            sampling = SamplingParams(max_tokens=chance.randint(1, longest), ignore_eos=True, detokenize=False, temperature=0.0)
            core.add_request(str(number), prompt, sampling)
            active.add(str(number))
            number += 1
        for output in core.step():
            if output.finished:
                active.discard(output.request_id)
                done += 1
    left = len(active)
    drain(20 * longest)
    return {
        "done": done,
        "left": left,
        "unfinished": core.has_unfinished_requests(),
        "preempted": preempted[0],
        "memory": memory,
    }


SCENARIOS: dict[str, Callable[..., dict[str, Any]]] = {
    each.__name__: each for each in (accuracy, reload, sleep, same_bits, generate, storm)
}


def main() -> None:
    given = json.loads(sys.argv[2])
    scenario = SCENARIOS[given.pop("scenario")]
    engine = Engine(sys.argv[1], given.pop("simulated"), given.pop("options"), given.pop("other_code", False))
    answer = scenario(engine, **given)
    print("ANSWER " + json.dumps(answer | engine.facts()), flush=True)
    os._exit(0)  # vLLM's shutdown takes seconds


if __name__ == "__main__":
    main()

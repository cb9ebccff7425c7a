"""A process of `bench serve`: vLLM's engine in one mode, on random weights, which answers requests as lines of JSON.

usage: python -m hdispatch.bench.serve_worker     the first line is `EngineOptions`, the others {"do": …}; see `_Engine`
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

#: Steps after which a batch is in steady state, and steps that are timed.
SKIP, STEPS = 16, 96
CAPTURE_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class EngineOptions:
    """Options of an engine.

    mode    of `serve.MODES`
    graphs  "none", "decode" (vLLM's layers or ours captured whole, nothing compiled) or "compiled" (vLLM's default)
    served  "no", "override" (vLLM's ops), "layers" (the plug-in), "layers-launches" (without replays),
            "layers-vllm-runner" (vLLM's model runner and sampler), "layers-vllm-scheduler" (vLLM's plans of all steps),
            "layers-fa3" (decode steps by FlashAttention 3)
    kv_gib  of KV cache
    """

    mode: str
    graphs: str
    served: str
    model: str
    scheme: str
    bundle: str
    ranks: int
    kv_gib: float
    layers: int | None
    seed: int

    def to_line(self) -> str:
        """One line for a process's stdin."""
        return json.dumps(asdict(self)) + "\n"


def environment(setup: EngineOptions, caches: Path) -> dict[str, str]:
    """That of the process: vLLM in one process, compile caches that are empty, the plug-in on or off."""
    found = dict(os.environ)
    found |= {
        "HDISPATCH": "1" if setup.served.startswith("layers") else "0",
        "HDISPATCH_BUNDLE": setup.bundle,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "VLLM_CACHE_ROOT": str(caches / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
    }
    if setup.served == "layers-fa3":
        found["HDISPATCH_ATTENTION"] = "fa3"
    if setup.served == "layers-launches":
        found["HDISPATCH_REPLAY"] = "0"
    if setup.served == "layers-vllm-runner":
        found["HDISPATCH_RUNNER"] = "0"
    if setup.served == "layers-vllm-scheduler":
        found["HDISPATCH_SCHEDULER"] = "0"
    found.setdefault("VLLM_LOGGING_LEVEL", "INFO")
    return found


def main() -> None:
    """Serve requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else is printed goes to the log
    setup = EngineOptions(**json.loads(sys.stdin.readline()))
    engine = _answer(answers, lambda: _Engine(setup), None, "")
    for line in sys.stdin:
        _answer(answers, None, engine, line)
    os._exit(0)  # vLLM's shutdown takes seconds


def _answer(answers: Any, make: Callable[[], _Engine] | None, engine: _Engine | None, line: str) -> _Engine | None:
    """Write the answer to a line; to the first one, which makes the engine, how it started. An error is an answer."""
    try:
        if make is not None:
            engine = make()
            found = engine.started()
        elif engine is None:
            found = {"error": "the engine did not start"}
        else:
            found = engine.do(json.loads(line))
    except Exception as error:
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {str(error)[:600]}"}
    answers.write(json.dumps(found) + "\n")
    return engine


class _Engine:
    """vLLM's LLM, and what can be asked of it. Every method that answers a request is named as the request is."""

    def __init__(self, setup: EngineOptions) -> None:
        began = time.perf_counter()
        import torch

        from . import serve_model

        self._torch, self._setup = torch, setup
        self._override = None
        torch.zeros(1, device="cuda")
        self._load_s = 0.0
        if setup.served == "override":
            from .. import runtime
            from ..integrations.vllm import override_vllm_ops

            at = time.perf_counter()
            runtime.load(setup.bundle)
            self._load_s = time.perf_counter() - at
            self._override = override_vllm_ops()
        from vllm import LLM

        self._import_s = time.perf_counter() - began
        folder = Path(tempfile.mkdtemp(prefix="hdispatch-model-"))
        serve_model.write_config(folder, setup.model, setup.scheme)
        options = self._options(folder)
        free, _ = torch.cuda.mem_get_info()
        began = time.perf_counter()
        self._llm = LLM(**options)
        torch.cuda.synchronize()
        self._init_s = time.perf_counter() - began
        self._memory = {
            "device_bytes": free - torch.cuda.mem_get_info()[0],
            "allocated_bytes": torch.cuda.memory_allocated(),
            "reserved_bytes": torch.cuda.memory_reserved(),
            "peak_bytes": torch.cuda.max_memory_allocated(),
        }
        self._model = self._fill(serve_model.fill_weights)
        self._check_served()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def _options(self, folder: Path) -> dict[str, Any]:
        setup = self._setup
        options: dict[str, Any] = {
            "model": str(folder),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "max_model_len": 2048,
            "max_num_seqs": 160,
            "max_num_batched_tokens": 4096,
            "enable_prefix_caching": False,
            "seed": 0,
            "tensor_parallel_size": setup.ranks,
            "gpu_memory_utilization": 0.15,
            "kv_cache_memory_bytes": int(setup.kv_gib * 2**30),
        }
        if setup.layers is not None:
            options["hf_overrides"] = {"num_hidden_layers": setup.layers}
        if setup.graphs == "none":
            options["enforce_eager"] = True
        elif setup.graphs == "decode":
            options["compilation_config"] = {
                "mode": 0,
                "cudagraph_mode": "FULL_DECODE_ONLY",
                "cudagraph_capture_sizes": list(CAPTURE_SIZES),
            }
        elif setup.graphs == "compiled":
            options["compilation_config"] = {"cudagraph_capture_sizes": list(CAPTURE_SIZES)}
        return options

    def _fill(self, fill: Any) -> Any:
        """Random weights in every rank's model; the model of this process, if it is here."""
        core = getattr(self._llm.llm_engine.engine_core, "engine_core", None)
        worker = getattr(getattr(core, "model_executor", None), "driver_worker", None)
        if self._setup.ranks > 1 or worker is None:
            self._llm.apply_model(_fill_rank)
            self._runner = None
            return None
        self._runner = getattr(worker, "worker", worker).model_runner
        model = self._runner.get_model()
        fill(model)
        return model

    def _check_served(self) -> None:
        """Raise unless hdispatch's layers run where the mode wants them."""
        if self._model is None or not self._setup.served.startswith("layers"):
            return
        kind = type(self._model)
        if not kind.__module__.startswith("hdispatch."):
            raise RuntimeError(
                f"the plug-in is not on: the model is {kind.__module__}.{kind.__name__}; is hdispatch installed?"
            )
        if self._model.hdispatch_reason is not None:
            raise RuntimeError(f"the layers are not served: {self._model.hdispatch_reason}")

    # ---- requests ----

    def do(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request."""
        what = request.pop("do")
        if what not in ("decode", "prefill", "profile", "logits", "finish"):
            raise ValueError(f"no request {what!r}")
        found: dict[str, Any] = getattr(self, what)(**request)
        return found

    def started(self) -> dict[str, Any]:
        """Seconds of start-up, and memory after it, before the weights are filled.

        device_bytes is what the GPU has less: with graphs and code, for which torch's allocator has no figure.
        """
        weights = sum(p.numel() * p.element_size() for p in self._model.parameters()) if self._model is not None else 0
        return {
            "import_s": self._import_s,
            "init_s": self._init_s,
            "load_s": self._load_s,
            "weights_bytes": weights,
            "kv_bytes": int(self._setup.kv_gib * 2**30),
            **self._memory,
            "gpu": self._torch.cuda.get_device_name(),
        }

    def decode(self, batch: int) -> dict[str, Any]:
        """ms of a decode step in steady state: the mean over STEPS of them."""
        window = _Window(self._llm, batch, self._torch)
        return {"ms": window.run() * 1e3}

    def prefill(self, requests: int, tokens: int) -> dict[str, Any]:
        """ms to the first token of all of several requests."""
        self._torch.cuda.synchronize()
        began = time.perf_counter()
        self._llm.generate(_prompts(requests, tokens), _sampling(1), use_tqdm=False)
        return {"ms": (time.perf_counter() - began) * 1e3}

    def profile(self, batch: int) -> dict[str, Any]:
        """Host µs by part of a decode step, and ms in which the GPU is busy."""
        from . import serve_profile

        if self._runner is None:
            return {}
        return serve_profile.profile(self._llm, self._runner, self._model, lambda: _Window(self._llm, batch, self._torch))

    def logits(self, steps: int, requests: int) -> dict[str, Any]:
        """Errors of the logits of forced tokens against a float32 evaluation of the weights; see `serve_accuracy.Errors`."""
        from . import serve_accuracy

        if self._runner is None:
            raise RuntimeError("logits are compared on one rank")
        found = serve_accuracy.measure(self._llm, self._runner, self._model, steps, requests)
        self._torch.cuda.empty_cache()
        return {**found}

    def finish(self) -> dict[str, Any]:
        """Peak memory since the start, and what hdispatch's ops did."""
        from .. import runtime

        stats = {op: counts for op, counts in runtime.stats().items() if counts["hits"] or counts["misses"]}
        memory = self._torch.cuda
        return {
            "peak_bytes": memory.max_memory_allocated(),
            "reserved_bytes": memory.memory_reserved(),
            "hits": sum(counts["hits"] for counts in stats.values()),
            "misses": {op: counts["misses"] for op, counts in stats.items() if counts["misses"]},
        }


class _Window:
    """A generation whose engine steps SKIP to SKIP + STEPS are timed, or given to `enter` and `leave`."""

    def __init__(self, llm: Any, batch: int, torch: Any) -> None:
        self._llm, self._batch, self._torch = llm, batch, torch
        self.steps = STEPS
        self.enter: Callable[[], None] = _nothing
        self.leave: Callable[[], None] = _nothing

    def run(self) -> float:
        """Seconds per step."""
        engine = self._llm.llm_engine
        real, count, times = engine.step, 0, [0.0, 0.0]

        def step() -> Any:
            nonlocal count
            if count == SKIP:
                self.enter()
                times[0] = time.perf_counter()
            if count == SKIP + self.steps:
                times[1] = time.perf_counter()
                self.leave()
            count += 1
            return real()

        engine.step = step
        try:
            sampling = _sampling(SKIP + self.steps + 8)
            self._llm.generate(_prompts(self._batch, 32), sampling, use_tqdm=False)
        finally:
            del engine.step
        return (times[1] - times[0]) / self.steps


def _nothing() -> None: ...


def _prompts(count: int, tokens: int) -> list[dict[str, Any]]:
    return [{"prompt_token_ids": [(7 * i + j) % 1000 + 10 for j in range(tokens)]} for i in range(count)]


def _sampling(tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False, temperature=0.0)


def _fill_rank(model: Any) -> None:
    from vllm.distributed import get_tensor_model_parallel_rank

    from . import serve_model

    serve_model.fill_weights(model, rank=get_tensor_model_parallel_rank())


if __name__ == "__main__":
    main()

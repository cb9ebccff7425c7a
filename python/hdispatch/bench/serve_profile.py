"""Where a decode step of vLLM's engine goes: host time by part, and how long the GPU is busy."""

from __future__ import annotations

import collections
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity

#: Methods of vLLM's V2 model runner that are parts of a step.
RUNNER = (
    "execute_model",
    "sample_tokens",
    "gather_batch_req_state",
    "prepare_inputs",
    "prepare_attn",
    "add_requests",
    "update_requests",
    "finish_requests",
    "sample",
    "postprocess_sampled",
)
#: Engine steps of the GPU profile: the profiler keeps every kernel.
GPU_STEPS = 16


class _Timers:
    """Exclusive host time of wrapped methods, while `on`."""

    def __init__(self) -> None:
        self.on = False
        self.seconds: collections.defaultdict[str, float] = collections.defaultdict(float)
        self._inner: list[float] = []
        self._undo: list[tuple[Any, str, bool, Any]] = []

    def wrap(self, owner: Any, name: str, label: str) -> None:
        """Time a method; nothing if the owner has none of that name."""
        real = getattr(owner, name, None)
        if real is None:
            return
        clock = time.perf_counter

        def timed(*given: Any, **named: Any) -> Any:
            if not self.on:
                return real(*given, **named)
            self._inner.append(0.0)
            began = clock()
            try:
                return real(*given, **named)
            finally:
                took = clock() - began
                self.seconds[label] += took - self._inner.pop()
                if self._inner:
                    self._inner[-1] += took

        own = name in vars(owner)
        self._undo.append((owner, name, own, vars(owner).get(name)))
        setattr(owner, name, timed)

    def restore(self) -> None:
        """Undo every wrap."""
        for owner, name, own, former in reversed(self._undo):
            if own:
                setattr(owner, name, former)
            else:
                delattr(owner, name)


def profile(llm: Any, runner: Any, model: Any, window: Callable[[], Any]) -> dict[str, Any]:
    """{"host_us": {part: µs per step}, "step_us", "gpu_busy_us", "kernels"} of a decode step.

    window  makes a generation with `enter`, `leave`, `steps` and `run`
    """
    found = _profile_host(llm, runner, model, window())
    return found | (_profile_gpu(window()) if torch.cuda.is_available() else {})


def _profile_host(llm: Any, runner: Any, model: Any, window: Any) -> dict[str, Any]:
    timers = _Timers()
    engine = llm.llm_engine
    core = engine.engine_core.engine_core
    modules = [sys.modules[each.__module__] for each in type(runner).__mro__]  # the plug-in's runner is a class above vLLM's
    timers.wrap(engine.output_processor, "process_outputs", "process outputs")
    timers.wrap(core.scheduler, "schedule", "schedule")
    timers.wrap(core.scheduler, "update_from_output", "update from output")
    for name in RUNNER:
        timers.wrap(runner, name, name.replace("_", " "))
    timers.wrap(runner.model_state, "prepare_attn", "attention metadata")
    if getattr(runner, "cudagraph_manager", None) is not None:
        timers.wrap(runner.cudagraph_manager, "run_fullgraph", "graph replay")
    timers.wrap(model, "forward", "model")
    timers.wrap(model, "compute_logits", "logits")
    for output in {each.AsyncOutput for each in modules if hasattr(each, "AsyncOutput")}:
        timers.wrap(output, "get_output", "waiting for the GPU")

    def enter() -> None:
        timers.on = True

    def leave() -> None:
        timers.on = False

    window.enter, window.leave = enter, leave
    try:
        seconds = window.run()
    finally:
        timers.restore()
    parts = {name: value / window.steps * 1e6 for name, value in sorted(timers.seconds.items(), key=lambda each: -each[1])}
    parts["rest"] = seconds * 1e6 - sum(parts.values())
    return {"step_us": seconds * 1e6, "host_us": parts}


def _profile_gpu(window: Any) -> dict[str, Any]:
    recorder = torch.profiler.profile(activities=[ProfilerActivity.CUDA])

    def enter() -> None:
        torch.cuda.synchronize()
        recorder.start()

    def leave() -> None:
        torch.cuda.synchronize()
        recorder.stop()

    window.steps, window.enter, window.leave = GPU_STEPS, enter, leave
    window.run()
    recorded: list[Any] = list(recorder.events())  # type: ignore[no-untyped-call]
    events = [each for each in recorded if each.device_type == DeviceType.CUDA]
    spans = sorted((each.time_range.start, each.time_range.end) for each in events if not each.is_user_annotation)
    busy, until = 0.0, float("-inf")
    for begin, end in spans:
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    kernels: collections.defaultdict[str, float] = collections.defaultdict(float)
    for each in events:
        kernels[each.name[:80]] += each.time_range.elapsed_us()
    longest = sorted(kernels.items(), key=lambda each: -each[1])[:20]
    return {
        "gpu_busy_us": busy / GPU_STEPS,
        "launches": len(spans) / GPU_STEPS,
        "kernels": {name: value / GPU_STEPS for name, value in longest},
    }

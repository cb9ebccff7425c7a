"""A vLLM 0.33 that lacks a name or does something else: what depends on it stays vLLM's own, and the log says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

SCRIPT = """
import json, logging, sys
import simulation
simulation.start()
import vllm.platforms
vllm.platforms.current_platform.is_cuda = lambda: True
from vllm.model_executor.models import ModelRegistry, qwen3
from vllm.v1.core import kv_cache_manager
from vllm.v1.core.sched import async_scheduler
from vllm.v1.worker.gpu import model_runner, input_batch
from hdispatch.integrations.vllm import plugin, settings

exec(sys.argv[1])
said = []
settings.logger.warning = lambda text, *values: said.append(text % values)
plugin.register()
ours = {
    "models": "hdispatch" in repr(ModelRegistry.models["Qwen3ForCausalLM"]),
    "runner": model_runner.GPUModelRunner.__module__.startswith("hdispatch"),
    "scheduler": async_scheduler.AsyncScheduler.__module__.startswith("hdispatch"),
    "ops": bool(plugin._OVERRIDE),
}
print("ANSWER " + json.dumps([ours, said, plugin.examine()]))
"""


@pytest.fixture
def register(output: Callable[..., str]) -> Callable[[str], tuple[dict[str, bool], list[str], dict[str, Any]]]:
    """Run statements on vLLM's modules, then `register`: which parts are ours, what the log says, and what `examine` does."""

    def run(change: str) -> tuple[dict[str, bool], list[str], dict[str, Any]]:
        said = output("-c", SCRIPT, change)
        answers = [line for line in said.splitlines() if line.startswith("ANSWER ")]
        assert answers, said[-4000:]
        ours, log, found = json.loads(answers[0].removeprefix("ANSWER "))
        return ours, log, found

    return run


ALL = {"models": True, "runner": True, "scheduler": True, "ops": True}


def test_the_release_itself(register: Any) -> None:
    ours, log, found = register("")
    assert ours == ALL
    assert log == []
    assert found["ok"]
    assert (found["layers"], found["runner"], found["scheduler"]) == ("", "", "")


@pytest.mark.parametrize(
    ("change", "part", "what", "reason"),
    [
        ("del kv_cache_manager.KVCacheManager.allocate_slots", "scheduler", "scheduler", "has no attribute 'allocate_slots'"),
        ("del input_batch.post_update", "runner", "model runner", "has no attribute 'post_update'"),
        ("qwen3.Qwen3Attention.forward = qwen3.Qwen3Attention.__init__", "models", "decoder layers", "its code is "),
        ("qwen3.Qwen3Attention.forward = len", "models", "decoder layers", "there is no source of len to compare"),
        ("del qwen3.Qwen3DecoderLayer", "models", "decoder layers", "has no attribute 'Qwen3DecoderLayer'"),
    ],
    ids=["a method of the cache", "a function of the runner", "another forward", "no source", "a class"],
)
def test_one_part_stays_vllms(register: Any, change: str, part: str, what: str, reason: str) -> None:
    ours, log, found = register(change)
    assert not ours[part]
    lost = {"models", "runner"} if part == "runner" else {part}  # the layers' attention metadata come from the runner
    assert ours == {name: name not in lost for name in ALL}
    assert any(line.startswith(f"hdispatch: vLLM's own {what} stay") and reason in line for line in log), log
    assert reason in found["layers" if part == "models" else part]
    assert found["ok"]
    assert bool(found["models"]) == ours["models"]


def test_another_fault_is_not_taken_for_another_release(register: Any) -> None:
    """A module of ours that is not there is an error."""
    with pytest.raises(AssertionError, match=r"import of hdispatch\.integrations\.vllm\.decode_batch halted"):
        register("sys.modules['hdispatch.integrations.vllm.decode_batch'] = None")

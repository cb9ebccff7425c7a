"""What of vLLM's model runner ours stands in for: the ops against its Triton kernels, and its class put in and taken out."""

from __future__ import annotations

import json
from collections.abc import Callable

SWAP = """
import simulation
simulation.start()
from hdispatch.integrations.vllm import runner
from vllm.v1.worker.gpu import model_runner
assert runner.STAND_IN.objection() == "", runner.STAND_IN.objection()
for _ in range(2):
    runner.STAND_IN.install(runner.Runner)
    assert model_runner.GPUModelRunner is runner.Runner
runner.STAND_IN.uninstall()
assert model_runner.GPUModelRunner is runner.ORIGINAL
print("SWAPPED")
"""


def test_the_ops_do_what_vllms_kernels_do(output: Callable[..., str]) -> None:
    """Bit for bit."""
    found = output("runner_kernels.py")
    (line,) = (each for each in found.splitlines() if each.startswith("FAILURES ")) if "FAILURES " in found else (found,)
    cases, failures = json.loads(line.removeprefix("FAILURES "))
    assert len(cases) == 10
    assert failures == []


def test_the_class_is_put_in_and_taken_out(output: Callable[..., str]) -> None:
    assert "SWAPPED" in output("-c", SWAP)

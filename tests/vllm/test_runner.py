"""What of vLLM's model runner ours stands in for: the ops against its Triton kernels, and its class put in and taken out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SWAP = """
import simulation
simulation.start()
from hdispatch.integrations.vllm import runner
from vllm.v1.worker.gpu import model_runner
assert runner.objection() == "", runner.objection()
for _ in range(2):
    runner.install()
    assert model_runner.GPUModelRunner is runner.Runner
runner.uninstall()
assert model_runner.GPUModelRunner is runner.ORIGINAL
print("SWAPPED")
"""


def output(environment: dict[str, str], *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=HERE, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    return done.stdout + done.stderr


def test_the_ops_do_what_vllms_kernels_do(environment: dict[str, str]) -> None:
    """Bit for bit."""
    found = output(environment, "runner_kernels.py")
    (line,) = (each for each in found.splitlines() if each.startswith("FAILURES ")) if "FAILURES " in found else (found,)
    cases, failures = json.loads(line.removeprefix("FAILURES "))
    assert len(cases) == 10
    assert failures == []


def test_the_class_is_put_in_and_taken_out(environment: dict[str, str]) -> None:
    assert "SWAPPED" in output(environment, "-c", SWAP)

"""vLLM's Python, from its wheel: where it is, and runs of the simulated engine in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hdispatch.bench import serve_model

Answer = dict[str, Any]

#: `make test-vllm` puts vLLM's tree and what it imports here.
VLLM = Path(os.environ.get("HDISPATCH_VLLM", Path(__file__).parents[2] / "build" / "vllm"))
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not (VLLM / "tree" / "vllm").is_dir():
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=f"no vLLM in {VLLM}; make test-vllm downloads it"))


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of a process that imports vLLM, with the plug-in on."""
    folder = tmp_path_factory.mktemp("bundle")  # never loaded: CPU tensors are served by the references
    paths = [str(VLLM / "tree"), str(VLLM / "deps")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HDISPATCH": "1", "HDISPATCH_BUNDLE": str(folder)}


@pytest.fixture
def simulate(environment: dict[str, str], tmp_path: Path) -> Callable[..., Answer]:
    """Run one engine: simulate(model, scheme, **parameters of simulated_run.run) -> its answer and "log"."""

    def run(model: str, scheme: str, **given: Any) -> Answer:
        variables = environment | given.pop("variables", {})
        return ask("simulated_run.py", variables, tmp_path, model, scheme, given)

    return run


@pytest.fixture
def generate(environment: dict[str, str], tmp_path: Path) -> Callable[..., Answer]:
    """Run parallel_run.py on a simulated engine: generate(**parameters of its run) -> its answer and "log"."""

    def run(**given: Any) -> Answer:
        variables = environment | given.pop("variables", {})
        return ask("parallel_run.py", variables, tmp_path, "tiny-qwen3", "token", {"simulated": True} | given)

    return run


@pytest.fixture
def play(environment: dict[str, str], tmp_path: Path) -> Callable[..., Answer]:
    """Run a scenario of engine_run.py on a simulated engine: play(scenario, options, **parameters) -> its answer and "log"."""

    def run(scenario: str, options: dict[str, Any] | None = None, **given: Any) -> Answer:
        variables = environment | {"TORCHDYNAMO_DISABLE": "1"} | given.pop("variables", {})
        fixed = {"scenario": scenario, "simulated": True, "options": options or {}}
        return ask("engine_run.py", variables, tmp_path, given.pop("model", "tiny-qwen3"), "token", fixed | given)

    return run


@pytest.fixture
def schedule(environment: dict[str, str], tmp_path: Path) -> Callable[..., Answer]:
    """Run scheduler_run.py: schedule(what=…, **parameters of that function) -> its answer and "log"."""

    def run(**given: Any) -> Answer:
        return ask("scheduler_run.py", environment, tmp_path, "tiny-qwen3", "token", given)

    return run


@pytest.fixture
def output(environment: dict[str, str]) -> Callable[..., str]:
    """Run Python in this folder: output(*arguments) -> all that it said."""

    def run(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=600, check=False)
        return done.stdout + done.stderr

    return run


def ask(script: str, environment: dict[str, str], folder: Path, model: str, scheme: str, parameters: Any) -> Answer:
    serve_model.write_config(folder, model, scheme)
    command = [sys.executable, script, str(folder), json.dumps(parameters)]
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=600, check=False)
    answers = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert answers, done.stdout[-4000:] + done.stderr[-4000:]
    return {**json.loads(answers[0].removeprefix("ANSWER ")), "log": done.stdout + done.stderr}

"""SGLang's Python, from its wheel: where it is, and calls of it in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bundle_of_rows import write_bundle

Answer = dict[str, Any]

#: `make test-sglang` puts SGLang's tree and what it really imports here.
SGLANG = Path(os.environ.get("HDISPATCH_SGLANG", Path(__file__).parents[2] / "build" / "sglang"))
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not (SGLANG / "complete").is_file():
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=f"no SGLang in {SGLANG}; make test-sglang downloads it"))


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of a process that imports SGLang, with the plug-in on and a bundle for the null driver."""
    folder = write_bundle(tmp_path_factory.mktemp("bundle"))
    paths = [str(SGLANG / "tree"), str(SGLANG / "deps"), str(HERE)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HDISPATCH": "1", "HDISPATCH_BUNDLE": str(folder)}


@pytest.fixture(scope="session")
def ask(environment: dict[str, str]) -> Callable[..., Answer]:
    """Run one function of simulated_calls.py: ask(name, **variables of the environment) -> its answer and "log"."""

    def run(name: str, **variables: str) -> Answer:
        command = [sys.executable, "simulated_calls.py", name]
        given = {"cwd": HERE, "env": environment | variables, "capture_output": True, "text": True}
        done = subprocess.run(command, **given, timeout=300, check=False)
        answers = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
        assert answers, done.stdout[-4000:] + done.stderr[-4000:]
        return {**json.loads(answers[0].removeprefix("ANSWER ")), "log": done.stdout + done.stderr}

    return run

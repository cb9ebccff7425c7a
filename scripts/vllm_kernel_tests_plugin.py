"""A pytest plugin for vLLM's own kernel tests: a sample of them, under the override of a bundle or without, counted by test.

Loaded by `scripts/vllm_kernel_tests.py` with `-p`; vLLM's conftest is left out, since it imports servers and model hubs.
"""

from __future__ import annotations

import json
import os
import random
import sys
import types
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

#: One seed for both runs of a file, so that they run the same tests.
SEED = 20261126
#: Functions each of whose tests makes hundreds of calls -> how many of them run.
LONG = {"test_cutlass_fp8_gemm_m_sweep": 2}
#: Bytes that torch may keep for later tests.
MUCH = 2 << 30


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options that `vllm_kernel_tests.py` passes."""
    group = parser.getgroup("hdispatch")
    group.addoption("--bundle", type=Path, help="serve vLLM's ops from this bundle; without it vLLM's own kernels run")
    group.addoption("--records", type=Path, required=True, help="file that gets one line of JSON a test")
    group.addoption("--sample", type=int, default=0, help="tests of a file that run at most; 0 for all")


def pytest_configure(config: pytest.Config) -> None:
    """Before a test file imports vLLM."""
    os.environ.update(VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1", VLLM_USE_DEEP_GEMM="0")
    _offer_utils()
    config.pluginmanager.register(_Recorder(config.option.records, config.option.bundle), "hdispatch-recorder")


def _offer_utils() -> None:
    """`tests.utils`, of which kernel tests take two names; the whole module imports clients of web services."""
    import torch
    from vllm.utils.torch_utils import set_random_seed

    def large_gpu_test(*, min_gb: int) -> Any:
        has_room = torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory >= min_gb << 30
        return pytest.mark.skipif(not has_room, reason=f"needs a GPU with {min_gb} GiB")

    module = types.ModuleType("tests.utils")
    module.__dict__.update(large_gpu_test=large_gpu_test, set_random_seed=set_random_seed)
    sys.modules["tests.utils"] = module


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the sample of what -k has left."""
    kept = set(sample(sorted(item.nodeid for item in items), config.option.sample))
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in kept])
    items[:] = [item for item in items if item.nodeid in kept]


def sample(names: list[str], limit: int) -> list[str]:
    """At most `limit` of the tests, at random but always the same, from all functions in turn; all of them if it is 0."""
    if not limit:
        return names
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[name.partition("[")[0]].append(name)
    for function, group in groups.items():
        random.Random(f"{SEED} {function}").shuffle(group)
        del group[LONG.get(function.rpartition("::")[2], len(group)) :]
    rounds = [group[i] for i in range(max(map(len, groups.values()), default=0)) for group in groups.values() if i < len(group)]
    return rounds[:limit]


class _Recorder:
    """Installs the override, and writes down what became of each test and what the ops counted in it."""

    def __init__(self, records: Path, bundle: Path | None) -> None:
        self._lines = records.open("w")
        self._bundle = bundle

    def pytest_sessionstart(self) -> None:
        if self._bundle is None:
            return
        import hdispatch

        hdispatch.load(self._bundle)
        self._override = hdispatch.override_vllm_ops()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        refused = self._override.refused if self._bundle else {}
        self._write({"collected": [item.nodeid for item in session.items], "refused": refused})

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._outcome, self._message = "passed", ""
        self._write({"started": item.nodeid})  # a crash of the process is this test's
        self._count()
        try:
            return (yield)
        finally:
            record = {"test": item.nodeid, "outcome": self._outcome, "message": self._message, "ops": self._count()}
            self._write(record)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._outcome, self._message = "failed", f"{report.when}: {str(report.longrepr)[-1500:]}"
        elif report.skipped and self._outcome == "passed":
            self._outcome = "skipped"

    def _count(self) -> dict[str, Any]:
        """The counters of the ops that were called since the last time."""
        if self._bundle is None:
            return {}
        import hdispatch

        counted = hdispatch.stats(reset=True)
        return {op: c for op, c in counted.items() if c["hits"] or c["empty"] or c["misses"]}

    def _write(self, record: dict[str, Any]) -> None:
        self._lines.write(json.dumps(record) + "\n")
        self._lines.flush()


@pytest.fixture
def default_vllm_config() -> Iterator[Any]:
    """As in vLLM's conftest."""
    from vllm.config import VllmConfig, set_current_vllm_config

    config = VllmConfig()
    with set_current_vllm_config(config):
        yield config


@pytest.fixture
def dist_init() -> None:
    """Nothing: the layers of the tests that ask for a process group ask for no group themselves."""


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """The default device, Dynamo's caches and much memory, as vLLM's conftest leaves them after each test."""
    import torch

    yield
    torch.set_default_device(None)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if torch.cuda.is_available() and torch.cuda.memory_reserved() > MUCH:
        torch.cuda.empty_cache()  # other processes run tests beside this one

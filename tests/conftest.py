"""What every test is given: the process's environment as it was, and its share of the CPUs where tests run side by side.

Helion writes TRITON_CACHE_DIR when it compiles, and a later test would read it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import forked
import pytest

#: CPUs of this process: pytest-xdist's workers share them.
CPUS = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def pytest_configure(config: pytest.Config) -> None:
    """One thread a CPU in torch, here and in processes that tests start: those of another test's CPU wait in a busy loop.

    Processes to fork from are xdist's workers' together: whoever starts these has them.
    """
    if not config.getoption("numprocesses", None):  # else the workers, which would inherit it, have their own share
        os.environ.setdefault("OMP_NUM_THREADS", str(CPUS))
    if "PYTEST_XDIST_WORKER" not in os.environ and importlib.util.find_spec("triton") is not None:
        folder = tempfile.TemporaryDirectory(prefix="hdispatch-test-")
        stack = contextlib.ExitStack()
        stack.enter_context(folder)
        stack.enter_context(forked.serving(Path(folder.name)))
        config.add_cleanup(stack.close)


#: Tests that take minutes: side by side with all others, or one CPU waits for them at the end.
FIRST = ("tests/cpu/test_records.py", "tests/cpu/test_special_values.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones first."""
    items.sort(key=lambda item: not item.nodeid.startswith(FIRST))


@pytest.fixture(autouse=True, scope="session")
def compilers() -> Iterator[None]:
    """One compiling process a CPU where a test does not say how many. They are forked of one that has imported all."""
    try:
        from hdispatch.compile import pool
    except ImportError:  # an environment that serves and does not compile
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "available_cpus", lambda: CPUS)
        patch.setattr(pool, "_COMMAND", forked.worker(*pool._COMMAND[3:]))
        yield


@contextmanager
def kept_environment() -> Iterator[None]:
    """Undoes what the block does to `os.environ`, but for what pytest itself notes there."""
    before = dict(os.environ)
    yield
    for name in {*before, *os.environ} - {"PYTEST_CURRENT_TEST"}:
        if name not in before:
            del os.environ[name]
        elif os.environ.get(name) != before[name]:
            os.environ[name] = before[name]


@pytest.fixture(autouse=True, scope="module")
def environment_of_the_module() -> Iterator[None]:
    """Around fixtures of the module, which compile too."""
    with kept_environment():
        yield


@pytest.fixture(autouse=True)
def environment_of_the_test(environment_of_the_module: None) -> Iterator[None]:
    """Around each test."""
    with kept_environment():
        yield

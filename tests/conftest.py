"""What every test is given: the process's environment as it was, whatever a test or a compiler has written to it.

Helion writes TRITON_CACHE_DIR when it compiles, and a later test would read it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


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

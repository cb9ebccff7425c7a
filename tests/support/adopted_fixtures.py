"""Fixtures of the tests of adopted Triton kernels: Triton over a libcuda that records, a kernel that has served a call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import adopted_kernels as kernels
import hdispatch
import pytest
import triton_stub
from adopted_calls import ADD, fresh, served


@pytest.fixture(scope="module")
def stub() -> Iterator[triton_stub.Stub]:
    with triton_stub.installed() as made:
        yield made


@pytest.fixture
def left_alone(stub: triton_stub.Stub) -> Iterator[None]:
    """Counters from zero before, and nothing adopted after."""
    hdispatch.stats(reset=True)
    yield
    hdispatch.unadopt()


@pytest.fixture
def add(stub: triton_stub.Stub, left_alone: None) -> Any:
    """A kernel that has served ADD."""
    kernel = hdispatch.adopt(fresh(kernels.add), driver="null")
    assert not served(kernel, *ADD, BLOCK=256)
    assert served(kernel, *ADD, BLOCK=256)
    return kernel

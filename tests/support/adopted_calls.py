"""What the tests of adopted Triton kernels share: calls and what they launched, kernels of one's own, counters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import hdispatch
import torch
import triton
from hdispatch.testing import null


def misses(kernel: Any) -> dict[str, int]:
    return dict(counts(kernel)["misses"])


def counts(kernel: Any) -> dict[str, Any]:
    function = kernel
    while not isinstance(function, triton.JITFunction):
        function = function.fn
    return hdispatch.stats()[f"adopted {function.fn.__module__}.{function.fn.__qualname__}"]


def launched(call: Callable[[], Any]) -> tuple[Any, dict[str, Any] | None]:
    """What a call returned, and what it launched from C++; None if Triton launched."""
    with null.recording():
        result = call()
        found = null.launches()
    assert len(found) <= 1
    return result, found[0] if found else None


def fresh(function: Any, **options: Any) -> Any:
    """A kernel of its own."""
    return triton.jit(function.fn, **options)


X, Y, OUT = (torch.zeros(4096) for _ in range(3))


def served(kernel: Any, *args: Any, **keywords: Any) -> bool:
    return launched(lambda: kernel[(4,)](*args, **keywords))[1] is not None


ADD = (X, Y, OUT, 1000)


def wrapper(kernel: Any) -> Any:
    """A copy of an autotuner or of heuristics or of one around the other, around a kernel of its own."""
    made = copy.copy(kernel)
    made.fn = fresh(kernel.fn) if isinstance(kernel.fn, triton.JITFunction) else wrapper(kernel.fn)
    if hasattr(kernel, "cache"):
        made.cache = {}
    return made

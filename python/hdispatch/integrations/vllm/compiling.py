"""Triton kernels compiled side by side: what a call would compile one after the other as it launches."""

from __future__ import annotations

import concurrent.futures
import os
import threading
from collections.abc import Callable
from typing import Any

import torch

#: Compilers at once: a kernel is one thread's work, and the passes and assemblers behind it run without the GIL.
WORKERS = 8


def compile_side_by_side(call: Callable[[], Any], jit: Any, device: torch.device) -> None:
    """Make a call of which Triton launches nothing, but compiles and loads, in threads, what it would have launched.

    What kernels would have written holds anything: the call must not look at it. A kernel that cannot be compiled says so
    when it is launched.

    jit     Triton's JITFunction, in which every launch ends
    device  where the call's tensors are
    """
    launch = jit.run
    caller, pool = threading.get_ident(), concurrent.futures.ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1))

    def load(kernel: Any, given: Any, named: Any) -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # of this thread
        compiled = launch(kernel, *given, warmup=True, **named)
        if compiled is not None:
            compiled._init_handles()

    def run(kernel: Any, *given: Any, warmup: bool, **named: Any) -> Any:
        if warmup or threading.get_ident() != caller:
            return launch(kernel, *given, warmup=warmup, **named)
        pool.submit(load, kernel, given, named)
        return None

    with pool:  # left when all are compiled
        jit.run = run
        try:
            call()
        finally:
            jit.run = launch

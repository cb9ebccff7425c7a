"""A full launch queue blocks nobody but the thread that launches: host functions in Python, and other threads, go on."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch

from .test_ops import OPS
from .test_order import make

import hdispatch  # isort: skip

LIBRARY = os.environ.get("HDISPATCH_VLLM_OPS")
LAUNCHES = 6000
OP = "dynamic_per_token_scaled_fp8_quant"
assert OP in OPS

#: A host function in Python waits on the stream for its turn to run Python, while launches fill the queue behind it.
HOST_FUNCTION = """
import ctypes, time, torch, hdispatch
from hdispatch.integrations.vllm import override_vllm_ops

bundle, library, door = {bundle!r}, {library!r}, {door!r}
hdispatch.load(bundle)
x = torch.randn(16, 4096, device="cuda").bfloat16()
args = (torch.empty_like(x, dtype=torch.float8_e4m3fn), x, torch.empty(16, 1, device="cuda"), None)
if library:
    torch.ops.load_library(library)
y = torch.empty_like(x)
calls = {{
    "torch.add": lambda: torch.add(x, x, out=y),
    "hdispatch.ops": lambda: hdispatch.ops.{op}(*args),
    "torch.ops": lambda: torch.ops.hdispatch.{op}(*args),
    "torch.ops default": lambda: torch.ops.hdispatch.{op}.default(*args),
    "overridden": lambda: torch.ops._C.{op}(*args),
    "overridden default": lambda: torch.ops._C.{op}.default(*args),
}}
if door.startswith("overridden"):
    override_vllm_ops()
call = calls[door]
call()
torch.cuda.synchronize()
ran = []
callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: (time.sleep(0.3), ran.append(1)))
stream = torch.cuda.current_stream().cuda_stream
assert ctypes.CDLL("libcuda.so.1").cuLaunchHostFunc(ctypes.c_void_p(stream), callback, None) == 0
for _ in range({launches}):
    call()
torch.cuda.synchronize()
assert ran == [1]
print("served", hdispatch.stats()["{op}"]["hits"])
"""


@pytest.mark.parametrize(
    "door", ["torch.add", "hdispatch.ops", "torch.ops", "torch.ops default", "overridden", "overridden default"]
)
def test_a_host_function_in_python(bundle_dir, door):
    if door.startswith("overridden") and not LIBRARY:
        pytest.skip("HDISPATCH_VLLM_OPS names no library of vLLM's ops")
    code = textwrap.dedent(HOST_FUNCTION).format(
        bundle=str(bundle_dir), library=LIBRARY or "", door=door, op=OP, launches=LAUNCHES
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    assert door == "torch.add" or int(done.stdout.split()[1]) >= LAUNCHES


def longest_stop(call) -> float:
    """Seconds that another Python thread stands still, at most, while `call` runs into a full queue."""
    longest, stop = 0.0, threading.Event()

    def watch() -> None:
        nonlocal longest
        last = time.perf_counter()
        while not stop.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now

    thread = threading.Thread(target=watch)
    torch.cuda.synchronize()
    thread.start()
    torch.cuda._sleep(1_500_000_000)  # most of a second
    for _ in range(3000):
        call()
    stop.set()
    thread.join()
    torch.cuda.synchronize()
    return longest


def test_other_threads_run_while_the_queue_is_full(bundle):
    x = torch.randn(16, 4096, device="cuda")
    args = make(OP, 16)
    op = getattr(hdispatch.ops, OP)
    op(*args)
    torch.add(x, x, out=x)
    theirs = longest_stop(lambda: torch.add(x, x, out=x))
    for call in (op, getattr(torch.ops.hdispatch, OP)):
        assert longest_stop(lambda call=call: call(*args)) <= max(2 * theirs, 0.05)


def test_another_context_is_current(bundle):
    """Somebody's own CUDA context on top of torch's: launches go on in the right one, and the other stays current."""
    import ctypes

    cuda = ctypes.CDLL("libcuda.so.1")
    args = make(OP, 16)
    op = getattr(hdispatch.ops, OP)
    with hdispatch.strict():
        op(*args)
    expected = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    torch.cuda.synchronize()
    device, other, current = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
    assert cuda.cuDeviceGet(ctypes.byref(device), 0) == 0
    create = cuda.cuCtxCreate_v2
    assert create(ctypes.byref(other), 0, device) == 0
    try:
        before = hdispatch.stats()[OP]["hits"]
        with hdispatch.strict():
            for _ in range(3):
                op(*args)
        assert hdispatch.stats()[OP]["hits"] == before + 3
        assert cuda.cuCtxGetCurrent(ctypes.byref(current)) == 0
        assert current.value == other.value
    finally:
        popped = ctypes.c_void_p()
        cuda.cuCtxPopCurrent_v2(ctypes.byref(popped))
        cuda.cuCtxDestroy_v2(other)
    torch.cuda.synchronize()
    for got, wanted in zip(args, expected, strict=True):
        if isinstance(got, torch.Tensor):
            assert torch.equal(got.float(), wanted.float())

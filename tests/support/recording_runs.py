"""A user's Triton kernels, and a run that compiles them on a described GPU: what the tests of recording record."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

KERNELS = """
import enum
import triton
import triton.language as tl

SCALE = tl.constexpr(3)

class Mode(enum.IntEnum):
    PLAIN = 0
    TWICE = 1

@triton.jit
def square(x):
    return x * x * SCALE

@triton.jit
def cube(x):
    return x * x * x

@triton.jit
def plain(out, x, elements, FUNCTION: tl.constexpr, DTYPE: tl.constexpr, PAIR: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x + at, at < elements).to(DTYPE)
    tl.store(out + at, FUNCTION(y) * PAIR[0] + PAIR[1], at < elements)

@triton.autotune([triton.Config({"BLOCK": b}, num_warps=w) for b, w in ((128, 4), (256, 8))], key=["elements"])
@triton.heuristics({"EVEN": lambda args: args["elements"] % 16 == 0})
@triton.jit
def tuned(out, x, elements, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, at < elements) + (1 if EVEN else 2), at < elements)

@triton.jit
def moded(out, x, MODE: tl.constexpr):
    tl.store(out, tl.load(x) * 2 if MODE == 1 else tl.load(x))

@triton.autotune([triton.Config({"BLOCK": b}) for b in (16, 64, 1024)], key=["stride"])
@triton.jit
def picky(out, x, stride, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK >= 64, "rows are not whole")
    at = tl.arange(0, 64)[:, None] * stride + tl.arange(0, BLOCK)[None, :]
    a = tl.load(x + at)
    rows = tl.arange(0, 64)
    tl.store(out + rows[:, None] * 64 + rows[None, :], tl.dot(a, tl.trans(a)))

def nested():
    @triton.jit
    def inside(out, BLOCK: tl.constexpr):
        tl.store(out + tl.arange(0, BLOCK), 1.0)
    return inside
"""


#: Compiles them, as a run with a GPU would on its first calls.
RUN = """
import triton
import triton.language as tl
from triton.runtime.jit import MockTensor
import torch

def run(kernels):
    import triton.runtime.jit
    pointer = MockTensor(torch.float32)
    made = {}
    for elements in (1, 16, 1000):
        for function in (kernels.square, kernels.cube):
            made[elements, function.fn.__name__] = kernels.plain.warmup(
                pointer, pointer, elements, function, tl.float32, (2, 3), BLOCK=128, grid=(1,))
    made["warps"] = kernels.plain.warmup(
        pointer, pointer, 16, kernels.cube, tl.float32, (2, 3), BLOCK=128, grid=(1,), num_warps=8, num_stages=2)
    for mode in kernels.Mode:
        made[mode] = kernels.moded.warmup(pointer, pointer, mode, grid=(1,))
    for config in kernels.tuned.configs:
        made["tuned", config.num_warps] = kernels.tuned.fn.fn.warmup(
            pointer, pointer, 64, True, BLOCK=config.kwargs["BLOCK"], num_warps=config.num_warps, grid=(1,))
    for config in kernels.picky.configs:
        try:
            made["picky", config.kwargs["BLOCK"]] = kernels.picky.fn.warmup(
                pointer, pointer, 1024, **config.kwargs, num_warps=4, grid=(1,))
        except triton.compiler.errors.CompileTimeAssertionFailure as error:
            assert config.kwargs["BLOCK"] == 16 and "rows are not whole" in str(error) and "BLOCK >= 64" in str(error), error
            made["refused"] = error
    assert "refused" in made
    return {name: each for name, each in made.items() if name != "refused"}
"""


DESCRIBED = """
from hdispatch.compile import target
target.install(target.DESCRIBED[{gpu!r}])
"""


def python(project: Path, text: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh process of the project with cold caches."""
    cold = {"TRITON_CACHE_DIR": str(project / f"triton-{os.urandom(4).hex()}")}
    return subprocess.run(
        [sys.executable, "-c", text],
        env={**os.environ, "PYTHONPATH": str(project), **cold, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def write_project(folder: Path) -> Path:
    """A folder with the kernels of a user, and a run of them."""
    (folder / "user_kernels.py").write_text(KERNELS)
    (folder / "user_run.py").write_text(RUN)
    return folder

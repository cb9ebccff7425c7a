"""Lists and functions as compile-time constants: of Triton kernels, by the host function; of Helion kernels, by the module."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hdispatch.bundle_reader import read_bundle
from hdispatch.compile import build
from hdispatch.errors import BuildError

SPEC = """
import torch
from hdispatch.opspec import OpSpec, TensorArg

def reference(x, out):
    out.copy_(x)

def sample(variant, sizes, device, generator):
    x = torch.randn((sizes["M"], sizes["K"]), generator=generator, device=device)
    return [x, torch.full_like(x, float("nan"))]

SPEC = OpSpec(
    name="NAME",
    args=(TensorArg("x", ("M", "K"), (torch.float32,)), TensorArg("out", ("M", "K"), "x", mutated=True, returned=True)),
    reference=reference, sample=sample, shapes=({"K": 64},), config_key={"width": "K", "rows": "M"}, ladder=(1, 16, 256),
)
"""

TRITON = """
import torch
import triton
import triton.language as tl

def make(power):
    if power == 2:
        @triton.jit
        def function(x):
            return x * x
    else:
        @triton.jit
        def function(x):
            return x * x * x
    return function

FUNCTIONS = {2: make(2), 3: make(3)}  # of one name

@triton.jit
def kernel(x, out, elements, FUNCTION: tl.constexpr, PAIR: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    tl.store(out + at, FUNCTION(tl.load(x + at, at < elements)) * PAIR[0] + PAIR[1], at < elements)

def launch(x, *, config, _launcher):
    out = torch.empty_like(x)
    elements = x.size(0) * x.size(1)
    _launcher(kernel, ((elements + 127) // 128,), x, out, elements, FUNCTIONS[config["power"]], config["pair"], SIZE=128)
    return out
"""

HELION = """
import helion
import helion.language as hl
import torch

def squared(value):
    return value * value

CONSTANTS = {"epilogue": squared, "factors": [2, 3]}

@helion.kernel(static_shapes=False, index_dtype=torch.int64)
def KERNEL(x: torch.Tensor, epilogue, factors: list[int]) -> torch.Tensor:
    m, k = x.size()
    k = hl.specialize(k)
    out = torch.empty_like(x)
    for rows in hl.tile(m):
        out[rows, :] = epilogue(x[rows, :]) * factors[0] + factors[1]
    return out
"""


def package(folder: Path, name: str, kernel: dict[str, str], entries: list[dict[str, object]] | None = None) -> str:
    """An op's package in a folder that can be imported from."""
    where = folder / name
    (where / "configs").mkdir(parents=True)
    (where / "__init__.py").write_text("")
    (where / "spec.py").write_text(SPEC.replace("NAME", name))
    for file, text in kernel.items():
        (where / file).write_text(text)
    if entries:
        (where / "configs" / "nvidia_h200.json").write_text(json.dumps(entries))
    return str(where)


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])


def entry(rows: int, power: int, pair: list[object]) -> dict[str, object]:
    return {"key": {"width": 64, "rows": rows}, "config": {"power": power, "pair": pair}}


@pytest.mark.parametrize(("power", "pair"), [(3, [2, 1]), (2, [4, 1])], ids=["function", "list"])
def test_tuples_and_functions_of_triton(tmp_path, power, pair):
    """Functions of one name are told apart, and so are lists."""
    op = f"triton_constants_{power}"
    name = package(tmp_path, op, {"triton.py": TRITON}, [entry(1, 2, [2, 1]), entry(16, 2, [2, 1]), entry(256, power, pair)])
    build([op], "h200", tmp_path / "b", cache=tmp_path / "cache", extra=[name], jobs=1)
    manifest, _ = read_bundle(tmp_path / "b")
    one, other = (manifest["records"][row["record"]]["cubins"]["mult16"] for row in manifest["rows"] if row["bucket"])
    assert one["file"] != other["file"]
    assert len(one["params"]) == 3, "neither is a parameter"


def test_a_list_of_sizes_is_refused(tmp_path):
    kernel = TRITON.replace('config["pair"]', "[x.size(0), 1]")
    name = package(tmp_path, "triton_sizes", {"triton.py": kernel}, [entry(1, 2, [1, 1])])
    with pytest.raises(BuildError, match="PAIR is a list; pass its elements one by one"):
        build(["triton_sizes"], "h200", tmp_path / "b", cache=tmp_path / "cache", extra=[name], jobs=1)


def test_lists_and_functions_of_helion(tmp_path):
    name = package(tmp_path, "helion_constants", {"helion.py": HELION})
    build(["helion_constants"], "h200", tmp_path / "b", cache=tmp_path / "cache", extra=[name], jobs=1)
    manifest, _ = read_bundle(tmp_path / "b")
    assert {param["arg"] for record in manifest["records"] for param in record["params"] if "arg" in param} == {"x", "out"}


def test_constants_that_the_kernel_does_not_have(tmp_path):
    name = package(tmp_path, "helion_others", {"helion.py": HELION.replace('"factors": [2', '"others": [2')})
    with pytest.raises(BuildError, match=r"CONSTANTS is .*; KERNEL has \['epilogue', 'factors'\] behind the op's arguments"):
        build(["helion_others"], "h200", tmp_path / "b", cache=tmp_path / "cache", extra=[name], jobs=1)

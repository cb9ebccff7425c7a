"""scripts/compare_artifacts.py: rows whose machine code or launch differs are found, names of kernels and sources are not."""

from __future__ import annotations

import copy
import importlib.util
import json
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import forked
import pytest
import toy

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare_artifacts.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_artifacts", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


TOOL = load()


def elf(machine: int, sections: list[tuple[str, int, bytes, int]]) -> bytes:
    """An ELF file of (name, type, content, link); the section names come first, as section 0."""
    names = b"\0" + b"\0".join(name.encode() for name, *_ in sections) + b"\0"
    bodies = [names, *(content for _, _, content, _ in sections)]
    offsets = [64 + sum(map(len, bodies[:i])) for i in range(len(bodies))]
    table = struct.pack("<IIQQQQI20x", 0, 3, 0, 0, offsets[0], len(names), 0)
    for (name, kind, content, link), offset in zip(sections, offsets[1:], strict=True):
        at = names.index(b"\0" + name.encode() + b"\0") + 1
        table += struct.pack("<IIQQQQI20x", at, kind, 0, 0, offset, len(content), link)
    start = 64 + sum(map(len, bodies))
    head = (
        b"\x7fELF\2\1\1" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, 0, 0, start, 0, 64, 0, 0, 64, len(bodies), 0)
    )
    return head + b"".join(bodies) + table


def cubin(name: str, code: bytes = b"code", constants: bytes = b"constants") -> bytes:
    return elf(TOOL.EM_CUDA, [(f".text.{name}", 1, code, 0), (f".nv.constant0.{name}", 1, constants, 0), (".note", 1, b"x", 0)])


def library(*functions: tuple[str, bytes]) -> bytes:
    """A shared library that exports functions, in reverse order of its symbols, each with a cubin."""
    names = b"\0" + b"\0".join(f"__tvm_ffi_{name}".encode() for name, _ in functions) + b"\0other\0"
    symbols = struct.pack("<IBBHQQ", names.index(b"other"), 0, 0, 1, 0, 0)
    for index, (name, _) in reversed(list(enumerate(functions))):
        symbols += struct.pack("<IBBHQQ", names.index(f"__tvm_ffi_{name}\0".encode()), 0, 0, 1, 100 * (index + 1), 0)
    data = b"".join(code for _, code in functions)
    return elf(62, [(".dynsym", 11, symbols, 2), (".dynstr", 3, names, 0), (".rodata", 1, data, 0)])


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (cubin("kernel"), True),
        (cubin("renamed_kernel"), True),
        (cubin("kernel", code=b"edoc"), False),
        (cubin("kernel", constants=b"longer constants"), False),
    ],
    ids=["same", "renamed", "other code", "other constants"],
)
def test_the_machine_code_of_a_cubin_has_no_names(other, same):
    assert (TOOL.machine_code(cubin("kernel")) == TOOL.machine_code(other)) is same


def test_functions_have_the_code_that_lies_at_their_place():
    first, second = cubin("a", code=b"one"), cubin("b", code=b"two")
    found = TOOL.code_of_functions(library(("f_1", first), ("g_2", second)))
    assert found == {"f_1": TOOL.machine_code(first), "g_2": TOOL.machine_code(second)}
    assert TOOL.code_of_functions(library(("g_9", second), ("f_8", first))) == {"f_8": found["f_1"], "g_9": found["g_2"]}


def test_a_function_without_one_cubin_stands_for_all():
    one, two = cubin("a"), cubin("b", code=b"two")
    found = TOOL.code_of_functions(library(("f", one + two), ("g", one)))
    assert found["f"] == found["g"] != TOOL.code_of_functions(library(("f", one + one), ("g", one)))["f"]


@pytest.mark.parametrize(
    ("first", "second", "how"),
    [
        ({"function": "f_old"}, {"function": "f_new"}, None),  # of other sources
        ({"function": "f_old"}, {"function": "g_new"}, "other code"),
        ({"function": "f_old"}, {"function": "f_new", "pdl": False}, "other pdl"),
    ],
    ids=["renamed", "other code", "other launch"],
)
def test_host_functions_are_compared_by_their_kernels(first, second, how):
    record: dict[str, Any] = {"launcher": "tvm_ffi", "args": [], "pdl": True, "guards": []}
    code = {"f_old": "1", "f_new": "1", "g_new": "2"}
    before, after = ({"row": TOOL.artifact(record | each, code)} for each in (first, second))
    assert TOOL.compare(before, after) == ([("row", how)] if how else [])


def run(*arguments: object) -> tuple[int, list[str]]:
    done = subprocess.run(forked.python(SCRIPT, *arguments), capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.splitlines()


def test_bundles(tmp_path):
    plain = toy.manifest(variants=("bfloat16",))
    plain["records"].append(copy.deepcopy(plain["records"][0]))
    edited = copy.deepcopy(plain)
    edited["records"][1]["cubins"]["other"]["file"] = edited["records"][1]["cubins"]["one"]["file"]
    plain["rows"][3]["record"] = edited["rows"][3]["record"] = 1
    less = copy.deepcopy(plain)
    less["records"], less["rows"] = less["records"][:1], [row for row in less["rows"] if not row["record"]]
    before, after, part = (toy.write(tmp_path / name, each) for name, each in (("a", plain), ("b", edited), ("c", less)))
    rows, changed = len(plain["rows"]), "toy bfloat16 K=64 N=0 bucket 3"
    assert run(before, before) == (0, [json.dumps({"rows": rows, "differ": 0})])
    assert run(before, after) == (1, [f"{changed}: other cubins", json.dumps({"rows": rows, "differ": 1})])
    assert run(before, part) == (1, [f"{changed}: only in BEFORE", json.dumps({"rows": rows, "differ": 1})])
    assert run(before, part, "--common") == (0, [json.dumps({"rows": rows - 1, "differ": 0})])
    assert run(before, after, "--ops", "another") == (0, [json.dumps({"rows": 0, "differ": 0})])

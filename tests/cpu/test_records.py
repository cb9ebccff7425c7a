"""Every record against a run of its host function with everything known: grid, every parameter's bytes, which code.

Twice: evaluated here in Python, and by the C++ core through the null driver.
"""

from __future__ import annotations

import queue
import re
import struct
import subprocess
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hdispatch
import pytest
import torch
import triton
from hdispatch.build import build, pool
from hdispatch.build.expr import evaluate
from hdispatch.build.trace import FLOAT_HINT
from hdispatch.build.unit import HINT, class_of
from hdispatch.manifest import Manifest, Record, read_bundle
from hdispatch.opspec import FloatArg, OpSpec, bucket_index
from hdispatch.testing import null
from in_worker import InWorker
from triton_example.spec import SPEC as EXAMPLE

pytestmark = pytest.mark.slow

MS = (1, 2, 3, 15, 16, 17, 64, 127, 1000, 8192)
FORMATS = {"i1": (1, True), "i8": (1, True), "i16": (2, True), "i32": (4, True), "i64": (8, True)}

if EXAMPLE.name not in hdispatch.ops.names():
    hdispatch.ops.define(EXAMPLE)


def row_padding(m: int) -> int:
    """Rows are contiguous for some Ms and not for others. The stride of a single row means nothing: it is its width."""
    return 0 if m in (1, 3, 17, 64, 1000) else 16


@dataclass
class Case:
    """A record as used by one op, variant and shape, with the Ms that its rows serve and what is expected there."""

    op: str
    variant: str
    shape: dict[str, int]
    record: Record
    ms: list[int] = field(default_factory=list)
    expected: list[dict[str, Any]] = field(default_factory=list)

    @property
    def spec(self) -> OpSpec:
        """The op's declaration."""
        return hdispatch.ops.spec(self.op)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """All ops and the plain Triton example, through the user's build cache."""
    folder = tmp_path_factory.mktemp("bundle") / "h200"
    build(None, "h200", folder, extra=["triton_example"])
    return folder


@pytest.fixture(scope="module")
def cases(bundle) -> list[Case]:
    found = collect(read_bundle(bundle)[0])
    waiting: queue.SimpleQueue[Case] = queue.SimpleQueue()
    for case in found:
        waiting.put(case)
    errors: list[BaseException] = []
    threads = [threading.Thread(target=fill, args=(waiting, errors)) for _ in range(min(4, pool.available_cpus()))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found


def collect(manifest: Manifest) -> list[Case]:
    found: dict[tuple, Case] = {}
    for row in manifest["rows"]:
        if manifest["records"][row["record"]]["launcher"] == "tvm_ffi":  # nothing is traced: see test_ll_gemm.py
            continue
        key = (row["record"], row["op"], row["variant"], row["K"], row["N"])
        shape = {name: row[name] for name in ("K", "N") if row[name]}
        case = found.setdefault(key, Case(row["op"], row["variant"], shape, manifest["records"][row["record"]]))
        case.ms += [m for m in MS if bucket_index(manifest["ops"][row["op"]]["ladder"], m) == row["bucket"]]
    return [case for case in found.values() if case.ms]


def fill(waiting: queue.SimpleQueue[Case], errors: list[BaseException]) -> None:
    """Asks a worker process what each case's host function does."""
    worker = InWorker()
    try:
        while not errors:
            case = waiting.get_nowait()
            package, _, backend = case.record["kernel"].rpartition(".")
            hint = 1 if case.record["m_max"] == 1 else HINT
            calls = [[m, row_padding(m)] for m in case.ms]
            arguments = (package, backend, case.variant, case.shape, case.record["config"], hint, calls)
            case.expected = worker.call("concrete_launches:expect", *arguments)
    except queue.Empty:
        return
    except BaseException as error:
        errors.append(error)
    finally:
        worker.close()


def sizes_of(case: Case, m: int) -> dict[str, int]:
    """The leaves of a call's expressions."""
    symbols = {"K": 0, "N": 0, **case.shape, "M": m}
    strides = {}
    for arg in case.spec.tensors():
        if arg.row_strided:
            width = 1
            for size in case.spec.tensor_sizes(arg, symbols)[1:]:
                width *= size
            strides[f"{arg.name}.stride(0)"] = width + row_padding(m)
    return {**symbols, **strides}


def evaluated(param: dict[str, Any], sizes: dict[str, int]) -> list[Any]:
    """A parameter as `concrete_launches` has it, without its name."""
    if param["kind"] == "ptr":
        return [param["arg"], evaluate(param.get("offset", [0]), sizes)]
    if param["kind"] == "tensor_map":
        listed = ([evaluate(value, sizes) for value in param["map"][name]] for name in ("shape", "strides"))
        return [param["arg"], evaluate(param.get("offset", [0]), sizes), *listed]
    if param["kind"] in FORMATS:
        size, signed = FORMATS[param["kind"]]
        return [evaluate(param["value"], sizes).to_bytes(size, "little", signed=signed).hex()]
    return [struct.pack({"f32": "<f", "f64": "<d"}[param["kind"]], param.get("const", FLOAT_HINT)).hex()]


def test_every_row_is_covered(cases, bundle):
    covered: dict[tuple, set[int]] = defaultdict(set)
    for case in cases:
        covered[case.op, case.variant, *case.shape.values()] |= set(case.ms)
    manifest = read_bundle(bundle)[0]
    rows = [row for row in manifest["rows"] if manifest["records"][row["record"]]["launcher"] == "cubin"]
    assert {row["op"] for row in rows} >= {EXAMPLE.name, *hdispatch.build.available_ops()} - {"ll_gemm_bf16", "ll_gemm_fp8"}
    assert len(covered) == len({(row["op"], row["variant"], row["K"], row["N"]) for row in rows})
    assert all(ms == set(MS) for ms in covered.values())


def test_records_evaluated_in_python(cases):
    for case in cases:
        for m, expected in zip(case.ms, case.expected, strict=True):
            where = (case.op, case.variant, case.shape, m)
            sizes = sizes_of(case, m)
            assert case.record["m_min"] <= m <= case.record["m_max"], where
            assert all(evaluate(guard["expr"], sizes) for guard in case.record["guards"]), where
            assert [evaluate(size, sizes) for size in case.record["grid"]] == expected["grid"], where
            code = case.record["cubins"][class_of(m)]
            params = [evaluated(case.record["params"][index], sizes) for index in code["params"]]
            assert params == [param[1:] for param in expected["params"]], where
            assert expected["false_hints"] == [], where


def arguments(case: Case, m: int) -> list[Any]:
    """Arguments of a call on the CPU. Their memory is never touched, so their size does not matter."""
    spec, variant = case.spec, case.spec.variant(case.variant)
    made: list[Any] = []
    for arg in spec.args:
        if isinstance(arg, FloatArg):
            made.append(FLOAT_HINT)
        elif arg.name in variant.none:
            made.append(None)
        else:
            sizes = spec.tensor_sizes(arg, {**case.shape, "M": m})
            if arg.row_strided:
                whole = torch.empty(sizes[0], sizes[1] + row_padding(m), dtype=variant.dtypes[arg.name])
                made.append(whole[:, : sizes[1]])
            else:
                made.append(torch.empty(sizes, dtype=variant.dtypes[arg.name]))
    return made


def test_records_evaluated_by_the_core(cases, bundle):
    loaded = hdispatch.load(bundle, driver="null")
    try:
        with hdispatch.strict(), torch.inference_mode():
            for case in cases:
                for m, expected in zip(case.ms, case.expected, strict=True):
                    check_launch(case, m, expected)
    finally:
        loaded.unload()


def check_launch(case: Case, m: int, expected: dict[str, Any]) -> None:
    where = (case.op, case.variant, case.shape, m)
    args = arguments(case, m)
    with null.recording():
        getattr(hdispatch.ops, case.op)(*args)
    (launch,) = null.launches()
    code = case.record["cubins"][class_of(m)]
    tensors = {arg.name: value for arg, value in zip(case.spec.args, args, strict=True) if isinstance(value, torch.Tensor)}
    passed = [described(param) for param in launch["params"]]
    assert passed == [*(wanted(param, tensors) for param in expected["params"]), bytes(8), bytes(8)], where
    assert list(launch["grid"]) == expected["grid"], where
    assert (launch["file"], launch["function"]) == (code["file"], code["function"]), where
    assert (launch["block"], launch["shared"]) == ((32 * code["num_warps"], 1, 1), code["shared_bytes"]), where
    attributes = [launch[name] for name in ("pdl", "cooperative")] + [list(launch["cluster"])]
    assert attributes == [code["pdl"], code["cooperative"], code["cluster"]], where


def described(param: bytes) -> Any:
    """A parameter's bytes; of a TMA descriptor the address, sizes and strides."""
    if len(param) != 128:
        return param
    found = null.tensor_map(param)
    return [found["address"], found["shape"], found["strides"]]


def wanted(param: list[Any], tensors: dict[str, torch.Tensor]) -> Any:
    if len(param) == 2:
        return bytes.fromhex(param[1])
    tensor, address = tensors[param[1]], tensors[param[1]].data_ptr() + param[2]
    if len(param) == 3:
        return address.to_bytes(8, "little")
    return [address, param[3], [stride * tensor.itemsize for stride in param[4]]]


def test_code_waits_then_reads_then_releases(bundle):
    """Programmatic dependent launch in the machine code: nothing is read or written before the wait, and the dependents are
    released after the last read. (ACQBULK and PREEXIT are griddepcontrol.wait and .launch_dependents.)"""
    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    manifest, _ = read_bundle(bundle)
    names = {c["file"] for r in manifest["records"] if r["backend"] == "helion" for c in r["cubins"].values() if c["pdl"]}
    assert names
    for name in sorted(names):
        listing = subprocess.run([disassembler, bundle / name], capture_output=True, text=True, check=True).stdout
        steps = re.findall(r"\b(ACQBULK|PREEXIT|LDG|STG|LDL|STL)\b", listing)
        order = "".join({"ACQBULK": "w", "PREEXIT": "r", "LDG": "l", "STG": "s"}.get(step, "!") for step in steps)
        assert re.fullmatch(r"wl+rs+", order), f"{name}: {' '.join(steps)}"

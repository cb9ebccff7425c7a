"""Every record against a run of its host function with everything known: grid, every parameter's bytes, which code.

Twice: evaluated here in Python, and by the C++ core through the null driver.
"""

from __future__ import annotations

import itertools
import math
import queue
import re
import struct
import subprocess
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import hdispatch
import pytest
import shared
import torch
import triton
from hdispatch.bundle_reader import read_bundle
from hdispatch.compile import pool
from hdispatch.compile.build_unit import common_m
from hdispatch.compile.call_maker import FLOAT_HINT, CallMaker
from hdispatch.compile.expr import evaluate
from hdispatch.ladders import bucket_index
from hdispatch.manifest import LIBRARY, Manifest, Record, class_of
from hdispatch.opspec import BoolArg, FloatArg, IntArg, NoneArg, OpSpec, StrArg, TensorArg
from hdispatch.testing import null
from in_worker import InWorker
from sampled_build import build_sampled, form, is_stub, traits
from triton_example.spec import SPEC as EXAMPLE

pytestmark = pytest.mark.slow

MS = (1, 2, 3, 15, 16, 17, 64, 127, 1000, 8192)
#: For the sizes that a row leaves open: none that is listed anywhere.
OPEN = {"K": 768, "N": 256}
FORMATS = {"i1": (1, True), "i8": (1, True), "i16": (2, True), "i32": (4, True), "i64": (8, True)}

if EXAMPLE.name not in hdispatch.registry.names():
    hdispatch.registry.define(EXAMPLE)


def row_padding(m: int) -> int:
    """Rows are contiguous for some Ms and not for others."""
    return 0 if m in (3, 17, 64, 1000) else 16


@dataclass
class Case:
    """A record as used by one op, variant and shape, with the Ms that its rows serve and what is expected there.

    shape    of the rows; `sizes` has the ones that it leaves open too
    seconds  of an op with a second ladder, for each M a value of its integer that the record serves too
    """

    op: str
    variant: str
    shape: dict[str, int]
    record: Record
    ms: list[int] = field(default_factory=list)
    seconds: dict[int, int] = field(default_factory=dict)
    expected: list[dict[str, Any]] = field(default_factory=list)

    @property
    def spec(self) -> OpSpec:
        """The op's declaration."""
        return hdispatch.registry.spec(self.op)

    @property
    def sizes(self) -> dict[str, int]:
        """Every size of the calls but M."""
        has = self.spec.row_shape(self.variant, dict.fromkeys(self.spec.symbols(), 1))
        return {symbol: self.shape.get(symbol, OPEN[symbol]) if symbol in has else 0 for symbol in ("K", "N")}

    def leaves(self, m: int) -> dict[str, int]:
        """The leaves of a call's expressions."""
        return {**self.sizes, **self.maker.leaf_values(m, row_padding(m), self.second(m))}

    def second(self, m: int) -> dict[str, int]:
        """The integer with a second ladder at M = m, by name, if the op has one."""
        arg = self.spec.ladders.arg
        return {} if arg is None else {arg: self.seconds[m]}

    @cached_property
    def maker(self) -> CallMaker:
        """Makes the calls."""
        return CallMaker(self.spec, self.spec.variant(self.variant), self.sizes)


#: Ops whose rows are all host functions: nothing of them is traced.
FUNCTIONS = {"ll_gemm_bf16", "ll_gemm_fp8"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """All ops and the plain Triton example: every record, and the code of some. See `sampled_build`."""

    def make(folder: Path) -> None:
        build_sampled(folder / "h200", folder / "cache", ["triton_example"])

    return shared.folder(tmp_path_factory, "records", make) / "h200"


@pytest.fixture(scope="module")
def cases(bundle, tmp_path_factory) -> list[Case]:
    found = collect(read_bundle(bundle)[0])
    expected = shared.value(tmp_path_factory, "launches", lambda: launches(found))
    for case, its in zip(found, expected, strict=True):
        case.expected = its
    return found


def launches(found: list[Case]) -> list[list[dict[str, Any]]]:
    """What each case's host function does, as worker processes say."""
    waiting: queue.SimpleQueue[list[Case]] = queue.SimpleQueue()
    for _, sharing in itertools.groupby(found, key=lambda case: id(case.record)):
        waiting.put(list(sharing))
    errors: list[BaseException] = []
    threads = [threading.Thread(target=fill, args=(waiting, errors)) for _ in range(min(4, pool.available_cpus()))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [case.expected for case in found]


def served_ms(bucket: int, spec: OpSpec) -> list[int]:
    """Of MS, those of a bucket: all of them, but for an op that is closed, whose last bucket ends at the ladder's last edge."""
    ladders = spec.ladders
    last = ladders.m[-1] if spec.is_closed else max(MS)
    return [m for m in MS if m <= last and bucket in ladders.of_m(bucket_index(ladders.m, m))]


def collect(manifest: Manifest) -> list[Case]:
    """Every record at every M that it serves, and for each variant and shape that it serves at one M at least."""
    found: dict[tuple, Case] = {}
    for row in manifest["rows"]:
        if manifest["records"][row["record"]]["launcher"] == "tvm_ffi":  # nothing is traced: see test_ll_gemm.py
            continue
        key = (row["record"], row["op"], row["variant"], row["K"], row["N"])
        shape = {name: row[name] for name in ("K", "N") if row[name]}
        case = found.setdefault(key, Case(row["op"], row["variant"], shape, manifest["records"][row["record"]]))
        ladders = case.spec.ladders
        served = served_ms(row["bucket"], case.spec)
        case.ms += [m for m in served if m not in case.ms]
        if ladders.arg is not None:
            first, last = ladders.second_bounds(row["bucket"])
            case.seconds |= dict.fromkeys(served, last or first + 1000)
    cases = sorted((case for case in found.values() if case.ms), key=lambda case: manifest["records"].index(case.record))
    seen: dict[int, set[int]] = defaultdict(set)
    for index, case in enumerate(cases):
        case.ms = [m for m in case.ms if m not in seen[id(case.record)]] or [case.ms[index % len(case.ms)]]
        seen[id(case.record)] |= set(case.ms)
    return cases


def fill(waiting: queue.SimpleQueue[list[Case]], errors: list[BaseException]) -> None:
    """Asks a worker process what each case's host function does."""
    worker = InWorker()
    try:
        while not errors:
            for case in waiting.get_nowait():
                package, _, backend = case.record["kernel"].rpartition(".")
                hint = 1 if case.record["m_max"] == 1 else common_m(case.spec)
                calls = [[m, row_padding(m), case.second(m)] for m in case.ms]
                arguments = (package, backend, case.variant, case.sizes, case.record["config"], hint, calls)
                case.expected = worker.call("concrete_launches:expect", *arguments)
    except queue.Empty:
        return
    except BaseException as error:
        errors.append(error)
    finally:
        worker.close()


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
    manifest = read_bundle(bundle)[0]
    cubins = {index for index, record in enumerate(manifest["records"]) if record["launcher"] == "cubin"}
    traced = {row["op"] for row in manifest["rows"] if row["record"] in cubins}
    assert traced == {EXAMPLE.name, *hdispatch.compile.available_ops()} - FUNCTIONS
    rows: dict[int, set[tuple]] = defaultdict(set)
    ms: dict[int, set[int]] = defaultdict(set)
    for row in manifest["rows"]:
        served = served_ms(row["bucket"], hdispatch.registry.spec(row["op"]))
        if served:
            rows[row["record"]].add((row["op"], row["variant"], row["K"], row["N"]))
            ms[row["record"]] |= set(served)
    using_record = defaultdict(list)
    for case in cases:
        using_record[manifest["records"].index(case.record)].append(case)
    for index in cubins:
        using = using_record[index]
        assert {(c.op, c.variant, c.shape.get("K", 0), c.shape.get("N", 0)) for c in using} == rows[index]
        assert {m for case in using for m in case.ms} == ms[index]


def test_every_kind_of_code_is_compiled(bundle):
    """Of each kernel every trait of variants, form of config and edge of buckets: of the rest, the code is a stub."""
    manifest = read_bundle(bundle)[0]
    stubs = {name for name in manifest["files"] if is_stub((bundle / name).read_bytes())}
    seen: dict[bool, set[tuple]] = {True: set(), False: set()}
    for row in manifest["rows"]:
        record = manifest["records"][row["record"]]
        if record["launcher"] == "cubin":
            files = {cubin["file"] for cubin in record["cubins"].values()}
            assert files <= stubs or not files & stubs, row
            spec = hdispatch.registry.spec(row["op"])
            edge = row["bucket"] in (0, spec.ladders.count - 1)
            kinds = [form(record["config"]), *traits(spec.variant(row["variant"])), *([row["bucket"]] if edge else [])]
            seen[bool(files & stubs)] |= {(record["kernel"], kind) for kind in kinds}
    assert seen[True] <= seen[False]
    library = manifest["files"][LIBRARY]["size"]
    assert library > 2**18, "of host functions too, which stubs of all would not come to"


def test_records_evaluated_in_python(cases):
    for case in cases:
        for m, expected in zip(case.ms, case.expected, strict=True):
            where = (case.op, case.variant, case.shape, m)
            sizes = case.leaves(m)
            assert case.record["m_min"] <= m <= case.record["m_max"], where
            assert all(evaluate(guard["expr"], sizes) for guard in case.record["guards"]) == ("refused" not in expected), where
            if "refused" in expected:
                continue
            assert [evaluate(size, sizes) for size in case.record["grid"]] == expected["grid"], where
            code = case.record["cubins"][class_of(m)]
            params = [evaluated(case.record["params"][index], sizes) for index in code["params"]]
            assert params == [param[1:] for param in expected["params"]], where
            assert expected["false_hints"] == [], where


def arguments(case: Case, m: int) -> list[Any]:
    """Arguments of a call on the CPU. Their memory is never touched, so their size does not matter."""
    spec, variant, leaves = case.spec, case.maker.variant, case.leaves(m)
    made: list[Any] = []
    for arg in spec.args:
        if isinstance(arg, FloatArg):
            made.append(FLOAT_HINT)
        elif isinstance(arg, NoneArg) or arg.name in variant.none:
            made.append(None)
        elif isinstance(arg, TensorArg):
            made.append(tensor(arg, spec.tensor_sizes(arg, leaves, variant.static), variant.dtypes[arg.name], leaves))
        elif isinstance(arg, BoolArg) and arg.values is None:
            made.append(bool(m % 2))
        elif isinstance(arg, (BoolArg, IntArg, StrArg)):
            made.append(variant.static.get(arg.name, leaves.get(arg.name)))
    return made


def tensor(arg: TensorArg, sizes: list[int], dtype: torch.dtype, leaves: dict[str, int]) -> torch.Tensor:
    """A tensor with the free sizes and strides of `leaves`; one of stride 0 has one element."""
    sizes = [leaves[f"{arg.name}.size({i})"] if size == -1 else size for i, size in enumerate(sizes)]
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))] if arg.layout != "columns" else [1, 0]
    strides = [leaves.get(f"{arg.name}.stride({i})", stride) for i, stride in enumerate(strides)]
    return torch.empty(1, dtype=dtype) if arg.broadcast and strides == [0] else torch.empty_strided(sizes, strides, dtype=dtype)


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
    if "refused" in expected:
        with pytest.raises(hdispatch.MissError, match="guard"):
            getattr(hdispatch.ops, case.op)(*args)
        return
    with null.recording():
        getattr(hdispatch.ops, case.op)(*args)
    (launch,) = null.launches()
    code = case.record["cubins"][class_of(m)]
    tensors = {arg.name: value for arg, value in zip(case.spec.args, args, strict=True) if isinstance(value, torch.Tensor)}
    passed = [described(param) for param in launch["params"]]
    if case.spec.workspace is not None:  # it is the runtime's: any address will do
        (at,) = [i for i, param in enumerate(expected["params"]) if param[1] == case.spec.workspace.name]
        address = int.from_bytes(passed[at], "little")
        assert address, where
        assert address % 256 == 0, where
        expected["params"][at] = [case.spec.workspace.name, passed[at].hex()]
    assert passed == [*(wanted(param, tensors) for param in expected["params"]), bytes(8), bytes(8)], where
    assert list(launch["grid"]) == expected["grid"], where
    assert (launch["file"], launch["function"]) == (code["file"], code["function"]), where
    assert (launch["block"], launch["shared"]) == ((32 * code["num_warps"], 1, 1), code["shared_bytes"]), where
    # Where something that is read early lies where the case before wrote, the attribute is left out: see test_early_reads.
    pdl = launch["pdl"] if case.record.get("early") else code["pdl"]
    assert [launch["pdl"], launch["cooperative"], list(launch["cluster"])] == [pdl, code["cooperative"], code["cluster"]], where


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


def test_code_waits_then_reads_then_releases(bundle, tmp_path):
    """Programmatic dependent launch in the machine code: nothing is read or written before the wait, and the dependents are
    released after the last read. (ACQBULK and PREEXIT are griddepcontrol.wait and .launch_dependents.)"""
    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    manifest, _ = read_bundle(bundle)
    names = {c["file"] for r in manifest["records"] if r["backend"] == "helion" for c in r["cubins"].values() if c["pdl"]}
    cubins = {name: cubin for name in sorted(names) if not is_stub(cubin := (bundle / name).read_bytes())}
    assert cubins
    # All in one go: the disassembler takes longer to start than to work.
    codes = {name: machine_code(cubin) for name, cubin in cubins.items()}
    (tmp_path / "code").write_bytes(b"".join(codes.values()))
    command = [disassembler, "--binary", "SM90a", tmp_path / "code"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    instructions = [(int(at, 16), text) for at, text in re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.+?);", listing, re.MULTILINE)]
    end = 0
    for name, code in codes.items():
        start, end = end, end + len(code)
        own = " ".join(text for at, text in instructions if start <= at < end)
        steps = re.findall(r"\b(ACQBULK|PREEXIT|LDG|STG|LDL|STL)\b", own)
        order = "".join({"ACQBULK": "w", "PREEXIT": "r", "LDG": "l", "STG": "s"}.get(step, "!") for step in steps)
        assert re.fullmatch(r"wl+rs+", order), f"{name}: {' '.join(steps)}"


def machine_code(cubin: bytes) -> bytes:
    """The section of a cubin's one function; a cubin is an ELF file."""
    (table,), (size, count, names) = struct.unpack_from("<Q", cubin, 0x28), struct.unpack_from("<3H", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    text = [section for section in sections if cubin[sections[names][4] + section[0] :].startswith(b".text.")]
    ((*_, offset, length),) = text
    return cubin[offset : offset + length]

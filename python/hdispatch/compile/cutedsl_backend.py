"""CuteDSL: a kernel and a config become an object file with a host function, which a bundle links into its library.

`kernels/<op>/cutedsl.py` has

    GENERIC      the sizes that may differ from call to call: ("N",)
    program(variant, sizes, config)
                 what is to be compiled for a variant, the other sizes and a config: see `Program`
    EARLY_READS  the tensors that the code reads before it waits for the kernel before it: ("w",)
    candidates(sizes, variant)
                 configs that are worth measuring

Imports cutlass, which reads CUTE_DSL_ARCH as it is imported: `pool.environment` sets it.
"""

from __future__ import annotations

import functools
import importlib
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypedDict

from cutlass import cute  # type: ignore[import-not-found,import-untyped,unused-ignore]

from ..errors import BuildError
from ..manifest import Expr, FfiArg, FfiRecord, Guard
from ..opspec import OpSpec, TensorArg
from . import op_package
from .build_unit import Built, Unit, early_reads, load_spec
from .expr import guards_of
from .store import Store, digest
from .target import GpuTarget

#: Raised when what is stored about an object file, or how it is compiled, changes.
CODE_FORMAT = 1

_OPTIONS = "--enable-tvm-ffi"


class ObjectEntry(TypedDict):
    """The build cache's entry for an object file: the SHA-256 of its bytes."""

    sha256: str


class Program(Protocol):
    """The result of a kernel module's `program`.

    host          a `cute.jit` function of the arguments, in their order
    arguments     by name: fake tensors for the op's tensors, the Int32 "pdl", the fake stream "stream"
    largest_m     the code serves 1 <= M <= largest_m
    shared_bytes  of a block
    multiples     by leaf (`K`, `x.stride(0)`): what the code takes it for a multiple of; a stride of one row is free
    views         by tensor: which of its dimensions the function takes, if not all in their order
    """

    host: Callable[..., None]
    arguments: Mapping[str, Any]
    largest_m: int
    shared_bytes: int
    multiples: Mapping[str, int]
    views: Mapping[str, list[int]]


def build_records(unit: Unit, target: GpuTarget, tools: Mapping[str, str], store: Store) -> list[Built]:
    """The unit's record, as `record_builder.build_records` returns it; its object file is in the store.

    BuildError for a config that does not serve all of the unit's buckets, or that the target cannot run.
    """
    start = time.monotonic()
    if (arch := os.environ.get("CUTE_DSL_ARCH")) != target.arch:
        raise BuildError(
            f"CUTE_DSL_ARCH is {arch!r}, as cutlass read it when it was imported; {target.name} takes {target.arch!r}"
        )
    spec = load_spec(unit.package)
    module = importlib.import_module(f"{unit.package}.{unit.backend}")
    program = _program(module, spec, unit, target)
    key = digest(
        {
            "format": CODE_FORMAT,
            "unit": {**unit.to_json(), "buckets": [], "rows": []},
            "sources": _sources(unit.package),
            "target": target.code_key(),
            "tools": dict(tools),
        }
    )
    function = f"{spec.name}_{key[:16]}"
    found = store.get("object", key, ObjectEntry)
    if found is None or not store.has_blob(found["sha256"]):
        found = {"sha256": store.put_blob(_compile(program, function, unit))}
        store.put("object", key, found)
    record: FfiRecord = {
        "launcher": "tvm_ffi",
        "backend": unit.backend,
        "kernel": module.__name__,
        "config": unit.config,
        "m_min": 1,
        "m_max": program.largest_m,
        "guards": _guards(spec, unit, program),
        "file": found["sha256"],
        "function": function,
        "args": [_argument(spec, program, name) for name in program.arguments],
        "pdl": True,
        "env_stream": False,
    }
    if spec.second is not None:  # the code does not get it
        record |= {"second_min": spec.second.minimum, "second_max": 2**63 - 1}
    if early := early_reads(module, spec, spec.variant(unit.variant)):
        record["early"] = list(early)
    return [{"record": record, "buckets": list(unit.buckets), "seconds": round(time.monotonic() - start, 3)}]


def _program(module: Any, spec: OpSpec, unit: Unit, target: GpuTarget) -> Program:
    try:
        program: Program = module.program(spec.variant(unit.variant), unit.shape, unit.config)
    except (KeyError, TypeError, ValueError) as error:
        raise BuildError(f"the config {unit.config} does not suit {module.__name__}: {error}") from error
    if program.shared_bytes > target.shared_memory:
        raise BuildError(
            f"a block needs {program.shared_bytes} bytes of shared memory, {target.name} has {target.shared_memory}; "
            "choose fewer stages, or a smaller tile"
        )
    for bucket in unit.buckets:
        first, last = spec.ladders.bounds(bucket)
        if (last or spec.ladder[-1]) > program.largest_m:
            raise BuildError(
                f"bucket {bucket} holds M from {first} to {last or spec.ladder[-1]}, the config {unit.config} takes at most "
                f"{program.largest_m}; choose one with more tokens"
            )
    return program


def _compile(program: Program, function: str, unit: Unit) -> bytes:
    """The object file that defines `__tvm_ffi_<function>`."""
    try:
        compiled = cute.compile(program.host, *program.arguments.values(), options=_OPTIONS)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "function.o"
            compiled.export_to_c(str(path), function_name=function)
            return path.read_bytes()
    except Exception as error:  # the DSL raises anything
        raise BuildError(f"CuteDSL cannot compile {unit.config}: {type(error).__name__}: {error}") from error


@functools.cache
def _sources(package: str) -> dict[str, str]:
    """Found once: this process imports each module once, and lives for one build."""
    return op_package.sources([package], build_wing=False)[package]


def _argument(spec: OpSpec, program: Program, name: str) -> FfiArg:
    given = program.arguments[name]
    if name in ("pdl", "stream"):
        return {"kind": "pdl" if name == "pdl" else "stream"}
    if name not in {arg.name for arg in spec.args if isinstance(arg, TensorArg)}:
        raise BuildError(f"{spec.name}: the host function takes {name!r}, which is no tensor of the op, nor pdl, nor stream")
    if given is None:
        return {"kind": "none"}
    argument: FfiArg = {"kind": "tensor", "arg": name, "align": given._assumed_align}
    if name in program.views:
        argument["dims"] = list(program.views[name])
    return argument


def _guards(spec: OpSpec, unit: Unit, program: Program) -> list[Guard]:
    """Facts without which the host function would refuse a call, and those that the code assumes without asking."""
    generic = [symbol for symbol in spec.symbols() if symbol != "M" and symbol not in unit.shape]
    exprs: list[Expr] = [[symbol, 1, ">="] for symbol in generic]
    for leaf, multiple in program.multiples.items():
        name, dot, dimension = leaf.partition(".stride(")
        if not dot and leaf in unit.shape:
            continue
        expr: Expr = [leaf, multiple, "%", 0, "=="]
        exprs.append([*expr, f"{name}.size({dimension}", 1, "==", "or"] if dot else expr)
    return guards_of(exprs)

"""What a generated host function passes to its launcher when everything is known; runs inside of `in_worker`.

Independent of records: the host function is generated again and run with a concrete M, and Triton itself decides on each
argument's type and which it drops.
"""

from __future__ import annotations

import functools
import importlib
import json
import struct
from typing import Any

from hdispatch.compile.build_unit import load_spec
from hdispatch.compile.call_maker import CallMaker
from hdispatch.compile.host_launch import Descriptor, Flag, Launch, Number, Pointer
from hdispatch.compile.trace import HostSide, Trace, trace
from hdispatch.compile.triton_backend import Sample, _SampleTensor, samples
from hdispatch.manifest import class_of

BYTES = {"i1": 1, "u1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8}


@functools.lru_cache(maxsize=4)
def _traced(package: str, backend: str, variant: str, known: str, config: str, hint: int) -> tuple[HostSide, Trace]:
    spec = load_spec(package)
    maker = CallMaker(spec, spec.variant(variant), json.loads(known))
    module = importlib.import_module(f"{package}.{backend}")
    side = importlib.import_module(f"hdispatch.compile.{backend}_backend").host_side(module, json.loads(config), maker, hint)
    return side, trace(side.host, maker.symbolic(hint))


def expect(
    package: str, backend: str, variant: str, shape: dict[str, int], config: Any, hint: int, calls: list[list[Any]]
) -> Any:
    """For each [M, row padding, {integer with a second ladder}] the launch at a whole shape: {grid, params, false_hints}, or
    {refused} by a ValueError.

    params are [name, bytes in hex], of pointers [name, argument, offset], of TMA descriptors [name, argument, offset, sizes,
    strides but the last], followed by these as parameters of their own: all that Triton would pass at this M, and those
    that it would drop because they are 1 here, but that are not always 1 in the class of M. false_hints are arguments of
    which the record's code for the class takes more for granted than is so.
    """
    generic = getattr(importlib.import_module(f"{package}.{backend}"), "GENERIC", ())
    known = json.dumps({symbol: size for symbol, size in shape.items() if symbol not in generic})
    side, symbolic = _traced(package, backend, variant, known, json.dumps(config), hint)
    spec = load_spec(package)
    maker = CallMaker(spec, spec.variant(variant), shape)
    found: list[dict[str, Any]] = []
    for m, row_padding, second in calls:
        try:
            launch = trace(side.host, maker.concrete(m, row_padding, second)).launch
        except ValueError as error:
            found.append({"refused": str(error)})
            continue
        decided = _decide(launch)
        claims = samples(symbolic, class_of(m))
        # Triton makes nothing of a claim about a parameter that it is not to specialize.
        special = {param.name: not param.do_not_specialize for param in launch.kernel.params}
        aligned = {param.name: not param.do_not_specialize_on_alignment for param in launch.kernel.params}
        wrong = [
            name
            for name, (kind, key) in decided.items()
            if kind != "constexpr"
            and special[name]
            and (claims[name].one or (claims[name].multiple and aligned[name] and key != "D"))
        ]
        declared = {param.name for param in launch.kernel.params if param.is_constexpr}
        one_here = {name: ("i32", None) for name, arg in launch.args.items() if isinstance(arg, Number) and arg.value == 1}
        one_here = {name: kind for name, kind in one_here.items() if name not in declared and not claims[name].one}
        kept = {name: kind for name, (kind, _) in (decided | one_here).items() if kind != "constexpr"}
        params = [param for name, kind in kept.items() for param in _encode(name, launch.args[name], kind)]
        found.append({"grid": list(launch.grid), "params": params, "false_hints": wrong})
    return found


def _decide(launch: Launch) -> dict[str, tuple[str, Any]]:
    """Triton's own word on each argument: its type, "constexpr" if it is dropped, and "D" for a multiple of 16."""

    def value(arg: Any) -> Any:
        if isinstance(arg, Pointer):
            return _SampleTensor(arg.dtype, arg.offset)
        if isinstance(arg, Descriptor):
            return Sample(arg).value()
        return bool(arg.value) if isinstance(arg, Flag) else arg.value

    binder = launch.kernel.device_caches[0][4]
    _, specialization, _ = binder(*(value(arg) for arg in launch.args.values()), **launch.options)
    return dict(zip(launch.args, specialization, strict=True))


def _encode(name: str, arg: Any, kind: str) -> list[list[Any]]:
    if isinstance(arg, Descriptor):
        values = [_encode(f"{name}.{i}", Number(value), "i32")[0] for i, value in enumerate(arg.shape)]
        values += [_encode(f"{name}.{i}", Number(value), "i64")[0] for i, value in enumerate(arg.strides)]
        return [[name, arg.arg, arg.offset, list(arg.shape), list(arg.strides[:-1])], *values]
    if isinstance(arg, Pointer):
        return [[name, arg.arg, arg.offset]]
    if kind in BYTES:
        return [[name, int(arg.value).to_bytes(BYTES[kind], "little", signed=kind != "u1").hex()]]
    return [[name, struct.pack({"fp32": "<f", "fp64": "<d"}[kind], arg.value).hex()]]

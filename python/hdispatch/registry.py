"""Which ops there are: `define` makes one of its declaration, `names`, `get` and `spec` find them.

Every package `hdispatch.kernels.<op>` with a `spec` is defined at import. An op is then an attribute of `hdispatch.ops`, and in
torch's dispatcher `torch.ops.hdispatch.<op>`. Ops of installed distributions (`kernel_packages.GROUP`) are defined when a name
is looked for that is none of these, here, in `hdispatch.ops` or by `hdispatch.load`; others by `define_package`.
"""

from __future__ import annotations

import copyreg
import importlib
import importlib.util
import inspect
import pkgutil
import threading
from pathlib import Path
from typing import Any

import torch

from . import _C, kernel_packages, ops
from .errors import HdispatchError
from .opspec import Arg, BoolArg, FloatArg, IntArg, NoneArg, OpSpec, StrArg, TensorArg, dtype_name, parse_dim

_SPECS: dict[str, OpSpec] = {}
_OPS: dict[str, _C.Op] = {}
#: Defines the functional forms of ops that return tensors.
_TORCH = torch.library.Library("hdispatch", "FRAGMENT")  # type: ignore[no-untyped-call]
#: Names of the ops of packages outside of hdispatch, by package.
_DEFINED: dict[str, str] = {}
#: Held while such packages are looked for; and whether those that are installed have been.
_LOOKING = threading.RLock()
_looked = False


def define(spec: OpSpec) -> _C.Op:
    """Define an op from its declaration; it is then `hdispatch.ops.<name>` and `torch.ops.hdispatch.<name>`.

    Raises `HdispatchError` if an op of that name exists.
    """
    if spec.name in _OPS:
        raise HdispatchError(f"op {spec.name!r} is defined already")
    variants = list(spec.variant_arguments().items())
    doc = f"{spec.schema()}\n\n{inspect.cleandoc(spec.reference.__doc__ or '')}"
    if spec.returned:
        _TORCH.define(spec.functional_schema(), tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
        doc = f"{spec.functional_schema()}\n\n{inspect.cleandoc(spec.reference.__doc__ or '')}"
    described = [_describe(spec, arg) for arg in spec.args]
    fallback, signature = spec.fallback_function, _signature(spec)
    if spec.workspace is None:
        op = _C.define_op(spec.name, spec.schema(), described, variants, fallback, doc, signature)
    else:
        sizes = [spec.workspace_bytes(variant) for variant in spec.variants()]
        op = _C.define_op(spec.name, spec.schema(), described, variants, fallback, doc, signature, spec.workspace.name, sizes)
    called = _C.define_functional(op, spec.functional_schema()) if spec.returned else op
    _shorten(called)
    _SPECS[spec.name], _OPS[spec.name] = spec, op
    setattr(ops, spec.name, called)
    return op


def _shorten(op: _C.Op | _C.FunctionalOp) -> None:
    """Let `torch.ops.hdispatch.<op>(…)` take the fast path too.

    torch's packet parses the arguments against the schema on every call: 1.7 µs for seven. The op's own door takes 0.15 µs
    and hands whatever is not plain (modes, subclasses, tracing, …) to torch's packet, so nothing is lost. The replacement
    stays an OpOverloadPacket, which is what Dynamo looks for; `.default` is torch's own.
    """
    packet = getattr(torch.ops.hdispatch, op.name)
    kind = type(packet.__name__, (type(packet),), {"__call__": op, "__doc__": op.schema})
    fast: Any = object.__new__(kind)
    fast.__dict__.update(packet.__dict__)
    setattr(torch.ops.hdispatch, op.name, fast)


def define_package(where: str | Path) -> list[str]:
    """Define the ops of a folder or a dotted package outside of hdispatch; those that it defined before stay as they are.

    Returns their names. `HdispatchError` if there is none, or one has the name of another op.
    """
    with _LOOKING:
        return [_define_from(package) for package in kernel_packages.op_packages(where)]


def _define_from(package: str) -> str:
    if package not in _DEFINED:
        found = getattr(importlib.import_module(f"{package}.spec"), "SPEC", None)
        if not isinstance(found, OpSpec):
            raise HdispatchError(f"{package}.spec has no OpSpec named SPEC")
        if _SPECS.get(found.name) is not found:  # by hand
            define(found)
        _DEFINED[package] = found.name
    return _DEFINED[package]


def is_defined(name: str) -> bool:
    """Whether there is an op of that name. Where it is not defined, what installed distributions name is."""
    global _looked
    if name not in _OPS and not name.startswith("_") and not _looked:
        with _LOOKING:
            for package in kernel_packages.installed():
                _define_from(package)
            _looked = True
    return name in _OPS


setattr(ops, "_look_for", is_defined)  # noqa: B010  (a function there is none to mypy)


def get(name: str) -> _C.Op:
    """The op of that name. Ops are pickled and copied by name: there is one of each in a process."""
    if not is_defined(name):
        raise HdispatchError(f"no op {name!r}; there are {', '.join(sorted(_OPS))}")
    return _OPS[name]


copyreg.pickle(_C.Op, lambda op: (get, (op.name,)))
copyreg.pickle(_C.FunctionalOp, lambda op: (_called, (op.name,)))


def _called(name: str) -> _C.FunctionalOp:
    """The op of that name, which returns tensors."""
    found: _C.FunctionalOp = getattr(ops, get(name).name)
    return found


def names() -> list[str]:
    """Names of all defined ops."""
    return list(_OPS)


def spec(name: str) -> OpSpec:
    """The declaration of an op."""
    if not is_defined(name):
        raise HdispatchError(f"no op {name!r}; there are {', '.join(sorted(_SPECS))}")
    return _SPECS[name]


def _signature(spec: OpSpec) -> inspect.Signature:
    """As `inspect.signature` gives it. What a required argument follows has no default there, as in Python."""
    parameters: list[inspect.Parameter] = []
    required = False
    for arg in reversed(spec.args):
        kind: object
        default: object = inspect.Parameter.empty
        if isinstance(arg, TensorArg):
            kind = torch.Tensor | None if arg.optional or arg.returned else torch.Tensor
            default = None if arg.optional or arg.returned else default
        elif isinstance(arg, NoneArg):
            kind, default = list[int] | None if arg.type == "int[]?" else arg.type, None
        elif isinstance(arg, FloatArg):
            kind = float
        else:
            kind = bool if isinstance(arg, BoolArg) else str if isinstance(arg, StrArg) else int
            default = default if arg.default is None else arg.default
        required = required or default is inspect.Parameter.empty
        default = inspect.Parameter.empty if required else default
        parameters.append(
            inspect.Parameter(arg.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=kind)
        )
    results = len(spec.returned)
    returns: object = None if not results else torch.Tensor if results == 1 else tuple[(torch.Tensor,) * results]  # type: ignore[misc]
    return inspect.Signature(parameters[::-1], return_annotation=returns)


def _call_traced(op: _C.Op, *args: Any, **by_name: Any) -> Any:
    """Stands in for a call under torch.compile, which cannot trace the C++ door: it calls the op in torch's dispatcher."""
    return getattr(torch.ops.hdispatch, op.name)(*args, **by_name)


_C.set_traced_call(_call_traced)


def _describe(spec: OpSpec, arg: Arg) -> dict[str, object]:
    """An argument as the C++ door takes it."""
    if isinstance(arg, FloatArg):
        return {"kind": "float", "name": arg.name, "minimum": arg.minimum}
    if isinstance(arg, NoneArg):
        return {"kind": "none", "name": arg.name, "ignored": arg.ignored}
    if isinstance(arg, StrArg):
        return {"kind": "str", "name": arg.name, "values": list(arg.values), "default": arg.default}
    if not isinstance(arg, TensorArg):
        return {
            "kind": "bool" if isinstance(arg, BoolArg) else "int",
            "name": arg.name,
            "values": [int(value) for value in arg.values or ()],
            "minimum": 0 if isinstance(arg, BoolArg) else arg.minimum,
            "default": None if arg.default is None else int(arg.default),
            "ladder": isinstance(arg, IntArg) and arg.ladder is not None,
        }
    source = next(a for a in spec.tensors() if a.name == arg.dtypes) if isinstance(arg.dtypes, str) else arg
    return {
        "kind": "tensor",
        "name": arg.name,
        "dims": [tuple(parse_dim(dim)) for dim in arg.dims],
        "dtypes": [dtype_name(dtype) for dtype in source.dtypes if not isinstance(dtype, str)],
        "mutated": arg.mutated,
        "optional": arg.optional,
        "layout": arg.layout,
        "flat": arg.flat,
        "broadcast": arg.broadcast,
        "pad": arg.pad,
        "merge": arg.merge,
        "in_place": arg.in_place or "",
        "returned": arg.returned,
        "zeroed": arg.zeroed,
        "dtype_of": arg.dtypes if isinstance(arg.dtypes, str) else "",
    }


_KERNELS = importlib.import_module(f"{__package__}.kernels")  # a folder of its own in a checkout
for _module in pkgutil.iter_modules(_KERNELS.__path__):
    _name = f"{_KERNELS.__name__}.{_module.name}.spec"
    if _module.ispkg and importlib.util.find_spec(_name):
        define(importlib.import_module(_name).SPEC)

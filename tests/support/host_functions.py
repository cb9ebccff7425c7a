"""Host functions that can and cannot become records, for test_trace.py; runs inside of `in_worker`."""

# ruff: noqa: ARG005
from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from hdispatch.compile import DESCRIBED, triton_backend
from hdispatch.compile.build_unit import Unit
from hdispatch.compile.call_maker import CallMaker
from hdispatch.compile.expr import postfix
from hdispatch.compile.host_launch import Constant, Flag, Number, Pointer, Real
from hdispatch.compile.record_builder import Candidate
from hdispatch.compile.store import Store
from hdispatch.compile.trace import trace
from hdispatch.opspec import FloatArg, OpSpec, TensorArg
from helped.op.triton import on_descriptor, on_few
from triton.tools.tensor_descriptor import TensorDescriptor

SPEC = OpSpec(
    name="toy_host",
    args=(
        TensorArg("result", ("M", "K"), (torch.float32,), mutated=True),
        TensorArg("input", ("M", "2*K"), (torch.float32,), layout="rows"),
        FloatArg("eps"),
    ),
    reference=lambda *_args: None,
    sample=lambda *_args: [],
    shapes=({"K": 64},),
    config_key={"width": "K", "rows": "M"},
    ladder=(1, 16, 256),
)
OPTIONS: dict[str, Any] = {"num_warps": 1}


@triton.jit
def copy(result, input, eps, m, stride, other, K: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, K)
    tl.store(result + row * K + columns, tl.load(input + row * stride + columns) + eps + m + other)


@triton.jit
def described(result, input, eps, m, stride, other, K: tl.constexpr):
    block = tl.make_tensor_descriptor(input, [m, K], [stride, 1], [1, K])
    tl.store(result + tl.arange(0, K), tl.reshape(block.load([tl.program_id(0), 0]), [K]) + eps + other)


@triton.jit
def waiting(result, input, eps, m, stride, other, K: tl.constexpr):
    tl.extra.cuda.gdc_wait()
    tl.store(result + tl.arange(0, K), tl.load(input + stride * tl.program_id(0) + tl.arange(0, K)) + eps + m + other)


def good(result, input, eps, *, _launcher):
    m, k = result.shape
    gate, up = input[:, :k], input[:, k:]
    _launcher(copy, (min(m, 132), 2), result, up, eps, m, gate.stride(0), 1, k, num_warps=1)


def makers(kernel: Any = copy, **options: Any) -> Callable[..., Callable[..., None]]:
    """A host function that computes `grid` and `other` from its arguments."""

    def make(other: Callable[..., Any], grid: Callable[..., Any] = lambda r, i, e: (r.shape[0],)) -> Callable[..., None]:
        def host(result, input, eps, *, _launcher):
            value = other(result, input, eps)
            rest = (eps, result.shape[0], input.stride(0), value, 64)
            _launcher(kernel, grid(result, input, eps), result, input, *rest, **(OPTIONS | options))

        return host

    return make


def no_launch(result, input, eps, *, _launcher):
    pass


def two_launches(result, input, eps, *, _launcher):
    good(result, input, eps, _launcher=_launcher)
    good(result, input, eps, _launcher=_launcher)


def describing(make: Callable[..., Any]) -> Callable[..., None]:
    """A host function that passes a TMA descriptor of its input."""

    def host(result, input, eps, *, _launcher):
        _launcher(copy, (1,), result, make(input), eps, 1, 1, 1, 64, num_warps=1)

    return host


def branching(result, input, eps, *, _launcher):
    wide = result.shape[0] <= 128
    _launcher(copy, (result.shape[0],), result, input, eps, 1, input.stride(0), 5 if wide else 6, 64, num_warps=1)


def odd(result, input, eps, *, _launcher):
    _launcher(
        copy, (result.shape[0],), result, input, eps, 1, input.stride(0), 5 if result.shape[0] % 3 == 1 else 6, 64, num_warps=1
    )


def at_one_size(size: int) -> Callable[..., None]:
    def host(result, input, eps, *, _launcher):
        other = 5 if result.numel() != 64 * size else 6
        _launcher(copy, (result.shape[0],), result, input, eps, 1, input.stride(0), other, 64, num_warps=1)

    return host


def on_stride(result, input, eps, *, _launcher):
    _launcher(copy, (result.shape[0],), result, input, eps, 1, 1, 5 if input.stride(0) > 140 else 6, 64, num_warps=1)


def checked(result, input, eps, *, _launcher):
    if input.stride(0) % 16 != 0:
        raise ValueError("rows are whole vectors")
    good(result, input, eps, _launcher=_launcher)


def on_float(result, input, eps, *, _launcher):
    _launcher(copy, (result.shape[0],), result, input, eps, 1, 1, 5 if eps > 0 else 6, 64, num_warps=1)


def constexpr(result, input, eps, *, _launcher):
    _launcher(copy, (1,), result, input, eps, 1, 1, 1, K=result.shape[0], num_warps=1)


HOSTS: dict[str, Callable[..., None]] = {
    "good": good,
    "no_launch": no_launch,
    "two_launches": two_launches,
    "descriptor_of_columns": describing(lambda i: TensorDescriptor(i, list(i.shape), [1, i.stride(0)], [1, 64])),
    "descriptor_of_ranks": describing(lambda i: TensorDescriptor(i, [64], list(i.stride()), [1, 64])),
    "descriptor_in_rows": describing(lambda i: TensorDescriptor.from_tensor(i, [i.shape[0], 64])),
    "branching": branching,
    "odd": odd,
    "at_seven": at_one_size(7),
    "at_100000": at_one_size(100000),
    "on_stride": on_stride,
    "checked": checked,
    "on_float": on_float,
    "constexpr": constexpr,
    "zeros": makers()(lambda r, i, e: torch.zeros(4, device="cuda")),
    "clone": makers()(lambda r, i, e: i.clone()),
    "empty": makers()(lambda r, i, e: torch.empty(4, device="cuda")),
    "item": makers()(lambda r, i, e: r[0, 0].item()),
    "float_arithmetic": makers()(lambda r, i, e: e * 2),
    "true_division": makers()(lambda r, i, e: 1, lambda r, i, e: (int(r.shape[0] / 2),)),
    "tuple": makers()(lambda r, i, e: (1, 2)),
    "grid_of_four": makers()(lambda r, i, e: 1, lambda r, i, e: (1, 1, 1, 1)),
    "callable_grid": makers()(lambda r, i, e: 1, lambda r, i, e: lambda meta: (1,)),
    "float_grid": makers()(lambda r, i, e: 1, lambda r, i, e: (1.5,)),
    "state": makers(_persistent_state_specs=())(lambda r, i, e: 1),
    "not_a_kernel": makers(kernel=len)(lambda r, i, e: 1),
    "scratch": makers(kernel=described)(lambda r, i, e: 1),
    "pdl": makers(kernel=waiting, launch_pdl=True)(lambda r, i, e: 1),
    "pdl_without_wait": makers(launch_pdl=True)(lambda r, i, e: 1),
    "cluster": makers(num_ctas=2)(lambda r, i, e: 1),
    "sixteenfold": makers()(lambda r, i, e: 16 * r.shape[0] + 32),
    "twofold": makers()(lambda r, i, e: 2 * r.shape[0]),
    "blocks": makers()(lambda r, i, e: triton.cdiv(r.shape[0], 16)),
    "always_one": makers()(lambda r, i, e: r.shape[0] // r.shape[0]),
    "wide": makers()(lambda r, i, e: r.shape[0] * 2**20),
    "large": makers()(lambda r, i, e: 2**40),
    "flag": makers()(lambda r, i, e: r.shape[0] > 4),
    "half": makers()(lambda r, i, e: 0.5),
    "tall": makers()(lambda r, i, e: 1, lambda r, i, e: (1, r.shape[0])),
    "none": makers()(lambda r, i, e: None),
    "helped": on_few(copy),
    "helped_descriptor": on_descriptor(copy),
}


def maker() -> CallMaker:
    return CallMaker(SPEC, SPEC.variants()[0], SPEC.shapes[0])


def candidate(name: str, hint: int = 64, index_bits: int = 32) -> Candidate:
    """A Candidate on one of HOSTS, as if it were a plain Triton op."""
    module = types.ModuleType(name)

    def launch(*args: object, config: object, _launcher: Callable[..., None]) -> None:
        HOSTS[name](*args, _launcher=_launcher)

    module.launch = launch  # type: ignore[attr-defined]
    module.INDEX_BITS = index_bits  # type: ignore[attr-defined]
    made = Candidate.__new__(Candidate)
    made.unit = Unit("toy", "triton", "any", SPEC.shapes[0], {}, (0, 1, 2))
    made.hint, made.second, made.module, made.maker = hint, None, module, maker()
    made.side = triton_backend.host_side(module, {}, made.maker, hint)
    made.trace = trace(made.side.host, made.maker.symbolic(hint))
    return made


def any_layout(multiple: int) -> dict[str, Any]:
    """Which strides of a tensor of layout "any" are proved to be multiples of 16, and the record's guards."""
    args = (SPEC.args[0], TensorArg("input", ("M", 4, "K"), (torch.float32,), layout="any", multiple=multiple), SPEC.args[2])
    spec = dataclasses.replace(SPEC, args=args)

    def host(result, input, eps, *, _launcher):
        _launcher(copy, (result.shape[0],), result, input, eps, input.stride(2), input.stride(0), input.stride(1), 64)

    found = trace(host, CallMaker(spec, spec.variants()[0], {"K": 64}).symbolic(64))
    proved = triton_backend.samples(found, "other")
    names = {"stride(0)": "stride", "stride(1)": "other", "stride(2)": "m"}
    return {
        "proved": [stride for stride, name in names.items() if proved[name].multiple],
        "guarded": sorted(triton_backend.assumed_strides(found, "other")),
    }


def launched(name: str) -> dict[str, Any]:
    """The symbolic launch of a host function, as plain data."""
    found = trace(HOSTS[name], maker().symbolic(64))

    def plain(arg: Any) -> Any:
        if isinstance(arg, Pointer):
            return ["pointer", arg.arg, postfix(arg.offset, found.leaves)]
        if isinstance(arg, (Number, Flag)):
            return [type(arg).__name__.lower(), postfix(arg.value, found.leaves)]
        assert isinstance(arg, (Real, Constant))
        return [type(arg).__name__.lower(), arg.arg if isinstance(arg, Real) and arg.arg else arg.value]

    return {
        "kernel": found.launch.kernel.__name__,
        "grid": [postfix(size, found.leaves) for size in found.launch.grid],
        "args": {key: plain(arg) for key, arg in found.launch.args.items()},
        "options": found.launch.options,
    }


def decided(name: str) -> list[str]:
    """What a host function found out about the sizes of a call, which is then assumed of all calls."""
    return [str(guard) for guard in trace(HOSTS[name], maker().symbolic(64)).guards]


def concrete(name: str, m: int, row_padding: int) -> dict[str, Any]:
    """The launch for a known M, as plain data."""
    launch = trace(HOSTS[name], maker().concrete(m, row_padding)).launch
    return {"grid": list(launch.grid), "numbers": {k: a.value for k, a in launch.args.items() if isinstance(a, (Number, Flag))}}


def interval(name: str, hint: int = 64, index_bits: int = 32) -> list[int]:
    return list(candidate(name, hint, index_bits).interval)


def guards(name: str, index_bits: int = 32) -> list[str]:
    return [guard["text"] for guard in candidate(name, 64, index_bits).guards(["other"])]


def hints(name: str, m_class: Any) -> dict[str, list[bool]]:
    """What is proved of each argument: [always 1, always a multiple of 16]."""
    found = trace(HOSTS[name], maker().symbolic(64))
    return {key: [sample.one, sample.multiple] for key, sample in triton_backend.samples(found, m_class).items()}


def code(name: str, m_class: Any, cache: str) -> Any:
    """Compiles one class."""
    found = trace(HOSTS[name], maker().symbolic(64))
    return triton_backend.compile_class(found, m_class, DESCRIBED["h200"], {}, Store(Path(cache)))


def record(name: str, cache: str) -> Any:
    """A whole record."""
    return candidate(name).record([0, 1, 2], DESCRIBED["h200"], {}, Store(Path(cache)))


def check_ptx(function: str, ptx: str, kinds: Any, num_warps: int) -> None:
    triton_backend._check_ptx("toy", function, ptx, kinds, num_warps)

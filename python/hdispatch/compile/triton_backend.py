"""Triton: a launch becomes one cubin per class of M; and plain Triton kernels with a Python host function.

Triton compiles different code for different values: an integer argument that is 1 is folded away, one that is a multiple
of 16 and a pointer that is 16-byte aligned are marked so, and the code is wrong for others. So each class of M gets what
is proved for all of its Ms, and nothing more.

Imports triton, which asks for the device: import this module after `target.install`.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal, TypedDict

import sympy  # type: ignore[import-untyped]
import torch
import triton  # type: ignore[import-untyped]
from triton._utils import canonicalize_dtype  # type: ignore[import-untyped]
from triton.experimental.gluon.language import NVMMASharedLayout  # type: ignore[import-untyped]
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor  # type: ignore[import-untyped]
from triton.language import str_to_ty  # type: ignore[import-untyped]
from triton.runtime.jit import MockTensor  # type: ignore[import-untyped]
from triton.tools.tensor_descriptor import TensorDescriptor  # type: ignore[import-untyped]

from ..errors import BuildError
from ..manifest import TENSOR_MAP_TYPES, MClass
from ..opspec import OpSpec
from . import build_unit
from .build_unit import early_reads
from .call_maker import CallMaker
from .expr import divisor
from .host_launch import ALIGNMENT, Constant, Descriptor, Flag, HostArg, Launch, Number, Pointer, Real
from .store import Store, digest
from .target import GpuTarget
from .trace import HostSide, Trace

Kind = Literal["ptr", "i1", "i8", "i16", "i32", "i64", "f32", "f64", "tensor_map"]

#: Raised when what is stored about an artifact, or how it is compiled, changes.
CODE_FORMAT = 2

_KINDS: dict[str, Kind] = {
    "i1": "i1",
    "u1": "i1",
    "i8": "i8",
    "i16": "i16",
    "i32": "i32",
    "i64": "i64",
    "fp32": "f32",
    "fp64": "f64",
}
#: A parameter's type in PTX, as `_check_ptx` reads it.
_PTX_TYPES: dict[Kind, str] = {
    "ptr": "64",
    "i1": "8",
    "i8": "8",
    "i16": "16",
    "i32": "32",
    "i64": "64",
    "f32": "f32",
    "f64": "f64",
    "tensor_map": "8[128]",
}

#: Triton's numbers for TMA's element types are the driver's, but for three.
_MAP_TYPE_NUMBERS = {8: 10, 9: 8, 10: 9}

#: Samples for Triton's own specialisation: an integer that is no multiple of 16, one that is; addresses likewise.
_PLAIN, _MULTIPLE = 7, 16


class MapCode(TypedDict):
    """The fields of a TMA descriptor that the code decides: element type, box (outermost first), swizzle in bytes."""

    type: str
    box: list[int]
    swizzle: int


class Code(TypedDict):
    """One artifact and how it is launched. `kinds` are the types of the parameters that it takes, by name.

    A descriptor is several parameters: see `Descriptor.parameters`. `maps` are by the descriptors' names.
    """

    sha256: str
    size: int
    function: str
    kinds: dict[str, Kind]
    maps: dict[str, MapCode]
    num_warps: int
    shared_bytes: int
    cluster: list[int]
    cooperative: bool
    pdl: bool


@dataclass(frozen=True)
class Sample:
    """A stand-in for one argument, for Triton: a value of the same kind that has the same proved properties."""

    arg: HostArg
    one: bool = False
    multiple: bool = False

    def value(self) -> object:
        """An argument for Triton's specialisation."""
        arg = self.arg
        if isinstance(arg, Descriptor):
            # Triton looks at the type and the block alone.
            base, rank = _SampleTensor(arg.dtype, 0), len(arg.shape)
            strides = [ALIGNMENT] * (rank - 1) + [1]
            return TensorDescriptor(base, [ALIGNMENT] * rank, strides, list(arg.block_shape))
        if isinstance(arg, Pointer):
            return _SampleTensor(arg.dtype, 0 if self.multiple else arg.dtype.itemsize)
        if isinstance(arg, (Number, Flag)):
            known = isinstance(arg.value, int)
            number = arg.value if known else 1 if self.one else _MULTIPLE if self.multiple else _PLAIN
            return bool(number) if isinstance(arg, Flag) else number
        return arg.value

    def key(self) -> list[object]:
        """The part of this sample that the code depends on, as plain data."""
        if isinstance(self.arg, Descriptor):
            return [repr(self.arg.dtype), len(self.arg.shape), list(self.arg.block_shape), self.arg.tf32]
        value = self.value()
        shown = repr(value.dtype) if isinstance(value, _SampleTensor) else f"{type(value).__name__} {_shown(value)}"
        return [shown, self.one, self.multiple]


def _shown(value: object) -> str:
    """A value in a key: a Triton function by Triton's hash of it and of what it uses, since two may have one name."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_shown, value))})"
    found: str | None = getattr(value, "cache_key", None)
    return repr(value) if found is None else found


class _SampleTensor(MockTensor):  # type: ignore[misc]
    def __init__(self, dtype: torch.dtype, address: int) -> None:
        super().__init__(dtype)
        self.address = address

    def data_ptr(self) -> int:
        return self.address


def samples(trace: Trace, m_class: MClass) -> dict[str, Sample]:
    """A sample of each argument that is right for all Ms of a class, with row strides as `trace.multiples` says."""
    m = {symbol: ALIGNMENT if m_class == "mult16" else 1 for symbol, leaf in trace.leaves.items() if leaf == "M"}
    launch = trace.launch.at(dict.fromkeys(m, 1)) if m_class == "one" else trace.launch

    def sample(name: str, arg: HostArg) -> Sample:
        if isinstance(arg, Pointer):
            # Alignment is a guard of the record, so it does not depend on the class.
            whole = trace.launch.args[name]
            return Sample(arg, multiple=isinstance(whole, Pointer) and divisor(whole.offset, trace.multiples) % ALIGNMENT == 0)
        if isinstance(arg, Number):
            return Sample(arg, one=arg.value == 1, multiple=divisor(arg.value, trace.multiples | m) % ALIGNMENT == 0)
        return Sample(arg)

    return {name: sample(name, arg) for name, arg in launch.args.items()}


def assumed_strides(trace: Trace, m_class: MClass) -> set[str]:
    """The row strides (`input.stride(0)`) that `samples` would prove less without taking them for multiples of 16."""
    blind = samples(replace(trace, multiples={}), m_class)
    assumed: set[str] = set()
    for name, sample in samples(trace, m_class).items():
        if sample.multiple and not blind[name].multiple:
            arg: Any = sample.arg
            value: Any = arg.offset if isinstance(arg, Pointer) else arg.value
            assumed |= {trace.leaves[symbol] for symbol in value.free_symbols if symbol in trace.multiples}
    return assumed


def compile_class(
    trace: Trace, m_class: MClass, target: GpuTarget, tools: Mapping[str, str], store: Store, *, early: bool = False
) -> Code:
    """The code for one class of M, from the store if it is there. `early`: it may read before it waits.

    BuildError where Triton or the launcher cannot: see the messages.
    """
    launch = trace.launch
    wanted = samples(trace, m_class)
    key = digest(
        {
            "format": CODE_FORMAT,
            "source": _source(launch.kernel),
            "kernel": launch.kernel.cache_key,
            "samples": {name: sample.key() for name, sample in wanted.items()},
            "options": {name: repr(value) for name, value in launch.options.items()},
            "target": target.code_key(),
            "tools": dict(tools),
            **({"early": True} if early else {}),
        }
    )
    if (found := store.get("code", key, Code)) is not None and store.has_blob(found["sha256"]):
        return found
    code, cubin = _compile(launch, wanted, target, early)
    store.put_blob(cubin)
    store.put("code", key, dict(code))
    return code


def _source(kernel: Any) -> str:
    """The whole text of the module that the kernel is in: constants and imports are part of what is compiled."""
    module = inspect.getmodule(kernel.fn)
    return inspect.getsource(module) if module is not None else str(kernel.src)


def _compile(launch: Launch, wanted: Mapping[str, Sample], target: GpuTarget, early: bool) -> tuple[Code, bytes]:
    name = launch.kernel.__name__
    for param in launch.kernel.params:
        arg = launch.args[param.name]
        varies = arg.arg if isinstance(arg, Real) else getattr(arg, "value", None)
        if param.is_constexpr and isinstance(varies, (str, sympy.Basic)) and not isinstance(arg, Constant):
            raise BuildError(
                f"{name}: constexpr {param.name} is {varies}, which differs from call to call; pass it as an argument"
            )
    values = [sample.value() for sample in wanted.values()]
    if launch.kernel.is_gluon():
        values = [_with_layout(value) if isinstance(value, TensorDescriptor) else value for value in values]
    compiled = launch.kernel.warmup(*values, grid=(1,), **launch.options)
    if compiled is None:
        raise BuildError(f"{name}: Triton compiled nothing; is a JIT hook installed (triton.knobs.runtime.jit_cache_hook)?")
    metadata = compiled.metadata
    kinds = _kinds(name, compiled.src, wanted)
    maps = _maps(name, metadata, wanted)
    ptx = compiled.asm["ptx"]
    _check_metadata(name, metadata, ptx, target)
    if metadata.launch_pdl and not early:
        _check_waits_first(name, ptx)
    _check_ptx(name, metadata.name, ptx, kinds, metadata.num_warps)
    cubin: bytes = compiled.asm["cubin"]
    code = Code(
        sha256=digest(cubin),
        size=len(cubin),
        function=metadata.name,
        kinds=kinds,
        maps=maps,
        num_warps=metadata.num_warps,
        shared_bytes=metadata.shared,
        cluster=[metadata.num_ctas, 1, 1],
        cooperative=bool(metadata.launch_cooperative_grid),
        pdl=bool(metadata.launch_pdl),
    )
    return code, cubin


def _with_layout(plain: TensorDescriptor) -> GluonDescriptor:
    """Gluon's descriptor with the layout in shared memory that Triton would choose."""
    layout = NVMMASharedLayout.get_default_for(plain.block_shape, str_to_ty(canonicalize_dtype(plain.base.dtype), None))
    return GluonDescriptor(plain.base, plain.shape, plain.strides, plain.block_shape, layout)


def _kinds(name: str, source: Any, wanted: Mapping[str, Sample]) -> dict[str, Kind]:
    """The parameters that the code takes, in order; and everything that Triton took for granted is proved."""
    kinds: dict[str, Kind] = {}
    for index, (param, sample) in enumerate(wanted.items()):
        kind = source.signature[param]
        if kind == "constexpr":
            if isinstance(getattr(sample.arg, "value", None), sympy.Basic) and not sample.one:
                raise BuildError(f"{name}: Triton folded {param}, which is not always 1")
            continue
        hints = {hint for hint, _ in source.attrs.get((index,), ())}
        if hints - {"tt.divisibility"} or (hints and not sample.multiple):
            raise BuildError(f"{name}: Triton compiled {param} for {sorted(hints)}, which is not proved for all calls")
        if isinstance(sample.arg, Descriptor) and kind.startswith("tensordesc<"):
            whole, *values = sample.arg.parameters(param)
            kinds |= {whole: "tensor_map", **{value: "i32" if ".shape[" in value else "i64" for value in values}}
        elif kind.startswith("*"):
            kinds[param] = "ptr"
        elif kind in _KINDS:
            kinds[param] = _KINDS[kind]
        else:
            raise BuildError(
                f"{name}: parameter {param} has Triton's type {kind}; a record takes pointers and {sorted(_KINDS)}"
            )
    return kinds


def _maps(name: str, metadata: Any, wanted: Mapping[str, Sample]) -> dict[str, MapCode]:
    """Triton's choices for each descriptor, in their order."""
    descriptors = {param: sample.arg for param, sample in wanted.items() if isinstance(sample.arg, Descriptor)}
    found = getattr(metadata, "tensordesc_meta", None) or []
    if len(found) != len(descriptors):
        raise BuildError(
            f"{name}: Triton's metadata has {len(found)} TMA descriptors, the launch has {list(descriptors)}; "
            "they need compute capability 9.0"
        )
    maps: dict[str, MapCode] = {}
    for (param, arg), choice in zip(descriptors.items(), found, strict=True):
        number = _MAP_TYPE_NUMBERS.get(choice["elem_type"], choice["elem_type"])
        supported = 0 <= number < len(TENSOR_MAP_TYPES) and choice["swizzle"] in (0, 1, 2, 3)
        if not supported or choice["fp4_padded"] or choice["elem_size"] != arg.dtype.itemsize or choice.get("is_im2col"):
            raise BuildError(f"{name}: Triton wants the TMA descriptor {param} to be {choice}, which a record cannot express")
        swizzle = 16 << choice["swizzle"] if choice["swizzle"] else 0
        kind = "tfloat32" if arg.tf32 else TENSOR_MAP_TYPES[number]
        maps[param] = {"type": kind, "box": [int(size) for size in choice["block_size"]], "swizzle": swizzle}
    return maps


def _check_metadata(name: str, metadata: Any, ptx: str, target: GpuTarget) -> None:
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise BuildError(
            f"{name}: each block needs {metadata.global_scratch_size} + {metadata.profile_scratch_size} bytes of scratch "
            "(descriptors made on the device do, and profiling), and a record allocates nothing; "
            "choose a config with pointer indexing"
        )
    if metadata.shared > target.shared_memory:
        raise BuildError(
            f"{name}: a block needs {metadata.shared} bytes of shared memory, {target.name} has {target.shared_memory}; "
            "choose smaller blocks"
        )
    if metadata.launch_pdl and "griddepcontrol.wait" not in ptx:
        raise BuildError(
            f"{name}: launched with launch_pdl, but the code never waits for its predecessor; "
            "begin it with hl.pdl_wait() (in Triton, tl.extra.cuda.gdc_wait())"
        )


#: Instructions that read or write global memory, or let the next kernel begin. Prefetches into L2 do no harm.
_TOUCHES = re.compile(
    r"\b(?:griddepcontrol\.launch_dependents|(?:ld|st|atom|red)\.(?:\w+\.)*?global\b|cp\.async\.(?!bulk\.prefetch)\w+)"
)


def _check_waits_first(name: str, ptx: str) -> None:
    """The launcher counts on it (csrc/pending_writes.h): code without early reads waits before it does anything else."""
    before, _, _ = ptx.partition("griddepcontrol.wait")
    if found := _TOUCHES.search(before):
        raise BuildError(
            f"{name}: the code has {found[0]} before it waits for its predecessor; wait first (tl.extra.cuda.gdc_wait()), "
            'or name in the module what is read before the wait: EARLY_READS = ("weight",)'
        )


_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)", re.DOTALL)
_PARAM = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.([a-z])(\d+)[^,\[]*(\[\d+\])?")


def _check_ptx(name: str, function: str, ptx: str, kinds: Mapping[str, Kind], num_warps: int) -> None:
    """The entry takes exactly `kinds` and Triton's two scratch pointers, and blocks have 32 * num_warps threads."""
    entries = _ENTRY.findall(ptx)
    if [entry for entry, _ in entries] != [function]:
        raise BuildError(f"{name}: the PTX has entries {[entry for entry, _ in entries]}; expected {[function]}")
    found = [("f" if letter == "f" else "") + bits + array for letter, bits, array in _PARAM.findall(entries[0][1])]
    expected = [_PTX_TYPES[kind] for kind in kinds.values()] + ["64", "64"]
    if found != expected:
        raise BuildError(
            f"{name}: the PTX entry takes parameters of {found} bits; expected {expected}, that is {dict(kinds)} "
            f"and two scratch pointers. Triton {triton.__version__} has another calling convention than hdispatch knows"
        )
    threads = re.search(r"\.reqntid\s+(\d+)", ptx)
    found_threads = int(threads.group(1)) if threads else None
    if found_threads != 32 * num_warps:
        raise BuildError(f"{name}: the PTX asks for {found_threads} threads per block; expected {32 * num_warps}")


def allocates(module: ModuleType, spec: OpSpec) -> bool:
    """Whether the module's host function allocates what the op returns."""
    return build_unit.allocates(_launch_of(module), spec)


def _launch_of(module: ModuleType) -> types.FunctionType:
    launch = getattr(module, "launch", None)
    if not inspect.isfunction(launch):
        raise BuildError(f"{module.__name__} has no function launch(*args, config, _launcher)")
    return launch


def host_side(module: ModuleType, config: Mapping[str, Any], maker: CallMaker, _hint: int) -> HostSide:
    """`kernels/<op>/triton.py`: a function `launch(*args, config, _launcher)` of the op's arguments, then its workspace.

    What the op returns it takes as arguments, or allocates itself (`torch.empty_like(x)`) and returns. It calls
    `_launcher(kernel, grid, *args, **options)` once, `kernel` being a @triton.jit function; the config's entries
    are its own business (block sizes, num_warps). Offsets into tensors are 64 bits wide; a module whose kernels have them of
    32 says `INDEX_BITS = 32`, and its records refuse tensors that these do not reach. `EARLY_READS = ("weight",)` names the
    tensor arguments that kernels may read before they wait for their predecessors (gdc_wait); a module without it promises
    that they first wait, then release their dependents.
    """
    launch = _launch_of(module)
    bits: Literal[32, 64] = getattr(module, "INDEX_BITS", 64)
    if bits not in (32, 64):
        raise BuildError(f"{module.__name__}: INDEX_BITS is {bits!r}; it takes 32 or 64")

    def host(*args: object, _launcher: Callable[..., None]) -> object:
        return launch(*args, config=dict(config), _launcher=_launcher)

    host.__wrapped__ = launch  # type: ignore[attr-defined]
    return HostSide(
        host, lambda _m, _row_padding, _sizes: True, bits, frozenset(), early_reads(module, maker.spec, maker.variant)
    )

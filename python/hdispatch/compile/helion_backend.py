"""Helion: a kernel and a config become a host function, and Helion's own word on the sizes for which its code is valid.

All use of Helion's private parts is in this file (checked with Helion 1.5): `_bind_isolated`, `_base_specialization_key`,
`_specialize_extra`, `_guarded_input_facts`, the alignment that a fake tensor is taken to have, and whether a size fits 32 bits.

Imports helion, which asks for the device: import this module after `target.install`.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Hashable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

import helion  # type: ignore[import-untyped]
import torch
from helion._compiler import compile_environment, indexing_strategy  # type: ignore[import-untyped]

from ..errors import BuildError
from ..opspec import OpSpec
from . import build_unit
from .call_maker import ROW_PADDING, CallMaker, Ignored
from .expr import turns
from .trace import HostSide


def _say_aligned() -> None:
    """Fake tensors have no address; Helion asks for it where a config has TMA descriptors, and avoids them if not told."""
    asked = compile_environment.tensor_descriptor_runtime_alignment_signature

    def answer(value: object) -> object:
        if isinstance(value, torch._subclasses.FakeTensor):
            return True, value.storage_offset() == 0
        return asked(value)

    compile_environment.tensor_descriptor_runtime_alignment_signature = answer


_say_aligned()


def _say_rows_fit() -> None:
    """No record serves more than 2**31 - 1 rows; Helion makes no TMA descriptor with 64-bit offsets where it does not know."""
    proven = indexing_strategy._tensor_dimension_fits_int32

    def answer(size: int | torch.SymInt) -> object:
        return proven(size) or (_only_rows_vary and not isinstance(size, int))

    indexing_strategy._tensor_dimension_fits_int32 = answer


#: Whether M is the one size that the kernel at hand is not compiled for.
_only_rows_vary = False

_say_rows_fit()


def allocates(module: ModuleType, spec: OpSpec) -> bool:
    """Whether the module's kernel allocates what the op returns."""
    kernel = getattr(module, "KERNEL", None)
    return isinstance(kernel, helion.Kernel) and build_unit.allocates(kernel.fn, spec)


def host_side(module: ModuleType, config: Mapping[str, Any], maker: CallMaker, hint: int) -> HostSide:
    """`kernels/<op>/helion.py`: a Helion kernel named KERNEL that takes the op's arguments, its results among them unless
    it returns them, and then its workspace.

    `CONSTANTS = {"dims": [1, 2], "epilogue": function}` gives further parameters of it their values: lists, functions, whatever
    Helion compiles in. `check(*args)` of the op's arguments, if the module has it, raises ValueError for calls that the kernel
    does not take: what it asks for becomes guards of the record.
    """
    global _only_rows_vary
    _only_rows_vary = not maker.generic()
    kernel = _configured(module, config)
    fixed = constants(module, kernel, maker.symbolic(hint, floats=False).names)
    bound = kernel._bind_isolated(arguments(module, kernel, maker, hint))
    compiled = bound.compile_config(kernel.configs[0])
    check = getattr(module, "check", None)

    def host(*args: object, **launcher: object) -> object:
        if check is not None:
            check(*args)
        return compiled(*args, *fixed, **launcher)

    host.__wrapped__ = compiled  # type: ignore[attr-defined]
    # Helion looks for the kernel that it is at when it asks how large a tile of a fixed size is.
    with bound.host_function:
        extractors = [*bound._specialize_extra(), *bound._guarded_input_facts()]

    def key(m: int, row_padding: int, sizes: Mapping[str, int]) -> tuple[Hashable, ...]:
        args = (*_plain(maker.concrete(m, row_padding, sizes).args), *fixed)
        return (kernel._base_specialization_key(args), *(extract(args) for extract in extractors))

    wanted = key(hint, ROW_PADDING, {})
    return HostSide(
        host=host,
        agrees=lambda m, row_padding, sizes: key(m, row_padding, sizes) == wanted,
        index_bits=64 if bound.env.index_dtype == torch.int64 else 32,
        turns=turns(guard.expr for guard in bound.env.shape_env.guards),
    )


def arguments(module: ModuleType, kernel: Any, maker: CallMaker, hint: int) -> tuple[object, ...]:
    """What a kernel is bound with: a symbolic call, but for integers and floats, of which Helion makes symbols itself."""
    call = maker.symbolic(hint, floats=False)
    _check_ignored(module, kernel, [name for name, arg in zip(call.names, call.args, strict=True) if isinstance(arg, Ignored)])
    args = (arg.node.hint if isinstance(arg, torch.SymInt) else arg for arg in _plain(call.args))
    return (*args, *constants(module, kernel, call.names))


def _plain(args: Iterable[object]) -> tuple[object, ...]:
    """Arguments as Helion takes them: None for a flag that every variant accepts."""
    return tuple(None if isinstance(arg, Ignored) else arg for arg in args)


def _check_ignored(module: ModuleType, kernel: Any, flags: Sequence[str]) -> None:
    """BuildError for a kernel that looks at a flag without values: Helion would compile in the None that stands for it."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kernel.fn))) if flags else ast.Module([], [])
    looked = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & set(flags)
    if looked:
        raise BuildError(
            f"{module.__name__}.KERNEL looks at {min(looked)}, a flag without values; list them in the op's spec: BoolArg(name)"
        )


def constants(module: ModuleType, kernel: Any, taken: Sequence[str]) -> tuple[object, ...]:
    """The values of the kernel's last parameters, which are no arguments of the op. BuildError for others than it has."""
    given: object = getattr(module, "CONSTANTS", {})
    wanted = list(inspect.signature(kernel.fn).parameters)[len(taken) :]
    if not isinstance(given, dict) or set(given) - set(wanted):
        raise BuildError(f"{module.__name__}: CONSTANTS is {given!r}; KERNEL has {wanted} behind the op's arguments")
    return tuple(given[name] for name in wanted if name in given)


def _configured(module: ModuleType, config: Mapping[str, Any]) -> Any:
    """The module's kernel with this one config: unconfigured, it would keep the guards of every config that it might choose."""
    kernel = getattr(module, "KERNEL", None)
    if not isinstance(kernel, helion.Kernel):
        raise BuildError(f"{module.__name__} has no Helion kernel named KERNEL")
    if kernel.settings.static_shapes or kernel.settings.backend != "triton" or kernel._key_fn is not None:
        raise BuildError(
            f"{module.__name__}.KERNEL: static_shapes is {kernel.settings.static_shapes}, backend {kernel.settings.backend!r}, "
            f"key {kernel._key_fn}; it takes @helion.kernel(static_shapes=False) on the triton backend without a key function"
        )
    return helion.Kernel(kernel.fn, configs=[helion.Config(**config)], settings=kernel.settings)

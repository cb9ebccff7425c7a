"""Triton's own word on TMA descriptors, for test_tensor_map.py; runs inside of `in_worker`."""

from __future__ import annotations

import importlib
import inspect
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import helion
import helion.language as hl
import torch
import triton
from hdispatch.compile import DESCRIBED, build_unit, record_builder, store, triton_backend
from hdispatch.compile.call_maker import CallMaker
from hdispatch.compile.trace import trace
from hdispatch.opspec import OpSpec, TensorArg
from triton.backends.nvidia import driver
from triton.tools.tensor_descriptor import TensorDescriptor

#: Addresses of the arguments, in their order, are 2**20 times 1, 2, …
PAGE = 2**20


class Base:
    """A tensor with an address."""

    def __init__(self, tensor: torch.Tensor, pages: dict[int, int]) -> None:
        self.dtype = tensor.dtype
        self.address = PAGE * pages[tensor.untyped_storage()._cdata] + tensor.storage_offset() * tensor.itemsize

    def data_ptr(self) -> int:
        """In bytes."""
        return self.address


def encoded(package: str, variant: str, shape: dict[str, int], config: Any, calls: list[Any]) -> list[Any]:
    """For each [M, row padding, other sizes] what Triton's launcher makes of the launch's descriptors.

    Each is [arguments of its encoder, the parameters that follow the map].
    """
    spec = build_unit.load_spec(package)
    maker = CallMaker(spec, spec.variant(variant), shape)
    module = importlib.import_module(f"{package}.triton")
    side = triton_backend.host_side(module, config, maker, 64)
    launch = trace(side.host, maker.symbolic(64)).launch
    wanted = triton_backend.samples(trace(side.host, maker.symbolic(64)), "other")
    compiled = launch.kernel.warmup(*(sample.value() for sample in wanted.values()), grid=(1,), **launch.options)
    return [_described(module, config, maker.concrete(*call), compiled.metadata.tensordesc_meta) for call in calls]


def _described(module: Any, config: Any, call: Any, metadata: list[Any]) -> list[Any]:
    pages = {tensor.untyped_storage()._cdata: 1 + index for index, (_, tensor) in enumerate(call.tensors())}
    made: list[TensorDescriptor] = []

    def launcher(_kernel: Any, _grid: Any, *args: object, **_kwargs: object) -> None:
        made.extend(arg for arg in args if isinstance(arg, TensorDescriptor))

    with call.mode:
        module.launch(*call.args, config=config, _launcher=launcher)
    utils = types.SimpleNamespace(fill_tma_descriptor_tiled=lambda *args: args)
    found = []
    with mock.patch.object(triton.runtime.driver, "_active", types.SimpleNamespace(utils=utils)):
        for descriptor, facts in zip(made, metadata, strict=True):
            descriptor.base = Base(descriptor.base, pages)
            # Triton 3.8 gives the launch's other arguments too, which it does not read here.
            others = ((),) if len(inspect.signature(driver.make_tensordesc_arg).parameters) == 3 else ()
            encoder, *rest = driver.make_tensordesc_arg(descriptor, facts, *others)
            found.append([[list(arg) if isinstance(arg, (list, tuple)) else arg for arg in encoder], rest])
    return found


@helion.kernel(static_shapes=False)
def double(result: torch.Tensor, input: torch.Tensor) -> None:
    m, k = input.size()
    k = hl.specialize(k)
    for rows, columns in hl.tile([m, k]):
        result[rows, columns] = input[rows, columns] * 2


def helion_record(cache: str) -> Any:
    """The record of a Helion kernel whose config asks for descriptors made on the host, for M from 16 to 31."""
    spec = OpSpec(
        name="toy_helion",
        args=(
            TensorArg("result", ("M", "K"), (torch.float32,), mutated=True),
            TensorArg("input", ("M", "K"), (torch.float32,), layout="rows"),
        ),
        reference=lambda *_args: None,
        sample=lambda *_args: [],
        shapes=({"K": 64},),
        config_key={"width": "K", "rows": "M"},
        ladder=(15, 31, 256),
    )
    modules = {name: types.ModuleType(name) for name in ("toy_helion", "toy_helion.spec", "toy_helion.helion")}
    modules["toy_helion.spec"].SPEC = spec  # type: ignore[attr-defined]
    modules["toy_helion.helion"].KERNEL = double  # type: ignore[attr-defined]
    sys.modules.update(modules)
    config = {"block_sizes": [16, 32], "indexing": "tensor_descriptor", "host_tensor_descriptors": True}
    work = build_unit.Unit("toy_helion", "helion", "any", {"K": 64}, config, (1,))
    return record_builder.build_records(work, DESCRIBED["h200"], {}, store.Store(Path(cache)))[0]["record"]

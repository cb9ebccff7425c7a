"""The CuteDSL kernels of the ll_gemm and scaled_mm ops: few tokens times a matrix of weights, as fast as the weights stream.

Four forms. `Split` multiplies in the tensor core and cuts K over the warps of a block and the blocks of a cluster; `Dot` gives
a block a few outputs and all of K, multiplies in the ordinary cores and serves the fewest tokens. In these two a thread copies
just what it multiplies: the copies are asynchronous and many, and there is nothing to wait for but they themselves.
`Warpgroup` leaves the copies to TMA and the products to wgmma; `BlockScaled` is the same where scales are per 128 of K. In all,
the first weights are under way before the predecessor's results are asked for.

Imports cutlass, which reads CUTE_DSL_ARCH as it is imported: import this module after it is set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from cutlass import BFloat16, Float8E4M3FN, Float16, Float32, Int32, Numeric, cute
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor
from hdispatch.opspec import Variant

from .base import VECTOR, Gemm
from .block_scaled import BlockScaled
from .dot import Dot
from .split import Split
from .warpgroup import Warpgroup

#: By the "kernel" of a config.
FORMS: dict[str, type[Gemm]] = {"split": Split, "dot": Dot, "warpgroup": Warpgroup, "block_scaled": BlockScaled}


def make(
    element: type[Numeric], k: int | None, config: Mapping[str, Any], forms: Mapping[str, type[Gemm]], grouped: bool
) -> Gemm:
    """The kernel that a config describes: its "kernel" among the forms, and that form's arguments."""
    form = forms[config["kernel"]]
    if form.grouped != grouped:
        scales = "per 128 of K" if form.grouped else "per row"
        raise ValueError(f"the {config['kernel']} form takes scales {scales}, the op's are others; choose another form")
    return form(element, k, **{name: value for name, value in config.items() if name != "kernel"})


@dataclass(frozen=True)
class Program:
    """What a bundle's builder compiles: see `hdispatch.compile.cutedsl_backend`."""

    host: Callable[..., None]
    arguments: dict[str, Any]
    largest_m: int
    shared_bytes: int
    multiples: dict[str, int]
    views: dict[str, list[int]]


#: What ll_gemm_fp8 calls its tensors; ll_gemm_bf16 has the first three. A sixth is a bias.
NAMES = ("out", "x", "w", "x_scale", "w_scale")


def program(
    element: type[Numeric],
    out: type[Numeric],
    sizes: Mapping[str, int],
    config: Mapping[str, Any],
    names: tuple[str, ...] = NAMES,
    transposed: bool = False,
    forms: Mapping[str, type[Gemm]] = FORMS,
    grouped: bool = False,
) -> Program:
    """The host function of a config, for any M and N, and any K unless `sizes` has it.

    names       what the op calls out, x, w and the scales
    transposed  whether the op's weights are [K, N], columns contiguous
    forms       the forms that a config may name
    grouped     whether the op's scales are per 128 of K
    """
    gemm = make(element, sizes.get("K"), config, forms, grouped)
    m, n = cute.sym_int(), cute.sym_int()
    k = sizes.get("K") or cute.sym_int(divisibility=gemm.vector)

    def matrix(kind: type[Numeric], shape: tuple[Any, Any], divisor: int, align: int) -> Any:
        return make_fake_tensor(kind, shape, (cute.sym_int64(divisibility=divisor), 1), assumed_align=align)

    arguments = {
        names[0]: matrix(out, (m, n), gemm.out_vector, gemm.out_vector * out.width // 8),
        names[1]: matrix(element, (m, k), gemm.vector, VECTOR),
        names[2]: matrix(element, (n, k), gemm.vector, VECTOR),
    }
    host = gemm.plain
    if element is Float8E4M3FN:
        host = gemm.scaled
        for name, shape in zip(names[3:5], gemm.scale_shapes(m, n), strict=True):
            strides = tuple(cute.sym_int64() for _ in shape)
            arguments[name] = make_fake_tensor(Float32, shape, strides, assumed_align=4)
    if len(names) == len(NAMES) + 1:
        host = gemm.biased
        arguments[names[5]] = make_fake_tensor(out, (n,), (1,), assumed_align=out.width // 8)
    arguments |= {"pdl": Int32(0), "stream": make_fake_stream()}
    if gemm.k is not None and gemm.k % gemm.vector:
        raise ValueError(f"K is {gemm.k}, no multiple of {gemm.vector} elements, which are loaded at once")
    multiples = dict.fromkeys(("K", f"{names[1]}.stride(0)", f"{names[2]}.stride({int(transposed)})"), gemm.vector)
    if gemm.out_vector > 1:
        multiples[f"{names[0]}.stride(0)"] = gemm.out_vector
    return Program(
        host=host,
        arguments=arguments,
        largest_m=gemm.largest_m,
        shared_bytes=gemm.shared_bytes,
        multiples=multiples,
        views={names[2]: [1, 0]} if transposed else {},
    )


def scaled_program(
    variant: Variant,
    sizes: Mapping[str, int],
    config: Mapping[str, Any],
    forms: Mapping[str, type[Gemm]],
    grouped: bool = False,
) -> Program:
    """The host function of a scaled_mm op: a [M, K] and b [K, N] in fp8, scales of both, and a bias where the variant has one.

    forms    those of this op alone, beside FORMS
    grouped  whether scales are per 128 of K
    """
    out = Float16 if variant.dtypes["out"] == torch.float16 else BFloat16
    names = ("out", "a", "b", "a_scales", "b_scales", *(("bias",) if "bias" in variant.dtypes else ()))
    return program(Float8E4M3FN, out, sizes, config, names, transposed=True, forms={**FORMS, **forms}, grouped=grouped)

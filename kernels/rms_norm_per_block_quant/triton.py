"""The Triton kernel of rms_norm_per_block_quant: one row per program, read once, in registers until it is written.

Configs have

    chunk, chunks  a row is `chunks` pieces of `chunk` elements, a power of two, at most: 5120 is 5 times 1024, where one
                   piece of 8192 would leave three threads of eight without work
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from hdispatch.opspec import Variant

from ..lib.triton_fp8 import bounded, row_scale
from ..lib.triton_groups import inverse_scale, power_of_two, store_codes, whole_groups
from ..lib.triton_launch import launch_options

GENERIC = ("K",)
EARLY_READS = ("weight",)


@triton.jit
def load_row(pointer, groups_of_row, GROUP: tl.constexpr, GROUPS: tl.constexpr, CHUNKS: tl.constexpr):
    """A row of groups_of_row groups as CHUNKS tiles [GROUPS, GROUP], zeros behind its end."""
    tiles = ()
    for chunk in tl.static_range(CHUNKS):
        group = chunk * GROUPS + tl.arange(0, GROUPS)[:, None]
        place = pointer + group * GROUP + tl.arange(0, GROUP)[None, :]
        tiles += (tl.load(place, group < groups_of_row, other=0.0),)
    return tiles


@triton.jit
def rms_norm_per_block_quant(
    result, input, weight, scale, scale_ub, residual, epsilon, groups_of_row, input_stride, row_stride, group_stride,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, CHUNKS: tl.constexpr, UE8M0: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A row of at most CHUNKS * GROUPS groups of GROUP elements."""
    dtype: tl.constexpr = input.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    start = row * groups_of_row * GROUP
    # A constant, which need not wait.
    weights = load_row(weight, groups_of_row, GROUP, GROUPS, CHUNKS)
    if PDL:
        tl.extra.cuda.gdc_wait()
    rounded = load_row(input + row * input_stride, groups_of_row, GROUP, GROUPS, CHUNKS)
    if residual is not None:
        added = load_row(residual + start, groups_of_row, GROUP, GROUPS, CHUNKS)
    if scale_ub is not None:
        bound = tl.load(scale_ub)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()

    tiles = ()
    squares = tl.zeros((GROUPS, GROUP), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        x = rounded[chunk].to(tl.float32)
        if residual is not None:
            group = chunk * GROUPS + tl.arange(0, GROUPS)[:, None]
            x += added[chunk].to(tl.float32)
            place = residual + start + group * GROUP + tl.arange(0, GROUP)[None, :]
            tl.store(place, x.to(dtype), group < groups_of_row)
        squares += x * x
        tiles += (x,)
    rstd = tl.rsqrt(tl.sum(squares) / (groups_of_row * GROUP) + epsilon)

    for chunk in tl.static_range(CHUNKS):
        group = chunk * GROUPS + tl.arange(0, GROUPS)
        y = ((tiles[chunk] * rstd).to(dtype).to(tl.float32) * weights[chunk].to(tl.float32)).to(dtype).to(tl.float32)
        absmax = tl.max(tl.abs(y), 1)
        if scale_ub is not None:
            absmax = bounded(absmax, bound)
        s = row_scale(absmax)
        if UE8M0:
            s = power_of_two(s)
        offset = start + group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        # 8 bytes, because that is what a thread has of each 16-byte load of the inputs.
        # A product, not a division, as in vLLM. That which NaN is not needs no clamping where it is 448 at most.
        codes = tl.minimum(y * inverse_scale(s, UE8M0)[:, None], 448.0)
        if scale_ub is not None:
            codes = tl.maximum(codes, -448.0)
        store_codes(result, offset, codes, (group < groups_of_row)[:, None], 8)
        tl.store(scale + row * row_stride + group.to(tl.int64) * group_stride, s, group < groups_of_row)


def launch(
    result, input, weight, scale, epsilon, scale_ub, residual, group_size, _is_scale_transposed, scale_ue8m0, *, config,
    _launcher,
):  # fmt: skip
    """One program per row of at most `chunk` * `chunks` elements."""
    m, k = input.size(0), input.size(1)
    if k > config["chunk"] * config["chunks"]:
        raise ValueError(f"a row has {k} elements; the config takes up to {config['chunk']} * {config['chunks']}")
    tensors = (result, input, weight, scale, scale_ub, residual)
    strides = (input.stride(0), scale.stride(0), scale.stride(1))
    tile = {"GROUP": group_size, "GROUPS": config["chunk"] // group_size, "CHUNKS": config["chunks"]}
    groups_of_row, options = whole_groups(k, group_size), launch_options(config)
    _launcher(rms_norm_per_block_quant, (m,), *tensors, epsilon, groups_of_row, *strides, **tile, UE8M0=scale_ue8m0, **options)


def candidates(sizes: dict[str, int], _variant: Variant) -> list[dict[str, Any]]:
    """Configs worth measuring for some sizes; the first is a safe default. Without a K, those that serve up to 16384."""
    if "K" not in sizes:
        return [{"chunk": 16384, "chunks": 1, "num_warps": warps} for warps in (16, 32)]
    whole = triton.next_power_of_2(sizes["K"])
    pieces = [(whole, 1)]
    # The largest power of two of which a row is a few pieces.
    chunk = sizes["K"] & -sizes["K"]
    if chunk < whole and sizes["K"] // chunk <= 8:
        pieces.append((chunk, sizes["K"] // chunk))
    configs = [
        {"chunk": chunk, "chunks": chunks, "num_warps": warps}
        for chunk, chunks in pieces
        for warps in (chunk // 512, chunk // 256, chunk // 1024, chunk // 2048, chunk // 128)
        if 1 <= warps <= 32 and 64 * 32 * warps >= chunk * chunks
    ]
    return configs or [{"chunk": whole, "chunks": 1, "num_warps": 32}]

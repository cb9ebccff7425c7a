"""The quantizing kernels on special values, interpreted on the CPU; run as a program, which prints failures as JSON.

An interpreter is switched on by the environment when it is imported, TRITON_INTERPRET or HELION_INTERPRET, never both; so
each runs in a process of its own. The GPU's arithmetic is put into Triton's where it differs: a minimum or maximum of a
number and NaN is the number, fma rounds once, conversions round to even and keep subnormal numbers, that to fp8 clamps at
±448, and exp is torch's.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from hdispatch.opspec import OpSpec, Variant
from hdispatch.testing.special_values import special_rows
from numpy.typing import NDArray

#: Small sizes; the row-wise Triton kernels run with rows that fit a block and with rows that do not. Packed scales: the five
#: groups of a row leave three bytes of its second word.
COLUMNS, PACKED_COLUMNS = 256, 640
#: The Helion kernel of packed scales takes whole words.
WHOLE_WORDS = 1024
INTERPRETS_HELION = os.environ.get("HELION_INTERPRET") == "1"
#: op -> configs of its Triton kernel.
ROWS = (
    {"rows": 1, "block": 256, "loop": False, "num_warps": 1},
    {"rows": 4, "block": 256, "loop": False, "num_warps": 1},
    {"rows": 2, "block": 64, "loop": True, "num_warps": 1},
)
GROUPS = ({"elements": 256, "vector": 8, "num_warps": 1}, {"elements": 1024, "vector": 16, "num_warps": 1})
CONFIGS: dict[str, tuple[dict[str, Any], ...]] = {
    "dynamic_per_token_scaled_fp8_quant": ROWS,
    "silu_and_mul_dynamic_per_token_quant": ROWS,
    "rms_norm_dynamic_per_token_quant": ROWS,
    "dynamic_scaled_fp8_quant": ({"rows": 1, "block": 256, "programs": 2, "num_warps": 1},),
    "static_scaled_fp8_quant": ({"block": 256, "num_warps": 1}, {"block": 64, "num_warps": 1}),
    "per_token_group_fp8_quant": GROUPS,
    "per_token_group_fp8_quant_packed": GROUPS,
    "silu_and_mul_per_block_quant": GROUPS,
    "silu_and_mul": ({"block": 256, "num_warps": 1}, {"block": 64, "num_warps": 1}),
    "rms_norm_per_block_quant": ({"chunk": 256, "chunks": 1, "num_warps": 1}, {"chunk": 128, "chunks": 2, "num_warps": 1}),
}
#: What the ops call their codes and scales.
OUTPUTS = ("result", "out", "output_q", "scale", "scales", "output_s", "output_s_packed")
F32 = np.float32
Rows = NDArray[np.float32]


def like_the_gpu() -> None:
    """Give Triton's interpreter the GPU's minimum, maximum, fma, bfloat16 and conversions."""
    builder: Any = interpreter.InterpreterBuilder
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    builder.create_clampf = lambda self, x, low, high, _nans: self.ternary_op(
        x, low, high, lambda x, low, high: np.fmax(np.fmin(x, high), low)
    )

    def fma(self: Any, a: Any, b: Any, c: Any) -> Any:
        exact = a.data.astype(np.float64) * b.data.astype(np.float64) + c.data.astype(np.float64)
        return interpreter.TensorHandle(exact.astype(a.data.dtype), c.dtype.scalar)

    builder.create_fma = fma

    def bfloat16_too(operation: Any) -> Callable[..., Any]:
        """The interpreter keeps bfloat16 as integers, and would add and multiply those."""

        def run(self: Any, a: Any, b: Any) -> Any:
            if a.dtype.scalar != tl.bfloat16:
                return self.binary_op(a, b, operation)
            x, y = ((v.data.astype(np.uint32) << 16).view(np.float32) for v in (a, b))
            made = torch.from_numpy(np.atleast_1d(operation(x, y))).bfloat16().view(torch.int16).numpy().view(np.uint16)
            return interpreter.TensorHandle(made, a.dtype.scalar)

        return run

    builder.create_fadd, builder.create_fmul = bfloat16_too(np.add), bfloat16_too(np.multiply)
    own = interpreter._convert_float

    builder.create_exp = lambda self, x: self.unary_op(x, lambda values: torch.exp(torch.from_numpy(values)).numpy())

    def convert(x: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) == (tl.bfloat16, tl.float32):
            return x.view(np.uint16).astype(np.uint32) << 16
        if source != tl.float32 or target not in (tl.bfloat16, tl.float8e4nv):
            return own(x, source, target, rounding)
        values = torch.from_numpy(np.ascontiguousarray(x))
        if target == tl.bfloat16:
            return values.bfloat16().view(torch.int16).numpy().view(np.uint16)
        return values.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    interpreter._convert_float = convert
    interpret_faster()


def interpret_faster() -> None:
    """Half of the interpreter's time goes to what has no effect, or to what is the same at each operation and each call."""
    find_builtins_once()
    # Whether an integer overflows is computed at each operation, and read by device_assert in debug mode alone.
    builder = interpreter.interpreter_builder
    assert not builder.options.debug, "the interpreter asserts that no integer overflows: keep it computed"
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    own, known = interpreter._get_np_dtype, dict[str, np.dtype[Any]]()

    def np_dtype(kind: Any) -> np.dtype[Any]:
        element = kind.element_ty if isinstance(kind, tl.block_type) else kind
        if element.name not in known:
            known[element.name] = own(element)
        return known[element.name]

    interpreter._get_np_dtype = np_dtype


def find_builtins_once() -> None:
    """At each call of a kernel and of its functions the interpreter looks for builtins among all that a module has.

    A quarter of the time is that, and their names do not change. In a kernel's functions all are replaced already.
    """

    @functools.cache
    def names(module: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(module) if tl.core.is_builtin(member)]

    def members(module: Any) -> list[tuple[str, Any]]:
        found = names(module)
        are_replaced = found and not tl.core.is_builtin(getattr(module, found[0]))
        return [] if are_replaced else [(name, getattr(module, name)) for name in found]

    interpreter.inspect = SimpleNamespace(**{**vars(inspect), "getmembers": members})


def spec_of(op: str) -> OpSpec:
    return importlib.import_module(f"hdispatch.kernels.{op}.spec").SPEC


def widened(rows: torch.Tensor) -> torch.Tensor:
    """The rows as part of a wider tensor of NaN, which a kernel must not read."""
    wide = torch.full((rows.shape[0], rows.shape[1] + 16), float("nan"), dtype=rows.dtype)
    wide[:, :-16] = rows
    return wide[:, :-16]


def arguments(spec: OpSpec, variant: Variant, scale_ub: float) -> dict[str, Any]:
    """Sample arguments by name, their inputs replaced by special rows."""
    dtype = variant.dtypes["input"]
    columns = (WHOLE_WORDS if INTERPRETS_HELION else PACKED_COLUMNS) if spec.name.endswith("packed") else COLUMNS
    special = special_rows(columns, dtype)
    if spec.name.startswith("silu"):
        # Every kind of gate with three kinds of up.
        special = torch.cat([torch.cat([special, special.roll(shift, 0)], dim=1) for shift in (0, 8, 19)])
    sizes = {"M": len(special), "K": columns, "N": columns}
    assert sizes["M"] % 4, "packed scales would have no padded rows"
    values = spec.sample(variant, sizes, torch.device("cpu"), torch.Generator().manual_seed(0))
    args = dict(zip((arg.name for arg in spec.args), values, strict=True))
    layouts = {arg.name: getattr(arg, "layout", "") for arg in spec.args}
    args["input"] = widened(special) if layouts["input"] == "rows" else special
    if args.get("residual") is not None:
        args["residual"] = special_rows(COLUMNS, dtype, seed=1).roll(5, 0).contiguous()
    if args.get("scale_ub") is not None:
        args["scale_ub"].fill_(scale_ub)
    return args


def copied(args: dict[str, Any]) -> dict[str, Any]:
    """Tensors with the strides they have, and with what lies between their rows or columns."""

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage().clone()
        return torch.empty(0, dtype=tensor.dtype).set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())  # type: ignore[call-overload]

    return {name: copy(value) if isinstance(value, torch.Tensor) else value for name, value in args.items()}


def whole(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """Every byte of a tensor's storage."""
    return np.frombuffer(bytes(tensor.untyped_storage()), np.uint8)


# What vLLM's CUDA kernels compute, in numpy float32, which rounds as CUDA C does and never contracts.


def codes(x: Rows, low_first: bool = False) -> NDArray[np.uint8]:
    """e4m3 codes of x clamped to ±448; NaN becomes the bound that the clamp names first."""
    clamped = np.fmin(np.fmax(x, F32(-448)), F32(448)) if low_first else np.fmax(np.fmin(x, F32(448)), F32(-448))
    values = np.array([m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:-1])
    size = np.abs(clamped).astype(np.float64)
    above = np.clip(np.searchsorted(values, size), 1, len(values) - 1)
    up, down = values[above] - size, size - values[above - 1]
    code = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, above - 1)
    return (code + 128 * np.signbit(clamped)).astype(np.uint8)


def absmax(x: Rows) -> Rows:
    return np.fmax.reduce(np.abs(x), axis=-1, initial=F32(0))


def row_scale(largest: Rows, bound: float | None) -> Rows:
    if bound is not None:
        largest = np.fmin(largest, F32(bound))
    return np.fmax(largest / F32(448), F32(1 / (448 * 512)))


def activated(x: Rows) -> Rows:
    gate, up = np.split(x, 2, axis=-1)
    # numpy's exp may differ from torch's in the last bit.
    exp = torch.exp(torch.from_numpy(-gate)).numpy()
    return gate * (F32(1) / (F32(1) + exp)) * up


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """Of vLLM's op silu_and_mul, which rounds silu to 16 bits and adds 0 to up."""
    gate, up = x.float().chunk(2, dim=-1)
    silu = torch.from_numpy(gate.numpy() / (F32(1) + torch.exp(-gate).numpy()))
    return (silu.to(x.dtype).float() * (up + 0.0)).to(x.dtype)


def normalized(args: dict[str, Any]) -> Rows:
    total = args["input"].float()
    if args["residual"] is not None:
        total = total + args["residual"].float()
    # The sum and the roots as torch has them: another order is another test's.
    rstd = torch.rsqrt((total * total).mean(dim=-1, keepdim=True) + args["epsilon"])
    dtype = args["weight"].dtype
    rounded = (total * rstd).to(dtype).float() * args["weight"].float()
    return rounded.to(dtype).float().numpy()


def grouped(x: Rows, size: int) -> Rows:
    return x.reshape(x.shape[0], -1, size)


def vllm(op: str, args: dict[str, Any]) -> tuple[NDArray[np.uint8], Rows | NDArray[np.int32]]:
    """The codes and scales of vLLM's kernel; of packed scales the whole storage."""
    bound = None if args.get("scale_ub") is None else float(args["scale_ub"])
    rows = args["input"].float().numpy()
    if op == "static_scaled_fp8_quant":
        return codes(rows * (F32(1) / args["scale"].numpy())), args["scale"].numpy()
    if op == "dynamic_scaled_fp8_quant":
        scale = absmax(rows.reshape(1, -1)) / F32(448)
        return codes(rows * (F32(1) / scale)), scale
    if "per_token_group" in op:
        x = grouped(rows, args["group_size"])
        scale = np.fmax(absmax(x), F32(args["eps"])) / F32(args["fp8_max"])
        packed = op.endswith("packed")
        if packed or args["scale_ue8m0"]:
            mantissa, exponent = np.frexp(np.fmax(scale, F32(1e-10)))
            with np.errstate(invalid="ignore"):
                rounded = np.exp2(np.where(mantissa == 0.5, exponent - 1, exponent)).astype(F32)
            scale = np.where(np.isinf(scale), scale, rounded)
        found = codes(x * (F32(1) / scale)[..., None], low_first=True).reshape(rows.shape)
        return found, packed_storage(scale) if packed else scale
    if op == "rms_norm_per_block_quant":
        x = grouped(normalized(args), args["group_size"])
        scale = row_scale(absmax(x), bound)
        return codes(x * (F32(1) / scale)[..., None]).reshape(rows.shape), scale
    if op == "silu_and_mul_per_block_quant":
        x = grouped(activated(rows), args["group_size"])
        scale = np.fmax.reduce(np.abs(x), axis=-1) / F32(448)  # NaN of NaNs alone
        scale = np.fmax(scale if bound is None else np.fmin(scale, F32(bound)), F32(1 / (448 * 512)))
        return codes(x / scale[..., None]).reshape(len(rows), -1), scale
    x = normalized(args) if op.startswith("rms") else activated(rows) if op.startswith("silu") else rows
    scale = row_scale(absmax(x), bound)[:, None]
    return codes(x / scale), scale


def packed_storage(scale: Rows) -> NDArray[np.int32]:
    """Words [columns, rows filled up to four], flat, without what lies behind the last column."""
    rows, groups = scale.shape
    pitch, words = -(-rows // 4) * 4, -(-groups // 4)
    storage = np.zeros((words, pitch, 4), np.uint8)
    for group in range(groups):
        storage[group // 4, :rows, group % 4] = (scale[:, group].view(np.int32) >> 23).astype(np.uint8)
    return storage.reshape(-1, 4).view(np.int32).reshape(-1)[: pitch * (words - 1) + rows]


def check(spec: OpSpec, before: dict[str, Any], after: dict[str, Any]) -> None:
    """`after` is what vLLM's kernel would have made of `before`, bit for bit, and no byte more."""
    if spec.name == "silu_and_mul":
        numbers, wanted = after["result"], silu_and_mul(before["input"])
        equal(numbers.isnan().numpy(), wanted.isnan().numpy(), "NaN")
        numbers, wanted = (torch.where(wanted.isnan(), 0, values).view(torch.int16) for values in (numbers, wanted))
        equal(numbers.numpy(), wanted.numpy(), "results")
        return
    # The first two that the op has: its codes and, written by all but the static op, its scales.
    out, scale = [arg.name for arg in spec.args if arg.name in OUTPUTS][:2]
    ours = spec.name.endswith("per_block_quant") and before.get("scale_ue8m0")
    if ours:  # not in vLLM
        reference = copied(before)
        spec.reference(*reference.values())
        wanted_codes, wanted_scale = reference[out].view(torch.uint8).numpy(), reference[scale].numpy()
    else:
        wanted_codes, wanted_scale = vllm(spec.name, before)
    got = after[out].view(torch.uint8).numpy()
    equal(got, wanted_codes, "codes")
    if spec.name.endswith("packed"):
        storage = whole(before[scale]).view(np.int32).copy()
        storage[: len(wanted_scale)] = wanted_scale
        equal(whole(after[scale]).view(np.int32), storage, "words of the scale storage")
    else:
        equal(
            after[scale].numpy().view(np.int32), np.asarray(wanted_scale).reshape(after[scale].shape).view(np.int32), "scales"
        )
    assert not ((got & 0x7F) == 0x7F).any(), "a code is NaN"


def equal(got: NDArray[Any], wanted: NDArray[Any], what: str) -> None:
    differ = got != wanted
    if differ.any():
        at = tuple(int(i) for i in np.argwhere(differ)[0])
        raise AssertionError(f"{int(differ.sum())} of {differ.size} {what} differ, the first at {at}: {got[at]}, {wanted[at]}")


def callers(op: str) -> dict[str, Callable[[dict[str, Any]], Any]]:
    """How to run the op, by name: its Helion kernel, or its reference and its Triton kernel with each config."""
    if INTERPRETS_HELION:
        kernel = importlib.import_module(f"hdispatch.kernels.{op}.helion").KERNEL
        return {"Helion": lambda args: kernel(*args.values())}
    triton_kernel = importlib.import_module(f"hdispatch.kernels.{op}.triton")
    found: dict[str, Callable[[dict[str, Any]], Any]] = {"reference": lambda args: spec_of(op).reference(*args.values())}

    def launched(config: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
        def launcher(kernel: Any, grid: tuple[int, ...], *values: Any, **options: Any) -> None:
            kernel[grid](*values, **{k: v for k, v in options.items() if k.isupper()})

        return lambda args: triton_kernel.launch(*args.values(), config={**config, "pdl": False}, _launcher=launcher)

    for config in CONFIGS[op]:
        found[f"Triton {config}"] = launched(config)
    return found


def failures(op: str) -> list[str]:
    spec, found = spec_of(op), []
    for index, variant in enumerate(spec.served_variants()):
        # The variants with a scale_ub take turns with one that clamps and two that do not.
        before = arguments(spec, variant, (0.7, float("inf"), float("nan"))[index % 3])
        for name, call in callers(op).items():
            after = copied(before)
            try:
                call(after)
                check(spec, before, after)
            except Exception as error:
                bound = "" if before.get("scale_ub") is None else f" scale_ub {float(before['scale_ub'])}"
                found.append(f"{variant.name}{bound} {name}: {type(error).__name__}: {error}")
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    if os.environ.get("TRITON_INTERPRET") == "1":
        like_the_gpu()
    json.dump({op: failures(op) for op in (sys.argv[1:] or CONFIGS)}, sys.stdout)
    sys.stdout.write("\n")

"""Random calls of every op through three doors, against its reference: `scripts/fuzz.py SECONDS`.

A call has random sizes (edges of buckets ± 1, no rows, odd sizes), dtypes, strides, offsets, special values and shapes that
stand for others; every tensor lies between guard bytes, outputs are poisoned; a quarter of the calls have something wrong.
Checked is that the doors agree, that a call is counted once, that nothing but what the op writes has changed, that a wrong
call raises `ArgumentError` and writes nothing, and that the results are the reference's. On a GPU those of launches are
compared; on the CPU, with the null driver, launches must have written nothing, and the fallback's results are compared.

A seed and a number give the same call again: what fails is printed with the command that repeats it alone.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hdispatch
import torch
from hdispatch import _C
from hdispatch.kernels.per_token_group_fp8_quant_packed.spec import padding
from hdispatch.manifest import ARTIFACTS, CHECKSUM_NAME, MANIFEST_NAME, SCHEMA_VERSION
from hdispatch.opspec import BoolArg, FloatArg, IntArg, OpSpec, StrArg, TensorArg, Variant
from hdispatch.testing.numeric import MismatchError, compare_outputs

Args = list[Any]
#: Errors that a door may raise for a wrong call, besides those of torch's parser for a wrong type.
REFUSED = hdispatch.ArgumentError
GUARD = 64  # bytes before and after a tensor
#: What the references say of an index that points outside of its tensor, on the CPU.
OUTSIDE = "; expected at least 0 and less than "
DOORS: dict[str, Callable[[str], Callable[..., None]]] = {
    "hdispatch.ops": lambda name: getattr(hdispatch.ops, name),
    "torch.ops": lambda name: getattr(torch.ops.hdispatch, name),
    "torch.ops default": lambda name: getattr(torch.ops.hdispatch, name).default,
}


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """torch's default dtype for the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


AMBIENT: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cuda" if torch.cuda.is_available() else "cpu", dtype=torch.bfloat16),
    "float64 by default": lambda: default_dtype(torch.float64),
}


#: Ops whose results are compared by a norm.
GEMMS = ("scaled_mm", "scaled_mm_blockwise", "ll_gemm_bf16", "ll_gemm_fp8")
#: Sizes beyond it, as a vocabulary, take too long.
LARGEST = 2**16
#: Integers that the references believe.
LONGEST = ("max_seq_len", "max_seqlen_q", "max_seqlen_k")
#: Ops whose fallback is torch's SDPA, which makes of infinite and undefined scores what its kernels differ in.
SDPA = ("attention_dense", "attention_varlen")


class FailureError(Exception):
    """A call did what it must not."""


class Case:
    """One call: the op, canonical arguments, and what was done to them. All of it follows from the seed."""

    def __init__(self, seed: str, names: list[str], device: torch.device) -> None:
        self.random = random.Random(seed)
        self.device = device
        self.generator = torch.Generator(device).manual_seed(self.random.getrandbits(31))
        self.spec: OpSpec = hdispatch.registry.spec(self.random.choice(names))
        # Of the other variants of an op that writes strings' formats most are refused: a format is of a dtype.
        formats = any(isinstance(arg, StrArg) for arg in self.spec.args)
        self.variant: Variant = self.random.choice(self.spec.served_variants() if formats else self.spec.variants())
        self.notes: list[str] = []
        self.expects: str = "result"  # or "error", or "either"
        self.is_finite = True
        self.is_comparable = True
        self.sizes = self._sizes()
        self.args: Args = self.spec.sample(self.variant, self.sizes, device, self.generator)
        if self.random.random() < 0.2:
            self._put_special_values()
        self.ambient = self.random.choice(list(AMBIENT)) if self.random.random() < 0.1 else None

    def __str__(self) -> str:
        return f"{self.spec.name} {self.variant.name} {self.sizes} {'; '.join(self.notes)} {self.ambient or ''}".strip()

    def _sizes(self) -> dict[str, int]:
        """M at the edges of buckets, none, or any; K and N of a shape, or odd ones, in whole heads."""
        pick, is_gpu = self.random.random(), self.device.type == "cuda"
        edges = [m for edge in (1, *self.spec.ladder) for m in (edge - 1, edge, edge + 1) if m and (is_gpu or m <= 65)]
        m = 0 if pick < 0.05 else self.random.choice(edges) if pick < 0.7 else self.random.randint(1, 300 if is_gpu else 40)
        heads = self.variant.static.get("head_size") or self.variant.static.get("head_dim")
        sizes = {"M": m}
        for symbol in set(self.spec.symbols()) - {"M"}:
            given = [shape[symbol] for shape in self.spec.shapes if shape.get(symbol, LARGEST) < LARGEST]
            if "head_dim" in self.spec.config_key:
                group = int(self.variant.static.get("group", 1))
                sizes[symbol] = self.random.choice(given) if given else group * self.random.randint(1, 8 if is_gpu else 2)
            elif heads:
                sizes[symbol] = int(heads) * self.random.randint(3, 24 if is_gpu else 6)
            elif self.spec.name == "rms_norm" and symbol == "N":
                sizes[symbol] = self.random.choice((1, 1, 2, 5, 8))
            elif is_gpu and given and self.random.random() < 0.5:
                sizes[symbol] = self.random.choice(given)
            else:
                sizes[symbol] = self.random.choice((16, 64, 128, 192, 256, 320, 640, 1024, self.random.randint(1, 600)))
        limit = 2**23 if is_gpu else 2**13
        most = math.prod(sizes[s] for s in sizes if s != "M")
        sizes["M"] = min(m, max(limit // max(most, 1), 1)) if m else 0
        return sizes

    def _put_special_values(self) -> None:
        values = [0.0, -0.0, 448.0, -448.0, 1e-40, 6e-8, float("nan"), float("inf"), float("-inf")]
        for arg, tensor in zip(self.spec.args, self.args, strict=True):
            if not isinstance(arg, TensorArg) or tensor is None or arg.mutated or not tensor.is_floating_point():
                continue
            if tensor.numel() and self.random.random() < 0.7:
                value = self.random.choice(values[:4] if tensor.element_size() == 1 else values)
                # Of a matrix product nothing but the norm of the error is compared, which one outlier would be; and tensor
                # cores add fp8 products in some 14 bits of the largest one.
                is_outlier = self.spec.name in GEMMS and (tensor.dtype == torch.float32 or abs(value) == 448)
                self.is_finite = self.is_finite and math.isfinite(value)
                self.is_comparable = self.is_comparable and not is_outlier
                flat = tensor.flatten().clone()
                flat[self.random.randrange(flat.numel())] = value
                tensor.copy_(flat.view(tensor.shape))
                self.notes.append(f"{arg.name} has {value}")

    # ---- the arguments of one door ----

    def place(self, seed: int) -> tuple[Args, list[torch.Tensor]]:
        """The arguments in legal layouts and shapes, and the memory that they lie in, between guard bytes.

        The same for the same seed: all in one storage, or each in its own.
        """
        rng, placed = random.Random(seed), list[Any]()
        is_merged, is_apart = rng.random() < 0.2, rng.random() < 0.3
        layouts = [None if not isinstance(v, torch.Tensor) else self._layout(a, v, rng) for a, v in self._pairs()]
        sizes = [-(-sum(layout[1:]) // 16) * 16 + GUARD for layout in layouts if layout]
        memory = [self._guarded(size) for size in sizes] if is_apart else [self._guarded(sum(sizes))]
        at, buffers = GUARD, iter(memory)
        for (arg, value), layout in zip(self._pairs(), layouts, strict=True):
            if layout is None:
                placed.append(value)
                continue
            strides, offset, size = layout
            buffer = next(buffers) if is_apart else memory[0]
            flat = buffer[at + offset : at + offset + size].view(value.dtype)
            tensor = flat.as_strided(value.shape, strides) if value.numel() else flat.view(value.shape)
            placed.append(self._reshaped(arg, tensor.copy_(value), rng, is_merged))
            at += 0 if is_apart else -(-(offset + size) // 16) * 16 + GUARD
        return placed, memory

    def _pairs(self) -> list[tuple[Any, Any]]:
        return list(zip(self.spec.args, self.args, strict=True))

    def _guarded(self, size: int) -> torch.Tensor:
        return torch.full((GUARD + size,), 0xA5, dtype=torch.uint8, device=self.device)

    def _layout(self, arg: TensorArg, value: torch.Tensor, rng: random.Random) -> tuple[list[int], int, int]:
        """Strides; bytes to leave free; bytes from the first element to the last."""
        strides = list(value.stride())
        if value.dim() == 2 and value.numel() and rng.random() < 0.4:
            extra = rng.choice((1, 8, 16, 64))
            if arg.layout in ("rows", "any") and strides[1] == 1:
                strides[0] = max(strides[0], value.size(1)) + extra
            elif arg.layout in ("columns", "any") and strides[0] == 1:
                strides[1] = max(strides[1], value.size(0)) + extra
        extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, strides, strict=True))
        bytes_each = value.element_size()
        return strides, rng.choice((0, 0, 0, 16, 8, 4, 1)) * bytes_each, (extent if value.numel() else 0) * bytes_each

    def _reshaped(self, arg: TensorArg, tensor: torch.Tensor, rng: random.Random, is_merged: bool) -> torch.Tensor:
        """The same elements in another shape that the declaration takes."""
        if arg.flat and rng.random() < 0.5 and tensor.is_contiguous():
            return tensor.view(rng.choice(([-1, 1], [1, -1], [1, -1, 1]) if tensor.numel() else [list(tensor.shape)]))
        if arg.pad and tensor.size(1) == 1 and rng.random() < 0.5:
            return tensor.squeeze(1)
        if arg.merge and is_merged and tensor.dim() < 4:
            head = self.variant.static.get("head_size")
            if head and rng.random() < 0.5:
                return tensor.unflatten(-1, (tensor.size(-1) // int(head), int(head)))
            if tensor.dim() == 2:
                return tensor.unsqueeze(0)
        return tensor

    def spoil(self, args: Args, seed: int) -> None:
        """Put one thing wrong in a quarter of the calls; the same thing for the same seed."""
        rng = random.Random(seed + 1)
        self.expects, self.notes = "result", [note for note in self.notes if not note.startswith("wrong: ")]
        if rng.random() >= 0.25:
            return
        index = rng.randrange(len(args))
        arg, what = self.spec.args[index], rng.choice(tuple(WRONG))
        before, was_comparable = list(args), self.is_comparable
        changed = WRONG[what](self, args, index, rng)
        if self.device.type == "cuda" and isinstance(arg, TensorArg) and points_outside(self.spec, args):
            args[:], self.is_comparable = before, was_comparable
        elif changed is not None:
            self.expects = changed
            self.notes.append(f"wrong: {arg.name} {what}")


def points_outside(spec: OpSpec, args: Args) -> bool:
    """Whether an index points outside of what it is of. On a GPU nobody looks at it, and torch's assertion ends the context."""
    if not any(isinstance(value, torch.Tensor) and value.dtype in (torch.int32, torch.int64) for value in args):
        return False
    try:
        spec.reference(*(value.cpu() if isinstance(value, torch.Tensor) and value.is_cuda else value for value in args))
    except Exception as error:  # of another fault, as memory that was freed, the doors must tell
        return OUTSIDE in str(error)
    return False


# ---- wrong calls: each changes args[index] and says what is to be expected, or None where it does not apply ----


def tensor_of(case: Case, args: Args, index: int) -> torch.Tensor | None:
    """args[index] if it is a tensor."""
    return args[index] if isinstance(case.spec.args[index], TensorArg) and args[index] is not None else None


def wrong_dtype(case: Case, args: Args, index: int, rng: random.Random) -> str | None:
    """A dtype that no argument of any op has there."""
    if (tensor := tensor_of(case, args, index)) is None:
        return None
    args[index] = torch.zeros(tensor.shape, dtype=rng.choice((torch.float64, torch.int8, torch.complex64)), device=case.device)
    return "error"


def wrong_size(case: Case, args: Args, index: int, rng: random.Random) -> str | None:
    """One more or less in one dimension."""
    tensor, arg = tensor_of(case, args, index), case.spec.args[index]
    if tensor is None or not tensor.dim() or not isinstance(arg, TensorArg):
        return None
    shape = list(tensor.shape)
    d = rng.randrange(len(shape))
    shape[d] = max(0, shape[d] + rng.choice((-1, 1)))
    args[index] = torch.zeros(shape, dtype=tensor.dtype, device=case.device)
    return "either"  # another M is a call of another size, if this is the only tensor that has it


def wrong_rank(case: Case, args: Args, index: int, rng: random.Random) -> str | None:
    """Dimensions added, or all but one taken away."""
    if (tensor := tensor_of(case, args, index)) is None:
        return None
    args[index] = rng.choice((tensor[None], tensor[..., None], tensor.flatten(), tensor[None, None, None, None]))
    return "either"


def wrong_strides(case: Case, args: Args, index: int, rng: random.Random) -> str | None:
    """Columns, every other element, one row repeated."""
    tensor = tensor_of(case, args, index)
    if tensor is None or tensor.dim() != 2:
        return None
    wide = torch.zeros(tensor.size(0), 2 * tensor.size(1), dtype=tensor.dtype, device=case.device)
    other = torch.zeros(tensor.size(1), tensor.size(0), dtype=tensor.dtype, device=case.device).t()
    args[index] = rng.choice((wide[:, ::2], other, wide[:, : tensor.size(1)], other[:1].expand(tensor.shape)))
    return "either"


def wrong_none(case: Case, args: Args, index: int, rng: random.Random) -> str | None:  # noqa: ARG001
    """None for a tensor."""
    tensor, arg = tensor_of(case, args, index), case.spec.args[index]
    if tensor is None or not isinstance(arg, TensorArg):
        return None
    args[index] = None
    return "either" if arg.optional else "type error"


def wrong_type(case: Case, args: Args, index: int, rng: random.Random) -> str | None:  # noqa: ARG001
    """Something that is of no argument's type."""
    args[index] = rng.choice(("text", object(), b"1"))
    return "type error"


def wrong_value(case: Case, args: Args, index: int, rng: random.Random) -> str | None:
    """A float that is not finite, an integer or flag that may have no variant."""
    arg = case.spec.args[index]
    if isinstance(arg, FloatArg):
        args[index] = rng.choice((float("nan"), float("inf"), -float("inf"), 1e39))
        return "error"
    if isinstance(arg, IntArg):
        args[index] = rng.choice((-1, 0, 1, 2, 7, 2**31, -(2**63), 2**63 - 1))
        # The references believe it; the kernels need not.
        case.is_comparable = case.is_comparable and arg.name not in LONGEST
        return "either"
    if isinstance(arg, BoolArg) and arg.values is not None:
        args[index] = not args[index]
        return "either"
    return None


def freed(case: Case, args: Args, index: int, rng: random.Random) -> str | None:  # noqa: ARG001
    """A tensor whose storage was freed."""
    tensor = tensor_of(case, args, index)
    if tensor is None or not tensor.numel():
        return None
    args[index] = tensor.clone()
    args[index].untyped_storage().resize_(0)
    return "error"


def overlapping(case: Case, args: Args, index: int, rng: random.Random) -> str | None:
    """args[index], which is written, becomes a view of the memory of another tensor."""
    tensor, arg = tensor_of(case, args, index), case.spec.args[index]
    others = [i for i, value in enumerate(args) if i != index and isinstance(value, torch.Tensor)]
    if tensor is None or not isinstance(arg, TensorArg) or not arg.mutated or not others or not tensor.numel():
        return None
    other = args[rng.choice(others)]
    if not other.is_contiguous() or not other.numel() or not tensor.is_contiguous():
        return None
    size = tensor.numel() * tensor.element_size()
    shared = torch.zeros(max(size, other.numel() * other.element_size()), dtype=torch.uint8, device=case.device)
    at = next(i for i in others if args[i] is other)
    args[at] = shared[: other.numel() * other.element_size()].view(other.dtype).view(other.shape).copy_(other)
    args[index] = shared[:size].view(tensor.dtype).view(tensor.shape)
    is_same = arg.in_place == case.spec.args[at].name and args[at].numel() == args[index].numel()
    return "either" if is_same or not all(map(torch.numel, (args[at], args[index]))) else "error"


def requires_grad(case: Case, args: Args, index: int, rng: random.Random) -> str | None:  # noqa: ARG001
    """A tensor that requires grad, in grad mode."""
    tensor = tensor_of(case, args, index)
    if tensor is None or not tensor.is_floating_point() or case.ambient in ("inference mode", "no grad"):
        return None
    args[index] = tensor.clone().requires_grad_()
    return "error"


WRONG: dict[str, Callable[[Case, Args, int, random.Random], str | None]] = {
    "dtype": wrong_dtype,
    "size": wrong_size,
    "rank": wrong_rank,
    "strides": wrong_strides,
    "None": wrong_none,
    "type": wrong_type,
    "value": wrong_value,
    "freed": freed,
    "overlap": overlapping,
    "requires grad": requires_grad,
}


# ---- running and checking ----


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor's elements, copied."""
    made = torch.empty(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    return made.copy_(tensor.detach().reshape(-1)).view(torch.uint8)


def is_in(tensor: torch.Tensor, memory: list[torch.Tensor]) -> bool:
    """Whether the tensor is in one of those storages."""
    return tensor.untyped_storage().data_ptr() in {buffer.untyped_storage().data_ptr() for buffer in memory}


def run_door(case: Case, door: str, seed: int) -> tuple[str, Args]:
    """The outcome of one call and its arguments after it, which has left alone what it must."""
    args, memory = case.place(seed)
    case.spoil(args, seed)
    elsewhere = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and not is_in(a, memory)]
    before = {i: bits(args[i]) for i in elsewhere if args[i].untyped_storage().size()}
    kept = [buffer.clone() for buffer in memory]
    ambient = AMBIENT[case.ambient]() if case.ambient else contextlib.nullcontext()
    op = hdispatch.registry.get(case.spec.name)
    _C.reset_stats(op)
    raised: Exception | None = None
    try:
        with ambient:
            DOORS[door](case.spec.name)(*args)
        if case.device.type == "cuda":
            torch.cuda.synchronize()
    except Exception as error:  # judged below
        raised = error
    counts = _C.stats(op)
    outcome = judge(case, raised, counts)
    if is_written(case, outcome):
        for arg, value in zip(case.spec.args, args, strict=True):
            if isinstance(arg, TensorArg) and arg.mutated and value is not None:
                # It may be the same view as an argument that the op allows.
                mine = value.untyped_storage().data_ptr()
                for i in [i for i in before if i == case.spec.args.index(arg) or args[i].untyped_storage().data_ptr() == mine]:
                    del before[i]
                for guard, buffer in zip(kept, memory, strict=True):
                    if is_in(value, [buffer]) and value.numel():
                        inside = guard.view(value.dtype).as_strided(value.shape, value.stride(), value.storage_offset())
                        inside.copy_(value.detach())
                        if arg.name == "output_s_packed":
                            padding(inside).zero_()  # written too, where the strides leave some
    if not all(map(torch.equal, kept, memory)):
        raise FailureError(f"{door}: bytes that are no output's were written, and the call was: {outcome}")
    for i, old in before.items():
        if not torch.equal(bits(args[i]), old):
            raise FailureError(f"{door}: {case.spec.args[i].name} was written, and the call was: {outcome}")
    return outcome, args


def is_written(case: Case, outcome: str) -> bool:
    """Whether the outputs are; the null driver writes nothing."""
    return outcome.startswith("fallback") or outcome == "empty" or (outcome == "hit" and case.device.type == "cuda")


def judge(case: Case, raised: Exception | None, counts: dict[str, Any]) -> str:
    """The outcome of a call. FailureError if it is not the expected one, or if the call was not counted once."""
    calls, reasons = (counts["hits"], counts["empty"], counts["fallbacks"]), list(Counter(counts["misses"]).elements())
    if raised is None:
        if sum(calls) != 1 or len(reasons) != calls[2]:
            raise FailureError(f"counted {calls} {reasons} for one call")
        if case.expects in ("error", "type error"):
            raise FailureError(f"expected an error, and the call was counted {calls} {reasons}")
        return "hit" if calls[0] else "empty" if calls[1] else f"fallback, {reasons[0]}"
    if isinstance(raised, torch.OutOfMemoryError):
        raise raised
    is_parsers = case.expects == "type error" and isinstance(raised, (TypeError, RuntimeError))
    is_named = isinstance(raised, REFUSED) or is_parsers or (case.expects != "result" and isinstance(raised, OverflowError))
    if not is_named:
        raise FailureError(f"raised {type(raised).__name__}: {raised}") from raised
    if case.expects == "result":
        raise FailureError(f"refused a good call: {raised}") from raised
    if calls[0] or calls[1]:
        raise FailureError(f"raised, and was counted {calls}: {raised}") from raised
    return "refused"


def without_common(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The tensor with 0 where both are NaN, or the same infinity: tolerances are for numbers."""
    if tensor.element_size() == 1 or not tensor.is_floating_point():
        return tensor
    return tensor.masked_fill((tensor.isnan() & other.isnan()) | ((tensor == other) & tensor.isinf()), 0.0)


def check_results(case: Case, outcome: str, args: Args) -> None:
    """The outputs against the reference's of the canonical arguments."""
    if case.expects != "result" or not is_written(case, outcome) or (outcome == "hit" and not case.is_finite):
        return
    if not case.is_comparable or (case.spec.name in GEMMS + SDPA and not case.is_finite):
        return
    wanted = [a.clone() if isinstance(a, torch.Tensor) else a for a in case.args]
    try:
        case.spec.reference(*wanted)
    except Exception as error:
        raise FailureError(f"{outcome}: the reference raised {type(error).__name__}: {error}") from error
    got = [a.reshape(w.shape) if isinstance(w, torch.Tensor) else a for a, w in zip(args, wanted, strict=True)]
    outputs = [i for i, arg in enumerate(case.spec.args) if isinstance(arg, TensorArg) and arg.mutated and got[i] is not None]
    if all(torch.equal(bits(got[i]), bits(wanted[i])) for i in outputs):
        return
    for i in outputs:
        got[i], wanted[i] = without_common(got[i], wanted[i]), without_common(wanted[i], got[i])
    # Of a small output two codes are more than a thousandth.
    least = min((1 - max(1e-3, 2 / got[i].numel()) for i in outputs if got[i].numel()), default=1.0)
    try:
        compare_outputs(case.spec, case.variant, got, wanted, least)
    except MismatchError as error:
        raise FailureError(f"{outcome}: {error}") from None


def run_case(number: int, seed: int, names: list[str], device: torch.device) -> str:
    """One call through every door; its outcome. Raises FailureError."""
    case = Case(f"{seed}/{number}", names, device)
    placed = case.random.getrandbits(30)
    try:
        found = {door: run_door(case, door, placed) for door in DOORS}
        outcomes = {outcome for outcome, _ in found.values()}
        if len(outcomes) != 1:
            raise FailureError(f"the doors disagree: { {door: outcome for door, (outcome, _) in found.items()} }")
        (outcome,) = outcomes
        first, *others = [args for _, args in found.values()]
        for other in others if outcome != "refused" and device.type == "cpu" else ():
            for arg, a, b in zip(case.spec.args, first, other, strict=True):
                if isinstance(a, torch.Tensor) and not torch.equal(bits(a), bits(b)):
                    raise FailureError(f"{outcome}: {arg.name} differs between doors")
        for _, args in found.values():
            check_results(case, outcome, args)
    except FailureError as failure:
        raise FailureError(f"{case}\n    {failure}") from failure.__cause__
    return outcome


# ---- a bundle for the null driver ----


def write_null_bundle(folder: Path, names: list[str]) -> Path:
    """Rows for every served variant of every op and any K and N, that take all but misaligned pointers; nothing is in them."""
    code = {"function": "none", "num_warps": 4, "shared_bytes": 0, "cluster": [1, 1, 1], "cooperative": False, "pdl": True}
    content = b"nothing"
    file = f"{ARTIFACTS}/none.cubin"
    manifest: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "hdispatch": hdispatch.__version__,
        "target": {"name": "h200", "arch": "sm_90a", "compute_capability": [9, 0], "sm_count": 132, "shared_memory": 232448},
        "tools": {"triton": "0"},
        "ops": {},
        "files": {file: {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}},
        "records": [],
        "rows": [],
    }
    for name in names:
        spec = hdispatch.registry.spec(name)
        variants, ladders = [v.name for v in spec.served_variants()], spec.ladders
        manifest["ops"][name] = spec.entry(variants)
        pointers = [{"kind": "ptr", "arg": arg.name, "align": 16} for arg in spec.tensors() if not arg.optional]
        cubins = {kind: {**code, "file": file, "params": list(range(len(pointers)))} for kind in ("one", "mult16", "other")}
        record = {"launcher": "cubin", "backend": "triton", "kernel": name, "config": {}, "m_min": 1, "m_max": 2**31 - 1}
        record |= {"grid": [["M"], [1], [1]], "params": pointers, "guards": [], "cubins": cubins}
        if ladders.arg is not None:
            record |= {"second_min": 1, "second_max": 2**63 - 1}
        row = {"op": name, "K": 0, "N": 0, "record": len(manifest["records"]), "build_seconds": 0.0, "bytes": 0}
        manifest["records"].append(record)
        manifest["rows"] += [{**row, "variant": v, "bucket": b} for v, b in itertools.product(variants, range(ladders.count))]
    (folder / ARTIFACTS).mkdir(parents=True)
    (folder / file).write_bytes(content)
    text = json.dumps(manifest).encode()
    (folder / MANIFEST_NAME).write_bytes(text)
    (folder / CHECKSUM_NAME).write_text(f"{hashlib.sha256(text).hexdigest()}  {MANIFEST_NAME}\n")
    return folder


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("seconds", type=float, help="how long to go on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calls", type=int, help="stop after that many calls, if that is sooner")
    parser.add_argument("--only-call", type=int, metavar="NUMBER", help="repeat one call of this seed")
    parser.add_argument("--ops", help="names of ops, with commas; all if left out")
    parser.add_argument("--bundle", type=Path, help="on a GPU: the bundle to load; without one the null driver serves the CPU")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 after a failure. Twenty failures end the run."""
    given = parse(argv)
    names = given.ops.split(",") if given.ops else sorted(hdispatch.registry.names())
    device = torch.device("cuda" if given.bundle else "cpu")
    torch.set_num_threads(1)  # of tensors this small
    with tempfile.TemporaryDirectory() as folder:
        if given.bundle:
            hdispatch.load(given.bundle)
        else:
            hdispatch.load(write_null_bundle(Path(folder) / "bundle", names), driver="null")
        end = time.monotonic() + given.seconds
        found, failures, number = Counter[str](), 0, -1
        numbers = itertools.count() if given.only_call is None else [given.only_call]
        for number in numbers:
            if time.monotonic() > end or failures == 20 or (given.calls is not None and number >= given.calls):
                break
            try:
                found[run_case(number, given.seed, names, device).partition(",")[0]] += 1
            except FailureError as failure:
                failures += 1
                print(f"call {number}: {failure}", file=sys.stderr)
                ops = f" --ops {given.ops}" if given.ops else ""
                bundle = f" --bundle {given.bundle}" if given.bundle else ""
                print(f"    again: {sys.argv[0]} 60 --seed {given.seed} --only-call {number}{ops}{bundle}", file=sys.stderr)
    calls = sum(found.values()) + failures
    print(f"{calls * len(DOORS)} calls, {calls} through each door: {dict(found)}; {failures} failures")
    return 1 if failures or not found else 0


if __name__ == "__main__":
    sys.exit(main())

"""Chains of eight dependent small calls, which `bench pdl` times and tests race: cubin rows, CuteDSL rows, both in turn."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hdispatch import registry
from hdispatch.opspec import TensorArg
from torch import Tensor

#: Columns of the rows that go through a chain, and of what its products narrow them to.
HIDDEN, NARROW, WIDER = 4096, 128, 256
HEADS, HEAD = 32, 128
EPSILON = 1e-6

BF16, FP8, FP32 = torch.bfloat16, torch.float8_e4m3fn, torch.float32
CUBIN, FUNCTION = "cubin", "tvm_ffi"

#: Memory for a tensor of a shape and a type.
Empty = Callable[[tuple[int, ...], torch.dtype], Tensor]


@dataclass(frozen=True)
class Step:
    """A call of an op. Its variant, K and N choose its row; `launcher`: the launcher kind its row must have."""

    op: str
    variant: str
    sizes: Mapping[str, int]
    launcher: str
    arguments: tuple[Any, ...]

    def written(self) -> list[Tensor]:
        """The tensors that it writes."""
        pairs = zip(registry.spec(self.op).args, self.arguments, strict=True)
        return [given for arg, given in pairs if isinstance(arg, TensorArg) and arg.mutated and given is not None]

    def call(self) -> Callable[[], object]:
        """The call through `hdispatch.ops`."""
        return functools.partial(registry.get(self.op), *self.arguments)


@dataclass(frozen=True)
class Chain:
    """Calls each of which reads what the one before it wrote; the first reads what the last one did.

    state   what the first call reads, [M, HIDDEN] in bfloat16: it changes with every pass
    """

    name: str
    m: int
    steps: tuple[Step, ...]
    state: tuple[Tensor, ...]

    def calls(self) -> list[Callable[[], object]]:
        """Every step's call."""
        return [step.call() for step in self.steps]

    def start(self, seed: int = 0) -> list[Tensor]:
        """Random values of `state`."""
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(t.shape, generator=generator).to(device=t.device, dtype=t.dtype) for t in self.state]

    def restart(self, start: Sequence[Tensor]) -> None:
        """Put values into `state`, on the current stream."""
        for tensor, value in zip(self.state, start, strict=True):
            tensor.copy_(value)


def make_chain(name: str, m: int, device: torch.device, empty: Empty | None = None) -> Chain:
    """The chain of that name (of CHAINS) for M rows. All that it writes is in memory from `empty`, as it comes from there.

    Weights are the same everywhere. `restart` it before it is run.
    """
    maker = _Maker(m, device, empty or functools.partial(_on_device, device))
    steps, state = CHAINS[name](maker)
    return Chain(name, m, tuple(steps), tuple(state))


def _on_device(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


class _Maker:
    """Makes tensors of a chain, and its calls of ops."""

    def __init__(self, m: int, device: torch.device, empty: Empty) -> None:
        self.m, self.device, self._empty = m, device, empty
        self._generator = torch.Generator().manual_seed(1)  # the CPU's: the same numbers on every device

    def rows(self, columns: int, dtype: torch.dtype = BF16) -> Tensor:
        """Memory for [M, columns]."""
        return self._empty((self.m, columns), dtype)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    def _norm_weight(self, columns: int) -> Tensor:
        return (1 + 0.2 * self._normal(columns)).to(self.device, BF16)

    def add_norm(self, x: Tensor, residual: Tensor) -> Step:
        """x + residual, normalized, in place."""
        arguments = (x, residual, self._norm_weight(HIDDEN), EPSILON)
        return Step("fused_add_rms_norm", "bfloat16+weight", {"K": HIDDEN}, CUBIN, arguments)

    def norm(self, out: Tensor, x: Tensor) -> Step:
        """RMS norm of rows, or of heads where there are three dimensions."""
        sizes = {"K": x.size(-1), "N": x.size(1) if x.dim() == 3 else 1}
        return Step("rms_norm", "bfloat16+weight", sizes, CUBIN, (out, x, self._norm_weight(x.size(-1)), EPSILON))

    def norm_quant(self, codes: Tensor, x: Tensor, scales: Tensor, residual: Tensor) -> Step:
        """x + residual to residual, and normalized to fp8."""
        arguments = (codes, x, self._norm_weight(HIDDEN), scales, EPSILON, None, residual)
        return Step("rms_norm_dynamic_per_token_quant", "bfloat16+residual", {"K": HIDDEN}, CUBIN, arguments)

    def quant(self, codes: Tensor, x: Tensor, scales: Tensor) -> Step:
        """Rows to fp8."""
        op = "dynamic_per_token_scaled_fp8_quant"
        return Step(op, "bfloat16", {"K": x.size(1)}, CUBIN, (codes, x, scales, None))

    def gate(self, out: Tensor, x: Tensor) -> Step:
        """silu of one half of each row times the other."""
        return Step("silu_and_mul", "bfloat16", {"N": out.size(1)}, CUBIN, (out, x))

    def rotate(self, x: Tensor) -> Step:
        """Heads rotated in place."""
        angles = self._normal(self.m, HEAD // 2)
        cache = torch.cat([angles.cos(), angles.sin()], dim=1).to(self.device, BF16)
        arguments = (torch.arange(self.m, device=self.device), x, None, HEAD, cache, True, 0, False)
        return Step("rotary_embedding", f"bfloat16-bfloat16+head_size={HEAD}+is_neox", {"K": HIDDEN}, CUBIN, arguments)

    def product(self, out: Tensor, x: Tensor) -> Step:
        """x times weights, in bfloat16: about as large as x is."""
        k, n = x.size(1), out.size(1)
        weights = (self._normal(n, k) * k**-0.5).to(self.device, BF16)
        return Step("ll_gemm_bf16", "bfloat16", {"K": k, "N": n}, FUNCTION, (out, x, weights))

    def scaled_product(self, out: Tensor, codes: Tensor, scales: Tensor) -> Step:
        """The same in fp8, with a scale for each token and each output."""
        k, n = codes.size(1), out.size(1)
        weights = (self._normal(n, k) * 100).clamp(-448, 448).to(FP8).to(self.device)
        factors = (0.01 * k**-0.5 * (0.5 + torch.rand(n, generator=self._generator))).to(self.device)
        return Step("ll_gemm_fp8", "any", {"K": k, "N": n}, FUNCTION, (out, codes, weights, scales, factors))


Made = tuple[list[Step], list[Tensor]]


def _mixed(make: _Maker) -> Made:
    """Two bottlenecks, as adapters have them: the kinds of row take turns."""
    x, residual, y = (make.rows(HIDDEN) for _ in range(3))
    down, gated, wider = make.rows(NARROW), make.rows(NARROW // 2), make.rows(WIDER)
    codes, scales = make.rows(HIDDEN, FP8), make.rows(1, FP32)
    wider_codes, wider_scales = make.rows(WIDER, FP8), make.rows(1, FP32)
    steps = [
        make.add_norm(x, residual),
        make.product(down, x),
        make.gate(gated, down),
        make.product(y, gated),
        make.norm_quant(codes, y, scales, residual),
        make.scaled_product(wider, codes, scales),
        make.quant(wider_codes, wider, wider_scales),
        make.scaled_product(x, wider_codes, wider_scales),
    ]
    return steps, [x, residual]


def _cubin(make: _Maker) -> Made:
    """Norms and rotations of rows and heads."""
    x, residual, y, z = (make.rows(HIDDEN) for _ in range(4))
    codes, scales = make.rows(HIDDEN, FP8), make.rows(1, FP32)
    y_heads, z_heads = (rows.view(make.m, HEADS, HEAD) for rows in (y, z))
    steps = [
        make.add_norm(x, residual),
        make.rotate(x),
        make.norm(y, x),
        make.add_norm(y, residual),
        make.norm(z_heads, y_heads),
        make.rotate(z),
        make.norm_quant(codes, z, scales, residual),
        make.norm(x, residual),
    ]
    return steps, [x, residual]


def _cutedsl(make: _Maker) -> Made:
    """Products that narrow the rows and widen them again."""
    x, y = make.rows(HIDDEN), make.rows(HIDDEN)
    narrow = [make.rows(NARROW) for _ in range(4)]
    steps = [
        make.product(narrow[0], x),
        make.product(y, narrow[0]),
        make.product(narrow[1], y),
        make.product(x, narrow[1]),
        make.product(narrow[2], x),
        make.product(y, narrow[2]),
        make.product(narrow[3], y),
        make.product(x, narrow[3]),
    ]
    return steps, [x]


CHAINS: dict[str, Callable[[_Maker], Made]] = {"mixed": _mixed, "cubin": _cubin, "cutedsl": _cutedsl}

"""The decoder layers of a dense model with fp8 weights and a scale per token, without attention: calls to time and compare.

Each step stands here once; `Layers` makes of it one sequence of all layers, and the same calls of single ops.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hdispatch import registry
from hdispatch.sequence import Sequence, SequenceTensor

FP8 = torch.float8_e4m3fn
EPSILON = 1e-6


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer; the default is Qwen3-8B."""

    hidden: int = 4096
    intermediate: int = 12288
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    layers: int = 36
    positions: int = 4096

    @property
    def qkv(self) -> int:
        """Width of q, k and v."""
        return (self.heads + 2 * self.kv_heads) * self.head_size

    def matrices(self) -> dict[str, tuple[int, int]]:
        """(K, N) of each matrix."""
        attended = self.heads * self.head_size
        return {
            "qkv": (self.hidden, self.qkv),
            "out": (attended, self.hidden),
            "gate_up": (self.hidden, 2 * self.intermediate),
            "down": (self.intermediate, self.hidden),
        }

    def buffers(self) -> dict[str, tuple[int, torch.dtype]]:
        """(width, dtype) of what lies between steps."""
        attended, half = self.heads * self.head_size, torch.bfloat16
        return {
            "hidden": (self.hidden, half),
            "normed": (self.hidden, FP8),
            "qkv": (self.qkv, half),
            "attended": (attended, FP8),
            "gate_up": (2 * self.intermediate, half),
            "activated": (self.intermediate, FP8),
            **{f"{name}.scales": (1, torch.float32) for name in ("normed", "attended", "activated")},
        }


@dataclass
class Layers:
    """Weights of all layers on a device, random. Norms, rotations, quantizations and products are as they are when serving;
    attention is left out: what it would read is quantized in its place.
    """

    device: torch.device
    shape: Shape = field(default_factory=Shape)
    distinct: int | None = None  # sets of weights, which layers take in turn; None: each its own
    seed: int = 0

    def __post_init__(self) -> None:
        """Make the weights."""
        generator = torch.Generator(device=self.device).manual_seed(self.seed)

        def random(*sizes: int) -> torch.Tensor:
            return torch.randn(*sizes, generator=generator, device=self.device)

        self.cache = random(self.shape.positions, self.shape.head_size).bfloat16()
        made: list[dict[str, torch.Tensor]] = []
        for _ in range(self.distinct or self.shape.layers):
            layer = {f"{name}_norm": random(self.shape.hidden).bfloat16() for name in ("input", "output")}
            layer |= {f"{name}_norm": random(self.shape.head_size).bfloat16() for name in ("q", "k")}
            for name, (k, n) in self.shape.matrices().items():
                layer[name] = random(n, k).mul_(0.3).to(FP8).t()
                layer[f"{name}.scales"] = random(n, 1).abs_().mul_(0.01)
            made.append(layer)
        self.layers = [made[i % len(made)] for i in range(self.shape.layers)]

    def steps(self, layer: dict[str, torch.Tensor], first: bool) -> list[tuple[str, tuple[Any, ...]]]:
        """(op, arguments) of a layer; a str names a buffer or a slot."""
        shape = self.shape
        heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.head_size, EPSILON)

        def product(out: str, x: str, name: str) -> tuple[str, tuple[Any, ...]]:
            return "scaled_mm", (out, x, layer[name], f"{x}.scales", layer[f"{name}.scales"], None)

        def norm(x: str, name: str, residual: str | None) -> tuple[str, tuple[Any, ...]]:
            arguments = ("normed", x, layer[f"{name}_norm"], "normed.scales", EPSILON, None, residual)
            return "rms_norm_dynamic_per_token_quant", arguments

        return [
            norm("residual", "input", None) if first else norm("hidden", "input", "residual"),
            product("qkv", "normed", "qkv"),
            ("fused_qk_norm_rope", ("qkv", *heads, layer["q_norm"], layer["k_norm"], self.cache, True, "positions")),
            ("dynamic_per_token_scaled_fp8_quant", ("attended", "q", "attended.scales", None)),
            product("hidden", "attended", "out"),
            norm("hidden", "output", "residual"),
            product("gate_up", "normed", "gate_up"),
            ("silu_and_mul_dynamic_per_token_quant", ("activated", "gate_up", "activated.scales", None)),
            product("hidden", "activated", "down"),
        ]

    def all_steps(self) -> list[tuple[str, tuple[Any, ...]]]:
        """Of all layers, and the sum at the end, which leaves the result in `residual`."""
        found = [step for i, layer in enumerate(self.layers) for step in self.steps(layer, i == 0)]
        return [*found, ("fused_add_rms_norm", ("hidden", "residual", self.layers[0]["input_norm"], EPSILON))]

    def sequence(self, name: str, **options: Any) -> Any:
        """All layers as one sequence of the slots residual [M, hidden], which is written, and positions [M]."""
        s = Sequence(name, **options)
        values: dict[str, SequenceTensor] = {
            "residual": s.slot("residual", ("M", self.shape.hidden), torch.bfloat16, written=True),
            "positions": s.slot("positions", ("M",), torch.int64),
        }
        for buffer, (width, dtype) in self.shape.buffers().items():
            values[buffer] = s.temp(("M", width), dtype)
        values["q"] = values["qkv"].columns(0, self.shape.heads * self.shape.head_size)
        for op, arguments in self.all_steps():
            s.add(registry.get(op), *(values[each] if isinstance(each, str) else each for each in arguments))
        return s.freeze()

    def single(self, residual: torch.Tensor, positions: torch.Tensor) -> list[tuple[Callable[..., Any], tuple[Any, ...]]]:
        """The same as (op, arguments), with buffers of their own, poisoned."""
        m = residual.size(0)
        values = {"residual": residual, "positions": positions}
        for buffer, (width, dtype) in self.shape.buffers().items():
            values[buffer] = torch.full((m, width), float("nan"), device=self.device).to(dtype)
        values["q"] = values["qkv"][:, : self.shape.heads * self.shape.head_size]
        return [
            (registry.get(op), tuple(values[each] if isinstance(each, str) else each for each in arguments))
            for op, arguments in self.all_steps()
        ]

    def inputs(self, m: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Random residual and positions."""
        generator = torch.Generator(device=self.device).manual_seed(seed)
        residual = torch.randn(m, self.shape.hidden, generator=generator, device=self.device).bfloat16()
        positions = torch.randint(self.shape.positions, (m,), generator=generator, device=self.device)
        return residual, positions

"""An op for tests of sequences, and a block of five steps of it, in one call and one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hdispatch
import torch
from hdispatch import Sequence
from hdispatch.opspec import FloatArg, IntArg, OpSpec, TensorArg, Variant

NAME = "sequence_scale"
K = 64
EDGES = (1, 4, 16)
#: Every bucket's edge, and its neighbours.
ROWS = sorted({max(1, edge + by) for edge in EDGES for by in (-1, 0, 1)} | {40})


def reference(out, x, bias, factor, repeat, gate=None):
    """The fallback's result is the negative of the function's: it shows who wrote."""
    out.copy_(-(x.float() * factor * repeat + bias.float()) - (0 if gate is None else gate.float()))


def sample(variant: Variant, sizes: dict[str, int], device: torch.device, generator: torch.Generator) -> list[Any]:
    m, k = sizes["M"], sizes["K"]
    x, bias = torch.randn(m, k, generator=generator, device=device), torch.randn(k, generator=generator, device=device)
    return [torch.empty(m, k, device=device), x, bias, 0.5, 3, None if "gate" in variant.none else x.clone()]


SPEC = OpSpec(
    name=NAME,
    args=(
        TensorArg("out", ("M", "K"), (torch.float32,), mutated=True, layout="rows"),
        TensorArg("x", ("M", "K"), (torch.float32,), layout="rows"),
        TensorArg("bias", ("K",), (torch.float32,)),
        FloatArg("factor"),
        IntArg("repeat", minimum=1),
        TensorArg("gate", ("M", "K"), (torch.float32,), optional=True, layout="rows"),
    ),
    reference=reference,
    sample=sample,
    shapes=({"K": K},),
    config_key={"hidden_size": "K", "num_tokens": "M"},
    ladder=EDGES,
)
OP = hdispatch.registry.define(SPEC) if NAME not in hdispatch.registry.names() else hdispatch.registry.get(NAME)
PLAIN, GATED = (variant.name for variant in sorted(SPEC.variants(), key=lambda v: not v.none))
SOURCE = r"""
#include <unistd.h>
using tvm::ffi::TensorView;

void scale(TensorView out, TensorView x, TensorView bias, double factor, int64_t repeat, tvm::ffi::Optional<TensorView> gate) {
  const float *from = static_cast<const float*>(x.data_ptr()), *add = static_cast<const float*>(bias.data_ptr());
  float* to = static_cast<float*>(out.data_ptr());
  for (int64_t i = 0; i < x.size(0); ++i)
    for (int64_t j = 0; j < x.size(1); ++j) {
      float more = 0;
      if (gate.has_value()) more = static_cast<const float*>(gate.value().data_ptr())[i * gate.value().stride(0) + j];
      to[i * out.stride(0) + j] = from[i * x.stride(0) + j] * float(factor) * float(repeat) + add[j] + more;
    }
}

void nap() { usleep(300000); }
void raise_it() { TVM_FFI_THROW(ValueError) << "unlucky"; }
"""


def stats(name: str) -> dict[str, Any]:
    return hdispatch.stats()[name]


def random(*sizes: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed + sum(sizes)))


def poisoned(*sizes: int) -> torch.Tensor:
    return torch.full(sizes, float("nan"))


#: A block of a model: (step, what it calls) where a step writes one name and reads others.
WEIGHTS = [random(K, seed=i) for i in range(4)]


def block(name: str, **options: Any) -> Any:
    """Three buffers wide, rows of half of one, a gate, an integer of the call, in and out slots."""
    s = Sequence(name, **options)
    x, out = s.slot("x", ("M", K), torch.float32), s.slot("out", ("M", K), torch.float32, written=True)
    repeat = s.int_slot("repeat")
    wide, a, b = s.temp(("M", 2 * K), torch.float32), s.temp(("M", K), torch.float32), s.temp(("M", K), torch.float32)
    s.add(OP, wide.columns(0, K), x, WEIGHTS[0], 0.5, 1)
    s.add(OP, wide.columns(K, 2 * K), x, WEIGHTS[1], 2.0, repeat)
    s.add(OP, a, wide.columns(K, 2 * K), WEIGHTS[2], 1.5, repeat, wide.columns(0, K))
    s.add(OP, b, a, WEIGHTS[3], 0.25, 2)
    s.add(OP, out, b, gate=a, repeat=3, factor=1.0, bias=WEIGHTS[0])
    return s.freeze()


def block_one_by_one(x: torch.Tensor, out: torch.Tensor, repeat: int, op: Callable[..., None] = OP) -> None:
    m = x.size(0)
    wide, a, b = poisoned(m, 2 * K), poisoned(m, K), poisoned(m, K)
    op(wide[:, :K], x, WEIGHTS[0], 0.5, 1, None)
    op(wide[:, K:], x, WEIGHTS[1], 2.0, repeat, None)
    op(a, wide[:, K:], WEIGHTS[2], 1.5, repeat, wide[:, :K])
    op(b, a, WEIGHTS[3], 0.25, 2, None)
    op(out, b, WEIGHTS[0], 1.0, 3, a)


def check(sequence: Any, m: int, repeat: int = 2, seed: int = 0) -> torch.Tensor:
    """A call against the same ops one by one, from poisoned outputs; returns the result."""
    x, out, expected = random(m, K, seed=seed), poisoned(m, K), poisoned(m, K)
    sequence(x, out, repeat)
    block_one_by_one(x, expected, repeat)
    assert torch.equal(out, expected)
    return out

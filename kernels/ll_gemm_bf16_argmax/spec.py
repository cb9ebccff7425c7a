"""ll_gemm_bf16_argmax: the largest logit of few tokens, lm_head's product and argmax in one, for greedy sampling."""

from __future__ import annotations

from typing import Any

import torch
from hdispatch.errors import ArgumentError
from hdispatch.opspec import Fallback, OpSpec, TensorArg, Variant, WorkspaceArg

from ..lib.model_sizes import lm_head

NAME = "ll_gemm_bf16_argmax"

#: The most tokens that rows serve, and the most blocks that there are at once for one.
TOKENS, PROGRAMS = 32, 512


def reference(out: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> None:
    """The op in torch.

    out  int64 [M], written: where the largest of a row of x @ w.T is, summed in float32 and rounded to bfloat16 as a tensor of
         logits has it; of equal ones the first, 0 and -0 being equal. NaN is larger than all else
    x    bfloat16 [M, K], rows contiguous
    w    bfloat16 [N, K], rows contiguous, N at least 1

    Rows serve 1 <= M <= 32 and K and N of multiples of 16, with rows of x and w that begin at multiples of 16 bytes.
    """
    _require_outputs(w)
    torch.argmax((x.float() @ w.float().t()).to(x.dtype), dim=-1, out=out)


def fallback(out: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> None:
    """The op where no row serves: torch.mm, and torch.argmax of what it wrote."""
    _require_outputs(w)
    torch.argmax(torch.mm(x, w.t()), dim=-1, out=out)


def _require_outputs(w: torch.Tensor) -> None:
    if not w.size(0):
        raise ArgumentError(f"{NAME}: w has 0 rows, which make no logits; expected at least 1")


def sample(variant: Variant, sizes: dict[str, int], device: torch.device, generator: torch.Generator) -> list[Any]:  # noqa: ARG001
    """Random arguments of whole numbers, whose sums are exact in any order: so the largest logits, and ties, are known."""
    m, k, n = sizes["M"], sizes["K"], sizes["N"]

    def whole(rows: int, most: int) -> torch.Tensor:
        numbers = torch.randint(-most, most + 1, (rows, k), generator=generator, device=generator.device, dtype=torch.int8)
        return numbers.to(device=device, dtype=torch.bfloat16)

    return [torch.full((m,), -7, device=device), whole(m, 4), whole(n, 8)]


SPEC = OpSpec(
    name=NAME,
    args=(
        TensorArg("out", ("M",), (torch.int64,), mutated=True),
        TensorArg("x", ("M", "K"), (torch.bfloat16,), layout="rows"),
        TensorArg("w", ("N", "K"), (torch.bfloat16,), layout="rows"),
    ),
    reference=reference,
    sample=sample,
    shapes=({},),
    calls=lm_head,
    config_key={"in_features": "K", "out_features": "N", "num_tokens": "M"},
    ladder=(8, 16, TOKENS),
    hints={"N": 151936},
    workspace=WorkspaceArg("workspace", 8 * PROGRAMS * TOKENS),
    fallback=Fallback(fallback, beyond_ladder=True),
)

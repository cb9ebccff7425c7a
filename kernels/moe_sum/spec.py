"""moe_sum: what a token's experts computed, added up, as the op of vLLM."""

from __future__ import annotations

from typing import Any

import torch
from hdispatch.errors import ArgumentError
from hdispatch.opspec import OpSpec, TensorArg, Variant, VllmOp

from ..lib.model_sizes import summed

NAME = "moe_sum"

INT = (torch.int32,)
#: Sums in float32, in another order than the reference's: some units of 2**-24 of the partial sums.
ACCUMULATION = 1e-7
#: Experts per token, and experts, in samples that do not say how many.
TOPK, EXPERTS = 8, 128


def reference(
    input: torch.Tensor,
    output: torch.Tensor,
    topk_ids: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
) -> None:
    """The op in torch.

    input       bfloat16, float16 or float32 [M, A, N]: a row of each of a token's A experts; the stride of tokens is free
    output      of that dtype [M, N], written: their sum, in float32, rounded once
    topk_ids    int32 [M, A], or None: the expert of each row; that of a negative one is not read, and counts as zeros
    expert_map  int32, or None: with topk_ids, the number of each expert on this GPU; negative: it is another's, and its row
                is not read. So is that of an expert beyond the map

    A sum of minus zeros is 0, as vLLM's is.
    """
    if topk_ids is None:
        output.copy_(input.float().sum(1) + 0.0)
        return
    here = topk_ids >= 0
    if expert_map is not None:
        if not expert_map.numel() and topk_ids.numel():
            raise ArgumentError(f"{NAME}: expert_map has no elements; expected one for each expert")
        known = here & (topk_ids < expert_map.numel())
        here = known & (expert_map[torch.where(known, topk_ids, 0).long()] >= 0)
    output.copy_(torch.where(here[:, :, None], input.float(), 0.0).sum(1) + 0.0)


def sample(variant: Variant, sizes: dict[str, int], device: torch.device, generator: torch.Generator) -> list[Any]:
    """Random arguments. With a map half of the experts are on this GPU; rows of the others hold NaN."""
    m, n, topk, dtype = sizes["M"], sizes["N"], sizes.get("A", TOPK), variant.dtypes["input"]
    x = torch.randn(m, topk, n, generator=generator, device=device).to(dtype)
    ids = placed = None
    if "topk_ids" in variant.dtypes:
        ids = torch.randint(-1, EXPERTS, (m, topk), generator=generator, device=device, dtype=torch.int32)
        absent = ids < 0
        if "expert_map" in variant.dtypes:
            placed = torch.arange(EXPERTS, dtype=torch.int32, device=device)
            placed = torch.where(placed < EXPERTS // 2, placed, -1)
            absent |= ids >= EXPERTS // 2
        x.masked_fill_(absent[:, :, None], float("nan"))
    elif "expert_map" in variant.dtypes:
        placed = torch.full((EXPERTS,), -1, dtype=torch.int32, device=device)
    return [x, torch.full((m, n), float("nan"), dtype=dtype, device=device), ids, placed]


def served(variant: Variant) -> bool:
    """bfloat16, of all rows, or of those whose experts are on this GPU. The rest on request."""
    given = variant.none ^ {"topk_ids", "expert_map"}
    return variant.dtypes["input"] == torch.bfloat16 and len(given) != 1


SPEC = OpSpec(
    name=NAME,
    args=(
        TensorArg("input", ("M", "A", "N"), (torch.bfloat16, torch.float16, torch.float32), layout="rows"),
        TensorArg("output", ("M", "N"), "input", mutated=True),
        TensorArg("topk_ids", ("M", "A"), INT, optional=True),
        TensorArg("expert_map", ("*",), INT, optional=True),
    ),
    reference=reference,
    sample=sample,
    shapes=({"N": 2048}, {}),
    accumulation=ACCUMULATION,
    summed="A",
    calls=summed,
    config_key={"hidden_size": "N", "num_tokens": "M"},
    ladder=(8, 64, 512, 8192),
    hints={"N": 2048},
    served=served,
    typical="bfloat16",
    vllm=VllmOp(NAME, namespace="_moe_C"),
)

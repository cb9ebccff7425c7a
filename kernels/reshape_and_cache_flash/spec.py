"""reshape_and_cache_flash: K and V of new tokens to their places in the paged KV cache, as the op of vLLM."""

from __future__ import annotations

from typing import Any

import torch
from hdispatch.errors import ArgumentError
from hdispatch.opspec import OpSpec, StrArg, TensorArg, Variant, VllmOp

from ..lib.model_sizes import head
from ..lib.paged_kv import check_slots, random_slots, write
from ..lib.reference_fp8 import FP8, random_rows

NAME = "reshape_and_cache_flash"

#: What kv_cache_dtype may be.
FORMATS = ("auto", "fp8", "fp8_e4m3")
#: Tokens of a block of a sample call's cache.
PAGE = 16


def reference(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
) -> None:
    """The op in torch.

    key             bfloat16 or float16 [M, N, K]: the N heads of K elements of each token
    value           likewise, dtype of key
    key_cache       [blocks, page, N, K], any strides but the last, written: of token m the place slot_mapping[m] % page of
                    the block slot_mapping[m] // page; both caches may be parts of one tensor
    value_cache     likewise
    slot_mapping    int64 [M], no slot twice; of a negative one nothing is written
    kv_cache_dtype  "auto": the caches have the dtype of key, and get what is in key and value; "fp8" or "fp8_e4m3": they are
                    float8_e4m3fn, or its bytes as uint8, and get x / scale in float32, clamped to ±448, NaN staying NaN
    k_scale         float32 with one element; v_scale likewise
    """
    if kv_cache_dtype not in FORMATS:
        raise ArgumentError(f"{NAME}: kv_cache_dtype is {kv_cache_dtype!r}; expected one of {FORMATS}")
    for cache in (key_cache, value_cache):
        dtypes = (key.dtype,) if kv_cache_dtype == "auto" else (FP8, torch.uint8)
        if cache.dtype not in dtypes:
            raise ArgumentError(
                f"{NAME}: a cache of {cache.dtype}; with kv_cache_dtype {kv_cache_dtype!r} it is one of {dtypes}"
            )
        check_slots(NAME, slot_mapping, *cache.shape[:2])
    for cache, x, scale in ((key_cache, key, k_scale), (value_cache, value, v_scale)):
        quantized = kv_cache_dtype != "auto"
        stored = (x.float() / scale.reshape(())).clamp(-448, 448).to(FP8).view(torch.uint8) if quantized else x
        # Bytes: torch selects between numbers of none of the fp8 dtypes.
        target = cache.view(torch.uint8) if quantized else cache
        write(target.transpose(1, 2), slot_mapping, stored)


def sample(variant: Variant, sizes: dict[str, int], device: torch.device, generator: torch.Generator) -> list[Any]:
    """Random arguments; the caches are the halves of one tensor, as in vLLM, in which nothing was written yet."""
    m, heads, dim, dtype = sizes["M"], sizes["N"], sizes["K"], variant.dtypes["key"]
    slots, blocks = random_slots(m, PAGE, device, generator)
    cache = torch.zeros(blocks, PAGE, heads, 2 * dim, dtype=variant.dtypes["key_cache"], device=device)
    keys, values = (random_rows(m, heads * dim, dtype, device, generator).view(m, heads, dim) for _ in "kv")
    scales = (torch.full((1,), scale, device=device) for scale in (0.5, 0.25))
    return [keys, values, *cache.split(dim, dim=-1), slots, variant.static["kv_cache_dtype"], *scales]


def served(variant: Variant) -> bool:
    """bfloat16; caches of that with "auto", of fp8 or bytes with the others. The rest on request."""
    key, cache = variant.dtypes["key"], variant.dtypes["key_cache"]
    if key != torch.bfloat16:
        return False
    return key == cache if variant.static["kv_cache_dtype"] == "auto" else cache.itemsize == 1


SPEC = OpSpec(
    name=NAME,
    args=(
        TensorArg("key", ("M", "N", "K"), (torch.bfloat16, torch.float16), layout="rows"),
        TensorArg("value", ("M", "N", "K"), "key", layout="rows"),
        TensorArg(
            "key_cache",
            ("*", "*", "N", "K"),
            (torch.bfloat16, torch.float16, FP8, torch.uint8),
            True,
            layout="any",
            multiple=16,
        ),
        TensorArg("value_cache", ("*", "*", "N", "K"), "key_cache", True, layout="any", multiple=16),
        TensorArg("slot_mapping", ("M",), (torch.int64,)),
        StrArg("kv_cache_dtype", FORMATS),
        TensorArg("k_scale", (1,), (torch.float32,), flat=True),
        TensorArg("v_scale", (1,), (torch.float32,), flat=True),
    ),
    reference=reference,
    sample=sample,
    shapes=({"K": 128}, {"K": 64}),
    calls=head,
    config_key={"head_dim": "K", "num_tokens": "M"},
    hints={"N": 8},
    served=served,
    typical="bfloat16-bfloat16+kv_cache_dtype=auto",
    # vLLM pads key and value, and not the slots.
    vllm=VllmOp(NAME, namespace="_C_cache_ops", padded=("key", "value"), rows="slot_mapping"),
)

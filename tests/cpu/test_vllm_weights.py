"""The weights of vLLM's layers that the plug-in binds."""

from __future__ import annotations

from types import SimpleNamespace as Object

import pytest
import torch
from hdispatch.integrations.vllm import schemes, support, weights
from vllm_layers import (
    FP8,
)

K, N = 256, 384


def linear(method="CompressedTensorsLinearMethod", **more):
    """A linear layer of vLLM's as it is loaded: fp8 by columns with a scale per column."""
    found = {
        "quant_method": type(method, (), {})(),
        "scheme": type("CompressedTensorsW8A8Fp8", (), {})(),
        "skip_bias_add": False,
        "bias": None,
        "weight": torch.zeros(N, K).to(FP8).t(),
        "weight_scale": torch.ones(N, 1),
        "input_scale": None,
    }
    return Object(**(found | more))


def bind(module):
    return weights.bind_linear("qkv_proj", module, K, N, torch.bfloat16)


def test_schemes_of_what_is_loaded():
    scheme, bound = bind(linear())
    assert type(scheme) is schemes.PerTokenFp8
    assert bound.sizes == (K, N)
    scheme, _ = bind(linear(weight_scale=torch.ones(1)))
    assert type(scheme) is schemes.PerTokenFp8
    scheme, bound = bind(linear("Fp8LinearMethod", input_scale=torch.tensor(0.5), weight_scale=torch.ones(())))
    assert type(scheme) is schemes.StaticFp8
    assert bound.input_scale.tolist() == [0.5]
    rows = torch.zeros(N, K).to(FP8)
    scheme, bound = bind(
        linear("Fp8LinearMethod", weight=rows, weight_block_size=[128, 128], weight_scale_inv=torch.ones(3, 2))
    )
    assert type(scheme) is schemes.BlockFp8
    assert (bound.sizes, tuple(bound.scale.shape)) == ((K, N), (2, 3))
    scheme, bound = bind(linear("UnquantizedLinearMethod", weight=torch.zeros(N, K, dtype=torch.bfloat16)))
    assert type(scheme) is schemes.Scheme
    assert bound.sizes == (K, N)


def test_a_weight_by_rows_is_turned():
    _, bound = bind(linear("Fp8LinearMethod", weight=torch.zeros(N, K).to(FP8)))
    assert (tuple(bound.weight.shape), bound.weight.stride(0)) == ((K, N), 1)


def test_a_sums_bias_is_added_by_the_first_rank_alone():
    kind = type("RowParallelLinear", (Object,), {})
    for rank in (0, 1):
        module = kind(**vars(linear()), tp_rank=rank)
        module.bias = torch.zeros(N, dtype=torch.bfloat16)
        _, bound = bind(module)
        assert (bound.bias is None) == (rank == 1)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (linear("AutoAWQLinearMethod"), "qkv_proj is quantized by AutoAWQLinearMethod"),
        (linear(scheme=Object()), "quantized by SimpleNamespace; served is CompressedTensorsW8A8Fp8"),
        (linear(skip_bias_add=True), "leaves its bias"),
        (linear(input_scale_ub=torch.ones(1)), "bounds the scale"),
        (linear(weight=torch.zeros(N, K, dtype=torch.int32)), "weight is torch.int32; expected torch.bfloat16 or"),
        (linear(weight=torch.zeros(N + 16, K).to(FP8).t()), r"weight is \[256, 400\]"),
        (linear(weight_scale=torch.ones(3)), r"scales are torch.float32 \[3\]"),
        (linear(weight_scale=torch.ones(N).bfloat16()), "scales are torch.bfloat16"),
        (linear(input_scale=torch.ones(3)), "has 3 scales of its inputs"),
        (linear(bias=torch.zeros(N)), "bias is torch.float32"),
        (
            linear("UnquantizedLinearMethod", weight=torch.zeros(K, N).bfloat16()),
            r"weight is \[256, 384\]; expected \[384, 256\]",
        ),
        (linear("Fp8LinearMethod", weight_block_size=[64, 64]), r"blocks of \[64, 64\]"),
        (
            linear(
                "Fp8LinearMethod",
                weight=torch.zeros(N, K).to(FP8),
                weight_block_size=[128, 128],
                weight_scale_inv=torch.ones(3, 1, dtype=torch.int32),
            ),
            r"scales are torch.int32 \[3, 1\]; expected float32 \[3, 2\]",
        ),
    ],
)
def test_weights_that_are_refused(module, reason):
    with pytest.raises(support.UnsupportedError, match=reason):
        bind(module)

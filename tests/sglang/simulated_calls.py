"""Calls of SGLang's own Python under the plug-in, in a process of its own: what served them, and which numbers came out.

usage: simulated_calls.py FUNCTION      prints "ANSWER " and its answer as JSON
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from typing import Any

import hdispatch
import torch
from hdispatch import _C, registry
from hdispatch.testing.numeric import assert_close_by_dtype, compare_fp8, compare_scale
from simulation import RAN, note_kernels, simulate

FP8 = torch.float8_e4m3fn
HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD = 512, 768, 4, 2, 128
#: SGLang's layers end, or fail, before they call these functions without rows.
EARLIER = ("rms_norm", "fused_add_rms_norm", "rotary_embedding")
GENERATOR = torch.Generator().manual_seed(1)


def load(*, reference: bool = False) -> None:
    """SGLang with its plug-ins. The table serves, on the null driver, or the torch references of our ops in its place."""
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
    if not reference:
        hdispatch.load(driver="null")
    simulate()
    note_kernels()
    if reference:
        _C.make_attempt = lambda op: lambda *args: op(*args) is None
    from sglang.srt.plugins import load_plugins

    load_plugins()


def rows(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 3.0) -> torch.Tensor:
    return (scale * torch.randn(*shape, generator=GENERATOR)).to(dtype)


def fp8(*shape: int) -> torch.Tensor:
    return rows(*shape, dtype=torch.float32, scale=100).clamp(-448, 448).to(FP8)


def scales(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=GENERATOR) * 1e-3 + 1e-4


# ---- SGLang's layers and functions, as its models call them ----


def norm_layer() -> Any:
    from sglang.srt.layers.layernorm import RMSNorm

    layer = RMSNorm(HIDDEN, eps=1e-5)
    layer.weight.data = rows(HIDDEN, scale=1.0)
    return layer


def rope_layer(neox: bool = True, head: int = HEAD, rotary: int = HEAD) -> Any:
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

    return RotaryEmbedding(head, rotary, 4096, 10000, neox, torch.bfloat16)


def heads_of(m: int, head: int = HEAD) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positions, and q and k as views of a row of q, k and v."""
    qkv = rows(m, (HEADS + 2 * KV_HEADS) * head)
    return torch.randint(4096, (m,), generator=GENERATOR), qkv[:, : HEADS * head], qkv[:, HEADS * head :][:, : KV_HEADS * head]


def group_quant(x: torch.Tensor, **given: Any) -> Any:
    from sglang.kernels.ops.quantization.fp8_kernel import sglang_per_token_group_quant_fp8

    return sglang_per_token_group_quant_fp8(x, 128, **given)


def block_product(name: str, m: int, **given: Any) -> tuple[Any, list[torch.Tensor]]:
    from sglang.kernels.ops.gemm import fp8_kernel

    a, b, sa, sb = fp8(m, HIDDEN), fp8(384, HIDDEN), scales(HIDDEN // 128, m).t(), scales(3, HIDDEN // 128)
    block = given.pop("block", [128, 128])
    return getattr(fp8_kernel, name)(a, b, sa, sb, block, output_dtype=given.pop("dtype", torch.bfloat16)), [a, b, sa, sb]


def usual(m: int = 5) -> dict[str, Callable[[], Any]]:
    """Op -> a call of SGLang's that it is to serve."""
    from sglang.kernels.ops.gemm import fp8_scaled_mm
    from sglang.kernels.ops.quantization.fp8_kernel import scaled_fp8_quant, sglang_per_token_quant_fp8
    from sglang.srt.layers.activation import SiluAndMul

    norm, rope, act = norm_layer(), rope_layer(), SiluAndMul()
    return {
        "rms_norm": lambda: norm(rows(m, HIDDEN)),
        "fused_add_rms_norm": lambda: norm(rows(m, HIDDEN), rows(m, HIDDEN)),
        "silu_and_mul": lambda: act(rows(m, 2 * INTERMEDIATE)),
        "rotary_embedding": lambda: rope(*heads_of(m)),
        "dynamic_per_token_scaled_fp8_quant": lambda: sglang_per_token_quant_fp8(rows(m, HIDDEN)),
        "dynamic_per_token_scaled_fp8_quant (scaled_fp8_quant)": lambda: scaled_fp8_quant(
            rows(m, HIDDEN), use_per_token_if_dynamic=True
        ),
        "per_token_group_fp8_quant": lambda: group_quant(rows(m, HIDDEN)),
        "per_token_group_fp8_quant (columns)": lambda: group_quant(
            rows(m, HIDDEN), column_major_scales=True, scale_tma_aligned=True
        ),
        "per_token_group_fp8_quant (powers of two)": lambda: group_quant(rows(m, HIDDEN), scale_ue8m0=True),
        "scaled_mm": lambda: fp8_scaled_mm(fp8(m, HIDDEN), fp8(384, HIDDEN).t(), scales(m, 1), scales(384), torch.bfloat16),
        "scaled_mm_blockwise (DeepGEMM)": lambda: block_product("w8a8_block_fp8_matmul_deepgemm", m),
        "scaled_mm_blockwise (Triton)": lambda: block_product("w8a8_block_fp8_matmul_triton", m),
    }


def run(calls: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """Of each call: hits by op, reasons of misses, SGLang's own kernels that ran."""
    found = {}
    with torch.no_grad():
        for name, call in calls.items():
            hdispatch.stats(reset=True)
            RAN.clear()
            call()
            counts = {op: each for op, each in hdispatch.stats().items() if op in registry.names()}
            hits = {op: each["hits"] for op, each in counts.items() if each["hits"]}
            reasons = [reason for each in counts.values() for reason in each["misses"]]
            found[name] = {"hits": hits, "reasons": reasons, "own": list(RAN)}
    return found


# ---- what the tests ask for ----


def served() -> Any:
    load()
    return {"calls": run(usual()), "empty": run({k: v for k, v in usual(0).items() if not k.startswith(EARLIER)})}


def registered() -> Any:
    """The kernels in SGLang's registry, loaded by its selector; and a call of one."""
    load()
    import sglang.kernels.ops  # noqa: F401
    from sglang.kernels import KernelBackend, select_kernel
    from sglang.kernels import registry as theirs

    ours = [spec for spec in theirs.all_specs() if spec.backend is KernelBackend.PLUGIN]
    loaded = {spec.op: select_kernel(spec.op, backend=KernelBackend.PLUGIN).load() for spec in ours}
    hdispatch.stats(reset=True)
    x = rows(5, 2 * INTERMEDIATE)
    out = loaded["activation.silu_and_mul"](x)
    refused = ""
    try:
        loaded["activation.silu_and_mul"](x, expert_ids=torch.zeros(5, dtype=torch.int32))
    except hdispatch.ArgumentError as error:
        refused = str(error)
    return {
        "ops": sorted(loaded),
        "known": [op for op in loaded if len(theirs.get(op)) > 1],
        "hits": hdispatch.stats()["silu_and_mul"]["hits"],
        "shape": list(out.shape),
        "refused": refused,
    }


def hooks() -> Any:
    """What the plug-in put into SGLang's registries."""
    load()
    import sglang.kernels.ops  # noqa: F401
    from sglang.kernels import KernelBackend
    from sglang.kernels import registry as theirs
    from sglang.srt.plugins.hook_registry import HookRegistry

    plugins = [spec.op for spec in theirs.all_specs() if spec.backend is KernelBackend.PLUGIN]
    return {"hooks": sorted(HookRegistry._hooks), "plugins": plugins}


def off() -> Any:
    return hooks() | {"calls": run(usual())}


def unusual() -> Any:
    load()
    from sglang.kernels.ops.activation.activation import silu_and_mul
    from sglang.kernels.ops.attention.rope import FusedSetKVBufferArg, apply_rope_with_cos_sin_cache_inplace
    from sglang.kernels.ops.gemm import fp8_scaled_mm
    from sglang.kernels.ops.quantization.fp8_kernel import sglang_per_token_quant_fp8
    from sglang.kernels.ops.quantization.per_token_group_quant import per_token_group_quant
    from sglang.srt.layers.activation import SiluAndMul

    norm, rope, act, m = norm_layer(), rope_layer(), SiluAndMul(), 5
    x, wide = rows(m, HIDDEN), rows(m, 2 * INTERMEDIATE)
    q, s = torch.empty(m, HIDDEN, dtype=FP8), torch.empty(m, 4)
    norm32 = norm_layer()
    norm32.weight.data = norm32.weight.data.float()

    def store(positions: Any, query: Any, key: Any) -> Any:
        pool = torch.zeros(64, KV_HEADS * HEAD, dtype=torch.bfloat16)
        arg = FusedSetKVBufferArg(key, pool, pool.clone(), torch.arange(m))
        return rope(positions, query, key, fused_set_kv_buffer_arg=arg)

    def rotate(positions: Any, query: Any, key: Any) -> None:
        q3, k3 = query.view(m, -1, HEAD), key.view(m, -1, HEAD)
        apply_rope_with_cos_sin_cache_inplace(q3, k3, rope.cos_sin_cache, positions, is_neox=True)

    def ints() -> Any:
        positions, query, key = heads_of(m)
        return positions.int(), query, key

    def compiled() -> None:
        torch.compile(lambda y: act(y), backend="eager", fullgraph=True)(wide)

    return run(
        {
            "norm of float32": lambda: norm(x.float()),
            "norm with a float32 weight": lambda: norm32(x, rows(m, HIDDEN)),
            "norm that needs a gradient": lambda: torch.enable_grad()(norm)(x.clone().requires_grad_()),
            "experts": lambda: silu_and_mul(wide, None, torch.zeros(m, dtype=torch.int32)),
            "activation under torch.compile": compiled,
            "activation of float32": lambda: act(wide.float()),
            "rope and store": lambda: store(*heads_of(m)),
            "rope of int32 positions": lambda: rotate(*ints()),
            "rope of part of a head": lambda: rope_layer(rotary=64)(*heads_of(m)),
            "tokens of float32": lambda: sglang_per_token_quant_fp8(x.float()),
            "tokens into a longer buffer": lambda: sglang_per_token_quant_fp8(
                x, output_q=torch.empty(8, HIDDEN, dtype=FP8), output_s=torch.empty(8, 1)
            ),
            "groups to int8": lambda: per_token_group_quant(x, q.view(torch.int8), s),
            "groups of 32": lambda: per_token_group_quant(x, q, torch.empty(m, 16), 32),
            "groups without buffers": lambda: per_token_group_quant(x),
            "packed groups": lambda: group_quant(x, column_major_scales=True, scale_tma_aligned=True, scale_ue8m0=True),
            "groups with an activation": lambda: group_quant(rows(m, 2 * HIDDEN), fuse_silu_and_mul=True),
            "product to float32": lambda: fp8_scaled_mm(
                fp8(m, HIDDEN), fp8(384, HIDDEN).t(), scales(m, 1), scales(384), torch.float32
            ),
            "product of rows": lambda: fp8_scaled_mm(
                fp8(m, HIDDEN), fp8(HIDDEN, 384), scales(m, 1), scales(384), torch.bfloat16
            ),
        }
    )


def numbers() -> Any:
    """SGLang's layers under the hooks, our references in the table's place, against SGLang's own torch, and what its kernels
    are documented to compute. Raises where they differ."""
    load(reference=True)
    with torch.no_grad():
        for m in (1, 2, 5, 33):
            _compare_norms(m)
            _compare_activation(m)
            for neox in (True, False):
                for head in (64, 128, 256):
                    _compare_rope(m, neox, head)
            _compare_quantization(m)
            _compare_products(m)
    assert RAN == [], f"SGLang's own kernels ran: {RAN}"
    return {"ok": True}


def _compare_norms(m: int) -> None:
    norm = norm_layer()
    for shape in ((m, HIDDEN), (m, 2, HIDDEN)):
        for x in (rows(*shape), rows(*shape, scale=1e-3), torch.zeros(*shape, dtype=torch.bfloat16)):
            assert_close_by_dtype(norm.forward_cuda(x.clone()), norm.forward_native(x))
            if len(shape) == 2:
                residual = rows(*shape)
                got = norm.forward_cuda(x.clone(), residual.clone())
                for mine, theirs in zip(got, norm.forward_native(x, residual), strict=True):
                    # SGLang norms the sum before it is rounded, we after, as vLLM: half a unit of bfloat16 more.
                    assert_close_by_dtype(mine, theirs, rtol=2.4e-2, atol=2e-3)


def _compare_activation(m: int) -> None:
    from sglang.srt.layers.activation import SiluAndMul

    act = SiluAndMul()
    for x in (rows(m, 2 * INTERMEDIATE), rows(m, 3, 2 * INTERMEDIATE), rows(m, 2 * INTERMEDIATE, scale=60)):
        assert_close_by_dtype(act.forward_cuda(x), act.forward_native(x))


def _compare_rope(m: int, neox: bool, head: int) -> None:
    rope = rope_layer(neox, head, head)
    positions, query, key = heads_of(m, head)
    wanted = rope.forward_native(positions, query.float(), key.float())  # of bfloat16 it rounds each product
    got = rope.forward_cuda(positions, query, key)
    for mine, theirs in zip(got, wanted, strict=True):
        assert_close_by_dtype(mine, theirs.to(mine.dtype))


def _compare_quantization(m: int) -> None:
    from sglang.kernels.ops.quantization.fp8_kernel import sglang_per_token_quant_fp8

    for x in (rows(m, HIDDEN), rows(m, HIDDEN, scale=1e-2), rows(m, HIDDEN, dtype=torch.float16)):
        x[-1, 3] = 70.0
        # per_token_quant_fp8.cuh: scale = max |row| / 448, x * (1 / scale)
        codes, scale = sglang_per_token_quant_fp8(x)
        expected = x.float().abs().amax(-1, keepdim=True) / 448
        compare_scale(scale, expected)
        compare_fp8(codes, (x.float() / expected).clamp(-448, 448).to(FP8), min_equal=0.99)
        _compare_groups(x)
    zeros = torch.zeros(m, HIDDEN, dtype=torch.bfloat16)
    codes, scale = sglang_per_token_quant_fp8(zeros)
    assert not (codes.float() * scale).any()


def _compare_groups(x: torch.Tensor) -> None:
    """per_token_group_quant.cuh: scale = max(max |group|, 1e-10) / 448, x * (448 / …); …_v2.cuh: 2 ** ceil(log2(scale))."""
    groups = x.float().unflatten(-1, (-1, 128))
    exact = groups.abs().amax(-1).clamp(min=1e-10) / 448
    for given in ({}, {"column_major_scales": True, "scale_tma_aligned": True}, {"scale_ue8m0": True}):
        codes, scale = group_quant(x, **given)
        expected = torch.exp2(exact.log2().ceil()) if "scale_ue8m0" in given else exact
        compare_scale(scale.contiguous(), expected)
        quotients = (groups / expected.unsqueeze(-1)).clamp(-448, 448).flatten(-2)
        compare_fp8(codes, quotients.to(FP8), min_equal=0.99)


def _compare_products(m: int) -> None:
    from sglang.kernels.ops.gemm import fp8_scaled_mm
    from sglang.srt.layers.quantization.fp8_utils import block_quant_dequant

    a, b, sa, sb = fp8(m, HIDDEN), fp8(384, HIDDEN).t(), scales(m, 1), scales(384)
    for bias in (None, rows(384)):
        got = fp8_scaled_mm(a, b, sa, sb, torch.bfloat16, bias)
        wanted = (a.double() * sa.double()) @ (b.double() * sb.double())
        assert_close_by_dtype(got, (wanted if bias is None else wanted + bias.double()).to(torch.bfloat16), atol=1e-2)
    for name in ("w8a8_block_fp8_matmul_deepgemm", "w8a8_block_fp8_matmul_triton"):
        got, (a, b, sa, sb) = block_product(name, m)
        weights = block_quant_dequant(b, sb, [128, 128], torch.float32)
        wanted = (a.double() * sa.repeat_interleave(128, 1).double()) @ weights.double().t()
        assert_close_by_dtype(got, wanted.to(torch.bfloat16), atol=1e-2)


def other_parameters() -> Any:
    """A function of SGLang's that has one parameter more stays its own; so does one that is not there."""
    simulate()
    module = sys.modules["sgl_kernel"]
    former = module.rmsnorm

    def rmsnorm(input: Any, weight: Any, eps: float = 1e-6, out: Any = None, enable_pdl: Any = None, more: int = 0) -> Any:
        return former(input, weight, eps, out, enable_pdl)

    module.rmsnorm = rmsnorm
    from sglang.kernels.ops.quantization import per_token_group_quant_8bit_v2 as v2

    del v2.per_token_group_quant_8bit_v2
    hdispatch.load(driver="null")
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
    note_kernels()
    from hdispatch.integrations.sglang import plugin
    from sglang.srt.plugins import load_plugins

    load_plugins()
    calls = usual()
    return {"calls": run({name: calls[name] for name in ("rms_norm", "fused_add_rms_norm")}), "doctor": plugin.examine()}


def examined() -> Any:
    simulate()
    from hdispatch.integrations.sglang import plugin

    return plugin.examine()


if __name__ == "__main__":
    print("ANSWER " + json.dumps(globals()[sys.argv[1]]()))

"""What vLLM passes to its ops, as its layers and its own kernel tests call them: served, or missed for a reason by name."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import hdispatch
import pytest
import torch
from hdispatch.integrations.vllm import ROUTES
from hdispatch.testing import null
from standin import SCHEMAS, Library, counts

pytestmark = pytest.mark.usefixtures("bundle")

REAL = [
    n for n in hdispatch.registry.names() if hdispatch.registry.spec(n).reference.__module__.startswith("hdispatch.kernels")
]
FP8 = torch.float8_e4m3fn


def fuzz_script():
    """scripts/fuzz.py, which writes a bundle with rows of every op."""
    spec = importlib.util.spec_from_file_location("fuzz", Path(__file__).parents[2] / "scripts" / "fuzz.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fuzz_script().write_null_bundle(tmp_path_factory.mktemp("calls") / "bundle", REAL)


@pytest.fixture(scope="module")
def library() -> Library:
    return Library(*SCHEMAS)


@pytest.fixture(params=["packet", "default"])
def call(request, library):
    def run(name, *args):
        packet = getattr(library.ops, name)
        library.calls.clear()
        with library.override(ROUTES):
            (packet if request.param == "packet" else packet.default)(*args)

    return run


def served(library, op: str) -> bool:
    found = counts(op)
    hdispatch.stats(reset=True)
    return found == {"hits": 1, "empty": 0, "fallbacks": 0, "misses": {}} and not library.calls


def reason(op: str) -> str:
    found = counts(op)
    hdispatch.stats(reset=True)
    assert (found["hits"], found["fallbacks"]) == (0, 1), found
    return next(iter(found["misses"]))


ROPE = {
    "tokens": ((11,), (11, 17 * 64)),
    "tokens, heads": ((11,), (11, 17, 64)),
    "batch, length": ((5, 11), (5, 11, 17 * 64)),
    "batch, length, heads": ((5, 11), (5, 11, 17, 64)),
    "a batch of one token": ((1, 1), (1, 1, 17, 64)),
    "one head": ((11,), (11, 1, 64)),
}


@pytest.mark.parametrize("use_key", [True, False])
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("shapes", ROPE.values(), ids=ROPE.keys())
def test_rotary_embedding(call, library, shapes, is_neox, use_key):
    """get_rope(...).forward of vLLM's test_pos_encoding.py: six arguments, positions of one or two dimensions."""
    positions, cache = torch.randint(0, 128, shapes[0]), torch.randn(128, 64).bfloat16()
    query = torch.randn(shapes[1]).bfloat16()
    key = torch.randn(shapes[1]).bfloat16() if use_key else None
    with null.recording():
        call("rotary_embedding", positions, query, key, 64, cache, is_neox)
    assert null.launches()[0]["grid"][0] == positions.numel()
    assert served(library, "rotary_embedding")
    # What is served is what the reference makes of it: row by row, head by head.
    spec, flat = hdispatch.registry.spec("rotary_embedding"), query.clone().view(positions.numel(), -1)
    spec.reference(positions.flatten(), flat, None, 64, cache, is_neox)
    spec.reference(positions, query, key, 64, cache, is_neox)
    assert torch.equal(query.view(flat.shape), flat)


def test_rotary_embedding_of_a_projection(call, library):
    """q and k are columns of one tensor, also with head_size as a dimension of its own."""
    qkv, cache = torch.randn(11, 3 * 256).bfloat16(), torch.randn(128, 64).bfloat16()
    q, k, _ = qkv.split(256, dim=-1)
    for query, key in ((q, k), (q.unflatten(-1, (4, 64)), k.unflatten(-1, (4, 64)))):
        call("rotary_embedding", torch.arange(11), query, key, 64, cache, True)
        assert served(library, "rotary_embedding")


def test_rotary_embedding_misses(call):
    positions, cache = torch.randint(0, 128, (5, 11)), torch.randn(128, 64).bfloat16()
    padded = torch.randn(5, 11, 7, 128).bfloat16()[..., :64]
    call("rotary_embedding", positions, padded, None, 64, cache, True)
    assert reason("rotary_embedding") == "override: query: strides"
    x = torch.randn(5, 11, 7 * 80)
    call("rotary_embedding", positions, x, None, 80, torch.randn(128, 80), True)
    assert reason("rotary_embedding") == "override: query: dtype"
    call("rotary_embedding", positions, x.bfloat16(), None, 80, torch.randn(128, 80).bfloat16(), True)
    assert reason("rotary_embedding") == "no variant: head_size"
    call("rotary_embedding", positions, x.bfloat16(), None, 64, cache, True, 2)
    assert reason("rotary_embedding") == "no variant: rope_dim_offset"
    call("rotary_embedding", positions, x[:, :10].bfloat16(), None, 64, cache, True)
    assert reason("rotary_embedding") == "override: query: size"
    q = torch.randn(11, 128).bfloat16()
    call("rotary_embedding", torch.arange(11), q, q, 64, cache, True)
    assert reason("rotary_embedding") == "override: query: overlap"


def test_static_scaled_fp8_quant(call, library):
    """vLLM's QuantFP8 gives group_shape for static scales, (-1, -1) where there is one."""
    x, out = torch.randn(7, 1024).bfloat16(), torch.zeros(7, 1024, dtype=FP8)
    for scale in (torch.ones(1), torch.tensor(1.0), torch.ones(1, 1)):
        for group in (None, [-1, -1], (-1, -1)):
            call("static_scaled_fp8_quant", out, x, scale, group)
            assert served(library, "static_scaled_fp8_quant")
    call("static_scaled_fp8_quant", out, x.float(), torch.ones(1), None)
    assert reason("static_scaled_fp8_quant") == "override: input: dtype"
    call("static_scaled_fp8_quant", out, x, torch.ones(8, 7).t(), [1, 128])
    assert reason("static_scaled_fp8_quant") == "override: scale: strides"


def test_norms(call, library):
    """test_layernorm.py, and models of the Transformers library, which keep a dimension for a batch of one."""
    weight = torch.ones(64).bfloat16()
    for shape in ((7, 64), (1, 7, 64), (7, 3, 64), (1, 7, 3, 64), (2, 7, 3, 64)):
        x = torch.randn(shape).bfloat16()
        call("rms_norm", torch.empty_like(x), x, weight, 1e-6)
        assert served(library, "rms_norm"), shape
    for shape in ((7, 64), (1, 7, 64), (2, 7, 3, 64)):
        x = torch.randn(shape).bfloat16()
        call("fused_add_rms_norm", x, torch.randn_like(x), weight, 1e-6)
        assert served(library, "fused_add_rms_norm"), shape
        call("silu_and_mul", torch.empty(*shape[:-1], 32).bfloat16(), x)
        assert served(library, "silu_and_mul"), shape
    x = torch.randn(7, 64)
    call("rms_norm", torch.empty_like(x), x, weight.float(), 1e-6)
    assert reason("rms_norm") == "override: result: dtype"
    x = x.bfloat16()
    call("rms_norm", torch.empty_like(x), x, weight.float(), 1e-6)  # Gemma's weight
    assert reason("rms_norm") == "override: weight: dtype"
    wide = [torch.randn(7, columns).bfloat16()[:, :64] for columns in (128, 192)]
    for rows, residual in (wide, (x, wide[0]), (wide[0], x)):  # strided_input of test_layernorm.py: both lie apart
        call("fused_add_rms_norm", rows, residual, weight, 1e-6)
        assert served(library, "fused_add_rms_norm")
    call("fused_add_rms_norm", x, torch.randn(64, 7).bfloat16().t(), weight, 1e-6)
    assert reason("fused_add_rms_norm") == "override: residual: strides"


@pytest.mark.parametrize("shape", [(28, 17, 64), (4, 3, 8, 64), (1, 5, 2, 64)])
def test_a_weight_for_each_batch_is_missed(call, shape):
    """test_batched_weight_rms_norm.py: a row of weights for each first index is vLLM's kernel's."""
    x = torch.randn(shape).bfloat16()
    call("rms_norm", torch.empty_like(x), x, torch.ones(shape[0], 64).bfloat16(), 1e-6)
    assert reason("rms_norm") == "override: weight: rank"


def test_fused_norms(call, library):
    """test_fused_quant_layernorm.py: fp8 of 16-bit inputs is served, int8 and float32 are not."""
    x, weight, scale = torch.randn(7, 1024).bfloat16(), torch.ones(1024).bfloat16(), torch.ones(7, 1)
    for upper in (None, torch.ones(1), torch.tensor(1.0)):
        call("rms_norm_dynamic_per_token_quant", torch.zeros(7, 1024, dtype=FP8), x, weight, scale, 1e-6, upper, None)
        assert served(library, "rms_norm_dynamic_per_token_quant")
    columns = torch.ones(8, 7).t()
    call("rms_norm_per_block_quant", torch.zeros(7, 1024, dtype=FP8), x, weight, columns, 1e-6, None, None, 128, True)
    assert served(library, "rms_norm_per_block_quant")
    for name, rest in (
        ("rms_norm_dynamic_per_token_quant", (scale, 1e-6, None, None)),
        ("rms_norm_per_block_quant", (columns, 1e-6, None, None, 128, True)),
    ):
        call(name, torch.zeros(7, 1024, dtype=torch.int8), x, weight, *rest)
        assert reason(name) == "override: result: dtype"
        call(name, torch.zeros(7, 1024, dtype=FP8), x.float(), weight.float(), *rest)
        assert reason(name) == "override: input: dtype"
        call(name, torch.zeros(7, 1024, dtype=FP8), x, weight.float(), *rest)
        assert reason(name) == "override: weight: dtype"


def test_cutlass_scaled_mm(call, library):
    """test_cutlass_scaled_mm.py: scales [M, 1] or [1, 1] and [1, N] or [1, 1], with columns contiguous; int8 is not served."""
    a, b = torch.zeros(5, 256).to(FP8), torch.zeros(128, 256).to(FP8).t()
    out = torch.zeros(5, 128).bfloat16()
    for rows in ((5, 1), (1, 1), (1,), (5,)):
        for columns in ((1, 128), (1, 1), (128,)):
            call("cutlass_scaled_mm", out, a, b, torch.ones(rows), torch.ones(columns), torch.ones(128).bfloat16())
            assert served(library, "scaled_mm"), (rows, columns)
    blocks = torch.ones(2, 5).t(), torch.ones(1, 2).t()
    call("cutlass_scaled_mm", out, a, b, *blocks, None)
    assert served(library, "scaled_mm_blockwise")
    call("cutlass_scaled_mm", out, a.to(torch.int8), b.to(torch.int8), torch.ones(1), torch.ones(1), None)
    assert reason("scaled_mm") == "override: a: dtype (scaled_mm); a: dtype (scaled_mm_blockwise)"
    call("cutlass_scaled_mm", out, a, b, torch.ones(5, 2), blocks[1], None)
    form = "strides that the overridden op does not read"
    assert reason("scaled_mm") == f"override: a_scales: size (scaled_mm); a_scales: {form} (scaled_mm_blockwise)"

"""The plug-in on SGLang's own kernels: the same results with its hooks and without them.

SGLang is the installed one; or, with HDISPATCH_SGLANG, the Python that scripts/fetch_sglang.py put into that folder, with empty
modules for packages that are not there. What it compiles for itself needs nvcc; what sgl-kernel has compiled is left out then.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import hdispatch
import pytest
import torch

if folder := os.environ.get("HDISPATCH_SGLANG"):
    sys.path[:0] = [str(Path(folder, "tree")), str(Path(folder, "deps")), str(Path(__file__).parents[1] / "sglang")]
    import simulation  # type: ignore[import-not-found]

    HAS_SGL_KERNEL = "sgl_kernel" not in simulation.absent()
    sys.meta_path.append(simulation.Finder())
else:
    HAS_SGL_KERNEL = True

from hdispatch.integrations.sglang import FUNCTIONS, plugin
from hdispatch.testing.numeric import assert_close_by_dtype, compare_fp8, compare_scale

#: A folder on the path, such as tests/, has one of that name, which is no package and has no origin.
wanted = ("sglang", "sgl_kernel") if HAS_SGL_KERNEL else ("sglang",)
missing = [n for n in wanted if getattr(importlib.util.find_spec(n), "origin", None) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"{' and '.join(missing)} cannot be imported")
of_sgl_kernel = pytest.mark.skipif(not HAS_SGL_KERNEL, reason="sgl_kernel, which has compiled it, is not there")
of_nvcc = pytest.mark.skipif(
    shutil.which("ninja") is None or (shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").is_file()),
    reason="SGLang compiles it with nvcc and ninja",
)

FP8 = torch.float8_e4m3fn
HIDDEN, WIDE, MS = 4096, 12288, (1, 2, 16, 17, 128, 1000)
ROWS = [pytest.param(m, id=f"M={m}") for m in MS]


def rows(*shape, scale=3.0, dtype=torch.bfloat16):
    return (scale * torch.randn(*shape, device="cuda")).to(dtype)


def fp8(*shape):
    return rows(*shape, scale=100, dtype=torch.float32).clamp(-448, 448).to(FP8)


def scales(*shape):
    return torch.rand(*shape, device="cuda") * 1e-3 + 1e-4


def function(name):
    return next(each for each in FUNCTIONS if each.target.endswith(f".{name}"))


def both(name, make):
    """(what SGLang's function makes of arguments, what the hook around it makes of equal ones, which the table must serve)

    Each is its result and its arguments afterwards.
    """
    target = function(name)
    holder, _, last = target.target.rpartition(".")
    try:
        original = getattr(plugin.find(holder), last)
    except ImportError as error:
        if HAS_SGL_KERNEL:
            raise
        pytest.skip(f"sgl_kernel, which is not there, has what {holder} imports: {error}")
    found = []
    for call in (original, lambda *args, **named: target.make_hook()(refuse, *args, **named)):
        torch.manual_seed(7)
        args, named = make()
        with torch.no_grad(), hdispatch.strict():
            found.append((call(*args, **named), args, named))
    torch.cuda.synchronize()
    return found


def refuse(*_, **__):
    raise AssertionError("the table did not serve the call")


def test_every_function_has_the_parameters_that_it_had():
    listed = [each for each in FUNCTIONS if HAS_SGL_KERNEL or not each.target.startswith("sgl_kernel.")]
    assert len(listed) >= len(FUNCTIONS) - 2
    assert not [why for each in listed if (why := plugin.objection(each))]


@of_sgl_kernel
@pytest.mark.parametrize("m", ROWS)
def test_norms(bundle, m):
    (theirs, _, _), (ours, _, _) = both("rmsnorm", lambda: ((rows(m, HIDDEN), rows(HIDDEN, scale=1.0), 1e-6), {}))
    assert_close_by_dtype(ours, theirs)
    (_, theirs, _), (_, ours, _) = both(
        "fused_add_rmsnorm", lambda: ((rows(m, HIDDEN), rows(m, HIDDEN), rows(HIDDEN, scale=1.0), 1e-6), {})
    )
    assert_close_by_dtype(ours[1], theirs[1])
    assert_close_by_dtype(ours[0], theirs[0], rtol=2.4e-2, atol=2e-3)  # theirs norms the sum before it is rounded


@of_nvcc
@pytest.mark.parametrize("m", ROWS)
def test_activation(bundle, m):
    (theirs, _, _), (ours, _, _) = both("silu_and_mul", lambda: ((rows(m, 2 * WIDE),), {}))
    assert_close_by_dtype(ours, theirs)


@of_nvcc
@pytest.mark.parametrize("m", ROWS)
def test_rope(bundle, m):
    def make():
        qkv, angles = rows(m, 6144), torch.rand(4096, 64, device="cuda") * 6.28
        q, k = qkv[:, :4096].view(m, 32, 128), qkv[:, 4096:5120].view(m, 8, 128)
        cache = torch.cat((angles.cos(), angles.sin()), -1)
        return (q, k, cache, torch.randint(4096, (m,), device="cuda")), {"is_neox": True}

    (_, theirs, _), (_, ours, _) = both("apply_rope_with_cos_sin_cache_inplace", make)
    assert_close_by_dtype(ours[0], theirs[0])
    assert_close_by_dtype(ours[1], theirs[1])


@of_nvcc
@pytest.mark.parametrize("m", ROWS)
def test_quantization_per_token(bundle, m):
    def make():
        return (rows(m, HIDDEN), torch.empty(m, HIDDEN, dtype=FP8, device="cuda"), torch.empty(m, 1, device="cuda")), {}

    (_, theirs, _), (_, ours, _) = both("sgl_per_token_quant_fp8", make)
    compare_scale(ours[2], theirs[2])
    compare_fp8(ours[1], theirs[1], min_equal=0.99)


@of_nvcc
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("m", ROWS)
def test_quantization_per_group(bundle, m, columns):
    def make():
        padded = -(-m // 4) * 4
        groups = HIDDEN // 128
        scale = torch.empty(groups, padded, device="cuda").t()[:m] if columns else torch.empty(m, groups, device="cuda")
        return (rows(m, HIDDEN), torch.empty(m, HIDDEN, dtype=FP8, device="cuda"), scale, 128), {}

    (_, theirs, _), (_, ours, _) = both("per_token_group_quant", make)
    compare_scale(ours[2], theirs[2])
    compare_fp8(ours[1], theirs[1], min_equal=0.99)


@of_nvcc
@pytest.mark.parametrize("m", ROWS)
def test_quantization_per_group_with_powers_of_two(bundle, m):
    def make():
        scale = torch.empty(m, HIDDEN // 128, device="cuda")
        args = (rows(m, HIDDEN), torch.empty(m, HIDDEN, dtype=FP8, device="cuda"), scale, 128, 1e-10, -448.0, 448.0, True)
        return args, {}

    (_, theirs, _), (_, ours, _) = both("per_token_group_quant_8bit_v2", make)
    assert torch.equal(ours[2], theirs[2])
    compare_fp8(ours[1], theirs[1], min_equal=0.99)


@of_sgl_kernel
@pytest.mark.parametrize("m", ROWS)
def test_product_per_token(bundle, m):
    def make():
        b = fp8(6144, HIDDEN).t()
        return (None, fp8(m, HIDDEN), b, scales(m, 1), scales(6144), torch.bfloat16, None), {}

    (theirs, _, _), (ours, _, _) = both("forward_aot", make)
    _compare_products(ours, theirs)


@pytest.mark.parametrize("name", ["w8a8_block_fp8_matmul_deepgemm", "w8a8_block_fp8_matmul_triton"])
@pytest.mark.parametrize("m", ROWS)
def test_product_of_blocks(bundle, m, name):
    if name.endswith("deepgemm"):
        from sglang.srt.layers import deep_gemm_wrapper

        if not deep_gemm_wrapper.ENABLE_JIT_DEEPGEMM or not HAS_SGL_KERNEL:
            pytest.skip("DeepGEMM is not there, or off")

    def make():
        a_scales = scales(HIDDEN // 128, -(-m // 4) * 4).t()[:m]
        return (fp8(m, HIDDEN), fp8(6144, HIDDEN), a_scales, scales(48, HIDDEN // 128), [128, 128], torch.bfloat16), {}

    (theirs, _, _), (ours, _, _) = both(name, make)
    _compare_products(ours, theirs)


def _compare_products(ours, theirs):
    """Relative to the size of the output: the tensor core drops bits, in another order in each kernel."""
    size = theirs.float().pow(2).mean().sqrt()
    assert_close_by_dtype(ours, theirs, atol=float(1e-2 * size))

"""Every op against its float32 reference on the GPU: all variants and sizes, at the edges of the buckets.

Why these M: each bucket edge changes the row that serves the call, edge ± 1 changes the class of M (== 1, % 16 == 0,
other) that picks the cubin, and one past the last edge is served by the last bucket.
"""

from __future__ import annotations

import hdispatch
import pytest
import torch
from hdispatch.testing.numeric import compare_fp8, compare_scale, poison

OPS = [
    "dynamic_per_token_scaled_fp8_quant",
    "rms_norm_dynamic_per_token_quant",
    "silu_and_mul_dynamic_per_token_quant",
]
EDGES = hdispatch.ops.spec(OPS[0]).ladder
MS = sorted({m for edge in EDGES for m in (edge - 1, edge, edge + 1) if m >= 1})
CASES = [
    pytest.param(op, variant.name, shape, id=f"{op}-{variant.name}-{'x'.join(map(str, shape.values()))}")
    for op in OPS
    for variant in hdispatch.ops.spec(op).variants()
    for shape in hdispatch.ops.spec(op).shapes
]


def make(op, variant, shape, m, seed=0):
    """Random arguments on the GPU, made there."""
    spec = hdispatch.ops.spec(op)
    device = torch.device("cuda")
    return spec.sample(spec.variant(variant), {"M": m, **shape}, device, torch.Generator(device).manual_seed(seed))


def copy(args):
    return [a.clone() if isinstance(a, torch.Tensor) else a for a in args]


def normalized_scales(args):
    """Scales of rms_norm_dynamic_per_token_quant for the least and the greatest rstd that float32 arithmetic may give.

    The scale is taken from values that were rounded to 16 bits. Where the largest of a row lies next to a tie, the last bit
    of rstd, which depends on the order of a sum, decides to which side it goes: about one row in ten thousand. So the
    scale is computed here in float64 for rstd (1 ± 2**-21), and lies between the two: rounding is monotonic.
    """
    _, x, weight, _, epsilon, scale_ub, residual = args
    x = x.float() if residual is None else x.float() + residual.float()
    rstd = torch.rsqrt(x.double().square().mean(dim=-1, keepdim=True) + epsilon)
    found = []
    for factor in (1 - 2.0**-21, 1 + 2.0**-21):
        y = ((x.double() * rstd * factor).to(weight.dtype) * weight).double()
        absmax = y.abs().amax(dim=-1, keepdim=True)
        if scale_ub is not None:
            absmax = absmax.minimum(scale_ub.double().reshape(()))
        found.append((absmax / 448).clamp(min=1 / (448 * 512)))
    return found


def check_scale(op, got, wanted, inputs):
    """To 1e-6 of the reference's; for the op that rounds before it takes the scale, in the interval above to 1e-6."""
    if "rms_norm" not in op or inputs is None:
        compare_scale(got, wanted)
        return
    low, high = normalized_scales(inputs)
    inside = (got >= low * (1 - 1e-6)) & (got <= high * (1 + 1e-6))
    assert inside.all(), (
        f"scale[{(~inside).nonzero()[0].tolist()}] is {got[~inside][0]}, not in [{low[~inside][0]}, {high[~inside][0]}]"
    )
    # … and it is the reference's own in all but the rows that lie next to a tie.
    compare_scale(got, wanted, outliers=max(0.001, 1 / got.numel()), outlier_rtol=2.0**-7)


def check(op, args, expected, where, inputs=None):
    """Every mutated argument equals the reference's. `inputs` are the arguments as they were before the call."""
    for spec, got, wanted in zip(hdispatch.ops.spec(op).args, args, expected, strict=True):
        if not getattr(spec, "mutated", False) or got is None:
            continue
        try:
            if got.dtype == torch.float8_e4m3fn:
                compare_fp8(got, wanted)
            elif got.dtype == torch.float32:
                check_scale(op, got, wanted, inputs)
            else:
                assert torch.equal(got, wanted), f"{spec.name}: {(got != wanted).sum().item()} elements differ"
        except AssertionError as error:
            raise AssertionError(f"{op} {where}: {spec.name}: {error}") from error


def run_and_check(op, args, where):
    spec = hdispatch.ops.spec(op)
    inputs, expected = copy(args), copy(args)
    spec.reference(*expected)
    getattr(hdispatch.ops, op)(*args)
    torch.cuda.synchronize()
    check(op, args, expected, where, inputs)


@pytest.mark.parametrize(("op", "variant", "shape"), CASES)
def test_every_bucket(bundle, op, variant, shape):
    wide = max(shape.values()) > 6144
    ms = [m for m in MS if m <= (2049 if wide else 8193)] + ([8192, 8193] if wide else [])
    if variant.startswith("float16"):
        ms = [m for m in ms if m in EDGES or m < 20]
    with hdispatch.strict():
        for m in ms:
            run_and_check(op, make(op, variant, shape, m, seed=m), f"{variant} {shape} M={m}")
    assert hdispatch.stats()[op]["hits"] == len(ms)
    assert not hdispatch.stats()[op]["misses"]


@pytest.mark.parametrize("op", OPS)
def test_zero_rows_launch_nothing(bundle, op):
    shape = hdispatch.ops.spec(op).shapes[0]
    args = make(op, "bfloat16", shape, 3)
    empty = [a[:0] if isinstance(a, torch.Tensor) and a.dim() == 2 else a for a in args]
    with hdispatch.strict():
        getattr(hdispatch.ops, op)(*empty)
        getattr(torch.ops.hdispatch, op)(*empty)
        getattr(torch.ops.hdispatch, op).default(*empty)
    assert hdispatch.stats()[op] == {"hits": 0, "empty": 3, "fallbacks": 0, "misses": {}}


@pytest.mark.parametrize("m", [1, 2, 16, 17, 300])
@pytest.mark.parametrize("op", OPS)
def test_strided_rows_are_served(bundle, op, m):
    """Rows of a wider tensor: the stride travels to the kernel."""
    shape = hdispatch.ops.spec(op).shapes[1]
    args = make(op, "bfloat16", shape, m)
    index = next(i for i, a in enumerate(hdispatch.ops.spec(op).args) if a.name == "input")
    wide = torch.full((m, args[index].shape[1] + 64), float("nan"), device="cuda", dtype=args[index].dtype)
    wide[:, 32:-32] = args[index]
    args[index] = wide[:, 32:-32]
    with hdispatch.strict():
        run_and_check(op, args, f"strided M={m}")


@pytest.mark.parametrize("op", OPS)
def test_misaligned_pointers_and_odd_strides_fall_back(bundle, op):
    shape = hdispatch.ops.spec(op).shapes[0]
    index = next(i for i, a in enumerate(hdispatch.ops.spec(op).args) if a.name == "input")
    for offset, pad, reason in ((1, 32, "align"), (8, 25, "stride(0) % 16")):
        args = make(op, "bfloat16", shape, 16)
        width = args[index].shape[1]
        wide = torch.full((16, width + pad), float("nan"), device="cuda", dtype=args[index].dtype)
        wide[:, offset : offset + width] = args[index]
        args[index] = wide[:, offset : offset + width]
        run_and_check(op, args, reason)
        found = hdispatch.stats(reset=True)[op]
        assert found["hits"] == 0
        assert found["fallbacks"] == 1
        assert [key for key in found["misses"] if reason in key], found
        with pytest.raises(hdispatch.MissError, match="does not hold"), hdispatch.strict():
            getattr(hdispatch.ops, op)(*args)
        hdispatch.stats(reset=True)


@pytest.mark.parametrize("op", OPS)
def test_other_sizes_fall_back(bundle, op):
    """K + 1 and K / 2 have no row; the row of K does not serve them."""
    shape = hdispatch.ops.spec(op).shapes[0]
    for change in (lambda k: k + 1, lambda k: k // 2):
        run_and_check(op, make(op, "bfloat16", {s: change(k) for s, k in shape.items()}, 5), "other size")
    assert hdispatch.stats()[op]["misses"] == {"no row": 2}


@pytest.mark.parametrize("op", OPS)
def test_torch_door_equals_ops_door(bundle, op):
    shape = hdispatch.ops.spec(op).shapes[0]
    for variant in hdispatch.ops.spec(op).variants():
        doors = [getattr(hdispatch.ops, op), getattr(torch.ops.hdispatch, op), getattr(torch.ops.hdispatch, op).default]
        results = []
        for door in doors:
            args = make(op, variant.name, shape, 33)
            with torch.inference_mode(), hdispatch.strict():
                door(*args)
            results.append([a for a in args if isinstance(a, torch.Tensor)])
        for other in results[1:]:
            for got, wanted in zip(other, results[0], strict=True):
                assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("op", OPS)
def test_compiled_fullgraph(bundle, op):
    shape = hdispatch.ops.spec(op).shapes[0]
    door = getattr(torch.ops.hdispatch, op)

    @torch.compile(fullgraph=True, dynamic=False)
    def program(*args):
        door(*args)
        return args[0].float() + 1

    args = make(op, "bfloat16", shape, 16)
    expected = copy(args)
    hdispatch.ops.spec(op).reference(*expected)
    with torch.no_grad():
        out = program(*args)
    check(op, args, expected, "compiled")
    assert torch.equal(out, args[0].float() + 1)
    assert hdispatch.stats()[op]["hits"] == 1


@pytest.mark.parametrize("op", OPS)
def test_capture_and_replay(bundle, op):
    shape = hdispatch.ops.spec(op).shapes[0]
    args = make(op, "bfloat16", shape, 16)
    index = next(i for i, a in enumerate(hdispatch.ops.spec(op).args) if a.name == "input")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), hdispatch.strict():
        getattr(hdispatch.ops, op)(*args)
        getattr(torch.ops.hdispatch, op).default(*args)
    for seed in range(3):
        args[index].copy_(make(op, "bfloat16", shape, 16, seed=seed)[index])
        for tensor in (args[0],):
            poison(tensor)
        expected = copy(args)
        hdispatch.ops.spec(op).reference(*expected)
        graph.replay()
        torch.cuda.synchronize()
        check(op, args, expected, f"replay {seed}")


@pytest.mark.parametrize("op", OPS)
def test_bad_input_leaves_outputs_alone(bundle, op):
    shape = hdispatch.ops.spec(op).shapes[0]
    specs = hdispatch.ops.spec(op).args
    index = next(i for i, a in enumerate(specs) if a.name == "input")
    good = make(op, "bfloat16", shape, 16)
    bad = {
        "float32": good[index].float(),
        "cpu": good[index].cpu(),
        "transposed": good[index].t().contiguous().t(),
        "rank": good[index][0],
        "rows": good[index][:-1],
    }
    for what, value in bad.items():
        args = copy(good)
        args[index] = value
        before = args[0].view(torch.uint8).clone()
        for door in (getattr(hdispatch.ops, op), getattr(torch.ops.hdispatch, op).default):
            with pytest.raises((hdispatch.ArgumentError, RuntimeError, ValueError)):
                door(*args)
        torch.cuda.synchronize()
        assert torch.equal(args[0].view(torch.uint8), before), what
    run_and_check(op, copy(good), "after bad input")

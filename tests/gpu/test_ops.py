"""Every op against its float32 reference on the GPU: all variants and sizes, at the edges of the buckets.

Why these M: each bucket edge changes the row that serves the call, edge ± 1 changes the class of M (== 1, % 16 == 0,
other) that picks the cubin, and one past the last edge is served by the last bucket.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import hdispatch
import pytest
import torch
from hdispatch.compile import buildable_ops
from hdispatch.opspec import HINTS, TensorArg
from hdispatch.testing.numeric import compare_outputs, poison


def served_ops():
    """Those of the bundle; of the one that is built here those that can be built. Other test files define ops of their own."""
    given = os.environ.get("HDISPATCH_BUNDLE")
    return sorted(json.loads((Path(given) / "manifest.json").read_text())["ops"]) if given else buildable_ops()


OPS = served_ops()
#: For the sizes that a row leaves open: none that is listed anywhere.
OPEN = {"K": 3072, "N": 1536}
#: Experts of a router, of which there are fewer.
FEWER = {"topk_softmax": {"N": 64}}
#: Elements of the largest tensor: references of more take too long for each M.
FULL, MOST = 2**25, 2**28


def spec_of(op):
    return hdispatch.registry.spec(op)


def sizes_of(spec, shape):
    """A shape with every size that the op has."""
    sizes = {**OPEN, **FEWER.get(spec.name, {}), **shape}
    return {symbol: sizes[symbol] for symbol in spec.symbols() if symbol in ("K", "N")}


def edges(spec):
    return sorted({m for edge in spec.ladder for m in (edge - 1, edge, edge + 1) if m >= 1})


def elements(spec, variant, sizes, m):
    dims = [spec.tensor_sizes(arg, {**HINTS, **sizes, "M": m}, variant.static) for arg in spec.tensors()]
    return max(abs(math.prod(d)) for d in dims)


CASES = [
    pytest.param(op, variant.name, shape, id=f"{op}-{variant.name}-{'x'.join(map(str, shape.values())) or 'any'}")
    for op in OPS
    for variant in spec_of(op).served_variants()
    for shape in spec_of(op).shapes
]


def typical_case(op):
    """The op's typical variant, and its first shape."""
    spec = spec_of(op)
    return spec.typical_variant().name, sizes_of(spec, spec.shapes[0])


def need_row(op, variant, sizes, m):
    """Skips where the bundle has no row of the size (conftest.py), for tests in which a call without one falls back."""
    with hdispatch.strict():
        getattr(hdispatch.ops, op)(*make(op, variant, sizes, m))
    hdispatch.stats(reset=True)


def most_rows(op, sizes):
    """The largest M that the op's kernels take; beyond it the fallback is faster."""
    if spec_of(op).is_closed:
        return spec_of(op).ladder[-1]
    return 64 * 5120 // sizes["K"] if op == "dynamic_scaled_fp8_quant" else 2**30


def make(op, variant, sizes, m, seed=0):
    """Random arguments on the GPU, made there."""
    spec = spec_of(op)
    device = torch.device("cuda")
    return spec.sample(spec.variant(variant), {"M": m, **sizes}, device, torch.Generator(device).manual_seed(seed))


def written(op):
    """Indices of the arguments that the op writes."""
    return [i for i, arg in enumerate(spec_of(op).args) if getattr(arg, "mutated", False)]


def bits(tensor):
    return tensor.contiguous().view(torch.uint8).clone()


def copy(args):
    """Tensors keep their strides."""

    def clone(tensor):
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        return made.copy_(tensor)

    return [clone(a) if isinstance(a, torch.Tensor) else a for a in args]


#: The ops that take scales from normalized values.
NORMALIZED = {"rms_norm_dynamic_per_token_quant": None, "rms_norm_per_block_quant": 7}


def normalized_scales(args, group_size):
    """Scales of an op of NORMALIZED for the least and the greatest rstd that float32 arithmetic may give.

    The scale is taken from values that were rounded to 16 bits. Where the largest of a row lies next to a tie, the last bit
    of rstd, which depends on the order of a sum, decides to which side it goes: about one row in ten thousand. So the
    scale is computed here in float64 for rstd (1 ± 2**-21), and lies between the two: rounding is monotonic.
    """
    _, x, weight, _, epsilon, scale_ub, residual = args[:7]
    x = x.float() if residual is None else x.float() + residual.float()
    rstd = torch.rsqrt(x.double().square().mean(dim=-1, keepdim=True) + epsilon)
    found = []
    for factor in (1 - 2.0**-21, 1 + 2.0**-21):
        y = ((x.double() * rstd * factor).to(weight.dtype) * weight).double().abs()
        pad = -y.size(1) % (group_size or 1)
        groups = torch.nn.functional.pad(y, (0, pad)).unflatten(1, (-1, group_size or y.size(1)))
        absmax = groups.amax(dim=-1)
        if scale_ub is not None:
            absmax = absmax.minimum(scale_ub.double().reshape(()))
        found.append((absmax / 448).clamp(min=1 / (448 * 512)))
    return found


def check_scale(got, inputs, group_size):
    """Scales taken from rounded values lie in the interval above, to 1e-6."""
    low, high = normalized_scales(inputs, group_size)
    inside = (got >= low * (1 - 1e-6)) & (got <= high * (1 + 1e-6))
    assert inside.all(), (
        f"scale[{(~inside).nonzero()[0].tolist()}] is {got[~inside][0]}, not in [{low[~inside][0]}, {high[~inside][0]}]"
    )


def check(op, variant, args, expected, where, inputs=None, min_equal=0.999):
    """Every mutated argument equals the reference's. `inputs` are the arguments as they were before the call."""
    spec = spec_of(op)
    if op in NORMALIZED and inputs is not None and not spec.variant(variant).static.get("scale_ue8m0"):
        check_scale(args[3], inputs, args[NORMALIZED[op]] if NORMALIZED[op] else None)
    try:
        compare_outputs(spec, spec.variant(variant), args, expected, min_equal)
    except AssertionError as error:
        raise AssertionError(f"{op} {where}: {error}") from error


def run_and_check(op, variant, args, where):
    inputs, expected = copy(args), copy(args)
    spec_of(op).reference(*expected)
    getattr(hdispatch.ops, op)(*args)
    torch.cuda.synchronize()
    check(op, variant, args, expected, where, inputs)


@pytest.mark.parametrize(("op", "variant", "shape"), CASES)
def test_every_bucket(bundle, op, variant, shape):
    spec = spec_of(op)
    sizes, chosen = sizes_of(spec, shape), spec.variant(variant)
    is_typical = variant == spec.typical_variant().name
    limit = FULL if is_typical else FULL // 8
    ms = [m for m in edges(spec) if m <= most_rows(op, sizes)]
    ms = [m for m in ms if elements(spec, chosen, sizes, m) <= (MOST if is_typical and m in (8192, 8193) else limit)]
    if not is_typical:
        ms = [m for m in ms if m in spec.ladder or m < 20]
    with hdispatch.strict():
        for m in ms:
            run_and_check(op, variant, make(op, variant, sizes, m, seed=m), f"{variant} {sizes} M={m}")
    assert hdispatch.stats()[op]["hits"] == len(ms)
    assert not hdispatch.stats()[op]["misses"]


@pytest.mark.parametrize("op", [op for op in OPS if most_rows(op, typical_case(op)[1]) < 2**30])
def test_more_rows_than_the_kernel_takes_fall_back(bundle, op):
    variant, sizes = typical_case(op)
    m = most_rows(op, sizes) + 16
    run_and_check(op, variant, make(op, variant, sizes, m), f"M={m}")
    found = hdispatch.stats()[op]
    assert (found["hits"], found["fallbacks"]) == (0, 1)
    assert all(reason.startswith("guard: ") for reason in found["misses"]), found


@pytest.mark.parametrize("op", OPS)
def test_zero_rows_launch_nothing(bundle, op):
    variant, sizes = typical_case(op)
    empty = make(op, variant, sizes, 0)
    with hdispatch.strict():
        getattr(hdispatch.ops, op)(*empty)
        getattr(torch.ops.hdispatch, op)(*empty)
        getattr(torch.ops.hdispatch, op).default(*empty)
    assert hdispatch.stats()[op] == {"hits": 0, "empty": 3, "fallbacks": 0, "misses": {}}


def widened(tensor, before, after):
    """The same values with `before` + `after` NaNs (or bytes of 0x7f) between the rows."""
    columns = tensor.shape[-1]
    wide = poison(torch.empty(*tensor.shape[:-1], columns + before + after, dtype=tensor.dtype, device="cuda"))
    inner = wide[..., before : before + columns]
    return inner.copy_(tensor)


STRIDED = [
    (op, index)
    for op in OPS
    for index, arg in enumerate(spec_of(op).args)
    if getattr(arg, "layout", "") == "rows" and len(arg.dims) == 2
]


@pytest.mark.parametrize("m", [1, 2, 16, 17, 300])
@pytest.mark.parametrize(("op", "index"), STRIDED)
def test_strided_rows_are_served(bundle, op, index, m):
    """Rows of a wider tensor: the stride travels to the kernel."""
    variant, sizes = typical_case(op)
    m = min(m, most_rows(op, sizes))
    args = make(op, variant, sizes, m)
    if args[index] is None:
        pytest.skip("absent in this variant")
    args[index] = widened(args[index], 32, 32)
    with hdispatch.strict():
        run_and_check(op, variant, args, f"strided M={m}")


@pytest.mark.parametrize(("op", "index"), STRIDED)
def test_misaligned_pointers_and_odd_strides_fall_back(bundle, op, index):
    variant, sizes = typical_case(op)
    if make(op, variant, sizes, 2)[index] is None:
        pytest.skip("absent in this variant")
    need_row(op, variant, sizes, 16)
    for offset, pad, reason in ((1, 31, "align"), (0, 25, "% ")):
        args = make(op, variant, sizes, 16)
        args[index] = widened(args[index], offset, pad)
        run_and_check(op, variant, args, reason)
        found = hdispatch.stats(reset=True)[op]
        if found["hits"]:  # of a kernel that takes any stride, or stores single elements: what it computed is right
            assert reason == "% " or spec_of(op).args[index].mutated
            continue
        assert found["hits"] == 0
        assert found["fallbacks"] == 1
        # A descriptor of TMA wants both: its guard names them at once.
        assert [key for key in found["misses"] if reason in key or "fits a TMA descriptor" in key], found
        with pytest.raises(hdispatch.MissError, match="does not hold"), hdispatch.strict():
            getattr(hdispatch.ops, op)(*args)
        hdispatch.stats(reset=True)


@pytest.mark.parametrize("op", OPS)
def test_torch_door_equals_ops_door(bundle, op):
    _, shape = typical_case(op)
    for variant in spec_of(op).served_variants():
        doors = [getattr(hdispatch.ops, op), getattr(torch.ops.hdispatch, op), getattr(torch.ops.hdispatch, op).default]
        results = []
        for door in doors:
            args = make(op, variant.name, shape, min(33, most_rows(op, shape)))
            with torch.inference_mode(), hdispatch.strict():
                door(*args)
            results.append([a for a in args if isinstance(a, torch.Tensor)])
        for other in results[1:]:
            for got, wanted in zip(other, results[0], strict=True):
                assert torch.equal(bits(got), bits(wanted))


@pytest.mark.parametrize("op", OPS)
def test_compiled_fullgraph(bundle, op):
    torch._dynamo.reset()  # every op compiles the same code object
    variant, shape = typical_case(op)
    need_row(op, variant, shape, 16)
    door = getattr(torch.ops.hdispatch, op)
    at = written(op)[0]

    @torch.compile(fullgraph=True, dynamic=False)
    def program(*args):
        door(*args)
        return args[at].float() + 1

    args = make(op, variant, shape, 16)
    expected = copy(args)
    hdispatch.registry.spec(op).reference(*expected)
    with torch.no_grad():
        out = program(*args)
    check(op, variant, args, expected, "compiled")
    assert torch.equal(out, args[at].float() + 1)
    assert hdispatch.stats()[op]["hits"] == 1


@pytest.mark.parametrize("op", OPS)
def test_capture_and_replay(bundle, op):
    variant, shape = typical_case(op)
    args = make(op, variant, shape, 16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), hdispatch.strict():
        getattr(hdispatch.ops, op)(*args)
    for seed in range(3):
        fresh = make(op, variant, shape, 16, seed=seed)
        for held, new in zip(args, fresh, strict=True):
            if isinstance(held, torch.Tensor):
                held.copy_(new)
        expected = copy(args)
        spec_of(op).reference(*expected)
        graph.replay()
        torch.cuda.synchronize()
        check(op, variant, args, expected, f"replay {seed}")


def bad_values(arg, value):
    """Tensors that the argument does not take, by what is wrong with them."""
    yield "dtype", value.double()
    yield "cpu", value.cpu()
    yield "rank", value[None, None, None, None] if not arg.flat else value.repeat(2)
    yield "rows", value[:-1]
    if arg.layout in ("contiguous", "rows") and value.dim() == 2:
        yield "transposed", value.t().contiguous().t()


@pytest.mark.parametrize("op", OPS)
def test_bad_input_leaves_outputs_alone(bundle, op):
    variant, shape = typical_case(op)
    specs = spec_of(op).args
    rows = [i for i, a in enumerate(specs) if isinstance(a, TensorArg) and not a.optional and "M" in a.dims]
    index = next((i for i in rows if not specs[i].mutated), rows[0])
    good = make(op, variant, shape, 16)
    at = next(i for i in written(op) if i != index)
    for what, value in bad_values(specs[index], good[index]):
        if what == "rows" and len(rows) == 1:  # nothing else says how many there are
            continue
        args = copy(good)
        args[index] = value
        before = bits(args[at])
        for door in (getattr(hdispatch.ops, op), getattr(torch.ops.hdispatch, op).default):
            with pytest.raises((hdispatch.ArgumentError, RuntimeError, ValueError)):
                door(*args)
        torch.cuda.synchronize()
        assert torch.equal(bits(args[at]), before), what
    run_and_check(op, variant, copy(good), "after bad input")

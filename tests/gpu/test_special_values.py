"""NaN, infinities, zeros, subnormal numbers and ±448 through every quantizing op and silu_and_mul, every variant and bucket.

The results are those of vLLM's own kernels bit for bit where $HDISPATCH_VLLM_OPS names the library behind torch.ops._C, and
else the reference's. Where vLLM adds squares in another order than we do, the scale may differ in its last bits, and a code
by one. Of scales that are packed, padded or transposed the whole storage is compared.
"""

from __future__ import annotations

import functools
import os

import hdispatch
import pytest
import torch
from hdispatch.testing.numeric import compare_fp8
from hdispatch.testing.special_values import special_rows

from .test_ops import FULL, MOST, elements, make, most_rows, sizes_of, spec_of, written
from .test_ops import OPS as ALL_OPS
from .test_vllm import THEIRS, call_theirs

LIBRARY = os.environ.get("HDISPATCH_VLLM_OPS")
OPS = [op for op in ALL_OPS if op.endswith(("fp8_quant", "token_quant", "block_quant", "fp8_quant_packed", "silu_and_mul"))]
#: The ops that add: the order of a sum may move their scales.
NORMS = [op for op in OPS if op.startswith("rms_norm")]
#: The scale and the codes that vLLM's kernel gives a row with one NaN, whose largest other number is 3.78125.
REPORTED = {"scale": 3.78125 / 448, "code": 126}


@pytest.fixture(autouse=True)
def library():
    if LIBRARY:
        torch.ops.load_library(LIBRARY)


def has_original(op, variant):
    """Whether vLLM has this op with these flags: scale_ue8m0 of per_block_quant is our own."""
    own = op.endswith("per_block_quant") and variant.static.get("scale_ue8m0")
    return bool(LIBRARY) and THEIRS.get(op, op) is not None and not own


def expected_of(op, variant, args):
    """What the original makes of copies of the arguments; the reference where there is none."""
    expected = twins(args)
    if has_original(op, variant):
        call_theirs(op, expected)
    else:
        spec_of(op).reference(*expected)
    return expected


def twins(args):
    """Tensors with their strides, and with what lies between their elements."""

    def twin(tensor):
        storage = tensor.untyped_storage().clone()
        made = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return made.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())

    return [twin(a) if isinstance(a, torch.Tensor) else a for a in args]


def storage(tensor):
    """Every byte that the tensor's storage has."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def compare(op, args, expected, where):
    for index in written(op):
        got, want = args[index], expected[index]
        if got is None or torch.equal(storage(got), storage(want)):
            continue
        name = f"{op} {where}: {spec_of(op).args[index].name}"
        if got.dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(got.isnan(), want.isnan()), name
            got, want = got[~want.isnan()], want[~want.isnan()]
            assert torch.equal(got, want), name
            # Zeros of equal signs.
            assert op != "silu_and_mul" or torch.equal(got.signbit(), want.signbit()), name
        elif got.dtype == torch.float8_e4m3fn and op in NORMS:
            compare_fp8(got, want, min_equal=0.99)
        elif got.dtype == torch.float32 and op in NORMS:
            assert torch.equal(got.isinf(), want.isinf()), name
            assert not got.isnan().any(), name
            finite = want.isfinite()
            torch.testing.assert_close(got[finite], want[finite], rtol=2**-6, atol=0.0, msg=name)
        else:
            differ = (storage(got) != storage(want)).nonzero()
            assert not len(differ), f"{name}: {len(differ)} bytes differ, the first is byte {int(differ[0])}"


@functools.lru_cache(maxsize=8)
def rows_of(columns, dtype, seed):
    return special_rows(columns, dtype, "cuda", seed=seed)


def with_special_rows(op, variant, sizes, m, start, seed):
    """Sample arguments whose input rows are special rows from the `start`-th on, round and round."""
    args = make(op, variant.name, sizes, m, seed=seed)
    names = [arg.name for arg in spec_of(op).args]
    for name, shift in (("input", 0), ("residual", 7)):
        if name not in names or args[names.index(name)] is None:
            continue
        tensor = args[names.index(name)]
        columns, dtype = tensor.shape[-1], tensor.dtype
        if op.startswith("silu"):
            gate, up = (rows_of(columns // 2, dtype, s) for s in (0, 1))
            # The pairs of rows change with the round.
            rows = torch.cat([gate, up.roll(seed, 0)], dim=1)
        else:
            rows = rows_of(columns, dtype, shift).roll(shift, 0)
        tensor.copy_(rows[(start + torch.arange(m, device="cuda")) % len(rows)])
    if "scale_ub" in names and args[names.index("scale_ub")] is not None:
        args[names.index("scale_ub")].fill_((0.7, float("inf"), float("nan"))[seed % 3])
    return args


def count_of(op):
    return len(special_rows(64, torch.bfloat16))


CASES = [
    pytest.param(op, variant, shape, id=f"{op}-{variant.name}-{'x'.join(map(str, shape.values())) or 'any'}")
    for op in OPS
    for variant in spec_of(op).served_variants()
    for shape in spec_of(op).shapes
]


@pytest.mark.parametrize(("op", "variant", "shape"), CASES)
def test_every_bucket(bundle, op, variant, shape):
    spec = spec_of(op)
    sizes, count = sizes_of(spec, shape), count_of(op)
    limit = MOST if variant.name == spec.typical_variant().name else FULL
    ms = [m for m in spec.ladder if m <= most_rows(op, sizes) and elements(spec, variant, sizes, m) <= limit]
    with hdispatch.strict():
        for seed, m in enumerate(ms):
            # Few rows go round until all have been seen; many hold each several times.
            for start in range(0, count if m < count else 1, m):
                args = with_special_rows(op, variant, sizes, m, start, seed)
                expected = expected_of(op, variant, args)
                getattr(hdispatch.ops, op)(*args)
                torch.cuda.synchronize()
                compare(op, args, expected, f"{variant.name} {sizes} M={m} from row {start}")
    assert not hdispatch.stats()[op]["misses"]


@pytest.mark.parametrize("op", OPS)
def test_every_door_and_the_reference(bundle, op):
    """The doors agree bit for bit, and the fallback with them."""
    spec = spec_of(op)
    sizes = sizes_of(spec, spec.shapes[0])
    m = min(48, most_rows(op, sizes))
    for seed, variant in enumerate(spec.served_variants()):
        args = with_special_rows(op, variant, sizes, m, 0, seed)
        wanted = expected_of(op, variant, args)
        doors = [getattr(hdispatch.ops, op), getattr(torch.ops.hdispatch, op), getattr(torch.ops.hdispatch, op).default]
        for door in (*doors, spec.reference):
            got = twins(args)
            with torch.inference_mode():
                door(*got)
            torch.cuda.synchronize()
            if door is spec.reference and op.startswith("silu"):
                for index in written(op):  # torch's exp may differ in the last bit
                    if got[index].dtype == torch.float8_e4m3fn:
                        compare_fp8(got[index], wanted[index], min_equal=0.99)
                    elif got[index].dtype != torch.float32:
                        torch.testing.assert_close(got[index], wanted[index], equal_nan=True)
                continue
            compare(op, got, wanted, f"{variant.name} {door}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 4, 32, 64, 256, 512, 1024, 4096])
def test_one_nan_in_a_row(bundle, m, dtype):
    """The reported case: a finite scale, the NaN's code 126, no NaN code in the row, in every bucket."""
    x = torch.linspace(-3.5, 3.5, 4096, device="cuda").to(dtype).repeat(m, 1)
    x[:, 7], x[:, 100] = 3.78125, float("nan")
    result = torch.full_like(x, 0.0, dtype=torch.float8_e4m3fn)
    scale = torch.full((m, 1), float("nan"), device="cuda")
    with hdispatch.strict():
        hdispatch.ops.dynamic_per_token_scaled_fp8_quant(result, x, scale)
    codes = result.view(torch.uint8)
    torch.testing.assert_close(scale, torch.full_like(scale, REPORTED["scale"]), rtol=1e-6, atol=0.0)
    assert (codes[:, 100] == REPORTED["code"]).all()
    assert not ((codes & 0x7F) == 0x7F).any()


def scales_of(layout, m, groups):
    """A poisoned scale tensor [m, groups] as vLLM allocates it."""
    if layout == "row-major":
        return torch.full((m, groups), float("nan"), device="cuda")
    pitch = m if layout == "column-major" else (m + 3) // 4 * 4
    return torch.full((groups, pitch), float("nan"), device="cuda").t()[:m]


@pytest.mark.skipif(not LIBRARY, reason="HDISPATCH_VLLM_OPS names no library of vLLM's ops")
@pytest.mark.parametrize("layout", ["row-major", "column-major", "column-major, padded to four rows"])
@pytest.mark.parametrize(
    "op", [op for op in OPS if op in ("per_token_group_fp8_quant", *NORMS[-1:], "silu_and_mul_per_block_quant")]
)
def test_whole_scale_storage(bundle, op, layout):
    """The storage behind the scales is vLLM's, padding included."""
    spec, names = spec_of(op), [arg.name for arg in spec_of(op).args]
    at = next(i for i in written(op) if args_dtype(spec, i) == torch.float32)
    for variant in spec.served_variants():
        if not has_original(op, variant):
            continue
        sizes = sizes_of(spec, spec.shapes[0])
        for m in (1, 2, 3, 4, 7, 64, 127, 253):
            args = make(op, variant.name, sizes, m, seed=m)
            args[at] = scales_of(layout, m, args[at].shape[1])
            if "is_scale_transposed" in names:
                args[names.index("is_scale_transposed")] = layout != "row-major"
            expected = twins(args)
            call_theirs(op, expected)
            with hdispatch.strict():
                getattr(hdispatch.ops, op)(*args)
            torch.cuda.synchronize()
            if op == "silu_and_mul_per_block_quant" and "padded" in layout:
                expected[at] = padded_by_strides(expected[at])
            compare(op, args, expected, f"{variant.name} {layout} M={m}")


def padded_by_strides(flat):
    """What vLLM's silu_and_mul_per_block_quant wrote as if columns had no padding, put where the strides have it."""
    m, groups = flat.shape
    placed = scales_of("padded", m, groups)
    return placed.copy_(flat.as_strided((m, groups), (1, m)))


def gates_of(dtype):
    """Every number of a 16-bit dtype."""
    return torch.arange(2**16, device="cuda").to(torch.int16).view(dtype)


#: By dtype, ups beside the gates: 1, and one that lifts what silu makes of gates about -88 above the least scale.
UPS = {torch.bfloat16: (1.0, 2.0**100, 2.0**127), torch.float16: (1.0, 2.0**15)}


@pytest.mark.skipif(not LIBRARY, reason="HDISPATCH_VLLM_OPS names no library of vLLM's ops")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_gate(bundle, dtype):
    """silu_and_mul of all 65,536 gates has vLLM's bits, those of zeros and of subnormal numbers too."""
    if "silu_and_mul" not in OPS:
        pytest.skip("not in the bundle")
    gates = gates_of(dtype)
    for up in UPS[dtype]:
        rows = torch.cat([gates.view(32, -1), torch.full((32, 2048), up, dtype=dtype, device="cuda")], dim=1)
        got, want = (torch.empty(32, 2048, dtype=dtype, device="cuda") for _ in range(2))
        torch.ops._C.silu_and_mul(want, rows)
        with hdispatch.strict():
            hdispatch.ops.silu_and_mul(got, rows)
        got, want = got.flatten(), want.flatten()
        assert torch.equal(got.isnan(), want.isnan())
        kept = ~want.isnan()
        differ = gates[kept][got[kept].view(torch.int16) != want[kept].view(torch.int16)]
        assert not len(differ), (up, differ.tolist())


def quantized_gates(dtype, up):
    """vLLM's codes and scales, one of each, of groups of 64 equal gates with equal ups: every gate in turn."""
    ups = torch.full((1024, 4096), up, dtype=dtype, device="cuda")
    rows = torch.cat([gates_of(dtype).repeat_interleave(64).view(1024, 4096), ups], dim=1)
    codes = torch.empty(1024, 4096, dtype=torch.float8_e4m3fn, device="cuda")
    scales = torch.empty(1024, 64, device="cuda")
    torch.ops._C.silu_and_mul_per_block_quant(codes, rows, scales, 64, None, False)
    return rows, codes, scales


@pytest.mark.skipif(not LIBRARY, reason="HDISPATCH_VLLM_OPS names no library of vLLM's ops")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_gate_in_a_group(bundle, dtype):
    """One gate to a group, so that its scale shows the bits of silu: those of silu_and_mul_per_block_quant."""
    if "silu_and_mul_per_block_quant" not in OPS:
        pytest.skip("not in the bundle")
    for up in UPS[dtype]:
        rows, want_codes, want_scales = quantized_gates(dtype, up)
        codes, scales = torch.empty_like(want_codes), torch.empty_like(want_scales)
        with hdispatch.strict():
            hdispatch.ops.silu_and_mul_per_block_quant(codes, rows, scales, 64, None, False)
        differ = gates_of(dtype)[(scales.view(torch.int32) != want_scales.view(torch.int32)).flatten()]
        assert not len(differ), (up, differ.tolist())
        assert torch.equal(codes.view(torch.uint8), want_codes.view(torch.uint8)), up


@pytest.mark.skipif(not LIBRARY, reason="HDISPATCH_VLLM_OPS names no library of vLLM's ops")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "m"), [(64, 65536), (6144, 1), (6144, 256), (12288, 4096), (25600, 1024)])
def test_every_gate_in_a_row(bundle, dtype, n, m):
    """One gate to a row of silu_and_mul_dynamic_per_token_quant: the codes and scale of a group of that gate.

    n and m choose kernels of Helion and of Triton. A single row has the gates whose sigmoid is subnormal, and some beside.
    """
    if "silu_and_mul_dynamic_per_token_quant" not in OPS:
        pytest.skip("not in the bundle")
    every = gates_of(dtype)
    chosen = ((every > -90) & (every < -86)).nonzero().flatten() if m == 1 else torch.arange(2**16, device="cuda")
    for up in UPS[dtype]:
        _, want_codes, want_scales = quantized_gates(dtype, up)
        want_codes, want_scales = want_codes.view(torch.uint8).view(-1, 64)[:, 0], want_scales.flatten().view(torch.int32)
        ups = torch.full((m, n), up, dtype=dtype, device="cuda")
        for places in chosen.split(m):
            rows = torch.cat([every[places, None].expand(m, n), ups], dim=1)
            codes = torch.empty(m, n, dtype=torch.float8_e4m3fn, device="cuda")
            scales = torch.empty(m, 1, device="cuda")
            with hdispatch.strict():
                hdispatch.ops.silu_and_mul_dynamic_per_token_quant(codes, rows, scales)
            differ = every[places][scales.flatten().view(torch.int32) != want_scales[places]]
            assert not len(differ), (up, differ.tolist())
            assert (codes.view(torch.uint8) == want_codes[places, None]).all(), (up, places[0])


def args_dtype(spec, index):
    return getattr(spec.args[index], "dtypes", (None,))[0] if index is not None else None


@pytest.mark.skipif(not LIBRARY, reason="HDISPATCH_VLLM_OPS names no library of vLLM's ops")
@pytest.mark.parametrize("k", [128, 640, 2048, 4096, 7168])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 127, 128, 253])
def test_whole_packed_storage(bundle, m, k):
    """vLLM fills columns up to four rows with zeros, but for the last, behind which there is nothing."""
    if "per_token_group_fp8_quant_packed" not in OPS:
        pytest.skip("not in the bundle")
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    words, pitch = (k // 128 + 3) // 4, (m + 3) // 4 * 4

    def outputs():
        codes = torch.full((m, k), 0x7F, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
        return codes, torch.full((words, pitch), -(2**31), dtype=torch.int32, device="cuda").t()[:m]

    (codes, scales), (their_codes, their_scales) = outputs(), outputs()
    torch.ops._C.per_token_group_fp8_quant_packed(x, their_codes, their_scales, 128, 1e-10, -448.0, 448.0)
    with hdispatch.strict():
        hdispatch.ops.per_token_group_fp8_quant_packed(x, codes, scales, 128, 1e-10, -448.0, 448.0)
    torch.cuda.synchronize()
    assert torch.equal(storage(codes), storage(their_codes))
    assert torch.equal(storage(scales), storage(their_scales))

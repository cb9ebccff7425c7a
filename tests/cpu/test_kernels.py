"""The Helion kernels, interpreted on the CPU, against the torch references and against an independent float64 computation.

Helion reads HELION_INTERPRET when it is imported, and it must not be set for the rest of the test process. So this file
is also a program: run with that variable set it checks every case and prints one JSON object, which the tests look up.
"""

from __future__ import annotations

import copy
import importlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hdispatch.opspec import OpSpec, Variant
from hdispatch.testing.numeric import assert_no_poison, compare_fp8, compare_outputs, compare_scale

OPS = (
    "dynamic_per_token_scaled_fp8_quant",
    "rms_norm_dynamic_per_token_quant",
    "silu_and_mul_dynamic_per_token_quant",
)
#: Those that are compared with the reference alone, and with special values in test_special_values.py.
OTHERS = (
    "dynamic_scaled_fp8_quant",
    "fused_add_rms_norm",
    "fused_qk_norm_rope",
    "per_token_group_fp8_quant",
    "per_token_group_fp8_quant_packed",
    "rms_norm",
    "rms_norm_per_block_quant",
    "rotary_embedding",
    "scaled_mm",
    "scaled_mm_blockwise",
    "silu_and_mul",
    "silu_and_mul_per_block_quant",
    "static_scaled_fp8_quant",
)
#: Their sizes, small ones: no multiple of a tile; three heads, and three groups of K and N.
SIZES = {"K": 512, "N": 384}
OWN_SIZES = {
    "rms_norm": {"K": 192, "N": 3},
    "rotary_embedding": {"K": 512, "N": 256},
    "scaled_mm": {"K": 272, "N": 336},
    "scaled_mm_blockwise": {"K": 384, "N": 384},
}
#: (M, K or N, extra elements between the rows of the input): small ones, and one size that is built.
CASES = (*((m, 192, pad) for m in (1, 2, 3, 7, 16, 17, 33) for pad in (0, 16)), (3, 2048, 0), (3, 6144, 64))


def spec_of(op: str) -> OpSpec:
    return importlib.import_module(f"hdispatch.kernels.{op}.spec").SPEC


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    env = {**os.environ, "HELION_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    env["HELION_CACHE_DIR"] = str(tmp_path_factory.mktemp("helion"))
    done = subprocess.run(
        [sys.executable, str(Path(__file__))], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("op", "variant"), [(op, v.name) for op in OPS for v in spec_of(op).variants()])
def test_kernel_agrees_with_reference_and_float64(outcomes: dict[str, list[str]], op: str, variant: str) -> None:
    assert outcomes[f"{op}/{variant}"] == []


@pytest.mark.parametrize(("op", "variant"), [(op, v.name) for op in OTHERS for v in spec_of(op).served_variants()])
def test_kernel_agrees_with_reference(outcomes: dict[str, list[str]], op: str, variant: str) -> None:
    assert outcomes[f"{op}/{variant}"] == []


def test_every_helion_kernel_is_interpreted() -> None:
    """Here, or in test_attention.py."""
    kernels = Path(__file__).parents[2] / "kernels"
    assert {path.parent.name for path in kernels.glob("*/helion.py")} == {*OPS, *OTHERS, "paged_attention_decode"}


def arguments(spec: OpSpec, variant: Variant, m: int, size: int, pad: int) -> dict[str, Any]:
    """Sample arguments by name; `pad` NaNs follow each row of the input."""
    generator = torch.Generator().manual_seed(1000 * m + size + pad)
    values = spec.sample(variant, {"M": m, "K": size, "N": size}, torch.device("cpu"), generator)
    args = dict(zip((arg.name for arg in spec.args), values, strict=True))
    rows = args["input"]
    buffer = torch.full((m, rows.shape[1] + pad), float("nan"), dtype=rows.dtype)
    buffer[:, : rows.shape[1]] = rows
    args["input"] = buffer[:, : rows.shape[1]]
    return args


def unquantized(op: str, args: dict[str, Any]) -> torch.Tensor:
    """What an op quantizes, in float64, from its arguments before the call."""
    x = args["input"].double()
    if op.startswith("silu"):
        half = x.shape[1] // 2
        return x[:, :half] / (1 + torch.exp(-x[:, :half])) * x[:, half:]
    if op.startswith("rms"):
        if args["residual"] is not None:
            x = x + args["residual"].double()
        scaled = x / torch.sqrt(x.square().sum(dim=1, keepdim=True) / x.shape[1] + args["epsilon"])
        dtype = args["input"].dtype
        x = (scaled.to(dtype).double() * args["weight"].double()).to(dtype).double()
    return x


def e4m3_values() -> torch.Tensor:
    """The finite values of e4m3 in ascending order, from the format's definition: bias 7, subnormals, up to 1.75 * 2**8."""
    positive = [m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:-1]
    return torch.tensor(sorted({-v for v in positive} | set(positive)), dtype=torch.float64)


def check(spec: OpSpec, before: dict[str, Any], after: dict[str, Any], reference: dict[str, Any]) -> None:
    """`after` is the kernel's arguments, `reference` those of the torch reference, both called with copies of `before`."""
    for name in ("result", "scale"):
        assert_no_poison(after[name], name)
    compare_scale(after["scale"], reference["scale"])
    compare_fp8(after["result"], reference["result"])
    for name in ("input", "weight", "scale_ub"):
        if before.get(name) is not None:
            assert torch.equal(after[name], before[name]), f"{name} was changed"
    if before.get("residual") is not None:
        total = before["input"].float() + before["residual"].float()
        assert torch.equal(after["residual"], total.to(before["residual"].dtype)), "residual is not the rounded sum"

    wanted = unquantized(spec.name, before)
    absmax = wanted.abs().amax(dim=1, keepdim=True)
    if before["scale_ub"] is not None:
        assert (absmax > before["scale_ub"].double()).any(), "scale_ub clamps no row: the sample tests nothing"
        absmax = torch.minimum(absmax, before["scale_ub"].double())
    compare_scale(after["scale"], (absmax / 448).clamp(min=1 / (448 * 512)).float())

    quotient = (wanted / after["scale"].double()).clamp(-448, 448)
    values = e4m3_values()
    above = torch.searchsorted(values, quotient).clamp(1, len(values) - 1)
    nearest = torch.minimum((values[above] - quotient).abs(), (quotient - values[above - 1]).abs())
    error = (after["result"].double() - quotient).abs() - nearest
    # The norm rounds to 16 bits before it divides, and float32 and float64 may take different neighbours there.
    flipped = (error > 448 * 2e-6).double().mean()
    assert flipped <= (0.001 if spec.name.startswith("rms") else 0), f"{flipped} of the codes are not the nearest"
    assert error.max() <= 448 * 2**-7, f"a code is {error.max()} further from the quotient than the nearest value of e4m3"


def run(op: str) -> dict[str, list[str]]:
    """Failures by `op/variant`; empty lists are passes."""
    spec, kernel = spec_of(op), importlib.import_module(f"hdispatch.kernels.{op}.helion").KERNEL
    failures: dict[str, list[str]] = {}
    for variant, (m, size, pad) in itertools.product(spec.variants(), CASES):
        found = failures.setdefault(f"{op}/{variant.name}", [])
        before = arguments(spec, variant, m, size, pad)
        after, reference = copy.deepcopy(before), copy.deepcopy(before)
        try:
            returned = kernel(*after.values())
            spec.reference(*reference.values())
            assert returned is None, f"the kernel returned {returned!r}"
            check(spec, before, after, reference)
        except Exception as error:
            found.append(f"M={m} size={size} pad={pad}: {type(error).__name__}: {error}")
    return failures


def run_other(op: str) -> dict[str, list[str]]:
    """Likewise, of a sample call and its copy for the reference."""
    spec, kernel = spec_of(op), importlib.import_module(f"hdispatch.kernels.{op}.helion").KERNEL
    failures: dict[str, list[str]] = {}
    for variant, m in itertools.product(spec.served_variants(), (1, 3, 17)):
        found = failures.setdefault(f"{op}/{variant.name}", [])
        sizes = {**OWN_SIZES.get(op, SIZES), "M": m}
        got = spec.sample(variant, sizes, torch.device("cpu"), torch.Generator().manual_seed(m))
        want = copy.deepcopy(got)
        try:
            kernel(*got)
            spec.reference(*want)
            compare_outputs(spec, variant, got, want)
        except Exception as error:
            found.append(f"{sizes}: {type(error).__name__}: {error}")
    return failures


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump(
        {
            **{key: found for op in OPS for key, found in run(op).items()},
            **{k: v for op in OTHERS for k, v in run_other(op).items()},
        },
        sys.stdout,
    )
    sys.stdout.write("\n")

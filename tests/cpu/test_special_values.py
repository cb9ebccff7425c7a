"""Quantizing ops and silu_and_mul on NaN, infinities, zeros, subnormal and the largest numbers: vLLM's kernels' answers.

special_values.py says how; it runs in a process of its own, once for each interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import shared
import torch
from hdispatch.errors import ArgumentError
from hdispatch.testing.special_values import special_rows

PROGRAM = Path(__file__).parents[1] / "support" / "special_values.py"
OPS = (
    "dynamic_per_token_scaled_fp8_quant",
    "rms_norm_dynamic_per_token_quant",
    "silu_and_mul_dynamic_per_token_quant",
    "per_token_group_fp8_quant",
    "rms_norm_per_block_quant",
    "silu_and_mul_per_block_quant",
    "per_token_group_fp8_quant_packed",
    "dynamic_scaled_fp8_quant",
    "static_scaled_fp8_quant",
    "silu_and_mul",
)


def failures(interpreter: str, factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Of each op; all in one process, of which the start costs as much as an op."""

    def ask() -> dict[str, list[str]]:
        env = {**os.environ, interpreter: "1", "OMP_NUM_THREADS": "1", "HELION_CACHE_DIR": str(factory.mktemp("helion"))}
        command = [sys.executable, "-W", "ignore", str(PROGRAM), *OPS]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    return shared.value(factory, f"special values {interpreter}", ask)


@pytest.fixture(scope="module")
def of_triton(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return failures("TRITON_INTERPRET", tmp_path_factory)


@pytest.fixture(scope="module")
def of_helion(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return failures("HELION_INTERPRET", tmp_path_factory)


@pytest.mark.parametrize("op", OPS)
def test_triton_and_reference_are_bit_equal_to_vllm(op: str, of_triton: dict[str, list[str]]) -> None:
    assert of_triton[op] == []


@pytest.mark.parametrize("op", OPS)
def test_helion_is_bit_equal_to_vllm(op: str, of_helion: dict[str, list[str]]) -> None:
    assert of_helion[op] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_special_rows_hold_what_they_promise(dtype: torch.dtype) -> None:
    rows = special_rows(16, dtype)
    info = torch.finfo(dtype)
    for number in (float("inf"), -float("inf"), 448, -448, info.max, -info.max, info.smallest_normal * info.eps):
        assert (rows == number).all(dim=1).any(), number
        assert ((rows == number).sum(dim=1) == 1).any(), number
    assert rows.isnan().all(dim=1).any()
    assert (rows.isnan().sum(dim=1) == 1).any()
    for negative in (True, False):
        assert ((rows == 0) & (rows.signbit() == negative)).all(dim=1).any()
    with pytest.raises(ArgumentError, match="at least 2 columns, found 1"):
        special_rows(1, dtype)

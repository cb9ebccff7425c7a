"""The Triton kernels of the model runner's ops, interpreted on the CPU, against their references; prints failures as JSON.

Run as a program, since the interpreter is switched on by the environment: test_runner_ops.py does. Each kernel runs twice on
the same workspace, whose counters must be zero afterwards.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import hdispatch
import torch
from hdispatch.opspec import WORKSPACE_COUNTERS
from interpreted import report
from special_values import like_the_gpu

CPU = torch.device("cpu")
CONFIGS: dict[str, tuple[dict[str, Any], ...]] = {
    "decode_inputs": ({"block": 4, "num_warps": 1}, {"block": 128, "num_warps": 1}),
    "decode_update": ({"block": 2, "num_warps": 1}, {"block": 32, "num_warps": 1}),
    "argmax": tuple(
        {"parts": parts, "block": block, "num_warps": 1, "num_stages": 1} for parts in (1, 4) for block in (16, 256)
    ),
}


def launcher(kernel: Any, grid: tuple[int, ...], *values: Any, **options: Any) -> None:
    kernel[grid](*values, **{k: v for k, v in options.items() if k.isupper()})


def run(op: str, config: dict[str, Any], given: list[Any], workspace: torch.Tensor) -> None:
    """The kernel twice, where it writes only; the second call has what the first left in the workspace."""
    spec = hdispatch.registry.spec(op)
    module = importlib.import_module(f"hdispatch.kernels.{op}.triton")
    expected = [each.clone() if isinstance(each, torch.Tensor) else each for each in given]
    spec.reference(*expected)
    for _ in range(2):
        found = [each.clone() if isinstance(each, torch.Tensor) else each for each in given]
        more = [workspace] if spec.workspace is not None else []
        module.launch(*found, *more, config={**config, "pdl": False}, _launcher=launcher)
        assert not workspace[:WORKSPACE_COUNTERS].any(), "counters are left"
        for arg, a, b in zip(spec.args, found, expected, strict=True):
            if isinstance(a, torch.Tensor):
                assert torch.equal(a.nan_to_num(), b.nan_to_num()), (arg.name, a, b)


def special(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Rows of logits that are hard to compare."""
    nan, infinity, most = float("nan"), float("inf"), torch.finfo(dtype).max
    rows = {
        "zeros": [-0.0, 0.0, -0.0, 0.0],
        "nan": [1.0, nan, infinity, nan],
        "minus nan": [infinity, -nan, most, 0.0],
        "infinities": [-infinity, infinity, infinity, most],
        "lowest": [-infinity] * 4,
        "negative": [-3.0, -1.0, -1.0, -2.0],
        "extremes": [-most, most, most, torch.finfo(dtype).tiny],
    }
    # The row again and again: a tie in every lane and part.
    return {name: torch.tensor([row * 64, [-infinity] * 200 + row * 14], dtype=dtype) for name, row in rows.items()}


def main() -> None:
    like_the_gpu()
    workspace = torch.zeros(WORKSPACE_COUNTERS + 2**17, dtype=torch.uint8)
    workspace[WORKSPACE_COUNTERS:] = 0x77
    cases: list[tuple[str, str, dict[str, Any], list[Any]]] = []
    for op, configs in CONFIGS.items():
        spec = hdispatch.registry.spec(op)
        for config in configs:
            for variant in spec.variants():
                for m in (1, 2, 5, 33):
                    sizes = {"M": m, "N": 70, "K": 50}
                    made = spec.sample(variant, sizes, CPU, torch.Generator().manual_seed(m))
                    cases.append((f"{op} {variant.name} {m} {config}", op, config, made))
    for config in CONFIGS["argmax"]:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for name, logits in special(dtype).items():
                cases.append((f"argmax {dtype} {name} {config}", "argmax", config, [torch.full((2,), -7), logits]))
            wide = torch.randn(3, 300, generator=torch.Generator().manual_seed(1)).to(dtype)
            for columns in (1, 15, 16, 17, 255, 257):
                given = [torch.full((3,), -7), wide[:, :columns]]
                cases.append((f"argmax {dtype} {columns} columns {config}", "argmax", config, given))
    report((name, partial(run, op, config, given, workspace)) for name, op, config, given in cases)


if __name__ == "__main__":
    main()

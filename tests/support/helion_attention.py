"""The Helion kernel of paged_attention_decode, interpreted on the CPU, against the float32 reference; prints failures as JSON.

Run as a program, since HELION_INTERPRET is read when Helion is imported: test_attention.py does. The cases are those of the
Triton kernel, one for each thing that a call may have.
"""

from __future__ import annotations

import importlib
import json
import sys

import helion
import torch
from attention_kernels import DECODE, check_decode

CASES = (
    "one split", "length 1", "ragged, with and without splits", "splits that end at a tile", "many splits", "padding",
    "longer than the longest", "fewer splits than chunks", "window over splits", "group 1",
    "group 7, float16", "head_dim 128", "window", "window of one", "softcap", "sinks", "sinks and a window", "3 queries",
    "1 query where 4 may be", "5 queries of group 5 in a window", "fp8", "fp8, pages of 48",
)  # fmt: skip


_mm = torch.mm


def float32_mm(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """torch.mm of 16-bit matrices into float32, which torch has for GPUs alone."""
    return _mm(a, b) if out_dtype is None else _mm(a.to(out_dtype), b.to(out_dtype))


def failures() -> dict[str, str | None]:
    plain = importlib.import_module("hdispatch.kernels.paged_attention_decode.helion").KERNEL
    config = helion.Config(block_sizes=[32, 4], chunk=32, num_warps=4, num_stages=1)
    kernel = helion.Kernel(plain.fn, configs=[config], settings=plain.settings)
    found: dict[str, str | None] = {}
    for name in CASES:
        try:
            check_decode(DECODE[name][0], lambda args: kernel(*args.values()))
            found[name] = None
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.mm = float32_mm
    json.dump(failures(), sys.stdout)
    sys.stdout.write("\n")

"""The doors of the toy op, and what tests of them share: calls, counts, what a fallback must do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hdispatch
import torch
import toy

Args = list[Any]
Door = Callable[..., None]
DOORS = {
    "hdispatch.ops": hdispatch.ops.toy,
    "torch.ops": torch.ops.hdispatch.toy,
    "torch.ops default": torch.ops.hdispatch.toy.default,
}
RESULT, INPUT, WEIGHT, SCALE, EPSILON, SCALE_UB, RESIDUAL = range(7)
FULL = "bfloat16+scale_ub+residual"


def counts() -> dict[str, Any]:
    return hdispatch.stats()["toy"]


def counted(hits: int = 0, empty: int = 0, **misses: int) -> dict[str, Any]:
    return {"hits": hits, "empty": empty, "fallbacks": sum(misses.values()), "misses": misses}


def snapshot(args: Args) -> list[bytes | None]:
    """The bytes of every tensor that is on the CPU."""

    def read(tensor: object) -> bytes | None:
        if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cpu":
            return None
        return bytes(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())

    return [read(a) for a in args]


def replaced(index: int, value: object, m: int = 4, k: int = 64, variant: str = "bfloat16") -> Args:
    args = toy.arguments(m, k, variant)
    args[index] = value
    return args


def check_fallback(door: Door, args: Args, reason: str) -> None:
    """The call misses for that reason, and does what the reference does."""
    wanted = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    toy.reference(*wanted)
    hdispatch.stats(reset=True)
    door(*args)
    assert counts() == counted(**{reason: 1})
    for actual, expected in zip(args, wanted, strict=True):
        if isinstance(actual, torch.Tensor):
            assert torch.equal(actual.float(), expected.float())


def bf16(*shape: int, **kwargs: Any) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16, **kwargs)


def f8(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.float8_e4m3fn)

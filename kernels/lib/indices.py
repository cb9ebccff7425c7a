"""What the references say of indices that arguments hold, where a kernel would read or write outside of a tensor."""

from __future__ import annotations

import torch
from hdispatch.errors import ArgumentError


def check_indices(op: str, arg: str, indices: torch.Tensor, count: int, what: str) -> None:
    """ArgumentError for an index that is not one of `count` of `what`. On a GPU none is looked at: the host would wait."""
    if indices.device.type != "cpu" or not indices.numel():
        return
    for index in map(int, indices.aminmax()):
        if not 0 <= index < count:
            raise ArgumentError(f"{op}: {arg} has {index}; expected at least 0 and less than {count}, as {what} has")

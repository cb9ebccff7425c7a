"""Helion kernels for adoption: outputs that they allocate, sizes that they compile in, and what cannot be a record."""

from __future__ import annotations

import helion
import helion.language as hl
import torch

CONFIG_2D = helion.Config(block_sizes=[32, 32])
CONFIG_1D = helion.Config(block_sizes=[8])


@helion.kernel(static_shapes=False, config=CONFIG_2D)
def add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    for tile in hl.tile(x.size()):
        out[tile] = x[tile] + y[tile]
    return out


@helion.kernel(static_shapes=False, config=CONFIG_1D)
def specialized(x: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    m, n = x.size()
    n = hl.specialize(n)
    out = torch.empty([m, n], dtype=torch.float32, device=x.device)
    total = torch.empty([m], dtype=torch.float32, device=x.device)
    for rows in hl.tile(m):
        values = x[rows, :] * scale
        out[rows, :] = values
        total[rows] = values.sum(-1)
    return out, total


@helion.kernel(static_shapes=True, config=CONFIG_2D)
def static(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    for tile in hl.tile(x.size()):
        out[tile] = x[tile] * 2
    return out


@helion.kernel(static_shapes=False, config=CONFIG_2D)
def in_place(x: torch.Tensor) -> torch.Tensor:
    for tile in hl.tile(x.size()):
        x[tile] = x[tile] + 1
    return x


@helion.kernel(static_shapes=False, config=CONFIG_2D)
def flattened(x: torch.Tensor) -> torch.Tensor:
    rows = x.view(-1, x.size(-1))
    out = torch.empty_like(rows)
    for tile in hl.tile(rows.size()):
        out[tile] = rows[tile] + 1
    return out


@helion.kernel(static_shapes=False, config=CONFIG_2D)
def zeros(x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x)
    for tile in hl.tile(x.size()):
        out[tile] += x[tile]
    return out


@helion.kernel(static_shapes=False, config=CONFIG_1D)
def filled(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    m, n = x.size()
    highest = torch.full([m], float("-inf"), device=x.device)
    count = x.new_ones([m], dtype=torch.int32)
    out = torch.empty([m, n], dtype=torch.promote_types(x.dtype, torch.bfloat16), device=x.device)
    for rows in hl.tile(m):
        highest[rows] = torch.maximum(highest[rows], x[rows, :].amax(-1))
        count[rows] = count[rows] + 1
        out[rows, :] = x[rows, :]
    return highest, count, out


@helion.kernel(static_shapes=False, config=CONFIG_2D)
def returns_a_view(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    for tile in hl.tile(x.size()):
        out[tile] = x[tile] + 1
    return out.view(-1)


@helion.kernel(static_shapes=False, config=CONFIG_1D)
def returns_views(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    m, n = x.size()
    out = torch.empty_like(x)
    total = torch.empty([m + 1], dtype=torch.float32, device=x.device)
    for rows in hl.tile(m):
        values = x[rows, :]
        out[rows, :] = values
        total[rows] = values.sum(-1)
    return out.view(-1, n // 2, 2), total[1:], out


@helion.kernel(static_shapes=False, config=CONFIG_1D, ignore_warnings=[helion.exc.TensorOperationInWrapper])
def reduces_after(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty([x.size(0)], dtype=x.dtype, device=x.device)
    for rows in hl.tile(x.size(0)):
        out[rows] = x[rows, :].sum(-1)
    return out.mean()


@helion.kernel(static_shapes=False, config=CONFIG_2D)
def writes_after(x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x)
    for tile in hl.tile(x.size()):
        out[tile] = x[tile]
    out[:, -1] = 0
    return out


@helion.kernel(static_shapes=False, config=CONFIG_2D)
def returns_another_dtype(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    for tile in hl.tile(x.size()):
        out[tile] = x[tile] + 1
    return out.view(torch.int32)


@helion.aot_kernel(config=CONFIG_2D)
def aot(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    for tile in hl.tile(x.size()):
        out[tile] = x[tile] * 2
    return out


@helion.kernel(static_shapes=False, config=CONFIG_2D, key=lambda x: x.size(0) > 10)
def own_key(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    for tile in hl.tile(x.size()):
        out[tile] = x[tile] * 2
    return out


@helion.kernel(static_shapes=False, config=CONFIG_2D)
def listed(x: torch.Tensor, shape: list[int], names: tuple[str, float]) -> torch.Tensor:
    assert shape[0] == x.size(1)
    out = torch.empty_like(x)
    for tile in hl.tile(x.size()):
        out[tile] = x[tile] * names[1]
    return out


@helion.kernel(static_shapes=False, config=helion.Config(block_sizes=[16, 16, 16]))
def transposed(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    m, k = x.size()
    _, n = w.size()
    out = torch.empty([m, n], dtype=x.dtype, device=x.device)
    for rows, columns in hl.tile([m, n]):
        sums = hl.zeros([rows, columns], dtype=torch.float32)
        for inner in hl.tile(k):
            sums = torch.addmm(sums, x[rows, inner], w[inner, columns])
        out[rows, columns] = sums
    return out


@helion.kernel(static_shapes=False, config=CONFIG_2D)
def on_another_device(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty_like(x)
    seed = torch.empty([1], device="meta")
    for tile in hl.tile(x.size()):
        out[tile] = x[tile] + 1
    return out, seed


@helion.kernel(static_shapes=False, config=CONFIG_2D)
def with_grad(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x, requires_grad=True)
    for tile in hl.tile(x.size()):
        out[tile] = x[tile] + 1
    return out

"""Rows of numbers that arithmetic treats specially: NaN, infinities, zeros, subnormal numbers, the largest ones, ±448."""

from __future__ import annotations

import torch

from ..errors import ArgumentError


def special_rows(columns: int, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> torch.Tensor:
    """Rows [rows, columns] in bfloat16 or float16; each row holds special numbers.

    Every one of them stands among normal numbers, at a place that `seed` chooses, and fills a row alone. At least two
    columns, else `ArgumentError`.
    """
    if columns < 2:
        raise ArgumentError(f"special_rows: expected at least 2 columns, found {columns}")
    generator = torch.Generator().manual_seed(seed)
    info = torch.finfo(dtype)
    least, subnormal = info.smallest_normal * info.eps, 0.5 * info.smallest_normal
    inf, nan = float("inf"), float("nan")
    numbers = [nan, -nan, inf, -inf, 0.0, -0.0, 448.0, -448.0, info.max, -info.max, least, -least, subnormal, -subnormal]
    #: Replaced together, in one row of normal numbers each.
    mixtures = [[number] for number in numbers]
    mixtures += [[nan, inf], [inf, -inf], [nan, inf, -inf, 0.0, -0.0], [info.max, least, -least, -0.0], [448.0, -448.0, nan]]

    def normal() -> torch.Tensor:
        return torch.randn(columns, generator=generator)

    rows = []
    for mixture in mixtures:
        row = normal()
        places = torch.randperm(columns, generator=generator)[: len(mixture)]
        row[places] = torch.tensor(mixture[: len(places)])
        rows.append(row)
    for number in numbers:
        rows.append(torch.full((columns,), number))
    alternating = torch.ones(columns)
    alternating[1::2] = -1
    # Zeros and subnormal numbers of both signs; the same beside one large number, which makes the quotients underflow.
    for value in (0.0, least, subnormal):
        tiny = alternating * value
        rows += [tiny, tiny.clone()]
        rows[-1][-1] = info.max
    rows += [alternating * 448, alternating * info.max, normal() * info.smallest_normal, normal() * 1e-6]
    # Gates that silu makes a zero of either sign: exp overflows. Gates whose sigmoid is subnormal, from -88.72 to -87.34.
    rows += [-89 - 20 * torch.rand(columns, generator=generator), alternating * 89]
    rows.append(-87.34 - 1.38 * torch.rand(columns, generator=generator))
    return torch.stack(rows).to(device=device, dtype=dtype)

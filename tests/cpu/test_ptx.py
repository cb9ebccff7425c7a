"""The PTX of kernels/lib/ptx.py, run in numpy over all numbers of 16 bits: vLLM's silu bit for bit.

Every instruction is exact as PTX defines it, flushing included, but for the approximate ones: those are correctly rounded here,
and then moved by some units in the last place, as a GPU's may be.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hdispatch.kernels.lib.ptx import SIGMOID, SILU, WIDEN
from numpy.typing import NDArray

F32 = np.float32
Floats = NDArray[np.float32]
#: By how many units in the last place ex2 is moved, and rcp or rsqrt.
MOVES = [(0, 0), (0, -1), (0, 1), (0, -2), (0, 2), (-2, 0), (-1, 1), (1, -1), (2, 0)]


def fma(a: Floats, b: Floats, c: Floats) -> Floats:
    """a * b + c, rounded once: the product is exact in float64, and the sum is rounded to odd there."""
    product, c64 = np.broadcast_arrays(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64))
    total = product + c64
    part = total - product
    lost = (product - (total - part)) + (c64 - part)
    bits = total.view(np.int64)
    odd = np.where((lost > 0) == (total > 0), bits, bits - 1) | 1
    return np.where(np.isfinite(total) & (lost != 0), odd.view(np.float64), total).astype(F32)


def fma_down(a: Floats, b: Floats, c: Floats) -> Floats:
    """a * b + c, rounded down, where the sum has no bits below 1."""
    assert (np.abs(c) >= 2**23).all()
    assert (np.abs(c) < 2**24).all()
    return (np.floor(a.astype(np.float64) * b.astype(np.float64)) + c).astype(F32)


def saturate(x: Floats) -> Floats:
    return np.where(np.isnan(x), F32(0), np.clip(x, F32(0), F32(1)))


def flush(x: Floats) -> Floats:
    return np.where(np.abs(x) < F32(2.0**-126), np.copysign(F32(0), x), x)


def approximate(function: Callable[[NDArray[np.float64]], NDArray[np.float64]], x: Floats, units: int) -> Floats:
    """function(x), both flushed, `units` beside the correctly rounded result; exact results are not moved."""
    exact = function(flush(x).astype(np.float64))
    rounded = flush(exact.astype(F32))
    moves = np.isfinite(rounded) & (rounded > 0) & (rounded != exact) & (rounded != 1)
    return flush(np.where(moves, (rounded.view(np.int32) + np.int32(units)).view(F32), rounded))


def run(ptx: str, x: Floats, moves: tuple[int, int] = (0, 0)) -> tuple[Floats, Floats]:
    """$0 of the PTX for $1 = x, and its register e."""
    ex2, rcp = moves
    registers: dict[str, Floats] = {"$1": x}

    def value(name: str) -> Floats:
        if name.startswith("0f"):
            return np.full_like(x, np.array(int(name[2:], 16), np.uint32).view(F32))
        return registers[name]

    operations: dict[str, Callable[..., Floats]] = {
        "fma.rn.f32": fma,
        "fma.rn.sat.f32": lambda a, b, c: saturate(fma(a, b, c)),
        "fma.rm.f32": fma_down,
        "sub.f32": np.subtract,
        "mul.rn.f32": np.multiply,
        "neg.f32": np.negative,
        "min.f32": np.fmin,
        "ex2.approx.ftz.f32": lambda a: approximate(np.exp2, a, ex2),
        "rcp.approx.ftz.f32": lambda a: approximate(np.reciprocal, a, rcp),
        "rsqrt.approx.ftz.f32": lambda a: approximate(lambda v: 1 / np.sqrt(v), a, rcp),
    }
    total = x
    for statement in ptx.strip("{}").split(";"):
        name, *operands = re.split(r"[ ,]+", statement.strip())
        if not name or name == ".reg":
            continue
        target, *sources = operands
        if name == "shl.b32":
            registers[target] = (registers[sources[0]].view(np.uint32) << np.uint32(sources[1])).view(F32)
        else:
            registers[target] = operations[name](*(value(source) for source in sources))
        if target == "e":
            total = registers["e"]
    return registers["$0"], total


def gates(dtype: torch.dtype) -> Floats:
    return torch.arange(2**16).to(torch.int16).view(dtype).float().numpy()


def same(got: Floats, want: Floats) -> None:
    """Bit for bit, and NaN where NaN is wanted."""
    assert np.array_equal(np.isnan(got), np.isnan(want))
    kept = ~np.isnan(want)
    differ = got[kept].view(np.int32) != want[kept].view(np.int32)
    assert not differ.any(), (got[kept][differ][:8], want[kept][differ][:8])


@pytest.fixture(autouse=True)
def quiet():
    with np.errstate(all="ignore"):
        yield


def test_fma_rounds_once():
    a, b, c = (np.array(v, F32) for v in ([1 + 2**-12, 1 + 2**-23], [1 + 2**-12, 1 - 2**-24], [2.0**-60, -1.0]))
    # 1 + 2**-11 + 2**-24 is a tie to even without 2**-60.
    assert fma(a, b, c).tolist() == [1 + 2**-11 + 2**-23, 2**-24 - 2**-47]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("moves", MOVES)
def test_silu_is_the_rounded_quotient(dtype: torch.dtype, moves: tuple[int, int]):
    x = gates(dtype)
    # exp(-2**-24), moved, makes a sum of 2 less one unit, and a quotient beside a tie of float16: see the next test.
    x = x[x != 2**-24] if all(moves) else x
    got, total = run(SILU, x, moves)
    got, want = (torch.from_numpy(values).to(dtype).float().numpy() for values in (got, x / total))
    same(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("moves", MOVES)
def test_sigmoid_is_the_reciprocal(dtype: torch.dtype, moves: tuple[int, int]):
    x = gates(dtype)
    # Of a sum that is 2 less some units a GPU's own rcp decides; tests/gpu/test_special_values.py has all gates there.
    x = x[~((x > 0) & (x < 2**-20))] if moves[1] else x
    got, total = run(SIGMOID, x, moves)
    same(x * got, x * (F32(1) / total))


def test_ends():
    """exp overflows from -88.72 on, and the reciprocal is subnormal before that."""
    x = np.array([-np.inf, -200, -100, -88.75, -88.5, -88, -87.5, -87, 0, 100, np.inf, np.nan], F32)
    for got, total in (run(SILU, x), (x * run(SIGMOID, x)[0], run(SIGMOID, x)[1])):
        assert np.isnan(got[[0, -1]]).all()
        assert (got[1:4] == 0).all()
        assert np.signbit(got[1:4]).all()
        assert (got[4:8] < 0).all()
        np.testing.assert_allclose(got[4:8], x[4:8].astype(np.float64) * np.exp(x[4:8].astype(np.float64)), rtol=3e-6)
        assert (got[8:11] == [0, 100, np.inf]).all()
        assert np.isinf(total[1:4]).all()


def test_widening_is_exact():
    """Both numbers of a register, the second in the upper half, bits of NaN included."""
    numbers = torch.arange(2**16).to(torch.int16).view(torch.bfloat16)
    pairs = torch.stack([numbers, numbers.flip(0)], dim=1).contiguous()
    registers = {"$2": pairs.view(torch.int32).flatten().numpy().view(np.uint32)}
    operations = {"shl.b32": np.left_shift, "and.b32": np.bitwise_and}
    for statement in WIDEN.strip(";").split(";"):
        name, target, source, number = re.split(r"[ ,]+", statement.strip())
        registers[target] = operations[name](registers[source], np.uint32(int(number, 0)))
    for place in (0, 1):
        assert np.array_equal(registers[f"${place}"].view(np.int32), pairs[:, place].float().numpy().view(np.int32))

"""Which calls the table serves through every door, which it misses and why; strict mode, stats, explain, pick."""

from __future__ import annotations

import inspect

import hdispatch
import pytest
import torch
import toy
from doors import (
    EPSILON,
    FULL,
    INPUT,
    RESULT,
    SCALE,
    SCALE_UB,
    WEIGHT,
    check_fallback,
    counted,
    counts,
    replaced,
    snapshot,
)
from hdispatch import _C

pytestmark = pytest.mark.usefixtures("bundle")


def test_every_m_is_a_hit(door):
    for m in (*range(1, 40), 1000, 8192):
        door(*toy.arguments(m))
    assert counts() == counted(hits=41)


def test_nothing_to_do_for_no_rows(door):
    args = toy.arguments(0)
    door(*args)
    door(*toy.arguments(0, 513))  # whether or not there is a row
    assert counts() == counted(empty=2)


def test_k_513_is_not_k_512(door):
    door(*toy.arguments(4, 512))
    assert counts() == counted(hits=1)
    check_fallback(door, toy.arguments(4, 513), "no row")
    check_fallback(door, toy.arguments(4, 511, FULL), "no row")
    check_fallback(door, toy.arguments(4, 64, "float16"), "no row")
    check_fallback(door, toy.arguments(4, 64, "bfloat16+residual"), "no row")


def test_rows_of_an_odd_stride(door):
    wide = torch.randn(4, 72).bfloat16()
    check_fallback(door, replaced(INPUT, wide[:, :64]), "guard: input.stride(0) % 16 == 0")
    hdispatch.stats(reset=True)
    door(*replaced(INPUT, torch.randn(4, 96).bfloat16()[:, :64]))
    # Of one row the stride means nothing, nor of a row that is repeated 0 elements apart.
    door(*replaced(INPUT, wide[:1, :64], m=1))
    door(*replaced(INPUT, torch.randn(1, 64).bfloat16().expand(4, 64)))
    door(*replaced(INPUT, torch.empty_strided((1, 64), (3, 1), dtype=torch.bfloat16), m=1))
    assert counts() == counted(hits=4)


def test_pointers_that_are_not_aligned(door):
    def shifted(like: torch.Tensor, elements: int) -> torch.Tensor:
        return torch.zeros(like.numel() + elements, dtype=like.dtype)[elements:].view(like.shape)

    a = toy.arguments()
    check_fallback(door, replaced(RESULT, shifted(a[RESULT], 1)), "guard: result is 16-byte aligned")
    check_fallback(door, replaced(INPUT, shifted(a[INPUT], 1)), "guard: input is 16-byte aligned")
    check_fallback(door, replaced(SCALE, shifted(a[SCALE], 2)), "guard: scale is 16-byte aligned")
    hdispatch.stats(reset=True)
    door(*replaced(RESULT, shifted(a[RESULT], 16)))
    door(*replaced(WEIGHT, shifted(a[WEIGHT], 1)))  # the record does not care
    assert counts() == counted(hits=2)


def test_a_rank_0_scale_ub(door):
    door(*replaced(SCALE_UB, torch.tensor(2.0), variant=FULL))
    assert counts() == counted(hits=1)
    check_fallback(door, replaced(SCALE_UB, torch.tensor(2.0), k=513, variant=FULL), "no row")


def test_without_a_bundle(door, bundle):
    bundle.unload()
    check_fallback(door, toy.arguments(), "no table")
    with hdispatch.strict(), pytest.raises(hdispatch.MissError, match=r"no bundle with this op .* call hdispatch.load"):
        door(*toy.arguments())


def test_strict_mode(door):
    with hdispatch.strict():
        door(*toy.arguments())
        args = toy.arguments(4, 513)
        before = snapshot(args)
        with pytest.raises(
            hdispatch.MissError,
            match=r"toy\(bfloat16, M=4, K=513, N=0\): the launch table has no row for it; nearest rows: "
            r"\(bfloat16, K=512, N=0, M 3\.\.4\), \(bfloat16, K=64, N=0, M 3\.\.4\), \(bfloat16\+scale_ub\+residual, K=512, ",
        ):
            door(*args)
        assert snapshot(args) == before
        with pytest.raises(
            hdispatch.MissError, match=r"M=4, K=64.*guard: input.stride\(0\) % 16 == 0 does not hold in toy_kernel"
        ):
            door(*replaced(INPUT, torch.zeros(4, 72, dtype=torch.bfloat16)[:, :64]))
        with pytest.raises(hdispatch.ArgumentError):  # bad input is no miss
            door(*replaced(EPSILON, -1.0))
    assert counts() == {"hits": 1, "empty": 0, "fallbacks": 0, "misses": {"no row": 1, "guard: input.stride(0) % 16 == 0": 1}}
    door(*toy.arguments(4, 513))
    assert counts()["fallbacks"] == 1


def test_stats():
    hdispatch.ops.toy(*toy.arguments())
    hdispatch.ops.toy(*toy.arguments(0))
    hdispatch.ops.toy(*toy.arguments(4, 513))
    every = hdispatch.stats(reset=True)
    assert set(every) >= set(hdispatch.registry.names())  # and sequences of other tests
    assert every["toy"] == {"hits": 1, "empty": 1, "fallbacks": 1, "misses": {"no row": 1}}
    assert counts() == counted()


def test_explain():
    explain = hdispatch.explain
    op = hdispatch.ops.toy
    text = explain(op, *toy.arguments(18, 512))
    for part in (
        "M=18 K=512",
        "bucket   4: M 9..",
        "guard    input.stride(0) % 16 == 0: holds",
        "class    other",
        'driver "null"',
    ):
        assert part in text
    values = toy.arguments(18, 512)
    by_name = dict(zip(inspect.signature(op).parameters, values, strict=True))
    assert explain(op, **by_name) == explain(op, *values)
    first, *others = by_name
    assert explain(op, values[0], **{name: by_name[name] for name in others}) == explain(op, *values)
    with pytest.raises(hdispatch.ArgumentError, match="toy: got an unexpected keyword argument 'nonsense'; it takes"):
        explain(op, *values, nonsense=1)
    with pytest.raises(hdispatch.ArgumentError, match=f"toy: missing a required argument: '{first}'"):
        explain(op, **{name: by_name[name] for name in others})
    assert "nothing to launch: M is 0" in explain(op, *toy.arguments(0))
    assert "nearest rows" in explain(op, *toy.arguments(4, 513))
    assert "FAILS" in explain(op, *replaced(INPUT, torch.zeros(4, 72, dtype=torch.bfloat16)[:, :64]))
    with pytest.raises(hdispatch.ArgumentError, match="weight has size"):
        explain(op, *replaced(WEIGHT, torch.zeros(65, dtype=torch.bfloat16)))
    with pytest.raises(hdispatch.ArgumentError, match="not a plain CPU or CUDA tensor"):
        explain(op, *replaced(WEIGHT, torch.zeros(64, dtype=torch.bfloat16, device="meta")))
    with pytest.raises(hdispatch.ArgumentError, match='"weight" is missing'):
        explain(op, *toy.arguments()[:2])
    with pytest.raises(TypeError, match="expected an hdispatch op"):
        explain(toy.reference, *toy.arguments())
    assert counts() == counted()  # nothing was launched


def test_pick():
    pick = hdispatch.ops.toy.pick
    rows = toy.manifest()["rows"]
    variants = [v.name for v in toy.SPEC.variants()]
    for m in (*range(1, 40), 10**6, 2**62):
        bucket = _C.bucket(list(toy.SPEC.ladder), m)
        for k in (64, 512):
            for variant in ("bfloat16", FULL):
                index = pick(m, k, 0, variants.index(variant))
                row = rows[index]
                assert (row["K"], row["bucket"], row["variant"]) == (k, bucket, variant)
    for nothing in (
        (4, 513),
        (4, 64, 1),
        (4, 64, 0, 1),
        (0, 64),
        (-1, 64),
        (4, -64),
        (4, 2**32 + 64),
        (4, 64, 0, -1),
        (4, 64, 0, 2**16),
    ):
        assert pick(*nothing) is None
    for wrong in ((), (1, 2, 3, 4, 5, 6), ("4", 64), (4.0, 64), (None,)):
        with pytest.raises(TypeError):
            pick(*wrong)
    with pytest.raises(OverflowError):
        pick(2**64)

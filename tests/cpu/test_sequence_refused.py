"""What a sequence refuses: slots, sizes, steps, strict mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hdispatch
import pytest
import torch
from hdispatch import ArgumentError, HdispatchError, Key, MissError, Sequence
from sequence_op import (
    NAME,
    OP,
    PLAIN,
    WEIGHTS,
    K,
    block,
    poisoned,
    random,
    stats,
)

pytestmark = pytest.mark.usefixtures("nothing_serves")


def test_slots_are_checked(served):
    sequence = block("checked")
    x, out = random(4, K), poisoned(4, K)
    wrong: list[tuple[tuple[Any, ...], str]] = [
        ((x.double(), out, 1), r"slot x has dtype float64; it takes float32"),
        ((x[:, :8], out, 1), r"slot x has sizes \[4, 8\]; it takes \[M, 64\] with M = 4"),
        ((x, out[:3], 1), r"slot out has sizes \[3, 64\]; it takes \[M, 64\] with M = 4"),
        ((x[0], out, 1), r"slot x has rank 1 \(sizes \[64\]\); it takes \[M, 64\]"),
        ((x.to("meta"), out, 1), r"slot x is no plain CPU or CUDA tensor \(it is on meta\)"),
        ((None, out, 1), r"slot x is None; it takes a tensor \[M, 64\]"),
        ((3, out, 1), r"slot x is a int; it takes a torch.Tensor"),
        ((x, out, 1.5), r"slot repeat is a float; it takes an int"),
        ((x, out, 2**70), r"slot repeat is an int that 64 bits do not hold"),
        ((x, out), r"slot \"repeat\" is missing"),
        ((x, out, 1, 2), r"got 4 slots; it takes 3"),
        ((random(4, K).requires_grad_(), out, 1), r"slot x requires grad and grad mode is on"),
    ]
    for args, message in wrong:
        with pytest.raises(ArgumentError, match=message):
            sequence(*args)
    assert out.isnan().all()
    with pytest.raises(ArgumentError, match='has no slot "y"'):
        sequence(x, y=out, repeat=1)
    with pytest.raises(ArgumentError, match='slot "x" is given twice'):
        sequence(x, x=out, repeat=1)
    with pytest.raises(ArgumentError, match=rf"sequence checked, step 1 \({NAME}\): {NAME}: repeat is 0; it takes at least 1"):
        sequence(x, out, 0)
    with pytest.raises(ArgumentError, match=rf"sequence checked, step 4 \({NAME}\): {NAME}: out .*shares memory with bias"):
        sequence(x, WEIGHTS[0].expand(4, K), 1)
    assert out.isnan().all()
    sequence(repeat=1, out=out, x=x)
    assert not out.isnan().any()


def test_fewer_rows_than_none():
    s = Sequence("negative")
    x, out = s.slot("x", ("2*M+3", K), torch.float32), s.slot("out", ("M+2", K), torch.float32, written=True)
    s.add(OP, out.narrow(0, 0, "M"), x.narrow(0, 0, "M"), WEIGHTS[0], 1.0, 1)
    with pytest.raises(ArgumentError, match=r"slot x has sizes \[1, 64\]; it takes \[2\*M\+3, 64\] with M of at least 0"):
        s.freeze()(random(1, K), poisoned(1, K))


@pytest.mark.parametrize("width", [2**33, 2**61, 2**62])
def test_temporaries_whose_bytes_64_bits_do_not_hold(width):
    """Not an arena of the bytes that are left."""
    s = Sequence("large", max_rows=2**31)
    out = s.slot("out", ("M", K), torch.float32, written=True)
    s.add_torch(torch.ops.aten.zero_.default, s.temp(("M", width), torch.float32))
    s.add_torch(torch.ops.aten.zero_.default, out)
    with pytest.raises(ArgumentError, match=rf"sequence large: temporary 0, \[M, {width}\], takes more than 2\*\*48 bytes"):
        s.freeze()


def test_what_cannot_be_built():
    s = Sequence("wrong")
    x, out = s.slot("x", ("M", K), torch.float32), s.slot("out", ("M", K), torch.float32, written=True)
    a, n, loose = s.temp(("M", K), torch.float32), s.int_slot("n"), s.slot("loose", None, None)
    other = Sequence("other").slot("x", ("M", K), torch.float32)
    weight, where = WEIGHTS[0], rf"sequence wrong, step 0 \({NAME}\)"
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: s.add(OP, x, x, weight, 1.0, 1), rf"{where}: it writes out, which is <slot x of sequence wrong>; declare"),
        (lambda: s.add(OP, out, a, weight, 1.0, 1), rf"{where}: it reads x, which is <temp 0 of .*>; no step before it"),
        (lambda: s.add(OP, out, other, weight, 1.0, 1), rf"{where}: x is of another sequence, other"),
        (lambda: s.add(OP, out, x, weight, 1.0), rf"{where}: argument 'repeat' is missing"),
        (lambda: s.add(OP, out, x, weight, 1.0, 1, size=3), rf"{where}: argument 'size' is not known"),
        (lambda: s.add(OP, out, x, "weight", 1.0, 1), rf"{where}: bias is a str; it takes a tensor"),
        (lambda: s.add(OP, out, x, None, 1.0, 1), rf"{where}: bias is None; it takes a tensor"),
        (lambda: s.add(OP, out, x, weight, n, 1), rf"{where}: factor is the integer slot n; it takes no int"),
        (lambda: s.add(OP, out, x, weight, 1.0, x), rf"{where}: repeat is <slot x of .*>; it takes no tensor"),
        (lambda: s.add_torch(torch.add, x, x), r"it takes an overload"),
        (lambda: s.add_torch(torch.ops.aten.mm.out, x, weight, out), r"got 3 positional arguments; it takes 2"),
        (lambda: s.slot("x", ("M",), torch.float32), r"slot 'x': it takes an identifier that no other slot has"),
        (lambda: s.temp(("M", "*"), torch.float32), r'only a slot has a size "\*"'),
        (lambda: s.temp(("K",), torch.float32), r"'K' is no size"),
        (lambda: s.temp((-1,), torch.float32), r"-1 is no size"),
        (lambda: x.narrow(2, 0, 1), r"dimension 2 of rank 2"),
        (lambda: loose.view("M"), r"no view of a slot without dims"),
        (lambda: Sequence(NAME), r"it takes a name that no op has"),
        (lambda: Sequence("none").freeze(), r"sequence none: it has no step"),
    ]
    for build, message in wrong:
        with pytest.raises(ArgumentError, match=message):
            build()
    s.add(OP, out, x, weight.to("meta"), 1.0, 1)
    with pytest.raises(ArgumentError, match=rf"step 0.*{NAME}: a constant is no plain CPU or CUDA tensor"):
        s.freeze()
    made = Sequence("made")
    x, out = made.slot("x", ("M", K), torch.float32), made.slot("out", ("M", K), torch.float32, written=True)
    made.add(OP, out, x, weight, 1.0, 1)
    assert made.freeze() is made.freeze()
    with pytest.raises(HdispatchError, match="sequence made is frozen"):
        made.add(OP, out, x, weight, 1.0, 1)


def test_strict_names_the_step_and_launches_nothing(sequence_functions):
    hdispatch.register(OP, Key(PLAIN), sequence_functions.scale, driver="null")
    sequence = block("strict")
    x, out = random(3, K), poisoned(3, K)
    with hdispatch.strict(), pytest.raises(MissError, match=rf"sequence strict, step 2 \({NAME}\): .*no row for it; nearest"):
        sequence(x, out, 2)
    assert out.isnan().all()
    assert stats("strict") == {"hits": 0, "empty": 0, "fallbacks": 0, "misses": {f"{NAME}: no row": 1}}
    assert stats(NAME)["hits"] == 0
    with hdispatch.strict(), hdispatch.strict(False):
        sequence(x, out, 2)
    assert not out.isnan().any()


def test_which_steps_work_by_rows():
    s = Sequence("by rows")
    x, weight = s.slot("x", ("M", K), torch.float32), s.slot("weight", (K,), torch.float32)
    out, turned = s.slot("out", ("M", K), torch.float32, written=True), s.temp((K, "M"), torch.float32)
    odd = s.slot("odd", ("M+1", K), torch.float32)

    def by_rows(*args: Any, **options: Any) -> bool:
        s.add(OP, *args, **options)
        return bool(s._steps[-1]["by_rows"])

    assert by_rows(out, x, WEIGHTS[0], 1.0, 1)
    assert by_rows(out.columns(0, 32), x.columns(0, 32), WEIGHTS[0][:32], 1.0, 1)
    assert not by_rows(out, x, weight, 1.0, 1)  # a slot that has no rows may be a cache
    assert by_rows(out, x, weight, 1.0, 1, by_rows=True)
    assert not by_rows(turned, x.transpose(0, 1), WEIGHTS[0], 1.0, 1)  # the sequence's rows are the op's columns
    assert not by_rows(out, odd.narrow(0, 0, "M"), WEIGHTS[0], 1.0, 1)
    assert not by_rows(out, x, WEIGHTS[0], 1.0, 1, by_rows=False)
    assert not by_rows(out.narrow(0, 0, 4), x.narrow(0, 0, 4), WEIGHTS[0], 1.0, 1)  # rows of the call, not of each chunk
    assert not by_rows(out, x, WEIGHTS[0], 1.0, 1, random(9, K))  # a constant has all rows in each chunk


def test_some_rows_and_constants_with_rows_in_many_rows(served):
    s = Sequence("some rows", max_rows=4)
    x, out = s.slot("x", ("M", K), torch.float32), s.slot("out", ("M", K), torch.float32, written=True)
    gate = random(9, K, seed=4)
    s.add(OP, out, x, WEIGHTS[0], 1.0, 1, gate)
    s.add(OP, out.narrow(0, 1, 2), x.narrow(0, 1, 2), WEIGHTS[1], 0.5, 1)
    given, result, expected = random(9, K), poisoned(9, K), poisoned(9, K)
    s.freeze()(given, result)
    OP(expected, given, WEIGHTS[0], 1.0, 1, gate)
    OP(expected[1:3], given[1:3], WEIGHTS[1], 0.5, 1)
    assert torch.equal(result, expected)

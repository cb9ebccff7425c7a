"""Steps of a sequence that are torch ops of others."""

from __future__ import annotations

import hdispatch
import pytest
import torch
from hdispatch import ArgumentError, Key, Sequence
from sequence_op import (
    NAME,
    OP,
    PLAIN,
    WEIGHTS,
    K,
    poisoned,
    random,
    stats,
)

pytestmark = pytest.mark.usefixtures("nothing_serves")


def test_foreign_steps(served):
    s = Sequence("foreign")
    x, index = s.slot("x", ("M", K), torch.float32), s.slot("index", ("M",), torch.int64)
    out, cache = s.slot("out", ("M", K), torch.float32, written=True), s.slot("cache", None, None, written=True)
    a, b = s.temp(("M", K), torch.float32), s.temp(("M", K), torch.float32)
    flag = s.int_slot("flag")
    s.add(OP, a, x, WEIGHTS[0], 1.0, 1)
    product = s.add_torch(torch.ops.aten.mul.Tensor, a, x)
    s.add_torch(torch.ops.aten.copy_.default, b, product, flag)
    s.add_torch(torch.ops.aten.index_copy_.default, cache, 0, index, b)
    s.add_torch(torch.ops.aten.index_select.out, cache, 0, index, out=a)
    s.add(OP, out, a, WEIGHTS[1], 1.0, 1)
    sequence = s.freeze()
    for m in (1, 4, 7):
        memory, given, result = torch.zeros(50, K), random(m, K), poisoned(m, K)
        places = torch.randperm(50)[:m]
        version = memory._version
        sequence(given, places, result, memory, m % 2)
        scaled, expected = poisoned(m, K), poisoned(m, K)
        OP(scaled, given, WEIGHTS[0], 1.0, 1, None)
        OP(expected, scaled * given, WEIGHTS[1], 1.0, 1, None)
        assert torch.equal(result, expected)
        assert torch.equal(memory[places], scaled * given)
        assert memory._version > version
    assert stats("foreign")["hits"] == 3
    with torch.inference_mode():
        sequence(random(4, K), torch.arange(4), poisoned(4, K), torch.zeros(9, K), 0)


def test_a_foreign_step_whose_schema_marks_nothing():
    library = torch.library.Library("hdispatch_unmarked", "FRAGMENT")
    library.define("fill(Tensor out, float value) -> ()")
    library.impl("fill", lambda out, value: (out.fill_(value), None)[1], "CPU")
    fill = torch.ops.hdispatch_unmarked.fill.default
    s = Sequence("unmarked")
    out, a = s.slot("out", ("M",), torch.float32, written=True), s.temp(("M",), torch.float32)
    with pytest.raises(ArgumentError, match=r"it reads out, which is <temp 0 of sequence unmarked>; no step before it"):
        s.add_torch(fill, a, 2.0)
    with pytest.raises(ArgumentError, match=r"it is said to write 'to', which is no argument"):
        s.add_torch(fill, a, 2.0, writes=("to",))
    s.add_torch(fill, a, 2.0, writes=("out",))
    s.add_torch(torch.ops.aten.copy_.default, out, a)
    result = poisoned(3)
    s.freeze()(result)
    assert result.tolist() == [2.0] * 3


def test_a_slot_that_may_be_none(served):
    s = Sequence("optional")
    x, gate = s.slot("x", ("M", K), torch.float32), s.slot("gate", ("M", K), torch.float32, optional=True)
    out = s.slot("out", ("M", K), torch.float32, written=True)
    s.add(OP, out, x, WEIGHTS[0], 1.0, 1, gate)
    sequence = s.freeze()
    for given in (None, random(3, K, seed=5), None):
        result, expected = poisoned(3, K), poisoned(3, K)
        sequence(random(3, K), given, result)
        OP(expected, random(3, K), WEIGHTS[0], 1.0, 1, given)
        assert torch.equal(result, expected)
    sequence(random(3, K), out=poisoned(3, K))
    assert stats("optional")["hits"] == 4


def test_a_foreign_step_in_python_takes_the_lock(served):
    seen: list[int] = []

    @torch.library.custom_op("hdispatch_test::double", mutates_args=("out",))
    def double(out: torch.Tensor, x: torch.Tensor) -> None:
        seen.append(x.size(0))
        out.copy_(2 * x)

    s = Sequence("python")
    x, out = s.slot("x", ("M", K), torch.float32), s.slot("out", ("M", K), torch.float32, written=True)
    a = s.temp(("M", K), torch.float32)
    s.add_torch(torch.ops.hdispatch_test.double.default, a, x)
    s.add(OP, out, a, WEIGHTS[0], 1.0, 1)
    sequence = s.freeze()
    given, result, expected = random(3, K), poisoned(3, K), poisoned(3, K)
    sequence(given, result)
    OP(expected, 2 * given, WEIGHTS[0], 1.0, 1, None)
    assert torch.equal(result, expected)
    assert seen == [3]


def test_errors_of_steps_name_them(served, sequence_functions):
    s = Sequence("failing")
    x, index = s.slot("x", ("M", K), torch.float32), s.slot("index", None, torch.int64)
    a = s.temp(("M", K), torch.float32)
    s.add(OP, a, x, WEIGHTS[0], 1.0, 1)
    s.add_torch(torch.ops.aten.index_select.out, x, 0, index, out=a)
    sequence = s.freeze()
    with pytest.raises(hdispatch.FunctionError, match=r"sequence failing, step 1 \(aten::index_select\): .*ndex out of"):
        sequence(random(3, K), torch.tensor([0, 1, 99]))
    sequence(random(3, K), torch.tensor([0, 1, 2]))
    hdispatch.register(OP, Key(PLAIN), sequence_functions.raise_it, args=[], driver="null", stream="none", label="bad")
    with pytest.raises(hdispatch.FunctionError, match=rf"sequence failing, step 0 \({NAME}\): bad.*ValueError: unlucky"):
        sequence(random(3, K), torch.tensor([0, 1, 2]))

"""Sequences against the same ops called one by one, bit for bit: on functions compiled here, and on the null driver."""

from __future__ import annotations

from pathlib import Path

import hdispatch
import pytest
import torch
import toy
from hdispatch import ArgumentError, Key, Sequence
from hdispatch.manifest import FfiArg
from hdispatch.testing import null
from sequence_op import (
    GATED,
    NAME,
    OP,
    PLAIN,
    ROWS,
    WEIGHTS,
    K,
    block,
    block_one_by_one,
    check,
    poisoned,
    random,
    reference,
    stats,
)

from benchmarks.decoder import Layers, Shape

pytestmark = pytest.mark.usefixtures("nothing_serves")


def test_any_number_of_rows(served):
    sequence = block("rows")
    for turn in range(3):
        for m in ROWS:
            for repeat in (2, 5):
                check(sequence, m, repeat, seed=turn)
    calls = 3 * len(ROWS) * 2
    assert stats("rows") == {"hits": calls, "empty": 0, "fallbacks": 0, "misses": {}}
    assert stats(NAME) == {"hits": 2 * 5 * calls, "empty": 0, "fallbacks": 0, "misses": {}}


@pytest.mark.parametrize("special", [0.0, float("nan"), float("inf"), -float("inf"), 3e38])
def test_special_values(served, special):
    sequence = block("special")
    x, out, expected = random(5, K), poisoned(5, K), poisoned(5, K)
    x[1, 3] = x[4] = special
    sequence(x, out, 2)
    block_one_by_one(x, expected, 2)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())


def test_without_a_table_the_steps_are_made_one_by_one():
    sequence = block("no table")
    for m in (1, 5, 40):
        x, out, expected = random(m, K), poisoned(m, K), poisoned(m, K)
        sequence(x, out, 2)
        block_one_by_one(x, expected, 2, reference)
        assert torch.equal(out, expected)
    assert stats("no table") == {"hits": 0, "empty": 0, "fallbacks": 3, "misses": {f"{NAME}: no table": 3}}
    assert stats(NAME)["fallbacks"] == 15


def test_one_step_without_a_row(sequence_functions):
    """The gated variant has no row: what the others have is launched, one by one."""
    hdispatch.register(OP, Key(PLAIN), sequence_functions.scale, driver="null")
    sequence = block("one missing")
    check(sequence, 3)
    assert stats("one missing")["misses"] == {f"{NAME}: no row": 1}
    assert stats(NAME) == {"hits": 6, "empty": 0, "fallbacks": 4, "misses": {"no row": 4}}


def test_no_rows_at_all(served):
    check(block("empty"), 0)
    assert stats("empty") == {"hits": 0, "empty": 1, "fallbacks": 0, "misses": {}}
    assert stats(NAME)["empty"] == 10


def test_chunks(served):
    """Steps by rows in chunks, between steps that see all rows: their buffers are whole."""
    s = Sequence("chunks", max_rows=4)
    x, out = s.slot("x", ("M", K), torch.float32), s.slot("out", ("M", K), torch.float32, written=True)
    a, b, total = (s.temp(("M", K), torch.float32) for _ in range(3))
    local, last = s.temp(("M", 2 * K), torch.float32), s.temp(("M", K), torch.float32)
    s.add(OP, local.columns(K, 2 * K), x, WEIGHTS[0], 0.5, 1)
    s.add(OP, a, local.columns(K, 2 * K), WEIGHTS[1], 0.5, 1)
    s.add_torch(torch.ops.aten.cumsum.out, a, 0, out=total)
    s.add(OP, b, total, WEIGHTS[2], 1.0, 1, a)
    s.add(OP, last, b, WEIGHTS[2], 1.0, 1, a)
    s.add(OP, out, last, WEIGHTS[3], 1.0, 1, x)
    sequence = s.freeze()
    for m in range(1, 23):
        given, result, expected = random(m, K), poisoned(m, K), poisoned(m, K)
        steps = [poisoned(m, K) for _ in range(5)]
        OP(steps[0], given, WEIGHTS[0], 0.5, 1, None)
        OP(steps[1], steps[0], WEIGHTS[1], 0.5, 1, None)
        steps[2] = torch.cumsum(steps[1], 0)
        OP(steps[3], steps[2], WEIGHTS[2], 1.0, 1, steps[1])
        OP(steps[4], steps[3], WEIGHTS[2], 1.0, 1, steps[1])
        OP(expected, steps[4], WEIGHTS[3], 1.0, 1, given)
        sequence(given, result)
        assert torch.equal(result, expected), m
    assert stats("chunks")["hits"] == 22
    explained = hdispatch.explain(sequence, random(9, K), poisoned(9, K))
    assert "in chunks of at most 4" in explained
    assert "aten::cumsum: foreign" in explained
    assert "rows 6..9" in explained
    assert hdispatch.explain(sequence, out=poisoned(9, K), x=random(9, K)) == explained
    assert hdispatch.explain(sequence, random(9, K), out=poisoned(9, K)) == explained
    for given, said in (({"x": random(9, K)}, 'slot "out" is missing'), ({"y": random(9, K)}, 'has no slot "y"')):
        with pytest.raises(ArgumentError, match=said):
            hdispatch.explain(sequence, **given)
    hdispatch.registered()[0].unregister()  # in chunks one by one
    m = 9
    given, result = random(m, K), poisoned(m, K)
    sequence(given, result)
    assert not result.isnan().any()
    assert stats("chunks")["fallbacks"] == 1


def test_slots_that_overlap_are_not_made_in_chunks(served):
    sequence = block("overlapping", max_rows=4)
    memory = random(12, K)
    with pytest.raises(ArgumentError, match=r"slot out is written and shares memory with slot x, and M = 8 is more than max_r"):
        sequence(memory[:8], memory[4:], 2)
    sequence(memory[:8], memory[:8], 2)  # the same rows


def test_views(served):
    """Reshaped, transposed and narrowed as torch does it."""
    s = Sequence("views")
    x, out = s.slot("x", ("M", 2, K), torch.float32), s.slot("out", ("2*M", K), torch.float32, written=True)
    a = s.temp(("M", 2 * K), torch.float32)
    s.add(OP, a.view("M", 2, K).narrow(1, 1, 1).view("M", K), x.narrow(1, 0, 1).view("M", K), WEIGHTS[0], 1.0, 1)
    s.add(OP, a.columns(0, K), x.narrow(1, 1, 1).view("M", K), WEIGHTS[1], 1.0, 1)
    s.add(OP, out, a.view("2*M", K), WEIGHTS[2], 1.0, 1)
    sequence = s.freeze()
    for m in (1, 3, 16):
        given, result, expected = random(m, 2, K), poisoned(2 * m, K), poisoned(2 * m, K)
        sequence(given, result)
        wide = poisoned(m, 2 * K)
        OP(wide[:, K:], given[:, 0], WEIGHTS[0], 1.0, 1, None)
        OP(wide[:, :K], given[:, 1], WEIGHTS[1], 1.0, 1, None)
        OP(expected, wide.view(2 * m, K), WEIGHTS[2], 1.0, 1, None)
        assert torch.equal(result, expected)
    assert stats("views")["hits"] == 3


def test_a_view_that_torch_would_copy(served):
    s = Sequence("copying")
    x, out = s.slot("x", ("M", 2, K), torch.float32), s.slot("out", ("2*M", K), torch.float32, written=True)
    s.add(OP, out, x.transpose(0, 1).view("2*M", K), WEIGHTS[0], 1.0, 1)
    sequence = s.freeze()
    with pytest.raises(ArgumentError, match=rf"sequence copying, step 0 \({NAME}\): the view that is its argument x cannot be"):
        sequence(random(3, 2, K), poisoned(6, K))


def test_strided_and_misaligned_slots(sequence_functions):
    """Strides are part of what a plan is for; a guard that fails sends the call to single ops."""
    args = [
        FfiArg(kind="tensor", arg="out", align=4),
        FfiArg(kind="tensor", arg="x", align=16),
        *(FfiArg(kind="tensor", arg="bias"), FfiArg(kind="float", arg="factor")),
        *(FfiArg(kind="int", value=["repeat"]), FfiArg(kind="none")),
    ]
    hdispatch.register(OP, Key(PLAIN), sequence_functions.scale, driver="null", args=args)
    hdispatch.register(OP, Key(GATED), sequence_functions.scale, driver="null")
    sequence = block("strides")
    memory = random(5, 3 * K)
    for begin in (0, 4, 8, 1, 4, 0):
        x, out, expected = memory[:, begin : begin + K], poisoned(5, K), poisoned(5, K)
        sequence(x, out, 2)
        block_one_by_one(x, expected, 2)
        assert torch.equal(out, expected)
    assert stats("strides") == {
        "hits": 5,
        "empty": 0,
        "fallbacks": 1,
        "misses": {f"{NAME}: guard: x is 16-byte aligned": 1},
    }


def test_tables_change_between_calls(served, sequence_functions):
    sequence = block("tables")
    first = check(sequence, 4)
    for registration in served:
        registration.unregister()
    x, out, expected = random(4, K), poisoned(4, K), poisoned(4, K)
    sequence(x, out, 2)
    block_one_by_one(x, expected, 2, reference)
    assert torch.equal(out, expected)
    assert not torch.equal(out, first)
    for variant in (PLAIN, GATED):
        hdispatch.register(OP, Key(variant), sequence_functions.scale, driver="null")
    assert torch.equal(check(sequence, 4), first)
    assert (stats("tables")["hits"], stats("tables")["fallbacks"]) == (2, 1)


def test_constants_keep_their_memory(served):
    weight = torch.nn.Parameter(random(K, seed=9))
    value = weight.detach().clone()
    s = Sequence("constants")
    x, out = s.slot("x", ("M", K), torch.float32), s.slot("out", ("M", K), torch.float32, written=True)
    s.add(OP, out, x, weight, 1.0, 1)
    sequence = s.freeze()
    weight.data = torch.zeros(K)
    given, result, expected = random(3, K), poisoned(3, K), poisoned(3, K)
    sequence(given, result)
    OP(expected, given, value, 1.0, 1, None)
    assert torch.equal(result, expected)


def test_weights_as_slots(served):
    """One layer called for each of its weights."""
    s = Sequence("layer")
    x, weight = s.slot("x", ("M", K), torch.float32), s.slot("weight", (K,), torch.float32)
    out = s.slot("out", ("M", K), torch.float32, written=True)
    a = s.temp(("M", K), torch.float32)
    s.add(OP, a, x, weight, 1.0, 1, by_rows=True)
    s.add(OP, out, a, weight, 1.0, 1, by_rows=True)
    layer = s.freeze()
    given = random(6, K)
    expected, result = given.clone(), given.clone()
    for each in WEIGHTS * 2:
        other, between = poisoned(6, K), poisoned(6, K)
        layer(result, each, other)
        result = other
        OP(between, expected, each, 1.0, 1, None)
        expected = poisoned(6, K)
        OP(expected, between, each, 1.0, 1, None)
    assert torch.equal(result, expected)


def test_decoder_layers_in_chunks_of_their_references():
    """What benchmarks and the GPU's tests run: every step works by rows."""
    shape = Shape(hidden=256, intermediate=512, heads=2, kv_heads=1, layers=2, positions=64)
    layers = Layers(torch.device("cpu"), shape)
    sequence = layers.sequence("decoder", max_rows=4)
    for m in (1, 4, 5, 9):
        residual, positions = layers.inputs(m)
        given, expected = residual.clone(), residual.clone()
        for op, arguments in layers.single(expected, positions):
            op(*arguments)
        sequence(residual, positions)
        assert torch.equal(residual, expected)
        assert not torch.equal(residual, given)
    explained = hdispatch.explain(sequence, *layers.inputs(9))
    assert explained.count(" rows 0..3: miss ") == explained.count(" rows 6..9: miss ") == 9 * 2 + 1


@pytest.mark.parametrize("k", [64, 512])
def test_launches_are_those_of_single_ops(tmp_path: Path, k: int):
    """Grid, parameters and PDL of every launch; rows of K = 512 read early, and one weight is what a step in front writes."""
    content = toy.manifest()
    content["records"].append({**toy.record(), "early": ["weight"]})
    for row in content["rows"]:
        row["record"] = int(row["K"] == 512)
    hdispatch.load(toy.write(tmp_path, content), driver="null")
    s = Sequence(f"toy {k}")
    x = s.slot("x", ("M", k), torch.bfloat16)
    outs = [s.slot(f"out{i}", ("M", k), torch.float8_e4m3fn, written=True) for i in range(2)]
    scales = [s.slot(f"scale{i}", ("M", 1), torch.float32, written=True) for i in range(2)]
    weight = s.slot("weight", (k,), torch.bfloat16)
    constant = torch.randn(k).to(torch.bfloat16)
    plan = [(0, weight), (1, constant), (0, weight), (1, weight)]
    waits = toy.arguments()  # all that was launched before it has completed
    for i, each in plan:
        s.add(toy.OP, outs[i], x, each, scales[i], 1e-6)
    sequence = s.freeze()
    for m in (1, 2, 4, 5, 16, 17, 100):
        for _ in range(2):  # other addresses the second time
            given = torch.randn(m, k).to(torch.bfloat16)
            result = [torch.zeros(m, k, dtype=torch.float8_e4m3fn) for _ in range(2)]
            scale = [torch.zeros(m, 1) for _ in range(2)]
            w = torch.randn(k).to(torch.bfloat16)
            toy.OP(*waits)
            with null.recording(), hdispatch.strict():
                for i, each in plan:
                    toy.OP(result[i], given, w if each is weight else constant, scale[i], 1e-6)
            single = null.launches()
            toy.OP(*waits)
            with null.recording(), hdispatch.strict():
                sequence(given, *result, *scale, w)
            assert null.launches() == single
            assert len(single) == 4

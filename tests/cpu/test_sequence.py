"""Sequences against the same ops called one by one, bit for bit: on functions compiled here, and on the null driver."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hdispatch
import pytest
import torch
import toy
from hdispatch import ArgumentError, HdispatchError, Key, MissError, Sequence
from hdispatch.bench.decoder import Layers, Shape
from hdispatch.manifest import FfiArg
from hdispatch.opspec import FloatArg, IntArg, OpSpec, TensorArg, Variant
from hdispatch.testing import null

NAME = "sequence_scale"
K = 64
EDGES = (1, 4, 16)
#: Every bucket's edge, and its neighbours.
ROWS = sorted({max(1, edge + by) for edge in EDGES for by in (-1, 0, 1)} | {40})


def reference(out, x, bias, factor, repeat, gate=None):
    """The fallback's result is the negative of the function's: it shows who wrote."""
    out.copy_(-(x.float() * factor * repeat + bias.float()) - (0 if gate is None else gate.float()))


def sample(variant: Variant, sizes: dict[str, int], device: torch.device, generator: torch.Generator) -> list[Any]:
    m, k = sizes["M"], sizes["K"]
    x, bias = torch.randn(m, k, generator=generator, device=device), torch.randn(k, generator=generator, device=device)
    return [torch.empty(m, k, device=device), x, bias, 0.5, 3, None if "gate" in variant.none else x.clone()]


SPEC = OpSpec(
    name=NAME,
    args=(
        TensorArg("out", ("M", "K"), (torch.float32,), mutated=True, layout="rows"),
        TensorArg("x", ("M", "K"), (torch.float32,), layout="rows"),
        TensorArg("bias", ("K",), (torch.float32,)),
        FloatArg("factor"),
        IntArg("repeat", minimum=1),
        TensorArg("gate", ("M", "K"), (torch.float32,), optional=True, layout="rows"),
    ),
    reference=reference,
    sample=sample,
    shapes=({"K": K},),
    config_key={"hidden_size": "K", "num_tokens": "M"},
    ladder=EDGES,
)
OP = hdispatch.ops.define(SPEC) if NAME not in hdispatch.ops.names() else hdispatch.ops.get(NAME)
PLAIN, GATED = (variant.name for variant in sorted(SPEC.variants(), key=lambda v: not v.none))

SOURCE = r"""
#include <unistd.h>
using tvm::ffi::TensorView;

void scale(TensorView out, TensorView x, TensorView bias, double factor, int64_t repeat, tvm::ffi::Optional<TensorView> gate) {
  const float *from = static_cast<const float*>(x.data_ptr()), *add = static_cast<const float*>(bias.data_ptr());
  float* to = static_cast<float*>(out.data_ptr());
  for (int64_t i = 0; i < x.size(0); ++i)
    for (int64_t j = 0; j < x.size(1); ++j) {
      float more = 0;
      if (gate.has_value()) more = static_cast<const float*>(gate.value().data_ptr())[i * gate.value().stride(0) + j];
      to[i * out.stride(0) + j] = from[i * x.stride(0) + j] * float(factor) * float(repeat) + add[j] + more;
    }
}

void nap() { usleep(300000); }
void raise_it() { TVM_FFI_THROW(ValueError) << "unlucky"; }
"""


@pytest.fixture(scope="module")
def module() -> Any:
    cpp = pytest.importorskip("tvm_ffi.cpp", reason="needs apache-tvm-ffi: pip install 'hdispatch[ffi]'")
    return cpp.load_inline("hdispatch_test_sequence", cpp_sources=SOURCE, functions=["scale", "nap", "raise_it"])


@pytest.fixture(autouse=True)
def nothing_serves() -> Iterator[None]:
    def clear() -> None:
        for each in hdispatch.registered():
            each.unregister()
        for bundle in hdispatch.loaded():
            bundle.unload()
        hdispatch.stats(reset=True)

    clear()
    yield
    clear()


@pytest.fixture
def served(module: Any) -> list[hdispatch.Registration]:
    """Every call of the op is served by the function."""
    return [hdispatch.register(OP, Key(variant), module.scale, driver="null") for variant in (PLAIN, GATED)]


def stats(name: str) -> dict[str, Any]:
    return hdispatch.stats()[name]


def random(*sizes: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed + sum(sizes)))


def poisoned(*sizes: int) -> torch.Tensor:
    return torch.full(sizes, float("nan"))


#: A block of a model: (step, what it calls) where a step writes one name and reads others.
WEIGHTS = [random(K, seed=i) for i in range(4)]


def block(name: str, **options: Any) -> Any:
    """Three buffers wide, rows of half of one, a gate, an integer of the call, in and out slots."""
    s = Sequence(name, **options)
    x, out = s.slot("x", ("M", K), torch.float32), s.slot("out", ("M", K), torch.float32, written=True)
    repeat = s.int_slot("repeat")
    wide, a, b = s.temp(("M", 2 * K), torch.float32), s.temp(("M", K), torch.float32), s.temp(("M", K), torch.float32)
    s.add(OP, wide.columns(0, K), x, WEIGHTS[0], 0.5, 1)
    s.add(OP, wide.columns(K, 2 * K), x, WEIGHTS[1], 2.0, repeat)
    s.add(OP, a, wide.columns(K, 2 * K), WEIGHTS[2], 1.5, repeat, wide.columns(0, K))
    s.add(OP, b, a, WEIGHTS[3], 0.25, 2)
    s.add(OP, out, b, gate=a, repeat=3, factor=1.0, bias=WEIGHTS[0])
    return s.freeze()


def block_one_by_one(x: torch.Tensor, out: torch.Tensor, repeat: int, op: Callable[..., None] = OP) -> None:
    m = x.size(0)
    wide, a, b = poisoned(m, 2 * K), poisoned(m, K), poisoned(m, K)
    op(wide[:, :K], x, WEIGHTS[0], 0.5, 1, None)
    op(wide[:, K:], x, WEIGHTS[1], 2.0, repeat, None)
    op(a, wide[:, K:], WEIGHTS[2], 1.5, repeat, wide[:, :K])
    op(b, a, WEIGHTS[3], 0.25, 2, None)
    op(out, b, WEIGHTS[0], 1.0, 3, a)


def check(sequence: Any, m: int, repeat: int = 2, seed: int = 0) -> torch.Tensor:
    """A call against the same ops one by one, from poisoned outputs; returns the result."""
    x, out, expected = random(m, K, seed=seed), poisoned(m, K), poisoned(m, K)
    sequence(x, out, repeat)
    block_one_by_one(x, expected, repeat)
    assert torch.equal(out, expected)
    return out


# ---- right ----


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


def test_one_step_without_a_row(module):
    """The gated variant has no row: what the others have is launched, one by one."""
    hdispatch.register(OP, Key(PLAIN), module.scale, driver="null")
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


def test_strided_and_misaligned_slots(module):
    """Strides are part of what a plan is for; a guard that fails sends the call to single ops."""
    args = [
        FfiArg(kind="tensor", arg="out", align=4),
        FfiArg(kind="tensor", arg="x", align=16),
        *(FfiArg(kind="tensor", arg="bias"), FfiArg(kind="float", arg="factor")),
        *(FfiArg(kind="int", value=["repeat"]), FfiArg(kind="none")),
    ]
    hdispatch.register(OP, Key(PLAIN), module.scale, driver="null", args=args)
    hdispatch.register(OP, Key(GATED), module.scale, driver="null")
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


def test_tables_change_between_calls(served, module):
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
        hdispatch.register(OP, Key(variant), module.scale, driver="null")
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


# ---- foreign steps ----


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


def test_errors_of_steps_name_them(served, module):
    s = Sequence("failing")
    x, index = s.slot("x", ("M", K), torch.float32), s.slot("index", None, torch.int64)
    a = s.temp(("M", K), torch.float32)
    s.add(OP, a, x, WEIGHTS[0], 1.0, 1)
    s.add_torch(torch.ops.aten.index_select.out, x, 0, index, out=a)
    sequence = s.freeze()
    with pytest.raises(hdispatch.FunctionError, match=r"sequence failing, step 1 \(aten::index_select\): .*ndex out of"):
        sequence(random(3, K), torch.tensor([0, 1, 99]))
    sequence(random(3, K), torch.tensor([0, 1, 2]))
    hdispatch.register(OP, Key(PLAIN), module.raise_it, args=[], driver="null", stream="none", label="bad")
    with pytest.raises(hdispatch.FunctionError, match=rf"sequence failing, step 0 \({NAME}\): bad.*ValueError: unlucky"):
        sequence(random(3, K), torch.tensor([0, 1, 2]))


# ---- refused ----


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


def test_strict_names_the_step_and_launches_nothing(module):
    hdispatch.register(OP, Key(PLAIN), module.scale, driver="null")
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


# ---- threads, processes, locks ----


def test_threads_have_arenas_of_their_own(served):
    sequence = block("threads")
    faults: list[str] = []

    def work(seed: int) -> None:
        try:
            for i in range(150):
                check(sequence, 1 + (i + seed) % 7, 1 + i % 3, seed)
        except BaseException as error:
            faults.append(repr(error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert stats("threads") == {"hits": 600, "empty": 0, "fallbacks": 0, "misses": {}}


def test_tables_change_while_threads_call(served, module):
    sequence = block("swapped")
    stop = threading.Event()
    faults: list[str] = []

    def work(seed: int) -> None:
        x, out, twice = random(3, K, seed=seed), poisoned(3, K), poisoned(3, K)
        block_one_by_one(x, twice, 2)
        try:
            while not stop.is_set():
                sequence(x, out, 2)
                if not torch.equal(out, twice):
                    raise AssertionError("another result")
        except BaseException as error:
            faults.append(repr(error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(40):
        hdispatch.register(OP, Key(PLAIN), module.scale, driver="null").unregister()
        time.sleep(0.002)
    stop.set()
    for thread in threads:
        thread.join()
    assert not faults


def test_the_lock_is_given_away(module):
    for variant in (PLAIN, GATED):
        hdispatch.register(OP, Key(variant), module.nap, args=[], stream="none", driver="null")
    sequence = block("nap")
    ticks, stop = 0, threading.Event()

    def count() -> None:
        nonlocal ticks
        while not stop.is_set():
            time.sleep(0.005)
            ticks += 1

    thread = threading.Thread(target=count)
    thread.start()
    before = ticks
    sequence(random(1, K), poisoned(1, K), 1)  # 5 naps of 0.3 s
    during = ticks - before
    stop.set()
    thread.join()
    assert during > 60


def test_a_forked_child_goes_on(served):
    sequence = block("forked")
    check(sequence, 4)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            check(sequence, 4)
            check(sequence, 5)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def test_modes_see_every_op(served):
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    sequence = block("modes")
    x, out, expected = random(4, K), poisoned(4, K), poisoned(4, K)
    with Mode():
        sequence(x, out, 2)
    block_one_by_one(x, expected, 2)
    assert torch.equal(out, expected)
    assert seen.count(f"hdispatch.{NAME}.default") == 5
    assert stats("modes")["misses"] == {}


def test_versions_of_what_is_written(served):
    sequence = block("versions")
    x, out = random(4, K), poisoned(4, K)
    before = x._version, out._version
    sequence(x, out, 2)
    assert x._version == before[0]
    assert out._version > before[1]


def test_arenas(served):
    shared = hdispatch.Arena()
    small, large = block("small", arena=shared, max_rows=2), block("large", arena=shared, max_rows=64)
    assert shared.nbytes == 0
    check(small, 2)
    assert small.arena_bytes <= shared.nbytes < 2 * small.arena_bytes + 1024
    check(large, 2)
    grown = shared.nbytes
    assert grown >= large.arena_bytes
    check(small, 2)
    check(large, 60)
    assert shared.nbytes == grown


def test_an_arena_of_given_memory(served):
    """All streams, and threads, have it; too little of it, or what is no whole allocation, is an error."""
    small = block("in given memory", max_rows=4)
    wanted = small.arena_bytes + 256
    memory = torch.full((wanted,), 255, dtype=torch.uint8)
    arena = hdispatch.Arena(memory)
    assert arena.nbytes == wanted
    check(block("in given memory", arena=arena, max_rows=4), 4)
    assert not memory.eq(255).all()
    short = block("in too little", arena=hdispatch.Arena(memory[:-1]), max_rows=4)
    with pytest.raises(ArgumentError, match=f"memory has {wanted - 1} bytes; the sequence takes {wanted}, arena_by"):
        check(short, 1)
    for wrong, reason in (
        (memory[1:], "from element 1 of its storage on; it takes all of a contiguous uint8 tensor"),
        (memory.view(torch.int8), "is CPUCharType of 1 dimensions"),
        (memory.view(-1, 1), "of 2 dimensions"),
        (64, "is a int; it takes a torch.Tensor or None"),
    ):
        with pytest.raises(ArgumentError, match=reason):
            hdispatch.Arena(wrong)


def test_many_layouts_are_forgotten(served):
    sequence = block("many")
    for m in range(1, 90):
        check(sequence, m)
    for m in range(1, 90):
        check(sequence, m)


# ---- the null driver ----


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

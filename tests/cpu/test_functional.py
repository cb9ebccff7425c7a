"""Ops that return tensors: declared, built of host functions that allocate, served by both doors, refused."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hdispatch
import pytest
import torch
from hdispatch import HdispatchError
from hdispatch.bundle_reader import read_bundle
from hdispatch.compile import build
from hdispatch.opspec import OpSpec, TensorArg
from hdispatch.testing import null
from in_worker import InWorker
from returned_rows.spec import SPEC
from returned_square.spec import SPEC as SQUARE

NAMES = (SPEC.name, SQUARE.name)
for _spec in (SPEC, SQUARE):
    if _spec.name not in hdispatch.registry.names():
        hdispatch.registry.define(_spec)
OP, SQUARE_OP = hdispatch.ops.returned_rows, hdispatch.ops.returned_square


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("functional")
    build(NAMES, "h200", out / "bundle", cache=out / "cache", extra=NAMES, jobs=1)
    return out / "bundle"


def call(m: int, k: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(m, k).to(dtype), torch.randn(m)


def pointers(launch: dict[str, Any]) -> list[int]:
    """The parameters of a launch as addresses."""
    return [int.from_bytes(param, "little") for param in launch["params"]]


# ---- declared ----


def test_what_it_says_of_itself():
    assert OP.schema == "returned_rows(Tensor x, Tensor scale) -> (Tensor, Tensor)"
    assert OP.out.schema == "returned_rows.out(Tensor x, Tensor scale, Tensor(a!) out, Tensor(b!) total) -> ()"
    assert SQUARE_OP.schema == "returned_square(Tensor x) -> Tensor"
    assert OP.__doc__.startswith("returned_rows(Tensor x, Tensor scale) -> (Tensor, Tensor)")
    signature = inspect.signature(OP)
    assert list(signature.parameters) == ["x", "scale", "out", "total"]
    assert signature.return_annotation == tuple[torch.Tensor, torch.Tensor]
    assert signature.parameters["out"].default is None
    assert inspect.signature(SQUARE_OP).return_annotation is torch.Tensor
    assert pickle.loads(pickle.dumps(OP)) is OP
    assert copy.deepcopy(OP) is OP


def spec_of(*args: TensorArg) -> OpSpec:
    return dataclasses.replace(SPEC, name="refused", args=args, ladder=(1,))


X = TensorArg("x", ("M", "K"), (torch.float32,))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((X, TensorArg("out", ("M", "K"), "x", returned=True)), "it takes mutated=True"),
        ((X, TensorArg("out", ("M", "K"), "x", mutated=True, returned=True, layout="rows")), "the layout 'contiguous'"),
        ((X, TensorArg("out", ("M", "K"), "x", mutated=True, returned=True, optional=True)), "neither optional"),
        ((X, TensorArg("out", ("M", "*"), "x", mutated=True, returned=True)), "its dimensions are symbols and numbers"),
        (
            (X, TensorArg("out", ("M", "K"), (torch.float32, torch.float16), mutated=True, returned=True)),
            "it takes one dtype, or the name of an argument",
        ),
        ((X, TensorArg("out", ("M", "K"), "x", mutated=True, zeroed=True)), "is zeroed; only what the op allocates is"),
        ((TensorArg("out", ("M", "K"), "x", mutated=True, returned=True), X), "they come behind all other arguments"),
        ((X, TensorArg("out", ("M", "N"), "x", mutated=True, returned=True)), "no required argument carries N plainly"),
    ],
)
def test_declarations_that_are_refused(args, words):
    with pytest.raises(HdispatchError, match=words):
        spec_of(*args)


# ---- served ----


@pytest.fixture
def loaded(folder) -> Iterator[hdispatch.Bundle]:
    bundle = hdispatch.load(folder, driver="null")
    hdispatch.stats(reset=True)
    yield bundle
    bundle.unload()


@pytest.mark.parametrize("m", [1, 3, 16, 17, 64])
@pytest.mark.parametrize("k", [256, 1008])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_gets_what_is_allocated_and_it_is_returned(loaded, m, k, dtype):
    x, scale = call(m, k, dtype)
    with hdispatch.strict(), null.recording():
        doors = [OP(x, scale), torch.ops.hdispatch.returned_rows(x, scale), torch.ops.hdispatch.returned_rows.default(x, scale)]
        doors += [OP(x=x, scale=scale), OP(scale=scale, x=x)]
        launches = null.launches()
    assert len(launches) == len(doors)
    for (out, total), launch in zip(doors, launches, strict=True):
        assert (out.shape, out.dtype, out.is_contiguous(), out.requires_grad) == ((m, k), dtype, True, False)
        assert (total.shape, total.dtype, int(total.abs().sum())) == (((k + 63) // 64,), torch.int32, 0)
        assert pointers(launch)[:4] == [x.data_ptr(), scale.data_ptr(), out.data_ptr(), total.data_ptr()]
    assert len({out.data_ptr() for out, _ in doors}) == len(doors), "each call's are its own"
    assert hdispatch.stats()["returned_rows"]["hits"] == len(doors)


def test_a_helion_kernel_that_returns_its_result(loaded):
    x = torch.randn(5, 256).half()
    with hdispatch.strict(), null.recording():
        out = SQUARE_OP(x)
        (launch,) = null.launches()
    assert (out.shape, out.dtype) == (x.shape, x.dtype)
    assert sorted(pointers(launch)[:2]) == sorted([x.data_ptr(), out.data_ptr()])


def test_tensors_may_be_given(loaded):
    x, scale = call(4, 256)
    out, total = torch.empty(4, 256), torch.zeros(4, dtype=torch.int32)
    with hdispatch.strict(), null.recording():
        assert [each.data_ptr() for each in OP(x, scale, out, total)] == [out.data_ptr(), total.data_ptr()]
        assert OP(x, scale, out=out, total=total)[0] is out
        assert torch.ops.hdispatch.returned_rows.out(x, scale, out, total) is None
        assert {pointers(launch)[2] for launch in null.launches()} == {out.data_ptr()}
    with pytest.raises(hdispatch.ArgumentError, match="give all of the tensors that it returns, or none"):
        OP(x, scale, out=out)


@pytest.mark.parametrize("shape", [(7, 256), (1, 7, 256), (7, 1, 256)])
def test_merged_dimensions(loaded, shape):
    x, scale = torch.randn(shape), torch.randn(7)
    with hdispatch.strict(), null.recording():
        assert OP(x, scale)[0].shape == (7, 256)


def test_rows_with_a_stride_and_without_rows(loaded):
    x, scale = torch.randn(5, 512)[:, :256], torch.randn(5)
    with hdispatch.strict(), null.recording():
        out, _ = OP(x, scale)
        assert out.stride() == (256, 1)
    out, total = OP(torch.empty(0, 256), torch.empty(0))
    assert (out.shape, total.tolist()) == ((0, 256), [0] * 4)


def test_the_fallback_writes_what_is_returned():
    x, scale = call(3, 320)
    for out, total in (OP(x, scale), torch.ops.hdispatch.returned_rows.default(x, scale)):
        torch.testing.assert_close(out, x * scale[:, None])
        assert total.tolist() == [3] * 5
    torch.testing.assert_close(SQUARE_OP(x.half()), (x.half().float() ** 2).half())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.ones(3, 4), torch.ones(4)), "scale has size(0) = 4; it takes 3"),
        ((torch.ones(3, 4).int(), torch.ones(3)), "x has dtype int32"),
        ((torch.ones(3), torch.ones(3)), "x has rank 1"),
        ((torch.ones(3, 4), torch.ones(3).double()), "scale has dtype float64"),
        ((torch.ones(3, 4), 1.0), "scale is a float; it takes a tensor"),
        ((torch.ones(3, 4), None), "scale is None"),
        ((torch.ones(3, 4),), 'argument "scale" is missing'),
    ],
)
def test_wrong_calls_are_refused_in_the_words_of_the_op(arguments, words):
    with pytest.raises(hdispatch.ArgumentError) as refused:
        OP(*arguments)
    assert words in str(refused.value)


def test_gradients_are_refused():
    x, scale = call(3, 256)
    with pytest.raises(hdispatch.ArgumentError, match="x requires grad and grad mode is on"):
        OP(x.requires_grad_(), scale)
    with pytest.raises(Exception, match="x requires grad and grad mode is on"):
        torch.ops.hdispatch.returned_rows.default(x, scale)
    with torch.no_grad():
        assert not OP(x, scale)[0].requires_grad


def test_inference_mode_and_references():
    import sys

    x, scale = call(3, 256)
    with torch.inference_mode():
        assert OP(x, scale)[0].is_inference()
    before = sys.getrefcount(x)
    for _ in range(100):
        out, _ = OP(x, scale)
        with pytest.raises(hdispatch.ArgumentError):
            OP(x, x)
    assert sys.getrefcount(x) == before
    assert sys.getrefcount(out) == 2


def test_deterministic_mode_fills_what_no_kernel_wrote(loaded):
    torch.use_deterministic_algorithms(True)
    try:
        with null.recording():
            assert OP(*call(3, 256))[0].isnan().all()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("m", [0, 1, 16])
def test_what_is_returned_is_a_tensor_as_torch_makes_them(loaded, m):
    x = torch.randn(m, 256).half()
    SQUARE_OP(x)  # torch makes a device's first
    got, want = SQUARE_OP(x), torch.empty_like(x)
    for fact in ("shape", "dtype", "device", "layout", "requires_grad", "is_leaf", "grad_fn"):
        assert getattr(got, fact) == getattr(want, fact)
    assert (got.stride(), got.is_contiguous(), got.storage_offset()) == (want.stride(), True, 0)
    assert got.untyped_storage().nbytes() == want.untyped_storage().nbytes() == 2 * got.numel()
    assert got.data_ptr() % 64 == 0
    assert torch.equal(copy.deepcopy(got.fill_(3)), want.fill_(3))
    assert got.resize_(32, 256).fill_(1).sum() == 32 * 256, "its storage can grow"


def test_dropped_results_are_freed(loaded):
    from torch.profiler import ProfilerActivity, profile

    x = torch.randn(16, 256).half()
    SQUARE_OP(x)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        for _ in range(10):
            SQUARE_OP(x)
    assert sum(event.self_device_memory_usage + event.self_cpu_memory_usage for event in seen.events()) == 0
    assert any(event.name == "[memory]" for event in seen.events())


def test_the_cost_of_a_result_by_stage():
    like = torch.empty(16, 256)
    for stage in ("allocator", "tensor", "wrapped"):
        assert 0 < hdispatch._C.bench_empty_ns(like, stage, 100) < 1e6
    with pytest.raises(hdispatch.ArgumentError, match="stage: all; give nothing, allocator, tensor or wrapped"):
        hdispatch._C.bench_empty_ns(like, "all", 1)


def test_explained(loaded):
    said = hdispatch.explain(OP, *call(3, 256))
    assert "returned_rows" in said
    assert "M=3" in said.replace(" ", "")
    assert hdispatch.explain(OP, *call(3, 256), torch.empty(3, 256), torch.empty(4, dtype=torch.int32)) == said
    assert hdispatch.stats()["returned_rows"]["hits"] == 0
    names = list(inspect.signature(OP).parameters)
    results = torch.empty(3, 256), torch.empty(4, dtype=torch.int32)
    by_name = dict(zip(names, (*call(3, 256), *results), strict=True))
    for given in (dict(list(by_name.items())[: len(call(3, 256))]), by_name):
        assert hdispatch.explain(OP, **given) == said
        first = names[0]
        assert hdispatch.explain(OP, given[first], **{name: each for name, each in given.items() if name != first}) == said


def test_in_a_sequence_it_takes_what_it_returns(loaded):
    sequence = hdispatch.Sequence("returning")
    x, scale = sequence.slot("x", ("M", 256), torch.float32), sequence.slot("scale", ("M",), torch.float32)
    out, total = sequence.slot("out", ("M", 256), torch.float32, written=True), sequence.temp((4,), torch.int32)
    sequence.add(OP, x, scale, out, total, by_rows=False)
    returning = sequence.freeze()
    given, factor = call(3, 256)
    result = torch.empty(3, 256)
    with null.recording(), hdispatch.strict():
        returning(given, factor, result)
        (launch,) = null.launches()
    assert pointers(launch)[2] == result.data_ptr()


# ---- traced by torch ----


def test_fake_and_meta_tensors_have_the_shapes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        out, total = OP(torch.empty(6, 200, dtype=torch.bfloat16), torch.empty(6))
        assert (out.shape, out.dtype, total.shape, total.dtype) == ((6, 200), torch.bfloat16, (4,), torch.int32)
    out, _ = torch.ops.hdispatch.returned_rows(torch.empty(6, 200, device="meta"), torch.empty(6, device="meta"))
    assert (out.shape, out.device.type) == ((6, 200), "meta")
    with pytest.raises(Exception, match="scale"):
        torch.ops.hdispatch.returned_rows(torch.empty(6, 200, device="meta"), torch.empty(5, device="meta"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole(dynamic):
    def f(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        out, total = OP(x * 2, scale)
        return out.sum(1) + total[0]

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for m in (3, 5):
        x, scale = call(m, 256)
        torch.testing.assert_close(compiled(x, scale), f(x, scale))


def test_opcheck():
    x, scale = call(3, 256)
    torch.library.opcheck(torch.ops.hdispatch.returned_rows.default, (x, scale))


# ---- traced by the build ----


@pytest.fixture(scope="module")
def worker() -> Iterator[InWorker]:
    process = InWorker()
    yield process
    process.close()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("good", ""),
        ("one", "returns ['Tensor']; the op returns ['out', 'total']"),
        ("nothing", "returns ['NoneType']"),
        ("an_argument", "returns out, which it does not allocate"),
        ("zeros", "allocates out with zeros; the op says zeroed=False"),
        ("no_zeros", "allocates total with no zeros; the op says zeroed=True"),
        ("another_dtype", "returns out of torch.int8; the op declares torch.bfloat16"),
        ("another_rank", "returns out of rank 1; the op declares 2"),
        ("another_width", "returns out with the sizes (s29, 128); the op declares (s29, 256)"),
        ("a_part", "returns out with the sizes (s29, 128)"),
        ("computed", "the host function runs aten.add"),
        ("kept", "allocates a tensor for the kernel that it does not return"),
    ],
)
def test_what_host_functions_return(worker, name, words):
    said = worker.call("returned_hosts:problem", name, None)
    assert said.startswith("ok") if not words else words in said


def test_what_a_concrete_call_alone_can_tell(worker):
    assert worker.call("returned_hosts:problem", "longer_beyond_100", 64) == "ok"
    said = worker.call("returned_hosts:problem", "longer_beyond_100", 128)
    assert "returns out with the sizes (129, 256); the op declares (128, 256)" in said
    assert "returns out with the strides" in worker.call("returned_hosts:problem", "transposed", 64)


def test_records_say_where_the_result_is(folder):
    manifest, _ = read_bundle(folder)
    assert manifest["ops"]["returned_rows"]["schema"] == OP.out.schema
    for record in manifest["records"]:
        names = [param["arg"] for param in record["params"] if param["kind"] == "ptr"]
        assert sorted(names) in (["out", "scale", "total", "x"], ["out", "x"])
        assert not [guard for guard in record["guards"] if "stride" in guard["text"] and "!=" in guard["text"]], (
            "rows of any stride are served"
        )

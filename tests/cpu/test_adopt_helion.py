"""hdispatch.adopt of Helion kernels: the launch is Helion's own, whatever M, and what cannot be a record is Helion's."""

from __future__ import annotations

import importlib.util
import math
import random
import re
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import adopted_aot
import adopted_helion as kernels
import adopted_kernels
import hdispatch
import helion
import helion_stub
import pytest
import torch
import triton_stub
from hdispatch.adopted import helion_record
from hdispatch.testing import host_timer, null

from benchmarks import adopt


@pytest.fixture(scope="module")
def stub() -> Iterator[triton_stub.Stub]:
    with triton_stub.installed() as made, helion_stub.on_h100():
        yield made


@pytest.fixture(autouse=True)
def left_alone(stub: triton_stub.Stub) -> Iterator[None]:
    hdispatch.stats(reset=True)
    yield
    hdispatch.unadopt()


def launched(call: Callable[[], Any]) -> tuple[Any, list[dict[str, Any]]]:
    """What a call returned, and its launches from C++."""
    with null.recording():
        return call(), null.launches()


def counts(kernel: Any) -> dict[str, Any]:
    return hdispatch.stats()[f"adopted {kernel.fn.__module__}.{kernel.fn.__qualname__}"]


def tensors(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [each for each in value if isinstance(each, torch.Tensor)]


def storages(value: Any) -> dict[int, int]:
    """Addresses of results; of one memory the last."""
    return {each.untyped_storage().data_ptr(): i for i, each in enumerate(tensors(value))}


def geometry(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device, tensor.requires_grad


def same(stub: triton_stub.Stub, kernel: Any, args: tuple[Any, ...]) -> bool:
    """Whether C++ made the call; if so, that it launched what Helion does, and returned what it does."""
    hits = counts(kernel)["hits"]
    got, launches = launched(lambda: kernel(*args))
    if counts(kernel)["hits"] == hits:
        return False
    hdispatch.unadopt()
    stub.expect(["i8"] * (len(launches[0]["params"]) - 2))
    before = stub.launches
    wanted = kernel(*args)
    assert stub.launches == before + 1
    hdispatch.adopt(kernel, driver="null")
    last = stub.last()
    assert (launches[0]["grid"], launches[0]["block"], launches[0]["shared"]) == (last.grid, last.block, last.shared)
    assert type(got) is type(wanted)
    known = storages(got)
    # Parameters bit by bit, but for the addresses of what each of them allocated.
    stub.expect([{8: "i64", 4: "i32", 1: "i8"}[len(param)] for param in launches[0]["params"][:-2]])
    hdispatch.unadopt()
    wanted = kernel(*args)
    hdispatch.adopt(kernel, driver="null")
    theirs = storages(wanted)
    for ours, other in zip(launches[0]["params"], stub.last().params, strict=True):
        mine, his = (int.from_bytes(param, "little") for param in (ours, other))
        assert mine == his or known[mine] == theirs[his], (args, mine, his)
    for ours, other in zip(tensors(got), tensors(wanted), strict=True):
        assert geometry(ours) == geometry(other)
        assert ours._is_view() == other._is_view()
    return True


def adopted(kernel: Any) -> Any:
    return hdispatch.adopt(kernel, driver="null")


def warm(kernel: Any, make: Callable[[int], tuple[Any, ...]]) -> None:
    """One M of each kind that Triton compiles for: the launch of each is then known."""
    for m in (7, 7, 16, 16, 33):
        kernel(*make(m))


OPEN: dict[str, Callable[[int], tuple[Any, ...]]] = {
    "add": lambda m: (torch.zeros(m, 64), torch.zeros(m, 64)),
    "specialized": lambda m: (torch.zeros(m, 64), 2.5),
    "in_place": lambda m: (torch.zeros(m, 48),),
    "flattened": lambda m: (torch.zeros(3, m, 48),),
    "zeros": lambda m: (torch.zeros(m, 64),),
    "filled": lambda m: (torch.zeros(m, 64),),
    "returns_a_view": lambda m: (torch.zeros(m, 64),),
    "returns_views": lambda m: (torch.zeros(m, 64),),
    "listed": lambda m: (torch.zeros(m, 64), [64], ("twice", 2.0)),
    "transposed": lambda m: (torch.zeros(m, 32), torch.zeros(48, 32).t()),
}


@pytest.mark.parametrize("name", list(OPEN))
def test_an_m_never_seen_is_served(stub, name):
    kernel, rng = adopted(getattr(kernels, name)), random.Random(name)
    warm(kernel, OPEN[name])
    for m in [rng.randrange(2, 3000) for _ in range(30)] + [17, 48, 65537]:
        assert same(stub, kernel, OPEN[name](m)), (m, counts(kernel))


def test_one_row_is_a_kind_of_its_own(stub):
    kernel = adopted(kernels.add)
    warm(kernel, OPEN["add"])
    for _ in range(3):
        kernel(*OPEN["add"](1))
    assert same(stub, kernel, OPEN["add"](1))
    assert same(stub, kernel, OPEN["add"](5))


def test_other_columns_of_a_specialized_kernel_are_a_kind_of_their_own(stub):
    kernel = adopted(kernels.specialized)
    warm(kernel, lambda m: (torch.zeros(m, 64), 2.5))
    warm(kernel, lambda m: (torch.zeros(m, 128), 2.5))
    for columns in (64, 128, 64):
        assert same(stub, kernel, (torch.zeros(77, columns), 2.5))


def test_static_shapes_are_served_shape_by_shape(stub):
    kernel = adopted(kernels.static)
    for m in (7, 16):
        for _ in range(3):
            kernel(torch.zeros(m, 64))
    assert same(stub, kernel, (torch.zeros(7, 64),))
    assert same(stub, kernel, (torch.zeros(16, 64),))
    assert not same(stub, kernel, (torch.zeros(8, 64),))


def test_strided_tensors_are_served_shape_by_shape(stub):
    kernel = adopted(kernels.add)
    x, y = torch.zeros(20, 128), torch.zeros(20, 128)
    for _ in range(3):
        kernel(x[:, :64], y[:, :64])
    assert same(stub, kernel, (x[:, :64], y[:, :64]))


def test_results_are_filled_and_views_share_memory(stub):
    kernel, other = adopted(kernels.filled), adopted(kernels.returns_views)
    for each in (kernel, other):
        warm(each, lambda m: (torch.zeros(m, 64),))
    hits = counts(kernel)["hits"]
    highest, count, out = kernel(torch.zeros(21, 64))  # nothing runs: they are what the host function made them
    assert counts(kernel)["hits"] == hits + 1
    assert highest.tolist() == [float("-inf")] * 21
    assert count.tolist() == [1] * 21
    assert out.dtype == torch.float32
    hits = counts(other)["hits"]
    pairs, tail, whole = other(torch.zeros(21, 64))
    assert counts(other)["hits"] == hits + 1
    whole.copy_(torch.arange(21 * 64).view(21, 64))
    assert pairs.flatten().tolist() == list(range(21 * 64))
    assert tail.storage_offset() == 1
    assert pairs._base is not None
    assert not pairs.requires_grad


def test_results_are_tensors_as_torch_makes_them(stub):
    kernel, other = adopted(kernels.add), adopted(kernels.transposed)
    warm(kernel, OPEN["add"])
    warm(other, OPEN["transposed"])
    for each, args in ((kernel, OPEN["add"](21)), (other, OPEN["transposed"](21))):
        hits = counts(each)["hits"]
        got = each(*args)
        assert counts(each)["hits"] == hits + 1
        want = torch.empty_strided(got.shape, got.stride(), dtype=got.dtype)
        assert got.untyped_storage().nbytes() == want.untyped_storage().nbytes()
        assert (got.is_contiguous(), got.requires_grad, got.is_inference()) == (want.is_contiguous(), False, False)
        with torch.inference_mode():
            assert each(*args).is_inference()
        torch.use_deterministic_algorithms(True)
        try:
            assert each(*args).isnan().all(), "torch wants new memory filled, and no kernel ran"
        finally:
            torch.use_deterministic_algorithms(False)


def test_aot_kernels_are_served_shape_by_shape(stub):
    kernel = adopted(kernels.aot)
    for m in (7, 16, 7, 16, 7, 16):
        kernel(torch.zeros(m, 64))
    assert same(stub, kernel, (torch.zeros(7, 64),))
    assert same(stub, kernel, (torch.zeros(16, 64),))
    assert "calls of one shape: it is an AOT kernel without heuristics for this GPU" in hdispatch.explain(kernel)


def test_aot_kernels_with_heuristics_are_served_at_ms_never_seen(stub):
    kernel = adopted(adopted_aot.tuned)
    make = lambda m: (torch.zeros(m, 64),)  # noqa: E731
    warm(kernel, make)
    for m in (112, 128, 129):  # of the other configuration
        kernel(*make(m))
        kernel(*make(m))
    asked = kernel._key_fn._load_key_function().__globals__
    for m in (5, 100, 101, 99, 3000, 48, 160):
        assert same(stub, kernel, make(m)), (m, counts(kernel))
        before = asked["asked"]
        for _ in range(3):  # of a shape that is known, nothing is asked
            hits = counts(kernel)["hits"]
            kernel(*make(m))
            assert (asked["asked"], counts(kernel)["hits"]) == (before, hits + 1)
    with null.recording():
        for m in (5, 100, 101):
            kernel(*make(m))
        assert [launch["grid"][0] for launch in null.launches()] == [1 * 2, 4 * 2, 13]
    assert hdispatch.explain(kernel).splitlines() == ["adopted, 2 key(s)", "served    any M", "served    any M"]


def test_what_a_key_function_raises_is_raised(stub, monkeypatch):
    kernel = adopted(adopted_aot.tuned)
    warm(kernel, lambda m: (torch.zeros(m, 64),))

    def refuse(*args: Any) -> int:
        raise ZeroDivisionError(args[0].shape)

    monkeypatch.setattr(kernel._key_fn, "_key_fn", refuse)
    with pytest.raises(ZeroDivisionError, match="61, 64"):
        kernel(torch.zeros(61, 64))
    kernel(torch.zeros(7, 64))


def test_a_choice_by_every_size_is_served_shape_by_shape(stub, monkeypatch):
    """As heuristics of some compilers' are; those of Triton's look at the device alone."""

    class OfSizes:
        fact = "input_tensor_metadata"

        def __call__(self, values: Any) -> Any:
            return tuple(each.shape for each in values)

    kernel = adopted(kernels.add)
    kernel.reset()
    kernel(*OPEN["add"](7))
    (bound,) = kernel._bound_kernels.values()
    monkeypatch.setattr(bound, "_compiler_seed_specialization_extractors", (OfSizes(),))
    hdispatch.unadopt()
    with pytest.raises(helion_record._Refused, match="by input_tensor_metadata"):
        helion_record._choice(bound, OPEN["add"](7))


def test_an_error_on_stand_ins_says_where_it_was_raised(stub, monkeypatch):
    def refuse(*_: Any) -> None:
        raise ValueError("no such stand-in")

    monkeypatch.setattr(helion_record, "_fake", refuse)
    known = kernels.in_place
    kernel = adopted(helion.Kernel(known.fn, configs=known.configs, settings=known.settings))
    kernel(torch.zeros(7, 64))
    said = hdispatch.explain(kernel)
    assert re.search(r"of one shape: ValueError: no such stand-in \(test_adopt_helion.py:\d+, refuse\)$", said, re.MULTILINE)


@pytest.mark.parametrize("name", ["reduces_after", "writes_after", "returns_another_dtype", "own_key"])
def test_what_cannot_be_a_record_is_helions_and_its_launch_is_served(stub, name):
    kernel = adopted(getattr(kernels, name))
    x = torch.zeros(7, 64)
    for turn in range(3):
        _, launches = launched(lambda: kernel(x))
        assert len(launches) == (turn == 2)
    reason = "key function" if name == "own_key" else "host function: it "
    assert any(each.startswith(reason) for each in counts(kernel)["misses"])
    assert counts(kernel)["hits"] == 0
    assert f"Helion's  {reason}" in hdispatch.explain(kernel)


def test_arguments_that_share_memory_are_helions(stub):
    kernel = adopted(kernels.add)
    warm(kernel, OPEN["add"])
    x = torch.zeros(7, 64)
    kernel(x, x)
    assert counts(kernel)["misses"]["arguments that share memory"] == 1


def test_keywords_are_helions_and_their_launches_are_served(stub):
    kernel = adopted(kernels.add)
    x, y = OPEN["add"](7)
    for turn in range(5):
        result, launches = launched(lambda: kernel(x, y=y))
        assert result.shape == x.shape
        assert turn < 2 or len(launches) == 1
    assert counts(kernel)["misses"]["keywords"] == 5
    x, y = OPEN["add"](9)  # of the same variant, and of the same key of Triton's
    assert len(launched(lambda: kernel(y=y, x=x))[1]) == 1


def test_other_orders_of_dimensions_are_kinds_of_their_own(stub):
    kernel = adopted(kernels.transposed)
    warm(kernel, OPEN["transposed"])
    warm(kernel, lambda m: (torch.zeros(m, 32), torch.zeros(32, 48)))
    for w in (torch.zeros(32, 48), torch.zeros(48, 32).t(), torch.zeros(64, 32).t(), torch.zeros(32, 64)):
        for m in (7, 99):
            assert same(stub, kernel, (torch.zeros(m, 32), w)), w.stride()
    assert not same(stub, kernel, (torch.zeros(7, 32), torch.zeros(48, 40).t()[:32]))


def test_other_lists_are_kinds_of_their_own(stub):
    kernel = adopted(kernels.listed)
    warm(kernel, OPEN["listed"])
    hits = counts(kernel)["hits"]
    kernel(torch.zeros(7, 64), [64], ("thrice", 2.0))
    assert counts(kernel)["hits"] == hits
    with pytest.raises(AssertionError):
        kernel(torch.zeros(7, 64), [65], ("twice", 2.0))


def test_other_dtypes_and_ranks_are_kinds_of_their_own(stub):
    kernel = adopted(kernels.add)
    warm(kernel, OPEN["add"])
    warm(kernel, lambda m: tuple(each.half() for each in OPEN["add"](m)))
    got = kernel(*(each.half() for each in OPEN["add"](99)))
    assert got.dtype == torch.float16
    assert same(stub, kernel, tuple(each.half() for each in OPEN["add"](99)))
    assert same(stub, kernel, OPEN["add"](99))


def test_floats_that_are_equal_and_not_the_same(stub):
    kernel = adopted(kernels.specialized)
    seen = {}
    for scale in (0.0, -0.0, float("nan"), float("-inf"), 2.5):
        warm(kernel, lambda m, scale=scale: (torch.zeros(m, 64), scale))
        _, launches = launched(lambda scale=scale: kernel(torch.zeros(99, 64), scale))
        assert len(launches) == 1, scale
        seen[repr(scale)] = [param for param in launches[0]["params"] if param == struct.pack("f", scale)]
    assert all(len(each) == 1 for each in seen.values()), seen
    hits = counts(kernel)["hits"]
    kernel(torch.zeros(99, 64), math.inf - math.inf)  # another NaN
    assert counts(kernel)["hits"] == hits + (struct.pack("d", math.inf - math.inf) == struct.pack("d", math.nan))


def test_keys_that_do_not_come_again_are_learnt_no_more(stub, monkeypatch):
    kernel = adopted(helion.kernel(kernels.specialized.fn, static_shapes=False, config=kernels.CONFIG_1D))
    x = torch.zeros(7, 64)
    with monkeypatch.context() as patched:
        patched.setattr(helion_record, "record", lambda *_args: "no record")
        for seed in range(300):
            kernel(x, seed / 7)
    assert counts(kernel)["misses"] == {"first call of a key": 256, "keys that do not come again": 44}
    assert len(launched(lambda: kernel(x, 299 / 7))[1]) == 1  # the launch is served all the same
    kernel(x, 1 / 7)  # one comes again: there is room for another
    for _ in range(2):
        kernel(x, 299 / 7)
    assert counts(kernel)["misses"]["no record"] == 1
    assert counts(kernel)["hits"] == 1


def test_another_default_dtype_is_a_kind_of_its_own(stub):
    kernel = adopted(kernels.filled)
    warm(kernel, OPEN["filled"])
    x = torch.zeros(99, 64)
    assert kernel(x)[0].dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert kernel(x)[0].dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(stub, kernel, (x,))


def test_two_threads_note_launches_in_turn(stub):
    """A launch of a thread that another one's recorder has replaced would be made: what is in place would be done twice."""
    kernel = adopted(kernels.in_place)
    kernel(torch.zeros(7, 48))
    host = next(iter(kernel._bound_kernels.values()))._run
    noted: list[Any] = []

    def note() -> None:
        with helion_record._recording(host) as launch:
            host(torch.zeros(7, 48))
        noted.append(launch.kernel)

    before = stub.launches
    other = threading.Thread(target=note)
    with helion_record._recording(host) as launch:
        other.start()
        other.join(0.1)
        host(torch.zeros(7, 48))
    other.join()
    assert stub.launches == before
    assert noted == [launch.kernel] == helion_record._functions(host)


def test_unadopting_a_kernel_gives_its_launches_back(stub):
    kernel = adopted(kernels.add)
    warm(kernel, OPEN["add"])
    hdispatch.unadopt(kernel)
    hits = hdispatch.stats()
    assert launched(lambda: kernel(*OPEN["add"](7)))[1] == []
    assert hdispatch.stats() == hits
    hdispatch.adopt(kernel)
    assert same(stub, kernel, OPEN["add"](99))


def test_adopted_again_it_learns_as_before(stub):
    kernel = adopted(kernels.add)
    for _ in range(2):
        kernel(*OPEN["add"](7))
    hdispatch.unadopt()
    hdispatch.adopt(kernel)
    assert len(launched(lambda: kernel(*OPEN["add"](7)))[1]) == 1
    make = lambda: tuple(each[:, 1:] for each in (torch.zeros(7, 65), torch.zeros(7, 65)))  # noqa: E731  not aligned
    for _ in range(3):
        kernel(*make())
    assert len(launched(lambda: kernel(*make()))[1]) == 1


@pytest.mark.parametrize("name", ["on_another_device", "with_grad"])
def test_results_that_torch_makes_otherwise_are_helions(stub, name):
    kernel = adopted(getattr(kernels, name))
    for m in (7, 7, 9):
        kernel(torch.zeros(m, 64))
    assert counts(kernel)["hits"] == 0
    assert any(each.startswith("host function: it allocates") for each in counts(kernel)["misses"]), counts(kernel)


def test_pinned_memory_and_large_fills_are_refused(stub):
    with helion_record._Outputs(), pytest.raises(helion_record._Refused, match="pinned"):
        torch.empty(1, pin_memory=True)
    with helion_record._Outputs(), pytest.raises(helion_record._Refused, match=f"fills with {2**63}, which 64 bits"):
        torch.full([1], 2**63, dtype=torch.uint64)


def test_unadopt_gives_the_call_back(stub):
    kernel = adopted(kernels.add)
    warm(kernel, OPEN["add"])
    hdispatch.unadopt()
    hits = counts(kernel)["hits"]
    kernel(*OPEN["add"](7))
    assert counts(kernel)["hits"] == hits
    hdispatch.adopt(kernel)
    kernel(*OPEN["add"](7))
    assert counts(kernel)["hits"] == hits + 1


def test_the_benchmark_measures_every_path(stub):
    hdispatch.stats(reset=True)  # the kernels are those of other tests too
    made = adopt.batches("cpu", "null", lambda: None)
    samples, failed = host_timer.interleave(made, 2, random.Random(0))
    assert not failed
    rows = adopt.summarize(samples, 700.0)
    assert {row["kernel"] for row in rows} == set(adopt.TARGETS)
    assert sum("verdict" in row for row in rows) == 3 + 2 * 3
    for kernel in (adopted_kernels.nop, adopted_kernels.nineteen, adopted_kernels.fifty_eight):
        stats = hdispatch.stats()[f"adopted {kernel.fn.__module__}.{kernel.fn.__qualname__}"]
        assert stats["misses"] == {"first call of a key": 1}


def test_the_example_is_served_at_every_m(stub, capsys):
    file = Path(__file__).parents[2] / "examples" / "adopt_helion.py"
    spec = importlib.util.spec_from_file_location("adopt_helion_example", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Helion looks its source up
    spec.loader.exec_module(module)
    vars(module.add).pop("_hdispatch_adopted")  # it was adopted for a GPU
    adopted(module.add)
    module.main("cpu")
    assert capsys.readouterr().out == "adopted, 1 key(s)\nserved    any M\n"
    assert counts(module.add)["misses"] == {"first call of a key": 3}  # Helion's, and two of Triton's

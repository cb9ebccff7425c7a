"""The two doors, `hdispatch.ops.<op>` and `torch.ops.hdispatch.<op>`, on the null driver: the same calls, errors and counts."""

from __future__ import annotations

import copy
import dataclasses
import gc
import inspect
import pickle
import struct
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hdispatch
import pytest
import torch
import toy
from hdispatch import _C
from hdispatch.ladders import bucket_index
from hdispatch.testing import null
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own

Args = list[Any]
Door = Callable[..., None]

DOORS = {
    "hdispatch.ops": hdispatch.ops.toy,
    "torch.ops": torch.ops.hdispatch.toy,
    "torch.ops default": torch.ops.hdispatch.toy.default,
}
RESULT, INPUT, WEIGHT, SCALE, EPSILON, SCALE_UB, RESIDUAL = range(7)
FULL = "bfloat16+scale_ub+residual"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.write(tmp_path_factory.mktemp("doors"))


@pytest.fixture(autouse=True)
def bundle(folder: Path) -> Iterator[hdispatch.Bundle]:
    loaded = hdispatch.load(folder, driver="null")
    hdispatch.stats(reset=True)
    yield loaded
    hdispatch.set_strict(False)
    for each in hdispatch.loaded():
        each.unload()


@pytest.fixture(params=DOORS)
def door(request: pytest.FixtureRequest) -> Door:
    return DOORS[request.param]


def counts() -> dict[str, Any]:
    return hdispatch.stats()["toy"]


def counted(hits: int = 0, empty: int = 0, **misses: int) -> dict[str, Any]:
    return {"hits": hits, "empty": empty, "fallbacks": sum(misses.values()), "misses": misses}


def snapshot(args: Args) -> list[bytes | None]:
    """The bytes of every tensor that is on the CPU."""

    def read(tensor: object) -> bytes | None:
        if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cpu":
            return None
        return bytes(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())

    return [read(a) for a in args]


def replaced(index: int, value: object, m: int = 4, k: int = 64, variant: str = "bfloat16") -> Args:
    args = toy.arguments(m, k, variant)
    args[index] = value
    return args


def check_fallback(door: Door, args: Args, reason: str) -> None:
    """The call misses for that reason, and does what the reference does."""
    wanted = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    toy.reference(*wanted)
    hdispatch.stats(reset=True)
    door(*args)
    assert counts() == counted(**{reason: 1})
    for actual, expected in zip(args, wanted, strict=True):
        if isinstance(actual, torch.Tensor):
            assert torch.equal(actual.float(), expected.float())


# ---- arguments ----


def test_positional_keyword_and_default_arguments(door):
    a = toy.arguments(4, 64, FULL)
    names = [arg.name for arg in toy.SPEC.args]
    door(*a)
    door(*a[:5])
    door(*a[:5], None)
    door(*a[:5], None, None)
    door(**dict(zip(names, a, strict=True)))
    door(**dict(reversed(list(zip(names, a, strict=True)))))
    door(*a[:3], epsilon=a[EPSILON], scale=a[SCALE])
    door(*a[:5], residual=a[RESIDUAL], scale_ub=a[SCALE_UB])
    door(*a[:4], 1)  # an int is a float
    assert counts() == counted(hits=9)


def test_every_launch_is_the_same_through_every_door():
    seen = []
    for each in DOORS.values():
        with null.recording():
            for m in (1, 2, 15, 16, 17, 1000):
                for k in (64, 512):
                    for variant in ("bfloat16", FULL):
                        args = toy.arguments(m, k, variant)
                        each(*args)
                        addresses = [args[i].data_ptr() + past for i, past in ((RESULT, 0), (INPUT, 32), (SCALE, 0))]
                        launch = null.launches()[-1]
                        assert [struct.unpack("q", p)[0] for p in launch["params"][:3]] == addresses
                        launch["params"][:3] = []
                        seen.append((each, launch))
    launches = [[launch for who, launch in seen if who is each] for each in DOORS.values()]
    assert launches[0] == launches[1] == launches[2]
    assert len(launches[0]) == 24


def test_what_is_launched():
    with null.recording():
        hdispatch.ops.toy(*replaced(EPSILON, 0.25, m=18, k=512))
        hdispatch.ops.toy(*toy.arguments(16))
        hdispatch.ops.toy(*toy.arguments(1))
    other, mult16, one = null.launches()
    assert (other["function"], other["file"]) == ("toy_kernel", "artifacts/other.cubin")
    assert (mult16["file"], one["file"]) == ("artifacts/mult16.cubin", "artifacts/one.cubin")
    assert (other["grid"], other["block"], other["shared"]) == ((5, 1, 1), (128, 1, 1), 0)
    assert (other["pdl"], other["cooperative"], other["cluster"]) == (True, False, (1, 1, 1))
    assert other["params"][3:] == [
        struct.pack("i", 512),
        struct.pack("i", 18),
        struct.pack("f", 0.25),
        struct.pack("d", 0.5),
        struct.pack("q", 18 * 512),
        b"\1",
        bytes(8),
        bytes(8),
    ]
    assert len(one["params"]) == 8 + 2  # M is compiled in


def test_without_pdl(folder):
    hdispatch.load(folder, driver="null", pdl=False)
    with null.recording():
        hdispatch.ops.toy(*toy.arguments())
    assert null.launches()[0]["pdl"] is False


def test_what_an_op_says_about_itself():
    op = hdispatch.ops.toy
    assert op.name == op.__name__ == "toy"
    assert op.schema == toy.SPEC.schema()
    assert op.fallback is toy.reference
    assert repr(op) == f"<hdispatch op {toy.SPEC.schema()}>"
    assert callable(op)
    assert type(op) is _C.Op
    with pytest.raises(TypeError):
        _C.Op()
    assert str(torch.ops.hdispatch.toy.default._schema) == "hdispatch::" + toy.SPEC.schema()
    assert torch.ops.hdispatch.toy.default._schema.is_mutable


# ---- hits and misses ----


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
    assert set(every) >= set(hdispatch.ops.names())  # and sequences of other tests
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


# ---- bad input: an error that names the argument, nothing written, and the process lives on ----


def bf16(*shape: int, **kwargs: Any) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16, **kwargs)


def f8(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.float8_e4m3fn)


BAD = {
    "input of another dtype": (INPUT, torch.zeros(4, 64), "input has dtype float32; it takes bfloat16 or float16"),
    "input complex": (INPUT, torch.zeros(4, 64, dtype=torch.complex64), "input has dtype other"),
    "weight of the other dtype": (WEIGHT, torch.zeros(64, dtype=torch.float16), "no variant takes this combination of dtypes"),
    "result of another dtype": (
        RESULT,
        torch.zeros(4, 64, dtype=torch.uint8),
        "result has dtype uint8; it takes float8_e4m3fn",
    ),
    "scale of another dtype": (SCALE, torch.zeros(4, 1, dtype=torch.float64), "scale has dtype float64; it takes float32"),
    "scale_ub of another dtype": (SCALE_UB, torch.ones(1).bfloat16(), "scale_ub has dtype bfloat16; it takes float32"),
    "input of rank 1": (INPUT, bf16(64), r"input has rank 1 \(sizes \[64\]\); it takes rank 2, \[M, K\]"),
    "input of rank 3": (INPUT, bf16(2, 2, 64), r"input has rank 3 \(sizes \[2, 2, 64\]\)"),
    "input of rank 0": (INPUT, bf16(()), r"input has rank 0 \(sizes \[\]\)"),
    "input of rank 9": (INPUT, bf16(1, 1, 1, 1, 1, 1, 1, 4, 64), r"input has rank 9 \(sizes \[1, 1, 1, 1, \.\.\.\]\)"),
    "scale of rank 1": (SCALE, torch.zeros(4), "scale has rank 1"),
    "columns that are not contiguous": (INPUT, bf16(4, 128)[:, ::2], r"input has stride\(1\) = 2 .* call .contiguous\(\)"),
    "transposed": (INPUT, bf16(64, 4).t(), r"input has stride\(1\) = 4"),
    "weight that is not contiguous": (WEIGHT, bf16(128)[::2], r"weight has stride\(0\) = 2"),
    "weight repeated": (WEIGHT, bf16(1).expand(64), r"weight has stride\(0\) = 0"),
    "result in rows that are apart": (
        RESULT,
        f8(4, 128)[:, :64],
        r"result has stride\(0\) = 128 .* it takes 64 \(contiguous\)",
    ),
    "result in rows that overlap": (RESULT, f8(1, 64).expand(4, 64), r"result has stride\(0\) = 0"),
    "residual in rows that overlap": (RESIDUAL, bf16(1, 64).expand(4, 64), r"residual has stride\(0\) = 0"),
    "scale repeated": (SCALE, torch.zeros(1, 1).expand(4, 1), r"scale has stride\(0\) = 0"),
    "weight too short": (WEIGHT, bf16(63), r"weight has size\(0\) = 63; it takes 64 \(\[K\] with K = 64\)"),
    "weight too long": (WEIGHT, bf16(65), r"weight has size\(0\) = 65"),
    "result too small": (RESULT, f8(3, 64), r"result has size\(0\) = 3; it takes 4 \(\[M, K\] with M = 4\)"),
    "result too narrow": (RESULT, f8(4, 63), r"result has size\(1\) = 63; it takes 64"),
    "result empty": (RESULT, f8(0, 64), r"result has size\(0\) = 0; it takes 4"),
    "scale too small": (SCALE, torch.zeros(3, 1), r"scale has size\(0\) = 3; it takes 4"),
    "scale of two columns": (SCALE, torch.zeros(4, 2), r"scale has size\(1\) = 2; it takes 1"),
    "scale_ub of two": (SCALE_UB, torch.ones(2), r"scale_ub has size\(0\) = 2; it takes 1"),
    "residual of another shape": (RESIDUAL, bf16(5, 64), r"residual has size\(0\) = 5; it takes 4"),
    "input on meta": (INPUT, bf16(4, 64, device="meta"), "result is on cpu; another argument is a meta tensor"),
    "result on meta": (RESULT, f8(4, 64).to("meta"), "input is on cpu; another argument is a meta tensor"),
    "input absent": (INPUT, None, r"input is None; it takes a tensor \[M, K\]"),
    "result absent": (RESULT, None, "result is None"),
    "epsilon negative": (EPSILON, -1e-30, "epsilon is -1e-30; it takes a finite float32 of at least 0"),
    "epsilon NaN": (EPSILON, float("nan"), "epsilon is nan"),
    "epsilon infinite": (EPSILON, float("inf"), "epsilon is inf"),
    "epsilon minus infinite": (EPSILON, float("-inf"), "epsilon is -inf"),
    "epsilon beyond float32": (EPSILON, 1e39, "epsilon is 1e"),
    "epsilon a large int": (EPSILON, 10**39, "epsilon is 1e"),
    "input requires grad": (
        INPUT,
        bf16(4, 64, requires_grad=True),
        r"input requires grad and grad mode is on; .* input.detach\(\)",
    ),
    "result requires grad": (SCALE, torch.zeros(4, 1, requires_grad=True), "scale requires grad"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(door, case):
    index, value, words = BAD[case]
    variant = FULL if index in (SCALE_UB, RESIDUAL) else "bfloat16"
    args = replaced(index, value, variant=variant)
    before = snapshot(args)
    with pytest.raises(hdispatch.ArgumentError, match=f"toy: {words}"):
        door(*args)
    assert snapshot(args) == before
    assert counts() == counted()
    door(*toy.arguments())
    assert counts() == counted(hits=1)


# What is not of a type that torch's own parser takes: torch words it where the call is torch's own.
NOT_EVEN = {
    "epsilon text": (EPSILON, "1e-6", "epsilon is a str; it takes a float"),
    "epsilon absent": (EPSILON, None, "epsilon is a NoneType; it takes a float"),
    "epsilon beyond any float": (EPSILON, 10**400, "epsilon is an int that no float holds"),
    "epsilon complex": (EPSILON, 1j, "epsilon is a complex; it takes a float"),
    "input a list": (INPUT, [[1.0]], "input is a list; it takes a tensor"),
    "input text": (INPUT, "x", "input is a str; it takes a tensor"),
    "input a number": (INPUT, 1.0, "input is a float; it takes a tensor"),
    "input an array": (INPUT, torch.zeros(4, 64).numpy(), "input is a numpy.ndarray; it takes a tensor"),
    "scale_ub a number": (SCALE_UB, 448.0, "scale_ub is a float; it takes a tensor"),
    "result an op": (RESULT, hdispatch.ops.toy, "result is a hdispatch._C.Op; it takes a tensor"),
}


@pytest.mark.parametrize("case", NOT_EVEN)
def test_what_is_no_argument_at_all(door, case):
    index, value, words = NOT_EVEN[case]
    args = replaced(index, value)
    before = snapshot(args)
    if door is DOORS["torch.ops default"]:
        expected: Any = pytest.raises(RuntimeError, match=f"for argument '{toy.SPEC.args[index].name}'")
    else:
        expected = pytest.raises(hdispatch.ArgumentError, match=f"toy: {words}")
    with expected:
        door(*args)
    assert snapshot(args) == before
    assert counts() == counted()


@pytest.mark.parametrize("name", ["hdispatch.ops", "torch.ops"])
def test_a_flag_or_a_tensor_is_no_float(name):
    for value, kind in ((True, "bool"), (torch.tensor(1.0), "Tensor")):
        with pytest.raises(hdispatch.ArgumentError, match=f"epsilon is a {kind}; it takes a float"):
            DOORS[name](*replaced(EPSILON, value))


@pytest.mark.parametrize(
    ("positional", "keywords", "words"),
    [
        (3, {}, 'argument "scale" is missing'),
        (4, {}, 'argument "epsilon" is missing'),
        (0, {}, 'argument "result" is missing'),
        (5, {"eps": 1.0}, 'has no argument "eps"'),
        (5, {"": 1.0}, 'has no argument ""'),
        (5, {"\ud800": 1.0}, 'has no argument "?"'),
        (5, {"result": None}, 'argument "result" is given twice'),
        (7, {"residual": None}, 'argument "residual" is given twice'),
        (8, {}, "got 8 positional arguments; it takes 7"),
        (100, {}, "got 100 positional arguments; it takes 7"),
    ],
)
def test_wrong_sets_of_arguments(door, positional, keywords, words):
    args = (toy.arguments(4, 64, FULL) + [None] * 100)[:positional]
    if door is DOORS["torch.ops default"]:
        with pytest.raises((RuntimeError, UnicodeEncodeError)):  # torch's own words
            door(*args, **keywords)
    else:
        with pytest.raises(hdispatch.ArgumentError) as caught:
            door(*args, **keywords)
        assert words in str(caught.value)
        assert toy.SPEC.schema() in str(caught.value) or "twice" in words
    assert counts() == counted()


def test_errors_are_of_the_right_kind():
    with pytest.raises(ValueError, match="epsilon"):
        hdispatch.ops.toy(*replaced(EPSILON, -1.0))
    with pytest.raises(hdispatch.HdispatchError):
        hdispatch.ops.toy(*replaced(EPSILON, -1.0))
    with pytest.raises(RuntimeError):
        hdispatch.ops.toy(*replaced(EPSILON, -1.0))


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_a_fallback_that_raises(kind):
    def reference(*_: object) -> None:
        raise kind("from the fallback")

    name = f"toy_{kind.__name__}"
    hdispatch.ops.define(dataclasses.replace(toy.SPEC, name=name, reference=reference))
    packet = getattr(torch.ops.hdispatch, name)
    for each in (getattr(hdispatch.ops, name), packet, packet.default):
        with pytest.raises(kind):
            each(*toy.arguments())
        assert hdispatch.stats(reset=True)[name]["fallbacks"] == 1


# ---- gradients ----


def test_gradients(door):
    leaf = bf16(4, 64, requires_grad=True)
    with torch.no_grad():
        door(*replaced(INPUT, leaf))
        door(*replaced(SCALE, torch.zeros(4, 1, requires_grad=True)))
    door(*replaced(INPUT, leaf.detach()))
    with torch.inference_mode():
        door(*replaced(INPUT, leaf))
        door(*toy.arguments())
    assert counts() == counted(hits=5)
    with pytest.raises(hdispatch.ArgumentError, match="input requires grad"):
        door(*replaced(INPUT, leaf * 2))  # not a leaf
    with pytest.raises(hdispatch.ArgumentError, match="input requires grad"):
        door(*replaced(INPUT, torch.nn.Parameter(bf16(4, 513)), k=513))  # before the fallback, too


def test_parameters(door):
    door(*replaced(WEIGHT, torch.nn.Parameter(bf16(64), requires_grad=False)))
    with torch.no_grad():
        door(*replaced(WEIGHT, torch.nn.Parameter(bf16(64))))
    assert counts() == counted(hits=2)
    with pytest.raises(hdispatch.ArgumentError, match="weight requires grad"):
        door(*replaced(WEIGHT, torch.nn.Parameter(bf16(64))))


@pytest.mark.parametrize("k", [64, 513])
def test_what_is_written_has_a_new_version(door, k):
    args = toy.arguments(4, k, FULL)
    tensors = {i: a for i, a in enumerate(args) if isinstance(a, torch.Tensor)}
    before = {i: a._version for i, a in tensors.items()}
    door(*args)
    for i, tensor in tensors.items():
        assert (tensor._version > before[i]) == (i in (RESULT, SCALE, RESIDUAL))


def test_backward_through_an_overwritten_tensor_is_noticed(door):
    args = toy.arguments(4, 64, FULL)
    x = torch.ones(4, 64, dtype=torch.bfloat16, requires_grad=True)
    y = x * args[RESIDUAL]
    door(*args)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_inference_tensors(door):
    with torch.inference_mode():
        args = toy.arguments(4, 64, FULL)
    door(*args)
    with torch.inference_mode():
        door(*args)
    assert counts() == counted(hits=2)


def test_lazy_clones_are_made_real_only_where_written(door):
    args = toy.arguments(4, 64, FULL)
    kept = args[RESIDUAL]
    args[RESIDUAL], args[INPUT] = torch._lazy_clone(kept), torch._lazy_clone(args[INPUT])
    door(*args)
    assert not torch._C._is_cow_tensor(args[RESIDUAL])
    assert torch._C._is_cow_tensor(args[INPUT])
    assert args[RESIDUAL].data_ptr() != kept.data_ptr()
    assert counts() == counted(hits=1)


# ---- what is not plain: torch has something to do first ----


class Subclass(torch.Tensor):
    """A subclass that adds nothing."""


class Logged(torch.Tensor):
    """A subclass with its own __torch_function__."""

    seen: list[Any] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


class Wrapped(torch.Tensor):
    """A wrapper with its own __torch_dispatch__."""

    @staticmethod
    def __new__(cls, inner):  # noqa: D102
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return func(*(a.inner if isinstance(a, Wrapped) else a for a in args), **(kwargs or {}))


def test_subclasses(door):
    door(*replaced(INPUT, bf16(4, 64).as_subclass(Subclass)))
    Logged.seen.clear()
    door(*replaced(INPUT, bf16(4, 64).as_subclass(Logged)))
    assert Logged.seen
    wrapped = Wrapped(torch.randn(4, 64).bfloat16())
    door(*replaced(INPUT, wrapped))
    assert counts() == counted(hits=3)
    args = replaced(INPUT, Wrapped(torch.randn(4, 513).bfloat16()), k=513)
    door(*args)
    plain = [a.inner if isinstance(a, Wrapped) else a for a in toy.arguments(4, 513)]
    plain[INPUT] = args[INPUT].inner
    toy.reference(*plain)
    assert torch.equal(args[RESULT].float(), plain[RESULT].float())


def test_duck_types(door):
    class Duck:
        """No tensor, but it takes part in torch's functions."""

        def __torch_function__(self, func, types, args=(), kwargs=None):
            return "quack"

    if door is not DOORS["torch.ops default"]:
        assert door(*replaced(INPUT, Duck())) == "quack"


def test_dispatch_modes_see_the_call(door):
    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append((func, len(args)))
            return func(*args, **(kwargs or {}))

    seen: list[Any] = []
    with Log():
        args = toy.arguments()
        seen.clear()
        door(*args)
    assert seen == [(torch.ops.hdispatch.toy.default, 5)]  # torch leaves trailing defaults out
    assert counts() == counted(hits=1)


def test_function_modes_see_the_call(door):
    class Log(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list[Any] = []
    args = toy.arguments()
    with Log():
        door(*args)
    assert len(seen) == 1
    assert "toy" in str(seen[0])
    assert counts() == counted(hits=1)


def test_functorch(door):
    args = toy.arguments()
    with pytest.raises(RuntimeError, match="Batching rule not implemented for hdispatch::toy"):
        torch.vmap(lambda x: (door(args[0], x, *args[2:]), x)[1])(bf16(2, 4, 64))
    # Not one of the mapped tensors: served as ever.
    torch.vmap(lambda x: (door(*args), x)[1])(torch.zeros(2))
    assert counts() == counted(hits=1)
    with pytest.raises(hdispatch.ArgumentError, match="input requires grad"):
        torch.func.grad(lambda x: (door(args[0], x, *args[2:]), x.float().sum())[1])(bf16(4, 64))
    assert counts() == counted(hits=1)


def test_autocast_and_profiler_change_nothing(door):
    with torch.autocast("cpu", torch.bfloat16):
        door(*toy.arguments())
    with torch.profiler.profile():
        door(*toy.arguments())
    assert counts() == counted(hits=2)


def test_meta_tensors(door):
    def meta(args: Args) -> Args:
        return [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]

    door(*meta(toy.arguments()))
    door(*meta(toy.arguments(0)))
    door(*meta(toy.arguments(4, 513, FULL)))
    with pytest.raises(hdispatch.ArgumentError, match=r"weight has size\(0\) = 65"):
        door(*meta(replaced(WEIGHT, bf16(65))))
    with pytest.raises(hdispatch.ArgumentError, match="epsilon is -1"):
        door(*meta(replaced(EPSILON, -1.0)))
    assert counts() == counted()


def test_fake_tensors(door):
    with FakeTensorMode():
        args = toy.arguments(4, 64, FULL)
        door(*args)
        with pytest.raises(hdispatch.ArgumentError, match="input has dtype float32"):
            door(*replaced(INPUT, torch.zeros(4, 64)))
    door(*args)
    assert counts() == counted()


def test_opcheck():
    # The checks compute with what is written, which torch cannot do in fp8: the same op with a float32 result.
    result = dataclasses.replace(toy.SPEC.args[RESULT], dtypes=(torch.float32,))
    hdispatch.ops.define(dataclasses.replace(toy.SPEC, name="toy_float", args=(result, *toy.SPEC.args[1:])))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for variant, m, k in (("bfloat16", 4, 64), (FULL, 16, 512), ("float16", 4, 64), ("bfloat16", 0, 64)):
        args = toy.arguments(m, k, variant)
        args[RESULT] = args[RESULT].float()
        found = torch.library.opcheck(torch.ops.hdispatch.toy_float.default, tuple(args), test_utils=checks)
        assert set(found.values()) == {"SUCCESS"}


# ---- torch.compile ----


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("door", ["ops", "torch.ops"])
def test_compile(backend, dynamic, door):
    def layer(result, x, weight, scale, residual):
        x = x * 2
        if door == "ops":
            hdispatch.ops.toy(result, x, weight, scale, 0.5, residual=residual)
        else:
            torch.ops.hdispatch.toy(result, x, weight, scale, 0.5, None, residual)
        return result.float() + scale, x if residual is None else residual * 2

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=dynamic)
    # K = 96 has no row, so the fallback writes what can be compared; K = 64 is launched by a driver that does nothing.
    for m in (4, 7, 16):
        a, b = (toy.arguments(m, 96, "bfloat16+residual") for _ in range(2))
        actual = compiled(a[RESULT], a[INPUT], a[WEIGHT], a[SCALE], a[RESIDUAL])
        expected = layer(b[RESULT], b[INPUT], b[WEIGHT], b[SCALE], b[RESIDUAL])
        for left, right in zip((*actual, *a), (*expected, *b), strict=True):
            if isinstance(left, torch.Tensor):
                assert torch.equal(left.float(), right.float())
    assert counts() == counted(**{"no row": 6})
    with torch.no_grad():
        a = toy.arguments(4, 64)
        compiled(a[RESULT], a[INPUT], a[WEIGHT], a[SCALE], None)
    assert counts()["hits"] == 1


def test_signature():
    signature = inspect.signature(hdispatch.ops.toy)
    assert str(signature) == (
        "(result: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, epsilon: float, "
        "scale_ub: torch.Tensor | None = None, residual: torch.Tensor | None = None) -> None"
    )


def test_signatures_of_all_ops():
    for name in hdispatch.ops.names():
        spec, parameters = hdispatch.ops.spec(name), inspect.signature(hdispatch.ops.get(name)).parameters
        assert list(parameters) == [arg.name for arg in spec.args]


def test_compile_refuses_a_wrong_call():
    def call(result, x, weight, scale):
        torch.ops.hdispatch.toy(result, x, weight, scale, 0.5)

    torch._dynamo.reset()
    a = replaced(WEIGHT, bf16(65))
    with pytest.raises(Exception, match=r"weight has size\(0\) = 65"):
        torch.compile(call, fullgraph=True, backend="aot_eager")(*a[:4])
    assert counts() == counted()


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, result, x, weight, scale):
            torch.ops.hdispatch.toy(result, x, weight, scale, 0.5)
            return result

    a = toy.arguments()
    program = torch.export.export(Layer(), tuple(a[:4]))
    assert "hdispatch.toy" in program.graph_module.code
    program.module()(*a[:4])
    assert counts() == counted(hits=1)


def test_jit_trace():
    def call(result, x, weight, scale):
        torch.ops.hdispatch.toy(result, x, weight, scale, 0.5)
        return result

    a = toy.arguments()
    traced = torch.jit.trace(call, tuple(a[:4]), check_trace=False)
    assert "hdispatch::toy" in str(traced.graph)


def test_fx():
    def call(result, x, weight, scale):
        hdispatch.ops.toy(result, x, weight, scale, 0.5)
        torch.ops.hdispatch.toy(result, x, weight, scale, 0.5)
        return result

    traced = torch.fx.symbolic_trace(call)
    packet = torch.ops.hdispatch.toy
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [packet, packet]
    traced(*toy.arguments()[:4])
    assert counts() == counted(hits=2)


def test_the_packet_is_still_torchs():
    packet = torch.ops.hdispatch.toy
    assert isinstance(packet, torch._ops.OpOverloadPacket)
    assert packet is torch.ops.hdispatch.toy
    assert packet.overloads() == ["default"]
    assert packet.default is packet.default
    assert packet.default.overloadpacket is packet


# ---- threads ----


def test_threads_add_up():
    calls, threads = 300, 4
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            doors = list(DOORS.values())
            hit, miss, empty = toy.arguments(4), toy.arguments(4, 513), toy.arguments(0)
            for i in range(calls):
                doors[(i + number) % 3](*hit)
                if i % 10 == 0:
                    doors[i // 10 % 3](*miss)
                    doors[i // 10 % 3](*empty)
                    with pytest.raises(hdispatch.ArgumentError):
                        doors[i // 10 % 3](*hit[:1], None, *hit[2:])
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors
    assert counts() == counted(hits=calls * threads, empty=calls * threads // 10, **{"no row": calls * threads // 10})


def test_threads_and_a_table_that_is_replaced(folder):
    stop = threading.Event()
    errors: list[BaseException] = []

    def work() -> None:
        args = toy.arguments(4)
        while not stop.is_set():
            try:
                for each in DOORS.values():
                    each(*args)
            except BaseException as error:
                errors.append(error)
                return

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for _ in range(30):
        hdispatch.load(folder, driver="null")
    stop.set()
    for worker in workers:
        worker.join()
    assert not errors
    assert counts()["hits"] > 0
    assert counts()["misses"] == {}


# ---- leaks ----


@pytest.mark.parametrize("k", [64, 513])
def test_no_reference_is_kept(door, k):
    args = toy.arguments(4, k, FULL)
    for _ in range(3):
        door(*args)
        with pytest.raises((hdispatch.ArgumentError, RuntimeError)):
            door(*args[:5], wrong=1)
        with pytest.raises(hdispatch.ArgumentError):
            door(*args[:4], -1.0, *args[5:])
    watched = [weakref.ref(a) for a in args if isinstance(a, torch.Tensor)]
    del args
    gc.collect()
    assert [w() for w in watched] == [None] * len(watched)


# ---- definitions ----


def test_definitions_that_are_refused():
    define = hdispatch.ops.define
    with pytest.raises(hdispatch.HdispatchError, match="op 'toy' is defined already"):
        define(toy.SPEC)
    for name in ("names", "spec", "define", "torch"):
        with pytest.raises(hdispatch.HdispatchError, match=f"would hide hdispatch.ops.{name}"):
            define(dataclasses.replace(toy.SPEC, name=name))
    for name in ("", "a-b", "1a", "class", "a.b", "_private", "a b"):
        with pytest.raises(hdispatch.HdispatchError, match="is not a name that Python and torch's schemas take"):
            dataclasses.replace(toy.SPEC, name=name)
    with pytest.raises(hdispatch.HdispatchError, match="no op 'nobody'; there are"):
        hdispatch.ops.spec("nobody")
    with pytest.raises(AttributeError, match="hdispatch has no op 'nobody'; it has"):
        hdispatch.ops.nobody  # noqa: B018
    assert "toy" in hdispatch.ops.names()


def test_python_and_the_core_agree_on_buckets():
    for ladder in ([1], [1, 2, 4, 8, 16], [5, 100, 101], list(range(1, 65))):
        for m in (*range(1, 130), 10**9):
            assert _C.bucket(ladder, m) == bucket_index(ladder, m)


def test_hashes_of_neighbours_differ():
    assert _C.key_hash(0, 0, 512, 0, 3) != _C.key_hash(0, 0, 513, 0, 3)
    assert _C.key_hash(0, 0, 512, 0, 3) == _C.key_hash(op=0, variant=0, k=512, n=0, bucket=3)


def test_copies_of_an_op_are_the_op():
    """A module that holds one can be copied and pickled."""
    assert copy.deepcopy(hdispatch.ops.toy) is hdispatch.ops.toy
    assert pickle.loads(pickle.dumps(hdispatch.ops.toy)) is hdispatch.ops.toy
    with pytest.raises(hdispatch.HdispatchError, match="no op 'nothing'"):
        hdispatch.ops.get("nothing")

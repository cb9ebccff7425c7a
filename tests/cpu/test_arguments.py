"""Ops with many arguments, and arguments that are strings: through every door, on the null driver."""

from __future__ import annotations

import dataclasses
import itertools
import struct
from collections.abc import Callable, Iterator
from typing import Any

import hdispatch
import pytest
import torch
from hdispatch import _C, HdispatchError, Key
from hdispatch.integrations.vllm.override import Route
from hdispatch.opspec import BoolArg, FloatArg, IntArg, NoneArg, OpSpec, StrArg, TensorArg
from hdispatch.testing import null
from standin import Library
from torch._subclasses.fake_tensor import FakeTensorMode

Args = list[Any]
ran: list[tuple[Any, ...]] = []
#: Strings that are easily mistaken for others.
ODD = ("", "fp8", "fp8\0e4m3", "fp8_e4m3", "ﬀ\u0301π", "\0", "a b", "'")

WIDE = OpSpec(
    name="wide_op",
    args=(
        TensorArg("out", ("M", "K"), (torch.float32,), mutated=True),
        *(TensorArg(f"x{i}", ("M", "K"), (torch.float32,)) for i in range(15)),
        TensorArg("late", ("M", "K"), (torch.float32, torch.bfloat16)),
        FloatArg("eps", minimum=0.0),
        IntArg("count", minimum=1),
        IntArg("group", values=(64, 128)),
        BoolArg("flag"),
        StrArg("mode", values=ODD),
        StrArg("cache", values=("auto", "fp8"), default="auto"),
        TensorArg("gate", ("M", "K"), (torch.float32,), optional=True),
    ),
    reference=lambda *args: ran.append(args),
    sample=lambda *_: [],
    shapes=({"K": 32},),
    config_key={},
    ladder=(1, 16),
)
assert len(WIDE.args) == 24
LATE, EPS, COUNT, GROUP, FLAG, MODE, CACHE, GATE = range(16, 24)
OP = hdispatch.registry.define(WIDE) if WIDE.name not in hdispatch.registry.names() else hdispatch.registry.get(WIDE.name)
DOORS: dict[str, Callable[..., None]] = {
    "ops": OP,
    "torch": torch.ops.hdispatch.wide_op,
    "default": torch.ops.hdispatch.wide_op.default,
    "keywords": lambda *args: OP(**{arg.name: value for arg, value in zip(WIDE.args, args, strict=True)}),
}


def arguments(
    m: int = 4, mode: str = "fp8", cache: str = "auto", gate: bool = False, late: torch.dtype = torch.float32
) -> Args:
    tensors = [torch.zeros(m, 32) for _ in range(16)]
    return [*tensors, torch.zeros(m, 32, dtype=late), 0.5, 7, 64, True, mode, cache, torch.zeros(m, 32) if gate else None]


def publish() -> None:
    """A record for each variant, which is launched with its number, the sixteenth tensor, `late`, `count` and `eps`."""
    code = {"file": "none", "num_warps": 1, "shared_bytes": 0, "cluster": [1, 1, 1], "cooperative": False, "pdl": False}
    builder = _C.TableBuilder(-1, 0, True)
    builder.set_ladder(OP, list(WIDE.ladder))
    builder.add_module("none", b"none")
    for number, variant in enumerate(WIDE.variants()):
        params: list[dict[str, Any]] = [{"kind": "ptr", "arg": name} for name in ("out", "x14", "late")]
        params += [{"kind": "i32", "value": ["count"]}, {"kind": "i32", "value": [number]}, {"kind": "f32", "arg": "eps"}]
        cubin = {**code, "function": "wide", "params": list(range(len(params)))}
        record = {"launcher": "cubin", "kernel": "wide", "m_min": 1, "m_max": 2**31 - 1, "grid": [["M"], [1], [1]]}
        record |= {"params": params, "guards": [], "cubins": {"one": cubin, "mult16": cubin, "other": cubin}}
        index = builder.add_record(OP, record)
        for bucket in range(len(WIDE.ladder)):
            builder.add_row(OP, variant.name, 32, 0, bucket, index)
    builder.publish()


@pytest.fixture(autouse=True)
def table() -> Iterator[None]:
    publish()
    hdispatch.stats(reset=True)
    ran.clear()
    yield
    _C.withdraw(-1)


@pytest.fixture(params=DOORS)
def door(request: pytest.FixtureRequest) -> Callable[..., None]:
    return DOORS[request.param]


def launched() -> tuple[Any, ...]:
    """Addresses, count, the variant's number and eps of the one launch."""
    (launch,) = null.launches()
    return struct.unpack("<QQQiif", b"".join(launch["params"][:6]))


@pytest.mark.parametrize("late", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate", [False, True])
def test_the_variant_of_24_arguments(door, gate, late):
    numbers = {}
    for mode, cache, group, flag in itertools.product(ODD, ("auto", "fp8"), (64, 128), (False, True)):
        args = arguments(3, mode, cache, gate, late)
        args[GROUP], args[FLAG] = group, flag
        with null.recording():
            door(*args)
        out, x14, third, count, number, eps = launched()
        assert (out, x14, third) == (args[0].data_ptr(), args[15].data_ptr(), args[LATE].data_ptr())
        assert (count, eps) == (7, 0.5)
        variant = WIDE.variants()[number]
        assert variant.static == {"group": group, "flag": flag, "mode": mode, "cache": cache}
        assert variant.dtypes["late"] is late
        assert ("gate" in variant.none) != gate
        numbers[mode, cache, group, flag] = number
    assert len(set(numbers.values())) == 64
    assert hdispatch.stats()["wide_op"]["hits"] == 64


def test_defaults():
    args = arguments()
    OP(*args[:CACHE])
    torch.ops.hdispatch.wide_op(*args[:CACHE])
    torch.ops.hdispatch.wide_op.default(*args[:CACHE])
    assert hdispatch.stats()["wide_op"]["hits"] == 3
    assert 'str mode, str cache="auto", Tensor? gate=None) -> ()' in WIDE.schema()


@pytest.mark.parametrize("value", ["fp8 ", "FP8", "fp", "fp8\0", "fp8\0e4m", "ﬀπ", "é" * 200, "\0\0"])
def test_a_value_that_is_not_listed_is_a_miss(door, value):
    args = arguments(mode=value)
    door(*args)
    assert ran[-1][MODE] == value
    assert hdispatch.stats()["wide_op"]["misses"] == {"no variant: mode": 1}
    with (
        hdispatch.strict(),
        pytest.raises(hdispatch.MissError, match=r'mode is ".*, served are "" "fp8" "fp8\\x00e4m3"') as error,
    ):
        door(*args)
    if "\0" not in value and len(value) < 100:
        assert f'mode is "{value}"' in str(error.value)
    assert "\0" not in str(error.value)


def test_explain():
    words = hdispatch.explain(OP, *arguments(mode="fp8\0e4m3", late=torch.bfloat16))
    assert "variant  bfloat16+group=64+flag+mode='fp8\\x00e4m3'+cache=auto" in words
    words = hdispatch.explain(OP, *arguments(cache="fp9"))
    assert 'miss     wide_op: no variant has these values: cache is "fp9", served are "auto" "fp8"' in words


@pytest.mark.parametrize(
    ("value", "words"), [(8, "mode is a int; it takes a str"), (None, "mode is a NoneType"), (b"fp8", "bytes")]
)
def test_what_is_no_string(value, words):
    with pytest.raises(hdispatch.ArgumentError, match=words):
        OP(*arguments(mode=value))
    if isinstance(value, bytes):
        return  # torch takes them for a str
    with pytest.raises(RuntimeError):
        torch.ops.hdispatch.wide_op.default(*arguments(mode=value))


def test_half_a_character():
    with pytest.raises(hdispatch.ArgumentError, match="half a character"):
        OP(*arguments(mode="\ud800"))


def test_subclasses_of_str():
    class Name(str):
        __slots__ = ()

    OP(*arguments(mode=Name("fp8_e4m3")))
    assert hdispatch.stats()["wide_op"]["hits"] == 1


def test_errors_name_arguments_beyond_the_sixteenth():
    args = arguments()
    args[LATE] = args[LATE].half()
    with pytest.raises(hdispatch.ArgumentError, match="late has dtype float16; it takes float32 or bfloat16"):
        OP(*args)
    args = arguments(gate=True)
    args[GATE] = args[0]
    with pytest.raises(hdispatch.ArgumentError, match="out is written and shares memory with gate"):
        OP(*args)
    args = arguments()
    args[GROUP] = 65
    OP(*args)
    assert hdispatch.stats()["wide_op"]["misses"] == {"no variant: group": 1}


def test_fake_and_meta_tensors():
    torch.ops.hdispatch.wide_op(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments()))
    with FakeTensorMode() as mode:
        torch.ops.hdispatch.wide_op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments(mode="x")))

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(*args: Any) -> None:
        torch.ops.hdispatch.wide_op(*args)

    args = arguments(mode="fp8_e4m3")
    with null.recording():
        compiled(*args)
    assert launched()[0] == args[0].data_ptr()


@pytest.mark.parametrize("door", ["packet", "default"])
def test_override(door):
    library = Library(WIDE.schema())
    with library.override({"wide_op": (Route("wide_op"),)}):
        packet = library.ops.wide_op
        call = packet if door == "packet" else packet.default
        call(*arguments(mode="fp8_e4m3", cache="fp8"))
        call(*arguments()[:CACHE])
        assert (hdispatch.stats()["wide_op"]["hits"], library.calls) == (2, [])
        call(*arguments(mode="other"))
    assert library.calls == ["wide_op"]
    assert hdispatch.stats()["wide_op"]["misses"] == {"no variant: mode": 1}


def test_a_registered_function_gets_the_string():
    tvm_ffi = pytest.importorskip("tvm_ffi")
    told: list[Any] = []
    variant = hdispatch.registry.spec("wide_op").variants()[0]
    registration = hdispatch.register(
        OP, Key(variant.name, 32), tvm_ffi.convert(lambda *args: told.append(args)), driver="null", stream="none"
    )
    try:
        args = arguments(mode=ODD[0], cache="auto", late=torch.float32)
        args[FLAG] = False
        OP(*args)
    finally:
        registration.unregister()
    assert [str(told[0][MODE]), str(told[0][CACHE])] == ["", "auto"]
    assert (told[0][COUNT], told[0][GROUP], len(told[0])) == (7, 64, 24)
    nul = next(v.name for v in WIDE.variants() if v.static["mode"] == "\0")
    with pytest.raises(HdispatchError, match="takes no NUL"):
        hdispatch.register(OP, Key(nul, 32), tvm_ffi.convert(lambda *_: None), driver="null")


def declare(*args: Any) -> OpSpec:
    return dataclasses.replace(WIDE, name="other_wide", args=(WIDE.args[0], WIDE.args[1], *args))


@pytest.mark.parametrize(
    ("arg", "words"),
    [
        (StrArg("s", values=()), "1 to 13 different values"),
        (StrArg("s", values=tuple(map(str, range(14)))), "1 to 13 different values"),
        (StrArg("s", values=("a", "a")), "different values"),
        (StrArg("s", values=("\ud800",)), "strings that UTF-8 has"),
        (StrArg("s", values=("a", 1)), "strings that UTF-8 has"),
        (StrArg("s", values=("a",), default="b"), "the default of s is 'b', none of its values"),
        (StrArg("s", values=("é",), default="é"), "torch's schemas take printable ASCII"),
        (StrArg("s", values=('"',), default='"'), "torch's schemas take printable ASCII"),
        (StrArg("s", values=("\\",), default="\\"), "torch's schemas take printable ASCII"),
        (StrArg("s", values=("\0",), default="\0"), "torch's schemas take printable ASCII"),
        (IntArg("i", values=tuple(range(14))), "1 to 13 different values"),
        (TensorArg("t", ("K/s",), (torch.float32,)), "no integer argument with values"),
    ],
)
def test_refused_declarations(arg, words):
    more = (StrArg("s", values=("a",)),) if isinstance(arg, TensorArg) else ()
    with pytest.raises(HdispatchError, match=words):
        declare(arg, *more)


def test_at_most_32_arguments():
    declare(*(NoneArg(f"n{i}") for i in range(30)))
    with pytest.raises(HdispatchError, match="33 arguments; an op takes at most 32"):
        declare(*(NoneArg(f"n{i}") for i in range(31)))


def test_32_tensors_that_are_written():
    """Every nibble of a signature, and every place among the pending writes."""
    args = tuple(TensorArg(f"t{i}", ("M", "K"), (torch.float32, torch.bfloat16), mutated=True) for i in range(1))
    args += tuple(TensorArg(f"t{i}", ("M", "K"), "t0", mutated=True) for i in range(1, 32))
    spec = dataclasses.replace(WIDE, name="widest_op", args=args)
    op = hdispatch.registry.define(spec) if spec.name not in hdispatch.registry.names() else hdispatch.registry.get(spec.name)
    tensors = [torch.zeros(2, 32, dtype=torch.bfloat16) for _ in args]
    code = {"file": "none", "num_warps": 1, "shared_bytes": 0, "cluster": [1, 1, 1], "cooperative": False, "pdl": True}
    params = [{"kind": "ptr", "arg": arg.name} for arg in args]
    record: dict[str, Any] = {"launcher": "cubin", "kernel": "widest", "m_min": 1, "m_max": 99, "grid": [["M"], [1], [1]]}
    cubins = {"other": {**code, "function": "widest", "params": list(range(32))}}
    record |= {"params": params, "guards": [], "cubins": cubins, "early": ["t31"]}
    builder = _C.TableBuilder(-1, 0, True)
    builder.set_ladder(op, [16])
    builder.add_module("none", b"none")
    builder.add_row(op, "bfloat16", 32, 0, 0, builder.add_record(op, record))
    builder.publish()
    with null.recording():
        op(*tensors)
        torch.ops.hdispatch.widest_op.default(*tensors)
    pointers = [[int.from_bytes(p, "little") for p in launch["params"][:32]] for launch in null.launches()]
    assert pointers == [[tensor.data_ptr() for tensor in tensors]] * 2
    for wrong in range(1, 32):
        with pytest.raises(hdispatch.ArgumentError, match="dtype"):
            op(*tensors[:wrong], tensors[wrong].float(), *tensors[wrong + 1 :])

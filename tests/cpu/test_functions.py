"""Rows that are TVM-FFI functions: live ones, compiled from C++ here, tensors in and tensors out; and those of bundles."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import hdispatch
import pytest
import torch
import toy
from hdispatch import Key, host
from hdispatch.cli.main import main
from hdispatch.manifest import LIBRARY, FfiArg
from hdispatch.opspec import FloatArg, IntArg, OpSpec, TensorArg, Variant
from hdispatch.testing import null

pytestmark = pytest.mark.usefixtures("nothing_serves")  # other tests' rows

NAME = "ffi_scale"


def reference(out, x, bias, factor, repeat, gate=None):
    """The fallback writes the result, negated."""
    out.copy_(-(x.float() * factor * repeat + bias.float()) + (0 if gate is None else gate.float()))


def sample(variant: Variant, sizes: dict[str, int], device: torch.device, generator: torch.Generator) -> list[Any]:
    m, k = sizes["M"], sizes["K"]
    x = torch.randn(m, k, generator=generator, device=device)
    gate = None if "gate" in variant.none else torch.ones(m, k, device=device)
    return [torch.empty(m, k, device=device), x, torch.randn(k, generator=generator, device=device), 0.5, 3, gate]


SPEC = OpSpec(
    name=NAME,
    args=(
        TensorArg("out", ("M", "K"), (torch.float32,), mutated=True),
        TensorArg("x", ("M", "K"), (torch.float32,), layout="rows"),
        TensorArg("bias", ("K",), (torch.float32,)),
        FloatArg("factor"),
        IntArg("repeat"),
        TensorArg("gate", ("M", "K"), (torch.float32,), optional=True),
    ),
    reference=reference,
    sample=sample,
    shapes=({"K": 64}, {}),
    config_key={"hidden_size": "K", "num_tokens": "M"},
    ladder=(1, 4, 16),
)
OP = hdispatch.registry.define(SPEC) if NAME not in hdispatch.registry.names() else hdispatch.registry.get(NAME)
PLAIN, GATED = (variant.name for variant in sorted(SPEC.variants(), key=lambda v: not v.none))

SOURCE = r"""
using tvm::ffi::TensorView;
static int64_t calls = 0;
int64_t count_calls() { return calls; }

void scale(TensorView out, TensorView x, TensorView bias, double factor, int64_t repeat, tvm::ffi::Optional<TensorView> gate) {
  ++calls;
  if (x.ndim() != 2 || x.device().device_type != kDLCPU) TVM_FFI_THROW(TypeError) << "x has rank " << x.ndim();
  if (x.size(1) == 13) TVM_FFI_THROW(ValueError) << "K is " << x.size(1) << ", which is unlucky";
  const float* from = static_cast<const float*>(x.data_ptr());
  float* to = static_cast<float*>(out.data_ptr());
  const float* add = static_cast<const float*>(bias.data_ptr());
  for (int64_t i = 0; i < x.size(0); ++i)
    for (int64_t j = 0; j < x.size(1); ++j)
      to[i * out.stride(0) + j] = from[i * x.stride(0) + j * x.stride(1)] * factor * repeat + add[j] +
                                  (gate.has_value() ? 100.0f : 0.0f);
}

void transposed(TensorView out, TensorView x, int64_t rows, bool flag, double constant) {
  ++calls;
  static_cast<float*>(out.data_ptr())[0] = x.size(0) * 1000 + x.size(1) + rows * 0.5 + (flag ? 0.25 : 0) + constant;
}

tvm::ffi::String returns_an_object(TensorView out) { ++calls; return "a string that is not small at all"; }
"""
NAMES = ("count_calls", "scale", "transposed", "returns_an_object")


@pytest.fixture(scope="module")
def module() -> Any:
    cpp = pytest.importorskip("tvm_ffi.cpp", reason="needs apache-tvm-ffi: pip install 'hdispatch[ffi]'")
    return cpp.load_inline("hdispatch_test_functions", cpp_sources=SOURCE, functions=list(NAMES))


def register(function: object, key: Key | None = None, **options: Any) -> hdispatch.Registration:
    return hdispatch.register(OP, key or Key(PLAIN), function, driver="null", **options)


def arguments(m: int = 4, k: int = 64, variant: str = PLAIN) -> list[Any]:
    return sample(SPEC.variant(variant), {"M": m, "K": k}, torch.device("cpu"), torch.Generator().manual_seed(m))


def expected(args: list[Any]) -> torch.Tensor:
    _, x, bias, factor, repeat, gate = args
    result: torch.Tensor = x * factor * repeat + bias + (0 if gate is None else 100)
    return result


def called(args: list[Any]) -> str:
    """Who wrote the result of a call: the function, the fallback or neither."""
    args[0].fill_(float("nan"))
    OP(*args)
    if torch.allclose(args[0], expected(args), atol=1e-5):
        return "function"
    reference(other := torch.empty_like(args[0]), *args[1:])
    return "fallback" if torch.equal(args[0], other) else "neither"


# ---- live functions ----


def test_tensors_in_tensors_out(module):
    assert called(arguments()) == "fallback"
    register(module.scale)
    before = module.count_calls()
    for m in (1, 2, 4, 5, 16, 17, 100):
        for k in (1, 64, 70):
            assert called(arguments(m, k)) == "function"
    assert module.count_calls() == before + 21
    assert hdispatch.stats()[NAME] == {"hits": 21, "empty": 0, "fallbacks": 1, "misses": {"no table": 1}}


def test_strides_and_offsets(module):
    register(module.scale)
    args = arguments(5, 64)
    args[1] = torch.randn(5, 100)[:, 3:67]
    args[0] = torch.empty(6, 64)[1:]
    assert called(args) == "function"


def test_the_torch_door_too(module):
    register(module.scale)
    args = arguments()
    torch.ops.hdispatch.ffi_scale.default(*args)
    assert torch.allclose(args[0], expected(args), atol=1e-5)


def test_no_row_for_m_0_is_called(module):
    register(module.scale)
    before = module.count_calls()
    OP(*arguments(0))
    assert module.count_calls() == before
    assert hdispatch.stats()[NAME]["empty"] == 1


def test_variants_are_apart(module):
    register(module.scale, Key(GATED))
    assert called(arguments(variant=GATED)) == "function"
    assert called(arguments()) == "fallback"
    assert hdispatch.stats()[NAME]["misses"] == {"no row": 1}


def test_sizes_and_buckets(module):
    register(module.scale, Key(PLAIN, K=64, M=3))
    assert [called(arguments(m)) for m in (1, 2, 4, 5)] == ["fallback", "function", "function", "fallback"]
    assert called(arguments(4, 65)) == "fallback"
    register(module.scale, Key(PLAIN, M=10**6))
    assert [called(arguments(m, 65)) for m in (4, 5, 16, 17)] == ["fallback", "function", "function", "function"]


def test_guards_count_and_do_not_call(module):
    args: list[FfiArg] = hdispatch.functions.default_args(SPEC, PLAIN)
    args[1] |= {"align": 16}
    register(
        module.scale,
        args=args,
        guards=[{"expr": ["K", 16, "%", 0, "=="], "text": "K % 16 == 0"}],
        m_range=(2, 50),
    )
    before = module.count_calls()
    misaligned = arguments()
    misaligned[1] = torch.randn(4 * 64 + 1)[1:].view(4, 64)
    assert [called(a) for a in (arguments(4, 70), arguments(1), arguments(51), misaligned)] == ["fallback"] * 4
    assert module.count_calls() == before
    assert called(arguments()) == "function"
    assert hdispatch.stats()[NAME]["misses"] == {
        "guard: K % 16 == 0": 1,
        "guard: 2 <= M <= 50": 2,
        "guard: x is 16-byte aligned": 1,
    }
    with hdispatch.strict(), pytest.raises(hdispatch.MissError, match=r"guard: K % 16 == 0 does not hold in \(registered\)"):
        OP(*arguments(4, 70))


def test_an_argument_list(module):
    register(
        module.transposed,
        args=[
            {"kind": "tensor", "arg": "out"},
            {"kind": "tensor", "arg": "x", "dims": [1, 0]},
            {"kind": "int", "value": ["M", "repeat", "*"]},
            {"kind": "bool", "value": ["K", 64, "=="]},
            {"kind": "float", "const": 0.125},
        ],
    )
    args = arguments(4, 64)
    OP(*args)
    assert args[0][0, 0].item() == 64 * 1000 + 4 + 12 * 0.5 + 0.25 + 0.125


def test_the_stream_is_given_once(module):
    given: list[FfiArg] = [{"kind": "tensor", "arg": "out"}, {"kind": "stream"}]
    in_args = register(module.scale, args=given).function.record
    assert (in_args["env_stream"], in_args["args"]) == (False, given)
    assert register(module.scale).function.record["env_stream"] is True
    last = register(module.scale, stream="argument").function.record
    assert (last["env_stream"], last["args"][-1]) == (False, {"kind": "stream"})
    none = register(module.scale, stream="none").function.record
    assert (none["env_stream"], none["args"][-1]) == (False, {"kind": "none"})


def test_errors_come_back_with_their_text(module):
    register(module.scale, label="scale_cpp")
    wanted = r"ffi_scale\(.*M=4, K=13, N=0\), row \d+, scale_cpp: .* returned -1, ValueError: K is 13, which is unlucky"
    with pytest.raises(hdispatch.FunctionError, match=wanted):
        OP(*arguments(4, 13))
    with pytest.raises(RuntimeError, match="ValueError: K is 13"):
        torch.ops.hdispatch.ffi_scale.default(*arguments(4, 13))
    assert hdispatch.stats()[NAME]["misses"] == {}
    assert called(arguments()) == "function"


def test_a_wrong_argument_list_says_what_the_function_takes(module):
    register(module.scale, args=[{"kind": "tensor", "arg": "out"}])
    with pytest.raises(hdispatch.FunctionError, match=r"TypeError: .*6"):
        OP(*arguments())


def test_a_python_function(module):
    import tvm_ffi

    seen = []

    def python(out: Any, *others: Any) -> None:
        seen.append((tuple(out.shape), others[2:]))
        if out.shape[0] == 2:
            raise KeyError("from Python")

    register(tvm_ffi.convert(python))
    OP(*arguments())
    assert seen == [((4, 64), (0.5, 3, None))]
    with pytest.raises(hdispatch.FunctionError, match=r"KeyError: .*from Python"):
        OP(*arguments(2))


def test_what_was_just_written_is_not_read_early(module):
    """A function that reads `bias` before it waits is told to launch without PDL where `bias` may still be written."""
    import tvm_ffi

    told = []
    args: list[FfiArg] = [{"kind": "tensor", "arg": "out"}, {"kind": "pdl"}]
    function = tvm_ffi.convert(lambda _out, pdl: told.append(pdl))
    register(function, args=args, pdl=True, early=["bias"])
    first, other = arguments(1), arguments(1)
    chained = [torch.empty(1, 64), first[1], first[0].view(64), *first[3:]]
    # `first` writes what `chained` reads early; that one is launched without PDL, so all before it, other tests' launches into
    # memory that may be used again here included, has completed.
    for call in (first, chained):
        OP(*call)
    for call in (first, other, chained, chained, other):
        OP(*call)
    assert told[1:] == [0, 1, 1, 0, 1, 1]
    register(function, args=args, pdl=True)
    OP(*first)
    OP(*chained)
    assert told[7:] == [1, 1]
    with pytest.raises(hdispatch.BundleError, match="has no PDL argument by which it could be told not to"):
        register(function, args=args[:1], pdl=True, early=["bias"])
    with pytest.raises(hdispatch.BundleError, match='reads "basi" early; ffi_scale has no tensor argument of that name'):
        register(function, args=args, pdl=True, early=["basi"])


def test_what_it_returns_is_dropped(module):
    register(module.returns_an_object, args=[{"kind": "tensor", "arg": "out"}])
    before = module.count_calls()
    for _ in range(100):
        OP(*arguments())
    assert module.count_calls() == before + 100


def test_a_wrapper_gives_its_raw_function(module):
    class Wrapper:
        def __tvm_ffi_object__(self) -> Any:
            return module.scale

        def __call__(self, *_: object) -> None:
            raise AssertionError("through Python")

    register(Wrapper())
    assert called(arguments()) == "function"


def test_a_function_outlives_its_last_reference(module):
    import tvm_ffi

    register(tvm_ffi.convert(lambda *_: None))
    OP(*arguments())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"function": print}, "is no TVM-FFI function"),
        ({"key": Key("nobody")}, f"has no variant 'nobody'; it has {PLAIN}"),
        ({"key": Key(PLAIN, M=0)}, "M is 0"),
        ({"key": Key(PLAIN, K=-1)}, "K = -1"),
        ({"stream": "mine"}, "stream is 'mine'"),
        ({"driver": "mine"}, "driver is 'mine'"),
        ({"m_range": (4, 3)}, "which is empty"),
        ({"args": [{"kind": "tensor", "arg": "nobody"}]}, 'has no tensor argument "nobody"'),
        ({"args": [{"kind": "tensor", "arg": "gate"}]}, "reads gate, which is None in variant"),
        ({"args": [{"kind": "tensor", "arg": "x", "dims": [2]}]}, "reads dimension 2 of x, which has rank 2"),
        ({"args": [{"kind": "float", "arg": "x"}]}, 'has no float argument "x"'),
        ({"args": [{"kind": "string"}]}, 'argument kind "string" is not known'),
        ({"guards": [{"expr": ["M", "+"], "text": ""}]}, 'operator "+" has 1 operands'),
    ],
)
def test_what_is_refused_changes_nothing(module, wrong, words):
    kept = register(module.scale)
    options = {"op": OP, "key": Key(PLAIN), "function": module.scale, "driver": "null", **wrong}
    with pytest.raises(hdispatch.HdispatchError, match=re.escape(words)):
        hdispatch.register(options.pop("op"), options.pop("key"), options.pop("function"), **options)
    assert hdispatch.registered() == [kept]
    assert called(arguments()) == "function"


def test_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(hdispatch.BundleError, match="no CUDA device here"):
        hdispatch.register(OP, Key(PLAIN), type("Raw", (), {"__chandle__": lambda _: 0})())


# ---- with bundles, and with each other ----


def toy_function(module: Any, key: Key) -> hdispatch.Registration:
    return hdispatch.register(toy.OP, key, module.returns_an_object, args=[{"kind": "tensor", "arg": "result"}], driver="null")


def served(m: int = 4, k: int = 64) -> str:
    """What serves a call of the toy op."""
    words = hdispatch.explain(toy.OP, *toy.arguments(m, k))
    found = re.search(r"^row +\d+: (.*)$", words, re.MULTILINE)
    return found[1] if found else "none"


@pytest.mark.parametrize("order", ["register, load", "load, register"])
def test_registered_before_or_after_a_bundle(module, tmp_path, order):
    folder = toy.write(tmp_path / "bundle")
    steps = {
        "register": lambda: toy_function(module, Key("bfloat16", K=64, M=3)),
        "load": lambda: hdispatch.load(folder, driver="null"),
    }
    done = {step: steps[step]() for step in order.split(", ")}
    assert [served(m) for m in (2, 3, 4, 5)] == ["toy_kernel", "(registered)", "(registered)", "toy_kernel"]
    assert served(4, 512) == "toy_kernel"
    before = module.count_calls()
    toy.OP(*toy.arguments(4, 64))
    assert module.count_calls() == before + 1
    hdispatch.load(folder, driver="null")  # again: the registration stays
    assert served(4) == "(registered)"
    registration = done["register"]
    assert isinstance(registration, hdispatch.Registration)
    registration.unregister()
    assert served(4) == "toy_kernel"
    registration.unregister()
    assert served(4) == "toy_kernel"


def test_unloading_leaves_what_is_registered(module, tmp_path):
    bundle = hdispatch.load(toy.write(tmp_path / "bundle"), driver="null")
    registration = toy_function(module, Key("bfloat16"))
    assert served(4, 64) == "toy_kernel"  # the exact row comes before one for every K
    assert served(4, 70) == "(registered)"
    bundle.unload()
    assert served(4, 64) == "(registered)"
    assert hdispatch.loaded() == []
    registration.unregister()
    assert served(4, 64) == "none"


def test_the_last_of_one_key_serves(module):
    first = register(module.scale)
    second = register(module.returns_an_object, Key(PLAIN, M=4), args=[{"kind": "tensor", "arg": "out"}])
    assert called(arguments(4)) == "neither"
    assert called(arguments(5)) == "function"
    second.unregister()
    assert called(arguments(4)) == "function"
    first.unregister()
    assert called(arguments(4)) == "fallback"


def test_explain_says_what_is_called(module):
    register(module.scale, label="scale_cpp", pdl=True)
    words = hdispatch.explain(OP, *arguments(3))
    assert "row      1: scale_cpp\nvalid    1 <= M <= 9223372036854775807\nfunction scale_cpp in this process" in words
    assert words.endswith('environment\nargs     out, x, bias, 0.5, 3, None, driver "null"')


# ---- bundles with a library ----


def manifest(change: Any = lambda _: None) -> dict[str, Any]:
    """The toy's, with the rows of K = 512 served by a host function."""
    made = toy.manifest()
    head = {name: made["records"][0][name] for name in ("m_min", "m_max", "guards", "config")}
    args = [
        {"kind": "tensor", "arg": "result", "align": 16},
        {"kind": "tensor", "arg": "weight", "dtype": "int16"},
        {"kind": "tensor", "arg": "input", "dims": [1, 0]},
        {"kind": "none"},
        {"kind": "float", "arg": "epsilon"},
        {"kind": "int", "value": ["M", 2, "*"]},
        {"kind": "pdl"},
        {"kind": "stream"},
    ]
    function = {"launcher": "tvm_ffi", "backend": "cutedsl", "kernel": "toy_host", "file": LIBRARY, "function": "toy_f"}
    made["records"].append({**head, **function, "args": args, "pdl": True, "env_stream": False})
    made["host"] = host.describe()
    made["files"][LIBRARY] = {"sha256": toy.hashlib.sha256(b"library").hexdigest(), "size": 7}
    for row in made["rows"]:
        row["record"] = int(row["K"] == 512)
    made = copy.deepcopy(made)
    change(made)
    return made


def write(folder: Path, change: Any = lambda _: None) -> Path:
    toy.write(folder, manifest(change))
    (folder / LIBRARY).write_bytes(b"library")
    return folder


def test_a_bundle_with_both_kinds_of_row(tmp_path):
    hdispatch.load(write(tmp_path), driver="null")  # the library is not opened for the null driver
    assert (served(4, 64), served(4, 512)) == ("toy_kernel", "toy_host")
    args = toy.arguments(4, 512)
    with null.recording():
        toy.OP(*args)
        toy.OP(*toy.arguments(4, 64))
    first, second = null.launches()
    assert (first["function"], second["function"]) == ("toy_f", "toy_kernel")
    assert first["file"] == LIBRARY
    result, weight, x, none, epsilon, rows, pdl, stream = map(null.ffi_argument, first["params"])
    assert result == {
        "address": args[0].data_ptr(),
        "device": (1, 0),
        "dtype": (10, 8, 1),
        "shape": [4, 512],
        "strides": [512, 1],
    }
    assert (weight["dtype"], weight["shape"], weight["strides"]) == ((0, 16, 1), [512], [1])
    assert (x["shape"], x["strides"]) == ([512, 4], [1, 512])
    assert (none, epsilon, rows, pdl, stream) == (None, 1e-6, 8, 1, {"pointer": 0})


def test_pdl_is_an_option_of_load(tmp_path):
    hdispatch.load(write(tmp_path), driver="null", pdl=False)
    with null.recording():
        toy.OP(*toy.arguments(4, 512))
    assert null.ffi_argument(null.launches()[0]["params"][6]) == 0


def test_inspect_shows_a_function(tmp_path, capsys):
    folder = write(tmp_path)
    assert main(["inspect", str(folder), "--row", "6"]) == 0
    words = capsys.readouterr().out
    for part in (
        "kernel  toy_host by cutedsl",
        "   0 tensor result, a multiple of 16 bytes\n   1 tensor weight as int16\n   2 tensor input[dimensions 1, 0]\n",
        "   4 float  epsilon\n   5 int    M * 2\n   6 pdl    1 where the bundle is loaded with pdl\n   7 stream\nguards",
        "host function toy_f, pdl",
        f"{LIBRARY}, 7 B with all others, for {host.describe()['machine']} with ",
    ):
        assert part in words
    assert main(["inspect", str(folder)]) == 0
    assert "20 rows, 2 records, 3 cubins, 1 function," in capsys.readouterr().out


def function_record(m: dict[str, Any]) -> dict[str, Any]:
    record: dict[str, Any] = m["records"][1]
    return record


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.pop("host"), "kernel toy_host is a host function, but host, its CPU, is missing"),
        (lambda m: m["files"].pop(LIBRARY), f"kernel toy_host uses {LIBRARY}, which is not listed"),
        (lambda m: function_record(m).pop("args"), r"malformed: records\[1\].args is missing"),
        (
            lambda m: function_record(m).update(launcher="rocket"),
            r"\[1\].launcher is 'rocket'; it takes one of cubin, tvm_ffi",
        ),
        (lambda m: function_record(m).pop("launcher"), r"records\[1\].launcher is missing"),
        (lambda m: function_record(m)["args"][0].update(kind="string"), r"records\[1\].args\[0\].kind is 'string'"),
        (lambda m: function_record(m)["args"][0].pop("arg"), 'field "arg" is missing'),
        (lambda m: function_record(m)["args"][0].update(dims=[-1]), 'field "dims" is'),
        (
            lambda m: function_record(m)["args"][0].update(dtype="int3"),
            "is passed result, of float8_e4m3fn, as int3; it takes one of",
        ),
        (lambda m: function_record(m)["args"][5].pop("value"), 'field "value" is missing'),
        (lambda m: function_record(m)["args"][0].update(arg="residual"), "reads residual, which is None in variant bfloat16"),
    ],
)
def test_what_a_bundle_may_not_say(tmp_path, change, words):
    with pytest.raises(hdispatch.BundleError, match=words):
        hdispatch.load(write(tmp_path, change), driver="null")
    assert hdispatch.loaded() == []


# ---- the host's CPU ----


def test_the_cpu_here_runs_what_is_built_here():
    here = host.describe()
    assert here["features"]
    host.check("bundle", here)


@pytest.mark.parametrize(
    ("needed", "words"),
    [
        ({"machine": "pdp11", "features": []}, "bundle: its host functions are for pdp11; this machine is "),
        (
            {"features": ["avx512f", "avx2"]},
            "its host functions were compiled on a CPU with avx512f, which the CPU here",
        ),
    ],
)
def test_a_cpu_that_does_not(needed, words, tmp_path):
    (tmp_path / "cpuinfo").write_text("processor : 0\nflags\t\t: fpu sse2 avx2 aes avx512_vp2intersect fma\n")
    here = host.describe(tmp_path / "cpuinfo")
    assert here["features"] == ["avx2", "fma"]
    with pytest.raises(hdispatch.BundleError, match=re.escape(words)):
        host.check("bundle", {**here, **needed}, here)

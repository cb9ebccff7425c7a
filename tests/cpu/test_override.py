"""The drop-in on the null driver, over a stand-in for vLLM's library, whose CPU kernels note that they ran."""

from __future__ import annotations

import itertools
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hdispatch
import pytest
import torch
import toy
from hdispatch.integrations import vllm
from hdispatch.integrations.vllm import Form, Override, Route
from hdispatch.opspec import BoolArg, IntArg, OpSpec, TensorArg
from hdispatch.testing import null
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own

#: vLLM 0.33's, as torch prints them
SCHEMAS = """
static_scaled_fp8_quant(Tensor! result, Tensor input, Tensor scale, int[]? group_shape=None) -> ()
dynamic_scaled_fp8_quant(Tensor! result, Tensor input, Tensor! scale) -> ()
dynamic_per_token_scaled_fp8_quant(Tensor! result, Tensor input, Tensor! scale, Tensor? scale_ub) -> ()
rms_norm_dynamic_per_token_quant(Tensor! result, Tensor input, Tensor weight, Tensor! scale, float epsilon, Tensor? scale_ub, \
Tensor!? residual) -> ()
per_token_group_fp8_quant(Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps, float fp8_min, \
float fp8_max, bool scale_ue8m0, bool dummy_is_scale_transposed, bool dummy_is_tma_aligned) -> ()
per_token_group_fp8_quant_packed(Tensor input, Tensor! output_q, Tensor! output_s_packed, int group_size, float eps, \
float fp8_min, float fp8_max) -> ()
rms_norm_per_block_quant(Tensor! result, Tensor input, Tensor weight, Tensor! scale, float epsilon, Tensor? scale_ub, \
Tensor!? residual, int group_size, bool is_scale_transposed) -> ()
silu_and_mul_per_block_quant(Tensor! out, Tensor input, Tensor! scales, int group_size, Tensor? scale_ub=None, \
bool is_scale_transposed=False) -> ()
fused_qk_norm_rope(Tensor! qkv, int num_heads_q, int num_heads_k, int num_heads_v, int head_dim, float eps, \
Tensor q_weight, Tensor k_weight, Tensor cos_sin_cache, bool is_neox, Tensor position_ids, \
int forced_token_heads_per_warp=-1) -> ()
rms_norm(Tensor! result, Tensor input, Tensor? weight, float epsilon) -> ()
fused_add_rms_norm(Tensor! input, Tensor! residual, Tensor? weight, float epsilon) -> ()
silu_and_mul(Tensor! result, Tensor input) -> ()
rotary_embedding(Tensor positions, Tensor! query, Tensor!? key, int head_size, Tensor cos_sin_cache, bool is_neox, \
int rope_dim_offset=0, bool inverse=False) -> ()
cutlass_scaled_mm(Tensor! out, Tensor a, Tensor b, Tensor a_scales, Tensor b_scales, Tensor? bias) -> ()
""".strip().splitlines()

#: The toy's arguments as another library may have them: no default for the last but one.
TOY = (
    "toy(Tensor! result, Tensor input, Tensor weight, Tensor! scale, float epsilon, "
    "Tensor? scale_ub, Tensor!? residual=None) -> ()"
)
TOY_ROUTE = {"toy": (Route("toy"),)}
_numbers = itertools.count()


def nothing(*args: object) -> None: ...


SPECS = [
    # Two ops behind one name, told apart by the sizes of the scales; only the first has a bias.
    OpSpec(
        name="by_rows",
        args=(
            TensorArg("out", ("M", "K"), (torch.bfloat16,), mutated=True, layout="rows"),
            TensorArg("a", ("M", "K"), (torch.bfloat16,)),
            TensorArg("scales", ("M",), (torch.float32,), flat=True, broadcast=True),
            TensorArg("bias", ("K",), "a", optional=True),
        ),
        reference=nothing,
        sample=lambda *_: [],
        shapes=({"K": 256},),
        config_key={},
        ladder=(16,),
    ),
    OpSpec(
        name="by_groups",
        args=(
            TensorArg("out", ("M", "K"), (torch.bfloat16,), mutated=True, layout="rows"),
            TensorArg("a", ("M", "K"), (torch.bfloat16,)),
            TensorArg("scales", ("M", "K/128"), (torch.float32,), layout="any"),
        ),
        reference=nothing,
        sample=lambda *_: [],
        shapes=({"K": 256},),
        config_key={},
        ladder=(16,),
    ),
    # With an argument of its own at the end.
    OpSpec(
        name="grouped",
        args=(
            TensorArg("out", ("M", "K/group_size"), (torch.float32,), mutated=True, layout="any"),
            TensorArg("a", ("M", "K"), (torch.bfloat16,)),
            IntArg("group_size", values=(64, 128)),
            BoolArg("transposed", values=None, default=False),
            BoolArg("own", default=False),
        ),
        reference=nothing,
        sample=lambda *_: [],
        shapes=({"K": 256},),
        config_key={},
        ladder=(16,),
    ),
]
for _spec in SPECS:
    if _spec.name not in hdispatch.ops.names():
        hdispatch.ops.define(_spec)


def write_bundle(folder: Path) -> Path:
    """The toy's bundle with rows for every variant of the other ops."""
    content = toy.manifest()
    for spec in SPECS:
        record = toy.record()
        record["kernel"] = spec.name
        record["grid"] = [["M"], [1], [1]]
        record["params"] = [{"kind": "ptr", "arg": "out", "align": 4}, {"kind": "i32", "value": ["M"]}]
        record["guards"] = []
        for cubin in record["cubins"].values():
            cubin.update(params=[0, 1], function=spec.name)
        content["records"].append(record)
        content["ops"][spec.name] = {
            "schema": spec.schema(),
            "ladder": list(spec.ladder),
            "variants": spec.variant_arguments(),
        }
        content["rows"] += [
            {**content["rows"][0], "op": spec.name, "variant": v, "K": 256, "bucket": 0, "record": len(content["records"]) - 1}
            for v in spec.variant_arguments()
        ]
    return toy.write(folder, content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("override"))


@pytest.fixture(autouse=True)
def bundle(folder: Path) -> Iterator[hdispatch.Bundle]:
    loaded = hdispatch.load(folder, driver="null")
    hdispatch.stats(reset=True)
    yield loaded
    hdispatch.strict(False)
    loaded.unload()


class Library:
    """A library of ops in a namespace of its own; `calls` are the names of the kernels that ran."""

    def __init__(self, *schemas: str, namespace: str = "", kernels: bool = True) -> None:
        self.namespace = namespace or f"standin{next(_numbers)}"
        self.torch = torch.library.Library(self.namespace, "FRAGMENT")
        self.calls: list[str] = []
        for schema in schemas:
            self.torch.define(schema)
            if kernels:
                self.add_kernel(schema.partition("(")[0])

    def add_kernel(self, name: str) -> None:
        """A kernel that notes its name; the toy's does what the toy's reference does."""

        def kernel(*args: Any) -> None:
            self.calls.append(name)
            if name == "toy":
                if args[0].shape != args[1].shape:
                    raise ValueError("the other library's own words")
                toy.reference(*args)

        self.torch.impl(name, kernel, "CPU")

    @property
    def ops(self) -> Any:
        """torch.ops.<namespace>."""
        return getattr(torch.ops, self.namespace)

    def override(self, routes: dict[str, tuple[Route, ...]] = TOY_ROUTE) -> Override:
        """What `override_vllm_ops` does, for this namespace on the CPU."""
        return Override(self.namespace, "CPU", routes)

    def dump(self, name: str) -> str:
        """What torch's dispatcher has for the op."""
        return torch._C._dispatch_dump(f"{self.namespace}::{name}")


@pytest.fixture
def library() -> Library:
    return Library(TOY)


DOORS: dict[str, Callable[[Any], Callable[..., None]]] = {
    "packet": lambda packet: packet,
    "default": lambda packet: packet.default,
    "keywords": lambda packet: (
        lambda *args: packet(
            **dict(zip([arg.name for arg in toy.SPEC.args], args, strict=False)),
        )
    ),
}


@pytest.fixture(params=DOORS)
def door(request: pytest.FixtureRequest, library: Library) -> Callable[..., None]:
    return DOORS[request.param](library.ops.toy)  # held since before the override


def counts(op: str = "toy") -> dict[str, Any]:
    return hdispatch.stats()[op]


def hits(number: int, op: str = "toy") -> bool:
    return counts(op) == {"hits": number, "empty": 0, "fallbacks": 0, "misses": {}}


def missed(reason: str, number: int = 1, op: str = "toy") -> bool:
    return counts(op) == {"hits": 0, "empty": 0, "fallbacks": number, "misses": {reason: number}}


# ---- hits, misses, undo ----


def test_a_hit_is_launched_and_a_miss_runs_the_former_kernel(library, door):
    with library.override() as override:
        assert override.served == ["toy"]
        with null.recording():
            door(*toy.arguments(4, 64))
        assert len(null.launches()) == 1
        assert hits(1)
        assert library.calls == []
        hdispatch.stats(reset=True)
        args, wanted = toy.arguments(4, 513), toy.arguments(4, 513)
        toy.reference(*wanted)
        door(*args)
        assert missed("no row")
        assert library.calls == ["toy"]
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(args, wanted, strict=True) if isinstance(a, torch.Tensor))
        hdispatch.stats(reset=True)
        door(*toy.arguments(0))
        assert counts()["empty"] == 1
        assert library.calls == ["toy"]
    door(*toy.arguments(4, 64))
    assert library.calls == ["toy", "toy"]


def test_every_reason_to_miss(library, door, bundle):
    with library.override():
        args = toy.arguments(4, 64)
        args[1] = torch.zeros(4, 72, dtype=torch.bfloat16)[:, :64]
        door(*args)
        assert missed("guard: input.stride(0) % 16 == 0")
        hdispatch.stats(reset=True)
        bundle.unload()
        door(*toy.arguments(4, 64))
        assert missed("no table")
        assert library.calls == ["toy"] * 2


def test_a_wrong_call_gets_the_former_kernels_error(library, door):
    args = toy.arguments(4, 64)
    args[0] = args[0][:3]
    with library.override():
        with pytest.raises(ValueError, match="the other library's own words"):
            door(*args)
        assert missed("override: arguments that the op does not take")
        args = toy.arguments(4, 64)
        args[1], args[2] = args[1].float(), args[2].float()  # which only the former kernel takes
        door(*args)
        assert library.calls == ["toy"] * 2
        assert counts()["fallbacks"] == 2


def test_wrong_types_get_torchs_error(library, door):
    before = []
    for wrong in ({4: "1"}, {4: None}, {1: 3}, {5: 1.5}):
        args = toy.arguments(4, 64)
        for index, value in wrong.items():
            args[index] = value
        with pytest.raises((RuntimeError, TypeError)) as raised:
            door(*args)
        before.append((args, str(raised.value)))
    with library.override():
        for args, text in before:
            with pytest.raises((RuntimeError, TypeError)) as raised:
                door(*args)
            assert str(raised.value).split("\n")[0] == text.split("\n")[0]
    assert library.calls == []


def test_missing_and_surplus_arguments(library):
    args = toy.arguments(4, 64)
    with library.override():
        library.ops.toy(*args[:6])  # its last argument has a default
        assert hits(1)
        for wrong in (args[:5], [*args, None], []):
            with pytest.raises(RuntimeError):
                library.ops.toy(*wrong)
        with pytest.raises(RuntimeError):
            library.ops.toy(*args, nonsense=1)
        library.ops.toy(*args[:4], scale_ub=None, epsilon=1)
        assert hits(2)
    assert library.calls == []


def test_strict_mode(library, door):
    with library.override(), hdispatch.strict():
        door(*toy.arguments(4, 64))
        with pytest.raises(hdispatch.MissError, match="nearest rows"):
            door(*toy.arguments(4, 513))
        args = toy.arguments(4, 64)
        args[0] = args[0][:3]
        with pytest.raises(hdispatch.MissError, match=r"toy is not served by toy: toy: result has size\(0\) = 3; it takes 4"):
            door(*args)
    assert library.calls == []
    assert counts()["hits"] == 1


def test_undo_restores_exactly(library):
    packet, default, before = library.ops.toy, library.ops.toy.default, library.dump("toy")
    override = library.override()
    assert library.ops.toy is packet
    assert packet.default is default
    assert type(packet) is not torch._ops.OpOverloadPacket
    assert isinstance(packet, torch._ops.OpOverloadPacket)
    assert repr(packet) == f"<OpOverloadPacket(op='{library.namespace}.toy')>"
    assert "hdispatch" in library.dump("toy") != before
    held = packet.__call__
    for _ in range(2):
        override.undo()
        assert library.dump("toy") == before
        assert type(packet) is torch._ops.OpOverloadPacket
        assert override.served == []
    held(*toy.arguments(4, 64))
    assert library.calls == ["toy"]


def test_nested_overrides(library):
    before = library.dump("toy")
    outer = library.override()
    with library.override() as inner, library.override():
        assert inner.served == ["toy"]
        library.ops.toy(*toy.arguments(4, 513))
        assert missed("no row")  # once
    library.ops.toy(*toy.arguments(4, 64))
    assert counts()["hits"] == 1
    inner.undo()
    inner = library.override()
    outer.undo()
    library.ops.toy.default(*toy.arguments(4, 64))
    assert counts()["hits"] == 2
    inner.undo()
    assert library.dump("toy") == before
    library.ops.toy(*toy.arguments(4, 64))
    assert library.calls == ["toy"] * 2


def test_many_times(library):
    before = library.dump("toy")
    for _ in range(200):
        with library.override():
            library.ops.toy.default(*toy.arguments(4, 64))
    assert hits(200)
    assert library.dump("toy") == before


def test_torchs_warning_is_left_to_others(library):
    """torch warns of an overridden kernel once in a process; an override neither shows the warning nor uses it up."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with library.override():
            pass
    assert not seen


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
def test_another_override_on_top(library):
    """Whoever overrides later wins, and stays after our undo."""
    override = library.override()
    theirs = torch.library.Library(library.namespace, "IMPL")
    theirs.impl("toy", lambda *_: library.calls.append("theirs"), "CPU", allow_override=True)
    library.ops.toy.default(*toy.arguments(4, 64))
    override.undo()
    library.ops.toy(*toy.arguments(4, 64))
    assert library.calls == ["theirs"] * 2
    assert hits(0)
    theirs._destroy()
    library.ops.toy(*toy.arguments(4, 64))
    assert library.calls == ["theirs", "theirs", "toy"]


# ---- torch's machinery ----


def test_kernels_that_torch_calls_first_are_called(library):
    """Then the packet stays as it is: the door would leave them out."""
    library.torch.impl("toy", lambda keys, *args: redispatch(keys, args), "AutogradCPU", with_keyset=True)
    seen = []

    def redispatch(keys: torch._C.DispatchKeySet, args: tuple[object, ...]) -> None:
        seen.append("autograd")
        library.ops.toy.default.redispatch(keys & torch._C._after_autograd_keyset, *args)

    with library.override():
        library.ops.toy(*toy.arguments(4, 64))
    assert seen == ["autograd"]
    assert hits(1)


def test_inference_mode(library, door):
    with library.override():
        with torch.inference_mode():
            args = toy.arguments(4, 64)
            assert args[0].is_inference()
            door(*args)
        with torch.no_grad():
            door(*toy.arguments(4, 64))
        door(*args[:1], *toy.arguments(4, 64)[1:])
    assert hits(3)


def test_writes_bump_versions(library, door):
    args = toy.arguments(4, 64, "bfloat16+scale_ub+residual")
    before = [a._version if isinstance(a, torch.Tensor) else 0 for a in args]
    with library.override():
        door(*args)
    after = [a._version if isinstance(a, torch.Tensor) else 0 for a in args]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 0, 0, 1, 0, 0, 1]


def test_tensors_that_require_grad_are_torchs_to_judge(library, door):
    """As without us: torch has no derivative and says so in the backward pass, if one comes."""
    args = toy.arguments(4, 64)
    args[2] = torch.nn.Parameter(args[2])
    with library.override():
        door(*args)
        with torch.no_grad():
            door(*args)
    assert hits(2)


def test_modes_and_subclasses_go_through_torch(library):
    seen = []

    class Function(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    class Subclass(torch.Tensor):
        pass

    args = toy.arguments(4, 64)
    with library.override():
        for mode in (Function, Dispatch):
            with mode():
                library.ops.toy(*args)
        args[1] = args[1].as_subclass(Subclass)
        library.ops.toy(*args)
    assert len(seen) == 2
    assert all("toy" in name for name in seen)
    assert hits(3)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_code(library, backend):
    torch._dynamo.reset()
    packet = library.ops.toy

    def by_attribute(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        result = torch.empty_like(x, dtype=torch.float8_e4m3fn)
        library.ops.toy(result, x, WEIGHT, scale, 1e-6, None)
        packet(result, x, WEIGHT, scale, 1e-6, None)
        packet.default(result, x, WEIGHT, scale, 1e-6, None)
        return result

    x, scale = torch.zeros(4, 64, dtype=torch.bfloat16), torch.zeros(4, 1)
    compiled = torch.compile(by_attribute, fullgraph=True, backend=backend)
    override = library.override()
    compiled(x, scale)
    assert hits(3)
    assert library.calls == []
    override.undo()
    compiled(x, scale)
    assert library.calls == ["toy"] * 3
    with library.override(), torch.compiler.set_stance("fail_on_recompile"):
        compiled(x, scale)
    assert hits(6)
    with library.override():
        compiled(torch.zeros(5, 64, dtype=torch.bfloat16), torch.zeros(5, 1))
    assert hits(9)


WEIGHT = torch.ones(64, dtype=torch.bfloat16)


def test_compiled_before_the_library_is_looked_up():
    """Dynamo's own look-up is the first one."""
    torch._dynamo.reset()
    late = Library()
    override = late.override()
    late.torch.define(TOY)
    late.add_kernel("toy")
    namespace = late.ops

    def function(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        result = torch.empty_like(x, dtype=torch.float8_e4m3fn)
        namespace.toy(result, x, WEIGHT, scale, 1e-6, None)
        return result

    torch.compile(function, fullgraph=True, backend="aot_eager")(torch.zeros(4, 64, dtype=torch.bfloat16), torch.zeros(4, 1))
    assert override.served == ["toy"]
    assert hits(1)
    override.undo()


def test_threads(library):
    failures = []

    def work(index: int) -> None:
        try:
            for m in range(1, 101):
                call = library.ops.toy if index % 2 else library.ops.toy.default
                call(*toy.arguments(m, 64))
                call(*toy.arguments(m, 72))
        except Exception as error:
            failures.append(error)

    with library.override():
        threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    assert counts() == {"hits": 800, "empty": 0, "fallbacks": 800, "misses": {"no row": 800}}
    assert len(library.calls) == 800


# ---- libraries that are loaded later ----


@pytest.mark.parametrize("name", ["packet", "default"])
def test_loaded_after(name):
    late = Library()
    override = late.override()
    assert (override.served, override.waiting) == ([], ["toy"])
    with pytest.raises(AttributeError, match="has no attribute 'toy'"):
        late.ops.toy  # noqa: B018
    assert not hasattr(late.ops, "other")
    late.torch.define(TOY)
    late.torch.define("other(Tensor x) -> ()")
    late.add_kernel("toy")
    late.ops.other  # noqa: B018
    assert override.waiting == ["toy"]
    DOORS[name](late.ops.toy)(*toy.arguments(4, 64))
    assert (override.served, override.waiting) == (["toy"], [])
    assert hits(1)
    assert type(late.ops) is torch._ops._OpNamespace
    override.undo()
    late.ops.toy(*toy.arguments(4, 64))
    assert late.calls == ["toy"]


def test_loaded_after_undo():
    late = Library()
    with late.override():
        assert type(late.ops) is not torch._ops._OpNamespace
    assert type(late.ops) is torch._ops._OpNamespace
    late.torch.define(TOY)
    late.add_kernel("toy")
    late.ops.toy(*toy.arguments(4, 64))
    assert late.calls == ["toy"]


def test_loaded_in_parts():
    """Some ops are there, some come later, and two overrides wait."""
    late = Library(TOY)
    routes = {**TOY_ROUTE, "more": (Route("grouped"),)}
    first, second = late.override(routes), late.override(routes)
    assert (first.served, first.waiting) == (["toy"], ["more"])
    late.torch.define("more(Tensor! out, Tensor a, int group_size, bool transposed=False) -> ()")
    late.add_kernel("more")
    more = late.ops.more
    assert first.served == second.served == ["toy", "more"]
    more(torch.zeros(4, 2), torch.zeros(4, 256).bfloat16(), 128)
    assert hits(1, "grouped")
    first.undo()
    more(torch.zeros(4, 2), torch.zeros(4, 256).bfloat16(), 128)
    assert hits(2, "grouped")
    second.undo()
    assert type(more) is torch._ops.OpOverloadPacket


def test_defined_without_a_kernel():
    """Until the kernel is there, nothing is overridden; a later override finds it."""
    late = Library(TOY, kernels=False)
    with late.override() as override:
        assert override.waiting == ["toy"]
        with pytest.raises(NotImplementedError):
            late.ops.toy(*toy.arguments(4, 64))
        late.add_kernel("toy")
        with late.override() as second:
            assert second.served == ["toy"]
            late.ops.toy(*toy.arguments(4, 64))
            assert hits(1)


# ---- schemas ----

DRIFTED = {
    "name": TOY.replace("epsilon", "eps"),
    "type": TOY.replace("float epsilon", "int epsilon"),
    "mutability": TOY.replace("Tensor! scale", "Tensor scale"),
    "optional": TOY.replace("Tensor? scale_ub", "Tensor scale_ub"),
    "order": TOY.replace("Tensor input, Tensor weight", "Tensor weight, Tensor input"),
    "default": TOY.replace("float epsilon, Tensor? scale_ub", "float epsilon=1e-5, Tensor? scale_ub=None"),
    "result": TOY.replace("-> ()", "-> Tensor"),
    "one more": TOY.replace("residual=None", "residual=None, bool fast=False"),
    "one less": TOY.replace("float epsilon, Tensor? scale_ub, Tensor!? residual=None", "float epsilon").replace(
        ", float epsilon", ""
    ),
    "keyword only": TOY.replace("Tensor!? residual", "*, Tensor!? residual"),
}


@pytest.mark.parametrize("schema", DRIFTED.values(), ids=DRIFTED.keys())
def test_a_drifted_schema_is_refused(schema):
    library = Library(schema)
    before = library.dump("toy")
    with pytest.warns(UserWarning, match=rf"does not override torch.ops.{library.namespace}.toy: its schema is"):
        override = library.override()
    assert (override.served, override.waiting) == ([], [])
    assert "expected" in override.refused["toy"]
    assert library.dump("toy") == before
    assert type(library.ops.toy) is torch._ops.OpOverloadPacket


def test_a_drifted_schema_is_refused_later():
    late = Library()
    override = late.override()
    late.torch.define(DRIFTED["name"])
    with pytest.warns(UserWarning, match="its schema is"):
        late.ops.toy  # noqa: B018
    assert list(override.refused) == ["toy"]


def test_overloads_are_refused():
    library = Library(TOY, TOY.replace("toy(", "toy.other("), kernels=False)
    with pytest.warns(UserWarning, match="it has the overloads"):
        assert list(library.override().refused) == ["toy"]


@pytest.fixture(scope="module")
def standin() -> Library:
    return Library(*SCHEMAS)


def test_every_op_of_vllm_fits(standin):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with standin.override(vllm.ROUTES) as override:
            assert sorted(override.served) == sorted(vllm.ROUTES) == sorted(s.partition("(")[0] for s in SCHEMAS)


@pytest.mark.parametrize("name", vllm.ROUTES)
def test_every_op_of_vllm_gets_its_own_arguments_back(standin, name, bundle):
    """Nothing of these is loaded: all calls miss, through both doors, and reach vLLM's kernel."""
    for route in vllm.ROUTES[name]:
        spec = hdispatch.ops.spec(route.op)
        variant = next(v for v in spec.variants() if all(value is not True for value in v.static.values()))
        sizes = {"M": 4, "K": 1024, "N": 1024}
        args = spec.sample(variant, sizes, torch.device("cpu"), torch.Generator().manual_seed(0))
        packet = getattr(standin.ops, name)
        args = args[: len(packet.default._schema.arguments)]
        args += [None] * (len(packet.default._schema.arguments) - len(args))
        standin.calls.clear()
        with standin.override({name: vllm.ROUTES[name]}):
            packet(*args)
            packet.default(*args)
        assert standin.calls == [name] * 2
        assert missed("no table", 2, route.op), counts(route.op)
        hdispatch.stats(reset=True)


def test_the_public_function():
    with pytest.raises(hdispatch.HdispatchError, match="no such ops of vLLM are served: nonsense; there are cutlass_scaled_mm"):
        hdispatch.override_vllm_ops(["rms_norm", "nonsense"])
    with hdispatch.override_vllm_ops(["rms_norm"]) as override:
        assert override.waiting == ["rms_norm"]
        assert "waiting ['rms_norm']" in repr(override)
    with hdispatch.override_vllm_ops() as override:
        assert sorted(override.waiting + override.served) == sorted(vllm.ROUTES)


# ---- two routes, own arguments, forms ----


@pytest.mark.parametrize("door", ["packet", "default"])
def test_two_routes(door):
    library = Library("mm(Tensor! out, Tensor a, Tensor scales, Tensor? bias) -> ()")
    routes = {"mm": (Route("by_rows"), Route("by_groups", (Form("out", "rows"), Form("scales", "packed"))))}
    out, a, bias = torch.zeros(4, 256).bfloat16(), torch.zeros(4, 256).bfloat16(), torch.zeros(256).bfloat16()
    groups = torch.zeros(2, 4).t()
    with library.override(routes):
        call = DOORS[door](library.ops.mm)
        call(out, a, torch.zeros(4), None)
        call(out, a, torch.zeros(4, 1), bias)
        call(out, a, torch.zeros(1), bias)
        assert hits(3, "by_rows")
        call(out, a, groups, None)
        assert hits(1, "by_groups")
        assert library.calls == []

        hdispatch.stats(reset=True)
        call(out, a, groups.contiguous(), None)  # the other kernel does not read strides: another result
        call(out, a, groups, bias)  # nor has the second op a bias
        call(torch.zeros(4, 512).bfloat16()[:, :256], a, groups, None)
        call(out, a, torch.zeros(5), None)
        assert library.calls == ["mm"] * 4
        # Neither op takes the arguments; then the first one counts.
        assert missed("override: arguments that the op does not take", 4, "by_rows")
        assert hits(0, "by_groups")

        hdispatch.stats(reset=True)
        a512 = torch.zeros(4, 512).bfloat16()
        call(torch.zeros_like(a512), a512, torch.zeros(4, 4), None)
        assert hits(0, "by_groups")
        call(torch.zeros_like(a512), a512, torch.zeros(4, 4).t(), None)
        assert missed("no row", 1, "by_groups")  # the one that takes the arguments


@pytest.mark.parametrize("door", ["packet", "default"])
def test_own_arguments_take_their_defaults(door):
    library = Library("more(Tensor! out, Tensor a, int group_size, bool transposed=False) -> ()")
    a = torch.zeros(4, 256).bfloat16()
    with library.override({"more": (Route("grouped"),)}):
        call = DOORS[door](library.ops.more)
        call(torch.zeros(4, 2), a, 128)
        call(torch.zeros(4, 4), a, 64, True)
        assert hits(2, "grouped")
        call(torch.zeros(4, 8), a, 32, False)
        assert library.calls == ["more"]


ROWS, COLUMNS, PADDED = torch.zeros(4, 2), torch.zeros(2, 4).t(), torch.zeros(2, 16).t()[:4]
ONE = torch.zeros(1, 2)
#: form -> (tensors that are served without and, if there is a flag, with it set)
FORMS = [
    (Form("out", "rows"), [ROWS, ONE], [COLUMNS, PADDED, torch.zeros(4, 3)[:, :2]]),
    (Form("out", "columns"), [COLUMNS, PADDED, ONE], [ROWS]),
    (Form("out", "packed"), [COLUMNS, ONE], [ROWS, PADDED, torch.zeros(2, 4).t()[:1]]),
    (Form("out", "either"), [ROWS, COLUMNS, PADDED, ONE, torch.zeros(2, 4).t()[:1]], [torch.zeros(4, 3)[:, :2]]),
    (Form("out", "either"), [], [torch.zeros(8, 4)[::2, ::2], torch.empty_strided((1, 2), (5, 3))]),
]


@pytest.mark.parametrize(("form", "served", "others"), FORMS)
def test_forms(form, served, others):
    library = Library("more(Tensor! out, Tensor a, int group_size, bool transposed=False) -> ()")
    with library.override({"more": (Route("grouped", (form,)),)}):
        for out in served:
            library.ops.more(out, torch.zeros(len(out), 256).bfloat16(), 128)
            library.ops.more.default(out, torch.zeros(len(out), 256).bfloat16(), 128)
        assert hits(2 * len(served), "grouped")
        hdispatch.stats(reset=True)
        for out in others:
            library.ops.more(out, torch.zeros(len(out), 256).bfloat16(), 128)
        assert missed("override: strides that the overridden op does not read", len(others), "grouped")


def test_forms_by_flag():
    library = Library("more(Tensor! out, Tensor a, int group_size, bool transposed=False) -> ()")
    a = torch.zeros(4, 256).bfloat16()
    with library.override({"more": (Route("grouped", (Form("out", "columns", flag="transposed"),)),)}):
        library.ops.more(ROWS, a, 128)
        library.ops.more(COLUMNS, a, 128, True)
        library.ops.more(PADDED, a, 128, True)
        assert hits(3, "grouped")
        library.ops.more(ROWS, a, 128, True)
        library.ops.more(COLUMNS, a, 128)
        library.ops.more.default(COLUMNS, a, 128)
    assert library.calls == ["more"] * 3
    with (
        library.override({"more": (Route("grouped", (Form("out", "packed"),)),)}),
        hdispatch.strict(),
        pytest.raises(hdispatch.MissError, match="more is not served by grouped: strides that the overridden op does not"),
    ):
        library.ops.more(ROWS, a, 128)


def test_only_tensors_of_the_overridden_device():
    """The door from Python too leaves tensors of another device to torch, even with nothing to do."""
    library = Library(TOY)
    library.torch.impl("toy", lambda *_: library.calls.append("cuda"), "CUDA")
    with Override(library.namespace, "CUDA", TOY_ROUTE) as override:
        assert override.served == ["toy"]
        library.ops.toy(*toy.arguments(4, 64))
        library.ops.toy(*toy.arguments(0, 64))
    assert library.calls == ["toy", "toy"]
    assert hits(0)

"""The drop-in on the null driver: libraries that are loaded later, schemas, vLLM's ops, and what strides they presume."""

from __future__ import annotations

import warnings

import hdispatch
import pytest
import torch
import toy
from hdispatch.integrations import vllm
from hdispatch.integrations.vllm import Form, Override, Route
from standin import DOORS, SCHEMAS, TOY, TOY_ROUTE, Library, counts, hits, missed, write_bundle

#: What writes the bundle in `folder` (conftest.py).
WRITE = write_bundle

pytestmark = [
    pytest.mark.usefixtures("bundle"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),  # torch's own
]


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
    "one more, keyword only": TOY.replace("residual=None", "residual=None, *, Tensor? bias=None"),
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
        spec = hdispatch.registry.spec(route.op)
        variant = next(v for v in spec.variants() if all(value is not True for value in v.static.values()))
        sizes = {"M": 4, "K": 1024, "N": 2 if name == "reshape_and_cache_flash" else 1024}  # its caches have N heads
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
        form = "strides that the overridden op does not read"
        assert counts("by_rows")["misses"] == {
            f"override: scales: size (by_rows); scales: {form} (by_groups)": 1,
            "override: scales: strides (by_rows); bias: not None (by_groups)": 1,
            f"override: scales: strides (by_rows); out: {form} (by_groups)": 1,
            "override: scales: size (by_rows); scales: rank (by_groups)": 1,
        }
        assert counts("by_rows")["fallbacks"] == 4
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
        assert missed("override: out: strides that the overridden op does not read", len(others), "grouped")


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
        pytest.raises(hdispatch.MissError, match="more is not served by grouped: out: strides that the overridden op does not"),
    ):
        library.ops.more(ROWS, a, 128)


def test_only_tensors_of_the_overridden_device():
    """The door from Python too leaves tensors of another device to torch, even with nothing to do."""
    library = Library(TOY)
    library.torch.impl("toy", lambda *_: library.calls.append("cuda"), "CUDA")
    with Override("CUDA", TOY_ROUTE, library.namespace) as override:
        assert override.served == ["toy"]
        library.ops.toy(*toy.arguments(4, 64))
        library.ops.toy(*toy.arguments(0, 64))
    assert library.calls == ["toy", "toy"]
    assert hits(0)

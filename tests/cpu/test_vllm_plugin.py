"""The vLLM plug-in without vLLM: its switches, why it refuses a configuration, its workspace, the weights it binds."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import pathlib
import sys
from types import SimpleNamespace as Object

import hdispatch
import pytest
import torch
import toy
from hdispatch import HdispatchError
from hdispatch.integrations.vllm import attention as attention_module
from hdispatch.integrations.vllm import layers, plugin, schemes, settings, support, weights, workspace
from hdispatch.integrations.vllm.workspace import rows_within
from hdispatch.ladders import Ladders

FP8 = torch.float8_e4m3fn


# ---- switches ----


@pytest.mark.parametrize(("value", "on"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_the_switch(monkeypatch, value, on):
    monkeypatch.delenv("HDISPATCH", raising=False)
    if value is not None:
        monkeypatch.setenv("HDISPATCH", value)
    assert settings.is_on() is on


def test_a_wrong_switch_is_an_error(monkeypatch):
    monkeypatch.setenv("HDISPATCH", "yes")
    with pytest.raises(HdispatchError, match=r"HDISPATCH is 'yes'; it takes 1 .* or 0"):
        plugin.register()


def test_what_decode_steps_take(monkeypatch, tmp_path):
    monkeypatch.delenv("HDISPATCH_ATTENTION", raising=False)
    assert settings.attention() == "auto"
    for value in settings.ATTENTIONS:
        monkeypatch.setenv("HDISPATCH_ATTENTION", value)
        assert settings.attention() == value
    monkeypatch.setenv("HDISPATCH_ATTENTION", "fa2")
    with pytest.raises(HdispatchError, match="HDISPATCH_ATTENTION is 'fa2'; it takes auto, half, fa3"):
        settings.attention()


def test_off_it_does_not_even_look_for_vllm(monkeypatch):
    monkeypatch.setenv("HDISPATCH", "0")
    monkeypatch.setitem(sys.modules, "vllm", None)  # any import of it raises
    plugin.register()


@pytest.mark.parametrize("name", ["HDISPATCH_ATTENTION", "HDISPATCH_REPLAY"])
def test_wrong_settings_are_told_before_a_model_is_made(monkeypatch, tmp_path, fake_vllm, name):
    monkeypatch.setenv("HDISPATCH_BUNDLE", str(tmp_path))
    monkeypatch.setenv(name, "yes")
    with pytest.raises(HdispatchError, match=f"{name} is 'yes'; it takes"):
        plugin.register()
    assert f"{name} is 'yes'" in plugin.examine()["reason"]


def test_a_bundle_must_be_named(monkeypatch, tmp_path):
    monkeypatch.delenv("HDISPATCH_BUNDLE", raising=False)
    with pytest.raises(HdispatchError, match="HDISPATCH=1 needs HDISPATCH_BUNDLE"):
        settings.bundle_folder()
    monkeypatch.setenv("HDISPATCH_BUNDLE", str(tmp_path / "none"))
    with pytest.raises(HdispatchError, match="which is no folder"):
        settings.bundle_folder()
    monkeypatch.setenv("HDISPATCH_BUNDLE", str(tmp_path))
    assert settings.bundle_folder() == tmp_path
    settings.load_bundle(torch.device("cpu"))  # the references serve CPU tensors: nothing to load


# ---- what doctor says ----


@pytest.fixture
def fake_vllm(monkeypatch):
    """A vLLM 0.33 on CUDA whose models are not there."""
    monkeypatch.setattr(plugin.importlib.metadata, "version", lambda _: "0.33.0")
    monkeypatch.setitem(sys.modules, "vllm", Object(__version__="0.33.0"))
    platform = Object(is_cuda=lambda: True, device_name="cuda")
    monkeypatch.setitem(sys.modules, "vllm.platforms", Object(current_platform=platform))
    monkeypatch.setitem(sys.modules, "vllm.distributed", None)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setenv("HDISPATCH", "1")
    return platform


def test_doctor_says_why_vllm_would_not_be_served(monkeypatch, tmp_path, fake_vllm):
    def reason():
        found = plugin.examine()
        assert not found["ok"]
        assert found["version"] == "0.33.0"
        return found["reason"]

    monkeypatch.setenv("HDISPATCH_BUNDLE", str(tmp_path))
    assert reason().startswith("vLLM cannot be imported: ModuleNotFoundError")
    fake_vllm.is_cuda = lambda: False
    assert reason() == "vLLM runs on cuda; the plug-in is for CUDA"
    sys.modules["vllm"].__version__ = "0.34.1"
    assert reason() == "this is vLLM 0.34.1; the plug-in is for 0.33"
    monkeypatch.setenv("HDISPATCH_BUNDLE", "")
    assert "HDISPATCH=1 needs HDISPATCH_BUNDLE" in reason()
    monkeypatch.setenv("HDISPATCH", "0")
    assert reason() == "HDISPATCH is not 1: the plug-in does nothing"
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    assert reason() == "VLLM_PLUGINS is 'another', which leaves hdispatch out"
    monkeypatch.setattr(plugin.importlib.metadata, "entry_points", lambda **_: [])
    assert "no entry point in vllm.general_plugins" in reason()


def test_doctor_without_vllm(monkeypatch):
    def missing(name):
        raise plugin.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(plugin.importlib.metadata, "version", missing)
    found = {"ok": False, "reason": "vLLM is not installed", "version": None, "models": [], "decode": ""}
    assert plugin.examine() == found


@pytest.mark.parametrize(("version", "cuda"), [("0.34.0", True), ("0.33.0", False)])
def test_a_vllm_that_does_not_fit_is_left_alone(monkeypatch, caplog, fake_vllm, version, cuda):
    sys.modules["vllm"].__version__ = version
    fake_vllm.is_cuda = lambda: cuda
    plugin.register()
    assert "hdispatch: off: " in caplog.text
    assert not plugin._OVERRIDE


# ---- reasons ----


def config(**changes):
    """A VllmConfig that is served, with changes given as parallel_config__enable=… ."""
    found = Object(
        lora_config=None,
        kv_transfer_config=None,
        parallel_config=Object(
            pipeline_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            use_ubatching=False,
        ),
        cache_config=Object(kv_sharing_fast_prefill=False),
        model_config=Object(dtype=torch.bfloat16),
    )
    return changed(found, changes)


def attention(**changes):
    impl = type("FlashAttentionImpl", (Object,), {})(
        vllm_flash_attn_version=3,
        kv_cache_dtype="auto",
        attn_type="decoder",
        sliding_window=(-1, -1),
        alibi_slopes=None,
        logits_soft_cap=0,
        sinks=None,
        batch_invariant_enabled=False,
    )
    return changed(Object(impl=impl, query_quant=None, kv_sharing_target_layer_name=None), changes)


def changed(found, changes):
    for path, value in changes.items():
        *owners, name = path.split("__")
        owner = found
        for each in owners:
            owner = getattr(owner, each)
        setattr(owner, name, value)
    return found


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"lora_config": Object()}, "LoRA is on"),
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline parallel over 2 ranks"),
        ({"parallel_config__decode_context_parallel_size": 2}, "decode context parallel over 2 ranks"),
        ({"parallel_config__prefill_context_parallel_size": 4}, "prefill context parallel over 4 ranks"),
        ({"parallel_config__use_ubatching": True}, "micro-batches"),
        ({"kv_transfer_config": Object(kv_connector="NixlConnector")}, "a KV connector is configured"),
        ({"cache_config__kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill is on"),
        ({"model_config__dtype": torch.float32}, "the model's dtype is torch.float32; expected bfloat16 or float16"),
    ],
)
def test_configurations_that_are_refused(change, reason):
    support.check_config(config())
    with pytest.raises(support.UnsupportedError, match=reason):
        support.check_config(config(**change))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"impl": Object()}, "the attention backend is SimpleNamespace; expected FlashAttention"),
        ({"impl__vllm_flash_attn_version": 2}, "FlashAttention 2 is in use; expected 3"),
        ({"impl__kv_cache_dtype": "fp8"}, "the KV cache is fp8; expected auto"),
        ({"impl__attn_type": "encoder_only"}, "attention is encoder_only"),
        ({"impl__sliding_window": (4095, 0)}, "sliding window"),
        ({"impl__alibi_slopes": torch.ones(4)}, "ALiBi"),
        ({"impl__logits_soft_cap": 30.0}, "soft cap, 30.0"),
        ({"impl__sinks": torch.ones(4)}, "sinks"),
        ({"impl__batch_invariant_enabled": True}, "VLLM_BATCH_INVARIANT is on"),
        ({"query_quant": Object()}, "queries are quantized"),
        ({"kv_sharing_target_layer_name": "model.layers.0"}, "the KV cache is shared with model.layers.0"),
    ],
)
def test_attention_that_is_refused(change, reason):
    support.check_attention(attention())
    with pytest.raises(support.UnsupportedError, match=reason):
        support.check_attention(attention(**change))


def test_steps_that_are_refused():
    model = Object(aux_hidden_state_layers=())
    ours = Object(model=model)
    positions = torch.zeros(4, dtype=torch.int64)
    assert support.step_reason(ours, positions, None) is None
    assert "intermediate tensors" in support.step_reason(ours, positions, Object())
    assert "2 dimensions" in support.step_reason(ours, positions.expand(3, 4), None)
    model.aux_hidden_state_layers = (2, 18)
    assert "hidden states of layers in between" in support.step_reason(ours, positions, None)


# ---- weights ----

K, N = 256, 384


def linear(method="CompressedTensorsLinearMethod", **more):
    """A linear layer of vLLM's as it is loaded: fp8 by columns with a scale per column."""
    found = {
        "quant_method": type(method, (), {})(),
        "scheme": type("CompressedTensorsW8A8Fp8", (), {})(),
        "skip_bias_add": False,
        "bias": None,
        "weight": torch.zeros(N, K).to(FP8).t(),
        "weight_scale": torch.ones(N, 1),
        "input_scale": None,
    }
    return Object(**(found | more))


def bind(module):
    return weights.bind_linear("qkv_proj", module, K, N, torch.bfloat16)


def test_schemes_of_what_is_loaded():
    scheme, bound = bind(linear())
    assert type(scheme) is schemes.PerTokenFp8
    assert bound.sizes == (K, N)
    scheme, _ = bind(linear(weight_scale=torch.ones(1)))
    assert type(scheme) is schemes.PerTokenFp8
    scheme, bound = bind(linear("Fp8LinearMethod", input_scale=torch.tensor(0.5), weight_scale=torch.ones(())))
    assert type(scheme) is schemes.StaticFp8
    assert bound.input_scale.tolist() == [0.5]
    rows = torch.zeros(N, K).to(FP8)
    scheme, bound = bind(
        linear("Fp8LinearMethod", weight=rows, weight_block_size=[128, 128], weight_scale_inv=torch.ones(3, 2))
    )
    assert type(scheme) is schemes.BlockFp8
    assert (bound.sizes, tuple(bound.scale.shape)) == ((K, N), (2, 3))
    scheme, bound = bind(linear("UnquantizedLinearMethod", weight=torch.zeros(N, K, dtype=torch.bfloat16)))
    assert type(scheme) is schemes.Scheme
    assert bound.sizes == (K, N)


def test_a_weight_by_rows_is_turned():
    _, bound = bind(linear("Fp8LinearMethod", weight=torch.zeros(N, K).to(FP8)))
    assert (tuple(bound.weight.shape), bound.weight.stride(0)) == ((K, N), 1)


def test_a_sums_bias_is_added_by_the_first_rank_alone():
    kind = type("RowParallelLinear", (Object,), {})
    for rank in (0, 1):
        module = kind(**vars(linear()), tp_rank=rank)
        module.bias = torch.zeros(N, dtype=torch.bfloat16)
        _, bound = bind(module)
        assert (bound.bias is None) == (rank == 1)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (linear("AutoAWQLinearMethod"), "qkv_proj is quantized by AutoAWQLinearMethod"),
        (linear(scheme=Object()), "quantized by SimpleNamespace; served is CompressedTensorsW8A8Fp8"),
        (linear(skip_bias_add=True), "leaves its bias"),
        (linear(input_scale_ub=torch.ones(1)), "bounds the scale"),
        (linear(weight=torch.zeros(N, K, dtype=torch.int32)), "weight is torch.int32; expected torch.bfloat16 or"),
        (linear(weight=torch.zeros(N + 16, K).to(FP8).t()), r"weight is \[256, 400\]"),
        (linear(weight_scale=torch.ones(3)), r"scales are torch.float32 \[3\]"),
        (linear(weight_scale=torch.ones(N).bfloat16()), "scales are torch.bfloat16"),
        (linear(input_scale=torch.ones(3)), "has 3 scales of its inputs"),
        (linear(bias=torch.zeros(N)), "bias is torch.float32"),
        (
            linear("UnquantizedLinearMethod", weight=torch.zeros(K, N).bfloat16()),
            r"weight is \[256, 384\]; expected \[384, 256\]",
        ),
        (linear("Fp8LinearMethod", weight_block_size=[64, 64]), r"blocks of \[64, 64\]"),
        (
            linear(
                "Fp8LinearMethod",
                weight=torch.zeros(N, K).to(FP8),
                weight_block_size=[128, 128],
                weight_scale_inv=torch.ones(3, 1, dtype=torch.int32),
            ),
            r"scales are torch.int32 \[3, 1\]; expected float32 \[3, 2\]",
        ),
    ],
)
def test_weights_that_are_refused(module, reason):
    with pytest.raises(support.UnsupportedError, match=reason):
        bind(module)


# ---- workspace ----

#: hidden, heads, kv heads, intermediate of Qwen3 8B, 1.7B, Llama 70B on one of four ranks.
SHAPES = {"8b": (4096, 32, 8, 12288), "1.7b": (2048, 16, 8, 6144), "70b": (8192, 16, 2, 7168)}


@pytest.mark.parametrize("scheme", [schemes.Scheme(), schemes.StaticFp8(), schemes.PerTokenFp8(), schemes.BlockFp8()])
@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.usefixtures("flash_attention")
def test_layers_stay_within_the_limit(model, scheme):
    """All kinds of steps, all layers or halves of them, take what the workspace was made for."""
    hidden, heads, kv_heads, intermediate = SHAPES[model]
    bound = with_caches(make_weights(scheme, 3, weights.Shape(hidden, heads, kv_heads, 128, intermediate), torch.empty))
    for reduce, whole in ((None, True), (torch.clone, False), (_OneRank(), False), (_OneRank(), True)):
        attention = make_attention(bound)
        summed, all_reduce = (torch.clone, reduce) if isinstance(reduce, _OneRank) else (reduce, None)
        fused = layers.FusedLayers(Object(), bound, 8192, attention, lambda: None, summed, None, all_reduce)
        space = fused.workspace
        assert space.memory.numel() == space.rows * space.row_bytes + workspace.ALIGNMENT
        assert space.memory.numel() <= workspace.LIMIT_BYTES + workspace.ALIGNMENT < 100e6
        assert space.rows >= 512
        assert space.rows % 128 == 0
        attention.bind()
        for kind in attention_module.Kind:
            found = fused._make_steps(kind, few=False, whole=whole)
            assert len(found) == (1 if whole else 6)
            taken = max(each.arena_bytes for each in found)
            assert taken == space.rows * space.row_bytes or (taken < space.rows * space.row_bytes and all_reduce)


def test_rows_within_a_limit():
    assert rows_within(100, 100) == 128
    assert rows_within(100, 129) == 256
    assert rows_within(workspace.LIMIT_BYTES // 300, 4096) == 256
    assert rows_within(1 << 24, 4096) == 128  # whatever they take


def test_the_arena_stays_where_weights_of_the_same_shape_come():
    """Graphs may have been captured with it."""
    bound = make_weights(schemes.PerTokenFp8())
    first = make_layers(bound, None)
    assert make_layers(make_weights(schemes.PerTokenFp8()), None, former=first).workspace is first.workspace
    assert make_layers(make_weights(schemes.BlockFp8()), None, former=first).workspace is not first.workspace


def test_copies_stay_where_graphs_have_them():
    """Weights that are loaded again leave captured graphs as they are, so that what those read and write must be there."""
    device, first = torch.device("cpu"), torch.rand(8, 4)
    own = weights.bind_rope(Object(cos_sin_cache=first), torch.float32, device, None)
    assert own.data_ptr() == first.data_ptr()
    copy = weights.bind_rope(Object(cos_sin_cache=first), torch.bfloat16, device, None)
    again = weights.bind_rope(Object(cos_sin_cache=first + 1), torch.bfloat16, device, copy)
    assert again.data_ptr() == copy.data_ptr()
    assert torch.equal(again, (first + 1).bfloat16())
    other = weights.bind_rope(Object(cos_sin_cache=torch.rand(9, 4)), torch.bfloat16, device, copy)
    assert other.data_ptr() != copy.data_ptr()
    replaced = weights.bind_rope(Object(cos_sin_cache=first.clone()), torch.float32, device, own)
    assert replaced.data_ptr() != own.data_ptr()


# ---- a step ----

HIDDEN, HEADS, KV_HEADS, HEAD, INTERMEDIATE = 256, 4, 2, 64, 384
SHAPE = weights.Shape(HIDDEN, HEADS, KV_HEADS, HEAD, INTERMEDIATE)


def make_weights(scheme, count=2, shape=SHAPE, make=None):
    """Weights of `count` layers without norms of q and k; random, unless `make` makes tensors of their sizes."""
    generator = torch.Generator().manual_seed(5)
    hidden = shape.hidden

    def normal(*sizes):
        return torch.randn(sizes, generator=generator) if make is None else make(sizes)

    def matrix(k, n):
        if make is not None and scheme.quantized:
            blocks = isinstance(scheme, schemes.BlockFp8)
            scale = torch.ones((-(-k // 128), -(-n // 128)) if blocks else (n, 1))
            return schemes.Linear(make((n, k), dtype=FP8).t(), scale, None, torch.ones(1))
        if make is not None:
            return schemes.Linear(make((n, k), dtype=torch.bfloat16))
        if not scheme.quantized:
            return schemes.Linear((normal(n, k) / k**0.5).bfloat16(), bias=normal(n).bfloat16())
        weight = (100 * normal(n, k)).to(FP8).t()
        shape = (-(-k // 128), -(-n // 128)) if isinstance(scheme, schemes.BlockFp8) else (n, 1)
        scale = (0.5 + torch.rand(shape, generator=generator)) / (100 * k**0.5)
        given = torch.tensor([0.01]) if isinstance(scheme, schemes.StaticFp8) else None
        return schemes.Linear(weight, scale, normal(n).bfloat16(), given)

    found = [
        weights.Layer(
            *((1 + 0.1 * normal(hidden)).bfloat16() for _ in range(2)),
            *(None, None),
            matrix(hidden, shape.qkv),
            matrix(shape.attended, hidden),
            matrix(hidden, 2 * shape.intermediate),
            matrix(shape.intermediate, hidden),
            attention_layer(f"layer {n}", shape),
        )
        for n in range(count)
    ]
    rope = normal(512, shape.head_size).bfloat16()
    norm = (1 + 0.1 * normal(hidden)).bfloat16()
    embedding = normal(64, hidden).bfloat16()
    return weights.Weights(shape, scheme, torch.bfloat16, 1e-6, embedding, norm, rope, True, tuple(found))


def attention_layer(name, shape):
    """An attention layer of vLLM's that has no cache yet."""
    size = shape.head_size
    return Object(layer_name=name, impl=Object(scale=size**-0.5), head_size=size, kv_cache=torch.tensor([]))


def make_attention(bound, longest=512):
    return attention_module.Attention(bound, lambda: longest, (64, 512), lambda x: x)


class _OneRank:
    """The custom all-reduce of a single rank: what was summed is NaN after it."""

    def __init__(self, rows=1000):
        self.memory, self.reason = torch.full((rows, HIDDEN), float("nan"), dtype=torch.bfloat16), None

    def objection(self):
        return self.reason

    def handle(self):
        return 7

    def add(self, s, _, shared, total):
        s.add_torch(torch.ops.aten.copy_.default, total, shared)
        s.add_torch(torch.ops.aten.fill_.Scalar, shared, float("nan"))

    def sum(self, rows, out):
        out.copy_(self.memory[:rows])
        self.memory.fill_(float("nan"))


def make_layers(bound, reduce, context=None, most=512, former=None):
    """Layers whose arena is NaN in every type."""
    context = context or Object(attn_metadata=None)
    summed, all_reduce = (torch.clone, reduce) if isinstance(reduce, _OneRank) else (reduce, None)
    fused = layers.FusedLayers(Object(), bound, most, make_attention(bound), lambda: context, summed, former, all_reduce)
    fused.workspace.memory.fill_(255)
    return fused


def run_step(bound, rows, reduce, most=512):
    """A step without attention, as vLLM's memory profile makes it."""
    fused = make_layers(bound, reduce, most=most)
    embedded = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(6)).bfloat16()
    found = [fused.forward(None, torch.arange(rows), embedded).clone() for _ in range(2)]
    if isinstance(reduce, _OneRank):
        few = not bound.scheme.quantized and rows <= 32
        assert set(fused._steps) == {(attention_module.Kind.NOTHING, few, is_whole(fused, rows))}
    return found


def is_whole(fused, rows):
    """Whether a step is one sequence."""
    most = min(layers.REPLAYED_ROWS, fused.workspace.rows, fused.all_reduce.memory.size(0))
    return rows <= most and fused.all_reduce.reason is None


@pytest.mark.parametrize("scheme", [schemes.Scheme(), schemes.StaticFp8(), schemes.PerTokenFp8(), schemes.BlockFp8()])
@pytest.mark.parametrize("rows", [1, 7, 130])
def test_sums_over_ranks_are_read_where_they_are(scheme, rows):
    """A sum that is a new tensor, or the same one, and chunks of rows: the bits of the step without sums."""
    bound = make_weights(scheme)
    (expected, again) = run_step(bound, rows, None)
    assert expected.isfinite().all()
    assert torch.equal(expected, again)
    summed = []

    def copied(x):
        summed.append(x.clone())
        x.fill_(float("nan"))  # nothing reads what was summed
        return summed[-1]

    assert all(torch.equal(each, expected) for each in run_step(bound, rows, copied))
    assert len(summed) == 2 * 2 * 2  # halves, layers, steps
    assert all(torch.equal(each, expected) for each in run_step(bound, rows, lambda x: x))


@pytest.mark.parametrize("scheme", [schemes.Scheme(), schemes.StaticFp8(), schemes.PerTokenFp8(), schemes.BlockFp8()])
@pytest.mark.parametrize("rows", [1, 7, 32, 33, 256, 257])
def test_sums_over_ranks_are_steps_of_one_sequence(scheme, rows):
    """Up to 256 rows, as many as ranks share memory for, while vLLM has no other all-reduce: the bits of the step without."""
    bound = make_weights(scheme)
    (expected, again) = run_step(bound, rows, None)
    assert expected.isfinite().all()
    assert torch.equal(expected, again)
    other = _OneRank()
    other.reason = "another comes first"
    for all_reduce in (_OneRank(), _OneRank(rows), _OneRank(rows - 1), other):
        assert all(torch.equal(each, expected) for each in run_step(bound, rows, all_reduce))
    assert _OneRank().memory.size(0) > rows  # the first one had more


def test_a_step_without_rows_sums_nothing():
    all_reduce = _OneRank()
    fused = make_layers(make_weights(schemes.PerTokenFp8()), all_reduce)
    embedded = torch.empty(0, HIDDEN, dtype=torch.bfloat16)
    assert fused.forward(None, torch.arange(0), embedded).shape == (0, HIDDEN)
    assert all_reduce.memory.isnan().all()


@pytest.mark.parametrize("shard", [True, False])
def test_the_embedding_of_a_rank_is_summed(shard):
    """In the memory that ranks share, where vLLM's embedding is no more than its op and a sum; else by vLLM's module."""
    bound = make_weights(schemes.PerTokenFp8())
    ids = torch.tensor([3, 0, 63, 9])
    expected = make_layers(bound, None).forward(ids, torch.arange(4), None)
    fused = make_layers(bound, _OneRank())
    asked = []

    def embed(given):
        asked.append(given)
        return bound.embedding[given]

    embed.use_fused_embedding, embed.reduce_results, embed.parallel_group = shard, True, None
    embed.weight = bound.embedding
    embed.shard_indices = Object(
        org_vocab_start_index=0,
        org_vocab_end_index=64,
        num_org_vocab_padding=0,
        added_vocab_start_index=64,
        added_vocab_end_index=64,
    )
    fused.model.embed_tokens = embed
    with simulated_embedding():
        assert torch.equal(fused.forward(ids, torch.arange(4), None), expected)
    assert len(asked) == (0 if shard else 1)


@contextlib.contextmanager
def simulated_embedding():
    """vLLM's op, as the simulated engine has it."""
    with torch.library._scoped_library("_C", "FRAGMENT") as library:
        library.define(
            "vocab_parallel_embedding(Tensor! out, Tensor input_ids, Tensor weight, int org_vocab_start_index, "
            "int org_vocab_end_index, int num_org_vocab_padding, int added_vocab_start_index, int added_vocab_end_index) -> ()"
        )
        library.impl("vocab_parallel_embedding", simulated_ops().embedding, "CPU")
        yield


@pytest.mark.parametrize("reduce", [None, torch.clone])
@pytest.mark.parametrize("scheme", [schemes.Scheme(), schemes.StaticFp8(), schemes.PerTokenFp8(), schemes.BlockFp8()])
def test_chunks_of_a_step(monkeypatch, scheme, reduce):
    bound = make_weights(scheme)
    expected, _ = run_step(bound, 300, None)
    monkeypatch.setattr(layers, "rows_within", lambda *_: 128)
    assert all(torch.equal(each, expected) for each in run_step(bound, 300, reduce))


# ---- attention of a step ----

PAGE, BLOCKS = 16, 40


def simulated_ops():
    path = pathlib.Path(__file__).parents[1] / "vllm" / "simulated_ops.py"
    spec = importlib.util.spec_from_file_location("simulated_ops", path)
    simulated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(simulated)
    return simulated


@pytest.fixture
def flash_attention():
    """FlashAttention 3's op and vLLM's cache write, as the simulated engine has them."""
    library = torch.library._scoped_library
    with library("_C_cache_ops", "FRAGMENT") as cache, library("_vllm_fa3_C", "FRAGMENT") as fa3:
        simulated_ops().define_cache_and_attention(cache, fa3)
        yield


def with_caches(bound):
    """The same layers with caches of random tokens."""
    generator = torch.Generator().manual_seed(9)
    for layer in bound.layers:
        sizes = BLOCKS, PAGE, bound.shape.kv_heads, 2 * bound.shape.head_size
        cache = torch.randn(sizes, generator=generator).bfloat16().transpose(1, 2)
        layer.attention.kv_cache = cache
        layer.attention._k_scale = layer.attention._v_scale = torch.ones(1)
    return bound


def decode_step(lengths, slots=None, **changes):
    """Metadata and slots of a step of one new token per request; 0: a padded row. Blocks of a request are its own."""
    width = max(4, -(-max(lengths) // PAGE))
    table = torch.arange(1, len(lengths) * width + 1, dtype=torch.int32).view(len(lengths), width)
    last = torch.tensor(lengths) - 1
    at = table[torch.arange(len(lengths)), last.clamp(min=0) // PAGE].long() * PAGE + last % PAGE
    found = Object(
        max_query_len=1,
        num_actual_tokens=len(lengths),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        max_seq_len=max(lengths),
        block_table=table,
    )
    slots = torch.where(last < 0, -1, at) if slots is None else slots
    return changed(found, changes), slots


def decode(bound, lengths, rows, reduce=None):
    """The hidden states of a decode step with `rows` tokens and as many requests as lengths; and the caches after it."""
    metadata, slots = decode_step(lengths)
    positions = torch.cat((metadata.seq_lens.long() - 1, torch.full((rows - len(lengths),), 7))).clamp(min=0)
    names = [layer.attention.layer_name for layer in bound.layers]
    context = Object(attn_metadata=dict.fromkeys(names, metadata), slot_mapping=dict.fromkeys(names, slots))
    fused = make_layers(bound, reduce, context)
    embedded = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(6)).bfloat16()
    before = hdispatch.stats()["attention_half"]["fallbacks"]
    found = fused.forward(None, positions, embedded)
    assert hdispatch.stats()["attention_half"]["fallbacks"] - before == len(bound.layers)
    assert fused.attention.decode_reason is None
    whole = reduce is None or (isinstance(reduce, _OneRank) and is_whole(fused, rows))
    assert set(fused._steps) == {(attention_module.Kind.HALF, not bound.scheme.quantized and rows <= 32, whole)}
    return fused.workspace.rows, found, [layer.attention.kv_cache.clone() for layer in bound.layers]


def test_padded_rows_of_a_decode_step_are_harmless():
    """Rows with requests of no token, as in full graphs, and rows without requests: the same bits and caches as without."""
    lengths = [1, 17, 40, 64]
    _, expected, caches = decode(with_caches(make_weights(schemes.PerTokenFp8())), lengths, 4)
    assert expected.isfinite().all()
    assert not torch.equal(*caches)
    for each in ([*lengths, 0, 0], lengths):
        _, padded, padded_caches = decode(with_caches(make_weights(schemes.PerTokenFp8())), each, 6)
        assert torch.equal(padded[:4], expected)
        assert padded.isfinite().all()
        assert all(torch.equal(mine, other) for mine, other in zip(padded_caches, caches, strict=True))


@pytest.mark.parametrize("reduce", [None, torch.clone, _OneRank()])
def test_decode_steps_in_chunks_and_with_sums(monkeypatch, reduce):
    """More requests than the arena has rows, and sums over ranks: the bits of a step without either; caches too."""
    lengths = [1 + 7 * request % 60 for request in range(150)]
    monkeypatch.setattr(sys.modules[__name__], "BLOCKS", 4 * len(lengths) + 1)

    def run(reduce):
        rows, found, caches = decode(with_caches(make_weights(schemes.PerTokenFp8())), lengths, 150, reduce)
        return rows, [found, *caches]

    rows, expected = run(None)
    assert rows == 512
    assert all(each.isfinite().all() for each in expected)
    for limit in (128, 512):
        monkeypatch.setattr(layers, "rows_within", lambda *_, limit=limit: limit)
        rows, found = run(reduce)
        assert rows == limit
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def mixed_step(queries, lengths):
    """Metadata, slots and positions of a step with so many new tokens of requests that have `lengths` after it."""
    found, _ = decode_step(lengths)
    starts = torch.tensor([0, *itertools.accumulate(queries)], dtype=torch.int32)
    places = [(row, at) for row, (q, n) in enumerate(zip(queries, lengths, strict=True)) for at in range(n - q, n)]
    slots = torch.tensor([int(found.block_table[row, at // PAGE]) * PAGE + at % PAGE for row, at in places])
    more = {"max_query_len": max(queries), "num_actual_tokens": len(places), "query_start_loc": starts, "causal": True}
    more |= {"scheduler_metadata": None, "max_num_splits": 0}
    return changed(found, more), slots, torch.tensor([at for _, at in places])


@pytest.mark.usefixtures("flash_attention")
@pytest.mark.parametrize("scheme", [schemes.Scheme(), schemes.PerTokenFp8(), schemes.BlockFp8()])
@pytest.mark.parametrize("written", [True, False])
def test_steps_with_flash_attention(monkeypatch, scheme, written):
    """Prompts beside decoding requests: the same bits in chunks, with sums over ranks, with rows that vLLM has no slots for."""
    if not written:
        monkeypatch.setattr(attention_module, "objection", lambda *_: "no row")
        monkeypatch.setattr(attention_module, "loaded_ladders", lambda *_: Ladders((1,)))
    queries, lengths = [1, 60, 33, 1, 50, 64], [40, 60, 64, 1, 61, 64]
    metadata, slots, positions = mixed_step(queries, lengths)
    tokens = len(positions)
    embedded = torch.randn(tokens + 5, HIDDEN, generator=torch.Generator().manual_seed(6)).bfloat16()

    def run(limit, reduce, padding=0):
        monkeypatch.setattr(layers, "rows_within", lambda *_: limit)
        bound = with_caches(make_weights(scheme))
        names = [layer.attention.layer_name for layer in bound.layers]
        context = Object(attn_metadata=dict.fromkeys(names, metadata), slot_mapping=dict.fromkeys(names, slots))
        fused = make_layers(bound, reduce, context)
        given = torch.nn.functional.pad(positions, (0, padding), value=7)
        found = fused.forward(None, given, embedded[: tokens + padding])[:tokens]
        whole = reduce is None or (isinstance(reduce, _OneRank) and is_whole(fused, len(given)))
        assert set(fused._steps) == {(attention_module.Kind.FLASH, False, whole)}
        assert (fused.attention.write_reason is None) is written
        return [found, *(layer.attention.kv_cache.clone() for layer in bound.layers)]

    expected = run(512, None)
    assert all(each.isfinite().all() for each in expected)
    summed = ((512, _OneRank()), (128, _OneRank()), (512, _OneRank(), 5))
    for changes in ((128, None), (512, torch.clone), (128, torch.clone), (512, None, 5), (128, torch.clone, 5), *summed):
        found = run(*changes)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), changes


@pytest.mark.usefixtures("flash_attention")
def test_decode_steps_of_both_kinds_are_near(monkeypatch):
    lengths = [1, 17, 40, 64]
    _, half, half_caches = decode(with_caches(make_weights(schemes.Scheme())), lengths, 4)
    metadata, slots, positions = mixed_step([1] * 4, lengths)
    monkeypatch.setenv("HDISPATCH_ATTENTION", "fa3")
    bound = with_caches(make_weights(schemes.Scheme()))
    names = [layer.attention.layer_name for layer in bound.layers]
    context = Object(attn_metadata=dict.fromkeys(names, metadata), slot_mapping=dict.fromkeys(names, slots))
    embedded = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(6)).bfloat16()
    flash = make_layers(bound, None, context).forward(None, positions, embedded)
    assert (flash.float() - half.float()).norm() < 0.01 * flash.float().norm()
    for mine, layer in zip(half_caches, bound.layers, strict=True):
        assert (mine.float() - layer.attention.kv_cache.float()).norm() < 0.01 * mine.float().norm()


def test_caches_that_are_replaced_are_those_that_steps_write():
    """vLLM makes new caches after profiling and on waking up."""
    bound = with_caches(make_weights(schemes.PerTokenFp8()))
    metadata, slots = decode_step([5, 16])
    names = [layer.attention.layer_name for layer in bound.layers]
    context = Object(attn_metadata=dict.fromkeys(names, metadata), slot_mapping=dict.fromkeys(names, slots))
    fused = make_layers(bound, None, context)
    embedded = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(6)).bfloat16()
    expected = fused.forward(None, torch.tensor([4, 15]), embedded)
    written = [layer.attention.kv_cache for layer in bound.layers]
    kept = [each.clone() for each in written]
    with_caches(bound)
    assert torch.equal(fused.forward(None, torch.tensor([4, 15]), embedded), expected)
    for layer, old, copy in zip(bound.layers, written, kept, strict=True):
        assert torch.equal(old, copy)
        assert torch.equal(layer.attention.kv_cache, copy)


@pytest.mark.parametrize(
    ("edges", "limit", "expected"),
    [
        ((128, 256), 500, {1: 128, 128: 128, 129: 256, 256: 256, 257: 500, 500: 500}),
        ((128, 256), 5000, {257: 1024, 1024: 1024, 1025: 2048, 4999: 5000}),
        ((), 500, {1: 500, 500: 500}),
    ],
    ids=["to the longest", "behind the last edge", "no rows"],
)
def test_lengths_that_attention_half_is_told(monkeypatch, edges, limit, expected):
    """The ends of buckets, so that a step is seldom resolved for it; never more than the longest request may have."""
    monkeypatch.setattr(attention_module, "loaded_ladders", lambda *_: Object(m=(), second=edges))
    attention = make_attention(with_caches(make_weights(schemes.Scheme())), limit)
    attention.bind()
    told = {}
    for longest in expected:
        found = Object(max_seq_len=longest, block_table=torch.zeros(1, 1), seq_lens=torch.ones(1))
        told[longest] = attention.given(attention_module.Kind.HALF, torch.zeros(1), found, torch.zeros(1))[-1]
    assert told == expected


@pytest.mark.parametrize(("value", "on"), [(None, True), ("", True), ("1", True), ("0", False)])
def test_replays_are_on_unless_switched_off(monkeypatch, value, on):
    monkeypatch.delenv("HDISPATCH_REPLAY", raising=False)
    if value is not None:
        monkeypatch.setenv("HDISPATCH_REPLAY", value)
    assert settings.replay() is on


def test_another_value_of_the_switch_is_refused(monkeypatch):
    monkeypatch.setenv("HDISPATCH_REPLAY", "yes")
    with pytest.raises(HdispatchError, match="HDISPATCH_REPLAY is 'yes'; it takes 1"):
        settings.replay()


def test_a_decode_step_writes_the_new_tokens_alone():
    bound = with_caches(make_weights(schemes.Scheme()))
    before = [layer.attention.kv_cache.clone() for layer in bound.layers]
    _, _, caches = decode(bound, [5, 16], 2)
    _, slots = decode_step([5, 16])
    for old, new in zip(before, caches, strict=True):
        other = (old != new).any(-1).any(1).nonzero().tolist()
        assert sorted(block * PAGE + place for block, place in other) == sorted(slots.tolist())


LONG = attention_module.GRAPH_TOKENS + 1


@pytest.mark.parametrize(
    ("setting", "longest", "change", "taken"),
    [
        ("auto", 512, {}, True),
        ("fa3", 512, {}, False),
        ("auto", 512, {"max_query_len": 2}, False),
        ("auto", 512, {"num_actual_tokens": 3}, False),
        ("auto", 512, {"max_seq_len": 512}, True),  # a graph of a short model
        ("auto", LONG, {}, True),
        ("auto", LONG, {"max_seq_len": LONG - 1}, True),
        ("auto", LONG, {"max_seq_len": LONG}, False),  # a graph of a long one
        ("half", LONG, {"max_seq_len": LONG}, True),
    ],
)
def test_steps_that_take_attention_half(monkeypatch, setting, longest, change, taken):
    monkeypatch.setenv("HDISPATCH_ATTENTION", setting)
    attention = make_attention(with_caches(make_weights(schemes.Scheme())), longest)
    assert not attention._is_decode(decode_step([5, 16])[0])  # before the caches are known
    attention.bind()
    assert attention._is_decode(decode_step([5, 16], **change)[0]) is taken


def test_steps_keep_flash_attention_and_vllms_write_where_rows_are_missing(monkeypatch, caplog):
    """Every bucket is asked for, up to the rows of a step and the longest request; said once."""
    asked = []

    def refuse(op, *arguments):
        hdispatch.explain(op, *arguments)  # raises for a wrong call
        half = op.name == "attention_half"
        asked.append((arguments[0].size(0), arguments[10] if half else None))
        return f"no row of {op.name}" if arguments[0].size(0) == (64 if half else 256) else None

    monkeypatch.setattr(
        attention_module,
        "loaded_ladders",
        lambda op, _: Ladders((1, 8, 64, 256), *(("max_seq_len", (64, 1024)) if op == "attention_half" else ())),
    )
    monkeypatch.setattr(attention_module, "objection", refuse)
    caplog.set_level("INFO", logger="vllm.hdispatch")
    bound = with_caches(make_weights(schemes.Scheme()))
    attention = make_attention(bound)
    attention.bind()
    assert asked == [(1, 64), (1, 512), (8, 64), (8, 512), (64, 64), (1, None), (8, None), (64, None), (256, None)]
    assert (attention.decode_reason, attention.write_reason) == (
        "no row of attention_half",
        "no row of fused_qk_norm_rope_cache",
    )
    attention.bind()
    said = (
        "decode steps take FlashAttention 3: no row of attention_half; others FlashAttention 3 after vLLM's cache write: no row"
    )
    assert caplog.text.count(said) == 1
    monkeypatch.setattr(attention_module, "objection", lambda *_: None)
    assert attention.is_bound()
    bound.layers[-1].attention.kv_cache = bound.layers[-1].attention.kv_cache.clone()
    assert not attention.is_bound()
    attention.bind()
    assert (attention.decode_reason, attention.write_reason) == (None, None)
    assert "decode steps take attention_half; others FlashAttention 3 after fused_qk_norm_rope_cache" in caplog.text


def test_why_the_table_does_not_serve_a_call():
    found = support.objection(hdispatch.ops.attention_half, *example())
    assert found.startswith(
        "attention_half(bfloat16-bfloat16+group=2, M=3, K=64, N=4, max_seq_len=100): no bundle with this op"
    )
    found = support.objection(hdispatch.ops.attention_half, *example(neox=False))
    assert found == "attention_half: no variant has these values: is_neox is 0, served are 1"


def test_rows_of_a_loaded_bundle(tmp_path):
    """Served, no row, a guard that fails: of the bundle that serves the tensors' device."""
    op = hdispatch.ops.toy
    bundle = hdispatch.load(toy.write(tmp_path / "toy"), driver="null")
    try:
        assert support.loaded_ladders("toy", torch.device("cpu")) == Ladders((1, 2, 4, 8, 16))
        assert support.loaded_ladders("attention_half", torch.device("cpu")) == Ladders(())
        assert support.objection(op, *toy.arguments()) is None
        assert support.objection(op, *toy.arguments(4, 513)) == (
            "toy(bfloat16, M=4, K=513, N=0): the launch table has no row for it"
        )
        strided = toy.arguments()
        strided[1] = torch.zeros(4, 72, dtype=torch.bfloat16)[:, :64]
        assert "guard: input.stride(0) % 16 == 0 does not hold" in support.objection(op, *strided)
    finally:
        bundle.unload()
    assert support.loaded_ladders("toy", torch.device("cpu")) == Ladders(())


def example(neox=True):
    bound = with_caches(make_weights(schemes.Scheme()))
    attention = make_attention(dataclasses.replace(bound, neox=neox))
    attention.bind()
    return attention._half_example(3, 100)

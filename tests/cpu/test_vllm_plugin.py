"""The vLLM plug-in without vLLM: its switches, why it refuses a configuration, its workspace, the weights it binds."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from types import SimpleNamespace as Object

import hdispatch
import pytest
import torch
import toy
from hdispatch import HdispatchError
from hdispatch.integrations.vllm import attention as attention_module
from hdispatch.integrations.vllm import layers, plugin, schemes, settings, support, weights, workspace
from hdispatch.integrations.vllm.workspace import Arena, Buffer, place, rows_within, total_size
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


def check_no_overlap(buffers, rows):
    offsets = place(buffers, rows)
    for a, b in itertools.combinations(buffers, 2):
        if a.steps & b.steps:
            begin, end = offsets[a.name], offsets[a.name] + a.size(rows)
            assert end <= offsets[b.name] or offsets[b.name] + b.size(rows) <= begin, (a, b)
    assert all(offset % workspace.ALIGNMENT == 0 for offset in offsets.values())


def test_buffers_that_are_never_needed_at_once_share_bytes():
    buffers = [
        Buffer("a", 100, torch.float32, frozenset({0, 1})),
        Buffer("b", 200, torch.float32, frozenset({2})),
        Buffer("c", 10, torch.bfloat16, frozenset({1, 2})),
    ]
    check_no_overlap(buffers, 7)
    assert total_size(buffers, 7) == buffers[1].size(7) + buffers[2].size(7)
    arena = Arena(buffers, 7, torch.device("cpu"))
    arena.view("b", 7).fill_(1)
    arena.view("c", 7).fill_(2)
    assert arena.view("b", 7).eq(1).all()
    assert arena.view("a", 3).shape == (3, 100)


def test_columns():
    arena = Arena([Buffer("s", 3, torch.float32, frozenset({0}), columns=True)], 9, torch.device("cpu"))
    assert (arena.view("s", 5).shape, arena.view("s", 5).stride()) == ((5, 3), (1, 5))


#: hidden, heads, kv heads, intermediate of Qwen3 8B, 1.7B, Llama 70B on one of four ranks.
SHAPES = {"8b": (4096, 32, 8, 12288), "1.7b": (2048, 16, 8, 6144), "70b": (8192, 16, 2, 7168)}


@pytest.mark.parametrize("scheme", [schemes.Scheme(), schemes.StaticFp8(), schemes.PerTokenFp8(), schemes.BlockFp8()])
@pytest.mark.parametrize("model", SHAPES)
def test_layers_stay_within_the_limit(model, scheme):
    hidden, heads, kv_heads, intermediate = SHAPES[model]
    shape = weights.Shape(hidden, heads, kv_heads, 128, intermediate)
    buffers = layers.layer_buffers(Object(shape=shape, scheme=scheme, dtype=torch.bfloat16))
    rows = rows_within(buffers, 8192)
    check_no_overlap(buffers, rows)
    assert total_size(buffers, rows) <= workspace.LIMIT_BYTES < 100e6
    assert rows >= 512
    assert rows % 128 == 0


def test_as_many_rows_as_asked_where_they_fit():
    assert rows_within([Buffer("a", 8, torch.float32, frozenset({0}))], 100) == 100
    assert rows_within([Buffer("a", 1 << 24, torch.float32, frozenset({0}))], 4096) == 128


# ---- a step ----

HIDDEN, HEADS, KV_HEADS, HEAD, INTERMEDIATE = 256, 4, 2, 64, 384


def make_weights(scheme, count=2):
    """Random weights of `count` layers without norms of q and k."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    def matrix(k, n):
        if not scheme.quantized:
            return schemes.Linear((normal(n, k) / k**0.5).bfloat16(), bias=normal(n).bfloat16())
        weight = (100 * normal(n, k)).to(FP8).t()
        shape = (-(-k // 128), -(-n // 128)) if isinstance(scheme, schemes.BlockFp8) else (n, 1)
        scale = (0.5 + torch.rand(shape, generator=generator)) / (100 * k**0.5)
        given = torch.tensor([0.01]) if isinstance(scheme, schemes.StaticFp8) else None
        return schemes.Linear(weight, scale, normal(n).bfloat16(), given)

    shape = weights.Shape(HIDDEN, HEADS, KV_HEADS, HEAD, INTERMEDIATE)
    found = [
        weights.Layer(
            *((1 + 0.1 * normal(HIDDEN)).bfloat16() for _ in range(2)),
            *(None, None),
            matrix(HIDDEN, shape.qkv),
            matrix(shape.attended, HIDDEN),
            matrix(HIDDEN, 2 * INTERMEDIATE),
            matrix(INTERMEDIATE, HIDDEN),
            Object(layer_name=f"layer {n}", impl=Object(scale=HEAD**-0.5), head_size=HEAD, kv_cache=torch.tensor([])),
        )
        for n in range(count)
    ]
    rope = normal(512, HEAD).bfloat16()
    norm = (1 + 0.1 * normal(HIDDEN)).bfloat16()
    embedding = normal(64, HIDDEN).bfloat16()
    return weights.Weights(shape, scheme, torch.bfloat16, 1e-6, embedding, norm, rope, True, tuple(found))


def make_attention(bound, longest=512):
    return attention_module.Attention(bound, lambda: longest, (64, 512), lambda x: x)


def run_step(bound, rows, reduce, most=512):
    """A step without attention, as vLLM's memory profile makes it."""
    context = Object(attn_metadata=None)
    fused = layers.FusedLayers(Object(), bound, most, make_attention(bound), lambda: context, reduce)
    embedded = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(6)).bfloat16()
    fused.arena.memory.fill_(255)  # NaN in every type
    return [fused.forward(None, torch.arange(rows), embedded).clone() for _ in range(2)]


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


@pytest.mark.parametrize("reduce", [None, torch.clone])
@pytest.mark.parametrize("scheme", [schemes.Scheme(), schemes.StaticFp8(), schemes.PerTokenFp8(), schemes.BlockFp8()])
def test_chunks_of_a_step(monkeypatch, scheme, reduce):
    bound = make_weights(scheme)
    expected, _ = run_step(bound, 300, None)
    monkeypatch.setattr(layers, "rows_within", lambda *_: 128)
    assert all(torch.equal(each, expected) for each in run_step(bound, 300, reduce))


@pytest.mark.parametrize(("m", "most"), [(129, 128), (300, 128), (333, 256), (4097, 4096), (1025, 1024), (8191, 1152)])
def test_chunks_start_at_aligned_rows(m, most):
    """int64 positions from row 113 on would be 8-byte aligned, and kernels take 16."""
    size = layers.chunk_rows(m, most)
    assert size % 16 == 0
    assert size <= most
    assert m / size <= -(-m // most)


# ---- attention of a step ----

PAGE, BLOCKS = 16, 40


def with_caches(bound):
    """The same layers with caches of random tokens."""
    generator = torch.Generator().manual_seed(9)
    for layer in bound.layers:
        cache = torch.randn(BLOCKS, PAGE, KV_HEADS, 2 * HEAD, generator=generator).bfloat16().transpose(1, 2)
        layer.attention.kv_cache = cache
        layer.attention._k_scale = layer.attention._v_scale = torch.ones(1)
    return bound


def decode_step(lengths, slots=None, **changes):
    """Metadata and slots of a step of one new token per request; 0: a padded row. Blocks of a request are its own."""
    width = 4
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


def half_outputs(bound, lengths, rows):
    """Outputs of every layer's calls for `rows` tokens, poisoned before, and the caches after them."""
    attention = make_attention(bound)
    attention.bind()
    metadata, slots = decode_step(lengths)
    padding = rows - len(lengths)
    qkv = torch.randn(rows, bound.shape.qkv, generator=torch.Generator().manual_seed(3)).bfloat16()
    attended = torch.full((rows, bound.shape.attended), float("nan"), dtype=torch.bfloat16)
    positions = torch.cat((metadata.seq_lens.long() - 1, torch.full((padding,), 7))).clamp(min=0)
    slots = torch.cat((slots, torch.full((padding,), -1)))
    outputs = []
    for ((op, arguments),) in attention.calls(attention.plan(qkv, attended), positions, metadata, slots):
        assert op is hdispatch.ops.attention_half
        op(*arguments)
        outputs.append(attended.clone())
        attended.fill_(float("nan"))
    return outputs, [layer.attention.kv_cache.clone() for layer in bound.layers]


def test_padded_rows_of_a_decode_step_are_harmless():
    """Rows with requests of no token, as in full graphs, and rows without requests: the same bits and caches as without."""
    lengths = [1, 17, 40, 64]
    expected, caches = half_outputs(with_caches(make_weights(schemes.Scheme())), lengths, 4)
    assert all(each.isfinite().all() for each in expected)
    assert not torch.equal(expected[0], expected[1])  # every layer has its own cache
    padded, padded_caches = half_outputs(with_caches(make_weights(schemes.Scheme())), [*lengths, 0, 0], 6)
    assert all(torch.equal(mine[:4], each) for mine, each in zip(padded, expected, strict=True))
    assert all(each.isfinite().all() for each in padded)
    assert all(torch.equal(mine, each) for mine, each in zip(padded_caches, caches, strict=True))
    longer, longer_caches = half_outputs(with_caches(make_weights(schemes.Scheme())), lengths, 6)
    assert all(torch.equal(mine[:4], each) for mine, each in zip(longer, expected, strict=True))
    assert all(each[4:].isnan().all() for each in longer)
    assert all(torch.equal(mine, each) for mine, each in zip(longer_caches, caches, strict=True))


@pytest.mark.parametrize("reduce", [None, torch.clone])
def test_decode_steps_in_chunks_and_with_sums(monkeypatch, reduce):
    """More requests than the arena has rows, and sums over ranks: the bits of a step without either; caches too."""
    lengths = [1 + 7 * request % 60 for request in range(150)]
    metadata, slots = decode_step(lengths)
    monkeypatch.setattr(sys.modules[__name__], "BLOCKS", 4 * len(lengths) + 1)
    embedded = torch.randn(len(lengths), HIDDEN, generator=torch.Generator().manual_seed(6)).bfloat16()

    def run(reduce):
        bound = with_caches(make_weights(schemes.PerTokenFp8()))
        names = [layer.attention.layer_name for layer in bound.layers]
        context = Object(attn_metadata=dict.fromkeys(names, metadata), slot_mapping=dict.fromkeys(names, slots))
        fused = layers.FusedLayers(Object(), bound, 512, make_attention(bound), lambda: context, reduce)
        fused.arena.memory.fill_(255)
        found = fused.forward(None, metadata.seq_lens.long() - 1, embedded).clone()
        assert fused.attention.decode_reason is None
        return fused.arena.rows, [found, *(layer.attention.kv_cache for layer in bound.layers)]

    rows, expected = run(None)
    assert rows == 512
    assert all(each.isfinite().all() for each in expected)
    for limit in (128, 512):
        monkeypatch.setattr(layers, "rows_within", lambda *_, limit=limit: limit)
        rows, found = run(reduce)
        assert rows == limit
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_decode_step_writes_the_new_tokens_alone():
    bound = with_caches(make_weights(schemes.Scheme()))
    before = [layer.attention.kv_cache.clone() for layer in bound.layers]
    _, caches = half_outputs(bound, [5, 16], 2)
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
    assert found.startswith("attention_half(bfloat16-bfloat16+group=2, M=3, K=64, N=4, max_seq_len=100): no bundle")
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

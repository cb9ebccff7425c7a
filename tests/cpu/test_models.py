"""Models by name and config.json: what they call the ops with; tuning and building for one in a command each."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hdispatch import models, registry
from hdispatch.bundle_reader import read_bundle
from hdispatch.cli import tune
from hdispatch.cli.main import main, parser
from hdispatch.compile import configs
from hdispatch.errors import HdispatchError
from hdispatch.tune import measure_process, timings

#: The part of a config.json that says sizes.
QWEN3_8B = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}
QWEN3_MOE = {
    **QWEN3_8B,
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
}
MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "vocab_size": 32000,
}


def write(folder: Path, config: Any, name: str = "model") -> Path:
    path = folder / name / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(("config", "name"), [(QWEN3_8B, "Qwen3-8B"), (QWEN3_MOE, "Qwen3-30B-A3B"), (MIXTRAL, "Mixtral-8x7B")])
def test_a_config_says_what_the_name_does(tmp_path, config, name):
    path = write(tmp_path, config, name)
    for word in (str(path), str(path.parent), name, name.lower(), f"owner/{name}"):
        assert models.find([word]) == models.find([name])


DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "first_k_dense_replace": 3,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
}
SMALL = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 16, "model_type": "llama"}


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (
            SMALL,
            {
                "kv_heads": 16,
                "head_dim": 64,
                "intermediate": (2048,),
                "dense": (2048,),
                "qk_norm": False,
                "experts": 0,
                "vocabulary": 0,
            },
        ),
        ({**QWEN3_MOE, "mlp_only_layers": [0]}, {"intermediate": (6144, 768), "dense": (6144,)}),
        ({**QWEN3_MOE, "shared_expert_intermediate_size": 1024}, {"intermediate": (1024, 768), "dense": (1024,)}),
        ({"model_type": "vl", "text_config": QWEN3_8B}, {"hidden": 4096, "qk_norm": True, "vocabulary": 151936}),
    ],
    ids=["as many heads of k, a part of the hidden size", "dense layers", "a shared expert", "text_config"],
)
def test_what_a_config_leaves_out_and_adds(tmp_path, config, sizes):
    model = models.read(write(tmp_path, config))
    assert {name: getattr(model, name) for name in sizes} == sizes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([1], "holds a JSON list"),
        ({}, "hidden_size is None; it takes a size of at least 1"),
        ({**QWEN3_8B, "num_attention_heads": 0}, "num_attention_heads is 0"),
        ({**QWEN3_8B, "head_dim": "128"}, "head_dim is '128'"),
        ({**QWEN3_8B, "intermediate_size": 1.5}, "intermediate_size is 1.5"),
        ({**QWEN3_8B, "hidden_size": True}, "hidden_size is True"),
        ({**QWEN3_8B, "vocab_size": 0}, "vocab_size is 0; it takes a size of at least 1"),
        (
            {**SMALL, "hidden_size": 4096, "num_attention_heads": 30},
            "hidden_size is 4096; without head_dim it takes a multiple of num_attention_heads, which is 30",
        ),
        (
            {**QWEN3_8B, "num_attention_heads": 30},
            "num_attention_heads is 30; it takes a multiple of num_key_value_heads, which is 8",
        ),
        (DEEPSEEK_V3, r"q_lora_rank is 1536: its heads are compressed \(MLA\), .* with none of kv_lora_rank, q_lora_rank"),
        ({**DEEPSEEK_V3, "q_lora_rank": None, "kv_lora_rank": 512}, "kv_lora_rank is 512"),
        ({**QWEN3_8B, "v_head_dim": 64}, "v_head_dim is 64: v has heads of another size .* it takes that of q and k, 128"),
        ({**SMALL, "v_head_dim": 2 * 4096}, "v_head_dim is 8192: v has heads of another size"),
        ({**QWEN3_8B, "v_head_dim": "128"}, "v_head_dim is '128'; it takes a size"),
    ],
)
def test_what_is_no_model_is_named(tmp_path, config, message):
    path = write(tmp_path, config)
    with pytest.raises(HdispatchError, match=message) as error:
        models.find([str(path)])
    assert str(path) in str(error.value)


@pytest.mark.parametrize("config", [QWEN3_8B, {**QWEN3_8B, "head_dim": None}])
@pytest.mark.parametrize("v_head_dim", [128, None, 0])
def test_heads_of_v_that_are_as_large_are_plain_ones(tmp_path, config, v_head_dim):
    (found,) = models.find([str(write(tmp_path, {**config, "v_head_dim": v_head_dim}))])
    assert found.head_dim == 128
    assert found.kv == 1024


def test_a_name_that_is_no_model(tmp_path):
    with pytest.raises(HdispatchError, match=r"'GPT-9' is no model: .* one of Qwen3-0.6B, "):
        models.find(["GPT-9"])
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(HdispatchError, match="cannot read the model"):
        models.find([str(tmp_path)])


def test_a_part_of_a_model():
    (model,) = models.find(["Llama-3.3-70B"], shards=4)
    assert (model.hidden, model.heads, model.kv_heads, model.intermediate) == (8192, 16, 2, (7168,))
    assert models.find(["Qwen3-30B-A3B"], shards=8)[0].kv_heads == 1
    assert [models.find(["Qwen3-8B"], count)[0].vocabulary for count in (1, 2, 8)] == [151936, 75968, 18992]
    assert models.Model("x", 2048, (96,), 24, 6, vocabulary=1000).shard(3).vocabulary == 334, "padded"
    for shards, message in ((3, "32 .heads. cannot be cut into 3"), (0, "cannot be cut into 0")):
        with pytest.raises(HdispatchError, match=message):
            models.find(["Qwen3-8B"], shards)
    with pytest.raises(HdispatchError, match=r"100 .intermediate size 100. cannot be cut into 8"):
        models.Model("x", 2048, (100,), 16, 8).shard(8)
    with pytest.raises(HdispatchError, match="6 kv heads cannot be cut into, or repeated for, 4"):
        models.Model("x", 2048, (1024,), 24, 6).shard(4)


def rows(op: str, *names: str) -> list[tuple[str, dict[str, int]]]:
    return models.calls_of(registry.spec(op), models.find(names)).rows


def test_what_models_call_ops_with():
    assert [sizes for _, sizes in rows("scaled_mm", "Qwen3-32B")] == [
        {"K": 5120, "N": 10240},
        {"K": 8192, "N": 5120},
        {"K": 5120, "N": 51200},
        {"K": 25600, "N": 5120},
    ]
    assert rows("silu_and_mul", "Llama-3.1-8B", "Qwen3-30B-A3B") == [("bfloat16", {"N": 14336}), ("bfloat16", {"N": 768})]
    assert rows("ll_gemm_bf16", "Qwen3-8B") == [("bfloat16", {"K": 4096, "N": 151936})]
    router, head = {"K": 2048, "N": 128}, {"K": 2048, "N": 151936}
    assert rows("ll_gemm_bf16", "Qwen3-30B-A3B") == [("bfloat16", router), ("bfloat16", head)]
    assert rows("ll_gemm_bf16_argmax", "Llama-3.3-70B") == [("any", {"K": 8192, "N": 128256})]
    assert rows("topk_softmax", "Qwen3-30B-A3B", "Qwen3-8B") == [("int32-bfloat16+renormalize", {"N": 128})]
    assert rows("moe_sum", "Qwen3-235B-A22B", "Qwen3-8B") == [("bfloat16", {"N": 4096})]
    assert rows("moe_align_block_size", "Qwen3-30B-A3B", "Mixtral-8x7B") == [("int32", {})]
    assert rows("moe_align_block_size", "Qwen3-8B") == []
    assert rows("fused_qk_norm_rope", "Llama-3.1-8B") == []
    assert rows("attention_half", "Llama-3.1-8B", "Qwen3-32B") == [
        ("bfloat16-bfloat16+group=4", {"K": 128}),
        ("bfloat16-bfloat16+q_weight+k_weight+group=8", {"K": 128}),
    ]
    assert rows("rotary_embedding", "Llama-3.2-1B") == [("bfloat16-bfloat16+key+head_size=64+is_neox", {"K": 2048, "N": 512})]
    assert rows("argmax", "Qwen3-8B", "Llama-3.1-8B") == [("bfloat16", {})]


def test_sizes_have_labels():
    (model,) = models.find(["Qwen3-8B"])
    calls = registry.spec("dynamic_per_token_scaled_fp8_quant").calls
    assert calls is not None
    assert calls(model) == {"hidden": {"K": 4096}, "out": {"K": 4096}, "intermediate": {"K": 12288}}
    shared = models.Model("shared", 2048, (1024, 768), 16, 8, dense=(1024, 512))
    assert list(calls(shared)) == ["hidden", "out", "intermediate", "intermediate 768"]
    assert calls(shared)["intermediate 768"] == {"K": 768}
    products = registry.spec("scaled_mm").calls
    assert products is not None
    few = registry.spec("ll_gemm_bf16").calls
    assert few is not None
    assert few(model) == {"lm_head": {"K": 4096, "N": 151936}}
    assert few(shared) == {}, "of no known vocabulary"
    assert list(products(shared)) == ["qkv", "out", "gate_up", "down", "gate_up 512", "down 512"]
    assert products(shared)["down 512"] == {"K": 512, "N": 2048}


def test_an_op_outside_of_hdispatch_says_what_models_call_it_with():
    """As any of ours; without a word of it, the rows that serve any size."""
    (model,) = models.find(["Qwen3-8B"])
    spec = replace(registry.spec("silu_and_mul"), name="gelu_and_mul", shapes=({"N": 64}, {}))
    calls = replace(spec, calls=lambda model: {"hidden": {"N": model.hidden}})
    assert [sizes for _, sizes in models.calls_of(calls, [model]).rows] == [{"N": 4096}]
    assert [sizes for _, sizes in models.calls_of(replace(spec, calls=None), [model]).rows] == [{}]


def test_every_op_takes_what_every_model_calls_it_with():
    """No op is called with sizes that it has no place for; what is left out is said."""
    for name in registry.names():
        spec = registry.spec(name)
        calls = models.calls_of(spec, models.MODELS)
        for note in calls.notes:
            model, _, why = note.partition(" for ")[2].partition(": ")
            wanted = {
                "Qwen3-235B-A22B": r"its variant (\S+group=16\S*) is not served; `.* --variants \1` builds it",
                "Llama-3.2-3B": r"group is 3; its variants have \[4, 8, 2, 1, 5, 7, 16\]",
                "Qwen3-14B": r"its variant (\S+group=5\S*) is not served; `.* --variants \1` builds it",
            }[model]
            named = re.fullmatch(wanted, why)
            assert named, why
            if named.groups():
                assert named[1] in {each.name for each in spec.variants()} - {each.name for each in spec.served_variants()}
        for variant, sizes in calls.rows:
            assert variant in {each.name for each in spec.served_variants()}
            assert set(sizes) <= set(spec.symbols())


def test_sizes_without_a_row_are_told():
    odd = models.Model("odd", 960, (2560,), 15, 5, head_dim=80)
    calls = models.calls_of(registry.spec("paged_attention_decode"), [odd])
    assert calls.rows == []
    assert calls.notes == ["paged_attention_decode: left out for odd: group is 3; its variants have [4, 8, 2, 1, 5, 7, 16]"]
    calls = models.calls_of(registry.spec("reshape_and_cache_flash"), [odd])
    assert "it has rows for [{'K': 128}, {'K': 64}], not for {'K': 80}" in calls.notes[0]


# ---- the commands ----


PROCESS = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parents[1] / "support")]!r}
import fake_device
from hdispatch.tune import measure_worker
us_of = lambda rows: 10.0 + abs(rows.record["config"]["num_warps"] - 4)
measure_worker.main(lambda folder, manifest, index: fake_device.FakeDevice(us_of))
"""


def warps(file: configs.ConfigFile) -> dict[int, int]:
    """By the edges of the buckets that were measured."""
    spec = registry.spec("silu_and_mul")
    return {m: file.pick(spec, {"N": 1536}, {"M": m}).config["num_warps"] for m in (1, 32)}


@pytest.mark.slow
def test_a_model_is_tuned_and_built_in_a_command_each(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure_process, "COMMAND", ("-P", "-c", PROCESS))
    monkeypatch.setattr("hdispatch.tune.farm.current_device", lambda: 0)
    path = write(tmp_path, {**QWEN3_8B, "hidden_size": 768, "intermediate_size": 1536})
    command = ["tune", "all", "--ops", "silu_and_mul,topk_softmax", "--models", str(path), "--target", "h200"]
    command += ["--buckets", "1,32", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "configs")]
    command += ["--cache", str(tmp_path / "cache"), "--jobs", "2"]
    assert main(command) == 0
    said = capsys.readouterr()
    assert [line for line in said.err.splitlines() if line.startswith("step ")] == [
        "step 1 of 3: candidates are collected and compiled",
        "step 2 of 3: they are measured",
        "step 3 of 3: configs are selected",
    ]
    assert "2 cells measured" in said.out
    places = f"--configs {tmp_path / 'configs'} --cache {tmp_path / 'cache'}"
    assert f"next: hdispatch build --models {path} --target h200 {places} --out bundle\n" in said.out
    found = configs.read(tmp_path / "configs" / "silu_and_mul" / "nvidia_h200.json", registry.spec("silu_and_mul"))
    assert warps(found) == {1: 4, 32: 4}
    own = configs.read(configs.installed("silu_and_mul") / "nvidia_h200.json", registry.spec("silu_and_mul"))
    assert [entry for entry in found.entries if entry.shape.get("N") != 1536] == list(own.entries)
    assert not (tmp_path / "configs" / "topk_softmax").exists(), "no router is called"
    lines = timings.read(tmp_path / "work" / "timings.jsonl")
    assert {line["status"] for line in lines} == {"ok"}
    assert main(command) == 0
    assert "0 cells measured" in capsys.readouterr().out, "the same command goes on where it was"

    lines = (tmp_path / "work" / "timings.jsonl").read_text().splitlines()
    faster = {**json.loads(lines[0]), "config": {"num_warps": 32}, "us": 0.1}  # of a kernel that there is no more
    (tmp_path / "work" / "timings.jsonl").write_text("\n".join([*lines, json.dumps(faster)]) + "\n")
    assert main(command) == 0
    assert "timings.jsonl: 1 line left out: of other sizes, or of configs or kernels that are none" in capsys.readouterr().out
    found = configs.read(tmp_path / "configs" / "silu_and_mul" / "nvidia_h200.json", registry.spec("silu_and_mul"))
    assert warps(found) == {1: 4, 32: 4}

    build = ["build", "--ops", "silu_and_mul", "--variants", "bfloat16", "--target", "h200", "--models", str(path)]
    build += ["--configs", str(tmp_path / "configs"), "--cache", str(tmp_path / "cache")]
    assert main([*build, "--out", str(tmp_path / "bundle")]) == 0
    manifest, _ = read_bundle(tmp_path / "bundle")
    assert {1536, 12288, 0} <= {row["N"] for row in manifest["rows"]}
    assert any("tuned" in row for row in manifest["rows"] if row["N"] == 1536)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "--out bundle"),
        (["--models", "Qwen3-8B", "--tensor-parallel", "4"], "--models Qwen3-8B --tensor-parallel 4 --out bundle"),
        (["--target", "h100", "--ray", "--ops", "rms_norm"], "--target h100 --out bundle"),
        (["--ops", "rms_norm", "--variants", "float16"], "--variants float16 --ops rms_norm --out bundle"),
        (["--out", "my configs"], "--configs 'my configs' --out bundle"),
        (["--kernels", "a", "--kernels", "b", "--ops", "c,d"], "--kernels a --kernels b --ops c,d --out bundle"),
    ],
)
def test_the_whole_command_for_the_bundle_is_told(given, words):
    command = tune._build_command(parser().parse_args(["tune", "all", *given]))
    assert command == f"hdispatch build {words}"
    parser().parse_args(shlex.split(command)[1:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune", "all", "--models", "GPT-9"], "'GPT-9' is no model"),
        (["tune", "all", "--models", ""], "--models is empty"),
        (
            ["tune", "candidates", "--out", "x", "--models", "Qwen3-8B", "--shapes", "K=4096"],
            "leave out --shapes and --variants",
        ),
        (["tune", "candidates", "--out", "x", "--models", "Qwen3-8B", "--ops", "topk_softmax"], "call none of topk_softmax"),
        (["tune", "all", "--models", "Qwen3-8B", "--tensor-parallel", "3"], "cannot be cut into 3"),
        (["build", "--out", "x", "--models", "Qwen3-8B", "--shapes", "K=4096"], "give one of them"),
        (["build", "--out", "x", "--models", ""], "--models is empty"),
    ],
)
def test_bad_requests(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, *(["--target", "h200"] if arguments[0] == "tune" else [])]) == 1
    assert message in capsys.readouterr().err

"""Config files: vLLM's format, vLLM's rule, and what is refused."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import hdispatch
import pytest
import torch
from hdispatch.compile import DESCRIBED, configs, op_package
from hdispatch.errors import BuildError
from hdispatch.opspec import IntArg, OpSpec, TensorArg
from hdispatch.tune import point_configs, points

SPEC = OpSpec(
    name="toy_configs",
    args=(TensorArg("input", ("M", "K"), (torch.float32,)),),
    reference=lambda *_args: None,
    sample=lambda *_args: [],
    shapes=({"K": 64},),
    config_key={"hidden_size": "K", "num_tokens": "M"},
    ladder=(1, 16, 256),
)


def entry(hidden: int, tokens: int) -> dict:
    return {"key": {"hidden_size": hidden, "num_tokens": tokens}, "config": {"name": f"{hidden}/{tokens}"}}


def write(folder: Path, content: object, name: str = "nvidia_h200.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("hidden", "edge", "picked"),
    [
        (2048, 1, "2048/1"),
        (2048, 2, "2048/16"),  # the smallest that is large enough
        (2048, 16, "2048/16"),
        (2048, 8192, "2048/64"),  # none is: the largest
        (4096, 1, "4096/8"),
        (3072, 1, "2048/1"),  # as near as 4096, which comes later
        (3073, 16, "4096/8"),
        (10**6, 1, "4096/8"),
    ],
)
def test_pick_as_vllm_does(tmp_path, hidden, edge, picked):
    file = configs.read(write(tmp_path, [entry(2048, 64), entry(2048, 1), entry(2048, 16), entry(4096, 8)]), SPEC)
    assert file.pick(SPEC, {"K": hidden}, {"M": edge}).config["name"] == picked


def test_the_default_serves_only_where_nothing_else_is(tmp_path):
    default = {"key": {}, "config": {"name": "default"}}
    assert configs.read(write(tmp_path, [default]), SPEC).pick(SPEC, {"K": 1}, {"M": 1}).config["name"] == "default"
    assert (
        configs.read(write(tmp_path, [default, entry(2048, 1)]), SPEC).pick(SPEC, {"K": 9}, {"M": 9}).config["name"] == "2048/1"
    )
    with pytest.raises(BuildError, match="has no entry"):
        configs.read(write(tmp_path, []), SPEC).pick(SPEC, {"K": 1}, {"M": 1})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read the configs"),
        ("3", "holds a JSON int; it takes a list"),
        ({"key": {}}, "entry 'key' has the key 'key'; toy_configs takes"),
        ([{"key": {}}], "entry 0 is"),
        ([{"key": 3, "config": {}}], "entry 0 has the key 3; it takes an object"),
        ([{"key": "hidden_size_2048_num_tokens", "config": {}}], "entry 0 has the key 'hidden_size_2048_num_tokens'"),
        ([{"key": "hidden_size_1_hidden_size_2", "config": {}}], "entry 0 has the key 'hidden_size_1_hidden_size_2'"),
        ([{"key": {"hidden_size": 1, "K": 2}, "config": {}}], "entry 0 .*names a size twice"),
        ([{"key": {"N": 1}, "config": {}}], r"toy_configs takes \['hidden_size', 'num_tokens'\]"),
        ({"hidden_size_-1_num_tokens_1": {}}, "entry 'hidden_size_-1_num_tokens_1' has hidden_size -1; it takes an integer"),
        ([{"key": {"hidden": 1, "num_tokens": 1}, "config": {}}], r"toy_configs takes \['hidden_size', 'num_tokens'\]"),
        ([{"key": {"hidden_size": "x", "num_tokens": 1}, "config": {}}], "has hidden_size 'x'; it takes an integer"),
        ([{"key": {"hidden_size": 0, "num_tokens": 1}, "config": {}}], "at least 1"),
        ([{"key": {"hidden_size": True, "num_tokens": 1}, "config": {}}], "has hidden_size True"),
        ([entry(1, 1), entry(2, 1), entry(1, 1)], "entry 2 repeats the key of entry 0"),
        ([{"key": {"K": 1, "M": 1}, "config": {}}, entry(1, 1)], "entry 1 repeats the key of entry 0"),
        ([{"key": {"hidden_size": 1, "num_tokens": 1}, "config": []}], "entry 0 is"),
        ([entry(1, 1), {**entry(2, 1), "bakend": "triton"}], "entry 1 has 'bakend'; .* it takes \"backend\""),
        (
            [entry(1, 1), {**entry(2, 1), "backend": "cuda"}],
            "entry 1 has backend 'cuda'; .* one of .*'cutedsl', 'fallback', 'helion', 'tri",
        ),
        ([{**entry(2, 1), "backend": ["triton"]}], r"entry 0 has backend \['triton'\]"),
        ([{**entry(2, 1), "without": "cuda"}], "entry 0 has without 'cuda'"),
        ([entry(10**30, 1)], "entry 0 has hidden_size 1000000000000000000000000000000; .* at most 4294967295"),
        ([entry(1, 10**30)], "entry 0 has num_tokens 1000"),
        ([{**entry(1, 1), "config": {"block": [10**30]}}], "entry 0 has an integer of 100 bits in its config"),
        ('[{"key": {}, "config": {"x": NaN}}]', "entry 0 has nan in its config"),
        ('[{"key": {}, "config": {"x": [1e999]}}]', "entry 0 has inf in its config"),
        ('[{"key": {}, "config": {"x": 1, "x": 2}}]', "json: entry 0.config repeats the name 'x'"),
        ('[{"key": {}, "config": {}}, {"key": {"K": 1, "K": 2}, "config": {}}]', "json: entry 1.key repeats the name 'K'"),
        ('[{"key": {}, "config": {}, "config": {}}]', "json: entry 0 repeats the name 'config'"),
        ('{"default": {}, "default": {}}', "json: the file repeats the name 'default'"),
        ('{"default": {"x": {"y": 1, "y": 2}}}', "json: entry default.x repeats the name 'y'"),
        ("[" * 100_000, "json: the file is nested deeper than 64 levels"),
        (
            '[{"key": {}, "config": {"x": ' + "[" * 100 + "]" * 100 + "}}]",
            r"json: entry 0.config.x\[0\].*nested deeper than 64",
        ),
        ("1" * 5000, "cannot read the configs"),
    ],
)
def test_what_is_refused(tmp_path, content, message):
    with pytest.raises(BuildError, match=message):
        configs.read(write(tmp_path, content), SPEC)


def test_another_gpus_file_is_used_but_not_silently(tmp_path):
    assert configs.find(SPEC, DESCRIBED["b200"], tmp_path) is None
    write(tmp_path, [entry(1, 1)])
    file, note = configs.find(SPEC, DESCRIBED["b200"], tmp_path)
    assert file.path.name == "nvidia_h200.json"
    assert "no configs for b200" in note
    assert configs.find(SPEC, DESCRIBED["h200"], tmp_path)[1] is None
    write(tmp_path, [entry(2, 2)], "nvidia_b200.json")
    file, note = configs.find(SPEC, DESCRIBED["b200"], tmp_path)
    assert (file.path.name, note) == ("nvidia_b200.json", None)


def test_vllms_keys_of_several_sizes():
    spec = replace(SPEC, config_key={"hidden_size": "K", "groups": "N", "num_tokens": "M"})
    entries = tuple(
        configs.ConfigEntry({"K": k, "N": n, "M": m}, {"at": [k, n, m]}) for k in (64, 128) for n in (1, 8) for m in (1, 4)
    )
    file = configs.ConfigFile(Path("x"), entries)
    assert file.pick(spec, {"K": 120, "N": 3}, {"M": 2}).config["at"] == [128, 1, 4]


def test_entries_that_stand_in_for_a_backend(tmp_path):
    usual = [{**entry(64, 4), "backend": "cutedsl"}, entry(64, 8), entry(128, 8)]
    file = configs.read(write(tmp_path, [*usual, {**entry(64, 2), "without": "cutedsl"}]), SPEC)
    both, one = file.available(["triton", "cutedsl"], "triton"), file.available(["triton"], "triton")
    assert [(e.shape["K"], e.sizes["M"], e.backend) for e in both.entries] == [
        (64, 4, "cutedsl"),
        (64, 8, None),
        (128, 8, None),
    ]
    assert [(e.shape["K"], e.sizes["M"], e.without) for e in one.entries] == [(64, 2, "cutedsl"), (128, 8, None)]
    only = configs.read(write(tmp_path, usual[:1]), SPEC)
    assert only.available(["triton"], "triton").entries == only.entries, "what is missing is said when it is built"
    again = {**entry(64, 2), "without": "cutedsl"}
    with pytest.raises(BuildError, match="entry 1 repeats the key of entry 0"):
        configs.read(write(tmp_path, [again, again]), SPEC)
    with pytest.raises(BuildError, match="entry 0 has without 3; it takes the name of a backend"):
        configs.read(write(tmp_path, [{**entry(64, 2), "without": 3}]), SPEC)


def test_what_is_no_text_is_refused(tmp_path):
    (tmp_path / "x.json").write_bytes(b'[{"key": {}, "config": {"\xff": 1}}]')
    with pytest.raises(BuildError, match=r"cannot read the configs in .*x\.json"):
        configs.read(tmp_path / "x.json", SPEC)


def test_an_entry_for_a_kernel_that_the_op_has_not(tmp_path):
    file = configs.read(write(tmp_path, [entry(1, 1), {**entry(2, 2), "backend": "cutedsl"}]), SPEC)
    file.require_backends(["triton", "cutedsl"])
    with pytest.raises(BuildError, match=r"h200.json: entry 1 is for 'cutedsl'; the op has kernels of \['triton'\]"):
        file.require_backends(["triton"])


# ---- vLLM's own files: a Helion config, and every shape of key ----

HELION = {"block_sizes": [1], "num_warps": 4, "num_stages": 1, "indexing": ["pointer"], "pid_type": "flat"}


@pytest.mark.parametrize(
    ("op", "key", "sizes", "arguments"),
    [
        ("rms_norm_dynamic_per_token_quant", {"hidden_size": 2048, "num_tokens": 4}, {"K": 2048, "M": 4}, {}),
        (
            "per_token_group_fp8_quant",
            {"hidden_size": 2048, "group_size": 128, "num_tokens": 4},
            {"K": 2048, "M": 4},
            {"group_size": 128},
        ),
        (
            "per_token_group_fp8_quant_packed",
            {"hidden_size": 2048, "group_size": 128, "num_tokens": 4},
            {"K": 2048, "M": 4},
            {"group_size": 128},
        ),
        (
            "rms_norm_per_block_quant",
            {"hidden_size": 2048, "group_size": 64, "num_tokens": 4},
            {"K": 2048, "M": 4},
            {"group_size": 64},
        ),
        (
            "silu_and_mul_per_block_quant",
            {"intermediate_size": 6144, "group_size": 128, "num_tokens": 4},
            {"N": 6144, "M": 4},
            {"group_size": 128},
        ),
        ("fused_qk_norm_rope", {"q_heads": 16, "kv_heads": 8, "num_tokens": 4}, {"K": 4096, "M": 4}, {}),
        ("fused_qk_norm_rope", {"q_heads": 64, "kv_heads": 8, "num_tokens": 4}, {"K": 10240, "M": 4}, {}),
        (
            "fused_qk_norm_rope",
            {"q_heads": 16, "kv_heads": 8, "is_neox": 0, "num_tokens": 4},
            {"K": 4096, "M": 4},
            {"is_neox": 0},
        ),
        ("scaled_mm", {"K": 2048, "N": 4096, "M": 4}, {"K": 2048, "N": 4096, "M": 4}, {}),
        ("scaled_mm_blockwise", {"K": 2048, "N": 4096, "M": 4}, {"K": 2048, "N": 4096, "M": 4}, {}),
    ],
)
@pytest.mark.parametrize("older", [False, True])
def test_vllms_keys(tmp_path, op, key, sizes, arguments, older):
    spec = hdispatch.registry.spec(op)
    text = "_".join(f"{name}_{size}" for name, size in key.items())
    default = {"default": HELION} if older else [{"key": {}, "config": HELION}]
    content = {**default, text: HELION} if isinstance(default, dict) else [*default, {"key": key, "config": HELION}]
    first, second = configs.read(write(tmp_path, content), spec).entries
    assert (first.sizes, first.arguments) == ({}, {})
    assert (second.sizes, second.arguments, second.backend) == (sizes, arguments, "helion")
    assert second.config == HELION


@pytest.mark.parametrize(
    ("op", "key"),
    [
        ("fused_qk_norm_rope", {"q_heads": 16, "num_tokens": 4}),
        ("fused_qk_norm_rope", {"q_heads": 16, "kv_heads": 0, "num_tokens": 4}),
        ("fused_qk_norm_rope", {"q_heads": 16, "kv_heads": "8", "num_tokens": 4}),
        ("fused_qk_norm_rope", {"q_heads": 2**31, "kv_heads": 8, "num_tokens": 4}),
        ("rms_norm", {"hidden_size": 2048, "group_size": 64, "num_tokens": 4}),
        ("static_scaled_fp8_quant", {"hidden_size": 2048, "group_shape_m": -1, "group_shape_n": -1, "num_tokens": 1}),
    ],
)
def test_keys_that_mean_nothing_here(tmp_path, op, key):
    with pytest.raises(BuildError, match=r"h200\.json: entry 0 has "):
        configs.read(write(tmp_path, [{"key": key, "config": HELION}]), hdispatch.registry.spec(op))


@pytest.mark.parametrize(
    ("op", "name", "value", "values"),
    [
        ("rms_norm_per_block_quant", "group_size", 48, "[64, 128]"),
        ("rms_norm_per_block_quant", "residual", 2, "[0, 1]"),
        ("rms_norm_per_block_quant", "residual", -1, "[0, 1]"),
        ("rms_norm_per_block_quant", "residual", True, "[0, 1]"),
        ("rms_norm_per_block_quant", "group_size", 128.0, "[64, 128]"),
        ("fused_qk_norm_rope", "is_neox", 2, "[0, 1]"),
        ("attention_half", "is_neox", 0, "[1]"),
    ],
)
def test_values_that_no_variant_has_are_refused(tmp_path, op, name, value, values):
    spec = hdispatch.registry.spec(op)
    path = write(tmp_path, [{"key": {}, "config": {}}, {"key": {name: value, "M": 4}, "config": {}}])
    with pytest.raises(BuildError) as error:
        configs.read(path, spec)
    what = f"entry 1 has {name} {value!r}, which no variant of {op} has; it takes one of {values}"
    assert str(error.value) == f"{path}: {what}"
    packages = op_package.read(op, f"{op_package.KERNELS}.{op}")
    (tmp_path / op).mkdir()
    path.rename(tmp_path / op / path.name)
    notes = []
    point_configs.config_files(packages, points.Scope(more=(tmp_path,)), DESCRIBED["h200"], notes)
    assert len(notes) == 1
    assert what in notes[0]


def test_all_values_that_variants_have_are_read(tmp_path):
    for op in op_package.available_ops():
        spec = hdispatch.registry.spec(op)
        for name in configs.key_arguments(spec):
            values = sorted({value for each in spec.variants() if (value := configs.argument_of(each, name)) is not None})
            file = configs.read(write(tmp_path, [{"key": {name: value}, "config": {}} for value in values]), spec)
            assert [entry.arguments for entry in file.entries] == [{name: value} for value in values]


def test_equal_rows_of_other_heads_are_no_repetition(tmp_path):
    keys = [{"q_heads": q, "kv_heads": kv, "num_tokens": 4} for q, kv in ((16, 8), (24, 4), (16, 8))]
    content = [{"key": key, "config": {**HELION, "num_warps": 2**at}} for at, key in enumerate(keys)]
    spec = hdispatch.registry.spec("fused_qk_norm_rope")
    file = configs.read(write(tmp_path, content[:2]), spec)
    assert file.pick(spec, {"K": 4096}, {"M": 4}).config["num_warps"] == 1
    with pytest.raises(BuildError, match="entry 2 repeats the key of entry 0"):
        configs.read(write(tmp_path, content), spec)


def test_entries_for_a_value_of_an_argument(tmp_path):
    args = (*SPEC.args, IntArg("group_size", values=(128, 64, 32)))
    spec = replace(SPEC, args=args)
    keys = [{"hidden_size": 64, "group_size": group, "num_tokens": 16} for group in (64, 128)]
    file = configs.read(write(tmp_path, [{"key": key, "config": {"name": key["group_size"]}} for key in keys]), spec)
    for group, picked in ((64, 64), (128, 128), (32, 64)):
        variant = spec.variant(f"any+group_size={group}")
        assert file.pick(spec, {"K": 64}, {"M": 16}, variant).config["name"] == picked
    assert file.pick(spec, {"K": 64}, {"M": 16}).config["name"] == 128, "the typical variant's"


def collected(op: str, more: Path) -> tuple[list[configs.ConfigFile], list[str]]:
    """The files of a folder that `tune candidates --configs` takes, without the op's own, and its notes."""
    notes: list[str] = []
    files = point_configs.config_files(
        op_package.read(op, f"{op_package.KERNELS}.{op}"), points.Scope(more=(more,)), DESCRIBED["h200"], notes
    )
    return [file for file in files if more in file.path.parents], notes


def test_files_that_cannot_serve_are_named_and_left_out(tmp_path):
    for op in ("rms_norm_dynamic_per_token_quant", "reshape_and_cache_flash", "silu_mul_fp8", "empty"):
        (tmp_path / op).mkdir()
    key = {"hidden_size": 2048, "num_tokens": 4}
    first = tmp_path / "rms_norm_dynamic_per_token_quant"
    write(first, [{"key": key, "config": HELION}], "good.json")
    write(first, [{"key": {"what": 1}, "config": HELION}], "odd.json")
    write(tmp_path / "reshape_and_cache_flash", [{"key": {}, "config": HELION}], "a.json")
    write(tmp_path / "silu_mul_fp8", [])
    files, notes = collected("rms_norm_dynamic_per_token_quant", tmp_path)
    assert {file.path.name for file in files} == {"good.json"}
    assert len(notes) == 1
    assert "left out: " in notes[0]
    assert "odd.json: entry 0 has the key {'what': 1}" in notes[0]
    files, notes = collected("reshape_and_cache_flash", tmp_path)
    assert not files
    assert "a.json: 1 of 1 entries are for helion; reshape_and_cache_flash has kernels of triton" in notes[0]
    found = point_configs.strangers(points.Scope(more=(tmp_path,)), op_package.find(None))
    assert found == [f"left out: {tmp_path / 'silu_mul_fp8'} is of no op here"]


#: vllm/kernels/helion/configs of an unpacked vLLM.
VLLM_CONFIGS = "HDISPATCH_VLLM_CONFIGS"


@pytest.mark.skipif(VLLM_CONFIGS not in os.environ, reason=f"${VLLM_CONFIGS} names no folder of vLLM's Helion configs")
def test_vllms_own_files_load():
    folder = Path(os.environ[VLLM_CONFIGS])
    paths = [path for op in op_package.available_ops() for path in sorted((folder / op).glob("*.json"))]
    assert len(paths) >= 12
    for path in paths:
        spec = hdispatch.registry.spec(path.parent.name)
        raw = json.loads(path.read_text())
        file = configs.read(path, spec)
        assert len(file.entries) == len(raw)
        for entry in file.entries:
            assert entry.backend == "helion"
            assert set(entry.sizes) in ({*spec.config_key.values()}, set()), f"{path}: {entry}"
        for shape in spec.shapes:
            assert [file.pick(spec, shape, {"M": edge}) for edge in spec.ladder]
        files, notes = collected(path.parent.name, folder)
        has_helion = "helion" in op_package.read(path.parent.name, f"{op_package.KERNELS}.{path.parent.name}").backends
        assert any(each.path == path for each in files) == has_helion
        assert any(str(path) in note and "are for helion" in note for note in notes) != has_helion

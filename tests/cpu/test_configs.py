"""Config files: vLLM's format, vLLM's rule, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hdispatch.build import DESCRIBED, configs
from hdispatch.errors import BuildError
from hdispatch.opspec import OpSpec, TensorArg

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
    assert file.pick(SPEC, {"K": hidden}, edge).config["name"] == picked


def test_the_default_serves_only_where_nothing_else_is(tmp_path):
    default = {"key": {}, "config": {"name": "default"}}
    assert configs.read(write(tmp_path, [default]), SPEC).pick(SPEC, {"K": 1}, 1).config["name"] == "default"
    assert configs.read(write(tmp_path, [default, entry(2048, 1)]), SPEC).pick(SPEC, {"K": 9}, 9).config["name"] == "2048/1"
    with pytest.raises(BuildError, match="has no entry"):
        configs.read(write(tmp_path, []), SPEC).pick(SPEC, {"K": 1}, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read the configs"),
        ({"key": {}}, "holds a JSON dict; it takes a list"),
        ([{"key": {}}], "entry 0 is"),
        (
            [{"key": "hidden_size_2048_num_tokens_1", "config": {}}],
            "has the key 'hidden_size_2048_num_tokens_1'; it takes an object",
        ),
        ([{"key": {"hidden": 1, "num_tokens": 1}, "config": {}}], r"toy_configs takes \['hidden_size', 'num_tokens'\]"),
        ([{"key": {"hidden_size": "x", "num_tokens": 1}, "config": {}}], "has hidden_size 'x'; it takes an integer"),
        ([{"key": {"hidden_size": 0, "num_tokens": 1}, "config": {}}], "at least 1"),
        ([{"key": {"hidden_size": True, "num_tokens": 1}, "config": {}}], "has hidden_size True"),
        ([entry(1, 1), entry(2, 1), entry(1, 1)], "entry 2 repeats the key of entry 0"),
        ([{"key": {"hidden_size": 1, "num_tokens": 1}, "config": []}], "entry 0 is"),
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
    spec = OpSpec(**{**vars(SPEC), "config_key": {"hidden_size": "K", "groups": "N", "num_tokens": "M"}})
    entries = tuple(
        configs.ConfigEntry({"K": k, "N": n, "M": m}, {"at": [k, n, m]}) for k in (64, 128) for n in (1, 8) for m in (1, 4)
    )
    file = configs.ConfigFile(Path("x"), entries)
    assert file.pick(spec, {"K": 120, "N": 3}, 2).config["at"] == [128, 1, 4]


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

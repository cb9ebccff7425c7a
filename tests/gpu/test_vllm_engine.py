"""vLLM's real engine with the plug-in, a process a test: graphs, both runners, other weights, sleep, speculation, many steps.

Needs vLLM 0.33 and its libraries. The model has Qwen3-1.7B's sizes and four layers.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hdispatch.bench import serve_model

SPEC = importlib.util.find_spec("vllm")
pytestmark = pytest.mark.skipif(SPEC is None or SPEC.origin is None, reason="vLLM is not installed")

SCRIPT = Path(__file__).parents[1] / "vllm" / "engine_run.py"
LAYERS = 4
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 8, 32, 64]}
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
#: Relative error of logits of four fp8 layers against float32: 0.02 to 0.03. A layer that computes anything else is at 0.3.
RIGHT = 0.05
#: Logprob gap at which rounding may part greedy tokens.
NEAR = 0.5
#: Requests of a batch that has a captured graph.
REQUESTS = 32


@pytest.fixture
def play(bundle_dir, tmp_path):
    """Run a scenario of tests/vllm/engine_run.py: play(scenario, scheme, options, **parameters) -> its answer."""

    def run(scenario, scheme="token", options=None, variables=None, limit_s=300, **given):
        serve_model.write_config(tmp_path, "qwen3-1.7b", scheme)
        options = {"hf_overrides": {"num_hidden_layers": LAYERS}} | (options or {})
        parameters = {"scenario": scenario, "simulated": False, "options": options} | given
        environment = os.environ | {
            "HDISPATCH": "1",
            "HDISPATCH_BUNDLE": str(bundle_dir),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_USE_DEEP_GEMM": "0",
            "VLLM_USE_FLASHINFER_SAMPLER": "0",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
        command = [sys.executable, str(SCRIPT), str(tmp_path), json.dumps(parameters)]
        done = subprocess.run(
            command, env=environment | (variables or {}), capture_output=True, text=True, timeout=limit_s, check=False
        )
        answers = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
        assert answers, done.stdout[-3000:] + done.stderr[-6000:]
        return json.loads(answers[0].removeprefix("ANSWER "))

    return run


def check_served(found):
    assert found["class"] == "hdispatch.integrations.vllm.models"
    assert found["reason"] is None
    assert found["misses"] == {}
    assert found["hits"] > 0


def check_near_ties(found, expected):
    """Greedy tokens part where the expected logprobs are near each other only."""
    for mine, other in zip(found["requests"], expected["requests"], strict=True):
        for step, (a, b) in enumerate(zip(mine["tokens"], other["tokens"], strict=True)):
            if a != b:
                known = dict(map(tuple, other["top"][step]))
                assert a in known, (step, a, known)
                assert known[b] - known[a] < NEAR
                break


FA3 = {"HDISPATCH_ATTENTION": "fa3"}


def check_decode(found, setting):
    """Decode steps took attention_half, or FlashAttention 3 because it was asked for."""
    assert found["decode"]["reason"] == ("HDISPATCH_ATTENTION is fa3" if setting else None)
    assert (found["decode"]["calls"] == 0) == bool(setting)


@pytest.mark.parametrize(
    ("scheme", "setting"),
    [("token", {}), ("token", FA3), ("block", {}), ("tensor", {}), ("static", {}), ("bf16", {}), ("bf16", FA3)],
    ids=lambda each: each if isinstance(each, str) else "fa3" if each else "half",
)
def test_logits(play, scheme, setting):
    found = play("accuracy", scheme, variables=setting, steps=16, requests=REQUESTS)
    check_served(found)
    check_decode(found, setting)
    assert found["errors"][0]["relative"] < RIGHT


@pytest.mark.parametrize(
    ("scheme", "setting", "requests"),
    [
        ("token", {}, REQUESTS),
        ("token", {}, REQUESTS - 5),  # padded rows: requests of no token, whose slot is -1
        ("token", FA3, REQUESTS),
        ("block", {}, REQUESTS),
    ],
)
def test_full_graphs(play, scheme, setting, requests):
    """Decode steps replay a graph of our layers: their launches are not made again."""
    found = play("accuracy", scheme, {"compilation_config": GRAPHS}, setting, steps=16, requests=requests)
    check_served(found)
    check_decode(found, setting)
    (errors,) = found["errors"]
    assert errors["relative"] < RIGHT
    assert 0 < errors["calls"] < 3 * 12 * LAYERS  # those of the prefill


def test_full_graphs_of_a_long_model(play):
    """Captured for 32k tokens, FlashAttention 3 splits requests by their lengths; attention_half is right there too."""
    options = {"compilation_config": GRAPHS, "max_model_len": 32768}
    settings = ({}, {"HDISPATCH_ATTENTION": "half"})
    auto, half = (play("accuracy", options=options, variables=each, steps=16, requests=REQUESTS) for each in settings)
    for found in (auto, half):
        check_served(found)
        assert found["decode"]["reason"] is None
        assert found["errors"][0]["relative"] < RIGHT
    captured = 2 * LAYERS * len(GRAPHS["cudagraph_capture_sizes"])  # each after a step to warm up
    assert half["decode"]["calls"] - auto["decode"]["calls"] >= captured


def test_prompts_that_the_cache_holds(play):
    """Prefix caching: the second time only the ends of the prompts are computed; tokens part at near ties only."""
    sizes = {"tokens": 32, "lengths": [40, 25, 60, 300, 7, 130, 64, 64]}
    once = play("generate", options={"enable_prefix_caching": False}, **sizes)
    twice = play("generate", options={"enable_prefix_caching": True}, times=2, **sizes)
    check_served(twice)
    check_near_ties(twice, once)


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_our_runner_takes_vllms_tokens(play, graphs):
    """Greedy, without logprobs: those of vLLM's own runner and sampler over the same layers, requests ending one by one."""
    sizes = {"tokens": 48, "lengths": [40, 25, 60, 300, 7, 130, 64, 64], "logprobs": None, "stagger": 3}
    options = {"compilation_config": GRAPHS} if graphs else {}
    ours, theirs = (play("generate", options=options, variables={"HDISPATCH_RUNNER": on}, **sizes) for on in ("1", "0"))
    check_served(ours)
    assert (ours["sampler"], theirs["sampler"]) == ("GreedySampler", "Sampler")
    assert ours["runner_decodes"]["reason"] is None
    assert ours["runner_decodes"]["decode_inputs"] == ours["runner_decodes"]["decode_update"] > 0
    assert [each["tokens"] for each in ours["requests"]] == [each["tokens"] for each in theirs["requests"]]


def test_reloaded_weights_are_bound_again(play):
    found = play("reload", steps=8, requests=8)
    check_served(found)
    assert found["changed"]
    assert found["bound_again"]
    assert all(errors["relative"] < RIGHT for errors in found["errors"]), found["errors"]


def test_weights_reloaded_under_graphs(play):
    """vLLM copies into the memory that graphs were captured with."""
    found = play("reload", options={"compilation_config": GRAPHS}, steps=8, requests=8)
    assert found["changed"]
    assert all(errors["relative"] < RIGHT for errors in found["errors"]), found["errors"]


def test_sleep_mode(play):
    if not importlib.util.find_spec("vllm.cumem_allocator"):
        pytest.skip("this vLLM is without cumem_allocator, which sleep mode needs")
    found = play("sleep", options={"enable_sleep_mode": True}, steps=8, requests=8)
    check_served(found)
    assert all(errors["relative"] < RIGHT for errors in found["errors"]), found["errors"]


@pytest.mark.parametrize(
    ("options", "variables"),
    [
        ({}, {"VLLM_USE_V2_MODEL_RUNNER": "0"}),
        ({"speculative_config": NGRAM}, {}),
        ({"speculative_config": NGRAM, "compilation_config": GRAPHS}, {}),
        ({"enable_prefix_caching": True, "max_num_batched_tokens": 256}, {}),
        ({}, {"HDISPATCH_ATTENTION": "fa3"}),
    ],
    ids=["v1", "ngram", "ngram under graphs", "chunks and prefix caching", "fa3"],
)
def test_tokens_part_from_vllms_own_at_near_ties_only(play, options, variables):
    sizes = {"tokens": 48, "lengths": [40, 25, 60, 300, 7, 130, 64, 64]}
    found = play("generate", options=options, variables=variables, **sizes)
    check_served(found)
    assert ("gpu_model_runner" in found["runner"]) == ("VLLM_USE_V2_MODEL_RUNNER" in variables)
    theirs = play("generate", options=options, variables=variables | {"HDISPATCH": "0"}, **sizes)
    assert not theirs["class"].startswith("hdispatch")
    check_near_ties(found, theirs)


@pytest.mark.parametrize("scheme", ["token", "block"])
def test_two_runs_and_another_order_give_the_same_bits(play, scheme):
    found = play("same_bits", scheme, steps=16, requests=REQUESTS)
    check_served(found)
    assert all(found["again"]), found["again"]
    assert all(found["other_order"]), found["other_order"]


def test_lora_takes_vllms_own_layers(play):
    found = play("generate", options={"enable_lora": True}, tokens=4, lengths=[40, 25])
    assert found["reason"] == "LoRA is on"


def test_ten_thousand_steps(play):
    """More than ten thousand steps of random batches, lengths and preemptions: no fault, every request done, memory flat."""
    options = {"kv_cache_memory_bytes": 64 << 20}  # 4096 tokens
    found = play("storm", options=options, limit_s=500, steps=10_500, most=128, longest=300)
    check_served(found)
    assert not found["unfinished"]
    assert found["done"] > 1000
    assert found["preempted"] > 100
    (device, host), (device_end, host_end) = found["memory"]
    assert device_end - device < 4 << 20
    assert host_end - host < 200 << 20

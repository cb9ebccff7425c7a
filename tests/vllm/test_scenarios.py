"""What a long-lived engine meets, simulated: other weights, speculation, the V1 runner, LoRA, preemptions (more: tests/gpu)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Play = Callable[..., dict[str, Any]]
LENGTHS = [40, 25, 60]
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2}


def test_reloaded_weights_are_bound_again(play: Play) -> None:
    found = play("reload", steps=2, requests=4)
    assert found["changed"]
    assert found["bound_again"]
    assert all(errors["relative"] < 0.03 for errors in found["errors"]), found["errors"]
    assert found["log"].count("hdispatch: 2 layers of Qwen3ForCausalLM") == 2


def tokens_of(found: dict[str, Any]) -> list[list[int]]:
    return [each["tokens"] for each in found["requests"]]


@pytest.mark.parametrize(
    ("options", "variables"),
    [({}, {"VLLM_USE_V2_MODEL_RUNNER": "0"}), ({"speculative_config": NGRAM}, {})],
    ids=["v1", "ngram"],
)
def test_the_v1_runner_and_speculation_change_nothing(play: Play, options: Any, variables: dict[str, str]) -> None:
    """The same tokens whatever runs around the layers: ours are the same function of the same rows."""
    expected = play("generate", tokens=8, lengths=LENGTHS)
    found = play("generate", options, tokens=8, lengths=LENGTHS, variables=variables)
    assert found["reason"] is None
    assert ("gpu_model_runner" in found["runner"]) == bool(variables)
    assert tokens_of(found) == tokens_of(expected)
    assert expected["decode"]["reason"] is None
    assert expected["decode"]["calls"] > 0
    if variables:
        assert found["decode"] == expected["decode"]
    assert expected["sampler"] == "GreedySampler"
    assert found["sampler"] == "Sampler"  # V1's own, and that of speculation
    assert found["runner_decodes"]["reason"] == ("vLLM's runner" if variables else "speculation is on")
    assert found["runner_decodes"]["decode_inputs"] == 0


def test_prompts_that_the_cache_holds(play: Play) -> None:
    """Prefix caching: the second time only the ends of the prompts are computed, in steps that mix lengths."""
    expected = play("generate", tokens=6, lengths=LENGTHS)
    found = play("generate", {"enable_prefix_caching": True}, tokens=6, lengths=LENGTHS, times=2)
    assert tokens_of(found) == tokens_of(expected)
    assert found["decode"]["calls"] == 2 * expected["decode"]["calls"]


OFF = {"HDISPATCH_RUNNER": "0"}


@pytest.mark.parametrize(
    ("more", "options"),
    [
        ({"logprobs": None}, {}),
        ({}, {}),
        ({"logprobs": None, "temperature": 0.8}, {}),
        ({"logprobs": None, "sampling": {"repetition_penalty": 1.3}}, {}),
        ({"logprobs": None, "mixed": True}, {}),
        ({"logprobs": None}, {"max_num_batched_tokens": 32, "max_num_seqs": 2}),
        ({"logprobs": None}, {"async_scheduling": False}),
    ],
    ids=["greedy", "logprobs", "random", "penalty", "mixed", "chunks", "sync"],
)
def test_our_runner_takes_vllms_tokens(play: Play, more: dict[str, Any], options: dict[str, Any]) -> None:
    """The tokens of vLLM's own runner over the same layers, with requests that come and go; its Triton kernels interpreted."""
    given = {"tokens": 10, "lengths": [40, 25, 60, 17], "stagger": 2} | more
    ours = play("generate", options, **given)
    theirs = play("generate", options, variables=OFF, **given)
    assert (ours["sampler"], theirs["sampler"]) == ("GreedySampler", "Sampler")
    assert ours["scheduler"] == ("Scheduler" if options.get("async_scheduling") is False else "DecodeScheduler")
    assert tokens_of(ours) == tokens_of(theirs)
    found = ours["runner_decodes"]
    assert found["reason"] is None
    assert found["decode_inputs"] == found["decode_update"] > 0
    assert (found["argmax"] > 0) == ("temperature" not in more)
    assert set(theirs["runner_decodes"].values()) == {"vLLM's runner", 0}
    assert ours["decode"] == theirs["decode"]
    assert "hdispatch: vLLM's own model runner stays: HDISPATCH_RUNNER is 0" in theirs["log"]


def test_a_runner_that_is_not_the_known_one_stays(play: Play) -> None:
    found = play("generate", tokens=3, lengths=LENGTHS, other_code=True)
    assert found["sampler"] == "Sampler"
    assert "hdispatch: vLLM's own model runner stays: its code is " in found["log"]
    assert found["reason"] is None


def test_layers_of_vllms_under_our_runner(play: Play) -> None:
    """LoRA: vLLM's own layers read all of attention's metadata."""
    given = {"tokens": 6, "lengths": LENGTHS, "logprobs": None}
    ours, theirs = (play("generate", {"enable_lora": True}, variables=off, **given) for off in ({}, OFF))
    assert ours["runner_decodes"]["decode_inputs"] > 0
    assert tokens_of(ours) == tokens_of(theirs)


def test_lora_takes_vllms_own_layers(play: Play) -> None:
    """Step after step: what is refused is refused once."""
    found = play("generate", {"enable_lora": True}, tokens=4, lengths=LENGTHS)
    assert found["reason"] == "LoRA is on"
    assert found["log"].count("takes vLLM's own layers: LoRA is on") == 1


def test_two_runs_and_another_order_give_the_same_bits(play: Play) -> None:
    found = play("same_bits", steps=2, requests=5)
    assert all(found["again"])
    assert all(found["other_order"])


def test_requests_are_preempted_and_finish(play: Play) -> None:
    found = play("storm", {"num_gpu_blocks_override": 33}, steps=30, most=8, longest=120)
    assert found["preempted"] > 0
    assert found["runner_decodes"]["decode_inputs"] > 0
    assert not found["unfinished"]
    assert found["reason"] is None
    assert found["decode"]["calls"] > 0

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


def test_prompts_that_the_cache_holds(play: Play) -> None:
    """Prefix caching: the second time only the ends of the prompts are computed, in steps that mix lengths."""
    expected = play("generate", tokens=6, lengths=LENGTHS)
    found = play("generate", {"enable_prefix_caching": True}, tokens=6, lengths=LENGTHS, times=2)
    assert tokens_of(found) == tokens_of(expected)
    assert found["decode"]["calls"] == 2 * expected["decode"]["calls"]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_our_sampler_takes_vllms_tokens(play: Play, temperature: float) -> None:
    """Greedy and random, without logprobs: those of vLLM's own sampler over the same layers."""
    given = {"tokens": 6, "lengths": LENGTHS, "temperature": temperature, "logprobs": None}
    ours = play("generate", **given)
    theirs = play("generate", own_sampler=False, **given)
    assert (ours["sampler"], theirs["sampler"]) == ("GreedySampler", "Sampler")
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
    assert not found["unfinished"]
    assert found["reason"] is None
    assert found["decode"]["calls"] > 0

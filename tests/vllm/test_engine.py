"""vLLM's real engine with the plug-in, on CPU tensors: every step against vLLM's own layers on the same caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Simulate = Callable[..., dict[str, Any]]

#: Relative difference of hidden states. fp8: a sum or product that vLLM rounds to bfloat16 before it quantizes and we do not
#: changes some codes by one, 1/16 of the value. bfloat16: the same of the norms of q and k, and no codes.
DIFFERENCES = {"token": 0.025, "tensor": 0.025, "block": 0.025, "static": 0.015, "bf16": 0.006}
CASES = [
    *(("tiny-qwen3", scheme) for scheme in DIFFERENCES),
    *(("tiny-qwen2", scheme) for scheme in ("token", "block", "bf16")),
    *(("tiny-llama", scheme) for scheme in ("block", "static")),
]


@pytest.mark.parametrize(("model", "scheme"), CASES)
def test_every_step_is_that_of_vllms_own_layers(simulate: Simulate, model: str, scheme: str) -> None:
    found = simulate(model, scheme, tokens=4)
    (decision,) = found["models"]
    assert decision["reason"] is None, decision
    assert decision["class"].startswith("hdispatch.")
    assert {step["kind"] for step in found["steps"]} >= {"mixed", "decode"}
    assert all(step["halves"] == (2 if step["kind"] == "decode" else 0) for step in found["steps"]), found["steps"]
    # Llama with fixed scales calls the same ops in the same order.
    bound = 0.0 if (model, scheme) == ("tiny-llama", "static") else DIFFERENCES[scheme]
    assert max(step["difference"] for step in found["steps"]) <= bound, found["steps"]
    assert all(len(request["tokens"]) == 4 for request in found["requests"])


def test_chunks_of_rows_change_nothing(simulate: Simulate) -> None:
    """The same bits from an arena of 128 rows as from one that holds the whole step."""
    whole, chunked = (simulate("tiny-qwen3", "token", tokens=2, arena=arena) for arena in (None, 500_000))
    assert whole["models"][0]["arena"]["rows"] == 256
    assert chunked["models"][0]["arena"]["rows"] == 128
    assert whole["requests"] == chunked["requests"]
    assert whole["steps"] == chunked["steps"]


def test_decode_steps_with_flash_attention(simulate: Simulate) -> None:
    """HDISPATCH_ATTENTION=fa3: no launch of attention_half, and hidden states no nearer to vLLM's own."""
    half, fa3 = (simulate("tiny-qwen3", "bf16", tokens=4, variables={"HDISPATCH_ATTENTION": each}) for each in ("auto", "fa3"))
    assert "hdispatch: decode steps take attention_half" in half["log"]
    assert "hdispatch: decode steps take FlashAttention 3: HDISPATCH_ATTENTION is fa3; others FlashAttention 3" in fa3["log"]
    assert not any(step["halves"] for step in fa3["steps"])

    def error(found: dict[str, Any]) -> float:
        return max(step["difference"] for step in found["steps"] if step["kind"] == "decode")

    assert error(half) < 1.1 * error(fa3)


@pytest.mark.parametrize(("model", "scheme"), [("tiny-qwen3", "token"), ("tiny-qwen2", "bf16")])
def test_without_rows_of_the_attention_ops(simulate: Simulate, model: str, scheme: str) -> None:
    """Every step takes rotary embedding, vLLM's cache write and FlashAttention 3."""
    found = simulate(model, scheme, tokens=3, rows_off=True)
    assert found["log"].count("after vLLM's cache write: the test says so") == 1
    assert not any(step["halves"] for step in found["steps"])
    assert max(step["difference"] for step in found["steps"]) <= DIFFERENCES[scheme]


def test_single_prefill_and_chunked_prefill(simulate: Simulate) -> None:
    """One request at a time: its prompt in chunks, then decode steps."""
    found = simulate("tiny-qwen3", "token", tokens=2, max_num_seqs=1)
    kinds = [step["kind"] for step in found["steps"]]
    assert kinds.count("prefill") > 5  # five prompts, the longest in two chunks
    assert max(step["difference"] for step in found["steps"]) <= DIFFERENCES["token"]


def test_layers_that_are_refused_take_vllms_own_path(simulate: Simulate) -> None:
    found = simulate("tiny-qwen3", "token", tokens=2, layers_off=True)
    assert found["models"][0]["reason"] == "the test says so"
    assert "hdispatch: Qwen3ForCausalLM takes vLLM's own layers: the test says so" in found["log"]
    assert all(len(request["tokens"]) == 2 for request in found["requests"])


def test_tokens_part_at_near_ties_only(simulate: Simulate) -> None:
    """Greedy tokens of ours and vLLM's: where they part, vLLM's logprob gap is within what rounding moves."""
    ours, theirs = (simulate("tiny-qwen3", "token", tokens=16, layers_off=off) for off in (False, True))
    for mine, other in zip(ours["requests"], theirs["requests"], strict=True):
        for step, (a, b) in enumerate(zip(mine["tokens"], other["tokens"], strict=True)):
            if a != b:
                known = dict(map(tuple, other["top"][step]))
                assert known[b] - known[a] < 0.1
                break


def test_two_runs_give_the_same_bits(simulate: Simulate) -> None:
    first, second = (simulate("tiny-qwen3", "block", tokens=4) for _ in range(2))
    assert first["requests"] == second["requests"]


def test_sums_over_ranks_in_the_sequence(simulate: Simulate) -> None:
    """vLLM's custom all-reduce as a step of one sequence: the bits of sums between halves of layers."""
    within, between = (simulate("tiny-qwen3", "token", tokens=4, ranks=2, custom_all_reduce=on) for on in (True, False))
    assert within["log"].count("hdispatch: sums over ranks lie in the sequence of all layers") == 2
    assert between["log"].count("hdispatch: sums over ranks lie between halves of layers: vLLM's custom all-reduce is off") == 2
    assert within["requests"] == between["requests"]


def test_two_ranks_have_the_logits_of_one(generate: Simulate) -> None:
    """Of one model, whose parts they have: logprobs differ by rounding, tokens part at near ties."""
    one, two = (generate(ranks=ranks, tokens=[3, 6, 5, 4]) for ranks in (1, 2))
    assert all(each["whole"] == each["kinds"] > 0 for each in two["ranks"])
    compared = 0
    for mine, other in zip(two["requests"], one["requests"], strict=True):
        for step, (a, b) in enumerate(zip(mine["tokens"], other["tokens"], strict=True)):
            known = dict(map(tuple, other["top"][step]))
            gaps = [abs(value - known[token]) for token, value in mine["top"][step] if token in known]
            assert max(gaps) < 0.1
            compared += len(gaps)
            if a != b:
                assert known[b] - known[a] < 0.1
                break
    assert compared > 30


def test_tensor_parallel_on_two_ranks(simulate: Simulate) -> None:
    """Two workers, sums over gloo; tokens part from vLLM's own at near ties only."""
    ours, theirs = (simulate("tiny-qwen3", "token", tokens=4, ranks=2, layers_off=off) for off in (False, True))
    assert ours["log"].count("hdispatch: 2 layers of Qwen3ForCausalLM") == 2
    for mine, other in zip(ours["requests"], theirs["requests"], strict=True):
        known = [dict(map(tuple, step)) for step in other["top"]]
        for step, (a, b) in enumerate(zip(mine["tokens"], other["tokens"], strict=True)):
            if a != b:
                assert known[step][b] - known[step][a] < 0.1
                break

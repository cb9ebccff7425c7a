"""vLLM's engine on two GPUs with the plug-in: the logits of one GPU, 200 steps of changing batches, replayed and in graphs.

Needs vLLM 0.33 with its libraries and two GPUs that reach each other. Qwen3-1.7B's sizes, four layers, weights in a file.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hdispatch.bench import serve_model

SPEC = importlib.util.find_spec("vllm")
pytestmark = [
    pytest.mark.skipif(SPEC is None or SPEC.origin is None, reason="vLLM is not installed"),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU; tensor parallel takes two"),
]

SCRIPT = Path(__file__).parents[1] / "vllm" / "parallel_run.py"
LAYERS, VOCABULARY = 4, 4096
#: Logprob gap at which rounding may part greedy tokens.
NEAR = 0.5
#: How much farther from one GPU's logprobs ours may be than vLLM's own, on average: what differs is rounding.
FARTHER = 1.2
#: Tokens of each request's answer: with 200 steps, batches of 24 down to 1.
TOKENS = [200, *random.Random(2).choices(range(8, 200), k=23)]
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 8, 16, 24]}
#: Seconds until an engine that has not answered has to say where it stands.
LIMIT = 240
STACKS = {"PYTHONFAULTHANDLER": "1"}
OFF, LAUNCHED = {"HDISPATCH": "0"}, {"HDISPATCH_REPLAY": "0"}


@pytest.fixture(scope="module")
def generate(bundle_dir, tmp_path_factory):
    """Run tests/vllm/parallel_run.py: generate(ranks, variables, **options) -> its answer. A run is made once."""
    folder = tmp_path_factory.mktemp("model")
    serve_model.write_config(folder, "qwen3-1.7b", "token")
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
    (folder / "config.json").write_text(json.dumps(config))
    known = {}

    def run(ranks, variables=None, **options):
        key = json.dumps([ranks, variables, options], sort_keys=True)
        if key not in known:
            known[key] = ask(folder, {"ranks": ranks, "tokens": TOKENS} | options, variables or {})
        return known[key]

    def ask(folder, parameters, variables):
        environment = os.environ | {
            "HDISPATCH": "1",
            "HDISPATCH_BUNDLE": str(bundle_dir),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            # An engine beside this process begins with whatever has arrived: batches, and bits, by chance.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_USE_DEEP_GEMM": "0",
            "VLLM_USE_FLASHINFER_SAMPLER": "0",
            "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        }
        said = told(command=[sys.executable, str(SCRIPT), str(folder), json.dumps(parameters)], env=environment | variables)
        answers = [line for line in said.splitlines() if line.startswith("ANSWER ")]
        assert answers, said[-9000:]
        return json.loads(answers[0].removeprefix("ANSWER "))

    return run


def told(command, env):
    """What a process and its children said until it ended. A pipe would stay open: the engine's process outlives it.

    One that takes too long says where each of its threads stands.
    """
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=env | STACKS, stdout=log, stderr=log, start_new_session=True)
        late = False
        try:
            process.wait(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            late = True
            os.killpg(process.pid, signal.SIGABRT)
            process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        log.seek(0)
        said = log.read()
    assert not late, f"no answer in {LIMIT} s:\n{said[-30000:]}"
    return said


def gaps(found, expected):
    """Differences of logprobs on the same tokens before them; tokens part at near ties only."""
    differences = []
    for mine, other in zip(found["requests"], expected["requests"], strict=True):
        for step, (a, b) in enumerate(zip(mine["tokens"], other["tokens"], strict=True)):
            known = dict(map(tuple, other["top"][step]))
            differences += [abs(value - known[token]) for token, value in mine["top"][step] if token in known]
            if a != b:
                assert a in known, (step, a, known)
                assert known[b] - known[a] < NEAR
                break
    assert max(differences) < NEAR
    return differences


def check_served(found, *, whole):
    assert len(found["ranks"]) == 2
    for rank in found["ranks"]:
        assert rank["class"] == "hdispatch.integrations.vllm.models"
        assert rank["reason"] is None
        assert (rank["whole"] > 0) is whole


@pytest.mark.parametrize("options", [{}, {"compilation_config": GRAPHS}], ids=["eager", "graphs"])
def test_logits_of_one_gpu(generate, options):
    """Ours on two GPUs are as near to one GPU's as vLLM's own on two."""
    one = generate(1, OFF)
    ours, theirs = generate(2, **options), generate(2, OFF, **options)
    check_served(ours, whole=True)
    near, own = (gaps(each, one) for each in (ours, theirs))
    assert len(near) > 1000
    assert statistics.fmean(near) < FARTHER * statistics.fmean(own)


def test_steps_are_replayed_and_have_the_bits_of_launched_ones(generate):
    replayed, launched = generate(2), generate(2, LAUNCHED)
    for found in (replayed, launched):
        check_served(found, whole=True)
    assert replayed["requests"] == launched["requests"]
    for rank in replayed["ranks"]:
        assert rank["captures"] > 5
        assert rank["replays"] > 100
    assert all(rank["replays"] == rank["captures"] == 0 for rank in launched["ranks"])


def test_many_answers_take_no_other_bits(generate):
    """Three times the same requests: graphs that the first time made are replayed by both ranks, and sums stay right."""
    once, thrice = generate(2), generate(2, times=3)
    assert once["requests"] == thrice["requests"]
    for first, last in zip(once["ranks"], thrice["ranks"], strict=True):
        assert last["replays"] > 2 * first["replays"]


def test_a_rank_that_launches_meets_one_that_replays(generate):
    mixed = generate(2, launching_rank=1)
    assert [rank["replays"] > 100 for rank in mixed["ranks"]] == [True, False]
    assert mixed["requests"] == generate(2)["requests"]


def test_without_custom_all_reduce_sums_lie_between_halves(generate):
    ours = generate(2, disable_custom_all_reduce=True)
    check_served(ours, whole=False)
    gaps(ours, generate(1, OFF))

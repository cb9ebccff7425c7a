"""Two schedulers of one workload, vLLM's and ours: whether plans, outputs and all state are equal; or what plans take.

usage: scheduler_run.py FOLDER PARAMETERS     FOLDER holds config.json; PARAMETERS: JSON, see `compare` and `measure`
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections import deque
from typing import Any

import simulation

BLOCK, EOS, CLIENTS = 16, 3, 2
#: Of a scheduler and of its requests, what must be equal; all that is plain data.
PLAIN = (int, float, str, bool, type(None))


def scheduler_of(folder: str, kind: type, blocks: int, caching: bool, seqs: int, policy: str) -> Any:
    """A scheduler of that class over a KV cache of that many blocks."""
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    sizes = {"max_model_len": 512, "max_num_seqs": seqs, "max_num_batched_tokens": 512}
    fixed = {"skip_tokenizer_init": True, "load_format": "dummy", "enforce_eager": True, "scheduling_policy": policy}
    config = EngineArgs(model=folder, enable_prefix_caching=caching, **sizes, **fixed).create_engine_config()
    config.cache_config.num_gpu_blocks = blocks
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=8, head_size=128, dtype=torch.bfloat16)
    groups = [KVCacheGroupSpec(["layer"], spec)]
    cache = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups)
    structured = StructuredOutputManager(config)
    structured.accept_tokens = lambda *_: True  # no grammar is compiled here
    return kind(
        vllm_config=config, kv_cache_config=cache, structured_output_manager=structured, block_size=BLOCK, log_stats=True
    )


def request_of(number: int, prompt: list[int], tokens: int, caching: bool, priority: int, structured: bool = False) -> Any:
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256)
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0, detokenize=False, stop_token_ids=[5])
    sampling._eos_token_id = EOS
    made = Request(
        request_id=f"r{number}",
        prompt_token_ids=prompt,
        sampling_params=sampling,
        pooling_params=None,
        client_index=number % CLIENTS,
        arrival_time=float(number),
        priority=priority,
        block_hasher=get_request_block_hasher(BLOCK, sha256) if caching else None,
    )
    made.structured_output_request = object() if structured else None  # as one whose grammar is ready
    return made


def tokens_of(plan: Any, seed: int, rare: bool) -> Any:
    """What a model would answer: a token for each request that has no prompt left, by its name and the step."""
    from vllm.v1.outputs import ModelRunnerOutput

    names = list(plan.num_scheduled_tokens)
    whole = {each.req_id: each for each in plan.scheduled_new_reqs}
    pick = random.Random(seed)
    tokens: list[list[int]] = []
    for name in names:
        new = whole.get(name)
        partial = new is not None and new.num_computed_tokens + plan.num_scheduled_tokens[name] < len(new.prefill_token_ids)
        tokens.append([] if partial or name in plan.unfinished_prefills else [pick.randrange(400 if rare else 40)])
    return ModelRunnerOutput(
        req_ids=names,
        req_id_to_index={name: index for index, name in enumerate(names)},
        sampled_token_ids=tokens,
        logprobs=None,
        prompt_logprobs_dict={},
        pooler_output=[],
    )


def step(scheduler: Any) -> Any:
    """The next plan, with the names of requests whose prompt it does not end."""
    plan = scheduler.schedule()
    plan.unfinished_prefills = {name for name in plan.num_scheduled_tokens if scheduler.requests[name].is_prefill_chunk}
    return plan


def state_of(scheduler: Any) -> Any:
    """All plain data of a scheduler and its requests, the queues and the blocks."""
    blocks = scheduler.kv_cache_manager.coordinator.single_type_managers[0]
    pool = scheduler.kv_cache_manager.block_pool
    requests = {
        name: {key: value for key, value in vars(each).items() if isinstance(value, PLAIN)}
        | {"tokens": list(each._all_token_ids), "drafts": list(each.spec_token_ids)}
        for name, each in scheduler.requests.items()
    }
    return {
        "own": {key: value for key, value in vars(scheduler).items() if isinstance(value, PLAIN) and key != "plan_reason"},
        "requests": requests,
        "running": [each.request_id for each in scheduler.running],
        "waiting": [each.request_id for each in scheduler.waiting],
        "prefills": {each.request_id for each in scheduler._inflight_prefills},
        "drafts": list(scheduler._spec_token_placeholders),
        "finished": scheduler.finished_req_ids,
        "held": {name: [block.block_id for block in each] for name, each in blocks.req_to_blocks.items() if each},
        "cached": dict(blocks.num_cached_block),
        "free": [block.block_id for block in pool.free_block_queue.get_all_free_blocks()],
    }


def told(value: Any) -> Any:
    """A plan or outputs as text. Times of events differ."""
    return repr(value.__dict__ if hasattr(value, "__dict__") else value)


def outputs_of(made: Any) -> dict[int, Any]:
    """Of each client, what every request got."""
    return {
        client: [(one.request_id, one.new_token_ids, one.finish_reason) for one in each.outputs]
        for client, each in made.items()
    }


def differs(ours: Any, theirs: Any, where: str) -> None:
    if ours != theirs:
        keys = [key for key in theirs if ours.get(key) != theirs[key]] if isinstance(theirs, dict) else []
        raise AssertionError(f"{where}: {keys}\nours   {str(ours)[:3000]}\ntheirs {str(theirs)[:3000]}")


def compare(folder: str, seed: int, steps: int, **sizes: Any) -> dict[str, Any]:
    """Steps with requests that come, end, are aborted and preempted; how many plans were ours."""
    from hdispatch.integrations.vllm.scheduler import ORIGINAL, DecodeScheduler

    pick = random.Random(seed)
    caching = sizes["caching"]
    pair = [scheduler_of(folder, kind, **sizes) for kind in (DecodeScheduler, ORIGINAL)]
    assert pair[0].plan_reason is None, pair[0].plan_reason
    mine, counts = [0], {"preempted": 0, "finished": 0}
    plan_step = pair[0]._step
    pair[0]._step = lambda *given: (mine.append(0), plan_step(*given))[1]
    under_way: tuple[deque[Any], deque[Any]] = deque(), deque()
    number = 0
    for at in range(steps):
        if pick.random() < (0.7 if not pair[0].requests else 0.06):
            for _ in range(pick.choice((1, 1, 2, 9))):
                shared = pick.choice((0, 0, 40))
                prompt = [7] * shared + [pick.randrange(10, 900) for _ in range(pick.choice((1, 5, 16, 33, 90, 300)))]
                given = number, prompt, pick.choice((1, 2, 20, 60, 150)), caching, pick.randrange(3), pick.random() < 0.1
                for each in pair:
                    each.add_request(request_of(*given))
                number += 1
        if pair[0].requests and pick.random() < 0.02:
            from vllm.v1.request import RequestStatus

            name = pick.choice(sorted(pair[0].requests))
            for each in pair:
                each.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        plans = [step(each) for each in pair]
        differs(told(plans[0]), told(plans[1]), f"plan {at}")
        counts["preempted"] += len(plans[1].preempted_req_ids or ())
        for queue, plan in zip(under_way, plans, strict=True):
            if plan.total_num_scheduled_tokens:
                queue.append(plan)
        differs(state_of(pair[0]), state_of(pair[1]), f"state after plan {at}")
        while len(under_way[0]) > (1 if plans[0].total_num_scheduled_tokens and pick.random() < 0.9 else 0):
            seed_of_step = pick.randrange(1 << 30)
            made = [
                each.update_from_output(plan := queue.popleft(), tokens_of(plan, seed_of_step, rare=True))
                for each, queue in zip(pair, under_way, strict=True)
            ]
            facts = [outputs_of(each) for each in made]
            differs(facts[0], facts[1], f"outputs {at}")
            counts["finished"] += sum(reason is not None for each in facts[1].values() for _, _, reason in each)
            differs(state_of(pair[0]), state_of(pair[1]), f"state after outputs {at}")
    return counts | {"ours": len(mine) - 1, "steps": steps}


def measure(folder: str, requests: int) -> dict[str, float]:
    """us of a plan of a decode step, vLLM's and ours: medians of 300 in turn."""
    from statistics import median

    from hdispatch.integrations.vllm.scheduler import ORIGINAL, DecodeScheduler

    pair = {}
    for name, kind in (("ours", DecodeScheduler), ("theirs", ORIGINAL)):
        each = scheduler_of(folder, kind, 20000, False, 256, "fcfs")
        for number in range(requests):
            each.add_request(request_of(number, [number % 900 + 10] * (3 + number % 7), 480, False, 0))
        while any(request.num_computed_tokens < request.num_prompt_tokens for request in each.requests.values()):
            plan = step(each)
            each.update_from_output(plan, tokens_of(plan, 0, rare=True))
        pair[name] = each
    times: dict[str, list[float]] = {name: [] for name in pair}
    for at in range(300):
        for name, each in sorted(pair.items(), key=lambda _: random.random()):
            began = time.perf_counter()
            plan = each.schedule()
            times[name].append(1e6 * (time.perf_counter() - began))
            plan.unfinished_prefills = set()
            answer = tokens_of(plan, at, rare=True)
            answer.sampled_token_ids = [[9]] * len(answer.req_ids)
            each.update_from_output(plan, answer)
    return {name: median(each) for name, each in times.items()}


def derive(folder: str) -> dict[str, Any]:
    """Steps of a scheduler derived from vLLM's, as `--scheduler-cls` may name one: the calls of what it overrides."""
    from hdispatch.integrations.vllm import scheduler
    from vllm.v1.core.sched import async_scheduler

    scheduler.STAND_IN.install(scheduler.DecodeScheduler)
    calls = []

    class Derived(async_scheduler.AsyncScheduler):
        def _update_after_schedule(self, plan: Any) -> None:
            super()._update_after_schedule(plan)
            calls.append(plan.total_num_scheduled_tokens)

    made = scheduler_of(folder, Derived, 100, False, 8, "fcfs")
    for number in range(3):
        made.add_request(request_of(number, [7] * 20, 30, False, 0))
    for at in range(10):
        plan = step(made)
        made.update_from_output(plan, tokens_of(plan, at, rare=True))
    return {"calls": calls, "reason": made.plan_reason}


if __name__ == "__main__":
    simulation.start()
    what = json.loads(sys.argv[2])
    answer = {"compare": compare, "measure": measure, "derive": derive}[what.pop("what")](sys.argv[1], **what)
    print("ANSWER " + json.dumps(answer), flush=True)
    os._exit(0)

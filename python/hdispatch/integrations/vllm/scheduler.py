"""vLLM's scheduler, with steps of one new token for every running request planned in one short loop.

Needs vLLM. At 128 requests vLLM's own plan of such a step takes one to two milliseconds, a small model on the GPU two. vLLM
takes another class from its command line alone: `STAND_IN` puts ours where its configuration looks for the usual one, if the
code that ours stands in for is what it was written for. Every other step is vLLM's own.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core import kv_cache_manager, single_type_kv_cache_manager
from vllm.v1.core.sched import async_scheduler, output, scheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import Request

from . import settings, support
from .stand_in import StandIn

#: vLLM's own.
ORIGINAL: Any = async_scheduler.AsyncScheduler
Blocks = single_type_kv_cache_manager.SingleTypeKVCacheManager
FullAttention = single_type_kv_cache_manager.FullAttentionManager
#: Methods that ours stands in for or calls, and the classes that it reads and fills. Those of the class that ours is derived
#: from, which another plug-in may have put in vLLM's place.
REPLACED = (
    *(scheduler.Scheduler.__init__, ORIGINAL.schedule, scheduler.Scheduler._update_after_schedule, ORIGINAL.__init__),
    *(ORIGINAL._update_after_schedule, ORIGINAL._make_cached_request_data, ORIGINAL._get_encoder_input_updates),
    *(kv_cache_manager.KVCacheManager.allocate_slots, Blocks.get_num_blocks_to_allocate, Blocks.allocate_new_blocks),
    *(Blocks.cache_blocks, FullAttention.cache_blocks, Request, output.CachedRequestData, output.SchedulerOutput),
)
STAND_IN = StandIn(
    async_scheduler,
    "AsyncScheduler",
    "scheduler",
    settings.SCHEDULER,
    settings.scheduler,
    REPLACED,
    "37a030bf191ee78b81f21fc08daf2b825cb889796448257a54ba16e4892caedc",  # of vLLM 0.33.0
)


class DecodeScheduler(ORIGINAL):
    """vLLM's, for which a step that gives every running request one token is one loop over them.

    What the step is, and the state it leaves, are vLLM's to the last field.

    plan_reason  why all steps are vLLM's own; None if decode steps are ours
    """

    plan_reason: str | None
    finished_req_ids: set[str]
    reset_preempted_req_ids: set[str]

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        try:
            self._check()
            self.plan_reason = None
        except support.UnsupportedError as error:
            self.plan_reason = str(error)
            settings.logger.info("hdispatch: all steps are planned by vLLM's scheduler: %s", error)

    def _check(self) -> None:
        """Raise `UnsupportedError` for a feature that our plans do not support."""
        require, manager = support.require, self.kv_cache_manager
        require(type(self) is DecodeScheduler, f"the scheduler is {type(self).__name__}")  # which may override what ours skips
        groups = manager.coordinator.single_type_managers
        require(len(groups) == 1, f"the KV cache has {len(groups)} groups")
        require(type(groups[0]) is FullAttention, f"the KV cache is a {type(groups[0]).__name__}'s")
        self._blocks = groups[0]
        require(self._blocks.block_size == manager.block_pool.hash_block_size, "prefixes are cached by parts of blocks")
        require(self.vllm_config.speculative_config is None and self.num_lookahead_tokens == 0, "speculation is on")
        for name in ("connector", "ec_connector", "aux_output_connector", "lora_config", "dynamic_sd_lookup"):
            require(getattr(self, name) is None, f"{name} is on")
        for name in ("use_pp", "need_mamba_block_aligned_split", "defer_block_free", "can_skip_drafts", "is_encoder_decoder"):
            require(not getattr(self, name), f"{name} is on")
        require(self.use_v2_model_runner, "the model runner is vLLM's first")
        require(self.num_sampled_tokens_per_step == 1, "a step samples several tokens of a request")
        require(self.num_prefill_lookahead == 0 and self.local_prefill_interval <= 1, "prefills are held back")
        details = self.observability_config.enable_logging_iteration_details
        require(not (self.log_stats and details), "iterations are logged in detail")

    def schedule(self, throttle_prefills: bool = False) -> Any:
        """vLLM's SchedulerOutput of the next step."""
        if self.plan_reason is None and not throttle_prefills and self._nobody_joins():
            plan = self._plan()
            if plan is not None:
                return self._step(*plan)
        return super().schedule(throttle_prefills)

    def _nobody_joins(self) -> bool:
        """Whether no waiting request can be admitted, and every running one may have a token."""
        running = len(self.running)
        full = running + self.num_waiting_for_streaming_input >= self.max_num_active_reqs
        return (
            0 < running <= min(self.max_num_scheduled_tokens, self.scheduler_config.max_num_batched_tokens)
            and self._pause_state == PauseState.UNPAUSED
            and (full or not (self.waiting or self.kv_holding_waiting))
            and not self._pending_encoder_input_ids
        )

    def _plan(self) -> tuple[list[Any], list[Any]] | None:
        """The running requests that get a token, and those of them that need a block or have one to cache.

        None if one of them needs anything else, or there are not as many blocks. Changes nothing.
        """
        step, blocks = self.current_step + 1, self._blocks
        held, cached, size, caching = blocks.req_to_blocks, blocks.num_cached_block, blocks.block_size, blocks.enable_caching
        last = self.max_model_len - 2
        chosen, growing, needed = [], [], 0
        for request in self.running:
            computed, placeholders = request.num_computed_tokens, request.num_output_placeholders
            if placeholders and computed + 2 - placeholders >= request.num_prompt_tokens + request.max_tokens:
                continue  # the step before this one makes its last token
            if step < request.next_decode_eligible_step:
                continue
            if (
                len(request._all_token_ids) + placeholders - computed != 1
                or computed > last
                or request.is_prefill_chunk
                or request.spec_token_ids
                or request.mm_features
            ):
                return None
            name = request.request_id
            chosen.append(request)
            if computed >= len(held[name]) * size:
                needed += 1
                growing.append(request)
            elif caching and cached.get(name, 0) < len(request.block_hashes):
                growing.append(request)
        return (chosen, growing) if chosen and needed <= self.kv_cache_manager.block_pool.get_num_free_blocks() else None

    def _step(self, chosen: list[Any], growing: list[Any]) -> Any:
        """vLLM's output of the plan, with requests as `_update_after_schedule` leaves them."""
        self.current_step += 1
        self.num_executed_steps += 1
        self.kv_cache_manager.new_step_starts()
        new_blocks = {each.request_id: self._grow(each) for each in growing}
        self.prefill_capacity_bound = self.get_request_counts()[1] > len(self.deferred_waiting)
        names: list[str] = []
        computed_tokens: list[int] = []
        output_tokens: list[int] = []
        structured = pending = False
        eligible = self.current_step + self.decode_stagger
        no_drafts: list[int] = []
        self._spec_token_placeholders = no_drafts
        for request in chosen:
            computed, placeholders = request.num_computed_tokens, request.num_output_placeholders
            names.append(request.request_id)
            computed_tokens.append(computed)
            output_tokens.append(len(request._output_token_ids) + placeholders)
            request.num_computed_tokens = computed + 1
            request.num_in_flight_tokens += 1
            request.num_output_placeholders = placeholders + 1
            request.spec_token_ids = no_drafts
            request.next_decode_eligible_step = eligible
            if request.structured_output_request is not None:
                structured, pending = True, pending or placeholders > 0
        cached = output.CachedRequestData(
            req_ids=names,
            resumed_req_ids=set(),
            new_token_ids=[],
            all_token_ids={},
            new_block_ids=[new_blocks.get(name) for name in names] if new_blocks else [None] * len(names),
            num_computed_tokens=computed_tokens,
            num_output_tokens=output_tokens,
        )
        return self._output(cached, structured, pending)

    def _grow(self, request: Any) -> Any:
        """Numbers of the blocks that a request gets, by group, as one token more takes them; None for none."""
        blocks = self.kv_cache_manager.allocate_slots(request, 1, num_lookahead_tokens=0)
        if blocks is None:  # _plan has counted
            raise RuntimeError(f"request {request.request_id} got no block, where the pool had as many as the step takes")
        return blocks.get_block_ids(allow_none=True)

    def _output(self, cached: Any, structured: bool, pending: bool) -> Any:
        copies, retained = self.kv_cache_manager.take_kv_cache_block_copies()
        if copies:
            self._free_cow_retained_blocks(retained, self.sched_step_seq + 1)
        found = output.SchedulerOutput(
            scheduled_new_reqs=[],
            scheduled_cached_reqs=cached,
            num_scheduled_tokens=dict.fromkeys(cached.req_ids, 1),
            total_num_scheduled_tokens=len(cached.req_ids),
            scheduled_spec_decode_tokens={},
            scheduled_encoder_inputs={},
            preempted_req_ids=self.reset_preempted_req_ids,
            finished_req_ids=self.finished_req_ids,
            free_encoder_mm_hashes=self.encoder_cache_manager.get_freed_mm_hashes(),
            has_structured_output_requests=structured,
            pending_structured_output_tokens=pending,
            new_block_ids_to_zero=self._get_new_block_ids_to_zero(),
            kv_cache_block_copies=copies or None,
            num_spec_tokens_to_schedule=self.num_spec_tokens,
            ec_manager_metadata=self.encoder_cache_manager.get_manager_metadata(),
        )
        self.finished_req_ids = set()
        self.reset_preempted_req_ids = set()
        return found


def objection() -> str:
    """Why vLLM's own stays; empty if ours takes its place."""
    return STAND_IN.objection()


def register() -> None:
    """Put ours in the place of vLLM's, or say in the log why not."""
    STAND_IN.install(DecodeScheduler)

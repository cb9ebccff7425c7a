"""vLLM's V2 model runner with decode steps of our own: their inputs by one launch, their end by another, no Triton between.

Needs vLLM. vLLM has no seam for its runner's class: `STAND_IN` puts ours where its worker looks for it, if the code that ours
stands in for is what it was written for. Everything but plain decode steps is vLLM's own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.config import CUDAGraphMode
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backends import flash_attn
from vllm.v1.worker.gpu import async_utils, attn_utils, block_table, input_batch, model_runner
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.sample import sampler, states

from ... import ops
from . import settings, support
from .attention import Kind
from .decode_batch import DecodeBatch, DecodeBuffers
from .sampling import GreedySampler
from .stand_in import StandIn

#: vLLM's own.
ORIGINAL: Any = model_runner.GPUModelRunner
#: Methods that ours replaces, wholly or for some steps, or calls unchanged.
REPLACED = (
    *(ORIGINAL.prepare_inputs, ORIGINAL.prepare_attn, ORIGINAL.sample, ORIGINAL.postprocess_sampled, ORIGINAL.sample_tokens),
    *(ORIGINAL.add_requests, ORIGINAL.gather_batch_req_state, input_batch.InputBatch, block_table.BlockTables),
    *(input_batch._prepare_pos_seq_lens_kernel, input_batch._combine_sampled_and_draft_tokens_kernel),
    *(input_batch._get_num_sampled_and_rejected_kernel, input_batch._post_update_kernel, input_batch.post_update),
    *(block_table._gather_block_tables_kernel, block_table._compute_slot_mappings_kernel),
    *(sampler.Sampler, states.SamplingStates, async_utils.AsyncOutput, DefaultModelState.prepare_attn),
    *(attn_utils.build_attn_metadata, flash_attn.FlashAttentionMetadata, flash_attn.FlashAttentionMetadataBuilder.build),
)
STAND_IN = StandIn(
    model_runner,
    "GPUModelRunner",
    "model runner",
    settings.RUNNER,
    settings.runner,
    REPLACED,
    "503e8627325515461c995a2d8af03ddb27418c6f7e9b01749b402b4205161d50",  # of vLLM 0.33.0
)


class Runner(ORIGINAL):
    """vLLM's, for which a step of one new token per request is one launch of decode_inputs and one of decode_update.

    decode_reason  why decode steps are vLLM's own; None if they are ours, "" if nothing is decided yet
    """

    decode_reason: str | None = ""
    sampler: Any

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        #: By number of requests; of these block tables.
        self._decode_buffers: dict[int, DecodeBuffers] = {}
        self._tables: Any = None
        #: The requests of the last decode step, on the host and on the GPU.
        self._rows: tuple[np.ndarray[Any, Any], torch.Tensor] | None = None

    def load_model(self, *given: Any, **named: Any) -> None:
        """vLLM's own, and our sampler in the place of its plain one."""
        super().load_model(*given, **named)
        if type(self.sampler) is sampler.Sampler and self.speculative_config is None:
            self.sampler = GreedySampler.of(self.sampler)

    # ---- the start of a step ----

    def prepare_inputs(self, scheduler_output: Any, batch_req_state: Any, batch_desc: Any, num_active_loras: int) -> Any:
        """vLLM's InputBatch, with everything on the GPU that it takes."""
        rows = len(batch_req_state.req_ids)
        if self.block_tables is not self._tables:
            self._decide()
        if (
            self.decode_reason is not None
            or batch_req_state.has_prefill
            or batch_req_state.num_tokens != rows
            or scheduler_output.scheduled_spec_decode_tokens
            or batch_desc.num_tokens > rows
            or (batch_desc.num_reqs or rows) != rows
            or batch_desc.num_ubatches > 1
            or self.block_tables._num_dirty_rows > rows
        ):
            return super().prepare_inputs(scheduler_output, batch_req_state, batch_desc, num_active_loras)
        self.block_tables._num_dirty_rows = rows
        return self._buffers(rows).batch(
            self,
            batch_req_state,
            self._idx_mapping(batch_req_state.idx_mapping_np),
            captured=batch_desc.cg_mode == CUDAGraphMode.FULL,
            structured=scheduler_output.has_structured_output_requests,
        )

    def prepare_attn(self, input_batch: Any) -> Any:
        """The block tables and slots of a step, which decode_inputs has made."""
        if type(input_batch) is DecodeBatch:
            return input_batch.block_tables, input_batch.slot_mappings
        return super().prepare_attn(input_batch)

    def _idx_mapping(self, rows: np.ndarray[Any, Any]) -> torch.Tensor:
        """int64 on the GPU; the same tensor as long as the requests are the same."""
        if self._rows is None or not np.array_equal(self._rows[0], rows):
            self._rows = rows, async_tensor_h2d(rows, device=self.device, dtype=torch.int64)
        return self._rows[1]

    def _buffers(self, rows: int) -> DecodeBuffers:
        found = self._decode_buffers.get(rows)
        if found is None:
            found = self._decode_buffers[rows] = DecodeBuffers(self, rows)
        return found

    # ---- its end ----

    def sample(self, hidden_states: torch.Tensor, input_batch: Any, grammar_output: Any) -> Any:
        """vLLM's SamplerOutput, how many tokens each request got, and how many were rejected."""
        if type(input_batch) is not DecodeBatch:
            return super().sample(hidden_states, input_batch, grammar_output)
        if grammar_output is None:  # logits_indices is every row
            output = self.sampler(self.model.compute_logits(hidden_states), input_batch)
        else:
            output, *_ = super().sample(hidden_states, input_batch, grammar_output)
        # In host memory, from where AsyncOutput would otherwise wait for a copy.
        return output, input_batch.num_sampled, output.num_rejected

    def postprocess_sampled(
        self,
        idx_mapping: torch.Tensor,
        sampled_tokens: torch.Tensor,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        query_start_loc: torch.Tensor | None = None,
        draft_tokens: torch.Tensor | None = None,
    ) -> None:
        """Keep the sampled tokens, and that theirs are computed."""
        known = self._decode_buffers.get(num_sampled.size(0))
        if known is None or known.fixed["num_sampled"] is not num_sampled:
            given = idx_mapping, sampled_tokens, num_sampled, num_rejected, query_start_loc, draft_tokens
            super().postprocess_sampled(*given)
            return
        states = self.req_states
        ops.decode_update(
            states.num_computed_tokens.gpu,
            states.last_sampled_tokens.view(-1),
            states.total_len.gpu,
            states.all_token_ids.gpu,
            self.sampler.penalties_state.output_bin_counts,
            idx_mapping,
            sampled_tokens,
        )

    # ---- whether ----

    def _decide(self) -> None:
        """Whether decode steps are ours, now that the caches are there; one line in the log."""
        self._tables = self.block_tables
        self._decode_buffers.clear()
        try:
            self._check()
        except support.UnsupportedError as error:
            self.decode_reason = str(error)
            settings.logger.info("hdispatch: the model runner's decode steps are vLLM's own: %s", error)
        else:
            self.decode_reason = None
            settings.logger.info("hdispatch: the model runner prepares and ends decode steps by one launch each")

    def _check(self) -> None:
        """Raise `UnsupportedError` for a feature that our decode steps do not support."""
        require, tables = support.require, self.block_tables
        require(type(self) is Runner, f"the model runner is {type(self).__name__}")
        require(not self.use_pp, "pipeline parallel")
        require(self.is_last_pp_rank and self.sampler is not None, "nothing is sampled here")
        require(self.speculative_config is None and self.speculator is None, "speculation is on")
        groups = tables.num_kv_cache_groups
        require(groups == 1, f"the KV cache has {groups} groups")
        require(tables.cp_size == 1 and self.dcp_size == 1 and self.pcp_manager is None, "context parallel is on")
        require(tables._slot_mapping_enabled[0], "the KV cache has no slots")
        require(not tables.has_sliding_window_groups, "attention has a sliding window")
        for name in ("batch_sharder", "fast_prefill", "ubatch_runner", "adaptive_verification", "aux_output_connector"):
            require(getattr(self, name) is None, f"{name} is on")
        require(self.model_config.rswa_window is None, "attention has a reference window")
        state = type(self.model_state)
        require(state.postprocess_state is ModelState.postprocess_state, f"{state.__name__} keeps state of its own")
        require(self.model_state.num_new_sampled_tokens_per_step == 1, "a step samples several tokens of a request")
        if self.device.type == "cuda":
            self._check_rows()

    def _check_rows(self) -> None:
        """Raise `UnsupportedError` where the bundle has no rows for the runner's ops."""
        rows = torch.zeros(1, dtype=torch.int64, device=self.device)
        reason = support.objection(ops.decode_inputs, *self._buffers(1).arguments(self, rows))
        support.require(reason is None, reason or "")
        states, counts = self.req_states, self.sampler.penalties_state.output_bin_counts
        written = states.num_computed_tokens.gpu, states.last_sampled_tokens.view(-1), states.total_len.gpu
        reason = support.objection(ops.decode_update, *written, states.all_token_ids.gpu, counts, rows, rows.clone())
        support.require(reason is None, reason or "")


class DecodeState(DefaultModelState):
    """The state of a decoder whose layers are ours: no schedule of FlashAttention 3 in steps that attention_half takes."""

    def prepare_attn(
        self,
        input_batch: Any,
        cudagraph_mode: Any,
        block_tables: Any,
        slot_mappings: Any,
        attn_groups: Any,
        kv_cache_config: Any,
        for_capture: bool = False,
        **named: Any,
    ) -> dict[str, Any]:
        """Layer -> metadata of attention; one object for all of them."""
        plain = type(input_batch) is DecodeBatch and cudagraph_mode == CUDAGraphMode.NONE and not for_capture and not named
        layers = getattr(self.model, "_layers", None)
        if plain and layers is not None and len(attn_groups[0]) == 1:
            metadata = flash_attn.FlashAttentionMetadata(
                num_actual_tokens=input_batch.num_tokens,
                max_query_len=1,
                query_start_loc=input_batch.query_start_loc,
                max_seq_len=int(input_batch.num_computed_tokens_np.max()) + 1,
                seq_lens=input_batch.seq_lens,
                block_table=block_tables[0],
                slot_mapping=slot_mappings[0],
            )
            if layers.attention.kind(metadata) is Kind.HALF:
                return dict.fromkeys(attn_groups[0][0].layer_names, metadata)
        given = input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, kv_cache_config, for_capture
        found: dict[str, Any] = super().prepare_attn(*given, **named)
        return found


def state_class(found: type) -> type:
    """The class of a model's state where vLLM would take `found`."""
    return DecodeState if found is DefaultModelState else found


def objection() -> str:
    """Why vLLM's own stays; empty if ours takes its place."""
    return STAND_IN.objection()


def register() -> None:
    """Put ours in the place of vLLM's, or say in the log why not."""
    STAND_IN.install(Runner)

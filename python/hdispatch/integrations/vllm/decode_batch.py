"""A step of one new token per request: vLLM's input batch for it, and views of the runner's buffers that it always has.

Needs vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.v1.worker.gpu.input_batch import InputBatch

from ... import ops


@dataclass
class DecodeBatch(InputBatch):
    """One new token of each of `num_reqs` requests, none of them a draft, none a prompt's, and no padding.

    num_sampled   int32 [requests] in host memory: 1
    num_rejected  int32 [requests]: 0
    block_tables  one [requests, blocks]
    slot_mapping  int64 [1, requests]
    """

    num_sampled: torch.Tensor = None  # type: ignore[assignment]  # fields of InputBatch before it have defaults
    num_rejected: torch.Tensor = None  # type: ignore[assignment]
    block_tables: tuple[torch.Tensor, ...] = ()
    slot_mappings: torch.Tensor = None  # type: ignore[assignment]


class DecodeBuffers:
    """State that batches of `rows` requests share: parts of the runner's buffers, and numbers that do not change.

    runner  vLLM's GPUModelRunner
    """

    def __init__(self, runner: Any, rows: int) -> None:
        buffers, tables, device = runner.input_buffers, runner.block_tables, runner.device
        self.block_tables = (tables.input_block_tables[0][:rows],)
        self.slot_mappings = tables.slot_mappings[:, :rows]
        #: Of the runner's, which captured graphs read.
        self.query_start_loc = buffers.query_start_loc[: rows + 1]
        self.counts_np = np.arange(rows + 1, dtype=np.int32)
        self.counts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.is_padding = buffers.is_padding[:rows]
        self.fixed = {
            "num_reqs": rows,
            "num_reqs_after_padding": rows,
            "num_tokens": rows,
            "num_tokens_after_padding": rows,
            "num_draft_tokens": 0,
            "num_draft_tokens_per_req": None,
            "seq_lens": buffers.seq_lens[:rows],
            "dcp_local_seq_lens": None,
            "input_ids": buffers.input_ids[:rows],
            "positions": buffers.positions[:rows],
            "is_padding": self.is_padding,
            "expanded_local_pos": torch.zeros(rows, dtype=torch.int32, device=device),
            "logits_indices": torch.arange(rows, dtype=torch.int64, device=device),
            "cu_num_logits": self.counts,
            "cu_num_logits_np": self.counts_np,
            "query_start_loc_np": self.counts_np,
            "prompt_lens": None,
            "num_sampled": torch.ones(rows, dtype=torch.int32),
            "num_rejected": torch.zeros(rows, dtype=torch.int32, device=device),
            "block_tables": self.block_tables,
            "slot_mappings": self.slot_mappings,
        }
        #: The first arguments of decode_inputs.
        self._written = (
            *(self.fixed[name] for name in ("input_ids", "positions", "seq_lens")),
            self.is_padding.view(torch.uint8),
            self.slot_mappings[0],
            self.block_tables[0],
        )

    def arguments(self, runner: Any, idx_mapping: torch.Tensor) -> tuple[Any, ...]:
        """Those of decode_inputs, for the requests that idx_mapping, int64 [rows], names."""
        states, tables = runner.req_states, runner.block_tables
        last = states.last_sampled_tokens.view(-1)
        source = tables.block_tables[0].gpu, tables.block_sizes[0]
        return *self._written, idx_mapping, states.num_computed_tokens.gpu, last, *source

    def batch(self, runner: Any, state: Any, idx_mapping: torch.Tensor, *, captured: bool, structured: bool) -> DecodeBatch:
        """Prepare a step on the GPU, by one launch of decode_inputs, and tell of it.

        state       vLLM's BatchReqState
        captured    whether a whole graph runs, which reads the runner's query_start_loc
        structured  whether a request has a grammar
        """
        ops.decode_inputs(*self.arguments(runner, idx_mapping))
        starts = self.query_start_loc.copy_(self.counts) if captured else self.counts
        rows = state.idx_mapping_np
        computed = runner.req_states.num_computed_tokens_np[rows]
        return DecodeBatch(
            req_ids=state.req_ids,
            idx_mapping=idx_mapping,
            idx_mapping_np=rows,
            expanded_idx_mapping=idx_mapping,
            num_scheduled_tokens=state.num_scheduled_tokens,
            query_start_loc=starts,
            seq_lens_cpu_upper_bound=torch.from_numpy(computed + 1),
            num_computed_tokens_np=computed,
            prefill_len_np=state.prefill_len_np,
            num_computed_prefill_tokens_np=state.num_computed_prefill_tokens_np,
            is_prefilling_np=state.is_prefilling_np,
            has_prefill=False,
            prefill_runs_as_decode_np=None,
            decode_graph_eligible=state.decode_graph_eligible,
            max_seq_len_np=state.max_seq_len_np,
            has_structured_output_reqs=structured,
            **self.fixed,
        )

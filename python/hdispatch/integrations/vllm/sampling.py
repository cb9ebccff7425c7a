"""Greedy sampling: the largest logit taken straight, where vLLM's V2 runner takes it by its kernel of Gumbel noise.

Needs vLLM.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.sample.states import NO_LOGPROBS

from ... import ops
from .decode_batch import DecodeBatch

#: vLLM's own logits processors: what they stage comes with a request.
PROCESSORS = (LogitBiasState, PenaltiesState, BadWordsState)


class GreedySampler(Sampler):
    """vLLM's sampler, all of whose state it shares, but for steps in which every request is greedy.

    Their tokens are the same: with temperature 0 vLLM's kernel adds no noise, and of equal logits both take the first. One
    launch in the place of three, and none of Triton's launcher; in a `DecodeBatch` nothing else at all.
    """

    #: Whether a request came since `apply_staged_writes`.
    _staged: bool
    #: idx_mapping of the last batch whose requests asked for a greedy token alone.
    _plain: torch.Tensor | None

    @classmethod
    def of(cls, sampler: Sampler) -> GreedySampler:
        """One in the place of `sampler`."""
        made = cls.__new__(cls)
        made.__dict__ = sampler.__dict__
        made._staged, made._plain = True, None
        return made

    def add_request(self, req_idx: int, sampling_params: Any) -> None:
        """vLLM's own."""
        self._staged, self._plain = True, None
        super().add_request(req_idx, sampling_params)

    def apply_staged_writes(self) -> None:
        """vLLM's own, in steps that have something to write: its eleven copies to the GPU's memory wait for a new request."""
        if self._staged or any(type(each) not in PROCESSORS for each in self.logits_processors):
            super().apply_staged_writes()
            self._staged = False

    def __call__(self, logits: torch.Tensor, input_batch: Any) -> Any:
        """vLLM's SamplerOutput for logits [requests, words]."""
        if type(input_batch) is not DecodeBatch or not self._is_plain(input_batch):
            return super().__call__(logits, input_batch)
        return SamplerOutput(
            sampled_token_ids=_argmax(logits).view(-1, 1),
            logprobs_tensors=None,
            num_nans=None,
            num_sampled=input_batch.num_sampled,
            num_rejected=input_batch.num_rejected,
        )

    def _is_plain(self, batch: DecodeBatch) -> bool:
        """Whether each request of a batch wants the largest logit and nothing else."""
        if self._plain is batch.idx_mapping:
            return True
        if self.compute_nans or self.return_sampling_mask or self.trace_replay_state is not None:
            return False
        rows, states = batch.idx_mapping_np, self.sampling_states
        if (
            states.temperature.np[rows].any()
            or self.needs_logits_processing[rows].any()
            or (states.num_logprobs[rows] != NO_LOGPROBS).any()
            or self.logprob_token_ids_state.max_num_token_ids(rows)
        ):
            return False
        self._plain = batch.idx_mapping
        return True

    def _sample_random(
        self, processed_logits: torch.Tensor, expanded_idx_mapping: torch.Tensor, idx_mapping_np: Any, *given: Any, **named: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.sampling_states.temperature.np[idx_mapping_np].any():
            found: tuple[torch.Tensor, torch.Tensor] = super()._sample_random(
                processed_logits, expanded_idx_mapping, idx_mapping_np, *given, **named
            )
            return found
        return _argmax(processed_logits), processed_logits


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    """int64 [rows]: the first largest of each row."""
    found = logits.new_empty(logits.size(0), dtype=torch.int64)
    ops.argmax(found, logits)
    return found

"""Greedy sampling: the largest logit taken straight, where vLLM's V2 runner takes it by its kernel of Gumbel noise.

Needs vLLM. The seam is vLLM's: a model names the class of its state, and the state may give another sampler.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.sample.sampler import Sampler


class GreedySampler(Sampler):
    """vLLM's sampler, all of whose state it shares, but for steps in which every request is greedy.

    Their tokens are the same: with temperature 0 vLLM's kernel adds no noise, and of equal logits both take the first. One
    launch in the place of three, and none of Triton's launcher.
    """

    @classmethod
    def of(cls, sampler: Sampler) -> GreedySampler:
        """One in the place of `sampler`."""
        made = cls.__new__(cls)
        made.__dict__ = sampler.__dict__
        return made

    def _sample_random(
        self, processed_logits: torch.Tensor, expanded_idx_mapping: torch.Tensor, idx_mapping_np: Any, *given: Any, **named: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.sampling_states.temperature.np[idx_mapping_np].any():
            found: tuple[torch.Tensor, torch.Tensor] = super()._sample_random(
                processed_logits, expanded_idx_mapping, idx_mapping_np, *given, **named
            )
            return found
        return processed_logits.argmax(dim=-1), processed_logits


class GreedyState(DefaultModelState):
    """The state of a decoder whose greedy steps `GreedySampler` samples; with speculation or a watermark, vLLM's own does."""

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any] | None:
        """What vLLM takes as sampler and rejection sampler; None: its own."""
        if type(sampler) is not Sampler or self.vllm_config.speculative_config is not None:
            return None
        return GreedySampler.of(sampler), None


def state_class(found: type) -> type:
    """The class of a model's state where vLLM would take `found`."""
    return GreedyState if found is DefaultModelState else found

"""vLLM's Qwen3, Qwen2 and Llama with a forward pass of our own: loader, KV cache, sampler see no difference.

Needs vLLM. `register` puts the classes in the place of vLLM's own, by vLLM's registry.
"""

from __future__ import annotations

import ctypes
import time
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import vllm.envs as vllm_envs
from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group, tensor_model_parallel_all_reduce
from vllm.distributed.device_communicators.cuda_wrapper import CudaRTLibrary
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import attention as attention_layer
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models import ModelRegistry, llama, qwen2, qwen3
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backends import flash_attn
from vllm.v1.worker.gpu.model_states import resolve_model_state_cls

from . import all_reduce, runner, settings, support, weights
from .all_reduce import CustomAllReduce
from .attention import Attention
from .layers import FusedLayers
from .stand_in import difference

if TYPE_CHECKING:
    from vllm.config import VllmConfig


#: What a step of ours stands in for.
REPLACED = (
    *(each.forward for each in (llama.LlamaForCausalLM, llama.LlamaModel, llama.LlamaDecoderLayer, llama.LlamaAttention)),
    *(each.forward for each in (qwen2.Qwen2ForCausalLM, qwen2.Qwen2Model, qwen2.Qwen2DecoderLayer, qwen2.Qwen2Attention)),
    *(each.forward for each in (qwen3.Qwen3ForCausalLM, qwen3.Qwen3Model, qwen3.Qwen3DecoderLayer, qwen3.Qwen3Attention)),
    *(each.forward for each in (llama.LlamaMLP, qwen2.Qwen2MLP, qwen3.Qwen3MLP, ColumnParallelLinear, RowParallelLinear)),
    *(each.forward for each in (VocabParallelEmbedding, attention_layer.Attention, flash_attn.FlashAttentionImpl)),
    *(flash_attn.FlashAttentionImpl.do_kv_cache_update, flash_attn.FlashAttentionMetadata),
    *(RMSNorm.forward_cuda, SiluAndMul.forward_cuda, RotaryEmbedding.forward_cuda),
)
#: sha256 of their sources in vLLM 0.33.0.
FINGERPRINT = "9aaf666c49b76dc33742578f3d5feafeeb177768280466c5a671e63b54b977c7"


class FusedForward:
    """Mixin for a model class of vLLM: `forward` runs the fused layers, or, with a reason, vLLM's own path.

    Decided on the first step after the weights are loaded, and again when they are loaded anew.

    hdispatch_reason  why vLLM's own path is taken; None if it is not, or nothing is decided yet
    """

    LAYER: ClassVar[type]
    hdispatch_reason: str | None = None
    _layers: FusedLayers | None = None
    #: Result of `_identity`; empty if the layers are refused; None before the first step.
    _bound: tuple[Any, ...] | None = None
    _config: Any = None
    model: Any

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> Any:
        """Hidden states [tokens, hidden], as vLLM's class gives them."""
        if not self._is_bound():
            self._decide()
        layers = self._layers
        if layers is None or support.step_reason(layers, positions, intermediate_tensors) is not None:
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)  # type: ignore[misc]
        return layers.forward(input_ids, positions, inputs_embeds)

    def get_model_state_cls(self) -> type:
        """The class of the model's state in vLLM's V2 runner: vLLM's own choice, but for the attention of decode steps."""
        return runner.state_class(resolve_model_state_cls(self._config, self.model))

    def load_weights(self, given: Any) -> set[str]:
        """vLLM's own, after which the weights are bound anew."""
        self._bound = None
        return super().load_weights(given)  # type: ignore[misc,no-any-return]

    def _is_bound(self) -> bool:
        """Whether the weights are where they were when they were bound: vLLM may replace them without a word."""
        bound = self._bound
        if bound is None:
            return False
        if not bound:  # refused, which other weights would not change
            return True
        first, first_address, last, last_address, parameters = bound
        return (
            parameters[0]["weight"] is first
            and first.data_ptr() == first_address
            and parameters[1]["weight"] is last
            and last.data_ptr() == last_address
        )

    def _decide(self) -> None:
        """Bind the weights, or note why they are not served; one line in the log either way."""
        began = time.perf_counter()
        decoder = self.model
        try:
            support.check_config(self._config)
            self._layers = self._make_layers(decoder)
        except support.UnsupportedError as error:
            self._layers, self._bound, self.hdispatch_reason = None, (), str(error)
            settings.logger.warning("hdispatch: %s takes vLLM's own layers: %s", type(self).__name__, error)
        else:
            self._bound, self.hdispatch_reason = _identity(decoder), None
            self._say(time.perf_counter() - began)

    def _make_layers(self, decoder: Any) -> FusedLayers:
        support.check_model(decoder, self.LAYER)
        for layer in decoder.layers:
            attention = layer.self_attn
            support.check_attention(attention.attn)
            support.check_rope(attention.rotary_emb, RotaryEmbedding.forward_cuda, attention.head_dim)
        config = self._config
        former = None if self._layers is None else self._layers.weights
        bound = weights.bind(decoder, config.model_config.dtype, former)
        settings.load_bundle(bound.embedding.device)
        scheduler = config.scheduler_config
        ranks = get_tensor_model_parallel_world_size()
        return FusedLayers(
            decoder,
            bound,
            scheduler.max_num_batched_tokens,
            Attention(
                bound,
                lambda: int(config.model_config.max_model_len),
                (scheduler.max_num_seqs, scheduler.max_num_batched_tokens),
                canonicalize_singleton_dim_strides,
            ),
            get_forward_context,
            tensor_model_parallel_all_reduce if ranks > 1 else None,
            self._layers,
            _find_all_reduce(bound, self._layers) if ranks > 1 else None,
        )

    def _say(self, seconds: float) -> None:
        layers = self._layers
        assert layers is not None
        settings.logger.info(
            "hdispatch: %d layers of %s, %s, are served; workspace %.1f MB for %d rows; bound in %.2f s",
            len(layers.weights.layers),
            type(self).__name__,
            layers.weights.scheme.name,
            layers.workspace.memory.numel() / 1e6,
            layers.workspace.rows,
            seconds,
        )
        if get_tensor_model_parallel_world_size() > 1:
            reason = _all_reduce_objection()
            settings.logger.info("hdispatch: sums over ranks lie %s", reason or "in the sequence of all layers")


def _all_reduce_objection() -> str | None:
    """Why sums over ranks lie between halves of layers; None if they are steps of one sequence."""
    if vllm_envs.VLLM_USE_NCCL_SYMM_MEM:
        reason: str | None = "vLLM's all-reduce is NCCL's over symmetric memory (VLLM_USE_NCCL_SYMM_MEM=1)"
    else:
        reason = all_reduce.objection(get_tp_group().device_communicator)
    return None if reason is None else f"between halves of layers: {reason}"


def _find_all_reduce(bound: weights.Weights, former: FusedLayers | None) -> CustomAllReduce | None:
    """vLLM's custom all-reduce, as steps of a sequence; None where vLLM has none or another comes first.

    FlashInfer's may find only at its first sum that it cannot be used; then vLLM's custom one comes first from there on.
    """
    communicator = get_tp_group().device_communicator
    custom = getattr(communicator, "ca_comm", None)
    if custom is None or custom.disabled or custom.mnnvl_only or vllm_envs.VLLM_USE_NCCL_SYMM_MEM:
        return None
    known = None if former is None else former.all_reduce
    if known is not None and known.is_of(communicator):
        return known
    address = ctypes.c_void_p(custom.buffer_ptrs[custom.rank])
    handle = bytes(CudaRTLibrary().cudaIpcGetMemHandle(address))[: all_reduce.HANDLE_BYTES]
    return CustomAllReduce(communicator, handle, bound.shape.hidden, bound.dtype)


def _identity(decoder: Any) -> tuple[Any, ...]:
    """The first and the last matrix, their addresses, and the modules' tables of parameters."""
    parameters = [decoder.layers[0].self_attn.qkv_proj._parameters, decoder.layers[-1].mlp.down_proj._parameters]
    first, last = (each["weight"] for each in parameters)
    return first, first.data_ptr(), last, last.data_ptr(), parameters


class Qwen3ForCausalLM(FusedForward, qwen3.Qwen3ForCausalLM):
    """Dense Qwen3."""

    LAYER = qwen3.Qwen3DecoderLayer

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:  # vLLM looks at the signature
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._config = vllm_config


class Qwen2ForCausalLM(FusedForward, qwen2.Qwen2ForCausalLM):
    """Dense Qwen2 and Qwen2.5."""

    LAYER = qwen2.Qwen2DecoderLayer

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._config = vllm_config


class LlamaForCausalLM(FusedForward, llama.LlamaForCausalLM):
    """Dense Llama 2 and 3."""

    LAYER = llama.LlamaDecoderLayer

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._config = vllm_config


#: Architecture, as a model's config.json names it -> the class that serves it.
ARCHITECTURES: dict[str, type] = {
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "LlamaForCausalLM": LlamaForCausalLM,
}


def objection() -> str:
    """Why vLLM's own layers stay, whatever the model; empty if ours take their place."""
    return difference(REPLACED, FINGERPRINT)


def register() -> None:
    """Put the classes into vLLM's registry, or say in the log why not."""
    reason = objection()
    if reason:
        settings.logger.warning("hdispatch: vLLM's own decoder layers stay: %s", reason)
        return
    for name, model in ARCHITECTURES.items():
        ModelRegistry.register_model(name, model)

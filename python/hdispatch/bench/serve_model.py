"""Models without a checkpoint: vLLM configurations by name, and random weights of the spread that real ones have.

Needs vLLM only where a model is given.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import HdispatchError

#: Quantization of the weights -> what a config.json says of it.
SCHEMES: dict[str, dict[str, Any] | None] = {
    "token": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": False, "symmetric": True},
                "input_activations": {
                    "num_bits": 8,
                    "type": "float",
                    "strategy": "token",
                    "dynamic": True,
                    "symmetric": True,
                },
            }
        },
    },
    "block": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
    },
    "tensor": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "static": {"quant_method": "fp8", "activation_scheme": "static"},
    "bf16": None,
}


@dataclass(frozen=True)
class Model:
    """Sizes of a dense decoder, and its architecture as vLLM names it."""

    architecture: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int = 128
    vocabulary: int = 151936

    def config(self, scheme: str) -> dict[str, Any]:
        """The content of a config.json. `HdispatchError` for a scheme that is not in SCHEMES."""
        if scheme not in SCHEMES:
            raise HdispatchError(f"no scheme {scheme!r}; there are {', '.join(SCHEMES)}")
        kind = self.architecture.removesuffix("ForCausalLM").lower()
        found: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": kind,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "head_dim": self.head_size,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": 40960,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": self.vocabulary,
        }
        if kind.startswith("qwen"):
            found |= {"max_window_layers": self.layers, "sliding_window": None, "use_sliding_window": False}
        if SCHEMES[scheme] is not None:
            found["quantization_config"] = SCHEMES[scheme]
        return found


MODELS = {
    "qwen3-8b": Model("Qwen3ForCausalLM", 4096, 12288, 36, 32, 8),
    "qwen3-1.7b": Model("Qwen3ForCausalLM", 2048, 6144, 28, 16, 8),
    "qwen2.5-7b": Model("Qwen2ForCausalLM", 3584, 18944, 28, 28, 4, vocabulary=152064),
    "llama3-8b": Model("LlamaForCausalLM", 4096, 14336, 32, 32, 8, vocabulary=128256),
    "tiny-qwen3": Model("Qwen3ForCausalLM", 256, 512, 2, 4, 2, vocabulary=1024),
    "tiny-qwen2": Model("Qwen2ForCausalLM", 512, 512, 2, 4, 2, vocabulary=1024),
    "tiny-llama": Model("LlamaForCausalLM", 256, 512, 2, 4, 2, vocabulary=1024),
}


def write_config(folder: Path, name: str, scheme: str) -> None:
    """Write the config.json of a named model. `HdispatchError` for a name that is not in MODELS."""
    if name not in MODELS:
        raise HdispatchError(f"no model {name!r}; there are {', '.join(MODELS)}")
    (folder / "config.json").write_text(json.dumps(MODELS[name].config(scheme), indent=1))


@torch.no_grad()
def fill_weights(model: torch.nn.Module, seed: int = 1234, rank: int = 0) -> None:
    """Give a vLLM model that is loaded random weights, by name from one seed: the same in every mode of a benchmark.

    Of a spread that real ones have, so that layers do something and tokens differ: vLLM's own dummy weights leave scales and
    norms within 1e-3 of zero. `rank` of a tensor parallel model only changes its shards of the vocabulary.
    """
    device = next(model.parameters()).device
    shared = torch.Generator(device).manual_seed(seed)
    vocabulary = torch.Generator(device).manual_seed(seed + 1 + rank)
    for name, parameter in sorted(model.named_parameters()):
        _fill(model, name, parameter.data, shared, vocabulary)


def _fill(model: torch.nn.Module, name: str, data: torch.Tensor, shared: torch.Generator, vocabulary: torch.Generator) -> None:
    def normal(shape: tuple[int, ...], generator: torch.Generator = shared) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=data.device)

    if "embed_tokens" in name or "lm_head" in name:
        for part in torch.split(data, 16384):  # whole it would take gigabytes in float32
            part.copy_(normal(tuple(part.shape), vocabulary) * (0.04 if "lm_head" in name else 1.0))
    elif "norm" in name:
        data.copy_(1 + 0.1 * normal(tuple(data.shape)))
    elif data.dtype == torch.float8_e4m3fn:
        _by_rows(data, lambda shape: normal(shape).mul_(100).clamp_(-448, 448))
    elif "weight_scale" in name:
        owner = model.get_submodule(name.rsplit(".", 1)[0])
        spread = torch.rand(data.shape, generator=shared, device=data.device) * 0.5 + 0.75
        data.copy_(spread * (_gain(name) / (100 * _inputs(owner.weight) ** 0.5)))
    elif "input_scale" in name:
        data.fill_(6 / 448)  # inputs are normed, so six deviations; those of down_proj are smaller
    elif "bias" in name:
        data.copy_(0.1 * normal(tuple(data.shape)))
    else:
        data.copy_(normal(tuple(data.shape)) * (_gain(name) / data.size(-1) ** 0.5))


def _by_rows(data: torch.Tensor, make: Callable[[tuple[int, ...]], torch.Tensor]) -> None:
    """Fill a matrix in the order of [N, K], whichever way it lies in memory."""
    rows = data if data.stride(-1) == 1 else data.t()
    rows.copy_(make(tuple(rows.shape)).to(data.dtype))


def _inputs(weight: torch.Tensor | Any) -> int:
    """K of a weight [N, K], or [K, N] with columns contiguous."""
    return int(weight.shape[1] if weight.stride(-1) == 1 else weight.shape[0])


def _gain(name: str) -> float:
    """The branches add less to the residual than it holds."""
    return 0.35 if "o_proj" in name or "down_proj" in name else 1.0

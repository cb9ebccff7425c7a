"""The weights of vLLM's decoder layers as the ops take them, whatever scheme the loader left them in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .schemes import FP8, GROUP, BlockFp8, Linear, PerTokenFp8, Scheme, StaticFp8
from .support import UnsupportedError, require

#: Quantization methods of vLLM whose layers hold nothing but a weight, scales and a bias.
METHODS = (
    "UnquantizedLinearMethod",
    "Fp8LinearMethod",
    "CompressedTensorsLinearMethod",
    "Fp8PerTensorOnlineLinearMethod",
    "Fp8PerBlockOnlineLinearMethod",
    "Fp8PtpcOnlineLinearMethod",
)
COMPRESSED_TENSORS = "CompressedTensorsW8A8Fp8"


def plain(x: torch.Tensor) -> torch.Tensor:
    """The same memory as a torch.Tensor proper: calls with a Parameter take hdispatch's slow door."""
    y = x.detach()
    return y if type(y) is torch.Tensor else y.as_subclass(torch.Tensor)


def kept_memory(made: torch.Tensor, former: torch.Tensor | None) -> torch.Tensor:
    """`made`, in the memory of `former` if that is one of its kind: graphs may have been captured with it."""
    if former is None or (made.shape, made.dtype, made.device) != (former.shape, former.dtype, former.device):
        return made
    return former.copy_(made)


def bind_linear(name: str, module: Any, k: int, n: int, dtype: torch.dtype) -> tuple[Scheme, Linear]:
    """The matrix of a vLLM linear layer that takes rows of k elements to rows of n.

    name   of the layer, for reasons
    dtype  of activations

    Raises `UnsupportedError` for what the ops do not take.
    """
    method = type(module.quant_method).__name__
    require(method in METHODS, f"{name} is quantized by {method}; served are {', '.join(METHODS)}")
    if method == "CompressedTensorsLinearMethod":
        scheme = type(module.scheme).__name__
        require(scheme == COMPRESSED_TENSORS, f"{name} is quantized by {scheme}; served is {COMPRESSED_TENSORS}")
    require(not module.skip_bias_add, f"{name} leaves its bias to its caller")
    require(getattr(module, "input_scale_ub", None) is None, f"{name} bounds the scale of its inputs")
    weight, bias = plain(module.weight), _bias(module, dtype, name)
    if weight.dtype == dtype:
        require(tuple(weight.shape) == (n, k), f"{name}'s weight is {list(weight.shape)}; expected [{n}, {k}]")
        return Scheme(), Linear(weight, bias=bias)
    require(weight.dtype == FP8, f"{name}'s weight is {weight.dtype}; expected {dtype} or {FP8}")
    if getattr(module, "weight_block_size", None) is not None:
        return BlockFp8(), _bind_blocks(name, module, weight, k, n, bias)
    return _bind_fp8(name, module, weight, k, n, bias)


def _bias(module: Any, dtype: torch.dtype, name: str) -> torch.Tensor | None:
    """The bias that this rank adds: of a sum over ranks only the first does."""
    if module.bias is None or (type(module).__name__ == "RowParallelLinear" and module.tp_rank > 0):
        return None
    bias = plain(module.bias)
    require(bias.dtype == dtype, f"{name}'s bias is {bias.dtype}; expected {dtype}")
    return bias


def _bind_blocks(name: str, module: Any, weight: torch.Tensor, k: int, n: int, bias: torch.Tensor | None) -> Linear:
    block = list(module.weight_block_size)
    require(block == [GROUP, GROUP], f"{name} is quantized in blocks of {block}; expected [{GROUP}, {GROUP}]")
    require(tuple(weight.shape) == (n, k) and weight.stride(1) == 1, f"{name}'s weight is not [{n}, {k}] by rows")
    scale = getattr(module, "weight_scale_inv", None)
    scale = plain(module.weight_scale if scale is None else scale)
    blocks = (-(-n // GROUP), -(-k // GROUP))
    good = scale.dtype == torch.float32 and tuple(scale.shape) == blocks
    require(good, f"{name}'s scales are {scale.dtype} {list(scale.shape)}; expected float32 {list(blocks)}")
    return Linear(weight.t(), scale.t(), bias)


def _bind_fp8(name: str, module: Any, weight: torch.Tensor, k: int, n: int, bias: torch.Tensor | None) -> tuple[Scheme, Linear]:
    by_columns = weight.t() if weight.stride(-1) == 1 and weight.size(-1) > 1 else weight
    good = tuple(by_columns.shape) == (k, n) and by_columns.stride(0) == 1
    require(good, f"{name}'s weight is {list(weight.shape)} with strides {weight.stride()}; expected [{k}, {n}] by columns")
    scale = plain(module.weight_scale)
    good = scale.dtype == torch.float32 and scale.numel() in (1, n)
    require(good, f"{name}'s scales are {scale.dtype} {list(scale.shape)}; expected float32, one or {n}")
    given = getattr(module, "input_scale", None)
    if given is None:
        return PerTokenFp8(), Linear(by_columns, scale, bias)
    require(given.numel() == 1, f"{name} has {given.numel()} scales of its inputs; expected one")
    return StaticFp8(), Linear(by_columns, scale, bias, plain(given).float().reshape(1))


@dataclass(frozen=True)
class Layer:
    """The weights of one decoder layer, and its vLLM Attention."""

    input_norm: torch.Tensor
    output_norm: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    qkv: Linear
    out: Linear
    gate_up: Linear
    down: Linear
    attention: Any


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder on this rank. hidden, heads and kv_heads of head_size elements, intermediate: elements of a row."""

    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int

    @property
    def qkv(self) -> int:
        """Elements of a row of q, k and v."""
        return (self.heads + 2 * self.kv_heads) * self.head_size

    @property
    def attended(self) -> int:
        """Elements of a row of attention's output."""
        return self.heads * self.head_size


@dataclass(frozen=True)
class Weights:
    """The tensors and sizes of a decoder's layers."""

    shape: Shape
    scheme: Scheme
    dtype: torch.dtype
    epsilon: float
    embedding: torch.Tensor
    final_norm: torch.Tensor
    rope_cache: torch.Tensor
    neox: bool
    layers: tuple[Layer, ...]


def bind(model: Any, dtype: torch.dtype, former: Weights | None = None) -> Weights:
    """The weights of vLLM's Qwen2Model, Qwen3Model or LlamaModel after loading. `UnsupportedError` for what is not served.

    former  what it said before; copies that it made are where they were
    """
    first = model.layers[0]
    attention, mlp = first.self_attn, first.mlp
    shape = Shape(
        first.hidden_size,
        attention.num_heads,
        attention.num_kv_heads,
        attention.head_dim,
        mlp.gate_up_proj.output_size_per_partition // 2,
    )
    layers: list[Layer] = []
    schemes: dict[str, Scheme] = {}
    for index, layer in enumerate(model.layers):
        bound, found = _bind_layer(index, layer, shape, dtype)
        layers.append(bound)
        schemes |= {scheme.name: scheme for scheme in found}
    if len(schemes) > 1:
        raise UnsupportedError(f"layers are quantized in several ways: {'; '.join(sorted(schemes))}")
    epsilons = {norm.variance_epsilon for layer in model.layers for norm in _norms(layer)} | {model.norm.variance_epsilon}
    require(len(epsilons) == 1, f"norms differ in epsilon: {sorted(epsilons)}")
    rope = attention.rotary_emb
    embedding = plain(model.embed_tokens.weight)
    return Weights(
        shape,
        next(iter(schemes.values())),
        dtype,
        epsilons.pop(),
        embedding,
        plain(model.norm.weight),
        bind_rope(rope, dtype, embedding.device, None if former is None else former.rope_cache),
        bool(rope.is_neox_style),
        tuple(layers),
    )


def bind_rope(rope: Any, dtype: torch.dtype, device: torch.device, former: torch.Tensor | None) -> torch.Tensor:
    """Cosines and sines: vLLM's own where they have the dtype, else a copy, in `former` if it fits."""
    own = plain(rope.cos_sin_cache)
    made = own.to(device=device, dtype=dtype)
    return made if made is own else kept_memory(made, former)


def _norms(layer: Any) -> list[Any]:
    found = [layer.input_layernorm, layer.post_attention_layernorm]
    return found + [n for n in (getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm")) if n is not None]


def _bind_layer(index: int, layer: Any, shape: Shape, dtype: torch.dtype) -> tuple[Layer, list[Scheme]]:
    attention, mlp = layer.self_attn, layer.mlp
    sizes = {
        "qkv_proj": (attention.qkv_proj, shape.hidden, shape.qkv),
        "o_proj": (attention.o_proj, shape.attended, shape.hidden),
        "gate_up_proj": (mlp.gate_up_proj, shape.hidden, 2 * shape.intermediate),
        "down_proj": (mlp.down_proj, shape.intermediate, shape.hidden),
    }
    bound = [bind_linear(f"{name} of layer {index}", *each, dtype) for name, each in sizes.items()]
    norms = [plain(norm.weight) for norm in _norms(layer)]
    require(len(norms) in (2, 4), f"layer {index} has {len(norms)} norms; expected 2 or 4")
    q_norm, k_norm = norms[2:] or (None, None)
    qkv, out, gate_up, down = (linear for _, linear in bound)
    return Layer(norms[0], norms[1], q_norm, k_norm, qkv, out, gate_up, down, attention.attn), [s for s, _ in bound]

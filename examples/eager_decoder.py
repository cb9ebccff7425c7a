"""An eager decoder: prompt and tokens of a small model, each step one call of one sequence of all layers.

    python examples/eager_decoder.py [BUNDLE]

Norms, rotary embedding and activation are hdispatch's ops, products, caches and attention torch's own, as foreign steps.
Without a bundle, or a GPU, every op runs its torch reference; with one it is served by the launch table.
"""

from __future__ import annotations

import sys
from typing import Any

import hdispatch
import torch
from hdispatch import ops

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, SIZE = 2048, 6144, 16, 8, 128
VOCABULARY, POSITIONS, EPSILON = 1000, 64, 1e-6
aten = torch.ops.aten


def decoder(layers: list[dict[str, torch.Tensor]], rope: torch.Tensor, dtype: torch.dtype) -> Any:
    """From `residual`, the embeddings [M, hidden], which all layers add to, to the normed `out`.

    `mask` [M, positions] says which cached positions a token sees.
    """
    s = hdispatch.Sequence("eager decoder")
    residual, result = (s.slot(name, ("M", HIDDEN), dtype, written=True) for name in ("residual", "out"))
    positions, mask = s.slot("positions", ("M",), torch.int64), s.slot("mask", ("M", POSITIONS), torch.bool)
    hidden, attended, activated = (s.temp(("M", n), dtype) for n in (HIDDEN, HEADS * SIZE, INTERMEDIATE))
    qkv, gate_up = s.temp(("M", (HEADS + 2 * KV_HEADS) * SIZE), dtype), s.temp(("M", 2 * INTERMEDIATE), dtype)
    heads = qkv.view("M", HEADS + 2 * KV_HEADS, SIZE)
    q, k, v = heads.narrow(1, 0, HEADS), heads.narrow(1, HEADS, KV_HEADS), heads.narrow(1, HEADS + KV_HEADS, KV_HEADS)
    s.add(ops.rms_norm, hidden, residual, layers[0]["norm_1"], EPSILON)
    for layer, following in zip(layers, [*layers[1:], layers[0]], strict=True):
        s.add_torch(aten.mm.out, hidden, layer["qkv"], out=qkv)
        s.add(ops.rotary_embedding, positions, q, k, SIZE, rope, True)
        s.add_torch(aten.index_copy_.default, layer["keys"], 0, positions, k)
        s.add_torch(aten.index_copy_.default, layer["values"], 0, positions, v)
        keys, values = layer["keys"].transpose(0, 1), layer["values"].transpose(0, 1)
        out = s.add_torch(aten.scaled_dot_product_attention.default, q.transpose(0, 1), keys, values, mask, enable_gqa=True)
        s.add_torch(aten.copy_.default, attended.view("M", HEADS, SIZE), s.add_torch(aten.transpose.int, out, 0, 1))
        s.add_torch(aten.mm.out, attended, layer["out"], out=hidden)
        s.add(ops.fused_add_rms_norm, hidden, residual, layer["norm_2"], EPSILON)
        s.add_torch(aten.mm.out, hidden, layer["gate_up"], out=gate_up)
        s.add(ops.silu_and_mul, activated, gate_up)
        s.add_torch(aten.mm.out, activated, layer["down"], out=hidden)
        s.add(ops.fused_add_rms_norm, hidden, residual, following["norm_1"], EPSILON)
    s.add_torch(aten.copy_.default, result, hidden)
    return s.freeze()


def make_layer(device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """Random weights of a layer, and its empty caches of all positions."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        "qkv": (HIDDEN, (HEADS + 2 * KV_HEADS) * SIZE),
        "out": (HEADS * SIZE, HIDDEN),
        "gate_up": (HIDDEN, 2 * INTERMEDIATE),
        "down": (INTERMEDIATE, HIDDEN),
    }
    layer = {name: (torch.randn(k, n, generator=generator) / k**0.5).to(device, dtype) for name, (k, n) in sizes.items()}
    norms = {name: torch.ones(HIDDEN, device=device, dtype=dtype) for name in ("norm_1", "norm_2")}
    caches = {name: torch.zeros(POSITIONS, KV_HEADS, SIZE, device=device, dtype=dtype) for name in ("keys", "values")}
    return layer | norms | caches


def make_rope(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """[positions, size]: half a row cosines, half sines."""
    frequencies = 10000.0 ** (-torch.arange(0, SIZE, 2) / SIZE)
    angles = torch.arange(POSITIONS)[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=1).to(device, dtype)


def generate(prompt: list[int], count: int, device: torch.device, layers: int = 2) -> list[int]:
    """The prompt and `count` tokens after it, greedily."""
    dtype = torch.bfloat16
    generator = torch.Generator().manual_seed(99)
    embedding, head = (torch.randn(VOCABULARY, HIDDEN, generator=generator).to(device, dtype) for _ in range(2))
    run = decoder([make_layer(device, dtype, i) for i in range(layers)], make_rope(device, dtype), dtype)
    tokens, fed = list(prompt), 0
    for _ in range(count):
        positions = torch.arange(fed, len(tokens), device=device)  # all of the prompt first, then one at a time
        residual = embedding[torch.tensor(tokens[fed:], device=device)]
        mask = torch.arange(POSITIONS, device=device) <= positions[:, None]
        out = torch.empty_like(residual)
        run(residual, out, positions, mask)
        fed = len(tokens)
        tokens.append(int((head @ out[-1]).argmax()))
    return tokens


def main() -> None:
    """Print the tokens, and what the sequence did."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if len(sys.argv) > 1:
        hdispatch.load(sys.argv[1], driver="cuda" if device.type == "cuda" else "null")
    with torch.inference_mode():
        print(*generate([1, 2, 3, 4, 5], 8, device))
    print(hdispatch.stats()["eager decoder"])


if __name__ == "__main__":
    main()

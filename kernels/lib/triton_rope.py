"""What the Triton kernels of the ops with a rotary embedding share: a program takes a tile of heads of a few tokens."""

from __future__ import annotations

from typing import Any

from hdispatch.opspec import Variant


def program_tile(head_size: int, is_neox: bool, config: dict[str, Any]) -> tuple[int, int]:
    """Tokens and heads of a program for which loads are vectors of 16 bytes and nothing is exchanged between threads.

    A thread holds the two elements of 8 pairs, of one head of each token. Of interleaved pairs it holds 4: their halves
    of the cache are vectors of 8 bytes, and for more than one token the compiler would make them 16 and exchange them.
    """
    pairs, tokens = (8, config["tokens"]) if is_neox else (4, 1)
    return tokens, config["num_warps"] * 32 * pairs * 2 // head_size


def candidates(sizes: dict[str, int], _variant: Variant | None = None) -> list[dict[str, Any]]:
    """Configs worth measuring. More tokens per program give a thread more loads at once, and longer programs."""
    if sizes["M"] <= 64:
        tiles = [(1, 2), (1, 4), (1, 1), (1, 8), (2, 2)]
    elif sizes["M"] <= 512:
        tiles = [(1, 2), (1, 4), (1, 1), (1, 8), (2, 1), (2, 2), (2, 4)]
    else:
        tiles = [(2, 2), (1, 2), (1, 4), (2, 1), (2, 4), (4, 1), (4, 2)]
    return [{"tokens": tokens, "num_warps": warps} for tokens, warps in tiles]

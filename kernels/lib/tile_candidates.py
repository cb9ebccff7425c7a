"""Configs of the tile form of the CuteDSL GEMMs that are worth measuring: see tile_gemm.py. No DSL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .hopper import SHARED_BYTES, SMS

#: About what of a block's shared memory is neither a stage nor a result: a kernel that needs more for scales stores its results
#: in more turns.
_OTHER = 2048

#: Fewer tokens than this are not worth a tile.
LEAST_M = 64

#: What a chunk of a tile costs an SM of an H100, roughly: products and bytes from L2 in a clock cycle, and the fewest cycles;
#: and, in cycles, what a tile takes before and after its chunks, and slices to add up their sums.
_PRODUCTS, _BYTES, _CHUNK, _TILE, _SLICES = 4096, 60, 200, 2500, 2500


def _most_stages(tile_m: int, tile_n: int, results: int, scales: int = 0, per_sm: int = 1) -> int:
    """Stages that there is room for beside so many bytes of results; more than eight gain nothing."""
    return min((SHARED_BYTES[1] // per_sm - _OTHER * per_sm - results) // (128 * (tile_m + tile_n) + scales), 8)


def tile(
    tile_m: int, tile_n: int, cluster: int = 1, shared: str = "w", band: int = 8, stages: int = 0, **others: int
) -> dict[str, Any]:
    """A config of `TileGemm`, with as many stages as there is room for where none are given; others: `ahead`, `trigger`."""
    # The largest tiles' results leave by way of half the room, for one stage more.
    results = tile_m * tile_n * (1 if tile_m * tile_n > 128 * 208 else 2)
    form = {"kernel": "tile", "tile_m": tile_m, "tile_n": tile_n, "stages": stages or _most_stages(tile_m, tile_n, results)}
    return form | {"cluster": cluster, "shared": shared, "band": band} | others


def block_tile(
    tile_m: int, tile_n: int, cluster: int = 1, shared: str = "w", band: int = 8, stages: int = 0, slices: int = 1,
    **others: int,
) -> dict[str, Any]:  # fmt: skip
    """A config of `BlockTileGemm`; others: `at_once`, `early`, `ahead`, `groups`, `per_sm`, `trigger`."""
    scales = 4 * (tile_m + tile_n // 8 + 4)
    results = tile_m * tile_n * (2 + 4 * (slices - 1)) // slices  # and what slices give each other
    stages = stages or _most_stages(tile_m, tile_n, results, scales, others.get("per_sm", 1))
    form = tile(tile_m, tile_n, cluster, shared, band, stages) | {"kernel": "block_tile"}
    return form | ({"slices": slices} if slices > 1 else {}) | others


def _cycles(config: Mapping[str, Any], m: int, k: int, n: int) -> float:
    """About how long a config takes, in clock cycles: so good that the best are among the first few."""
    tile_m, tile_n, slices = config["tile_m"], config["tile_n"], config.get("slices", 1)
    # Clusters of four and eight leave some SMs without a block: those of a group of SMs that they do not divide.
    at_once = {1: SMS, 2: SMS, 4: 120, 8: 96}[slices]
    waves = -(-(-(-m // tile_m) * -(-n // tile_n) * slices) // at_once)
    chunk = max(tile_m * tile_n * 128 / _PRODUCTS, (tile_m + tile_n) * 128 / _BYTES, _CHUNK)
    return waves * (-(-k // (128 * slices)) * chunk + _TILE + (_SLICES if slices > 1 else 0))


def _likely(sizes: Mapping[str, int], kind: Any, slices: tuple[int, ...], count: int) -> list[dict[str, Any]]:
    """The configs that should be fastest, of blocks that share nothing but a tile's chunks."""
    m, k, n = sizes["M"], sizes.get("K", 4096), sizes.get("N", 6144)
    made = []
    for tile_m in (64, 128, 256):
        for tile_n in range(32, 257, 32 if tile_m == 64 else 16):
            for parts in slices:
                # A thread has registers for 128 sums; a slice stores a piece of 16 columns at least.
                if tile_m * tile_n <= 128 * 256 and not tile_m * tile_n // (128 * 16) % parts:
                    made.append(kind(tile_m, tile_n, **({"slices": parts} if parts > 1 else {})))
    fitting = [each for each in made if each["tile_m"] < 2 * m and each["tile_n"] <= n and each["stages"] >= 3]
    return sorted(fitting, key=lambda each: _cycles(each, m, k, n))[:count]


def _pairs(found: list[dict[str, Any]], kind: Any, m: int) -> list[dict[str, Any]]:
    """Pairs of blocks that share what they read: of the likeliest tiles, or with many tokens of the largest.

    An H100 that multiplies is as fast as its power allows, and what is read twice from L2 takes some.
    """
    if m <= 128:
        return []
    if m > 1024:
        tiles = ((128, 160, 2, "w"), (128, 192, 2, "w"), (128, 256, 2, "w"), (128, 256, 2, "x"), (256, 128, 2, "x"))
        return [kind(*tile, ahead=2) for tile in tiles]
    return [
        kind(each["tile_m"], each["tile_n"], 2, shared, ahead=2)
        for each in found[: 2 if m > 256 else 1]
        for shared in ("w", "x")
    ]


def _in_turn(sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    """Tiles that groups of warps take in turn, where a block has several: one group multiplies while the other stores."""
    m, n = sizes["M"], sizes.get("N", 6144)
    made = [tile(128, 128, ahead=2, pingpong=True)]
    if m > 128:
        made += [
            tile(128, tile_n, 2, shared, ahead=2, pingpong=True) for tile_n, shared in ((128, "w"), (128, "x"), (112, "w"))
        ]
    if m > 1024:
        made.append(tile(128, 128, 2, band=16, ahead=2, pingpong=True))
    return [each for each in made if -(-m // each["tile_m"]) * -(-n // each["tile_n"]) > SMS]


def _one_group(sizes: Mapping[str, int], kind: Any, slices: tuple[int, ...]) -> list[dict[str, Any]]:
    """Few tokens, all of which one group of warps has: products of all of a tile's outputs are as quick as those of half.

    Eleven stages of narrow tiles are 2 to 4 % faster than eight.
    """
    k, n = sizes.get("K", 4096), sizes.get("N", 6144)
    made = [kind(64, tile_n, groups=1, ahead=2) for tile_n in (48, 64, 80, 96)]
    if 2 in slices:
        made += [kind(64, tile_n, slices=2, groups=1, ahead=2) for tile_n in (64, 96)]
    found = sorted(made, key=lambda each: _cycles(each, sizes["M"], k, n))[:3]
    return [*found, kind(64, 48, groups=1, ahead=2, stages=11)]


def tile_candidates(sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    """Configs of `TileGemm` for sizes, of any N where they have none; none for few tokens.

    Weights of two stages alone before the wait: tokens of the first chunks then do not queue behind those of all stages.
    """
    if sizes["M"] < LEAST_M:
        return []
    found = _likely(sizes, tile, (1,), 6)
    few = _one_group(sizes, tile, (1,)) if sizes["M"] <= 64 else []
    # Of many tokens those of `_in_turn` are faster than pairs of larger tiles: in 35 of 36 cells of 2,048 rows and more.
    pairs = _pairs(found, tile, sizes["M"]) if sizes["M"] <= 1024 else []
    return [each | {"ahead": 2} for each in found] + few + pairs + _in_turn(sizes)


def _early(config: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, int]:
    """Products that begin early, where a block's chunks are known and whole turns, and a thread has registers for them."""
    chunks, rest = divmod(-(-sizes.get("K", 0) // 128), config.get("slices", 1))
    return {"early": 4} if chunks and not rest and chunks % 4 == 0 and config["tile_m"] * config["tile_n"] <= 128 * 128 else {}


def _whole_turns(config: dict[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """With a stage less where a wide tile's chunks are then whole turns of the ring: 2 % faster than with the stage."""
    (chunks, rest), stages = divmod(-(-sizes.get("K", 0) // 128), config.get("slices", 1)), config["stages"]
    wide = config["tile_m"] > 64 and config["tile_n"] >= 64 and not config.get("early")
    better = wide and not rest and chunks % stages and stages > 4 and not chunks % (stages - 1)
    return config | {"stages": stages - 1} if better else config


def _two_on_an_sm(sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    """Blocks of which an SM holds two, so that the next kernel asks for its weights under this one's products."""
    if not {"K", "N"} <= sizes.keys():
        return []
    for tile_n in (16, 32, 48, 64):
        made = block_tile(64, tile_n, groups=1, per_sm=2, trigger=2)
        early = _early(made, sizes)
        if early and -(-sizes["M"] // 64) * -(-sizes["N"] // tile_n) <= SMS:
            return [made | early]
    return []


def block_tile_candidates(sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    """The same of `BlockTileGemm`."""
    if sizes["M"] < LEAST_M:
        return []
    if sizes["M"] <= 64:
        made = [each | {"ahead": 2} for each in _likely(sizes, block_tile, (1,), 1)] + _one_group(sizes, block_tile, (1, 2))
        return [each | _early(each, sizes) for each in made] + _two_on_an_sm(sizes)
    few = sizes["M"] <= 128
    whole = _likely(sizes, block_tile, (1,), 1 if few else 2)
    found = [each | {"ahead": 2} for each in whole + _likely(sizes, block_tile, (1, 2, 4), 3)]
    # Few tokens wait for weights, which many small tiles ask for early.
    more = [block_tile(128, 64)] if sizes["M"] <= 256 else []
    more += [each | _early(each, sizes) for each in found[: len(whole)] + more]
    more += [each | _early(each, sizes) for each in _pairs(whole, block_tile, sizes["M"])]
    if sizes["M"] <= 256:
        more += _two_on_an_sm(sizes)
    made = [_whole_turns(each, sizes) for each in found + more]
    return [each for index, each in enumerate(made) if each not in made[:index]]

"""Blocks, slots and positions past what they index: ArgumentError on the CPU, nothing written."""

from __future__ import annotations

from typing import Any

import hdispatch
import pytest
import torch
from hdispatch import ArgumentError

PAGED = ("attention_half", "paged_attention_decode")


def arguments(name: str) -> tuple[hdispatch.OpSpec, dict[str, Any]]:
    spec = hdispatch.registry.spec(name)
    variant = next(v for v in spec.served_variants() if v.name == spec.typical or not spec.typical)
    sizes = {"M": 5} | dict.fromkeys(set(spec.symbols()) - {"M"}, 128)
    if "group" in variant.static:
        sizes["N"] = 2 * int(variant.static["group"])
    if "head_dim" in variant.static or "head_size" in variant.static:
        sizes = {symbol: size if symbol == "M" else 4 * size for symbol, size in sizes.items()}
    made = spec.sample(variant, sizes, torch.device("cpu"), torch.Generator().manual_seed(3))
    return spec, dict(zip((arg.name for arg in spec.args), made, strict=True))


def is_refused(name: str, given: dict[str, Any], message: str) -> None:
    before = {key: value.clone() for key, value in given.items() if isinstance(value, torch.Tensor)}
    with pytest.raises(ArgumentError, match=message):
        hdispatch.registry.get(name)(*given.values())
    for key, value in before.items():
        assert torch.equal(value.nan_to_num(7.0), given[key].nan_to_num(7.0)), key


@pytest.mark.parametrize("index", [-1, 10**6])
@pytest.mark.parametrize(
    ("name", "arg"),
    [
        ("rotary_embedding", "positions"),
        ("fused_qk_norm_rope", "position_ids"),
        ("fused_qk_norm_rope_cache", "position_ids"),
        ("attention_half", "positions"),
    ],
)
def test_positions(name, arg, index):
    _, given = arguments(name)
    given[arg][3] = index
    is_refused(name, given, rf"{name}: {arg} has {index}; expected at least 0 and less than {len(given['cos_sin_cache'])}")


@pytest.mark.parametrize("name", ["attention_half", "fused_qk_norm_rope_cache", "reshape_and_cache_flash"])
def test_slots(name):
    _, given = arguments(name)
    given["slot_mapping"][4] = 10**9
    is_refused(name, given, f"{name}: slot_mapping has {10**9}; expected at least 0 and less than")


@pytest.mark.parametrize("name", ["fp8_e5m2", "text", ""])
def test_formats_that_there_are_not(name):
    """Not taken for e4m3, whose bytes are others."""
    _, given = arguments("reshape_and_cache_flash")
    dtypes = {"key_cache": torch.uint8, "value_cache": torch.uint8}
    given |= {cache: torch.zeros(given[cache].shape, dtype=dtype) for cache, dtype in dtypes.items()}
    given["kv_cache_dtype"] = name
    is_refused("reshape_and_cache_flash", given, f"kv_cache_dtype is {name!r}; expected one of")


@pytest.mark.parametrize("block", [-1, 10**6])
@pytest.mark.parametrize("name", PAGED)
def test_blocks(name, block):
    _, given = arguments(name)
    given["block_table"][0, 2] = block
    is_refused(name, given, rf"{name}: block_table has {block}; expected at least 0 and less than {len(given['kv_cache'])}")


@pytest.mark.parametrize("name", PAGED)
def test_tables_of_too_few_columns(name):
    _, given = arguments(name)
    given["block_table"] = given["block_table"][:, :2].clone()
    is_refused(name, given, rf"{name}: block_table has 2 columns; expected 7, for (99|100) tokens of a request in blocks of 16")


@pytest.mark.parametrize("name", PAGED)
@pytest.mark.parametrize("dimension", [0, 2])
def test_caches_of_nothing(name, dimension):
    """Requests of no cached token need none; others are refused."""
    _, given = arguments(name)
    given["kv_cache"] = given["kv_cache"].narrow(dimension, 0, 0)
    if "slot_mapping" in given:
        is_refused(name, given, f"{name}: slot_mapping has .*less than 0")
        given["slot_mapping"].fill_(-1)
    is_refused(name, given, f"{name}: (block_table has .*less than 0|kv_cache has blocks of no token)")
    given["seq_lens"].fill_(0)
    hdispatch.registry.get(name)(*given.values())
    assert not given["out"].isnan().any()


@pytest.mark.parametrize("name", PAGED)
def test_entries_behind_a_request_are_not_read(name):
    _, given = arguments(name)
    given["block_table"][1, 1:] = 10**6  # its length is 1
    hdispatch.registry.get(name)(*given.values())
    assert not given["out"].isnan().any()

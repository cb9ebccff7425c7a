"""The drop-in for vLLM's write to the paged KV cache, on the null driver: padded keys and values, caches, formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hdispatch
import pytest
import torch
from hdispatch.compile import Selection, build
from hdispatch.integrations.vllm import ROUTES
from hdispatch.testing import null
from standin import SCHEMAS, Library, counts, hits

OP = "reshape_and_cache_flash"
HEADS, DIM, PAGE = 2, 64, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("cache")
    variants = ["bfloat16-bfloat16+kv_cache_dtype=auto", "bfloat16-uint8+kv_cache_dtype=fp8"]
    select = Selection(
        shapes=lambda _: [{"K": DIM}],
        variants=lambda _: variants,
        buckets=lambda spec: [spec.ladders.index(m) for m in (1, 5)],
    )
    build([OP], "h200", work / "bundle", select=select, cache=work / "cache")
    return work / "bundle"


@pytest.fixture(scope="module")
def standin() -> Library:
    return Library(*SCHEMAS)


DOORS = {"packet": lambda packet: packet, "default": lambda packet: packet.default}


@pytest.fixture(params=DOORS)
def call(request: pytest.FixtureRequest, bundle: hdispatch.Bundle, standin: Library) -> Any:
    """Calls vLLM's op, and says whether its own kernel ran, and what was launched."""
    door = DOORS[request.param](getattr(standin.ops, OP))

    def made(*args: Any) -> tuple[bool, list[dict[str, Any]]]:
        standin.calls.clear()
        with null.recording():
            door(*args)
            return bool(standin.calls), null.launches()

    with standin.override({OP: ROUTES[OP]}):
        yield made


def arguments(tokens: int, rows: int, *, cache: torch.dtype = torch.bfloat16, scales: int = 1) -> list[Any]:
    """As vLLM calls it: parts of one row of qkv, and of one cache."""
    qkv = torch.zeros(rows, 3 * HEADS, DIM, dtype=torch.bfloat16)
    key, value = qkv[:, HEADS : 2 * HEADS], qkv[:, 2 * HEADS :]
    caches = torch.zeros(4, HEADS, PAGE, 2 * DIM, dtype=cache).transpose(1, 2).split(DIM, dim=-1)
    kind = "auto" if cache == torch.bfloat16 else "fp8"
    return [key, value, *caches, torch.arange(tokens), kind, *(torch.ones(scales) for _ in "kv")]


def test_vllms_op_is_declared():
    (route,) = ROUTES[OP]
    assert (route.op, route.namespace, route.padded, route.rows) == (OP, "_C_cache_ops", ("key", "value"), "slot_mapping")


@pytest.mark.parametrize("cache", [torch.bfloat16, torch.uint8])
def test_rows_of_padding_are_left(call: Any, cache: torch.dtype):
    """The launch is that of the rows that have a slot, whose number is all that vLLM's kernel reads."""
    for tokens, rows in ((1, 1), (1, 8), (5, 8), (5, 5), (5, 4096)):
        exact = arguments(tokens, tokens, cache=cache)
        hdispatch.stats(reset=True)
        runs_theirs, launches = call(*arguments(tokens, rows, cache=cache))
        assert not runs_theirs
        assert hits(1, OP)
        runs_theirs, wanted = call(*exact)
        assert not runs_theirs
        shape = [{key: each[key] for key in ("grid", "block")} for each in (*launches, *wanted)]
        assert shape[0] == shape[1]
        assert len(shape) == 2
        # Sizes and strides, behind the seven addresses; a kernel that has other ones is compiled otherwise.
        assert launches[0]["params"][7:] == wanted[0]["params"][7:]


def test_fewer_rows_than_slots_are_vllms(call: Any):
    runs_theirs, launches = call(*arguments(5, 4))
    assert runs_theirs
    assert launches == []
    (reason,) = counts(OP)["misses"]
    assert reason.startswith("override: ")


def test_a_step_of_nothing_but_padding_is_vllms(call: Any):
    runs_theirs, launches = call(*arguments(0, 8))
    assert runs_theirs
    assert launches == []
    assert counts(OP)["empty"] == 1


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (5, "fp8_e5m2"),  # a format that the kernel does not write
        (5, "fp8"),  # of a cache of 16 bits
        (6, torch.ones(HEADS)),  # a scale for each head
        (0, torch.zeros(5, HEADS, DIM, dtype=torch.float16)),
        (4, torch.zeros(5, dtype=torch.int32)),
    ],
)
def test_what_has_no_row_is_vllms(call: Any, at: int, value: Any):
    given = arguments(5, 8)
    given[at] = value
    runs_theirs, launches = call(*given)
    assert runs_theirs
    assert launches == []
    assert counts(OP)["fallbacks"] == 1


def test_auto_is_served_only_where_the_cache_has_the_dtype_of_the_keys(call: Any):
    given = arguments(5, 8, cache=torch.uint8)
    given[5] = "auto"
    assert call(*given) == (True, [])
    assert counts(OP)["fallbacks"] == 1


def test_the_op_itself_takes_no_padding(bundle: hdispatch.Bundle):
    with pytest.raises(hdispatch.ArgumentError, match=r"value|slot_mapping"):
        hdispatch.registry.get(OP)(*arguments(5, 8))

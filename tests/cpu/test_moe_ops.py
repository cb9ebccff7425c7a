"""The ops of a mixture of experts without a GPU: kernels in Triton's interpreter, references by hand, a bundle, the drop-in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import hdispatch
import pytest
import shared
import torch
from hdispatch import ArgumentError
from hdispatch.compile import Selection, build
from hdispatch.integrations.vllm import ROUTES
from hdispatch.opspec import OpSpec
from hdispatch.testing import null
from interpreted import ask
from standin import SCHEMAS, Library

CPU = torch.device("cpu")
OPS = ("topk_softmax", "moe_align_block_size", "moe_sum")
ALIGN = "moe_align_block_size"


def spec_of(op: str) -> OpSpec:
    return hdispatch.registry.spec(op)


def sampled(op: str, variant: str | None = None, **sizes: int) -> list[Any]:
    spec = spec_of(op)
    chosen = spec.typical_variant() if variant is None else spec.variant(variant)
    return spec.sample(chosen, {"N": 128, "K": 128, **sizes}, CPU, torch.Generator().manual_seed(sizes["M"]))


@pytest.mark.parametrize("op", OPS)
def test_kernels_in_the_interpreter(op: str) -> None:
    """Against the references: every variant and candidate, M at edges of buckets, ties, NaN, infinities, absent experts."""
    count, failures = ask("moe_kernels.py", op)
    assert count > 150
    assert failures == []


# ---- references, by hand ----


def aligned(ids: list[int], experts: int, block: int, room: int) -> tuple[list[int], list[int], int]:
    """What moe_align_block_size writes, one row after the other."""
    rows, of_blocks = [], []
    for expert in range(experts):
        mine = [row for row, each in enumerate(ids) if each == expert]
        filled = mine + [len(ids)] * (-len(mine) % block)
        rows += filled
        of_blocks += [expert] * (len(filled) // block)
    blocks = math.ceil(room / block)
    return rows + [len(ids)] * (room - len(rows)), of_blocks + [-1] * (blocks - len(of_blocks)), len(rows)


@pytest.mark.parametrize("m", [1, 5, 40])
@pytest.mark.parametrize("variant", ["int32", "int64+maybe_expert_map"])
@pytest.mark.parametrize(("experts", "block"), [(8, 4), (60, 16), (3, 1)])
def test_aligned_by_hand(m: int, variant: str, experts: int, block: int) -> None:
    given = sampled("moe_align_block_size", variant, M=m, A=3, num_experts=experts)
    ids, placed = given[0].flatten().tolist(), given[6]
    room = 3 * m + experts * (block - 1) + 5
    given[2:5] = [block, torch.full((room,), -7, dtype=torch.int32), torch.full((math.ceil(room / block) + 2,), -7).int()]
    spec_of("moe_align_block_size").reference(*given)
    if placed is not None:
        ids = [placed[each].item() if 0 <= each < experts else -1 for each in ids]
    rows, of_blocks, count = aligned(ids, experts, block, room)
    assert given[3].tolist() == rows
    assert given[4].tolist() == [*of_blocks, -7, -7], "elements beyond the blocks stay"
    assert given[5].tolist() == [count]


def test_aligned_as_vllms_docstring_has_it() -> None:
    ids = torch.tensor([[2, 3, 4], [1, 2, 4], [1, 3, 4], [1, 2, 3]], dtype=torch.int32)
    rows, of_blocks, count = (torch.empty(size, dtype=torch.int32) for size in (16, 4, 1))
    hdispatch.ops.moe_align_block_size(ids - 1, 4, 4, rows, of_blocks, count)
    assert rows.tolist() == [3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12, 2, 5, 8, 12]
    assert (of_blocks.tolist(), count.tolist()) == ([0, 1, 2, 3], [16])


@pytest.mark.parametrize("variant", [each.name for each in spec_of("topk_softmax").variants()])
@pytest.mark.parametrize("m", [1, 33])
def test_experts_by_hand(variant: str, m: int) -> None:
    given = sampled("topk_softmax", variant, M=m, A=6, N=60)
    weights, indices, order, logits, renormalize, bias, padding = given
    spec_of("topk_softmax").reference(*given)
    for row in range(m):
        x = logits[row].double()
        softmax = (x.exp() / x.exp().sum()).tolist()
        choice = softmax if bias is None else [a + b for a, b in zip(softmax, bias.tolist(), strict=True)]
        # Equal logits have equal weights, however they are rounded.
        chosen = sorted(range(60), key=lambda n: (-choice[n], n))[:6]
        total = sum(softmax[n] for n in chosen) if renormalize else 1.0
        wanted = torch.tensor([softmax[n] / total for n in chosen])
        torch.testing.assert_close(weights[row], wanted.float(), rtol=2e-6, atol=0)
        assert indices[row].tolist() == ([-1] * 6 if padding is not None and padding[row] else chosen)
        assert order[row].tolist() == [a * m + row for a in range(6)]


def test_experts_of_odd_rows() -> None:
    """A NaN or an infinity makes all weights 0; then the first experts are chosen, each once."""
    odd = [[math.nan, *[1.0] * 7], [math.inf, *[1.0] * 7], [-math.inf] * 8, [1.0, 2.0, 2.0, -math.inf, *[2.0] * 4]]
    weights, indices = torch.full((4, 3), -7.0), torch.full((4, 3), -7, dtype=torch.int32)
    hdispatch.ops.topk_softmax(weights, indices, indices.clone(), torch.tensor(odd), True)
    assert indices.tolist() == [[0, 1, 2]] * 3 + [[1, 2, 4]]
    assert weights[:3].tolist() == [[0.0] * 3] * 3
    torch.testing.assert_close(weights[3], torch.full((3,), 1 / 3))


@pytest.mark.parametrize("variant", [each.name for each in spec_of("moe_sum").variants()])
def test_sums_by_hand(variant: str) -> None:
    given = sampled("moe_sum", variant, M=9, A=5, N=40)
    x, out, ids, placed = given
    spec_of("moe_sum").reference(*given)
    for m in range(9):
        wanted = torch.zeros(40, dtype=torch.float64)
        for a in range(5):
            expert = 0 if ids is None else ids[m, a].item()
            if expert >= 0 and (ids is None or placed is None or placed[expert] >= 0):
                wanted += x[m, a].double()
        torch.testing.assert_close(out[m].double(), wanted, rtol=torch.finfo(x.dtype).eps, atol=1e-5)


def test_experts_of_any_number_take_memory_of_the_rows_alone() -> None:
    """2**31 - 1 counters of int64 would be 16 GiB."""
    given = [torch.tensor([[9, 2**31 - 2], [9, -1]], dtype=torch.int32), 2**31 - 1, 2, *room_for(8, 4), None]
    hdispatch.registry.get("moe_align_block_size")(*given)
    assert given[3].tolist() == [0, 2, 1, 4, 4, 4, 4, 4]
    assert given[4].tolist() == [9, 2**31 - 2, -1, -1]
    assert given[5].tolist() == [4]


def room_for(rows: int, blocks: int) -> list[torch.Tensor]:
    """The op's outputs, poisoned."""
    return [torch.full((size,), -7, dtype=torch.int32) for size in (rows, blocks, 1)]


def test_no_tokens() -> None:
    """No block, and all that is behind the last one; the others have nothing to write."""
    given = sampled("moe_align_block_size", M=0, A=8)
    given[3], given[4] = torch.full((40,), -7, dtype=torch.int32), torch.full((3,), -7, dtype=torch.int32)
    hdispatch.ops.moe_align_block_size(*given)
    assert given[5].tolist() == [0]
    assert given[3].tolist() == [0] * 40
    assert given[4].tolist() == [-1] * 3
    for op in ("topk_softmax", "moe_sum"):
        hdispatch.registry.get(op)(*sampled(op, M=0))


def refused(op: str, given: list[Any], message: str) -> None:
    before = [each.clone() if isinstance(each, torch.Tensor) else each for each in given]
    with pytest.raises(ArgumentError, match=message):
        hdispatch.registry.get(op)(*given)
    for each, known in zip(given, before, strict=True):
        if isinstance(each, torch.Tensor):
            assert torch.equal(each.nan_to_num(), known.nan_to_num())


def test_what_is_refused() -> None:
    refused(
        "topk_softmax", [*sampled("topk_softmax", M=2, A=8, N=8)[:3], torch.zeros(2, 4), True], "8 columns; expected at most 4"
    )
    given = sampled("moe_align_block_size", M=4)
    refused("moe_align_block_size", [*given[:4], given[4][:-1], *given[5:]], "experts_ids has .* expected .* for each block")
    given[0].fill_(3)
    short = torch.full((16,), -7, dtype=torch.int32)
    refused("moe_align_block_size", [*given[:3], short, *given[4:]], "sorted_token_ids has 16 elements; .* are 32")
    given = sampled("moe_align_block_size", M=4)
    for at, value in ((1, 0), (2, 0)):
        refused("moe_align_block_size", [*given[:at], value, *given[at + 1 :]], "expected at least 1|at least 1")
    for at, name in ((1, "num_experts"), (2, "block_size")):
        for value in (2**31, 2**63 - 1):
            message = f"{name} is {value}; it takes at most {2**31 - 1}"
            refused("moe_align_block_size", [*given[:at], value, *given[at + 1 :]], message)


# ---- a bundle, and rows of experts ----

#: Ops that take rows of experts, [M * top-k, 768] in Qwen3-30B-A3B, as they take any rows.
OF_ROWS = (
    "silu_and_mul",
    "silu_and_mul_dynamic_per_token_quant",
    "silu_and_mul_per_block_quant",
    "dynamic_per_token_scaled_fp8_quant",
    "per_token_group_fp8_quant",
)
TOKENS = (1, 16, 1024)
MAPPED = "int32+maybe_expert_map"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The typical variants of all, for any size; of the ops of rows the buckets that are called here."""

    def variants(spec: OpSpec) -> list[str]:
        return [spec.typical_variant().name, *([MAPPED] if spec.name == "moe_align_block_size" else [])]

    def buckets(spec: OpSpec) -> Iterable[int]:
        ladders = spec.ladders
        return range(ladders.count) if spec.name in OPS else sorted({ladders.index(8 * m) for m in TOKENS})

    select = Selection(shapes=lambda _: [{}], variants=variants, buckets=buckets)

    def make(work: Path) -> None:
        build([*OPS, *OF_ROWS], "h200", work / "bundle", select=select, cache=work / "cache")

    return shared.folder(tmp_path_factory, "moe", make) / "bundle"


@pytest.fixture(scope="module")
def standin() -> Library:
    return Library(*SCHEMAS)


@pytest.fixture(params=["ops", "override"])
def door(request: pytest.FixtureRequest, bundle: hdispatch.Bundle, standin: Library) -> Iterator[Any]:
    """Both ways to an op; of ops that vLLM has not, the one."""
    if request.param == "ops":
        yield hdispatch.registry.get
        return
    with standin.override(ROUTES):
        yield lambda op: getattr(standin.ops, op) if op in ROUTES else hdispatch.registry.get(op)
    assert standin.calls == []


@pytest.mark.parametrize("m", [1, 7, 8, 9, 63, 64, 65, 511, 512, 513, 8191, 8193])
def test_every_bucket_is_served(door: Any, m: int) -> None:
    grids = {}
    with hdispatch.strict(), null.recording():
        for op, sizes in (("topk_softmax", {"N": 64}), ("moe_sum", {"N": 48}), (ALIGN, {"num_experts": 100})):
            if op == ALIGN and m > 512:
                continue
            door(op)(*sampled(op, M=m, A=2, **sizes))
            grids[op] = null.launches()[-1]["grid"]
        assert len(null.launches()) == 2 + (m <= 512)
    assert grids["moe_sum"][0] == m
    if m > 512:
        return
    assert grids[ALIGN][0] <= 100
    for experts in (1, 128, 129, 512, 900):
        with hdispatch.strict():
            door(ALIGN)(*sampled(ALIGN, MAPPED, M=m, num_experts=experts))


@pytest.mark.parametrize("m", [513, 8192])
def test_more_tokens_than_the_kernel_is_for_run_the_fallback(bundle: hdispatch.Bundle, m: int) -> None:
    given = sampled(ALIGN, M=m, A=2, num_experts=100)
    expected = [each.clone() if isinstance(each, torch.Tensor) else each for each in given]
    hdispatch.registry.spec(ALIGN).reference(*expected)
    with null.recording():
        hdispatch.registry.get(ALIGN)(*given)
        assert not null.launches()
    assert all(torch.equal(got, want) for got, want in zip(given[3:6], expected[3:6], strict=True))
    with hdispatch.strict(), pytest.raises(hdispatch.MissError):
        hdispatch.registry.get(ALIGN)(*given)


@pytest.mark.parametrize(
    ("experts", "block", "is_served"),
    [
        (2**15, 16, True),
        (2**15 + 1, 16, False),
        (2**31 - 1, 1, False),
        (100, 2**24, True),
        (128, 2**24 + 1, False),
        (2, 2**30 - 8, True),
        (2, 2**30 - 7, False),
        (1, 2**31 - 1, False),
    ],
)
def test_no_kernel_runs_for_hours_or_counts_beyond_32_bits(
    bundle: hdispatch.Bundle, experts: int, block: int, is_served: bool
) -> None:
    """Rows and what fills up the blocks of all experts: 16 + experts * (block - 1) < 2**31."""
    given = sampled(ALIGN, M=2, A=8)
    given[1:3] = [experts, block]
    with hdispatch.strict(), null.recording():
        if is_served:
            hdispatch.registry.get(ALIGN)(*given)
            assert len(null.launches()) == 1
        else:
            with pytest.raises(hdispatch.MissError):
                hdispatch.registry.get(ALIGN)(*given)
            assert not null.launches()


@pytest.mark.parametrize("op", OF_ROWS)
@pytest.mark.parametrize("m", TOKENS)
def test_rows_of_experts_are_served_by_the_ops_that_there_are(door: Any, op: str, m: int) -> None:
    """8 rows for each token, 768 wide."""
    given = sampled(op, M=8 * m, N=768, K=768)
    if op in ROUTES and op.endswith("per_block_quant"):
        given = given[:6]  # without the flag that vLLM has not
    with hdispatch.strict(), null.recording():
        door(op)(*given)
        assert len(null.launches()) == 1


def test_more_experts_than_a_kernel_takes_are_vllms(bundle: hdispatch.Bundle, standin: Library) -> None:
    """So are calls with what only vLLM's op has."""
    standin.calls.clear()
    with standin.override(ROUTES):
        standin.ops.topk_softmax(*sampled("topk_softmax", M=4, N=1024))
        standin.ops.topk_softmax(*sampled("topk_softmax", M=4, N=60))
        standin.ops.topk_softmax(*sampled("topk_softmax", M=4, A=17, N=128))
        standin.ops.moe_align_block_size(*sampled("moe_align_block_size", M=4), torch.empty(32, 1, dtype=torch.int32))
    assert standin.calls == [*["topk_softmax"] * 3, "moe_align_block_size"]
    standin.calls.clear()


def test_both_libraries_of_vllm_are_waited_for() -> None:
    override = hdispatch.override_vllm_ops(["silu_and_mul", "moe_sum"])
    try:
        assert sorted([*override.waiting, *override.served]) == ["moe_sum", "silu_and_mul"]
        assert "torch.ops._C and torch.ops._moe_C" in repr(override)
    finally:
        override.undo()
    assert {name for name, routes in ROUTES.items() if routes[0].namespace == "_moe_C"} == set(OPS)

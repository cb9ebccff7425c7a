"""The attention ops without a GPU: references against a loop in float64, kernels in Triton's interpreter, what is refused.

attention_kernels.py interprets the kernels; it runs in a process of its own, once.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import hdispatch
import pytest
import shared
import torch
from hdispatch.errors import ArgumentError
from hdispatch.kernels.lib import attention, paged_kv
from hdispatch.kernels.lib.paged_kv import Rule, attend, random_lengths, random_paged, random_slots, write
from hdispatch.kernels.lib.workspace import LARGEST_HEAD, SPLITS, cells, rows_held, size
from hdispatch.opspec import WORKSPACE_COUNTERS

CPU = torch.device("cpu")
PROGRAM, HELION = (Path(__file__).parents[1] / "support" / name for name in ("attention_kernels.py", "helion_attention.py"))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    return shared.value(tmp_path_factory, "attention", lambda: interpreted(PROGRAM, "TRITON_INTERPRET"))


def interpreted(program: Path, switch: str) -> dict[str, str | None]:
    """What a program says of its cases, with an interpreter switched on."""
    env = {**os.environ, switch: "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(program)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_helions_kernel_agrees_with_the_reference() -> None:
    found = interpreted(HELION, "HELION_INTERPRET")
    assert len(found) >= 20
    assert {name: why for name, why in found.items() if why} == {}


def test_kernels_agree_with_the_references(outcomes: dict[str, str | None]) -> None:
    assert {name: why for name, why in outcomes.items() if why} == {}


@pytest.mark.parametrize("form", ["heads", "", None])
def test_a_form_that_is_none_is_refused(form: str | None) -> None:
    with pytest.raises(ValueError, match="is none of rows, tokens, warps"):
        attention.options({"tile": 64, "num_warps": 4, "stages": 2, "chunk": 64, "form": form}, 4, 128)


def test_every_op_was_interpreted(outcomes: dict[str, str | None]) -> None:
    counts = {"attention_half": 20, "paged_attention_decode": 20, "reshape_and_cache_flash": 4, "fused_qk_norm_rope_cache": 4}
    for op, least in counts.items():
        assert len([name for name in outcomes if name.startswith(op)]) >= least, op


def looped(q, paged, lengths, rule, newest=None):
    """Attention in float64, a request, query and head at a time."""
    page, dim = paged.kv_cache.size(2), q.size(3)
    out = torch.zeros(q.shape, dtype=torch.float64)
    for request, length in enumerate(lengths):
        rows = [paged.kv_cache[paged.block_table[request, t // page], :, t % page].double() for t in range(length)]
        if newest is not None:
            rows.append(torch.cat([new[request] for new in newest], -1).double())
        for query in range(q.size(1)):
            end = len(rows) - q.size(1) + 1 + query
            begin = max(0, end - rule.window) if rule.window else 0
            for head in range(q.size(2)):
                kv_head = head * paged.kv_cache.size(1) // q.size(2)
                scores = [
                    float(q[request, query, head].double() @ rows[t][kv_head, :dim]) * rule.scale for t in range(begin, end)
                ]
                if rule.softcap:
                    scores = [rule.softcap * math.tanh(s / rule.softcap) for s in scores]
                total = sum(math.exp(s) for s in scores) + (math.exp(rule.sinks[head]) if rule.sinks is not None else 0)
                for t, s in zip(range(begin, end), scores, strict=True):
                    out[request, query, head] += math.exp(s) / total * rows[t][kv_head, dim:]
    return out


RULES = {
    "plain": Rule(0.2),
    "window": Rule(0.2, window=5),
    "softcap": Rule(0.5, softcap=2.0),
    "sinks": Rule(0.2, sinks=torch.tensor([1.0, -2.0, 0.5, 3.0])),
    "all": Rule(0.4, 3.0, 7, torch.tensor([1.0, -2.0, 0.5, 3.0])),
}


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("rule", RULES)
def test_reference_is_a_loop_in_float64(rule: str, queries: int) -> None:
    lengths = [33, 1, 16, 17, 0]
    paged = random_paged(torch.tensor(lengths).clamp(min=1), 2, 8, 16, torch.bfloat16, CPU, generator())
    q = torch.randn(5, queries, 4, 8, generator=generator(1))
    # What lies behind a request's end is never looked at.
    for request, length in enumerate(lengths):
        paged.block_table[request, -(-length // 16) :] = -1
    got = attend(q, paged.kv_cache, paged.block_table, torch.tensor(lengths).int(), 33, RULES[rule])
    assert torch.allclose(got.double(), looped(q, paged, lengths, RULES[rule]), atol=2e-6)
    more = attend(q, paged.kv_cache, paged.block_table, torch.tensor(lengths).int(), 400, RULES[rule])
    assert torch.allclose(more, got, atol=1e-6), "a longer longest changes nothing"


def test_reference_takes_the_newest_token_beside_the_cache() -> None:
    lengths = [20, 0, 16]
    paged = random_paged(torch.tensor([20, 1, 16]), 2, 8, 16, torch.float16, CPU, generator())
    newest = tuple(torch.randn(3, 2, 8, generator=generator(seed)) for seed in (1, 2))
    q = torch.randn(3, 1, 4, 8, generator=generator(3))
    got = attend(q, paged.kv_cache, paged.block_table, torch.tensor(lengths).int(), 20, Rule(0.3), newest)
    assert torch.allclose(got.double(), looped(q, paged, lengths, Rule(0.3), newest), atol=2e-6)


def test_reference_takes_requests_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = random_lengths(7, 40, generator())
    paged = random_paged(lengths, 1, 8, 16, torch.bfloat16, CPU, generator())
    args = (torch.randn(7, 1, 4, 8), paged.kv_cache, paged.block_table, paged.seq_lens, 40, Rule(0.3))
    whole = attend(*args)
    monkeypatch.setattr(paged_kv, "GATHERED", 2 * 48 * 16)
    assert torch.equal(attend(*args), whole)


@pytest.mark.parametrize("slots", [[5, -1, 0, 31], [-1, -1, 7, -1], [-1, -1, -1, -1], [31, 30, 29, 28], []])
def test_write_passes_over_negative_slots(slots: list[int]) -> None:
    cache = torch.full((2, 3, 16, 4), float("nan"))
    kv = torch.randn(len(slots), 3, 4)
    write(cache, torch.tensor(slots, dtype=torch.int64), kv)
    want = torch.full((2, 3, 16, 4), float("nan"))
    for token, slot in enumerate(slots):
        if slot >= 0:
            want[slot // 16, :, slot % 16] = kv[token]
    assert torch.equal(cache.view(torch.int32), want.view(torch.int32))


def test_random_caches_hold_what_they_promise() -> None:
    for most in (2**26, 1):
        lengths = random_lengths(9, 100, generator())
        paged = random_paged(lengths, 2, 8, 16, torch.bfloat16, CPU, generator(), most)
        assert paged.kv_cache.shape[1:] == (2, 16, 16)
        assert paged.block_table.min() >= 0
        assert paged.block_table.max() < paged.kv_cache.size(0)
        assert len(set(paged.slots.tolist())) == 9
        last = paged.block_table.gather(1, ((lengths - 1) // 16)[:, None])[:, 0].long() * 16 + (lengths - 1) % 16
        assert torch.equal(last, paged.slots)
        # The newest token's block is no other request's.
        assert all(int((paged.block_table == slot // 16).any(1).sum()) == 1 for slot in paged.slots.tolist())
    slots, blocks = random_slots(40, 16, CPU, generator())
    assert slots[2] == -1
    assert len(set(slots.tolist())) == 40
    assert slots.max() < blocks * 16


def test_a_workspace_holds_the_splits_of_every_block() -> None:
    for rows in (1, 4, 5, 7, 8, 16, 56, 64, 128):
        assert 0 < cells(rows) * rows <= rows_held(rows)
        assert rows > 32 or cells(rows) >= SPLITS
        # Pairs of one split leave nothing there; each of the others has a counter.
        assert cells(rows) // 2 <= WORKSPACE_COUNTERS // 4
        assert size(rows) == 4 * rows_held(rows) * (2 + LARGEST_HEAD)
    for op in ("attention_half", "paged_attention_decode"):
        spec = hdispatch.registry.spec(op)
        assert max(shape["K"] for shape in spec.shapes) <= LARGEST_HEAD
        for variant in spec.variants():
            rows = int(variant.static["group"]) * int(variant.static.get("max_queries", 1))
            assert spec.workspace_bytes(variant) == WORKSPACE_COUNTERS + size(rows)


def sample(op: str, m: int = 3, k: int = 64, n: int = 8, variant: str | None = None) -> dict:
    spec = hdispatch.registry.spec(op)
    chosen = spec.typical_variant() if variant is None else spec.variant(variant)
    values = spec.sample(chosen, {"M": m, "K": k, "N": n}, CPU, generator())
    return dict(zip((arg.name for arg in spec.args), values, strict=True))


WRONG = {
    "attention_half": {
        "qkv": lambda x: x[:, :-64],
        "kv_cache": lambda x: x[:, :1],
        "cos_sin_cache": lambda x: x.repeat(1, 2),
    },
    "paged_attention_decode": {"max_queries": lambda _x: 1, "group": lambda _x: 2},
    "fused_qk_norm_rope_cache": {
        "num_heads_q": lambda x: x + 1,
        "cos_sin_cache": lambda x: x.repeat(1, 4),
        "kv_cache": lambda x: x[:, :1],
    },
    "reshape_and_cache_flash": {"kv_cache_dtype": lambda _x: "fp8"},
}


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, names in WRONG.items() for name in names])
def test_what_the_declaration_cannot_say_is_refused_by_name(op: str, name: str) -> None:
    variant = "bfloat16-bfloat16+group=4+max_queries=4" if op == "paged_attention_decode" else None
    k = 12 * 128 if op.startswith("fused") else 64
    args = sample(op, k=k, n=16 if op == "attention_half" else 8, variant=variant)
    args[name] = WRONG[op][name](args[name])
    with pytest.raises(ArgumentError, match=op):
        getattr(hdispatch.ops, op)(*args.values())


def test_gpu_tests_are_skipped_where_a_bundle_has_no_row_of_a_variant_and_only_there() -> None:
    path = Path(__file__).parents[1] / "gpu" / "conftest.py"
    found = importlib.util.spec_from_file_location("gpu_conftest", path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    miss = "paged_attention_decode(bfloat16-bfloat16+group=2+max_queries=4, M=1, K=128, N=16, max_seq_len=128): the table"
    row = {"op": "paged_attention_decode", "variant": "bfloat16-bfloat16+group=2+max_queries=4", "K": 128, "N": 16}
    wanted = "the bundle has no row of paged_attention_decode(bfloat16-bfloat16+group=2+max_queries=4) with K=128, N=16"
    assert module.absent_rows(miss, []) == wanted
    assert module.absent_rows(miss, [{**row, "K": 64}, {**row, "variant": "other"}, {**row, "op": "other"}]) == wanted
    assert module.absent_rows(miss, [{**row, "N": 8}]) == wanted
    assert module.absent_rows(miss, [row]) is None
    assert module.absent_rows(miss, [{**row, "N": 0}]) is None
    assert module.absent_rows(miss, [{**row, "K": 0}]) is None
    assert module.absent_rows("another error", []) is None

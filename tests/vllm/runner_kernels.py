"""The runner's ops against vLLM's own Triton kernels, interpreted on the CPU; prints failures as JSON. A process of its own."""

from __future__ import annotations

import json
import random
import sys
from types import SimpleNamespace
from typing import Any

import simulation
import torch

PAGE, PAGES, REQUESTS, WORDS = 16, 40, 24, 300


def state(chance: random.Random) -> dict[str, torch.Tensor]:
    """What the runner keeps of its requests."""
    seed = torch.Generator().manual_seed(chance.randint(0, 10**6))
    computed = torch.randint(PAGES * PAGE - 1, (REQUESTS,), generator=seed, dtype=torch.int32)
    computed[:4] = torch.tensor([0, PAGE - 1, PAGE, PAGES * PAGE - 2])  # edges of blocks
    return {
        "computed": computed,
        "last": torch.randint(WORDS, (REQUESTS, 1), generator=seed),
        "total": computed + 1,
        "ids": torch.randint(WORDS, (REQUESTS, PAGES * PAGE), generator=seed, dtype=torch.int32),
        "counts": torch.randint(9, (REQUESTS, WORDS), generator=seed, dtype=torch.int32),
        "source": torch.randperm(REQUESTS * PAGES, generator=seed).to(torch.int32).view(REQUESTS, PAGES),
    }


def inputs(kept: dict[str, torch.Tensor], rows: torch.Tensor) -> None:
    """decode_inputs against the four kernels of vLLM's."""
    from hdispatch import ops
    from vllm.v1.worker.gpu import input_batch
    from vllm.v1.worker.gpu.block_table import BlockTables

    m, most, device = rows.numel(), 64, torch.device("cpu")
    tables = BlockTables([PAGE], REQUESTS, most, [PAGES], device)
    tables.block_tables[0].gpu.copy_(kept["source"])
    tables.num_blocks.np[0] = (kept["computed"] // PAGE + 1).numpy()
    tables.num_blocks.copy_to_uva()
    starts = torch.arange(m + 1, dtype=torch.int32)
    buffers = input_batch.InputBuffers(REQUESTS, most, device)
    prefill = torch.zeros(REQUESTS, dtype=torch.int32)
    input_batch.prepare_pos_seq_lens(rows, starts, kept["computed"], buffers.positions, buffers.seq_lens)
    indices = input_batch.combine_sampled_and_draft_tokens(
        buffers.input_ids, rows, kept["last"], starts, buffers.seq_lens, prefill,
        torch.zeros(REQUESTS, 0, dtype=torch.int64), starts, m,
    )  # fmt: skip
    (table,) = tables.gather_block_tables(rows, num_reqs_padded=m)
    (slots,) = tables.compute_slot_mappings(rows, starts, buffers.positions, num_tokens_padded=m)
    assert indices.tolist() == list(range(m))
    found = [torch.full((m,), 99, dtype=each) for each in (torch.int32, torch.int64, torch.int32, torch.uint8, torch.int64)]
    found.append(torch.zeros(m, PAGES, dtype=torch.int32))
    ops.decode_inputs(*found, rows, kept["computed"], kept["last"].view(-1), kept["source"], PAGE)
    expected = buffers.input_ids, buffers.positions, buffers.seq_lens, buffers.is_padding.to(torch.uint8), slots, table
    for each, known in zip(found, expected, strict=True):
        assert torch.equal(each, known[:m]), (each, known[:m])


def update(kept: dict[str, torch.Tensor], rows: torch.Tensor) -> None:
    """decode_update against post_update, which gets what get_num_sampled_and_rejected says."""
    from hdispatch import ops
    from vllm.v1.worker.gpu import input_batch

    m = rows.numel()
    starts = torch.arange(m + 1, dtype=torch.int32)
    sampled = torch.randint(WORDS, (m, 1))
    lengths = kept["computed"][rows] + 1
    numbers = input_batch.get_num_sampled_and_rejected(
        torch.ones(m, dtype=torch.int32), lengths, starts, rows, torch.zeros(REQUESTS, dtype=torch.int32)
    )
    assert [each.unique().tolist() for each in numbers] == [[1], [0]]
    ours, theirs = ({name: each.clone() for name, each in kept.items()} for _ in range(2))
    input_batch.post_update(
        rows, theirs["computed"], theirs["last"], theirs["counts"], sampled, *numbers, starts, theirs["ids"], theirs["total"]
    )
    of = SimpleNamespace(**ours)
    ops.decode_update(of.computed, of.last.view(-1), of.total, of.ids, of.counts, rows, sampled)
    for name, each in ours.items():
        assert torch.equal(each, theirs[name]), name


def greedy(logits: torch.Tensor) -> None:
    """argmax against vLLM's kernel of Gumbel noise at temperature 0."""
    from hdispatch import ops
    from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

    m = logits.size(0)
    rows, zeros = torch.arange(m), torch.zeros(m)
    expected = gumbel_sample(
        logits, rows, zeros, torch.zeros(m, dtype=torch.int64), rows, apply_temperature=False, is_drafting=False
    )
    found = torch.full((m,), -7)
    ops.argmax(found, logits)
    assert torch.equal(found, expected), (found, expected)


def main() -> None:
    simulation.start()
    chance, failures = random.Random(5), []
    cases: dict[str, Any] = {}
    for m in (1, 2, 7, REQUESTS):
        kept, rows = state(chance), torch.tensor(chance.sample(range(REQUESTS), m))
        cases[f"inputs of {m}"] = (inputs, kept, rows)
        cases[f"update of {m}"] = (update, kept, rows)
    ties = torch.zeros(3, 5000)
    ties[1, 70], ties[2, [4999, 4097]] = 1.0, 2.0
    cases |= {"ties": (greedy, ties), "random": (greedy, torch.randn(5, 3000).bfloat16())}
    for name, (check, *given) in cases.items():
        try:
            check(*given)
        except Exception as error:  # told as a failure
            failures.append(f"{name}: {type(error).__name__}: {error}")
    sys.stdout.write("FAILURES " + json.dumps([sorted(cases), failures]) + "\n")


if __name__ == "__main__":
    main()

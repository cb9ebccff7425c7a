"""What the op benchmark says of a result: comparisons, targets, roofs, verdicts, text, JSON and picture."""

from __future__ import annotations

import math
from pathlib import Path

import hdispatch
import pytest
from hdispatch.errors import HdispatchError
from ops_results import QUANT, eager, pair, result, timing, whole_result

from benchmarks import verdict
from benchmarks.ops import grid, peers, plot, report, verdicts
from benchmarks.ops import result as compared

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_geomean():
    assert compared.geomean([2, 8]) == pytest.approx(4)
    assert compared.geomean([1.5]) == pytest.approx(1.5)


def test_compare_takes_cells_that_both_have():
    timings = [
        *pair(2, 4, m=1),
        *pair(4, 2, m=2),
        timing(peers.OURS, 1, m=4),
        timing(peers.VLLM, 1, m=8),
        *pair(1, 3, peers.COMPILE),
    ]
    found = compared.compare(timings, peers.VLLM)
    assert found.geomean == pytest.approx(1)
    assert [t["m"] for t, _ in found.losses] == [2]
    assert found.worst[1] == 0.5
    assert compared.compare(timings, peers.COMPILE).geomean == pytest.approx(3)
    assert compared.compare(timings[4:5], peers.VLLM) is None


def test_modes_are_never_mixed():
    timings = [timing(peers.OURS, 2, mode="warm"), timing(peers.VLLM, 4, mode="rotated")]
    assert compared.compare(timings, peers.VLLM) is None
    both = result([*pair(1, 2, mode="warm"), *pair(1, 8, mode="rotated")], modes=("warm", "rotated"))
    assert against(both)[f"{QUANT} against torch.ops._C, warm"].measured == pytest.approx(2)


def against(whole: dict) -> dict[str, verdict.Verdict]:
    return {each.text: each for each in verdicts.judge(whole)}


@pytest.mark.parametrize(("theirs", "word"), [(1.42, "pass"), (1.41, "pass"), (1.40, "miss")])
def test_speedup_targets(theirs, word):
    judged = against(result(pair(1, theirs)))
    assert judged[f"{QUANT} against torch.ops._C, warm"].word == word
    assert judged[f"{QUANT} against torch.ops._C, warm"].note == "1 cells"
    assert judged[f"{QUANT} against torch.compile, warm"].word == "not run"


def test_ops_without_a_target_are_shown():
    whole = result(pair(2, 1, op="rms_norm"))
    (line,) = [line.split() for line in report.describe_comparisons(whole).splitlines() if line.startswith("rms_norm ")]
    assert line[1:7] == ["torch.ops._C", "1", "0.50", "0", "1", "0.50"]
    assert not [text for text in against(whole) if text.startswith("rms_norm ")]


def test_targets_are_the_issues():
    speedups = verdict.TARGETS["ops"]["speedups"]
    means = {op: tuple(t.get(peer, {}).get("mean") for peer in (peers.COMPILE, peers.VLLM)) for op, t in speedups.items()}
    assert means == {
        "dynamic_per_token_scaled_fp8_quant": (1.24, 1.41),
        "rms_norm_dynamic_per_token_quant": (1.18, 1.80),
        "silu_and_mul_dynamic_per_token_quant": (1.26, None),
        "fused_qk_norm_rope": (1.38, 1.20),
        "per_token_group_fp8_quant": (1.42, 1.41),
        "rms_norm_per_block_quant": (1.67, 2.06),
        "silu_and_mul_per_block_quant": (1.73, 2.27),
        "scaled_mm": (None, 1.10),
        "scaled_mm_blockwise": (None, 1.10),
        "ll_gemm_bf16": (None, None),
        "ll_gemm_fp8": (None, 1.2),
    }
    assert {peer for each in speedups.values() for peer in each} <= set(peers.PEERS)
    assert set(speedups) <= set(grid.OPS)
    for op, labels in verdict.TARGETS["ops"]["bandwidth"].items():
        calls = hdispatch.registry.spec(op).calls
        assert calls is not None
        assert set(labels) <= set(calls(grid.MODELS[1]))
    streamed = {"lm_head": {"share": 0.95, "ms": [1, 2, 4, 8, 16, 32]}}
    assert verdict.TARGETS["ops"]["bandwidth"]["ll_gemm_bf16"] == streamed
    assert verdict.TARGETS["ops"]["bandwidth"]["ll_gemm_bf16_argmax"] == streamed
    assert verdict.TARGETS["pdl"] == {"speedup": 1.15, "modes": ["graph", "queued"]}


def test_roofs():
    memory = timing(peers.OURS, 10, moved=43 * 10**6 // 2)
    assert compared.roof(memory, 4.3e12) == compared.Roof("memory", pytest.approx(0.5))
    matrix = timing(peers.OURS, 100, moved=1000, flops=int(1979e12 * 80e-6))
    assert compared.roof(matrix, 4.3e12) == compared.Roof("matrix", pytest.approx(0.8))
    assert compared.copy_roof(result()) == 4.3e12
    assert compared.copy_roof(result(gpu="NVIDIA H100 80GB HBM3")) == 4.2e12


def test_roofs_stand_at_the_largest_m_and_for_gemms_at_the_smallest():
    quant = [timing(peers.OURS, 1, m=m, mode="rotated") for m in (1, 16, 8192)]
    gemm = [timing(peers.OURS, 1, op="scaled_mm", label="qkv", m=m, mode="rotated") for m in (1, 16, 8192)]
    found = compared.roof_timings(result([*quant, *gemm, timing(peers.OURS, 1, m=8192)]))
    assert [(op, m, len(each)) for (op, _, m), each in found.items()] == [
        (QUANT, 8192, 1),
        ("scaled_mm", 1, 1),
        ("scaled_mm", 8192, 1),
    ]


def test_gemms_at_one_row():
    def gemm(us, **given):
        return timing(peers.OURS, us, moved=43 * 10**6, op="scaled_mm", m=1, mode="rotated", **given)

    judged = against(result([gemm(12.5, label="qkv"), gemm(14, label="out"), gemm(1, label="qkv", model="Qwen3-32B")]))
    found = {text: (each.word, each.measured and round(each.measured, 3)) for text, each in judged.items() if each.share}
    assert found["scaled_mm, 8B qkv M=1: of the copy bandwidth"] == ("pass", 0.8)
    assert found["scaled_mm, 8B out M=1: of the copy bandwidth"] == ("miss", 0.714)
    assert found["scaled_mm_blockwise, 8B qkv M=1: of the copy bandwidth"] == ("not run", None)


def test_eager_is_judged_by_the_slower_door():
    rows = [eager(peers.OURS, 2), eager(peers.OURS_TORCH, 4), eager(peers.VLLM, 8)]
    judged = against(result(eager=rows))[f"{QUANT}, eager, M=16"]
    assert (judged.measured, judged.word) == (pytest.approx(2), "pass")
    rows += [eager(peers.OURS, 8, "wide"), eager(peers.VLLM, 8, "wide")]
    judged = against(result(eager=rows))[f"{QUANT}, eager, M=16"]
    assert (judged.measured, judged.word) == (pytest.approx(math.sqrt(2)), "miss")
    assert judged.note == "2 shapes, worst 1.00 (wide)"
    assert against(result())["every op, eager, M=16"].word == "not run"


def test_one_miss_is_a_miss():
    def hits(whole):
        return against(whole)["calls served by the table"]

    assert hits(result()).word == "pass"
    stats = {QUANT: {"hits": 10**6, "empty": 0, "fallbacks": 1, "misses": {"no row": 1}}}
    assert hits(result(stats=stats)).word == "miss"
    assert hits(result(stats=stats)).note == f"1000000 hits, 1 misses, 1 fallbacks; {QUANT}: no row: 1"
    assert hits(result(stats={})).word == "not run"
    assert verdict.verdict_table([hits(result(stats=stats))]).splitlines()[1].split()[5:12] == (
        ["≥", "100", "%", "100.000", "%", "miss", "1000000"]
    )


def test_the_report_says_everything():
    text = report.describe(whole_result())
    for part in (
        "NVIDIA H200, driver 580",
        "revision abcdef012345+changes",
        "copy bandwidth of this machine 4.20 TB/s; the memory roof stands at 4.30 TB/s",
        "warm buffers (the same in every launch); M = 1, 2, 4 … 8192",
        "torch.compile took part in 1 of 2 cells, M = 1",
        "rms_norm_per_block_quant",  # has a target, and did not run
        "scaled_mm, 8B qkv M=1: of the copy bandwidth",
        "called from Python, M = 16",
        "calls served by the table",
        f"  {QUANT} against torch.ops._C, 8B hidden: M=8192 0.50",
        "  scaled_mm against CUTLASS, 8B qkv: M=1 0.93, M=8192 0.93",
        "3 warm cells: --seconds 60 had passed",
        f"{QUANT}, torch.compile, 8B hidden M=16 and 1 more: it broke",
    ):
        assert part in text, part
    lines = {line.split()[0]: line for line in text.splitlines() if line}
    assert "≥ 1.41" in text
    assert "78 %" in lines[QUANT] or "78 %" in text
    assert max(map(len, text.splitlines())) < 200


def test_a_report_of_nothing():
    text = report.describe(result())
    assert "cells in which a peer is faster: none" in text
    assert "not run" in text


def test_variants_are_named_where_there_are_several():
    op = "rms_norm_dynamic_per_token_quant"
    timings = [{**each, "variant": v} for v in ("bfloat16", "bfloat16+residual") for each in pair(1, 2, op=op)]
    names = against(result(timings))
    assert f"{op} (bfloat16) against torch.ops._C, warm" in names
    assert f"{op} (bfloat16+residual) against torch.ops._C, warm" in names


def test_json_is_read_as_it_was_written(tmp_path):
    file = tmp_path / "ops.json"
    verdict.write_json({**whole_result(), "targets": []}, file)
    assert compared.read_json(file) == whole_result()
    file.write_text("{}")
    with pytest.raises(HdispatchError, match="is not a result of bench ops"):
        compared.read_json(file)


@pytest.mark.parametrize("name", ["ops", "ll_gemm_bf16"])
def test_committed_results_can_be_shown(name):
    whole = compared.read_json(RESULTS / "2026-11-21-h200-ops" / f"{name}.json")
    assert not [each for each in verdicts.judge(whole) if each.word == "miss"]
    assert "geomean" in report.describe(whole)


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    plot.draw(whole_result(), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(HdispatchError, match="nothing was measured"):
        plot.draw(result(), tmp_path / "x.png")
    with pytest.raises(HdispatchError, match="cannot write"):
        plot.draw(whole_result(), tmp_path / "x.nonsense")

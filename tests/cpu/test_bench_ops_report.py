"""What the op benchmark says of a result: comparisons, targets, roofs, verdicts, text, JSON and picture."""

from __future__ import annotations

import json
import math

import pytest
from hdispatch.bench import ops_compare, ops_plot, ops_report, peers
from hdispatch.cli import bench_ops_text
from hdispatch.errors import HdispatchError
from op_results import QUANT, eager, pair, result, timing, whole_result


def test_geomean():
    assert ops_compare.geomean([2, 8]) == pytest.approx(4)
    assert ops_compare.geomean([1.5]) == pytest.approx(1.5)


def test_compare_takes_cells_that_both_have():
    timings = [
        *pair(2, 4, m=1),
        *pair(4, 2, m=2),
        timing(peers.OURS, 1, m=4),
        timing(peers.VLLM, 1, m=8),
        *pair(1, 3, peers.COMPILE),
    ]
    found = ops_compare.compare(timings, peers.VLLM)
    assert found.geomean == pytest.approx(1)
    assert [t["m"] for t, _ in found.losses] == [2]
    assert found.worst[1] == 0.5
    assert ops_compare.compare(timings, peers.COMPILE).geomean == pytest.approx(3)
    assert ops_compare.compare(timings[4:5], peers.VLLM) is None


def test_modes_are_never_mixed():
    timings = [timing(peers.OURS, 2, mode="warm"), timing(peers.VLLM, 4, mode="rotated")]
    assert ops_compare.compare(timings, peers.VLLM) is None
    both = result([*pair(1, 2, mode="warm"), *pair(1, 8, mode="rotated")], modes=("warm", "rotated"))
    judged = dict(ops_report.judge_speedups(both))[QUANT]
    assert judged[peers.VLLM].measured == pytest.approx(2)


@pytest.mark.parametrize(("theirs", "verdict"), [(1.42, "pass"), (1.41, "pass"), (1.40, "miss")])
def test_speedup_targets(theirs, verdict):
    judged = dict(ops_report.judge_speedups(result(pair(1, theirs))))[QUANT]
    assert judged[peers.VLLM].verdict == verdict
    assert judged[peers.COMPILE].verdict == "not run"
    assert judged[peers.VLLM].note == "1 cells"


def test_ops_without_a_target_are_shown():
    text = bench_ops_text.describe_targets(result(pair(2, 1, op="rms_norm")))
    assert [line.split()[1:] for line in text.splitlines() if line.startswith("rms_norm ")] == [
        ["–", "–", "0.50", "×", "slower"]
    ]
    assert not [j for j in ops_report.judge(result(pair(2, 1, op="rms_norm"))) if j.text.startswith("rms_norm ")]


def test_targets_are_the_issues():
    wanted = {op: tuple(t.get(peer) for peer in ops_report.COLUMNS) for op, t in ops_report.SPEEDUPS.items()}
    assert wanted == {
        "dynamic_per_token_scaled_fp8_quant": (1.24, 1.41),
        "rms_norm_dynamic_per_token_quant": (1.18, 1.80),
        "silu_and_mul_dynamic_per_token_quant": (1.26, None),
        "fused_qk_norm_rope": (1.38, 1.20),
        "per_token_group_fp8_quant": (1.42, 1.41),
        "rms_norm_per_block_quant": (1.67, 2.06),
        "silu_and_mul_per_block_quant": (1.73, 2.27),
        "scaled_mm": (None, 1.08),
        "scaled_mm_blockwise": (None, 1.00),
    }


def test_roofs():
    memory = timing(peers.OURS, 10, moved=43 * 10**6 // 2)
    assert ops_compare.roof(memory, 4.3e12) == ops_compare.Roof("memory", pytest.approx(0.5))
    matrix = timing(peers.OURS, 100, moved=1000, flops=int(1979e12 * 80e-6))
    assert ops_compare.roof(matrix, 4.3e12) == ops_compare.Roof("matrix", pytest.approx(0.8))
    assert ops_compare.copy_roof(result()) == 4.3e12
    assert ops_compare.copy_roof(result(gpu="NVIDIA H100 80GB HBM3")) == 4.2e12


def test_roofs_stand_at_the_largest_m_and_for_gemms_at_the_smallest():
    quant = [timing(peers.OURS, 1, m=m, mode="rotated") for m in (1, 16, 8192)]
    gemm = [timing(peers.OURS, 1, op="scaled_mm", label="qkv", m=m, mode="rotated") for m in (1, 16, 8192)]
    found = ops_compare.roof_timings(result([*quant, *gemm, timing(peers.OURS, 1, m=8192)]))
    assert [(op, m, len(each)) for (op, _, m), each in found.items()] == [
        (QUANT, 8192, 1),
        ("scaled_mm", 1, 1),
        ("scaled_mm", 8192, 1),
    ]


def test_gemms_at_one_row():
    def gemm(us, **given):
        return timing(peers.OURS, us, moved=43 * 10**6, op="scaled_mm", m=1, mode="rotated", **given)

    judged = ops_report.judge_gemms(
        result([gemm(12.5, label="qkv"), gemm(14, label="out"), gemm(1, label="qkv", model="Qwen3-32B")])
    )
    assert [(j.verdict, j.measured and round(j.measured, 3)) for j in judged] == [
        ("pass", 0.8),
        ("miss", 0.714),
        ("not run", None),
    ]
    assert judged[0].text == "scaled_mm, 8B qkv M=1: of the copy bandwidth"
    assert judged[2].text.startswith("scaled_mm_blockwise")


def test_eager_is_judged_by_the_slower_door():
    rows = [eager(peers.OURS, 2), eager(peers.OURS_TORCH, 4), eager(peers.VLLM, 8)]
    (judged,) = ops_report.judge_eager(result(eager=rows))
    assert (judged.measured, judged.verdict) == (pytest.approx(2), "pass")
    rows += [eager(peers.OURS, 8, "wide"), eager(peers.VLLM, 8, "wide")]
    (judged,) = ops_report.judge_eager(result(eager=rows))
    assert (judged.measured, judged.verdict) == (pytest.approx(math.sqrt(2)), "miss")
    assert judged.note == "2 shapes, worst 1.00 (wide)"
    assert ops_report.judge_eager(result())[0].verdict == "not run"


def test_one_miss_is_a_miss():
    assert ops_report.judge_hits(result()).verdict == "pass"
    stats = {QUANT: {"hits": 10**6, "empty": 0, "fallbacks": 1, "misses": {"no row": 1}}}
    assert ops_report.judge_hits(result(stats=stats)).verdict == "miss"
    assert ops_report.judge_hits(result(stats={})).verdict == "not run"


def test_the_report_says_everything():
    text = bench_ops_text.describe(whole_result())
    for part in (
        "NVIDIA H200, driver 580",
        "revision abcdef012345+changes",
        "copy bandwidth of this machine 4.20 TB/s; the memory roof stands at 4.30 TB/s",
        "warm buffers (the same in every launch, as in the post); M = 1, 2, 4 … 8192",
        "torch.compile took part in 1 of 2 cells, M = 1",
        "rms_norm_per_block_quant",  # has a target, and did not run
        "scaled_mm, 8B qkv M=1: of the copy bandwidth",
        "the slower of the two doors",
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
    text = bench_ops_text.describe(result())
    assert "cells in which a peer is faster: none" in text
    assert "not run" in text


def test_variants_are_named_where_there_are_several():
    op = "rms_norm_dynamic_per_token_quant"
    timings = [{**each, "variant": v} for v in ("bfloat16", "bfloat16+residual") for each in pair(1, 2, op=op)]
    names = [name for name, _ in ops_report.judge_speedups(result(timings))]
    assert f"{op} (bfloat16)" in names
    assert f"{op} (bfloat16+residual)" in names


def test_json_is_read_as_it_was_written(tmp_path):
    file = tmp_path / "ops.json"
    ops_report.write_json(whole_result(), file)
    assert ops_report.read_json(file) == whole_result()
    targets = json.loads(file.read_text())["targets"]
    assert {each["verdict"] for each in targets} == {"pass", "miss", "not run"}
    file.write_text("{}")
    with pytest.raises(HdispatchError, match="is not a result of bench ops"):
        ops_report.read_json(file)


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    ops_plot.draw(whole_result(), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(HdispatchError, match="nothing was measured"):
        ops_plot.draw(result(), tmp_path / "x.png")
    with pytest.raises(HdispatchError, match="cannot write"):
        ops_plot.draw(whole_result(), tmp_path / "x.nonsense")

"""The op benchmark's GEMMs of a few tokens without a GPU: their cells, what their peers are given, targets, vLLM's library."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import hdispatch
import pytest
import torch
from ops_results import QUANT, eager, pair, result, timing
from ops_results import sample_few as sample

from benchmarks.ops import grid, peers, plot, report, verdicts, vllm_ll
from benchmarks.ops import run as ops
from benchmarks.ops import timing as ops_timing

CPU = torch.device("cpu")
BF16, FP8 = "ll_gemm_bf16", "ll_gemm_fp8"
MODELS = grid.model_names(None)


# ---- cells ----


def test_cells_are_the_routers_and_one_models_projections():
    spec = hdispatch.registry.spec(BF16)
    found = grid.cells([spec], grid.MS, ("warm",), MODELS, ["default"])
    assert {(each["K"], each["N"]) for each in found} == {(7168, 256), (4096, 128), (2048, 64), (5120, 160)}
    assert {each["model"] for each in found} == {"other"}
    assert {each["label"] for each in found} >= {"K=7168, N=256"}
    found = grid.cells([hdispatch.registry.spec(FP8)], (1,), ("warm",), MODELS, ["default"])
    labels = {each["label"]: (each["model"], each["K"], each["N"]) for each in found}
    assert labels == {
        "qkv": ("Qwen3-8B", 4096, 6144),
        "out": ("Qwen3-8B", 4096, 4096),
        "gate_up": ("Qwen3-8B", 4096, 24576),
        "down": ("Qwen3-8B", 12288, 4096),
    }


@pytest.mark.parametrize("op", grid.LOW_LATENCY)
def test_only_few_tokens_are_measured(op):
    specs = [hdispatch.registry.spec(op)]
    for found in (
        grid.cells(specs, grid.MS, ("warm",), MODELS, ["default"]),
        grid.roof_cells(specs, grid.MS, MODELS, ["default"]),
    ):
        assert max(each["m"] for each in found) == 32
    assert not grid.roof_cells(specs, (64, 8192), MODELS, ["default"])


def test_weights_that_no_server_finds_in_l2_are_rotated_at_every_m():
    found = grid.roof_cells([hdispatch.registry.spec(FP8)], grid.MS, MODELS, ["default"])
    assert {each["m"] for each in found} == {1, 2, 4, 8, 16, 32}
    assert {each["mode"] for each in found} == {"rotated"}
    assert len(found) == 6 * 4


@pytest.mark.parametrize("op", [BF16, grid.WITH_ARGMAX])
def test_lm_head_is_measured_on_rotated_buffers_alone_at_every_m(op):
    spec = hdispatch.registry.spec(op)
    found = [each for each in grid.roof_cells([spec], grid.MS, MODELS, ["default"]) if each["label"] == "lm_head"]
    eight = [each for each in found if each["model"] == "Qwen3-8B"]
    assert [(each["m"], each["K"], each["N"]) for each in eight] == [(m, 4096, 151936) for m in (1, 2, 4, 8, 16, 32)]
    assert {each["mode"] for each in found} == {"rotated"}
    assert not [each for each in grid.cells([spec], grid.MS, ("warm",), MODELS, ["default"]) if each["label"] == "lm_head"]
    both = grid.cells([spec], grid.MS, ("warm", "rotated"), MODELS, ["default"])
    assert [each for each in both if each["label"] == "lm_head" and each["model"] == "Qwen3-8B"] != []
    assert all(each["mode"] == "rotated" for each in both if each["label"] == "lm_head")
    assert not any(map(ops.is_called_eagerly, found))


def test_models_may_be_none_of_them():
    assert grid.model_names(["8B", "other"]) == ["Qwen3-8B", "other"]


def test_bytes_are_the_weights_and_little_else():
    assert grid.call_bytes(hdispatch.registry.spec(FP8), sample(FP8), 3) == 32 * 64 + 3 * 64 + 3 * 32 * 2 + (3 + 32) * 4
    assert grid.call_bytes(hdispatch.registry.spec(BF16), sample(BF16), 3) == 2 * (32 * 64 + 3 * 64 + 3 * 32)


# ---- peers ----


def bind_cutlass(monkeypatch, arguments: list[torch.Tensor]) -> tuple:
    packet = SimpleNamespace(default=SimpleNamespace(_schema=SimpleNamespace(arguments=[None] * 6)))
    monkeypatch.setattr(torch.ops, "_C", SimpleNamespace(cutlass_scaled_mm=packet))
    call, given = peers.bind_vllm(FP8, arguments)
    assert call is packet
    return given


@pytest.mark.parametrize("m", [1, 3])
def test_cutlass_is_given_columns_and_scales_that_broadcast(monkeypatch, m: int):
    arguments = sample(FP8, m)
    out, a, b, a_scales, b_scales, bias = bind_cutlass(monkeypatch, arguments)
    assert (out.data_ptr(), a.data_ptr(), b.data_ptr()) == tuple(each.data_ptr() for each in arguments[:3])
    assert (b.shape, b.stride()) == ((64, 32), (1, 64))
    assert (a_scales.shape, b_scales.shape, bias) == ((m, 1), (1, 32), None)
    assert a_scales.is_contiguous()
    assert b_scales.is_contiguous()
    hdispatch.registry.spec(FP8).reference(*arguments)
    torch.testing.assert_close(((a.float() @ b.float()) * a_scales * b_scales).to(out.dtype), out, rtol=2e-2, atol=0)


def test_one_scale_for_all_stays_one(monkeypatch):
    out, x, w, _, _ = sample(FP8)
    given = bind_cutlass(monkeypatch, [out, x, w, torch.ones(1), torch.ones(1)])
    assert (given[3].shape, given[4].shape) == ((1, 1), (1, 1))


def test_torch_mm_writes_what_the_op_writes():
    arguments = sample(BF16)
    call, given = peers.bind_torch_mm(BF16, arguments)
    call(*given)
    want = torch.empty_like(arguments[0])
    hdispatch.registry.spec(BF16).reference(want, *arguments[1:])
    torch.testing.assert_close(arguments[0], want, rtol=1e-2, atol=1e-2)
    assert given[1].data_ptr() == arguments[2].data_ptr(), "a view: nothing is copied"
    wide = sample(BF16, variant="float32")
    assert peers.bind_torch_mm(BF16, wide)[0].keywords == {"out": wide[0], "out_dtype": torch.float32}
    assert peers.bind_torch_mm(FP8, []) is None
    assert peers.bind_torch_mm("rms_norm", []) is None


def test_torch_mm_and_argmax_are_a_peer_of_both_in_one():
    arguments = sample(grid.WITH_ARGMAX)
    call, given = peers.bind_torch_mm_argmax(grid.WITH_ARGMAX, arguments)
    call(*given)
    want = torch.full((3,), -7)
    hdispatch.registry.spec(grid.WITH_ARGMAX).reference(want, *arguments[1:])
    assert torch.equal(arguments[0], want)
    assert peers.bind_torch_mm_argmax(BF16, []) is None
    assert peers.bind_torch_mm(grid.WITH_ARGMAX, []) is None
    assert peers.TORCH_MM_ARGMAX in peers.PEERS


def test_vllms_functions_for_routers_are_no_peers_of_lm_head():
    class Opened(vllm_ll.Library):
        def __init__(self):
            pass

        def _bind(self, *_):
            return print, ()

    out, x, w = sample(BF16)
    many = w[:1].expand(vllm_ll.MOST_N + 1, 64)
    for bind in (Opened().bind_ll_bf16, Opened().bind_skinny):
        assert bind(BF16, [out, x, w]) == (print, ())
        assert bind(BF16, [out, x, many]) is None


# ---- the report ----


def routers(ours: float, theirs: float, peer: str = peers.TORCH_MM, **given) -> list[dict]:
    return pair(ours, theirs, peer, **({"op": BF16, "model": "other", "label": "K=7168, N=256"} | given))


def projections(ours: float, theirs: float, **given) -> list[dict]:
    return pair(ours, theirs, **({"op": FP8, "label": "qkv", "mode": "rotated"} | given))


def judged(*timings: dict) -> dict[str, tuple]:
    """By text: target, what was measured, verdict."""
    found = [each for each in verdicts.judge(result(timings)) if each.text.startswith("ll_gemm") and not each.share]
    return {each.text: (each.wanted, each.measured and round(each.measured, 3), each.word) for each in found}


def test_targets_are_the_issues():
    assert judged() == {
        "ll_gemm_bf16 against torch.mm, warm, M ≤ 16": (1.3, None, "not run"),
        "ll_gemm_bf16 against torch.mm, warm, M ≤ 16, every cell": (1.0, None, "not run"),
        "ll_gemm_bf16 against vLLM ll_bf16_gemm, warm, M ≤ 16": (1.0, None, "not run"),
        "ll_gemm_bf16 against vLLM ll_bf16_gemm, warm, M ≤ 16, every cell": (1.0, None, "not run"),
        "ll_gemm_bf16 against vLLM skinny_gemm, warm, M ≤ 16": (1.0, None, "not run"),
        "ll_gemm_bf16 against vLLM skinny_gemm, warm, M ≤ 16, every cell": (1.0, None, "not run"),
        "ll_gemm_fp8 against CUTLASS, rotated, M ≤ 16": (1.2, None, "not run"),
    }


def test_a_cell_below_one_is_a_miss_however_good_the_mean():
    found = judged(*routers(1, 4, m=1), *routers(1, 0.99, m=8), *routers(1, 0.5, m=32))
    assert found["ll_gemm_bf16 against torch.mm, warm, M ≤ 16"] == (1.3, 1.99, "pass")
    assert found["ll_gemm_bf16 against torch.mm, warm, M ≤ 16, every cell"] == (1.0, 0.99, "miss")
    found = judged(*routers(1, 1.2, m=1), *routers(1, 1.2, m=8))
    assert [verdict for _, _, verdict in found.values()][:2] == ["miss", "pass"]
    text = report.describe(result([*routers(1, 4, m=1), *routers(1, 0.99, m=8), *routers(1, 0.5, m=32)]))
    (line,) = [line for line in text.splitlines() if "torch.mm, warm, M ≤ 16, every cell" in line]
    assert line.split()[-10:] == ["0.99", "×", "miss", "other", "K=7168,", "N=256", "M=8;", "1", "cells", "below"]
    assert "ll_gemm_bf16 against torch.mm, other K=7168, N=256: M=8 0.99, M=32 0.50" in text


def test_vllm_must_not_be_faster_anywhere():
    found = judged(*routers(1, 1.5, peers.LL_BF16), *routers(2, 2, peers.SKINNY, m=4))
    assert found["ll_gemm_bf16 against vLLM ll_bf16_gemm, warm, M ≤ 16, every cell"] == (1.0, 1.5, "pass")
    assert found["ll_gemm_bf16 against vLLM skinny_gemm, warm, M ≤ 16"] == (1.0, 1.0, "pass")


def test_fp8_is_judged_on_rotated_buffers():
    found = judged(*projections(1, 2, mode="warm"), *projections(1, 1.21), *projections(1, 0.1, m=32))
    assert found["ll_gemm_fp8 against CUTLASS, rotated, M ≤ 16"] == (1.2, 1.21, "pass")
    assert judged(*projections(1, 1.19))["ll_gemm_fp8 against CUTLASS, rotated, M ≤ 16"][2] == "miss"
    text = report.describe(result([*projections(1, 1.21), *projections(1, 0.1, m=32)]))
    assert "speedups by op, rotated buffers" in text
    assert "ll_gemm_fp8 against CUTLASS, 8B qkv: M=32 0.10" in text


def test_variants_are_judged_apart():
    wide = [{**each, "variant": "float32"} for each in routers(1, 1.1)]
    found = judged(*routers(1, 2), *wide)
    assert found["ll_gemm_bf16 (bfloat16) against torch.mm, warm, M ≤ 16"] == (1.3, 2.0, "pass")
    assert found["ll_gemm_bf16 (float32) against torch.mm, warm, M ≤ 16"] == (1.3, 1.1, "miss")


def test_bandwidth_at_one_row():
    def at(us: float, label: str, m: int = 1, **given) -> dict:
        return timing(peers.OURS, us, moved=43 * 10**6, op=FP8, m=m, mode="rotated", label=label, **given)

    def found(*timings: dict) -> dict:
        judged = [each for each in verdicts.judge(result(timings)) if each.share and each.text.startswith(FP8)]
        return {each.text: (each.wanted, each.measured and round(each.measured, 2), each.word) for each in judged}

    gate_up, down = (f"ll_gemm_fp8, 8B {label} M=1: of the copy bandwidth" for label in ("gate_up", "down"))
    assert found(at(12.4, "gate_up"), at(13, "down"), at(20, "qkv"), at(5, "down", m=32)) == {
        gate_up: (0.8, 0.81, "pass"),
        down: (0.8, 0.77, "miss"),
    }
    assert found() == {gate_up: (0.8, None, "not run"), down: (0.8, None, "not run")}


@pytest.mark.parametrize("op", [BF16, grid.WITH_ARGMAX])
def test_bandwidth_of_lm_head_at_every_m(op):
    def at(us: float, m: int, **given) -> dict:
        return timing(peers.OURS, us, moved=43 * 10**6, op=op, m=m, mode="rotated", **({"label": "lm_head"} | given))

    def found(*timings: dict) -> dict:
        judged = [each for each in verdicts.judge(result(timings)) if each.share and each.text.startswith(f"{op},")]
        return {each.text: (each.wanted, each.measured and round(each.measured, 3), each.word) for each in judged}

    names = {m: f"{op}, 8B lm_head M={m}: of the copy bandwidth" for m in (1, 2, 4, 8, 16, 32)}
    assert found() == dict.fromkeys(names.values(), (0.95, None, "not run"))
    judged = found(*(at(10.5, m) for m in (1, 2, 4)), at(10.6, 8), at(1, 16, model="Qwen3-32B"), at(1, 16, label="qkv"))
    assert [judged[names[m]] for m in (1, 2, 4)] == [(0.95, 0.952, "pass")] * 3
    assert judged[names[8]] == (0.95, 0.943, "miss")
    assert judged[names[16]] == judged[names[32]] == (0.95, None, "not run")


def test_lm_head_is_not_among_the_routers_that_are_compared():
    head = pair(1, 0.5, peers.TORCH_MM, op=BF16, label="lm_head", m=1, mode="rotated")
    found = judged(*routers(1, 4, m=1), *head)
    assert found["ll_gemm_bf16 against torch.mm, warm, M ≤ 16, every cell"] == (1.0, 4.0, "pass")
    alone = verdicts.judge(result([*routers(1, 4, m=1, mode="rotated"), *head], modes=("rotated",)))
    (verdict,) = [each for each in alone if each.text == "ll_gemm_bf16 against torch.mm, rotated, M ≤ 16, every cell"]
    assert verdict.measured == 4.0
    text = report.describe(result([*routers(1, 4, m=1), *routers(1, 3, m=1, mode="rotated"), *head]))
    assert "ll_gemm_bf16 against torch.mm, rotated, 8B lm_head: M=1 0.50" in text
    assert "speedups by op, rotated buffers" in text
    (line,) = [
        line.split()
        for line in report.describe_comparisons(result([*routers(1, 3, m=1, mode="rotated"), *head])).splitlines()
        if line.startswith(BF16)
    ]
    assert line[1:4] == ["torch.mm", "1", "0.50"], "the routers' rotated cells are roofs"


def test_calls_from_python_are_shown_but_not_judged():
    label = "K=7168, N=256"
    own = [eager(peers.OURS, 2, label, BF16), eager(peers.OURS_TORCH, 2.5, label, BF16), eager(peers.TORCH_MM, 3, label, BF16)]
    whole = result(eager=[*own, eager(peers.OURS, 2), eager(peers.OURS_TORCH, 2), eager(peers.VLLM, 8)])
    judged = [each for each in verdicts.judge(whole) if "eager" in each.text]
    assert [(each.wanted, round(each.measured, 2)) for each in judged] == [(1.5, 4.0)]
    lines = [line.split() for line in report.describe_eager(whole).splitlines() if line.startswith(BF16)]
    assert lines == [[BF16, "K=7168,", "N=256", "2.00", "2.50", "3.00"]]
    alone = [each for each in verdicts.judge(result(eager=own)) if "eager" in each.text]
    assert [(each.wanted, each.word) for each in alone] == [(1.5, "not run")]


def test_plot_has_every_peer(tmp_path):
    pytest.importorskip("matplotlib")
    whole = result([*routers(1, 2, m=1), *routers(1, 2, m=2), timing(peers.SKINNY, 3, op=BF16, model="other", m=1)])
    plot.draw(whole, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size


# ---- a run ----


def run(monkeypatch, tmp_path, names: list[str], **options) -> tuple[dict, dict[str, set[str]]]:
    """A run on no GPU of a bundle with these ops: its result, and by op the paths that took part."""
    took_part: dict[str, set[str]] = {}

    def measure(each, binders, *_):
        m, k, n = each["m"], 64, 32
        bound = {path for path, bind in binders.items() if bind(each["op"], sample(each["op"], m, k, n)) is not None}
        took_part.setdefault(each["op"], set()).update(bound)
        return ops_timing.Measured([{**timing(path, 2), **each} for path in sorted(bound)])

    manifest = {"ops": dict.fromkeys(names), "target": {"name": "h200"}, "records": [], "tools": {}}
    bundle = SimpleNamespace(manifest=manifest, rows=7, unload=lambda: None)
    monkeypatch.setattr(ops, "require_gpu", lambda: CPU)
    monkeypatch.setattr(ops.machine, "describe", lambda _: result()["machine"])
    monkeypatch.setattr(ops.runtime, "load", lambda *_, **__: bundle)
    monkeypatch.setattr(ops, "copy_bandwidth", lambda _: 4e12)
    monkeypatch.setattr(ops, "measure", measure)
    given = ops.Options(tmp_path, ms=(1, 16, 8192), compile_ms=(), eager=False)
    return ops.run(replace(given, **options)), took_part


def test_a_run_measures_them_beside_their_own_peers(monkeypatch, tmp_path):
    class Opened(vllm_ll.Library):
        def __init__(self, path):
            assert path == tmp_path / "ll.so"

        def _bind(self, *_):
            return print, ()

    monkeypatch.setattr(ops, "Library", Opened)
    found, took_part = run(monkeypatch, tmp_path, [QUANT, BF16, FP8], vllm_ll=tmp_path / "ll.so")
    assert took_part == {
        QUANT: {peers.OURS},
        BF16: {peers.OURS, peers.TORCH_MM, peers.LL_BF16, peers.SKINNY},
        FP8: {peers.OURS},
    }
    assert {each["m"] for each in found["timings"] if each["op"] != QUANT} == {1, 16}
    assert {each["m"] for each in found["timings"] if each["op"] == FP8 and each["mode"] == "rotated"} == {1, 16}
    assert found["machine"]["vllm_ll"] == "ll.so"
    assert list(found["skipped"]) == [peers.VLLM, peers.COMPILE]
    report.describe(found)


def test_what_is_not_there_is_named(monkeypatch, tmp_path):
    found, _ = run(monkeypatch, tmp_path, [QUANT])
    assert found["skipped"]["ll_gemm_bf16, ll_gemm_fp8"].startswith("not in the bundle; one built with the CuteDSL has them")
    assert "ll_gemm_bf16, ll_gemm_fp8: not in the bundle" in report.describe(found)
    assert "vLLM" not in " ".join(found["skipped"])
    found, took_part = run(monkeypatch, tmp_path, [QUANT, BF16])
    assert found["skipped"]["ll_gemm_fp8"].startswith("not in the bundle")
    assert "--make-vllm-ll" in found["skipped"]["vLLM ll_bf16_gemm, vLLM skinny_gemm"]
    assert took_part[BF16] == {peers.OURS, peers.TORCH_MM}
    found, _ = run(monkeypatch, tmp_path, [QUANT], ops=(QUANT,))
    assert not [name for name in found["skipped"] if name.startswith("ll_gemm")]


def test_eager_has_the_routers_and_cublas(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(ops, "EAGER_BATCHES", 1)
    monkeypatch.setattr(ops, "EAGER_CALLS", 1)
    monkeypatch.setattr(ops, "WARM_CALLS", 1)
    monkeypatch.setattr(ops.runtime, "strict", lambda: hdispatch.strict(False))
    found, _ = run(monkeypatch, tmp_path, [QUANT, BF16], eager=True, ms=(1,), models=("8B", "other"))
    doors = {each["path"] for each in found["eager"] if each["op"] == BF16}
    assert doors == {peers.OURS, peers.OURS_TORCH, peers.TORCH_MM}
    assert {each["m"] for each in found["eager"]} == {16}
    assert len({each["label"] for each in found["eager"] if each["op"] == BF16}) == 4

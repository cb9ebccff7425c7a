"""`hdispatch bench serve` without vLLM: processes that answer, fail or hang; how errors of logits are compared and judged."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from hdispatch import HdispatchError
from hdispatch.bench import serve, serve_accuracy, serve_plot, serve_targets
from hdispatch.bench.serve_accuracy import compare, compare_steps
from hdispatch.bench.serve_worker import EngineOptions, environment
from hdispatch.cli import bench_serve
from hdispatch.cli.main import main

#: A process that answers as serve_worker does; FAULT says what goes wrong, and at which request.
WORKER = """
import json, sys, time
setup = json.loads(sys.stdin.readline())
print("log of", setup["mode"], file=sys.stderr, flush=True)
started = dict(import_s=1, init_s=2, load_s=0, weights_bytes=100, kv_bytes=50, device_bytes=300, allocated_bytes=200,
               reserved_bytes=250, peak_bytes=220, gpu="none")
fault, at = FAULT
if setup["mode"] == fault and at == "start":
    sys.exit("no start")
print(json.dumps(started), flush=True)
for n, line in enumerate(sys.stdin):
    request = json.loads(line)
    what = request["do"]
    if setup["mode"] == fault and at == what:
        sys.exit("gone")
    if setup["mode"] == fault and at == "hang":
        time.sleep(60)
    if setup["mode"] == fault and at == "error":
        print(json.dumps({"error": "ValueError: no"}), flush=True)
        continue
    if what == "logits":
        answer = {"relative": [[0.01] * request["steps"]] * request["requests"]}
        answer["kl"] = answer["relative"]
    elif what == "finish":
        answer = dict(peak_bytes=230, reserved_bytes=260, hits=7, misses={})
    else:
        answer = {"ms": 1.0 + n}
    print(json.dumps(answer), flush=True)
"""


def measure(tmp_path, fault, at, limit_s=20.0, layers=None):
    command = (sys.executable, "-c", WORKER.replace("FAULT", repr((fault, at))))
    options = serve.ServeOptions(
        "tiny-qwen3", "token", ("eager", "ours"), tmp_path, (1, 4), 2, 2, steps=3, logs=tmp_path, limit_s=limit_s, layers=layers
    )
    return serve.measure(options, {"gpu": "none"}, lambda *_: None, command)


def test_a_run(tmp_path):
    result = measure(tmp_path, None, None)
    assert set(result["modes"]) == {"eager", "ours"}
    assert result["failed"] == {}
    # The first of three turns warms up; the median of the others counts.
    assert result["modes"]["ours"]["batches"] == {"1": 2.5, "4": 5.5}
    assert list(result["modes"]["eager"]["prefills"]) == ["1x128", "1x1024", "4x1024"]
    assert (tmp_path / "eager.log").read_text() == "log of eager\n"
    text = bench_serve.describe(result)
    assert "1.0000 ± 0.0000" in text
    assert bench_serve.judge(result) == []


def test_a_run_of_a_part_of_the_layers_says_so(tmp_path):
    whole = measure(tmp_path, None, None)
    part = measure(tmp_path, None, None, layers=1)
    assert (whole["layers"], part["layers"]) == (None, 1)
    assert bench_serve.describe(whole).startswith("tiny-qwen3, token, 1 GPU(s)")
    assert bench_serve.describe(part).startswith("tiny-qwen3, 1 of its layers, token, 1 GPU(s)")


def test_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    result = measure(tmp_path, None, None)
    serve_plot.draw(result, tmp_path / "serve.png")
    assert (tmp_path / "serve.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(HdispatchError, match="cannot write"):
        serve_plot.draw(result, tmp_path / "none" / "serve.png")
    with pytest.raises(HdispatchError, match="nothing was measured"):
        serve_plot.draw(result | {"modes": {}}, tmp_path / "serve.png")


@pytest.mark.parametrize(
    ("at", "said"),
    [
        ("start", "the engine ended with status 1; it said: log of ours\nno start"),
        ("prefill", "prefill 4x1024: the engine ended with status"),
        ("error", "ValueError: no; it said: log of ours"),
        ("finish", "finish: the engine ended with status 1; it said: log of ours\ngone"),
    ],
)
def test_a_mode_that_fails_is_named_with_what_it_said(tmp_path, at, said):
    result = measure(tmp_path, "ours", at)
    if at == "prefill":  # it is out after the first
        said = said.replace("4x1024", "1x128")
    assert said in result["failed"]["ours"]
    assert result["modes"]["eager"]["finished"]["hits"] == 7
    assert "ours did not run" in bench_serve.judge(result)
    assert "ours did not run: " in bench_serve.describe(result)


def test_an_engine_that_hangs_is_ended(tmp_path):
    result = measure(tmp_path, "ours", "hang", limit_s=3)
    assert "batch 1: the engine gave no answer within 3 s and was ended; it said: log of ours" in result["failed"]["ours"]
    assert result["modes"]["eager"]["batches"]["4"] > 0


# ---- logits ----


def errors(requests, steps, scale=1.0, seed=0, spread=0.05):
    generator = torch.Generator().manual_seed(seed)
    relative = scale * (1 + spread * torch.randn(requests, steps, generator=generator, dtype=torch.float64)).abs() * 0.02
    return {"relative": relative.tolist(), "kl": (relative**2).tolist()}


def test_ratios_of_errors():
    theirs = errors(32, 64)
    ours = {name: [[2 * each for each in row] for row in rows] for name, rows in theirs.items()}
    for name in ("relative", "kl"):
        ratio = compare(ours, theirs, name)
        assert (ratio.value, ratio.noise) == pytest.approx((2, 0))
        assert [each.value for each in compare_steps(ours, theirs, name)] == pytest.approx([2.0] * 64)


def test_the_noise_is_that_of_another_draw_of_requests():
    """The standard deviation of ratios over many draws, by one draw's own estimate."""
    for name in ("relative", "kl"):
        drawn = [compare(errors(32, 1, seed=2 * n), errors(32, 1, seed=2 * n + 1), name) for n in range(300)]
        found = torch.tensor([each.value for each in drawn])
        assert found.mean() == pytest.approx(1, abs=0.01)
        assert torch.tensor([each.noise for each in drawn]).mean() == pytest.approx(float(found.std()), rel=0.15)


def result_of(theirs, ours):
    modes = {"eager": {"logits": theirs, "finished": {}}, "ours": {"logits": ours, "finished": {}}}
    return {"modes": modes, "failed": {}}


def test_the_verdict_is_on_all_steps_and_on_each():
    theirs = errors(32, 64)
    assert bench_serve.judge(result_of(theirs, theirs)) == []
    one_step = {name: [[*row[:5], row[5] * 1.05, *row[6:]] for row in rows] for name, rows in theirs.items()}
    complaints = bench_serve.judge(result_of(theirs, one_step))
    assert complaints == [
        f"ours: {words} is above 1.02 times eager's at 1 of 64 steps, at 1 of them by more than twice the noise;"
        " the worst is step 5, 1.0500 ± 0.0000"
        for words in ("relative error", "KL divergence")
    ]
    complaints = bench_serve.judge(result_of(theirs, errors(32, 64, scale=1.05)))
    assert "relative error over all steps is 1.0500" in complaints[0]
    # A noisy comparison fails as the bound says, and says that it is noise.
    (_, noisy, *_) = bench_serve.judge(result_of(theirs, errors(32, 64, scale=1.03, seed=1, spread=0.2)))
    assert "of 64 steps, at " in noisy


def test_nan_is_no_pass():
    theirs = errors(8, 4)
    broken = {name: [[math.nan] * 4 for _ in rows] for name, rows in theirs.items()}
    assert len(bench_serve.judge(result_of(theirs, broken))) == 4


def test_prompts_fit_a_prefill_and_differ():
    for requests in (1, 2, 8, 32, 64):
        sizes = serve_accuracy.lengths(requests)
        assert len(set(sizes)) == requests
        assert sum(sizes) <= 4096
    with pytest.raises(ValueError, match="do not fit a prefill of 4096 tokens"):
        serve_accuracy.lengths(128)
    assert serve_accuracy.groups(70) == [range(32), range(32, 64), range(64, 70)]
    assert len({tuple(serve_accuracy.prompt(number, 20)) for number in range(256)}) == 256
    tokens = serve_accuracy.sequence(3, 20, 5)
    assert tokens.tolist()[:20] == serve_accuracy.prompt(3, 20)
    assert tokens[20:].tolist() == [int(serve_accuracy.forced(torch.tensor(position))) for position in range(19, 23)]


@pytest.mark.parametrize("count", ["0", "-3"])
def test_no_requests_are_refused(capsys, count):
    assert main(["bench", "serve", "--logits", "4", "--requests", count]) == 1
    assert f"--requests is {count}; it takes 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize("layers", ["0", "-1", "37"])
def test_layers_that_the_model_has_not_are_refused(capsys, layers):
    assert main(["bench", "serve", "--layers", layers]) == 1
    assert f"--layers is {layers}; qwen3-8b has 36, and it takes 1 or more of them" in capsys.readouterr().err


def test_logits_of_several_ranks_are_refused_before_anything_starts(capsys):
    assert main(["bench", "serve", "--ranks", "2", "--logits", "64"]) == 1
    assert "--logits 64 with --ranks 2: logits are compared on one rank; leave one out" in capsys.readouterr().err


# ---- targets ----


def timed(model="qwen3-8b", scheme="token", ranks=1, **modes):
    """A made-up result: modes with underscores for pluses, each with its batches, prefills and seconds of the start."""
    made = {
        name.replace("_", "+"): {"batches": batches, "prefills": prefills, "started": {"import_s": 10.0, "init_s": start}}
        for name, (batches, prefills, start) in modes.items()
    }
    return {"model": model, "scheme": scheme, "ranks": ranks, "modes": made, "failed": {}}


BATCHES = ("1", "8", "32", "128")


def every(ms):
    return dict.fromkeys(BATCHES, ms)


@pytest.mark.parametrize(
    ("result", "bounds"),
    [
        (timed(ours=(every(1.0), {}, 9), graph=(every(1.0), {}, 9)), [0.70, 0.70, 0.75, 0.85]),
        (timed(scheme="block", ours=(every(1.0), {}, 9), graph=(every(1.0), {}, 9)), [0.75, 0.72, 0.72, 0.85]),
        (timed("qwen3-1.7b", ours=(every(1.0), {}, 9), graph=(every(1.0), {}, 9)), [0.95, 1.0, 1.0, 1.0]),
        (timed("qwen3-1.7b", "block", ours=(every(1.0), {}, 9), graph=(every(1.0), {}, 9)), []),
        (timed(ranks=2, ours=({"1": 1.0, "16": 1.0}, {}, 9), graph=(every(1.0), {}, 9)), [0.90]),
        (timed(ours=(every(1.0), {}, 1), compiled=(every(1.0), {}, 6)), [0.85, 0.88, 0.90, 0.92, 6.0]),
        (timed("qwen3-1.7b", ours=(every(1.0), {}, 1), compiled=(every(1.0), {}, 6)), [1.0, 0.85, 0.85, 0.75, 6.0]),
        (timed(ours=(every(1.0), {"1x128": 1.0}, 9), eager=(every(8.0), {"1x128": 1.0}, 9)), [8.0, 8.0, 8.0, 0.30]),
        (timed(ours=({}, {"1x128": 1.0}, 9), graph=({}, {"1x128": 1.0}, 9)), [0.20]),
        (timed(ours_graph=(every(1.0), {}, 9), graph=(every(1.0), {}, 9)), [0.79, 0.79, 0.79, 0.87]),
        (timed(ours_graph=(every(1.0), {}, 9), compiled=(every(1.0), {}, 9)), [1.0] * 4),
        (timed("tiny-qwen3", ours=({"3": 1.0, "4": 1.0, "7": 1.0, "129": 1.0, "128": 1.0}, {}, 9)), [1.1, 1.1]),
        (timed("tiny-qwen3", ours=(every(1.0), {}, 9), eager=(every(1.0), {}, 9)), []),
    ],
)
def test_ratios_are_judged_where_both_have_the_cell(result, bounds):
    """The bounds are those that were asked for; at them a ratio passes, and beyond them it misses."""
    targets = serve_targets.load()
    assert [each.bound for each in serve_targets.judge(result, targets)] == bounds
    for each in serve_targets.judge(result, targets):
        assert each.met == (each.ratio >= each.bound if each.at_least else each.ratio <= each.bound)
        assert each.ratio in (1.0, 6.0, 8.0)


@pytest.mark.parametrize(("ms", "met"), [(0.69, True), (0.70, True), (0.71, False), (math.nan, False)])
def test_a_ratio_that_misses_is_said(ms, met):
    result = timed(ours=({"1": ms}, {}, 9), graph=({"1": 1.0}, {}, 9))
    (judged,) = serve_targets.judge(result, serve_targets.load())
    assert judged.met == met
    assert str(judged) == f"ours over graph, batch 1 is {ms:.3f}; at most 0.7"


@pytest.mark.parametrize(("options", "status"), [([], 0), (["--check"], 1), (["--check", "--layers", "2"], 0)])
def test_the_command_judges_ratios(monkeypatch, tmp_path, capsys, options, status):
    finished = {
        "started": {"import_s": 1, "init_s": 1, "weights_bytes": 1, "kv_bytes": 1, "device_bytes": 2, "allocated_bytes": 2}
    }
    modes = {
        name: {**finished, "batches": {"1": ms}, "prefills": {}, "profiles": {}, "logits": None, "finished": {}}
        for name, ms in (("ours", 0.9), ("graph", 1.0))
    }
    result = {"model": "qwen3-8b", "scheme": "token", "ranks": 1, "modes": modes, "failed": {}, "machine": {"gpu": "none"}}
    result["layers"] = 2 if "--layers" in options else None
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    monkeypatch.setattr(serve, "measure", lambda *_: result)
    assert main(["bench", "serve", "--bundle", str(tmp_path), *options]) == status
    said = capsys.readouterr().out
    assert ("not as it should be: ours over graph, batch 1 is 0.900; at most 0.7" in said) == ("--layers" not in options)


def test_without_a_checkout_no_ratio_is_judged(tmp_path):
    assert serve_targets.load(tmp_path / "targets.toml") is None
    (tmp_path / "targets.toml").write_text("[ops]")
    with pytest.raises(HdispatchError, match=r"cannot read the targets in .*targets.toml: KeyError\('serve'\)"):
        serve_targets.load(tmp_path / "targets.toml")


def test_what_decode_steps_of_a_mode_take(monkeypatch, tmp_path):
    monkeypatch.setenv("HDISPATCH_ATTENTION", "half")
    for name in ("HDISPATCH_REPLAY", "HDISPATCH_RUNNER", "HDISPATCH_SCHEDULER"):
        monkeypatch.delenv(name, raising=False)

    def variables(mode):
        graphs, served = serve.MODES[mode]
        setup = EngineOptions(mode, graphs, served, "tiny-qwen3", "token", str(tmp_path), 1, 1.0, None, 0)
        found = environment(setup, tmp_path)
        off = [name for name in ("HDISPATCH_REPLAY", "HDISPATCH_RUNNER", "HDISPATCH_SCHEDULER") if found.get(name) == "0"]
        return found["HDISPATCH"], found["HDISPATCH_ATTENTION"], off

    assert variables("eager") == ("0", "half", [])
    assert variables("ours") == variables("ours+graph") == ("1", "half", [])
    assert variables("ours-fa3") == variables("ours-fa3+graph") == ("1", "fa3", [])
    assert variables("ours-launches") == ("1", "half", ["HDISPATCH_REPLAY"])
    assert variables("ours-vllm-runner") == ("1", "half", ["HDISPATCH_RUNNER"])
    assert variables("ours-vllm-scheduler") == ("1", "half", ["HDISPATCH_SCHEDULER"])
    assert not any(mode.startswith("ours-") for mode in serve.USUAL)

"""benchmarks/regress.py: a cell that got slower is found, noise and other cells are not."""

from __future__ import annotations

import importlib.util
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "regress.py"


def row(m, median, spread=0.0, path="hdispatch"):
    return {"op": "a", "m": m, "path": path, "median_us": median, "q1_us": median - spread / 2, "q3_us": median + spread / 2}


def compare(tmp_path, old, new, *options):
    for name, rows in (("old", old), ("new", new)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"timings": rows}))
    command = [sys.executable, str(SCRIPT), str(tmp_path / "old.json"), str(tmp_path / "new.json"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("median", "spread", "status"),
    [(10.4, 0.0, 0), (10.6, 0.0, 1), (10.6, 0.3, 0), (13.0, 0.3, 1), (5.0, 0.0, 0)],
    ids=["within 5 %", "slower", "within the noise", "beyond the noise", "faster"],
)
def test_a_slower_cell_is_found(tmp_path, median, spread, status):
    code, text = compare(tmp_path, [row(1, 10.0), row(2, 10.0)], [row(1, 10.0), row(2, median, spread)])
    assert code == status, text
    assert ("slower  1" in text) == bool(status)


def test_other_paths_and_unmatched_cells_are_not_judged(tmp_path):
    old, new = [row(1, 10.0), row(1, 1.0, path="peer")], [row(1, 10.0), row(1, 9.0, path="peer"), row(4, 1.0)]
    code, text = compare(tmp_path, old, new, "--paths", "hdispatch")
    assert code == 0
    assert "0 of 1 cells slower; 0 only in the old file, 1 in the new" in text


def test_lost_cells_fail_unless_they_are_named(tmp_path):
    old = [row(m, 10.0) for m in range(1, 577)]
    for new, options, status in (
        (old[:3], (), 1),
        (old[:3], ("--partial",), 0),
        (old[1:], ("--gone", "op=a,m=1"), 0),
        (old[2:], ("--gone", "op=a,m=1"), 1),
        (old[2:], ("--gone", "m=1", "--gone", "m=2"), 0),
        (old[1:], ("--gone", "op=b"), 1),
    ):
        code, text = compare(tmp_path, old, new, *options)
        assert code == status, text
        assert ("lost  m " in text) == bool(status)
    assert "lost  566 more" not in text
    assert "lost  563 more; --gone FIELD=VALUE" in compare(tmp_path, old, old[:3])[1]
    assert compare(tmp_path, old, old, "--gone", "m")[0] == 2


def test_with_the_newest_of_the_same_card(tmp_path):
    def write(name: str, gpu: str, date: str, rows: list[dict[str, object]]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"machine": {"gpu": gpu, "date": date}, "timings": rows}))
        return path

    write("results/a.json", "H200", "2026-01-01", [row(1, 5.0)])
    write("results/b.json", "H200", "2026-01-02", [row(1, 10.0)])
    write("results/c.json", "H100", "2026-01-03", [row(1, 5.0)])
    write("results/d.json", "H200", "2026-01-04", [row(9, 5.0)])
    (tmp_path / "results" / "e.json").write_text("{")
    for gpu, us, status, said in (
        ("H200", 10.0, 0, "b.json"),
        ("H200", 11.0, 1, "b.json"),
        ("H100", 10.0, 1, "c.json"),
        ("B200", 10.0, 0, "skipped: no result in"),
    ):
        new = write("new.json", gpu, "2026-02-01", [row(1, us)])
        command = [sys.executable, str(SCRIPT), "--newest", str(tmp_path / "results"), str(new)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, said in done.stdout) == (status, True), done.stdout


def test_the_step_of_a_visit(tmp_path):
    """Without a result it says so; one that is as the newest of its card passes, and with a cell slower it does not."""
    out, python = tmp_path / "out", tmp_path / "bin"
    out.mkdir()
    python.mkdir()
    (python / "python3").symlink_to(sys.executable)
    path = f"{python}:{os.environ['PATH']}"

    def visit() -> tuple[int, str]:
        command = [str(SCRIPT.parents[1] / "scripts" / "gpu_visit.sh"), str(tmp_path), str(out), "regress"]
        environment = {**os.environ, "INSTALLED": "1", "PATH": path}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        return done.returncode, done.stdout + done.stderr

    assert visit()[0] == 0
    assert "skipped: this visit has no result yet" in visit()[1]
    content = json.loads((RESULTS / "2026-11-27-h200-serve" / "token-8b.json").read_text())
    content["machine"]["date"] = "2027-01-01"
    (out / "serve-1.json").write_text(json.dumps(content))
    code, text = visit()
    assert (code, "cells slower" in text) == (0, True), text
    content["modes"] = {
        mode: {**found, "batches": {n: ms * 4 for n, ms in found["batches"].items()}}
        for mode, found in content["modes"].items()
    }
    (out / "serve-1.json").write_text(json.dumps(content))
    code, text = visit()
    assert (code, "step regress FAILED" in text, "slower  4.0" in text) == (1, True, True), text


def test_nothing_to_compare_is_not_a_pass(tmp_path):
    assert compare(tmp_path, [row(1, 10.0)], [row(2, 10.0)])[0] == 2


OK = '{"op": "a", "median_us": 1, "q1_us": 1, "q3_us": 1}'


@pytest.mark.parametrize(
    "content",
    [
        None,
        '{"modes": {"ours": {"batches": {"1": "x"}}}}',
        '{"median_ns": {"functional": -1}}',
        "{",
        "[1]",
        "{}",
        '{"rows": 3}',
        '{"rows": [3]}',
        '{"rows": [{"op": "a"}]}',
        '{"rows": [{"op": "a", "median_us": 1}]}',
        '{"rows": [{"op": "a", "median_us": NaN, "q1_us": 1, "q3_us": 1}]}',
        '{"rows": [{"op": "a", "median_us": 0, "q1_us": 0, "q3_us": 0}]}',
        f'{{"rows": [{OK}, {OK}]}}',
    ],
)
def test_a_file_that_is_no_result_is_named(tmp_path, content):
    file = tmp_path / "odd.json"
    if content is not None:
        file.write_text(content)
    done = subprocess.run([sys.executable, str(SCRIPT), str(file), str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert str(file) in done.stderr
    assert "Traceback" not in done.stderr


def test_what_the_attention_benchmark_writes_can_be_compared(tmp_path):
    spec = importlib.util.spec_from_file_location("attention_benchmark", SCRIPT.with_name("attention.py"))
    attention = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = attention
    spec.loader.exec_module(attention)
    cell = attention.Cell(32, 8, 1, 1024)._asdict()
    measured = {"cell": cell, "us": {"hdispatch": 10.0}, "quartiles_us": {"hdispatch": [9.9, 10.1]}}
    rows = attention.timings([measured, {"cell": cell, "no_row": "why"}])
    slower = [row | {"median_us": 12.0} for row in rows]
    assert compare(tmp_path, rows, rows)[0] == 0
    assert compare(tmp_path, rows, slower)[0] == 1


def test_results_of_unlike_gpus_are_not_compared(tmp_path):
    for name, gpu in (("h100", "NVIDIA H100"), ("h200", "NVIDIA H200")):
        (tmp_path / f"{name}.json").write_text(json.dumps({"machine": {"gpu": gpu}, "timings": [row(1, 10.0)]}))
    command = [sys.executable, str(SCRIPT), str(tmp_path / "h100.json"), str(tmp_path / "h200.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "is of NVIDIA H100" in done.stderr


@pytest.mark.parametrize(("old", "new"), [(None, 4), (8, 4), (4, "old")])
def test_results_of_other_numbers_of_layers_are_not_compared(tmp_path, old, new):
    machine = {"gpu": "H200", "date": "2026-01-01"}
    content = {"machine": machine, "model": "a", "modes": {"ours": {"batches": {"1": 2.0}}}}
    for name, layers in (("old", old), ("new", new)):
        said = {} if layers == "old" else {"layers": layers}  # older results have no number
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.json").write_text(json.dumps({**content, **said}))

    def run(*given: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, str(SCRIPT), *given], capture_output=True, text=True, check=False)

    files = [str(tmp_path / name / "a.json") for name in ("old", "new")]
    done = run(*files)
    words = ["all" if layers in (None, "old") else str(layers) for layers in (old, new)]
    assert done.returncode == 2
    assert f"{files[0]} is of {words[0]} of the model's layers, {files[1]} of {words[1]}: measure both" in done.stderr
    done = run("--newest", str(tmp_path / "old"), files[1])
    assert (done.returncode, "skipped: no result in" in done.stdout) == (0, True)
    assert run(files[0], files[0]).returncode == 0


RESULTS = SCRIPT.with_name("results")


@pytest.mark.parametrize(
    ("name", "cells", "slower"),
    [
        ("2026-11-27-h200-serve/token-8b.json", 32, ("modes", "ours", "batches", "8")),
        ("2026-11-27-h200-serve/server-ours.json", 9, ("modes", "ours", "concurrency", "8", "median_tpot_ms")),
        ("2026-11-27-h200-adopt/functional.json", 5, ("median_ns", "functional")),
    ],
)
def test_results_of_engines_servers_and_functional_ops(tmp_path, name, cells, slower):
    content = json.loads((RESULTS / name).read_text())
    place = content
    for word in slower[:-1]:
        place = place[word]
    for change, status in ((1.0, 0), (1.04, 0), (1.06, 1), (None, 1)):
        value = place[slower[-1]]
        place[slower[-1]] = value * change if change else None
        if change is None and "median_ns" in content:
            del place[slower[-1]]
        (tmp_path / "new.json").write_text(json.dumps(content))
        command = [sys.executable, str(SCRIPT), str(RESULTS / name), str(tmp_path / "new.json")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stdout + done.stderr
        lost = change is None
        assert f"{int(status and not lost)} of {cells - lost} cells slower; {int(lost)} only in the old file" in done.stdout
        place[slower[-1]] = value


@pytest.mark.parametrize(
    "name",
    ["2026-11-26-h100/ops-after.json.xz", "2026-11-26-h200-attention/attention-untuned.json", "2026-11-26-h100/dispatch.json"],
)
def test_every_cell_of_a_real_result_is_judged(tmp_path, name):
    """`bench ops`, attention.py and `bench dispatch`: as they are, and with its steadiest cell 6 % slower than it was."""
    data = (RESULTS / name).read_bytes()
    content = json.loads(lzma.decompress(data) if name.endswith(".xz") else data)
    rows = content.get("timings") or content["rows"]
    unit = next(field.removeprefix("median") for field in rows[0] if field.startswith("median"))

    def run(new: Path) -> tuple[int, str]:
        command = [sys.executable, str(SCRIPT), str(RESULTS / name), str(new)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    code, text = run(RESULTS / name)
    assert code == 0, text
    assert f"0 of {len(rows)} cells slower; 0 only in the old file, 0 in the new" in text
    steady = min(rows, key=lambda each: (each[f"q3{unit}"] - each[f"q1{unit}"]) / each[f"median{unit}"])
    assert (steady[f"q3{unit}"] - steady[f"q1{unit}"]) < 0.01 * steady[f"median{unit}"]
    for field in ("median", "q1", "q3"):
        steady[field + unit] *= 1.06
    (tmp_path / "new.json").write_text(json.dumps(content))
    code, text = run(tmp_path / "new.json")
    assert code == 1, text
    assert f"1 of {len(rows)} cells slower" in text

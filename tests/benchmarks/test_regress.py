"""benchmarks/regress.py: a cell that got slower is found, noise and other cells are not."""

from __future__ import annotations

import importlib.util
import json
import lzma
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
    old, new = [row(1, 10.0), row(1, 1.0, path="peer"), row(4, 1.0)], [row(1, 10.0), row(1, 9.0, path="peer")]
    code, text = compare(tmp_path, old, new, "--paths", "hdispatch")
    assert code == 0
    assert "0 of 1 cells slower; 1 only in the old file, 0 in the new" in text


def test_nothing_to_compare_is_not_a_pass(tmp_path):
    assert compare(tmp_path, [row(1, 10.0)], [row(2, 10.0)])[0] == 2


OK = '{"op": "a", "median_us": 1, "q1_us": 1, "q3_us": 1}'


@pytest.mark.parametrize(
    "content",
    [
        None,
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


RESULTS = SCRIPT.with_name("results")


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

"""A recorded run served on a GPU: fresh processes, cold caches, nothing compiled, right results, first calls in ms."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hdispatch.compile import build

SUPPORT = Path(__file__).resolve().parents[1] / "support"


def python(folder: Path, text: str) -> str:
    """What a fresh process with cold caches prints."""
    cold = {name: str(folder / f"{name}-{os.urandom(4).hex()}") for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")]), **cold}
    done = subprocess.run(
        [sys.executable, "-c", text], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recorded")
    run = "import recorded_kernels as kernels; kernels.run(); kernels.run_tuned()"
    python(folder, f"import hdispatch\nwith hdispatch.record({str(folder / 'r.jsonl')!r}):\n    {run}")
    report = build([], "native", folder / "bundle", cache=folder / "cache", record=[folder / "r.jsonl"])
    assert [note.partition(": 1 recorded specialization")[0] for note in report.notes] == ["recorded_kernels.product"] * 2
    assert "a launch raises OutOfResources" in report.notes[0]
    assert "refused by the compiler, as in the run: CompileTimeAssertionFailure" in report.notes[1]
    return folder / "bundle"


SERVE = """
import json, hdispatch
hdispatch.load({bundle!r})
import triton, recorded_kernels
def refuse(**given):
    raise SystemExit("Triton compiles " + str(given["repr"]))
triton.knobs.runtime.jit_cache_hook = triton.knobs.runtime.jit_post_compile_hook = refuse
with hdispatch.strict():
    times = recorded_kernels.run()
    recorded_kernels.run_tuned()
    print(json.dumps([times, hdispatch.recorded.stats()]))
"""


def test_nothing_is_compiled_and_first_calls_take_milliseconds(bundle):
    times, stats = json.loads(python(bundle.parent, SERVE.format(bundle=str(bundle))))
    assert stats["compiled"] == {}
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert sum(stats["served"].values()) == len(manifest["recorded"]) + len(manifest["recorded_refused"])
    plain = json.loads(python(bundle.parent, "import json, recorded_kernels\nprint(json.dumps(recorded_kernels.run()))"))
    said = f"first calls: {times} ms with the bundle, {plain} ms without, on {torch.cuda.get_device_name()}"
    print(said)  # noqa: T201
    assert max(times.values()) <= 2.0, said

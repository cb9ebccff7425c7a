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

KERNELS = '''
import torch, triton
import triton.language as tl

@triton.jit
def add(out, x, y, elements, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, at < elements) + tl.load(y + at, at < elements), at < elements)

@triton.autotune([triton.Config({"BLOCK": b}) for b in (128, 256)], key=["elements"])
@triton.jit
def double(out, x, elements, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, at < elements) * 2, at < elements)

def run():
    """Milliseconds of each first call, checked."""
    import time
    torch.cuda.synchronize()
    times = []
    for n, offset in ((1, 0), (16, 0), (1000, 0), (1000, 1), (4096, 0)):
        for dtype in (torch.float32, torch.bfloat16):
            x, y = (torch.randn(n + offset, device="cuda").to(dtype)[offset:] for _ in range(2))
            out = torch.full_like(x, float("nan"))
            torch.cuda.synchronize()
            start = time.perf_counter()
            add[(triton.cdiv(n, 128),)](out, x, y, n, BLOCK=128)
            times.append(1e3 * (time.perf_counter() - start))
            assert torch.equal(out, x + y)
    x = torch.randn(1000, device="cuda")
    out = torch.empty_like(x)
    double[lambda meta: (triton.cdiv(1000, meta["BLOCK"]),)](out, x, 1000)
    assert torch.equal(out, x * 2)
    return times
'''


def python(folder: Path, text: str) -> str:
    """What a fresh process with cold caches prints."""
    cold = {name: str(folder / f"{name}-{os.urandom(4).hex()}") for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]), **cold}
    done = subprocess.run(
        [sys.executable, "-c", text], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "user_kernels.py").write_text(KERNELS)
    python(
        folder,
        f"import hdispatch\nwith hdispatch.record({str(folder / 'r.jsonl')!r}):\n    import user_kernels; user_kernels.run()",
    )
    report = build([], "native", folder / "bundle", cache=folder / "cache", record=[folder / "r.jsonl"])
    assert not report.notes
    return folder / "bundle"


SERVE = """
import json, hdispatch
hdispatch.load({bundle!r})
import triton, user_kernels
def refuse(**given):
    raise SystemExit("Triton compiles " + str(given["repr"]))
triton.knobs.runtime.jit_cache_hook = triton.knobs.runtime.jit_post_compile_hook = refuse
with hdispatch.strict():
    print(json.dumps([user_kernels.run(), hdispatch.recorded.stats()]))
"""


def test_nothing_is_compiled_and_first_calls_take_milliseconds(bundle):
    times, stats = json.loads(python(bundle.parent, SERVE.format(bundle=str(bundle))))
    assert stats["compiled"] == {}
    assert sum(stats["served"].values()) == len(json.loads((bundle / "manifest.json").read_text())["recorded"])
    plain = json.loads(python(bundle.parent, "import json, user_kernels\nprint(json.dumps(user_kernels.run()))"))
    said = f"first calls: {sorted(times)} ms with the bundle, {sorted(plain)} ms without, on {torch.cuda.get_device_name()}"
    print(said)  # noqa: T201
    assert sorted(times)[len(times) // 2] <= 2.0, said

"""The worked example of the README, as it stands there: short enough, it builds, it is dispatched, its kernel is right."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import hdispatch
import pytest
import torch
from hdispatch.compile import build
from hdispatch.testing import null

README = Path(__file__).parents[2] / "README.md"
#: What the README promises to stay under.
MOST_LINES = 60

#: Runs the example's kernel in Triton's interpreter and compares it with the reference.
INTERPRET = """
import torch
from hdispatch.testing.numeric import compare_outputs
from scale_rows import triton as module
from scale_rows.spec import SPEC

module.tl.extra.cuda.gdc_wait = lambda: None  # machine code
def interpret(kernel, grid, *args, launch_pdl, num_warps, **constants):
    kernel[grid](*args, **constants)

for variant in SPEC.served_variants():
    if variant.dtypes["x"] == torch.bfloat16:
        continue  # the interpreter does not round to it
    for m, k in ((1, 64), (3, 1008), (5, 4096)):
        got = SPEC.sample(variant, {"M": m, "K": k}, torch.device("cpu"), torch.Generator().manual_seed(m))
        want = [value.clone() if isinstance(value, torch.Tensor) else value for value in got]
        SPEC.reference(*want)
        for config in module.candidates({"M": m, "K": k}, variant):
            module.launch(*got, config=config, _launcher=interpret)
            compare_outputs(SPEC, variant, got, want)
            print(variant.name, m, k)
"""


def blocks() -> dict[str, str]:
    """The code of the example's files by name."""
    section = README.read_text().split("## Add an op")[1].split("\n## ")[0]
    found = re.findall(r"`kernels/scale_rows/(\w+\.py)`.*?```python\n(.*?)```", section, flags=re.DOTALL)
    return dict(found)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The example as a package that can be imported; its op is defined."""
    root = tmp_path_factory.mktemp("readme")
    folder = root / "scale_rows"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    for name, code in blocks().items():
        (folder / name).write_text(code)
    sys.path.insert(0, str(root))
    from scale_rows.spec import SPEC

    hdispatch.ops.define(SPEC)
    yield "scale_rows"
    sys.path.remove(str(root))


def test_it_is_short():
    code = blocks()
    assert set(code) == {"spec.py", "triton.py"}
    assert sum(len(text.splitlines()) for text in code.values()) < MOST_LINES


def test_it_builds_and_is_dispatched(package, tmp_path):
    report = build([package], "h200", tmp_path / "bundle", extra=[package], jobs=1)
    assert any("using the first of the kernel's candidates" in note for note in report.notes)
    loaded = hdispatch.load(tmp_path / "bundle", driver="null")
    spec = hdispatch.ops.spec(package)
    for k in (4096, 1008):
        for variant in spec.served_variants():
            arguments = spec.sample(variant, {"M": 3, "K": k}, torch.device("cpu"), torch.Generator().manual_seed(0))
            with hdispatch.strict(), null.recording():
                hdispatch.ops.scale_rows(*arguments)
                assert [launch["grid"] for launch in null.launches()] == [(3, 1, 1)]
    loaded.unload()


def test_its_kernel_is_right(package):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", INTERPRET], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(done.stdout.splitlines()) == 2 * 3 * 4


def test_help_says_what_it_takes(package):
    said = hdispatch.ops.scale_rows.__doc__
    assert said.startswith("scale_rows(Tensor(a!) out, Tensor x, Tensor scale, Tensor? bias=None) -> ()")
    assert "out [M, K] = x [M, K] * scale [M] + bias [K]" in said

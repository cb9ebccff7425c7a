"""The documents: README.md is short; links, tables and code blocks are right; the worked example of docs/add-an-op.md builds,
is dispatched, and its kernel is right.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import hdispatch
import pytest
import torch
from hdispatch.cli import main
from hdispatch.compile import Selection, available_ops, build
from hdispatch.testing import null

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLE = ROOT / "docs" / "add-an-op.md"
#: Lines of code that the example has at most, and lines of README.md.
MOST_LINES, MOST_README_LINES = 60, 130

#: Examples of docs/adopt.md, and what they say without a GPU.
ADOPTED = {
    "adopt": "scale is adopted; calling it needs a GPU\n",
    "adopt_autotuned": "scale is adopted; calling it needs a GPU\n",
    "adopt_helion": "add is adopted; calling it needs a GPU\n",
    "adopt_vllm": "all Triton kernels are adopted; serving needs a MODEL, vLLM and a GPU\n",
}

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
    found = re.findall(r"`kernels/scale_rows/(\w+\.py)`.*?```python\n(.*?)```", EXAMPLE.read_text(), flags=re.DOTALL)
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

    hdispatch.registry.define(SPEC)
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
    spec = hdispatch.registry.spec(package)
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


# ---- every document ----


def figures() -> ModuleType:
    found = importlib.util.spec_from_file_location("figures", ROOT / "scripts" / "figures.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_the_readme_is_short_and_starts_with_two_commands():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= MOST_README_LINES
    first_screen = "\n".join(lines[:30])
    assert re.search(r"^    pip install ", first_screen, re.MULTILINE)
    assert re.search(r"^    HDISPATCH=1 vllm serve ", first_screen, re.MULTILINE)


def test_tables_are_those_of_the_results():
    """After a new result: python scripts/figures.py --write."""
    module = figures()
    assert set(module.documents()) <= set(DOCUMENTS)
    used = []
    for file in module.documents():
        for name, table in module.MARKED.findall(file.read_text()):
            assert table == module.TABLES[name](), f"{file.name}: {name}"
            used.append(name)
    assert set(used) == set(module.TABLES)


def test_pictures_are_those_of_the_results():
    """After a new result: python scripts/figures.py --write."""
    module = figures()
    assert set(module.PICTURES) == {file.name for file in (ROOT / "docs").glob("*.svg")}
    said = (ROOT / "docs" / "adopt.svg").read_text()
    for _, _, times in module.adopted_rows():
        assert all(f">{module.microseconds(times[each])}<" in said for each in ("before", "adopted"))


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)
def test_links_and_paths_lead_somewhere(file):
    text = file.read_text()
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (file.parent / link.partition("#")[0]).exists(), link
    named = re.findall(r"`((?:benchmarks|scripts|tests|examples|csrc|docs|cmake)/[\w./-]+)`", text)
    named += re.findall(r"\bpython3? ((?:benchmarks|scripts|examples)/\w+\.py)", text)
    for path in named:
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)
def test_commands_take_what_the_documents_give_them(file):
    """Every `hdispatch …` line of a code block, up to its comment, parses; every make target is one."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in re.findall(r"^    (?:HDISPATCH\S*=\S+ )*(\S.*)$", file.read_text(), re.MULTILINE):
        command = shlex.split(line, comments=True)
        if command[:1] == ["hdispatch"]:
            try:
                main.parser().parse_args(command[1:])
            except SystemExit:
                pytest.fail(f"{line!r} is refused")
        elif command[:1] == ["make"]:
            assert {word for word in command[1:] if "=" not in word} <= targets, line


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)
def test_code_blocks_are_python_that_names_what_there_is(file):
    for code in re.findall(r"```python\n(.*?)```", file.read_text(), re.DOTALL):
        compile(code, file.name, "exec")
        for name, attribute in re.findall(r"\bhdispatch\.(\w+)(?:\.(\w+))?", code):
            if name == "opspec":
                continue
            assert hasattr(hdispatch, name) or name in hdispatch.registry.names(), name
            if name == "ops":
                assert attribute in hdispatch.registry.names(), attribute


def test_every_python_name_in_the_text_is_there():
    text = "\n".join(file.read_text() for file in DOCUMENTS)
    names = set(re.findall(r"\bhdispatch\.(\w+)\(", text)) | set(re.findall(r"`hdispatch\.([A-Z]\w+)`", text))
    assert {"load", "stats", "explain", "strict", "register", "Sequence"} <= names
    assert {name for name in names if not hasattr(hdispatch, name)} <= set(hdispatch.registry.names())


def test_every_op_is_in_the_list_of_ops():
    listed = (ROOT / "docs" / "ops.md").read_text()
    assert [name for name in available_ops() if f"`{name}`" not in listed] == []


def test_every_setting_is_explained():
    settings = set()
    for file in (ROOT / "python").rglob("*.py"):
        settings |= set(re.findall(r"\"(HDISPATCH(?:_[A-Z]+)*)\"", file.read_text()))
    explained = (ROOT / "docs" / "operations.md").read_text()
    assert settings
    assert [name for name in sorted(settings) if f"`{name}`" not in explained] == []


def test_concepts_before_a_first_op():
    table = EXAMPLE.read_text().split("| word | meaning |")[1].split("\n\n")[0]
    assert len(table.strip().splitlines()) - 1 == 12


@pytest.mark.parametrize("name", ["serve_op", "drop_in", "register_function", *ADOPTED])
def test_an_example_is_short_and_runs(name, examples_bundle):
    file = ROOT / "examples" / f"{name}.py"
    assert len(file.read_text().splitlines()) <= 40
    environment = {**os.environ, "HDISPATCH_BUNDLE": str(examples_bundle), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, file], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    said = {
        "serve_op": "{'hits': 3, 'empty': 0, 'fallbacks': 0, 'misses': {}}\n",
        "drop_in": "{'hits': 1, 'empty': 0, 'fallbacks': 0, 'misses': {}}\nvLLM's own kernel\n",
        "register_function": "[1.0] 1\n",
        **ADOPTED,
    }
    assert done.stdout.endswith(said[name])


@pytest.fixture(scope="module")
def examples_bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples") / "bundle"
    select = Selection(shapes=lambda _: [{"N": 12288}], variants=lambda _: ["bfloat16"])
    build(["silu_and_mul"], "h200", folder, jobs=1, select=select)
    return folder

"""What may import and include what: no cycle, the serve wing without the build wing, the core without Python and torch."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "hdispatch"
CSRC = ROOT / "csrc"

#: The build wing with the steps of tuning that use it, and what may use those: lazily, so that no serving process has them.
TUNING = (
    "autotune",
    "chosen",
    "collect",
    "compare",
    "compile_many",
    "compile_ray",
    "cover",
    "measured",
    "point_configs",
    "points",
    "select",
)
BUILD = ("hdispatch.compile", *(f"hdispatch.tune.{name}" for name in TUNING))
LAZY = ("hdispatch.cli", "hdispatch.bench", "hdispatch.__main__", "hdispatch.adopted", *BUILD)
VLLM = "hdispatch.integrations.vllm"
PLUGIN = f"{VLLM}.plugin"
SGLANG_PLUGIN = "hdispatch.integrations.sglang.plugin"
#: Where the extension cannot be imported nothing else can be: this hands over to the report of `hdispatch doctor`, and ends.
HANDS_OVER = ("hdispatch.extension imports hdispatch.cli.doctor",)
DSLS = ("helion", "triton", "cutlass", "tvm_ffi", "matplotlib", "rich", "pytest", "hypothesis")


@dataclass(frozen=True)
class Import:
    """`source` imports `target`, both full module names; `local`: inside a function."""

    source: str
    target: str
    local: bool

    def __str__(self) -> str:
        return f"{self.source} imports {self.target}"


def modules_in(folder: Path, package: str) -> dict[str, Path]:
    """The modules of a package that lies in a folder, by their full names."""
    named = {(package, *path.relative_to(folder).with_suffix("").parts): path for path in folder.rglob("*.py")}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for parts, path in named.items()}


FILES = modules_in(PACKAGE, "hdispatch")
KERNELS = modules_in(ROOT / "kernels", "hdispatch.kernels")
LIB = "hdispatch.kernels.lib"
#: What the build adds to the package.
MODULES = {*FILES, *KERNELS, "hdispatch._C", "hdispatch._build_info", "hdispatch.configs"}


def imports_of(name: str, path: Path) -> Iterator[Import]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node, local in statements(ast.parse(path.read_text()), local=False):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(name, alias.name, local)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (base, node.module or "") if part)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield Import(name, inner if inner in MODULES else base, local)


def statements(parent: ast.AST, local: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Every statement below but those for type checkers, and whether it lies in a function. Expressions hold no imports."""
    if isinstance(parent, ast.If) and ast.unparse(parent.test).endswith("TYPE_CHECKING"):
        return
    local = local or isinstance(parent, ast.FunctionDef | ast.AsyncFunctionDef)
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.stmt | ast.excepthandler | ast.match_case):
            yield node, local
            yield from statements(node, local)


IMPORTS = [each for name, path in FILES.items() for each in imports_of(name, path)]
OURS = [each for each in IMPORTS if each.target.split(".")[0] == "hdispatch"]


def within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def find_cycle(graph: Mapping[str, set[str]]) -> list[str] | None:
    """A cycle of the graph, or None."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str] | None:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        for target in sorted(graph.get(node, ())):
            found = walk(target, [*path, node])
            if found:
                return found
        done.add(node)
        return None

    return next((cycle for node in sorted(graph) if (cycle := walk(node, []))), None)


# ---- a fresh process ----


def run(code: str) -> dict[str, object]:
    """What the code prints last, as JSON, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


IMPORT = """
import json, os, sys
import torch
before = set(sys.modules)
files = []
sys.addaudithook(lambda event, args: files.append(str(args[0])) if event == "open" else None)
import hdispatch
print(json.dumps({"added": sorted(set(sys.modules) - before), "all": sorted(sys.modules), "files": files,
                  "initialized": torch.cuda.is_initialized(), "package": os.path.dirname(hdispatch.__file__)}))
"""


@pytest.fixture(scope="module")
def fresh() -> dict[str, object]:
    return run(IMPORT)


def test_importing_brings_no_dsl(fresh):
    # What `import torch` itself brings is torch's business.
    added = fresh["added"]
    assert isinstance(added, list)
    assert "hdispatch" in added
    others = ("hdispatch.cli", "hdispatch.bench", "hdispatch.testing", "hdispatch.tune")
    assert not [module for module in added if within(module, (*DSLS, *BUILD, *others))]


def test_importing_touches_no_gpu(fresh):
    assert fresh["initialized"] is False


def test_importing_reads_code_only(fresh):
    files, package = fresh["files"], fresh["package"]
    assert isinstance(files, list)
    assert isinstance(package, str)
    read = [f for f in files if not re.search(r"(\.py|\.pyc|\.so|\.pyi)(\.\d+)?$", f) and not Path(f).is_dir()]
    assert not [f for f in read if f.startswith((package, str(ROOT)))], read
    assert not [f for f in files if re.search(r"\.(json|cubin|sha256)$|/configs/", f)]


def test_the_command_line_starts_without_the_build_wing():
    code = "import json, sys, hdispatch.cli.main; print(json.dumps({'all': sorted(sys.modules)}))"
    loaded = run(code)["all"]
    assert isinstance(loaded, list)
    assert not [module for module in loaded if within(module, ("helion", "cutlass", "matplotlib", *BUILD))]


def test_measuring_needs_neither_the_build_wing_nor_a_dsl():
    # torch may import triton by itself, where it is installed.
    code = (
        "import json, sys, hdispatch.tune.measure, hdispatch.tune.measure_worker\n"
        "print(json.dumps({'all': sorted(sys.modules)}))"
    )
    loaded = run(code)["all"]
    assert isinstance(loaded, list)
    wanted = ("helion", "cutlass", "matplotlib", "rich", "ray", "hdispatch.cli", "hdispatch.bench", *BUILD)
    assert not [module for module in loaded if within(module, wanted)]


# ---- Python ----


def test_no_module_imports_in_a_circle():
    graph: dict[str, set[str]] = {name: set() for name in FILES}
    for each in OURS:
        # A package's __init__ is run first, but a submodule that names it would import the half-made package.
        if each.target != each.source:
            graph[each.source].add(each.target)
    assert find_cycle(graph) is None


def test_the_package_imports_no_benchmark_of_the_checkout():
    """A wheel has none: `hdispatch bench ops` looks for it when it is run."""
    assert not [str(each) for each in IMPORTS if within(each.target, ("benchmarks", "tests"))]


def test_the_serve_wing_never_imports_the_build_wing():
    assert not [str(each) for each in OURS if within(each.target, BUILD) and not within(each.source, LAZY)]


def test_the_serve_wing_imports_no_dsl():
    serving = [each for each in IMPORTS if not within(each.source, LAZY)]
    assert not [str(each) for each in serving if within(each.target, DSLS)]


def test_the_build_wing_imports_neither_the_command_line_nor_the_benchmark():
    above = ("hdispatch.cli", "hdispatch.bench", "hdispatch.__main__")
    found = [str(each) for each in OURS if within(each.target, above) and not within(each.source, above)]
    assert tuple(found) == HANDS_OVER


def test_the_build_does_not_know_tuning():
    build = ("hdispatch.compile",)
    assert not [str(each) for each in OURS if within(each.source, build) and within(each.target, ("hdispatch.tune",))]


def test_no_module_imports_the_package_itself():
    assert not [str(each) for each in OURS if each.target == "hdispatch"]


def test_imports_are_at_the_top():
    # Lazy ones are for what must not be loaded before it is needed: the build wing, the DSLs, vLLM and SGLang by the plug-ins.
    lazy = (*LAZY, PLUGIN, SGLANG_PLUGIN)
    assert tuple(str(each) for each in IMPORTS if each.local and not within(each.source, lazy)) == HANDS_OVER


def test_vllm_is_imported_by_the_plug_in_alone():
    vllm = [each for each in IMPORTS if within(each.target, ("vllm",)) and not within(each.source, LAZY)]
    assert {each.source for each in vllm} == {
        PLUGIN,
        *(f"{VLLM}.{name}" for name in ("models", "runner", "scheduler", "sampling", "decode_batch")),
    }
    assert all(each.local for each in vllm if each.source == PLUGIN)
    assert {each.source for each in IMPORTS if each.target == f"{VLLM}.models"} == {PLUGIN}


def test_sglang_is_imported_by_its_plug_in_alone():
    sglang = [each for each in IMPORTS if within(each.target, ("sglang", "sgl_kernel"))]
    assert {each.source for each in sglang} == {SGLANG_PLUGIN}
    assert all(each.local for each in sglang)


# ---- kernels ----


KERNEL_IMPORTS = [each for name, path in KERNELS.items() for each in imports_of(name, path)]


def op_of(module: str) -> str | None:
    """The op whose folder a module lies in."""
    parts = module.split(".")
    return parts[2] if module in KERNELS and len(parts) > 2 and not within(module, (LIB,)) else None


def test_no_op_imports_another():
    ops = {name.split(".")[2] for name in KERNELS if name.endswith(".spec")}
    assert len(ops) > 20
    crossing = [each for each in KERNEL_IMPORTS if op_of(each.target) not in (None, op_of(each.source))]
    assert not [str(each) for each in crossing]


def test_what_is_shared_lies_in_lib():
    beside = {name for name in KERNELS if name.count(".") == 2 and not KERNELS[name].name.startswith("__init__")}
    assert not beside


#: What declarations of ops import.
DECLARATIONS = ("hdispatch.opspec", "hdispatch.models", "hdispatch.errors", "hdispatch.kernels", "torch")


def test_kernels_import_declarations_a_dsl_and_lib():
    allowed = (
        "hdispatch.opspec",
        "hdispatch.models",
        "hdispatch.errors",
        "hdispatch.kernels",
        "torch",
        "triton",
        "helion",
        "cutlass",
    )
    found = [each for each in KERNEL_IMPORTS if each.target.split(".")[0] not in sys.stdlib_module_names]
    assert not [str(each) for each in found if not within(each.target, allowed)]


def test_declarations_import_no_dsl():
    """All that a spec.py reaches, through lib too."""
    allowed = DECLARATIONS
    reached = {name for name in KERNELS if name.endswith(".spec")}
    todo = sorted(reached)
    while todo:
        for each in imports_of(name := todo.pop(), KERNELS[name]):
            assert each.target.split(".")[0] in sys.stdlib_module_names or within(each.target, allowed), str(each)
            if each.target in KERNELS and each.target not in reached:
                reached.add(each.target)
                todo.append(each.target)
    assert f"{LIB}.reference_fp8" in reached


def test_no_kernel_module_imports_in_a_circle():
    graph: dict[str, set[str]] = {name: set() for name in KERNELS}
    for each in KERNEL_IMPORTS:
        if each.target in KERNELS and each.target != each.source:
            graph[each.source].add(each.target)
    assert find_cycle(graph) is None


# ---- C++ ----


INCLUDES = {
    path.name: re.findall(r'^#include ([<"][^>"]+)[>"]', path.read_text(), re.MULTILINE)
    for path in [*CSRC.glob("*.h"), *CSRC.glob("*.cpp")]
}


def test_no_header_includes_itself_in_a_circle():
    graph = {name: {each[1:] for each in includes if each[0] == '"'} for name, includes in INCLUDES.items()}
    assert find_cycle(graph) is None
    for name, targets in graph.items():
        assert targets <= set(INCLUDES), name
        assert not [target for target in targets if target.endswith(".cpp")], name


def test_the_first_line_of_a_file_says_what_it_is_for():
    # The licence is in LICENSE, for the whole project; headers of files do not repeat it.
    for name in INCLUDES:
        assert re.match(rf"// {re.escape(name)} -- \S.{{10,}}", (CSRC / name).read_text()), name


def test_the_map_names_every_file():
    text = (ROOT / "docs" / "architecture.md").read_text().split("```")[1]
    named = set(re.findall(r"\w+", text))
    headers = {path.stem for path in CSRC.glob("*.h")}
    files = headers | {path.stem for path in CSRC.glob("*.cpp") if not path.stem.startswith(tuple(headers))}
    modules = {name.split(".")[-1] for name in FILES if name.split(".")[1:2] in ([], ["compile"], ["tune"])}
    modules |= {path.stem for path in PACKAGE.glob("*.py")}
    missing = sorted(each for each in files | modules - {"hdispatch", "__init__", "__main__"} if each not in named)
    assert not missing, f"docs/architecture.md: the map lacks {', '.join(missing)}"


def core_files() -> set[str]:
    """The sources of hdispatch_core as CMake has them, and every header of ours that they reach."""
    text = (ROOT / "CMakeLists.txt").read_text()
    reached = set(re.findall(r"csrc/(\w+\.cpp)", " ".join(re.findall(r"set\(core_\d [^)]*\)", text))))
    todo = list(reached)
    while todo:
        for each in INCLUDES[todo.pop()]:
            if each[0] == '"' and each[1:] not in reached:
                reached.add(each[1:])
                todo.append(each[1:])
    return reached


def test_the_core_includes_neither_python_nor_torch():
    core = core_files()
    assert {"expr.cpp", "runtime.cpp", "driver.h", "key.h"} <= core
    for name in core:
        for include in INCLUDES[name]:
            foreign = r"<(Python|structmember|pybind11|torch|ATen|c10|cuda|tvm|dlpack)"
            assert not re.match(foreign, include), f"{name} includes {include}"


#: What adopted kernels are made of.
ADOPTED = tuple(f"adopted_{part}" for part in ("key", "state", "table", "tuner", "kernel", "learn", "host", "patch", "door"))
#: The doors, what they share, and what those of sequences and adopted kernels are made of.
DOORS = (
    *("op_call", "torch_op", "override", "attempt", "op_arguments", "python_errors", "profiler"),
    *("torch_python", "torch_layout", "torch_values", "strict_mode"),
    *("sequence_call", "sequence_reader", "arena"),
    *("host_program", *ADOPTED),
)


def test_the_core_knows_no_door():
    assert not core_files() & {*(f"{door}.h" for door in DOORS), "tensor_view.h", "bench.h"}


def test_only_the_driver_opens_libcuda():
    users = [
        path.name
        for path in [*CSRC.glob("*.h"), *CSRC.glob("*.cpp")]
        if "libcuda" in path.read_text() and "dlopen" in path.read_text()
    ]
    assert sorted(users) == ["driver.cpp", "driver.h"]


def test_only_tensor_view_and_the_doors_read_aten():
    readers = {name for name, includes in INCLUDES.items() if any(re.match(r"<(ATen|torch|c10)", each) for each in includes)}
    doors = {f"{door}.{kind}" for door in DOORS for kind in ("cpp", "h")}
    tensors = {f"{name}.{kind}" for name in ("tensor_view", "empty_tensor") for kind in ("cpp", "h")}
    assert readers <= {*tensors, "functional_op.cpp", *doors, "noop_cuda_guard.cpp"}


def returned_none(path: Path) -> list[str]:
    """The device functions of a file that return None somewhere."""
    found = []
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef) and any("triton.jit" in ast.unparse(each) for each in function.decorator_list):
            returned = [each.value for each in ast.walk(function) if isinstance(each, ast.Return) and each.value is not None]
            arms = [
                arm for value in returned for arm in ([value.body, value.orelse] if isinstance(value, ast.IfExp) else [value])
            ]
            found += [f"{path}: {function.name}" for arm in arms if isinstance(arm, ast.Constant) and arm.value is None]
    return found


def test_device_functions_return_no_none(tmp_path):
    """Triton 3.6, which comes with the oldest torch, cannot compile one that does."""
    assert [each for path in KERNELS.values() for each in returned_none(path)] == []
    example = tmp_path / "example.py"
    example.write_text("@triton.jit\ndef load(x):\n    return tl.load(x) if x is not None else None\n")
    assert returned_none(example) == [f"{example}: load"]

"""The static import graph, and the cache keys that follow it: whatever a kernel runs, an edit of it is built anew."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from hdispatch.bundle_reader import read_bundle
from hdispatch.compile import Selection, available_ops, build, op_package
from hdispatch.compile.imports import ImportGraph
from hdispatch.errors import BuildError
from hdispatch.tune import collect
from hdispatch.tune.points import Scope

SUPPORT = Path(__file__).parents[1] / "support"
GROUPS = "hdispatch.kernels.lib.triton_groups"


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of modules that can be imported."""
    root = tmp_path / "tree"
    root.mkdir()
    monkeypatch.syspath_prepend(root)
    yield root
    for name in [name for name in sys.modules if name.partition(".")[0] in ("pack", "beside")]:
        del sys.modules[name]


def write(root: Path, files: dict[str, str]) -> None:
    """Write modules, `pack/op/triton` to pack/op/triton.py."""
    for name, text in files.items():
        path = root / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    importlib.invalidate_caches()


def names(*modules: str) -> set[str]:
    return {name for name in ImportGraph().closure(modules).files if name.partition(".")[0] in ("pack", "beside")}


@pytest.mark.parametrize(
    ("text", "reached"),
    [
        ("import pack.lib.a", {"pack.lib.a"}),
        ("import pack.lib.a as x, os", {"pack.lib.a"}),
        ("from pack.lib import a", {"pack.lib.a"}),
        ("from ..lib import a", {"pack.lib.a"}),
        ("from ..lib.a import one, two", {"pack.lib.a"}),
        ("from ..lib.a import *", {"pack.lib.a"}),
        ("from . import own", {"pack.op.own"}),
        ("from .own import one", {"pack.op.own"}),
        ("from ... import nothing", set()),
        ("def f():\n    if True:\n        from ..lib import a", {"pack.lib.a"}),
        ("try:\n    from ..lib import a\nexcept ImportError:\n    pass", {"pack.lib.a"}),
        ("from ..lib import b", {"pack.lib.b", "pack.lib.a", "beside"}),  # transitively, and out of the package
        ("import beside", {"pack.lib.b", "pack.lib.a", "beside"}),
        ("import numpy, os.path, nowhere.at_all", set()),
    ],
)
def test_every_form_of_import_is_followed(tree, text, reached):
    write(tree, {"pack/__init__": "", "pack/op/__init__": "", "pack/op/triton": text, "pack/op/own": ""})
    write(tree, {"pack/lib/a": "", "pack/lib/b": "from . import a\nimport beside", "beside": "import pack.lib.b"})  # a circle
    passed = {"pack", "pack.op", "pack.op.triton"}
    assert names("pack.op.triton") == passed | reached


def test_what_a_package_takes_from_its_modules_is_followed(tree):
    """`from ..lib import scale`, where lib/__init__.py takes it from elsewhere; a package merely passed is not followed."""
    write(tree, {"pack/__init__": "import pack.heavy", "pack/heavy": "", "pack/op/__init__": ""})
    write(tree, {"pack/op/triton": "from ..lib import s"})
    write(tree, {"pack/lib/__init__": "from .inner.scale import s", "pack/lib/inner/scale": "s = 1"})
    assert names("pack.op.triton") == {"pack", "pack.op", "pack.op.triton", "pack.lib", "pack.lib.inner.scale"}


def test_a_folder_beside_a_module_that_is_imported_under_its_name_is_followed(tree, monkeypatch):
    """As CuteDSL's `_cutlass_ir`, an extension of another file's name beside a folder of that name."""
    write(tree, {"pack/__init__": "", "pack/op/triton": "from pack.lib.inner.deep import a", "pack/lib/inner/deep/a": ""})
    importlib.import_module("pack")
    monkeypatch.setitem(sys.modules, "pack.lib", types.ModuleType("pack.lib"))
    monkeypatch.setitem(sys.modules, "pack.lib.inner", types.ModuleType("pack.lib.inner"))
    assert names("pack.op.triton") == {"pack", "pack.op.triton", "pack.lib.inner.deep.a"}


def test_installed_distributions_count_by_version():
    found = ImportGraph().closure(["hdispatch.kernels.silu_and_mul_per_block_quant.triton"])
    assert {each.partition("==")[0] for each in found.distributions} >= {"torch", "triton"}
    assert not any("site-packages" in path.parts and "hdispatch" not in path.parts for path in found.files.values())


def test_a_file_that_is_no_python(tree):
    write(tree, {"pack/__init__": "", "pack/op/__init__": "", "pack/op/triton": "def ("})
    with pytest.raises(BuildError, match=r"triton\.py, which is built from, cannot be read as Python"):
        names("pack.op.triton")


def test_the_key_of_every_op_has_all_that_it_runs():
    found = op_package.sources([f"hdispatch.kernels.{op}" for op in available_ops()])
    for package, hashes in found.items():
        folder = op_package.folder_of(package)
        assert {f"{package}.{path.stem}" for path in folder.glob("*.py") if path.stem != "__init__"} <= hashes.keys()
        wing = {"compile.record_builder", "compile.triton_backend", "compile.trace", "manifest", "opspec"}
        assert {f"hdispatch.{name}" for name in wing} <= hashes.keys()
        assert "hdispatch.runtime" not in hashes, "the serve wing decides no record"
    assert GROUPS in found["hdispatch.kernels.silu_and_mul_per_block_quant"]
    assert GROUPS not in found["hdispatch.kernels.rotary_embedding"]


@pytest.mark.parametrize("edited", ["pack/lib/inner/scale.py", "pack/other/triton.py", "beside.py", "pack/op/spec.py"])
def test_an_edit_anywhere_changes_the_key(tree, edited):
    write(tree, {"pack/__init__": "", "pack/op/__init__": "", "pack/op/spec": "", "pack/other/__init__": "", "pack/unused": ""})
    write(tree, {"pack/op/triton": "from ..other.triton import f\nfrom ..lib.inner import scale"})
    write(tree, {"pack/other/triton": "import beside"})
    write(tree, {"pack/lib/inner/scale": "", "beside": ""})
    (before,) = op_package.sources(["pack.op"]).values()
    (tree / "pack" / "unused.py").write_text("x = 1")
    assert op_package.sources(["pack.op"]) == {"pack.op": before}
    (tree / edited).write_text((tree / edited).read_text() + "\nx = 1")
    (after,) = op_package.sources(["pack.op"]).values()
    changed = {name for name in before if before[name] != after.get(name)}
    assert changed == {edited.removesuffix(".py").replace("/", ".")}


@pytest.mark.slow
def test_an_edited_helper_in_another_folder_is_built_again(tree, tmp_path):
    """The same cache, twice: by `build` and by `tune candidates`."""
    example = SUPPORT / "triton_example"
    kernel = (example / "triton.py").read_text()
    write(
        tree,
        {
            "pack/__init__": "",
            "pack/triton_example/__init__": "",
            "pack/triton_example/spec": (example / "spec.py").read_text(),
            "pack/triton_example/triton": kernel.replace(
                "import triton.language as tl\n", "import triton.language as tl\n\nfrom ..lib.inner.scaling import scaled\n"
            ).replace("x + alpha * y", "scaled(x, alpha, y)"),
            "pack/lib/inner/scaling": "import triton\n\n\n@triton.jit\ndef scaled(x, alpha, y):\n    return x + alpha * y\n",
        },
    )
    one = Selection(shapes=lambda _: [{"K": 64, "N": 72}], variants=lambda _: ["any"], buckets=lambda _: [0])
    scope = Scope(shapes=one.shapes, variants=one.variants, buckets=one.buckets, radius=-1, spread=0)
    config = tree / "pack" / "triton_example" / "configs" / "nvidia_h200.json"
    config.parent.mkdir()
    config.write_text((example / "configs" / "nvidia_h200.json").read_text())
    extra, cache = ["pack.triton_example"], tmp_path / "cache"

    def built(out: str) -> tuple[int, dict[str, object]]:
        report = build(["triton_example"], "h200", tmp_path / out, cache=cache, extra=extra, select=one, jobs=1)
        return report.cache_hits, read_bundle(tmp_path / out)[0]["files"]

    first = built("a")
    assert first[0] == 0
    assert built("b") == (1, first[1])
    edited = tree / "pack" / "lib" / "inner" / "scaling.py"
    edited.write_text(edited.read_text().replace("x + alpha * y", "x - alpha * y"))
    second = built("c")
    assert second[0] == 0
    assert second[1] != first[1]
    edited.write_text(edited.read_text().replace("x - alpha * y", "x - 2 * alpha * y"))
    made = collect.collect(["triton_example"], "h200", tmp_path / "d", scope=scope, cache=cache, extra=extra, jobs=1)
    assert made.ops["triton_example"].from_cache == 0
    assert read_bundle(tmp_path / "d")[0]["files"].keys().isdisjoint(second[1])

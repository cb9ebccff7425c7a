"""Ops outside of hdispatch: installed distributions, folders and packages; built, listed, tuned, inspected and served."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import hdispatch
import pytest
import torch
from fake_device import FakeDevice
from hdispatch import HdispatchError, kernel_packages
from hdispatch.compile import build, op_package
from hdispatch.errors import BuildError
from hdispatch.testing import null
from hdispatch.tune import collect, measure, select, timings

SPEC = """
import torch
from hdispatch.opspec import OpSpec, TensorArg

def reference(out, x):
    \"\"\"out [M, K] = FACTOR * x.\"\"\"
    out.copy_(x * FACTOR)

def sample(variant, sizes, device, generator):
    x = torch.randn((sizes["M"], sizes["K"]), generator=generator, device=device)
    return [torch.full_like(x, float("nan")), x]

SPEC = OpSpec(
    name="NAME",
    args=(TensorArg("out", ("M", "K"), "x", mutated=True), TensorArg("x", ("M", "K"), (torch.float32,))),
    reference=reference, sample=sample, shapes=({"K": 64},), config_key={"width": "K", "rows": "M"}, ladder=(1, 16),
)
"""

KERNEL = """
import triton
import triton.language as tl

from LIB import multiple

@triton.jit
def kernel(out, x, elements, FACTOR: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at, at < elements) * FACTOR, at < elements)

def launch(out, x, *, config, _launcher):
    elements = x.size(0) * x.size(1)
    _launcher(kernel, (multiple(elements, config["size"]),), out, x, elements, FACTOR=FACTOR_OF, SIZE=config["size"])

def candidates(sizes, variant):
    return [{"size": size} for size in (128, 256)]
"""

LIB = "def multiple(size, by):\n    return (size + by - 1) // by\n"

#: In a process of its own: nothing is defined there but what is installed.
SERVE = """
import sys, torch, hdispatch
from hdispatch.testing import null
assert NAME not in hdispatch.registry.names(), "installed ops are defined when they are looked for"
hdispatch.load(sys.argv[1], driver="null")
x = torch.randn(3, 64)
with hdispatch.strict(), null.recording():
    getattr(hdispatch.ops, NAME)(torch.empty_like(x), x)
    getattr(torch.ops.hdispatch, NAME)(torch.empty_like(x), x)
    print([launch["grid"] for launch in null.launches()])
"""


def write_op(folder: Path, name: str, factor: int, lib: str) -> None:
    """An op that multiplies; its kernel takes a helper from the module `lib`."""
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "spec.py").write_text(SPEC.replace("FACTOR", str(factor)).replace("NAME", name))
    (folder / "triton.py").write_text(KERNEL.replace("LIB", lib).replace("FACTOR_OF", str(factor)))


def project(folder: Path, prefix: str) -> Path:
    """A package `<prefix>_kernels` with two ops in `ops`, and a module that both use."""
    package = folder / f"{prefix}_kernels"
    write_op(package / "ops" / f"{prefix}_double", f"{prefix}_double", 2, "...lib")
    write_op(package / "ops" / f"{prefix}_triple", f"{prefix}_triple", 3, f"{prefix}_kernels.lib")
    for init in (package, package / "ops"):
        (init / "__init__.py").write_text("")
    (package / "lib.py").write_text(LIB)
    return package


def wheel(folder: Path, package: Path, value: str) -> Path:
    """A wheel of a package, whose entry points name `value`."""
    info = f"{package.name}-1.0.dist-info"
    files = {str(path.relative_to(package.parent)): path.read_bytes() for path in package.rglob("*.py")}
    files |= {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package.name}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[{kernel_packages.GROUP}]\nmine = {value}\n".encode(),
    }
    record = "".join(f"{name},sha256={hashlib.sha256(data).hexdigest()},{len(data)}\n" for name, data in files.items())
    file = folder / f"{package.name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n".encode()}.items():
            archive.writestr(name, data)
    return file


def install(folder: Path, prefix: str, value: str) -> Path:
    """Install such a package with pip into a folder of its own."""
    made = wheel(folder, project(folder / "source", prefix), value)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*pip, "--disable-pip-version-check", "--target", folder / "site", made], check=True, timeout=120)
    return folder / "site"


def run(arguments: list[str], site: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` in a process that has `site` installed."""
    environment = dict(os.environ) | ({"PYTHONPATH": str(site)} if site else {})
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_an_installed_distribution_is_built_and_served_by_name(tmp_path):
    site = install(tmp_path, "foreign", "foreign_kernels.ops")
    where = ["--target", "h200", "--out", tmp_path / "b", "--cache", tmp_path / "cache"]
    made = run(["-m", "hdispatch", "build", "--ops", "foreign_double", *where], site)
    assert made.returncode == 0, made.stderr
    assert "foreign_double has no configs: asking its triton kernel for candidates" in made.stderr
    assert "compiling in 1 process: foreign_double any K=64 buckets 0-1" in made.stderr
    served = run(["-c", SERVE.replace("NAME", "'foreign_double'"), tmp_path / "b"], site)
    assert (served.returncode, served.stdout) == (0, "[(2, 1, 1), (2, 1, 1)]\n"), served.stderr
    without = run(["-c", SERVE.replace("NAME", "'foreign_double'"), tmp_path / "b"])
    assert "holds op 'foreign_double', which is not defined here: install the package that it was built from" in without.stderr


def test_a_distribution_whose_ops_are_not_there_is_named_when_an_op_is_looked_for(tmp_path):
    site = install(tmp_path, "broken", "broken_kernels.nowhere")
    used = run(["-c", "import hdispatch\nhdispatch.ops.rms_norm\nprint('as before')\nhdispatch.ops.broken_double"], site)
    assert used.stdout == "as before\n"
    assert (
        "broken-kernels names 'broken_kernels.nowhere' in the entry points 'hdispatch.kernels' (mine)"
        in used.stderr.replace("broken_kernels names", "broken-kernels names")
    )
    assert "repair or uninstall it" in used.stderr


def test_the_command_line_takes_a_folder(tmp_path):
    package = project(tmp_path, "folder")
    out = ["--target", "h200", "--out", tmp_path / "b", "--cache", tmp_path / "cache", "--json"]
    made = run(["-m", "hdispatch", "build", "--kernels", package / "ops", *out])
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["rows"] == 2 * 2
    shown = run(["-m", "hdispatch", "inspect", tmp_path / "b", "--kernels", package / "ops" / "folder_triple", "--json"])
    assert shown.returncode == 0, shown.stderr
    assert sorted(json.loads(shown.stdout)["ops"]) == ["folder_double", "folder_triple"]
    spec = package / "ops" / "folder_triple" / "spec.py"
    spec.write_text(spec.read_text().replace("torch.float32,", "torch.float16,"))
    other = run(["-m", "hdispatch", "inspect", tmp_path / "b", "--kernels", package / "ops"])
    assert other.returncode == 1
    assert "the installed op is folder_triple" in other.stderr


def test_tuning_writes_configs_beside_the_op_and_the_next_build_takes_them(tmp_path):
    package = project(tmp_path, "tuned")
    extra, cache = [str(package / "ops" / "tuned_double")], tmp_path / "cache"
    report = collect.collect(["tuned_double"], "h200", tmp_path / "candidates", cache=cache, extra=extra, jobs=1)
    assert report.ops["tuned_double"].options == 2

    def us_of(rows):
        return 1.0 if rows.record["config"]["size"] == 256 else 2.0

    fake = FakeDevice(us_of)
    done = measure.measure(tmp_path / "candidates", tmp_path / "times.jsonl", device=fake, kernels=extra)
    assert (done.measured, done.failures) == (2, [])
    packages = op_package.find(["tuned_double"], extra)
    select.select(timings.read(tmp_path / "times.jsonl", select.refusal(packages)), packages)
    written = json.loads((package / "ops" / "tuned_double" / "configs" / "nvidia_h200.json").read_text())
    assert {entry["config"]["size"] for entry in written} == {256}
    built = build(["tuned_double"], "h200", tmp_path / "bundle", cache=cache, extra=extra, jobs=1)
    assert (built.notes, built.cache_hits) == ([], 1)
    loaded = hdispatch.load(tmp_path / "bundle", driver="null")
    x = torch.randn(5, 64)
    with hdispatch.strict(), null.recording():
        hdispatch.ops.tuned_double(torch.empty_like(x), x)
        assert [launch["grid"] for launch in null.launches()] == [(2, 1, 1)]
    loaded.unload()


# ---- finding ----


def test_a_folder_is_imported_as_what_it_is_part_of(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    package = project(tmp_path / "whole", "part")
    both = ["part_kernels.ops.part_double", "part_kernels.ops.part_triple"]
    assert kernel_packages.op_packages(package / "ops") == both
    assert kernel_packages.op_packages(package / "ops" / "part_double") == both[:1]
    assert kernel_packages.op_packages("part_kernels.ops") == both
    assert kernel_packages.op_packages("part_kernels.ops.part_triple") == both[1:]
    write_op(tmp_path / "loose" / "loose_double", "loose_double", 2, "lib")
    assert kernel_packages.op_packages(tmp_path / "loose") == ["loose_double"]
    assert kernel_packages.op_packages(tmp_path / "loose" / "loose_double") == ["loose_double"]


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("no_such_package", "no_such_package is not a package that can be imported here"),
        ("no_such.package", "no_such.package cannot be imported here"),
        ("./nowhere", "./nowhere is no folder"),
        ("email", "has no spec.py and no folder with one"),
        (Path("nowhere"), "nowhere is no folder"),
    ],
)
def test_what_is_no_package_of_ops_is_refused(where, words):
    with pytest.raises(HdispatchError, match=words.replace(".", "[.]")):
        kernel_packages.op_packages(where)


def test_a_folder_whose_name_is_taken_or_none_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    write_op(tmp_path / "a" / "email", "email_double", 2, "lib")
    with pytest.raises(HdispatchError, match=r"email is another package here, .*rename the folder"):
        kernel_packages.op_packages(tmp_path / "a")
    write_op(tmp_path / "b" / "my-op", "my_op", 2, "lib")
    with pytest.raises(HdispatchError, match="'my-op' is no name of a package"):
        kernel_packages.op_packages(tmp_path / "b")
    (tmp_path / "c").mkdir()
    with pytest.raises(HdispatchError, match=r"has no spec\.py"):
        kernel_packages.op_packages(tmp_path / "c")


def test_two_ops_of_one_name_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    write_op(tmp_path / "clash_own", "rms_norm", 2, "lib")
    write_op(tmp_path / "clash_a", "clash", 2, "lib")
    write_op(tmp_path / "clash_b", "clash", 2, "lib")
    with pytest.raises(BuildError, match=r"clash_own and hdispatch.kernels.rms_norm both declare the op 'rms_norm'"):
        op_package.find(None, [str(tmp_path / "clash_own")])
    with pytest.raises(BuildError, match="clash_b and clash_a both declare the op 'clash'"):
        op_package.find(None, [str(tmp_path / "clash_a"), str(tmp_path / "clash_b")])
    with pytest.raises(HdispatchError, match="op 'rms_norm' is defined already"):
        hdispatch.registry.define_package(tmp_path / "clash_own")
    assert hdispatch.registry.define_package(tmp_path / "clash_a") == ["clash"]
    assert hdispatch.registry.define_package("clash_a") == ["clash"], "again, it stays"

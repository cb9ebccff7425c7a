"""Recording what a run compiles with Triton, building it without a GPU, and serving it from the first call."""

from __future__ import annotations

import copy
import enum
import importlib.util
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from hdispatch import BundleError, HdispatchError, archive, embedded, recorded, recorder, recording
from hdispatch.bundle_reader import read_bundle
from hdispatch.cli.main import main
from hdispatch.compile import build
from hdispatch.errors import BuildError
from hdispatch.manifest import MANIFEST_NAME

KERNELS = """
import enum
import triton
import triton.language as tl

SCALE = tl.constexpr(3)

class Mode(enum.IntEnum):
    PLAIN = 0
    TWICE = 1

@triton.jit
def square(x):
    return x * x * SCALE

@triton.jit
def cube(x):
    return x * x * x

@triton.jit
def plain(out, x, elements, FUNCTION: tl.constexpr, DTYPE: tl.constexpr, PAIR: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x + at, at < elements).to(DTYPE)
    tl.store(out + at, FUNCTION(y) * PAIR[0] + PAIR[1], at < elements)

@triton.autotune([triton.Config({"BLOCK": b}, num_warps=w) for b, w in ((128, 4), (256, 8))], key=["elements"])
@triton.heuristics({"EVEN": lambda args: args["elements"] % 16 == 0})
@triton.jit
def tuned(out, x, elements, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, at < elements) + (1 if EVEN else 2), at < elements)

@triton.jit
def moded(out, x, MODE: tl.constexpr):
    tl.store(out, tl.load(x) * 2 if MODE == 1 else tl.load(x))

@triton.autotune([triton.Config({"BLOCK": b}) for b in (16, 64, 1024)], key=["stride"])
@triton.jit
def picky(out, x, stride, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK >= 64, "rows are not whole")
    at = tl.arange(0, 64)[:, None] * stride + tl.arange(0, BLOCK)[None, :]
    a = tl.load(x + at)
    rows = tl.arange(0, 64)
    tl.store(out + rows[:, None] * 64 + rows[None, :], tl.dot(a, tl.trans(a)))

def nested():
    @triton.jit
    def inside(out, BLOCK: tl.constexpr):
        tl.store(out + tl.arange(0, BLOCK), 1.0)
    return inside
"""

#: Compiles them, as a run with a GPU would on its first calls.
RUN = """
import triton
import triton.language as tl
from triton.runtime.jit import MockTensor
import torch

def run(kernels):
    import triton.runtime.jit
    pointer = MockTensor(torch.float32)
    made = {}
    for elements in (1, 16, 1000):
        for function in (kernels.square, kernels.cube):
            made[elements, function.fn.__name__] = kernels.plain.warmup(
                pointer, pointer, elements, function, tl.float32, (2, 3), BLOCK=128, grid=(1,))
    made["warps"] = kernels.plain.warmup(
        pointer, pointer, 16, kernels.cube, tl.float32, (2, 3), BLOCK=128, grid=(1,), num_warps=8, num_stages=2)
    for mode in kernels.Mode:
        made[mode] = kernels.moded.warmup(pointer, pointer, mode, grid=(1,))
    for config in kernels.tuned.configs:
        made["tuned", config.num_warps] = kernels.tuned.fn.fn.warmup(
            pointer, pointer, 64, True, BLOCK=config.kwargs["BLOCK"], num_warps=config.num_warps, grid=(1,))
    for config in kernels.picky.configs:
        try:
            made["picky", config.kwargs["BLOCK"]] = kernels.picky.fn.warmup(
                pointer, pointer, 1024, **config.kwargs, num_warps=4, grid=(1,))
        except triton.compiler.errors.CompileTimeAssertionFailure as error:
            assert config.kwargs["BLOCK"] == 16 and "rows are not whole" in str(error) and "BLOCK >= 64" in str(error), error
            made["refused"] = error
    assert "refused" in made
    return {name: each for name, each in made.items() if name != "refused"}
"""

DESCRIBED = """
from hdispatch.compile import target
target.install(target.DESCRIBED[{gpu!r}])
"""

#: The specializations of RUN that are compiled; a compiler refuses one more.
COUNT = 13

#: What the builder says of an autotuner's configs that no GPU of the target takes.
NOTES = [
    "user_kernels.picky: 1 recorded specialization: 262144 bytes of shared memory, of 232448 that there are: a launch raises "
    "OutOfResources",
    "user_kernels.picky: 1 recorded specialization refused by the compiler, as in the run: CompileTimeAssertionFailure",
]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A folder with the kernels of a user, and a run of them."""
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "user_kernels.py").write_text(KERNELS)
    (folder / "user_run.py").write_text(RUN)
    return folder


def python(project: Path, text: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh process of the project with cold caches."""
    cold = {"TRITON_CACHE_DIR": str(project / f"triton-{os.urandom(4).hex()}")}
    return subprocess.run(
        [sys.executable, "-c", text],
        env={**os.environ, "PYTHONPATH": str(project), **cold, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def file(project) -> Path:
    """What a run on an H100 compiled."""
    file = project / "kernels.jsonl"
    done = python(
        project,
        DESCRIBED.format(gpu="h100")
        + f"import hdispatch\nwith hdispatch.record({str(file)!r}) as recorded:\n"
        + "    import user_kernels, user_run\n    user_run.run(user_kernels)\nprint(recorded.count)",
    )
    assert (done.returncode, done.stdout) == (0, f"{COUNT + 1}\n"), done.stderr
    return file


@pytest.fixture(scope="module")
def bundle(project, file) -> Path:
    """The same, compiled for an H200 in a process that never had the kernels."""
    cache = ["--cache", str(project / "cache")]
    command = ["-m", "hdispatch", "build", "--record", str(file), "--target", "h200", "--out", str(project / "bundle"), *cache]
    done = subprocess.run(
        [sys.executable, *command, "--json"],
        env={**os.environ, "PYTHONPATH": str(project)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["recorded"], report["rows"], report["notes"]) == (COUNT, 0, NOTES)
    return project / "bundle"


#: Runs with the bundle; Triton's compiler fails.
SERVE = """
import sys, time, hdispatch
from hdispatch import recorded
loaded = hdispatch.load({bundle!r}, driver="null")
recorded.serve(0, loaded._recorded)
import triton, user_kernels, user_run
import triton.compiler.compiler as compiler
seen = []
triton.knobs.runtime.jit_post_compile_hook = lambda **given: seen.append(given["key"])
def refuse(*args, **kwargs):
    raise SystemExit("Triton compiles")
compiler.compile = refuse
for kernel in (user_kernels.plain, user_kernels.tuned.fn.fn, user_kernels.picky.fn):
    kernel.device_caches[0]
    kernel.compile = refuse
"""


def test_a_run_with_the_bundle_compiles_nothing(project, bundle):
    done = python(
        project,
        DESCRIBED.format(gpu="h200")
        + SERVE.format(bundle=str(bundle))
        + "made = user_run.run(user_kernels)\n"
        + "assert all(each.asm['cubin'][:4] == b'\\x7fELF' for each in made.values())\n"
        + "assert made['warps'].metadata.num_warps == 8 and made['tuned', 8].metadata.num_warps == 8\n"
        + "assert {each.metadata.target.arch for each in made.values()} == {90}\n"
        + "assert all(each.metadata.name == each.name for each in made.values())\n"
        + "assert not seen\n"
        + "print(recorded.stats())",
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout
        == str(
            {
                "served": {"user_kernels.plain": 7, "user_kernels.moded": 2, "user_kernels.tuned": 2, "user_kernels.picky": 3},
                "compiled": {},
            }
        )
        + "\n"
    )


def test_the_code_is_what_triton_compiles_itself(project, bundle):
    text = (
        DESCRIBED.format(gpu="h200")
        + "import hashlib, user_kernels, user_run, triton\n"
        + "for each in user_run.run(user_kernels).values():\n    print(hashlib.sha256(each.asm['cubin']).hexdigest())"
    )
    done = python(project, text, TRITON_DISABLE_LINE_INFO="1")
    assert done.returncode == 0, done.stderr
    manifest, contents = read_bundle(bundle)
    assert {entry["file"] for entry in manifest["recorded"]} == {f"artifacts/{sha}.cubin" for sha in done.stdout.split()}
    assert set(contents) == {entry["file"] for entry in manifest["recorded"]}


def test_a_key_that_is_not_in_the_bundle_compiles_and_is_counted_or_refused(project, bundle):
    text = (
        DESCRIBED.format(gpu="h200")
        + "import hdispatch, torch\nfrom hdispatch import recorded\n"
        + f"recorded.serve(0, hdispatch.load({str(bundle)!r}, driver='null')._recorded)\n"
        + "import user_kernels, triton.language as tl\nfrom triton.runtime.jit import MockTensor\n"
        + "p = MockTensor(torch.float32)\n"
        + "call = lambda n: user_kernels.plain.warmup(p, p, 16, user_kernels.cube, tl.float32, (2, n), BLOCK=128, grid=(1,))\n"
        + "assert call(4) is not None\nprint(recorded.stats(reset=True)['compiled'])\n"
        + "with hdispatch.strict():\n    call(3)\n    call(4)\n    try:\n        call(5)\n"
        + "    except hdispatch.MissError as error:\n        print(error)\n"
    )
    done = python(project, text)
    assert done.returncode == 0, done.stderr
    counted, refused = done.stdout.splitlines()
    assert counted == "{'user_kernels.plain': 1}"
    assert refused.startswith("user_kernels.plain: no recorded kernel of the bundle has the key [")


def test_what_an_autotuner_tries_in_vain_raises_as_triton_does_and_compiles_nothing(project, bundle):
    """In strict mode, too: one config needs more shared memory than a GPU has, one is refused by the compiler."""
    text = (
        DESCRIBED.format(gpu="h200")
        + SERVE.format(bundle=str(bundle))
        + "import types, torch\n"
        + "from triton.runtime import driver\nfrom triton.runtime.errors import OutOfResources\n"
        + "utils = types.SimpleNamespace(get_device_properties=lambda device: {'max_shared_mem': 232448})\n"
        + "driver.active.utils, driver.active.launcher_cls = utils, lambda *given: None\n"
        + "p = user_run.MockTensor(torch.float32)\n"
        + "call = lambda block: user_kernels.picky.fn.warmup(p, p, 1024, BLOCK=block, num_warps=4, grid=(1,))\n"
        + "with hdispatch.strict():\n    kernel = call(1024)\n    assert call(64) is not kernel\n"
        + "    try:\n        kernel.run\n    except OutOfResources as error:\n"
        + "        print(error.required, error.limit, error.name)\n"
        + "    for _ in range(2):\n        try:\n            call(16)\n"
        + "        except triton.compiler.errors.CompileTimeAssertionFailure as error:\n"
        + "            print(str(error).splitlines()[-1])\n"
    )
    done = python(project, text)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["262144 232448 shared memory", *["rows are not whole"] * 2]


@pytest.mark.parametrize("name", list(recorder.REFUSALS))
def test_a_refusal_is_the_compilers_error_again(name):
    entry: Any = {"error": name, "message": "PTXAS error: why" if name == "PTXASError" else "why"}
    error = recorded.RefusedKernel(entry).error()
    assert (type(error).__name__, str(error)) == (name, entry["message"])
    assert f"{type(error).__module__}" == recorder.REFUSALS[name]


@pytest.mark.parametrize("name", list(recorder.REFUSALS))
def test_a_copy_of_a_refusal_says_the_same(name):
    entry: Any = {"error": name, "message": "PTXAS error: why" if name == "PTXASError" else "at 1:2:\nwhy"}
    error = recorded.RefusedKernel(entry).error()
    assert [str(each) for each in (copy.deepcopy(error), pickle.loads(pickle.dumps(error)))] == [entry["message"]] * 2


#: Kernels that a compiler refuses, with messages that no file of JSON can hold, and ptxas' own, which names temporary files.
REFUSED = """
import triton, triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

@triton.jit
def odd(out, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK > 16, "a\\0b\\ud800 in x.ptx ")

@gluon.jit
def gluons(out, BLOCK: gl.constexpr):
    gl.static_assert(BLOCK > 16, "gluon's")

@triton.jit
def ptx(out, BLOCK: tl.constexpr):
    x = tl.inline_asm_elementwise("mov.none $0, 1;", "=r", [], dtype=tl.int32, is_pure=True, pack=1)
    tl.store(out + tl.arange(0, BLOCK), x)
"""

#: Asks for each twice, and of what Triton raises it writes the last line.
RUN_REFUSED = """
import json, sys, torch, refused_kernels
from triton.runtime.jit import MockTensor
def run():
    said = []
    for name in ("odd", "gluons", "ptx"):
        for _ in range(2):
            try:
                getattr(refused_kernels, name).warmup(MockTensor(torch.int32), BLOCK=16, grid=(1,))
            except Exception as error:
                said.append([type(error).__name__, str(error)])
    return said
"""


@pytest.fixture(scope="module")
def refused(tmp_path_factory) -> Path:
    """A folder with a recording of kernels that a compiler refuses, all of them, and a bundle of it."""
    folder = tmp_path_factory.mktemp("refused")
    (folder / "refused_kernels.py").write_text(REFUSED)
    (folder / "refused_run.py").write_text(RUN_REFUSED)
    text = f"import hdispatch\nwith hdispatch.record({str(folder / 'r.jsonl')!r}) as recorded:\n    import refused_run\n"
    done = python(folder, DESCRIBED.format(gpu="h100") + text + "    refused_run.run()\nprint('count', recorded.count)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "count 3"
    build([], "h200", folder / "bundle", cache=folder / "cache", record=[folder / "r.jsonl"], jobs=1)
    return folder


def test_what_a_compiler_refuses_is_recorded_once(refused):
    _, lines = recording.read([refused / "r.jsonl"])
    assert [each["refused"] for each in lines] == ["CompileTimeAssertionFailure"] * 2 + ["PTXASError"]
    assert len((refused / "r.jsonl").read_text().splitlines()) == 4  # and the source


def test_messages_of_refusals_are_whatever_a_file_can_hold_and_the_same_in_each_build(refused, capfd):
    build([], "h200", refused / "again", cache=refused / "cache2", record=[refused / "r.jsonl"], jobs=1)
    again, manifest = (json.loads((refused / name / MANIFEST_NAME).read_text()) for name in ("again", "bundle"))
    assert again == manifest
    assert read_bundle(refused / "bundle")[0] == manifest
    done = python(
        refused,
        DESCRIBED.format(gpu="h200")
        + "import hdispatch, json, refused_run\nfrom hdispatch import recorded\n"
        + f"recorded.serve(0, hdispatch.load({str(refused / 'bundle')!r}, driver='null')._recorded)\n"
        + "with hdispatch.strict():\n    print(json.dumps(refused_run.run()))",
    )
    assert done.returncode == 0, done.stderr
    odd, _, gluons, _, ptx, _ = json.loads(done.stdout)
    assert (odd[0], odd[1].splitlines()[-1]) == ("CompileTimeAssertionFailure", "a\\0b\\ud800 in x.ptx ")
    assert (gluons[0], gluons[1].splitlines()[-1]) == ("CompileTimeAssertionFailure", "gluon's")
    assert ptx[0] == "PTXASError"
    assert "ptxas kernel.ptx, line" in ptx[1]
    assert "Repro" not in ptx[1]
    capfd.readouterr()
    assert main(["inspect", str(refused / "bundle")]) == 0
    assert "triton  refused_kernels.odd: 1 recorded specialization that the compiler refuses" in capfd.readouterr().out


#: Compiles in other threads, as Triton offers it: errors come with the results, and not where a kernel is asked for.
ASYNCHRONOUS = """
from concurrent.futures import ThreadPoolExecutor
from triton.runtime._async_compile import AsyncCompileMode
def run():
    import user_kernels, torch
    from triton.runtime.jit import MockTensor
    p = MockTensor(torch.float32)
    with ThreadPoolExecutor(1) as pool, AsyncCompileMode(pool, ignore_errors=True):
        made = [user_kernels.picky.fn.warmup(p, p, 1024, BLOCK=16, num_warps=4, grid=(1,)) for _ in range(2)]
    for each in made:
        try:
            each.kernel_that_is_launched
        except Exception as error:
            print(type(error).__name__, str(error).splitlines()[-1])
"""


def test_refusals_of_kernels_that_are_compiled_in_threads_are_recorded_and_served_as_such(project, bundle, tmp_path):
    said = ["CompileTimeAssertionFailure rows are not whole"] * 2
    done = python(
        project,
        DESCRIBED.format(gpu="h100")
        + ASYNCHRONOUS
        + f"import hdispatch\nwith hdispatch.record({str(tmp_path / 'r.jsonl')!r}):\n    run()\n",
    )
    assert (done.returncode, done.stdout.splitlines()) == (0, said), done.stderr
    _, lines = recording.read([tmp_path / "r.jsonl"])
    assert [each.get("refused") for each in lines] == ["CompileTimeAssertionFailure"]
    done = python(project, DESCRIBED.format(gpu="h200") + SERVE.format(bundle=str(bundle)) + ASYNCHRONOUS + "run()\n")
    assert (done.returncode, done.stdout.splitlines()) == (0, said), done.stderr


def test_of_a_specialization_that_one_run_compiled_the_other_refused_the_builder_decides(file, tmp_path):
    """In whatever order they are given."""
    lines = [json.loads(each) for each in file.read_text().splitlines()]
    (refused,) = [each for each in lines if "refused" in each]
    paths = [tmp_path / name for name in "ab"]
    for path, line in zip(paths, (refused, {name: each for name, each in refused.items() if name != "refused"}), strict=True):
        path.write_text(json.dumps(line) + "\n")
    assert recording.read(paths) == recording.read(paths[::-1]) == ({}, [refused])


class _Refusing:
    """Stands for a kernel that the compiler refuses: what is taken of it is counted."""

    device_caches = types.MappingProxyType(dict.fromkeys((0, -5), (None, None, "target")))

    def _call_hook(self, hook: Any, key: str, _signature: Any, target: str, *_others: Any) -> None:
        hook(key=(key, target))


def test_blocks_that_overlap_each_record_once_also_the_second_time(tmp_path, monkeypatch):
    import triton
    from triton.compiler.errors import CompileTimeAssertionFailure
    from triton.runtime.jit import JITFunction

    def plain(*_given: Any) -> None:
        raise CompileTimeAssertionFailure("why", None)

    monkeypatch.setattr(JITFunction, "_do_compile", plain)
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", None)
    taken = []
    monkeypatch.setattr(recorder.Recorder, "_take", lambda self, _given, refused="": taken.append((self.file.name, refused)))

    def compile() -> list[tuple[str, str]]:
        taken.clear()
        if hook := triton.knobs.runtime.jit_post_compile_hook:
            hook()
        with pytest.raises(CompileTimeAssertionFailure):
            JITFunction._do_compile(_Refusing(), "key", {}, 0, {}, None, {}, False)
        return sorted(taken)

    once = [("a", ""), ("a", "CompileTimeAssertionFailure")]
    a, b = recording.record(tmp_path / "a"), recording.record(tmp_path / "b")
    with a:
        assert compile() == once
        b.begin()
    assert compile() == [("b", refused) for _, refused in once]
    b.end()
    assert compile() == []
    with a:
        assert compile() == once
    assert compile() == []


def test_a_bundle_that_is_loaded_again_in_a_recording_is_asked_once(tmp_path, monkeypatch):
    from triton.runtime.jit import JITFunction

    def name() -> None:
        """Stands for a kernel's function."""

    compiled = []
    monkeypatch.setattr(JITFunction, "_do_compile", lambda *given: compiled.append(given))
    made: Any = types.SimpleNamespace(prepared=None, metadata={"shared": 0})
    kernel = types.SimpleNamespace(fn=name, cache_key="hash")
    recorded.stats(reset=True)
    try:
        recorded.serve(-5, {("other", "hash", "key"): made})
        with recording.record(tmp_path / "r"):
            recorded.serve(-5, {("another", "hash", "key"): made})
            JITFunction._do_compile(kernel, "key", {}, -5, {}, None, {}, False)
        found = recorded.stats(reset=True)["compiled"]
    finally:
        recorded.serve(-5, {})
    assert len(compiled) == 1
    assert list(found.values()) == [1]


def test_a_recording_has_no_refusals_that_a_bundle_serves(tmp_path, monkeypatch):
    """As it has no code that a bundle serves: what it has is what the bundle lacks."""
    from triton.compiler.errors import CompileTimeAssertionFailure
    from triton.runtime.jit import JITFunction

    class Kernel(_Refusing):
        cache_key = "hash"

        def fn(self) -> None:
            """Stands for a kernel's function."""

    monkeypatch.setattr(JITFunction, "_do_compile", lambda *_given: None)
    taken: list[str] = []
    monkeypatch.setattr(recorder.Recorder, "_take", lambda _self, _given, refused="": taken.append(refused))
    name = f"{Kernel.fn.__module__}.{Kernel.fn.__qualname__}"
    entry: Any = {"kernel": name, "source_hash": "hash", "key": "key", "error": "CompileTimeAssertionFailure", "message": "why"}
    try:
        recorded.serve(-5, {(name, "hash", "key"): recorded.RefusedKernel(entry)})
        recorded.stats(reset=True)
        for _ in range(2):
            with recording.record(tmp_path / "r"), pytest.raises(CompileTimeAssertionFailure, match="why"):
                JITFunction._do_compile(Kernel(), "key", {}, -5, {}, None, {}, False)
        found = recorded.stats(reset=True)
    finally:
        recorded.serve(-5, {})
    assert taken == []
    assert found == {"served": {name: 1}, "compiled": {}}  # specializations, however often an autotuner asks for one


def test_a_recording_that_ended_leaves_triton_as_it_was(tmp_path):
    from triton.runtime.jit import JITFunction

    before = JITFunction._do_compile
    with recording.record(tmp_path / "a"):
        assert JITFunction._do_compile is not before
    assert JITFunction._do_compile is before


def test_a_process_that_interprets_its_kernels_loads_the_bundle_too(project, bundle):
    done = python(
        project,
        f"import hdispatch\nmade = hdispatch.load({str(bundle)!r}, driver='null')\n"
        + "from hdispatch import recorded\nrecorded.serve(0, made._recorded)\nprint(len(made._recorded) > 0)",
        TRITON_INTERPRET="1",
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_launchers_that_triton_compiles_are_made_by_load(bundle, monkeypatch):
    """Triton 3.6: one for each list of types, whatever pointers point to, in the order of the function's parameters."""
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    made = []
    monkeypatch.setattr(nvidia, "make_launcher", None, raising=False)
    active = types.SimpleNamespace(launcher_cls=lambda source, metadata: made.append((source, metadata)))
    monkeypatch.setattr(driver, "_active", active)
    manifest, contents = read_bundle(bundle)
    table = recorded.table_of(bundle, manifest, contents)
    kernels = [each for each in table.values() if isinstance(each, recorded.RecordedKernel)]
    recorded._make_launchers(0, kernels)
    recorded._make_launchers(-1, kernels)
    found = [[*source.signature.items()] for source, _ in made]
    of_plain = ["out", "x", "elements", "FUNCTION", "DTYPE", "PAIR", "BLOCK"]
    kinds = sorted([kind for _, kind in each] for each in found if [name for name, _ in each] == of_plain)
    assert kinds == [["*fp32", "*fp32", kind, *["constexpr"] * 4] for kind in ("constexpr", "i32")]
    for entry in manifest["recorded"]:  # as an older bundle has it
        del entry["parameters"]
    recorded._make_launchers(0, [*recorded.table_of(bundle, manifest, contents).values()][:COUNT])
    assert len(made) == len(found)
    assert len(found) == len({str(each) for each in found}) < COUNT
    assert {metadata.num_warps for _, metadata in made} == {4, 8}


def test_recorded_kernels_are_added_to_the_rows_of_another_bundle(project, file, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(project))
    small = ["--ops", "rms_norm", "--shapes", "K=4096", "--variants", "bfloat16", "--target", "h200"]
    assert main(["build", *small, "--out", str(tmp_path / "rows")]) == 0
    base, base_files = read_bundle(tmp_path / "rows")
    added = ["build", "--record", str(file), "--onto", str(tmp_path / "rows"), "--cache", str(project / "cache")]
    for out in ("both", "both", "again"):  # a second time in the place of the first, then onto what has recorded kernels
        assert main([*added, "--out", str(tmp_path / out)]) == 0
        added[4] = str(tmp_path / "both")
    assert f"{len(base['rows'])} rows, {COUNT} recorded kernels for h200" in capfd.readouterr().out
    manifest, files = read_bundle(tmp_path / "both")
    again, _ = read_bundle(tmp_path / "again")
    assert manifest == again
    assert {**base, "files": manifest["files"]} == {name: manifest[name] for name in base}
    assert len(manifest["recorded"]) == COUNT
    assert files.keys() == base_files.keys() | {entry["file"] for entry in manifest["recorded"]}
    assert manifest["recorded_tools"]["triton"] == base["tools"]["triton"]
    # Without a folder, onto the installation's own for the GPU here.
    monkeypatch.setattr(embedded, "FOLDER", tmp_path)
    monkeypatch.delenv("HDISPATCH_BUNDLE", raising=False)
    archive.pack_together({"h200": tmp_path / "rows", "h100": tmp_path / "both"}, tmp_path / "sm_90a-h200-h100.tar.xz")
    own = ["build", "--record", str(file), "--onto", "--cache", str(project / "cache"), "--out", str(tmp_path / "own")]
    assert main(own) == 0
    assert read_bundle(tmp_path / "own")[0] == manifest


def test_only_recorded_kernels_must_be_of_the_triton_that_is_here(bundle):
    manifest, contents = read_bundle(bundle)
    manifest["tools"] = {"triton": "1.0"}
    assert len(recorded.table_of(bundle, manifest, contents)) == COUNT + 1
    manifest["recorded_tools"]["triton"] = "1.0"
    with pytest.raises(BundleError, match=r"its recorded kernels are triton 1\.0's; triton .* is installed"):
        recorded.table_of(bundle, manifest, contents)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--onto", "b"], "--onto takes the rows of a bundle as they are and adds recorded kernels: give --record FILE"),
        (["--record", "r", "--onto", "b", "--ops", "rms_norm", "--target", "h100"], "it takes no --ops, --target"),
        (["--record", "r", "--onto", "nothing"], "nothing/manifest.json: cannot be read"),
    ],
)
def test_what_onto_refuses(tmp_path, capfd, arguments, words):
    assert main(["build", *arguments, "--out", str(tmp_path / "out")]) == 1
    assert words in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def files_of(manifest: Any) -> dict[str, str]:
    """The code of each key."""
    return {entry["key"]: entry["file"] for entry in manifest["recorded"]}


def test_an_edited_kernel_is_not_served_the_old_code(project, file, bundle, tmp_path):
    (tmp_path / "user_kernels.py").write_text(KERNELS.replace("constexpr(3)", "constexpr(4)"))
    sys.path.insert(0, str(tmp_path))
    try:  # the recorded text is what was recorded, whatever is installed now
        report = build([], "h200", tmp_path / "b", cache=tmp_path / "cache", record=[file], jobs=1)
    finally:
        sys.path.remove(str(tmp_path))
    assert (report.recorded, report.notes) == (COUNT, NOTES)
    (tmp_path / "user_run.py").write_text(RUN)
    text = (
        DESCRIBED.format(gpu="h200")
        + "import hdispatch\nfrom hdispatch import recorded\n"
        + f"recorded.serve(0, hdispatch.load({str(tmp_path / 'b')!r}, driver='null')._recorded)\n"
        + "import user_kernels, user_run\nuser_run.run(user_kernels)\nprint(recorded.stats())"
    )
    done = python(tmp_path, text)
    manifest, _ = read_bundle(tmp_path / "b")
    original, _ = read_bundle(bundle)
    assert files_of(manifest) == files_of(original), "functions that a kernel is given are the recorded ones, too"
    # `square` uses the constant, and whatever is given `square`; `plain` with `cube` and `tuned` do not.
    assert (
        done.stdout
        == str(
            {
                "served": {"user_kernels.plain": 4, "user_kernels.moded": 2, "user_kernels.tuned": 2, "user_kernels.picky": 3},
                "compiled": {"user_kernels.plain": 3},
            }
        )
        + "\n"
    )


def test_what_cannot_be_built_again_is_named(project, file, tmp_path):
    lines = file.read_text().splitlines()
    changed: list[Any] = [json.loads(line) for line in lines if json.loads(line)["line"] == "specialization"][:6]
    changed[1]["constants"][0][1] = {"opaque": "<object object>"}
    changed[2]["qualname"] = "nested.<locals>.inside"
    changed[3]["source_hash"] = "0" * 64
    changed[4]["triton"] = "1.0"
    changed[5]["module"], changed[5]["module_sha256"] = "not_there", ""
    for number, line in enumerate(changed):
        line["key"] += f" {number}"
    whole = "".join(json.dumps(line) + "\n" for line in changed) + lines[0] + "\n"
    (tmp_path / "r.jsonl").write_text(whole)
    report = build([], "h200", tmp_path / "b", cache=tmp_path / "cache", record=[tmp_path / "r.jsonl"], jobs=1)
    assert report.recorded == 1
    said = "\n".join(report.notes)
    assert len(report.notes) == 5
    for words in (
        "user_kernels.plain: 1 recorded specialization not built: a constant is <object object>, which a recording cannot hold",
        "1 recorded specialization not built: nested.<locals>.inside is defined inside a function",
        "the source of plain, or of a function or constant that it uses, is another one here",
        "recorded with triton 1.0",
        "not_there.plain: 1 recorded specialization not built: ModuleNotFoundError: No module named 'not_there'; the text of",
    ):
        assert words in said


def test_a_command_is_recorded_in_all_of_its_processes(project, tmp_path, capfd, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, subprocess\n"
        + "if len(sys.argv) == 1:\n    raise SystemExit(subprocess.run([sys.executable, __file__, 'child']).returncode + 3)\n"
        + DESCRIBED.format(gpu="h100").replace(
            "from hdispatch.compile import target\n", "from hdispatch.compile import target\n"
        )
        + KERNELS.replace("import triton\n", "import torch\nimport triton\n", 1)
        + "from triton.runtime.jit import MockTensor\n"
        + "p = MockTensor(torch.float32)\nplain.warmup(p, p, 7, cube, tl.float32, (1, 2), BLOCK=64, grid=(1,))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(project))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    assert main(["record", "--out", str(tmp_path / "r.jsonl"), "--", sys.executable, str(script)]) == 3
    assert "1 specialization of 1 kernel, 1 of them new" in capfd.readouterr().out
    _, (line,) = recording.read([tmp_path / "r.jsonl"])
    assert (line["module"], line["qualname"]) == ("__main__", "plain")
    report = build([], "a100", tmp_path / "b", cache=tmp_path / "cache", record=[tmp_path / "r.jsonl"], jobs=1)
    assert (report.recorded, report.notes) == (1, []), "a script's definitions are run, and nothing that it does"
    manifest, _ = read_bundle(tmp_path / "b")
    assert manifest["recorded"][0]["kernel"] == "__main__.plain"
    assert manifest["target"]["arch"] == "sm_80"


def test_a_command_of_which_no_python_was_recorded_is_told_of(tmp_path, capfd):
    for arguments, said in (["-I", "-c", "pass"], True), (["-E", "-c", "pass"], True), (["-c", "pass"], False):
        assert main(["record", "--out", str(tmp_path / "r.jsonl"), "--", sys.executable, *arguments]) == 0
        out, err = capfd.readouterr()
        assert "0 specializations of 0 kernels" in out
        assert ("no Python process of the command was recorded" in err) == said


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 3), (signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGHUP, 128 + signal.SIGHUP)]
)
def test_an_ended_command_is_told_of_when_it_has_ended(project, tmp_path, number, code):
    """A terminal interrupts the command and the recorder, a supervisor signals the recorder alone."""
    script = tmp_path / "server.py"
    script.write_text(
        "import signal, sys, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        + DESCRIBED.format(gpu="h100")
        + "import torch, user_kernels\nfrom triton.runtime.jit import MockTensor\n"
        + "p = MockTensor(torch.float32)\nuser_kernels.moded.warmup(p, p, 1, grid=(1,))\n"
        + "try:\n    print('ready', flush=True)\n    time.sleep(100)\n"
        + "except KeyboardInterrupt:\n    time.sleep(0.5)\n    sys.exit(3)\n"
    )
    recorder = "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    recorder += "from hdispatch.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", recorder, "record", "--out", str(tmp_path / "r.jsonl"), "--", sys.executable, str(script)]
    variables = {**os.environ, "PYTHONPATH": str(project), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert (process.returncode, said.split(": ")[1]) == (code, "1 specialization of 1 kernel, 1 of them new\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--vllm-warmup", "{script}"], "--vllm-warmup takes --target, one of a100, h100, h200, "),
        (["--vllm-warmup", "{script}", "--target", "h300"], "; got h300"),
        (["--vllm-warmup", "{script}s", "--target", "h100"], "no such file; --vllm-warmup takes a Python script"),
        (["--target", "h100", "--", "true"], "--target is --vllm-warmup's: a command is recorded on the GPU"),
    ],
)
def test_warm_ups_of_vllm_that_are_refused(tmp_path, capfd, arguments, words):
    script = tmp_path / "register.py"
    script.write_text("")
    given = [each.format(script=script) for each in arguments]
    assert main(["record", "--out", str(tmp_path / "r.jsonl"), *given]) == 1
    assert words in capfd.readouterr().err


@pytest.mark.skipif(getattr(importlib.util.find_spec("vllm"), "origin", None) is not None, reason="vLLM is installed")
def test_a_warm_up_without_vllm_says_so(tmp_path, capfd):
    (tmp_path / "register.py").write_text("")
    given = ["--vllm-warmup", str(tmp_path / "register.py"), "--target", "h100"]
    assert main(["record", "--out", str(tmp_path / "r.jsonl"), *given]) == 1
    assert "--vllm-warmup needs vLLM 0.33 or later, which has a registry of warm-ups: No module" in capfd.readouterr().err


HELION = """
import hdispatch, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.jit import MockTensor
with hdispatch.record({file!r}):
    from returned_square.helion import KERNEL
    with FakeTensorMode():
        x = torch.empty(64, 256, dtype=torch.float16, device="cuda")
    bound = KERNEL._bind_isolated((x,))
    host = bound.compile_config(bound.config_spec.default_config())
    made = host.__globals__.values()
    kernel = next(value for value in made if hasattr(value, "cache_key") and hasattr(value, "params"))
    p = MockTensor(torch.float16)
    given = [1 if each.is_constexpr else p if each.name in ("x", "out") else 64 for each in kernel.params]
    kernel.warmup(*given, grid=(1,), num_warps=4)
"""


@pytest.mark.parametrize("theirs", [None, "print('theirs')\n"])
def test_processes_start_as_they_did(tmp_path, capfd, monkeypatch, theirs):
    """With a sitecustomize of the machine's, which runs once, and without; nothing else is said."""
    site = tmp_path / "site"
    site.mkdir()
    if theirs is not None:
        (site / "sitecustomize.py").write_text(theirs)
    monkeypatch.setenv("PYTHONPATH", str(site))
    assert main(["record", "--out", str(tmp_path / "r.jsonl"), "--", sys.executable, "-c", "print('ours')"]) == 0
    found = capfd.readouterr()
    assert found.out.splitlines()[:-1] == [*(["theirs"] if theirs else []), "ours"]
    assert found.err == ""


def test_a_kernel_that_helion_generated_is_built_of_its_recorded_text(project, tmp_path):
    support = str(Path(__file__).parents[1] / "support")
    text = DESCRIBED.format(gpu="h200") + HELION.format(file=str(tmp_path / "r.jsonl"))
    generated = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"), "HELION_CACHE_DIR": str(tmp_path / "helion")}
    done = python(project, text, PYTHONPATH=support, **generated)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "inductor")
    report = build([], "h100", tmp_path / "b", cache=tmp_path / "cache", record=[tmp_path / "r.jsonl"], jobs=1)
    assert (report.recorded, report.notes) == (1, [])


# ---- files ----


class Kind(enum.Flag):
    """Two together are no member."""

    FIRST = 1
    SECOND = 2


def test_values_that_json_lacks():
    assert recorder.encode((1, [True, None], "x", float("inf"))) == {"tuple": [1, [True, None], "x", {"float": "inf"}]}
    assert recorder.encode(Kind.SECOND) == {"enum": f"{__name__}:Kind:SECOND"}
    assert "opaque" in recorder.encode(Kind.FIRST | Kind.SECOND)
    assert recorder.encode(object())["opaque"].startswith("<object object")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nonsense\n", "line 1 is none of a recording"),
        ('{"line": "specialization"}\n', "line 1 is none of a recording"),
        ('{"line": "source", "module": 1, "sha256": "", "text": ""}\n', "module is 1"),
    ],
)
def test_a_file_that_is_no_recording_is_refused(tmp_path, text, words):
    (tmp_path / "r.jsonl").write_text(text)
    with pytest.raises(HdispatchError, match=words):
        recording.read([tmp_path / "r.jsonl"])


def test_an_empty_recording_and_one_that_cannot_be_written(tmp_path):
    (tmp_path / "r.jsonl").write_text("")
    with pytest.raises(BuildError, match="nothing was recorded"):
        build([], "h200", tmp_path / "b", cache=tmp_path / "cache", record=[tmp_path / "r.jsonl"])
    with pytest.raises(HdispatchError, match="cannot write the recording"), recording.record(tmp_path / "none" / "r.jsonl"):
        pass
    with pytest.raises(HdispatchError, match="cannot be read"):
        recording.read([tmp_path / "nothing.jsonl"])


def changed_bundle(bundle: Path, out: Path, change: Any) -> Path:
    """A copy with another manifest, whose checksum fits."""
    from hdispatch.bundle_reader import checksum_line
    from hdispatch.manifest import CHECKSUM_NAME

    shutil.copytree(bundle, out)
    manifest = json.loads((out / MANIFEST_NAME).read_text())
    change(manifest)
    text = json.dumps(manifest).encode()
    (out / MANIFEST_NAME).write_bytes(text)
    (out / CHECKSUM_NAME).write_bytes(checksum_line(text))
    return out


IDENTITY = ("kernel", "source_hash", "key")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["recorded"].append(m["recorded"][0]), "twice"),
        (lambda m: m["recorded"][0].update(file="artifacts/none.cubin"), "is not listed"),
        (lambda m: m["recorded"][0].update(metadata="{"), "its metadata is no JSON"),
        (lambda m: m["recorded"][0].update(metadata="{}"), "its metadata is not Triton's"),
        (lambda m: m["recorded"][0].pop("key"), "key is missing"),
        (lambda m: m["recorded_refused"].append(m["recorded_refused"][0]), "twice"),
        (lambda m: m["recorded"][0].update({name: m["recorded_refused"][0][name] for name in IDENTITY}), "twice"),
        (
            lambda m: m["recorded_refused"][0].update(error="KeyError"),
            "raises KeyError; it is one of CompileTimeAssertionFailure",
        ),
        (lambda m: m["recorded_refused"][0].pop("message"), "message is missing"),
        (lambda m: m["recorded_tools"].update(triton="1.0"), "its recorded kernels are triton 1.0's"),
    ],
)
def test_a_bundle_with_wrong_recorded_kernels_is_refused(bundle, tmp_path, change, words):
    import hdispatch

    with pytest.raises(BundleError, match=words):
        hdispatch.load(changed_bundle(bundle, tmp_path / "b", change), driver="null")


def test_lookup_is_by_kernel_source_key_and_device():
    class Kernel:
        cache_key = "hash"

        @staticmethod
        def fn() -> None:
            """Stands for a kernel."""

    name = f"{Kernel.fn.__module__}.{Kernel.fn.__qualname__}"
    made: Any = types.SimpleNamespace(prepared=None, metadata={"shared": 0})
    recorded.serve(-5, {(name, "hash", "key"): made})
    try:
        assert recorded.lookup(Kernel, "key", -5) is made
        assert recorded.lookup(Kernel, "other", -5) is None
        assert recorded.lookup(Kernel, "key", -4) is None
        Kernel.cache_key = "edited"
        assert recorded.lookup(Kernel, "key", -5) is None
    finally:
        recorded.serve(-5, {})

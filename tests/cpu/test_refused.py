"""Specializations that Triton's compiler refuses: recorded once, built as refused, raised again by a bundle."""

from __future__ import annotations

import copy
import json
import pickle
import re
import tempfile
import types
from pathlib import Path
from typing import Any

import pytest
from hdispatch import recorded, recorder, recording
from hdispatch.bundle_reader import read_bundle
from hdispatch.cli.main import main
from hdispatch.compile import build
from hdispatch.manifest import MANIFEST_NAME
from recording_runs import DESCRIBED, python


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
    assert re.search("^ptxas(-blackwell)? kernel.ptx, line", ptx[1], re.MULTILINE)
    assert "Repro" not in ptx[1]
    capfd.readouterr()
    assert main(["inspect", str(refused / "bundle")]) == 0
    assert "triton  refused_kernels.odd: 1 recorded specialization that the compiler refuses" in capfd.readouterr().out


def test_a_build_leaves_no_temporary_files(refused, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    build([], "h200", refused / "clean", cache=refused / "cache3", record=[refused / "r.jsonl"], jobs=1)
    assert list(tmp_path.iterdir()) == []


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

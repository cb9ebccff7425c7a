"""Recording what a run compiles with Triton, building it without a GPU, and serving it from the first call."""

from __future__ import annotations

import enum
import json
import os
import shutil
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
from recording_runs import DESCRIBED, KERNELS, RUN, python, write_project

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
    return write_project(tmp_path_factory.mktemp("recorded"))


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
    plain = python(project, DESCRIBED.format(gpu="h100") + ASYNCHRONOUS + "run()\n")
    said = plain.stdout.splitlines()  # asked again, Triton 3.9 says that there is nothing to wait for
    assert (len(said), said[0]) == (2, "CompileTimeAssertionFailure rows are not whole"), plain.stderr
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


def test_a_kernel_that_helion_generated_is_built_of_its_recorded_text(project, tmp_path):
    support = str(Path(__file__).parents[1] / "support")
    text = DESCRIBED.format(gpu="h200") + HELION.format(file=str(tmp_path / "r.jsonl"))
    generated = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"), "HELION_CACHE_DIR": str(tmp_path / "helion")}
    done = python(project, text, PYTHONPATH=support, **generated)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "inductor")
    report = build([], "h100", tmp_path / "b", cache=tmp_path / "cache", record=[tmp_path / "r.jsonl"], jobs=1)
    assert (report.recorded, report.notes) == (1, [])


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


def test_of_a_kernel_that_the_disk_has_no_room_for_nothing_is_written(project, file, tmp_path):
    """The launch raises what names the file, which ends with a whole line."""
    whole = file.read_bytes()
    full = tmp_path / "full.jsonl"
    full.write_bytes(whole * (2**22 // len(whole) + 1))  # larger than what Triton writes
    size = full.stat().st_size
    done = python(
        project,
        DESCRIBED.format(gpu="h100")
        + f"import hdispatch, resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({size} + 10, resource.RLIM_INFINITY))\n"
        + f"with hdispatch.record({str(full)!r}) as recorded:\n"
        + "    import user_kernels, user_run\n    try:\n        user_run.run(user_kernels)\n"
        + "    except OSError as error:\n        print(error, recorded.count)",
    )
    said = f"[Errno 27] File too large, so a kernel is not in the recording: {str(full)!r} 0\n"
    assert (done.returncode, done.stdout) == (0, said), done.stderr
    assert full.stat().st_size == size
    assert len(recording.read([full])[1]) == COUNT + 1


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

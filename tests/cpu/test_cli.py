"""The command line: help, errors in one line, exit codes, and build → inspect → doctor → bench on a real bundle."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import forked
import hdispatch
import pytest
import torch
import toy
from hdispatch import kernel_packages
from hdispatch.bench import dispatch
from hdispatch.bundle_reader import read_bundle
from hdispatch.cli import build, doctor, inspect, numbers, text
from hdispatch.cli.main import main
from hdispatch.compile import Selection, configs, store
from hdispatch.compile import build as wing
from hdispatch.manifest import CHECKSUM_NAME, MANIFEST_NAME

OP = "rms_norm_dynamic_per_token_quant"


def share(bundle: Path) -> dict[str, int]:
    """What the tuned configs make of one op, shape and variant: a row per bucket, and a record per config at least."""
    manifest, _ = read_bundle(bundle)
    spec = hdispatch.registry.spec(OP)
    file = configs.read(configs.installed(OP) / "nvidia_h200.json", spec)
    picked = [file.pick(spec, {"K": 2048}, {"M": edge}) for edge in spec.ladder]
    assert len(manifest["records"]) >= len({store.digest([entry.backend, entry.config]) for entry in picked})
    return {"rows": len(spec.ladder), "records": len(manifest["records"]), "cubins": len(manifest["files"])}


@pytest.fixture(autouse=True)
def no_default_bundle(monkeypatch):
    monkeypatch.delenv(doctor.BUNDLE_VARIABLE, raising=False)


@pytest.fixture(scope="module")
def toy_bundle(tmp_path_factory) -> Path:
    return toy.write(tmp_path_factory.mktemp("cli") / "toy")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, str]:
    """One op, one shape, one variant, built through the command line in a process of its own; and what it printed."""
    folder = tmp_path_factory.mktemp("built")
    command = ["build", "--ops", OP, "--target", "h200", "--out", str(folder / "bundle"), "--cache", str(folder / "cache")]
    command += ["--shapes", "K=2048", "--variants", "bfloat16+residual", "--jobs", "2", "--json"]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\b(\d+)/\1\b", done.stderr)
    return folder / "bundle", done.stdout


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = forked.python("-m", "hdispatch", *arguments)
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables}, check=False)


def fails(capsys, *arguments: str) -> str:
    """The one line that a failing command line leaves on stderr."""
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1
    assert lines[0].startswith("hdispatch: error: ")
    assert "Traceback" not in err
    return lines[0]


# ---- help and usage ----


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--help"],
            ["build", "inspect", "doctor", "bench", "words:", "variant", "bucket", "exit codes", "HDISPATCH_TRACEBACK"],
        ),
        (["build", "--help"], ["--target", "h200", "native", "--cache", "--shapes", "hdispatch build --"]),
        (["inspect", "--help"], ["--row", "--op", "--json", "hdispatch inspect"]),
        (["doctor", "--help"], ["$HDISPATCH_BUNDLE", "--json", "hdispatch doctor"]),
        (["bench", "--help"], ["dispatch"]),
        (["bench", "dispatch", "--help"], ["--vllm-ops", "--plot", "--quick", "cuLaunchKernelEx", "floor", "helion-torch-op"]),
        (["--version"], [hdispatch.__version__]),
    ],
)
def test_help(capsys, arguments, words):
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert not [word for word in words if word not in out]
    assert err == ""


@pytest.mark.parametrize(
    "arguments",
    [[], ["nonsense"], ["build"], ["inspect"], ["inspect", "x", "--row", "two"], ["bench"], ["bench", "dispatch", "--m", "x"]],
)
def test_a_wrong_command_line_exits_2(capsys, arguments):
    assert main(arguments) == 2
    assert "usage: hdispatch" in capsys.readouterr().err


def test_as_a_process(toy_bundle):
    done = run("inspect", str(toy_bundle / "nothing"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("hdispatch: error: ")
    assert "Traceback" not in done.stderr
    done = run("inspect", str(toy_bundle / "nothing"), HDISPATCH_TRACEBACK="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "hdispatch: error: " in done.stderr


def test_a_reader_that_stops_reading_is_no_error(toy_bundle):
    command = f"{sys.executable} -m hdispatch inspect {toy_bundle} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_interrupted(monkeypatch, capsys, toy_bundle):
    def stop(_folder, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect, "read_files", stop)
    assert main(["inspect", str(toy_bundle)]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_an_error_not_foreseen_is_one_line_too(monkeypatch, capsys, toy_bundle):
    def stop(_folder, **_options):
        raise ZeroDivisionError("odd")

    monkeypatch.setattr(inspect, "read_files", stop)
    assert "ZeroDivisionError: odd" in fails(capsys, "inspect", str(toy_bundle))


# ---- errors ----


def test_errors_of_build(capsys, tmp_path):
    out = str(tmp_path / "out")
    assert "no op 'nonsense'" in fails(capsys, "build", "--ops", "nonsense", "--target", "h200", "--out", out)
    assert "no target 'rtx'" in fails(capsys, "build", "--target", "rtx", "--out", out)
    assert "--jobs is 0" in fails(capsys, "build", "--jobs", "0", "--out", out)
    assert "'M=4' is no shape" in fails(capsys, "build", "--shapes", "M=4", "--out", out)
    for number in (
        "99999999999999999999",
        "4294967296",
        "0",
        "-1",
        "٣",
        "³",
        "1_0",
        " 3",
        "3 ",
        "+3",
        "0x10",
        "1e3",
        "",
        "9" * 5000,
    ):
        shape = f"K={number}x" if number != number.strip() else f"K={number}"  # the ends of an item are stripped
        assert "is no size; it takes 1 to 4294967295" in fails(capsys, "build", "--shapes", shape, "--out", out)
    assert "--shapes is empty" in fails(capsys, "build", "--shapes", ",", "--out", out)
    assert "takes K=… or any" in fails(capsys, "build", "--ops", OP, "--target", "h200", "--shapes", "N=64", "--out", out)
    assert "bfloat16" in fails(capsys, "build", "--ops", OP, "--target", "h200", "--variants", "int4", "--out", out)
    assert not Path(out).exists()
    if not torch.cuda.is_available():
        assert "no CUDA device" in fails(capsys, "build", "--target", "native", "--out", out)


@pytest.mark.parametrize(
    "command",
    [
        *(["bench", "dispatch", option, "BAD"] for option in ("--m", "--hidden", "--rounds", "--seed")),
        *(["bench", "ops", option, "BAD"] for option in ("--ms", "--compile-ms", "--rounds", "--seed", "--seconds")),
        *(["bench", "pdl", option, "BAD"] for option in ("--ms", "--rounds", "--seed")),
        *(["tune", "candidates", "--out", "x", option, "BAD"] for option in ("--radius", "--spread", "--jobs")),
        *(["tune", "measure", "x", "--out", "y", option, "BAD"] for option in ("--limit", "--seconds", "--seed")),
        ["tune", "select", "x", "--regret", "BAD"],
        ["tune", "helion", "--out", "x", "--seconds", "BAD"],
        ["inspect", "x", "--row", "BAD"],
        ["build", "--out", "x", "--jobs", "BAD"],
    ],
)
@pytest.mark.parametrize("number", ["٣", "1_0", "nan", "inf", "99999999999999999999999", "x", "", "9" * 5000])
def test_a_number_that_is_none_is_a_wrong_command_line(capsys, command, number):
    if number.startswith("99") and command[-2] in ("--seconds", "--regret"):
        number = f"1e{number[:4]}"  # a long number is one
    assert main([number if word == "BAD" else word for word in command]) == 2
    assert re.search(r"is no whole number|is no number|is no size|is no list of sizes", capsys.readouterr().err)


def test_numbers():
    assert [numbers.whole(each) for each in ("0", "-1", "007", str(2**63 - 1))] == [0, -1, 7, 2**63 - 1]
    assert [numbers.size(each) for each in ("1", str(2**32 - 1))] == [1, 2**32 - 1]
    assert [numbers.real(each) for each in ("0", "-1.5", ".5", "2.", "1e-3")] == [0.0, -1.5, 0.5, 2.0, 0.001]


def test_a_build_by_hand_refuses_sizes_too(tmp_path):
    for size in (0, -1, 2**32):
        select = Selection(shapes=lambda _, size=size: [{"K": size}])
        with pytest.raises(hdispatch.BuildError, match=f"the shape .*{size}.* sizes are 1 to 4294967295"):
            wing([OP], "h200", tmp_path / "out", cache=tmp_path / "cache", select=select)


def test_the_digest_of_a_bundle(capsys, toy_bundle):
    sha256 = (toy_bundle / CHECKSUM_NAME).read_text().split()[0]
    assert main(["inspect", str(toy_bundle), "--sha256", sha256]) == 0
    assert f"sha256  {sha256}" in capsys.readouterr().out
    assert main(["inspect", str(toy_bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sha256"] == sha256
    assert f"its SHA-256 is {sha256}, not {'0' * 64}" in fails(capsys, "inspect", str(toy_bundle), "--sha256", "0" * 64)
    assert doctor.examine(toy_bundle, sha256)["bundle"]["rows"] == 20
    assert "another bundle than the one wanted" in doctor.examine(toy_bundle, "0" * 64)["bundle"]["reason"]


def test_build_refuses_a_folder_that_is_no_bundle(capsys, tmp_path):
    (tmp_path / "letters").write_text("dear")
    assert "no bundle" in fails(capsys, "build", "--target", "h200", "--out", str(tmp_path))
    assert (tmp_path / "letters").read_text() == "dear"


def test_errors_of_inspect(capsys, tmp_path, toy_bundle):
    assert "is a bundle" not in fails(capsys, "inspect", str(tmp_path))
    assert "has no op 'nonsense'; it has toy" in fails(capsys, "inspect", str(toy_bundle), "--op", "nonsense")
    assert "has rows 0 to 19" in fails(capsys, "inspect", str(toy_bundle), "--row", "20")
    assert "has rows 0 to 19" in fails(capsys, "inspect", str(toy_bundle), "--row", "-1")
    broken = toy.write(tmp_path / "broken")
    (broken / MANIFEST_NAME).write_text((broken / MANIFEST_NAME).read_text().replace("0.5", "0.6"))
    assert "SHA-256" in fails(capsys, "inspect", str(broken))


def test_errors_of_bench(capsys, tmp_path, toy_bundle):
    bench = ["bench", "dispatch", "--device", "cpu", "--bundle", str(toy_bundle)]
    assert "no op 'nonsense'" in fails(capsys, *bench, "--op", "nonsense")
    assert "is not a folder" in fails(capsys, *bench, "--op", "toy", "--json", str(tmp_path / "no" / "x.json"))
    assert "is not a file" in fails(capsys, *bench, "--op", "toy", "--vllm-ops", str(tmp_path / "x.so"))
    assert "bundle?" in fails(capsys, "bench", "dispatch", "--op", "toy", "--bundle", str(tmp_path))
    assert "no variant" in fails(capsys, *bench, "--op", "toy", "--variant", "int4")


# ---- inspect ----


def test_inspect_prints_every_row(capsys, toy_bundle):
    assert main(["inspect", str(toy_bundle)]) == 0
    out = capsys.readouterr().out
    assert "every checksum holds" in out
    assert "h200: sm_90a, 132 SMs" in out
    table = [line for line in out.splitlines() if line[:1].isdigit()]
    assert len(table) == 21  # 20 rows and the totals
    assert table[7].split()[:8] == ["7", "toy", "bfloat16", "toy_kernel", "512", "-", "3..4", "4"]
    assert table[-1].startswith("20 rows, 1 record, 3 cubins")


def test_inspect_as_json(capsys, toy_bundle):
    assert main(["inspect", str(toy_bundle), "--op", "toy", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"bundle", "sha256", "target", "tools", "ops", "recorded", "recorded_refused", "rows", "totals"}
    assert found["totals"] == {"rows": 20, "records": 1, "cubins": 3, "functions": 0, "bytes": 700, "build_seconds": 0.5}
    row = found["rows"][9]
    assert (row["row"], row["K"], row["m_first"], row["m_last"]) == (9, 512, 9, None)
    assert row["guards"] == ["input.stride(0) % 16 == 0"]
    assert (row["warps"], row["pdl"]) == ([4], True)


def test_inspect_one_row_in_words(capsys, toy_bundle):
    assert main(["inspect", str(toy_bundle), "--row", "3"]) == 0
    out = capsys.readouterr().out
    for words in (
        "row 3: toy, bfloat16, K = 64, M 5..8",
        "serves 20 rows",
        "grid    (M + 3) // 4 x 1 x 1",
        "input + 32 bytes, a multiple of 16 bytes",
        "i64  M * K",
        "input.stride(0) % 16 == 0",
        "M = 1: toy_kernel, 4 warps, 0 bytes shared, pdl, params 4 compiled in",
    ):
        assert words in out


def test_inspect_a_row_that_serves_every_size(capsys, tmp_path):
    content = toy.manifest(sizes=(0,))
    assert main(["inspect", str(toy.write(tmp_path / "any", content)), "--row", "0"]) == 0
    assert "row 0: toy, bfloat16, any size, M 1\n" in capsys.readouterr().out


def test_inspect_shows_what_was_measured(capsys, tmp_path):
    content = toy.manifest()
    content["rows"][2]["tuned"] = {"us": 10.0, "others": {"cutedsl": 11.8, "triton": 25.0}}
    content["rows"][3]["tuned"] = {"us": 3.0, "others": {}}
    folder = str(toy.write(tmp_path / "tuned", content))
    assert main(["inspect", folder]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line[:1].isdigit()]
    ends = [re.split(r"\s{2,}", line)[-2:] for line in lines[1:5]]
    assert ends == [["-", "-"], ["10.00", "cutedsl 1.18 ×, triton 2.50 ×"], ["3.00", "-"], ["-", "-"]]
    assert main(["inspect", folder, "--row", "2"]) == 0
    assert "tuned   10.00 µs; cutedsl 1.18 ×, triton 2.50 ×" in capsys.readouterr().out
    assert main(["inspect", folder, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][2]["tuned"]["others"] == {"cutedsl": 11.8, "triton": 25.0}


def test_inspect_one_row_as_json(capsys, toy_bundle):
    assert main(["inspect", str(toy_bundle), "--row", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["record"] == read_bundle(toy_bundle)[0]["records"][0]


@pytest.mark.parametrize(
    ("expr", "words"),
    [
        ([7], "7"),
        (["M"], "M"),
        (["M", 15, "+", 16, "//"], "(M + 15) // 16"),
        (["M", 1, "-", 2, "K", "*", "min"], "min(M - 1, 2 * K)"),
        (["M", "input.stride(0)", "*", 2**31, "<", "M", 0, ">", "and"], "((M * input.stride(0)) < 2147483648) and (M > 0)"),
    ],
)
def test_expressions_in_words(expr, words):
    assert inspect.words_of(expr) == words


@pytest.mark.parametrize("expr", [[], ["+"], [1, "+"], [1, 2], ["min"]])
def test_expressions_that_are_none(expr):
    with pytest.raises(hdispatch.BundleError, match=f"an expression of {len(expr)} tokens leaves no single value"):
        inspect.words_of(expr)


# ---- doctor ----


def test_doctor_explains(capsys, toy_bundle):
    assert main(["doctor", str(toy_bundle)]) == 0
    out = capsys.readouterr().out
    for words in (f"built with torch {torch.__version__}", "libcuda", "helion", "triton", "ptxas", "bundle  "):
        assert words in out
    if not torch.cuda.is_available():
        assert "20 rows for h200" in out
        assert "hdispatch would not serve calls here" in out


def test_doctor_as_json(capsys, toy_bundle, monkeypatch):
    monkeypatch.setenv(doctor.BUNDLE_VARIABLE, str(toy_bundle))
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {
        "versions",
        "extension",
        "driver",
        "gpu",
        "backends",
        "bundle",
        "vllm",
        "sglang",
        "adopt",
        "host",
        "serving",
    }
    assert found["vllm"]["ok"] or found["vllm"]["reason"]
    assert found["sglang"]["ok"] or found["sglang"]["reason"]
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["backends"]) == {"helion", "triton", "ptxas", "configs", "kernels", "tvm_ffi", "linker"}
    assert all(part["ok"] or part["reason"] for part in found["backends"].values())
    assert found["backends"]["triton"]["ok"]
    assert found["bundle"]["rows"] == 20
    assert found["bundle"]["ok"] or torch.cuda.is_available()
    assert found["serving"]["ok"] or found["serving"]["reason"]
    assert torch.cuda.is_available() or not found["serving"]["ok"]


def test_doctor_without_a_bundle_or_with_a_broken_one(tmp_path):
    assert "HDISPATCH_BUNDLE" in doctor.examine(None)["bundle"]["reason"]
    bundle = toy.write(tmp_path)
    (bundle / "artifacts" / "one.cubin").write_bytes(b"short")
    found = doctor.examine(bundle)["bundle"]
    assert not found["ok"]
    assert "one.cubin" in found["reason"]


def test_doctor_leaves_nothing_loaded(toy_bundle):
    doctor.examine(toy_bundle)
    assert not hdispatch.loaded()


@pytest.mark.parametrize(("version", "reason"), [(None, "not installed"), ("0.1.0", "hdispatch builds with helion==")])
def test_doctor_says_why_a_backend_does_not_work(monkeypatch, version, reason):
    monkeypatch.setattr(doctor.machine, "package_version", lambda _name: version)
    found = doctor._examined(doctor.BACKENDS["helion"])
    assert not found["ok"]
    assert reason in found["reason"]


@pytest.mark.parametrize(
    ("versions", "told"),
    [
        (
            {"triton": "3.6.0", "helion": "1.5.0"},
            "ok: triton 3.6.0, helion 1.5.0; checked with triton 3.6, 3.7, 3.8, 3.9 and helion 1.5",
        ),
        ({"triton": "3.7.1"}, "ok: triton 3.7.1; checked with triton 3.6, 3.7, 3.8, 3.9 and helion 1.5"),
        (
            {"triton": "3.10.0"},
            "no: triton 3.10.0 is installed; hdispatch.adopt was checked with triton 3.6, 3.7, 3.8, 3.9 and helion 1.5",
        ),
        ({"triton": "3.6.0", "helion": "1.6.0"}, "no: helion 1.6.0 is installed; hdispatch.adopt was checked with"),
        ({}, "no: Triton is not installed; hdispatch.adopt was checked with triton 3.6, 3.7, 3.8, 3.9"),
    ],
)
def test_doctor_says_what_adopt_was_checked_with(monkeypatch, versions, told):
    found = doctor.examine(None)
    monkeypatch.setattr(doctor.machine, "package_version", versions.get)
    assert f"adopt      {told}" in doctor.describe(found | {"adopt": doctor._examined(doctor._check_adopt)})


def test_what_adopt_was_checked_with_is_what_its_modules_say():
    folder = Path(hdispatch.__file__).parent / "adopted"
    said = {
        name: re.findall(rf"checked with {name.title()} ([0-9.]+(?:(?:,| and) [0-9.]+)*)", text)
        for name in doctor.ADOPTED
        for text in [" ".join(" ".join(path.read_text().split()) for path in folder.glob("*.py"))]
    }
    assert {name: {tuple(re.split(",? (?:and )?", each.rstrip("."))) for each in found} for name, found in said.items()} == {
        name: {versions} for name, versions in doctor.ADOPTED.items()
    }


def test_doctor_names_a_broken_entry_point(monkeypatch):
    """Every build of all ops fails on it."""
    broken = EntryPoint("mine", "nowhere_kernels.ops", kernel_packages.GROUP)
    monkeypatch.setattr(kernel_packages, "entry_points", lambda group: [broken] if group == kernel_packages.GROUP else [])
    found = doctor.examine(None)
    assert not found["backends"]["kernels"]["ok"]
    assert "names 'nowhere_kernels.ops' in the entry points 'hdispatch.kernels' (mine)" in doctor.describe(found)
    monkeypatch.setattr(kernel_packages, "entry_points", lambda **_: [])
    assert re.fullmatch(r"[0-9]+ ops of hdispatch", doctor.examine(None)["backends"]["kernels"]["found"])


def test_doctor_says_how_an_import_failed(monkeypatch):
    def broken(_name):
        raise OSError("libz.so.9: no such file")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    assert "libz.so.9" in doctor._examined(doctor.BACKENDS["triton"])["reason"]


def test_required_versions_are_those_of_the_package():
    assert doctor.required_versions()["helion"].startswith("==")
    assert "triton" in doctor.required_versions()


# ---- build, then everything on what was built ----


def test_build_reports(built):
    report = json.loads(built[1])
    assert {name: report[name] for name in ("rows", "records", "cubins")} == share(built[0])
    assert (report["target"], report["from_cache"]) == ("h200", 0)
    assert report["seconds"] > 0
    assert len(report["record_seconds"]) == report["records"]
    assert report["bytes"] == sum(file.stat().st_size for file in built[0].rglob("*") if file.is_file())


def test_build_again_comes_from_the_cache(built, capsys, tmp_path):
    again = ["build", "--ops", OP, "--target", "h200", "--out", str(tmp_path / "b"), "--cache", str(built[0].parent / "cache")]
    assert main([*again, "--shapes", "K=2048", "--variants", "bfloat16+residual"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"\b(\d+) records? \(\1 from the cache\)", out)
    assert "s per row" in out
    assert (tmp_path / "b" / MANIFEST_NAME).read_bytes() == (built[0] / MANIFEST_NAME).read_bytes()


def test_inspect_what_was_built(built, capsys):
    assert main(["inspect", str(built[0]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: found["totals"][name] for name in ("rows", "records", "cubins")} == share(built[0])
    assert {"torch", "triton"} | {row["backend"] for row in found["rows"]} <= set(found["tools"])
    for row in found["rows"]:
        assert main(["inspect", str(built[0]), "--row", str(row["row"])]) == 0
        assert f"by {row['backend']}" in capsys.readouterr().out


def test_doctor_on_what_was_built(built, capsys):
    assert main(["doctor", str(built[0]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["bundle"]
    assert (found["rows"], found["target"]) == (len(hdispatch.registry.spec(OP).ladder), "h200")


def test_bench_on_what_was_built(built, capsys, tmp_path):
    files = ["--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")]
    assert main(["bench", "dispatch", "--bundle", str(built[0]), "--quick", "--device", "cpu", *files]) == 0
    out, err = capsys.readouterr()
    result = json.loads((tmp_path / "r.json").read_text())
    assert set(result) == {"machine", "rows", "skipped"}
    assert (result["machine"]["K"], result["machine"]["rounds"], result["machine"]["seed"]) == (2048, 5, 0)
    ran = {row["path"] for row in result["rows"]}
    assert {"python-call", "null-driver", "torch.ops.hdispatch-null", "config-pick", "table-probe"} <= ran
    assert ran | {name.partition(" (")[0] for name in result["skipped"]} >= set(dispatch.ORDER)
    assert all(row["m"] in ("fixed", "cycling", "unseen") for row in result["rows"])
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    for words in ("null-driver", "× floor", "verdict", "hdispatch.ops, null driver", "at most 150 ns", "not run", "seed 0"):
        assert words in out
    assert "calls" in err


def test_bench_builds_a_bundle_if_none_is_given(monkeypatch, capsys, toy_bundle):
    """The build itself is tested above: here it only copies."""
    asked = {}

    def fake(ops, target, out, *, select, extra, progress):
        assert extra == []
        asked.update(ops=ops, target=target, shapes=select.shapes(None), variants=select.variants(None))
        progress(1, 1, "one")
        toy.write(out)

    monkeypatch.setattr("hdispatch.compile.build", fake)
    assert (
        main(["bench", "dispatch", "--op", "toy", "--device", "cpu", "--quick", "--variant", "bfloat16", "--hidden", "512"])
        == 0
    )
    assert asked == {"ops": ["toy"], "target": "h200", "shapes": [{"K": 512}], "variants": ["bfloat16"]}
    out, err = capsys.readouterr()
    assert "no --bundle: building one with toy, bfloat16, K=512 for h200" in err
    assert "null-driver" in out


def test_bench_goes_on_where_no_bundle_can_be_built(monkeypatch, capsys):
    def fails_to_build(*_args, **_kwargs):
        raise hdispatch.BuildError("no compiler today")

    monkeypatch.setattr("hdispatch.compile.build", fails_to_build)
    assert main(["bench", "dispatch", "--op", "toy", "--device", "cpu", "--quick"]) == 0
    out = capsys.readouterr().out
    assert "no compiler today" in out
    assert "config-pick" in out


# ---- parts ----


def test_parse_shapes():
    assert build.parse_shapes("K=4096, K=2048:N=512, any") == [{"K": 4096}, {"K": 2048, "N": 512}, {}]


@pytest.mark.parametrize(
    ("ns", "words"), [(7.84, "7.8 ns"), (118.2, "118 ns"), (2710, "2.71 µs"), (41.2e6, "41.20 ms"), (3.14e9, "3.1 s")]
)
def test_durations(ns, words):
    assert text.duration(ns) == words


@pytest.mark.parametrize(("amount", "words"), [(12, "12 B"), (2048, "2.0 KiB"), (3 << 20, "3.0 MiB"), (5 << 30, "5.0 GiB")])
def test_sizes(amount, words):
    assert text.size(amount) == words


def test_progress_off_a_terminal_prints_quarters(capsys):
    progress = text.Progress()
    for done in range(1, 101):
        progress(done, 100, f"step {done}")
    progress.finish()
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == ["25/100", "50/100", "75/100", "100/100"]


def test_progress_on_a_terminal_draws_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = text.Progress()
    progress(1, 4, "one")
    progress(4, 4, "all")
    progress.finish()
    err = capsys.readouterr().err
    assert "\n" not in err
    assert "4/4 all" in err


def test_progress_says_what_remains(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(text.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(text.sys.stderr, "isatty", lambda: False, raising=False)
    progress = text.Progress()
    progress(40, 80, "from the cache")  # which took no time, and says nothing about the rest
    now[0] += 30
    progress(60, 80, "an op")
    now[0] += 30
    progress(80, 80, "the last op")
    said = capsys.readouterr().err.splitlines()
    assert said == ["40/80 from the cache (0 s)", "60/80 an op, about 30 s left (30 s)", "80/80 the last op (60 s)"]

"""Tuning: which candidates are collected and compiled, Helion's autotuner, the command line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import forked
import hdispatch
import pytest
from hdispatch.cli import tune, tune_options, tune_reports
from hdispatch.cli.main import main
from hdispatch.compile import DESCRIBED, configs, op_package, store
from hdispatch.compile.build_unit import Unit
from hdispatch.errors import BuildError
from hdispatch.manifest import CANDIDATES_NAME
from hdispatch.opspec import OpSpec
from hdispatch.tune import autotune, collect, compile_many, points
from hdispatch.tune.candidates import read_candidates
from hdispatch.tune.point_configs import PointConfigs

KERNEL = """
import os
import triton
import triton.language as tl

GENERIC = ("K",)
@triton.jit
def kernel(result, x, elements, SIZE: tl.constexpr, SHARE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    tl.store(result + at, tl.load(x + at, at < elements) * 2, at < elements)

def launch(result, x, *, config, _launcher):
    if config["size"] == -2:
        os.abort()
    if config["size"] < 0:
        raise ValueError("no such size")
    elements = x.size(0) * x.size(1)
    size = config["size"]
    _launcher(kernel, ((elements + size - 1) // size,), result, x, elements, SIZE=size, SHARE=config["share"], num_warps=1)

def candidates(sizes, variant):
    if "K" not in sizes:
        return [{"size": 128, "share": 0}, {"size": 512, "share": 0}]
    # The second has the code of the first, the third does not compile, the fourth takes the compiler along.
    return [{"size": size, "share": share} for size, share in ((256, 0), (256, 1), (-1, 0), (-2, 0))] + (
        [{"size": 1024, "share": 0}] if sizes["M"] > 16 else [])
"""

SPEC = """
import torch
from hdispatch.opspec import OpSpec, TensorArg
def reference(result, x):
    result.copy_(x * 2)
def sample(variant, sizes, device, generator):
    shape = sizes["M"], sizes["K"]
    return [torch.empty(shape, device=device), torch.randn(shape, generator=generator, device=device)]
SPEC = OpSpec(
    name="tuned_op",
    args=(TensorArg("result", ("M", "K"), (torch.float32,), mutated=True), TensorArg("x", ("M", "K"), (torch.float32,))),
    reference=reference, sample=sample, shapes=({"K": 64}, {"K": 4096}, {}),
    config_key={"width": "K", "rows": "M"}, ladder=(1, 16, 256),
)
"""

PROGRAM = """
import sys
sys.path.append(FOLDER)
from pathlib import Path
from hdispatch import archive
from hdispatch.tune import collect, points
here = Path(FOLDER)
report = collect.collect(["tuned_op"], "h200", here / OUT, cache=here / "cache", extra=["tuned_op"], jobs=1,
                         scope=points.Scope(more=(here / "more",)))
archive.pack(here / OUT, here / (OUT + ".tar.xz"), top=OUT)
op = report.ops["tuned_op"]
print(op.options, op.units, op.from_cache, op.records, op.cells, op.pairs, op.same_code, len(op.dropped))
"""


def make(folder: Path, out: str) -> list[int]:
    """In a process of its own, because modules stay imported; the report's counts."""
    program = PROGRAM.replace("FOLDER", repr(str(folder))).replace("OUT", repr(out))
    done = subprocess.run(
        forked.python("-P", "-c", forked.COMPILING + program), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.split()]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, list[int]]:
    folder = tmp_path_factory.mktemp("tune")
    package = folder / "tuned_op"
    (package / "configs").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "spec.py").write_text(SPEC)
    (package / "triton.py").write_text(KERNEL)
    present = {"key": {"width": 64, "rows": 1}, "config": {"size": 32, "share": 0}}
    (package / "configs" / "nvidia_h200.json").write_text(json.dumps([present]))
    (folder / "more" / "tuned_op").mkdir(parents=True)
    (folder / "more" / "tuned_op" / "x.json").write_text(
        '[{"key": {"width": 1, "rows": 1}, "config": {"size": 64, "share": 0}}]'
    )
    return folder, make(folder, "a")


def test_candidates_come_from_lists_files_open_rows_and_neighbours(made):
    folder, counts = made
    bundle = read_candidates(folder / "a")
    candidates, records = bundle["candidates"], bundle["manifest"]["records"]
    sizes = {
        (cell["K"], cell["M"]): [(records[r]["config"]["size"], records[r]["config"]["share"]) for r in cell["records"]]
        for cell in candidates["cells"]
    }
    own = [256, 32, 64, 128, 512]  # the list, the present file, the other file, what is offered for any K
    everything = {(s, 0) for s in [*own, 1024]}
    assert sizes[64, 1] == [(s, 0) for s in own]
    assert sizes[64, 16] == [*((s, 0) for s in own), (1024, 0)]  # from the next bucket
    assert set(sizes[4096, 256]) == everything
    assert len(sizes) == 6
    assert counts == [9, 9, 0, 6, 6, 34, 6, 2]
    generic = {records[r]["config"]["size"]: candidates["origins"][r]["generic"] for r in range(len(records))}
    assert generic == {256: [], 32: [], 64: [], 1024: [], 128: ["K"], 512: ["K"]}
    dropped = {each["config"]["size"]: each["why"] for each in candidates["dropped"]}
    assert sorted(dropped) == [-2, -1]
    assert "no such size" in dropped[-1]
    assert "a worker process ended with status -6" in dropped[-2]


def test_the_first_candidates_are_rows(made):
    folder, _ = made
    bundle = hdispatch.read_bundle(folder / "a")[0]
    rows = {(row["K"], row["bucket"]): bundle["records"][row["record"]]["config"]["size"] for row in bundle["rows"]}
    assert rows == {**{(k, b): 256 for k in (64, 4096) for b in range(3)}, **{(0, b): 128 for b in range(3)}}


class Refusing:
    """Compilers that refuse more than one bucket, and a config that is bad whatever its buckets."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []

    def pool(self, _target: Any, _store: Any, _sources: Any) -> Any:
        """Itself."""
        return self

    def jobs(self) -> int:
        """One unit at a time."""
        return 1

    def __enter__(self) -> Refusing:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to end."""

    def map(self, make: Any, count: int, _jobs: int) -> Any:
        """In order."""
        return ((index, make(index)) for index in range(count))

    def build(self, unit: Unit, _tools: Any, _seconds: float) -> Any:
        """A unit's records."""
        self.asked.append(unit.buckets)
        if len(unit.buckets) > 1:
            raise BuildError("a bucket beside its own is too large")
        if unit.config["bad"]:
            raise BuildError("the compiler fails")
        return [{"record": {}, "buckets": list(unit.buckets), "seconds": 0.0}]


def test_a_config_is_tried_for_its_own_buckets_and_its_own_problem_is_told(tmp_path):
    compilers: Any = Refusing()
    units = [
        Unit("hdispatch.kernels.rms_norm", "triton", "bfloat16", {"K": 64}, {"bad": bad}, buckets)
        for bad, buckets in ((False, (0, 1)), (True, (0, 1)), (True, (0,)), (True, (2, 3)))
    ]
    own: list[set[int]] = [{0}, {0}, {0}, set()]
    fine, *refused = compile_many.compile_many(units, own, DESCRIBED["h200"], store.Store(tmp_path), compilers=compilers)
    assert [built["buckets"] for built in fine.built] == [[0]]
    assert [(each.built, each.problem) for each in refused] == [
        ([], "the compiler fails"),
        ([], "the compiler fails"),
        ([], "a bucket beside its own is too large"),
    ]
    assert sorted(compilers.asked) == [(0,), (0,), (0, 1), (0, 1), (2, 3)]


def test_a_second_time_comes_from_the_cache(made):
    folder, counts = made
    again = make(folder, "b")
    assert again == [*counts[:2], 7, *counts[3:]]
    texts = [(folder / name / CANDIDATES_NAME).read_text() for name in "ab"]
    assert texts[0] == texts[1]


def test_the_archive_holds_the_bundle(made, tmp_path):
    folder, _ = made
    with tarfile.open(folder / "a.tar.xz") as packed:
        packed.extractall(tmp_path, filter="data")
    assert read_candidates(tmp_path / "a")["candidates"] == read_candidates(folder / "a")["candidates"]


def test_helions_autotuner_writes_as_it_goes(tmp_path, monkeypatch):
    autotuned: list[int] = []

    def best(_point: Any, _spec: OpSpec, sizes: dict[str, int], _effort: str) -> dict[str, Any]:
        autotuned.append(sizes["M"])
        if sizes["M"] == 2:
            raise ValueError("no luck")
        return {"block_sizes": [sizes["M"]]}

    monkeypatch.setattr(autotune, "_best", best)
    monkeypatch.setattr(autotune, "present", lambda: DESCRIBED["h200"])
    scope = points.Scope(shapes=lambda _spec: [{"N": 6144}], buckets=lambda _spec: [0, 1, 2])
    op = "silu_and_mul_dynamic_per_token_quant"
    failed = autotune.autotune([op], tmp_path, scope=scope)
    assert failed == [f"{op} {{'intermediate_size': 6144, 'num_tokens': 2}}: ValueError: no luck"]
    file = configs.read(tmp_path / op / "nvidia_h200.json", hdispatch.registry.spec(op))
    assert [(entry.sizes["M"], entry.config["block_sizes"]) for entry in file.entries] == [(1, [1]), (4, [4])]
    autotune.autotune([op], tmp_path, scope=scope, seconds=1000)
    assert autotuned == [1, 2, 4, 2]
    assert autotune.autotune([op], tmp_path, scope=scope, seconds=0) == []
    with pytest.raises(BuildError, match="none of the ops has a Helion kernel"):
        autotune.autotune(["argmax"], tmp_path, scope=scope)


@pytest.mark.slow
def test_every_op_has_candidates_of_its_typical_variant_from_each_backend():
    """The smallest bucket's, with Helion's neighbours: a list or a space that cannot be asked for is an error here."""
    packages = op_package.find(None)
    found = PointConfigs(packages.values(), points.Scope(buckets=lambda _spec: [0], whole=True), DESCRIBED["h200"])
    offered = {(p.op.name, option.backend) for p, options in found.by_point.items() for option in options}
    for package, backends in found.backends.items():
        assert offered & {(package.name, backend) for backend in backends}, package.name
        if "helion" in backends:
            assert (package.name, "helion") in offered


@pytest.mark.slow
def test_helions_own_space_and_the_command_line(tmp_path, capsys):
    command = ["tune", "candidates", "--ops", "silu_and_mul_dynamic_per_token_quant", "--out", str(tmp_path / "cand")]
    command += ["--shapes", "N=6144", "--buckets", "16", "--radius", "0", "--cache", str(tmp_path / "cache"), "--json"]
    assert main(command) == 0
    said = capsys.readouterr()
    assert re.search(r"^silu_and_mul_dynamic_per_token_quant +\d+ +\d+$", said.err, re.MULTILINE)
    report = json.loads(said.out)
    found = read_candidates(tmp_path / "cand")
    assert report["ops"]["silu_and_mul_dynamic_per_token_quant"]["cells"] == 1
    assert {record["backend"] for record in found["manifest"]["records"]} == {"helion", "triton"}


def test_the_lists_of_chosen_backends_compete_with_the_config_files():
    """`--backends helion`: Triton's configs are those of the op's file alone."""
    package = op_package.find(["silu_and_mul"])["silu_and_mul"]
    scope = points.Scope(buckets=lambda _spec: [0], spread=0, radius=-1, backends=("helion",))
    found = PointConfigs([package], scope, DESCRIBED["h200"])
    for point in found.points:
        counts = Counter(option.backend for option in found.by_point[point])
        assert counts["triton"] == 1
        assert counts["helion"] > 3


def found_of(op: str, folder: Path, scope: points.Scope, **files: list[dict[str, Any]]) -> PointConfigs:
    """An op's options at one point, with config files of these cards alone."""
    (folder / op).mkdir()
    for card, entries in files.items():
        (folder / op / f"nvidia_{card}.json").write_text(json.dumps(entries))
    package = dataclasses.replace(op_package.find([op])[op], configs=folder / op)
    return PointConfigs([package], dataclasses.replace(scope, buckets=lambda _spec: [0]), DESCRIBED["h100"])


def offered(found: PointConfigs) -> set[str]:
    return {option.backend for options in found.by_point.values() for option in options}


TRITON = {"key": {}, "config": {"block": 1024, "num_warps": 4}}
HELION = {"key": {}, "config": {"block_sizes": [1]}}
LISTS = points.Scope(shapes=lambda _spec: [{"N": 6144}], radius=-1)


def test_a_backend_that_no_config_file_chose_is_left_out_and_named(tmp_path):
    found = found_of("silu_and_mul", tmp_path, LISTS, h200=[TRITON], b200=[TRITON])
    assert offered(found) == {"triton"}
    (note,) = found.notes
    assert note.startswith(
        "left out: the candidates of helion, which no config file chose, of silu_and_mul; --backends helion "
    )
    assert "--whole" in note


@pytest.mark.parametrize(
    ("scope", "files"),
    [
        pytest.param({}, {}, id="no config file"),
        pytest.param({}, {"h200": [TRITON], "b200": [TRITON, {**HELION, "key": {"N": 64}}]}, id="chosen on another card"),
        pytest.param({}, {"h200": [{"key": {}, "backend": "fallback", "config": {}}]}, id="nothing chosen"),
        pytest.param({"backends": ("helion", "triton")}, {"h200": [TRITON]}, id="asked for"),
        pytest.param({"whole": True}, {"h200": [TRITON]}, id="whole"),
    ],
)
def test_other_backends_are_measured(tmp_path, scope, files):
    found = found_of("silu_and_mul", tmp_path, dataclasses.replace(LISTS, **scope), **files)
    assert offered(found) >= {"helion", "triton"}
    assert found.notes == []


def test_a_left_out_backends_own_config_competes(tmp_path):
    """--backends leaves the other lists out, not the configs that serve now."""
    scope = dataclasses.replace(LISTS, backends=("triton",))
    found = found_of("silu_and_mul", tmp_path, scope, h100=[HELION])
    options = [option for each in found.by_point.values() for option in each]
    assert [json.loads(o.config) for o in options if o.backend == "helion"] == [HELION["config"]]
    assert sum(option.backend == "triton" for option in options) > 3


def test_what_is_compiled_is_told_before_it_is():
    plan = collect.Plan({"a": {"triton": 90}, "b": {"cutedsl": 100, "triton": 10}}, 4, ["left out: c"])
    assert tune_reports.describe_plan(plan).splitlines() == [
        "op   triton  cutedsl",
        "a        90",
        "b        10      100",
        "all     100      100",
        "left out: c",
        "200 to compile, unless the cache has them: about 6 min of a CPU, 2 min by 4",
    ]


def test_whole_lists_are_those_of_all_backends_and_of_the_buckets_beside():
    def scope(*options: str) -> points.Scope:
        parser = argparse.ArgumentParser()
        tune.add_parser(parser.add_subparsers())
        return tune_options.scope_of(parser.parse_args(["tune", "candidates", "--out", "x", *options]))

    one, two = (op_package.find([op])[op].spec for op in ("silu_and_mul", "attention_half"))
    assert [(each.spread_of(one), each.spread_of(two)) for each in (scope(), scope("--whole"))] == [(1, 0), (1, 1)]
    assert [scope("--spread", "2").spread_of(two), scope("--whole", "--spread", "0").spread_of(one)] == [2, 0]
    assert [scope().whole, scope("--whole").whole] == [False, True]


def codes_of(found: PointConfigs) -> set[str]:
    options = [json.loads(option.config) for options in found.by_point.values() for option in options]
    return {json.dumps({name: value for name, value in each.items() if name != "chunk"}, sort_keys=True) for each in options}


def test_of_attentions_list_the_codes_stay_that_were_chosen(tmp_path):
    """At sizes that a config file has: another card's choice counts, at any bucket; the chunk is the launch's."""
    code = {"num_warps": 4, "stages": 3, "tile": 64}
    chosen = {"key": {"head_dim": 128, "num_tokens": 256}, "config": {**code, "chunk": 96}}
    other = {"key": {"head_dim": 64, "num_tokens": 1}, "config": {**code, "stages": 2, "chunk": 64}}
    scope = points.Scope(shapes=lambda _spec: [{"K": 128}])
    narrow = found_of("attention_half", tmp_path, scope, b200=[chosen, other])
    assert codes_of(narrow) == {json.dumps(code, sort_keys=True)}
    chunks = {json.loads(option.config)["chunk"] for options in narrow.by_point.values() for option in options}
    assert len(chunks) > 1


@pytest.mark.parametrize("head_dim", [128, 256])
def test_attentions_list_is_whole_where_asked_for_and_at_sizes_without_configs(tmp_path, head_dim):
    chosen = {"key": {"head_dim": 128, "num_tokens": 256}, "config": {"num_warps": 4, "stages": 3, "tile": 64, "chunk": 96}}
    scope = points.Scope(shapes=lambda _spec: [{"K": head_dim}], whole=head_dim == 128)
    found = found_of("attention_half", tmp_path, scope, b200=[chosen])
    (tmp_path / "none").mkdir()
    every = found_of("attention_half", tmp_path / "none", scope)
    assert list(found.by_point.values()) == list(every.by_point.values())
    assert len(codes_of(found)) > 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backends", "cuda"], "--backends has 'cuda'; there are triton, helion, cutedsl"),
        (["--ops", "nonsense"], "no op 'nonsense'"),
        (["--ops", "silu_and_mul", "--buckets", "3"], "'3' is no upper edge of silu_and_mul"),
        (["--ops", "silu_and_mul", "--shapes", "N=7"], "--shapes has none of silu_and_mul"),
        (["--configs", "/nowhere"], "--configs /nowhere is not a folder"),
        (["--archive", "/nowhere/x.tar.xz"], "cannot write /nowhere/x.tar.xz"),
        (["--archive", "/nowhere/x"], "/nowhere/x does not end in .tar.xz"),
        (["--jobs", "0", "--ops", "silu_and_mul"], "jobs is 0"),
    ],
)
def test_bad_requests(tmp_path, capsys, arguments, message):
    assert main(["tune", "candidates", "--out", str(tmp_path / "out"), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_sizes_that_rows_leave_open_are_measured_at_those_that_the_spec_says():
    """Attention's splits depend on the number of heads: that of a model, not one that every group divides."""
    for op in ("attention_half", "paged_attention_decode"):
        (point, *_) = points.points_of(
            op_package.read(op, f"hdispatch.kernels.{op}"), points.Scope(shapes=lambda _spec: [{"K": 128}])
        )
        assert points.sizes_of(point)["N"] == 32
        assert point.op.spec.hint("N") % 35 == 0

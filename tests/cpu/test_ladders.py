"""Two ladders: M and a run-time integer beside it, from the declaration to the launch, on the null driver."""

from __future__ import annotations

import dataclasses
import itertools
import json
import struct
from pathlib import Path
from typing import Any

import hdispatch
import pytest
import torch
from fake_device import FakeDevice
from hdispatch import _C, BundleError, HdispatchError, Key
from hdispatch.bundle_reader import read_bundle
from hdispatch.cli.main import main
from hdispatch.cli.tune_options import chosen_buckets
from hdispatch.compile import build, configs, op_package
from hdispatch.errors import BuildError
from hdispatch.ladders import Ladders
from hdispatch.manifest import MANIFEST_NAME
from hdispatch.opspec import IntArg
from hdispatch.testing import null
from hdispatch.tune import collect, device, measure, select, timings
from hdispatch.tune.candidates import read_candidates
from two_ladders.spec import LADDER, LENGTHS, SPEC

NAME = SPEC.name
OP = hdispatch.registry.define(SPEC) if NAME not in hdispatch.registry.names() else hdispatch.registry.get(NAME)
BUCKETS = len(LADDER) * len(LENGTHS)
#: Every edge of a ladder and what is around it, and far beyond.
MS = sorted({m for edge in LADDER for m in (edge - 1, edge, edge + 1)} - {0} | {1000})
VALUES = sorted({v for edge in LENGTHS for v in (edge - 1, edge, edge + 1)} | {1, 2, 100_000})
#: The chunk of each bucket: all different.
CHUNKS = {bucket: 16 << bucket for bucket in range(BUCKETS)}


def arguments(m: int = 4, longest: int = 100) -> list[Any]:
    lengths = torch.ones(m, dtype=torch.int32)
    return [torch.zeros(m, 1), torch.zeros(m, 64), lengths, longest, 0.5]


def entries() -> list[dict[str, Any]]:
    """A config file with an entry for each bucket."""
    found = []
    for bucket, chunk in CHUNKS.items():
        edges = SPEC.ladders.edges(bucket)
        key = {"width": 64, "rows": edges["M"], "longest": edges["longest"]}
        found.append({"key": key, "config": {"chunk": chunk}})
    return found


@pytest.fixture
def config_folder(monkeypatch, tmp_path) -> Path:
    folder = tmp_path / "configs"
    folder.mkdir()
    monkeypatch.setattr("hdispatch.compile.op_package.config_folder", lambda _: folder)
    return folder


def write_configs(folder: Path, content: list[dict[str, Any]]) -> None:
    (folder / "nvidia_h200.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        where = tmp_path_factory.mktemp("configs")
        patch.setattr("hdispatch.compile.op_package.config_folder", lambda _: where)
        write_configs(where, entries())
        out = tmp_path_factory.mktemp("two") / "bundle"
        report = build([NAME], "h200", out, cache=cache, extra=["two_ladders"])
    assert report.rows == BUCKETS
    return out


# ---- buckets ----


def test_buckets_of_one_ladder_are_as_they_were():
    one = Ladders((1, 4, 16))
    assert (one.count, [one.split(b) for b in range(3)]) == (3, [(0, 0), (1, 0), (2, 0)])
    assert one.edges(1) == {"M": 4}
    assert (one.bounds(1), one.bounds(2)) == ((2, 4), (5, None))
    assert [list(one.of_m(b)) for b in range(3)] == [[0], [1], [2]]
    assert one.near(1, 2) == [0, 2]


def test_buckets_of_two_ladders():
    two = SPEC.ladders
    assert two.count == BUCKETS
    for m, value in itertools.product(MS, VALUES):
        bucket = two.index(m, value)
        (first, last), (low, high) = two.bounds(bucket), two.second_bounds(bucket)
        assert first <= m <= (last or m)
        assert low <= value <= (high or value)
        assert bucket in two.of_m(_C.bucket(LADDER, m))
        assert bucket in two.of_second(value)
        assert bucket == _C.bucket(LADDER, m) * len(LENGTHS) + _C.bucket(LENGTHS, value)
    assert two.edges(4) == {"M": 4, "longest": 512}
    assert two.near(4, 1) == [1, 3, 7, 5]
    assert two.near(0, 2) == [3, 1, 6, 2]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"values": (1, 2)}, "it takes a minimum of at least 1 and no values"),
        ({"minimum": 0}, "it takes a minimum of at least 1"),
        ({"ladder": ()}, "is not a list of 1 to 64 ascending edges"),
        ({"ladder": (2, 1)}, "is not a list of 1 to 64 ascending edges"),
        ({"ladder": (1, 1)}, "is not a list of 1 to 64 ascending edges"),
        ({"ladder": (4, 8), "minimum": 5}, "ascending edges of at least 5"),
        ({"ladder": tuple(range(1, 66))}, "is not a list of 1 to 64 ascending edges"),
    ],
)
def test_refused_ladders(changed, words):
    arg = dataclasses.replace(SPEC.args[3], **changed)
    with pytest.raises(HdispatchError, match=words):
        dataclasses.replace(SPEC, args=(*SPEC.args[:3], arg, SPEC.args[4]))


def test_one_integer_has_a_ladder():
    with pytest.raises(HdispatchError, match="longest and other have ladders; one integer may"):
        dataclasses.replace(SPEC, args=(*SPEC.args, IntArg("other", minimum=1, ladder=(1,))))
    with pytest.raises(HdispatchError, match=r"config_key names \['scale'\]"):
        dataclasses.replace(SPEC, config_key={"width": "scale"})


def test_64_by_64_buckets():
    ladder = tuple(range(1, 65))
    spec = dataclasses.replace(
        SPEC,
        name="many_buckets",
        ladder=ladder,
        args=(*SPEC.args[:3], dataclasses.replace(SPEC.args[3], ladder=ladder), SPEC.args[4]),
    )
    op = hdispatch.registry.define(spec) if spec.name not in hdispatch.registry.names() else hdispatch.registry.get(spec.name)
    builder = _C.TableBuilder(-1, 0, False)
    builder.set_ladder(op, ladder, ladder)
    record = {"kernel": "k", "function": "k", "m_min": 1, "m_max": 99, "second_min": 1, "second_max": 99, "guards": []}
    index = builder.add_function(op, record | {"args": [], "pdl": False, "env_stream": False}, _C.bench_function())
    for bucket in range(64 * 64):
        builder.add_row(op, spec.variants()[0].name, 64, 0, bucket, index)
    with pytest.raises(BundleError, match="has no bucket 4096"):
        builder.add_row(op, spec.variants()[0].name, 64, 0, 4096, index)
    builder.publish()
    for m, value in itertools.product((1, 2, 63, 64, 65), repeat=2):
        assert op.pick(m, 64, 0, 0, value) == min(m - 1, 63) * 64 + min(value - 1, 63)
    _C.withdraw(-1)


# ---- calls ----


@pytest.mark.parametrize("door", [OP, torch.ops.hdispatch.two_ladders, torch.ops.hdispatch.two_ladders.default])
def test_every_edge_of_both_ladders(bundle, door):
    for m, longest in itertools.product(MS, VALUES):
        args = arguments(m, longest)
        with null.recording():
            door(*args)
        (launch,) = null.launches()
        chunk = CHUNKS[SPEC.ladders.index(m, longest)]
        assert launch["grid"] == (-(-longest // chunk), m, 1), (m, longest)
        # out, x, lengths, longest, scale, stride: the value itself reaches the kernel.
        assert struct.unpack("<i", launch["params"][3]) == (longest,)
    assert hdispatch.stats()[NAME] == {"hits": len(MS) * len(VALUES), "empty": 0, "fallbacks": 0, "misses": {}}


def test_pick_names_the_row(bundle):
    rows = bundle.manifest["rows"]
    for m, longest in itertools.product(MS, VALUES):
        row = OP.pick(m, 64, 0, 0, longest)
        assert row is not None
        assert rows[row]["bucket"] == SPEC.ladders.index(m, longest)
    assert OP.pick(4, 64) == OP.pick(4, 64, 0, 0, 1)
    assert OP.pick(4, 64, 0, 0, 0) is None


def test_what_is_no_value(bundle):
    for value in (0, -1, -(2**63)):
        with pytest.raises(hdispatch.ArgumentError, match=f"longest is {value}; it takes at least 1"):
            OP(*arguments(longest=value))


def test_beyond_what_a_record_is_valid_for(bundle):
    """Far above the last edge the kernel's 32 bits end: a miss by name."""
    for value in (2**31 - 1, 2**31, 2**62):
        hdispatch.stats(reset=True)
        OP(*arguments(longest=value))
        found = hdispatch.stats()[NAME]
        assert found["hits"] == (value < 2**31)
        if not found["hits"]:
            assert found["misses"] == {"guard: 1 <= longest <= 2147483647": 1}
    with hdispatch.strict(), pytest.raises(hdispatch.MissError, match=r"longest=2147483648\): .* of row .*, longest 513\.\.\)"):
        OP(*arguments(longest=2**31))


def test_explain(bundle):
    words = hdispatch.explain(OP, *arguments(5, 129))
    assert "sizes    M=5 K=64 N=0 longest=129" in words
    assert "bucket   7: M 5.., longest 129..512" in words
    assert "guard    1 <= longest <= 2147483647: holds" in words
    assert "grid 1x5x1" in words


def test_a_missing_row_names_the_nearest(bundle):
    builder = _C.TableBuilder(-1, 0, False)
    builder.set_ladder(OP, LADDER, LENGTHS)
    record = {"kernel": "k", "function": "k", "m_min": 1, "m_max": 99, "second_min": 1, "second_max": 99, "guards": []}
    index = builder.add_function(OP, record | {"args": [], "pdl": False, "env_stream": False}, _C.bench_function())
    builder.add_row(OP, "any", 64, 0, 2, index)
    builder.add_row(OP, "any", 64, 0, 6, index)
    builder.publish()
    with hdispatch.strict(), pytest.raises(hdispatch.MissError) as error:
        OP(*arguments(1, 300))
    assert "two_ladders(any, M=1, K=64, N=0, longest=300)" in str(error.value)
    assert "nearest rows: (any, K=64, N=any, M 1..1, longest 513..)" in str(error.value).replace("N=0", "N=any")
    bundle.publish()


def test_a_builder_wants_both_ladders():
    with pytest.raises(BundleError, match="two_ladders: 0 edges of a second ladder; longest has one"):
        _C.TableBuilder(-1, 0, False).set_ladder(OP, LADDER)
    with pytest.raises(BundleError, match="rms_norm: 1 edges of a second ladder; it has no integer argument with one"):
        _C.TableBuilder(-1, 0, False).set_ladder(hdispatch.ops.rms_norm, LADDER, [4])


def test_fake_tensors():
    with torch._subclasses.fake_tensor.FakeTensorMode() as mode:
        args = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments()]
        torch.ops.hdispatch.two_ladders(*args)
        with pytest.raises(RuntimeError, match="longest is 0"):
            torch.ops.hdispatch.two_ladders(*arguments(longest=0)[:0], *args[:3], 0, 0.5)


def test_registered_functions(bundle):
    tvm_ffi = pytest.importorskip("tvm_ffi")
    told: list[tuple[int, int]] = []
    function = tvm_ffi.convert(lambda out, _x, _lengths, longest, _scale: told.append((out.shape[0], longest)))
    registration = hdispatch.register(OP, Key("any", 64, M=3, second=400), function, driver="null", stream="none")
    try:
        for m, longest in itertools.product((1, 2, 4, 5), (128, 129, 512, 513)):
            OP(*arguments(m, longest))
        assert told == [(2, 129), (2, 512), (4, 129), (4, 512)]
    finally:
        registration.unregister()
    with pytest.raises(HdispatchError, match="the key's second is 0; two_ladders takes a longest of at least 1"):
        hdispatch.register(OP, Key("any", 64, second=0), function, driver="null")
    with pytest.raises(HdispatchError, match="the key's second is 4; rms_norm has no argument with a ladder"):
        hdispatch.register("rms_norm", Key("bfloat16", second=4), function, driver="null")


# ---- bundles ----


def test_the_manifest(folder, capsys):
    manifest, _ = read_bundle(folder)
    assert manifest["ops"][NAME]["second"] == {"arg": "longest", "ladder": list(LENGTHS)}
    for record in manifest["records"]:
        assert (record["second_min"], record["second_max"]) == (1, 2**31 - 1)
        assert record["guards"] == [guard for guard in record["guards"] if "longest" not in guard["text"]]
    assert main(["inspect", str(folder)]) == 0
    assert "5.., longest 129..512" in capsys.readouterr().out
    assert main(["inspect", str(folder), "--row", "0"]) == 0
    out = capsys.readouterr().out
    assert "M 1, longest 1..128" in out
    assert "1 <= longest <= 2147483647" in out
    assert main(["inspect", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][1]["second"] == {"arg": "longest", "first": 129, "last": 512}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["rows"][0].update(bucket=BUCKETS), "names bucket 9 of 9"),
        (lambda m: m["records"][0].pop("second_min"), "does not say for which longest"),
        (lambda m: m["ops"][NAME].pop("second"), "names bucket 3 of 3"),
        (lambda m: m["ops"][NAME]["second"].update(arg="other"), "with other variants or arguments"),
        (lambda m: m["ops"][NAME]["second"].update(ladder=[4, 4, 4]), "edges ascend"),
    ],
)
def test_damaged_manifests(folder, tmp_path, change, words):
    import shutil

    from toy import write_text

    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    manifest = json.loads((copy / MANIFEST_NAME).read_text())
    manifest["rows"].sort(key=lambda row: row["bucket"] < 3)
    change(manifest)
    write_text(copy, json.dumps(manifest).encode())
    with pytest.raises(BundleError, match=words):
        hdispatch.load(copy, driver="null")


# ---- the build ----


def build_with(where: Path, cache: Path, out: Path, config: dict[str, Any]) -> Any:
    write_configs(where, [{"key": {}, "config": config}])
    build([NAME], "h200", out, cache=cache, extra=["two_ladders"])
    return read_bundle(out)[0]


def test_code_that_depends_on_the_interval(config_folder, cache, tmp_path):
    """A host function that branches on the integer: a record for each side, none of them with a guard about it."""
    manifest = build_with(config_folder, cache, tmp_path / "bundle", {"chunk": 64, "far": 512})
    intervals = {(r["second_min"], r["second_max"]) for r in manifest["records"]}
    assert intervals == {(1, 512), (513, 2**31 - 1)}
    for row in manifest["rows"]:
        record = manifest["records"][row["record"]]
        assert record["second_min"] <= SPEC.ladders.second_bounds(row["bucket"])[0]
    assert not [g for r in manifest["records"] for g in r["guards"] if "longest" in g["text"]]


def test_a_border_within_a_bucket_is_refused(config_folder, cache, tmp_path):
    with pytest.raises(
        BuildError, match=r"holds longest from 129 to 512, but code generated for longest = 512 is valid for 301"
    ):
        build_with(config_folder, cache, tmp_path / "bundle", {"chunk": 64, "far": 300})


def test_configs_of_a_folder_come_before_the_ops_own(config_folder, cache, tmp_path):
    """A card's file in either, then another card's; times are those beside the file that was taken."""
    write_configs(config_folder, [{"key": {}, "config": {"chunk": 64}}])
    tuned, out, notes = tmp_path / "tuned", tmp_path / "bundle", list[str]()

    def chunks(target: str = "h200") -> set[int]:
        notes[:] = build([NAME], target, out, cache=cache, extra=["two_ladders"], more_configs=tuned).notes
        return {record["config"]["chunk"] for record in read_bundle(out)[0]["records"]}

    (tuned / "another").mkdir(parents=True)
    with pytest.raises(BuildError, match=rf"{tuned} has configs of none of the ops {NAME}: it takes .*/<op>/nvidia_h200.json"):
        chunks()
    (tuned / NAME).mkdir()
    write_configs(tuned / NAME, [{"key": {}, "config": {"chunk": 128}}])
    edges = SPEC.ladders.edges(0)
    key = {"width": 64, "rows": edges["M"], "longest": edges["longest"]}
    time = {"key": key, "backend": "triton", "config": {"chunk": 128}, "us": 3.5}
    content = {"variants": [SPEC.typical_variant().name], "times": [time]}
    (tuned / NAME / "nvidia_h200.tuned.json").write_text(json.dumps(content))
    assert chunks() == {128}
    assert [row["tuned"]["us"] for row in read_bundle(out)[0]["rows"] if "tuned" in row] == [3.5]
    assert chunks("h100") == {128}
    (config_folder / "nvidia_h100.json").write_text(json.dumps([{"key": {}, "config": {"chunk": 256}}]))
    assert chunks("h100") == {256}, "what is of the card goes before what is of another"
    assert any(f"{tuned / NAME} has nvidia_h200.json and not nvidia_h100.json" in note for note in notes)


def test_a_config_that_serves_no_long_ones_is_refused(config_folder, cache, tmp_path):
    with pytest.raises((BuildError, RuntimeError), match="too long for this config"):
        build_with(config_folder, cache, tmp_path / "bundle", {"chunk": 64, "most": 512})


# ---- configs ----


def pick(file: configs.ConfigFile, m: int, longest: int) -> Any:
    return file.pick(SPEC, {"K": 64}, {"M": m, "longest": longest}).config["chunk"]


def test_configs_by_both_edges(config_folder):
    write_configs(config_folder, entries())
    file = configs.read(config_folder / "nvidia_h200.json", SPEC)
    for bucket, chunk in CHUNKS.items():
        assert pick(file, *SPEC.ladders.edges(bucket).values()) == chunk
    assert pick(file, 100, 10**6) == CHUNKS[8]


def test_the_nearest_m_comes_first_then_the_nearest_length(config_folder):
    def entry(chunk: int, **key: int) -> dict[str, Any]:
        return {"key": {"width": 64, **key}, "config": {"chunk": chunk}}

    content = [entry(1, rows=4, longest=512), entry(2, rows=4, longest=2048), entry(3, rows=16, longest=128), entry(4, rows=99)]
    write_configs(config_folder, content)
    file = configs.read(config_folder / "nvidia_h200.json", SPEC)
    assert [pick(file, 1, length) for length in (128, 512, 513, 4096)] == [1, 1, 2, 2]
    assert [pick(file, 16, length) for length in (128, 512)] == [3, 3]
    assert [pick(file, 64, length) for length in (1, 4096)] == [4, 4]
    write_configs(config_folder, [entry(1, rows=4, length=1)])
    with pytest.raises(BuildError, match="takes \\['longest', 'rows', 'width'\\]"):
        configs.read(config_folder / "nvidia_h200.json", SPEC)


# ---- tuning ----


def us_of(rows: device.OneRow) -> float:
    """A chunk is the faster, the nearer it is to what a bucket's edges say."""
    return 10.0 + abs(rows.record["config"]["chunk"] - wanted_chunk(rows.ladders.edges(rows.bucket)))


def wanted_chunk(edges: dict[str, int]) -> int:
    """64 for short ones; else 256, but 512 for sixteen rows of the longest ones."""
    if edges["longest"] <= 128:
        return 64
    return 512 if edges == {"M": 16, "longest": 2048} else 256


def test_tuning_from_candidates_to_a_bundle(config_folder, cache, tmp_path):
    report = collect.collect([NAME], "h200", tmp_path / "candidates", cache=cache, extra=["two_ladders"])
    assert report.ops[NAME].cells == BUCKETS
    cells = read_candidates(tmp_path / "candidates")["candidates"]["cells"]
    assert [(cell["M"], cell["second"]) for cell in cells] == list(itertools.product(LADDER, LENGTHS))
    fake = FakeDevice(us_of)
    measured = measure.measure(tmp_path / "candidates", tmp_path / "times.jsonl", device=fake)
    assert (measured.measured, measured.failures) == (BUCKETS, [])
    sizes = {(arguments[0].size(0), arguments[3]) for arguments in fake.launched}
    assert sizes == set(itertools.product(LADDER, LENGTHS))
    found = timings.read(tmp_path / "times.jsonl", select.refusal({NAME: op_package.read(NAME, NAME)}))
    assert {(line["M"], line["second"]) for line in found} == sizes
    (selected,) = select.select(found, {NAME: op_package.read(NAME, NAME)})
    assert (selected.worst, selected.slots) == (0.0, BUCKETS)
    file = configs.read(selected.path, SPEC)
    for bucket in range(BUCKETS):
        edges = SPEC.ladders.edges(bucket)
        assert pick(file, *edges.values()) == wanted_chunk(edges)
    assert len(file.entries) == 7, "of neighbouring lengths with one config the last one's entry serves"
    build([NAME], "h200", tmp_path / "bundle", cache=cache, extra=["two_ladders"])
    manifest, _ = read_bundle(tmp_path / "bundle")
    for row in manifest["rows"]:
        assert manifest["records"][row["record"]]["config"]["chunk"] == wanted_chunk(SPEC.ladders.edges(row["bucket"]))
        assert row["tuned"]["us"] == 10.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"second": 129}, "second is 129; bucket 1 of two_ladders is measured at longest = 512"),
        ({"second": None}, "second is None; bucket 1 of two_ladders is measured at longest = 512"),
        ({"bucket": 9}, "bucket is 9; two_ladders has 9 of them"),
        ({"M": 4}, "M is 4; bucket 1 of two_ladders is measured at its edge, 1"),
    ],
)
def test_timings_that_are_refused(change, words):
    line: Any = {"op": NAME, "variant": "any", "K": 64, "N": 0, "bucket": 1, "M": 1, "second": 512, "backend": "triton"}
    line |= {"generic": []} | change
    line = {name: value for name, value in line.items() if value is not None}
    assert words in str(select.refusal({NAME: op_package.read(NAME, NAME)})(line))


def test_only_some_buckets_of_m():
    assert list(chosen_buckets(["16", "4"])(SPEC)) == [6, 7, 8, 3, 4, 5]

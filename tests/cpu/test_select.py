"""Selecting configs from timings: fewest configs, edges, rows for any size, and the files."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hdispatch.cli.main import main
from hdispatch.cli.tune_reports import describe_shares
from hdispatch.compile import configs, measurements
from hdispatch.compile.target import DESCRIBED
from hdispatch.errors import BuildError
from hdispatch.opspec import BoolArg, IntArg, TensorArg
from hdispatch.tune import compare, cover, measured, point_configs, points, select, timings
from toy_timings import SPEC, line, picks, run, table, toy_package


def test_the_fewest_configs_and_their_edges(tmp_path):
    # a is best in places, but b is within 2 % of the best wherever a is, and alone elsewhere.
    lines = table(64, a=[100, 100, 200, 200], b=[101, 101.5, 100, 100], c=[300, 300, 300, 99.9])
    report = run(lines, tmp_path)
    assert (report.candidates, report.before, report.kept, report.entries, report.slots) == (3, 3, 1, 1, 4)
    assert report.worst == pytest.approx(0.015)
    assert report.compile_seconds == 6
    assert report.device_seconds == 6
    assert json.loads(report.path.read_text()) == [{"key": {"hidden_size": 64, "num_tokens": 8}, "config": {"name": "b"}}]
    assert picks(tmp_path, {"K": 64}) == ["b"] * 4


def test_with_no_regret_everything_is_best(tmp_path):
    report = run(table(64, a=[100, 100, 200, 200], b=[101, 101.5, 100, 100], c=[300, 300, 300, 99]), tmp_path, limit=0.0)
    assert (report.kept, report.worst) == (3, 0)
    assert picks(tmp_path, {"K": 64}) == ["a", "a", "b", "c"]
    assert [entry["key"]["num_tokens"] for entry in json.loads(report.path.read_text())] == [2, 4, 8]


LONG = replace(
    SPEC,
    args=(*SPEC.args, IntArg("longest", minimum=1, ladder=(16, 64, 256))),
    shapes=({"K": 64},),
    config_key={**SPEC.config_key, "longest": "longest"},
    ladder=(1, 2),
)


def test_a_part_of_a_second_ladder_leaves_the_rest_as_it_was(tmp_path):
    packages = {"toy_select": toy_package(tmp_path, LONG)}
    path = tmp_path / "toy_select" / "nvidia_h200.json"

    def long_line(m: int, longest: int, name: str, us: float) -> timings.Timing:
        return line(64, LONG.ladders.index(m, longest), name, us, M=m, second=longest)

    def served() -> dict[tuple[int, int], str]:
        file = configs.read(path, LONG)
        edges = [LONG.ladders.edges(bucket) for bucket in range(LONG.ladders.count)]
        return {(each["M"], each["longest"]): file.pick(LONG, {"K": 64}, each).config["name"] for each in edges}

    every = [(m, longest) for m in (1, 2) for longest in (16, 64, 256)]
    select.select([long_line(m, longest, f"old {m}", 5.0) for m, longest in every], packages)
    assert len(json.loads(path.read_text())) == 2
    select.select([long_line(2, longest, "new", 4.0) for longest in (16, 256)], packages)
    assert served() == {
        **{(1, longest): "old 1" for longest in (16, 64, 256)},
        (2, 16): "new",
        (2, 64): "old 2",
        (2, 256): "new",
    }
    times = {
        (t["key"]["num_tokens"], t["key"]["longest"]): t["us"]
        for t in json.loads(measurements.companion(path).read_text())["times"]
    }
    assert times == {**dict.fromkeys(every, 5.0), (2, 16): 4.0, (2, 256): 4.0}


def test_configs_are_shared_across_sizes(tmp_path):
    lines = table(64, a=[100] * 4, both=[101] * 4) + table(512, b=[100] * 4, both=[101] * 4)
    report = run(lines, tmp_path)
    assert report.kept == 1
    assert picks(tmp_path, {"K": 512}) == ["both"] * 4


def brute_force(fits: dict[Any, list[Any]], every: list[Any]) -> int:
    for size in range(1, len(every) + 1):
        for chosen in itertools.combinations(every, size):
            if all(set(options) & set(chosen) for options in fits.values()):
                return size
    raise AssertionError


@pytest.mark.parametrize("seed", range(30))
def test_covers_are_whole_and_small(seed):
    order = random.Random(seed)
    every = [timings.ConfigKey("triton", str(index)) for index in range(8)]
    regrets = {
        ((("K", k),), bucket): {config: order.random() for config in order.sample(every, 5)}
        for k in (1, 2)
        for bucket in range(6)
    }
    for found in regrets.values():
        found[min(found, key=lambda c: found[c])] = 0.0
    limit = order.choice([0.0, 0.1, 0.3])
    fits = {slot: cover.fitting(found, limit) for slot, found in regrets.items()}
    kept = cover.cover(regrets, limit)
    assert all(options & set(kept) for options in map(set, fits.values()))
    assert brute_force(fits, every) <= len(kept) <= brute_force(fits, every) + 1
    chosen = cover.assign(regrets, kept, limit)
    assert all(chosen[slot] in fits[slot] for slot in regrets)


def test_a_large_cover_ends():
    order = random.Random(1)
    every = [timings.ConfigKey("triton", str(index)) for index in range(60)]
    regrets = {((("K", k),), b): dict.fromkeys(order.sample(every, 6), 0.0) for k in range(20) for b in range(14)}
    kept = cover.cover(regrets, 0.02)
    assert 10 < len(kept) < 40


def test_fewer_changes_along_the_buckets(tmp_path):
    # Both are needed, both fit the buckets between; the gain of changing twice would be 0.1 %.
    lines = table(64, a=[100, 100, 100.1, 200], b=[200, 100.1, 100, 100])
    report = run(lines, tmp_path)
    assert report.kept == 2
    names = picks(tmp_path, {"K": 64})
    assert names == sorted(names)
    assert report.entries == 2


def test_wrong_is_out_everywhere_and_refused_only_there(tmp_path):
    lines = table(64, a=[10, 10, 10, 10], b=[20, 20, 20, 20], c=[30, 15, 30, 30])
    for index, status in ((0, "wrong"), (5, "refused")):  # a in bucket 0, b in bucket 1
        del lines[index]["us"]
        lines[index]["status"] = status
    report = run(lines, tmp_path)
    assert picks(tmp_path, {"K": 64}) == ["b", "c", "b", "b"]
    assert report.wrong == 1
    assert 'wrong results: triton {"name":"a"}' in report.notes


def test_the_worst_variant_counts(tmp_path):
    lines = table(64, a=[100] * 4, b=[101] * 4)
    lines += [{**each, "variant": "float16", "us": 200.0 if each["config"] == {"name": "a"} else 100.0} for each in lines]
    report = run(lines, tmp_path)
    assert picks(tmp_path, {"K": 64}) == ["b"] * 4
    assert report.worst == pytest.approx(0.01)
    companion = json.loads(report.path.with_suffix(".tuned.json").read_text())
    assert companion["variants"] == ["float16", "float32"]
    # Each variant has its own times.
    assert [(t["key"]["num_tokens"], t["variant"], t["us"], t["regret"], t["backends"]) for t in companion["times"][:2]] == [
        (1, "float16", 100.0, 0.0, {"triton": 100.0}),
        (1, "float32", 101.0, 0.01, {"triton": 100.0}),
    ]
    assert len(companion["times"]) == 8


def test_times_of_a_variant_are_not_anothers(tmp_path):
    """Of other sizes, of the same ones, and of a file whose times do not name their variant."""
    record: Any = {"backend": "triton", "config": {"name": "a"}}

    def us(path: Path) -> dict[tuple[str, int], float | None]:
        times = measurements.Measurements(SPEC, path)
        found = {(v, k): times.of(v, {"K": k}, {"M": 1}, record) for v in ("float16", "float32") for k in (64, 512)}
        return {cell: each and each["us"] for cell, each in found.items()}

    half = {"variant": "float16"}
    path = run(table(64, a=[1.0] * 4), tmp_path).path
    companion = measurements.companion(path)
    older = json.loads(companion.read_text())
    for time in older["times"]:
        assert time.pop("variant") == "float32"
    for former in (json.loads(companion.read_text()), older):
        companion.write_text(json.dumps(former))
        assert us(path) == {("float16", 64): None, ("float16", 512): None, ("float32", 64): 1.0, ("float32", 512): None}
        run([line(512, bucket, "a", 2.0, **half) for bucket in range(4)], tmp_path)
        assert us(path) == {("float16", 64): None, ("float16", 512): 2.0, ("float32", 64): 1.0, ("float32", 512): None}
        run([line(64, bucket, "a", 3.0, **half) for bucket in range(4)], tmp_path)
        assert us(path) == {("float16", 64): 3.0, ("float16", 512): 2.0, ("float32", 64): 1.0, ("float32", 512): None}
    written = json.loads(companion.read_text())
    assert all("variant" in time for time in written["times"])
    written["variants"].append("gone")  # of an op that has changed
    companion.write_text(json.dumps(written))
    run(table(64, a=[4.0] * 4), tmp_path)
    assert us(path) == {("float16", 64): 3.0, ("float16", 512): 2.0, ("float32", 64): 4.0, ("float32", 512): None}


def test_times_of_an_op_with_one_variant_name_none(tmp_path):
    spec = replace(SPEC, args=(TensorArg("input", ("M", "K"), (torch.float32,)),))
    lines = [line(64, bucket, "a", 1.0, variant="any") for bucket in range(4)]
    (report,) = select.select(lines, {"toy_select": toy_package(tmp_path, spec)})
    assert all("variant" not in time for time in json.loads(measurements.companion(report.path).read_text())["times"])
    found = measurements.Measurements(spec, report.path).of(
        "any", {"K": 64}, {"M": 1}, {"backend": "triton", "config": {"name": "a"}}
    )
    assert found == {"us": 1.0, "others": {}}


def test_where_nothing_fits_the_nearest_is_taken(tmp_path):
    # a misses in one variant, b in the other
    lines = [
        line(64, 0, "a", 100),
        line(64, 0, "b", 110),
        line(64, 0, "a", 130, variant="float16"),
        line(64, 0, "b", 100, variant="float16"),
    ]
    report = run(lines, tmp_path)
    assert report.worst == pytest.approx(0.1)
    assert picks(tmp_path, {"K": 64})[0] == "b"


def opened(lines: list[timings.Timing], *names: str) -> list[timings.Timing]:
    return [{**each, "generic": ["K"] if each["config"]["name"] in names else []} for each in lines]


def test_the_row_for_any_size_gets_what_is_best_on_average(tmp_path):
    lines = table(64, a=[100] * 4, b=[150] * 4, g=[200] * 4, h=[300] * 4)
    lines += table(512, a=[200] * 4, b=[100] * 4, g=[150] * 4, h=[100] * 4)
    report = run(opened(lines, "g", "h"), tmp_path)
    assert picks(tmp_path, {"K": 64}) == ["a"] * 4
    assert picks(tmp_path, {"K": 512}) == ["b"] * 4
    assert picks(tmp_path, {}) == ["g"] * 4
    assert report.kept == 3
    assert {"key": {"num_tokens": 8}, "config": {"name": "g"}} in json.loads(report.path.read_text())


def test_the_row_for_any_size_prefers_a_config_that_is_kept(tmp_path):
    lines = table(64, a=[100] * 4, b=[101] * 4) + table(512, a=[102] * 4, b=[101] * 4)
    assert run(opened(lines, "a", "b"), tmp_path).kept == 1
    assert picks(tmp_path, {}) == picks(tmp_path, {"K": 64})


def test_an_op_with_open_sizes_only_is_measured_at_a_hint(tmp_path):
    spec = replace(SPEC, shapes=({},))
    lines = opened(table(4096, a=[1, 1, 1, 9], b=[9, 9, 9, 1]), "a", "b")
    select.select(lines, {"toy_select": toy_package(tmp_path, spec)})
    file = configs.read(tmp_path / "toy_select" / "nvidia_h200.json", spec)
    assert [entry.sizes for entry in file.entries] == [{"M": 4}, {"M": 8}]


def test_entries_of_other_sizes_stay(tmp_path):
    path = tmp_path / "toy_select" / "nvidia_h200.json"
    path.parent.mkdir()
    old = [
        {"key": {"hidden_size": 64, "num_tokens": 1}, "config": {"name": "old"}},
        {"key": {"hidden_size": 99, "num_tokens": 1}, "config": {"name": "kept"}},
        {"key": {}, "config": {"name": "default"}},
    ]
    path.write_text(json.dumps(old))
    report = run(table(64, a=[1] * 4), tmp_path)
    assert json.loads(path.read_text())[1:] == old[1:]
    assert report.entries == 3
    assert any("2 entries for sizes or arguments without timings are kept" in note for note in report.notes)
    assert any("no measured config is generic in ['K']" in note for note in report.notes)
    run(opened(table(64, a=[1] * 4), "a"), tmp_path)
    names = [entry["config"]["name"] for entry in json.loads(path.read_text())]
    assert names == ["a", "a", "kept"]


def test_entries_of_other_edges_of_m_stay(tmp_path):
    run(table(64, a=[1, 1, 9, 9], b=[9, 9, 1, 1]), tmp_path)
    assert picks(tmp_path, {"K": 64}) == ["a", "a", "b", "b"]
    # b was written for M = 8 alone, and served M = 4 too; a was written for M = 2, and served M = 1.
    run([line(64, 3, "c", 1.0)], tmp_path)
    assert picks(tmp_path, {"K": 64}) == ["a", "a", "b", "c"]
    run([line(64, 0, "d", 1.0)], tmp_path)
    assert picks(tmp_path, {"K": 64}) == ["d", "a", "b", "c"]
    run([line(64, 1, "e", 1.0)], tmp_path)
    assert picks(tmp_path, {"K": 64}) == ["d", "e", "b", "c"]


def test_edges_that_were_not_measured_keep_what_served_them_from_other_sizes(tmp_path):
    run(table(512, a=[1, 1, 9, 9], b=[9, 9, 1, 1]), tmp_path)
    run([line(64, 2, "c", 1.0)], tmp_path)
    assert picks(tmp_path, {"K": 64}) == ["a", "a", "c", "b"]
    assert picks(tmp_path, {"K": 512}) == ["a", "a", "b", "b"]


def test_edges_that_were_not_measured_keep_their_stand_ins(tmp_path):
    backends = ("triton", "cutedsl")
    path = tmp_path / "toy_select" / "nvidia_h200.json"

    def served(*installed: str) -> list[str]:
        file = configs.read(path, SPEC).available(installed, "triton")
        return [file.pick(SPEC, {"K": 64}, {"M": edge}).config["name"] for edge in SPEC.ladder]

    fast = [line(64, bucket, "fast", 50.0, backend="cutedsl") for bucket in range(4)]
    run(table(64, a=[90, 90, 95, 95], b=[95, 95, 90, 90]) + fast, tmp_path, backends=backends)
    assert (served(*backends), served("triton")) == (["fast"] * 4, ["a", "a", "b", "b"])
    run([line(64, 1, "c", 40.0)], tmp_path, backends=backends)
    assert (served(*backends), served("triton")) == (["fast", "c", "fast", "fast"], ["a", "c", "b", "b"])
    run([line(64, 3, "faster", 30.0, backend="cutedsl")], tmp_path, backends=backends)  # of Triton's nothing was measured
    assert (served(*backends), served("triton")) == (["fast", "c", "fast", "faster"], ["a", "c", "b", "b"])


def test_a_config_that_was_measured_as_wrong_serves_no_bucket(tmp_path):
    run(table(64, a=[1.0] * 4), tmp_path)
    run([line(64, 3, "a", None, status="wrong", why="w"), line(64, 3, "b", 2.0)], tmp_path)
    assert picks(tmp_path, {"K": 64}) == ["b"] * 4


def test_of_equally_near_sizes_the_same_one_serves_after_a_select_of_the_other(tmp_path):
    run(table(64, a=[1.0] * 4) + table(512, b=[1.0] * 4), tmp_path)
    assert picks(tmp_path, {"K": 288}) == ["a"] * 4
    run(table(512, c=[1.0] * 4), tmp_path)
    assert picks(tmp_path, {"K": 288}) == ["a"] * 4


def test_times_of_other_sizes_stay(tmp_path):
    run(table(64, a=[1.0] * 4) + table(512, a=[2.0] * 4), tmp_path)
    report = run([line(64, 3, "c", 0.5)], tmp_path)
    times = json.loads(report.path.with_suffix(".tuned.json").read_text())["times"]
    assert {(time["key"]["hidden_size"], time["key"]["num_tokens"]): time["us"] for time in times} == {
        **{(64, m): 1.0 for m in (1, 2, 4)},
        (64, 8): 0.5,
        **{(512, m): 2.0 for m in SPEC.ladder},
    }


def test_stand_ins_for_arguments_leave_the_other_entries(tmp_path):
    spec = replace(SPEC, args=(*SPEC.args, IntArg("group", values=(4, 8), minimum=1)), typical="float32+group=4")
    packages = {"toy_select": toy_package(tmp_path, spec, ("triton", "cutedsl"))}
    usual = [line(64, at, "a", 1.0, variant="float32+group=4") for at in range(4)]
    wide = [line(64, at, "b", 2.0, variant="float32+group=8") for at in range(4)]
    fast = [line(64, at, "fast", 1.0, variant="float32+group=8", backend="cutedsl") for at in range(4)]
    select.select([*usual, *wide, *fast], packages)
    file = configs.read(tmp_path / "toy_select" / "nvidia_h200.json", spec)
    for installed, expected in ((("triton",), ["a", "b"]), (("triton", "cutedsl"), ["a", "fast"])):
        there = file.available(installed, "triton")
        found = [there.pick(spec, {"K": 64}, {"M": 2}, spec.variant(f"float32+group={group}")) for group in (4, 8)]
        assert [entry.config["name"] for entry in found] == expected


def test_timings_of_a_variant_without_a_tensor_make_entries_of_their_own(tmp_path):
    """As Llama's of attention, after Qwen3's with norms: neither replaces the other's, in either order."""
    weight = TensorArg("weight", ("K",), "input", optional=True)
    args = (*SPEC.args, weight, BoolArg("flag"))
    spec = replace(SPEC, args=args, shapes=({"K": 64},), typical="float32+weight+flag")
    packages = {"toy_select": toy_package(tmp_path, spec)}
    path = tmp_path / "toy_select" / "nvidia_h200.json"
    runs = {
        "float32+weight+flag": ("a", {}),
        "float32+flag": ("b", {"weight": 0}),
        "float32+weight": ("c", {"flag": 0}),
        "float32": ("d", {"weight": 0, "flag": 0}),
    }
    for order in itertools.permutations(runs):
        for variant in (*order, order[0]):
            lines = [line(64, at, runs[variant][0], 1.0 + at, variant=variant) for at in range(4)]
            select.select([*lines, *(line(64, at, "slow", 9.0, variant=variant) for at in range(4))], packages)
        file, times = configs.read(path, spec), measurements.Measurements(spec, path)
        for variant, (name, arguments) in runs.items():
            picked = [file.pick(spec, {"K": 64}, {"M": m}, spec.variant(variant)) for m in SPEC.ladder]
            assert [(each.config["name"], each.arguments) for each in picked] == [(name, arguments)] * 4
            found = times.of(variant, {"K": 64}, {"M": 2}, {"backend": "triton", "config": {"name": name}})
            assert found is not None
        path.unlink()
        measurements.companion(path).unlink()


def test_an_entry_for_arguments_goes_before_finer_edges_of_others(tmp_path):
    spec = replace(SPEC, args=(*SPEC.args, IntArg("group", values=(4, 8), minimum=1)), typical="float32+group=4")
    packages = {"toy_select": toy_package(tmp_path, spec)}
    usual = [line(64, at, name, 1.0, variant="float32+group=4") for at, name in enumerate("abcd")]
    select.select([*usual, *(line(64, at, "e", 1.0, variant="float32+group=8") for at in range(4))], packages)
    file = configs.read(tmp_path / "toy_select" / "nvidia_h200.json", spec)
    for group, names in ((4, "abcd"), (8, "eeee")):
        variant = spec.variant(f"float32+group={group}")
        assert "".join(file.pick(spec, {"K": 64}, {"M": m}, variant).config["name"] for m in SPEC.ladder) == names


H100 = "NVIDIA H100 80GB HBM3"


def test_a_new_cards_file_begins_from_what_served_it(tmp_path):
    """All sizes, buckets, arguments and stand-ins of the file that it was served by; no times of that card."""
    backends = ("triton", "cutedsl")
    fast = [line(512, bucket, "fast", 50.0, backend="cutedsl") for bucket in range(4)]
    run(table(64, a=[1, 1, 9, 9], b=[9, 9, 1, 1]) + table(512, c=[90] * 4) + fast, tmp_path, backends=backends)
    before = json.loads((tmp_path / "toy_select" / "nvidia_h200.json").read_text())
    # Slower than b by less than the noise of the other card's choice: what another card chose is not kept for that.
    report = run(noisy([line(64, 0, name, us, gpu=H100) for name, us in (("x", 100), ("a", 100.1))], 0.1), tmp_path)
    assert report.path.name == "nvidia_h100.json"
    assert picks(tmp_path, {"K": 64}, "h100") == ["x", "a", "b", "b"]
    file = configs.read(report.path, SPEC)
    for installed, name in ((backends, "fast"), (("triton",), "c")):
        there = file.available(installed, "triton")
        assert [there.pick(SPEC, {"K": 512}, {"M": edge}).config["name"] for edge in SPEC.ladder] == [name] * 4
    assert json.loads((tmp_path / "toy_select" / "nvidia_h200.json").read_text()) == before
    times = json.loads(measurements.companion(report.path).read_text())["times"]
    assert [(time["key"], time["us"]) for time in times] == [({"hidden_size": 64, "num_tokens": 1}, 100)]
    assert (
        f"{report.path} is new: what was not measured is as in {tmp_path / 'toy_select' / 'nvidia_h200.json'}"
        in report.notes[0]
    )
    assert not any("is new" in note for note in run([line(64, 1, "y", 1.0, gpu=H100)], tmp_path).notes)
    assert picks(tmp_path, {"K": 64}, "h100") == ["x", "y", "b", "b"]


def test_what_serves_a_new_card_is_among_its_candidates(tmp_path):
    run(table(64, a=[1, 1, 9, 9], b=[9, 9, 1, 1]), tmp_path)
    for name, expected in (("h100", {"a", "b"}), ("h200", {"a", "b"})):
        files = point_configs.config_files(toy_package(tmp_path), points.Scope(), DESCRIBED[name], [])
        assert {entry.config["name"] for file in files for entry in file.entries} == expected
    run([line(64, bucket, "x", 1.0, gpu=H100) for bucket in range(4)], tmp_path)
    (file,) = point_configs.config_files(toy_package(tmp_path), points.Scope(), DESCRIBED["h100"], [])
    assert {entry.config["name"] for entry in file.entries} == {"x"}


def test_a_new_cards_file_has_the_entries_of_other_arguments(tmp_path):
    spec = replace(SPEC, args=(*SPEC.args, IntArg("group", values=(4, 8), minimum=1)), typical="float32+group=4")
    packages = {"toy_select": toy_package(tmp_path, spec)}

    def of(group: int, name: str, **changes: Any) -> list[timings.Timing]:
        return [line(64, at, name, 1.0, variant=f"float32+group={group}", **changes) for at in range(4)]

    select.select([*of(4, "a"), *of(8, "b")], packages)
    new = [each for group in (4, 8) for each in of(group, f"x{group}", gpu=H100)[:1]]
    for lines, expected in ((new[:1], ["x4", "a", "b", "b"]), (new, ["x4", "a", "x8", "b"])):
        path = select.select(lines, packages)[0].path
        file, m1, m8 = configs.read(path, spec), {"M": 1}, {"M": 8}
        wanted = [(group, edges) for group in (4, 8) for edges in (m1, m8)]
        found = [file.pick(spec, {"K": 64}, edges, spec.variant(f"float32+group={g}")) for g, edges in wanted]
        assert [entry.config["name"] for entry in found] == expected
        path.unlink()


def test_a_file_elsewhere_begins_from_the_ops_own(tmp_path):
    """With `--out`: the file of the card there, else what the op's own configs serve it with, the same card's times too."""
    run(table(64, a=[1, 2, 3, 4]) + table(512, b=[5.0] * 4), tmp_path)
    out = tmp_path / "out"
    report = run([line(64, 0, "x", 0.5)], tmp_path, out=out)
    assert report.path == out / "toy_select" / "nvidia_h200.json"
    assert (picks(out, {"K": 64}), picks(out, {"K": 512})) == (["x", "a", "a", "a"], ["b"] * 4)
    assert len(json.loads(measurements.companion(report.path).read_text())["times"]) == 8
    assert picks(tmp_path, {"K": 64}) == ["a"] * 4
    run([line(64, 0, "y", 0.5, gpu=H100)], tmp_path, out=out)
    assert (picks(out, {"K": 64}, "h100"), picks(out, {"K": 512}, "h100")) == (["y", "a", "a", "a"], ["b"] * 4)
    run(table(64, z=[1.0] * 4), tmp_path, out=out)
    assert (picks(out, {"K": 64}), picks(out, {"K": 512})) == (["z"] * 4, ["b"] * 4)


def test_timings_of_other_compiled_in_integers_make_entries_of_their_own(tmp_path):
    """Entries and times for them stand beside those of the typical variant, and serve their variants alone."""
    args = (*SPEC.args, IntArg("group", values=(4, 8, 2), minimum=1))
    spec = replace(SPEC, args=args, shapes=({"K": 64},), typical="float32+group=4")
    package = toy_package(tmp_path, spec)

    def of(group: int, name: str, times: list[float]) -> list[timings.Timing]:
        return [line(64, at, name, us, variant=f"float32+group={group}") for at, us in enumerate(times)]

    path = tmp_path / "toy_select" / "nvidia_h200.json"
    usual, wide = of(4, "a", [1, 2, 3, 4]), [*of(8, "b", [5, 6, 7, 8]), *of(8, "a", [9, 9, 9, 9])]
    for lines in (usual, wide, usual, [*wide, *usual]):
        select.select(lines, {"toy_select": package})
        file, times = configs.read(path, spec), measurements.Measurements(spec, path)
        for group, name, us in ((4, "a", 2), (2, "a", None), (8, "b", 6)):
            if name == "b" and len(file.entries) == 1:
                continue  # not yet
            variant = spec.variant(f"float32+group={group}")
            assert [file.pick(spec, {"K": 64}, {"M": edge}, variant).config["name"] for edge in spec.ladder] == [name] * 4
            found = times.of(variant.name, {"K": 64}, {"M": 2}, {"backend": "triton", "config": {"name": name}})
            assert (found and found["us"]) == us
    assert [entry.arguments for entry in file.entries] == [{}, {"group": 8}]


def noisy(lines: list[timings.Timing], share: float) -> list[timings.Timing]:
    return [{**each, "q1": each["us"] * (1 - share / 2), "q3": each["us"] * (1 + share / 2)} for each in lines]


@pytest.mark.parametrize(
    ("us", "noise", "kept"), [(100.4, 0.01, True), (101.5, 0.01, False), (100.0, 0.0, True), (100.4, 0.0, False)]
)
def test_a_choice_inside_the_noise_keeps_the_previous_config(tmp_path, us, noise, kept):
    assert run(table(64, old=[100] * 4, new=[110] * 4), tmp_path).kept == 1
    run(noisy(table(64, old=[us] * 4, new=[100] * 4), noise), tmp_path, limit=0.02)
    assert picks(tmp_path, {"K": 64}) == ["old" if kept else "new"] * 4


def test_reruns_that_differ_by_noise_choose_alike(tmp_path):
    """However the noise falls; and what is slower than allowed goes, inside the noise or not."""
    generator = random.Random(3)

    def measured_again() -> list[timings.Timing]:
        names = "abcdef"
        columns = {name: [100 * (1 + generator.uniform(0, 0.01)) for _ in SPEC.ladder] for name in names}
        return noisy(table(64, **columns) + table(512, **columns), 0.012)

    run(measured_again(), tmp_path)
    first = picks(tmp_path, {"K": 64}) + picks(tmp_path, {"K": 512})
    for _ in range(20):
        run(measured_again(), tmp_path)
        assert picks(tmp_path, {"K": 64}) + picks(tmp_path, {"K": 512}) == first
    run(noisy(table(64, **{first[0]: [103] * 4, "g": [100] * 4}), 0.1), tmp_path)
    assert picks(tmp_path, {"K": 64}) == ["g"] * 4


def test_a_models_sizes_get_entries_of_their_own(tmp_path):
    """And what rows have, the one for any size among it, stays as it is."""
    run(opened(table(64, a=[1] * 4) + table(512, a=[1] * 4), "a"), tmp_path)
    before = json.loads((tmp_path / "toy_select" / "nvidia_h200.json").read_text())
    run(table(3072, a=[9] * 4, b=[1, 1, 5, 5]), tmp_path)
    after = json.loads((tmp_path / "toy_select" / "nvidia_h200.json").read_text())
    assert after == [*before, {"key": {"hidden_size": 3072, "num_tokens": 8}, "config": {"name": "b"}}]
    assert picks(tmp_path, {"K": 3072}) == ["b"] * 4
    assert picks(tmp_path, {}) == ["a"] * 4
    hint = SPEC.hint("K")
    run(opened(table(hint, c=[1] * 4), "c"), tmp_path)
    assert picks(tmp_path, {}) == ["c"] * 4, "what stands for any size is for the row for any size"


def test_the_backend_is_named_where_it_is_not_the_first(tmp_path):
    lines = table(64, a=[1, 1, 2, 2]) + [{**each, "backend": "helion"} for each in table(64, b=[2, 2, 1, 1])]
    run(lines, tmp_path, backends=("helion", "triton"))
    entries = json.loads((tmp_path / "toy_select" / "nvidia_h200.json").read_text())
    assert [entry.get("backend") for entry in entries] == ["triton", None]


def test_compare_says_what_a_backend_reaches_of_the_best_other():
    others = [
        *table(64, t=[1.0, 2.0]),
        *table(512, t=[1.0, 4.0]),
        *[{**each, "backend": "cutedsl"} for each in table(64, c=[3, 1])],
    ]
    ours = [{**each, "backend": "helion"} for each in [*table(64, h=[2.0, 1.0], slow=[9, 9]), *table(512, h=[1.0, 2.0])]]
    packages = {"toy_select": toy_package(Path())}
    first, second = compare.compare([*others, *ours], packages, "helion")
    assert (first.op, first.m, first.worst, first.other, first.cells) == ("toy_select", 1, 0.5, "triton", 2)
    assert first.share == pytest.approx(0.5**0.5)
    assert (second.m, second.share, second.worst) == (2, pytest.approx(2**0.5), 1.0)
    text = describe_shares([first, second])
    assert text.splitlines()[0] == "| op | M = 1 | M = 2 |"
    assert "0.71 (worst 0.50) of triton" in text
    with pytest.raises(BuildError, match="no cell of the timings has a time of cutedsl"):
        compare.compare(table(64, a=[1.0] * 4), packages, "cutedsl")


def test_compare_takes_others_from_the_files_beside_the_configs(tmp_path):
    run(table(64, t=[1.0, 2.0, 4.0, 4.0]), tmp_path)
    packages = {"toy_select": toy_package(tmp_path)}
    ours = [{**each, "backend": "helion"} for each in table(64, h=[2.0, 2.0])]
    first, second = compare.compare(ours, packages, "helion", tuned=True)
    assert [(each.m, each.share, each.other) for each in (first, second)] == [(1, 0.5, "triton"), (2, 1.0, "triton")]
    with pytest.raises(BuildError, match="no cell of the timings has a time of helion and one of another backend"):
        compare.compare(ours, packages, "helion")


def test_the_companion_says_what_was_measured(tmp_path):
    report = run(table(64, a=[100] * 4, b=[101] * 4), tmp_path, limit=0.05)
    companion = json.loads((tmp_path / "toy_select" / "nvidia_h200.tuned.json").read_text())
    assert companion["gpu"] == "NVIDIA H200"
    assert companion["versions"] == [{"torch": "2"}]
    assert companion["regret"] == {"limit": 0.05, "worst": round(report.worst, 4), "mean": round(report.mean, 4)}
    assert companion["configs"] == {"candidates": 2, "best_everywhere": 1, "kept": 1}
    assert len(companion["times"]) == 4
    assert companion["times"][0] == {
        "key": {"hidden_size": 64, "num_tokens": 1},
        "variant": "float32",
        "backend": "triton",
        "config": {"name": "a"},
        "us": 100,
        "best_us": 100,
        "regret": 0,
        "backends": {"triton": 100},
    }


def test_nothing_is_written_if_not_asked_to(tmp_path):
    run(table(64, a=[1] * 4), tmp_path, write=False)
    assert not any(tmp_path.iterdir())


def test_the_curve_falls(tmp_path):
    order = random.Random(0)
    lines = [line(64, b, str(c), 100 + 50 * order.random()) for b in range(4) for c in range(10)]
    curve = run(lines, tmp_path).curve
    assert [number for number, _, _ in curve] == list(range(1, len(curve) + 1))
    assert all(a[2] >= b[2] for a, b in itertools.pairwise(curve))
    assert curve[-1][1] == 0


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ([], {}, "there are no timings; make some with `hdispatch tune measure`"),
        ([line(64, 0, "a", 1.0)], {"limit": -0.1}, "the regret is -0.1"),
        ([line(64, 0, "a", 1.0)], {"limit": float("nan")}, "the regret is nan"),
        (
            [line(64, 0, "a", 1.0), line(64, 1, "a", 1.0, gpu="NVIDIA B200")],
            {},
            r"timings are of \['NVIDIA B200', 'NVIDIA H200'\]",
        ),
        ([line(64, 0, "a", 1.0, op="nonsense")], {}, "'nonsense', which is no op here"),
        ([line(64, 0, "a", None, status="wrong")], {}, "no candidate gave a right result"),
    ],
)
def test_refused(tmp_path, lines, options, message):
    with pytest.raises(BuildError, match=message):
        run(lines, tmp_path, **options)


# ---- the command line ----


def real(k: int, bucket: int, name: str, us: float) -> timings.Timing:
    return line(k, bucket, name, us, op="dynamic_per_token_scaled_fp8_quant", variant="bfloat16", backend="helion")


def test_the_command_writes_and_draws(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    timings.append(tmp_path / "t.jsonl", [real(4096, b, n, us) for b in range(4) for n, us in (("a", 1.0), ("b", 1.5))])
    command = ["tune", "select", str(tmp_path / "t.jsonl"), "--out", str(tmp_path / "out"), "--plot", str(tmp_path / "p.png")]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "dynamic_per_token_scaled_fp8_quant" in out
    assert "best everywhere" in out
    written = tmp_path / "out" / "dynamic_per_token_scaled_fp8_quant" / "nvidia_h200.json"
    assert {"name": "a"} in [entry["config"] for entry in json.loads(written.read_text())]
    assert (tmp_path / "p.png").stat().st_size > 1000
    assert main([*command[:-2], "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["kept"] == 1


def test_the_default_backend_is_the_ops_and_not_what_is_installed_here(tmp_path, monkeypatch):
    monkeypatch.setattr("hdispatch.tune.point_configs.missing", lambda backend: backend if backend == "triton" else None)
    timings.append(tmp_path / "t.jsonl", [real(4096, 0, "a", 1.0)])
    assert main(["tune", "select", str(tmp_path / "t.jsonl"), "--out", str(tmp_path / "out")]) == 0
    written = tmp_path / "out" / "dynamic_per_token_scaled_fp8_quant" / "nvidia_h200.json"
    (entry,) = (entry for entry in json.loads(written.read_text()) if entry["config"] == {"name": "a"})
    assert entry["backend"] == "helion"


def test_the_command_names_the_line_and_writes_nothing(tmp_path, capsys):
    timings.append(tmp_path / "t.jsonl", [real(4096, 0, "a", 1.0), real(4096, 0, "a", 1.0) | {"bucket": 99}])  # type: ignore[list-item]
    command = ["tune", "select", str(tmp_path / "t.jsonl"), "--out", str(tmp_path / "out")]
    assert main(command) == 1
    assert "t.jsonl:2: no timing to choose by: bucket is 99" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*command, "--ops", "rms_norm,nonsense"]) == 1
    assert "no op 'nonsense'" in capsys.readouterr().err


def test_a_time_is_the_mean_of_the_ways(tmp_path):
    lines = [
        line(64, 0, "graph", 10.0, stream_us=14.0),
        line(64, 0, "stream", 10.4, stream_us=11.0),
        line(64, 0, "far", 13.0),
        *table(512, a=[100.0] * 4),
    ]
    report = run(lines, tmp_path)
    assert picks(tmp_path, {"K": 64})[0] == "stream"
    first = json.loads(report.path.with_suffix(".tuned.json").read_text())["times"][0]
    assert (first["us"], first["best_us"]) == (10.7, 10.7)
    assert times_at_64(lines) == pytest.approx({"graph": 12.0, "stream": 10.7, "far": 13.0 * 10.7 / 10.0})


def test_a_cell_on_the_same_buffers_too(tmp_path):
    lines = [
        line(64, 0, "cold", 10.0, stream_us=11.0, warm_us=12.0),
        line(64, 0, "warm", 10.4, stream_us=11.2, warm_us=8.4),
        line(64, 0, "far", 13.0, stream_us=13.4),
        *table(512, a=[100.0] * 4),
    ]
    run(lines, tmp_path)
    assert picks(tmp_path, {"K": 64})[0] == "warm"
    assert times_at_64(lines) == pytest.approx({"cold": 11.0, "warm": 10.0, "far": 13.0})


def times_at_64(lines):
    found = measured.Measured(SPEC, lines).times[(("K", 64),), 0]["float32", 64, 0]
    return {json.loads(config.config)["name"]: us for config, us in found.items()}


def test_where_an_optional_backend_wins_the_best_without_it_is_written_too(tmp_path):
    fast = {"backend": "cutedsl"}
    lines = table(64, a=[100, 100, 200, 200], b=[120, 120, 100, 100]) + table(512, a=[50] * 4)
    lines += [line(64, bucket, "fast", us, **fast) for bucket, us in enumerate((50.0, 50.0, 150.0, 150.0))]
    report = run(lines, tmp_path, backends=("triton", "cutedsl"))
    data = json.loads(report.path.read_text())
    assert [(e["key"], e.get("backend"), e.get("without"), e["config"]["name"]) for e in data] == [
        ({"hidden_size": 64, "num_tokens": 2}, "cutedsl", None, "fast"),
        ({"hidden_size": 64, "num_tokens": 8}, None, None, "b"),
        ({"hidden_size": 512, "num_tokens": 8}, None, None, "a"),
        ({"hidden_size": 64, "num_tokens": 2}, None, "cutedsl", "a"),
        ({"hidden_size": 64, "num_tokens": 8}, None, "cutedsl", "b"),
    ]
    times = json.loads(report.path.with_suffix(".tuned.json").read_text())["times"]
    assert [time["backends"] for time in times if time["key"]["hidden_size"] == 64] == [
        {"cutedsl": 50.0, "triton": 100.0},
        {"cutedsl": 50.0, "triton": 100.0},
        {"cutedsl": 150.0, "triton": 100.0},
        {"cutedsl": 150.0, "triton": 100.0},
    ]
    found = measurements.Measurements(SPEC, report.path)
    record: Any = {"backend": "cutedsl", "config": {"name": "fast"}}
    assert found.of("float32", {"K": 64}, {"M": 1}, record) == {"us": 50.0, "others": {"triton": 100.0}}
    assert found.of("float32", {"K": 64}, {"M": 8}, record) is None, "another config was chosen there"
    assert found.of("other", {"K": 64}, {"M": 1}, record) is None
    assert found.of("float32", {}, {"M": 1}, record) is None
    assert not measurements.Measurements(SPEC, tmp_path / "nothing.json").times
    (tmp_path / "odd.tuned.json").write_text('{"variants": 3}')
    with pytest.raises(BuildError, match=r"cannot read the measurements in .*odd\.tuned\.json: variants is 3"):
        measurements.Measurements(SPEC, tmp_path / "odd.json")
    file = configs.read(report.path, SPEC)
    alone = file.available(["triton"], "triton")
    assert [alone.pick(SPEC, {"K": 64}, {"M": edge}).config["name"] for edge in SPEC.ladder] == ["a", "a", "b", "b"]
    both = file.available(["triton", "cutedsl"], "triton")
    assert [both.pick(SPEC, {"K": 64}, {"M": edge}).config["name"] for edge in SPEC.ladder] == ["fast", "fast", "b", "b"]
    again = run(lines, tmp_path, backends=("triton", "cutedsl"))
    assert json.loads(again.path.read_text()) == data, "entries that stand in are replaced, not kept"

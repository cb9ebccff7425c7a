"""The file of timings: lines that come back, and those that cannot be right."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hdispatch.errors import BuildError, HdispatchError
from hdispatch.tune import select, timings
from toy_timings import SPEC, line, run, toy_package


def test_lines_come_back_and_later_ones_replace(tmp_path):
    path = tmp_path / "t.jsonl"
    timings.append(path, [line(64, 0, "a", 1.0), line(64, 1, "a", 2.0)])
    timings.append(path, [line(64, 0, "a", 3.0)])
    assert [each["us"] for each in timings.read(path)] == [2.0, 3.0]
    other = tmp_path / "u.jsonl"
    timings.append(other, [line(64, 1, "a", 4.0)])
    assert sorted(each["us"] for each in timings.read_all([path, other])) == [3.0, 4.0]  # type: ignore[type-var]


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / "t.jsonl"
    timings.append(path, [line(64, 0, "a", 1.0)])
    with path.open("ab") as file:
        file.write('{"op": "µ'.encode()[:-1])
    assert [each["us"] for each in timings.read(path)] == [1.0]
    timings.append(path, [line(64, 1, "a", 2.0)])
    assert [each["us"] for each in timings.read(path)] == [1.0, 2.0]


def test_what_is_no_timing_is_named(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"op": 1}\n')
    with pytest.raises(HdispatchError, match=r"t\.jsonl:1: no timing: op is 1"):
        timings.read(path)
    path.write_text("# Timings\n")
    with pytest.raises(HdispatchError, match=r"t\.jsonl:1: no timing: it begins with '# Timings'"):
        timings.read(path)
    with pytest.raises(HdispatchError, match="cannot read the timings"):
        timings.read(tmp_path / "absent")
    with pytest.raises(HdispatchError, match="cannot write"):
        timings.append(tmp_path / "absent" / "t.jsonl", [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"us": float("nan")}, "us is nan; floats are finite"),
        ({"us": float("inf")}, "us is inf; floats are finite"),
        ({"us": 0}, "us is 0; it takes more than 0"),
        ({"us": -1.5}, "us is -1.5; it takes more than 0"),
        ({"q1": -0.0}, "q1 is -0.0; it takes more than 0"),
        ({"stream_us": -3.0}, "stream_us is -3.0"),
        ({"warm_us": 0.0}, "warm_us is 0.0"),
        ({"rounds": -1}, "rounds is -1; it takes 0 or more"),
        ({"compile_seconds": -1.0}, "compile_seconds is -1.0"),
        ({"status": "wrong"}, "its status is 'wrong', and it has a time"),
        ({"bucket": 99}, "bucket is 99; toy_select has 4 of them"),
        ({"bucket": -1}, "bucket is -1; it takes 0 or more"),
        ({"bucket": 10**30}, "bucket is 1000000000000000000000000000000; integers fit 64 bits"),
        ({"M": 3}, "M is 3; bucket 1 of toy_select is measured at its edge, 2"),
        ({"M": 0}, "M is 0; it takes more than 0"),
        ({"variant": "float99"}, r"variant is 'float99'; toy_select has \['float32', 'float16'\]"),
        ({"backend": "cuda"}, r"backend is 'cuda'; toy_select has \['triton'\]"),
        ({"op": "nonsense"}, "it is of 'nonsense', which is no op here"),
        ({"N": 7}, "N is 7; toy_select has the sizes M, K, and 0 stands for one that it has not"),
        ({"K": 0}, "K is 0; toy_select has the sizes"),
        ({"K": -64}, "K is -64; it takes 0 or more"),
        ({"generic": ["N"]}, "generic names 'N'"),
    ],
)
def test_a_line_that_cannot_be_right_is_named(tmp_path, changes, message):
    path = tmp_path / "t.jsonl"
    bad: Any = {**line(64, 1, "a", 2.0), **changes}
    timings.append(path, [line(64, 0, "a", 1.0), bad, line(64, 2, "a", 3.0)])
    refused = select.refusal({"toy_select": toy_package(tmp_path)})
    with pytest.raises(HdispatchError, match=rf"t\.jsonl:2: no timing.*: {message}"):
        timings.read_all([path], refused)
    with pytest.raises(BuildError):  # what is handed over without a file is looked at too
        run([bad], tmp_path)


def test_a_row_that_the_op_has_not_is_named(tmp_path):
    closed = replace(SPEC, shapes=({"K": 64},))
    path = tmp_path / "t.jsonl"
    timings.append(path, [line(65, 0, "a", 1.0)])
    with pytest.raises(HdispatchError, match=r"t\.jsonl:1: .*K is 65 and N is 0; toy_select has rows for \[\{'K': 64\}\]"):
        timings.read(path, select.refusal({"toy_select": toy_package(tmp_path, closed)}))


def test_a_line_with_a_name_twice_or_nested_without_end_is_named(tmp_path):
    path = tmp_path / "t.jsonl"
    good = json.dumps(line(64, 0, "a", 1.0))
    path.write_text(f'{good}\n{good[:-1]}, "us": 2.0}}\n')
    with pytest.raises(HdispatchError, match=r"t\.jsonl:2: no timing: repeats the name 'us'"):
        timings.read(path)
    path.write_text('{"op": ' + "[" * 100_000 + "\n")
    with pytest.raises(HdispatchError, match=r"t\.jsonl:1: no timing: is nested deeper"):
        timings.read(path)

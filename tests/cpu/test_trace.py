"""Host functions on fake tensors: what becomes a launch, for which Ms, with which hints, and what is refused by name."""

from __future__ import annotations

import pytest
from in_worker import InWorker


@pytest.fixture(scope="module")
def worker():
    process = InWorker()
    yield process
    process.close()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def test_a_launch_is_expressions_in_the_calls_sizes(worker):
    assert worker.call("host_functions:launched", "good") == {
        "kernel": "copy",
        "grid": [["M", 132, "min"], [2], [1]],
        "args": {
            "result": ["pointer", "result", [0]],
            "input": ["pointer", "input", [64 * 4]],
            "eps": ["real", "eps"],
            "m": ["number", ["M"]],
            "stride": ["number", ["input.stride(0)"]],
            "other": ["number", [1]],
            "K": ["number", [64]],
        },
        "options": {"num_warps": 1},
    }


def test_helpers_from_beside_the_op_stay_symbolic(worker):
    assert worker.call("host_functions:launched", "helped")["grid"] == [["M", 132, "min", 3, "max"], [1], [1]]
    assert worker.call("host_functions:decided", "helped") == []
    assert worker.call("host_functions:decided", "helped_descriptor") == []


def test_a_known_call_has_a_known_launch(worker):
    assert worker.call("host_functions:concrete", "good", 1000, 48) == {
        "grid": [132, 2, 1],
        "numbers": {"m": 1000, "stride": 128 + 48, "other": 1, "K": 64},
    }


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("no_launch", r"launches 0 kernels"),
        ("two_launches", r"launches 2 kernels \['copy', 'copy'\]; a record holds exactly one"),
        ("descriptor_of_columns", r"input is a TMA descriptor whose last stride is \S+; it takes 1: transpose"),
        ("descriptor_of_ranks", "input is a TMA descriptor of 1 sizes, 2 strides and 2 block sizes; it takes 1 to 5"),
        ("descriptor_in_rows", r"input is a TMA descriptor with the block \[\S+, 64\], which is not known"),
        ("zeros", r"allocates \(aten.zeros"),
        ("clone", "runs aten.clone"),
        ("item", "runs aten._local_scalar_dense"),
        ("empty", r"allocates \(aten.empty.*; an op that returns what it allocates"),
        ("float_arithmetic", "other is computed on the host"),
        ("tuple", "other is a tuple"),
        ("grid_of_four", r"grid is \(1, 1, 1, 1\); it takes a tuple of 1 to 3 integers"),
        ("callable_grid", "grid is a function"),
        ("float_grid", "grid dimension 0 is 1.5"),
        ("state", "_persistent_state_specs: state kept between launches"),
        ("not_a_kernel", "takes a plain @triton.jit function"),
    ],
)
def test_refused_by_name(worker, host, message):
    with pytest.raises(RuntimeError, match=f"BuildError: .*{message}"):
        worker.call("host_functions:launched", host)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("good", [1, (2**31 - 1) // 128]),  # 32-bit offsets into input, which has 128 columns
        ("branching", [1, 128]),
        ("wide", [1, 2047]),  # an argument of M * 2**20 has to fit 32 bits
        ("tall", [1, 65535]),  # the second dimension of a grid
    ],
)
def test_the_interval_of_m(worker, host, expected):
    assert worker.call("host_functions:interval", host) == expected


def test_the_interval_with_wide_offsets(worker):
    assert worker.call("host_functions:interval", "good", 64, 64) == [1, 2**31 - 1]
    assert worker.call("host_functions:guards", "good", 64) == ["input.stride(0) % 16 == 0"]


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("odd", r"not for 2: the host function assumes M % 3 == 1"),
        ("at_seven", r"not for 7: the host function assumes M \* 64 != 448"),
        ("at_100000", r"not for 100000: the host function assumes M \* 64 != 6400000"),
        ("on_float", "branches on a float argument"),
        ("true_division", "TruncToInt in the host expression"),
    ],
)
def test_what_is_no_interval_is_refused(worker, host, message):
    with pytest.raises(RuntimeError, match=message):
        worker.call("host_functions:interval", host)


def test_facts_about_row_strides_become_guards(worker):
    assert worker.call("host_functions:guards", "good") == ["input.stride(0) % 16 == 0", "M * input.stride(0) <= 2147483647"]
    with pytest.raises(
        RuntimeError, match=r"not valid for every row stride: the host function assumes input.stride\(0\) > 140"
    ):
        worker.call("host_functions:guards", "on_stride")


def test_a_fact_that_the_host_function_checks_too_is_one_guard(worker):
    assert worker.call("host_functions:guards", "checked") == worker.call("host_functions:guards", "good")


@pytest.mark.parametrize(("multiple", "proved"), [(1, []), (16, ["stride(0)", "stride(1)"])])
def test_strides_of_any_layout_are_multiples_where_the_op_says_so(worker, multiple, proved):
    found = worker.call("host_functions:any_layout", multiple)
    assert found == {"proved": proved, "guarded": [f"input.{stride}" for stride in proved]}


@pytest.mark.parametrize(
    ("host", "one", "mult16", "other"),
    [  # [always 1, always a multiple of 16]
        ("sixteenfold", [False, True], [False, True], [False, True]),
        ("twofold", [False, False], [False, True], [False, False]),  # 2 * 8 is a multiple of 16, 2 * 7 is not
        ("blocks", [True, False], [False, False], [False, False]),  # ceil(M / 16) is 1 for some Ms only
        ("always_one", [True, False], [True, False], [True, False]),
        ("large", [False, True], [False, True], [False, True]),
    ],
)
def test_only_what_is_proved_for_a_whole_class_is_compiled_in(worker, host, one, mult16, other):
    for m_class, expected in (("one", one), ("mult16", mult16), ("other", other)):
        hints = worker.call("host_functions:hints", host, m_class)
        assert hints["other"] == expected, m_class
        assert hints["m"] == {"one": [True, False], "mult16": [False, True], "other": [False, False]}[m_class]
        assert hints["stride"] == [False, True]
        assert hints["result"] == [False, True]


@pytest.mark.parametrize(
    ("host", "kind"), [("twofold", "i32"), ("large", "i64"), ("flag", "i1"), ("half", "f32"), ("sixteenfold", "i32")]
)
def test_types_are_those_that_the_code_takes(worker, cache, host, kind):
    kinds = worker.call("host_functions:code", host, "other", cache)["kinds"]
    assert kinds == {"result": "ptr", "input": "ptr", "eps": "f32", "m": "i32", "stride": "i32", "other": kind}


def test_what_is_one_is_folded(worker, cache):
    assert "m" not in worker.call("host_functions:code", "twofold", "one", cache)["kinds"]
    assert "other" not in worker.call("host_functions:code", "always_one", "other", cache)["kinds"]


def test_launch_attributes(worker, cache):
    assert worker.call("host_functions:code", "pdl", "other", cache)["pdl"] is True
    assert worker.call("host_functions:code", "good", "other", cache)["pdl"] is False
    assert worker.call("host_functions:code", "cluster", "other", cache)["cluster"] == [2, 1, 1]


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("scratch", r"needs 128 \+ 0 bytes of scratch .* choose a config with pointer indexing"),
        ("pdl_without_wait", r"never waits for its predecessor; begin it with hl.pdl_wait\(\)"),
        ("constexpr", "constexpr K is .*, which differs from call to call"),
    ],
)
def test_code_that_a_record_cannot_launch_is_refused(worker, cache, host, message):
    with pytest.raises(RuntimeError, match=message):
        worker.call("host_functions:code", host, "other", cache)


def test_a_whole_record(worker, cache):
    record = worker.call("host_functions:record", "blocks", cache)
    assert record["grid"] == [["M"], [1], [1]]
    assert record["params"] == [
        {"kind": "ptr", "arg": "result", "align": 16},
        {"kind": "ptr", "arg": "input", "align": 16},
        {"kind": "f32", "arg": "eps"},
        {"kind": "i32", "value": ["M"]},
        {"kind": "i32", "value": ["input.stride(0)"]},
        {"kind": "i32", "value": ["M", 15, "+", 16, "//"]},
    ]
    assert {m_class: cubin["params"] for m_class, cubin in record["cubins"].items()} == {
        "one": [0, 1, 2, 4],
        "mult16": [0, 1, 2, 3, 4, 5],
        "other": [0, 1, 2, 3, 4, 5],
    }
    files = {m_class: cubin["file"] for m_class, cubin in record["cubins"].items()}
    assert files["one"] != files["other"]
    assert files["mult16"] == files["other"]  # here nothing can be made of M being a multiple of 16: equal code is one file


POINTER = ".param .u64 .ptr .global .align 1"
ENTRY = f".visible .entry toy(\n{POINTER} toy_0,\n.param .u32 toy_1,\n.param .f32 toy_2,\n%s)\n.reqntid %d\n{{"
SCRATCH = f"{POINTER} toy_3,\n{POINTER} toy_4\n"
KINDS = {"x": "ptr", "m": "i32", "eps": "f32"}


@pytest.mark.parametrize(
    ("ptx", "message"),
    [
        (ENTRY % (SCRATCH, 128), None),
        (ENTRY % (SCRATCH.splitlines()[1], 128), "parameters of .* bits; expected"),
        (ENTRY % (SCRATCH, 128) + ENTRY.replace("toy(", "two(") % (SCRATCH, 128), r"has entries \['toy', 'two'\]"),
        ((ENTRY % (SCRATCH, 128)).replace(".u32", ".f32"), "another calling convention"),
        (
            (ENTRY % (SCRATCH, 128)).replace(".u32", ".align 64 .b8").replace("toy_1", "toy_1[128]"),
            "another calling convention",
        ),
        (ENTRY % (SCRATCH, 64), "asks for 64 threads per block; expected 128"),
        ("", r"has entries \[\]"),
    ],
)
def test_the_ptx_entry_is_held_against_the_record(worker, ptx, message):
    if message is None:
        worker.call("host_functions:check_ptx", "toy", ptx, KINDS, 4)
        return
    with pytest.raises(RuntimeError, match=message):
        worker.call("host_functions:check_ptx", "toy", ptx, KINDS, 4)

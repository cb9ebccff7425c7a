"""Helion kernels: for which Ms and row strides their code is valid, by Helion's own word, and which are refused."""

from __future__ import annotations

import pytest
from in_worker import InWorker

TILES = {"block_sizes": [4, 64], "num_warps": 1}


@pytest.fixture(scope="module")
def worker():
    process = InWorker()
    yield process
    process.close()


@pytest.fixture(scope="module")
def build(worker, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    return lambda kernel, config, buckets=(0, 1, 2): worker.call("helion_kernels:build", kernel, config, buckets, cache)


def test_narrow_offsets_bound_m_and_the_row_stride(build):
    (built,) = build("double", TILES)
    assert built["buckets"] == [0, 1, 2]
    assert built["seconds"] > 0
    record = built["record"]
    assert (record["m_min"], record["m_max"]) == (1, (2**31 - 1) // 64)
    assert record["grid"] == [["M", 3, "+", 4, "//"], [1], [1]]
    assert [guard["text"] for guard in record["guards"]] == ["input.stride(0) % 16 == 0", "M * input.stride(0) <= 2147483647"]
    assert sorted(record["cubins"]) == ["mult16", "one", "other"]


def test_only_the_classes_of_the_buckets_are_compiled(build):
    for buckets, classes in (([1], ["mult16", "other"]), ([2], ["mult16", "other"]), ([0], ["one"])):
        (built,) = build("double", TILES, buckets)
        assert sorted(built["record"]["cubins"]) == classes


def test_one_row_alone_is_built_for_one_row(build):
    (built,) = build("double", TILES, [0])
    assert (built["record"]["m_min"], built["record"]["m_max"]) == (1, 1)


def test_persistent_kernels_have_a_grid_of_the_targets_sms(build):
    (built,) = build("double", {**TILES, "pid_type": "persistent_blocked"})
    assert built["record"]["grid"] == [[132], [1], [1]]


def test_a_flag_that_every_variant_accepts_is_no_parameter(build):
    (built,) = build("ignoring", {"block_sizes": [4]})
    assert not [param for param in built["record"]["params"] if "flag" in str(param)]


@pytest.mark.parametrize(
    ("kernel", "config", "message"),
    [
        (
            "double",
            {**TILES, "indexing": "tensor_descriptor"},
            "holds M from 2 to 16, but .* valid for 16 to 31 only",
        ),
        (
            "double",
            {**TILES, "indexing": "tensor_descriptor", "host_tensor_descriptors": True},
            "holds M from 2 to 16, but .* valid for 16 to 31 only",
        ),
        ("specialized", {"block_sizes": [4]}, "valid for 16 to 16 only: helion would generate other code for M = 15"),
        ("on_row_stride", {"block_sizes": [4]}, "not valid for every row stride: helion would generate other code"),
        ("allocating", {"block_sizes": [4]}, r"allocates \(aten.empty_like.default\); an op that returns what it allocates"),
        ("static", {"block_sizes": [4]}, "static_shapes is True.* it takes @helion.kernel"),
        ("looking", {"block_sizes": [4]}, "looks at flag, a flag without values; list them in the op's spec"),
        ("double", {"block_sizes": [4]}, "Not enough values for config"),
    ],
)
def test_refused(build, kernel, config, message):
    with pytest.raises(RuntimeError, match=message):
        build(kernel, config)

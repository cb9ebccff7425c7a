"""Memory is in proportion to what serves now, however often bundles and functions came and went."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hdispatch
import pytest
import toy
from hdispatch import Key

MIB = 1 << 20


@pytest.fixture(scope="module")
def function() -> Any:
    cpp = pytest.importorskip("tvm_ffi.cpp", reason="needs apache-tvm-ffi: pip install 'hdispatch[ffi]'")
    return cpp.load_inline("hdispatch_test_memory", cpp_sources="void nothing() {}", functions=["nothing"]).nothing


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of 9,000 rows."""
    content = toy.manifest(sizes=tuple(range(64, 64 + 900)))
    assert len(content["rows"]) == 9000
    return toy.write(tmp_path_factory.mktemp("memory"), content)


@pytest.fixture(autouse=True)
def nothing_serves() -> Iterator[None]:
    yield
    for each in hdispatch.registered():
        each.unregister()
    for bundle in hdispatch.loaded():
        bundle.unload()


def resident() -> int:
    """Bytes of memory that the process has."""
    gc.collect()
    fields = Path("/proc/self/status").read_text().split("VmRSS:")[1].split()
    return int(fields[0]) * 1024


def register(function: Any, k: int = 0) -> hdispatch.Registration:
    return hdispatch.register("toy", Key("bfloat16", K=k), function, args=[], stream="none", driver="null")


def test_pairs_of_register_and_unregister(function):
    register(function).unregister()
    before = resident()
    for _ in range(10_000):
        register(function).unregister()
    assert resident() - before <= 20 * MIB


def test_registrations_beside_a_large_bundle(function, folder):
    hdispatch.load(folder, driver="null")
    for _ in range(3):
        register(function).unregister()
    before = resident()
    for _ in range(100):
        register(function).unregister()
    assert resident() - before <= 10 * MIB


def test_registrations_that_stay(function, folder):
    hdispatch.load(folder, driver="null")
    register(function, 5000)
    before = resident()
    for k in range(5001, 5101):
        register(function, k)
    assert resident() - before <= 20 * MIB
    assert all(hdispatch.ops.toy.pick(4, k) is not None for k in (64, 5000, 5050, 5100))


def test_loads_and_unloads_of_one_bundle(folder):
    for _ in range(3):
        hdispatch.load(folder, driver="null").unload()
    before = resident()
    for _ in range(100):
        hdispatch.load(folder, driver="null").unload()
    assert resident() - before <= 50 * MIB


def test_a_table_outlives_its_bundle_object_while_it_serves(folder):
    hdispatch.load(folder, driver="null")
    gc.collect()
    hdispatch.stats(reset=True)
    hdispatch.ops.toy(*toy.arguments(4, 64))
    assert hdispatch.stats()["toy"]["hits"] == 1


def test_a_bundle_serves_again_after_others(folder, function):
    first = hdispatch.load(folder, driver="null")
    registration = register(function, 7)
    hdispatch.load(toy.write(folder.parent / "other"), driver="null")
    assert hdispatch.ops.toy.pick(4, 900) is None
    first.publish()
    registration.unregister()
    gc.collect()
    assert hdispatch.ops.toy.pick(4, 900) is not None
    assert hdispatch.ops.toy.pick(4, 7) is None

"""Fixtures that tests without a GPU share: a bundle that the null driver serves, and the doors of the toy op."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hdispatch
import pytest
import torch
import toy
from doors import DOORS, Door
from hdispatch import Key
from sequence_op import GATED, OP, PLAIN, SOURCE
from vllm_layers import simulated_ops


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy op's bundle, or what the module's `WRITE` writes; a module may also have a fixture of its own."""
    write: Callable[[Path], Path] = getattr(request.module, "WRITE", toy.write)
    return write(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def bundle(folder: Path) -> Iterator[hdispatch.Bundle]:
    """The bundle in `folder`, loaded with the null driver, with counts of zero. Nothing serves afterwards."""
    loaded = hdispatch.load(folder, driver="null")
    hdispatch.stats(reset=True)
    yield loaded
    hdispatch.set_strict(False)
    for registration in hdispatch.registered():
        registration.unregister()
    for each in hdispatch.loaded():
        each.unload()


@pytest.fixture(params=DOORS)
def door(request: pytest.FixtureRequest) -> Door:
    """Every door of the toy op in turn."""
    return DOORS[request.param]


# ---- sequences ----


@pytest.fixture(scope="module")
def sequence_functions() -> Any:
    """Functions compiled here: `scale` for the op of sequences, `nap` and `raise_it`."""
    cpp = pytest.importorskip("tvm_ffi.cpp", reason="needs apache-tvm-ffi: pip install 'hdispatch[ffi]'")
    return cpp.load_inline("hdispatch_test_sequence", cpp_sources=SOURCE, functions=["scale", "nap", "raise_it"])


@pytest.fixture
def nothing_serves() -> Iterator[None]:
    """No bundle and no registered row, and counts of zero."""

    def clear() -> None:
        for each in hdispatch.registered():
            each.unregister()
        for bundle in hdispatch.loaded():
            bundle.unload()
        hdispatch.stats(reset=True)

    clear()
    yield
    clear()


@pytest.fixture
def served(sequence_functions: Any) -> list[hdispatch.Registration]:
    """Every call of the op is served by the function."""
    return [hdispatch.register(OP, Key(variant), sequence_functions.scale, driver="null") for variant in (PLAIN, GATED)]


# ---- bundles that are written and refused ----


@pytest.fixture
def nothing_loaded() -> Iterator[None]:
    """Other tests' bundles are none of ours."""
    for each in hdispatch.loaded():
        each.unload()
    yield
    for each in hdispatch.loaded():
        each.unload()


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """The toy op's bundle, in a folder that the test may change."""
    return toy.write(tmp_path / "bundle")


@pytest.fixture
def good(tmp_path: Path) -> hdispatch.Bundle:
    """A bundle that is loaded and serves while others are refused."""
    return hdispatch.load(toy.write(tmp_path / "good"), driver="null")


# ---- the plug-in ----


@pytest.fixture
def flash_attention():
    """FlashAttention 3's op and vLLM's cache write, as the simulated engine has them."""
    library = torch.library._scoped_library
    with library("_C_cache_ops", "FRAGMENT") as cache, library("_vllm_fa3_C", "FRAGMENT") as fa3:
        simulated_ops().define_cache_and_attention(cache, fa3)
        yield

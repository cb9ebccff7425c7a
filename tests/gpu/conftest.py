"""GPU tests: skipped, saying so, where there is no CUDA device. The bundle is $HDISPATCH_BUNDLE, or is built for this GPU."""

from __future__ import annotations

import os
import re
from pathlib import Path

import hdispatch
import pytest
import torch


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skips a test of a variant and size of which the loaded bundle has no row at all: bundles hold the usual ones."""
    try:
        return (yield)
    except hdispatch.MissError as error:
        loaded = getattr(item, "funcargs", {}).get("bundle")
        if loaded is None or (reason := absent_rows(str(error), loaded.manifest["rows"])) is None:
            raise
        pytest.skip(reason)


def absent_rows(miss, rows):
    """Why `rows` of a manifest hold nothing of a MissError's `op(variant, M=1, K=128, N=64, …`. None if they do."""
    found = re.match(r"(\w+)\(([^,]+), M=\d+, K=(\d+)(?:, N=(\d+))?", miss)
    if found is None:
        return None
    op, variant, k, n = found[1], found[2], int(found[3]), int(found[4] or 0)
    same = (row for row in rows if row["op"] == op and row["variant"] == variant)
    if any(row["K"] in (0, k) and (not n or row["N"] in (0, n)) for row in same):
        return None
    return f"the bundle has no row of {op}({variant}) with K={k}" + (f", N={n}" if n else "")


@pytest.fixture(scope="session")
def bundle_dir(tmp_path_factory) -> Path:
    given = os.environ.get("HDISPATCH_BUNDLE")
    if given:
        return Path(given)
    from hdispatch.compile import build

    folder = tmp_path_factory.mktemp("bundle") / "native"
    build(None, "native", folder)
    return folder


@pytest.fixture
def bundle(bundle_dir):
    """The bundle on the current device; counters start at zero."""
    loaded = hdispatch.load(bundle_dir)
    hdispatch.stats(reset=True)
    yield loaded
    loaded.unload()

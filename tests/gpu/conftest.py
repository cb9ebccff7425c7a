"""GPU tests: skipped, saying so, where there is no CUDA device. The bundle is $HDISPATCH_BUNDLE, or is built for this GPU."""

from __future__ import annotations

import os
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


@pytest.fixture(scope="session")
def bundle_dir(tmp_path_factory) -> Path:
    given = os.environ.get("HDISPATCH_BUNDLE")
    if given:
        return Path(given)
    from hdispatch.build import build

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

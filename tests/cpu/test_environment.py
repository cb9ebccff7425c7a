"""Tests leave the environment of the process as they found it (tests/conftest.py)."""

from __future__ import annotations

import os

import pytest

NAMES = ("HDISPATCH_OF_A_TEST", "TRITON_CACHE_DIR", "HOME")


@pytest.fixture(scope="module")
def found() -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in NAMES}


@pytest.mark.parametrize("turn", [0, 1])
def test_what_a_test_writes_is_undone(found, turn):
    assert {name: os.environ.get(name) for name in NAMES} == found
    os.environ["HDISPATCH_OF_A_TEST"] = os.environ["TRITON_CACHE_DIR"] = "mine"
    os.environ.pop("HOME", None)

"""Bundles of the toy op that are changed, and what is said of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import hdispatch
import toy
from hdispatch.manifest import ARTIFACTS, CHECKSUM_NAME, MANIFEST_NAME

ONE = f"{ARTIFACTS}/one.cubin"
ALL_FILES = [MANIFEST_NAME, CHECKSUM_NAME, *toy.files()]


def serves(k: int = 64) -> bool:
    """Whether a call is a hit now."""
    before = hdispatch.stats()["toy"]["hits"]
    toy.OP(*toy.arguments(4, k))
    return hdispatch.stats()["toy"]["hits"] == before + 1


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    manifest = copy.deepcopy(toy.manifest())
    change(manifest)
    return manifest


def refusal(action: Callable[[], object]) -> str | None:
    """What the HdispatchError says that the action raises; any other exception goes on."""
    try:
        action()
    except hdispatch.HdispatchError as error:
        return str(error)
    return None

"""Manifests whose values are replaced, removed, repeated and swapped: refused, or served as they say."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hdispatch
import pytest
import toy
from toy_bundles import refusal, serves

pytestmark = pytest.mark.usefixtures("nothing_loaded")


WRONG = (
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    2**70,
    -(2**63),
    1.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "M",
    [],
    [None],
    [[1]],
    {},
    {"x": 1},
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every value in a JSON document."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def put(document: Any, path: tuple[Any, ...], value: object) -> None:
    for key in path[:-1]:
        document = document[key]
    document[path[-1]] = value


def attempt(folder: Path, manifest: dict[str, Any], good: hdispatch.Bundle) -> bool:
    """Load a changed bundle: it is either refused, and changes nothing, or serves calls. Returns which."""
    toy.write(folder, manifest)
    message = refusal(lambda: hdispatch.load(folder, driver="null"))
    if message is not None:
        assert str(folder) in message  # the file is named
        assert hdispatch.loaded() == [good]
        return False
    for m, k in ((1, 64), (4, 64), (16, 512), (100, 512)):
        toy.OP(*toy.arguments(m, k))
        toy.OP(*toy.arguments(m, k, "bfloat16+scale_ub+residual"))
    hdispatch.load(good.folder, driver="null")
    return True


def test_every_value_replaced(good, tmp_path):
    small = toy.manifest(sizes=(64,), variants=("bfloat16",))
    small["rows"] = small["rows"][:2]
    good = hdispatch.load(good.folder, driver="null")
    refused = loaded = 0
    for path in list(places(small)):
        for value in WRONG:
            manifest = copy.deepcopy(small)
            put(manifest, path, value)
            if attempt(tmp_path / "bad", manifest, good):
                loaded += 1
                good = hdispatch.loaded()[0]
            else:
                refused += 1
    assert refused > 1000
    assert loaded > 10  # the tools' versions, another K, …
    assert serves()


def test_every_field_removed_or_repeated(good, tmp_path):
    small = toy.manifest(sizes=(64,), variants=("bfloat16",))
    for path in list(places(small)):
        manifest = copy.deepcopy(small)
        parent = manifest
        for key in path[:-1]:
            parent = parent[key]
        if isinstance(parent, list):
            parent.append(parent[path[-1]])
        else:
            del parent[path[-1]]
        attempt(tmp_path / "bad", manifest, good)
        good = hdispatch.loaded()[0]
    assert serves()


def test_values_swapped_at_random(good, tmp_path):
    chooser = random.Random(2)
    original = toy.manifest(sizes=(64,), variants=("bfloat16",))
    everywhere = list(places(original))
    for _ in range(300):
        manifest = copy.deepcopy(original)
        for _ in range(chooser.randint(1, 4)):
            a, b = chooser.sample(everywhere, 2)
            value = original
            for key in b:
                value = value[key]
            try:
                put(manifest, a, copy.deepcopy(value))
            except (KeyError, IndexError, TypeError):
                continue  # an earlier change took the place away
        attempt(tmp_path / "bad", manifest, good)
        good = hdispatch.loaded()[0]
    assert serves()

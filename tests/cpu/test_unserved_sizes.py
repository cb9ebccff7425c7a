"""Sizes that a kernel cannot serve: the build refuses rows that no call with contiguous tensors would get."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from hdispatch.compile import record_builder
from hdispatch.compile.build_unit import Unit
from hdispatch.compile.store import Store
from hdispatch.compile.target import DESCRIBED
from hdispatch.errors import BuildError

BUCKET, M = 10, 512


def candidates(op: str, shape: dict[str, int]) -> list[Unit]:
    """A unit of each Triton candidate of the op's first variant."""
    package = f"hdispatch.kernels.{op}"
    spec = importlib.import_module(f"{package}.spec").SPEC
    variant = spec.variants()[0]
    configs: list[dict[str, Any]] = importlib.import_module(f"{package}.triton").candidates({"M": M, **shape}, variant)
    row = tuple(shape.items())
    return [Unit(package, "triton", variant.name, shape, config, (BUCKET,), ((row, BUCKET),)) for config in configs]


@pytest.mark.parametrize(
    ("op", "shape", "words"),
    [
        ("scaled_mm", {"K": 2049, "N": 512}, "K=2049, N=512"),
        ("scaled_mm", {"K": 2048, "N": 513}, "K=2048, N=513"),
        ("scaled_mm_blockwise", {"K": 2049, "N": 512}, "K=2049, N=512"),
    ],
)
def test_rows_of_tma_with_odd_sizes_are_refused(op, shape, words, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(record_builder.triton_backend, "compile_class", lambda *_args, **_options: compiled.append(1))
    units = [unit for unit in candidates(op, shape) if "tma" in str(unit.config)]
    assert units
    for unit in units:
        with pytest.raises(
            BuildError, match=f"^{words}: no call with contiguous tensors is served: .* or leave them to the op's fallback$"
        ):
            record_builder.build_records(unit, DESCRIBED["h200"], {}, Store(tmp_path))
    assert not compiled, "refused before anything is compiled"


@pytest.mark.parametrize("shape", [{"K": 2048, "N": 512}, {"K": 2064, "N": 528}])
def test_sizes_of_whole_16_bytes_are_not(shape, tmp_path, monkeypatch):
    class Compiled(Exception):
        """The build goes on to compile."""

    def compile_class(*_args: Any, **_options: Any) -> None:
        raise Compiled

    monkeypatch.setattr(record_builder.triton_backend, "compile_class", compile_class)
    for unit in candidates("scaled_mm", shape):
        with pytest.raises(Compiled):
            record_builder.build_records(unit, DESCRIBED["h200"], {}, Store(tmp_path))

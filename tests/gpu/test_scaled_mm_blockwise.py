"""scaled_mm_blockwise's candidates, where K is no whole number of what their groups take in a turn, and one scale is infinite.

The candidates of a bundle of `hdispatch tune candidates --ops scaled_mm_blockwise`, $HDISPATCH_CANDIDATES, are called one by
one; so compute-sanitizer can be run on kernels that no row has. Those of CuteDSL are for one K, if they are not of the bundle's
`--shapes any`; they are also called with M around their tiles' edges and N that are no tile's:

    HDISPATCH_CANDIDATES=DIR compute-sanitizer --tool racecheck python -m pytest tests/gpu/test_scaled_mm_blockwise.py
"""

from __future__ import annotations

import os

import hdispatch
import pytest
import torch
from hdispatch.manifest import artifacts_of, ladders_of
from hdispatch.testing.numeric import compare_outputs
from hdispatch.tune.candidates import read_candidates
from hdispatch.tune.device import OneRow, open_device

from .test_ops import copy, make, spec_of
from .test_scaled_mm import call_thrice, framed

OP = "scaled_mm_blockwise"
GIVEN = os.environ.get("HDISPATCH_CANDIDATES")
BUNDLE = read_candidates(GIVEN) if GIVEN else None


def takes_any_k(index: int) -> bool:
    """Whether K is not compiled into a record: then it has a guard of K."""
    return any("K" in guard["expr"] for guard in BUNDLE["manifest"]["records"][index]["guards"])


CELLS = [
    (cell, index, BUNDLE["manifest"]["records"][index]["backend"] == "cutedsl")
    for cell in (BUNDLE["candidates"]["cells"] if BUNDLE else ())
    for index in cell["records"]
    if cell["op"] == OP
]
#: Of each bucket's candidates, the bucket being the widest choice of M.
CANDIDATES = [
    pytest.param(cell, index, k, id=f"{cell['bucket']}-{index}-K{k}")
    for cell, index, dsl in CELLS
    for k in (128, 144, 384, 640, 1152)
    if not dsl and (cell["K"], cell["N"]) == (4096, 6144)
]
#: Around the edges of the tiles that CuteDSL's candidates have, and of their pieces.
EDGES = (1, 7, 8, 9, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257, 1000)
DSL_CANDIDATES = [
    pytest.param(cell, index, k, n, id=f"{cell['bucket']}-{index}-K{k}-N{n}")
    for cell, index, dsl in CELLS
    if dsl
    for k in ((128, 192, 1152, 4096) if takes_any_k(index) else (cell["K"],))
    for n in (64, 200, 6144)
]


def check(m: int, k: int, n: int, variant: str, scales: str = "columns", special: bool = True) -> None:
    """Against the reference; nothing else is written; the same bits again.

    scales   how they lie: by "columns", as vLLM makes them, by "rows", or neither, in more memory: "sliced"
    special  whether one row's last scale is infinite, one row NaN, and, of five rows or more, one's scales are 0 and one 0
    """
    spec = spec_of(OP)
    args, whole = framed(make(OP, variant, {"K": k, "N": n}, m, seed=m))
    args[3:] = [laid(each, scales) for each in args[3:]]
    if special:
        args[3][m - 1, -1] = float("inf")
        args[1].view(torch.uint8)[0] = 0x7F
    if special and m > 4:
        args[3][1] = 0
        args[1].view(torch.uint8)[2] = 0
    wanted = copy(args)
    spec.reference(*wanted)
    call_thrice(OP, args, whole)
    found = args[0].clone()
    if special:
        # An infinite scale of a sum that may be 0 in the tensor core is NaN where the reference's sum is not 0.
        found[m - 1] = torch.where(may_vanish(args[1][m - 1], args[2]), wanted[0][m - 1], found[m - 1])
    assert torch.equal(found.isnan(), wanted[0].isnan())
    assert torch.equal(found.isinf(), wanted[0].isinf())
    kept = range(1, m - 1) if special else range(m)
    compare_outputs(spec, spec.variant(variant), [args[0][kept], *args[1:]], [wanted[0][kept], *wanted[1:]])


def may_vanish(row: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Columns of b whose sum over row's last group is no larger than what the tensor core may drop of it.

    It adds 32 products and the sum so far with 13 bits after the binary point of the largest of the 33 (scaled_mm/spec.py).
    """
    start = (row.numel() - 1) // 128 * 128
    products = row[start:].double()[:, None] * b[start:].double()
    sums = products.cumsum(0)
    largest = torch.maximum(products.abs().amax(0), sums.abs().amax(0))
    return sums[-1].abs() <= -(-products.size(0) // 32) * 33 * 2.0**-13 * largest


def laid(scales: torch.Tensor, how: str) -> torch.Tensor:
    """The same scales, lying as `check` says."""
    if how == "columns":
        return scales
    if how == "rows":
        return scales.contiguous()
    whole = torch.full((2 * scales.size(0), 3 * scales.size(1)), float("nan"), device=scales.device)
    return whole[::2, ::3].copy_(scales)


def publish(cell, index, k: int, n: int):
    """One candidate as the row of its bucket; the bucket's first and last M."""
    manifest = BUNDLE["manifest"]
    record, ladders = manifest["records"][index], ladders_of(manifest["ops"][OP])
    files = {name: BUNDLE["contents"][name] for name in artifacts_of(record)}
    device = open_device(GIVEN, manifest, 0)
    device.publish(OneRow(hdispatch.registry.get(OP), ladders, cell["variant"], k, n, cell["bucket"], record, files))
    first, last = ladders.bounds(cell["bucket"])
    return first, last or ladders.m[-1]


@pytest.mark.skipif(BUNDLE is None, reason="HDISPATCH_CANDIDATES is not set")
@pytest.mark.parametrize(("cell", "index", "k"), CANDIDATES)
def test_candidates(cell, index, k):
    n = 6144
    first, last = publish(cell, index, k, n)
    for m in sorted({first, first + 1, last - 1, last}):
        check(m, k, n, cell["variant"])


@pytest.mark.skipif(BUNDLE is None, reason="HDISPATCH_CANDIDATES is not set")
@pytest.mark.parametrize(("cell", "index", "k", "n"), DSL_CANDIDATES)
def test_candidates_of_cutedsl(cell, index, k, n):
    first, last = publish(cell, index, k, n)
    edges = {m for m in EDGES if first <= m <= last} | {first, last}
    for m in sorted(edges):
        check(m, k, n, cell["variant"])
    for scales in ("columns", "rows", "sliced"):
        check(last, k, n, cell["variant"], scales, special=False)

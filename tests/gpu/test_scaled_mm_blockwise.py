"""scaled_mm_blockwise's candidates, where K is no whole number of what their groups take in a turn, and one scale is infinite.

The candidates of a bundle of `hdispatch tune candidates --ops scaled_mm_blockwise`, $HDISPATCH_CANDIDATES, are called one by
one; so compute-sanitizer can be run on kernels that no row has:

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
#: Of each bucket's candidates, the bucket being the widest choice of M.
CANDIDATES = [
    pytest.param(cell, index, k, id=f"{cell['bucket']}-{index}-K{k}")
    for cell in (BUNDLE["candidates"]["cells"] if BUNDLE else ())
    for index in cell["records"]
    for k in (128, 144, 384, 640, 1152)
    if cell["op"] == OP and (cell["K"], cell["N"]) == (4096, 6144)
]


def check(m: int, k: int, n: int, variant: str) -> None:
    """Against the reference; nothing else is written; the same bits again. One row's last scale is infinite, one row NaN."""
    spec = spec_of(OP)
    args, whole = framed(make(OP, variant, {"K": k, "N": n}, m, seed=m))
    args[3][m - 1, -1] = float("inf")
    args[1].view(torch.uint8)[0] = 0x7F
    wanted = copy(args)
    spec.reference(*wanted)
    call_thrice(OP, args, whole)
    assert torch.equal(args[0].isnan(), wanted[0].isnan())
    assert torch.equal(args[0].isinf(), wanted[0].isinf())
    kept = range(1, m - 1)
    compare_outputs(spec, spec.variant(variant), [args[0][kept], *args[1:]], [wanted[0][kept], *wanted[1:]])


@pytest.mark.skipif(BUNDLE is None, reason="HDISPATCH_CANDIDATES is not set")
@pytest.mark.parametrize(("cell", "index", "k"), CANDIDATES)
def test_candidates(cell, index, k):
    manifest, n = BUNDLE["manifest"], 6144
    record, ladders = manifest["records"][index], ladders_of(manifest["ops"][OP])
    files = {name: BUNDLE["contents"][name] for name in artifacts_of(record)}
    device = open_device(GIVEN, manifest, 0)
    device.publish(OneRow(hdispatch.registry.get(OP), ladders, cell["variant"], k, n, cell["bucket"], record, files))
    first, last = ladders.bounds(cell["bucket"])
    last = last or ladders.m[-1]
    for m in sorted({first, first + 1, last - 1, last}):
        check(m, k, n, cell["variant"])

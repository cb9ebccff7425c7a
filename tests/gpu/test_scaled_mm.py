"""scaled_mm of 129 to 192 rows, whose kernels take two or three pieces of rows, the last of which ends with M.

The candidates of a bundle that `hdispatch tune candidates --ops scaled_mm --buckets 144,160,192,…` made, $HDISPATCH_CANDIDATES,
are called one by one; so compute-sanitizer can be run on kernels that no row has:

    HDISPATCH_CANDIDATES=DIR compute-sanitizer --tool racecheck python -m pytest tests/gpu/test_scaled_mm.py -k candidates
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

from .test_ops import bits, copy, make, sizes_of, spec_of

OP = "scaled_mm"
GIVEN = os.environ.get("HDISPATCH_CANDIDATES")
BUNDLE = read_candidates(GIVEN) if GIVEN else None
#: Rows and columns of memory after those of out.
BEYOND = 64

CASES = [
    pytest.param(variant.name, sizes, id=f"{variant.name}-{sizes['K']}x{sizes['N']}")
    for variant in spec_of(OP).served_variants()
    for sizes in (sizes_of(spec_of(OP), shape) for shape in spec_of(OP).shapes)
]
CANDIDATES = [
    pytest.param(cell, index, id=f"{cell['K']}x{cell['N']}-{index}")
    for cell in (BUNDLE["candidates"]["cells"] if BUNDLE else ())
    for index in cell["records"]
    if cell["op"] == OP
]


def framed(args):
    """The arguments with a poisoned out that lies in more memory, and that memory."""
    out = args[0]
    whole = torch.full((out.size(0) + BEYOND, out.size(1) + BEYOND), float("nan"), dtype=out.dtype, device="cuda")
    return [whole[: out.size(0), : out.size(1)], *args[1:]], whole


def call_thrice(op, args, whole):
    """The same bits each time, and nothing else of the memory that `framed` made is written."""
    found = []
    for _ in range(3):
        whole.fill_(float("nan"))
        with hdispatch.strict():
            getattr(hdispatch.ops, op)(*args)
        torch.cuda.synchronize()
        found.append(bits(args[0]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert whole[args[0].size(0) :].isnan().all(), "rows after the last one"
    assert whole[:, args[0].size(1) :].isnan().all(), "columns after the last one"


def check(variant, sizes, m):
    """Against the reference; nothing else written; the same bits again. One row is NaN, and no other."""
    spec = spec_of(OP)
    args, whole = framed(make(OP, variant, sizes, m, seed=m))
    args[1].view(torch.uint8)[m - 3] = 0x7F
    wanted = copy(args)
    spec.reference(*wanted)
    call_thrice(OP, args, whole)
    assert torch.equal(args[0].isnan(), wanted[0].isnan())
    kept = [row for row in range(m) if row != m - 3]
    compare_outputs(spec, spec.variant(variant), [args[0][kept], *args[1:]], [wanted[0][kept], *wanted[1:]])


@pytest.mark.parametrize(("variant", "sizes"), CASES)
def test_rows_of_pieces(bundle, variant, sizes):
    for m in (128, 129, 130, 143, 144, 145, 159, 160, 161, 191, 192, 193):
        check(variant, sizes, m)


@pytest.mark.skipif(BUNDLE is None, reason="HDISPATCH_CANDIDATES is not set")
@pytest.mark.parametrize(("cell", "index"), CANDIDATES)
def test_candidates(cell, index):
    """At a bucket's edges; CuteDSL's code, which is of any N, also for two whose last tile is cut and whose blocks have few."""
    manifest = BUNDLE["manifest"]
    record, ladders = manifest["records"][index], ladders_of(manifest["ops"][OP])
    files = {name: BUNDLE["contents"][name] for name in artifacts_of(record)}
    device = open_device(GIVEN, manifest, 0)
    first, last = ladders.bounds(cell["bucket"])
    last = last or ladders.m[-1]
    others = (336, 1992) if record["backend"] == "cutedsl" else ()
    for n in (cell["N"], *others):
        device.publish(
            OneRow(hdispatch.registry.get(OP), ladders, cell["variant"], cell["K"], n, cell["bucket"], record, files)
        )
        for m in sorted({first, first + 1, (first + last) // 2 // 16 * 16, last - 1, last}):
            if first <= m <= last:
                check(cell["variant"], {"K": cell["K"], "N": n}, m)

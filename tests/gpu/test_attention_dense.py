"""hdispatch.attention on the GPU: against float32 and against torch's own error, at every edge; and how fast it was.

The last test compares with committed figures of the same card; `python benchmarks/attention_dense.py BUNDLE --json FILE` makes
them.
"""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import hdispatch
import pytest
import torch
from hdispatch.bench import machine
from hdispatch.compile import build
from hdispatch.compile.builder import Selection
from hdispatch.kernels.lib.paged_kv import Rule as PagedRule
from hdispatch.kernels.lib.paged_kv import attend as attend_paged
from hdispatch.kernels.lib.paged_kv import random_paged
from hdispatch.kernels.lib.sdpa import LENGTHS, Packed, Rule, attend, by_padding
from hdispatch.sdpa import FALLBACK
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).parents[2]
#: Most error, of numbers above 1 relative: a bfloat16 of 2 and more is rounded by up to 2^-8 of it.
TOLERANCE = 1e-2
#: What a cell may lose against the committed figures, in percent.
PERCENT = 10
EDGES = sorted({n for edge in LENGTHS for n in (edge - 1, edge, edge + 1)} - {0})
#: Query and kv heads that Helion's kernel of decode attention is called with.
DECODE_HEADS = [(32, 8), (64, 8), (10, 2)]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


def qkv(queries: int, keys: int, heads: tuple[int, int], dim: int, sequences: int = 1, dtype=torch.bfloat16):
    of_q, of_k = heads
    shapes = ((of_q, queries), (of_k, keys), (of_k, keys))
    return [randn(sequences, n, tokens, dim, seed=seed, dtype=dtype) for seed, (n, tokens) in enumerate(shapes)]


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert not got.isnan().any(), f"{int(got.isnan().sum())} elements are NaN"
    return float(((got.float() - want.float()).abs() / want.float().abs().clamp(min=1)).max())


def flash_error(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, want: torch.Tensor) -> float:
    """The largest error of torch's flash attention, of as many keys as queries."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        got = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    return error(got, want)


def serves(dim: int, seq_len: int, *, packed: bool = False, **asked: Any) -> bool:
    """Whether a row serves it, so that strict mode may be on; else the fallback does, as the config file says."""
    return hdispatch.select_attention(dim, seq_len, packed=packed, **asked).kernel != FALLBACK


def call(*args: torch.Tensor, **given: Any) -> torch.Tensor:
    """hdispatch.attention into a poisoned output, twice; a hit where the selector says so."""
    packed = "cu_seqlens_q" in given
    longest = given["max_seqlen_q"] if packed else args[0].size(2)
    limits = bool(given.get("window") or given.get("softcap"))
    asked = {"dtype": args[0].dtype, "causal": given.get("causal", False), "limits": limits}
    out = torch.full_like(args[0], float("nan"))
    with hdispatch.strict(serves(args[0].size(-1), max(1, longest), packed=packed, **asked)):
        hdispatch.attention(*args, out=out, **given)
        again = torch.full_like(out, float("nan"))
        hdispatch.attention(*args, out=again, **given)
    assert torch.equal(out.view(torch.int16), again.view(torch.int16)), "two calls differ"
    return out


@pytest.mark.usefixtures("bundle")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("queries", EDGES)
def test_dense_at_every_edge(queries: int, dim: int, causal: bool) -> None:
    """Error at most 1e-2, and no more than flash attention's, or a rounding of the output, which both have."""
    heads = (8, 2) if queries <= 4097 else (2, 1)
    q, k, v = qkv(queries, queries, heads, dim, 2 if queries <= 4097 else 1)
    want = attend(q, k, v, Rule(1 / math.sqrt(dim), causal=causal))
    got = error(call(q, k, v, causal=causal), want)
    assert got <= TOLERANCE
    assert got <= 1.05 * flash_error(q, k, v, causal, want) + 2**-9


@pytest.mark.usefixtures("bundle")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (7, 1), (10, 2), (64, 1), (40, 8)], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 4097), (3, 1000), (100, 1000), (1000, 100), (513, 513)])
def test_shapes_against_float32(queries: int, keys: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
    q, k, v = qkv(queries, keys, heads, 128, 3, dtype)
    for causal in (False, True):
        want = attend(q, k, v, Rule(128**-0.5, causal=causal))
        assert error(call(q, k, v, causal=causal), want) <= TOLERANCE


@pytest.mark.usefixtures("bundle")
@pytest.mark.parametrize("window", [0, 1, 63, 64, 65, 500, 5000])
@pytest.mark.parametrize("softcap", [0.0, 1.0, 30.0])
def test_what_models_add_against_float32(window: int, softcap: float) -> None:
    for queries, keys in ((1, 900), (700, 900), (1000, 1000)):
        q, k, v = qkv(queries, keys, (8, 2), 64, 2)
        want = attend(q, k, v, Rule(0.125, softcap, window, True))
        assert error(call(q, k, v, causal=True, window=window, softcap=softcap), want) <= TOLERANCE


RAGGED = {
    "one": [777],
    "ragged": [1, 512, 0, 17, 1000, 128, 129, 127],
    "empty ones": [0, 0, 300, 0],
    "all empty": [0, 0, 0],
    "many": [(7 * i) % 90 for i in range(300)],
    "one long": [1] * 40 + [5000],
}


@pytest.mark.usefixtures("bundle")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("lengths", RAGGED)
def test_packed_against_float32(lengths: str, dim: int, causal: bool) -> None:
    """Rows behind the last sequence stay as they are, and NaN there is not read."""
    counts, more = RAGGED[lengths], 5
    q, k, v = (randn(sum(counts) + more, heads, dim, seed=heads) for heads in (8, 2, 2))
    k[sum(counts) :] = v[sum(counts) :] = float("nan")
    starts = torch.tensor([0, *counts], device="cuda").cumsum(0).int()
    longest = max(1, *counts)
    want = torch.full(q.shape, float("nan"), device="cuda")
    by_padding(want, Packed(q, k, v, starts, starts, longest, longest), Rule(dim**-0.5, causal=causal), exact=True)
    got = call(q, k, v, causal=causal, cu_seqlens_q=starts, max_seqlen_q=longest)
    assert torch.equal(got.isnan(), want.isnan())
    assert error(got.nan_to_num(), want.nan_to_num()) <= TOLERANCE


@pytest.mark.usefixtures("bundle")
@pytest.mark.parametrize("longest", EDGES)
def test_packed_at_every_edge(longest: int) -> None:
    """Other numbers of keys than of queries, and the longest sequence at an edge of a bucket."""
    queries, keys = [3, longest, 0, 20], [50, longest + 7, 9, 0]
    heads = (4, 1)
    q, k, v = (randn(sum(n), h, 64, seed=h) for n, h in ((queries, heads[0]), (keys, heads[1]), (keys, heads[1])))
    starts = [torch.tensor([0, *each], device="cuda").cumsum(0).int() for each in (queries, keys)]
    most = [max(queries), max(keys)]
    want = torch.full(q.shape, float("nan"), device="cuda")
    by_padding(want, Packed(q, k, v, *starts, *most), Rule(0.125, causal=True), exact=True)
    given = {"cu_seqlens_q": starts[0], "cu_seqlens_k": starts[1], "max_seqlen_q": most[0], "max_seqlen_k": most[1]}
    assert error(call(q, k, v, causal=True, **given), want) <= TOLERANCE


@pytest.mark.usefixtures("bundle")
def test_layouts() -> None:
    """Tokens before heads and padded rows are hits; what is misaligned or strided in heads runs torch's, as right."""
    q, k, v = qkv(300, 300, (8, 2), 128, 2)
    want = attend(q, k, v, Rule(128**-0.5, causal=True))
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    padded = [torch.cat((x, torch.full_like(x[..., :32], float("nan"))), -1)[..., :128] for x in (q, k, v)]
    for args in (apart, padded):
        assert error(call(*args, causal=True), want) <= TOLERANCE
    shifted = [torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:].view(x.shape).copy_(x) for x in (q, k, v)]
    turned = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    for args in (shifted, turned):
        out = torch.full_like(q, float("nan"))
        assert error(hdispatch.attention(*args, causal=True, out=out), want) <= TOLERANCE
    for wrong in ((q.float(), k.float(), v.float()), (q, k.half(), v), (q.cpu(), k, v)):
        with pytest.raises(hdispatch.ArgumentError):
            hdispatch.attention(*wrong)


@pytest.mark.usefixtures("bundle")
def test_random_shapes() -> None:
    chosen = torch.Generator().manual_seed(0)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=chosen))

    for _ in range(200):
        group, kv_heads, dim = pick(1, 9), pick(1, 4), (64, 128, 256)[pick(0, 2)]
        q, k, v = qkv(pick(1, 700), pick(1, 700), (group * kv_heads, kv_heads), dim, pick(1, 4))
        causal = bool(pick(0, 1))
        window = pick(0, 300) if causal else 0
        want = attend(q, k, v, Rule(dim**-0.5, 0.0, window, causal))
        assert error(call(q, k, v, causal=causal, window=window), want) <= TOLERANCE, (q.shape, k.shape, causal, window)


@pytest.mark.usefixtures("bundle")
def test_large_scores_and_special_values() -> None:
    """A score beyond float16, equal ones, zeros; and NaN of one sequence that does not reach another."""
    q, k, v = qkv(200, 200, (4, 2), 128, 2)
    for factor in (0.0, 1.0, 100.0):
        want = attend(q * factor, k * 10, v, Rule(128**-0.5, causal=True))
        assert error(call(q * factor, k * 10, v, causal=True), want) <= 2 * TOLERANCE
    plain = call(q, k, v, causal=True)
    v[0] = k[0] = float("nan")
    spoiled = torch.full_like(q, 0.0)
    hdispatch.attention(q, k, v, causal=True, out=spoiled)
    assert torch.equal(spoiled[1], plain[1])
    assert spoiled[0].isnan().all()


@pytest.mark.usefixtures("bundle")
@pytest.mark.parametrize("strict", [True, False])
def test_neither_kernel_nor_fallback_waits_for_the_gpu(strict: bool) -> None:
    q, k, v = qkv(100, 100, (8, 2), 128 if strict else 96, 2)
    packed = [x[0].transpose(0, 1).contiguous() for x in (q, k, v)]
    starts = torch.tensor([0, 40, 100], dtype=torch.int32, device="cuda")

    def run() -> None:
        hdispatch.attention(q, k, v, causal=True)
        hdispatch.attention(q, k, v, causal=True, window=7)
        hdispatch.attention(*packed, causal=True, cu_seqlens_q=starts, max_seqlen_q=60)

    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("bundle")
def test_under_graph_capture_and_torch_compile() -> None:
    q, k, v = qkv(300, 300, (8, 2), 128)
    want = attend(q, k, v, Rule(128**-0.5, causal=True))
    out = torch.full_like(q, float("nan"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hdispatch.attention(q, k, v, causal=True, out=out)
    graph.replay()
    assert error(out, want) <= TOLERANCE
    compiled = torch.compile(lambda *args: hdispatch.attention(*args, causal=True), fullgraph=True)
    assert error(compiled(q, k, v), want) <= TOLERANCE


@pytest.fixture(scope="module")
def helion_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of paged_attention_decode that Helion's kernel serves, in chunks of 256 tokens."""
    pytest.importorskip("helion")
    folder = tmp_path_factory.mktemp("helion")
    chosen = {"block_sizes": [64, 8], "num_warps": 4, "num_stages": 3, "chunk": 256, "indexing": "pointer", "pid_type": "flat"}
    (folder / "nvidia_h200.json").write_text(json.dumps([{"key": {}, "backend": "helion", "config": chosen}]))
    op_package = importlib.import_module("hdispatch.compile.op_package")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op_package, "config_folder", lambda _: folder)
        variants = [f"bfloat16-bfloat16+group={q // kv}+max_queries={n}" for q, kv in DECODE_HEADS for n in (1, 4, 8)]
        select = Selection(shapes=lambda _: [{"K": 128}], variants=lambda _: variants)
        build(["paged_attention_decode"], "native", folder / "bundle", select=select)
    return folder / "bundle"


@pytest.mark.parametrize("queries", [1, 3, 8])
@pytest.mark.parametrize(("batch", "context"), [(1, 1), (1, 1024), (8, 100), (8, 8192), (128, 1024)])
@pytest.mark.parametrize("heads", DECODE_HEADS, ids=str)
def test_helions_decode_against_float32(
    helion_bundle: Path, heads: tuple[int, int], batch: int, context: int, queries: int
) -> None:
    lengths = torch.randint(1, context + 1, (batch,), generator=torch.Generator().manual_seed(batch))
    lengths[0] = context
    made = random_paged(lengths, heads[1], 128, 16, torch.bfloat16, torch.device("cuda"), torch.Generator("cuda"))
    q = randn(batch, queries, heads[0], 128, seed=queries)
    most = next(n for n in (1, 4, 8) if n >= queries)
    out = torch.full_like(q, float("nan"))
    args = (made.kv_cache, made.block_table, made.seq_lens, None, context, 128**-0.5, 0.0, 0, 1.0, 1.0)
    loaded = hdispatch.load(helion_bundle)
    try:
        want = attend_paged(q.float(), *args[:3], context, PagedRule(128**-0.5))
        for _ in range(2):  # the second call finds the counters as the first one leaves them
            out.fill_(float("nan"))
            with hdispatch.strict():
                hdispatch.ops.paged_attention_decode(out, q, *args, heads[0] // heads[1], most)
            assert error(out, want) <= 0.012
    finally:
        loaded.unload()


def committed() -> Path | None:
    """The newest committed figures of this card."""
    name = machine.describe(torch.device("cuda"))["gpu"]
    files = sorted((ROOT / "benchmarks" / "results").glob("*/attention_dense.json"), reverse=True)
    return next((file for file in files if json.loads(file.read_text())["machine"]["gpu"] == name), None)


@pytest.mark.slow
def test_no_slower_than_the_committed_figures(bundle_dir: Path, tmp_path: Path) -> None:
    """Only hdispatch's: torch's cells are there to be looked at."""
    old = committed()
    if old is None:
        pytest.skip(f"no figures of {torch.cuda.get_device_name()} in benchmarks/results/*/attention_dense.json")
    new = tmp_path / "attention_dense.json"
    program = ROOT / "benchmarks" / "attention_dense.py"
    subprocess.run([sys.executable, str(program), str(bundle_dir), "--json", str(new)], check=True, timeout=550)
    compare = [sys.executable, str(ROOT / "benchmarks" / "regress.py"), str(old), str(new)]
    done = subprocess.run(
        [*compare, "--paths", "hdispatch", "--percent", str(PERCENT)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr

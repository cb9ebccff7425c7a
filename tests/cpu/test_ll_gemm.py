"""The low-latency GEMMs: what goes to the CuteDSL kernels and what to the fallback, and what is compiled. No GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import hdispatch
import pytest
import torch
import triton
from hdispatch.bundle_reader import read_bundle
from hdispatch.compile import Selection, build, configs
from hdispatch.errors import BuildError
from hdispatch.manifest import LIBRARY
from hdispatch.testing import null

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
OPS = ("ll_gemm_bf16", "ll_gemm_fp8")
SHAPES = {"ll_gemm_bf16": ({"K": 2048, "N": 64}, {}), "ll_gemm_fp8": ({"K": 4096, "N": 4096}, {})}

needs_dsl = pytest.mark.skipif(
    importlib.util.find_spec("nvidia_cutlass_dsl") is None,
    reason="nvidia-cutlass-dsl is not installed: no CuteDSL kernel is compiled",
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """One shape of each op and its open row, in bfloat16, through the user's build cache."""
    folder = tmp_path_factory.mktemp("bundle") / "h200"
    selection = Selection(shapes=lambda spec: SHAPES[spec.name], variants=lambda spec: [spec.variants()[0].name])
    build(OPS, "h200", folder, select=selection)
    return folder


@pytest.fixture
def loaded(bundle):
    live = hdispatch.load(bundle, driver="null")
    yield
    live.unload()


def matrix(rows: int, k: int, dtype: torch.dtype, padding: int = 0, offset: int = 0) -> torch.Tensor:
    """A matrix with `padding` elements after each row and `offset` elements before the first."""
    flat = torch.zeros(rows * (k + padding) + offset + 64, dtype=dtype)
    skew = -flat.data_ptr() % 64 // dtype.itemsize
    return flat[skew + offset :][: rows * (k + padding)].view(rows, k + padding)[:, :k]


def arguments(
    op: str, m: int, k: int, n: int, x: dict[str, int] | None = None, w: dict[str, int] | None = None
) -> list[torch.Tensor]:
    dtype = BF16 if op == "ll_gemm_bf16" else FP8
    args = [torch.zeros(m, n, dtype=BF16), matrix(m, k, dtype, **x or {}), matrix(n, k, dtype, **w or {})]
    return args + ([] if dtype == BF16 else [torch.ones(m, 1), torch.ones(n)])


def served(op: str, *args: torch.Tensor) -> str | None:
    """The function that a call launches; None if the fallback computes it."""
    with null.recording():
        getattr(hdispatch.ops, op)(*args)
    launches = null.launches()
    assert len(launches) <= 1
    return launches[0]["function"] if launches else None


@needs_dsl
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("m", [1, 2, 3, 8, 9, 16, 17, 32])
def test_few_tokens_are_served(loaded, op: str, m: int) -> None:
    shape = SHAPES[op][0]
    assert served(op, *arguments(op, m, shape["K"], shape["N"]))
    assert served(op, *arguments(op, m, 1008, 77)), "any N, and any K of whole vectors"


@needs_dsl
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "case",
    [
        {"m": 0},
        {"m": 33},
        {"m": 4096},
        {"k": 1009},  # odd K
        {"k": 1004},  # no whole vectors: 8 of bfloat16, 16 of fp8
        {"x": {"padding": 4}, "m": 2},  # rows that are not aligned
        {"w": {"padding": 4}},
        {"x": {"offset": 4}},  # an address that is not
        {"w": {"offset": 4}},
    ],
    ids=str,
)
def test_what_the_kernels_cannot_take_goes_to_the_fallback(loaded, op: str, case: dict) -> None:
    sizes = {"m": 4, "k": 1008, "n": 80} | case
    assert served(op, *arguments(op, **sizes)) is None


@needs_dsl
@pytest.mark.parametrize("op", OPS)
def test_rows_may_be_strided(loaded, op: str) -> None:
    strided = arguments(op, 4, 1008, 80, x={"padding": 32}, w={"padding": 16})
    assert served(op, *strided)
    assert served(op, *arguments(op, 1, 1008, 80, x={"padding": 4})), "the stride of one row means nothing"


@needs_dsl
def test_fallback_is_right_where_the_kernels_are_not_used(loaded) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(rows, 1009, generator=generator).to(BF16) for rows in (5, 7))
    out = torch.empty(5, 7, dtype=BF16)
    hdispatch.ops.ll_gemm_bf16(out, x, w)
    torch.testing.assert_close(out.double(), x.double() @ w.double().t(), rtol=2**-8, atol=2**-8)
    out.fill_(float("nan"))
    codes, weights = x.to(FP8), w.to(FP8)
    scale = torch.tensor([0.5])
    hdispatch.ops.ll_gemm_fp8(out, codes, weights, scale, scale)
    torch.testing.assert_close(out.double(), 0.25 * codes.double() @ weights.double().t(), rtol=2**-8, atol=2**-8)


@needs_dsl
def test_one_scale_for_all_has_stride_0(loaded) -> None:
    args = arguments("ll_gemm_fp8", 4, 4096, 4096)
    args[3:] = [torch.ones(1), torch.ones(())]
    with null.recording():
        hdispatch.ops.ll_gemm_fp8(*args)
    scales = [null.ffi_argument(param) for param in null.launches()[0]["params"][3:5]]
    assert [(each["shape"], each["strides"]) for each in scales] == [([4], [0]), ([4096], [0])]


@needs_dsl
def test_bundle_holds_one_library_and_no_row_twice(bundle) -> None:
    manifest, files = read_bundle(bundle)
    assert list(files) == [LIBRARY]
    assert all(record["launcher"] == "tvm_ffi" and record["pdl"] for record in manifest["records"])
    for record in manifest["records"]:
        assert f"__tvm_ffi_{record['function']}".encode() in files[LIBRARY]
    rows = Counter((row["op"], row["K"]) for row in manifest["rows"])
    assert set(rows.values()) == {6}


@needs_dsl
def test_config_that_takes_too_few_tokens_is_refused(tmp_path) -> None:
    script = """
import hdispatch.compile.cutedsl_backend as backend
from hdispatch.compile.store import Store
from hdispatch.compile.target import DESCRIBED
from hdispatch.compile.build_unit import Unit
from hdispatch.errors import BuildError
from pathlib import Path
import sys

def said(config, buckets, shape):
    unit = Unit("hdispatch.kernels.ll_gemm_bf16", "cutedsl", "bfloat16", shape, config, buckets)
    try:
        backend.build_records(unit, DESCRIBED["h200"], {}, Store(Path(sys.argv[1])))
    except BuildError as error:
        return str(error)

split = {"kernel": "split", "rows": 1, "columns": 1, "warps": 4, "cluster": 4, "steps": 2, "depth": 2}
print(said(split, (4,), {"K": 2048}))
print(said({**split, "steps": 64}, (0,), {"K": 2048 * 16}))
print(said({"kernel": "dot", "outputs": 1, "tokens": 1, "warps": 4}, (0,), {}))
print(said({"kernel": "other"}, (0,), {}))
print(said(split, (0,), {"K": 2049}))
group = {"kernel": "warpgroup", "rows": 64, "columns": 1, "steps": 2, "stages": 8}
print(said({**group, "rows": 20}, (0,), {"K": 2048}))
print(said({**group, "cluster": 3}, (0,), {"K": 2048}))
print(said({**group, "ways": 2}, (0,), {}))
print(said({**group, "ways": 2, "stages": 5}, (0,), {"K": 2048}))
print(said({**group, "stages": 1}, (0,), {"K": 2048}))
print(said({**group, "resident": 1}, (0,), {}))
print(said({**group, "columns": 22, "stages": 4}, (0,), {"K": 2048}))
print(said({**group, "columns": 24, "stages": 4, "ways": 2}, (0,), {"K": 2048}))
"""
    environment = os.environ | {"CUTE_DSL_ARCH": "sm_90a"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=environment, capture_output=True, text=True, check=True
    )
    few, large, open_k, unknown, odd, *groups = done.stdout.splitlines()
    assert few.startswith("bucket 4 holds M from 9 to 16")
    assert few.endswith("takes at most 8; choose one with more tokens")
    assert "of shared memory, h200 has 232448" in large
    assert open_k.endswith("the dot form takes a K that is compiled in")
    assert "does not suit hdispatch.kernels.ll_gemm_bf16.cutedsl: 'other'" in unknown
    assert odd.endswith("K is 2049, no multiple of 8 elements, which are loaded at once")
    endings = (
        "a tile has 20 rows; it can have 8 to 128, in steps of 8",
        "3 blocks cannot share a tile; 1, 2 and 4 can",
        "None turns for 2 sets of warps; it can be 1, or 2 where there are as many for each",
        "5 stages for 2 sets of warps; there must be more, and as many for each",
        "1 stages for 1 sets of warps; there must be more, and as many for each",
        "tokens stay in shared memory where K is compiled in",
        "22 columns; more than 16 come in equal pieces, in the ring, for one way",
        "24 columns; more than 16 come in equal pieces, in the ring, for one way",
    )
    assert [line for line, ending in zip(groups, endings, strict=True) if not line.endswith(ending)] == []


@needs_dsl
def test_products_of_the_warpgroup_form_overlap(tmp_path) -> None:
    """ptxas makes each product wait for the one before it where it cannot follow the sums: 200 ns for every stage of two."""
    script = """
import sys
from cutlass import BFloat16, Float8E4M3FN, cute
from hdispatch.kernels.lib.ll_gemm.configs import warpgroup
from hdispatch.kernels.lib.ll_gemm.program import program

configs = [
    ({"K": 4096}, warpgroup(48, 2, 2, 12, ways=2)),
    ({"K": 4096}, warpgroup(64, 2, 2, 9, cluster=2, resident=1)),
    ({}, warpgroup(32, 1, 2, 20)),
    ({"K": 2048}, warpgroup(128, 8, 1, 6)),
    ({"K": 4096}, warpgroup(64, 24, 1, 6, cluster=2)),
    ({}, warpgroup(128, 24, 1, 4, cluster=4)),
]
for index, (sizes, config) in enumerate(configs):
    made = program(Float8E4M3FN, BFloat16, sizes, config)
    cute.compile(
        made.host, *made.arguments.values(), options=f"--enable-tvm-ffi --keep-cubin --dump-dir={sys.argv[1]}/{index}"
    )
"""
    for index in range(6):
        (tmp_path / str(index)).mkdir()
    environment = os.environ | {"CUTE_DSL_ARCH": "sm_90a"}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=environment, check=True)
    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    for index in range(6):
        (cubin,) = (tmp_path / str(index)).glob("*.cubin")
        code = subprocess.run([disassembler, "-c", cubin], capture_output=True, text=True, check=True).stdout
        assert len(re.findall(r"QGMMA\.", code)) >= 8
        assert len(re.findall(r"WARPGROUP\.DEPBAR", code)) == 2, "one in the loop, one after it"
        assert not re.search(r"\b(STL|LDL)\b", code), "registers in memory"


@needs_dsl
@pytest.mark.parametrize(("k", "n"), [(2048, 151936), (4096, 151936), (5120, 151936), (8192, 128256)])
def test_lm_heads_candidates_stream_and_fit(k: int, n: int) -> None:
    """All of its candidates can be made; the first one is what serves it until it is tuned. A router's are others."""
    script = """
import json, sys
from hdispatch.kernels.ll_gemm_bf16 import cutedsl
from hdispatch.kernels.ll_gemm_bf16.spec import SPEC

k, n = map(int, sys.argv[1:])
variant, found = SPEC.variant("bfloat16"), []
for m in SPEC.ladder:
    for config in cutedsl.candidates({"M": m, "K": k, "N": n}, variant):
        made = cutedsl.program(variant, {"K": k}, config)
        found.append([m, made.largest_m, made.shared_bytes, config])
router = [config["kernel"] for config in cutedsl.candidates({"M": 1, "K": k, "N": 256}, variant)]
print(json.dumps([found, router]))
"""
    environment = os.environ | {"CUTE_DSL_ARCH": "sm_90a"}
    command = [sys.executable, "-c", script, str(k), str(n)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found, router = json.loads(done.stdout)
    spec = hdispatch.registry.spec("ll_gemm_bf16")
    file = configs.read(configs.installed("ll_gemm_bf16") / "nvidia_h200.json", spec)
    for bucket, m in enumerate(spec.ladder):
        of_m = [each for each in found if each[0] == m]
        assert len(of_m) >= 5
        for _, most, shared, config in of_m:
            assert most >= m
            assert config["kernel"] == "warpgroup"
            assert (shared + 1024) * config["blocks"] // 132 <= 233472, config
        assert file.pick(spec, {"K": k, "N": n}, spec.ladders.edges(bucket)).config == of_m[0][3]
    assert {"dot", "split"} <= set(router)


@needs_dsl
def test_scaled_mm_is_served_by_the_same_kernels(tmp_path, monkeypatch) -> None:
    config = {"kernel": "warpgroup", "rows": 32, "columns": 1, "steps": 2, "stages": 20}
    entry = {"key": {}, "config": config, "backend": "cutedsl"}
    (tmp_path / "nvidia_h200.json").write_text(json.dumps([entry]))
    monkeypatch.setattr(configs, "installed", lambda _: tmp_path)
    folder = tmp_path / "bundle"
    build(
        ["scaled_mm"],
        "h200",
        folder,
        select=Selection(shapes=lambda _: [{}], variants=lambda _: ["bfloat16", "float16+bias"], buckets=lambda _: [2]),
    )
    live = hdispatch.load(folder, driver="null")
    x, w, out = matrix(3, 1008, FP8), matrix(80, 1008, FP8), torch.zeros(3, 80, dtype=BF16)
    args = (out, x, w.t(), torch.ones(3, 1), torch.ones(1), None)
    assert served("scaled_mm", *args)
    weights = null.ffi_argument(null.launches()[0]["params"][2])
    assert (weights["shape"], weights["strides"]) == ([80, 1008], [1008, 1])
    assert served("scaled_mm", out, x, matrix(80, 1008, FP8, padding=4).t(), *args[3:]) is None
    half = torch.float16
    assert served("scaled_mm", out.to(half), *args[1:5], torch.zeros(80, dtype=half)), "with a bias, in another type"
    assert null.ffi_argument(null.launches()[0]["params"][5])["shape"] == [80]
    live.unload()


@needs_dsl
@pytest.mark.parametrize(("most", "before"), [(144, 128), (160, 144), (192, 160)])
def test_wide_tiles_serve_a_bucket_of_their_own(tmp_path, monkeypatch, most, before) -> None:
    """More columns than any config of a lower bucket has; no more rows than they take."""
    config = {"kernel": "warpgroup", "rows": 64, "columns": most // 8, "steps": 1, "stages": 6, "cluster": 2}
    (tmp_path / "nvidia_h200.json").write_text(json.dumps([{"key": {}, "config": config, "backend": "cutedsl"}]))
    monkeypatch.setattr(configs, "installed", lambda _: tmp_path)
    folder, bucket = tmp_path / "bundle", hdispatch.registry.spec("scaled_mm").ladders.index(most)
    only = Selection(shapes=lambda _: [{}], variants=lambda _: ["bfloat16"], buckets=lambda _: [bucket])
    build(["scaled_mm"], "h200", folder, select=only)
    live = hdispatch.load(folder, driver="null")
    for m in (before, before + 1, most - 1, most, most + 1):
        args = [torch.zeros(m, 80, dtype=BF16), matrix(m, 1008, FP8), matrix(80, 1008, FP8).t()]
        found = served("scaled_mm", *args, torch.ones(m, 1), torch.ones(80), None)
        assert (found is not None) == (before < m <= most), m
    live.unload()


@needs_dsl
def test_kernels_compile_for_blackwell(tmp_path) -> None:
    """No such GPU is here to run them."""
    folder = tmp_path / "b200"
    selection = Selection(
        shapes=lambda spec: SHAPES[spec.name][:1], variants=lambda spec: [spec.variants()[0].name], buckets=lambda _: [0, 4]
    )
    build(OPS, "b200", folder, select=selection)
    manifest, _ = read_bundle(folder)
    assert manifest["target"]["arch"] == "sm_100a"
    assert len(manifest["rows"]) == 4


@pytest.mark.skipif(importlib.util.find_spec("nvidia_cutlass_dsl") is not None, reason="nvidia-cutlass-dsl is installed")
def test_without_the_dsl_a_build_says_what_is_missing(tmp_path) -> None:
    with pytest.raises(BuildError, match="nvidia-cutlass-dsl is not installed"):
        build(OPS, "h200", tmp_path / "bundle")

"""The CuteDSL kernels of scaled_mm_blockwise, and of scaled_mm for many rows: what is served, refused and compiled. No GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import hdispatch
import pytest
import torch
import triton
from hdispatch.compile import Selection, build, configs
from hdispatch.kernels.lib.ll_gemm.candidates import block_scaled_candidates
from hdispatch.kernels.lib.ll_gemm.configs import block_scaled, warpgroup
from hdispatch.kernels.lib.model_sizes import products, rows
from hdispatch.kernels.lib.tile_candidates import block_tile, block_tile_candidates, tile, tile_candidates
from hdispatch.testing import null

OP = "scaled_mm_blockwise"
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("nvidia_cutlass_dsl") is None,
    reason="nvidia-cutlass-dsl is not installed: no CuteDSL kernel is compiled",
)

PROGRAM = """
import importlib, json, sys
from cutlass import cute

op, *given = map(json.loads, sys.argv[1:])
cutedsl = importlib.import_module(f"hdispatch.kernels.{op}.cutedsl")
SPEC = importlib.import_module(f"hdispatch.kernels.{op}.spec").SPEC
"""


def in_dsl(script: str, *arguments: Any) -> Any:
    """What a script prints last, as JSON; it runs where cutlass believes in an H200, given an op and what else it takes."""
    given = [json.dumps(argument) for argument in arguments]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + script, *given],
        env=os.environ | {"CUTE_DSL_ARCH": "sm_90a"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def matrix(rows: int, columns: int, padding: int = 0) -> torch.Tensor:
    """A matrix in fp8 that begins at a multiple of 64 bytes, with `padding` bytes after each row."""
    flat = torch.zeros(rows * (columns + padding) + 64, dtype=torch.uint8)
    start = flat[-flat.data_ptr() % 64 :][: rows * (columns + padding)]
    return start.view(rows, columns + padding)[:, :columns].view(FP8)


def bundle_of(op: str, config: dict[str, Any], buckets: list[int], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle of one config for any K and N."""
    (folder / "nvidia_h200.json").write_text(json.dumps([{"key": {}, "config": config, "backend": "cutedsl"}]))
    monkeypatch.setattr(configs, "installed", lambda _: folder)
    select = Selection(shapes=lambda _: [{}], variants=lambda _: ["bfloat16"], buckets=lambda _: buckets)
    build([op], "h200", folder / "bundle", select=select)
    return folder / "bundle"


def served(*args: torch.Tensor | None, op: str = OP) -> dict[str, Any] | None:
    """The launch of a call; None if the fallback computes it."""
    with null.recording():
        getattr(hdispatch.ops, op)(*args)
    launches = null.launches()
    assert len(launches) <= 1
    return launches[0] if launches else None


def arguments(m: int, k: int, n: int) -> list[torch.Tensor]:
    """The op's, a_scales column-major."""
    groups_k, groups_n = -(-k // 128), -(-n // 128)
    out, a, b = torch.zeros(m, n, dtype=BF16), matrix(m, k), matrix(n, k).t()
    return [out, a, b, torch.ones(groups_k, m).t(), torch.ones(groups_n, groups_k).t()]


def test_scales_of_any_strides_are_served(tmp_path, monkeypatch) -> None:
    live = hdispatch.load(bundle_of(OP, block_scaled(64, 1, 2, 8), [3], tmp_path, monkeypatch), driver="null")
    m, k, n = 7, 1008, 336
    args = arguments(m, k, n)
    row_major = [*args[:3], args[3].contiguous(), args[4].contiguous()]
    sliced = [*args[:3], torch.ones(2 * m, 24)[::2, ::3], torch.ones(24, 9)[::3, ::3]]
    for given in (args, row_major, sliced):
        launch = served(*given)
        assert launch
        found = [null.ffi_argument(param) for param in launch["params"][3:5]]
        assert [(each["shape"], each["strides"]) for each in found] == [
            (list(scales.shape), list(scales.stride())) for scales in given[3:]
        ]
        weights = null.ffi_argument(launch["params"][2])
        assert (weights["shape"], weights["strides"]) == ([n, k], [k, 1])
    assert served(*args[:2], matrix(n, k, padding=4).t(), *args[3:]) is None, "rows of weights that are not aligned"
    assert served(*arguments(9, k, n)) is None, "no row for so many"
    live.unload()


def test_tiles_are_served(tmp_path, monkeypatch) -> None:
    """In a bucket of their own and in the last one, which has no end; rows of out that begin at multiples of 16 bytes."""
    last = len(hdispatch.registry.spec(OP).ladder) - 1
    live = hdispatch.load(bundle_of(OP, block_tile(128, 128, 2), [8, last], tmp_path, monkeypatch), driver="null")
    m, k, n = 255, 144, 200
    args = arguments(m, k, n)
    assert served(*args)
    assert served(*arguments(20000, k, n)), "past the ladder"
    assert served(*arguments(300, k, n)) is None, "a bucket without a row"
    whole = torch.zeros(m, n + 8, dtype=BF16)
    assert served(whole[:, :n], *args[1:])
    assert served(whole[:, 1 : n + 1], *args[1:]) is None, "an address that is not aligned"
    assert served(torch.zeros(m, n + 1, dtype=BF16)[:, :n], *args[1:]) is None, "rows that are not"
    live.unload()


def test_tiles_of_scaled_mm_are_served(tmp_path, monkeypatch) -> None:
    bucket = hdispatch.registry.spec("scaled_mm").ladders.index(512)
    live = hdispatch.load(bundle_of("scaled_mm", tile(256, 128, 2), [bucket], tmp_path, monkeypatch), driver="null")
    m, k, n = 500, 272, 336
    args = [torch.zeros(m, n, dtype=BF16), matrix(m, k), matrix(n, k).t(), torch.ones(1), torch.ones(n, 1), None]
    launch = served(*args, op="scaled_mm")
    assert launch
    scales = [null.ffi_argument(param) for param in launch["params"][3:5]]
    assert [(each["shape"], each["strides"]) for each in scales] == [([m], [0]), ([n], [1])]
    live.unload()


REFUSED = [
    (OP, {}, warpgroup(64, 1, 2, 8), "the warpgroup form takes scales per row, the op's are others; choose another form"),
    (OP, {}, block_scaled(128, 24, 1, 4), "24 columns take 184 registers of a thread, which has 168; choose fewer"),
    (OP, {}, block_scaled(20, 1, 2, 8), "a tile has 20 rows; it can have 8 to 128, in steps of 8"),
    (OP, {"K": 4104}, block_scaled(64, 1, 2, 8), "K is 4104, no multiple of 16 elements, which are loaded at once"),
    (OP, {}, block_tile(256, 256, stages=3), "a thread has 256 sums of a 256 x 256 tile; it can have 192"),
    (OP, {}, block_tile(128, 192, at_once=80), "80 outputs at once, of 192; it can be one of [192, 96, 48]"),
    (OP, {}, block_tile(128, 256, at_once=256), "a 128 x 256 tile takes 296 registers of a thread, which has 232"),
    (OP, {}, block_tile(128, 192, at_once=-96), "-96 outputs at once, of 192; it can be one of [192, 96, 48]"),
    (OP, {}, block_tile(128, 128) | {"slices": 0}, "0 slices of a tile; there can be 1, 2, 4 or 8"),
    (OP, {}, block_tile(128, 120), "a tile is 128 x 120; it can be 64, 128 or 256 x a multiple of 16 to 256"),
    (OP, {}, block_tile(64, 48), "a tile is 64 x 48; it can be 64, 128 or 256 x a multiple of 32 to 256"),
    (
        OP,
        {},
        block_tile(128, 96, slices=8),
        "8 slices of 128 x 96 tiles, 1 blocks sharing; a cluster has 8 blocks, each a piece of 16",
    ),
    (
        OP,
        {},
        block_tile(128, 128, 2, slices=8),
        "8 slices of 128 x 128 tiles, 2 blocks sharing; a cluster has 8 blocks, each a piece of 16",
    ),
    (OP, {}, block_tile(128, 128, 4), "4 blocks share 'w'; 1 or 2 can share 'x' or 'w'"),
    (OP, {}, block_tile(128, 128, stages=1), "1 stages, bands of 8; there must be 2 and 1 or more"),
    (OP, {}, block_tile(128, 64, groups=1), "1 groups for 128 tokens; there can be 2, and 1 for 64 tokens"),
    (OP, {}, block_tile(64, 64, groups=3), "3 groups for 64 tokens; there can be 2, and 1 for 64 tokens"),
    (OP, {}, block_tile(64, 64, per_sm=3), "3 blocks on an SM; there can be 1 or 2"),
    (OP, {}, block_tile(64, 64, ahead=9), "weights of 9 stages ahead; there are 8 stages, 0 for all"),
    (OP, {}, block_tile(128, 128, per_sm=2), "a thread has 64 sums of a 128 x 128 tile; it can have 56"),
    (
        OP,
        {"K": 4096},
        block_tile(256, 128, early=4, at_once=128),
        "products that begin early in a 256 x 128 tile take 296 registers of a thread, which has 232",
    ),
    (
        "scaled_mm",
        {},
        block_scaled(64, 1, 2, 8),
        "the block_scaled form takes scales per 128 of K, the op's are others; choose another form",
    ),
    ("scaled_mm", {}, block_tile(128, 128), "'block_tile'"),
    (
        "scaled_mm",
        {},
        tile(128, 128) | {"slices": 2},
        "2 slices of a tile whose scales are per row; it is one block's, slices are block_tile's",
    ),
    ("scaled_mm", {}, tile(96, 128), "a tile is 96 x 128; it can be 64, 128 or 256 x a multiple of 16 to 256"),
    ("scaled_mm", {}, tile(128, 128) | {"pingpong": "no"}, "pingpong is 'no'; it can be true or false"),
    ("scaled_mm", {}, tile(128, 256, pingpong=True), "a thread has 256 sums of a 128 x 256 tile; it can have 192"),
    (
        "scaled_mm",
        {},
        tile(64, 128, groups=1, pingpong=True),
        "groups that take tiles in turn: 1, 1 slices, scales per row; there must be 2, 1 slice and scales per row",
    ),
    (
        OP,
        {},
        block_tile(128, 64, pingpong=True),
        "groups that take tiles in turn: 2, 1 slices, scales per 128 of K; there must be 2, 1 slice and scales per row",
    ),
]


@pytest.mark.parametrize("op", [OP, "scaled_mm"])
def test_configs_are_refused(op) -> None:
    script = """
said = []
for sizes, config in given[0]:
    try:
        cutedsl.program(SPEC.variant("bfloat16"), sizes, config)
        said.append("compiled")
    except (KeyError, ValueError) as error:
        said.append(str(error))
print(json.dumps(said))
"""
    cases = [(sizes, config, ending) for name, sizes, config, ending in REFUSED if name == op]
    assert in_dsl(script, op, [case[:2] for case in cases]) == [ending for _, _, ending in cases]


def test_blocks_alone_are_launched_without_a_cluster() -> None:
    """A cluster of one is another launch: its blocks lie elsewhere, where they share less of what they read."""
    script = """
forms = [cutedsl.program(SPEC.variant("bfloat16"), {"K": 4096}, config).host.__self__ for config in given[0]]
print(json.dumps([form.cluster_shape() for form in forms]))
"""
    tiles = [block_tile(128, 128), block_tile(128, 128, 2), block_tile(128, 128, slices=2), block_tile(128, 128, 2, slices=2)]
    assert in_dsl(script, OP, tiles) == [None, [1, 2, 1], [1, 2, 1], [1, 4, 1]]


def test_products_begin_early_where_chunks_are_whole_turns() -> None:
    """A config is also that of a K nearby, which may have other chunks, and of rows of any K."""
    script = """
import cutlass
made = [
    cutedsl.BlockTileGemm(cutlass.Float8E4M3FN, k, **{name: value for name, value in config.items() if name != "kernel"})
    for k, config in given[0]
]
print(json.dumps([each.early for each in made]))
"""
    plain, shared = block_tile(64, 64, early=4), block_tile(64, 128, slices=4, early=4)
    cases = [(4096, plain), (4224, plain), (4160, plain), (None, plain), (6144, shared), (7168, shared), (2304, shared)]
    assert in_dsl(script, OP, cases) == [4, 0, 0, 0, 4, 0, 0]


def test_sums_get_the_scale_of_their_outputs() -> None:
    """Wherever a tile begins among 128 outputs: a column's scale of those kept, by the loop that runs, is that of its 128."""
    script = """
import cutlass
for tile_m, tile_n, groups, at_once in given[0]:
    made = cutedsl.BlockTileGemm(cutlass.Float8E4M3FN, 4096, tile_m, tile_n, 2, groups=groups, at_once=at_once)
    for index in range(16):
        begin = index * tile_n
        # As find_scales has them, of the tile; as sum_tile, of the group.
        kept = [(begin // made.unit * made.unit + lane * made.unit) // 128 for lane in range(made.w_kept)]
        for column in range(0, tile_n, made.columns):
            first_n = begin + column
            place = first_n // made.unit - begin // made.unit
            loops = [each for each in made.formers if len(made.formers) == 1 or each == min(128 - first_n % 128, made.columns)]
            assert len(loops) == 1, (tile_m, tile_n, index)
            assert place + made.scales_of(loops[0]) <= made.w_kept, (tile_m, tile_n, index)
            for beside in range(0, made.columns, made.at_once):
                runs = made.runs(beside, loops[0])
                assert [run[1] for run in runs[1:]] == [run[2] for run in runs[:-1]], runs
                assert (runs[0][1], runs[-1][2]) == (0, made.part), runs
                for scale, start, end in runs:
                    for each in range(start, end):
                        output = first_n + beside + each // 4 * 8 + each % 2
                        assert kept[place + scale] == output // 128, (tile_m, tile_n, index, column, output)
print(json.dumps([len(made.formers), made.unit]))
"""
    tiles = [(128, tile_n, 2, 0) for tile_n in range(16, 257, 16)] + [(64, tile_n, 2, 0) for tile_n in range(32, 257, 32)]
    tiles += [(256, 96, 2, 48), (64, 176, 1, 0), (128, 224, 2, 56), (128, 192, 2, 96), (128, 160, 2, 0)]
    assert in_dsl(script, OP, tiles) == [4, 128]


@pytest.mark.parametrize("op", [OP, "scaled_mm"])
def test_candidates_fit(op) -> None:
    """The GPU's shared memory, the tokens, a thread's registers; there are some for every M, few of this op, none twice."""
    script = """
listed = []
for sizes in given[0]:
    for m in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 8192):
        made = cutedsl.candidates({**sizes, "M": m}, SPEC.variant("bfloat16"))
        programs = [cutedsl.program(SPEC.variant("bfloat16"), {"K": sizes["K"]}, config) for config in made]
        listed.append((m, [(config, program.largest_m, program.shared_bytes) for config, program in zip(made, programs)]))
print(json.dumps(listed))
"""
    sizes = rows(products)
    listed = in_dsl(script, op, [{"K": 4096}, *sizes])
    assert len(listed) == 12 * (len(sizes) + 1)
    for m, found in listed:
        assert found
        assert all(largest >= m and shared <= 232448 for _, largest, shared in found)
        if op == OP:
            assert len(found) <= 14
            assert len({json.dumps(config) for config, _, _ in found}) == len(found)


@pytest.mark.parametrize("op", [OP, "scaled_mm"])
@pytest.mark.parametrize("card", ["h100", "h200"])
def test_configs_that_are_there_fit_shared_memory(op, card) -> None:
    """Of a block, of which an SM of Hopper's holds one, or two."""
    script = """
print(json.dumps([cutedsl.program(SPEC.variant("bfloat16"), sizes, config).shared_bytes for sizes, config in given[0]]))
"""
    entries = json.loads((Path(__file__).parents[2] / "configs" / op / f"nvidia_{card}.json").read_text())
    ours = [entry for entry in entries if entry.get("backend") == "cutedsl"]
    assert ours
    keys = [{"K": entry["key"]["in_features"]} if "in_features" in entry["key"] else {} for entry in ours]
    found = in_dsl(script, op, [[sizes, entry["config"]] for sizes, entry in zip(keys, ours, strict=True)])
    for size, entry in zip(found, ours, strict=True):
        assert size <= (115712 if entry["config"].get("per_sm") == 2 else 232448), entry


#: Of an op, a K and a config: wgmma's products in the loop over chunks or turns, and how often it waits for some. A loop of
#: sums over all of K comes after its first turn, and waits once more after the last. Block tiles take four chunks a turn, wide
#: ones all stages where a tile's chunks are whole turns of them, and have a loop over what is left where K is not compiled in.
#: Of 160 outputs they have a loop for each of the four places where a tile begins among 128, of 192 for each of two.
COMPILED = [
    (OP, {"K": 4096}, block_scaled(64, 1, 2, 8), 8, 2),
    (OP, {"K": 4096}, block_scaled(48, 2, 2, 12, ways=2), 8, 2),
    (OP, {"K": 12288}, block_scaled(128, 8, 1, 6, cluster=4), 8, 2),
    (OP, {}, block_scaled(32, 1, 1, 20), 4, 1),
    (OP, {"K": 4096}, block_scaled(96, 16, 1, 6), 8, 2),
    (OP, {}, block_scaled(64, 24, 1, 6, cluster=2), 8, 2),
    (OP, {"K": 4096}, block_scaled(64, 2, 2, 9, cluster=2, resident=1), 8, 2),
    (OP, {"K": 4096}, block_tile(64, 128, 2, "x", at_once=128), 16, 4),
    (OP, {}, block_tile(128, 128, 2), 20, 5),
    (OP, {"K": 4096}, block_tile(128, 64), 32, 8),
    (OP, {"K": 4096}, block_tile(128, 128, 2, at_once=64), 32, 8),
    (OP, {"K": 4096}, block_tile(256, 128, 2), 32, 8),
    (OP, {"K": 4096}, block_tile(256, 64, 2, at_once=32), 64, 16),
    (OP, {"K": 4096}, block_tile(128, 256, 2, "x"), 32, 8),
    (OP, {"K": 4096}, block_tile(128, 192), 32, 8),
    (OP, {}, block_tile(128, 112), 20, 5),
    (OP, {"K": 4096}, block_tile(128, 32), 16, 4),
    (OP, {"K": 5120}, block_tile(128, 160, 2, stages=5), 80, 20),
    (OP, {"K": 8192}, block_tile(128, 160, stages=5), 64, 16),
    (OP, {}, block_tile(128, 192), 40, 10),
    (OP, {}, block_tile(64, 256, 2, slices=4), 20, 5),
    (OP, {"K": 4096}, block_tile(64, 64, groups=1), 16, 4),
    (OP, {"K": 4096}, block_tile(64, 192, groups=1), 32, 8),
    (OP, {"K": 4096}, block_tile(64, 64, stages=6, groups=1, per_sm=2, early=4), 16, 4),
    (OP, {"K": 4096}, block_tile(128, 128, early=8), 32, 8),
    (OP, {"K": 4096}, block_tile(128, 192, early=4), 64, 16),
    (OP, {"K": 4096}, block_tile(128, 64, slices=2, early=4), 16, 4),
    ("scaled_mm", {"K": 4096}, tile(64, 256), 8, 2),
    ("scaled_mm", {}, tile(128, 128, 2, "x"), 8, 2),
    ("scaled_mm", {"K": 4096}, tile(128, 192, 2), 8, 2),
    ("scaled_mm", {"K": 4096}, tile(256, 128, 2), 16, 2),
    ("scaled_mm", {"K": 4096}, tile(128, 128, 2, pingpong=True), 16, 2),
    ("scaled_mm", {}, tile(128, 112, 2, pingpong=True), 16, 2),
    ("scaled_mm", {"K": 4096}, tile(64, 48, groups=1, stages=11), 8, 2),
]


@pytest.mark.parametrize("op", [OP, "scaled_mm"])
def test_products_overlap_and_sums_stay_in_registers(tmp_path, op) -> None:
    """ptxas makes each product wait for the one before it where it cannot follow the sums."""
    script = """
for index, (sizes, config) in enumerate(given[1]):
    made = cutedsl.program(SPEC.variant("bfloat16"), sizes, config)
    options = f"--enable-tvm-ffi --keep-cubin --dump-dir={given[0]}/{index}"
    cute.compile(made.host, *made.arguments.values(), options=options)
print("null")
"""
    cases = [case for name, *case in COMPILED if name == op]
    for index in range(len(cases)):
        (tmp_path / str(index)).mkdir()
    in_dsl(script, op, str(tmp_path), [case[:2] for case in cases])
    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    for index, (_, config, wgmmas, waits) in enumerate(cases):
        (cubin,) = (tmp_path / str(index)).glob("*.cubin")
        code = subprocess.run([disassembler, "-c", cubin], capture_output=True, text=True, check=True).stdout
        assert len(re.findall(r"QGMMA\.", code)) == wgmmas, config
        assert len(re.findall(r"WARPGROUP\.DEPBAR", code)) == waits, config
        assert not re.search(r"\b(STL|LDL)\b", code), f"{config}: registers in memory"
        # One takes registers, the other gives its own; ptxas drops both where it does not know how many there are.
        gives = config["kernel"] != "block_scaled" and config.get("groups", 2) == 2 and config.get("per_sm", 1) == 1
        assert len(re.findall(r"USETMAXREG", code)) == (2 if gives else 0), config
        if config["kernel"] != "block_scaled":
            assert not re.search(r"MUFU\.RCP", code), f"{config}: a division by what the host knows"


#: Of an op, a K that fits a stage, and a form whose two blocks share a tile: the second block's part of K is past its end.
SHORT = [
    ("scaled_mm", 256, {"kernel": "warpgroup", "rows": 32, "columns": 8, "steps": 2, "stages": 8, "cluster": 2, "resident": 1}),
    ("scaled_mm", 112, {"kernel": "warpgroup", "rows": 32, "columns": 8, "steps": 2, "stages": 8, "cluster": 2}),
    (OP, 256, {"kernel": "block_scaled", "rows": 32, "columns": 8, "steps": 2, "stages": 4, "cluster": 2}),
]


@pytest.mark.parametrize(("op", "k", "config"), SHORT)
def test_what_lies_past_a_short_k_is_not_copied_again(tmp_path, op, k, config) -> None:
    """Each block asks for its own part of K; where the DSL took it for the first one's, products were counted twice."""
    script = """
made = cutedsl.program(SPEC.variant("bfloat16"), {"K": given[1]}, given[2])
options = f"--enable-tvm-ffi --keep-ptx --dump-dir={given[0]}"
cute.compile(made.host, *made.arguments.values(), options=options)
print("null")
"""
    in_dsl(script, op, str(tmp_path), k, config)
    (file,) = tmp_path.glob("*.ptx")
    code = file.read_text()
    copies = re.findall(r"cp\.async\.bulk\.tensor\.(\d)d\.shared\S* \[%r\d+\S*\], \[%rd\d+, \{([^}]*)\}\]", code)
    assert copies
    for dimensions, coordinates in copies:
        along_k = coordinates.split(", ")[2 if dimensions == "3" else 0]
        assert not re.search(rf"mov\.b32\s+{along_k}, \d+;", code), coordinates


def test_candidates_need_no_dsl() -> None:
    assert block_scaled_candidates({"M": 1, "K": 4096})
    assert block_tile_candidates({"M": 32}) == tile_candidates({"M": 32}) == []
    assert block_tile_candidates({"M": 64})
    assert tile_candidates({"M": 64})


@pytest.mark.parametrize(("k", "stages"), [(8192, 4), (25600, 5), (128 * 43, 5)])
def test_wide_tiles_take_a_stage_less_where_it_makes_turns_whole(k, stages) -> None:
    """Of 5 stages, which a 128 x 160 tile has room for, 64 chunks are no whole turns; 43 are of neither."""
    found = block_tile_candidates({"M": 512, "K": k, "N": 5120})
    likely = [each for each in found if (each["tile_m"], each["tile_n"], each.get("slices", 1)) == (128, 160, 1)]
    assert likely
    assert {each["stages"] for each in likely} == {stages}


def test_a_stage_less_is_for_slices_that_take_as_many_chunks() -> None:
    """29 chunks of four slices are seven or eight: no number of stages makes turns of them whole."""
    found = block_tile_candidates({"M": 128, "K": 128 * 29, "N": 1024})
    shared = [each for each in found if (each["tile_m"], each["tile_n"], each.get("slices", 1)) == (128, 64, 4)]
    assert shared
    assert {each["stages"] for each in shared} == {8}


@pytest.mark.parametrize(("m", "n", "some"), [(8192, 4096, True), (256, 51200, True), (512, 2048, False), (64, 51200, True)])
def test_groups_take_tiles_in_turn_where_blocks_have_several(m, n, some) -> None:
    """Of 132 tiles and fewer a block has one, and its second group would have none."""
    found = [config for config in tile_candidates({"M": m, "K": 4096, "N": n}) if config.get("pingpong")]
    assert bool(found) == some
    for config in found:
        assert -(-m // config["tile_m"]) * -(-n // config["tile_n"]) > 132

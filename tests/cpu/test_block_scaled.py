"""The CuteDSL kernels of scaled_mm_blockwise: what is served, which configs are refused, what is compiled. No GPU."""

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
from hdispatch.kernels.lib.reference_gemm import SHAPES
from hdispatch.testing import null

OP = "scaled_mm_blockwise"
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("nvidia_cutlass_dsl") is None,
    reason="nvidia-cutlass-dsl is not installed: no CuteDSL kernel is compiled",
)

PROGRAM = """
import json, sys
from cutlass import BFloat16, Float8E4M3FN, cute
from hdispatch.kernels.scaled_mm_blockwise import cutedsl
from hdispatch.kernels.scaled_mm_blockwise.spec import SPEC

VARIANT = SPEC.variant("bfloat16")
"""


def in_dsl(script: str, *arguments: Any) -> Any:
    """What a script prints last, as JSON; it runs where cutlass believes in an H200, given the arguments as JSON."""
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


def bundle_of(config: dict[str, Any], buckets: list[int], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle of one config for any K and N."""
    (folder / "nvidia_h200.json").write_text(json.dumps([{"key": {}, "config": config, "backend": "cutedsl"}]))
    monkeypatch.setattr(configs, "installed", lambda _: folder)
    select = Selection(shapes=lambda _: [{}], variants=lambda _: ["bfloat16"], buckets=lambda _: buckets)
    build([OP], "h200", folder / "bundle", select=select)
    return folder / "bundle"


def served(*args: torch.Tensor) -> dict[str, Any] | None:
    """The launch of a call; None if the fallback computes it."""
    with null.recording():
        hdispatch.ops.scaled_mm_blockwise(*args)
    launches = null.launches()
    assert len(launches) <= 1
    return launches[0] if launches else None


def arguments(m: int, k: int, n: int) -> list[torch.Tensor]:
    """The op's, a_scales column-major."""
    groups_k, groups_n = -(-k // 128), -(-n // 128)
    out, a, b = torch.zeros(m, n, dtype=BF16), matrix(m, k), matrix(n, k).t()
    return [out, a, b, torch.ones(groups_k, m).t(), torch.ones(groups_n, groups_k).t()]


def test_scales_of_any_strides_are_served(tmp_path, monkeypatch) -> None:
    live = hdispatch.load(bundle_of(block_scaled(64, 1, 2, 8), [3], tmp_path, monkeypatch), driver="null")
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


@pytest.mark.parametrize(
    ("sizes", "config", "ending"),
    [
        ({}, warpgroup(64, 1, 2, 8), "the warpgroup form takes scales per row, the op's are others; choose another form"),
        ({}, block_scaled(128, 24, 1, 4), "24 columns take 184 registers of a thread, which has 168; choose fewer"),
        ({}, block_scaled(20, 1, 2, 8), "a tile has 20 rows; it can have 8 to 128, in steps of 8"),
        ({"K": 4104}, block_scaled(64, 1, 2, 8), "K is 4104, no multiple of 16 elements, which are loaded at once"),
    ],
    ids=["scales per row", "registers", "rows", "K"],
)
def test_configs_are_refused(sizes, config, ending) -> None:
    script = """
try:
    cutedsl.program(VARIANT, *map(json.loads, sys.argv[1:]))
    print(json.dumps("compiled"))
except ValueError as error:
    print(json.dumps(str(error)))
"""
    assert in_dsl(script, sizes, config) == ending


def test_another_op_refuses_the_block_scaled_form() -> None:
    script = """
from hdispatch.kernels.scaled_mm import cutedsl, spec
try:
    cutedsl.program(spec.SPEC.variant("bfloat16"), {}, json.loads(sys.argv[1]))
    print(json.dumps("compiled"))
except ValueError as error:
    print(json.dumps(str(error)))
"""
    said = in_dsl(script, block_scaled(64, 1, 2, 8))
    assert said == "the block_scaled form takes scales per 128 of K, the op's are others; choose another form"


@pytest.mark.parametrize(("k", "n"), [*SHAPES, (4096, None)])
def test_candidates_fit(k, n) -> None:
    """The GPU's shared memory, the tokens, a thread's registers; few, and none twice."""
    script = """
listed = {}
for m in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 8192):
    made = cutedsl.candidates({**json.loads(sys.argv[1]), "M": m}, VARIANT)
    programs = [cutedsl.program(VARIANT, {"K": json.loads(sys.argv[1])["K"]}, config) for config in made]
    listed[m] = [(config, program.largest_m, program.shared_bytes) for config, program in zip(made, programs)]
print(json.dumps(listed))
"""
    listed = in_dsl(script, {"K": k} | ({"N": n} if n else {}))
    for m, found in listed.items():
        assert len(found) <= 10
        assert len({json.dumps(config) for config, _, _ in found}) == len(found)
        assert all(largest >= int(m) and shared <= 232448 for _, largest, shared in found)
    assert all(listed[str(m)] for m in (1, 2, 4, 8, 16, 32, 64, 128))


#: Configs and, of each, how often a turn sums from zero: each chunk, or each half of its tokens, or both.
COMPILED = [
    ({"K": 4096}, block_scaled(64, 1, 2, 8), 2),
    ({"K": 4096}, block_scaled(48, 2, 2, 12, ways=2), 2),
    ({"K": 12288}, block_scaled(128, 8, 1, 6, cluster=4), 2),
    ({}, block_scaled(32, 1, 1, 20), 1),
    ({"K": 4096}, block_scaled(96, 16, 1, 6), 2),
    ({}, block_scaled(64, 24, 1, 6, cluster=2), 2),
    ({"K": 4096}, block_scaled(64, 2, 2, 9, cluster=2, resident=1), 2),
]


@pytest.mark.parametrize(("sizes", "config", "sums"), COMPILED)
def test_each_sum_is_one_wait(tmp_path, sizes, config, sums) -> None:
    """ptxas makes each product wait for the one before it where it cannot follow the sums."""
    script = """
folder, sizes, config = map(json.loads, sys.argv[1:])
made = cutedsl.program(VARIANT, sizes, config)
cute.compile(made.host, *made.arguments.values(), options=f"--enable-tvm-ffi --keep-cubin --dump-dir={folder}")
print("null")
"""
    in_dsl(script, str(tmp_path), sizes, config)
    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    (cubin,) = tmp_path.glob("*.cubin")
    code = subprocess.run([disassembler, "-c", cubin], capture_output=True, text=True, check=True).stdout
    assert len(re.findall(r"QGMMA\.", code)) == 4 * sums
    assert len(re.findall(r"WARPGROUP\.DEPBAR", code)) == sums
    assert not re.search(r"\b(STL|LDL)\b", code), "registers in memory"


def test_candidates_need_no_dsl() -> None:
    assert block_scaled_candidates({"M": 1, "K": 4096})

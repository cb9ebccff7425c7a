"""What a run of the op benchmark says: targets and their verdicts; a result as a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import HdispatchError
from . import ops_low_latency
from .ops_compare import (
    Judged,
    Result,
    cell_name,
    compare,
    eager_speedups,
    geomean,
    groups,
    main_mode,
    name_of,
    of_copy,
    roof_timings,
    words_of_peer,
)
from .ops_grid import EAGER_M, EAGER_MODEL, GEMMS, LOW_LATENCY, report_order
from .peers import COMPILE, VLLM

#: op -> peer -> speedup to reach, as a geometric mean over the grid: the post's, or better.
SPEEDUPS: dict[str, dict[str, float]] = {
    "dynamic_per_token_scaled_fp8_quant": {COMPILE: 1.24, VLLM: 1.41},
    "rms_norm_dynamic_per_token_quant": {COMPILE: 1.18, VLLM: 1.80},
    "silu_and_mul_dynamic_per_token_quant": {COMPILE: 1.26},
    "fused_qk_norm_rope": {COMPILE: 1.38, VLLM: 1.20},
    "per_token_group_fp8_quant": {COMPILE: 1.42, VLLM: 1.41},
    "rms_norm_per_block_quant": {COMPILE: 1.67, VLLM: 2.06},
    "silu_and_mul_per_block_quant": {COMPILE: 1.73, VLLM: 2.27},
    "scaled_mm": {VLLM: 1.08},
    "scaled_mm_blockwise": {VLLM: 1.00},
}
GEMM_ROOF = 0.75
EAGER_SPEEDUP = 1.5
#: Whom these are held against; the targets of few tokens are `ops_low_latency`'s.
COLUMNS = (COMPILE, VLLM)


# ---- targets ----


def judge_speedups(result: Result) -> list[tuple[str, dict[str, Judged]]]:
    """Every op of the run, and every op with a target, with its figure and verdict for each of COLUMNS."""
    found = {key: each for key, each in groups(result, main_mode(result)).items() if key[0] not in LOW_LATENCY}
    keys = [*found, *((op, "") for op in SPEEDUPS if all(op != each for each, _ in found))]
    lines = []
    for op, variant in sorted(keys, key=lambda key: (report_order(key[0]), key)):
        name = name_of(result, op, variant)
        judged = {}
        for peer in COLUMNS:
            comparison = compare(found.get((op, variant), ()), peer)
            measured = comparison.geomean if comparison else None
            note = f"{len(comparison.speedups)} cells" if comparison else ""
            judged[peer] = Judged(f"{name} against {words_of_peer(op, peer)}", SPEEDUPS.get(op, {}).get(peer), measured, note)
        lines.append((name, judged))
    return lines


def judge_gemms(result: Result) -> list[Judged]:
    """The GEMMs of one model at M = 1, rotated: fraction of the copy bandwidth."""
    judged = []
    for op in GEMMS:
        found = [t for (name, _, m), each in roof_timings(result).items() if (name, m) == (op, 1) for t in each]
        for timing in (each for each in found if each["model"] == EAGER_MODEL):
            judged.append(Judged(f"{op}, {cell_name(timing)}: of the copy bandwidth", GEMM_ROOF, of_copy(result, timing)))
        if not judged or not judged[-1].text.startswith(f"{op},"):
            judged.append(Judged(f"{op}, {EAGER_MODEL} at M=1: of the copy bandwidth", GEMM_ROOF, None))
    return judged


def judge_eager(result: Result) -> list[Judged]:
    """Every op, called from Python, against torch.ops._C: the geometric mean over its shapes. `LOW_LATENCY` has no target."""
    judged = []
    for (op, variant), speedups in eager_speedups(result).items():
        measured = geomean([speedup for _, speedup in speedups])
        worst, least = min(speedups, key=lambda each: each[1])
        note = f"{len(speedups)} shapes, worst {least:.2f} ({worst['label']})" if len(speedups) > 1 else ""
        wanted = None if op in LOW_LATENCY else EAGER_SPEEDUP
        judged.append(Judged(f"{name_of(result, op, variant)}, eager, M={EAGER_M}", wanted, measured, note))
    if all(each.wanted is None for each in judged):
        judged.append(Judged(f"every op, eager, M={EAGER_M}, against {VLLM}", EAGER_SPEEDUP, None))
    return judged


def judge_hits(result: Result) -> Judged:
    """Share of calls that the table served."""
    hits = sum(counts["hits"] for counts in result["stats"].values())
    misses = sum(sum(counts["misses"].values()) for counts in result["stats"].values())
    fallbacks = sum(counts["fallbacks"] for counts in result["stats"].values())
    share = hits / (hits + misses) if hits + misses else None
    return Judged("calls served by the table", 1.0, share, f"{hits} hits, {misses} misses, {fallbacks} fallbacks")


def judge(result: Result) -> list[Judged]:
    """Every target."""
    speedups = [each for _, judged in judge_speedups(result) for each in judged.values()]
    judged = [*speedups, *ops_low_latency.judge(result), *judge_gemms(result), *judge_eager(result), judge_hits(result)]
    return [each for each in judged if each.wanted is not None]


# ---- files ----


def write_json(result: Result, file: Path) -> None:
    """Write a result, a line for each timing, with the verdicts."""
    plain: dict[str, Any] = dict(result)
    targets = [{"text": j.text, "wanted": j.wanted, "measured": j.measured, "verdict": j.verdict} for j in judge(result)]
    parts = [f'"{name}": {_lines(value)}' for name, value in (plain | {"targets": targets}).items()]
    try:
        file.write_text("{" + ",\n".join(parts) + "}\n", encoding="utf-8")
    except OSError as error:
        raise HdispatchError(f"cannot write {file}: {error.strerror}") from error


def _lines(value: object) -> str:
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(json.dumps(each) for each in value) + "\n]"
    return json.dumps(value)


def read_json(file: Path) -> Result:
    """A result that `write_json` wrote."""
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
        return {name: plain[name] for name in Result.__annotations__}  # type: ignore[return-value]
    except OSError as error:
        raise HdispatchError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise HdispatchError(f"{file} is not a result of bench ops: {error}") from error

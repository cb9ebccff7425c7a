"""The tables of figures in README.md and docs/, and the pictures of docs/, made from benchmarks/results.

    python scripts/figures.py            print every table
    python scripts/figures.py --write    put each between its markers, `<!-- figures: NAME -->` and `<!-- /figures -->`, and
                                         draw the pictures (needs matplotlib)

tests/cpu/test_readme.py compares what stands between the markers, and what the pictures say, with what is made here.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"<!-- figures: ([\w-]+) -->\n(.*?)<!-- /figures -->", re.DOTALL)

#: Path of `bench dispatch` -> what a table calls it.
PATHS = {
    "cuLaunchKernelEx": "`cuLaunchKernelEx`, C loop (**floor**)",
    "cuLaunchKernelEx-pdl": "`cuLaunchKernelEx` with the PDL attribute, C loop",
    "hdispatch.ops": "**`hdispatch.ops`**",
    "torch.ops.hdispatch": "**`torch.ops.hdispatch`**",
    "torch.ops.hdispatch.default": "`torch.ops.hdispatch.….default` (torch's argument parser)",
    "hdispatch.ops-nopdl": "`hdispatch.ops`, loaded with `pdl=False`",
    "torch.ops._C": "vLLM's CUDA op, `torch.ops._C`",
    "triton": "a Triton JIT kernel with five pointers",
    "helion": "the same Helion kernel, called directly",
    "helion-torch-op": "… behind a torch op with a key function, as in vLLM",
    "cuda-graph": "replay of a CUDA graph of one launch",
    "null-driver": "`hdispatch.ops`, null driver: everything but the driver call",
}
SIX = ("cuLaunchKernelEx", "hdispatch.ops", "torch.ops.hdispatch", "torch.ops._C", "triton", "cuda-graph")
#: The run of the table of steps: mode in it -> what the table calls it.
SERVED = {
    "graph": "vLLM, full CUDA graphs of decode steps, nothing compiled",
    "compiled": "vLLM's default, compiled",
    "ours": "**these layers, `--enforce-eager`**",
    "ours+graph": "**these layers under vLLM's graphs**",
}
#: The table of servers: file and mode in it -> what the table calls it.
SERVERS = {
    ("server-compiled", "compiled"): "`vllm serve`",
    ("server-ours", "ours"): "**`HDISPATCH=1 vllm serve --enforce-eager`**",
    ("server-compiled-block", "compiled"): "`vllm serve`, blocks",
    ("server-ours-block", "ours"): "**`HDISPATCH=1 vllm serve --enforce-eager`, blocks**",
}
#: The same with n-gram speculation.
SPECULATING = {
    ("server-ngram", "compiled+ngram"): "`vllm serve`",
    ("server-ngram", "ours+ngram"): "**`HDISPATCH=1 vllm serve --enforce-eager`**",
}
#: Where all three lie.
SERVING = RESULTS / "2026-11-27-h200-serve"

#: Of benchmarks/adopt.py.
ADOPTED = RESULTS / "2026-11-27-h200-adopt" / "adopt.json"
#: Kernel in it -> what the table and the picture call it.
ADOPTED_KERNELS = {
    "0 arguments": "Triton, no arguments",
    "19 arguments": "Triton, 19 arguments",
    "58 arguments": "Triton, 58 arguments",
    "helion add, out given": "Helion, output given",
    "helion add": "Helion, output allocated",
}

#: Of benchmarks/adopt_helion_examples.py.
HELION_EXAMPLES = RESULTS / "2026-11-27-adopt-helion-examples" / "examples.json"
#: Class in it -> what the table calls it.
SERVED_AS = {
    "every M": "every M, from one adoption",
    "shape by shape": "shape by shape",
    "its launch alone": "its launch alone",
    "Helion's": "nothing",
}


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n".replace("|  |", "| |") for line in lines)


def microseconds(ns: float) -> str:
    """Three or four digits: 0.146, 2.76, 28.3, 459."""
    value = ns / 1000
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 50 else 0
    return f"{value:.{digits}f} µs"


def calls(folder: str, paths: tuple[str, ...]) -> str:
    """Host time of one call through some paths."""
    result: dict[str, Any] = json.loads((RESULTS / folder / "dispatch.json").read_text())
    cells = {(row["path"], row["m"]): row for row in result["rows"]}
    rows = []
    for path in paths:
        kinds = [cells.get((path, m)) for m in ("fixed", "cycling", "unseen")]
        times = [microseconds(cell["median_ns"]) if cell else "" for cell in kinds]
        ratio = cells[path, "fixed"]["floor_ratio"]
        rows.append([PATHS[path], *times, f"{ratio:.2f}" if ratio else ""])
    return markdown(["path", "M fixed", "M cycling over 2, 3, 7, 16", "M never seen before", "× floor (fixed)"], rows)


def serve(file: str) -> str:
    """ms per decode step of the whole engine, of the modes that a run has."""
    rows, batches = [], ("1", "8", "32", "128")
    result = json.loads((SERVING / file).read_text())
    for mode, name in SERVED.items():
        if mode not in result["modes"]:
            continue
        mark = "**" if name.startswith("**") else ""
        rows.append([name, *(f"{mark}{result['modes'][mode]['batches'][batch]:.2f}{mark}" for batch in batches)])
    return markdown(["ms per decode step, batch", *batches], rows)


def serve_memory() -> str:
    """GB that an engine of the table of steps takes beside weights and KV cache."""
    rows = []
    for mode, name in SERVED.items():
        run = json.loads((SERVING / "token-8b.json").read_text())["modes"][mode]
        started, reserved = run["started"], run["finished"]["reserved_bytes"]
        beside = (figure - started["weights_bytes"] - started["kv_bytes"] for figure in (started["device_bytes"], reserved))
        rows.append([name, *(f"{figure / 1e9:.2f}" for figure in beside)])
    return markdown(["GB beside weights and KV cache", "of the GPU, started", "reserved by torch, after the steps"], rows)


def server(runs: dict[tuple[str, str], str]) -> str:
    """Tokens per second, first token and time per token of the real server, by requests at once; seconds to start."""
    rows, header = [], ["", "starts in"]
    for (file, mode), name in runs.items():
        found = json.loads((SERVING / f"{file}.json").read_text())["modes"][mode]
        counts = sorted(found["concurrency"], key=int)
        header = ["", "starts in", *(f"{count} at once" for count in counts)]
        figures = (
            f"{each['total_token_throughput']:,.0f} tokens/s, {each['median_ttft_ms']:.0f} ms, {each['median_tpot_ms']:.2f} ms"
            for each in (found["concurrency"][count] for count in counts)
        )
        rows.append([name, f"{found['start_s']:.0f} s", *figures])
    return markdown(header, rows)


def section(file: Path, title: str) -> Iterator[list[str]]:
    """The lines of a printed table after its header, cut into cells at two spaces or more."""
    lines = file.read_text().split(f"{title}", 1)[1].splitlines()
    for line in lines[2:]:
        if not line.strip():
            return
        yield re.split(r"\s{2,}", line.strip())


def kernels() -> str:
    """GPU time of kernels against peers, share of the roof, and calls from Python."""
    file = RESULTS / "2026-11-21-h200-ops" / "ops.txt"
    against: dict[str, dict[str, list[str]]] = {}
    for op, peer, *cells in section(file, "speedups by op, warm buffers"):
        against.setdefault(op, {})["torch.compile" if peer == "torch.compile" else "vLLM"] = cells
    roofs = {(cells[0], cells[1]): cells for cells in section(file, "hdispatch, rotated buffers") if cells[2] == "8192"}
    eager: dict[str, list[float]] = {}
    for op, _shape, ours, torch_op, *vllm in section(file, "called from Python, M = 16, 8B"):
        if vllm:
            eager.setdefault(op, []).append(float(vllm[0]) / max(float(ours), float(torch_op)))
    rows = []
    for op, peers in against.items():
        if op.startswith("ll_gemm"):
            continue
        compiled, vllm = peers.get("torch.compile"), peers.get("vLLM")
        roof = roofs.get((op, "matrix")) or roofs.get((op, "memory"))
        rows.append(
            [
                f"`{op}`",
                compiled[1].removesuffix(" ×") if compiled else "–",
                vllm[1].removesuffix(" ×") if vllm else "–",
                f"{vllm[4].removesuffix(' ×')} ({vllm[5]})" if vllm else "–",
                f"{roof[3].replace(' … ', '–').replace(' %', '', 1)} of {roof[1]}" if roof else "–",
                f"{math.prod(eager[op]) ** (1 / len(eager[op])):.2f}" if op in eager and vllm else "–",
            ]
        )
    worst = "worst cell against vLLM's"
    return markdown(["op", "× torch.compile", "× vLLM's kernel", worst, "share of the roof, M = 8192", "eager, × vLLM's"], rows)


def speedups(file: Path, modes: tuple[str, ...]) -> Iterator[tuple[dict[str, Any], float]]:
    """A peer's timing, and its time over ours, for every cell of a run of `bench ops` that has both."""
    with lzma.open(file, "rt") if file.suffix == ".xz" else file.open() as text:
        timings: list[dict[str, Any]] = json.load(text)["timings"]
    parts = ("op", "variant", "K", "N", "m", "mode")
    ours = {tuple(each[part] for part in parts): each["median_us"] for each in timings if each["path"] == "hdispatch"}
    for each in timings:
        cell = tuple(each[part] for part in parts)
        if each["path"] != "hdispatch" and each["mode"] in modes and cell in ours:
            yield each, each["median_us"] / ours[cell]


def mean_and_worst(found: list[tuple[dict[str, Any], float]]) -> list[str]:
    """The geometric mean of peers' times over ours, and the cell where ours does worst."""
    mean = math.exp(sum(math.log(ratio) for _, ratio in found) / len(found))
    cell, worst = min(found, key=lambda each: each[1])
    return [f"{mean:.2f}", f"{worst:.2f} ({cell['model'].removeprefix('Qwen3-')} {cell['label']} M={cell['m']})"]


def kernels_equal() -> str:
    """What equality with vLLM's kernels to the bit costs, by op, and how the kernels do beside vLLM's since."""
    folder, found = RESULTS / "2026-11-26-h100", defaultdict(list)
    for each, ratio in speedups(folder / "ops-after.json.xz", ("warm",)):
        if each["path"] == "torch.ops._C":
            found[each["op"]].append((each, ratio))
    rows = []
    for line in (folder / "ops-before-after.txt").read_text().splitlines()[1:]:
        op, path, _cells, mean, worst, *_where = line.split()
        if path == "hdispatch":
            rows.append([f"`{op}`", mean, worst, *(mean_and_worst(found[op]) if op in found else ["–", "–"])])
    return markdown(["op", "time after / before, mean", "worst", "× vLLM's kernel, after", "worst cell"], rows)


#: What the authors of vLLM's Helion kernels published for them on an H100: op -> over torch.compile, over vLLM's kernel.
PUBLISHED = {
    "dynamic_per_token_scaled_fp8_quant": (1.24, 1.41),
    "rms_norm_dynamic_per_token_quant": (1.18, 1.80),
    "silu_and_mul_dynamic_per_token_quant": (1.26, None),
    "fused_qk_norm_rope": (1.38, 1.20),
    "per_token_group_fp8_quant": (1.42, 1.41),
    "rms_norm_per_block_quant": (1.67, 2.06),
    "silu_and_mul_per_block_quant": (1.73, 2.27),
    "scaled_mm": (None, 1.08),
    "scaled_mm_blockwise": (None, 0.96),
}


#: The two products on an H100, with configs chosen on one.
SCALED_MM, BLOCKS = "2026-11-28-h100-scaled_mm/ops.json", "2026-11-28-h100-blocks/deepgemm.json"


def published() -> str:
    """The nine ops beside torch.compile and vLLM's kernels on the card of the published figures, and those."""
    found = defaultdict(list)
    for file in ("2026-11-28-h100-ops/post.json", SCALED_MM, BLOCKS):
        for each, ratio in speedups(RESULTS / file, ("warm",)):
            if each["op"] != "scaled_mm" or file == SCALED_MM:
                found[each["op"], each["path"]].append((each, ratio))
    rows = []
    for op, theirs in PUBLISHED.items():
        cells = [f"`{op}`"]
        for peer, figure in zip(("torch.compile", "torch.ops._C"), theirs, strict=True):
            cells += [*mean_and_worst(found[op, peer]), f"{figure:.2f}"] if figure else ["–"] * 3
        rows.append(cells)
    return markdown(["op", "× torch.compile", "worst cell", "published", "× vLLM's kernel", "worst cell", "published"], rows)


def beside(file: str, peer: str, name: str) -> str:
    """How a product does beside a peer and vLLM's CUTLASS kernel, by rows."""
    timings = list(speedups(RESULTS / file, ("warm",)))
    rows = []
    for m in (*sorted({each["m"] for each, _ in timings}), None):
        cells = ["**all**" if m is None else str(m)]
        for path in (peer, "torch.ops._C"):
            cells += mean_and_worst([found for found in timings if found[0]["path"] == path and m in (None, found[0]["m"])])
        rows.append(cells)
    return markdown(["M", f"× {name}, mean", "worst cell", "× vLLM's CUTLASS, mean", "worst cell"], rows)


def tuning() -> str:
    """The tuned rows, and the loss from keeping few configs."""
    header = ["op", "candidates", "best somewhere", "kept (≤ 2 % regret)", "mean regret", "worst", "compiling", "GPU"]
    rows = []
    for op, *cells in section(RESULTS / "2026-11-21-h200-tune" / "select.txt", "in graphs, 336 cells in 42.5 s."):
        del cells[3]  # entries of the config file
        if op == "op":
            continue
        if op == "all":
            rows.append(["**all**", *cells[:3], "", *cells[3:]])
        else:
            rows.append([f"`{op}`", *cells])
    return markdown(header, rows)


def left_out() -> str:
    """What a model would miss, by op, if the chosen configs alone, or what tuning takes by default, were measured."""
    ops = json.loads((RESULTS / "2026-11-28-cpu-tune" / "left-out.json").read_text())["ops"]
    rows = []
    for op, found in ops.items():
        cells = [f"`{op}`", str(found["cells"]), str(found["candidates"])]
        for pool in ("chosen", "default"):
            cells.append(f"{100 * found[pool]['share']:.0f} %")
            cells += [f"{100 * found[pool][name]:.1f} %" for name in ("mean", "p95", "worst")]
        rows.append(cells)
    numbers = ["mean regret", "95th percentile", "worst"]
    return markdown(["op", "cells", "candidates", "chosen ones", *numbers, "default", *numbers], rows)


def adopted_rows() -> Iterator[tuple[str, str, dict[str, float]]]:
    """Kernel, how M goes, and ns per call: `floor`, `before`, `adopted`; and the ratio of `adopted` to the floor."""
    result: dict[str, Any] = json.loads(ADOPTED.read_text())
    cells = {(row["kernel"], row["path"], row["m"]): row for row in result["rows"]}
    for kernel, name in ADOPTED_KERNELS.items():
        for m in ("fixed", "cycling", "never seen"):
            ours = cells.get((kernel, "adopted", m))
            if ours is None:
                continue
            before = cells.get((kernel, "Triton", m)) or cells[kernel, "Helion", m]
            times = {"before": before["median_ns"], "adopted": ours["median_ns"], "ratio": ours["floor_ratio"]}
            times["floor"] = times["adopted"] / times["ratio"]
            yield name, f"M {m}" if kernel.startswith("helion") else "", times


def adopted() -> str:
    """Host time per call of kernels, adopted and as they were."""
    rows = [
        [name, m, *(microseconds(times[each]) for each in ("floor", "before", "adopted")), f"{times['ratio']:.2f}"]
        for name, m, times in adopted_rows()
    ]
    return markdown(["kernel", "", "floor", "before", "adopted", "× floor"], rows)


def helion_examples() -> str:
    """How the kernels of Helion's repository are served once adopted, and why those that are not for every M are not."""
    result: dict[str, Any] = json.loads(HELION_EXAMPLES.read_text())
    ways = [result[way] for way in ("static_shapes=False", "as written")]
    totals = [sum(way["classes"].get(name, 0) for name in SERVED_AS) for way in ways]
    rows = []
    for name, shown in SERVED_AS.items():
        counts = [way["classes"].get(name, 0) for way in ways]
        reasons = Counter(row["reason"] for row in ways[0]["kernels"] if row["class"] == name and row["reason"])
        why = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common())
        shares = [f"{count} ({count / total:.0%})" for count, total in zip(counts, totals, strict=True)]
        rows.append([shown, *shares, "" if name == "every M" else why.replace("|", "or")])
    return markdown(["", "`static_shapes=False`", "as written", "why, with `static_shapes=False`"], rows)


def helion_shares() -> str:
    """What Helion's kernels reach of the best other backend, by op and M."""
    shares = json.loads((RESULTS / "2026-11-27-h200-helion" / "shares.json").read_text())
    ms = sorted({each["m"] for each in shares})
    found = {(each["op"], each["m"]): each for each in shares}
    lines = ["| op | " + " | ".join(f"M = {m}" for m in ms) + " |", "| --- " * (len(ms) + 1) + "|"]
    for op in sorted({each["op"] for each in shares}):
        lines.append(f"| `{op}` | " + " | ".join(f"{found[op, m]['share']:.2f}" for m in ms) + " |")
    return "\n".join(lines) + "\n"


TABLES: dict[str, Callable[[], str]] = {
    "calls": lambda: calls("2026-11-26-h100", SIX),
    "calls-h100": lambda: calls("2026-11-26-h100", tuple(path for path in PATHS if not path.startswith("helion"))),
    "calls-h200": lambda: calls("2026-11-21-h200-2", tuple(PATHS)),
    "serve": lambda: serve("token-8b.json"),
    "serve-small": lambda: serve("token-1.7b.json"),
    "serve-memory": serve_memory,
    "server": lambda: server(SERVERS),
    "server-ngram": lambda: server(SPECULATING),
    "kernels": kernels,
    "kernels-equal": kernels_equal,
    "published": published,
    "scaled_mm": lambda: beside(SCALED_MM, "torch._scaled_mm", "cuBLAS"),
    "scaled_mm-h200": lambda: beside("2026-11-29-h200-contention/scaled_mm.json", "torch._scaled_mm", "cuBLAS"),
    "deepgemm": lambda: beside(BLOCKS, "DeepGEMM", "DeepGEMM"),
    "deepgemm-h200": lambda: beside("2026-11-29-h200-chunks/blocks.json", "DeepGEMM", "DeepGEMM"),
    "helion": helion_shares,
    "tuning": tuning,
    "left-out": left_out,
    "adopted": adopted,
    "adopted-helion-examples": helion_examples,
}


# ---- pictures ----


def draw_adopted(file: Path) -> None:
    """Bars on a logarithmic scale; the numbers are text."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = list(adopted_rows())[::-1]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hdispatch", "font.family": "sans-serif"}):
        figure = Figure(figsize=(8, 0.6 + 0.55 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for at, (_, _, times) in enumerate(rows):
            for y, path, color in ((at + 0.2, "before", "#c0392b"), (at - 0.2, "adopted", "#20639b")):
                axes.barh(y, times[path], 0.38, color=color, label=path if at == 0 else None)
                axes.annotate(microseconds(times[path]), (times[path], y), (4, 0), textcoords="offset points", va="center")
            label = None if at else "driver call alone"
            axes.plot([times["floor"]] * 2, [at - 0.42, at + 0.42], color="#333333", ls=":", label=label)
        axes.set_xscale("log")
        axes.set_xlim(1000)
        axes.margins(x=0.15)
        axes.xaxis.set_major_formatter(lambda ns, _at: f"{ns / 1000:g} µs")
        axes.set_yticks(range(len(rows)), [f"{name}\n{m}" if m else name for name, m, _ in rows])
        axes.set_xlabel("host time per call, enqueue only (median)")
        figure.legend(loc="outside upper right", ncols=3, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(file, metadata={"Date": None})


#: Picture of docs/ -> what draws it.
PICTURES: dict[str, Callable[[Path], None]] = {"adopt.svg": draw_adopted}


def documents() -> list[Path]:
    """The files that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> None:
    """Print, or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables and pictures into README.md and docs/")
    if not parser.parse_args().write:
        for name, table in TABLES.items():
            print(f"{name}\n\n{table()}")
        return
    for file in documents():
        text = file.read_text()
        file.write_text(MARKED.sub(lambda found: f"<!-- figures: {found[1]} -->\n{TABLES[found[1]]()}<!-- /figures -->", text))
    for name, draw in PICTURES.items():
        draw(ROOT / "docs" / name)


if __name__ == "__main__":
    main()

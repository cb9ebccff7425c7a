"""Host time of a decode step of the vLLM plug-in's layers, without vLLM: what one call of the model's forward costs the host.

Enqueue only, median and quartiles over rounds in random order: ms per step, and ns per launch above a C loop of bare launches.
With --driver null (the default where there is no GPU) the driver call costs nothing; with cuda it is the real one. The longest
request grows by a token a step, as it does when serving.

    python benchmarks/vllm_step.py BUNDLE [--driver null|cuda] [--rows 1 8 32 128] [--layers 36] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import hdispatch
import torch
from hdispatch import _C
from hdispatch.bench import machine
from hdispatch.integrations.vllm import attention, layers, schemes, weights

ROUNDS, CALLS, PAGE, PAGES, LONGEST = 30, 3, 16, 64, 1024
#: Qwen3-8B: hidden, heads, kv heads, head size, intermediate.
SHAPE = weights.Shape(4096, 32, 8, 128, 12288)
FP8, HALF = torch.float8_e4m3fn, torch.bfloat16


def make_layers(device: torch.device, count: int) -> layers.FusedLayers:
    """Layers with one set of weights: no step waits for what is computed."""

    def matrix(k: int, n: int) -> schemes.Linear:
        weight = torch.zeros(n, k, device=device, dtype=FP8).t()
        return schemes.Linear(weight, torch.ones(n, 1, device=device))

    hidden, head = SHAPE.hidden, SHAPE.head_size
    matrices = (
        matrix(hidden, SHAPE.qkv),
        matrix(SHAPE.attended, hidden),
        matrix(hidden, 2 * SHAPE.intermediate),
        matrix(SHAPE.intermediate, hidden),
    )
    norms = [torch.ones(size, device=device, dtype=HALF) for size in (hidden, hidden, head, head)]
    found = []
    for n in range(count):
        cache = torch.zeros(PAGES, SHAPE.kv_heads, PAGE, 2 * head, device=device, dtype=HALF)
        one = torch.ones(1, device=device)
        impl = SimpleNamespace(scale=head**-0.5)
        of = SimpleNamespace(layer_name=f"layer {n}", impl=impl, head_size=head, kv_cache=cache, _k_scale=one, _v_scale=one)
        found.append(weights.Layer(*norms, *matrices, of))
    rope = torch.zeros(LONGEST, head, device=device, dtype=HALF)
    embedding = torch.zeros(1024, hidden, device=device, dtype=HALF)
    bound = weights.Weights(SHAPE, schemes.PerTokenFp8(), HALF, 1e-6, embedding, norms[0], rope, True, tuple(found))
    attend = attention.Attention(bound, lambda: LONGEST, (256, 8192), lambda x: x)
    context = SimpleNamespace(attn_metadata=None, slot_mapping=None)
    made = layers.FusedLayers(None, bound, 8192, attend, lambda: context, None)
    made.context = context  # type: ignore[attr-defined]
    return made


def step_of(fused: layers.FusedLayers, m: int, device: torch.device) -> Callable[[], object]:
    """One call of forward, the next token's."""
    names = [layer.attention.layer_name for layer in fused.weights.layers]
    lengths = itertools.cycle(range(1, LONGEST // 2))
    ids, positions = (torch.zeros(m, device=device, dtype=torch.int64) for _ in range(2))
    slots = torch.full_like(ids, -1)
    metadata = SimpleNamespace(
        max_query_len=1,
        num_actual_tokens=m,
        seq_lens=torch.ones(m, device=device, dtype=torch.int32),
        block_table=torch.zeros(m, LONGEST // PAGE, device=device, dtype=torch.int32),
    )

    def step() -> object:
        metadata.max_seq_len = next(lengths)
        context = fused.context  # type: ignore[attr-defined]
        context.attn_metadata = dict.fromkeys(names, metadata)
        context.slot_mapping = dict.fromkeys(names, slots)
        return fused.forward(ids, positions, None)

    return step


def measured(fused: layers.FusedLayers, m: int, device: torch.device) -> dict[str, list[float]]:
    """Name -> ns per step, by round."""
    synchronize: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    step, before = step_of(fused, m, device), hdispatch.stats()
    with hdispatch.strict():
        step()
    after = hdispatch.stats()
    launches = sum(after[op]["hits"] - before[op]["hits"] for op in hdispatch.registry.names())
    x = torch.zeros(m, SHAPE.hidden, device=device, dtype=HALF)
    floor = (hdispatch.ops.fused_add_rms_norm, (x, x.clone(), fused.weights.final_norm, 1e-6))

    def timed() -> float:
        synchronize()
        begin = time.perf_counter_ns()
        for _ in range(CALLS):
            step()
        return (time.perf_counter_ns() - begin) / CALLS

    def bare() -> float:
        synchronize()
        return launches * float(_C.bench_launch_ns(*floor, launches * CALLS, True))

    made = {"forward": timed, "bare launches, C loop": bare}
    taken: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(ROUNDS):
        for name in random.sample(list(made), len(made)):
            taken[name].append(made[name]())
    synchronize()
    taken["launches"] = [launches]
    return taken


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--driver", choices=("null", "cuda"), default="cuda" if torch.cuda.is_available() else "null")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    hdispatch.load(options.bundle, driver=options.driver)
    device = torch.device("cuda" if options.driver == "cuda" else "cpu")
    torch.set_num_threads(1)  # the embedding is looked up on the CPU under the null driver
    found = []
    with torch.inference_mode():
        fused = make_layers(device, options.layers)
        for m in options.rows:
            taken = measured(fused, m, device)
            (launches,) = taken.pop("launches")
            bare = statistics.median(taken["bare launches, C loop"])
            for name, each in taken.items():
                low, median, high = (value / 1e6 for value in statistics.quantiles(each, n=4))
                above = (statistics.median(each) - bare) / launches
                print(
                    f"M {m:4}  {name:24}{median:7.3f} ms a step ({low:.3f} to {high:.3f}), {above:7.1f} ns a launch above bare"
                )
                found.append({"M": m, "path": name, "launches": launches, "ms": median, "low": low, "high": high})
    if options.json:
        here = machine.describe(device if options.driver == "cuda" else None)
        facts = {"machine": here, "driver": options.driver, "layers": options.layers, "paths": found}
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()

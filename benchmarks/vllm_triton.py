"""vLLM's own Triton kernels, three ways: compiled while it runs, from a bundle of a recorded run, adopted.

    python benchmarks/vllm_triton.py [--model qwen3-1.7b] [--attention TRITON_ATTN] [--json FILE]

Each engine is a process of its own whose compile caches are empty, without hdispatch's plug-in: layers, model runner and
sampler are vLLM's. It captures decode steps as graphs, as a server does, or with --eager captures nothing.

record    runs under `hdispatch record`; `hdispatch build --record` then makes the bundle
compiled  vLLM as it is
recorded  loads the bundle first; vLLM's own monitor of compilations is set to "error" before the first kernel
adopted   eager; hdispatch.adopt() first; counted after a warm-up with other requests

Told: seconds until the engine stands, milliseconds of the first request (128 tokens in, 8 out) and of the same once more, how
many kernels Triton compiled, and of the adopted launches the share that hit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hdispatch.bench import machine, serve_model

ARMS = ("record", "compiled", "recorded", "adopted")
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32]}
#: Share of adopted launches that hit after the warm-up, at least.
HIT_SHARE = 0.95


def run(arm: str, model: str, attention: str, eager: bool, bundle: str) -> dict[str, Any]:
    """What one engine shows; in its own process."""
    import hdispatch

    compiled = count_compilations()
    if arm == "recorded":
        hdispatch.load(bundle)
        forbid_compilations()
    if arm == "adopted":
        hdispatch.adopt()
    from vllm import LLM

    folder = Path(tempfile.mkdtemp(prefix="hdispatch-model-"))
    serve_model.write_config(folder, model, "token")
    sizes = {"max_model_len": 2048, "max_num_seqs": 64, "max_num_batched_tokens": 4096, "kv_cache_memory_bytes": 4 << 30}
    fixed = {"load_format": "dummy", "skip_tokenizer_init": True, "enable_prefix_caching": False, "seed": 0}
    fixed["jit_monitor_mode"] = "error" if arm == "recorded" else "warn"
    mode: dict[str, Any] = {"enforce_eager": True} if eager or arm == "adopted" else {"compilation_config": GRAPHS}
    began = time.perf_counter()
    llm = LLM(model=str(folder), attention_backend=attention, gpu_memory_utilization=0.2, **sizes, **fixed, **mode)
    found: dict[str, Any] = {"start_s": time.perf_counter() - began, "compiled_at_start": len(compiled)}
    for name in ("first_ms", "second_ms"):
        began = time.perf_counter()
        generate(llm, [128], [8])
        found[name] = 1e3 * (time.perf_counter() - began)
    answer_many(llm, seed=1)
    found["compiled"] = len(compiled)
    if arm == "recorded":
        found["recorded"] = {kind: sum(counts.values()) for kind, counts in hdispatch.recorded.stats().items()}
    if arm == "adopted":
        hdispatch.stats(reset=True)
        answer_many(llm, seed=2)
        found |= adopted_launches(hdispatch.stats())
    return found


def count_compilations() -> list[str]:
    """The names of kernels that Triton compiles from here on; the list grows."""
    from triton import knobs

    names: list[str] = []
    before = knobs.runtime.jit_post_compile_hook

    def hook(**given: Any) -> Any:
        names.append(str(given["fn"].name))
        return before(**given) if before is not None else None

    knobs.runtime.jit_post_compile_hook = hook
    return names


def forbid_compilations() -> None:
    """vLLM's monitor raises where Triton compiles, from here on."""
    from vllm.utils import jit_monitor

    jit_monitor.activate(mode="error", verbose=True)


def generate(llm: Any, prompts: list[int], tokens: list[int]) -> None:
    """Answers of `tokens` tokens to prompts of `prompts` tokens."""
    from vllm import SamplingParams

    given = [{"prompt_token_ids": [(7 * i + 3 * j) % 900 + 10 for j in range(length)]} for i, length in enumerate(prompts)]
    sampling = [SamplingParams(max_tokens=each, ignore_eos=True, detokenize=False, temperature=0.0) for each in tokens]
    outputs = llm.generate(given, sampling, use_tqdm=False)
    assert [len(each.outputs[0].token_ids) for each in outputs] == tokens


def answer_many(llm: Any, seed: int) -> None:
    """Requests of many lengths, few and many at once: prefill, mixed and decode steps."""
    pick = random.Random(seed)
    for count in (1, 3, 8, 33, 48):
        generate(llm, [pick.randint(1, 700) for _ in range(count)], [pick.randint(2, 40) for _ in range(count)])


def adopted_launches(stats: dict[str, Any]) -> dict[str, Any]:
    """Of all adopted kernels: launches, those that hit, misses by reason, and each kernel's own counts."""
    kernels = {name.removeprefix("adopted "): counts for name, counts in stats.items() if name.startswith("adopted ")}
    hits = sum(counts["hits"] for counts in kernels.values())
    reasons: dict[str, int] = {}
    for counts in kernels.values():
        for reason, count in counts["misses"].items():
            reasons[reason] = reasons.get(reason, 0) + count
    launches = hits + sum(counts["fallbacks"] for counts in kernels.values())
    seen = {name: counts for name, counts in kernels.items() if counts["hits"] or counts["fallbacks"]}
    return {"launches": launches, "hits": hits, "misses": reasons, "kernels": seen}


def ask(arm: str, given: argparse.Namespace, folder: Path, bundle: Path) -> dict[str, Any]:
    """Runs an arm in a fresh process with empty caches."""
    caches = Path(tempfile.mkdtemp(prefix=f"{arm}-", dir=folder))
    environment = os.environ | {
        "HDISPATCH": "0",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_DEEP_GEMM": "0",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CACHE_ROOT": str(caches / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
    }
    parameters = json.dumps([arm, given.model, given.attention, given.eager, str(bundle)])
    command = [sys.executable, __file__, "--engine", parameters]
    if arm == "record":
        command = [sys.executable, "-m", "hdispatch", "record", "--out", str(folder / "kernels.jsonl"), "--", *command]
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=given.limit, check=False)
    answers = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    if not answers:
        return {"error": (done.stdout + done.stderr)[-6000:]}
    return json.loads(answers[0].removeprefix("ANSWER ")) | {"process_s": time.perf_counter() - began}


def build(folder: Path) -> dict[str, Any]:
    """The bundle of the recording, and what building it said."""
    command = [sys.executable, "-m", "hdispatch", "build", "--record", str(folder / "kernels.jsonl"), "--target", "native"]
    command += ["--out", str(folder / "bundle"), "--cache", str(folder / "cache")]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return {"seconds": time.perf_counter() - began, "returned": done.returncode, "said": (done.stdout + done.stderr)[-3000:]}


def verdicts(arms: dict[str, dict[str, Any]]) -> list[str]:
    """met or miss of what was measured; nothing of an arm that failed but its name."""
    lines = [f"miss  {arm}: failed" for arm, found in arms.items() if "error" in found]
    if "start_s" in (found := arms.get("recorded", {})):
        lines.append(
            f"{'met ' if found['compiled'] == 0 else 'miss'}  compilations with the bundle: {found['compiled']}, at most 0"
        )
    if "hits" in (found := arms.get("adopted", {})):
        share = found["hits"] / max(1, found["launches"])
        lines.append(
            f"{'met ' if share >= HIT_SHARE else 'miss'}  adopted launches that hit: {share:.4f}, at least {HIT_SHARE}"
        )
    return lines


def main() -> int:
    """The table, the verdicts and the JSON file; 1 if something is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-1.7b", choices=serve_model.MODELS)
    parser.add_argument("--attention", default="TRITON_ATTN", help="vLLM's attention backend (default: TRITON_ATTN)")
    parser.add_argument("--arms", default=",".join(ARMS), help="default: all; recorded needs record")
    parser.add_argument("--eager", action="store_true", help="no graphs")
    parser.add_argument("--limit", type=float, default=200.0, help="seconds of an engine at most (default: 200)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.engine is not None:
        print("ANSWER " + json.dumps(run(*json.loads(given.engine))), flush=True)
        os._exit(0)  # vLLM's shutdown takes seconds
    folder = Path(tempfile.mkdtemp(prefix="hdispatch-vllm-triton-"))
    arms: dict[str, dict[str, Any]] = {}
    built: dict[str, Any] = {}
    for arm in given.arms.split(","):
        found = arms[arm] = ask(arm, given, folder, folder / "bundle")
        shown = {name: value for name, value in found.items() if name != "kernels"}
        print(
            f"{arm:9}", " ".join(f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items()), flush=True
        )
        if arm == "record" and "error" not in found:
            built = build(folder)
            print(f"build     {built['seconds']:.1f} s, returned {built['returned']}: {built['said'][-600:]}", flush=True)
    said = verdicts(arms)
    print("\n".join(said))
    if given.json is not None:
        options = {"model": given.model, "attention": given.attention, "eager": given.eager}
        given.json.write_text(
            json.dumps({"machine": machine.describe(), "options": options, "arms": arms, "build": built}, indent=1)
        )
    return int(any(line.startswith("miss") for line in said))


if __name__ == "__main__":
    sys.exit(main())

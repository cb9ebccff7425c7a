"""vLLM's server with and without hdispatch, by vLLM's own benchmark: `vllm serve`, then `vllm bench serve` on random tokens.

    python benchmarks/serve_server.py bundle --modes ours,compiled [--model qwen3-8b] [--concurrency 1,8,32] [--json FILE]

Modes are those of `hdispatch bench serve`; "+ngram" after one speculates four tokens from the prompt. Every prompt has 512
tokens, every answer 600. The model has vLLM's dummy weights, the tokenizer is made here: a word for each token. Where packages
that the server needs are missing they are named.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from hdispatch.bench import serve_model
from hdispatch.bench.machine import describe
from hdispatch.bench.serve import MODES
from hdispatch.bench.serve_worker import CAPTURE_SIZES, EngineOptions, environment

INPUT, OUTPUT = 512, 600
#: Modules that the server and its benchmark import besides vLLM's engine.
MODULES = (
    "vllm.entrypoints.cli.serve",
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.benchmarks.serve",
    "uvicorn.protocols.http.httptools_impl",
    "uvicorn.lifespan.on",
)
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")


def missing_packages() -> list[str]:
    """The MODULES that cannot be imported, and why. Each is tried in its own process, as the server would import it."""
    found = []
    for name in MODULES:
        done = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, text=True, check=False)
        if done.returncode:
            found.append(f"{name}: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
    return found


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """A tokenizer whose words are t0, t1, …: what is decoded is encoded to the same tokens."""
    words = {f"t{index}": index for index in range(vocabulary)}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "t0"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "t0", "eos_token": "t2", "model_max_length": 40960}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))


def arguments_of(mode: str, model: Path, port: int, ranks: int) -> list[str]:
    """The command line of `vllm serve` for a mode."""
    graphs, _ = MODES[mode.removesuffix("+ngram")]
    found = [*VLLM, "serve", str(model), "--load-format", "dummy", "--port", str(port), "--max-model-len", "2048"]
    found += ["--no-enable-prefix-caching", "--tensor-parallel-size", str(ranks)]
    if graphs == "none":
        found.append("--enforce-eager")
    elif graphs == "decode":
        config = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": list(CAPTURE_SIZES)}
        found += ["--compilation-config", json.dumps(config)]
    if mode.endswith("+ngram"):
        found += ["--speculative-config", json.dumps(NGRAM)]
    return found


@contextlib.contextmanager
def server(mode: str, model: Path, options: argparse.Namespace, log: Path) -> Iterator[tuple[int, float]]:
    """A server that answers: its port, and the seconds it took to start. RuntimeError with the end of its log if it ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as caches, log.open("wb") as output:
        served = MODES[mode.removesuffix("+ngram")][1]
        setup = EngineOptions(mode, "", served, "", "", str(options.bundle.resolve()), options.ranks, 0, None, 0)
        variables = environment(setup, Path(caches)) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        began = time.monotonic()
        process = subprocess.Popen(
            arguments_of(mode, model, port, options.ranks), stdout=output, stderr=output, env=variables, start_new_session=True
        )
        try:
            wait_until_it_answers(process, port, log, options.limit)
            yield port, time.monotonic() - began
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until_it_answers(process: subprocess.Popen[bytes], port: int, log: Path, limit: float) -> None:
    """Return when the server is healthy; RuntimeError with the end of its log if it is not within `limit` seconds."""
    until = time.monotonic() + limit
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}: {tail(log)}")
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
            return
        time.sleep(0.2)
    raise RuntimeError(f"the server did not answer within {limit:.0f} s: {tail(log)}")


def tail(log: Path) -> str:
    """The end of a log."""
    return log.read_text(errors="replace")[-3000:]


def bench(port: int, model: Path, concurrency: int, prompts: int, folder: Path, limit: float) -> dict[str, Any]:
    """One run of `vllm bench serve`; RuntimeError with what it said if it fails or a request did."""
    sizes = ["--random-input-len", str(INPUT), "--random-output-len", str(OUTPUT), "--num-prompts", str(prompts)]
    command = [*VLLM, "bench", "serve", "--model", str(model), "--base-url", f"http://127.0.0.1:{port}", "--ignore-eos"]
    command += ["--dataset-name", "random", *sizes, "--max-concurrency", str(concurrency), "--num-warmups", str(concurrency)]
    command += ["--save-result", "--result-dir", str(folder), "--result-filename", "bench.json", "--disable-tqdm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
    if done.returncode:
        raise RuntimeError(f"vllm bench serve ended with status {done.returncode}: {(done.stdout + done.stderr)[-3000:]}")
    found: dict[str, Any] = json.loads((folder / "bench.json").read_text())
    if found["completed"] != prompts:
        raise RuntimeError(f"{found['completed']} of {prompts} requests were answered")
    names = ("total_token_throughput", "output_throughput", "mean_ttft_ms", "median_ttft_ms", "mean_tpot_ms", "median_tpot_ms")
    return {name: found[name] for name in names}


def measure(mode: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Start-up and the figures of each concurrency."""
    found: dict[str, Any] = {"start_s": None, "concurrency": {}}
    log = (options.logs or folder) / f"server-{mode}.log"
    with server(mode, folder, options, log) as (port, seconds):
        found["start_s"] = seconds
        for concurrency in options.concurrency:
            prompts = max(4, options.prompts * concurrency)
            figures = bench(port, folder, concurrency, prompts, folder, options.limit)
            found["concurrency"][str(concurrency)] = figures
            print(
                f"{mode:16} {concurrency:4} at once: {figures['total_token_throughput']:8.0f} tokens/s, "
                f"TTFT {figures['median_ttft_ms']:7.1f} ms, TPOT {figures['median_tpot_ms']:6.2f} ms",
                flush=True,
            )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the modes one after the other; 1 if one did not run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--modes", default="compiled,ours", type=lambda text: text.split(","))
    parser.add_argument("--model", default="qwen3-8b", choices=serve_model.MODELS)
    parser.add_argument("--scheme", default="token", choices=serve_model.SCHEMES)
    parser.add_argument("--concurrency", default="1,8,32", type=lambda text: [int(each) for each in text.split(",")])
    parser.add_argument("--prompts", default=3, type=int, help="of each request at once (default: 3)")
    parser.add_argument("--ranks", default=1, type=int)
    parser.add_argument("--limit", default=300, type=float, help="most seconds of a start and of a run (default: 300)")
    parser.add_argument("--logs", type=Path, help="folder for the servers' logs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    known = [mode for mode in MODES if mode != "override"]  # that one is called in process
    unknown = [mode for mode in options.modes if mode.removesuffix("+ngram") not in known]
    if unknown:
        parser.error(f"no mode {', '.join(unknown)}; there are {', '.join(known)}, each also with +ngram")
    missing = missing_packages()
    if missing:
        print("the server cannot run here:", *missing, sep="\n  ")
        return 1
    if options.logs:
        options.logs.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else None
    result: dict[str, Any] = {"machine": describe(device), "model": options.model, "scheme": options.scheme}
    result |= {"modes": {}, "failed": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        serve_model.write_config(folder, options.model, options.scheme)
        write_tokenizer(folder, serve_model.MODELS[options.model].vocabulary)
        for mode in options.modes:
            try:
                result["modes"][mode] = measure(mode, options, folder)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                result["failed"][mode] = str(error)
                print(f"{mode} did not run: {error}", flush=True)
            if options.json:
                options.json.write_text(json.dumps(result, indent=1))
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())

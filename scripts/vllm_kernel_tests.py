#!/usr/bin/env python3
"""Run vLLM's own tests of the overridden ops on vLLM's kernels and under the override of a bundle, and compare.

usage: vllm_kernel_tests.py run BUNDLE TESTS [--json FILE] [--logs DIR] …     on a GPU, where vLLM can be imported
       vllm_kernel_tests.py pack SDIST ARCHIVE      the tests, from vLLM's source distribution (vllm-0.33.0.tar.gz)

TESTS is the unpacked ARCHIVE. Of each file a fixed random sample runs, with the file's own tolerances, a process a file. A
test that fails either way is not ours; one that fails under the override alone is, and the exit status is 1 then, or where
a run was cut short. Of each op: its calls in those tests, those that a launch served, and why not the others.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: The files whose tests call overridden ops -> which of their tests, as pytest's -k; the others call ops that vLLM keeps.
FILES = {
    "core/test_activation.py": "(silu_and_mul and not clamp) or moe_activation or swiglu_limit",
    "core/test_batched_weight_rms_norm.py": "",
    "core/test_fused_qk_norm_rope.py": "",
    "core/test_fused_quant_layernorm.py": "",
    "core/test_fused_silu_mul_block_quant.py": "",
    "core/test_layernorm.py": "",
    "core/test_pos_encoding.py": "not module_cache",
    "core/test_rotary_embedding.py": "",
    "ir/test_layernorm.py": "test_impls or opcheck",
    "quantization/test_block_fp8.py": "per_token_group or cutlass",
    "quantization/test_cutlass_scaled_mm.py": "not azp and not group_gemm and not int8_gemm_m_sweep and not support_opcheck",
    "quantization/test_fp8_quant.py": "",
    "quantization/test_fp8_quant_group.py": "",
    "quantization/test_per_token_group_quant.py": "not int8",
    "test_fused_quant_activation.py": "",
}
#: Modules that those files import from vLLM's tests, and the files themselves.
PACKED = [
    *("__init__.py", "ir/ir_test_utils.py", "kernels/__init__.py", "kernels/allclose_default.py"),
    *("kernels/quant_utils.py", "kernels/utils.py"),
    *(f"kernels/{name}" for name in FILES),
]
VLLM = "0.33.0"
OUTCOMES = ("passed", "failed", "skipped")
PLUGIN = "vllm_kernel_tests_plugin"


def pack(sdist: Path, archive: Path) -> None:
    """Write `archive`, a tar.xz with tests/, from the source distribution."""
    with tarfile.open(sdist) as source:
        top, files = source.getnames()[0].partition("/")[0], {}
        for name in PACKED:
            content = source.extractfile(f"{top}/tests/{name}") if f"{top}/tests/{name}" in source.getnames() else None
            if content is None:
                raise SystemExit(f"{sdist}: no file {top}/tests/{name}; expected the source distribution of vLLM {VLLM}")
            files[f"tests/{name}"] = content.read()
    with tarfile.open(archive, "w:xz") as target:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            target.addfile(entry, io.BytesIO(data))


@dataclass
class Run:
    """Results of the tests of one file. `ended` says how pytest did, `stopped`: by the time limit; `log` is its output."""

    outcomes: dict[str, str] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    ops: dict[str, dict[str, Any]] = field(default_factory=dict)
    collected: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    ended: str = ""
    stopped: bool = False
    seconds: float = 0.0
    log: Path | None = None

    def read(self, records: Path) -> None:
        """Take the lines that the plugin wrote; in a process that died by itself, the test that it was in has failed."""
        started = ""
        for line in records.read_text().splitlines() if records.exists() else ():
            record = json.loads(line)
            if "started" in record:
                started = record["started"]
            elif "collected" in record:
                self.collected, self.refused = record["collected"], record["refused"]
            else:
                self._add(record)
                started = ""
        if started and not self.stopped:
            self.outcomes[started] = "failed"
            self.messages[started] = f"the process ended in it: {self.ended}"

    def _add(self, record: dict[str, Any]) -> None:
        name = record["test"]
        self.outcomes[name] = record["outcome"]
        if record["message"]:
            self.messages[name] = record["message"]
        for op, counters in record["ops"].items():
            total = self.ops.setdefault(op, {"hits": 0, "empty": 0, "misses": {}})
            total["hits"] += counters["hits"]
            total["empty"] += counters["empty"]
            for reason, count in counters["misses"].items():
                total["misses"][reason] = total["misses"].get(reason, 0) + count

    def counts(self) -> dict[str, int]:
        """Tests by outcome; "not run" are those that the end of the process left out."""
        found = Counter(self.outcomes.values())
        return {**{outcome: found[outcome] for outcome in OUTCOMES}, "not run": len(self.collected) - len(self.outcomes)}


def run_file(name: str, bundle: Path | None, options: argparse.Namespace, deadline: float) -> Run:
    """One process of pytest on one file."""
    stem = f"{name.removesuffix('.py').replace('/', '-')}-{'override' if bundle else 'vllm'}"
    records, log = options.logs / f"{stem}.jsonl", options.logs / f"{stem}.log"
    records.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", f"tests/kernels/{name}", "-q", "--tb=short", "-p", "no:cacheprovider"]
    command += ["--noconftest", "--rootdir=.", "-o", "addopts=", "-p", PLUGIN]
    command += ["--records", str(records), "--sample", str(options.sample)]
    command += ["--bundle", str(bundle)] if bundle else []
    command += ["-k", FILES[name]] if FILES[name] else []
    path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH")]))
    threads = str(max((os.cpu_count() or 1) // options.jobs, 1))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": threads, "TORCHINDUCTOR_COMPILE_THREADS": threads}
    run, start = Run(log=log), time.monotonic()
    limit = max(min(options.timeout, deadline - start), 1.0)
    with log.open("w") as output:
        try:
            done = subprocess.run(
                command, cwd=options.tests, env=environment, stdout=output, stderr=output, timeout=limit, check=False
            )
            run.ended = f"exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            run.ended, run.stopped = f"stopped after {limit:.0f} s", True
    run.seconds = time.monotonic() - start
    run.read(records)
    return run


def ours(plain: Run, overridden: Run) -> list[str]:
    """The tests that pass on vLLM's kernels, and under the override ran and did not."""
    return [
        name for name, outcome in overridden.outcomes.items() if outcome != "passed" and plain.outcomes.get(name) == "passed"
    ]


def gaps(plain: Run, overridden: Run) -> str | None:
    """Why the comparison of a file says less than it should; None if it does not."""
    for kind, run in (("on vLLM's kernels", plain), ("under the override", overridden)):
        if run.counts()["not run"] or not run.collected:
            return f"{len(run.outcomes)} of {len(run.collected)} tests ran {kind}: {run.ended}"
    return None if plain.counts()["passed"] else "no test passes on vLLM's kernels"


def total(runs: list[Run]) -> dict[str, dict[str, Any]]:
    """The counters of the ops over all files."""
    sums = Run()
    for run in runs:
        sums._add({"test": "", "outcome": "", "message": "", "ops": run.ops})
    return dict(sorted(sums.ops.items()))


def print_files(pairs: dict[str, tuple[Run, Run]]) -> None:
    """A line a file: outcomes on vLLM's kernels and under the override."""
    print(f"{'tests: passed / failed / skipped / not run':44} {'vLLM':>18} {'override':>18}  only ours fail")
    for name, pair in pairs.items():
        columns = ["/".join(str(count) for count in run.counts().values()) for run in pair]
        seconds = " and ".join(f"{run.seconds:.0f}" for run in pair)
        print(f"{name:44} {columns[0]:>18} {columns[1]:>18}  {len(ours(*pair)):14}  {seconds} s")
        for op, reason in pair[1].refused.items():
            print(f"    {op} was not overridden: {reason}")


def print_ops(ops: dict[str, dict[str, Any]]) -> None:
    """Calls, served ones and the misses of each op by reason."""
    print(f"\n{'op':38} {'calls':>7} {'served':>7} {'missed':>7}  (calls without rows count as served)")
    for op, counters in ops.items():
        served, missed = counters["hits"] + counters["empty"], sum(counters["misses"].values())
        print(f"{op:38} {served + missed:7} {served:7} {missed:7}")
        for reason, count in sorted(counters["misses"].items(), key=lambda item: -item[1]):
            print(f"{'':38} {'':15} {count:7}  {reason}")


def print_failures(pairs: dict[str, tuple[Run, Run]]) -> None:
    """The tests that fail under the override alone, and how many fail either way."""
    for plain, overridden in pairs.values():
        for name in ours(plain, overridden):
            print(f"\nFAILED under the override alone: {name}\n{overridden.messages.get(name, overridden.ended)}")
    both = [n for plain, _ in pairs.values() for n, outcome in plain.outcomes.items() if outcome == "failed"]
    print(f"\n{len(both)} tests fail on vLLM's own kernels")
    for name in both[:20]:
        print(f"    {name}")


def print_gaps(incomplete: dict[str, str], pairs: dict[str, tuple[Run, Run]]) -> None:
    """Gaps of the comparison, and the end of pytest's output where it did not finish."""
    for name, why in incomplete.items():
        print(f"\nINCOMPLETE: {name}: {why}")
        for run in pairs[name]:
            if run.log and run.ended not in ("exit status 0", "exit status 1"):
                print("\n".join(f"    {line}" for line in run.log.read_text(errors="replace").splitlines()[-15:]))


def run_all(options: argparse.Namespace) -> int:
    """Both runs of every file, some at a time; the report. The exit status."""
    options.logs.mkdir(parents=True, exist_ok=True)
    options.logs = options.logs.resolve()
    deadline = time.monotonic() + options.limit
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = {
            name: [pool.submit(run_file, name, bundle, options, deadline) for bundle in (None, options.bundle.resolve())]
            for name in options.files or FILES
        }
        pairs = {name: (plain.result(), overridden.result()) for name, (plain, overridden) in futures.items()}
    ops = total([overridden for _, overridden in pairs.values()])
    print_files(pairs)
    print_ops(ops)
    print_failures(pairs)
    incomplete = {name: why for name, pair in pairs.items() if (why := gaps(*pair))}
    print_gaps(incomplete, pairs)
    failures = {name: ours(*pair) for name, pair in pairs.items()}
    if options.json:
        files = {
            name: {
                "vllm": plain.counts(),
                "override": overridden.counts(),
                "ops": overridden.ops,
                "ours": failures[name],
                "incomplete": incomplete.get(name),
            }
            for name, (plain, overridden) in pairs.items()
        }
        result = {"vllm": VLLM, "sample": options.sample, "files": files, "ops": ops}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if any(failures.values()) or incomplete or not any(c["hits"] for c in ops.values()) else 0


def main() -> int:
    """Pack the tests, or run them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    packing = actions.add_parser("pack", help="make the archive of the tests")
    packing.add_argument("sdist", type=Path)
    packing.add_argument("archive", type=Path)
    running = actions.add_parser("run", help="run them on vLLM's kernels and under the override")
    running.add_argument("bundle", type=Path)
    running.add_argument("tests", type=Path, help="the folder that holds tests/")
    running.add_argument("--json", type=Path, help="write counts here")
    running.add_argument("--logs", type=Path, default=Path("vllm-kernel-tests"), help="pytest's output and lines a test")
    running.add_argument("--sample", type=int, default=100, help="tests of a file at most; 0 for all (default: 100)")
    running.add_argument("--timeout", type=float, default=180.0, help="seconds for a file (default: 180)")
    running.add_argument("--limit", type=float, default=330.0, help="seconds for all of it (default: 330)")
    running.add_argument("--jobs", type=int, default=10, help="processes at a time (default: 10)")
    running.add_argument("--files", nargs="+", choices=list(FILES), metavar="FILE", help="only these")
    options = parser.parse_args()
    if options.action == "pack":
        pack(options.sdist, options.archive)
        return 0
    return run_all(options)


if __name__ == "__main__":
    sys.exit(main())

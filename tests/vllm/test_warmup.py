"""vLLM's warm-up registry as the source of a recording: no GPU, vLLM's own kernels, its registry and its compile keys."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hdispatch import recording
from hdispatch.bundle_reader import read_bundle

#: vLLM's wheel without its binaries, which importing its CUDA platform asks for.
BINARIES = """
import sys, types
for name in ("_C", "_C_stable_libtorch", "_moe_C", "_moe_C_stable_libtorch"):
    sys.modules["vllm." + name] = types.ModuleType("vllm." + name)
"""
SCRIPT = """
from vllm.model_executor.warmup.jit_warmup import VllmJitKernel
from vllm.v1.sample.rejection_sampler import _expand
from vllm.v1.worker.block_table import _COMPUTE_SLOT_MAPPING_KERNEL

class Broken(VllmJitKernel):
    def get_warmup_keys(self):
        raise RuntimeError("no keys here")
    def compile(self, compile_key): ...

_COMPUTE_SLOT_MAPPING_KERNEL.register_warmup(
    kv_cache_block_size=16, total_cp_world_size=1, total_cp_rank=0, cp_kv_cache_interleave_size=1, block_table_stride=256
)
if len(__import__("sys").argv) > 1:
    Broken().register_warmup()
_expand.register_warmup()
"""


@pytest.fixture
def project(environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    (tmp_path / "sitecustomize.py").write_text(BINARIES)
    (tmp_path / "register.py").write_text(SCRIPT)
    paths = os.pathsep.join([str(tmp_path), environment["PYTHONPATH"]])
    plain = {key: value for key, value in environment.items() if not key.startswith("HDISPATCH")}
    return {**plain, "PYTHONPATH": paths, "TRITON_CACHE_DIR": str(tmp_path / "triton")}


def hdispatch(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hdispatch", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_what_vllm_registers_is_recorded_and_built(project: dict[str, str], tmp_path: Path) -> None:
    script, file = str(tmp_path / "register.py"), str(tmp_path / "r.jsonl")
    done = hdispatch(project, "record", "--out", file, "--vllm-warmup", script, "--target", "h100")
    assert done.returncode == 0, done.stderr
    assert "vLLM's warm-up for NVIDIA H100 80GB HBM3: 2 kernels compiled" in done.stdout
    _, found = recording.read([file])
    names = {f"{line['module']}.{line['qualname']}" for line in found}
    slots, expand = (
        "vllm.v1.worker.block_table.ComputeSlotMappingKernel.kernel",
        "vllm.v1.sample.rejection_sampler.expand_kernel",
    )
    assert names == {slots, expand}
    assert {line["capability"] for line in found} == {90}
    built = hdispatch(project, "build", "--record", file, "--target", "h100", "--out", str(tmp_path / "b"), "--jobs", "1",
                      "--cache", str(tmp_path / "cache"))  # fmt: skip
    assert built.returncode == 0, built.stderr
    manifest, _ = read_bundle(tmp_path / "b")
    assert {entry["kernel"] for entry in manifest["recorded"]} == names
    assert len(manifest["recorded"]) == len(found)


def test_a_kernel_whose_warm_up_fails_is_named_and_the_others_are_recorded(project: dict[str, str], tmp_path: Path) -> None:
    script, file = str(tmp_path / "register.py"), str(tmp_path / "r.jsonl")
    done = hdispatch(project, "record", "--out", file, "--vllm-warmup", script, "--target", "b200", "--", "broken")
    assert done.returncode == 1
    assert "not compiled: Broken: RuntimeError: no keys here" in done.stderr
    _, found = recording.read([file])
    assert {line["qualname"] for line in found} == {"ComputeSlotMappingKernel.kernel", "expand_kernel"}
    assert {line["capability"] for line in found} == {100}


def test_a_script_that_registers_nothing_is_refused(project: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "nothing.py").write_text("")
    done = hdispatch(
        project, "record", "--out", str(tmp_path / "r.jsonl"), "--vllm-warmup", str(tmp_path / "nothing.py"), "--target", "h100"
    )
    assert done.returncode == 1
    assert "nothing.py: registered no kernel; call register_warmup(...) of some" in done.stderr

"""DeepGEMM as a peer, with a stand-in package: what it is given, that a wrong result has no time, and what leaves it out."""

from __future__ import annotations

import os
import random
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import hdispatch
import pytest
import torch
from hdispatch.errors import HdispatchError
from hdispatch.testing.numeric import MismatchError
from ops_results import cell, result

from benchmarks.ops import deep_gemm, peers
from benchmarks.ops import run as ops
from benchmarks.ops import timing as ops_timing
from benchmarks.ops.deep_gemm import OP, DeepGemm

CPU = torch.device("cpu")
#: Multiplies what it finds where DeepGEMM looks for it, and refuses other layouts, as DeepGEMM does.
STAND_IN = """
import torch
__version__ = "2.8.1"
calls, pdl, wrong = [], [], []

def set_pdl(on):
    pdl.append(on)

def fp8_gemm_nt(a, b, d, c=None, disable_ue8m0_cast=False):
    (x, sx), (w, sw) = a, b
    (m, k), n = x.shape, w.shape[0]
    assert x.is_contiguous() and w.is_contiguous() and w.shape == (n, k) and d.shape == (m, n) and d.is_contiguous()
    assert d.dtype == torch.bfloat16 and sx.dtype == sw.dtype == torch.float32
    assert sx.shape == (m, k // 128) and sx.stride() == (1, (m + 3) // 4 * 4), sx.stride()
    assert sw.shape == (-(-n // 128), k // 128) and sw.is_contiguous(), sw.stride()
    calls.append((a, b, d, disable_ue8m0_cast))
    left = x.float() * sx.repeat_interleave(128, 1)
    right = w.float() * sw.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)
    d.copy_(left @ right.t())
    if wrong:
        d[-1, -1] += 1 + d[-1, -1].abs()
"""


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(deep_gemm.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "deep_gemm", None)  # restored afterwards
    folder = tmp_path / "deep_gemm"
    folder.mkdir()
    (folder / "__init__.py").write_text(STAND_IN)
    return folder


def arguments(m: int, k: int = 384, n: int = 320, dtype: torch.dtype = torch.bfloat16) -> list:
    spec = hdispatch.registry.spec(OP)
    variant = next(each for each in spec.variants() if each.dtypes["out"] == dtype)
    sampled = spec.sample(variant, {"M": m, "K": k, "N": n}, CPU, torch.Generator().manual_seed(m))
    return peers.arrange(spec, sampled)


@pytest.mark.parametrize("m", [1, 3, 4, 5, 130])
@pytest.mark.parametrize("ue8m0", [False, True])
def test_it_is_called_as_vllm_calls_it(package, m, ue8m0):
    """Layouts are what the stand-in asserts; here: the same matrices, and whose scales."""
    peer, given = DeepGemm(package), arguments(m)
    bound = (peer.bind_ue8m0 if ue8m0 else peer.bind)(OP, given)
    assert bound is not None
    standin = sys.modules["deep_gemm"]
    ((x, sx), (w, sw), out, disabled), *more = standin.calls
    assert not more
    assert standin.pdl == [True]
    assert disabled is not ue8m0
    assert [x.data_ptr(), w.data_ptr(), out.data_ptr()] == [given[1].data_ptr(), given[2].data_ptr(), given[0].data_ptr()]
    for mine, theirs in ((sx, given[3]), (sw, given[4].t())):
        assert torch.equal(mine, deep_gemm.powers_of_two(theirs.contiguous()) if ue8m0 else theirs)
    call, bound_arguments = bound
    given[0].fill_(0)
    call(*bound_arguments)  # what is timed
    assert len(standin.calls) == 2
    assert given[0].any()


def test_powers_of_two_are_rounded_up():
    scales = torch.tensor([[1.0, 1.0000001, 0.75, 2.0, 3e-4, 2**-20]])
    wanted = torch.tensor([[1.0, 2.0, 1.0, 2.0, 2**-11, 2**-20]])
    assert torch.equal(deep_gemm.powers_of_two(scales), wanted)
    columns = torch.rand(3, 5).add_(0.01).t()
    found = deep_gemm.powers_of_two(columns)
    assert found.stride() == columns.stride()
    assert torch.equal(found, torch.exp2(torch.ceil(torch.log2(columns))))


def test_a_wrong_result_has_no_time(package, monkeypatch):
    peer = DeepGemm(package)
    sys.modules["deep_gemm"].wrong.append(True)
    with pytest.raises(MismatchError, match=r"1 of .* elements"):
        peer.bind(OP, arguments(5))
    monkeypatch.setattr(ops_timing, "make_arguments", lambda *_: arguments(5))
    binders = {peers.DEEP_GEMM: peer.bind, peers.DEEP_GEMM_UE8M0: peer.bind_ue8m0}
    found = ops_timing.measure(cell(OP, m=5), binders, CPU, 1, random.Random(0))
    assert not found.timings
    assert [each["path"] for each in found.failures] == list(binders)


def test_what_vllm_gives_to_others_is_not_its(package):
    peer = DeepGemm(package)
    assert peer.bind("scaled_mm", []) is None
    assert peer.bind_ue8m0("rms_norm", []) is None
    for given in (arguments(2, k=144), arguments(2, n=96), arguments(2, dtype=torch.float16)):
        assert peer.bind(OP, given) is None
        assert peer.bind_ue8m0(OP, given) is None
    assert not sys.modules["deep_gemm"].calls


@pytest.mark.parametrize(("text", "reason"), [("assert 0, 'no nvcc'", "AssertionError: no nvcc"), (None, "has no __init__.py")])
def test_a_package_that_cannot_be_imported_says_why(package, text, reason):
    (package / "__init__.py").unlink()
    if text:
        (package / "__init__.py").write_text(text)
    with pytest.raises(HdispatchError, match=f"--deep-gemm .*{reason}"):
        DeepGemm(package)
    assert sys.modules.get("deep_gemm") is None


def test_its_kernels_lie_in_a_folder_of_their_own(package, monkeypatch):
    monkeypatch.delenv(deep_gemm.CACHE_VARIABLE)
    peer = DeepGemm(package)
    folder = Path(os.environ[deep_gemm.CACHE_VARIABLE])
    assert folder.is_dir()
    del peer
    monkeypatch.delenv(deep_gemm.CACHE_VARIABLE)
    assert not folder.exists()


# ---- a run ----


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A run of the op without a GPU; gives the options, the paths of each cell, the cells that are compiled before."""
    seen = SimpleNamespace(options=ops.Options(tmp_path, ops=(OP,), ms=(1,), models=("8B",), compile_ms=(), eager=False))
    seen.paths, seen.compiled = [], []

    def compile_cells(cells, processes, deadline, lock, tick, call):
        assert not seen.paths, "before anything is timed"
        assert lock is None
        assert time.monotonic() < deadline
        seen.compiled += cells
        return deep_gemm.compiled.Compiled(list(cells), [0.0] * len(cells))

    def measure(each, binders, *_):
        seen.paths.append(tuple(binders))
        return ops_timing.Measured()

    bundle = SimpleNamespace(
        manifest={"ops": {OP: {}}, "target": {"name": "h200"}, "records": [], "tools": {}}, rows=7, unload=lambda: None
    )
    monkeypatch.setattr(ops, "require_gpu", lambda: CPU)
    monkeypatch.setattr(ops.machine, "describe", lambda _: result()["machine"])
    monkeypatch.setattr(ops.runtime, "load", lambda *_, **__: bundle)
    monkeypatch.setattr(ops, "copy_bandwidth", lambda _: 4e12)
    monkeypatch.setattr(ops, "measure", measure)
    monkeypatch.setattr(deep_gemm.compiled, "compile_cells", compile_cells)
    return seen


def test_a_run_with_it(run, package):
    found = ops.run(replace(run.options, deep_gemm=package))
    assert {(each["label"], each["mode"]) for each in run.compiled} == {
        (label, mode) for label in ("qkv", "out", "gate_up", "down") for mode in ("warm", "rotated")
    }
    assert all({peers.DEEP_GEMM, peers.DEEP_GEMM_UE8M0} <= set(paths) for paths in run.paths)
    assert len(run.paths) == 8
    assert found["machine"]["deep_gemm"] == "2.8.1"
    assert not any("DeepGEMM" in what for what in found["skipped"])


def test_a_run_without_it_says_so(run, tmp_path):
    name = f"{peers.DEEP_GEMM}, {peers.DEEP_GEMM_UE8M0}"
    assert "--deep-gemm PATH" in ops.run(run.options)["skipped"][name]
    found = ops.run(replace(run.options, deep_gemm=tmp_path))
    assert "has no __init__.py" in found["skipped"][name]
    assert found["machine"]["deep_gemm"] is None
    assert not run.compiled
    assert not any(peers.DEEP_GEMM in paths for paths in run.paths)

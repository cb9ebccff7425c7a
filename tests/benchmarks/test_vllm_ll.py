"""vLLM's low-latency GEMMs as peers: what their functions are given, and how their library is made. No GPU, no vLLM, no DSL."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hdispatch.cli.main import main
from hdispatch.compile import ffi_link
from hdispatch.errors import BuildError, HdispatchError
from ops_results import sample_few as sample

from benchmarks.ops import peers, vllm_ll, vllm_ll_build

BF16, FP8 = "ll_gemm_bf16", "ll_gemm_fp8"


# ---- vLLM's library ----

FUNCTIONS = """
#include <stdint.h>
typedef struct { int32_t type; uint32_t zero; int64_t value; } Any;
typedef struct { void* data; int32_t device_type, device; int32_t ndim; uint8_t code, bits; uint16_t lanes;
                 int64_t *shape, *strides; uint64_t offset; } Tensor;
void TVMFFIErrorSetRaisedFromCStr(const char* kind, const char* message);
int32_t count;
struct { int64_t type, value, rest[8]; } seen[8];

static int record(const Any* args, int32_t n) {
  count = n;
  for (int i = 0; i < n; ++i) {
    seen[i].type = args[i].type, seen[i].value = args[i].value;
    if (args[i].type != 7) continue;
    const Tensor* t = (const Tensor*)(intptr_t)args[i].value;
    const int64_t all[8] = {t->device_type, t->ndim, t->code, t->bits, t->lanes, t->shape[0], t->shape[1], t->strides[0]};
    seen[i].value = (int64_t)(intptr_t)t->data;
    for (int at = 0; at < 8; ++at) seen[i].rest[at] = all[at];
  }
  return 0;
}
#define FUNCTION(name) \\
  int __tvm_ffi_vllm_##name(void* self, const Any* args, int32_t n, Any* result) { return record(args, n); }
FUNCTION(dotprod_float32_m3_k64_n32)
FUNCTION(splitk_bfloat16_m3_k64_n32)
FUNCTION(skinny_bfloat16_m3_k64_n32)
int __tvm_ffi_vllm_dotprod_bfloat16_m1_k64_n32(void* self, const Any* args, int32_t n, Any* result) {
  TVMFFIErrorSetRaisedFromCStr("ValueError", "one is too few");
  return -1;
}
"""


class Seen(ctypes.Structure):
    """What the functions note of an argument."""

    _fields_ = (("type", ctypes.c_int64), ("value", ctypes.c_int64), ("rest", ctypes.c_int64 * 8))


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A library of functions that note their arguments, with the shim that is in real ones."""
    folder = tmp_path_factory.mktemp("vllm_ll")
    (folder / "functions.c").write_text(FUNCTIONS)
    try:
        cc = ffi_link.compiler()
    except BuildError as error:
        pytest.skip(str(error))
    library = folder / "ll.so"
    command = [*cc, "-shared", "-fPIC", "-std=c11", str(folder / "functions.c"), str(ffi_link.SHIM), "-o", str(library), "-ldl"]
    subprocess.run([*command, "-lpthread"], check=True)
    return library


def noted(library: Path) -> list[tuple[int, int, list[int]]]:
    opened = ctypes.CDLL(str(library))
    count = ctypes.c_int32.in_dll(opened, "count").value
    return [(each.type, each.value, list(each.rest)) for each in (Seen * 8).in_dll(opened, "seen")[:count]]


def test_functions_are_given_what_vllm_gives_them(built, monkeypatch):
    monkeypatch.setattr(vllm_ll, "_current_stream", lambda _: 0x1234)
    library = vllm_ll.Library(built)
    arguments = out, x, w = sample(BF16)
    tensors = {
        tensor.data_ptr(): [1, 2, 4, 16, 1, *tensor.shape, tensor.stride(0)] for tensor in arguments
    }  # bfloat16 on the CPU

    def given(bound: peers.Bound, result: torch.Tensor = out) -> list[tuple[int, int]]:
        bound[0](*bound[1])
        found = noted(built)
        assert all(rest == tensors[value] for kind, value, rest in found if kind == 7 and value != result.data_ptr())
        return [(kind, value) for kind, value, _ in found]

    matrices = [(7, x.data_ptr()), (7, w.data_ptr())]
    stream, result = (4, 0x1234), (7, out.data_ptr())
    one = int.from_bytes(bytes(ctypes.c_double(1.0)), "little")
    assert given(library.bind_ll_bf16(BF16, arguments)) == [*matrices, result, stream, (3, one)]
    assert given(library.bind_skinny(BF16, arguments)) == [*matrices, result, result, stream]
    wide = torch.empty(3, 32)
    assert given(library.bind_ll_bf16(BF16, [wide, x, w]), wide) == [*matrices, (7, wide.data_ptr()), (1, 32), stream]
    assert noted(built)[2][2] == [1, 2, 2, 32, 1, 3, 32, 32]


def test_what_vllm_does_not_serve_and_what_the_library_lacks(built):
    library = vllm_ll.Library(built)
    assert library.bind_ll_bf16("scaled_mm", []) is None
    assert library.bind_skinny(FP8, []) is None
    assert library.bind_skinny(BF16, sample(BF16, m=17)) is None
    assert library.bind_skinny(BF16, sample(BF16, variant="float32")) is None
    with pytest.raises(HdispatchError, match="has no dotprod or splitk for M=4, K=1000, N=32 and bfloat16"):
        library.bind_ll_bf16(BF16, sample(BF16, m=4, k=1000))
    call, _ = library.bind_ll_bf16(BF16, sample(BF16, m=1))
    with pytest.raises(HdispatchError, match=r"vllm_dotprod_bfloat16_m1_k64_n32: ValueError: one is too few"):
        call()


def test_a_library_that_is_none(tmp_path):
    (tmp_path / "x.so").write_text("no library")
    with pytest.raises(HdispatchError, match=r"--vllm-ll .*x\.so: .*--make-vllm-ll makes one"):
        vllm_ll.Library(tmp_path / "x.so")


# ---- making it ----

LL_BF16 = """
import torch
from types import SimpleNamespace
from vllm.platforms import current_platform
from vllm.utils.torch_utils import current_stream
from quack.compile_utils import make_fake_tensor
from .compiled import Compiled

class Gemm:
    def __init__(self, tag):
        self.tag, self._compiled_cache, self._splitk_cache = tag, {}, {}
    def dispatch(self, *, M, K, N, output_dtype):
        assert current_platform.is_device_capability(90) and not current_platform.is_device_capability_family(100)
        assert current_platform.is_arch_support_pdl() and current_stream().cuda_stream == 0
        form = "dotprod" if M <= 4 and K != 2047 else "splitk"
        return SimpleNamespace(backend=form, M=M, K=K, bs=128, split_k=6, num_stages=4, output_dtype=output_dtype)
    def compile(self, key):
        self._compiled_cache[key.M, key.K, key.bs, key.output_dtype] = Compiled(self.tag)
        self._splitk_cache[key.split_k, key.num_stages, key.output_dtype] = Compiled("split")

ll_bf16_gemm_kernel, ll_bf16_gemm_c1_pdl_kernel = Gemm("dot"), Gemm("dot, prefetched")
"""
SKINNY = """
from types import SimpleNamespace
from .compiled import Compiled

class Skinny:
    _compiled = {}
    def _config(self, m, n, k):
        return Config(m)
    def _compile(self, dtype, config, has_residual):
        self._compiled[dtype, config, has_residual] = Compiled("skinny")

class Config(int):
    block_size, vector_width, outputs_per_block = 64, 8, 2

shape_dynamic_skinny_gemm = Skinny()
"""
COMPILED = """
from pathlib import Path

class Compiled:
    def __init__(self, what):
        self.what = what
    def export_to_c(self, file, function_name):
        Path(file).write_text(self.what)
"""


@pytest.fixture
def vllm(tmp_path, monkeypatch) -> Path:
    """A vLLM that compiles nothing, in the place of site-packages."""
    folder = tmp_path / "vllm" / vllm_ll_build.SOURCES
    folder.mkdir(parents=True)
    for name, text in (("ll_bf16", LL_BF16), ("skinny_gemm", SKINNY), ("compiled", COMPILED)):
        (folder / f"{name}.py").write_text(text)
    monkeypatch.setattr(ffi_link, "runtime_archive", lambda: tmp_path)
    monkeypatch.setattr(ffi_link, "link", lambda objects: repr(sorted(objects.items())).encode())
    monkeypatch.setenv("CUTE_DSL_ARCH", "sm_90a")  # put back after the test
    return tmp_path


def test_every_size_is_compiled_as_vllm_would(vllm, capsys):
    before = set(sys.modules)
    library = vllm / "ll.so"
    assert main(["bench", "ops", "--make-vllm-ll", str(vllm), "--vllm-ll", str(library)]) == 0
    assert {
        name for name in set(sys.modules) - before if "vllm_cute" in name or name.split(".")[0] in ("vllm", "quack")
    } == set()
    functions = dict(eval(library.read_text()))
    assert f"{len(functions)} functions" in capsys.readouterr().out
    assert len(functions) == 4 * (2 * 6 + 5)
    assert functions["vllm_dotprod_bfloat16_m1_k7168_n256"] == b"dot, prefetched"
    assert functions["vllm_dotprod_float32_m2_k7168_n256"] == b"dot"
    assert functions["vllm_splitk_bfloat16_m32_k2048_n64"] == b"split"
    assert functions["vllm_skinny_bfloat16_m16_k5120_n160"] == b"skinny"
    assert not [name for name in functions if "skinny" in name and ("float32" in name or "m32" in name)]


def test_split_k_is_never_asked_for_where_it_hangs(vllm, monkeypatch):
    monkeypatch.setattr(vllm_ll_build, "sizes", lambda: [vllm_ll_build._Size(torch.bfloat16, 8, 1000, 64)])
    with pytest.raises(HdispatchError, match="which hangs below K=2048"):
        vllm_ll_build.make(vllm, vllm / "ll.so")
    assert not (vllm / "ll.so").exists()


def test_what_making_needs(vllm, monkeypatch, capsys):
    with pytest.raises(HdispatchError, match="name the folder of a vLLM"):
        vllm_ll_build.make(vllm / "vllm" / "model_executor", vllm / "ll.so")
    monkeypatch.setattr(ffi_link, "runtime_archive", lambda: None)
    with pytest.raises(HdispatchError, match="needs the CuteDSL"):
        vllm_ll_build.make(vllm, vllm / "ll.so")
    assert main(["bench", "ops", "--make-vllm-ll", str(vllm)]) == 1
    assert "name one" in capsys.readouterr().err
    assert main(["bench", "ops", "--vllm-ll", str(vllm / "none.so")]) == 1
    assert "is not a file; --make-vllm-ll makes one" in capsys.readouterr().err

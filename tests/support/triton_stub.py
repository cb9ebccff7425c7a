"""Triton on a machine without a GPU: its own compiler and its own launcher in C, over a libcuda that records launches.

So what Triton specializes on, compiles and passes to the driver is the real thing; only the driver is not. The library is
built once into a folder of the temporary ones; tensors are those of the CPU, whose addresses the stub says the GPU can read.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

SOURCE = r"""
#include <stdint.h>
#include <string.h>
#include <stdlib.h>
typedef struct { uint32_t grid[3], block[3], shared; void* stream; const void* attributes; uint32_t count; } Config;
typedef struct { uint32_t id; char pad[4]; char value[64]; } Attribute;
typedef struct { char name[256]; } Function;
struct Launch { Config config; Attribute attributes[8]; uint64_t params[64][2]; char name[256]; };
struct Launch hd_last; int hd_launches; int hd_param_count; int hd_param_bytes[64]; int hd_fail;
int cuInit(unsigned f) { return 0; }
int cuGetErrorString(int r, const char** s) { *s = r ? "stub refuses" : "no error"; return 0; }
int cuDriverGetVersion(int* v) { *v = 13000; return 0; }
int cuDeviceGet(int* d, int i) { *d = i; return 0; }
int cuDeviceGetAttribute(int* v, int a, int d) {
  *v = a == 97 || a == 8 ? 232448 : a == 75 ? 9 : a == 76 ? 0 : a == 16 ? 132 : a == 10 ? 32 : 1024;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** c, int d) { *c = (void*)0x1000; return 0; }
int cuCtxGetCurrent(void** c) { *c = (void*)0x1000; return 0; }
int cuCtxSetCurrent(void* c) { return 0; }
int cuCtxGetDevice(int* d) { *d = 0; return 0; }
int cuCtxGetLimit(size_t* v, int l) { *v = 0; return 0; }
int cuCtxSetLimit(int l, size_t v) { return 0; }
int cuModuleLoadData(void** m, const void* i) { *m = (void*)0x2000; return 0; }
int cuModuleUnload(void* m) { return 0; }
int cuModuleGetFunction(void** f, void* m, const char* n) {
  Function* made = calloc(1, sizeof(Function));
  strncpy(made->name, n, 255); *f = made; return 0;
}
int cuFuncGetAttribute(int* v, int a, void* f) { *v = a == 0 ? 1024 : 0; return 0; }
int cuFuncSetAttribute(void* f, int a, int v) { return 0; }
int cuFuncSetCacheConfig(void* f, int c) { return 0; }
int cuPointerGetAttribute(void* o, int a, uint64_t p) { *(uint64_t*)o = p; return 0; }
int cuPointerGetAttributes(unsigned n, int* a, void** o, uint64_t p) { return 1; }
int cuOccupancyMaxActiveClusters(int* n, void* f, void* c) { *n = 1; return 0; }
int cuStreamIsCapturing(void* s, int* v) { *v = 0; return 0; }
int cuTensorMapEncodeTiled() { return 0; }
int cuTensorMapEncodeIm2col() { return 0; }
int cuLaunchKernelEx(const Config* config, void* function, void** params, void** extra) {
  if (hd_fail) return 1;
  ++hd_launches;
  hd_last.config = *config;
  memcpy(hd_last.attributes, config->attributes, config->count * sizeof(Attribute));
  strcpy(hd_last.name, ((Function*)function)->name);
  for (int i = 0; i < hd_param_count; ++i) memcpy(hd_last.params[i], params[i], hd_param_bytes[i]);
  hd_param_count = 0;
  return 0;
}
"""

BYTES = {"i1": 1, "u1": 1, "i8": 1, "u8": 1, "i16": 2, "u16": 2, "i32": 4, "u32": 4, "fp32": 4, "bf16": 2, "fp16": 2}


class Launch(NamedTuple):
    """What reached the driver, in the form of `hdispatch.testing.null.launches`."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    attributes: dict[int, tuple[int, ...]]
    params: list[bytes]


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint32),
    )


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_uint32), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int32 * 16))


class _Launch(ctypes.Structure):
    _fields_ = (
        ("config", _Config),
        ("attributes", _Attribute * 8),
        ("params", (ctypes.c_uint8 * 16) * 64),
        ("name", ctypes.c_char * 256),
    )


class Stub:
    """The stub of libcuda, loaded where Triton's launcher finds it."""

    driver: Any

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self._last = _Launch.in_dll(self._library, "hd_last")
        self._count = ctypes.c_int.in_dll(self._library, "hd_launches")
        self._param_count = ctypes.c_int.in_dll(self._library, "hd_param_count")
        self._param_bytes = (ctypes.c_int * 64).in_dll(self._library, "hd_param_bytes")
        self._sizes: list[int] = []
        self._fail = ctypes.c_int.in_dll(self._library, "hd_fail")

    @property
    def launches(self) -> int:
        """How many launches of Triton's own have reached the driver."""
        return self._count.value

    def expect(self, kinds: list[str]) -> None:
        """The types of the next launch's parameters: a libcuda does not know how many bytes each has."""
        sizes = self._sizes = [*(8 if kind.startswith("*") else BYTES.get(kind, 8) for kind in kinds), 8, 8]
        self._param_count.value = len(sizes)
        self._param_bytes[: len(sizes)] = sizes

    def last(self) -> Launch:
        """Triton's last launch, the one that was expected."""
        config = self._last.config
        sizes = self._sizes
        attributes = {each.id: tuple(each.value[:3]) for each in self._last.attributes[: config.count]}
        params = [bytes(self._last.params[i][:size]) for i, size in enumerate(sizes)]
        return Launch(tuple(config.grid), tuple(config.block), config.shared, attributes, params)

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """The driver refuses every launch of Triton's."""
        self._fail.value = 1
        try:
            yield
        finally:
            self._fail.value = 0


_stub: Stub | None = None


@contextmanager
def installed() -> Iterator[Stub]:
    """Triton of this process believes in an H100 until the block ends."""
    from triton.runtime import driver

    made = _make()
    former = driver._active
    driver.set_active(made.driver)
    try:
        yield made
    finally:
        driver._active = former


def _make() -> Stub:
    global _stub
    if _stub is not None:
        return _stub
    library = _build()
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver, libcuda_dirs

    class StubDriver(CudaDriver):
        """Triton's own, but for what it asks torch."""

        def __init__(self) -> None:
            super().__init__()
            answers: dict[str, Any] = {"get_current_device": 0, "get_current_stream": 0, "set_current_device": None}
            for name, value in answers.items():
                setattr(self, name, lambda *_, value=value: value)
            self.get_device_capability = lambda *_: (9, 0)

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

    stub = Stub(library)
    with knobs.nvidia.scope():
        knobs.nvidia.libcuda_path = str(library.parent)
        libcuda_dirs.cache_clear()
        stub.driver = StubDriver()
    _stub = stub
    return stub


def _build() -> Path:
    folder = Path(tempfile.gettempdir()) / f"hdispatch-triton-stub-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    library, source = folder / "libcuda.so.1", folder / "libcuda.c"
    if not library.is_file() or source.read_text() != SOURCE:
        source.write_text(SOURCE)
        made = folder / f"{os.getpid()}.so"
        flags = ["-shared", "-fPIC", "-O1", "-w", "-Wl,-soname,libcuda.so.1"]
        subprocess.run(["gcc", *flags, str(source), "-o", str(made)], check=True)
        made.replace(library)
    return library

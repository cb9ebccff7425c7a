"""The shim of a bundle's library: launches of host functions go to the driver, and to the runtime where that cannot."""

from __future__ import annotations

import ctypes.util
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hdispatch.compile import ffi_link

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("nvidia_cutlass_dsl") is None,
    reason="nvidia-cutlass-dsl is not installed: there is no runtime that launches could be taken from",
)

#: Calls what CuteDSL's host functions call.
CALLER = """
#include <stdint.h>
extern int _cudaLaunchKernelEx(const void* config, void* kernel, void** params);
extern int _cudaGetDevice(int*);
__attribute__((visibility("default"))) int also(int* device) { return _cudaGetDevice(device); }
__attribute__((visibility("default"))) int call(const void* config, void* kernel, void** params) {
  return _cudaLaunchKernelEx(config, kernel, params);
}
"""

#: libcuda's launch, and libcudart's: they write down what they are given.
DRIVER = """
#include <stdint.h>
#include <string.h>
uint32_t seen[16]; void *seen_stream, *seen_kernel, *seen_attributes; int answer;
int cuLaunchKernelEx(const char* config, void* kernel, void** params, void** extra) {
  memcpy(seen, config, 7 * 4);
  memcpy(&seen_stream, config + 32, 8);
  memcpy(&seen_attributes, config + 40, 8);
  memcpy(seen + 7, config + 48, 4);
  seen[8] = *(uint32_t*)params[0]; seen[9] = extra != 0;
  seen_kernel = kernel;
  return answer;
}
"""
RUNTIME = """
int runtime_calls;
int cudaLaunchKernelExC(const void* config, const void* kernel, void** params) { return ++runtime_calls; }
const char* cudaGetErrorName(int code) { return ""; }
const char* cudaGetErrorString(int code) { return ""; }
int cudaGetLastError(void) { return 0; }
int cudaGetDevice(int* device) { return *device = 0; }
"""

SCRIPT = """
import ctypes, json, sys
folder = sys.argv[1]
driver = ctypes.CDLL(folder + "/libcuda.so.1") if sys.argv[2] == "driver" else None
runtime = ctypes.CDLL(folder + "/libcudart.so.13", ctypes.RTLD_GLOBAL)
# ctypes would want all of libcudart's functions at once.
loader = ctypes.CDLL(None)
loader.dlopen.restype = loader.dlsym.restype = ctypes.c_void_p
loader.dlerror.restype = ctypes.c_char_p
library = loader.dlopen((folder + "/library.so").encode(), 1)
assert library, loader.dlerror()
call = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(
    loader.dlsym(ctypes.c_void_p(library), b"call")
)

class Config(ctypes.Structure):
    _fields_ = [("grid", ctypes.c_uint32 * 3), ("block", ctypes.c_uint32 * 3), ("shared", ctypes.c_size_t),
                ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("count", ctypes.c_uint32)]

config = Config((2, 3, 4), (32, 1, 1), 1024, 0x1234, 0x5678, 2)
value = ctypes.c_uint32(77)
params = (ctypes.c_void_p * 1)(ctypes.addressof(value))
found = []
for answer in (0, 700, 201):
    if driver:
        ctypes.c_int.in_dll(driver, "answer").value = answer
    found.append(call(ctypes.addressof(config), 0x9ABC, ctypes.addressof(params)))
seen = list((ctypes.c_uint32 * 10).in_dll(driver, "seen")) if driver else []
names = ("seen_stream", "seen_kernel", "seen_attributes") if driver else ()
pointers = [ctypes.c_void_p.in_dll(driver, name).value for name in names]
print(json.dumps([found, seen, pointers]))
"""


def shared(source: str, out: Path, soname: str) -> None:
    options = ["-shared", "-fPIC", "-x", "c", "-", f"-Wl,-soname,{soname}", "-o", str(out)]
    subprocess.run([*ffi_link.compiler(), *options], input=source, text=True, check=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("shim")
    compile_it = [*ffi_link.compiler(), "-c", "-fPIC", "-x", "c", "-", "-o", str(root / "caller.o")]
    subprocess.run(compile_it, input=CALLER, text=True, check=True)
    (root / "library.so").write_bytes(ffi_link.link({"caller": (root / "caller.o").read_bytes()}))
    shared(DRIVER, root / "libcuda.so.1", "libcuda.so.1")
    shared(RUNTIME, root / "libcudart.so.13", "libcudart.so.13")
    return root


def launched(folder: Path, how: str) -> list:
    environment = os.environ | ({"LD_LIBRARY_PATH": str(folder)} if how == "driver" else {})
    command = [sys.executable, "-c", SCRIPT, str(folder), how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_a_launch_goes_to_the_driver_as_it_is(folder: Path) -> None:
    codes, seen, pointers = launched(folder, "driver")
    assert codes == [0, 700, 1], "the driver's code; the runtime's where the thread has no context"
    assert seen == [2, 3, 4, 32, 1, 1, 1024, 2, 77, 0], "grid, block, shared memory, attributes, what the kernel gets"
    assert pointers == [0x1234, 0x9ABC, 0x5678]


def test_without_a_driver_it_goes_to_the_runtime(folder: Path) -> None:
    if ctypes.util.find_library("cuda"):
        pytest.skip("there is a driver here")
    assert launched(folder, "runtime")[0] == [1, 2, 3]

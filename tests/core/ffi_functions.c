// ffi_functions.c -- a library as bundles have it, without kernels: two functions with TVM FFI's ABI, linked with the
// shim.
#include <stdint.h>
#include <string.h>

typedef struct {
  int32_t type;
  uint32_t zero;
  int64_t value;
} Any;

extern void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count);
extern void CuteDSLRT_TVMFFISetRaisedCudaError(void* set, int code);
extern void* TVMFFIEnvGetStream(int32_t device_type, int32_t device);
extern int cuda_dialect_init_library_once(void** slot, int (*init)(void**), int (*load)(void**, int), void* set);

static void* slot;
static int inits, loads, last_device = -1;

int __cute_internal_count_cuda_init(void** module) {
  ++inits;
  *module = &inits;
  return 0;
}
int __cute_internal_count_cuda_load_to_device(void** module, int device) {
  last_device = device;
  ++loads;
  return *module == &inits ? 0 : 1;
}

/// Returns 10000 * stream + 100 * loads + inits in the integer that args[0] points to.
int __tvm_ffi_count(void* self, const Any* args, int32_t count, Any* result) {
  (void)self, (void)result;
  if (count != 1) {
    const char* parts[] = {"one argument, ", 0, "not more"};
    TVMFFIErrorSetRaisedFromCStrParts("TypeError", parts, 3);
    return -1;
  }
  if (cuda_dialect_init_library_once(&slot, __cute_internal_count_cuda_init, __cute_internal_count_cuda_load_to_device,
                                     0))
    return -1;
  *(int64_t*)(uintptr_t)args[0].value = 10000 * (int64_t)(uintptr_t)TVMFFIEnvGetStream(2, 0) + 100 * loads + inits;
  return 0;
}

int __cute_internal_broken_cuda_init(void** module) {
  (void)module;
  return 218;
}
int __cute_internal_broken_cuda_load_to_device(void** module, int device) {
  (void)module, (void)device;
  return 0;
}
int __tvm_ffi_broken(void* self, const Any* args, int32_t count, Any* result) {
  (void)self, (void)args, (void)count, (void)result;
  CuteDSLRT_TVMFFISetRaisedCudaError(0, 9);
  return -1;
}

/// Without the symbols that load a module.
int __tvm_ffi_bare(void* self, const Any* args, int32_t count, Any* result) {
  (void)self, (void)args, (void)count, (void)result;
  return 0;
}

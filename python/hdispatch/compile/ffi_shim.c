// ffi_shim.c -- what a bundle's shared library links in the place of libtvm_ffi and CuteDSL's runtime. Plain C11.
//
// The host functions that CuteDSL exports ("TVM FFI") need four functions of those two libraries, and two of the static
// part of CuteDSL's runtime (libcuda_dialect_runtime_static.a), whose other functions only forward to libcudart:
//
//   gcc -shared -fPIC -O2 -Wl,--wrap=_cudaLaunchKernelEx *.o ffi_shim.c libcuda_dialect_runtime_static.a
//       -l:libcudart.so.13 -o library.so
//
// This file must come before the archive: both define cuda_dialect_{init,unload}_library_once, and ours is taken. Ours
// differs in that modules can be loaded ahead of the first call, which graph capture needs, and are never unloaded.
// Launches go to the driver, as those of cubins do.
//
// hdispatch opens the library and uses the functions that begin with hdispatch_ffi_ (csrc/ffi_library.h). Errors and
// the stream are per thread.
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define LOCAL __attribute__((visibility("hidden")))
#define OPTIONAL __attribute__((weak))

typedef int (*Init)(void** module);               // __cute_internal_<name>_cuda_init: loads the module
typedef int (*LoadToDevice)(void** module, int);  // …_cuda_load_to_device: finds its kernels, sets their attributes
typedef void (*SetError)(const char* kind, const char* message);
typedef void (*SetErrorParts)(const char* kind, const char** parts, int32_t count);

// libcudart's, which a library without kernels lacks.
OPTIONAL extern const char* cudaGetErrorName(int);
OPTIONAL extern const char* cudaGetErrorString(int);
OPTIONAL extern int cudaGetLastError(void);
OPTIONAL extern int cudaGetDevice(int*);

// ---- errors ----

static _Thread_local char error_kind[64];
static _Thread_local char error_message[4096];

LOCAL void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count) {
  snprintf(error_kind, sizeof error_kind, "%s", kind);
  size_t used = 0;
  error_message[0] = '\0';
  for (int32_t i = 0; i < count; ++i) {
    if (!parts[i] || used >= sizeof error_message) continue;
    const int more = snprintf(error_message + used, sizeof error_message - used, "%s", parts[i]);
    used += more > 0 ? (size_t)more : 0;
  }
}

LOCAL void TVMFFIErrorSetRaisedFromCStr(const char* kind, const char* message) {
  TVMFFIErrorSetRaisedFromCStrParts(kind, &message, 1);
}

static void set_cuda_error(const char* what, int code) {
  char number[16];
  snprintf(number, sizeof number, "%d ", code);
  const char* parts[] = {what, number, cudaGetErrorName ? cudaGetErrorName(code) : "", ": ",
                         cudaGetErrorString ? cudaGetErrorString(code) : ""};
  TVMFFIErrorSetRaisedFromCStrParts("CUDADialectError", parts, 5);
  if (cudaGetLastError) cudaGetLastError();  // it is reported here: not again by the next one who asks
}

LOCAL void CuteDSLRT_TVMFFISetRaisedCudaError(SetErrorParts set, int code) {
  (void)set;
  set_cuda_error("CUDA error ", code);
}

EXPORT const char* hdispatch_ffi_error(const char** kind) {
  *kind = error_kind;
  return error_message;
}

// ---- the stream ----

static _Thread_local void* stream;

LOCAL void* TVMFFIEnvGetStream(int32_t device_type, int32_t device) {
  (void)device_type, (void)device;
  return stream;
}

EXPORT int hdispatch_ffi_set_stream(int32_t device_type, int32_t device, void* next, void** before) {
  (void)device_type, (void)device;
  if (before) *before = stream;
  stream = next;
  return 0;
}

// ---- modules ----

struct Module {
  Init init;  // which one it is
  void* handle;
  struct Module* next;
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;  // guards `modules` and what they hold
static struct Module* modules;

/// The module, loaded to the device; null with the error set. The mutex is held.
static struct Module* load(Init init, LoadToDevice load_to_device, int device) {
  struct Module* module = modules;
  while (module && module->init != init) module = module->next;
  if (!module) {
    void* handle = NULL;
    const int code = init(&handle);
    if (code) return set_cuda_error("cannot load the module: ", code), NULL;
    module = malloc(sizeof *module);
    if (!module) return TVMFFIErrorSetRaisedFromCStr("MemoryError", "no memory for a module"), NULL;
    *module = (struct Module){init, handle, modules};
    modules = module;
  }
  const int code = load_to_device(&module->handle, device);
  if (code) return set_cuda_error("cannot load the module's kernels: ", code), NULL;
  return module;
}

/// Called by every host function before it launches; `slot` is its own, and set once.
LOCAL int cuda_dialect_init_library_once(void** slot, Init init, LoadToDevice load_to_device, SetError set) {
  (void)set;
  if (__atomic_load_n(slot, __ATOMIC_ACQUIRE)) return 0;
  pthread_mutex_lock(&mutex);
  struct Module* module = modules;
  while (module && module->init != init) module = module->next;
  if (!module) {  // nobody prepared it
    int device = 0;
    if (cudaGetDevice) cudaGetDevice(&device);
    module = load(init, load_to_device, device);
  }
  if (module) __atomic_store_n(slot, module->handle, __ATOMIC_RELEASE);
  pthread_mutex_unlock(&mutex);
  return module ? 0 : -1;
}

/// At exit. Captured graphs may still hold the kernels; the driver frees them with the process.
LOCAL void cuda_dialect_unload_library_once(void** slot) { (void)slot; }

EXPORT int hdispatch_ffi_prepare(void* library, const char* function, int device, void** module) {
  char name[512];
  snprintf(name, sizeof name, "__cute_internal_%s_cuda_init", function);
  const Init init = (Init)(uintptr_t)dlsym(library, name);
  snprintf(name, sizeof name, "__cute_internal_%s_cuda_load_to_device", function);
  const LoadToDevice load_to_device = (LoadToDevice)(uintptr_t)dlsym(library, name);
  if (!init || !load_to_device) {
    const char* parts[] = {"the library has no symbol ", name};
    TVMFFIErrorSetRaisedFromCStrParts("AttributeError", parts, 2);
    return -1;
  }
  pthread_mutex_lock(&mutex);
  const struct Module* loaded = load(init, load_to_device, device);
  pthread_mutex_unlock(&mutex);
  if (!loaded) return -1;
  *module = loaded->handle;
  return 0;
}

// ---- launches ----

typedef struct {  // cudaLaunchConfig_t
  uint32_t grid[3], block[3];
  size_t shared_bytes;
  void* stream;
  void* attributes;  // cudaLaunchAttribute is CUlaunchAttribute
  uint32_t attribute_count;
} RuntimeConfig;

typedef struct {  // CUlaunchConfig
  uint32_t grid[3], block[3], shared_bytes;
  void* stream;
  void* attributes;
  uint32_t attribute_count;
} DriverConfig;

typedef int (*DriverLaunch)(const DriverConfig*, void* kernel, void** params, void** extra);

static pthread_once_t driver_once = PTHREAD_ONCE_INIT;
static DriverLaunch driver_launch;

static void find_driver(void) {
  void* driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
  if (driver) driver_launch = (DriverLaunch)(uintptr_t)dlsym(driver, "cuLaunchKernelEx");
}

// The linker's names for the archive's function and for what is called instead.
OPTIONAL extern int __real__cudaLaunchKernelEx(const RuntimeConfig*, void* kernel, void** params);

LOCAL int __wrap__cudaLaunchKernelEx(const RuntimeConfig* config, void* kernel, void** params) {
  pthread_once(&driver_once, find_driver);
  if (driver_launch) {
    const DriverConfig own = {{config->grid[0], config->grid[1], config->grid[2]},
                              {config->block[0], config->block[1], config->block[2]},
                              (uint32_t)config->shared_bytes,
                              config->stream,
                              config->attributes,
                              config->attribute_count};
    const int code = driver_launch(&own, kernel, params, NULL);  // a cudaKernel_t is a CUkernel
    // 201: the thread has no context yet, and the runtime gives it one. The other codes mean the same to both.
    if (code != 201) return code;
  }
  return __real__cudaLaunchKernelEx ? __real__cudaLaunchKernelEx(config, kernel, params) : 3;  // not initialized
}

EXPORT int hdispatch_ffi_version(void) { return 1; }

// adopted_kernel.h -- a Triton kernel of somebody else's: its rows by key, what a row depends on beside the call,
// misses.
//
//   kernel[grid](*args)          calls of one form -> key (adopted_key.h) -> row (adopted_row.h) -> driver
//   the first call of a key      Triton itself, then `learn` makes what it compiled a row
//   everything unusual           Triton itself, counted by reason
//
// What the code depends on beside the arguments: Triton's knobs, hooks, captured globals, the function's source. None
// of it is asked for per call: dicts say by their version whether somebody has written to them, and only then Python is
// asked (`AdoptedCallbacks`) what holds now.
//
// Who may call: holders of the GIL. Rows are never freed before the kernel is.
#pragma once

#include <Python.h>

#include <string>
#include <vector>

#include "adopted_key.h"
#include "adopted_state.h"
#include "adopted_table.h"
#include "adopted_tuner.h"
#include "host_program.h"
#include "op.h"

namespace hdispatch {

/// What Python is asked; owned for ever.
struct AdoptedCallbacks {
  PyObject* process_state = nullptr;  ///< () -> what WatchedState::set takes
  PyObject* kernel_state = nullptr;   ///< (kernel) -> the same
  PyObject* choice = nullptr;         ///< (kernel, args, keywords) -> None, or an autotuner's (key, configuration)
  /// (kernel, compiled, an autotuner's configuration or None) -> str, the reason for no row, or the row as a dict
  PyObject* learn = nullptr;
  PyObject* trace = nullptr;          ///< (kernel, function, arguments) -> what HostProgram takes, or None
  PyObject* host_state = nullptr;     ///< (host kernel) -> what WatchedState::set takes
  PyObject* host_record = nullptr;    ///< (host kernel, arguments) -> str, or what HostRecord takes
  PyObject* host_choice = nullptr;    ///< (host kernel, arguments) -> what its function of the arguments says
  PyObject* host_launches = nullptr;  ///< (host kernel) -> the dict of its variants, whose launches are then adopted
};
extern AdoptedCallbacks adopted_callbacks;

/// How heuristics are computed: Triton's decorator, before anything else.
struct AdoptedHeuristic {
  int parameter;  ///< -1: an option
  PyObject* name;
  PyObject* function;
};

/// The Python object behind an adopted kernel: in the kernel's own `__dict__`, so that it lives as long.
struct AdoptedKernel {
  PyObject_HEAD PyObject* kernel;  ///< borrowed
  PyObject* run;                   ///< Triton's own `run` of the kernel's class; owned
  bool is_on;
  bool is_null;  ///< the null driver, for tensors of the CPU
  std::string* name;
  KeyReader* reader;
  WatchedState* state;
  AdoptedTable* table;
  std::vector<AdoptedHeuristic>* heuristics;
  HostPrograms* programs;
  AdoptedTuner* tuner;         ///< null without one
  const std::string* refusal;  ///< why every call stays Triton's; null for kernels that are served
  OpCounters* counters;

  /// Serves a call, or has Triton serve it. `grid` of `run` is among its keywords, and null here.
  PyObject* call(PyObject* grid, PyObject* const* args, size_t positional, PyObject* keyword_names);

  /// Launches what a host record computed, if its key has a row; false with the reason otherwise. May throw.
  bool launch(const CallForm& form, PyObject* const* args, const GivenValue* given, const int64_t (&grid)[3],
              const char*& reason);

  /// ns per launch of the bare driver call for positional arguments whose key has a row; throws kCaller otherwise.
  double bench_ns(PyObject* const* args, size_t count, const std::array<uint32_t, 3>& grid, uint32_t launches);
};

/// Where a kernel's calls go: the device that torch has current, or the CPU with the null driver.
DeviceSlot adopted_slot(bool is_null);

extern PyObject* adopted_type;
extern PyObject* patched_method_type;  ///< of our attributes on Triton's classes (adopted_patch.h)

/// For the device that torch has current; 1 where the process sees one GPU.
void set_adopted_device_count(int count);

}  // namespace hdispatch

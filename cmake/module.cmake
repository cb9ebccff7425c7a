# The extension module _C: the torch and Python doors, compiled against the torch of the building interpreter.
#
# torch's own CMake package would ask for a CUDA toolkit where torch is a CUDA build; headers and libraries are enough.
find_package(Python 3.11 REQUIRED COMPONENTS Interpreter Development.Module)
find_package(pybind11 CONFIG REQUIRED)

execute_process(
  COMMAND ${Python_EXECUTABLE} -c "import pathlib, torch; print(pathlib.Path(torch.__file__).parent, torch.__version__, sep=';', end='')"
  OUTPUT_VARIABLE torch_facts ERROR_VARIABLE torch_error RESULT_VARIABLE torch_result)
if(NOT torch_result EQUAL 0)
  message(FATAL_ERROR "hdispatch is compiled against the installed torch, and ${Python_EXECUTABLE} cannot import it:\n"
    "${torch_error}\nInstall torch first, then: pip install --no-build-isolation .")
endif()
list(GET torch_facts 0 TORCH_DIR)
list(GET torch_facts 1 TORCH_VERSION)
message(STATUS "torch ${TORCH_VERSION} in ${TORCH_DIR}")

pybind11_add_module(_C csrc/tensor_view.cpp csrc/op_call.cpp csrc/override.cpp csrc/arena.cpp
  csrc/sequence_reader.cpp csrc/sequence_call.cpp csrc/bench.cpp
  csrc/module.cpp)
target_include_directories(_C SYSTEM PRIVATE ${TORCH_DIR}/include ${TORCH_DIR}/include/torch/csrc/api/include)
target_compile_options(_C PRIVATE -Wall -Wextra -Wno-missing-field-initializers)
target_link_libraries(_C PRIVATE hdispatch_core)
foreach(name c10 torch_cpu torch torch_python)
  target_link_libraries(_C PRIVATE ${TORCH_DIR}/lib/lib${name}.so)
endforeach()
# torch is imported before the module, so its libraries are found by name; no path of the building machine is kept.
set_target_properties(_C PROPERTIES SKIP_BUILD_RPATH ON INSTALL_RPATH "")

# A CPU-only torch lacks the CUDA device guard that fake CUDA tensors need while kernels are generated (build wing).
add_library(noop_cuda_guard SHARED csrc/noop_cuda_guard.cpp)
target_include_directories(noop_cuda_guard SYSTEM PRIVATE ${TORCH_DIR}/include)
target_link_libraries(noop_cuda_guard PRIVATE ${TORCH_DIR}/lib/libc10.so)
set_target_properties(noop_cuda_guard PROPERTIES PREFIX "_" SKIP_BUILD_RPATH ON INSTALL_RPATH "")

# What the module was built with, readable without loading it: importing it under another torch would crash, not fail.
file(CONFIGURE OUTPUT ${CMAKE_CURRENT_BINARY_DIR}/_build_info.py CONTENT
"\"\"\"What the extension was compiled against; written by the build.\"\"\"

TORCH_VERSION = \"@TORCH_VERSION@\"
" @ONLY)

# A bundle that the package holds for GPUs of one architecture, an archive named by it: sm_90a.tar.xz. `make wheel` gives one.
set(HDISPATCH_EMBED_BUNDLE "" CACHE FILEPATH "archive of a bundle to install with the package")
set(bundle "${HDISPATCH_EMBED_BUNDLE}")
unset(HDISPATCH_EMBED_BUNDLE CACHE)  # the next build in this folder has a bundle only if it says so, also if this one fails
if(bundle)
  if(NOT bundle MATCHES "/sm_[0-9]+a?\\.tar\\.xz$" OR NOT EXISTS "${bundle}")
    message(FATAL_ERROR "HDISPATCH_EMBED_BUNDLE is '${bundle}'; it takes the full path of an archive that is named by its "
      "architecture, as sm_90a.tar.xz: hdispatch build --target h200 --out bundle --archive sm_90a.tar.xz")
  endif()
  install(FILES ${bundle} DESTINATION hdispatch/bundles)
endif()

install(TARGETS _C noop_cuda_guard LIBRARY DESTINATION hdispatch)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/_build_info.py DESTINATION hdispatch)

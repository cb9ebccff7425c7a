# The extension module _C: the torch and Python doors, one build of it for each torch that it is to serve.
#
#   HDISPATCH_TORCH=DIR;DIR   folders of torch to compile against, of one minor version each; a door needs their include/,
#                             lib/ and version.py. Default: the torch of the building interpreter.
#
# torch's own CMake package would ask for a CUDA toolkit where torch is a CUDA build; headers and libraries are enough.
set(HDISPATCH_TORCH "" CACHE STRING "folders of torch to compile against; empty: the building interpreter's")
find_package(Python 3.11 REQUIRED COMPONENTS Interpreter Development.Module)
find_package(pybind11 CONFIG REQUIRED)

if(HDISPATCH_TORCH)
  set(torch_dirs ${HDISPATCH_TORCH})
else()
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "import pathlib, torch; print(pathlib.Path(torch.__file__).parent, end='')"
    OUTPUT_VARIABLE torch_dirs ERROR_VARIABLE torch_error RESULT_VARIABLE torch_result)
  if(NOT torch_result EQUAL 0)
    message(FATAL_ERROR "hdispatch is compiled against the installed torch, and ${Python_EXECUTABLE} cannot import it:\n"
      "${torch_error}\nInstall torch first, then: pip install --no-build-isolation .")
  endif()
endif()

# The door for the torch in a folder: hdispatch/torch_X_Y/_C. Adds "X.Y": "X.Y.Z" to `torch_versions`.
function(add_door torch_dir)
  file(STRINGS ${torch_dir}/version.py version_line REGEX "^__version__ = ")
  string(REGEX MATCH "[0-9]+\\.[0-9]+\\.[^'\"]+" version "${version_line}")
  if(NOT version)
    message(FATAL_ERROR "${torch_dir}/version.py says no version of torch: ${version_line}")
  endif()
  string(REGEX MATCH "^[0-9]+\\.[0-9]+" minor "${version}")
  string(REPLACE "." "_" folder "torch_${minor}")
  if(TARGET ${folder})
    message(FATAL_ERROR "HDISPATCH_TORCH has torch ${minor} twice: ${HDISPATCH_TORCH}")
  endif()
  message(STATUS "a door for torch ${version} in ${torch_dir}")

  # Most of a file's compilation is reading headers: pybind11's, and those of torch's dispatcher. So files are compiled in two
  # groups, each as one: what a call runs or needs the dispatcher's headers, and what runs when ops are defined, at -O1, which
  # need not be linked with -flto. 60 s of two cores with the core; in groups that all had every header, 97.
  set(calls csrc/tensor_view.cpp csrc/profiler.cpp csrc/python_errors.cpp csrc/torch_layout.cpp csrc/op_arguments.cpp
    csrc/op_call.cpp csrc/override.cpp csrc/attempt.cpp csrc/adopted_key.cpp csrc/adopted_state.cpp csrc/adopted_table.cpp
    csrc/adopted_tuner.cpp csrc/host_program.cpp csrc/adopted_kernel.cpp csrc/adopted_host.cpp csrc/adopted_patch.cpp
    csrc/empty_tensor.cpp csrc/functional_op.cpp csrc/bench.cpp csrc/arena.cpp csrc/sequence_reader.cpp
    csrc/sequence_call.cpp csrc/torch_op.cpp)
  set(definitions csrc/strict_mode.cpp csrc/from_python.cpp csrc/adopted_learn.cpp csrc/adopted_door.cpp csrc/module.cpp)
  add_library(${folder}_definitions OBJECT ${definitions})
  target_compile_options(${folder}_definitions PRIVATE -O1)
  pybind11_add_module(${folder} ${calls} $<TARGET_OBJECTS:${folder}_definitions>)
  foreach(target ${folder} ${folder}_definitions)
    set_target_properties(${target} PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 0)
    # torch brings a pybind11 of its own, which its headers and libtorch_python take: it stands in front of ours.
    target_include_directories(${target} SYSTEM BEFORE PRIVATE
      ${torch_dir}/include ${torch_dir}/include/torch/csrc/api/include)
    # torch's headers then leave out the declarations of all its operators.
    target_compile_definitions(${target} PRIVATE AT_PER_OPERATOR_HEADERS)
    target_compile_options(${target} PRIVATE ${HDISPATCH_ALIGN} -Wall -Wextra -Wno-missing-field-initializers)
    target_link_libraries(${target} PRIVATE hdispatch_core pybind11::headers)
  endforeach()
  target_link_libraries(${folder}_definitions PRIVATE Python::Module)
  foreach(name c10 torch_cpu torch_python)
    target_link_libraries(${folder} PRIVATE ${torch_dir}/lib/lib${name}.so)
  endforeach()

  # A CPU-only torch lacks the CUDA device guard that fake CUDA tensors need while kernels are generated (build wing).
  set(guard ${folder}_noop_cuda_guard)
  add_library(${guard} SHARED csrc/noop_cuda_guard.cpp)
  target_include_directories(${guard} SYSTEM PRIVATE ${torch_dir}/include)
  target_link_libraries(${guard} PRIVATE ${torch_dir}/lib/libc10.so)
  set_target_properties(${guard} PROPERTIES PREFIX "" OUTPUT_NAME _noop_cuda_guard)
  set_target_properties(${folder} PROPERTIES OUTPUT_NAME _C)

  # torch is imported before the module, so its libraries are found by name; no path of the building machine is kept.
  set_target_properties(${folder} ${guard} PROPERTIES
    LIBRARY_OUTPUT_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/${folder} SKIP_BUILD_RPATH ON INSTALL_RPATH "$ORIGIN/..")
  install(TARGETS ${folder} ${guard} LIBRARY DESTINATION hdispatch/${folder})
  set(torch_versions ${torch_versions} "    \"${minor}\": \"${version}\"," PARENT_SCOPE)
endfunction()

foreach(torch_dir ${torch_dirs})
  add_door(${torch_dir})
endforeach()

# What the doors were compiled against, readable without loading one: under another torch that would crash, not fail.
list(JOIN torch_versions "\n" torch_versions)
file(CONFIGURE OUTPUT ${CMAKE_CURRENT_BINARY_DIR}/_build_info.py CONTENT
"\"\"\"What the extension was compiled against; written by the build.\"\"\"

#: minor version of torch -> the release that its door in torch_<minor> was compiled against
TORCH_VERSIONS = {
@torch_versions@
}
" @ONLY)

# Bundles that the package holds for GPUs of one architecture, an archive named by it: sm_90a.tar.xz, sm_90a-h200-h100.tar.xz.
set(HDISPATCH_EMBED_BUNDLE "" CACHE FILEPATH "archive of bundles to install with the package")
set(bundle "${HDISPATCH_EMBED_BUNDLE}")
unset(HDISPATCH_EMBED_BUNDLE CACHE)  # the next build in this folder has a bundle only if it says so, also if this one fails
if(bundle)
  if(NOT bundle MATCHES "/sm_[0-9]+a?(-[a-z0-9_]+)*\\.tar\\.xz$" OR NOT EXISTS "${bundle}")
    message(FATAL_ERROR "HDISPATCH_EMBED_BUNDLE is '${bundle}'; it takes the full path of an archive that is named by its "
      "architecture, as scripts/embedded_bundles.py and hdispatch build --target h200 --archive sm_90a.tar.xz make it")
  endif()
  install(FILES ${bundle} DESTINATION hdispatch/bundles)
endif()

install(TARGETS hdispatch_core LIBRARY DESTINATION hdispatch)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/_build_info.py DESTINATION hdispatch)

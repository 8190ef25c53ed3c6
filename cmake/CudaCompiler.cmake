# Enables CUDA with the first of
#   1. CUDACXX or -DCMAKE_CUDA_COMPILER,
#   2. the nvcc of the Python wheels beside ${Python_EXECUTABLE} (the build requirements),
#   3. an nvcc on PATH,
# and defines the target jax_flashmla_cudart: CUDA's headers and its runtime, linked statically.

if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  execute_process(
    COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/find_cuda_wheels.py"
    OUTPUT_VARIABLE cuda_wheels
    OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  if(cuda_wheels)
    set(CMAKE_CUDA_COMPILER "${cuda_wheels}/bin/nvcc")
  endif()
endif()

# nvcc looks for its runtime in lib64, the wheels have lib: without this CMake's own link test of
# the compiler fails. It is right for a toolkit too, which has lib64 (or both).
if(CMAKE_CUDA_COMPILER)
  get_filename_component(cuda_lib "${CMAKE_CUDA_COMPILER}/../../lib" ABSOLUTE)
  set(ENV{LIBRARY_PATH} "${cuda_lib}:$ENV{LIBRARY_PATH}")
endif()

# The kernels use instructions that only the "a" variant of sm_90 has: machine code for it, and
# no PTX, which no other GPU could use.
set(CMAKE_CUDA_ARCHITECTURES 90a-real)
enable_language(CUDA)

# find_package(CUDAToolkit) insists on libcudart.so, which the wheels lack; the static runtime
# and the headers are all that is needed.
find_path(
  cuda_include cuda_runtime_api.h
  HINTS ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES} "${CMAKE_CUDA_COMPILER_TOOLKIT_ROOT}/include"
  REQUIRED NO_CACHE)
find_library(
  cudart_static cudart_static
  HINTS "${cuda_include}/../lib64" "${cuda_include}/../lib" ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES}
        ${CMAKE_CUDA_HOST_IMPLICIT_LINK_DIRECTORIES}
  REQUIRED NO_CACHE)
message(STATUS "nvcc: ${CMAKE_CUDA_COMPILER} (${CMAKE_CUDA_COMPILER_VERSION})")
message(STATUS "CUDA runtime: ${cudart_static}, headers: ${cuda_include}")

set(THREADS_PREFER_PTHREAD_FLAG ON)
find_package(Threads REQUIRED)
add_library(jax_flashmla_cudart INTERFACE)
target_include_directories(jax_flashmla_cudart SYSTEM INTERFACE "${cuda_include}")
target_link_libraries(jax_flashmla_cudart INTERFACE "${cudart_static}" Threads::Threads rt
                                                    ${CMAKE_DL_LIBS})

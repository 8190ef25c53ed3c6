// The Python module `_C`: the FFI handlers as capsules, which Python registers with JAX by name.
#include <cuda_runtime_api.h>
#include <nanobind/nanobind.h>

#include "xla/ffi/api/c_api.h"

namespace nb = nanobind;

namespace jax_flashmla {

// The build makes handlers.inc of jax_flashmla/_targets.py: JAX_FLASHMLA_HANDLER(name) for each
// target. XLA_FFI_DEFINE_HANDLER_SYMBOL defines the function of that name, in the folder of its op.
#define JAX_FLASHMLA_HANDLER(name) extern "C" XLA_FFI_Error* name(XLA_FFI_CallFrame* call_frame);
#include "handlers.inc"
#undef JAX_FLASHMLA_HANDLER

namespace {

nb::dict Handlers() {
  nb::dict handlers;
#define JAX_FLASHMLA_HANDLER(name) handlers[#name] = nb::capsule(reinterpret_cast<void*>(name));
#include "handlers.inc"
#undef JAX_FLASHMLA_HANDLER
  return handlers;
}

// What the extension was compiled with, for the loader to compare with what it runs on.
nb::dict BuildInfo() {
  nb::dict info;
  info["ffi_api"] = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  info["cudart"] = CUDART_VERSION;
  return info;
}

// The number of SMs of the first visible device, None where there is no device or no driver. This
// reads an attribute of the driver and creates no CUDA context, so it is safe before JAX starts.
nb::object SmCount() {
  int count = 0;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0) == cudaSuccess) {
    return nb::int_(count);
  }
  cudaGetLastError();  // so that no later call reports this error as its own
  return nb::none();
}

}  // namespace

NB_MODULE(_C, m) {
  m.def("handlers", &Handlers, "Maps the name of each FFI target to its handler.");
  m.def("build_info", &BuildInfo, "The versions of XLA's FFI and of CUDA compiled against.");
  m.def("sm_count", &SmCount, "The SMs of the first CUDA device, None where there is none.");
}

}  // namespace jax_flashmla

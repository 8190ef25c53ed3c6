// The Python module: hands the FFI handlers to Python as capsules, which JAX registers by name.
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

}  // namespace

NB_MODULE(_C, m) {
  m.def("handlers", &Handlers, "Maps the name of each FFI target to its handler.");
  m.def("build_info", &BuildInfo, "The versions of XLA's FFI and of CUDA compiled against.");
}

}  // namespace jax_flashmla

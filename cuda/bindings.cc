// The Python module: hands the FFI handlers to Python as capsules, which JAX registers by name.
#include <cuda_runtime_api.h>
#include <nanobind/nanobind.h>

#include "xla/ffi/api/c_api.h"

namespace nb = nanobind;

namespace jax_flashmla {

// Each is defined by XLA_FFI_DEFINE_HANDLER_SYMBOL in the file of its op.
extern "C" {
XLA_FFI_Error* TileScheduler(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* DenseDecode(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* ScheduleAndDecode(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* AppendKv(XLA_FFI_CallFrame* call_frame);
}

namespace {

nb::capsule Capsule(XLA_FFI_Handler* handler) {
  return nb::capsule(reinterpret_cast<void*>(handler));
}

nb::dict Handlers() {
  nb::dict handlers;
  handlers["jax_flashmla_tile_scheduler"] = Capsule(TileScheduler);
  handlers["jax_flashmla_dense_decode"] = Capsule(DenseDecode);
  handlers["jax_flashmla_schedule_and_decode"] = Capsule(ScheduleAndDecode);
  handlers["jax_flashmla_append_kv"] = Capsule(AppendKv);
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

#!/usr/bin/env bash
# XLA FFI: asking a value that was read without an error for its error throws.
#
# Versions   jax 0.10.2 and jaxlib 0.10.2, g++ 12.2 (run here). Linux, CPU, 2026-12-01.
# Behaviour  A handler that binds RemainingArgs reads an operand with args.get<Buffer>(i), which returns
#            ErrorOr<Buffer>. ffi::Error itself has two states: a default ffi::Error means success, and
#            error.failure() asks. So `ffi::Error e = operand.error(); if (e.failure()) return e;` looks
#            right, and compiles. But error() of an ErrorOr that holds a value throws
#            std::bad_variant_access. XLA catches it: every call with valid operands fails, and the
#            message names neither the operand nor the handler.
# Expected   An error() that says success, as absl::StatusOr has with status().
# Way out    Ask operand.has_error() first, and only then for operand.error().
#
# Output seen:
#   has_error() first: [2. 3.]
#   error() of a value: XLA FFI call failed: std::get: wrong index for variant
#   as stated
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "jax==${JAX_VERSION:-0.10.2}" "jaxlib==${JAX_VERSION:-0.10.2}"
include=$("$folder/venv/bin/python" -c 'import jax; print(jax.ffi.include_dir())')

cat > "$folder/handlers.cc" << 'END'
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using Vector = ffi::Buffer<ffi::F32, 1>;

template <bool kAsksFirst>
ffi::Error AddOne(ffi::RemainingArgs args, ffi::Result<Vector> out) {
  const auto x = args.get<Vector>(0);
  if constexpr (kAsksFirst) {
    if (x.has_error()) return x.error();
  } else {
    if (ffi::Error error = x.error(); error.failure()) return error;
  }
  for (size_t i = 0; i < x->element_count(); ++i) {
    out->typed_data()[i] = x->typed_data()[i] + 1;
  }
  return ffi::Error::Success();
}

auto Binding() { return ffi::Ffi::Bind().RemainingArgs().Ret<Vector>(); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(asks_first, AddOne<true>, Binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(takes_the_error, AddOne<false>, Binding());
END
"${CXX:-g++}" -std=c++17 -O1 -shared -fPIC -isystem "$include" -o "$folder/handlers.so" "$folder/handlers.cc"

cat > "$folder/show.py" << 'END'
import ctypes
import sys

import jax
import jax.numpy as jnp

library = ctypes.CDLL(sys.argv[1])
for name in ("asks_first", "takes_the_error"):
    capsule = jax.ffi.pycapsule(getattr(library, name))
    jax.ffi.register_ffi_target(name, capsule, platform="cpu")


def call(name):
    x = jnp.array([1, 2], jnp.float32)
    return jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(x.shape, x.dtype))(x)


first = call("asks_first")
print(f"has_error() first: {first}")
try:
    message = f"no error, {call('takes_the_error').block_until_ready()}"
except Exception as error:
    message = str(error).partition(": ")[2].partition(" [")[0]
print(f"error() of a value: {message}")
as_stated = first.tolist() == [2, 3] and "wrong index for variant" in message
print("as stated" if as_stated else "CHANGED: the finding no longer holds")
sys.exit(not as_stated)
END
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/show.py" "$folder/handlers.so"

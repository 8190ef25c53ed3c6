#!/usr/bin/env bash
# jax.ffi: attributes that compare equal share one entry of the lowering cache.
#
# Versions   jax 0.10.2 and jaxlib 0.10.2 (run here); jax 0.12.0.1 does the same. Linux, CPU, 2026-12-01.
# Behaviour  An attribute of `jax.ffi.ffi_call` is lowered with the MLIR type of its Python type: 7 as
#            i64, np.int32(7) as i32, 7.0 as f64, True as i1. Two calls in one program that differ in an
#            attribute's type alone share a cache entry, because 7 == 7.0 and True == 1.0 in Python. The
#            second call gets the attribute of the first, with its type: a handler that binds
#            Attr<double>("n") is given an integer, but only in programs where the other call comes first.
# Expected   Each call has the attribute that it was given.
# Way out    Give an attribute one type everywhere: np.float32(n), not n.
#
# Output seen:
#   alone:    7 -> 7 : i64   7.0 -> 7.000000e+00 : f64   True -> true
#   together: 7, then 7.0 -> 7 : i64, 7 : i64
#   together: 7.0, then 7 -> 7.000000e+00 : f64, 7.000000e+00 : f64
#   together: True, then 1.0 -> true, true
#   as stated
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "jax==${JAX_VERSION:-0.10.2}" "jaxlib==${JAX_VERSION:-0.10.2}"

cat > "$folder/show.py" << 'END'
import re
import sys

import jax
import jax.numpy as jnp


def lowered(*values):
    """The attribute n of calls with these values, all in one program."""

    def program(x):
        for n in values:
            x = jax.ffi.ffi_call("a_target", jax.ShapeDtypeStruct(x.shape, x.dtype))(x, n=n)
        return x

    traced = jax.jit(program).trace(jax.ShapeDtypeStruct((2,), jnp.float32))
    return re.findall(r"\{n = (.*?)\}", traced.lower(lowering_platforms=("cuda",)).as_text())


(integer,), (real,), (boolean,) = lowered(7), lowered(7.0), lowered(True)
print(f"alone:    7 -> {integer}   7.0 -> {real}   True -> {boolean}")
pairs = [(7, 7.0), (7.0, 7), (True, 1.0)]
together = [lowered(*pair) for pair in pairs]
for (first, second), attributes in zip(pairs, together):
    print(f"together: {first}, then {second} -> {', '.join(attributes)}")
as_stated = (integer, real, boolean) == ("7 : i64", "7.000000e+00 : f64", "true") and (
    together == [[integer, integer], [real, real], [boolean, boolean]]
)
print("as stated" if as_stated else "CHANGED: the finding no longer holds")
sys.exit(not as_stated)
END
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/show.py"

#!/usr/bin/env bash
# jnp.zeros of float8_e8m0fnu is NaN; np.zeros of it is 2^-127.
#
# Versions   jax 0.10.2, jaxlib 0.10.2, ml_dtypes 0.6.0, numpy 2.4.6 (run here); jax 0.12.0.1 with ml_dtypes
#            0.7.0 does the same. Linux, CPU, 2026-12-01.
# Behaviour  float8_e8m0fnu holds the scales of 8-bit caches. All its values are powers of two, so that it
#            has no zero. np.zeros clears the bytes, and byte 0 is 2^-127: harmless. All that converts a 0
#            makes it NaN without an error: jnp.zeros, jnp.zeros_like, x.at[...].set(0), jnp.pad, np.full.
#            A cache of scales from jnp.zeros is NaN where nothing was written, and 0 * NaN is NaN: a
#            masked token with such a scale spoils the result. -0.5 becomes NaN too.
# Expected   An error, or one value for all: torch 2.13 converts 0.0 to 2^-127.
# Way out    jnp.ones, or the bytes: jax.lax.bitcast_convert_type(jnp.zeros(n, jnp.uint8), dtype).
#
# Output seen:
#   np.zeros:                    0x00 5.877471754111438e-39
#   np.full(2, 0):               0xff nan
#   jnp.zeros:                   0xff nan
#   jnp.zeros_like:              0xff nan
#   .at[0].set(0):               0xff nan
#   jnp.pad:                     0xff nan
#   jnp.asarray of np.zeros:     0x00 5.877471754111438e-39
#   bitcast of jnp.zeros, uint8: 0x00 5.877471754111438e-39
#   as stated
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "jax==${JAX_VERSION:-0.10.2}" "jaxlib==${JAX_VERSION:-0.10.2}" \
  "ml_dtypes==${ML_DTYPES_VERSION:-0.6.0}" "numpy==${NUMPY_VERSION:-2.4.6}"

cat > "$folder/show.py" << 'END'
import math

import jax
import jax.numpy as jnp
import numpy as np

E8M0 = jnp.float8_e8m0fnu
CASES = {
    "np.zeros": lambda: np.zeros(2, E8M0),
    "np.full(2, 0)": lambda: np.full(2, 0, E8M0),
    "jnp.zeros": lambda: jnp.zeros(2, E8M0),
    "jnp.zeros_like": lambda: jnp.zeros_like(jnp.ones(2, E8M0)),
    ".at[0].set(0)": lambda: jnp.ones(2, E8M0).at[0].set(0),
    "jnp.pad": lambda: jnp.pad(jnp.ones(2, E8M0), (1, 0)),
    "jnp.asarray of np.zeros": lambda: jnp.asarray(np.zeros(2, E8M0)),
    "bitcast of jnp.zeros, uint8": lambda: jax.lax.bitcast_convert_type(
        jnp.zeros(2, jnp.uint8), E8M0
    ),
}
CLEARED = {"np.zeros", "jnp.asarray of np.zeros", "bitcast of jnp.zeros, uint8"}

as_stated = True
for name, make in CASES.items():
    first = np.asarray(make())[:1]
    byte, value = first.view(np.uint8)[0], float(first.astype(np.float32)[0])
    print(f"{name + ':':28s} {byte:#04x} {value}")
    if name in CLEARED:
        as_stated &= byte == 0 and value == 2.0**-127
    else:
        as_stated &= byte == 255 and math.isnan(value)
print("as stated" if as_stated else "CHANGED: the finding no longer holds")
raise SystemExit(not as_stated)
END
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/show.py"

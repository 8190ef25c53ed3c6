#!/usr/bin/env bash
# jnp.exp2 of an integer is not a power of two, and jnp.log2 of a power of two is not an integer.
#
# Versions   jax 0.10.2 and jaxlib 0.10.2 (run here); jax 0.12.0.1 does the same. Linux, x86-64 CPU, 2026-12-01.
# Behaviour  2^k is a float32 for every integer k from -126 to 127. jnp.exp2 hits few of them, and gives 0 for
#            -126. The error is small, and it matters for scales that must be powers of two, as those of 8-bit
#            caches which store an exponent: of a result a bit below 2^k the exponent field reads k - 1.
#            Values that were divided by the one and are multiplied by the other come back as a half.
#            exp2(ceil(log2(x))) goes wrong in its log2 as well, by a factor of 2.
# Expected   Exact results where the exact result is a float32.
# Way out    jnp.ldexp(1.0, k) or 2.0**k, and jnp.frexp(x) in place of log2. They are exact.
#
# Output seen (the numbers may differ on another CPU):
#   exp2:            221 of 254 are not 2^k; the exponent field is too low for 113
#   ldexp:             0 of 254 are not 2^k; the exponent field is too low for 0
#   2.0**k:            0 of 254 are not 2^k; the exponent field is too low for 0
#   ceil(log2(2^k)):  23 of 254 are not k
#   frexp(2^k):        0 of 254 are not k
#   exp2(-126) = 0.0, exp2(13) = 8192.00391
#   as stated
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "jax==${JAX_VERSION:-0.10.2}" "jaxlib==${JAX_VERSION:-0.10.2}"

cat > "$folder/show.py" << 'END'
import jax
import jax.numpy as jnp
import numpy as np

k = np.arange(-126, 128)
true = np.ldexp(np.float32(1), k)
FUNCTIONS = {
    "exp2": jnp.exp2,
    "ldexp": lambda k: jnp.ldexp(jnp.float32(1), k.astype(jnp.int32)),
    "2.0**k": lambda k: 2.0**k,
}

wrong, too_low = {}, {}
for name, function in FUNCTIONS.items():
    result = np.asarray(jax.jit(function)(k.astype(np.float32)))
    field = (result.view(np.int32) >> 23) - 127
    wrong[name] = int((result != true).sum())
    too_low[name] = int((field < k).sum())
    print(
        f"{name + ':':16s} {wrong[name]:3d} of {len(k)} are not 2^k; "
        f"the exponent field is too low for {too_low[name]}"
    )
EXPONENTS = {
    "ceil(log2(2^k))": lambda x: jnp.ceil(jnp.log2(x)),
    "frexp(2^k)": lambda x: jnp.frexp(x)[1] - 1,
}
for name, function in EXPONENTS.items():
    wrong[name] = int((np.asarray(jax.jit(function)(true)) != k).sum())
    print(f"{name + ':':16s} {wrong[name]:3d} of {len(k)} are not k")
print(f"exp2(-126) = {jnp.exp2(-126.0)}, exp2(13) = {jnp.exp2(13.0):.9g}")
as_stated = wrong["exp2"] > 0 and too_low["exp2"] > 0 and wrong["ceil(log2(2^k))"] > 0
as_stated &= wrong["ldexp"] == wrong["2.0**k"] == wrong["frexp(2^k)"] == 0
print("as stated" if as_stated else "CHANGED: the finding no longer holds")
raise SystemExit(not as_stated)
END
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/show.py"

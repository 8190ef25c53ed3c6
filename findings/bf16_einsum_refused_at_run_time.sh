#!/usr/bin/env bash
# On a CPU, XLA compiles an einsum of bfloat16 with float32 sums and then refuses to run it.
#
# Versions   jax 0.10.2 and jaxlib 0.10.2 (run here); jax 0.12.0.1 does the same. Linux, x86-64 CPU with
#            avx512_bf16 (limited to AVX2 by XLA_FLAGS too), 2026-12-01.
# Behaviour  preferred_element_type=float32 asks for products of bfloat16 that are summed in float32, as
#            attention does on a GPU. On a CPU most such einsums work. But "bhst,btd->bshd", weights times
#            values, lowers and compiles, and the call raises a JaxRuntimeError. The axes of its result are
#            not in the order of dot_general (batch, left, right). With "bhst,btd->bhsd" it runs, and so it
#            does with float16.
# Expected   It runs whatever the order of the axes, or does not compile.
# Way out    Compute "bhst,btd->bhsd" and swap the axes then; or cast the operands to float32 on a CPU.
#            Products of bfloat16 are exact in float32, so that this changes no more than rounding.
#
# Output seen:
#   bfloat16, bhst,btd->bshd:               compiled; refused: Unsupported element type for DotThunk::Execute: BF16 x BF16 = F32
#   bfloat16, bhst,btd->bhsd:               compiled; ran
#   bfloat16, bhst,btd->bhsd, axes swapped: compiled; ran
#   float16, bhst,btd->bshd:                compiled; ran
#   as stated
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "jax==${JAX_VERSION:-0.10.2}" "jaxlib==${JAX_VERSION:-0.10.2}"

cat > "$folder/show.py" << 'END'
import functools

import jax
import jax.numpy as jnp

einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
refused, accepted = "bhst,btd->bshd", "bhst,btd->bhsd"
CASES = {
    f"bfloat16, {refused}": (jnp.bfloat16, functools.partial(einsum, refused)),
    f"bfloat16, {accepted}": (jnp.bfloat16, functools.partial(einsum, accepted)),
    f"bfloat16, {accepted}, axes swapped": (
        jnp.bfloat16,
        lambda weights, values: einsum(accepted, weights, values).swapaxes(1, 2),
    ),
    f"float16, {refused}": (jnp.float16, functools.partial(einsum, refused)),
}


def run(dtype, function):
    weights = jnp.full((2, 16, 1, 64), 1 / 64, dtype)
    values = jnp.ones((2, 64, 32), dtype)
    try:
        compiled = jax.jit(function).lower(weights, values).compile()
    except Exception as error:
        return f"did not compile; {error}"
    try:
        result = jax.block_until_ready(compiled(weights, values))
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        return f"compiled; refused: {message[max(0, message.find('Unsupported')) :]}"
    return "compiled; ran" if bool((result == 1).all()) else "compiled; a wrong result"


seen = []
for name, case in CASES.items():
    seen.append(run(*case))
    print(f"{name + ':':39s} {seen[-1]}")
as_stated = (
    seen[0].startswith("compiled; refused: Unsupported element type")
    and seen[1:] == ["compiled; ran"] * 3
)
print("as stated" if as_stated else "CHANGED: the finding no longer holds")
raise SystemExit(not as_stated)
END
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/show.py"

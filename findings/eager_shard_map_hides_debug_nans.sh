#!/usr/bin/env bash
# After an eager jax.shard_map, functions that are jitted already do not see jax_debug_nans any more.
#
# Versions   jax 0.10.2 and jaxlib 0.10.2 (run here); jax 0.12.0.1 does the same. Linux, CPU, 2026-12-01.
# Behaviour  jax.config.update("jax_debug_nans", True) makes every jitted function check its results, also
#            one that ran before. Not so in a thread in which the context manager jax.debug_nans has been
#            used, and an eager jax.shard_map uses it inside. There the flag reads True, but a function that
#            ran before still passes NaNs on. A function that is new does check, and so do other threads.
# Expected   The update counts for every jitted function.
# Way out    Set the flag before the first call, or run the function in another thread, or call
#            jax.clear_caches() after the update.
#
# Output seen:
#   nothing between:        a NaN raises, with the caches cleared raises
#   shard_map under jit:    a NaN raises, with the caches cleared raises
#   eager shard_map:        a NaN passes, with the caches cleared raises
#   with debug_nans(False): a NaN passes, with the caches cleared raises
#   as stated
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "jax==${JAX_VERSION:-0.10.2}" "jaxlib==${JAX_VERSION:-0.10.2}"

cat > "$folder/show.py" << 'END'
import threading

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

jax.config.update("jax_num_cpu_devices", 2)
mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
sharded = jax.shard_map(jnp.sin, mesh=mesh, in_specs=P("x"), out_specs=P("x"))


def context_manager():
    with jax.debug_nans(False):
        pass


BETWEEN = {
    "nothing between": lambda: None,
    "shard_map under jit": lambda: jax.jit(sharded)(jnp.arange(4.0)),
    "eager shard_map": lambda: sharded(jnp.arange(4.0)),
    "with debug_nans(False)": context_manager,
}


def what_a_nan_does(function):
    try:
        function(jnp.float32(-1)).block_until_ready()
    except FloatingPointError:
        return "raises"
    return "passes"


def run(between, seen):
    log = jax.jit(lambda x: jnp.log(x))
    jax.config.update("jax_debug_nans", False)
    what_a_nan_does(log)
    between()
    jax.config.update("jax_debug_nans", True)
    seen.append(what_a_nan_does(log))
    jax.clear_caches()
    seen.append(what_a_nan_does(log))


as_stated = True
for name, between in BETWEEN.items():
    seen = []
    thread = threading.Thread(target=run, args=(between, seen))
    thread.start()
    thread.join()
    print(f"{name + ':':23s} a NaN {seen[0]}, with the caches cleared {seen[1]}")
    hidden = name in ("eager shard_map", "with debug_nans(False)")
    as_stated &= seen == ["passes" if hidden else "raises", "raises"]
print("as stated" if as_stated else "CHANGED: the finding no longer holds")
raise SystemExit(not as_stated)
END
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/show.py" | grep -v "^Invalid nan value"

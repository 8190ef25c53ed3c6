"""What one looks at programs with: shapes, jaxprs, names, profiles, debug prints."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import D_K, D_V, assert_bit_equal
from decode_loop import COMMAND_BUFFERS
from decode_step import serve, serve_for, serve_inputs, serve_structs
from lowering import (
    APPEND,
    SCHEDULE_AND_DECODE,
    primitives,
)


def test_shapes_without_running():
    out, lse, k_cache = jax.eval_shape(serve, *serve_structs(3, 20, 6))
    assert (out.shape, out.dtype) == ((3, 1, 16, D_V), jnp.bfloat16)
    assert (lse.shape, lse.dtype) == ((3, 16, 1), jnp.float32)
    assert (k_cache.shape, k_cache.dtype) == ((20, 64, 1, D_K), jnp.bfloat16)


def test_ops_stand_in_jaxprs_by_name():
    ours = ["append_kv_cache", "get_mla_metadata", "flash_mla_with_kvcache"]
    structs = serve_structs(3, 20, 6)
    assert [name for name in primitives(serve, *structs) if name in ours] == ours
    assert [name for name in primitives(jax.checkpoint(serve), *structs) if name in ours] == ours


@pytest.mark.usefixtures("compiled_kernels")
def test_names_in_a_compiled_program(h200):
    """What a profile shows: scopes of the caller's, and the op."""

    @jax.named_scope("layer")
    def step(*arrays):
        return serve_for("cuda")(*arrays)

    structs = serve_structs(3, 20, 6, sharding=h200)
    hlo = jax.jit(step).lower(*structs).compile().as_text()
    found = re.findall(r'custom_call_target="(jax_flashmla_\w+)".*op_name="([^"]*)"', hlo)
    assert dict(found) == {
        APPEND: "jit(step)/layer/append_kv_cache/ffi_call",
        SCHEDULE_AND_DECODE: "jit(step)/layer/flash_mla_with_kvcache/ffi_call",
    }


def test_names_of_the_reference_too():
    text = jax.jit(serve_for("xla")).lower(*serve_structs(3, 20, 6)).as_text(debug_info=True)
    for name in ("append_kv_cache", "flash_mla_with_kvcache"):
        assert re.search(rf'"jit\(step\)/{name}/\w+', text), name


def test_profile(implementation, tmp_path):
    """With the caller's annotation in it, and the kernels by name."""
    arrays, _ = serve_inputs(2, 10, 4)
    options = COMMAND_BUFFERS["off"] if implementation == "cuda" else {}
    step = jax.jit(serve_for(implementation)).lower(*arrays).compile(compiler_options=options)
    jax.block_until_ready(step(*arrays))
    with jax.profiler.trace(tmp_path), jax.profiler.TraceAnnotation("one decode step"):
        jax.block_until_ready(step(*arrays))
    (file,) = tmp_path.rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    names = {event.name for plane in planes for line in plane.lines for event in line.events}
    assert "one decode step" in names
    if implementation == "cuda":
        assert [name for name in names if "jax_flashmla" in name]


def test_debug_print_and_callback(implementation, capfd):
    arrays, after = serve_inputs(2, 10, 4)
    seen = []

    @jax.jit
    def step(*arrays):
        jax.debug.print("before {}", arrays[4])
        out, lse, k_cache = serve_for(implementation)(*arrays)
        jax.debug.print("after {}", jnp.isfinite(lse).sum())
        jax.debug.callback(lambda lse: seen.append(np.asarray(lse)), lse)
        return out, lse, k_cache

    _, lse, _ = step(*arrays)
    jax.effects_barrier()
    printed = capfd.readouterr().out
    assert f"before {after.cache_seqlens}" in printed
    assert f"after {lse.size}" in printed
    assert_bit_equal(seen, [lse])

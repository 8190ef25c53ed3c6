"""Tools for looking into running programs: profiles, debug prints, callbacks."""

import jax
import jax.numpy as jnp
import numpy as np
from cases import assert_bit_equal
from decode_loop import COMMAND_BUFFERS
from decode_step import serve_for, serve_inputs


def test_profile(implementation, tmp_path):
    """A profile has the caller's annotation and the names of the kernels."""
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

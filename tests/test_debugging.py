"""jax_debug_nans and jax_debug_infs name the op, and are silent if there is nothing to find.

An op's NaN and infinities are documented results: NaN for a sequence longer than its table, +inf
for the lse of a query that sees no token. A call with them must end in JAX's FloatingPointError.
"""

import concurrent.futures
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_flashmla as fm

B, PAGE, D_K, D_V = 2, 16, 576, 512


def decode(lengths, implementation, given=False):
    q, k_cache = np.ones((B, 1, 4, D_K), jnp.bfloat16), np.ones((B, PAGE, 1, D_K), jnp.bfloat16)
    options = {"implementation": implementation}
    schedule = fm.get_mla_metadata(lengths, 4, 1, num_sms=2, **options) if given else (None, None)
    table = np.arange(B, dtype=np.int32)[:, None]
    return fm.flash_mla_with_kvcache(q, k_cache, table, lengths, D_V, *schedule, **options)


def append(arrays, implementation):
    return fm.append_kv_cache(*arrays, np.ones(1, np.int32), implementation=implementation)


def lengths(*values):
    return np.array(values, np.int32)


def cache_and_token(value):
    shape = (1, PAGE, 1, D_K)
    return np.zeros(shape, jnp.bfloat16), np.full((1, 1, D_K), value, jnp.bfloat16)


def in_a_loop(function, x):
    def body(_, total):
        return total + sum(leaf.sum(dtype=jnp.float32) for leaf in jax.tree.leaves(function(x)))

    return jax.lax.fori_loop(0, 2, body, jnp.float32(0))


def in_shard_map(function, x):
    devices = min(2, jax.device_count())
    mesh = jax.make_mesh((devices,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P())(x)


def stacked(x):
    return jax.tree.map(lambda leaf: np.stack([leaf, leaf]), x)


WAYS = {
    "eager": lambda f, x: f(x),
    "jit": lambda f, x: jax.jit(f)(x),
    "vmap": lambda f, x: jax.vmap(f)(stacked(x)),
    "jit of vmap": lambda f, x: jax.jit(jax.vmap(f))(stacked(x)),
    "fori_loop": in_a_loop,
    "jit of fori_loop": lambda f, x: jax.jit(functools.partial(in_a_loop, f))(x),
    "shard_map": in_shard_map,
    "jit of shard_map": lambda f, x: jax.jit(functools.partial(in_shard_map, f))(x),
}
NAMED_INSTEAD = {  # here JAX names the caller of the op, as it does for jax.numpy.log
    "fori_loop": "in scan",
    "jit of fori_loop": "in scan",
    "shard_map": "in sharded computation",
    "jit of shard_map": "in sharded computation",
}
DECODE, APPEND = "in flash_mla_with_kvcache", "in append_kv_cache"
CASES = {  # flag, function, arguments with and without a special value, op, ways
    "decode, NaN": ("nans", decode, lengths(3, PAGE + 1), lengths(3, PAGE), DECODE, WAYS),
    "decode, inf": ("infs", decode, lengths(3, 0), lengths(3, 1), DECODE, ["eager", "jit"]),
    "decode with a schedule, NaN": (
        "nans",
        functools.partial(decode, given=True),
        lengths(3, PAGE + 1),
        lengths(3, PAGE),
        DECODE,
        ["eager", "jit"],
    ),
    # Here the arguments hold NaN. Under vmap JAX names a reshape, in shard_map it recurses itself.
    "append, NaN": (
        "nans",
        append,
        cache_and_token(np.nan),
        cache_and_token(1),
        APPEND,
        ["eager", "jit", "fori_loop", "jit of fori_loop"],
    ),
    "append, inf": (
        "infs", append, cache_and_token(np.inf), cache_and_token(1), APPEND, ["eager", "jit"]
    ),
}  # fmt: skip
RUNS = [(case, way) for case, (*_, ways) in CASES.items() for way in ways]


def run_debugging(what, call, *args):
    """call(*args) with jax_debug_nans or jax_debug_infs.

    In a thread of its own: in a thread where an eager shard_map has run, functions that are jitted
    already do not see the flag (findings/eager_shard_map_hides_debug_nans.sh).
    """
    jax.config.update(f"jax_debug_{what}", True)
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            return jax.block_until_ready(pool.submit(call, *args).result())
    finally:
        jax.config.update(f"jax_debug_{what}", False)


@pytest.mark.parametrize(("case", "way"), RUNS)
def test_error_names_the_op(case, way, implementation):
    what, function, special, good, op, _ = CASES[case]
    function = functools.partial(function, implementation=implementation)
    special, good = jax.tree.map(jnp.asarray, (special, good))
    run_debugging(what, WAYS[way], function, good)
    with pytest.raises(FloatingPointError, match=NAMED_INSTEAD.get(way, op)):
        run_debugging(what, WAYS[way], function, special)


@pytest.mark.parametrize("what", ["nans", "infs"])
def test_schedules_hold_neither(what):
    def make(lengths):
        return fm.get_mla_metadata(lengths, 4, 1)[1]

    for run in (make, jax.jit(make)):
        assert run_debugging(what, run, lengths(70, 0)).tolist() == [0, 2, 3]


@pytest.mark.parametrize("what", ["nans", "infs"])
def test_merge_of_an_empty_part_makes_no_infinity(what):
    """An infinity in the arguments makes none in the results, nor on the way to them."""
    outs, lses = np.ones((2, 1, 1, 4, 8), np.float32), np.zeros((2, 1, 4, 1), np.float32)
    lses[1] = np.inf
    out, lse = run_debugging(what, fm.merge_attention_states, outs, jnp.asarray(lses))
    assert out.tolist() == outs[0].tolist()
    assert lse.tolist() == lses[0].tolist()
    lses[:] = {"nans": np.nan, "infs": np.inf}[what]
    with pytest.raises(FloatingPointError):
        run_debugging(what, fm.merge_attention_states, outs, jnp.asarray(lses))


def test_disable_jit():
    """An eager call is compiled as one operation, whatever jax_disable_jit says."""
    expected = decode(lengths(3, PAGE), "xla")
    with jax.disable_jit():
        actual = decode(lengths(3, PAGE), "xla")
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, e)

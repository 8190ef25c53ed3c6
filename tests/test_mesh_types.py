"""Arrays typed as unreduced or reduced over a mesh axis, in and out of shard_map.

Of an unreduced array each device holds a part of a sum. An op would compute with that part, so all
of them refuse it. Reduced arrays, a type for derivatives, are refused too.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_flashmla as fm

I32, F32 = jnp.int32, jnp.float32


def decode(q, k_cache, block_table, cache_seqlens, part_bounds, first_part, num_splits, offset):
    schedule = fm.TileSchedulerMetadata(part_bounds, first_part, 4, 1)
    arrays = q, k_cache, block_table, cache_seqlens
    options = {"causal": True, "causal_offset": offset}
    return fm.flash_mla_with_kvcache(*arrays, 4, schedule, num_splits, **options)


OPS = {  # function, and the shape and dtype of each array
    "get_mla_metadata": (
        lambda cache_seqlens: fm.get_mla_metadata(cache_seqlens, 4, 1),
        {"cache_seqlens": ((2,), I32)},
    ),
    "flash_mla_with_kvcache": (
        decode,
        {
            "q": ((2, 1, 4, 8), F32),
            "k_cache": ((2, 16, 1, 8), F32),
            "block_table": ((2, 1), I32),
            "cache_seqlens": ((2,), I32),
            "tile_scheduler_metadata.part_bounds": ((3, 2), I32),
            "tile_scheduler_metadata.first_part": ((2,), I32),
            "num_splits": ((3,), I32),
            "causal_offset": ((2,), I32),
        },
    ),
    "append_kv_cache": (
        fm.append_kv_cache,
        {
            "k_cache": ((2, 16, 1, 8), F32),
            "new_kv": ((2, 1, 8), F32),
            "slot_mapping": ((2,), I32),
        },
    ),
    "append_kv_cache without a head axis": (
        fm.append_kv_cache,
        {"k_cache": ((2, 16, 1, 8), F32), "new_kv": ((2, 8), F32), "slot_mapping": ((2,), I32)},
    ),
    "append_kv_cache of no tokens": (
        fm.append_kv_cache,
        {"k_cache": ((2, 16, 1, 8), F32), "new_kv": ((0, 1, 8), F32), "slot_mapping": ((0,), I32)},
    ),
    "get_slot_mapping": (
        lambda block_table, positions: fm.get_slot_mapping(block_table, positions, 16),
        {"block_table": ((2, 1), I32), "positions": ((2, 2), I32)},
    ),
    "merge_attention_states": (
        fm.merge_attention_states,
        {"outs": ((2, 2, 1, 4, 8), F32), "lses": ((2, 2, 4, 1), F32)},
    ),
    "merge_attention_states_across": (
        lambda out, lse: fm.merge_attention_states_across(out, lse, "x"),
        {"out": ((2, 1, 4, 8), F32), "lse": ((2, 4, 1), F32)},
    ),
}
ARGUMENTS = [(op, name) for op, (_, arrays) in OPS.items() for name in arrays]
INSIDE_ONLY = "merge_attention_states_across"


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh(
        (2,), ("x",), axis_types=(AxisType.Explicit,), devices=jax.devices("cpu")[:2]
    )


def arrays_of(op):
    return [jnp.zeros(shape, dtype) for shape, dtype in OPS[op][1].values()]


def retyped(x, kind):
    """Inside shard_map: x as another type over the axis x."""
    if kind == "unreduced":
        x = jax.lax.pcast(x, "x", to="varying")
    return jax.lax.pcast(x, "x", to=kind)


@pytest.mark.parametrize("kind", ["unreduced", "reduced"])
@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_inside_shard_map(op, name, kind, mesh):
    """One argument is of that type, the others are not."""
    function, names = OPS[op]
    index = list(names).index(name)

    def call(*arrays):
        arrays = list(arrays)
        arrays[index] = retyped(arrays[index], kind)
        return function(*arrays)

    run = jax.shard_map(call, mesh=mesh, in_specs=P(), out_specs=P("x"), check_vma=True)
    words = {"unreduced": "each device holds only its part of a sum", "reduced": "typed as reduced"}
    with jax.set_mesh(mesh), pytest.raises(NotImplementedError) as error:
        jax.eval_shape(run, *arrays_of(op))
    message = str(error.value)
    assert message.startswith(f"{name} is ")
    assert words[kind] in message
    assert "['x']" in message
    assert {"unreduced": "jax.lax.psum", "reduced": "to='varying'"}[kind] in message


@pytest.mark.parametrize("kind", ["unreduced", "reduced"])
@pytest.mark.parametrize(("op", "name"), [a for a in ARGUMENTS if a[0] != INSIDE_ONLY])
def test_outside_shard_map(op, name, kind, mesh):
    function, names = OPS[op]
    index = list(names).index(name)
    with jax.set_mesh(mesh):
        arrays = arrays_of(op)
        shape, dtype = names[name]
        spec = P(*[None] * len(shape), **{kind: {"x"}})
        arrays[index] = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        with pytest.raises(NotImplementedError, match=rf"^{name} is .*jax\.reshard outside"):
            jax.eval_shape(function, *arrays)


def test_ways_out_that_the_messages_name(mesh):
    """After the change that a message names, the op runs."""
    op = "append_kv_cache"
    function, _ = OPS[op]
    with jax.set_mesh(mesh):
        k_cache, new_kv, slots = arrays_of(op)
        slots = slots + jnp.arange(2, dtype=I32)

        @jax.jit
        @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(), out_specs=P())
        def summed(k_cache, new_kv, slots):
            return function(k_cache, jax.lax.psum(retyped(new_kv, "unreduced"), "x"), slots)

        assert np.asarray(summed(k_cache, new_kv + 1, slots))[0, :2, 0, 0].tolist() == [2, 2]

        @jax.jit
        @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(), out_specs=P("x"))
        def cast(k_cache, new_kv, slots):
            new_kv = jax.lax.pcast(retyped(new_kv, "reduced"), "x", to="varying")
            return function(k_cache, new_kv, slots)

        assert np.asarray(cast(k_cache, new_kv + 1, slots))[0, :2, 0, 0].tolist() == [1, 1]
        replicated = P(*[None] * 3)
        partial = jax.jit(
            lambda x: jnp.einsum(
                "ij,jkl->ikl", x, jnp.ones((2, 1, 8), out_sharding=P("x")),
                out_sharding=P(*replicated, unreduced={"x"}),
            )
        )(jax.device_put(jnp.ones((2, 2)), NamedSharding(mesh, P(None, "x"))))  # fmt: skip
        with pytest.raises(NotImplementedError, match="new_kv is unreduced"):
            function(k_cache, partial, slots)
        actual = function(k_cache, jax.reshard(partial, replicated), slots)
        assert np.asarray(actual)[0, :2, 0, 0].tolist() == [2, 2]

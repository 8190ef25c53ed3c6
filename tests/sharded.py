"""One decode step on a mesh whose axes split the sequences, the query heads and the pages."""

import dataclasses

import cases
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_flashmla as fm


@dataclasses.dataclass(frozen=True)
class Split:
    """The mesh axes over which sequences, heads and pages are split."""

    data: tuple[str, ...] = ()
    tensor: tuple[str, ...] = ()
    context: tuple[str, ...] = ()

    @property
    def in_specs(self):
        """Of q, k_cache, block_table and cache_seqlens."""
        data, tensor, context = (x or None for x in (self.data, self.tensor, self.context))
        return P(data, None, tensor), P(self.data + self.context or None), P(data, context), P(data)

    @property
    def out_specs(self):
        data, tensor = self.data or None, self.tensor or None
        return P(data, None, tensor), P(data, tensor)


def decode_step(split, **options):
    """The function of a device's arrays that jax.shard_map takes."""

    def step(q, k_cache, block_table, lengths):
        if not split.context:
            return fm.flash_mla_with_kvcache(
                q, k_cache, block_table, lengths, cases.D_V, causal=True, **options
            )
        capacity = block_table.shape[1] * k_cache.shape[1]
        left = lengths - jax.lax.axis_index(split.context) * capacity
        local = jnp.clip(left, 0, capacity)
        out, lse = fm.flash_mla_with_kvcache(
            q, k_cache, block_table, local, cases.D_V,
            causal=True, causal_offset=left - local, **options,
        )  # fmt: skip
        return fm.merge_attention_states_across(out, lse, split.context)

    return step


def on_mesh(split, mesh, **options):
    """The jitted step on a whole mesh."""
    return jax.jit(
        jax.shard_map(
            decode_step(split, **options),
            mesh=mesh,
            in_specs=split.in_specs,
            out_specs=split.out_specs,
        )
    )


def run(inputs, split, mesh, **options):
    """(out, lse) of the step, on inputs whose pages `split_pages` has split."""
    arrays = [
        jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), x.__getitem__)
        for x, spec in zip(dataclasses.astuple(inputs), split.in_specs, strict=True)
    ]
    with jax.set_mesh(mesh):
        return on_mesh(split, mesh, **options)(*arrays)


def split_pages(inputs, data, context):
    """The same sequences with a pool for each of data * context devices.

    Device (i, j) has the pages of the i-th of `data` runs of sequences and the j-th of `context`
    runs of table entries, numbered from 0. The pools follow each other in k_cache.
    """
    rng = np.random.default_rng(0)
    b, width = inputs.block_table.shape

    def unused_pages(count):
        return np.full_like(inputs.k_cache, np.nan, shape=(count, *inputs.k_cache.shape[1:]))

    table, pools = np.full_like(inputs.block_table, cases.UNUSED_ENTRY), []
    for i, j in np.ndindex(data, context):
        rows = slice(i * b // data, (i + 1) * b // data)
        columns = slice(j * width // context, (j + 1) * width // context)
        ids = inputs.block_table[rows, columns]
        used = ids != cases.UNUSED_ENTRY
        order = rng.permutation(used.sum()).astype(np.int32)
        table[rows, columns][used] = order
        pools.append(unused_pages(len(order)))
        pools[-1][order] = inputs.k_cache[ids[used]]
    pages = max(map(len, pools))
    k_cache = np.concatenate([x for pool in pools for x in (pool, unused_pages(pages - len(pool)))])
    return inputs.replace(k_cache=k_cache, block_table=table)

"""Writing new tokens into the paged cache."""

import jax
import jax.numpy as jnp

from ._checks import check_array, check_axis, static_int
from ._op import Op
from .reference import append as reference

_INT32_MAX = 2**31 - 1
_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def append_kv_cache(
    k_cache: jax.Array,
    new_kv: jax.Array,
    slot_mapping: jax.Array,
    *,
    implementation: str = "auto",
) -> jax.Array:
    """Writes tokens into slots of the paged cache, in place, and returns the cache.

    Inside jit the cache is updated in place where it is not used afterwards, in loops too: keep
    it in the carry, and donate it to the jitted function (`jax.jit(step, donate_argnums=...)`).
    Called outside jit, nothing is donated: the whole cache is copied.

    One buffer may hold the pages of all layers; then offset slots and block tables by layer.

    Under vmap the cache must be mapped; along axis 0, in and out, it is updated in place.

    Args:
      k_cache: [num_blocks, page_block_size, h_kv, d_k], bf16, fp16 or f32.
      new_kv: [tokens, h_kv, d_k] in k_cache's dtype; [tokens, d_k] where h_kv is 1.
      slot_mapping: i32 [tokens], page_id * page_block_size + offset for each token, as
        `get_slot_mapping` gives it. A slot outside the pool, a negative one included, writes
        nothing; of two equal slots either may win, in each element by itself.
      implementation: "auto", "cuda" or "xla".

    Returns:
      The cache.

    Raises:
      TypeError, ValueError: an argument is not as described.
      NotImplementedError: implementation is "cuda" and there is no kernel here; or vmap maps the
        tokens and not the cache.
    """
    k_cache, new_kv, slot_mapping = map(jnp.asarray, (k_cache, new_kv, slot_mapping))
    check_array("k_cache", k_cache, "num_blocks page_block_size h_kv d_k", _DTYPES)
    h_kv, d_k = k_cache.shape[2:]
    if new_kv.ndim == 2 and h_kv == 1:
        new_kv = new_kv[:, None]
    check_array("new_kv", new_kv, "tokens h_kv d_k", (k_cache.dtype,))
    check_array("slot_mapping", slot_mapping, "tokens", (jnp.int32,))
    check_axis("new_kv", new_kv, 1, h_kv, "the h_kv of k_cache")
    check_axis("new_kv", new_kv, 2, d_k, "the d_k of k_cache")
    check_axis("slot_mapping", slot_mapping, 0, new_kv.shape[0], "the tokens of new_kv")
    if 0 in k_cache.shape or 0 in new_kv.shape:
        return k_cache
    return append_kv_cache_op(k_cache, new_kv, slot_mapping, implementation=implementation)[0]


def get_slot_mapping(
    block_table: jax.Array, positions: jax.Array, page_block_size: int
) -> jax.Array:
    """The slots of tokens in the paged cache, for `append_kv_cache`.

    Args:
      block_table: i32 [b, max_blocks], the pages of each sequence.
      positions: i32 [b, n], 0-based positions of tokens in their sequences.
      page_block_size: tokens a page.

    Returns:
      i32 [b, n]: page_id * page_block_size + offset; -1 where the position is negative or past
      the table, or its table entry is negative or beyond what an int32 slot can address.

    Raises:
      TypeError, ValueError: an argument is not as described.
    """
    block_table, positions = jnp.asarray(block_table), jnp.asarray(positions)
    check_array("block_table", block_table, "b max_blocks", (jnp.int32,))
    check_array("positions", positions, "b n", (jnp.int32,))
    check_axis("positions", positions, 0, block_table.shape[0], "the batch of block_table")
    page = static_int("page_block_size", page_block_size)
    index = jnp.where(positions < 0, block_table.shape[1], positions // page)
    page_id = jnp.take_along_axis(block_table, index, axis=1, mode="fill", fill_value=-1)
    # An entry of garbage must not wrap round to somebody's slot.
    addressable = (page_id >= 0) & (page_id <= (_INT32_MAX - page + 1) // page)
    return jnp.where(addressable, jnp.where(addressable, page_id, 0) * page + positions % page, -1)


def _result_types(k_cache, new_kv, slot_mapping):
    return [(k_cache.shape, k_cache.dtype)]


def _reference(k_cache, new_kv, slot_mapping):
    return [reference.append(k_cache, new_kv, slot_mapping)]


def _kernel(k_cache, new_kv, slot_mapping):
    call = jax.ffi.ffi_call(
        "jax_flashmla_append_kv",
        [jax.ShapeDtypeStruct(k_cache.shape, k_cache.dtype)],
        input_output_aliases={0: 0},
    )
    return call(k_cache, new_kv, slot_mapping)


def _batch(args, dims, *, implementation):
    """Folds the mapped axis into the pages: example i owns the i-th run of them."""
    n = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
    if dims[0] is None:
        raise NotImplementedError(
            "vmap of append_kv_cache with k_cache not mapped would make a copy of the cache for "
            "each example; append all tokens in one call outside vmap, or map k_cache"
        )
    k_cache, new_kv, slots = (
        jnp.broadcast_to(x, (n, *x.shape)) if d is None else jnp.moveaxis(x, d, 0)
        for x, d in zip(args, dims, strict=True)
    )
    pool = k_cache.shape[1] * k_cache.shape[2]
    if n * pool > _INT32_MAX:
        raise NotImplementedError(
            f"vmap of append_kv_cache over {n} caches of {pool} slots exceeds the int32 range of "
            "slots; map fewer caches at a time"
        )
    first = jnp.arange(n, dtype=jnp.int32)[:, None] * pool
    slots = jnp.where((slots >= 0) & (slots < pool), slots + first, -1)
    (out,) = append_kv_cache_op(
        k_cache.reshape(-1, *k_cache.shape[2:]),
        new_kv.reshape(-1, *new_kv.shape[2:]),
        slots.reshape(-1),
        implementation=implementation,
    )
    return [out.reshape(k_cache.shape)], [0]


append_kv_cache_op = Op(
    name="append_kv_cache",
    result_types=_result_types,
    reference=_reference,
    kernel=_kernel,
    kernel_gap=lambda *_, **__: None,
    batch=_batch,
)

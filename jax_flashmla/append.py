"""Writing new tokens into the paged cache."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._checks import (
    INT32_MAX,
    as_array,
    check_array,
    check_axis,
    check_implementation,
    check_never_empty,
    int32_array,
    int32_holds_slots,
    static_int,
)
from ._op import Op, mapped_size
from .reference import append as reference

_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def append_kv_cache(
    k_cache: jax.Array,
    new_kv: jax.Array,
    slot_mapping: jax.Array,
    *,
    implementation: str = "auto",
) -> jax.Array:
    """Writes tokens into slots of the paged cache, in place, and returns the cache.

    Inside jit the cache is updated in place if the old one is not used afterwards, in loops too.
    Keep it in the loop's carry, and donate it to the jitted function
    (`jax.jit(step, donate_argnums=...)`). Outside jit nothing is donated, so the whole cache is
    copied.

    One buffer may hold the pages of all layers. Then offset slots and block tables by layer.

    Under vmap the cache must be mapped. It is updated in place if it is mapped along axis 0, in and
    out. For jax.export with symbolic sizes, give `jax.export.symbolic_shape` a constraint that
    bounds the slots of all examples to int32, such as "n*p <= 33554431" for n caches of p pages of
    64 tokens. Without it "auto" runs the reference, which works for any sizes.

    Paged caches are described in https://arxiv.org/abs/2309.06180.

    Args:
      k_cache: [num_blocks, page_block_size, h_kv, d_k], bf16, fp16 or f32.
      new_kv: [tokens, h_kv, d_k] in k_cache's dtype; or [tokens, d_k] where h_kv is 1.
      slot_mapping: i32 [tokens], page_id * page_block_size + offset for each token, as
        `get_slot_mapping` gives it. A slot outside the pool, such as -1, writes nothing. If two
        slots are equal, each element of the slot gets one of the two tokens' values.
      implementation: "auto": our kernel on a Hopper GPU, the reference in JAX ops elsewhere.
        "cuda": the kernel or an error. "xla": the reference.

    Returns:
      The cache.

    Raises:
      TypeError, ValueError: an argument is not as described.
      NotImplementedError: implementation is "cuda" and there is no kernel here; or vmap maps the
        tokens and not the cache; or an array is unreduced or reduced over a mesh axis.

    Example:
      >>> import jax.numpy as jnp, jax_flashmla as fm
      >>> k_cache = jnp.zeros((2, 4, 1, 8))  # 2 pages of 4 tokens
      >>> k_cache = fm.append_kv_cache(
      ...     k_cache, jnp.ones((2, 1, 8)), jnp.array([1, 6], jnp.int32)
      ... )
      >>> k_cache[..., 0, 0]
      Array([[0., 1., 0., 0.],
             [0., 0., 1., 0.]], dtype=float32)
    """
    check_implementation(implementation)
    k_cache, new_kv = as_array("k_cache", k_cache), as_array("new_kv", new_kv)
    check_array("k_cache", k_cache, "num_blocks page_block_size h_kv d_k", _DTYPES)
    h_kv, d_k = k_cache.shape[2:]
    if new_kv.ndim == 2 and h_kv == 1:
        new_kv = new_kv[:, None]
    check_array("new_kv", new_kv, "tokens h_kv d_k", (k_cache.dtype,))
    slot_mapping = int32_array("slot_mapping", slot_mapping, "tokens")
    check_axis("new_kv", new_kv, 1, h_kv, "the h_kv of k_cache")
    check_axis("new_kv", new_kv, 2, d_k, "the d_k of k_cache")
    check_axis("slot_mapping", slot_mapping, 0, new_kv.shape[0], "the tokens of new_kv")
    if 0 in k_cache.shape or 0 in new_kv.shape:
        return k_cache
    return append_kv_cache_op(k_cache, new_kv, slot_mapping, implementation=implementation)[0]


def get_slot_mapping(
    block_table: jax.Array, positions: jax.Array, page_block_size: int
) -> jax.Array:
    """The slots of tokens in the paged cache, for `append_kv_cache` and for token lists.

    Args:
      block_table: i32 [b, max_blocks], the pages of each sequence in order.
      positions: i32 [b, n], 0-based positions of tokens in their sequences. For positions
        [b, s_q, topk] of token lists, pass positions.reshape(b, -1), and .reshape(positions.shape)
        the result.
      page_block_size: tokens of a page, a static int.

    Returns:
      i32 [b, n]: page_id * page_block_size + offset. It is -1 if the position is negative or
      past the table, or if its table entry is negative or so large that int32 cannot hold the
      slot.

    Raises:
      TypeError, ValueError: an argument is not as described.
      NotImplementedError: an array is unreduced or reduced over a mesh axis.

    Example:
      >>> import jax.numpy as jnp, jax_flashmla as fm
      >>> block_table = jnp.array([[7, 2]], jnp.int32)
      >>> positions = jnp.array([[0, 15, 16, 32]], jnp.int32)
      >>> fm.get_slot_mapping(block_table, positions, 16)
      Array([[112, 127,  32,  -1]], dtype=int32)
    """
    block_table = int32_array("block_table", block_table, "b max_blocks")
    positions = int32_array("positions", positions, None)
    if positions.ndim > 2:
        raise ValueError(
            f"positions must have shape [b, n], got {list(positions.shape)}; for token lists pass "
            "positions.reshape(b, -1), and .reshape(positions.shape) the result"
        )
    check_array("positions", positions, "b n")
    check_axis("positions", positions, 0, block_table.shape[0], "the batch of block_table")
    check_never_empty("block_table", block_table, 0)
    check_never_empty("block_table", block_table, 1)
    page = static_int("page_block_size", page_block_size)
    index = jnp.where(positions < 0, block_table.shape[1], positions // page)
    page_id = jnp.take_along_axis(block_table, index, axis=1, mode="fill", fill_value=-1)
    # A garbage entry must not overflow into the slot of another sequence.
    addressable = (page_id >= 0) & (page_id <= (INT32_MAX - page + 1) // page)
    return jnp.where(addressable, jnp.where(addressable, page_id, 0) * page + positions % page, -1)


def _result_types(
    k_cache: Any, new_kv: Any, slot_mapping: Any
) -> list[tuple[tuple[int, ...], Any]]:
    return [(k_cache.shape, k_cache.dtype)]


def _reference(
    k_cache: jax.Array, new_kv: jax.Array, slot_mapping: jax.Array
) -> Sequence[jax.Array]:
    return [reference.append(k_cache, new_kv, slot_mapping)]


def _kernel(k_cache: jax.Array, new_kv: jax.Array, slot_mapping: jax.Array) -> Sequence[jax.Array]:
    call = jax.ffi.ffi_call(
        "jax_flashmla_append_kv",
        [jax.ShapeDtypeStruct(k_cache.shape, k_cache.dtype)],
        input_output_aliases={0: 0},
    )
    results: Sequence[jax.Array] = call(k_cache, new_kv, slot_mapping)
    return results


def _batch(
    args: Sequence[jax.Array], dims: Sequence[int | None], *, implementation: str
) -> tuple[Sequence[jax.Array], Sequence[int]]:
    """Folds the mapped axis into the pages: example i owns the i-th run of pages."""
    n = mapped_size(args, dims)
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
    if not int32_holds_slots("append_kv_cache", n, pool, implementation):
        # The reference numbers the slots of each example from 0, so they cannot overflow.
        return jax.vmap(_reference)(k_cache, new_kv, slots), [0]
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

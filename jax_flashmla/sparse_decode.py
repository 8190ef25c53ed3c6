"""Decode attention over token lists: each query attends to the slots of the cache that it names.

A query's list is one sequence of the schedule, so a call has b * s_q of them.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._checks import (
    check_list_lengths,
    check_lists,
    describe,
    exceeds,
    int32_array,
    int32_holds_slots,
    static_int,
)
from ._constants import MAX_BATCH, MAX_LIST, TILE_TOKENS
from ._op import Op, mapped_size
from ._split_kv import (
    SCHEDULE_OPERANDS,
    by_example,
    dtype_or_dims_gap,
    fold_sink,
    merge_axes,
    remake_schedule,
    result_types,
    scratch_types,
    split_axis,
)
from .reference import sparse_decode as reference

_REQUIRED = ("q", "k_cache", "indices", "topk_length")
EXTRA_OPERANDS = ("extra_k_cache", "extra_indices_in_kvcache", "extra_topk_length")
# The others, in this order, are EXTRA_OPERANDS, attn_sink, SCHEDULE_OPERANDS: those that a call has
# are named in its static parameter `operands`. attn_sink is [1, h_q], or [b, h_q] under vmap.
_PUBLIC_NAME = "flash_mla_with_kvcache with indices"
_CACHES = ("k_cache", "extra_k_cache")
_BY_QUERY = ("q", "indices", "topk_length", "extra_indices_in_kvcache", "extra_topk_length")


def get_sparse_seqlens(
    indices: jax.Array,
    topk_length: jax.Array | None = None,
    extra_indices_in_kvcache: jax.Array | None = None,
    extra_topk_length: jax.Array | None = None,
) -> jax.Array:
    """The lengths from which `get_mla_metadata` makes the schedule of a call with indices.

    A query's list is one sequence of the schedule, b * s_q in all. The kernel reads it in tiles of
    64 entries; an extra list begins a tile of its own.

    Args:
      indices: i32 [b, s_q, topk], as in `flash_mla_with_kvcache`. Only its shape matters.
      topk_length: i32 [b] or [b, s_q], the used entries of each list; default topk.
      extra_indices_in_kvcache: i32 [b, s_q, extra_topk], if the call has an extra cache. Only its
        shape matters.
      extra_topk_length: i32 [b] or [b, s_q], default extra_topk.

    Returns:
      i32 [b * s_q]: topk_length clamped to 0..topk. With an extra list it is rounded up to a
      multiple of 64, and extra_topk_length, clamped to 0..extra_topk, is added.

    Raises:
      TypeError, ValueError: an argument is not as described.
      NotImplementedError: an array is unreduced or reduced over a mesh axis.

    Example:
      >>> import jax.numpy as jnp, jax_flashmla as fm
      >>> indices = jnp.zeros((3, 1, 100), jnp.int32)
      >>> lengths = fm.get_sparse_seqlens(indices, jnp.array([70, 0, 300], jnp.int32))
      >>> lengths
      Array([ 70,   0, 100], dtype=int32)
      >>> schedule = fm.get_mla_metadata(lengths, 16, 1)  # for 16 query heads
    """
    indices = int32_array("indices", indices, "b s_q topk")
    b, s_q, _ = indices.shape
    check_lists("indices", indices, "indices", b, s_q)
    length = lengths_of_lists("topk_length", topk_length, indices)
    if extra_indices_in_kvcache is None:
        if extra_topk_length is not None:
            raise ValueError(
                "extra_topk_length holds the lengths of extra lists, got "
                f"{describe(extra_topk_length)} and None for extra_indices_in_kvcache; pass that "
                "too, or leave it out"
            )
        return _seqlens(indices, length).reshape(-1)
    name = "extra_indices_in_kvcache"
    extra_indices = token_lists(name, extra_indices_in_kvcache, "indices", b, s_q)
    extra_length = lengths_of_lists("extra_topk_length", extra_topk_length, extra_indices)
    return _seqlens(indices, length, extra_indices, extra_length).reshape(-1)


def to_local_slots(indices: jax.Array, first: int | jax.Array, count: int) -> jax.Array:
    """The slots of a token list inside a run of the pool; -1 for those outside.

    For a cache that is cut over devices: each device attends to the listed tokens that it holds,
    and `merge_attention_states_across` merges the results. Entries keep their places, so
    topk_length stays as it is.

    Args:
      indices: i32, any shape: slots of the whole pool. Invalid ones, such as -1, stay so.
      first: the first slot of the run, a Python int or an i32 scalar, traced ones too, as
        `jax.lax.axis_index("x") * count`.
      count: slots of the run, a static int: pages * page_block_size.

    Returns:
      i32, the shape of indices: index - first where that is from 0 to count - 1, else -1.

    Raises:
      TypeError, ValueError: an argument is not as described.
      NotImplementedError: an array is unreduced or reduced over a mesh axis.

    Example:
      >>> import jax.numpy as jnp, jax_flashmla as fm
      >>> indices = jnp.array([[[5, 130, -1, 64]]], jnp.int32)
      >>> fm.to_local_slots(indices, 64, 64)  # the second page of 64 tokens
      Array([[[-1, -1, -1,  0]]], dtype=int32)
    """
    indices = int32_array("indices", indices, None)
    if isinstance(first, int | np.integer):
        first = jnp.int32(static_int("first", first, minimum=0))
    first = int32_array("first", first, None)
    if first.ndim:
        raise ValueError(f"first must be a scalar, got shape {list(first.shape)}")
    count = static_int("count", count)
    local = indices - first  # If it overflows, it is negative, and the slot is far past the run.
    return jnp.where((indices >= 0) & (local >= 0) & (local < count), local, -1)


def token_lists(name: str, value: Any, owner: str, b: Any, s_q: int) -> jax.Array:
    """An i32 argument [b, s_q, topk], of `owner`'s batch and queries."""
    lists = int32_array(name, value, "b s_q topk")
    check_lists(name, lists, owner, b, s_q)
    return lists


def lengths_of_lists(name: str, value: Any, lists: jax.Array) -> jax.Array:
    """An i32 argument [b] or [b, s_q] as [b, s_q]; None stands for the whole length of `lists`."""
    b, s_q, topk = lists.shape
    if value is None:
        return jnp.full((b, s_q), topk, jnp.int32)
    lengths = int32_array(name, value, None)
    check_list_lengths(name, lengths, lists)
    return jnp.broadcast_to(lengths[:, None], (b, s_q)) if lengths.ndim == 1 else lengths


def _seqlens(
    indices: jax.Array,
    length: jax.Array,
    extra_indices: jax.Array | None = None,
    extra_length: jax.Array | None = None,
) -> jax.Array:
    """Tokens of the schedule's sequences; `length` and `extra_length` have any one shape."""
    length = jnp.clip(length, 0, indices.shape[-1])
    if extra_indices is None or extra_length is None:
        return length
    in_tiles = length + -length % TILE_TOKENS
    return in_tiles + jnp.clip(extra_length, 0, extra_indices.shape[-1])


def _reference(
    *args: jax.Array,
    operands: tuple[str, ...],
    head_dim_v: int,
    softmax_scale: float,
    **schedule: Any,
) -> tuple[jax.Array, jax.Array]:
    given = dict(zip(operands, args[len(_REQUIRED) :], strict=True))
    extra_k_cache, extra_indices, extra_length = map(given.get, EXTRA_OPERANDS)
    q, k_cache, indices, topk_length = args[: len(_REQUIRED)]
    return reference.sparse_decode(
        q,
        k_cache,
        indices,
        topk_length,
        extra_k_cache,
        extra_indices,
        extra_length,
        given.get("attn_sink"),
        head_dim_v=head_dim_v,
        softmax_scale=softmax_scale,
    )


def _kernel(*args: jax.Array, **params: Any) -> tuple[jax.Array, jax.Array]:
    operands, head_dim_v = params["operands"], params["head_dim_v"]
    given = dict(zip((*_REQUIRED, *operands), args, strict=True))
    if any(given[name].shape[0] == 0 for name in _CACHES if name in given):  # nothing to read
        return _reference(*args, **params)
    b, s_q, h_q, _ = given["q"].shape
    given = {name: merge_axes(x) if name in _BY_QUERY else x for name, x in given.items()}
    has_extra, has_schedule = "extra_k_cache" in given, "part_bounds" in given
    parts: Any = given["part_bounds"].shape[0] - 1 if has_schedule else params["num_parts"]
    if not has_schedule:
        given["seqlens"] = given["topk_length"]  # the kernel clamps it
        if has_extra:
            given["seqlens"] = _seqlens(*(given[name] for name in _BY_QUERY[1:]))
    types = [
        jax.ShapeDtypeStruct((b * s_q, h_q, head_dim_v), given["q"].dtype),
        jax.ShapeDtypeStruct((b, h_q, s_q), jnp.float32),
        *scratch_types(parts, 1, h_q, head_dim_v),
    ]
    out, lse, *_ = jax.ffi.ffi_call("jax_flashmla_sparse_decode", types)(
        *given.values(),
        softmax_scale=np.float32(params["softmax_scale"]),
        has_extra=has_extra,
        has_attn_sink="attn_sink" in given,
        has_schedule=has_schedule,
    )
    return out.reshape(b, s_q, h_q, head_dim_v), lse


def _kernel_gap(
    q: Any,
    k_cache: Any,
    indices: Any,
    *others: Any,
    operands: tuple[str, ...],
    head_dim_v: int,
    **params: Any,
) -> str | None:
    count = q.shape[0] * q.shape[1]
    if exceeds(count, MAX_BATCH):
        return f"there is a kernel for at most {MAX_BATCH} token lists (b * s_q), not for {count}"
    given = dict(zip((*_REQUIRED, *operands), (q, k_cache, indices, *others), strict=True))
    for name in ("indices", "extra_indices_in_kvcache"):
        if name in given and exceeds(topk := given[name].shape[2], MAX_LIST):
            return f"there is a kernel for {name} of at most {MAX_LIST} entries, not for {topk}"
    return dtype_or_dims_gap(q, head_dim_v)


def _batch(
    args: Sequence[jax.Array],
    dims: Sequence[int | None],
    *,
    operands: tuple[str, ...],
    fixed_split_size: int | None,
    implementation: str,
    **params: Any,
) -> tuple[Sequence[jax.Array], Sequence[int]]:
    """Folds the mapped axis into the batch, with one schedule for all of it."""
    n = mapped_size(args, dims)
    given = dict(zip((*_REQUIRED, *operands), zip(args, dims, strict=True), strict=True))
    folded = {name: by_example(*given[name], n) for name in _BY_QUERY if name in given}
    b = folded["q"].shape[1]
    for cache, lists in zip(_CACHES, ("indices", "extra_indices_in_kvcache"), strict=True):
        if cache not in given:
            continue
        pool, dim = given[cache]
        if dim is not None:
            pool = jnp.moveaxis(pool, dim, 0)
            slots = pool.shape[1] * pool.shape[2]
            if not int32_holds_slots(_PUBLIC_NAME, n, slots, implementation):
                # Number the slots of each example from 0: so they cannot overflow.
                return _reference_by_example(args, dims, operands, **params), [0, 0]
            folded[lists] = _shift(folded[lists], slots)
            pool = merge_axes(pool)
        folded[cache] = pool
    folded = {name: merge_axes(x) if name in _BY_QUERY else x for name, x in folded.items()}
    if "attn_sink" in given:
        folded["attn_sink"] = fold_sink(*given["attn_sink"], n, b)
    if "part_bounds" in given:  # it was made for the batch of one example
        lengths = _seqlens(*(folded[name] for name in _BY_QUERY[1:] if name in folded))
        schedule = remake_schedule(
            *given["part_bounds"],
            lengths.reshape(-1),
            n,
            rows=folded["q"].shape[2],
            fixed_split_size=fixed_split_size,
            implementation=implementation,
        )
        folded |= dict(zip(SCHEDULE_OPERANDS, schedule, strict=True))
    results = sparse_decode_op(
        *(folded[name] for name in (*_REQUIRED, *operands)),
        operands=operands,
        fixed_split_size=fixed_split_size,
        implementation=implementation,
        **params,
    )
    return [split_axis(x, n) for x in results], [0, 0]


def _reference_by_example(
    args: Sequence[jax.Array],
    dims: Sequence[int | None],
    operands: tuple[str, ...],
    **params: Any,
) -> Sequence[jax.Array]:
    def run(*args: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _reference(*args, operands=operands, **params)

    return jax.vmap(run, tuple(dims))(*args)


def _shift(slots: jax.Array, pool: Any) -> jax.Array:
    """The slots of n pools [n, ...] in one pool of them all; an invalid one becomes -1."""
    first = jnp.arange(slots.shape[0], dtype=jnp.int32) * pool
    first = first.reshape(-1, *(1 for _ in slots.shape[1:]))
    return jnp.where((slots >= 0) & (slots < pool), slots + first, -1)


sparse_decode_op = Op(
    name="sparse_flash_mla_with_kvcache",
    public_name=_PUBLIC_NAME,
    result_types=result_types,
    reference=_reference,
    kernel=_kernel,
    kernel_gap=_kernel_gap,
    batch=_batch,
)

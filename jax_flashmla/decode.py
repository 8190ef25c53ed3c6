"""flash_mla_with_kvcache: checks a call's arguments and makes it one of the two decode ops."""

from typing import Any

import jax
import jax.numpy as jnp

from ._checks import (
    as_array,
    check_axis,
    check_decode_shapes,
    check_extra_cache,
    check_extra_pair,
    check_given,
    check_implementation,
    check_never_empty,
    check_no_lists,
    check_offset_has_mask,
    check_only_lists,
    describe,
    int32_array,
    sink_array,
    static_bool,
    static_positive_float,
)
from ._split_kv import SCHEDULE_OPERANDS
from .dense_decode import flash_mla_with_kvcache_op
from .schedule import TileSchedulerMetadata, default_num_parts
from .sparse_decode import (
    EXTRA_OPERANDS,
    lengths_of_lists,
    sparse_decode_op,
    token_lists,
)

_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def flash_mla_with_kvcache(
    q: jax.Array,
    k_cache: jax.Array,
    block_table: jax.Array | None,
    cache_seqlens: jax.Array | None,
    head_dim_v: int,
    tile_scheduler_metadata: TileSchedulerMetadata | None = None,
    num_splits: jax.Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    causal_offset: jax.Array | None = None,
    indices: jax.Array | None = None,
    topk_length: jax.Array | None = None,
    attn_sink: jax.Array | None = None,
    extra_k_cache: jax.Array | None = None,
    extra_indices_in_kvcache: jax.Array | None = None,
    extra_topk_length: jax.Array | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Attention of a few new queries over a paged cache of latent KV (MLA).

    K of a token is its row of the cache. V is the first head_dim_v columns of that row. Signature
    and meaning are those of FlashMLA (https://github.com/deepseek-ai/FlashMLA). MLA is described in
    https://arxiv.org/abs/2405.04434.

    Without indices a query attends to all tokens of its sequence. With indices it attends to a list
    of tokens, such as an indexer's choice (DeepSeek sparse attention,
    https://arxiv.org/abs/2512.02556). Then block_table and cache_seqlens are None.
    `get_slot_mapping` turns positions in sequences into indices.

    Lengths, tables and indices may be traced values. Wrong values in them, which only the device
    can see, never cause a read out of bounds. If a sequence is longer than its table, or needs a
    page id outside the pool, all of its out and softmax_lse is NaN. A negative length counts as 0.

    Args:
      q: [b, s_q, h_q, d_k], bf16, fp16 or f32.
      k_cache: [num_blocks, page_block_size, h_kv, d_k] in q's dtype; h_kv divides h_q, with indices
        it is 1. Unused slots may hold anything, NaN too.
      block_table: i32 [b, max_blocks], the pages of each sequence in order. Entries after a
        sequence's last page are never used. None with indices.
      cache_seqlens: i32 [b], tokens of each sequence in the cache, including those of q. None with
        indices.
      head_dim_v: d_v, at most d_k.
      tile_scheduler_metadata, num_splits: the schedule from `get_mla_metadata`, made once a step
        for all layers; with indices from the lengths that `get_sparse_seqlens` gives. If you pass
        neither, each call makes its own. A schedule made for other lengths also gives right
        results, only slower.
      softmax_scale: a static Python number, finite and above 0; default d_k ** -0.5.
      causal: query i of a sequence sees its first cache_seqlens - s_q + 1 + i tokens. False with
        indices, which name just what a query may see.
      causal_offset: i32 [b], default 0, only with causal. It moves that boundary: query i sees
        token j if j < cache_seqlens and j <= cache_seqlens - s_q + i + causal_offset. Use it if the
        cache holds only a run of each sequence's tokens and the queries come later than its end.
        Any int32 is valid.
      indices: i32 [b, s_q, topk], the slots that each query attends to, in any order: page_id *
        page_block_size + offset. Entries outside the pool, such as -1, are masked and never read. A
        slot that is named twice counts twice.
      topk_length: i32 [b] or [b, s_q], default topk: the used entries of each list, clamped to
        0..topk. Entries after them may hold anything.
      attn_sink: f32 [h_q], one more score for each head, with 0 as its value, in the units of
        softmax_lse: out is multiplied by sigmoid(softmax_lse - attn_sink). +inf makes out 0, -inf
        changes nothing. softmax_lse is without it.
      extra_k_cache: [num_blocks2, page_block_size2, 1, d_k] in q's dtype, a second cache, such as
        one of compressed tokens. One softmax goes over the tokens of both lists.
      extra_indices_in_kvcache: i32 [b, s_q, extra_topk], slots of extra_k_cache.
      extra_topk_length: i32 [b] or [b, s_q], default extra_topk, as topk_length.
      implementation: "auto": our kernel on a Hopper GPU, the reference in JAX ops elsewhere.
        "cuda": the kernel or an error. "xla": the reference.

    Returns:
      out: [b, s_q, h_q, head_dim_v] in q's dtype; 0 for a query that sees no token.
      softmax_lse: f32 [b, h_q, s_q], natural logarithm of the sum of exponentials; +inf for a
        query that sees no token.

    Raises:
      TypeError, ValueError: an argument is not as described.
      NotImplementedError: implementation is "cuda" and there is no kernel for this machine, shape
        or dtype; or the program is partitioned over devices outside jax.shard_map; or an array is
        unreduced or reduced over a mesh axis; or int32 cannot hold the slots of all caches that
        vmap maps, with indices.

    Example:
      >>> import jax.numpy as jnp, jax_flashmla as fm
      >>> k_cache = jnp.ones((4, 64, 1, 576), jnp.bfloat16)  # 4 pages of 64 tokens
      >>> block_table = jnp.array([[2, 0], [3, 1]], jnp.int32)
      >>> cache_seqlens = jnp.array([70, 3], jnp.int32)
      >>> q = jnp.ones((2, 1, 16, 576), jnp.bfloat16)
      >>> schedule = fm.get_mla_metadata(cache_seqlens, 16, 1)
      >>> out, lse = fm.flash_mla_with_kvcache(
      ...     q, k_cache, block_table, cache_seqlens, 512, *schedule
      ... )
      >>> out.shape, out.dtype, lse.shape
      ((2, 1, 16, 512), dtype(bfloat16), (2, 16, 1))
      >>> positions = jnp.array([[69, 3, 64], [2, 0, -1]], jnp.int32)  # that an indexer picked
      >>> indices = fm.get_slot_mapping(block_table, positions, 64)[:, None]  # [b, s_q, topk]
      >>> indices[:, 0]
      Array([[  5, 131,   0],
             [194, 192,  -1]], dtype=int32)
      >>> out, lse = fm.flash_mla_with_kvcache(q, k_cache, None, None, 512, indices=indices)
      >>> out.shape, lse.shape
      ((2, 1, 16, 512), (2, 16, 1))
    """
    check_implementation(implementation)
    q, k_cache = as_array("q", q), as_array("k_cache", k_cache)
    d_v = check_decode_shapes(q, k_cache, head_dim_v, _DTYPES)
    common: dict[str, Any] = {
        "head_dim_v": d_v,
        "softmax_scale": static_positive_float(
            "softmax_scale", q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
        ),
        "fixed_split_size": getattr(tile_scheduler_metadata, "fixed_split_size", None),
        "implementation": implementation,
    }
    causal = static_bool("causal", causal)
    schedule = tile_scheduler_metadata, num_splits
    extra = extra_k_cache, extra_indices_in_kvcache, extra_topk_length
    if indices is None:
        check_no_lists(topk_length, *extra)
        check_given("block_table", block_table)
        arrays = q, k_cache, block_table, cache_seqlens, causal_offset, attn_sink
        out, lse = _dense(*arrays, schedule, causal=causal, **common)
    else:
        check_only_lists(
            k_cache,
            block_table=block_table,
            cache_seqlens=cache_seqlens,
            causal=causal,
            causal_offset=causal_offset,
        )
        out, lse = _sparse(q, k_cache, indices, topk_length, extra, attn_sink, schedule, **common)
    return out, lse


_Schedule = tuple[TileSchedulerMetadata | None, jax.Array | None]


def _dense(
    q: jax.Array,
    k_cache: jax.Array,
    block_table: Any,
    cache_seqlens: Any,
    causal_offset: Any,
    attn_sink: Any,
    schedule: _Schedule,
    *,
    causal: bool,
    **common: Any,
) -> list[jax.Array]:
    """The call without indices. Its arrays are not yet checked, except q and k_cache."""
    b, s_q, h_q, _ = q.shape
    h_kv = k_cache.shape[2]
    block_table = _by_sequence("block_table", block_table, "b max_blocks", b)
    cache_seqlens = _by_sequence("cache_seqlens", cache_seqlens, "b", b)
    check_never_empty("q", q, 0)
    check_never_empty("k_cache", k_cache, 0)
    check_never_empty("block_table", block_table, 1)
    offset = {}
    if causal_offset is not None:
        offset["causal_offset"] = _by_sequence("causal_offset", causal_offset, "b", b)
        check_offset_has_mask(causal)

    rows = s_q * h_q // h_kv
    operands = {
        **_schedule_operands(
            *schedule,
            batch=(b, "sequences in q"),
            num_heads_per_head_k=(rows, "query rows per KV head (s_q * h_q / h_kv)"),
            num_heads_k=(h_kv, "KV heads in k_cache"),
            remedy=f"get_mla_metadata(cache_seqlens, {rows}, {h_kv}) for the {b} sequences of this "
            "call, in jax.shard_map from the device's own lengths",
        ),
        **offset,
        **_sink_operand(attn_sink, h_q),
    }
    return flash_mla_with_kvcache_op(
        q,
        k_cache,
        block_table,
        cache_seqlens,
        *operands.values(),
        operands=tuple(operands),
        # One query sees all keys, unless an offset says otherwise.
        causal=causal and (s_q > 1 or causal_offset is not None),
        num_parts=None if "part_bounds" in operands else default_num_parts(rows, h_kv),
        **common,
    )


def _sparse(
    q: jax.Array,
    k_cache: jax.Array,
    indices: Any,
    topk_length: Any,
    extra: tuple[Any, Any, Any],
    attn_sink: Any,
    schedule: _Schedule,
    **common: Any,
) -> list[jax.Array]:
    """The call with indices. Its arrays are not yet checked, except q and k_cache."""
    b, s_q, h_q, _ = q.shape
    indices = token_lists("indices", indices, "q", b, s_q)
    topk_length = lengths_of_lists("topk_length", topk_length, indices)
    check_never_empty("q", q, 0)
    check_never_empty("k_cache", k_cache, 0)
    operands = {
        **_extra_operands(*extra, q=q),
        **_sink_operand(attn_sink, h_q),
        **_schedule_operands(
            *schedule,
            batch=(b * s_q, "token lists (b * s_q)"),
            num_heads_per_head_k=(h_q, "query heads"),
            num_heads_k=(1, "KV head"),
            remedy=f"get_mla_metadata(get_sparse_seqlens(indices, ...), {h_q}, 1) for the "
            f"{b * s_q} token lists of this call, in jax.shard_map from the device's own lists",
        ),
    }
    return sparse_decode_op(
        q,
        k_cache,
        indices,
        topk_length,
        *operands.values(),
        operands=tuple(operands),
        num_parts=None if "part_bounds" in operands else default_num_parts(h_q, 1),
        **common,
    )


def _by_sequence(name: str, value: Any, axes: str, b: int) -> jax.Array:
    """An i32 argument with the batch as axis 0."""
    array = int32_array(name, value, axes)
    check_axis(name, array, 0, b, "the batch of q")
    return array


def _sink_operand(attn_sink: Any, h_q: int) -> dict[str, jax.Array]:
    if attn_sink is None:
        return {}
    return {"attn_sink": sink_array(attn_sink, h_q, "the heads of q")[None]}


def _extra_operands(
    k_cache: Any, indices: Any, topk_length: Any, *, q: jax.Array
) -> dict[str, jax.Array]:
    """The checked arguments of the second cache, {} if there is none."""
    check_extra_pair(k_cache, indices, topk_length)
    if k_cache is None:
        return {}
    name = "extra_k_cache"
    k_cache = as_array(name, k_cache)
    check_extra_cache(k_cache, q)
    check_never_empty(name, k_cache, 0)
    indices = token_lists("extra_indices_in_kvcache", indices, "q", *q.shape[:2])
    topk_length = lengths_of_lists("extra_topk_length", topk_length, indices)
    return dict(zip(EXTRA_OPERANDS, (k_cache, indices, topk_length), strict=True))


def _schedule_operands(
    metadata: TileSchedulerMetadata | None,
    num_splits: jax.Array | None,
    *,
    remedy: str,
    **wanted: tuple[Any, str],
) -> dict[str, jax.Array]:
    """Checks a call's schedule; returns its three arrays, {} if the call has none.

    `wanted` has what the schedule's static attributes must be, and that in words.
    """
    if isinstance(num_splits, TileSchedulerMetadata):
        raise TypeError(
            "num_splits must be an array, got a TileSchedulerMetadata; pass "
            "tile_scheduler_metadata before num_splits, as get_mla_metadata returns them"
        )
    if metadata is not None and not isinstance(metadata, TileSchedulerMetadata):
        raise TypeError(
            "tile_scheduler_metadata must be the TileSchedulerMetadata that get_mla_metadata "
            f"returns first, got {describe(metadata)}"
        )
    if metadata is None and num_splits is None:
        return {}
    if metadata is None or num_splits is None:
        missing = "num_splits" if num_splits is None else "tile_scheduler_metadata"
        raise ValueError(
            "tile_scheduler_metadata and num_splits come as a pair from get_mla_metadata: pass "
            f"both or neither, got None for {missing}"
        )
    part_bounds = int32_array(
        "tile_scheduler_metadata.part_bounds", metadata.part_bounds, "parts+1 2"
    )
    first_part = int32_array("tile_scheduler_metadata.first_part", metadata.first_part, "b")
    num_splits = int32_array("num_splits", num_splits, "b+1")
    for field, (ours, what) in wanted.items():
        theirs = getattr(metadata, field)
        if theirs != ours:
            raise ValueError(
                f"tile_scheduler_metadata was made for {field}={theirs}, but this call has {ours} "
                f"{what}; make it with {remedy}"
            )
    made = "as get_mla_metadata made it for this batch"
    check_axis("tile_scheduler_metadata.part_bounds", part_bounds, 1, 2, made)
    check_axis("num_splits", num_splits, 0, wanted["batch"][0] + 1, made)
    return dict(zip(SCHEDULE_OPERANDS, (part_bounds, first_part, num_splits), strict=True))

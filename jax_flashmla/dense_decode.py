"""Decode attention over a paged latent KV cache."""

import jax
import jax.numpy as jnp
import numpy as np

from ._checks import (
    check_array,
    check_axis,
    check_offset_has_mask,
    static_bool,
    static_int,
    static_positive_float,
)
from ._op import Op
from .reference import dense_decode as reference
from .schedule import ROW_TILE, TileSchedulerMetadata, default_num_parts, get_mla_metadata_op

KERNEL_HEAD_DIMS = (576, 512)  # (d_k, d_v)
KERNEL_DTYPES = (jnp.bfloat16, jnp.float16)
KERNEL_PAGE_BLOCK_SIZES = (16, 32, 64, 128, 256)
_DTYPES = (*KERNEL_DTYPES, jnp.float32)
_FLAGS_PER_TILE = 16  # as in cuda/dense_decode/block.cuh


def flash_mla_with_kvcache(
    q: jax.Array,
    k_cache: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    head_dim_v: int,
    tile_scheduler_metadata: TileSchedulerMetadata | None = None,
    num_splits: jax.Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    causal_offset: jax.Array | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Attention of a few new queries over a paged cache of latent KV (MLA).

    K of a token is its row of the cache, V the first head_dim_v columns of that row. The
    signature and the meaning are those of FlashMLA (https://github.com/deepseek-ai/FlashMLA).

    Lengths and tables may be traced values. What only the device can see never reads out of
    bounds: a sequence whose length exceeds its table, or that needs a page id outside the pool,
    gets NaN in all of its out and softmax_lse; a negative length counts as 0.

    Args:
      q: [b, s_q, h_q, d_k], bf16, fp16 or f32.
      k_cache: [num_blocks, page_block_size, h_kv, d_k] in q's dtype; h_kv divides h_q. Unused
        slots may hold anything, NaN too.
      block_table: i32 [b, max_blocks], the pages of each sequence in order. Entries beyond a
        sequence's last page are never used.
      cache_seqlens: i32 [b], tokens of each sequence, those of q included.
      head_dim_v: d_v, at most d_k.
      tile_scheduler_metadata, num_splits: the schedule from `get_mla_metadata`, made once a step
        for all layers; without both of them each call makes its own. One made for other lengths
        gives right results as well, only slower.
      softmax_scale: a static Python number, finite and above 0; default d_k ** -0.5.
      causal: query i of a sequence sees its first cache_seqlens - s_q + 1 + i tokens.
      causal_offset: i32 [b], default 0, only with causal: moves that boundary, so that query i
        sees token j where j < cache_seqlens and j <= cache_seqlens - s_q + i + causal_offset. For
        a cache that holds only a run of each sequence's tokens, and so may end before the queries
        do; any int32 will do.
      implementation: "auto": our kernel on a Hopper GPU, plain JAX elsewhere; "cuda": the kernel
        or an error; "xla": plain JAX.

    Returns:
      out: [b, s_q, h_q, head_dim_v] in q's dtype; 0 for a query that sees no token.
      softmax_lse: f32 [b, h_q, s_q], natural logarithm of the sum of exponentials; +inf for a
        query that sees no token.

    Raises:
      TypeError, ValueError: an argument is not as described.
      NotImplementedError: implementation is "cuda" and there is no kernel for this machine, shape
        or dtype; or the program is partitioned over devices outside jax.shard_map.
    """
    q, k_cache, block_table, cache_seqlens = map(
        jnp.asarray, (q, k_cache, block_table, cache_seqlens)
    )
    _check_shapes(q, k_cache, block_table, cache_seqlens)
    b, s_q, h_q, d_k = q.shape
    h_kv = k_cache.shape[2]
    d_v = static_int("head_dim_v", head_dim_v)
    if d_v > d_k:
        raise ValueError(f"head_dim_v must be at most the d_k of q, {d_k}, got {d_v}")
    scale = static_positive_float(
        "softmax_scale", d_k**-0.5 if softmax_scale is None else softmax_scale
    )
    causal = static_bool("causal", causal)
    if causal_offset is not None:
        causal_offset = jnp.asarray(causal_offset)
        check_array("causal_offset", causal_offset, "b", (jnp.int32,))
        check_axis("causal_offset", causal_offset, 0, b, "the batch of q")
        check_offset_has_mask(causal)

    rows = s_q * h_q // h_kv
    if (tile_scheduler_metadata is None) != (num_splits is None):
        missing = "num_splits" if num_splits is None else "tile_scheduler_metadata"
        raise ValueError(
            "tile_scheduler_metadata and num_splits come as a pair from get_mla_metadata: pass "
            f"both or neither, got None for {missing}"
        )
    if tile_scheduler_metadata is None:
        schedule, fixed_split_size = (), None
        num_parts = default_num_parts(static_int("s_q * h_q / h_kv", rows), h_kv)
    else:
        num_splits = jnp.asarray(num_splits)
        _check_metadata(tile_scheduler_metadata, num_splits, b, rows, h_kv)
        metadata, num_parts = tile_scheduler_metadata, None
        schedule = (metadata.part_bounds, metadata.first_part, num_splits)
        fixed_split_size = metadata.fixed_split_size

    out, lse = flash_mla_with_kvcache_op(
        q,
        k_cache,
        block_table,
        cache_seqlens,
        *schedule,
        *_optional(causal_offset),
        head_dim_v=d_v,
        softmax_scale=scale,
        # One query sees all keys, unless an offset says otherwise.
        causal=causal and (s_q > 1 or causal_offset is not None),
        num_parts=num_parts,
        fixed_split_size=fixed_split_size,
        implementation=implementation,
    )
    return out, lse


def _check_shapes(q, k_cache, block_table, cache_seqlens):
    check_array("q", q, "b s_q h_q d_k", _DTYPES)
    check_array("k_cache", k_cache, "num_blocks page_block_size h_kv d_k", (q.dtype,))
    check_array("block_table", block_table, "b max_blocks", (jnp.int32,))
    check_array("cache_seqlens", cache_seqlens, "b", (jnp.int32,))
    b, s_q, h_q, d_k = q.shape
    if 0 in q.shape:
        raise ValueError(f"q must have no empty axis, got shape {list(q.shape)}")
    if 0 in k_cache.shape[1:]:
        raise ValueError(f"only axis 0 of k_cache may be empty, got shape {list(k_cache.shape)}")
    check_axis("k_cache", k_cache, 3, d_k, "the d_k of q")
    check_axis("block_table", block_table, 0, b, "the batch of q")
    check_axis("cache_seqlens", cache_seqlens, 0, b, "the batch of q")
    if h_q % k_cache.shape[2]:
        raise ValueError(
            f"h_kv must divide h_q: k_cache has {k_cache.shape[2]} KV heads, q has {h_q} heads"
        )


def _optional(operand):
    """The operand that an op has only where it is given."""
    return () if operand is None else (operand,)


def _schedule_and_offset(operands, num_parts):
    """What follows the first four operands: the schedule, three or none, and the offset, or none.

    A call without a schedule has num_parts, for the one that it makes.
    """
    count = 3 if num_parts is None else 0
    return operands[:count], operands[count:]


def _check_metadata(metadata, num_splits, b, rows, h_kv):
    if not isinstance(metadata, TileSchedulerMetadata):
        raise TypeError(
            "tile_scheduler_metadata must be the TileSchedulerMetadata of get_mla_metadata, got "
            f"{type(metadata).__name__}"
        )
    for field, ours, what in (
        ("batch", b, "sequences in q"),
        ("num_heads_per_head_k", rows, "query rows per KV head (s_q * h_q / h_kv)"),
        ("num_heads_k", h_kv, "KV heads in k_cache"),
    ):
        theirs = getattr(metadata, field)
        if theirs != ours:
            raise ValueError(
                f"tile_scheduler_metadata was made for {field}={theirs}, but this call has {ours} "
                f"{what}; make it with get_mla_metadata(cache_seqlens, {rows}, {h_kv}) for the "
                f"{b} sequences of this call, in jax.shard_map from the device's own lengths"
            )
    for name, x, axes, shape in (
        ("tile_scheduler_metadata.part_bounds", metadata.part_bounds, "parts+1 2",
         (metadata.num_parts + 1, 2)),
        ("tile_scheduler_metadata.first_part", metadata.first_part, "b", (b,)),
        ("num_splits", num_splits, "b+1", (b + 1,)),
    ):  # fmt: skip
        check_array(name, x, axes, (jnp.int32,))
        for axis, size in enumerate(shape):
            check_axis(name, x, axis, size, "as get_mla_metadata made it for this batch")


def _result_types(q, *_, head_dim_v, **params):
    b, s_q, h_q, _ = q.shape
    return [((b, s_q, h_q, head_dim_v), q.dtype), ((b, h_q, s_q), jnp.float32)]


def _reference(
    q, k_cache, block_table, cache_seqlens, *operands, num_parts, fixed_split_size, **params
):
    _, offset = _schedule_and_offset(operands, num_parts)
    return reference.decode(q, k_cache, block_table, cache_seqlens, *offset, **params)


def _kernel(
    q,
    k_cache,
    block_table,
    cache_seqlens,
    *operands,
    head_dim_v,
    softmax_scale,
    causal,
    num_parts,
    fixed_split_size,
):
    schedule, offset = _schedule_and_offset(operands, num_parts)
    b, s_q, h_q, d_k = q.shape
    h_kv = k_cache.shape[2]
    group = h_q // h_kv
    rows = s_q * group
    if 0 in (k_cache.shape[0], block_table.shape[1]):  # nothing to read
        return reference.decode(
            q,
            k_cache,
            block_table,
            cache_seqlens,
            *offset,
            head_dim_v=head_dim_v,
            softmax_scale=softmax_scale,
            causal=causal,
        )
    parts = schedule[0].shape[0] - 1 if schedule else num_parts
    slots = 2 * parts  # a part has at most two requests that are split
    types = [
        ((b, h_kv, rows, head_dim_v), q.dtype),
        ((b, h_q, s_q), jnp.float32),
        # Scratch: partial results, their scales and log-sum-exps, and flags of 64 bits.
        ((slots, h_kv, rows, head_dim_v), jnp.float16),
        ((slots, h_kv, 4, rows), jnp.float32),
        ((slots, h_kv, rows), jnp.float32),
        ((parts, h_kv, -(-rows // ROW_TILE), 2 * _FLAGS_PER_TILE), jnp.int32),
    ]
    target = "jax_flashmla_dense_decode" if schedule else "jax_flashmla_schedule_and_decode"
    call = jax.ffi.ffi_call(target, [jax.ShapeDtypeStruct(*type_) for type_ in types])
    # The kernel wants the rows that share a KV head side by side, ordered (s, g).
    if h_kv > 1 and s_q > 1:
        q = q.reshape(b, s_q, h_kv, group, d_k).transpose(0, 2, 1, 3, 4)
    out, lse, *_ = call(
        q.reshape(b, h_kv, rows, d_k),
        k_cache,
        block_table,
        cache_seqlens,
        *operands,
        softmax_scale=np.float32(softmax_scale),
        causal=causal,
    )
    if h_kv > 1 and s_q > 1:
        out = out.reshape(b, h_kv, s_q, group, head_dim_v).transpose(0, 2, 1, 3, 4)
    return out.reshape(b, s_q, h_q, head_dim_v), lse


def _kernel_gap(q, k_cache, *_, head_dim_v, **params):
    if q.dtype not in KERNEL_DTYPES:
        return f"there is a kernel for bfloat16 and float16, not for q in {q.dtype.name}"
    if (q.shape[3], head_dim_v) != KERNEL_HEAD_DIMS:
        return (
            f"there is a kernel for d_k {KERNEL_HEAD_DIMS[0]} and head_dim_v "
            f"{KERNEL_HEAD_DIMS[1]}, not for {q.shape[3]} and {head_dim_v}"
        )
    if k_cache.shape[1] not in KERNEL_PAGE_BLOCK_SIZES:
        return (
            f"there is a kernel for page_block_size in {KERNEL_PAGE_BLOCK_SIZES}, not for "
            f"{k_cache.shape[1]}"
        )
    return None


def _batch(args, dims, *, num_parts, fixed_split_size, implementation, **params):
    """Folds the mapped axis into the batch, with one schedule for all of it."""
    n = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
    schedule, offset = _schedule_and_offset(args[4:], num_parts)
    by_sequence = (0, 2, 3, *range(len(args) - len(offset), len(args)))  # all but the cache
    q, block_table, cache_seqlens, *causal_offset = (
        jnp.broadcast_to(args[i], (n, *args[i].shape))
        if dims[i] is None
        else jnp.moveaxis(args[i], dims[i], 0)
        for i in by_sequence
    )
    k_cache = args[1]
    if dims[1] is not None:
        k_cache, block_table = _fold_caches(jnp.moveaxis(k_cache, dims[1], 0), block_table)
    q, block_table, cache_seqlens, *causal_offset = (
        x.reshape(-1, *x.shape[2:]) for x in (q, block_table, cache_seqlens, *causal_offset)
    )
    if schedule:  # made for another batch
        bounds_shape = [size for axis, size in enumerate(args[4].shape) if axis != dims[4]]
        parts = bounds_shape[0] - 1
        schedule = get_mla_metadata_op(
            cache_seqlens,
            # Splits of a fixed size are as many for each sequence as before.
            num_parts=parts if fixed_split_size is None else n * parts,
            rows=q.shape[1] * q.shape[2],
            fixed_split_size=fixed_split_size,
            implementation=implementation,
        )
    results = flash_mla_with_kvcache_op(
        q,
        k_cache,
        block_table,
        cache_seqlens,
        *schedule,
        *causal_offset,
        num_parts=num_parts,
        fixed_split_size=fixed_split_size,
        implementation=implementation,
        **params,
    )
    return [x.reshape(n, -1, *x.shape[1:]) for x in results], [0, 0]


def _fold_caches(k_cache, block_table):
    """n caches become one, of which cache i is the i-th run of pages.

    Args:
      k_cache: [n, num_blocks, ...].
      block_table: [n, b, max_blocks].
    """
    n, num_blocks = k_cache.shape[:2]
    in_pool = (block_table >= 0) & (block_table < num_blocks)
    first = jnp.arange(n, dtype=jnp.int32)[:, None, None] * num_blocks
    return k_cache.reshape(-1, *k_cache.shape[2:]), jnp.where(in_pool, block_table + first, -1)


flash_mla_with_kvcache_op = Op(
    name="flash_mla_with_kvcache",
    result_types=_result_types,
    reference=_reference,
    kernel=_kernel,
    kernel_gap=_kernel_gap,
    batch=_batch,
)

"""Decode attention over a paged latent KV cache."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._checks import (
    as_array,
    check_axis,
    check_decode_shapes,
    check_implementation,
    check_never_empty,
    check_offset_has_mask,
    describe,
    int32_array,
    static_bool,
    static_positive_float,
)
from ._constants import FLAGS_PER_ROW_TILE, ROW_TILE, SCALES_PER_ROW, SPLITS_PER_PART
from ._op import Op
from .reference import dense_decode as reference
from .schedule import TileSchedulerMetadata, default_num_parts, get_mla_metadata_op

KERNEL_HEAD_DIMS = (576, 512)  # (d_k, d_v)
KERNEL_DTYPES = (jnp.bfloat16, jnp.float16)
KERNEL_PAGE_BLOCK_SIZES = (16, 32, 64, 128, 256)
_DTYPES = (*KERNEL_DTYPES, jnp.float32)


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

    K of a token is its row of the cache. V is the first head_dim_v columns of that row. Signature
    and meaning are those of FlashMLA (https://github.com/deepseek-ai/FlashMLA). MLA is described in
    https://arxiv.org/abs/2405.04434.

    Lengths and tables may be traced values. Wrong values in them, which only the device can see,
    never cause a read out of bounds. If a sequence is longer than its table, or needs a page id
    outside the pool, all of its out and softmax_lse is NaN. A negative length counts as 0.

    Args:
      q: [b, s_q, h_q, d_k], bf16, fp16 or f32.
      k_cache: [num_blocks, page_block_size, h_kv, d_k] in q's dtype; h_kv divides h_q. Unused
        slots may hold anything, NaN too.
      block_table: i32 [b, max_blocks], the pages of each sequence in order. Entries after a
        sequence's last page are never used.
      cache_seqlens: i32 [b], tokens of each sequence in the cache, including those of q.
      head_dim_v: d_v, at most d_k.
      tile_scheduler_metadata, num_splits: the schedule from `get_mla_metadata`, made once a step
        for all layers. If you pass neither, each call makes its own. A schedule made for other
        lengths also gives right results, only slower.
      softmax_scale: a static Python number, finite and above 0; default d_k ** -0.5.
      causal: query i of a sequence sees its first cache_seqlens - s_q + 1 + i tokens.
      causal_offset: i32 [b], default 0, only with causal. It moves that boundary: query i sees
        token j if j < cache_seqlens and j <= cache_seqlens - s_q + i + causal_offset. Use it if the
        cache holds only a run of each sequence's tokens and the queries come later than its end.
        Any int32 is valid.
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
        unreduced or reduced over a mesh axis.

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
    """
    check_implementation(implementation)
    q, k_cache = as_array("q", q), as_array("k_cache", k_cache)
    d_v = check_decode_shapes(q, k_cache, head_dim_v, _DTYPES)
    b, s_q, h_q, d_k = q.shape
    h_kv = k_cache.shape[2]
    block_table = _by_sequence("block_table", block_table, "b max_blocks", b)
    cache_seqlens = _by_sequence("cache_seqlens", cache_seqlens, "b", b)
    check_never_empty("q", q, 0)
    check_never_empty("k_cache", k_cache, 0)
    check_never_empty("block_table", block_table, 1)
    scale = static_positive_float(
        "softmax_scale", d_k**-0.5 if softmax_scale is None else softmax_scale
    )
    causal = static_bool("causal", causal)
    offset: tuple[jax.Array, ...] = ()
    if causal_offset is not None:
        offset = (_by_sequence("causal_offset", causal_offset, "b", b),)
        check_offset_has_mask(causal)

    rows = s_q * h_q // h_kv
    schedule = _schedule_arrays(tile_scheduler_metadata, num_splits, b, rows, h_kv)
    num_parts = None  # a given schedule has its number of parts
    if not schedule:
        num_parts = default_num_parts(rows, h_kv)
    out, lse = flash_mla_with_kvcache_op(
        q,
        k_cache,
        block_table,
        cache_seqlens,
        *schedule,
        *offset,
        head_dim_v=d_v,
        softmax_scale=scale,
        # One query sees all keys, unless an offset says otherwise.
        causal=causal and (s_q > 1 or causal_offset is not None),
        num_parts=num_parts,
        fixed_split_size=getattr(tile_scheduler_metadata, "fixed_split_size", None),
        implementation=implementation,
    )
    return out, lse


def _by_sequence(name: str, value: Any, axes: str, b: int) -> jax.Array:
    """An i32 argument with the batch as axis 0."""
    array = int32_array(name, value, axes)
    check_axis(name, array, 0, b, "the batch of q")
    return array


def _schedule_arrays(
    metadata: TileSchedulerMetadata | None,
    num_splits: jax.Array | None,
    b: int,
    rows: int,
    h_kv: int,
) -> tuple[jax.Array, ...]:
    """Checks a call's schedule; returns its three arrays, or () if the call has none."""
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
        return ()
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
    made = "as get_mla_metadata made it for this batch"
    check_axis("tile_scheduler_metadata.part_bounds", part_bounds, 1, 2, made)
    check_axis("num_splits", num_splits, 0, b + 1, made)
    return part_bounds, first_part, num_splits


def _schedule_and_offset(
    operands: Sequence[Any], num_parts: int | None
) -> tuple[Sequence[Any], Sequence[Any]]:
    """Splits the operands after the first four: 3 or none of a schedule, 1 or none of an offset.

    num_parts is None if the call was given a schedule.
    """
    count = 3 if num_parts is None else 0
    return operands[:count], operands[count:]


def _result_types(
    q: Any, *_: Any, head_dim_v: int, **params: Any
) -> list[tuple[tuple[int, ...], Any]]:
    b, s_q, h_q, _ = q.shape
    return [((b, s_q, h_q, head_dim_v), q.dtype), ((b, h_q, s_q), jnp.float32)]


def _reference(
    q: jax.Array,
    k_cache: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    *operands: jax.Array,
    num_parts: int | None,
    fixed_split_size: int | None,
    **params: Any,
) -> tuple[jax.Array, jax.Array]:
    _, offset = _schedule_and_offset(operands, num_parts)
    return reference.decode(q, k_cache, block_table, cache_seqlens, *offset, **params)


def _kernel(
    q: jax.Array,
    k_cache: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    *operands: jax.Array,
    head_dim_v: int,
    softmax_scale: float,
    causal: bool,
    num_parts: int | None,
    fixed_split_size: int | None,
) -> tuple[jax.Array, jax.Array]:
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
    parts: Any = schedule[0].shape[0] - 1 if schedule else num_parts
    partials = SPLITS_PER_PART * parts
    types = [
        ((b, h_kv, rows, head_dim_v), q.dtype),
        ((b, h_q, s_q), jnp.float32),
        # Scratch memory: partial results, their scales and log-sum-exps, and flags of 64 bits.
        ((partials, h_kv, rows, head_dim_v), jnp.float16),
        ((partials, h_kv, SCALES_PER_ROW, rows), jnp.float32),
        ((partials, h_kv, rows), jnp.float32),
        ((parts, h_kv, -(-rows // ROW_TILE), 2 * FLAGS_PER_ROW_TILE), jnp.int32),
    ]
    target = "jax_flashmla_dense_decode" if schedule else "jax_flashmla_schedule_and_decode"
    call = jax.ffi.ffi_call(target, [jax.ShapeDtypeStruct(*type_) for type_ in types])
    # The kernel wants the rows of a KV head to be contiguous, ordered (s_q, group).
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


def _kernel_gap(q: Any, k_cache: Any, *_: Any, head_dim_v: int, **params: Any) -> str | None:
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


def _batch(
    args: Sequence[jax.Array],
    dims: Sequence[int | None],
    *,
    num_parts: int | None,
    fixed_split_size: int | None,
    implementation: str,
    **params: Any,
) -> tuple[Sequence[jax.Array], Sequence[int]]:
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
    if schedule:  # it was made for the batch of one example; make one for the folded batch
        bounds_shape = [size for axis, size in enumerate(args[4].shape) if axis != dims[4]]
        parts = bounds_shape[0] - 1
        schedule = get_mla_metadata_op(
            cache_seqlens,
            # With splits of a fixed size, each sequence keeps its number of parts.
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


def _fold_caches(k_cache: jax.Array, block_table: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Makes one cache of n caches. Cache i becomes the i-th run of pages.

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

"""Decode attention over a paged latent KV cache, of all tokens of each sequence."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._checks import exceeds
from ._constants import MAX_BATCH
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
from .reference import dense_decode as reference

KERNEL_PAGE_BLOCK_SIZES = (16, 32, 64, 128, 256)

_REQUIRED = ("q", "k_cache", "block_table", "cache_seqlens")
# The others, in this order, are SCHEDULE_OPERANDS, causal_offset, attn_sink: those that a call has
# are named in its static parameter `operands`. attn_sink is [1, h_q], or [b, h_q] under vmap.


def _reference(
    *args: jax.Array,
    operands: tuple[str, ...],
    head_dim_v: int,
    softmax_scale: float,
    causal: bool,
    **schedule: Any,
) -> tuple[jax.Array, jax.Array]:
    given = dict(zip(operands, args[len(_REQUIRED) :], strict=True))
    q, k_cache, block_table, cache_seqlens = args[: len(_REQUIRED)]
    return reference.decode(
        q,
        k_cache,
        block_table,
        cache_seqlens,
        given.get("causal_offset"),
        attn_sink=given.get("attn_sink"),
        head_dim_v=head_dim_v,
        softmax_scale=softmax_scale,
        causal=causal,
    )


def _kernel(*args: jax.Array, **params: Any) -> tuple[jax.Array, jax.Array]:
    q, k_cache, block_table, cache_seqlens, *optional = args
    if 0 in (k_cache.shape[0], block_table.shape[1]):  # nothing to read
        return _reference(*args, **params)
    operands, head_dim_v = params["operands"], params["head_dim_v"]
    given = dict(zip(operands, optional, strict=True))
    b, s_q, h_q, d_k = q.shape
    h_kv = k_cache.shape[2]
    group = h_q // h_kv
    rows = s_q * group
    has_schedule = "part_bounds" in given
    parts: Any = given["part_bounds"].shape[0] - 1 if has_schedule else params["num_parts"]
    types = [
        jax.ShapeDtypeStruct((b, h_kv, rows, head_dim_v), q.dtype),
        jax.ShapeDtypeStruct((b, h_q, s_q), jnp.float32),
        *scratch_types(parts, h_kv, rows, head_dim_v),
    ]
    target = "jax_flashmla_dense_decode" if has_schedule else "jax_flashmla_schedule_and_decode"
    # Programs that were exported before there were sinks do not have the attribute.
    sink = {"has_attn_sink": True} if "attn_sink" in given else {}
    # The kernel wants the rows of a KV head to be contiguous, ordered (s_q, group).
    if h_kv > 1 and s_q > 1:
        q = q.reshape(b, s_q, h_kv, group, d_k).transpose(0, 2, 1, 3, 4)
    out, lse, *_ = jax.ffi.ffi_call(target, types)(
        q.reshape(b, h_kv, rows, d_k),
        k_cache,
        block_table,
        cache_seqlens,
        *optional,
        softmax_scale=np.float32(params["softmax_scale"]),
        causal=params["causal"],
        **sink,
    )
    if h_kv > 1 and s_q > 1:
        out = out.reshape(b, h_kv, s_q, group, head_dim_v).transpose(0, 2, 1, 3, 4)
    return out.reshape(b, s_q, h_q, head_dim_v), lse


def _kernel_gap(
    q: Any, k_cache: Any, *_: Any, operands: tuple[str, ...], head_dim_v: int, **params: Any
) -> str | None:
    if "part_bounds" not in operands and exceeds(q.shape[0], MAX_BATCH):
        return (
            f"without a schedule there is a kernel for at most {MAX_BATCH} sequences, not for "
            f"{q.shape[0]}"
        )
    if k_cache.shape[1] not in KERNEL_PAGE_BLOCK_SIZES:
        page_gap = (
            f"there is a kernel for page_block_size in {KERNEL_PAGE_BLOCK_SIZES}, not for "
            f"{k_cache.shape[1]}"
        )
    else:
        page_gap = None
    return dtype_or_dims_gap(q, head_dim_v) or page_gap


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
    folded = {
        name: by_example(x, dim, n)
        for name, (x, dim) in given.items()
        if name not in ("k_cache", "attn_sink", *SCHEDULE_OPERANDS)
    }
    b = folded["q"].shape[1]
    k_cache, cache_dim = given["k_cache"]
    if cache_dim is not None:
        k_cache, folded["block_table"] = _fold_caches(
            jnp.moveaxis(k_cache, cache_dim, 0), folded["block_table"]
        )
    folded = {name: merge_axes(x) for name, x in folded.items()}
    folded["k_cache"] = k_cache
    if "attn_sink" in given:
        folded["attn_sink"] = fold_sink(*given["attn_sink"], n, b)
    if "part_bounds" in given:  # it was made for the batch of one example
        schedule = remake_schedule(
            *given["part_bounds"],
            folded["cache_seqlens"],
            n,
            rows=folded["q"].shape[1] * folded["q"].shape[2],
            fixed_split_size=fixed_split_size,
            implementation=implementation,
        )
        folded |= dict(zip(SCHEDULE_OPERANDS, schedule, strict=True))
    results = flash_mla_with_kvcache_op(
        *(folded[name] for name in (*_REQUIRED, *operands)),
        operands=operands,
        fixed_split_size=fixed_split_size,
        implementation=implementation,
        **params,
    )
    return [split_axis(x, n) for x in results], [0, 0]


def _fold_caches(k_cache: jax.Array, block_table: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Makes one cache of n caches. Cache i becomes the i-th run of pages.

    Args:
      k_cache: [n, num_blocks, ...].
      block_table: [n, b, max_blocks].
    """
    n, num_blocks = k_cache.shape[:2]
    in_pool = (block_table >= 0) & (block_table < num_blocks)
    first = jnp.arange(n, dtype=jnp.int32)[:, None, None] * num_blocks
    return merge_axes(k_cache), jnp.where(in_pool, block_table + first, -1)


flash_mla_with_kvcache_op = Op(
    name="flash_mla_with_kvcache",
    result_types=result_types,
    reference=_reference,
    kernel=_kernel,
    kernel_gap=_kernel_gap,
    batch=_batch,
)

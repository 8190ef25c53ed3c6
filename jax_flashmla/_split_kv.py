"""What the decode ops share: limits of their kernels, results, scratch, folding under vmap."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._constants import FLAGS_PER_ROW_TILE, ROW_TILE, SCALES_PER_ROW, SPLITS_PER_PART
from .schedule import get_mla_metadata_op

KERNEL_DTYPES = (jnp.bfloat16, jnp.float16)
KERNEL_HEAD_DIMS_K = (576, 512)  # with rope columns and without
KERNEL_HEAD_DIM_V = 512
SCHEDULE_OPERANDS = ("part_bounds", "first_part", "num_splits")


def dtype_or_dims_gap(q: Any, head_dim_v: int) -> str | None:
    """Why there is no kernel for q's dtype or for these head dims, or None."""
    if q.dtype not in KERNEL_DTYPES:
        return f"there is a kernel for bfloat16 and float16, not for q in {q.dtype.name}"
    if q.shape[3] not in KERNEL_HEAD_DIMS_K or head_dim_v != KERNEL_HEAD_DIM_V:
        return (
            f"there is a kernel for d_k {' or '.join(map(str, KERNEL_HEAD_DIMS_K))} and "
            f"head_dim_v {KERNEL_HEAD_DIM_V}, not for {q.shape[3]} and {head_dim_v}"
        )
    return None


def result_types(
    q: Any, *_: Any, head_dim_v: int, **params: Any
) -> list[tuple[tuple[int, ...], Any]]:
    """Shapes and dtypes of out and lse, of any decode of q."""
    b, s_q, h_q, _ = q.shape
    return [((b, s_q, h_q, head_dim_v), q.dtype), ((b, h_q, s_q), jnp.float32)]


def scratch_types(parts: Any, h_kv: int, rows: int, head_dim_v: int) -> list[jax.ShapeDtypeStruct]:
    """Scratch memory of a call: partial results, their scales and lses, and flags of 64 bits."""
    partials = SPLITS_PER_PART * parts
    return [
        jax.ShapeDtypeStruct((partials, h_kv, rows, head_dim_v), jnp.float16),
        jax.ShapeDtypeStruct((partials, h_kv, SCALES_PER_ROW, rows), jnp.float32),
        jax.ShapeDtypeStruct((partials, h_kv, rows), jnp.float32),
        jax.ShapeDtypeStruct(
            (parts, h_kv, -(-rows // ROW_TILE), 2 * FLAGS_PER_ROW_TILE), jnp.int32
        ),
    ]


# Folding an axis that vmap maps into the batch.


def by_example(x: jax.Array, dim: int | None, n: Any) -> jax.Array:
    """[n, ...], the operand of each of n examples."""
    return jnp.broadcast_to(x, (n, *x.shape)) if dim is None else jnp.moveaxis(x, dim, 0)


def merge_axes(x: jax.Array) -> jax.Array:
    """[n, b, ...] -> [n * b, ...]."""
    return x.reshape(-1, *x.shape[2:])


def split_axis(x: jax.Array, n: Any) -> jax.Array:
    """[n * b, ...] -> [n, b, ...]."""
    return x.reshape(n, -1, *x.shape[1:])


def fold_sink(attn_sink: jax.Array, dim: int | None, n: Any, b: Any) -> jax.Array:
    """The sinks of n examples of b sequences: [1, h_q] if all are the same, else [n * b, h_q]."""
    if dim is None and attn_sink.shape[0] == 1:
        return attn_sink
    sinks = by_example(attn_sink, dim, n)  # [n, 1 or b, h_q]
    return merge_axes(jnp.broadcast_to(sinks, (n, b, sinks.shape[2])))


def remake_schedule(
    part_bounds: jax.Array,
    dim: int | None,
    lengths: jax.Array,
    n: Any,
    *,
    rows: int,
    fixed_split_size: int | None,
    implementation: str,
) -> Sequence[jax.Array]:
    """The schedule of a folded batch, in place of one that was made for the batch of one example.

    Args:
      part_bounds: of the given schedule, mapped along axis `dim`.
      lengths: i32 [n * b], of the folded batch.
      rows: query rows of a sequence over all KV heads.
    """
    axis = 0 if dim is None or dim > 0 else 1  # of the parts
    parts = part_bounds.shape[axis] - 1
    return get_mla_metadata_op(
        lengths,
        # With splits of a fixed size, each sequence keeps its number of parts.
        num_parts=parts if fixed_split_size is None else n * parts,
        rows=rows,
        fixed_split_size=fixed_split_size,
        implementation=implementation,
    )

"""The tile schedule of a decode step: which part of the GPU reads which tokens."""

import dataclasses
import json

import jax
import jax.numpy as jnp
from jax import export

from . import _ffi, reference
from ._checks import check_array, static_int
from ._primitive import Op

ROW_TILE = 64
"""Query rows of one KV head that a thread block handles together."""

DEFAULT_NUM_SMS = 132
"""The SM count of an H100 or H200 SXM: the default where no CUDA device is visible."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TileSchedulerMetadata:
    """The schedule of one decode step, made by `get_mla_metadata`; a pytree.

    The arrays are opaque. The other fields are static and say which calls the schedule serves:
    those with this batch, these query rows per KV head and these KV heads.
    """

    part_bounds: jax.Array  # i32 [num_parts + 1, 2]
    first_part: jax.Array  # i32 [batch]
    batch: int = dataclasses.field(metadata={"static": True})
    num_heads_per_head_k: int = dataclasses.field(metadata={"static": True})
    num_heads_k: int = dataclasses.field(metadata={"static": True})
    num_parts: int = dataclasses.field(metadata={"static": True})


# For exported functions that take or return a schedule.
export.register_pytree_node_serialization(
    TileSchedulerMetadata,
    serialized_name="jax_flashmla.TileSchedulerMetadata",
    serialize_auxdata=lambda static: json.dumps(static).encode(),
    deserialize_auxdata=lambda data: tuple(json.loads(data)),
)


def get_mla_metadata(
    cache_seqlens: jax.Array,
    num_heads_per_head_k: int,
    num_heads_k: int,
    *,
    num_sms: int | None = None,
    implementation: str = "auto",
) -> tuple[TileSchedulerMetadata, jax.Array]:
    """Makes the schedule that one decode step shares among its layers.

    A schedule made for other lengths still gives right results in `flash_mla_with_kvcache`, only
    slower; one made for another batch or other head counts is refused there.

    The work is cut into equal shares as in FlashMLA (https://github.com/deepseek-ai/FlashMLA).

    Args:
      cache_seqlens: i32 [b], the tokens in the cache of each sequence, those of this step
        included. A negative length counts as 0.
      num_heads_per_head_k: query rows per KV head, s_q * h_q / h_kv.
      num_heads_k: KV heads, h_kv.
      num_sms: the SMs to spread the work over; default: those of the local CUDA device, 132 where
        there is none. Results are right on any SM count.
      implementation: "auto", "cuda" or "xla"; the integers are the same in each.

    Returns:
      The schedule, and num_splits i32 [b + 1]: the prefix sum of the number of parts into which
      each sequence is split.

    Raises:
      TypeError, ValueError: an argument is not as described.
      NotImplementedError: implementation is "cuda" and there is no kernel here.
    """
    cache_seqlens = jnp.asarray(cache_seqlens)
    check_array("cache_seqlens", cache_seqlens, "b", (jnp.int32,))
    rows = static_int("num_heads_per_head_k", num_heads_per_head_k)
    h_kv = static_int("num_heads_k", num_heads_k)
    sms = _local_num_sms() if num_sms is None else static_int("num_sms", num_sms)
    b = cache_seqlens.shape[0]
    if b == 0:
        raise ValueError("cache_seqlens must hold at least one sequence, got shape [0]")
    num_parts = max(1, sms // (-(-rows // ROW_TILE) * h_kv))
    part_bounds, first_part, num_splits = get_mla_metadata_op(
        cache_seqlens, num_parts=num_parts, implementation=implementation
    )
    return TileSchedulerMetadata(part_bounds, first_part, b, rows, h_kv, num_parts), num_splits


def _local_num_sms() -> int:
    devices = _ffi.local_cuda_devices()
    return int(devices[0].core_count) if devices else DEFAULT_NUM_SMS


def _result_types(cache_seqlens, *, num_parts):
    b = cache_seqlens.shape[0]
    return [((num_parts + 1, 2), jnp.int32), ((b,), jnp.int32), ((b + 1,), jnp.int32)]


def _kernel(cache_seqlens, *, num_parts):
    types = _result_types(cache_seqlens, num_parts=num_parts)
    call = jax.ffi.ffi_call(
        "jax_flashmla_tile_scheduler", [jax.ShapeDtypeStruct(*type_) for type_ in types]
    )
    return call(cache_seqlens)


def _batch(args, dims, *, num_parts, implementation):
    # Under vmap the decode op makes one schedule for the whole folded batch and drops these, so
    # that they cost nothing; they are right nevertheless.
    results = jax.vmap(
        lambda lengths: reference.schedule(lengths, num_parts=num_parts), in_axes=dims
    )(*args)
    return results, (0, 0, 0)


get_mla_metadata_op = Op(
    name="get_mla_metadata",
    result_types=_result_types,
    reference=reference.schedule,
    kernel=_kernel,
    kernel_gap=lambda *_, **__: None,
    batch=_batch,
)

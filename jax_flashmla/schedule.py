"""The tile schedule of a decode step: which part of the GPU reads which tokens."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from . import _ffi
from ._checks import check_array, static_int
from ._op import Op
from .reference import schedule as reference

ROW_TILE = 64
"""Query rows of one KV head that a thread block handles together."""

DEFAULT_NUM_SMS = 132
"""The SM count of an H100 or H200 SXM: the default where no CUDA device is visible."""

_INT32_MAX = 2**31 - 1


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
    fixed_split_size: int | None = dataclasses.field(default=None, metadata={"static": True})


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
    fixed_split_size: int | None = None,
    max_seqlen: int | None = None,
    implementation: str = "auto",
) -> tuple[TileSchedulerMetadata, jax.Array]:
    """Makes the schedule that one decode step shares among its layers.

    A schedule made for other lengths still gives right results in `flash_mla_with_kvcache`, only
    slower; one made for another batch or other head counts is refused there.

    The work is cut into equal shares as in FlashMLA (https://github.com/deepseek-ai/FlashMLA), so
    that where a sequence is split depends on the whole batch and on the SM count. With
    fixed_split_size it depends on the sequence alone, and the kernel's results for a sequence are
    the same bits whatever the batch: docs/tile_scheduler.md says what that takes and costs.

    Args:
      cache_seqlens: i32 [b], the tokens in the cache of each sequence, those of this step
        included. A negative length counts as 0.
      num_heads_per_head_k: query rows per KV head, s_q * h_q / h_kv.
      num_heads_k: KV heads, h_kv.
      num_sms: the SMs to spread the work over; default: those of the local CUDA device, 132 where
        there is none. Results are right on any SM count. Not with fixed_split_size, where it
        would change nothing.
      fixed_split_size: tokens of a split, a static multiple of 64; default: no fixed size. The
        scratch of a decode then grows with b * ceil(max_seqlen / fixed_split_size).
      max_seqlen: a static bound of the lengths in tokens, such as the block table's width times the
        page size; with fixed_split_size and only with it. A longer sequence still gets right
        results, from a last split that is as long as it takes.
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
    b = cache_seqlens.shape[0]
    if b == 0:
        raise ValueError("cache_seqlens must hold at least one sequence, got shape [0]")
    if fixed_split_size is None and max_seqlen is None:
        sms = None if num_sms is None else static_int("num_sms", num_sms)
        num_parts = default_num_parts(rows, h_kv, sms)
    else:
        num_parts = b * _splits_a_request(fixed_split_size, max_seqlen, num_sms)
        fixed_split_size = int(fixed_split_size)
    part_bounds, first_part, num_splits = get_mla_metadata_op(
        cache_seqlens,
        num_parts=num_parts,
        rows=rows * h_kv,
        fixed_split_size=fixed_split_size,
        implementation=implementation,
    )
    metadata = TileSchedulerMetadata(
        part_bounds, first_part, b, rows, h_kv, num_parts, fixed_split_size
    )
    return metadata, num_splits


def default_num_parts(rows: int, h_kv: int, num_sms: int | None = None) -> int:
    """The SMs for each row tile of each KV head, of which one has `rows` query rows."""
    if num_sms is None:
        num_sms = _local_num_sms()
    return max(1, num_sms // (-(-rows // ROW_TILE) * h_kv))


def _splits_a_request(fixed_split_size, max_seqlen, num_sms) -> int:
    """How many splits of a fixed size the longest sequence has; checks the arguments."""
    if fixed_split_size is None or max_seqlen is None:
        missing = "max_seqlen" if max_seqlen is None else "fixed_split_size"
        raise ValueError(
            "fixed_split_size and max_seqlen, a static bound of the lengths, come as a pair: pass "
            f"both or neither, got None for {missing}"
        )
    if num_sms is not None:
        raise ValueError(
            f"num_sms changes nothing where splits have a fixed size; leave it out, got {num_sms}"
        )
    size = static_int("fixed_split_size", fixed_split_size, reference.TILE_TOKENS)
    longest = static_int("max_seqlen", max_seqlen)
    if size % reference.TILE_TOKENS:
        raise ValueError(
            f"fixed_split_size must be a multiple of {reference.TILE_TOKENS} tokens, got {size}"
        )
    for name, value in (("fixed_split_size", size), ("max_seqlen", longest)):
        if value > _INT32_MAX:
            raise ValueError(f"{name} must fit into int32, as lengths do, got {value}")
    return -(-longest // size)


def _local_num_sms() -> int:
    devices = _ffi.local_cuda_devices()
    return int(devices[0].core_count) if devices else DEFAULT_NUM_SMS


def _result_types(cache_seqlens, *, num_parts, **params):
    b = cache_seqlens.shape[0]
    return [((num_parts + 1, 2), jnp.int32), ((b,), jnp.int32), ((b + 1,), jnp.int32)]


def _reference(cache_seqlens, *, num_parts, rows, fixed_split_size):
    if fixed_split_size is None:
        return reference.schedule(cache_seqlens, num_parts=num_parts, rows=rows)
    return reference.fixed_schedule(
        cache_seqlens, num_parts=num_parts, fixed_split_size=fixed_split_size
    )


def _kernel(cache_seqlens, **params):
    if params["fixed_split_size"] is not None:  # a few operations, for which XLA will do
        return _reference(cache_seqlens, **params)
    types = _result_types(cache_seqlens, **params)
    call = jax.ffi.ffi_call(
        "jax_flashmla_tile_scheduler", [jax.ShapeDtypeStruct(*type_) for type_ in types]
    )
    return call(cache_seqlens, rows=np.int64(params["rows"]))


def _batch(args, dims, *, implementation, **params):
    # Under vmap the decode op makes one schedule for the whole folded batch and drops these, so
    # that they cost nothing; they are right nevertheless.
    results = jax.vmap(lambda lengths: _reference(lengths, **params), in_axes=dims)(*args)
    return results, (0, 0, 0)


get_mla_metadata_op = Op(
    name="get_mla_metadata",
    result_types=_result_types,
    reference=_reference,
    kernel=_kernel,
    kernel_gap=lambda *_, **__: None,
    batch=_batch,
)

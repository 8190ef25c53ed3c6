"""The tile schedule of a decode step: which part of the GPU reads which tokens."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from . import _ffi
from ._checks import (
    INT32_MAX,
    check_implementation,
    check_never_empty,
    exceeds,
    int32_array,
    static_int,
)
from ._constants import MAX_BATCH, ROW_TILE, TILE_TOKENS
from ._op import Op
from .reference import schedule as reference

_MAX_ROWS = INT32_MAX // 2
_MAX_PARTS = 2**27  # with more, the place where a part begins may not fit into int32

_SERIALIZED_NAME = "jax_flashmla.TileSchedulerMetadata"


def _class_of_earlier_import() -> Any:
    """TileSchedulerMetadata as an earlier import of this module defined it, None the first time.

    jax.export keeps a registered class for the life of the process and refuses a second class of
    the same name. So importlib.reload (and %autoreload in a notebook) must keep the class. Then
    schedules made before the reload still work.
    """
    for class_ in object.__subclasses__():
        if (class_.__module__, class_.__qualname__) == (__name__, "TileSchedulerMetadata"):
            return class_
    return None


_earlier_class = _class_of_earlier_import()


@dataclasses.dataclass(frozen=True, eq=False)
class TileSchedulerMetadata:
    """The schedule of one decode step, made by `get_mla_metadata`; a pytree.

    The contents of the arrays may change between versions. The other attributes say which calls of
    `flash_mla_with_kvcache` the schedule is for: those with this batch, these query rows per KV
    head and these KV heads.

    Attributes:
      part_bounds: i32 [num_parts + 1, 2], where the work of each part begins.
      first_part: i32 [batch], the first part that works on each sequence.
      num_heads_per_head_k: query rows per KV head, s_q * h_q / h_kv. Static.
      num_heads_k: KV heads, h_kv. Static.
      fixed_split_size: tokens of a split if all have the same size, else None. Static.

    Example:
      >>> import jax, jax.numpy as jnp, jax_flashmla as fm
      >>> metadata, num_splits = fm.get_mla_metadata(jnp.array([70, 3], jnp.int32), 16, 1)
      >>> metadata.batch, metadata.num_heads_per_head_k, metadata.num_heads_k
      (2, 16, 1)
      >>> len(jax.tree.leaves(metadata))
      2
    """

    part_bounds: jax.Array
    first_part: jax.Array
    num_heads_per_head_k: int
    num_heads_k: int
    fixed_split_size: int | None = None

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.first_part.shape[-1]

    @property
    def num_parts(self) -> int:
        """Number of parts that the work is cut into."""
        return self.part_bounds.shape[-2] - 1

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TileSchedulerMetadata):
            return NotImplemented
        _refuse_comparison()

    __hash__ = None  # type: ignore[assignment]


def _refuse_comparison() -> NoReturn:
    raise TypeError(
        "TileSchedulerMetadata holds arrays, so == has no single answer; compare field by field, "
        "as in jax.numpy.array_equal(a.part_bounds, b.part_bounds)"
    )


def _serialize_static(static: tuple[int | None, ...]) -> bytes:
    return json.dumps(static).encode()


def _deserialize_static(data: bytes | bytearray) -> tuple[int | None, ...]:
    static = json.loads(data)
    if len(static) == 5:  # older programs hold the batch and the number of parts too
        _, rows, h_kv, _, fixed_split_size = static
        return rows, h_kv, fixed_split_size
    return tuple(static)


if _earlier_class is None:
    jax.tree_util.register_dataclass(
        TileSchedulerMetadata,
        data_fields=["part_bounds", "first_part"],
        meta_fields=["num_heads_per_head_k", "num_heads_k", "fixed_split_size"],
    )
    # For exported functions that take or return a schedule.
    export.register_pytree_node_serialization(
        TileSchedulerMetadata,
        serialized_name=_SERIALIZED_NAME,
        serialize_auxdata=_serialize_static,
        deserialize_auxdata=_deserialize_static,
    )
else:
    TileSchedulerMetadata = _earlier_class  # type: ignore[misc]


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
    """Makes the schedule of a decode step, once for all of its layers.

    A schedule made for other lengths still gives right results in `flash_mla_with_kvcache`, only
    slower. One made for another batch or other head counts is refused there.

    The work is cut into equal shares as in FlashMLA (https://github.com/deepseek-ai/FlashMLA). So
    where a sequence is split depends on the whole batch and on the SM count. With fixed_split_size
    it depends on the sequence alone, and the kernel's results for a sequence are the same bits
    in every batch. docs/schedule.md says what that needs and costs.

    Args:
      cache_seqlens: i32 [b], the tokens of each sequence in the cache, including those of this
        step. A negative length counts as 0. For a decode with indices, what `get_sparse_seqlens`
        gives.
      num_heads_per_head_k: query rows per KV head, s_q * h_q / h_kv; with indices h_q.
      num_heads_k: KV heads, h_kv; with indices 1.
      num_sms: the number of SMs to spread the work over. Default: that of this machine's first
        GPU, or 132 if there is none. Results are right on any SM count. Not allowed with
        fixed_split_size, where it would change nothing.
      fixed_split_size: tokens of a split, a static multiple of 64. Default: no fixed size. The
        scratch memory of a decode then grows with b * ceil(max_seqlen / fixed_split_size).
      max_seqlen: a static bound of the lengths in tokens, such as the block table's width times the
        page size. Required with fixed_split_size, not allowed without it. A longer sequence still
        gets right results: its last split holds all tokens that are left.
      implementation: "auto", "cuda" or "xla". The integers are the same with each.

    Returns:
      The schedule, and num_splits i32 [b + 1]: the prefix sum of the number of splits of each
      sequence.

    Raises:
      TypeError, ValueError: an argument is not as described.
      NotImplementedError: implementation is "cuda" and there is no kernel here; or cache_seqlens is
        unreduced or reduced over a mesh axis.

    Example:
      >>> import jax.numpy as jnp, jax_flashmla as fm
      >>> cache_seqlens = jnp.array([300, 70], jnp.int32)
      >>> metadata, num_splits = fm.get_mla_metadata(cache_seqlens, 16, 1, num_sms=4)
      >>> num_splits  # 2 splits of the first sequence, 1 of the second
      Array([0, 2, 3], dtype=int32)
    """
    cache_seqlens = int32_array("cache_seqlens", cache_seqlens, "b")
    rows = static_int("num_heads_per_head_k", num_heads_per_head_k)
    h_kv = static_int("num_heads_k", num_heads_k)
    check_implementation(implementation)
    if rows * h_kv > _MAX_ROWS:
        raise ValueError(
            f"num_heads_per_head_k * num_heads_k must be at most {_MAX_ROWS}, got {rows} * {h_kv}"
        )
    b = cache_seqlens.shape[0]
    if b == 0:
        raise ValueError("cache_seqlens must hold at least one sequence, got shape [0]")
    check_never_empty("cache_seqlens", cache_seqlens, 0)
    if fixed_split_size is None and max_seqlen is None:
        sms = None if num_sms is None else static_int("num_sms", num_sms, maximum=_MAX_PARTS)
        num_parts = default_num_parts(rows, h_kv, sms)
    else:
        fixed_split_size, splits = _fixed_splits(fixed_split_size, max_seqlen, num_sms)
        num_parts = b * splits
        if isinstance(num_parts, int) and num_parts > _MAX_PARTS:
            raise ValueError(
                f"fixed_split_size={fixed_split_size} and max_seqlen={max_seqlen} make {num_parts} "
                f"splits for {b} sequences, more than {_MAX_PARTS}; pass a larger fixed_split_size"
            )
    part_bounds, first_part, num_splits = get_mla_metadata_op(
        cache_seqlens,
        num_parts=num_parts,
        rows=rows * h_kv,
        fixed_split_size=fixed_split_size,
        implementation=implementation,
    )
    metadata = TileSchedulerMetadata(part_bounds, first_part, rows, h_kv, fixed_split_size)
    return metadata, num_splits


def default_num_parts(rows: int, h_kv: int, num_sms: int | None = None) -> int:
    """How many SMs there are for each row tile of each KV head. A KV head has `rows` query rows."""
    if num_sms is None:
        num_sms = _ffi.sm_count()
    return max(1, num_sms // (-(-rows // ROW_TILE) * h_kv))


def _fixed_splits(
    fixed_split_size: int | None, max_seqlen: int | None, num_sms: int | None
) -> tuple[int, int]:
    """Checks the arguments; returns a split's size and how many splits a sequence may have."""
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
    size = static_int("fixed_split_size", fixed_split_size, TILE_TOKENS)
    longest = static_int("max_seqlen", max_seqlen)
    if size % TILE_TOKENS:
        raise ValueError(f"fixed_split_size must be a multiple of {TILE_TOKENS} tokens, got {size}")
    return size, -(-longest // size)


def _result_types(
    cache_seqlens: Any, *, num_parts: int, **params: Any
) -> list[tuple[tuple[int, ...], Any]]:
    b = cache_seqlens.shape[0]
    return [((num_parts + 1, 2), jnp.int32), ((b,), jnp.int32), ((b + 1,), jnp.int32)]


def _reference(
    cache_seqlens: jax.Array, *, num_parts: int, rows: int, fixed_split_size: int | None
) -> tuple[jax.Array, ...]:
    if fixed_split_size is None:
        return reference.schedule(cache_seqlens, num_parts=num_parts, rows=rows)
    return reference.fixed_schedule(
        cache_seqlens, num_parts=num_parts, fixed_split_size=fixed_split_size
    )


def _kernel(cache_seqlens: jax.Array, **params: Any) -> Sequence[jax.Array]:
    if params["fixed_split_size"] is not None:
        return _reference(cache_seqlens, **params)  # a few operations: no kernel is needed
    types = _result_types(cache_seqlens, **params)
    call = jax.ffi.ffi_call(
        "jax_flashmla_tile_scheduler", [jax.ShapeDtypeStruct(*type_) for type_ in types]
    )
    results: Sequence[jax.Array] = call(cache_seqlens, rows=np.int64(params["rows"]))
    return results


def _kernel_gap(cache_seqlens: Any, *, fixed_split_size: int | None, **_: Any) -> str | None:
    """Why there is no kernel that makes the schedule of so many sequences, or None."""
    b = cache_seqlens.shape[0]
    if fixed_split_size is None and exceeds(b, MAX_BATCH):
        return f"there is a kernel for at most {MAX_BATCH} sequences, not for {b}"
    return None


def _batch(
    args: Sequence[jax.Array], dims: Sequence[int | None], *, implementation: str, **params: Any
) -> tuple[Sequence[jax.Array], Sequence[int]]:
    # Under vmap the decode op folds the batches into one and makes one schedule for it. It drops
    # the schedules made here, so XLA never computes them. Other code may still use them.
    results = jax.vmap(lambda lengths: _reference(lengths, **params), in_axes=dims)(*args)
    return results, (0, 0, 0)


get_mla_metadata_op = Op(
    name="get_mla_metadata",
    result_types=_result_types,
    reference=_reference,
    kernel=_kernel,
    kernel_gap=_kernel_gap,
    batch=_batch,
)

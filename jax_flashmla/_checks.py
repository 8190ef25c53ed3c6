"""Checks of arguments. Each message names the argument, what it must be and what it is."""

import math
import numbers
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

INT32_MAX = 2**31 - 1
IMPLEMENTATIONS = ("auto", "cuda", "xla")


def as_array(name: str, value: Any) -> jax.Array:
    """`value` as a JAX array; numpy arrays and lists of numbers become one."""
    if value is None:
        raise TypeError(f"{name} must be an array, got None")
    if isinstance(value, jax.ShapeDtypeStruct):
        raise TypeError(
            f"{name} must be an array, got {value}, which has a shape but no values; pass it "
            "through jax.eval_shape, or make an array of it with jax.numpy.zeros"
        )
    try:
        array = jnp.asarray(value)
    except OverflowError:
        raise ValueError(f"{name} must fit into int32, got {describe(value)}") from None
    except jax.errors.JAXTypeError:
        raise  # as of a tracer that outlived its function: JAX says what to do
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be an array, got {describe(value)}") from None
    if jnp.issubdtype(array.dtype, jnp.integer) and not _fits_into_int32(value):
        raise ValueError(f"{name} must fit into int32, got {describe(value)}")
    _refuse_partial_sums(name, array)
    return array


def _fits_into_int32(value: Any) -> bool:
    """Whether int32 holds all integers of numpy arrays, which JAX wraps without an error."""
    for leaf in jax.tree.leaves(value):
        if isinstance(leaf, jax.Array) or not hasattr(leaf, "__array__"):
            continue
        values = np.asarray(leaf)
        wide = not np.can_cast(values.dtype, np.int32)
        if wide and values.size and not -INT32_MAX - 1 <= values.min() <= values.max() <= INT32_MAX:
            return False
    return True


def _refuse_partial_sums(name: str, x: jax.Array) -> None:
    """Refuses arrays typed as unreduced or reduced over a mesh axis, in shard_map and outside."""
    aval = jax.typeof(x)
    spec, manual = aval.sharding.spec, aval.manual_axis_type
    if axes := spec.unreduced | manual.unreduced:
        raise NotImplementedError(
            f"{name} is unreduced over the mesh axes {sorted(map(str, axes))}, got "
            f"{aval.str_short()}: each device holds only its part of a sum. Add the parts first, "
            "with jax.lax.psum inside jax.shard_map or with jax.reshard outside"
        )
    if axes := spec.reduced | manual.reduced:
        raise NotImplementedError(
            f"{name} is typed as reduced over the mesh axes {sorted(map(str, axes))}, got "
            f"{aval.str_short()}: only derivatives need that type. Change it first, with "
            "jax.lax.pcast(..., to='varying') inside jax.shard_map or with jax.reshard outside"
        )


def int32_array(name: str, value: Any, axes: str | None) -> jax.Array:
    """`value` as an i32 array; `axes` is its shape in words, as for `check_array`."""
    return _array_of(name, value, axes, jnp.int32)


def sink_array(attn_sink: Any, h_q: int, why: str) -> jax.Array:
    """The argument attn_sink, f32 [h_q]."""
    array = _array_of("attn_sink", attn_sink, "h_q", jnp.float32)
    check_axis("attn_sink", array, 0, h_q, why)
    return array


def _array_of(name: str, value: Any, axes: str | None, dtype: DTypeLike) -> jax.Array:
    """`value` as an array; if it has another dtype, the message says how to convert it."""
    array = as_array(name, value)
    check_array(name, array, axes)
    word = np.dtype(dtype).name
    if array.dtype != dtype:
        remedy = (
            f"{name}.astype(jnp.{word})"
            if hasattr(value, "astype")
            else f"jnp.asarray({name}, jnp.{word})"
        )
        raise TypeError(f"{name} must have dtype {word}, got {array.dtype.name}; pass {remedy}")
    return array


def check_array(
    name: str, x: Any, axes: str | None, dtypes: Iterable[DTypeLike] | None = None
) -> None:
    """Checks rank and dtype; `axes` is the shape in words, as "b s_q h_q d_k", None for any."""
    if axes is not None and len(x.shape) != len(axes.split()):
        words = ", ".join(axes.split())
        raise ValueError(f"{name} must have shape [{words}], got {list(x.shape)}")
    if dtypes is not None:
        allowed = [np.dtype(d) for d in dtypes]
        if x.dtype not in allowed:
            words = " or ".join(d.name for d in allowed)
            raise TypeError(f"{name} must have dtype {words}, got {np.dtype(x.dtype).name}")


def check_axis(name: str, x: Any, axis: int, expected: int, why: str) -> None:
    """Checks one axis of an array against the size that another argument gives it."""
    if x.shape[axis] != expected:
        raise ValueError(
            f"{name} has shape {list(x.shape)}, but axis {axis} must be {expected}, {why}"
        )


def check_never_empty(name: str, x: Any, axis: int) -> None:
    """Checks that a symbolic size (jax.export) cannot be 0; leaves known sizes alone."""
    size = x.shape[axis]
    if isinstance(size, int):
        return
    try:
        fits = size >= 1
    except jax.errors.InconclusiveDimensionOperation:
        fits = False
    if not fits:
        raise ValueError(
            f"{name} has shape {list(x.shape)}, and its symbolic axis {axis} may be 0; pass "
            f'jax.export.symbolic_shape the constraint "{size} >= 1"'
        )


def exceeds(size: Any, limit: int) -> bool:
    """Whether a size is above a limit; False for a symbolic one (jax.export) that may be so."""
    try:
        return bool(size > limit)
    except jax.errors.InconclusiveDimensionOperation:
        return False


def int32_holds_slots(op: str, n: Any, pool: Any, implementation: str) -> bool:
    """Whether int32 holds the slots of n caches of `pool` slots, which vmap makes one cache of.

    False if the sizes are symbolic (jax.export) and no constraint decides it.
    """
    try:
        fits = n * pool <= INT32_MAX
    except jax.errors.InconclusiveDimensionOperation:
        if implementation == "cuda":
            raise NotImplementedError(
                f"vmap of {op} over {n} caches of {pool} slots, with "
                f'implementation="cuda": there must be at most {INT32_MAX} slots in all, '
                "which symbolic sizes do not guarantee; pass jax.export.symbolic_shape the "
                f'constraint "{n * pool} <= {INT32_MAX}", or pass implementation="auto" or "xla"'
            ) from None
        return False
    if not fits:
        raise NotImplementedError(
            f"vmap of {op} over {n} caches of {pool} slots exceeds the int32 range of "
            "slots; map fewer caches at a time"
        )
    return True


def check_decode_shapes(q: Any, k_cache: Any, head_dim_v: int, dtypes: Iterable[DTypeLike]) -> int:
    """Checks q, k_cache and head_dim_v of a decode against each other; returns head_dim_v."""
    check_array("q", q, "b s_q h_q d_k", dtypes)
    check_only_axis_0_symbolic("q", q)
    if 0 in q.shape:
        raise ValueError(f"q must have no empty axis, got shape {list(q.shape)}")
    h_q, d_k = q.shape[2:]
    check_cache("k_cache", k_cache, "num_blocks page_block_size h_kv d_k", d_k, q.dtype)
    if h_q % k_cache.shape[2]:
        raise ValueError(
            f"h_kv must divide h_q: k_cache has {k_cache.shape[2]} KV heads, q has {h_q} heads"
        )
    d_v = static_int("head_dim_v", head_dim_v)
    if d_v > d_k:
        raise ValueError(f"head_dim_v must be at most the d_k of q, {d_k}, got {d_v}")
    return d_v


def check_cache(name: str, x: Any, axes: str, d_k: int, dtype: DTypeLike) -> None:
    """Checks a cache of q's dtype and d_k."""
    check_array(name, x, axes, (dtype,))
    check_only_axis_0_symbolic(name, x)
    if 0 in x.shape[1:]:
        raise ValueError(f"only axis 0 of {name} may be empty, got shape {list(x.shape)}")
    check_axis(name, x, 3, d_k, "the d_k of q")


def check_extra_cache(extra_k_cache: Any, q: Any) -> None:
    """Checks a second cache of q's dtype and d_k, with the one KV head of token lists."""
    name = "extra_k_cache"
    check_cache(name, extra_k_cache, "num_blocks2 page_block_size2 h_kv d_k", q.shape[3], q.dtype)
    check_axis(name, extra_k_cache, 2, 1, "the KV heads with indices")


def check_only_axis_0_symbolic(name: str, x: Any) -> None:
    """Checks that jax.export knows all sizes but that of axis 0."""
    if not all(isinstance(size, int) for size in x.shape[1:]):
        raise TypeError(
            f"only axis 0 of {name} may be symbolic in jax.export, got shape {list(x.shape)}; "
            "export one program for each of the other sizes"
        )


def check_implementation(implementation: str) -> None:
    """Checks the argument `implementation` of an op."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {IMPLEMENTATIONS}, got {implementation!r}")


def check_offset_has_mask(causal: bool) -> None:
    """Checks that a call with a causal_offset has causal=True."""
    if not causal:
        raise ValueError(
            "causal_offset moves the boundary of the causal mask, which causal=False turns off; "
            "pass causal=True with it, also for one query a sequence, or leave it out"
        )


def check_lists(name: str, x: Any, owner: str, b: Any, s_q: int) -> None:
    """Checks the shape of token lists [b, s_q, topk] against `owner`'s batch and queries."""
    check_array(name, x, "b s_q topk")
    check_only_axis_0_symbolic(name, x)
    check_axis(name, x, 0, b, f"the batch of {owner}")
    check_axis(name, x, 1, s_q, f"the s_q of {owner}")
    if x.shape[2] == 0:
        raise ValueError(
            f"{name} must have at least one entry a query, which may be -1, got shape "
            f"{list(x.shape)}"
        )


def check_list_lengths(name: str, x: Any, lists: Any) -> None:
    """Checks the shape of the lengths of token lists, [b] or [b, s_q]."""
    b, s_q, _ = lists.shape
    if x.ndim not in (1, 2):
        raise ValueError(f"{name} must have shape [b] or [b, s_q], got {list(x.shape)}")
    if x.ndim == 1 and x.shape[0] != b and x.shape[0] == b * s_q:
        raise ValueError(
            f"{name} must have shape [b] or [b, s_q], [{b}] or [{b}, {s_q}] here, got "
            f"{list(x.shape)}; pass {name}.reshape({b}, {s_q})"
        )
    for axis, size in enumerate(("batch", "s_q")[: x.ndim]):
        check_axis(name, x, axis, lists.shape[axis], f"the {size} of its lists")


def check_no_lists(
    topk_length: Any, extra_k_cache: Any, extra_indices: Any, extra_topk_length: Any
) -> None:
    """Checks that a call without indices has no argument that belongs to them."""
    for name, value in (
        ("topk_length", topk_length),
        ("extra_k_cache", extra_k_cache),
        ("extra_indices_in_kvcache", extra_indices),
        ("extra_topk_length", extra_topk_length),
    ):
        if value is not None:
            raise ValueError(
                f"{name} belongs to a call with indices, got {describe(value)} and indices=None; "
                "pass indices with it, or leave it out"
            )


def check_given(name: str, value: Any) -> None:
    """Checks that a call without indices has an argument that one with indices leaves out."""
    if value is None:
        raise TypeError(
            f"{name} must be an array, got None; for attention over token lists pass indices"
        )


def check_only_lists(k_cache: Any, *, causal: bool, **others: Any) -> None:
    """Checks that a call with indices says nowhere else what a query sees."""
    instead = {
        "block_table": "get_slot_mapping makes indices of a block table and positions",
        "cache_seqlens": "topk_length holds the lengths of the lists",
        "causal_offset": "the lists hold just what a query sees",
    }
    for name, value in others.items():
        if value is not None:
            raise ValueError(
                f"{name} must be None with indices, got {describe(value)}; {instead[name]}"
            )
    if causal:
        raise ValueError(
            "causal must be False with indices, got True; the lists hold just what a query sees"
        )
    if k_cache.shape[2] != 1:
        raise ValueError(
            f"k_cache has shape {list(k_cache.shape)}, but with indices axis 2 must be 1: all "
            "query heads share one KV head"
        )


def check_extra_pair(extra_k_cache: Any, extra_indices: Any, extra_topk_length: Any) -> None:
    """Checks that an extra cache comes with its lists, and their lengths only with both."""
    if (extra_k_cache is None) != (extra_indices is None):
        missing = "extra_k_cache" if extra_k_cache is None else "extra_indices_in_kvcache"
        raise ValueError(
            "extra_k_cache and extra_indices_in_kvcache come as a pair: pass both or neither, got "
            f"None for {missing}"
        )
    if extra_k_cache is None and extra_topk_length is not None:
        raise ValueError(
            "extra_topk_length holds the lengths of extra lists, got "
            f"{describe(extra_topk_length)} and None for extra_k_cache and "
            "extra_indices_in_kvcache; pass these too, or leave it out"
        )


def static_int(name: str, value: Any, minimum: int = 1, maximum: int = INT32_MAX) -> int:
    """A Python (or numpy) integer from `minimum` to `maximum`; traced and device values raise."""
    if isinstance(value, jax.Array) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be a static Python int, got {describe(value)}")
    if isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} must be an int of at least {minimum}, got {value}")
    if value > maximum:
        limit = "fit into int32" if maximum == INT32_MAX else f"be at most {maximum}"
        raise ValueError(f"{name} must {limit}, got {value}")
    return int(value)


def static_bool(name: str, value: Any) -> bool:
    """A Python (or numpy) bool."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be a static Python bool, got {describe(value)}")
    return bool(value)


def static_positive_float(name: str, value: Any) -> float:
    """A Python (or numpy) number, finite and above 0 also in float32."""
    if isinstance(value, jax.Array | bool) or not isinstance(value, numbers.Real | np.number):
        raise TypeError(f"{name} must be a static Python number, got {describe(value)}")
    with np.errstate(over="ignore"):
        rounded = float(np.float32(value))
    if not math.isfinite(rounded) or rounded <= 0:
        raise ValueError(f"{name} must be finite and above 0 in float32, got {value}")
    return rounded


def describe(value: Any) -> str:
    """A value in words, for a message."""
    if isinstance(value, jax.core.Tracer):
        return f"the traced value {value}"
    if isinstance(value, jax.Array):
        return f"an array of type {jax.typeof(value).str_short()}"
    text = " ".join(repr(value).split())
    if len(text) > 100:
        text = f"{text[:100]}..."
    return f"{text} of type {type(value).__name__}"

"""Merges partial attention results: of several caches, or of one sequence's pages over devices.

Shapes: n partial results, b sequences, s_q queries, h_q query heads, d_v head dim of V.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._checks import as_array, check_array, check_axis, check_never_empty, sink_array

_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def merge_attention_states(
    outs: jax.Array, lses: jax.Array, *, attn_sink: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Attention over all keys, from its results over disjoint parts of the keys.

    Exact up to rounding: the weight of each part is exp(lse) / sum of exp(lse), as in online
    softmax (https://arxiv.org/abs/1805.02867). The parts may come in any order. The arithmetic is
    float32.

    Args:
      outs: [n, b, s_q, h_q, d_v], bf16, fp16 or f32, each the attention over its part alone.
      lses: f32 [n, b, h_q, s_q], natural logarithm of each part's sum of exponentials. Infinity
        means that the query sees no key in the part, as in the results of
        `flash_mla_with_kvcache`. Such a part adds nothing, whatever its out holds. If a sequence is
        NaN in one part, because it is invalid there, its merged results are NaN.
      attn_sink: f32 [h_q], as of `flash_mla_with_kvcache`: out is multiplied by
        sigmoid(lse - attn_sink). Pass it here and not to the calls that gave the parts, so that it
        counts once.

    Returns:
      out: [b, s_q, h_q, d_v] in outs' dtype; 0 for a query that sees no key in any part.
      lse: f32 [b, h_q, s_q], without the sink; +inf for such a query.

    Raises:
      TypeError, ValueError: an argument is not as described.
      NotImplementedError: an array is unreduced or reduced over a mesh axis.

    Example:
      >>> import jax.numpy as jnp, jax_flashmla as fm
      >>> outs = jnp.array([1.0, 4.0]).reshape(2, 1, 1, 1, 1)
      >>> lses = jnp.log(jnp.array([2.0, 1.0])).reshape(2, 1, 1, 1)  # shares of 2/3 and 1/3
      >>> out, lse = fm.merge_attention_states(outs, lses)
      >>> round(out.item(), 3), round(jnp.exp(lse).item(), 3)
      (2.0, 3.0)
    """
    outs, lses = as_array("outs", outs), as_array("lses", lses)
    check_array("outs", outs, "n b s_q h_q d_v", _DTYPES)
    check_array("lses", lses, "n b h_q s_q", (jnp.float32,))
    if outs.shape[0] == 0:
        raise ValueError(f"outs must hold at least one part, got shape {list(outs.shape)}")
    check_never_empty("outs", outs, 0)
    for lses_axis, outs_axis, name in ((0, 0, "n"), (1, 1, "b"), (2, 3, "h_q"), (3, 2, "s_q")):
        check_axis("lses", lses, lses_axis, outs.shape[outs_axis], f"the {name} of outs")
    if attn_sink is not None:
        attn_sink = sink_array(attn_sink, outs.shape[3], "the h_q of outs")

    # Make no infinities on the way to the result, because jax_debug_infs would stop at them.
    empty = jnp.isinf(lses)
    lowest = float(np.finfo(np.float32).min)
    maximum = jnp.where(empty, lowest, lses).max(axis=0)
    weights = jnp.where(empty, 0, jnp.exp(jnp.where(empty, maximum[None], lses) - maximum[None]))
    total = weights.sum(axis=0)
    nothing = total == 0
    total = jnp.where(nothing, 1, total)
    shares = weights / total[None]
    lse = maximum + jnp.log(total)  # of a query that sees a key
    if attn_sink is not None:
        shares *= _sink_factor(lse, attn_sink)[None]

    shares, empty = (jnp.swapaxes(x, 2, 3)[..., None] for x in (shares, empty))
    # An empty part's out may hold NaN, and 0 * NaN is NaN.
    out = jnp.sum(shares * jnp.where(empty, 0, outs).astype(jnp.float32), axis=0)
    return out.astype(outs.dtype), jnp.where(nothing, jnp.inf, lse)


def _sink_factor(lse: jax.Array, attn_sink: jax.Array) -> jax.Array:
    """sigmoid(lse - attn_sink) for lse [b, h_q, s_q]; makes no infinities on the way either."""
    infinite, negative = (x[None, :, None] for x in (jnp.isinf(attn_sink), attn_sink < 0))
    finite = jnp.where(jnp.isinf(attn_sink), 0, attn_sink)[None, :, None]
    factor = jax.nn.sigmoid(lse - finite)
    return jnp.where(infinite, negative.astype(factor.dtype), factor)


def merge_attention_states_across(
    out: jax.Array,
    lse: jax.Array,
    axis_name: str | tuple[str, ...],
    *,
    attn_sink: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`merge_attention_states` of one part on each device, inside jax.shard_map.

    The results are the same on every device along axis_name, and their type says so: out_specs need
    not name the axis.

    It takes one collective: an all-gather of out, in its own dtype, together with lse's bits. Each
    device receives b * s_q * h_q * (d_v * itemsize + 4) bytes from each of the n - 1 others. An
    all-reduce of weighted sums in float32 would move fewer bytes from n = 4 on (for 16-bit outs).
    But it would need the largest lse first, which takes a second collective. In a decode step
    waiting for one more collective costs more than the bytes.

    Args:
      out: [b, s_q, h_q, d_v], bf16, fp16 or f32, the attention over this device's keys.
      lse: f32 [b, h_q, s_q]; +inf for a query that sees none of them.
      axis_name: the mesh axis, or several, over which the keys are split.
      attn_sink: f32 [h_q], the sinks of these heads, the same on all devices along axis_name; not
        passed to the calls that gave the parts.

    Returns:
      out [b, s_q, h_q, d_v] and lse f32 [b, h_q, s_q], as of `merge_attention_states`.

    Raises:
      TypeError, ValueError: an argument is not as described, or axis_name is not a manual mesh
        axis here.
      NotImplementedError: an array is unreduced or reduced over a mesh axis.

    Example:
      >>> import jax, jax.numpy as jnp, jax_flashmla as fm
      >>> mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> merge = jax.shard_map(
      ...     lambda out, lse: fm.merge_attention_states_across(out, lse, "x"),
      ...     mesh=mesh,
      ...     in_specs=jax.P("x"),  # axis 0 of the arguments: the devices' parts
      ...     out_specs=jax.P(),
      ... )
      >>> out, lse = merge(jnp.ones((1, 2, 4, 8)), jnp.zeros((1, 4, 2)))
      >>> out.shape, lse.shape
      ((1, 2, 4, 8), (1, 4, 2))
    """
    out, lse = as_array("out", out), as_array("lse", lse)
    check_array("out", out, "b s_q h_q d_v", _DTYPES)
    check_array("lse", lse, "b h_q s_q", (jnp.float32,))
    for lse_axis, out_axis, name in ((0, 0, "b"), (1, 2, "h_q"), (2, 1, "s_q")):
        check_axis("lse", lse, lse_axis, out.shape[out_axis], f"the {name} of out")
    if attn_sink is not None:
        attn_sink = sink_array(attn_sink, out.shape[2], "the h_q of out")
    gathered = jax.lax.all_gather(_pack(out, lse), _check_axis_name(axis_name), to="invarying")
    return merge_attention_states(*_unpack(gathered, out.dtype), attn_sink=attn_sink)


def _check_axis_name(axis_name: str | tuple[str, ...]) -> tuple[str, ...]:
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"axis_name must be the name of a mesh axis or a tuple of names, got {axis_name!r}"
        )
    for name in names:
        try:
            jax.lax.axis_size(name)
        except NameError:
            raise ValueError(
                f"axis_name {name!r} is not a manual mesh axis here; call "
                "merge_attention_states_across inside a jax.shard_map over that axis"
            ) from None
    return names


def _pack(out: jax.Array, lse: jax.Array) -> jax.Array:
    """One array of both: [b, s_q, h_q, d_v + 4 / itemsize], of unsigned integers.

    As integers, so that nothing treats lse's bits as floating-point numbers on the way.
    """
    bits = jnp.dtype(f"uint{8 * out.dtype.itemsize}")
    lse_bits = jax.lax.bitcast_convert_type(jnp.swapaxes(lse, 1, 2), bits)
    return jnp.concatenate(
        [jax.lax.bitcast_convert_type(out, bits), lse_bits.reshape(*out.shape[:3], -1)], axis=-1
    )


def _unpack(packed: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """(outs, lses) of packed [n, b, s_q, h_q, ...]."""
    lse_columns = jnp.dtype(jnp.float32).itemsize // packed.dtype.itemsize
    outs = jax.lax.bitcast_convert_type(packed[..., :-lse_columns], dtype)
    lses = packed[..., -lse_columns:]
    lses = jax.lax.bitcast_convert_type(lses if lse_columns > 1 else lses[..., 0], jnp.float32)
    return outs, jnp.swapaxes(lses, 2, 3)

"""Multiplies rows by factors: a made-up op, see tests/test_ops.py."""

import jax
import jax.numpy as jnp

from ._checks import check_array, check_axis
from ._op import Op
from .reference import scale_rows as reference


def scale_rows(x: jax.Array, factors: jax.Array, *, implementation: str = "auto") -> jax.Array:
    """Multiplies each row of `x`, [rows, width], by its element of `factors`, [rows]."""
    x, factors = jnp.asarray(x), jnp.asarray(factors)
    check_array("x", x, "rows width", (jnp.float32,))
    check_array("factors", factors, "rows", (jnp.float32,))
    check_axis("factors", factors, 0, x.shape[0], "the rows of x")
    return scale_rows_op(x, factors, implementation=implementation)[0]


def _result_types(x, factors):
    return [(x.shape, x.dtype)]


def _reference(x, factors):
    return [reference.scale_rows(x, factors)]


def _kernel(x, factors):
    call = jax.ffi.ffi_call("jax_flashmla_scale_rows", jax.ShapeDtypeStruct(x.shape, x.dtype))
    return [call(x, factors)]


def _batch(args, dims, *, implementation):
    """Folds the mapped axis into the rows."""
    n = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
    x, factors = (
        jnp.broadcast_to(x, (n, *x.shape)) if d is None else jnp.moveaxis(x, d, 0)
        for x, d in zip(args, dims, strict=True)
    )
    (out,) = scale_rows_op(
        x.reshape(-1, x.shape[2]), factors.reshape(-1), implementation=implementation
    )
    return [out.reshape(x.shape)], [0]


scale_rows_op = Op(
    name="scale_rows",
    result_types=_result_types,
    reference=_reference,
    kernel=_kernel,
    kernel_gap=lambda x, factors: None if x.shape[1] % 4 == 0 else "width must be a multiple of 4",
    batch=_batch,
)

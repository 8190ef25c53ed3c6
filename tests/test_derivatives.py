"""The ops have no derivative, and say so."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import ops
import pytest

# f gives a scalar from some arrays. The derivative is with respect to the i-th array.
DERIVATIVES = {
    "grad": lambda f, i, *args: jax.grad(f, i)(*args),
    "jvp": lambda f, i, *args: jax.jvp(by_one(f, i, args), args[i : i + 1], args[i : i + 1]),
    "vjp": lambda f, i, *args: jax.vjp(by_one(f, i, args), args[i]),
    "linearize": lambda f, i, *args: jax.linearize(by_one(f, i, args), args[i]),
    "jacfwd": lambda f, i, *args: jax.jacfwd(lambda s: by_one(f, i, args)(s * args[i]))(
        jnp.ones((), args[i].dtype)
    ),
    "jit": lambda f, i, *args: jax.jit(jax.grad(jax.jit(f), i))(*args),
    "checkpoint": lambda f, i, *args: jax.grad(jax.checkpoint(f), i)(*args),
    "vmap": lambda f, i, *args: jax.vmap(jax.grad(f, i))(*(x[None] for x in args)),
    "scan": lambda f, i, *args: jax.grad(
        lambda x: jax.lax.scan(lambda c, _: (c + by_one(f, i, args)(x), None), 0.0, length=2)[0]
    )(args[i]),
}


def by_one(f, i, args):
    """f as a function of its i-th argument."""
    return lambda x: f(*args[:i], x, *args[i + 1 :])


def scalar_of(row):
    """The sum of the results as a function of the operands that are floats; and these operands."""
    operands = row.arrays()
    floats = [i for i, operand in enumerate(row.operands) if operand.is_float]

    def total(*values):
        arrays = list(operands)
        for i, value in zip(floats, values, strict=True):
            arrays[i] = value
        results = [x for x in row.run(*arrays) if jnp.issubdtype(x.dtype, jnp.floating)]
        return functools.reduce(jnp.add, [x.astype(jnp.float32).sum() for x in results])

    return total, [operands[i] for i in floats]


def derivative_rows():
    """With respect to every float operand; for the cache only jax.grad."""
    for row in ops.ROWS:
        floats = [operand.name for operand in row.operands if operand.is_float]
        if row.primitive is not None:
            for i, name in enumerate(floats):
                for derivative in ["grad"] if name in row.caches else DERIVATIVES:
                    id_ = f"{row}-{derivative}-by-{name}"
                    yield pytest.param(row, i, derivative, id=id_, marks=row.marks)


@pytest.mark.parametrize(("row", "i", "derivative"), list(derivative_rows()))
def test_derivatives_raise(row, i, derivative):
    message = f"^{row.name_in_messages} is an inference op and has no derivative"
    f, operands = scalar_of(row)
    with pytest.raises(NotImplementedError, match=message):
        DERIVATIVES[derivative](f, i, *operands)


@pytest.mark.usefixtures("quick_compile")
@ops.each(lambda row: row.primitive and not row.variant and any(x.is_float for x in row.operands))
def test_ops_among_what_is_differentiated(row):
    """An op may stand in a differentiated function if no derivative goes through the op."""
    total, floats = scalar_of(row)
    operands = [jnp.abs(x) for x in floats]

    def loss(x):
        first = jax.lax.stop_gradient(x * operands[0].astype(jnp.float32))
        first = first.astype(operands[0].dtype)
        constant = jnp.nan_to_num(total(first, *operands[1:]), posinf=1.0)
        return x * x * (2.0 + jnp.tanh(constant))

    for f in (loss, jax.checkpoint(loss), jax.jit(loss)):
        x = jnp.float32(2)
        np.testing.assert_allclose(jax.grad(f)(x), 2 * loss(x) / x, rtol=0.01)

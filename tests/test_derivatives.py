"""The ops have no derivative, and say so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import D_K, zeros
from decode_step import append
from dense_calls import decode

import jax_flashmla as fm


def attend(q, k_cache):
    """A scalar of the decode op."""
    table, lengths = zeros(2, 1, dtype=jnp.int32), jnp.array([3, 16], jnp.int32)
    schedule = fm.get_mla_metadata(lengths, 4, 1)
    return decode(q, k_cache, table, lengths, schedule=schedule)[1].sum()


def append_all(new_kv, k_cache):
    """A scalar of the append."""
    return append(k_cache, new_kv, jnp.array([3, 5], jnp.int32)).astype(jnp.float32).sum()


DERIVATIVES = {
    "grad": lambda f, *args: jax.grad(f)(*args),
    "grad of the cache": lambda f, *args: jax.grad(f, 1)(*args),
    "jvp": lambda f, *args: jax.jvp(f, args, args),
    "vjp": lambda f, *args: jax.vjp(f, *args),
    "linearize": lambda f, *args: jax.linearize(f, *args),
    "jacfwd": lambda f, *args: jax.jacfwd(f)(*args),
    "jit": lambda f, *args: jax.jit(jax.grad(jax.jit(f)))(*args),
    "checkpoint": lambda f, *args: jax.grad(jax.checkpoint(f))(*args),
    "vmap": lambda f, *args: jax.vmap(jax.grad(f), (None, 0))(args[0], args[1][None]),
    "scan": lambda f, *args: jax.grad(
        lambda x: jax.lax.scan(lambda c, _: (c + f(x, args[1]), None), 0.0, length=2)[0]
    )(args[0]),
}


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize(
    ("function", "shape", "op"),
    [(attend, (2, 1, 4, D_K), "flash_mla_with_kvcache"), (append_all, (2, D_K), "append_kv_cache")],
    ids=["decode", "append"],
)
def test_derivatives_raise(function, shape, op, derivative):
    with pytest.raises(NotImplementedError, match=f"{op} is an inference op and has no derivative"):
        DERIVATIVES[derivative](function, zeros(*shape), zeros(2, 16, 1, D_K))


def test_ops_among_what_is_differentiated():
    """Where no derivative goes through them, they do not mind."""
    q, k_cache = jnp.ones((2, 1, 4, D_K), jnp.bfloat16), jnp.ones((2, 16, 1, D_K), jnp.bfloat16)

    def loss(x):
        constant = attend(jax.lax.stop_gradient(x * q), k_cache)
        return x * x * constant

    expected = 4 * attend(2 * q, k_cache)
    for f in (loss, jax.checkpoint(loss), jax.jit(loss)):
        np.testing.assert_allclose(jax.grad(f)(jnp.bfloat16(2)), expected, rtol=0.01)

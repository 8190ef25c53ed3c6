"""A decode loop: each step appends, makes a schedule, attends, and so picks the next tokens."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
from cases import D_K
from decode_step import append
from dense_calls import decode

import jax_flashmla as fm

# Lengths grow across ends of pages and tiles, and with the tiles the splits change: in the third
# step, before many sequences have ended, whatever the bits of the results are. One sequence
# begins empty. Each ends with its budget, or with an end-of-sequence token.
LOOP_PAGE, STEPS = 16, 20

STARTS, BUDGETS = np.array([[126, 0, 254, 50], [18, 13, 17, 18]], np.int32)

VOCAB, ENDS = 97, 5  # tokens, and how many of them end a sequence


def loop_weights(seed=0):
    """The cache, the block table, and the queries and cache entry of each token."""
    rng = np.random.default_rng(seed)
    b, width = len(STARTS), 17
    order = rng.permutation(b * width).astype(np.int32).reshape(b, width)
    k_cache = cases.random_values(rng, (b * width, LOOP_PAGE, 1, D_K), "bfloat16")
    queries = cases.random_values(rng, (VOCAB, 1, 16, D_K), "bfloat16")
    entries = cases.random_values(rng, (VOCAB, 1, D_K), "bfloat16")
    return tuple(jnp.asarray(x) for x in (k_cache, order, queries, entries))


def hashed(out, lse):
    """A token for each sequence. It depends on every bit of the results, by integer arithmetic."""
    bits = jax.lax.bitcast_convert_type(out, jnp.int16).astype(jnp.int32)
    more = jax.lax.bitcast_convert_type(lse, jnp.int32)
    place = jnp.arange(1, bits[0].size + 1, dtype=jnp.int32).reshape(bits[0].shape)
    return (jnp.sum(bits * place, axis=(1, 2, 3)) + jnp.sum(more, axis=(1, 2))) % VOCAB


def loop_step(weights, implementation, given=True):
    """One step: appends, makes the schedule and attends, with the lengths that the last step left.

    With `given` false the call makes a schedule of its own.
    """
    table, queries, entries = weights

    def step(state):
        count, k_cache, lengths, tokens, done = state
        lengths = lengths + ~done
        positions = jnp.where(done, -1, lengths - 1)[:, None]
        slots = fm.get_slot_mapping(table, positions, LOOP_PAGE)[:, 0]
        k_cache = append(k_cache, entries[tokens], slots, implementation=implementation)
        schedule = fm.get_mla_metadata(lengths, 16, 1, num_sms=9, implementation=implementation)
        arrays = queries[tokens], k_cache, table, lengths
        passed = schedule if given else (None, None)
        out, lse = decode(*arrays, schedule=passed, implementation=implementation)
        following = jnp.where(done, tokens, hashed(out, lse))
        done = done | (following < ENDS) | (lengths >= STARTS + BUDGETS)
        return (count + 1, k_cache, lengths, following, done), schedule[1]

    return step


def loop_state(k_cache):
    tokens = jnp.arange(len(STARTS), dtype=jnp.int32) + ENDS
    return jnp.int32(0), k_cache + 0, jnp.asarray(STARTS), tokens, jnp.zeros(len(STARTS), bool)


def fori_loop(step, state):
    return jax.lax.fori_loop(0, STEPS, lambda _, s: step(s)[0], state)


def scan(step, state):
    return jax.lax.scan(lambda s, _: (step(s)[0], None), state, length=STEPS)[0]


def while_loop(step, state):
    """Steps until every sequence has ended, which only the device knows."""
    return jax.lax.while_loop(lambda s: ~jnp.all(s[4]), lambda s: step(s)[0], state)


def cond(step, state):
    """Makes a step at every turn of the loop except each third one."""

    def turn(s, i):
        return jax.lax.cond(i % 3 < 2, lambda s: step(s)[0], lambda s: s, s), None

    return jax.lax.scan(turn, state, jnp.arange(STEPS))[0]


def unrolled(step, state, loop):
    """The same in Python, a jitted step at a time; and num_splits of each step."""
    step, splits = jax.jit(step), []
    for i in range(STEPS):
        if loop is while_loop and np.all(state[4]):
            break
        if loop is not cond or i % 3 < 2:
            state, num_splits = step(state)
            splits.append(tuple(np.asarray(num_splits).tolist()))
    return state, splits


def independent_loops(implementation):
    """A compiled step of some tokens, and states to start from, made anew at each call."""
    k_cache, *weights = loop_weights()
    step = loop_step(weights, implementation)
    run = jax.jit(lambda s: jax.lax.fori_loop(0, 4, lambda _, s: step(s)[0], s), donate_argnums=0)

    def states():
        for i in range(4):
            count, cache, lengths, tokens, done = loop_state(k_cache)
            yield count, cache, lengths - i * (lengths > 10), tokens + i, done

    return run.lower(next(states())).compile(), lambda: list(states())


COMMAND_BUFFERS = {
    "default": {},
    "off": {"xla_gpu_enable_command_buffer": ""},
    "while": {
        "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CONDITIONAL,WHILE",
        "xla_gpu_graph_min_graph_size": 1,
    },
}

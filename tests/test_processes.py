"""Several processes and threads that decode at once, and the cache of programs on disk."""

import concurrent.futures
import functools
import hashlib

import fresh_process
import jax
import numpy as np
from cases import assert_bit_equal
from decode_loop import fori_loop, independent_loops, loop_state, loop_step, loop_weights


def digest(implementation):
    """Runs a loop; returns the bits of its results in short, and the hits of the cache on disk."""
    events = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    k_cache, *weights = loop_weights()
    step = loop_step(weights, implementation)
    leaves = jax.jit(functools.partial(fori_loop, step))(loop_state(k_cache))
    bits = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in leaves)).hexdigest()
    found = [e.rsplit("/", 1)[1] for e in events if e.startswith("/jax/compilation_cache/cache_")]
    return bits, found.count("cache_hits"), found.count("cache_misses")


def start_process(implementation, **environment):
    """Starts another process, which prints its `digest`."""
    code = f"import test_processes; print(*test_processes.digest({implementation!r}))"
    return fresh_process.start(code, **environment)


def finish(process):
    bits, hits, misses = fresh_process.finish(process).split()
    return bits, int(hits), int(misses)


def test_two_processes_and_the_cache_on_disk(implementation, tmp_path):
    """Two at a time on one device, each with its own program cache; then again, with hits only."""
    both = [
        {
            "JAX_COMPILATION_CACHE_DIR": str(tmp_path / name),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "JAX_RAISE_PERSISTENT_CACHE_ERRORS": "1",
        }
        for name in "ab"
    ]
    first = [finish(p) for p in [start_process(implementation, **each) for each in both]]
    second = finish(start_process(implementation, **both[0]))
    expected = digest(implementation)[0]
    assert [bits for bits, _, _ in (*first, second)] == [expected] * 3
    assert all(hits == 0 and misses > 0 for _, hits, misses in first)
    assert second[1:] == (first[0][2], 0)


def test_threads_call_one_compiled_step(implementation):
    run, states = independent_loops(implementation)
    expected = []
    for state in states():
        for _ in range(3):
            state = jax.block_until_ready(run(state))
        expected.append(jax.device_get(state))
    assert len({e[1].tobytes() for e in expected}) == 4

    def work(state):
        for _ in range(3):
            state = run(state)
        return jax.device_get(state)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(5 if implementation == "cuda" else 1):
            assert_bit_equal(list(pool.map(work, states())), expected)
    turns = states()  # several loops running at a time, started by one thread
    for _ in range(3):
        turns = [run(state) for state in turns]
    assert_bit_equal(jax.device_get(turns), expected)

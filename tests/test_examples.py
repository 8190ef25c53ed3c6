"""The example runs, checks itself, and compiles for an H200 with its cache in place."""

import functools
import importlib.util
import math
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering import PASSED_ON, operations_on

ROOT = Path(__file__).parent.parent
SMALL = ["--layers=2", "--batch=3", "--heads=2", "--steps=20", "--prompt=40", "--width=64"]


def load_example():
    """examples/decode_loop.py as a new module, whose jitted functions have traced nothing yet."""
    spec = importlib.util.spec_from_file_location("decode_loop", ROOT / "examples/decode_loop.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


example = functools.cache(load_example)


def test_decode_loop(implementation, capsys):
    assert example().main([*SMALL, f"--implementation={implementation}"]) == 0
    output = capsys.readouterr().out
    assert re.search(rf"implementation +{implementation}:", output)
    assert re.search(r"decoded +\d+ tokens/s", output)
    assert re.search(r"cache in place +yes", output)
    assert output.endswith("ok\n")


def test_decode_loop_notices_a_missing_token(monkeypatch, capsys):
    module = load_example()
    decode = module.flash_mla_with_kvcache

    def one_short(q, k_cache, block_table, lengths, *args, **kwargs):
        return decode(q, k_cache, block_table, lengths - 1, *args, **kwargs)

    monkeypatch.setattr(module, "flash_mla_with_kvcache", one_short)
    assert module.main([*SMALL, "--implementation=xla"]) == 1
    assert capsys.readouterr().out.endswith("FAILED\n")


def test_error_of_nan_is_nan():
    config = example().Config(layers=1, heads=1, num_pages=1, weight_dtype="float32")
    weights = example().init_weights(config, jax.random.key(0))
    fed, logits = np.zeros((2, 1), np.int32), np.ones((2, 1, config.vocab), np.float32)
    logits[0, 0, 0] = np.nan
    prompts = [np.zeros(3, np.int32)]
    assert math.isnan(example().largest_error(weights, prompts, fed, logits, config))


def test_pages_are_handed_out_as_sequences_grow():
    page, free = 16, np.array([3, 0, 2, 1, 4, 6, 5], np.int32)
    config = example().Config(layers=1, heads=1, num_pages=len(free), page_size=page)
    state = example().init_state(config, None, np.array([-20, 0, -5]), max_pages=3)
    state = example().dataclasses.replace(state, free_pages=jnp.asarray(free))
    taken = []
    for _ in range(8):  # 5 tokens a step; the last page that is wanted does not exist
        lengths = state.lengths + 5
        table, used = jax.jit(functools.partial(example().allocate_pages, page_size=page))(
            state, lengths
        )
        expected = np.array(state.block_table)
        for row, (old, new) in enumerate(zip(state.lengths, lengths, strict=True)):
            pages = [-(-max(int(n), 0) // page) for n in (old, new)]
            for column in range(*pages):
                expected[row, column] = free[len(taken)] if len(taken) < free.size else -1
                taken.append(expected[row, column])
        np.testing.assert_array_equal(table, expected)
        state = example().DecodeState(None, table, lengths, state.free_pages, used)
    assert sorted(taken) == [-1, *range(7)]


def compile_for(sharding, function, num_pages):
    """The example's `function` compiled for a pool of `num_pages` pages a layer, and the cache."""
    batch = 8
    config = example().Config(layers=3, heads=16, num_pages=num_pages, implementation="cuda")

    def arguments():
        cache = example().init_cache(config)
        state = example().init_state(config, cache, jnp.zeros(batch, jnp.int32), max_pages=8)
        tokens = jnp.zeros((4, batch, 32) if function == "prefill" else (batch,), jnp.int32)
        return example().init_weights(config, jax.random.key(0)), state, tokens

    weights, state, tokens = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(arguments),
    )
    static = {"config": config} | ({"steps": 100} if function == "decode" else {})
    jitted = getattr(example(), function)
    return jitted.lower(weights, state, tokens, **static).compile(), state.cache


@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize("function", ["decode", "prefill"])
def test_cache_stays_in_place_on_an_h200(function, h200):
    temporary = []
    for num_pages in (64, 6400):
        compiled, cache = compile_for(h200, function, num_pages)
        memory, hlo = compiled.memory_analysis(), compiled.as_text()
        assert memory.alias_size_in_bytes >= cache.size * cache.dtype.itemsize
        temporary.append(memory.temp_size_in_bytes)
        # One call each. The schedule's call is outside the loop over the layers.
        assert sorted(re.findall(r'custom_call_target="(jax_flashmla_\w+)"', hlo)) == [
            "jax_flashmla_append_kv",
            "jax_flashmla_dense_decode",
            "jax_flashmla_tile_scheduler",
        ]
        assert operations_on(cache.size, hlo) <= {*PASSED_ON, "custom-call"}
    assert temporary[0] == temporary[1]

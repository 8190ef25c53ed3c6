"""Tests the parts of examples/models, on several devices and compiled for an H200."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import lowering
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from lowering import PASSED_ON, operations_on

from examples.models import generate
from examples.models import model as model_module
from examples.models.config import PRESETS, ModelConfig
from examples.models.decoding import Decoder, State, allocate
from examples.models.model import experts, forward, init_cache
from examples.models.parallel import Layout
from examples.models.sampling import greedy, sample
from examples.models.weights import Leaf, leaves, random_weights
from jax_flashmla import _op

TINY = {
    "model_type": "deepseek_v3",
    "vocab_size": 96,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "eos_token_id": None,
}
# A small model with head dims that the kernel has.
KERNEL_SIZED = TINY | {
    "vocab_size": 512,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 128,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
}


quick = pytest.mark.usefixtures("quick_compile")


# -------------------- Configurations


# The published sizes: https://arxiv.org/abs/2405.04434, 2412.19437, 2507.20534.
@pytest.mark.parametrize(
    ("name", "billions"),
    [("deepseek-v2-lite", 15.7), ("deepseek-v2", 236), ("deepseek-v3", 671), ("kimi-k2", 1026)],
)
def test_named_models(name, billions):
    config = ModelConfig.named(name)
    assert hash(config) == hash(ModelConfig.named(name))
    tree = jax.tree.leaves(leaves(config), is_leaf=lambda x: isinstance(x, Leaf))
    assert sum(math.prod(leaf.shape) for leaf in tree) / 1e9 == pytest.approx(billions, rel=2e-3)
    assert (config.entry_dim, config.kv_lora_rank) == (576, 512)  # the kernel's


def test_unknown_name():
    with pytest.raises(ValueError, match=rf"{next(iter(PRESETS))}.*'gpt'"):
        ModelConfig.named("gpt")


# -------------------- Experts


def expert_by_expert(w, config, x):
    """The output of a layer's experts in float64, token by token; x [t, m]."""
    w = {name: np.asarray(array, np.float64) for name, array in w.items()}
    out = np.zeros_like(x)

    def mlp(gate, up, x):
        gate, up = gate @ x, up @ x
        return gate / (1 + np.exp(-gate)) * up

    for t, token in enumerate(np.asarray(x, np.float64)):
        scores = 1 / (1 + np.exp(-w["router"] @ token))
        biased = (scores + w["router_bias"]).reshape(config.groups, -1)
        worth = np.sort(biased, axis=1)[:, -2:].sum(axis=1)
        biased[np.argsort(worth)[: -config.groups_per_token]] = -np.inf
        chosen = np.argsort(biased.ravel())[-config.experts_per_token :]
        shares = scores[chosen] / scores[chosen].sum() * config.routing_scale
        for i, share in zip(chosen, shares, strict=True):
            out[t] += share * (mlp(*w["experts_gate_up"][i], token) @ w["experts_down"][i])
        out[t] += w["shared_down"] @ mlp(*w["shared_gate_up"], token)
    return out


# 1 and 3 tokens copy their experts. 20 go through all experts at once, 75 in several batches, the
# last of which is smaller.
@quick
@pytest.mark.parametrize("tokens", [1, 3, 20, 75])
def test_experts(tokens, monkeypatch):
    monkeypatch.setattr(model_module, "DENSE_TOKENS", 32)
    config = ModelConfig.from_hf(TINY | {"n_routed_experts": 24, "n_group": 4, "topk_group": 2})
    few = []
    copying = model_module.few_tokens
    monkeypatch.setattr(model_module, "few_tokens", lambda *a: (few.append(a), copying(*a))[1])
    w = random_weights(config, jax.random.key(0), jnp.float32)["layers"][1]
    x = jax.random.normal(jax.random.key(1), (tokens, config.width))
    out = jax.jit(lambda x: experts(w, config, x[None]))(x)[0]
    assert bool(few) == (tokens <= 3)
    np.testing.assert_allclose(out, expert_by_expert(w, config, x), rtol=1e-4, atol=1e-5)


# -------------------- Sampling


def test_greedy_and_samples_at_low_temperature_take_the_most_likely():
    logits = jax.random.normal(jax.random.key(0), (50, 300))
    best = np.argmax(np.asarray(logits), axis=1)
    np.testing.assert_array_equal(greedy(logits), best)
    key = jax.random.key(1)
    for temperature, top_p in ((0.0, 1.0), (1.0, 0.0), (1e-4, 1.0)):
        np.testing.assert_array_equal(sample(logits, key, temperature, top_p), best)


@quick
def test_samples_follow_the_distribution():
    count = 20000
    likely = np.array([0.05, 0.4, 0.25, 0.2, 0.1])
    temperature, top_p = np.full(count, 2.0), np.full(count, 1.0)
    temperature[count // 2 :], top_p[count // 2 :] = 1.0, 0.7
    logits = jnp.broadcast_to(jnp.log(likely), (count, 5))
    tokens = np.asarray(jax.jit(sample)(logits, jax.random.key(0), temperature, top_p))
    for half, expected in (
        (tokens[: count // 2], np.sqrt(likely)),
        # The most likely ones that sum to at least 70%: 0.4, 0.25 and 0.2.
        (tokens[count // 2 :], np.where(likely >= 0.2, likely, 0)),
    ):
        found = np.bincount(half, minlength=5) / half.size
        # Five standard deviations of a measured frequency.
        limit = 5 * np.sqrt(0.25 / half.size) * (expected > 0)
        assert (np.abs(found - expected / expected.sum()) <= limit).all()


def test_top_p_takes_no_more_tokens_than_needed():
    """Four tokens are equally likely: 0.5 takes two of them. 1 takes all, despite rounding."""
    for top_p, expected in ((0.25, {0}), (0.5, {0, 1}), (0.6, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
        tokens = sample(jnp.zeros((200, 4)), jax.random.key(0), 1.0, top_p)
        assert set(np.asarray(tokens).tolist()) == expected


# -------------------- The loop


def tiny_config(**changes):
    return ModelConfig.from_hf(TINY | changes)


def tiny(seed=0, **changes):
    config = tiny_config(**changes)
    return config, random_weights(config, jax.random.key(seed), jnp.float32)


def answers(decoder, prompts, steps, page=16, **options):
    state = decoder.start(
        len(prompts), [len(p) + steps for p in prompts], page_block_size=page, **options
    )
    state = decoder.prefill(state, prompts)
    return np.asarray(decoder.decode(state, steps)[0])


PROMPTS = [[1, 2, 3], list(range(40)), [5] * 17, [90]]


def test_allocate():
    table, pages = allocate([33, 0, 16, 1], 16)
    assert table.tolist() == [[0, 1, 2], [-1] * 3, [3, -1, -1], [4, -1, -1]]
    assert pages == 5
    table, pages = allocate([33, 0, 16, 1], 16, groups=2)
    assert table.tolist() == [[0, 1, 2], [-1] * 3, [0, -1, -1], [1, -1, -1]]
    assert pages == 3


@quick
def test_the_loop_updates_the_cache_in_place(implementation):
    """On a GPU with the kernels. A second run gives the same tokens."""
    on_gpu = implementation == "cuda"
    config = ModelConfig.from_hf(KERNEL_SIZED if on_gpu else TINY)
    dtype = jnp.bfloat16 if on_gpu else jnp.float32
    params = random_weights(config, jax.random.key(0), dtype)
    decoder = Decoder(params, config, chunk=16, implementation=implementation)
    state = decoder.start(4, [60] * 4, page_block_size=16)
    address = state.cache.unsafe_buffer_pointer()
    state = decoder.prefill(state, PROMPTS)
    tokens, state = decoder.decode(state, 8)
    assert state.cache.unsafe_buffer_pointer() == address
    assert np.asarray(state.lengths).tolist() == [len(prompt) + 8 for prompt in PROMPTS]
    assert ((np.asarray(tokens) >= 0) & (np.asarray(tokens) < config.vocab)).all()
    np.testing.assert_array_equal(answers(decoder, PROMPTS, 8), tokens)


@quick
def test_prompts_that_are_refused():
    """A lookup past the end of the embedding would read its last row."""
    config, params = tiny()
    decoder = Decoder(params, config, chunk=16)
    state = decoder.start(2, [8, 8])
    for prompts, message in (
        ([[1], []], "prompt 1 must have at least one token"),
        ([[1], [2, 96]], r"prompt 1\[1\] must be from 0 to 95, got 96"),
        ([[1], [-1]], r"prompt 1\[0\] must be from 0 to 95, got -1"),
        ([[1.5], [1]], r"prompt 0\[0\] must be an int, got 1.5"),
        ([[1]], "1 prompts, but 2 sequences"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder.prefill(state, prompts)
    batcher = decoder.batcher(1, 8)
    batcher.submit([95, 0], 1)
    with pytest.raises(ValueError, match=r"prompt\[0\] must be from 0 to 95, got 96"):
        batcher.submit([96], 1)


@quick
def test_the_same_seed_gives_the_same_answer():
    config, params = tiny()
    decoder = Decoder(params, config, chunk=16, temperature=1.0, top_p=0.95)
    first, again, other = (answers(decoder, PROMPTS, 12, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


RANDOM = ["--random-weights", "tiny", "--layers", "1", "--prompt-tokens", "20"]
RANDOM += ["--batch", "8", "--max-tokens", "9", "--temperature", "1"]


@quick
def test_command_with_random_weights(monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "tiny", ModelConfig.from_hf(TINY))
    assert generate.main([*RANDOM, "--parallel", "dp"]) == 0
    shown = capsys.readouterr()
    assert len(shown.out.split()) == 9
    assert all(0 <= int(token) < 96 for token in shown.out.split())
    assert "8 sequences on 8 x cpu" in shown.err


@quick
def test_command_with_slots(monkeypatch):
    """An answer depends on its seed, not on how many sequences run at the same time."""
    monkeypatch.setitem(PRESETS, "tiny", ModelConfig.from_hf(TINY))

    def answers_of(*arguments):
        args = generate.parse_args([*RANDOM, *arguments])
        decoder, _, prompts = generate.load(args)
        shown = []
        answers, said = generate.run_in_slots(decoder, prompts, args, shown.append)
        assert [len(answer) for answer in answers] == [9] * 8
        assert shown[-1] == answers[0]
        assert f"{args.slots} at a time" in said
        return answers

    first, again = answers_of("--slots", "3"), answers_of("--slots", "2")
    assert first == again
    assert first != answers_of("--slots", "3", "--top-p", "0")


# -------------------- Continuous batching


@functools.cache
def solo_runs():
    """(prompts, some of which begin with the same tokens; their greedy answers)."""
    rng = np.random.default_rng(3)
    common = rng.integers(0, 96, 37).tolist()
    prompts = [[*common, *rng.integers(0, 96, n).tolist()] for n in (3, 11, 12)]
    prompts += [rng.integers(0, 96, n).tolist() for n in (1, 30, 45)]
    config, params = tiny()
    decoder, found = Decoder(params, config, chunk=16), []
    for prompt in prompts:
        state = decoder.prefill(decoder.start(1, [80], page_block_size=16), [prompt])
        found.append(np.asarray(decoder.decode(state, 24)[0])[0].tolist())
    assert len({token for answer in found for token in answer}) > 30
    return prompts, found


@quick
@pytest.mark.parametrize(
    ("kind", "sampling"), [(None, {}), ("tp", {"temperature": 5.0, "top_p": 0.0})]
)
def test_batched_requests_get_the_tokens_of_solo_runs(kind, sampling):
    """The pool is too small for all running requests. One joins every second step."""
    prompts, expected = solo_runs()
    layout = Layout.over(kind, jax.devices("cpu")[:2])
    config = ModelConfig.from_hf(TINY)
    params = random_weights(config, jax.random.key(0), jnp.float32, layout.place)
    decoder = Decoder(params, config, layout=layout, chunk=16, **sampling)
    batcher = decoder.batcher(3, 80, num_blocks=8, page_block_size=16)
    requests = []
    for prompt in prompts:
        requests.append(batcher.submit(prompt, 24))
        batcher.step()
        batcher.step()
    batcher.run()
    assert [request.generated for request in requests] == expected
    assert any(request.preemptions for request in requests)
    assert any(request.reused and not request.preemptions for request in requests)
    batcher.manager.check()
    assert batcher.manager.num_free == 8


# -------------------- Several devices


@functools.cache
def answers_of_one_device():
    config, params = tiny()
    return answers(Decoder(params, config, chunk=16), PROMPTS, 20)


@quick
@pytest.mark.parametrize("kind", ["dp", "tp"])
def test_several_devices_give_the_tokens_of_one(kind):
    layout = Layout.over(kind, jax.devices("cpu")[:2])
    config = ModelConfig.from_hf(TINY)
    params = random_weights(config, jax.random.key(0), jnp.float32, layout.place)
    heads = params["layers"][0]["key_up"]
    split = PartitionSpec("device") if kind == "tp" else PartitionSpec()
    assert heads.sharding.spec == split
    decoder = Decoder(params, config, layout=layout, chunk=16)
    np.testing.assert_array_equal(answers(decoder, PROMPTS, 20), answers_of_one_device())


@quick
def test_devices_draw_different_tokens():
    layout = Layout.over("dp", jax.devices("cpu")[:2])
    config = ModelConfig.from_hf(TINY)
    params = random_weights(config, jax.random.key(0), jnp.float32, layout.place)
    decoder = Decoder(params, config, layout=layout, chunk=16, temperature=5.0)
    first, second = answers(decoder, [[1, 2]] * 2, 12)
    assert (first != second).sum() > 6


def test_sizes_that_the_devices_do_not_divide_are_refused():
    config, params = tiny()
    devices = jax.devices("cpu")
    with pytest.raises(ValueError, match="8 devices: heads is 4"):
        Layout.over("tp", devices).check(config, 1)
    with pytest.raises(ValueError, match="8 devices: batch is 3"):
        Layout.over("dp", devices).check(config, 3)
    with pytest.raises(ValueError, match="2 devices: mlp_width is 63"):
        Layout.over("tp", devices[:2]).check(tiny_config(intermediate_size=63), 1)
    with pytest.raises(ValueError, match="2 devices: expert_width is 31"):
        Layout.over("tp", devices[:2]).check(tiny_config(moe_intermediate_size=31), 1)
    with pytest.raises(ValueError, match="'pp'"):
        Layout.over("pp")
    with pytest.raises(ValueError, match="one pool of pages"):
        Decoder(params, config, layout=Layout.over("dp", devices)).batcher(2, 8)


@pytest.mark.parametrize(
    "changes",
    [
        {"intermediate_size": 63, "first_k_dense_replace": 0},  # no dense layer
        {"moe_intermediate_size": 31, "first_k_dense_replace": 2},  # no layer with experts
    ],
)
def test_a_width_that_no_layer_has_need_not_be_divisible(changes):
    Layout.over("tp", jax.devices("cpu")[:2]).check(tiny_config(**changes), 1)


# -------------------- On an H200


@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize("n", [1, 128])
def test_weights_and_cache_are_not_copied_on_an_h200(n, h200):
    """Three layers of V2-Lite, for decode and for prefill."""
    config, batch = ModelConfig.named("deepseek-v2-lite", layers=3), 32
    dtype = jnp.bfloat16

    def struct(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=h200)

    params = jax.tree.map(
        lambda leaf: struct(leaf.shape, leaf.dtype(dtype)),
        leaves(config),
        is_leaf=lambda x: isinstance(x, Leaf),
    )
    cache = struct((3 * 512, 64, 1, 576), dtype)
    tokens, table, row = (struct(shape, jnp.int32) for shape in ((batch, n), (batch, 16), (batch,)))

    def step(params, cache, *args):
        return forward(params, config, cache, *args, implementation="cuda")

    compiled = jax.jit(step, donate_argnums=1).lower(params, cache, tokens, table, row, row)
    compiled = compiled.compile()
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    assert memory.alias_size_in_bytes >= cache.size * 2
    assert operations_on(cache.size, hlo) <= {*PASSED_ON, "custom-call"}
    for name in ("experts_gate_up", "experts_down"):
        assert operations_on(params["layers"][1][name].size, hlo) <= PASSED_ON
    assert hlo.count('custom_call_target="jax_flashmla_tile_scheduler"') == 1


@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize(("kind", "sums"), [("dp", 0), ("tp", 2 * 3)])
def test_the_loop_on_two_h200s(kind, sums):
    """A step of three layers has only the expected sums over devices, and both run the kernels."""
    layout = Layout(kind, lowering.h200_mesh((2,), ("device",)))
    config, batch = ModelConfig.named("deepseek-v2-lite", layers=3), 8
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype(jnp.bfloat16), sharding=layout.place(leaf)
        ),
        leaves(config),
        is_leaf=lambda x: isinstance(x, Leaf),
    )
    whole = layout.place(Leaf(()))
    by_sequence = NamedSharding(layout.mesh, layout.by_sequence)

    def struct(shape, dtype, sharding=by_sequence):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    key = jax.eval_shape(lambda: jax.random.key(0))
    state = State(
        struct((layout.groups * 3 * 64, 64, 1, 576), jnp.bfloat16),
        struct((batch, 16), jnp.int32),
        struct((batch,), jnp.int32),
        struct((batch,), jnp.int32),
        struct((batch,), bool),
        struct(key.shape, key.dtype, whole),
    )
    decoder = Decoder(params, config, layout=layout, implementation="cuda")
    hlo = decoder.program(4).lower(params, state).compile().as_text()
    assert hlo.count('custom_call_target="jax_flashmla_dense_decode"') == 3
    exchanges = re.findall(r" (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(", hlo)
    assert exchanges == ["all-reduce"] * sums


@pytest.mark.usefixtures("kernels")
def test_one_warning_for_dimensions_without_a_kernel():
    config, params = tiny()
    cache = init_cache(config, 4, 64)
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    row = jnp.ones(1, jnp.int32)
    _op._warn_once.cache_clear()

    def two_steps(params, cache):
        for n in (1, 16):
            tokens = jnp.ones((1, n), jnp.int32)
            _, cache = forward(params, config, cache, tokens, row[:, None], row, row)
        return cache

    with pytest.warns(RuntimeWarning, match="head_dim_v 512, not for 32 and 24") as said:
        lowering.text_for_cuda(two_steps, params, cache)
    assert len(said) == 1


# The error of the logits that comes from rounding to bfloat16, relative to their rms. One rounding
# has an error of at most 2^-8 of the value, uniformly distributed: 2^-8 / sqrt(3) rms. The output
# of a block has at most 8 independent roundings: the normed input, the low-rank query, the query,
# the query in the latent space, the cache entry, the weights of the softmax, the attention's
# result, the values. (An MLP has 2.) The residual stream is a sum of blocks of equal size, so its
# relative error is that of one block. The head adds one rounding. If the errors were normally
# distributed, one logit in 1e8 would have an error above six standard deviations.
SIGMA = 2**-8 / math.sqrt(3) * math.sqrt(8 + 1)
BOUND = 6 * SIGMA


def rounded_product(equation, x, w):
    """`product` where XLA has no bfloat16 products: rounds its operands, multiplies in float32."""
    operands = (a.astype(jnp.float32) for a in (x.astype(w.dtype), w))
    return jnp.einsum(equation, *operands, precision="highest")


@quick
def test_bfloat16(implementation, monkeypatch):
    """Prefill of several lengths over page boundaries, then decode, against float32."""
    # Each token takes all experts, because a rounding could change the choice.
    config = dataclasses.replace(
        ModelConfig.from_hf(KERNEL_SIZED), experts_per_token=8, groups=1, groups_per_token=1
    )
    params = random_weights(config, jax.random.key(0))
    if jax.default_backend() == "cpu":
        monkeypatch.setattr(model_module, "product", rounded_product)
    lengths = np.array([70, 64, 1, 129], np.int32)
    table, pages = allocate(lengths + 8, 64)
    tokens = jax.random.randint(jax.random.key(1), (4, 144), 0, config.vocab)

    def run(params, dtype, implementation):
        step = jax.jit(
            lambda *args: forward(params, config, *args, all_logits=True,
                                  implementation=implementation),
            donate_argnums=0,
        )  # fmt: skip
        cache, found = init_cache(config, pages, 64, dtype), []
        for start, n in ((0, 136), *((136 + i, 1) for i in range(8))):
            ends, new = (lengths, lengths) if n > 1 else (lengths + start - 135, lengths * 0 + 1)
            args = (tokens[:, start : start + n], table, ends, new)
            logits, cache = step(cache, *(jnp.asarray(x, jnp.int32) for x in args))
            found += [logits[i, n - count :] for i, count in enumerate(new)]
        return np.concatenate(found)

    got = run(params, jnp.bfloat16, implementation)
    with jax.default_matmul_precision("highest"):
        want = run(jax.tree.map(lambda w: w.astype(jnp.float32), params), jnp.float32, "xla")
    assert want.shape == (lengths.sum() + 32, config.vocab)
    rms = np.sqrt(np.mean(want**2))
    error = np.abs(got - want) / rms
    assert np.sqrt(np.mean(error**2)) <= 2 * SIGMA
    assert error.max() <= BOUND
    ordered = np.sort(want, axis=1) / rms
    clear = ordered[:, -1] - ordered[:, -2] > 2 * BOUND
    assert clear.mean() > 0.5
    np.testing.assert_array_equal(np.argmax(got, axis=1)[clear], np.argmax(want, axis=1)[clear])

"""The snippets of docs/models.md: each model decodes as plain attention does."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering import PASSED_ON, operations_on

from examples.models.batching import ContinuousBatcher, make_step

# Relative L2 error of any token's logits. In float32 what remains is the order of sums; bfloat16
# rounds cache entries, queries and results to 8 bits, and the layers' errors add up.
TOLERANCE = {"float32": 2e-5, "bfloat16": 0.04}


def snippets():
    text = Path(__file__).parents[1].joinpath("docs/models.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@functools.cache
def docs():
    """The names that the snippets define, without the snippets that run a model."""
    names = {}
    exec("\n".join(code for code in snippets() if "empty_cache()," not in code), names)
    return names


@pytest.mark.usefixtures("quick_compile")
def test_snippets_run():
    assert sum("empty_cache()," in code for code in snippets()) == 5
    names = {}
    exec("\n".join(snippets()), names)
    for name in ("params", "flax_state", "eqx_model", "streamed"):
        assert names[name]
    assert np.isfinite(names["logits"]).all()


def shape(name):
    return docs()[name]


def plain_params():
    return docs()["init_params"](3)


def flax_params():
    """The weights of the Flax model, named as those of the plain one."""
    model = docs()["FlaxModel"](docs()["nnx"].Rngs(1))
    paths = {
        "norm": "norm.scale",
        "query": "query.kernel",
        "kv_down": "kv_down.kernel",
        "kv_norm": "kv_norm.scale",
        "key_up": "key_up",
        "value_up": "value_up",
        "out": "out.kernel",
    }

    def at(layer, path):
        return functools.reduce(getattr, path.split("."), layer)[...]

    return docs()["nnx"].split(model)[1], {
        "layers": {k: jnp.stack([at(x, path) for x in model.layers]) for k, path in paths.items()},
        "embedding": model.embedding.embedding[...],
        "final_norm": model.final_norm.scale[...],
        "head": model.head.kernel[...],
    }


def eqx_params():
    model = docs()["EqxModel"](jax.random.key(4))
    names = ("norm", "query", "kv_down", "kv_norm", "key_up", "value_up", "out")
    return model, {
        "layers": {name: getattr(model.layers, name) for name in names},
        "embedding": model.embedding.weight,
        "final_norm": model.final_norm,
        "head": model.head,
    }


def model(kind):
    """(step(cache, tokens, table, lengths, num_new) -> (logits, cache), the weights)."""
    if kind == "plain":
        params = plain_params()
        return functools.partial(docs()["plain_step"], params, None), params
    own, params = {"flax": flax_params, "equinox": eqx_params}[kind]()
    return functools.partial(
        docs()[{"flax": "flax_step", "equinox": "eqx_step"}[kind]], own
    ), params


def plain_logits(params, tokens):
    """Logits [T, vocab] of one sequence in float64: keys and values of every head, no pages."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    nope, latent, rope = shape("nope"), shape("latent"), shape("rope")
    positions = np.arange(len(tokens))
    angle = positions[:, None, None] * 10000.0 ** (-np.arange(0, rope, 2) / rope)
    turn = np.exp(1j * angle)

    def norm(x, gain):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * gain

    def rotated(x):  # [T, heads, rope]
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
        return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)

    x = params["embedding"][np.asarray(tokens)]
    for i in range(shape("layers")):
        w = {name: stack[i] for name, stack in params["layers"].items()}
        y = norm(x, w["norm"])
        query, down = np.einsum("tm,mhe->the", y, w["query"]), y @ w["kv_down"]
        kv = norm(down[:, :latent], w["kv_norm"])
        key = np.einsum("tc,hec->the", kv, w["key_up"])
        k_rope = rotated(down[:, None, latent:])[:, 0]
        scores = np.einsum("qhe,khe->hqk", query[..., :nope], key)
        scores += np.einsum("qhe,ke->hqk", rotated(query[..., nope:]), k_rope)
        scores = np.where(positions[:, None] >= positions, scores * 192**-0.5, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        values = np.einsum("tc,hcv->thv", kv, w["value_up"])
        x = x + np.einsum("hqk,khv,hvm->qm", weights, values, w["out"])
    return norm(x, params["final_norm"]) @ params["head"]


def test_absorbed_factors():
    """Keys and values as kv_b_proj, a torch.nn.Linear, makes them from the latent."""
    heads, nope, value, latent = map(shape, ("heads", "nope", "value", "latent"))
    rng = np.random.default_rng(2)
    kv_b_proj = rng.standard_normal((heads * (nope + value), latent), np.float32)
    x = rng.standard_normal((5, latent), np.float32)
    key_up, value_up = docs()["absorb"](kv_b_proj)
    actual = np.concatenate(
        [np.einsum("tc,hec->the", x, key_up), np.einsum("tc,hcv->thv", x, value_up)], axis=-1
    )
    np.testing.assert_allclose(actual.reshape(5, -1), x @ kv_b_proj.T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["plain", "flax", "equinox"])
def test_decode_against_plain_attention(kind, implementation):
    """Ragged prompts in chunks, then steps of one token.

    The first two sequences cross the end of a page, the third slot is idle, and the last sequence
    has no second page: it gets NaN from its 65th token on. The others are not affected.
    """
    dtype = {"xla": "float32", "cuda": "bfloat16"}[implementation]
    step, params = model(kind)
    rng = np.random.default_rng(0)
    chunk, prompts = 32, [61, 66, 0, 1, 62]
    # Page 23 is the one before the first of the second layer.
    table = np.array([[7, 2], [5, 23], [-1, -1], [0, -1], [9, -1]], np.int32)
    tokens = [rng.integers(0, shape("vocab"), n + 5 if n else 0) for n in prompts]
    expected = [plain_logits(params, row) if len(row) else None for row in tokens]
    cache = jnp.full_like(docs()["empty_cache"](jnp.dtype(dtype)), jnp.nan)
    done = np.zeros(len(tokens), np.int32)

    def one_step(cache, width, ends):
        num_new = np.minimum(ends - done, width).astype(np.int32)
        new = np.zeros((len(tokens), width), np.int32)
        for row, begin, n, known in zip(new, done, num_new, tokens, strict=True):
            row[width - n :] = known[begin : begin + n]
        lengths = np.where(num_new > 0, done + num_new, 0).astype(np.int32)
        logits, cache = step(cache, new, table, lengths, num_new)
        done[:] += num_new
        for row, n in enumerate(num_new):
            if row == 4 and done[row] > 64:
                assert np.isnan(logits[row]).all()
            elif n:
                want = expected[row][done[row] - 1]
                error = np.linalg.norm(logits[row] - want) / np.linalg.norm(want)
                assert error < TOLERANCE[dtype], (row, done[row])
        return cache

    with jax.default_matmul_precision("highest"):  # no TF32
        while (done < prompts).any():
            cache = one_step(cache, chunk, np.array(prompts))
        while (done < [len(row) for row in tokens]).any():
            cache = one_step(cache, 1, np.array([len(row) for row in tokens]))


@pytest.mark.usefixtures("quick_compile")
def test_batched_requests_equal_their_solo_runs():
    """In a pool that is too small for all of them."""
    params = plain_params()
    step = make_step(docs()["forward"], params, None)
    rng = np.random.default_rng(1)
    common = rng.integers(0, shape("vocab"), 70)
    prompts = [[*common[:n], *rng.integers(0, shape("vocab"), m)] for n, m in ((70, 55), (70, 54))]
    prompts += [rng.integers(0, shape("vocab"), n) for n in (61, 3)]
    batcher = ContinuousBatcher(
        step,
        docs()["empty_cache"](jnp.float32),
        num_blocks=4,
        page_block_size=64,
        max_batch=3,
        max_blocks=3,
        chunk=32,
    )
    made = [batcher.submit(prompts[0], 8)]
    for _ in range(3):
        batcher.step()
    made += [batcher.submit(prompt, 8) for prompt in prompts[1:]]
    batcher.run()
    assert any(request.reused for request in made)
    assert any(request.preemptions for request in made)
    for request in made:
        logits = plain_logits(params, request.tokens[:-1])[request.prompt_length - 1 :]
        assert request.generated == list(np.argmax(logits, axis=-1))


@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize("kind", ["plain", "flax", "equinox"])
def test_cache_stays_in_place_on_an_h200(kind, h200):
    own = {"plain": plain_params, "flax": flax_params, "equinox": eqx_params}[kind]()
    first = (own, None) if kind == "plain" else (own[0],)
    cache, b = docs()["empty_cache"](), 4
    inputs = (jnp.zeros((b, 1), jnp.int32), jnp.zeros((b, 2), jnp.int32), *[jnp.ones(b, int)] * 2)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=h200), (*first, cache, *inputs)
    )
    name = {"plain": "plain_step", "flax": "flax_step", "equinox": "eqx_step"}[kind]
    compiled = docs()[name].lower(*like).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= cache.nbytes
    assert operations_on(cache.size, compiled.as_text()) <= {*PASSED_ON, "custom-call"}

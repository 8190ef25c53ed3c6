"""Generates tokens with a small DeepSeek-style decoder whose cache is updated in place.

    python examples/decode_loop.py [--layers L] [--batch B] [--heads H] [--steps S] ...

The model is a stack of multi-head latent attention (MLA) layers with random weights. It shows:

* One buffer holds the pages of all layers. Layer l owns num_pages of them, from l * num_pages on.
  So one block table serves all layers: each adds its l * num_pages.
* The cache is in the carry of both loops, over the steps and over the layers, and it is donated to
  the jitted function. So each append writes into the buffer that came in. Nothing copies the cache.
* Pages are handed out inside the loop, when a sequence reaches its next page (`allocate_pages`).
* The schedule is made once a step and serves all layers (`get_mla_metadata`).
* The same `forward` reads the prompts, several tokens a call, and decodes, one token a call.

At the end the script computes the logits of every generated token again, in float32 with plain
attention: no pages, no absorption, keys and values expanded for every head. It exits with status 1
if they disagree or if the cache was not updated in place.

Shape letters: b sequences, n new tokens of each, m model width, h heads, c latent width
(kv_lora_rank), e query/key width of a head, v value width of a head, T tokens of a whole sequence.
"""

import argparse
import dataclasses
import functools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashmla import (
    append_kv_cache,
    flash_mla_with_kvcache,
    get_mla_metadata,
    get_slot_mapping,
)

# The relative L2 error allowed for the logits of each token. Rounding to bfloat16 stays below it;
# one token lost from the cache gives an error of 0.2 (default run on a CPU).
TOLERANCE = 0.04


@dataclasses.dataclass(frozen=True)
class Config:
    """The static options of a run. Hashable, as a static argument of jitted functions must be."""

    layers: int
    heads: int
    num_pages: int  # pages of each layer
    width: int = 256  # m, of the residual stream
    mlp_width: int = 512
    vocab: int = 512
    kv_lora_rank: int = 512  # c: the latent part of a cache entry, head_dim_v of the op
    rope_dim: int = 64  # the rotary part of a cache entry; 512 + 64 = 576 = d_k
    nope_dim: int = 128  # query/key width of a head without the rotary part
    value_dim: int = 128
    page_size: int = 64
    weight_dtype: str = "bfloat16"  # also of matmul operands; matmuls sum in float32
    implementation: str = "auto"

    @property
    def softmax_scale(self):
        # The scale depends on the head width before absorption. The op's default is for the 576
        # columns of the cache, so always pass your own. A model with YaRN multiplies by mscale**2.
        return (self.nope_dim + self.rope_dim) ** -0.5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What a step reads and changes. Donate all of it."""

    cache: jax.Array  # [layers * num_pages, page_size, 1, 576] bf16: every layer's pages
    block_table: jax.Array  # [b, max_pages] i32: the pages of each sequence, -1 for none yet
    lengths: jax.Array  # [b] i32: tokens in the cache; negative while padding is left
    free_pages: jax.Array  # [num_pages] i32: the order in which pages are handed out
    num_used: jax.Array  # [] i32: how many of them are in use


# -------------------- The model


def init_weights(config, key):
    """Random weights. Those of the layers are stacked on a leading axis, for `lax.scan`."""
    m, h, c = config.width, config.heads, config.kv_lora_rank
    e, v, mlp = config.nope_dim + config.rope_dim, config.value_dim, config.mlp_width
    keys = iter(jax.random.split(key, 16))

    def normal(*shape, fan_in):
        return (jax.random.normal(next(keys), shape) * fan_in**-0.5).astype(config.weight_dtype)

    layers = config.layers
    stack = {
        "attention_norm": jnp.ones((layers, m), config.weight_dtype),
        # Twice the usual size, so that the softmax is far from uniform and single tokens matter.
        "query": 2 * normal(layers, m, h, e, fan_in=m),
        "kv_down": normal(layers, m, c + config.rope_dim, fan_in=m),
        "kv_norm": jnp.ones((layers, c), config.weight_dtype),
        "key_up": normal(layers, h, config.nope_dim, c, fan_in=c),
        "value_up": normal(layers, h, c, v, fan_in=c),
        "out": normal(layers, h, v, m, fan_in=h * v),
        "mlp_norm": jnp.ones((layers, m), config.weight_dtype),
        "gate": normal(layers, m, mlp, fan_in=m),
        "up": normal(layers, m, mlp, fan_in=m),
        "down": normal(layers, mlp, m, fan_in=mlp),
    }
    return {
        "layers": stack,
        "embedding": normal(config.vocab, m, fan_in=1),
        "final_norm": jnp.ones((m,), config.weight_dtype),
        "unembedding": normal(m, config.vocab, fan_in=m),
    }


def matmul(equation, x, w):
    """The product of x, rounded to w's dtype, and w, in float32."""
    return jnp.einsum(equation, x.astype(w.dtype), w, preferred_element_type=jnp.float32)


def rms_norm(x, gain, eps=1e-6):
    mean_square = jnp.mean(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + eps) * gain.astype(jnp.float32)


def rope(x, positions):
    """Rotates pairs of adjacent columns. x [..., n, heads, rope_dim], positions [..., n]."""
    pairs = x.shape[-1] // 2
    frequency = 10000.0 ** (-jnp.arange(pairs, dtype=jnp.float32) / pairs)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    even, odd = x[..., 0::2], x[..., 1::2]
    rotated = (
        even * jnp.cos(angle) - odd * jnp.sin(angle),
        even * jnp.sin(angle) + odd * jnp.cos(angle),
    )
    return jnp.stack(rotated, axis=-1).reshape(x.shape)


def mlp(w, x):
    gate, up = (matmul("...m,mf->...f", x, w[name]) for name in ("gate", "up"))
    return matmul("...f,fm->...m", jax.nn.silu(gate) * up, w["down"])


def mla(w, x, cache, block_table, positions, lengths, schedule, config):
    """Attention of one layer: x [b, n, m] -> ([b, n, m], the cache with the new tokens).

    block_table has this layer's pages, positions [b, n] are those of the new tokens, lengths [b]
    include the new tokens, schedule is the result of get_mla_metadata.
    """
    c = config.kv_lora_rank

    # Absorption: a key is key_up @ latent, and q . (key_up @ latent) is (q @ key_up) . latent.
    # With queries in the latent space, all heads share one key (the cache entry) and one value (its
    # first c columns).
    query = matmul("bnm,mhe->bnhe", x, w["query"])
    q_nope, q_rope = query[..., : config.nope_dim], query[..., config.nope_dim :]
    q_latent = matmul("bnhe,hec->bnhc", q_nope, w["key_up"])
    q = jnp.concatenate([q_latent, rope(q_rope, positions)], axis=-1).astype(cache.dtype)

    # The cache entries of the new tokens, [b, n, 1, 576]: latent and rotary key.
    down = matmul("bnm,mk->bnk", x, w["kv_down"])
    latent, k_rope = rms_norm(down[..., :c], w["kv_norm"]), rope(down[..., None, c:], positions)
    entries = jnp.concatenate([latent[:, :, None], k_rope], axis=-1).astype(cache.dtype)

    # Append first, because a token attends to itself too. Padding has negative positions and so
    # slot -1, where nothing is written.
    slots = get_slot_mapping(block_table, positions, config.page_size)
    cache = append_kv_cache(
        cache,
        entries.reshape(-1, 1, entries.shape[-1]),
        slots.reshape(-1),
        implementation=config.implementation,
    )
    attended, _ = flash_mla_with_kvcache(
        q,
        cache,
        block_table,
        lengths,
        c,
        *schedule,
        softmax_scale=config.softmax_scale,
        causal=True,
        implementation=config.implementation,
    )

    # Out of the latent space, then the usual output projection.
    values = matmul("bnhc,hcv->bnhv", attended, w["value_up"])
    return matmul("bnhv,hvm->bnm", values, w["out"]), cache


# -------------------- The loop


def init_cache(config):
    """The pages of all layers in one buffer. Its contents do not matter until they are written."""
    entry = config.kv_lora_rank + config.rope_dim
    shape = (config.layers * config.num_pages, config.page_size, 1, entry)
    return jnp.zeros(shape, jnp.bfloat16)


def init_state(config, cache, lengths, max_pages, seed=0):
    """A state without any pages in use; they will be handed out in random order."""
    order = jax.random.permutation(jax.random.key(seed), config.num_pages)
    return DecodeState(
        cache=cache,
        block_table=jnp.full((len(lengths), max_pages), -1, jnp.int32),
        lengths=jnp.asarray(lengths, jnp.int32),
        free_pages=order.astype(jnp.int32),
        num_used=jnp.zeros((), jnp.int32),
    )


def allocate_pages(state, lengths, page_size):
    """The block table and the number of used pages, for sequences that grow to `lengths`.

    When no page is left, the table gets -1: tokens there are not written, and attention makes that
    sequence's output NaN. Other sequences are not affected.
    """
    have, need = (-(-jnp.maximum(n, 0) // page_size) for n in (state.lengths, lengths))
    grown = need - have
    before = jnp.cumsum(grown) - grown  # pages that go to the sequences before this one
    column = jnp.arange(state.block_table.shape[1])
    turn = state.num_used + before[:, None] + column - have[:, None]
    is_new = (column >= have[:, None]) & (column < need[:, None])
    page = state.free_pages.at[jnp.where(is_new, turn, 0)].get(mode="fill", fill_value=-1)
    return jnp.where(is_new, page, state.block_table), state.num_used + jnp.sum(grown)


def forward(weights, state, tokens, config):
    """Appends tokens [b, n]. Returns the logits [b, vocab] after the last, and the new state."""
    n = tokens.shape[1]
    lengths = state.lengths + n
    positions = lengths[:, None] - n + jnp.arange(n)
    block_table, num_used = allocate_pages(state, lengths, config.page_size)

    # Made once a step for all layers, because it depends only on the lengths. The second argument
    # is the number of query rows of each KV head, n * h.
    schedule = get_mla_metadata(lengths, n * config.heads, 1, implementation=config.implementation)

    def layer(carry, xs):
        x, cache = carry
        w, index = xs
        # This layer's pages. Keep -1: added to index * num_pages it is a page of another layer.
        table = jnp.where(block_table < 0, -1, block_table + index * config.num_pages)
        attended, cache = mla(
            w, rms_norm(x, w["attention_norm"]), cache, table, positions, lengths, schedule, config
        )
        x = x + attended
        return (x + mlp(w, rms_norm(x, w["mlp_norm"])), cache), None

    x = weights["embedding"][tokens].astype(jnp.float32)
    layers = (weights["layers"], jnp.arange(config.layers, dtype=jnp.int32))
    (x, cache), _ = jax.lax.scan(layer, (x, state.cache), layers)

    logits = matmul("bm,mk->bk", rms_norm(x[:, -1], weights["final_norm"]), weights["unembedding"])
    return logits, DecodeState(cache, block_table, lengths, state.free_pages, num_used)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def prefill(weights, state, prompts, *, config):
    """Reads prompts [chunks, b, n]. Returns the logits [b, vocab] after them, and the new state.

    The prompts are padded on the left to one length, and `state.lengths` starts at minus the
    padding, so that all sequences end in the same step. Padding has negative positions, so it is
    not written. The causal mask is aligned to the end of a sequence, so padding does not shift it.
    """

    def chunk(state, tokens):
        logits, state = forward(weights, state, tokens, config)
        return state, logits

    state, logits = jax.lax.scan(chunk, state, prompts)
    return logits[-1], state


@functools.partial(jax.jit, static_argnames=("config", "steps"), donate_argnames="state")
def decode(weights, state, first, *, config, steps):
    """Decodes greedily, starting with the tokens `first` [b].

    Returns (logits [steps, b, vocab], the token before each of them [steps, b]), and the new state.
    """

    def step(carry, _):
        state, tokens = carry
        logits, state = forward(weights, state, tokens[:, None], config)
        return (state, jnp.argmax(logits, axis=-1).astype(tokens.dtype)), (logits, tokens)

    (state, _), outputs = jax.lax.scan(step, (state, first), length=steps)
    return outputs, state


# -------------------- The check: the same weights, in float32, without pages, without absorption


def plain_logits(weights, tokens, config):
    """Logits [T, vocab] of one whole sequence, tokens [T]."""
    weights = jax.tree.map(lambda w: w.astype(jnp.float32), weights)
    positions = jnp.arange(tokens.shape[0])
    c, causal = config.kv_lora_rank, positions[:, None] >= positions

    def layer(x, w):
        y = rms_norm(x, w["attention_norm"])
        query = matmul("tm,mhe->the", y, w["query"])
        down = matmul("tm,mk->tk", y, w["kv_down"])
        latent = rms_norm(down[:, :c], w["kv_norm"])
        key = matmul("tc,hec->the", latent, w["key_up"])
        value = matmul("tc,hcv->thv", latent, w["value_up"])
        scores = jnp.einsum("qhe,khe->hqk", query[..., : config.nope_dim], key)
        q_rope = rope(query[..., config.nope_dim :], positions)
        scores += jnp.einsum("qhe,ke->hqk", q_rope, rope(down[:, None, c:], positions)[:, 0])
        scores = jnp.where(causal, scores * config.softmax_scale, -jnp.inf)
        attended = jnp.einsum("hqk,khv->qhv", jax.nn.softmax(scores, axis=-1), value)
        x = x + matmul("thv,hvm->tm", attended, w["out"])
        return x + mlp(w, rms_norm(x, w["mlp_norm"])), None

    x, _ = jax.lax.scan(layer, weights["embedding"][tokens], weights["layers"])
    return matmul("tm,mk->tk", rms_norm(x, weights["final_norm"]), weights["unembedding"])


def largest_error(weights, prompts, fed, logits, config):
    """The largest relative L2 error of a token's logits; NaN if one of them is NaN.

    prompts has b arrays; logits [steps, b, vocab] and fed [steps, b] are from `decode`.
    """
    steps = fed.shape[0]
    sequences = np.zeros((len(prompts), max(map(len, prompts)) + steps), np.int32)
    for sequence, prompt, generated in zip(sequences, prompts, fed.T, strict=True):
        sequence[: len(prompt) + steps] = np.concatenate([prompt, generated])
    starts = np.array([len(prompt) for prompt in prompts], np.int32)

    @jax.jit
    def errors(weights, sequences, starts, logits):
        def one(args):
            tokens, start, got = args
            want = jax.lax.dynamic_slice_in_dim(plain_logits(weights, tokens, config), start, steps)
            return jnp.linalg.norm(got - want, axis=-1) / jnp.linalg.norm(want, axis=-1)

        return jax.lax.map(one, (sequences, starts, logits.swapaxes(0, 1)))

    with jax.default_matmul_precision("highest"):  # no TF32
        return float(jnp.max(errors(weights, sequences, starts, logits)))


# -------------------- The script


def parse_args(argv):
    device = jax.devices()[0]
    hopper = device.platform == "gpu" and str(device.compute_capability) == "9.0"
    parser = argparse.ArgumentParser(description="Decodes from a paged MLA cache.")
    option = functools.partial(parser.add_argument, type=int)
    option("--layers", default=8 if hopper else 3)
    option("--batch", default=64 if hopper else 4)
    option("--heads", default=16 if hopper else 8)
    option("--steps", default=256 if hopper else 128)
    option(
        "--prompt",
        default=2048 if hopper else 96,
        help="tokens of the longest prompt; the others are shorter",
    )
    option("--width", default=2048 if hopper else 256, help="width of the residual stream")
    option("--page-size", default=64, help="tokens a page")
    parser.add_argument("--implementation", choices=("auto", "cuda", "xla"), default="auto")
    return parser.parse_args(argv)


def make_prompts(batch, longest, vocab):
    """Random prompts of 1 to `longest` tokens. The first has `longest`."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, longest + 1, batch)
    lengths[0] = longest
    return [rng.integers(0, vocab, length, dtype=np.int32) for length in lengths]


def pad_left(prompts, chunk):
    """The padded prompts as [chunks, b, chunk], and minus the padding of each, [b]."""
    lengths = np.array([len(prompt) for prompt in prompts])
    width = -(-lengths.max() // chunk) * chunk
    padded = np.stack([np.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
    return padded.reshape(len(prompts), -1, chunk).swapaxes(0, 1), lengths - width


def say(what, value):
    print(f"{what:<16}{value}", flush=True)


def main(argv=None):
    args = parse_args(argv)
    device = jax.devices()[0]
    prompts = make_prompts(args.batch, args.prompt, Config.vocab)
    pages = [-(-(len(prompt) + args.steps) // args.page_size) for prompt in prompts]
    config = Config(
        layers=args.layers,
        heads=args.heads,
        num_pages=sum(pages),  # exactly as many as are needed
        width=args.width,
        page_size=args.page_size,
        # XLA's CPU backend lacks some of the bfloat16 matmuls.
        weight_dtype="float32" if device.platform == "cpu" else "bfloat16",
        implementation=args.implementation,
    )
    say("device", device.device_kind)
    say("model", f"{args.layers} layers, {args.heads} heads, width {args.width}")
    shortest = min(len(prompt) for prompt in prompts)
    say(
        "sequences",
        f"{args.batch}: prompts of {shortest} to {args.prompt} tokens, then {args.steps} steps",
    )

    weights = init_weights(config, jax.random.key(1))
    chunks, starts = pad_left(prompts, chunk=32)
    cache = init_cache(config)
    address = cache.unsafe_buffer_pointer()

    state = init_state(config, cache, starts, max(pages))
    first = jnp.zeros((args.batch,), jnp.int32)
    began = time.perf_counter()
    run = decode.lower(weights, state, first, config=config, steps=args.steps).compile()
    kernel = "jax_flashmla_dense_decode" in run.as_text()
    say("compiled", f"the decode loop in {time.perf_counter() - began:.1f} s")
    say("implementation", "cuda: the Hopper kernels" if kernel else "xla: the references")

    # Twice in the same buffer. The first run loads kernels and libraries; the second is timed.
    for _ in range(2):
        state = init_state(config, cache, starts, max(pages))
        logits, state = prefill(weights, state, chunks, config=config)
        first = jax.block_until_ready(jnp.argmax(logits, axis=-1).astype(jnp.int32))
        began = time.perf_counter()
        (logits, fed), state = jax.block_until_ready(run(weights, state, first))
        seconds = time.perf_counter() - began
        cache = state.cache
    say(
        "decoded",
        f"{args.batch * args.steps / seconds:.0f} tokens/s, "
        f"{seconds / args.steps * 1e3:.2f} ms a step",
    )

    memory = run.memory_analysis()
    stayed = cache.unsafe_buffer_pointer() == address and memory.alias_size_in_bytes >= cache.nbytes
    say(
        "cache",
        f"{cache.nbytes / 1e6:.1f} MB, {int(state.num_used)} of {config.num_pages} pages "
        "a layer in use",
    )
    say(
        "cache in place",
        f"{'yes' if stayed else 'NO'}: {memory.alias_size_in_bytes / 1e6:.1f} MB "
        f"aliased, {memory.temp_size_in_bytes / 1e6:.1f} MB temporary",
    )

    error = largest_error(weights, prompts, np.asarray(fed), logits, config)
    say("largest error", f"{error:.1e} against plain float32 attention, {TOLERANCE:.0e} allowed")
    passed = stayed and error <= TOLERANCE  # a NaN fails
    print("ok" if passed else "FAILED", flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

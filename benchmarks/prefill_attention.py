"""Attention of a chunk of a prompt: over latents in their pages, or over expanded keys and values.

The first is the op; the second `jax.nn.dot_product_attention`, an ordinary multi-head attention.
Both begin with the queries of each head, q_nope [1, n, h, nope] and q_rope [1, n, h, rope], and end
with its values [1, n, h, v]; the chunk's own latents are in the pages already. So absorption counts
for the one, gathering and expansion for the other. Letters are those of examples/deepseek/model.py;
s are the tokens of the sequence, of which the chunk is the last n.
"""

import dataclasses

import jax
import jax.numpy as jnp

from examples.deepseek.model import product
from jax_flashmla import flash_mla_with_kvcache, get_mla_metadata, merge_attention_states

WEIGHTS = ("key_up", "value_up")  # of a layer; kv_b_proj, in two


@dataclasses.dataclass(frozen=True)
class AttentionForm:
    """A way to run the attention of a chunk."""

    name: str
    implementation: str  # of the op, or of the library call
    expanded: bool = True
    split: bool = False  # two calls, without a mask over what stands before the chunk


def lower_layers(form, config, layers, w, q_nope, q_rope, cache, table):
    """The attention of all layers in a loop, lowered.

    Each has its own pages of the cache, as in the model; they share weights and queries. Each waits
    for the one before it, whose result, times the program's last argument, is added to its queries:
    that argument is 0.

    Args:
      form: an AttentionForm.
      config: a ModelConfig.
      layers: how many.
      w: the WEIGHTS of a layer.
      q_nope, q_rope: the queries, in the cache's dtype.
      cache: [layers * pages, page, 1, c + rope].
      table: i32 [1, s / page], within a layer's pages.

    Raises:
      NotImplementedError, RuntimeError, TypeError, ValueError: the call refuses.
    """
    length = table.shape[1] * cache.shape[1]

    def run(w, q_nope, q_rope, cache, table, zero):
        n, heads = q_nope.shape[1:3]
        lengths = jnp.full(1, length, jnp.int32)
        schedule = None
        if not form.expanded:
            schedule = get_mla_metadata(lengths, n * heads, 1, implementation=form.implementation)

        def layer(i, out):
            rope = q_rope + zero * out[..., : config.rope_dim]
            pages = table + i * (cache.shape[0] // layers)
            if form.expanded:
                return expanded(form, config, w, q_nope, rope, cache, pages)
            return absorbed(form, config, w, q_nope, rope, cache, pages, lengths, schedule)

        out = jnp.zeros((1, n, heads, config.value_dim), cache.dtype)
        return jax.lax.fori_loop(0, layers, layer, out)

    zero = jax.ShapeDtypeStruct((), cache.dtype)
    return jax.jit(run).lower(w, q_nope, q_rope, cache, table, zero)


def absorbed(form, config, w, q_nope, q_rope, cache, table, lengths, schedule):
    """As the model does it: queries into the latent space, results out of it."""
    q_latent = product("bnhe,hec->bnhc", q_nope, w["key_up"]).astype(cache.dtype)
    out, _ = flash_mla_with_kvcache(
        jnp.concatenate([q_latent, q_rope], axis=-1), cache, table, lengths, config.kv_lora_rank,
        *schedule, softmax_scale=config.softmax_scale, causal=True,
        implementation=form.implementation,
    )  # fmt: skip
    return product("bnhc,hvc->bnhv", out, w["value_up"]).astype(cache.dtype)


def expanded(form, config, w, q_nope, q_rope, cache, table):
    """Ordinary multi-head attention, keys of nope + rope columns."""
    q = jnp.concatenate([q_nope, q_rope], axis=-1)
    n, s = q.shape[1], table.shape[1] * cache.shape[1]
    entries = cache[table[0]].reshape(1, s, config.entry_dim)

    def call(entries, **options):
        return jax.nn.dot_product_attention(
            q, *expand(config, w, entries), scale=config.softmax_scale,
            implementation=form.implementation, **options,
        )  # fmt: skip

    if form.split and s > n:
        parts = [
            call(entries[:, : s - n], return_residual=True),
            call(entries[:, s - n :], return_residual=True, is_causal=True),
        ]
        outs, lses = (jnp.stack(x) for x in zip(*parts, strict=True))
        out, _ = merge_attention_states(outs, jnp.swapaxes(lses, 2, 3).astype(jnp.float32))
    elif form.split:
        out = call(entries, is_causal=True)
    else:  # its is_causal would align the mask to the beginning
        out = call(entries, mask=jnp.tri(n, s, s - n, dtype=bool)[None, None])
    return out[..., : config.value_dim]


def expand(config, w, entries):
    """Keys and values of each head, [1, s, h, nope + rope] both: the call wants them alike."""
    latent, k_rope = jnp.split(entries, [config.kv_lora_rank], axis=-1)
    k_nope = jnp.einsum("bsc,hec->bshe", latent, w["key_up"])
    k_rope = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], config.rope_dim))
    value = jnp.einsum("bsc,hvc->bshv", latent, w["value_up"])
    key = jnp.concatenate([k_nope, k_rope], axis=-1)
    return key, jnp.pad(value, [(0, 0)] * 3 + [(0, key.shape[-1] - config.value_dim)])

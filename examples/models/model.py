"""One forward pass of a model with multi-head latent attention over a paged latent cache.

Prefill and decode are the same function: `forward` appends new tokens of each sequence and returns
logits. Matrices are [outputs, inputs], as in weights.py. A matrix product takes its operands in the
dtype of the weights and sums in float32. Everything between products is float32.

Shape letters: b sequences, n new tokens of each, m model width, h heads, c latent width
(kv_lora_rank), e query/key width of a head, v value width of a head, r q_lora_rank, t tokens of all
sequences, x experts, f width of an MLP.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jax_flashmla import (
    append_kv_cache,
    flash_mla_with_kvcache,
    get_mla_metadata,
    get_slot_mapping,
)

from .rope import rotate, rotation

LATENT_NORM_EPS = 1e-6  # for the norms inside attention; the others have config.norm_eps
DENSE_TOKENS = 512  # tokens that go through all experts at a time; bounds temporary memory


def init_cache(config, pages_per_layer, page_block_size=64, dtype=jnp.bfloat16):
    """The pages of all layers in one buffer; layer l has them from l * pages_per_layer on.

    The contents do not matter until they are written.
    """
    pages = config.layers * pages_per_layer
    return jnp.zeros((pages, page_block_size, 1, config.entry_dim), dtype)


def forward(
    params,
    config,
    cache,
    tokens,
    block_table,
    cache_seqlens,
    num_new,
    *,
    all_logits=False,
    tensor_axis=None,
    implementation="auto",
):
    """Appends each sequence's new tokens to the cache and returns logits.

    Column j of sequence i has position cache_seqlens[i] - n + j. The new tokens are the last
    num_new[i] columns. The columns before them are padding: they are not written to the cache, and
    their logits have no meaning. Donate the cache, so that it is updated in place.

    Args:
      params: from weights.py.
      config: a ModelConfig; static.
      cache: [layers * pages_per_layer, page_block_size, 1, entry_dim], from `init_cache`.
      tokens: i32 [b, n].
      block_table: i32 [b, max_blocks], pages within a layer, -1 where there is none.
      cache_seqlens: i32 [b], tokens of each sequence, including the new ones; 0 for a row of the
        batch without a sequence.
      num_new: i32 [b], 0 to n.
      all_logits: static; whether to return logits of all columns or only of the last.
      tensor_axis: static; the mesh axis that splits heads and MLP widths (parallel.py).
      implementation: static; as in the ops.

    Returns:
      logits: f32 [b, vocab], or [b, n, vocab].
      cache.
    """
    heads = params["layers"][0]["key_up"].shape[0]  # on this device
    step = plan_step(
        config, cache.shape[1], tokens.shape[1], heads, block_table, cache_seqlens, num_new,
        implementation,
    )  # fmt: skip

    def over_devices(x):
        return x if tensor_axis is None else jax.lax.psum(x, tensor_axis)

    # Unrolled, because a scan would slice each layer out of stacked weights and so copy them (the
    # experts of a V2-Lite layer are 1.1 GB). XLA also makes one CUDA graph of unrolled layers.
    x = params["embedding"][tokens].astype(jnp.float32)
    late = None  # with paired layers: what the experts of an even one add after the next
    for layer, w in enumerate(params["layers"]):
        y = rms_norm(x, w["attention_norm"], config.norm_eps)
        attended, cache = attention(w, config, y, cache, layer, step)
        x = x + over_devices(attended)
        y = rms_norm(x, w["mlp_norm"], config.norm_eps)
        routed = experts(w, config, y, over_devices) if "router" in w else None
        if config.paired_layers:
            routed, late = late, routed
        if "gate_up" in w:
            x = x + over_devices(mlp(w["gate_up"], w["down"], y))
        if routed is not None:
            x = x + routed

    x = rms_norm(x if all_logits else x[:, -1], params["final_norm"], config.norm_eps)
    return product("...m,km->...k", x, params.get("head", params["embedding"])), cache


@dataclasses.dataclass(frozen=True)
class Step:
    """The arrays that all layers of one forward pass use."""

    block_table: jax.Array
    lengths: jax.Array  # the cache_seqlens
    schedule: tuple  # from get_mla_metadata
    slots: jax.Array  # [b, n], the slots of the new tokens within a layer's pages
    rotation: tuple  # cosine and sine, [b, n, 1, rope_dim / 2]
    implementation: str


def plan_step(config, page, n, heads, block_table, cache_seqlens, num_new, implementation):
    """Computes what depends only on lengths and tables, once for all layers."""
    column = jnp.arange(n, dtype=jnp.int32)
    positions = cache_seqlens[:, None] - n + column
    is_new = column >= n - num_new[:, None]
    return Step(
        block_table,
        cache_seqlens,
        # Each KV head has n * heads query rows.
        get_mla_metadata(cache_seqlens, n * heads, 1, implementation=implementation),
        get_slot_mapping(block_table, jnp.where(is_new, positions, -1), page),
        rotation(config, jnp.maximum(positions, 0)[:, :, None]),
        implementation,
    )


def product(equation, x, w):
    """The product of x, rounded to w's dtype, and w, in float32."""
    precision = "highest" if w.dtype == jnp.float32 else None  # no TF32
    return jnp.einsum(
        equation, x.astype(w.dtype), w, preferred_element_type=jnp.float32, precision=precision
    )


def rms_norm(x, gain, eps):
    mean_square = jnp.mean(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + eps) * gain.astype(jnp.float32)


# -------------------- Attention


def attention(w, config, x, cache, layer, step):
    """Multi-head latent attention of one layer: x [b, n, m] -> ([b, n, m], the cache)."""
    c, (cosine, sine) = config.kv_lora_rank, step.rotation

    # The cache entries of the new tokens, [b, n, c + rope]: latent and rotary key.
    down = product("bnm,km->bnk", x, w["kv_down"])
    latent = rms_norm(down[..., :c], w["kv_norm"], LATENT_NORM_EPS) * config.latent_scale
    k_rope = rotate(down[..., c:], (cosine[:, :, 0], sine[:, :, 0]), config.rope_interleave)
    entries = jnp.concatenate([latent, k_rope], axis=-1).astype(cache.dtype)

    # Append first, because a token attends to itself too. Keep -1 (no page, or a slot where nothing
    # is written). With the layer's first page added it would be a page of another layer.
    first_page = layer * (cache.shape[0] // config.layers)
    table, slots = (
        jnp.where(ids < 0, -1, ids + first)
        for ids, first in (
            (step.block_table, first_page),
            (step.slots, first_page * cache.shape[1]),
        )
    )
    cache = append_kv_cache(
        cache,
        entries.reshape(-1, entries.shape[-1]),
        slots.reshape(-1),
        implementation=step.implementation,
    )
    attended, _ = flash_mla_with_kvcache(
        queries(w, config, x, step.rotation).astype(cache.dtype),
        cache,
        table,
        step.lengths,
        c,
        *step.schedule,
        softmax_scale=config.softmax_scale,
        causal=True,
        implementation=step.implementation,
    )

    # Out of the latent space, then the usual output projection.
    values = product("bnhc,hvc->bnhv", attended, w["value_up"])
    return product("bnhv,mhv->bnm", values, w["out"]), cache


def queries(w, config, x, rotation):
    """Queries in the latent space, [b, n, h, c + rope].

    Absorption: a key is key_up @ latent, and q . (key_up @ latent) is (q @ key_up) . latent. So all
    heads share one key (the cache entry) and one value (its first c columns).
    """
    if "query_down" in w:
        x = product("bnm,rm->bnr", x, w["query_down"])
        x = rms_norm(x, w["query_norm"], LATENT_NORM_EPS) * config.query_scale
    q = product("bnm,hem->bnhe", x, w["query"])
    q_latent = product("bnhe,hec->bnhc", q[..., : config.nope_dim], w["key_up"])
    q_rope = rotate(q[..., config.nope_dim :], rotation, config.rope_interleave)
    return jnp.concatenate([q_latent, q_rope], axis=-1)


# -------------------- MLPs


def mlp(gate_up, down, x):
    """x [..., m] -> [..., m]; gate_up [2, f, m], down [m, f]."""
    gate, up = jnp.moveaxis(product("...m,gfm->...gf", x, gate_up), -2, 0)
    return product("...f,mf->...m", jax.nn.silu(gate) * up, down)


def experts(w, config, x, over_devices=lambda x: x):
    """The output of each token's experts plus that of the shared experts: x [b, n, m].

    With tensor parallelism `over_devices` sums over the devices that split the experts' widths.
    """
    tokens = x.reshape(-1, x.shape[-1])
    weights, chosen = route(w, config, tokens)

    # With few tokens, copying each token's experts (read, write, read) moves fewer bytes than
    # reading all experts once. With many tokens nearly every expert is needed, so all tokens go
    # through all experts, which is two matrix products. Up to about 128 tokens their time is that
    # of reading the weights; a long prompt pays in arithmetic. jax.lax.ragged_dot is made for this,
    # but on GPUs it becomes the same two products with experts_per_token times the rows.
    if 3 * chosen.size <= config.experts:
        routed = few_tokens(w, tokens, weights, chosen)
    else:
        row = jnp.arange(tokens.shape[0])[:, None]
        spread = jnp.zeros((tokens.shape[0], config.experts))
        spread = spread.at[row, chosen].set(weights, mode="drop")  # drops zero experts
        routed = jax.lax.map(
            lambda one: all_experts(w, *one), (tokens, spread), batch_size=DENSE_TOKENS
        )
    routed = routed.reshape(x.shape)
    if config.shared_experts:
        routed = routed + mlp(w["shared_gate_up"], w["shared_down"], x)
    routed = over_devices(routed)
    if config.zero_experts:  # they return the token as it is
        share = jnp.sum(jnp.where(chosen < config.experts, 0, weights), axis=1)
        routed = routed + share.reshape(*x.shape[:-1], 1) * x
    if config.mlp_out_norm:
        routed = rms_norm(routed, w["mlp_out_norm"], config.norm_eps)
    return routed


def few_tokens(w, x, weights, chosen):
    """Tokens x [t, m] through their experts `chosen` [t, k] -> [t, m]. Copies k experts a token."""
    is_zero = chosen >= w["experts_down"].shape[0]
    chosen, weights = jnp.where(is_zero, 0, chosen), jnp.where(is_zero, 0, weights)
    gate, up = jnp.moveaxis(product("tm,tkgfm->tkgf", x, w["experts_gate_up"][chosen]), 2, 0)
    hidden = jax.nn.silu(gate) * up * weights[..., None]
    return product("tkf,tkfm->tm", hidden, w["experts_down"][chosen])


def all_experts(w, x, weights):
    """One token x [m] through all experts -> [m]. Most of its weights [x] are 0."""
    gate, up = jnp.moveaxis(product("m,xgfm->xgf", x, w["experts_gate_up"]), 1, 0)
    hidden = jax.nn.silu(gate) * up * weights[:, None]
    return product("xf,xfm->m", hidden, w["experts_down"])


def route(w, config, x):
    """Chooses the experts of tokens x [t, m]: (weights f32 [t, k], indices i32 [t, k])."""
    logits = product("tm,xm->tx", x, w["router"])  # the router is float32
    if config.softmax_scores or config.topk_method != "noaux_tc":
        scores = jax.nn.softmax(logits, axis=-1)
    else:
        scores = jax.nn.sigmoid(logits)
    if config.topk_method == "noaux_tc":
        by_group = scores + w["router_bias"]  # the bias changes the choice, not the weights
        best = 2  # a group's score is the sum over this number of its experts
    else:
        by_group, best = scores, 1
    if config.groups > 1:
        by_group = within_best_groups(by_group, config, best)
    _, chosen = jax.lax.top_k(by_group, config.experts_per_token)
    weights = jnp.take_along_axis(scores, chosen, axis=1)
    if config.normalize_routing:
        weights = weights / (jnp.sum(weights, axis=1, keepdims=True) + 1e-20)
    return weights * config.routing_scale, chosen


def within_best_groups(scores, config, best):
    """The scores [t, x], with -inf outside each token's best groups.

    The score of a group is the sum of its `best` highest scores.
    """
    grouped = scores.reshape(scores.shape[0], config.groups, -1)
    best = min(best, grouped.shape[2])
    worth = jnp.sum(jax.lax.top_k(grouped, best)[0], axis=-1)
    _, kept = jax.lax.top_k(worth, config.groups_per_token)
    is_kept = jnp.any(jnp.arange(config.groups) == kept[..., None], axis=1)
    return jnp.where(is_kept[..., None], grouped, -jnp.inf).reshape(scores.shape)

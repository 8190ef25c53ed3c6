"""Times the attention of a prompt's last chunk beside a library call over expanded keys and values.

    python benchmarks/bench_chunk_attention.py           -> benchmarks/results/<card>.json
    python benchmarks/bench_chunk_attention.py --smoke   tiny shapes on the CPU

The chunk's own latents are in the pages already. Absorption counts for the op; gathering and
expansion count for the peer. See ABOUT below.
"""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from core import bench, check
from core.inputs import page_tables, random_pool
from core.op import Case, Op
from core.peers import JaxPeer

from jax_flashmla import flash_mla_with_kvcache, get_mla_metadata, merge_attention_states

LATENT, NOPE, ROPE, VALUE, PAGE = 512, 128, 64, 128, 64
SCALE = (NOPE + ROPE) ** -0.5


@dataclasses.dataclass(frozen=True)
class Chunk(Case):
    """The last `chunk` tokens of a sequence of `context` tokens."""

    context: int
    chunk: int
    h_q: int = 16

    @property
    def name(self):
        return f"{self.chunk} of {self.context}"

    def flops(self):
        """Of the form with less arithmetic; a query sees all keys up to its own."""
        seen = self.chunk * (self.context - (self.chunk - 1) / 2)
        projections = 2 * LATENT * (NOPE + VALUE) * self.h_q
        absorbed = 2 * self.h_q * seen * (2 * LATENT + ROPE) + projections * self.chunk
        expanded = 2 * self.h_q * seen * (NOPE + ROPE + VALUE) + projections * self.context
        return min(absorbed, expanded)

    def token_bytes(self):
        return 2 * self.context * (LATENT + ROPE)

    def moved_bytes(self):
        return self.token_bytes() + 2 * self.h_q * self.chunk * (NOPE + ROPE + VALUE)


def make_pool(cases, calls):
    """The pages, and the weights of a layer (kv_b_proj, in two)."""
    needs = [(case.context, calls(case)) for case in cases]
    key, value = jax.random.split(jax.random.key(1))
    return {
        "cache": random_pool(needs, PAGE, LATENT + ROPE, jnp.bfloat16),
        "key_up": weights(key, (cases[0].h_q, NOPE, LATENT)),
        "value_up": weights(value, (cases[0].h_q, VALUE, LATENT)),
    }


def weights(key, shape):
    return (jax.random.normal(key, shape) / LATENT**0.5).astype(jnp.bfloat16)


def make_lists(case, pool, calls):
    tables = page_tables([case.context], PAGE, case.context // PAGE, len(pool["cache"]), calls)
    return np.full(1, case.context, np.int32), list(tables)


def draw_queries(case, key):
    """Those of each head: nope columns, then rotary ones."""
    return jax.random.normal(key, (1, case.chunk, case.h_q, NOPE + ROPE), jnp.bfloat16)


def make_schedule(case, implementation, lengths):
    return get_mla_metadata(lengths, case.chunk * case.h_q, 1, implementation=implementation)


def absorbed(case, implementation, pool, lengths, schedule, own):
    """As a model runs it: queries into the latent space, results out of it."""
    table, q = own
    q_nope, q_rope = jnp.split(q, [NOPE], axis=-1)
    q_latent = jnp.einsum("bnhe,hec->bnhc", q_nope, pool["key_up"])
    out, _ = flash_mla_with_kvcache(
        jnp.concatenate([q_latent, q_rope], axis=-1), pool["cache"], table, lengths, LATENT,
        *(schedule or ()), softmax_scale=SCALE, causal=True, implementation=implementation,
    )  # fmt: skip
    return (jnp.einsum("bnhc,hvc->bnhv", out, pool["value_up"]),)


def expand(pool, table):
    """Keys [1, s, h, nope + rope] and values [1, s, h, v] of each head."""
    entries = pool["cache"][table[0]].reshape(1, -1, LATENT + ROPE)
    latent, k_rope = jnp.split(entries, [LATENT], axis=-1)
    k_nope = jnp.einsum("bsc,hec->bshe", latent, pool["key_up"])
    k_rope = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], ROPE))
    value = jnp.einsum("bsc,hvc->bshv", latent, pool["value_up"])
    return jnp.concatenate([k_nope, k_rope], axis=-1), value


def expanded(way, pool, lengths, own):
    """Ordinary multi-head attention; values are padded to the width of keys, as the call wants."""
    del lengths
    table, q = own
    key, value = expand(pool, table)
    value = jnp.pad(value, [(0, 0)] * 3 + [(0, NOPE + ROPE - VALUE)])
    n, s = q.shape[1], key.shape[1]

    def attend(first, last, **options):
        return jax.nn.dot_product_attention(
            q, key[:, first:last], value[:, first:last], scale=SCALE,
            implementation=way.split("_")[0], **options,
        )  # fmt: skip

    if not way.endswith("_split"):  # is_causal would align the mask to the beginning
        out = attend(0, s, mask=jnp.tri(n, s, s - n, dtype=bool)[None, None])
    elif s == n:
        out = attend(0, s, is_causal=True)
    else:  # no mask over the tokens before the chunk
        parts = [
            attend(0, s - n, return_residual=True),
            attend(s - n, s, return_residual=True, is_causal=True),
        ]
        outs, lses = (jnp.stack(x) for x in zip(*parts, strict=True))
        out, _ = merge_attention_states(outs, jnp.swapaxes(lses, 2, 3).astype(jnp.float32))
    return (out[..., :VALUE],)


def check_results(case, pool, lengths, own, found):
    """Beside the expanded form in float32, head by head."""
    table, q = own
    pool = pool | {name: pool[name].astype(jnp.float32) for name in ("key_up", "value_up")}
    entries = pool["cache"][table[0]].reshape(-1, LATENT + ROPE).astype(jnp.float32)
    dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    seen = jnp.tri(case.chunk, case.context, case.context - case.chunk, dtype=bool)

    def one_head(operands):
        q, key_up, value_up = operands
        latent, rope = entries[:, :LATENT], entries[:, LATENT:]
        key = jnp.concatenate([dot("sc,ec->se", latent, key_up), rope], axis=1)
        scores = dot("ne,se->ns", q.astype(jnp.float32), key) * SCALE
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
        return dot("ns,sv->nv", weights, dot("sc,vc->sv", latent, value_up))

    heads = jnp.swapaxes(q[0], 0, 1), pool["key_up"], pool["value_up"]
    expected = jnp.swapaxes(jax.lax.map(one_head, heads), 0, 1)[None]
    return check.compare((expected,), found, rel_err=check.relative)


def find_library(options):
    ways = ["xla", "xla_split"] if options.smoke else ["cudnn", "cudnn_split", "xla"]
    return JaxPeer("jax.nn.dot_product_attention", expanded, ways)


OP = Op(
    "chunk_attention",
    [Chunk(context, chunk) for context in (4096, 32768) for chunk in (64, 256, 512, 2048)],
    smoke=[Chunk(128, 64, h_q=2), Chunk(64, 64, h_q=2)],
    pool=make_pool, lists=make_lists, draw=draw_queries, prepare=make_schedule, call=absorbed,
    check=check_results, limits={"rel_err": 2e-2}, peers=[find_library],
    labels="chunk of context", heading=lambda row: "The attention of a prompt's chunk",
)  # fmt: skip

ABOUT = """
The attention of the last chunk of a context, from the queries of each head to its values, with
the dimensions of DeepSeek-V2-Lite. Our time includes the absorption of the queries into the latent
space and the projection of the result out of it. The peer gathers the latents from their pages,
expands them into keys and values of each head, and calls `jax.nn.dot_product_attention` in three
ways: cuDNN with a mask; cuDNN once over all tokens before the chunk and once, causal, over the
chunk, merged by `merge_attention_states` ("cudnn_split"); XLA with a mask. The fastest counts."""

if __name__ == "__main__":
    sys.exit(bench.main(OP, __doc__))

"""FlashAttention-3 over token lists, out of vllm's wheel. It is no benchmark of its own."""

import functools

import jax.numpy as jnp
from core import peers
from core.op import Peer

VALUE, ROPE = 512, 64  # columns of a value, and the columns beside it that only a key has
NUM_SPLITS = (0, 1, 2, 4, 8, 16, 32)  # with 0 it chooses


class FlashAttention(Peer):
    """It reads a cache with pages of one token, whose page table is the list, as vllm calls it.

    Its metadata is made beforehand, and the fastest of NUM_SPLITS counts; vllm leaves both to the
    call. Tokens of 512 columns have no columns beside the value: as in vllm, the queries of those
    are zero, and the keys any columns.
    """

    def __init__(self, lists, options):
        """lists: (case, lengths, own) -> (slots i32 [n, tokens], all valid; q [n, h, d])."""
        self._lists, (self._ops, self.name) = lists, peers.load_flash_attention(options)

    def ways(self, case):
        return [""]

    def prepare(self, case, way, pool, lengths, owns):
        inputs = [self._lists(case, lengths, own) for own in owns]
        n, tokens = inputs[0][0].shape
        counts, starts = jnp.full(n, tokens, jnp.int32), jnp.arange(n + 1, dtype=jnp.int32)
        zero = jnp.zeros((n, case.h_q, ROPE), pool.dtype)
        arrays = pool.reshape(-1, 1, 1, pool.shape[-1]), counts, starts, zero
        splits = [i for i in NUM_SPLITS if i <= 1 or (64 * i <= tokens and n * i <= 1024)]
        return peers.fastest_round({
            f"num_splits {i}": functools.partial(
                peers.graph_round, functools.partial(self._prepare, case, i), arrays, inputs
            )
            for i in splits
        })  # fmt: skip

    def _prepare(self, case, splits, arrays, first):
        (rows, counts, starts, zero), (n, tokens) = arrays, first[0].shape
        heads, d_k, window = case.h_q, rows.shape[-1], (-1, -1)
        v, rope = rows[..., :VALUE], d_k > VALUE
        k = rows[..., VALUE:] if rope else rows[..., :ROPE]
        metadata = self._ops.get_scheduler_metadata(
            n, 1, tokens, heads, 1, ROPE, VALUE, rows.dtype, counts, starts, None, None, None, None,
            1, 0, True, *window, False, splits, None, 0,
        )  # fmt: skip
        absent = (None,) * 8  # a batch index, paddings, rotations, scales

        def run(one):
            slots, q = one
            out, lse = self._ops.fwd(
                q[..., VALUE:] if rope else zero, k, v, None, None, q[..., :VALUE], None, starts,
                None, None, None, counts, 1, tokens, slots, *absent, d_k**-0.5, True, *window, 0.0,
                True, metadata, splits, None, 0, None, 1, 0, None,
            )[:2]  # fmt: skip
            batch = case.batch, case.s_q, heads
            lse = lse.swapaxes(0, 1).reshape(batch).swapaxes(1, 2)  # from [h, n]
            return out.reshape(*batch, VALUE), lse

        return run, metadata

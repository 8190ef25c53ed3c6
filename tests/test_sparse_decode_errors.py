"""Wrong arguments of flash_mla_with_kvcache with indices, and of the helpers for token lists."""

import jax
import jax.numpy as jnp
import pytest
from cases import D_K, D_V

import jax_flashmla as fm

B, S_Q, TOPK = 2, 3, 5
LISTS = jnp.zeros((B, S_Q, TOPK), jnp.int32)
CACHE = jnp.zeros((8, 64, 1, D_K), jnp.bfloat16)
EXTRA = {"extra_k_cache": CACHE[:, :2], "extra_indices_in_kvcache": LISTS}


def call_with(**changes):
    """The op on good arguments, of which some are changed."""
    arguments = {
        "q": jnp.zeros((B, S_Q, 4, D_K), jnp.bfloat16),
        "k_cache": CACHE,
        "block_table": None,
        "cache_seqlens": None,
        "head_dim_v": D_V,
        "indices": LISTS,
        "implementation": "xla",
    }
    return fm.flash_mla_with_kvcache(**{**arguments, **changes})


def lists(*shape, dtype=jnp.int32):
    return jnp.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"block_table": lists(B, 4)},
            ValueError,
            r"^block_table must be None with indices, got an array of type int32\[2,4\]; get_slot_",
        ),
        (
            {"cache_seqlens": lists(B)},
            ValueError,
            r"^cache_seqlens must be None with indices, got .*int32\[2\]; topk_length holds",
        ),
        ({"causal": True}, ValueError, "^causal must be False with indices, got True; the lists"),
        ({"causal": 0}, TypeError, "^causal must be a static Python bool, got 0"),
        (
            {"causal_offset": lists(B)},
            ValueError,
            r"^causal_offset must be None with indices, got .*int32\[2\]",
        ),
        (
            {"k_cache": jnp.zeros((8, 64, 2, D_K), jnp.bfloat16)},
            ValueError,
            r"^k_cache has shape \[8, 64, 2, 576\], but with indices axis 2 must be 1",
        ),
        ({"k_cache": CACHE[..., :512]}, ValueError, "^k_cache .*axis 3 must be 576"),
        (
            {"indices": lists(B, TOPK)},
            ValueError,
            r"^indices must have shape \[b, s_q, topk\], got",
        ),
        (
            {"indices": lists(B, S_Q, 3, dtype=jnp.float32)},
            TypeError,
            "^indices .*int32, got float",
        ),
        ({"indices": lists(3, S_Q, 3)}, ValueError, "^indices .*axis 0 must be 2, the batch of q"),
        ({"indices": lists(B, 1, 3)}, ValueError, "^indices .*axis 1 must be 3, the s_q of q"),
        (
            {"indices": lists(B, S_Q, 0)},
            ValueError,
            r"^indices must have at least one .*\[2, 3, 0\]",
        ),
        ({"topk_length": lists()}, ValueError, r"^topk_length must have shape \[b\] or \[b, s_q\]"),
        (
            {"topk_length": lists(3)},
            ValueError,
            "^topk_length .*axis 0 must be 2, the batch of its",
        ),
        ({"topk_length": lists(B, 1)}, ValueError, "^topk_length .*axis 1 must be 3, the s_q of"),
        (
            {"topk_length": lists(B * S_Q)},
            ValueError,
            r"^topk_length must have shape \[b\] or \[b, s_q\], \[2\] or \[2, 3\] here, got \[6\]; "
            r"pass topk_length\.reshape\(2, 3\)$",
        ),
        ({"topk_length": lists(B, dtype=jnp.int16)}, TypeError, "^topk_length .*got int16"),
        ({"attn_sink": jnp.zeros(3)}, ValueError, "^attn_sink .*axis 0 must be 4, the heads of q"),
        ({"attn_sink": jnp.zeros((1, 4))}, ValueError, r"^attn_sink must have shape \[h_q\], got"),
        (
            {"attn_sink": jnp.zeros(4, jnp.bfloat16)},
            TypeError,
            "^attn_sink .*float32, got bfloat16",
        ),
        ({"softmax_scale": 1e39}, ValueError, r"^softmax_scale must be finite .*got 1e\+39"),
    ],
)
def test_misuse(changes, error, message):
    with pytest.raises(error, match=message):
        call_with(**changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"extra_k_cache": None}, ValueError, "come as a pair.*got None for extra_k_cache"),
        (
            {"extra_indices_in_kvcache": None},
            ValueError,
            "come as a pair.*got None for extra_indices_in_kvcache",
        ),
        (
            {"extra_k_cache": CACHE.astype(jnp.float16)},
            TypeError,
            "^extra_k_cache must have dtype bfloat16, got float16",
        ),
        (
            {"extra_k_cache": CACHE[..., :512]},
            ValueError,
            r"^extra_k_cache has shape \[8, 64, 1, 512\], but axis 3 must be 576, the d_k of q",
        ),
        ({"extra_k_cache": CACHE[0]}, ValueError, r"^extra_k_cache must have shape \[num_blocks2"),
        ({"extra_k_cache": CACHE[:, :0]}, ValueError, "^only axis 0 of extra_k_cache may be empty"),
        (
            {"extra_k_cache": jnp.zeros((8, 2, 2, D_K), jnp.bfloat16)},
            ValueError,
            "^extra_k_cache .*axis 2 must be 1",
        ),
        (
            {"extra_indices_in_kvcache": lists(B, 1, 7)},
            ValueError,
            "^extra_indices_in_kvcache .*axis 1 must be 3, the s_q of q",
        ),
        (
            {"extra_indices_in_kvcache": lists(B, S_Q, 0)},
            ValueError,
            "^extra_indices_in_kvcache must have at least one entry",
        ),
        ({"extra_topk_length": lists(3)}, ValueError, "^extra_topk_length .*axis 0 must be 2"),
        (
            {"extra_topk_length": lists(B * S_Q)},
            ValueError,
            r"^extra_topk_length .*; pass extra_topk_length\.reshape\(2, 3\)$",
        ),
    ],
)
def test_misuse_of_an_extra_cache(changes, error, message):
    call_with(**EXTRA)
    with pytest.raises(error, match=message):
        call_with(**EXTRA | changes)


def test_lengths_of_extra_lists_that_are_missing():
    with pytest.raises(ValueError, match=r"^extra_topk_length holds .*int32\[2\].*extra_k_cache"):
        call_with(extra_topk_length=lists(B))


@pytest.mark.parametrize("name", ["topk_length", "extra_topk_length", *EXTRA])
def test_arguments_that_need_indices(name):
    value = EXTRA.get(name, lists(B))
    dense = {"block_table": lists(B, 4), "cache_seqlens": lists(B), "indices": None}
    call_with(**dense, attn_sink=jnp.zeros(4))
    with pytest.raises(ValueError, match=rf"^{name} belongs to a call with indices, got .*\["):
        call_with(**dense, **{name: value})


def test_neither_indices_nor_a_block_table():
    advice = "must be an array, got None; for attention over token lists pass indices"
    with pytest.raises(TypeError, match=f"^block_table {advice}"):
        call_with(indices=None)
    with pytest.raises(TypeError, match=f"^cache_seqlens {advice}"):
        fm.decode_cost(jnp.zeros((B, S_Q, 4, D_K), jnp.bfloat16), CACHE, None, D_V)


# Schedules.


def some_schedule(lists=B * S_Q, h_q=4):
    return fm.get_mla_metadata(jnp.ones(lists, jnp.int32), h_q, 1, implementation="xla")


@pytest.mark.parametrize(
    ("made_for", "message"),
    [
        ({"lists": B}, r"batch=2, but this call has 6 token lists \(b \* s_q\)"),
        ({"h_q": 4 * S_Q}, "num_heads_per_head_k=12, but this call has 4 query heads"),
    ],
)
def test_schedule_of_another_call(made_for, message):
    metadata, num_splits = some_schedule(**made_for)
    remedy = r"; make it with get_mla_metadata\(get_sparse_seqlens\(indices, \.\.\.\), 4, 1\)"
    with pytest.raises(ValueError, match=message + remedy):
        call_with(tile_scheduler_metadata=metadata, num_splits=num_splits)


def test_schedule_of_the_lists():
    """get_sparse_seqlens makes the lengths that a call's schedule needs."""
    schedule = fm.get_mla_metadata(fm.get_sparse_seqlens(LISTS), 4, 1, implementation="xla")
    call_with(tile_scheduler_metadata=schedule[0], num_splits=schedule[1])
    call_with(tile_scheduler_metadata=some_schedule()[0], num_splits=some_schedule()[1])
    with pytest.raises(ValueError, match=r"num_splits .*must be 7"):
        call_with(tile_scheduler_metadata=schedule[0], num_splits=schedule[1][1:])
    with pytest.raises(ValueError, match=r"come as a pair from get_mla_metadata.*num_splits"):
        call_with(tile_scheduler_metadata=schedule[0])


# Symbolic sizes.


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ({"topk": "k"}, TypeError, r"^only axis 0 of indices may be symbolic .*\[2, 3, k\]"),
        (
            {"extra_topk": "k"},
            TypeError,
            "^only axis 0 of extra_indices_in_kvcache may be symbolic",
        ),
        ({"extra_page": "k"}, TypeError, "^only axis 0 of extra_k_cache may be symbolic"),
        ({"extra_pages": "k - 1"}, ValueError, "^extra_k_cache .*axis 0 may be 0.*constraint"),
        ({"pages": "k - 1"}, ValueError, "^k_cache .*axis 0 may be 0.*constraint"),
    ],
)
def test_symbolic_sizes(sizes, error, message):
    names = {"topk": 5, "extra_topk": 4, "pages": 8, "extra_pages": 9, "extra_page": 2}
    scope = jax.export.SymbolicScope()
    names |= {n: jax.export.symbolic_shape(x, scope=scope)[0] for n, x in sizes.items()}

    def struct(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype)

    structs = (
        struct(names["pages"], 64, 1, D_K, dtype=jnp.bfloat16),
        struct(B, S_Q, names["topk"]),
        struct(names["extra_pages"], names["extra_page"], 1, D_K, dtype=jnp.bfloat16),
        struct(B, S_Q, names["extra_topk"]),
    )
    arguments = "k_cache", "indices", "extra_k_cache", "extra_indices_in_kvcache"
    run = jax.jit(lambda *arrays: call_with(**dict(zip(arguments, arrays, strict=True))))
    with pytest.raises(error, match=message):
        jax.export.export(run)(*structs)


# The helpers.


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"indices": lists(B, 3)}, ValueError, r"^indices must have shape \[b, s_q, topk\]"),
        ({"indices": lists(B, 3, 0)}, ValueError, "^indices must have at least one entry"),
        ({"topk_length": lists(B, S_Q, 1)}, ValueError, r"^topk_length must have shape \[b\] or"),
        ({"topk_length": lists(1)}, ValueError, "^topk_length .*axis 0 must be 2"),
        ({"topk_length": lists(B * S_Q)}, ValueError, r"^topk_length .*reshape\(2, 3\)$"),
        (
            {"extra_indices_in_kvcache": lists(B, 1, 3)},
            ValueError,
            "^extra_indices_in_kvcache .*axis 1 must be 3, the s_q of indices",
        ),
        (
            {"extra_topk_length": lists(B)},
            ValueError,
            r"^extra_topk_length holds .*int32\[2\] and None for extra_indices_in_kvcache",
        ),
    ],
)
def test_misuse_of_get_sparse_seqlens(arguments, error, message):
    with pytest.raises(error, match=message):
        fm.get_sparse_seqlens(**{"indices": LISTS} | arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"indices": jnp.zeros(3)}, TypeError, "^indices must have dtype int32, got float32"),
        ({"first": -1}, ValueError, "^first must be an int of at least 0, got -1"),
        ({"first": 2**31}, ValueError, "^first must fit into int32, got 2147483648"),
        ({"first": lists(2)}, ValueError, r"^first must be a scalar, got shape \[2\]"),
        ({"first": jnp.float32(1)}, TypeError, "^first must have dtype int32, got float32"),
        ({"count": 0}, ValueError, "^count must be an int of at least 1, got 0"),
        ({"count": jnp.int32(3)}, TypeError, "^count must be a static Python int, got an array"),
    ],
)
def test_misuse_of_to_local_slots(arguments, error, message):
    with pytest.raises(error, match=message):
        fm.to_local_slots(**{"indices": LISTS, "first": 0, "count": 4} | arguments)

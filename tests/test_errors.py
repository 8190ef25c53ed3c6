"""Wrong arguments: each error names the argument and its value, and says what to do."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flashmla as fm

LENGTHS = jnp.array([70, 3], jnp.int32)
METADATA, NUM_SPLITS = fm.get_mla_metadata(LENGTHS, 4, 1, num_sms=2, implementation="xla")
LISTS = jnp.zeros((2, 1, 3), jnp.int32)
FUNCTIONS = {  # valid arguments by name, of a function or of one way to call it
    "get_mla_metadata": {
        "cache_seqlens": LENGTHS, "num_heads_per_head_k": 4, "num_heads_k": 1
    },
    "flash_mla_with_kvcache": {
        "q": jnp.zeros((2, 1, 4, 8)),
        "k_cache": jnp.zeros((4, 64, 1, 8)),
        "block_table": jnp.zeros((2, 2), jnp.int32),
        "cache_seqlens": LENGTHS,
        "head_dim_v": 4,
        "tile_scheduler_metadata": METADATA,
        "num_splits": NUM_SPLITS,
        "causal": True,
        "causal_offset": LENGTHS,
        "attn_sink": jnp.zeros(4),
    },
    "flash_mla_with_kvcache with indices": {
        "q": jnp.zeros((2, 1, 4, 8)),
        "k_cache": jnp.zeros((4, 64, 1, 8)),
        "block_table": None,
        "cache_seqlens": None,
        "head_dim_v": 4,
        "tile_scheduler_metadata": METADATA,
        "num_splits": NUM_SPLITS,
        "indices": LISTS,
        "topk_length": LENGTHS,
        "attn_sink": jnp.zeros(4),
        "extra_k_cache": jnp.zeros((3, 2, 1, 8)),
        "extra_indices_in_kvcache": LISTS,
        "extra_topk_length": LENGTHS,
    },
    "get_sparse_seqlens": {
        "indices": LISTS,
        "topk_length": LENGTHS,
        "extra_indices_in_kvcache": LISTS,
        "extra_topk_length": LENGTHS,
    },
    "to_local_slots": {"indices": LISTS, "first": jnp.int32(3), "count": 5},
    "append_kv_cache": {
        "k_cache": jnp.zeros((4, 64, 1, 8)),
        "new_kv": jnp.zeros((3, 1, 8)),
        "slot_mapping": jnp.zeros(3, jnp.int32),
    },
    "get_slot_mapping": {
        "block_table": jnp.zeros((2, 2), jnp.int32),
        "positions": jnp.zeros((2, 1), jnp.int32),
        "page_block_size": 64,
    },
    "decode_cost": {
        "q": jnp.zeros((2, 1, 4, 8)),
        "k_cache": jnp.zeros((4, 64, 1, 8)),
        "cache_seqlens": [70, 3],
        "head_dim_v": 4,
        "causal": True,
        "causal_offset": [0, -1],
    },
    "decode_cost with indices": {
        "q": jnp.zeros((2, 1, 4, 8)),
        "k_cache": jnp.zeros((4, 64, 1, 8)),
        "cache_seqlens": None,
        "head_dim_v": 4,
        "indices": [[[1, 2, 3]], [[1, -1, 3]]],
        "topk_length": [2, 3],
        "extra_k_cache": jnp.zeros((3, 2, 1, 8)),
        "extra_indices_in_kvcache": [[[1]], [[1]]],
        "extra_topk_length": [2, 3],
    },
    "merge_attention_states": {
        "outs": jnp.zeros((2, 2, 1, 4, 8)),
        "lses": jnp.zeros((2, 2, 4, 1)),
        "attn_sink": jnp.zeros(4),
    },
    "merge_attention_states_across": {
        "out": jnp.zeros((2, 1, 4, 8)),
        "lse": jnp.zeros((2, 4, 1)),
        "axis_name": "x",
        "attn_sink": jnp.zeros(4),
    },
}  # fmt: skip
OPTIONAL = {
    "tile_scheduler_metadata", "num_splits", "causal_offset", "indices", "topk_length", "attn_sink",
    "extra_k_cache", "extra_indices_in_kvcache", "extra_topk_length",
}  # fmt: skip
ARRAYS = [
    (function, name)
    for function, arguments in FUNCTIONS.items()
    for name, value in arguments.items()
    if isinstance(value, jax.Array | list)
]
STRUCTS_WILL_DO = {
    (function, name)
    for function in ("decode_cost", "decode_cost with indices")
    for name in ("q", "k_cache", "extra_k_cache")
}


def public(function):
    """The function, of which the table may have several calls."""
    return getattr(fm, function.split(" ")[0])


WITH_IMPLEMENTATION = [
    name for name in FUNCTIONS if "implementation" in inspect.signature(public(name)).parameters
]


def call(function, **changes):
    reference = {"implementation": "xla"} if function in WITH_IMPLEMENTATION else {}
    return public(function)(**{**FUNCTIONS[function], **reference, **changes})


def test_the_table_is_complete():
    """It has every public function and every array argument, and all arguments are valid."""
    functions = {function: set() for function in map(public, FUNCTIONS)}
    assert {f.__name__ for f in functions} == {
        name for name in fm.__all__ if inspect.isfunction(getattr(fm, name))
    }
    for function, name in ARRAYS:
        functions[public(function)].add(name)
    for function, names in functions.items():
        annotations = inspect.signature(function).parameters
        assert names == {n for n, p in annotations.items() if "rray" in str(p.annotation)}, function
    for function, arguments in FUNCTIONS.items():
        annotations = inspect.signature(public(function)).parameters
        required = {n for n, p in annotations.items() if p.default is p.empty}
        assert required <= set(arguments)
        if function != "merge_attention_states_across":
            call(function)


NOT_ARRAYS = {
    "None": (None, "None"),
    "ShapeDtypeStruct": (
        jax.ShapeDtypeStruct((2, 7), jnp.int32),
        r"ShapeDtypeStruct\(shape=\(2, 7\)",
    ),
    "str": ("many", "'many' of type str"),
    "dict": ({"a": 1}, r"\{'a': 1\} of type dict"),
    "schedule": (METADATA, "TileSchedulerMetadata"),
}


@pytest.mark.parametrize(
    ("function", "name", "kind"),
    [
        (function, name, kind)
        for function, name in ARRAYS
        for kind in NOT_ARRAYS
        if not (kind == "None" and name in OPTIONAL)
        if not (kind == "ShapeDtypeStruct" and (function, name) in STRUCTS_WILL_DO)
    ],
)
def test_not_an_array(function, name, kind):
    value, message = NOT_ARRAYS[kind]
    with pytest.raises(TypeError, match=rf"^{name} must be .*, got .*{message}") as error:
        call(function, **{name: value})
    assert len(str(error.value)) < 400, "it prints all of the value"


def test_structs_in_a_schedule():
    """A schedule that jax.eval_shape made has no values."""
    structs = jax.eval_shape(lambda: METADATA)
    with pytest.raises(TypeError, match=r"^tile_scheduler_metadata\.part_bounds must be an array"):
        call("flash_mla_with_kvcache", tile_scheduler_metadata=structs)


def test_huge_values_are_cut():
    with pytest.raises(
        TypeError, match=r"^cache_seqlens must be an array, got \[.{0,120}\.\.\. of"
    ):
        call("get_mla_metadata", cache_seqlens=["x" * 1000] * 1000)


def test_numbers_past_int32():
    message = r"^cache_seqlens must fit into int32, got \[1099511627776\] of type list"
    with pytest.raises(ValueError, match=message):
        call("get_mla_metadata", cache_seqlens=[2**40])


INTEGERS = [
    (function, name)
    for function, name in ARRAYS
    if isinstance(value := FUNCTIONS[function][name], jax.Array) and value.dtype == jnp.int32
]


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize(("function", "name"), INTEGERS)
def test_numpy_integers_past_int32(function, name, x64):
    """JAX would wrap them: 2**32 + 1 would be slot 1."""
    value = np.asarray(FUNCTIONS[function][name])
    with jax.enable_x64(x64):
        for dtype, number in (
            (np.int64, 2**32 + 1),
            (np.int64, -(2**31) - 1),
            (np.uint64, 2**64 - 1),
            (np.uint32, 2**31),
        ):
            wide = value.astype(dtype)
            wide.flat[-1] = number
            for wrong in (wide, list(wide)) if wide.ndim else (wide,):
                with pytest.raises(ValueError, match=rf"^{name} must fit into int32, got .*\d"):
                    call(function, **{name: wrong})


def test_numpy_integers_that_fit_into_int32():
    """Also with 64 bits, as numpy makes them by default."""
    positions = np.array([[0, 2**31 - 1, -(2**31)]])
    assert positions.dtype == np.int64
    assert fm.get_slot_mapping(np.array([[7]]), positions, 64).tolist() == [[448, -1, -1]]
    assert fm.get_slot_mapping(np.array([[7]]), positions[:, :0], 64).shape == (1, 0)


@pytest.mark.parametrize(
    ("value", "remedy"),
    [
        (jnp.zeros(4, jnp.bfloat16), r"got bfloat16; pass attn_sink\.astype\(jnp\.float32\)$"),
        (np.zeros(4, np.int32), r"got int32; pass attn_sink\.astype\(jnp\.float32\)$"),
        ([0, 1, 2, 3], r"got int32; pass jnp\.asarray\(attn_sink, jnp\.float32\)$"),
    ],
)
def test_sinks_of_another_dtype(value, remedy):
    """As a checkpoint may hold them."""
    message = rf"^attn_sink must have dtype float32, {remedy}"
    for function in ("flash_mla_with_kvcache", "flash_mla_with_kvcache with indices"):
        with pytest.raises(TypeError, match=message):
            call(function, attn_sink=value)
    with pytest.raises(TypeError, match=message):
        call("merge_attention_states", attn_sink=value)


@pytest.mark.parametrize(("function", "name"), INTEGERS)
def test_integers_of_64_bits(function, name):
    """As jax_enable_x64 makes them of lists and numpy arrays."""
    value = np.asarray(FUNCTIONS[function][name], np.int64)
    got = f"^{name} must have dtype int32, got int64; pass "
    with jax.enable_x64(True):
        for wide in (value, jnp.asarray(value)):
            with pytest.raises(TypeError, match=got + rf"{name}\.astype\(jnp\.int32\)$"):
                call(function, **{name: wide})
        if value.ndim:  # a Python int may be a scalar
            with pytest.raises(TypeError, match=got + rf"jnp\.asarray\({name}, jnp\.int32\)$"):
                call(function, **{name: value.tolist()})


def test_escaped_tracer_in_a_list():
    """JAX says what it is, as it does for one that is an argument itself."""
    escaped = []
    jax.jit(escaped.append)(jnp.int32(3))
    with pytest.raises(jax.errors.UnexpectedTracerError):
        call("get_mla_metadata", cache_seqlens=escaped)


@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("function", WITH_IMPLEMENTATION)
def test_misspelt_implementation(function, tokens):
    """Even if an append has nothing to do."""
    changes = {"implementation": "cudda"}
    if function == "append_kv_cache":
        changes |= {
            "new_kv": jnp.zeros((tokens, 1, 8)),
            "slot_mapping": jnp.zeros(tokens, jnp.int32),
        }
    message = r"^implementation must be one of \('auto', 'cuda', 'xla'\), got 'cudda'"
    with pytest.raises(ValueError, match=message):
        call(function, **changes)


@pytest.mark.parametrize("shape", [(0, 64, 1, 8), (4, 64, 1, 0), (0, 0, 0, 0)])
def test_misspelt_implementation_of_an_append_to_nothing(shape):
    new_kv = jnp.zeros((3, *shape[2:]))
    with pytest.raises(ValueError, match=r"^implementation must be one of"):
        call("append_kv_cache", k_cache=jnp.zeros(shape), new_kv=new_kv, implementation="XLA")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tile_scheduler_metadata": NUM_SPLITS, "num_splits": METADATA},
            r"^num_splits must be an array, got a TileSchedulerMetadata; pass "
            r"tile_scheduler_metadata before num_splits",
        ),
        (
            {"tile_scheduler_metadata": (METADATA, NUM_SPLITS), "num_splits": None},
            "^tile_scheduler_metadata must be the TileSchedulerMetadata that get_mla_metadata "
            "returns first, got .* of type tuple",
        ),
        (
            {"tile_scheduler_metadata": NUM_SPLITS},
            r"^tile_scheduler_metadata must be .*, got an array of type int32\[3\]",
        ),
        (
            {"num_splits": (METADATA, NUM_SPLITS)},
            "^num_splits must be an array, got .* of type tuple",
        ),
    ],
)
def test_schedule_in_the_wrong_place(changes, message):
    with pytest.raises(TypeError, match=message):
        call("flash_mla_with_kvcache", **changes)


INT32 = "must fit into int32, got 1099511627776"


@pytest.mark.parametrize(
    ("function", "changes", "message"),
    [
        ("get_slot_mapping", {"page_block_size": 2**40}, f"^page_block_size {INT32}"),
        ("get_mla_metadata", {"num_heads_per_head_k": 2**40}, f"^num_heads_per_head_k {INT32}"),
        ("get_mla_metadata", {"num_heads_k": 2**40}, f"^num_heads_k {INT32}"),
        (
            "get_mla_metadata",
            {"num_heads_per_head_k": 2**20, "num_heads_k": 2**20},
            r"^num_heads_per_head_k \* num_heads_k must be at most 1073741823, got 1048576 \* 1",
        ),
        (
            "get_mla_metadata",
            {"num_sms": 2**40},
            "^num_sms must be at most 134217728, got 1099511627776",
        ),
        (
            "get_mla_metadata",
            {"fixed_split_size": 64, "max_seqlen": 2**40},
            f"^max_seqlen {INT32}",
        ),
        (
            "get_mla_metadata",
            {"cache_seqlens": jnp.zeros(2**10, jnp.int32), "fixed_split_size": 64,
             "max_seqlen": 2**31 - 1},
            "^fixed_split_size=64 and max_seqlen=2147483647 make 34359738368 splits .*a larger",
        ),
        ("flash_mla_with_kvcache", {"head_dim_v": 2**40}, f"^head_dim_v {INT32}"),
        ("decode_cost", {"head_dim_v": 2**40}, f"^head_dim_v {INT32}"),
    ],
)  # fmt: skip
def test_sizes_that_are_too_large(function, changes, message):
    with pytest.raises(ValueError, match=message):
        call(function, **changes)


def test_largest_sizes():
    """The largest sizes that the messages allow work; only shapes are computed."""
    table = jnp.array([[0, 1]], jnp.int32)
    assert fm.get_slot_mapping(table, jnp.array([[5]], jnp.int32), 2**31 - 1).tolist() == [[5]]
    metadata, _ = jax.eval_shape(lambda n: fm.get_mla_metadata(n, 1, 1, num_sms=2**27), LENGTHS)
    assert metadata.part_bounds.shape == (2**27 + 1, 2)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"head_dim_v": 9}, ValueError, "^head_dim_v must be at most the d_k of q, 8, got 9"),
        ({"head_dim_v": 0}, ValueError, "^head_dim_v must be an int of at least 1, got 0"),
        (
            {"cache_seqlens": [1.9, 2]},
            TypeError,
            r"^cache_seqlens must be 2 integers, got \[1\.9, 2\] of type list",
        ),
        ({"cache_seqlens": [[1], [1, 2]]}, TypeError, "^cache_seqlens must be 2 integers"),
        ({"cache_seqlens": [True, False]}, TypeError, "^cache_seqlens must be 2 integers"),
        ({"cache_seqlens": [[1, 2]]}, ValueError, r"^cache_seqlens must have shape \[b\]"),
        ({"causal_offset": [0.5, 1]}, TypeError, "^causal_offset must be 2 integers"),
        (
            {"k_cache": jnp.zeros((4, 64, 8))},
            ValueError,
            r"^k_cache must have shape \[num_blocks, .*, h_kv, d_k\], got \[4, 64, 8\]",
        ),
        ({"q": jnp.zeros((2, 4, 8))}, ValueError, r"^q must have shape .*got \[2, 4, 8\]"),
        ({"q": jnp.zeros((2, 1, 4, 8), jnp.int8)}, TypeError, "^q must have dtype .*got int8"),
        (
            {"k_cache": jnp.zeros((4, 64, 1, 8), jnp.bfloat16)},
            TypeError,
            "^k_cache must have dtype float32, got bfloat16",
        ),
        ({"k_cache": jnp.zeros((4, 64, 1, 9))}, ValueError, "^k_cache .*axis 3 must be 8"),
        ({"k_cache": jnp.zeros((4, 64, 3, 8))}, ValueError, "h_kv must divide h_q: .*3 KV heads"),
        ({"k_cache": jnp.zeros((4, 0, 1, 8))}, ValueError, "only axis 0 of k_cache may be empty"),
    ],
)
def test_cost(changes, error, message):
    """decode_cost refuses what the call itself refuses."""
    with pytest.raises(error, match=message):
        call("decode_cost", **changes)


def test_comparing_schedules():
    other, _ = fm.get_mla_metadata(LENGTHS, 4, 1, num_sms=2, implementation="xla")
    advice = r"compare field by field, as in jax\.numpy\.array_equal"
    for compare in (lambda: other == METADATA, lambda: other != METADATA):
        with pytest.raises(TypeError, match=advice):
            compare()
        with pytest.raises(TypeError, match=advice):
            jax.jit(lambda a, b: a == b)(other, METADATA)
    assert METADATA != None  # noqa: E711
    assert NUM_SPLITS.tolist() != METADATA
    with pytest.raises(TypeError, match="unhashable type: 'TileSchedulerMetadata'"):
        hash(METADATA)


def test_arrays_may_be_numpy_arrays_and_lists():
    slots = fm.get_slot_mapping(np.array([[7, 2]], np.int32), [[0, 64]], 64)
    assert slots.tolist() == [[448, 128]]

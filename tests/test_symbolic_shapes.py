"""jax.export with symbolic sizes: an append under vmap, and a schedule as a result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jax_flashmla as fm

PAGE, D_K = 16, 576
INT32_MAX = 2**31 - 1


def struct(*shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype)


def append(implementation="auto", in_axes=(0, 0, 0), nested=False):
    def call(*arrays):
        return fm.append_kv_cache(*arrays, implementation=implementation)

    vmapped = jax.vmap(call, in_axes)
    return jax.jit(jax.vmap(vmapped) if nested else vmapped)


def append_structs(sizes, *constraints):
    """Of n examples: a cache of p pages each, and t tokens."""
    n, p, t = export.symbolic_shape(sizes, constraints=constraints)
    return append_structs_of((n,), p, t)


def append_structs_of(leading, p, t):
    return (
        struct(*leading, p, PAGE, 1, D_K, dtype=jnp.bfloat16),
        struct(*leading, t, 1, D_K, dtype=jnp.bfloat16),
        struct(*leading, t),
    )


def append_inputs(*leading, pages=3, tokens=4):
    """Slots in each example's pool, past it, and negative ones."""
    rng = np.random.default_rng(0)
    k_cache = rng.standard_normal((*leading, pages, PAGE, 1, D_K), np.float32)
    new_kv = rng.standard_normal((*leading, tokens, 1, D_K), np.float32)
    slots = rng.permuted(
        np.broadcast_to(np.arange(-2, pages * PAGE + 2), (*leading, pages * PAGE + 4)), axis=-1
    )[..., :tokens]
    k_cache, new_kv = (x.astype(jnp.bfloat16) for x in (k_cache, new_kv))
    return k_cache, new_kv, slots.astype(np.int32)


def append_expected(k_cache, new_kv, slots):
    k_cache = k_cache.copy()
    for index in np.ndindex(slots.shape):
        slot, example = slots[index], index[:-1]
        if 0 <= slot < k_cache.shape[len(example)] * PAGE:
            k_cache[(*example, slot // PAGE, slot % PAGE)] = new_kv[index]
    return k_cache


def check_append(program, *leading, **sizes):
    inputs = append_inputs(*leading, **sizes)
    actual = export.deserialize(program.serialize()).call(*map(jnp.asarray, inputs))
    np.testing.assert_array_equal(np.asarray(actual), append_expected(*inputs))


def kernel_calls(program):
    return program.mlir_module().count("custom_call @jax_flashmla_append_kv")


def export_for_both(function, *structs):
    return export.export(
        function, platforms=("cpu", "cuda"), disabled_checks=fm.EXPORT_DISABLED_CHECKS
    )(*structs)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("sizes", ["n, 3, 4", "2, p, 4", "n, p, t"])
def test_append_under_vmap(sizes):
    """It is not known whether int32 holds the slots of all examples, so the reference runs."""
    program = export_for_both(append(), *append_structs(sizes))
    assert kernel_calls(program) == 0
    check_append(program, 2)
    if "n" in sizes:
        check_append(program, 5)
    if "p" in sizes:
        check_append(program, 2, pages=7)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("sizes", "constraint"),
    [
        ("n, 3, 4", "n <= 1000"),
        ("2, p, 4", "p <= 1000000"),
        ("n, p, t", f"n*p <= {INT32_MAX // PAGE}"),
    ],
)
@pytest.mark.parametrize("implementation", ["auto", "cuda"])
def test_append_under_vmap_with_a_constraint(implementation, sizes, constraint):
    """With a constraint that bounds the slots, the kernel runs."""
    structs = append_structs(sizes, constraint)
    if implementation == "cuda":
        program = export.export(
            append("cuda"), platforms=("cuda",), disabled_checks=fm.EXPORT_DISABLED_CHECKS
        )(*structs)
        assert kernel_calls(program) == 1
        return
    program = export_for_both(append(), *structs)
    assert kernel_calls(program) == 1
    check_append(program, 2)


def test_append_under_vmap_refuses_to_promise_the_kernel():
    with pytest.raises(NotImplementedError, match=r'constraint "\S*n\S* <= 2147483647", or pass'):
        jax.eval_shape(append("cuda"), *append_structs("n, p, t"))


def test_append_under_vmap_past_int32():
    """With known sizes, and with a constraint that makes the slots too many."""
    for structs in (
        append_structs_of((2,), 2**26, 1),
        append_structs("n, p, t", f"n*p >= {INT32_MAX}"),
    ):
        with pytest.raises(NotImplementedError, match="exceeds the int32 range of slots"):
            jax.eval_shape(append(), *structs)


def test_append_under_nested_vmaps():
    m, n, p, t = export.symbolic_shape("m, n, p, t")
    program = export.export(append(nested=True))(*append_structs_of((m, n), p, t))
    check_append(program, 2, 3)


def test_append_of_tokens_that_are_not_mapped():
    n, p = export.symbolic_shape("n, p")
    k_cache, new_kv, slots = append_structs_of((n,), p, 4)
    new_kv = struct(*new_kv.shape[1:], dtype=new_kv.dtype)
    program = export.export(append(in_axes=(0, None, 0)))(k_cache, new_kv, slots)
    k_cache, new_kv, slots = append_inputs(3)
    actual = program.call(k_cache, new_kv[0], slots)
    expected = append_expected(k_cache, np.broadcast_to(new_kv[:1], new_kv.shape), slots)
    np.testing.assert_array_equal(np.asarray(actual), expected)


def make(lengths):
    return fm.get_mla_metadata(lengths, 16, 1, num_sms=7, implementation="xla")


def make_fixed(lengths):
    options = {"fixed_split_size": 64, "max_seqlen": 300, "implementation": "xla"}
    return fm.get_mla_metadata(lengths, 16, 1, **options)


@pytest.mark.parametrize("function", [make, make_fixed])
def test_schedule_of_a_symbolic_batch_as_result(function):
    """Once it holds arrays it has a batch and a number of parts, and a decode can use it."""
    (b,) = export.symbolic_shape("b")
    program = export.export(jax.jit(function))(struct(b))
    loaded = export.deserialize(program.serialize())
    for lengths in ([70], [300, 0, 64, 128]):
        lengths = jnp.array(lengths, jnp.int32)
        (metadata, num_splits), expected = loaded.call(lengths), function(lengths)
        assert jax.tree.structure(metadata) == jax.tree.structure(expected[0])
        assert (metadata.batch, metadata.num_parts) == (len(lengths), expected[0].num_parts)
        for a, e in zip(
            jax.tree.leaves((metadata, num_splits)), jax.tree.leaves(expected), strict=True
        ):
            np.testing.assert_array_equal(a, e)
        arrays = (
            jnp.ones((len(lengths), 1, 16, 8)), jnp.ones((20, 64, 1, 8)),
            jnp.arange(5 * len(lengths), dtype=jnp.int32).reshape(-1, 5), lengths,
        )  # fmt: skip
        jax.eval_shape(
            lambda *args: fm.flash_mla_with_kvcache(*args[:4], 4, *args[4:]),
            *arrays, metadata, num_splits,
        )  # fmt: skip


def test_schedule_of_a_symbolic_batch_as_argument_and_result():
    """One program takes a schedule that another one made, and returns it."""
    (b,) = export.symbolic_shape("b")
    made = jax.eval_shape(make, struct(b))
    program = export.export(jax.jit(lambda metadata, num_splits: (metadata, num_splits + 1)))(*made)
    loaded = export.deserialize(program.serialize())
    metadata, num_splits = make(jnp.array([70, 3], jnp.int32))
    again, following = loaded.call(metadata, num_splits)
    np.testing.assert_array_equal(again.part_bounds, metadata.part_bounds)
    np.testing.assert_array_equal(following, num_splits + 1)


def decode_structs(b="b", s_q="1", h_q="16", pages="p", page="64", h_kv="1", width="w"):
    sizes = export.symbolic_shape(", ".join((b, s_q, h_q, pages, page, h_kv, width)))
    b, s_q, h_q, pages, page, h_kv, width = sizes
    return (
        struct(b, s_q, h_q, D_K, dtype=jnp.bfloat16),
        struct(pages, page, h_kv, D_K, dtype=jnp.bfloat16),
        struct(b, width),
        struct(b),
    )


def decode(*arrays):
    return fm.flash_mla_with_kvcache(*arrays, 512)


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        (
            {"s_q": "s"},
            TypeError,
            r"only axis 0 of q may be symbolic .*got shape \[b, s, 16, 576\]",
        ),
        ({"h_q": "h"}, TypeError, r"only axis 0 of q may be symbolic .*got shape \[b, 1, h, 576\]"),
        (
            {"page": "t"},
            TypeError,
            r"only axis 0 of k_cache .*got shape \[p, t, 1, 576\]; export one",
        ),
        ({"h_kv": "h"}, TypeError, r"only axis 0 of k_cache .*got shape \[p, 64, h, 576\]"),
        ({"b": "b - 1"}, ValueError, r'q has shape \[b - 1, .*axis 0 may be 0; .* "b - 1 >= 1"'),
        ({"pages": "p - 1"}, ValueError, r'k_cache .*axis 0 may be 0; .* "p - 1 >= 1"'),
        ({"width": "w - 1"}, ValueError, r'block_table .*axis 1 may be 0; .* "w - 1 >= 1"'),
    ],
)
def test_symbolic_sizes_that_decode_refuses(sizes, error, message):
    with pytest.raises(error, match=message):
        jax.eval_shape(decode, *decode_structs(**sizes))


def test_constraints_that_the_messages_name():
    """With them the program is exported."""
    for constraint in ("b - 1 >= 1", "b >= 2"):
        b, w = export.symbolic_shape("b, w", constraints=[constraint, "w - 1 >= 1"])
        arrays = (
            struct(b - 1, 1, 16, D_K, dtype=jnp.bfloat16),
            struct(8, 64, 1, D_K, dtype=jnp.bfloat16),
            struct(b - 1, w - 1),
            struct(b - 1),
        )
        run = jax.jit(lambda *a: (decode(*a), make(a[3])))
        out = export.export(run, platforms=("cpu",))(*arrays).out_avals[0]
        assert out.shape == (b - 1, 1, 16, 512)
    with pytest.raises(ValueError, match=r'^cache_seqlens has shape \[b - 1\].* "b - 1 >= 1"'):
        jax.eval_shape(make, struct(export.symbolic_shape("b")[0] - 1))


@pytest.mark.parametrize(
    ("function", "shapes", "message"),
    [
        ("get_slot_mapping", ("n-1 w", "n-1 t"), r"block_table has shape \[n - 1, w\].* axis 0"),
        ("get_slot_mapping", ("b n-1", "b t"), r"block_table has shape \[b, n - 1\].* axis 1"),
        (
            "merge_attention_states",
            ("n-1 b s h d", "n-1 b h s"),
            r"outs has shape \[n - 1, .*axis 0",
        ),
    ],
)
def test_symbolic_sizes_that_other_functions_refuse(function, shapes, message):
    """Where they may be 0; with a constraint the function is exported."""

    def call(*arrays):
        return getattr(fm, function)(*arrays, *([16] if function == "get_slot_mapping" else []))

    def structs(*constraints):
        scope = export.SymbolicScope(constraints)
        dtypes = [jnp.int32, jnp.int32] if function == "get_slot_mapping" else [jnp.float32] * 2
        return [
            struct(*export.symbolic_shape(shape.replace(" ", ", "), scope=scope), dtype=dtype)
            for shape, dtype in zip(shapes, dtypes, strict=True)
        ]

    with pytest.raises(ValueError, match=f'^{message} may be 0; .* "n - 1 >= 1"'):
        jax.eval_shape(call, *structs())
    export.export(jax.jit(call))(*structs("n - 1 >= 1"))

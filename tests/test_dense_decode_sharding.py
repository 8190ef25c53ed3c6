"""Dense decode on several devices: data, tensor and context parallelism, what H200s exchange."""

import functools
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import D_K, D_V, Case
from dense_calls import decode, decode_structs
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lowering import (
    SCHEDULE_AND_DECODE,
    cpu_mesh,
    custom_calls,
    h200_mesh,
    placed,
    struct,
    text_for_cuda,
)
from sharded import Split, on_mesh, run, split_pages

import jax_flashmla as fm
from jax_flashmla import _ffi

pytestmark = pytest.mark.usefixtures("quick_compile")

BOTH_TYPES = pytest.mark.parametrize("types", [AxisType.Auto, AxisType.Explicit], ids=str)
# Tokens of each sequence; a device has 2 or 4 pages of 64 of it. Some sequences end in the middle
# of a device's pages, some just after the first token, so that 4 new tokens lie on two devices.
LENGTHS = [258, 130, 0, 3, 512, 257, 385, 64]


def make_inputs(s_q=4, lengths=LENGTHS, h_q=8, max_blocks=8, **options):
    case = Case(len(lengths), s_q, 0, h_q, **options)
    return cases.make_inputs(case, lengths=lengths, max_blocks=max_blocks)


def check(inputs, split, mesh, implementation="xla"):
    """Runs the step on the mesh and compares it with one call on one device."""
    expected = fm.flash_mla_with_kvcache(
        *inputs.device_arrays(), D_V, causal=True, implementation="xla"
    )
    data, context = (
        int(np.prod([mesh.shape[axis] for axis in axes])) for axes in (split.data, split.context)
    )
    actual = run(split_pages(inputs, data, context), split, mesh, implementation=implementation)
    for x, spec in zip(actual, split.out_specs, strict=True):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)
    cases.assert_decode_close(actual, tuple(np.asarray(x, np.float64) for x in expected))
    return actual


# Results.


@BOTH_TYPES
@pytest.mark.parametrize("axes", ["x", "xy"])
@pytest.mark.parametrize("kind", ["data", "tensor", "context"])
def test_one_kind(kind, axes, types):
    """Over all devices of a mesh of one axis, and of one of two."""
    mesh = cpu_mesh((4,) if axes == "x" else (2, 2), tuple(axes), types)
    check(make_inputs(), Split(**{kind: tuple(axes)}), mesh)


@pytest.mark.parametrize("kind", ["data", "tensor", "context"])
def test_one_query(kind):
    check(make_inputs(s_q=1), Split(**{kind: ("x",)}), cpu_mesh((4,), ("x",)))


@BOTH_TYPES
def test_two_kinds(types):
    """An argument is the same on all devices along an axis that does not split it."""
    mesh = cpu_mesh((2, 4), ("x", "y"), types)
    check(make_inputs(), Split(tensor=("x",), context=("y",)), mesh)


@BOTH_TYPES
def test_all_three_kinds(types):
    mesh = cpu_mesh((2, 2, 2), ("data", "tensor", "context"), types)
    check(make_inputs(), Split(("data",), ("tensor",), ("context",)), mesh)


def test_an_invalid_sequence_on_one_device_of_several():
    split, mesh = Split(context=("x",)), cpu_mesh((4,), ("x",))
    inputs = split_pages(make_inputs(), 1, 4)
    inputs.block_table[0, 4] = -1  # of the third device
    out, lse = run(inputs, split, mesh, implementation="xla")
    for i in range(len(LENGTHS)):
        assert (np.isnan(np.asarray(out[i], np.float32)) == (i == 0)).all()
        assert (np.isnan(lse[i]) == (i == 0)).all()


def test_kv_heads_are_split_with_their_query_heads():
    mesh = cpu_mesh((2,), ("x",))
    inputs = make_inputs(h_kv=2)
    specs = P(None, None, "x"), P(None, None, "x"), P(), P()
    f = jax.shard_map(
        lambda *args: decode(*args, causal=True),
        mesh=mesh,
        in_specs=specs,
        out_specs=(P(None, None, "x"), P(None, "x")),
    )
    expected = cases.expected_decode(inputs, causal=True)
    cases.assert_decode_close(jax.jit(f)(*inputs.device_arrays()), expected)


@BOTH_TYPES
def test_fixed_splits_on_each_device(types):
    """A device's schedule splits its sequences as the schedule of the whole batch does."""
    mesh, inputs = cpu_mesh((4,), ("x",), types), make_inputs(s_q=1)
    split = split_pages(inputs, 4, 1)

    def step(q, k_cache, table, lengths):
        schedule = fm.get_mla_metadata(lengths, 8, 1, fixed_split_size=64, max_seqlen=512)
        return decode(q, k_cache, table, lengths, schedule=schedule), schedule[1][None]

    f = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=P("x"), out_specs=P("x")))
    arrays = [jax.device_put(x, NamedSharding(mesh, P("x"))) for x in split.device_arrays()]
    actual, num_splits = f(*arrays)
    cases.assert_decode_close(actual, cases.expected_decode(inputs))
    splits = np.maximum(-(-np.array(LENGTHS) // 64), 1)
    np.testing.assert_array_equal(np.diff(num_splits).reshape(-1), splits)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_merge_across_is_merge(dtype):
    """Bit for bit, for dtypes of 16 and 32 bits, along two axes in the given order."""
    rng = np.random.default_rng(0)
    outs = jnp.asarray(rng.standard_normal((4, 3, 2, 5, 6)), dtype)
    lses = rng.standard_normal((4, 3, 5, 2)).astype(np.float32)
    lses[:, 0] = np.inf
    lses[2, 1] = np.nan
    lses[1:, 2, 0] = np.inf
    mesh = cpu_mesh((2, 2), ("x", "y"))
    across = jax.jit(
        jax.shard_map(
            lambda out, lse: fm.merge_attention_states_across(out[0], lse[0], ("x", "y")),
            mesh=mesh,
            in_specs=P(("x", "y")),
            out_specs=P(),
        )
    )
    results = across(outs, lses), jax.jit(fm.merge_attention_states)(outs, lses)
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_merge_across_stays_split_over_other_axes():
    mesh = cpu_mesh((2, 2), ("x", "y"))

    def f(out_specs):
        return jax.shard_map(
            lambda out, lse: fm.merge_attention_states_across(out, lse, "x"),
            mesh=mesh,
            in_specs=P(("x", "y")),
            out_specs=out_specs,
        )

    structs = struct((4, 1, 5, 6)), struct((4, 5, 1), jnp.float32)
    jax.eval_shape(f(P("y")), *structs)
    with pytest.raises(ValueError, match="replicat"):
        jax.eval_shape(f(P()), *structs)


def gpu_mesh(sizes, names):
    gpus, needed = _ffi.local_cuda_devices(), int(np.prod(sizes))
    if len(gpus) < needed:
        pytest.skip(f"needs {needed} GPUs, there are {len(gpus)}")
    return jax.sharding.Mesh(np.array(gpus[:needed]).reshape(sizes), names)


@pytest.mark.gpu
@pytest.mark.parametrize("s_q", [1, 4])
def test_on_a_mesh_of_one_gpu(s_q):
    mesh = gpu_mesh((1, 1, 1), ("x", "y", "z"))
    check(make_inputs(s_q, h_q=128), Split(("x",), ("y",), ("z",)), mesh, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("s_q", [1, 4])
@pytest.mark.parametrize("kind", ["data", "tensor", "context"])
def test_on_two_gpus(kind, s_q):
    """A long sequence, and one whose new tokens lie on both devices if there are 4 of them."""
    mesh = gpu_mesh((2,), ("x",))
    inputs = make_inputs(s_q, [131072, 65538], h_q=128, max_blocks=2048)
    check(inputs, Split(**{kind: ("x",)}), mesh, "cuda")


# The snippets of docs/parallelism.md.


@functools.cache
def docs():
    """What the snippets define, on meshes of 8 CPU devices."""
    text = Path(__file__).parents[1].joinpath("docs/parallelism.md").read_text(encoding="utf-8")
    names = {}
    on_cpus = functools.partial(jax.make_mesh, devices=jax.devices("cpu"))
    with mock.patch.object(jax, "make_mesh", on_cpus):  # where there are GPUs, too
        for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            exec(code, names)
    return names


@pytest.mark.parametrize("kind", ["data", "tensor"])
def test_snippets(kind):
    inputs = make_inputs()
    split = split_pages(inputs, 8 if kind == "data" else 1, 1)
    mesh, specs, f = (docs()[f"{kind}_{name}"] for name in ("mesh", "specs", "parallel"))
    actual = f(*docs()["place"](mesh, specs, *split.device_arrays()))
    cases.assert_decode_close(actual, cases.expected_decode(inputs, causal=True))


@pytest.mark.parametrize(("kind", "data", "context"), [("context", 1, 8), ("all", 2, 2)])
def test_snippets_that_append(kind, data, context):
    """The cache comes without the new tokens, which are NaN in it, and must end with them."""
    lengths = [258, 130, 4, 65, 512, 257, 385, 66]
    s_q, page = 4, 64
    inputs = make_inputs(s_q, lengths)
    full = split_pages(inputs, data, context)
    positions = np.array(lengths)[:, None] - s_q + np.arange(s_q)
    pages = np.take_along_axis(inputs.block_table, positions // page, axis=1)
    new_kv = inputs.k_cache[pages, positions % page, 0]  # [b, s_q, d_k]
    without = inputs.replace(k_cache=inputs.k_cache.copy())
    without.k_cache[pages, positions % page] = np.nan
    q, k_cache, table, seqlens = split_pages(without, data, context).device_arrays()

    mesh, specs, f = (docs()[f"{kind}_{name}"] for name in ("mesh", "specs", "parallel"))
    *actual, k_cache = f(
        *docs()["place"](mesh, specs, q, jnp.asarray(new_kv), k_cache, table, seqlens)
    )
    cases.assert_decode_close(actual, cases.expected_decode(inputs, causal=True))
    np.testing.assert_array_equal(np.asarray(k_cache, np.float32), full.k_cache.astype(np.float32))


# Several processes.


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def run_processes(count, out):
    """What process 0 of `count` has written."""
    script, port = Path(__file__).with_name("two_processes.py"), free_port()
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)
    }  # fmt: skip
    running = [
        subprocess.Popen(
            [sys.executable, script, str(port), str(process), str(count), str(out)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for process in range(count)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=120)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * count, "\n".join(outputs)
    return np.load(out)


def test_two_processes(tmp_path):
    """Of two devices each, joined by jax.distributed: as one process with all four."""
    one, two = (run_processes(count, tmp_path / f"{count}.npz") for count in (1, 2))
    assert one["owners"].tolist() == [[0, 0], [0, 0]]
    assert two["owners"].tolist() == [[0, 0], [1, 1]]
    assert np.isfinite(one["out"]).all()
    for name in ("out", "lse"):
        np.testing.assert_array_equal(one[name], two[name])


# Misuse inside jax.shard_map.


def test_schedule_of_the_global_batch_raises():
    mesh, (q, k_cache, table, lengths) = cpu_mesh((2,), ("x",)), decode_structs()
    specs = (P("x"), P(), P("x"), P("x"), P())

    def f(q, k_cache, table, lengths, schedule):
        return decode(q, k_cache, table, lengths, schedule=schedule)

    schedule = jax.eval_shape(lambda x: fm.get_mla_metadata(x, 16, 1), lengths)
    with pytest.raises(ValueError, match=r"batch=4, but this call has 2 .*in jax\.shard_map.*own"):
        jax.eval_shape(
            jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P("x")),
            q, k_cache, table, lengths, schedule,
        )  # fmt: skip


def test_schedule_of_all_heads_raises():
    mesh, structs = cpu_mesh((2,), ("x",)), decode_structs()

    def f(*args):
        schedule = fm.get_mla_metadata(args[3], 16, 1)
        return decode(*args, schedule=schedule)

    specs = P(None, None, "x"), P(), P(), P()
    with pytest.raises(ValueError, match="num_heads_per_head_k=16, but this call has 8"):
        jax.eval_shape(
            jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P(None, "x")), *structs
        )


def test_heads_that_the_mesh_does_not_divide():
    """JAX's own error, which names the argument, its shape and the mesh axis."""
    f = jax.shard_map(
        decode,
        mesh=cpu_mesh((3,), ("x",)),
        in_specs=(P(None, None, "x"), P(), P(), P()),
        out_specs=(P(None, None, "x"), P(None, "x")),
    )
    with pytest.raises(ValueError, match=r"(?s)not evenly divisible.*16.*'x' .*size 3"):
        jax.eval_shape(f, *decode_structs())


def test_fewer_query_heads_than_kv_heads_on_a_device():
    f = jax.shard_map(
        decode,
        mesh=cpu_mesh((8,), ("x",)),
        in_specs=(P(None, None, "x"), P(), P(), P()),
        out_specs=(P(None, None, "x"), P(None, "x")),
    )
    with pytest.raises(ValueError, match="k_cache has 2 KV heads, q has 1 heads"):
        jax.eval_shape(f, *decode_structs(h_q=8, h_kv=2))


# Programs for 8 H200s.


@pytest.mark.usefixtures("kernels")
@BOTH_TYPES
def test_a_call_on_each_device(types):
    mesh = cpu_mesh((2, 2), ("x", "y"), types)
    split = Split(data=("x",), tensor=("y",))
    with jax.set_mesh(mesh):
        structs = placed(decode_structs(), mesh, *split.in_specs)
        text = text_for_cuda(on_mesh(split, mesh), *structs)
    assert "tensor<2x1x32x576xbf16>" not in custom_calls(text)[SCHEDULE_AND_DECODE][0]
    assert "tensor<2x1x8x576xbf16>" in custom_calls(text)[SCHEDULE_AND_DECODE][0]
    assert "all_gather" not in text


def collectives(hlo):
    """(name, shapes of the results) of each collective, blocking or asynchronous."""
    names = r"all-gather|all-reduce|all-to-all|reduce-scatter|collective-\w+"
    found = re.findall(rf"= (.*?) ({names})(?:-start)?\(", hlo)
    return [(name, re.findall(r"\w+\[[\d,]*\]", shapes)) for shapes, name in found]


B, S_Q, H_Q, PAGES = 8, 4, 128, 8192


@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize(
    ("sizes", "split", "gathered"),
    [
        ((8,), Split(data=("x",)), None),
        ((8,), Split(tensor=("x",)), None),
        ((8,), Split(context=("x",)), (8, B, S_Q, H_Q)),
        ((2, 4), Split(context=("x", "y")), (8, B, S_Q, H_Q)),
        ((2, 2, 2), Split(("x",), ("y",), ("z",)), (2, B // 2, S_Q, H_Q // 2)),
    ],
    ids=["data", "tensor", "context", "context-2-axes", "all-three"],
)
def test_what_8_devices_exchange(sizes, split, gathered):
    """Nothing, or one all-gather of partial results; never a byte of the cache."""
    mesh = h200_mesh(sizes, ("x", "y", "z")[: len(sizes)])
    structs = (
        struct((B, S_Q, H_Q, D_K)),
        struct((PAGES, 64, 1, D_K)),
        struct((B, 64), jnp.int32),
        struct((B,), jnp.int32),
    )
    step = on_mesh(split, mesh, implementation="cuda")
    compiled = step.lower(*placed(structs, mesh, *split.in_specs)).compile()
    hlo = compiled.as_text()
    ours = re.findall(r'custom_call_target="(jax_flashmla_\w+)"', hlo)
    assert set(ours) == {SCHEDULE_AND_DECODE}
    found = collectives(hlo)
    if gathered is None:
        assert found == []
    else:
        n, *part = gathered
        ((name, shapes),) = found
        assert name == "all-gather"
        # 16 bits each: the columns of out, and two for a float32.
        shape = ",".join(map(str, (n, *part, D_V + 2)))
        assert shapes[-1] == f"u16[{shape}]"
    pools = int(np.prod([mesh.shape[axis] for axis in split.data + split.context]))
    pool = PAGES // pools * 64 * D_K * 2  # bytes
    memory = compiled.memory_analysis()
    assert pool <= memory.argument_size_in_bytes < pool + 2**24
    assert memory.temp_size_in_bytes < pool, "room for a second copy of the pages"

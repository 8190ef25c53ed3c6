"""Every op on several devices: in jax.shard_map each device makes its own call."""

import jax
import numpy as np
import ops
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lowering import cpu_mesh, custom_calls, h200_mesh, text_for_cuda
from op_examples import Split

BOTH_TYPES = pytest.mark.parametrize("types", [AxisType.Auto, AxisType.Explicit], ids=str)
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "reduce-scatter", "collective-")


def splits():
    for row in ops.ROWS:
        for kind in row.splits:
            yield pytest.param(row, Split(row, kind), id=f"{row}-{kind}", marks=row.marks)


EACH_SPLIT = pytest.mark.parametrize(("row", "split"), list(splits()))
EACH_SPLIT_OF_KERNELS = pytest.mark.parametrize(
    ("row", "split"), [x for x in splits() if x.values[0].targets]
)


def on_mesh(row, split, mesh, implementation="auto"):
    return jax.jit(
        jax.shard_map(
            row.with_implementation(implementation),
            mesh=mesh,
            in_specs=split.in_specs,
            out_specs=split.out_specs,
        )
    )


def placed(arrays, split, mesh):
    """The arrays on the mesh, each split according to its spec."""
    return [
        jax.tree.map(lambda x, spec=spec: jax.device_put(x, NamedSharding(mesh, spec)), operand)
        for operand, spec in zip(arrays, split.in_specs, strict=True)
    ]


@pytest.mark.usefixtures("quick_compile")
@BOTH_TYPES
@EACH_SPLIT
def test_each_device_gives_what_its_call_gives(row, split, types):
    mesh = cpu_mesh((2,), ("x",), types)
    arrays, examples = split.joined(2)
    with jax.set_mesh(mesh):
        results = on_mesh(row, split, mesh)(*placed(arrays, split, mesh))
    for x, spec in zip(results, split.out_specs, strict=True):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)
    parts = [np.split(np.asarray(x), 2, a) for x, a in zip(results, split.out_axes, strict=True)]
    for device, example in enumerate(examples):
        row.check([part[device] for part in parts], example)


def varying_operands():
    for row in ops.ROWS:
        if row.primitive:
            for i, name in enumerate(row.names):
                yield pytest.param(row, i, id=f"{row}-{name}", marks=row.marks)


@pytest.mark.parametrize(("row", "varying"), list(varying_operands()))
def test_varying_result_is_not_taken_for_replicated(row, varying):
    """If any operand differs by device, the results do."""
    mesh = cpu_mesh((2,), ("x",))
    structs = row.structs()
    structs[varying] = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((2 * x.shape[0], *x.shape[1:]), x.dtype), structs[varying]
    )
    specs = tuple(P("x") if i == varying else P() for i in range(len(structs)))

    def f(out_specs):
        return jax.shard_map(row.run, mesh=mesh, in_specs=specs, out_specs=out_specs)

    jax.eval_shape(f(P("x")), *structs)
    with pytest.raises(ValueError, match="replicat"):
        jax.eval_shape(f(P()), *structs)


@ops.each(lambda row: row.primitive)
def test_results_of_no_examples_have_the_type_of_others(row):
    """A vmap over an axis of size 0: if an operand differs by device, the results may too."""
    mesh = cpu_mesh((2,), ("x",))
    *same, last = [
        jax.tree.map(lambda x: jax.ShapeDtypeStruct((0, *x.shape), x.dtype), operand)
        for operand in row.structs()
    ]
    last = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((0, 2 * x.shape[1], *x.shape[2:]), x.dtype), last
    )
    specs = (*(P() for _ in same), P(None, "x"))

    def f(out_specs):
        return jax.shard_map(jax.vmap(row.run), mesh=mesh, in_specs=specs, out_specs=out_specs)

    jax.eval_shape(f(P(None, "x")), *same, last)
    with pytest.raises(ValueError, match="replicat"):
        jax.eval_shape(f(P()), *same, last)


# Where XLA would have to partition the call.


def structs_on_mesh(split, mesh):
    structs = split.structs(2)
    return [
        jax.tree.map(
            lambda x, spec=spec: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
            ),
            operand,
        )
        for operand, spec in zip(structs, split.in_specs, strict=True)
    ]


def global_call(row):
    """The op on global arrays; a schedule among them is made for the whole batch."""
    return row.targets and not any(isinstance(x, ops.Schedule) for x in row.operands)


@pytest.mark.usefixtures("kernels")
@ops.each(global_call)
def test_jit_over_several_devices_raises(row):
    split, mesh = Split(row, "data"), cpu_mesh((2,), ("x",))
    structs = structs_on_mesh(split, mesh)
    message = rf"^{row.name_in_messages} is called in a jit over 2 devices, outside jax\.shard_map"
    with pytest.raises(NotImplementedError, match=message):
        text_for_cuda(row.run, *structs)
    text_for_cuda(row.with_implementation("xla"), *structs)


@pytest.mark.usefixtures("kernels")
@ops.each(lambda row: row.targets)
def test_partly_manual_shard_map_raises(row):
    split, mesh = Split(row, "data"), cpu_mesh((2, 2), ("x", "y"))
    f = jax.shard_map(
        row.run, mesh=mesh, in_specs=split.in_specs, out_specs=split.out_specs, axis_names={"x"}
    )
    message = rf"^{row.name_in_messages} is .*leaves the mesh axes \{{'y': 2\}} to XLA"
    with pytest.raises(NotImplementedError, match=message):
        text_for_cuda(f, *structs_on_mesh(split, mesh))


@ops.each(lambda row: row.primitive and global_call(row))
def test_explicit_sharding_outside_shard_map_raises(row):
    """Any of the operands may be the sharded one."""
    split, mesh = Split(row, "data"), cpu_mesh((2,), ("x",), AxisType.Explicit)
    for i in range(len(row.operands)):
        if split.axis_of(row.operands[i].axes) is None:
            continue
        with jax.set_mesh(mesh):
            structs = split.structs(2, sharding=NamedSharding(mesh, P()))
            structs[i] = structs_on_mesh(split, mesh)[i]
            message = rf"^{row.name_in_messages} got .*explicit mesh axes.*jax\.shard_map"
            with pytest.raises(NotImplementedError, match=message):
                jax.eval_shape(row.run, *structs)


# Programs for several H200s.


@pytest.mark.usefixtures("kernels")
@BOTH_TYPES
@EACH_SPLIT_OF_KERNELS
def test_a_call_of_each_devices_own_shapes(row, split, types):
    mesh = cpu_mesh((2,), ("x",), types)
    with jax.set_mesh(mesh):
        text = text_for_cuda(on_mesh(row, split, mesh), *structs_on_mesh(split, mesh))
    assert "all_gather" not in text
    alone = text_for_cuda(row.run, *row.structs())

    for target in row.targets:
        actual, expected = (custom_calls(x)[target] for x in (text, alone))
        # The types of operands and results.
        assert [x.split(" : ")[-1] for x in actual] == [x.split(" : ")[-1] for x in expected]


@pytest.mark.usefixtures("compiled_kernels")
@EACH_SPLIT_OF_KERNELS
def test_devices_exchange_nothing(row, split):
    mesh = h200_mesh((2,), ("x",))
    program = on_mesh(row, split, mesh, "cuda").lower(*structs_on_mesh(split, mesh)).compile()
    hlo = program.as_text()
    assert all(f'custom_call_target="{target}"' in hlo for target in row.targets)
    assert not [name for name in COLLECTIVES if name in hlo]

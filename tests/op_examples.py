"""Examples of an op's operands, stacked for jax.vmap and jax.lax.scan or joined for a mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P


def stacked(row, sizes, *in_axes):
    """The operands for nested vmaps, the outermost first, and those of each example.

    Args:
      row: of the table of ops.
      sizes: how many examples each vmap maps.
      in_axes: of each vmap, an axis or None for each operand.

    Returns:
      The operands as jax arrays; {index of an example: its operands as numpy arrays}.
    """
    arrays, values = [], []
    for i, axes in enumerate(zip(*in_axes, strict=True)):
        levels = [level for level, axis in enumerate(axes) if axis is not None]
        drawn = {
            index: row.draw(i, (7, *index)) for index in np.ndindex(*(sizes[x] for x in levels))
        }
        values.append([drawn[tuple(index[x] for x in levels)] for index in np.ndindex(*sizes)])

        def stack(*leaves, levels=levels, axes=axes):
            value = np.stack(leaves).reshape(*(sizes[x] for x in levels), *leaves[0].shape)
            for place in reversed(range(len(levels))):  # the innermost axis goes into place first
                value = np.moveaxis(value, place, place + axes[levels[place]])
            return jnp.asarray(value)

        arrays.append(jax.tree.map(stack, *drawn.values()))
    return arrays, dict(zip(np.ndindex(*sizes), map(list, zip(*values, strict=True)), strict=True))


@dataclasses.dataclass(frozen=True)
class Split:
    """How jax.shard_map splits a call over one mesh axis, by the names of the axes it splits."""

    row: object
    kind: str
    mesh_axis: str = "x"

    @property
    def names(self):
        return self.row.splits[self.kind]

    def axis_of(self, axes):
        """Which of these axes is split, or None."""
        found = [i for i, name in enumerate(axes.split()) if name in self.names]
        return found[0] if found else None

    def spec(self, axis):
        return P() if axis is None else P(*[None] * axis, self.mesh_axis)

    @property
    def in_specs(self):
        return tuple(self.spec(self.axis_of(x.axes)) for x in self.row.operands)

    @property
    def out_axes(self):
        """The axis along which each result is joined; the first where none of them is split."""
        return [self.axis_of(result.axes) or 0 for result in self.row.results]

    @property
    def out_specs(self):
        return tuple(map(self.spec, self.out_axes))

    def joined(self, count):
        """The operands of `count` devices in global arrays, and those of each device."""
        arrays, values = [], []
        for i, operand in enumerate(self.row.operands):
            axis = self.axis_of(operand.axes)
            drawn = [
                self.row.draw(i, 0 if axis is None else (11, device)) for device in range(count)
            ]
            join = [
                np.concatenate(leaves, axis or 0)
                for leaves in zip(*map(jax.tree.leaves, drawn), strict=True)
            ]
            whole = (
                drawn[0] if axis is None else jax.tree.unflatten(jax.tree.structure(drawn[0]), join)
            )
            arrays.append(jax.tree.map(jnp.asarray, whole))
            values.append(drawn)
        return arrays, [list(x) for x in zip(*values, strict=True)]

    def structs(self, count, **options):
        """The shapes of the global arrays."""

        def widen(operand, struct):
            axis = self.axis_of(operand.axes)
            shape = [n * count if i == axis else n for i, n in enumerate(struct.shape)]
            return jax.ShapeDtypeStruct(shape, struct.dtype, **options)

        return [
            jax.tree.map(functools.partial(widen, operand), structs)
            for operand, structs in zip(self.row.operands, self.row.structs(), strict=True)
        ]

"""One model on several devices, through jax.shard_map.

dp: each device has all weights, and some of the sequences with their pages.
tp: each device has some of the heads and a part of each MLP's width, and all pages: all heads share
    a sequence's latents. Two sums over the devices a layer.
"""

import dataclasses

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .weights import Leaf, leaves

AXIS = "device"


@dataclasses.dataclass(frozen=True)
class Layout:
    """How weights and sequences lie on the devices; `Layout()` is one device."""

    kind: str | None = None  # "dp" or "tp"
    mesh: Mesh | None = None

    @classmethod
    def over(cls, kind, devices=None):
        """Over the given devices, by default all that there are; kind None takes one."""
        if kind is None:
            return cls()
        if kind not in ("dp", "tp"):
            raise ValueError(f'parallel must be "dp" or "tp", got {kind!r}')
        return cls(kind, Mesh(np.array(devices or jax.devices()), (AXIS,)))

    @property
    def size(self):
        return 1 if self.mesh is None else self.mesh.size

    @property
    def groups(self):
        """Into how many parts the sequences are split."""
        return self.size if self.kind == "dp" else 1

    @property
    def tensor_axis(self):
        return AXIS if self.kind == "tp" else None

    @property
    def by_sequence(self):
        """The spec of arrays with a leading axis of sequences or pages."""
        return PartitionSpec(AXIS) if self.kind == "dp" else PartitionSpec()

    def check(self, config, batch):
        """Raises where the model or the batch does not divide."""
        sizes = {"batch": batch} if self.kind == "dp" else {}
        if self.kind == "tp":
            sizes = {"heads": config.heads, "mlp_width": config.mlp_width}
            sizes |= {"expert_width": config.expert_width} if config.experts else {}
        for name, size in sizes.items():
            if size % self.size:
                raise ValueError(f"{self.kind} over {self.size} devices: {name} is {size}")

    def sharding(self, spec):
        """None: the default device."""
        return None if self.mesh is None else NamedSharding(self.mesh, spec)

    def place(self, leaf):
        """The sharding of a parameter, for weights.py."""
        return self.sharding(leaf.spec(self.tensor_axis))

    def params(self, config):
        """The specs of all parameters."""
        return jax.tree.map(
            lambda leaf: leaf.spec(self.tensor_axis),
            leaves(config),
            is_leaf=lambda x: isinstance(x, Leaf),
        )

    def put(self, x, spec):
        return x if self.mesh is None else jax.device_put(x, self.sharding(spec))

    def shard(self, function, in_specs, out_specs):
        """A function of whole arrays, made of one of a device's arrays; for use inside jit."""
        if self.mesh is None:
            return function
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs)

    def jit(self, function, in_specs, out_specs, **options):
        """jax.jit of a function of one device's arrays."""
        return jax.jit(self.shard(function, in_specs, out_specs), **options)

    def device_key(self, key):
        """Inside a jitted function: devices with different sequences draw different numbers."""
        return jax.random.fold_in(key, jax.lax.axis_index(AXIS)) if self.kind == "dp" else key

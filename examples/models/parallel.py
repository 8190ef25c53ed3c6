"""One model on several devices, with jax.shard_map.

dp: each device has all weights, and some of the sequences with their pages.
tp: each device has some of the heads and a part of each MLP's width. It has all pages, because all
    heads of a sequence share its cache. Each layer needs two sums over the devices.
"""

import dataclasses

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .weights import Leaf, leaves

AXIS = "device"


@dataclasses.dataclass(frozen=True)
class Layout:
    """How weights and sequences are split over devices. `Layout()` is for one device."""

    kind: str | None = None  # "dp" or "tp"
    mesh: Mesh | None = None

    @classmethod
    def over(cls, kind, devices=None):
        """A layout over these devices, by default all. With kind None, over one device."""
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
        """The number of parts that the sequences are split into."""
        return self.size if self.kind == "dp" else 1

    @property
    def tensor_axis(self):
        return AXIS if self.kind == "tp" else None

    @property
    def by_sequence(self):
        """The PartitionSpec of arrays whose first axis is sequences or pages."""
        return PartitionSpec(AXIS) if self.kind == "dp" else PartitionSpec()

    def check(self, config, batch):
        """Raises ValueError if the number of devices does not divide a size of model or batch."""
        sizes = {"batch": batch} if self.kind == "dp" else {}
        if self.kind == "tp":
            sizes = {"heads": config.heads}
            layers = range(config.layers)
            sizes |= {"mlp_width": config.mlp_width} if any(map(config.has_mlp, layers)) else {}
            if any(map(config.has_experts, layers)):
                sizes["expert_width"] = config.expert_width
        for name, size in sizes.items():
            if size % self.size:
                raise ValueError(f"{self.kind} over {self.size} devices: {name} is {size}")

    def sharding(self, spec):
        """The NamedSharding for a spec, or None for the default device."""
        return None if self.mesh is None else NamedSharding(self.mesh, spec)

    def place(self, leaf):
        """The sharding of a parameter, for `place` in weights.py."""
        return self.sharding(leaf.spec(self.tensor_axis))

    def params(self, config):
        """The PartitionSpecs of all parameters."""
        return jax.tree.map(
            lambda leaf: leaf.spec(self.tensor_axis),
            leaves(config),
            is_leaf=lambda x: isinstance(x, Leaf),
        )

    def put(self, x, spec):
        return x if self.mesh is None else jax.device_put(x, self.sharding(spec))

    def shard(self, function, in_specs, out_specs):
        """Turns a function of one device's arrays into one of whole arrays, for use inside jit."""
        if self.mesh is None:
            return function
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs)

    def jit(self, function, in_specs, out_specs, **options):
        """jax.jit of `shard`."""
        return jax.jit(self.shard(function, in_specs, out_specs), **options)

    def device_key(self, key):
        """This device's key, inside jit: devices with different sequences need different keys."""
        return jax.random.fold_in(key, jax.lax.axis_index(AXIS)) if self.kind == "dp" else key

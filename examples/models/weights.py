"""A model's weights: from a Hugging Face folder of safetensors, or random.

params = {"embedding", "final_norm", "head" unless tied, "layers": [{name: array}]}. A matrix is
[outputs, inputs]; heads and the gate/up pair are axes of their own. `layer_leaves` has all names
and shapes.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from .checkpoint import as_published, check, checkpoint_tensors
from .shards import open_folder


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of the parameters."""

    shape: tuple[int, ...]
    fan_in: int | None = None  # scales random weights; None: the gain of a norm, ones
    split: int | None = None  # the axis that tensor parallelism splits
    float32: bool = False  # always float32, whatever dtype the others have

    def dtype(self, dtype):
        return jnp.dtype(jnp.float32 if self.float32 else dtype)

    def spec(self, axis_name):
        """The PartitionSpec on a mesh with that axis; with None, each device has all of it."""
        if axis_name is None or self.split is None:
            return PartitionSpec()
        return PartitionSpec(*[None] * self.split, axis_name)


def leaves(config):
    """The tree of parameters, with a Leaf for each array."""
    m, vocab = config.width, config.vocab
    tree = {"embedding": Leaf((vocab, m), 1), "final_norm": Leaf((m,))}
    if not config.tied:
        tree["head"] = Leaf((vocab, m), m)
    return tree | {"layers": [layer_leaves(config, layer) for layer in range(config.layers)]}


def layer_leaves(config, layer):
    m, c, h, v = config.width, config.kv_lora_rank, config.heads, config.value_dim
    r = config.q_lora_rank or m
    found = {
        "attention_norm": Leaf((m,)),
        "query": Leaf((h, config.nope_dim + config.rope_dim, r), r, split=0),
        "kv_down": Leaf((config.entry_dim, m), m),
        "kv_norm": Leaf((c,)),
        "key_up": Leaf((h, config.nope_dim, c), c, split=0),
        "value_up": Leaf((h, v, c), c, split=0),
        "out": Leaf((m, h, v), h * v, split=1),
        "mlp_norm": Leaf((m,)),
    }
    if config.q_lora_rank:
        found |= {"query_down": Leaf((r, m), m), "query_norm": Leaf((r,))}
    if config.has_mlp(layer):
        found |= _mlp_leaves("", m, config.mlp_width)
    if config.has_experts(layer):
        found |= _expert_leaves(config)
    return found


def _expert_leaves(config):
    m, x, f = config.width, config.experts, config.expert_width
    scored = x + config.zero_experts
    found = {
        "router": Leaf((scored, m), m, float32=True),
        "experts_gate_up": Leaf((x, 2, f, m), m, split=2),
        "experts_down": Leaf((x, f, m), f, split=1),
    }
    if config.topk_method == "noaux_tc":
        found["router_bias"] = Leaf((scored,), 100, float32=True)
    if config.mlp_out_norm:
        found["mlp_out_norm"] = Leaf((m,))
    if config.shared_experts:
        found |= _mlp_leaves("shared_", m, f * config.shared_experts)
    return found


def _mlp_leaves(prefix, m, f):
    return {
        f"{prefix}gate_up": Leaf((2, f, m), m, split=1),
        f"{prefix}down": Leaf((m, f), f, split=1),
    }


# -------------------- Random weights


def random_weights(config, key, dtype=jnp.bfloat16, place=None):
    """Random weights of plausible size, made on the device.

    Args:
      config: a ModelConfig.
      key: from jax.random.
      dtype: of the weights (the router is float32).
      place: Leaf -> the sharding of that leaf, or None for the default device.
    """
    tree, structure = jax.tree.flatten(leaves(config), is_leaf=lambda x: isinstance(x, Leaf))
    arrays = [
        _random_leaf(leaf, leaf.dtype(dtype), place and place(leaf))(jax.random.fold_in(key, i))
        for i, leaf in enumerate(tree)
    ]
    return jax.tree.unflatten(structure, arrays)


@functools.cache
def _random_leaf(leaf, dtype, sharding):
    def make(key):
        if leaf.fan_in is None:
            return jnp.ones(leaf.shape, dtype)
        normal = jax.random.normal(key, leaf.shape, dtype)
        return normal * jnp.asarray(leaf.fan_in**-0.5, dtype)

    return jax.jit(make, out_shardings=sharding)


# -------------------- Loading


def load_weights(folder, config, dtype=jnp.bfloat16, place=None, progress=True):
    """Reads a Hugging Face folder, file by file. Each tensor goes straight to the device.

    Args:
      folder: has *.safetensors, and maybe model.safetensors.index.json.
      config: a ModelConfig.
      dtype: of the weights on the device (the router is float32).
      place: Leaf -> the sharding of that leaf, or None for the default device.
      progress: whether to show a progress bar.

    Raises:
      FileNotFoundError: there is no such file, or one that the index names is missing.
      ValueError: lists the tensors that are missing, surplus or misshapen.
    """
    from tqdm import tqdm  # imported here, because random weights need only jax

    tensors = as_published(open_folder(folder))
    wanted = checkpoint_tensors(config)
    check(tensors, wanted, config)
    tree = leaves(config)
    params = {"layers": [{} for _ in range(config.layers)]}
    absent = wanted.keys() - tensors.keys()  # `check` allows it where zeros mean the same
    in_order = sorted(wanted, key=lambda name: ("", 0) if name in absent else tensors[name].place)
    for name in tqdm(in_order, "weights", disable=not progress):
        scale = tensors.get(f"{name}_scale_inv")
        for target in wanted[name][1]:
            leaf, home = _leaf_and_home(tree, params, target.path)
            key, sharding = target.path[-1], place and place(leaf)
            if key not in home:
                home[key] = _empty(leaf, leaf.dtype(dtype), sharding)()
            if name in absent:
                continue
            home[key] = _fill(
                home[key],
                tensors[name].read(),
                None if scale is None else scale.read(),
                np.array(target.index, np.int32),
                sharding=sharding,
                part=target.part,
                block=config.fp8_block,
                nope_dim=config.nope_dim,
            )
    return params


def _leaf_and_home(tree, params, path):
    for key in path[:-1]:
        tree, params = tree[key], params[key]
    return tree[path[-1]], params


@functools.cache
def _empty(leaf, dtype, sharding):
    return jax.jit(lambda: jnp.zeros(leaf.shape, dtype), out_shardings=sharding)


@functools.partial(
    jax.jit, donate_argnames="leaf", static_argnames=("sharding", "part", "block", "nope_dim")
)
def _fill(leaf, tensor, scale, index, *, sharding, part, block, nope_dim):
    """Writes the tensor to its place in the leaf, in place."""
    if scale is not None:
        tensor = dequantize(tensor, scale, block)
    if part == "transposed":
        tensor = tensor.T
    elif part != "whole":
        heads = tensor.reshape(leaf.shape[0], -1, tensor.shape[-1])
        tensor = heads[:, :nope_dim] if part == "key_up" else heads[:, nope_dim:]
    rest = leaf.shape[index.shape[0] :]
    filled = leaf.at[tuple(index)].set(tensor.reshape(rest).astype(leaf.dtype))
    return filled if sharding is None else jax.lax.with_sharding_constraint(filled, sharding)


def dequantize(tensor, scale, block):
    """An FP8 matrix as f32. Each block of `block` = (rows, columns) has a scale of its own."""
    rows, columns = tensor.shape
    scale = jnp.repeat(jnp.repeat(scale, block[0], axis=0), block[1], axis=1)
    return tensor.astype(jnp.float32) * scale[:rows, :columns].astype(jnp.float32)

"""A model's weights: from a folder of safetensors as Hugging Face lays it out, or random.

params = {"embedding", "final_norm", "head" unless tied, "layers": [{name: array}]}. A matrix is
[outputs, inputs], with the heads or the gate/up pair as an axis of their own; `layer_leaves` has
all names and shapes.
"""

import dataclasses
import functools
import json
import mmap
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of the parameters."""

    shape: tuple[int, ...]
    fan_in: int | None = None  # of random weights; None: a norm's gain, ones
    split: int | None = None  # the axis that tensor parallelism splits
    float32: bool = False  # whatever the dtype of the others

    def dtype(self, dtype):
        return jnp.dtype(jnp.float32 if self.float32 else dtype)

    def spec(self, axis_name):
        """How it lies on a mesh with that axis; None: whole on every device."""
        if axis_name is None or self.split is None:
            return PartitionSpec()
        return PartitionSpec(*[None] * self.split, axis_name)


def leaves(config):
    """The parameters' tree, of Leaf."""
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
    if not config.has_experts(layer):
        return found | _mlp_leaves("", m, config.mlp_width)
    x, f = config.experts, config.expert_width
    found |= {
        "router": Leaf((x, m), m, float32=True),
        "experts_gate_up": Leaf((x, 2, f, m), m, split=2),
        "experts_down": Leaf((x, f, m), f, split=1),
    }
    if config.topk_method == "noaux_tc":
        found["router_bias"] = Leaf((x,), 100, float32=True)
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
    """Weights of the right shapes and plausible sizes, made on the device.

    Args:
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


# -------------------- The names and shapes of a checkpoint


@dataclasses.dataclass(frozen=True)
class Target:
    """Where a checkpoint's tensor, or a part of it, goes."""

    path: tuple  # of the leaf in the parameters
    index: tuple[int, ...] = ()  # into the leaf's leading axes
    part: str = "whole"  # or "key_up" or "value_up", of kv_b_proj; or "transposed"


def checkpoint_tensors(config):
    """{the checkpoint's name: (its shape, its Targets)} for every tensor of the model."""
    m, vocab = config.width, config.vocab
    found = {
        "model.embed_tokens.weight": ((vocab, m), [Target(("embedding",))]),
        "model.norm.weight": ((m,), [Target(("final_norm",))]),
    }
    if not config.tied:
        found["lm_head.weight"] = ((vocab, m), [Target(("head",))])
    for layer in range(config.layers):
        path = ("layers", layer)
        tensors = _attention_tensors(config, path)
        if config.has_experts(layer):
            tensors |= _expert_tensors(config, path)
        else:
            tensors |= _mlp_tensors("mlp.", path, "", m, config.mlp_width)
        found |= {f"model.layers.{layer}.{name}": tensor for name, tensor in tensors.items()}
    return found


def _attention_tensors(config, path):
    m, c, h = config.width, config.kv_lora_rank, config.heads
    r, e, v = config.q_lora_rank, config.nope_dim + config.rope_dim, config.value_dim

    def one(shape, leaf):
        return shape, [Target((*path, leaf))]

    found = {
        "input_layernorm.weight": one((m,), "attention_norm"),
        "post_attention_layernorm.weight": one((m,), "mlp_norm"),
        "self_attn.kv_a_proj_with_mqa.weight": one((config.entry_dim, m), "kv_down"),
        "self_attn.kv_a_layernorm.weight": one((c,), "kv_norm"),
        "self_attn.kv_b_proj.weight": (
            (h * (config.nope_dim + v), c),
            [Target((*path, leaf), part=leaf) for leaf in ("key_up", "value_up")],
        ),
        "self_attn.o_proj.weight": one((m, h * v), "out"),
    }
    if r is None:
        return found | {"self_attn.q_proj.weight": one((h * e, m), "query")}
    return found | {
        "self_attn.q_a_proj.weight": one((r, m), "query_down"),
        "self_attn.q_a_layernorm.weight": one((r,), "query_norm"),
        "self_attn.q_b_proj.weight": one((h * e, r), "query"),
    }


def _mlp_tensors(name, path, prefix, m, f):
    gate_up, down = (*path, f"{prefix}gate_up"), (*path, f"{prefix}down")
    return {
        f"{name}gate_proj.weight": ((f, m), [Target(gate_up, (0,))]),
        f"{name}up_proj.weight": ((f, m), [Target(gate_up, (1,))]),
        f"{name}down_proj.weight": ((m, f), [Target(down)]),
    }


def _expert_tensors(config, path):
    m, f, experts = config.width, config.expert_width, config.experts
    found = {"mlp.gate.weight": ((experts, m), [Target((*path, "router"))])}
    if config.topk_method == "noaux_tc":
        bias = (experts,), [Target((*path, "router_bias"))]
        found["mlp.gate.e_score_correction_bias"] = bias
    if config.shared_experts:
        width = f * config.shared_experts
        found |= _mlp_tensors("mlp.shared_experts.", path, "shared_", m, width)
    gate_up, down = (*path, "experts_gate_up"), (*path, "experts_down")
    for i in range(experts):
        name = f"mlp.experts.{i}."
        found |= {
            f"{name}gate_proj.weight": ((f, m), [Target(gate_up, (i, 0))]),
            f"{name}up_proj.weight": ((f, m), [Target(gate_up, (i, 1))]),
            f"{name}down_proj.weight": ((m, f), [Target(down, (i,), "transposed")]),
        }
    return found


# -------------------- Loading


def load_weights(folder, config, dtype=jnp.bfloat16, place=None, progress=True):
    """Reads a Hugging Face folder, shard by shard, each tensor straight to the device.

    Args:
      folder: *.safetensors, with model.safetensors.index.json or without.
      dtype: of the parameters on the device (the router is float32).
      place: Leaf -> the sharding of that leaf, or None for the default device.
      progress: shows a bar.

    Raises:
      FileNotFoundError: there is no shard, or one of the index is missing.
      ValueError: lists the tensors that are missing, not of this model, or of another shape.
    """
    from tqdm import tqdm  # random weights need no more than jax

    tensors = open_folder(folder)
    wanted = checkpoint_tensors(config)
    _check(tensors, wanted, config)
    tree = leaves(config)
    params = {"layers": [{} for _ in range(config.layers)]}
    for name in tqdm(
        sorted(wanted, key=lambda n: tensors[n].place), "weights", disable=not progress
    ):
        scale = tensors.get(f"{name}_scale_inv")
        for target in wanted[name][1]:
            leaf, home = _leaf_and_home(tree, params, target.path)
            key = target.path[-1]
            if key not in home:
                home[key] = _empty(leaf, leaf.dtype(dtype), place and place(leaf))()
            home[key] = _fill(
                home[key],
                tensors[name].read(),
                None if scale is None else scale.read(),
                np.array(target.index, np.int32),
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


@functools.partial(jax.jit, donate_argnames="leaf", static_argnames=("part", "block", "nope_dim"))
def _fill(leaf, tensor, scale, index, *, part, block, nope_dim):
    """The leaf with the tensor in its place, in place."""
    if scale is not None:
        tensor = dequantize(tensor, scale, block)
    if part == "transposed":
        tensor = tensor.T
    elif part != "whole":
        heads = tensor.reshape(leaf.shape[0], -1, tensor.shape[-1])
        tensor = heads[:, :nope_dim] if part == "key_up" else heads[:, nope_dim:]
    rest = leaf.shape[index.shape[0] :]
    return leaf.at[tuple(index)].set(tensor.reshape(rest).astype(leaf.dtype))


def dequantize(tensor, scale, block):
    """f32 values of a matrix in FP8: each block of it (rows, columns) has a scale of its own."""
    rows, columns = tensor.shape
    scale = jnp.repeat(jnp.repeat(scale, block[0], axis=0), block[1], axis=1)
    return tensor.astype(jnp.float32) * scale[:rows, :columns].astype(jnp.float32)


def _check(tensors, wanted, config):
    """Raises where the tensors that are there are not the wanted ones, before any is read."""
    wanted = {name: shape for name, (shape, _) in wanted.items()}
    if config.fp8_block:
        rows, columns = config.fp8_block
        wanted |= {
            f"{name}_scale_inv": (-(-shape[0] // rows), -(-shape[1] // columns))
            for name, shape in wanted.items()
            if name in tensors and tensors[name].dtype.itemsize == 1
        }
    surplus = [n for n in tensors if n not in wanted and not _may_be_there(n, config)]
    wrong = [f"missing    {name} {list(shape)}" for name, shape in wanted.items()
             if name not in tensors]  # fmt: skip
    wrong += [f"surplus    {name} {list(tensors[name].shape)}" for name in surplus]
    wrong += [
        f"misshapen  {name} {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if wrong:
        shown = "\n  ".join(sorted(wrong)[:40])
        more = f"\n  and {len(wrong) - 40} more" if len(wrong) > 40 else ""
        raise ValueError(
            f"the checkpoint is not one of config.json's model; {len(wrong)} tensors are wrong:"
            f"\n  {shown}{more}"
        )


def _may_be_there(name, config):
    """Tensors that no decoding needs: constants, a tied head, layers for further tokens."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    extra = layer and 0 <= int(layer[1]) - config.layers < config.extra_layers
    return (
        extra or name.endswith("rotary_emb.inv_freq") or (config.tied and name == "lm_head.weight")
    )


# -------------------- The files


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a shard, read when asked for."""

    shard: mmap.mmap
    place: tuple[str, int]  # file and offset
    dtype: np.dtype
    shape: tuple[int, ...]

    def read(self):
        count = int(np.prod(self.shape, dtype=np.int64))
        return np.frombuffer(self.shard, self.dtype, count, self.place[1]).reshape(self.shape)


_DTYPES = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,
}


def open_folder(folder):
    """{name: StoredTensor} of all shards of a folder."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise FileNotFoundError(f"there are no *.safetensors in {folder}")
    tensors = {}
    for name in names:
        tensors |= open_shard(folder / name)
    return tensors


def open_shard(path):
    """{name: StoredTensor} of one file.

    The format (https://huggingface.co/docs/safetensors) is a length, a JSON header, the data. The
    library of that name would do, but for FP8, which its reader for numpy lacks.
    """
    with open(path, "rb") as file:
        shard = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    start = 8 + int.from_bytes(shard[:8], "little")
    header = json.loads(shard[8:start])
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise ValueError(
                f"{path}: {name} is {entry['dtype']}, supported are {', '.join(_DTYPES)}"
            )
    return {
        name: StoredTensor(
            shard,
            (str(path), start + entry["data_offsets"][0]),
            np.dtype(_DTYPES[entry["dtype"]]),
            tuple(entry["shape"]),
        )
        for name, entry in header.items()
    }

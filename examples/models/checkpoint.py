"""Says where each tensor of a Hugging Face checkpoint goes, and checks that all are there."""

import dataclasses
import re

ROUTER_BIAS = "e_score_correction_bias"


@dataclasses.dataclass(frozen=True)
class Target:
    """The place in the parameters for a checkpoint's tensor or a part of it."""

    path: tuple  # of the leaf in the parameters
    index: tuple[int, ...] = ()  # into the leaf's leading axes
    part: str = "whole"  # or "transposed"; or "key_up" or "value_up", the two parts of kv_b_proj


def checkpoint_tensors(config):
    """{name in the checkpoint: (shape, Targets)} of every tensor of the model."""
    m, vocab = config.width, config.vocab
    found = {
        "model.embed_tokens.weight": ((vocab, m), [Target(("embedding",))]),
        "model.norm.weight": ((m,), [Target(("final_norm",))]),
    }
    if not config.tied:
        found["lm_head.weight"] = ((vocab, m), [Target(("head",))])
    for layer in range(config.layers):
        prefix, tensors = _layer_tensors(config, layer)
        found |= {f"model.layers.{prefix}.{name}": tensor for name, tensor in tensors.items()}
    return {f"{config.tensor_prefix}{name}": tensor for name, tensor in found.items()}


def _layer_tensors(config, layer):
    """(The layer's number in the checkpoint, its tensors)."""
    path = ("layers", layer)
    if config.paired_layers:  # two of ours are one there, and its parts are numbered 0 and 1
        there, part, mlp = layer // 2, f".{layer % 2}", f"mlps.{layer % 2}."
    else:
        there, part, mlp = layer, "", "mlp."
    found = _attention_tensors(config, path, part)
    if config.has_mlp(layer):
        found |= _mlp_tensors(mlp, path, "", config.width, config.mlp_width)
    if config.has_experts(layer):
        found |= _expert_tensors(config, path)
    return there, found


def _attention_tensors(config, path, part):
    m, c, h = config.width, config.kv_lora_rank, config.heads
    r, e, v = config.q_lora_rank, config.nope_dim + config.rope_dim, config.value_dim

    def one(shape, leaf):
        return shape, [Target((*path, leaf))]

    found = {
        f"input_layernorm{part}.weight": one((m,), "attention_norm"),
        f"post_attention_layernorm{part}.weight": one((m,), "mlp_norm"),
        f"self_attn{part}.kv_a_proj_with_mqa.weight": one((config.entry_dim, m), "kv_down"),
        f"self_attn{part}.kv_a_layernorm.weight": one((c,), "kv_norm"),
        f"self_attn{part}.kv_b_proj.weight": (
            (h * (config.nope_dim + v), c),
            [Target((*path, leaf), part=leaf) for leaf in ("key_up", "value_up")],
        ),
        f"self_attn{part}.o_proj.weight": one((m, h * v), "out"),
    }
    if r is None:
        return found | {f"self_attn{part}.q_proj.weight": one((h * e, m), "query")}
    return found | {
        f"self_attn{part}.q_a_proj.weight": one((r, m), "query_down"),
        f"self_attn{part}.q_a_layernorm.weight": one((r,), "query_norm"),
        f"self_attn{part}.q_b_proj.weight": one((h * e, r), "query"),
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
    scored = experts + config.zero_experts
    name, matrix = ("router", "classifier.weight") if config.paired_layers else ("gate", "weight")
    found = {f"mlp.{name}.{matrix}": ((scored, m), [Target((*path, "router"))])}
    if config.topk_method == "noaux_tc":
        bias = (scored,), [Target((*path, "router_bias"))]
        found[f"mlp.{name}.{ROUTER_BIAS}"] = bias
    if config.mlp_out_norm:
        found["post_mlp_layernorm.weight"] = (m,), [Target((*path, "mlp_out_norm"))]
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


def as_published(tensors):
    """The tensors of a folder under the names that published checkpoints have.

    Transformers 5.24 saves the layers of Kimi-K2.5's language model under another name than the
    one it reads: it takes "blocks", which are those of the vision tower, for all layers.
    """
    saved, published = "language_model.model.blocks.", "language_model.model.layers."
    return {
        published + name[len(saved) :] if name.startswith(saved) else name: tensor
        for name, tensor in tensors.items()
    }


# -------------------- Checking that the checkpoint fits the model


def check(tensors, wanted, config):
    """Checks that a checkpoint has the tensors of the model.

    Args:
      tensors: from `open_folder` of shards.py.
      wanted: from `checkpoint_tensors`.

    Raises:
      ValueError: lists the tensors that are missing, surplus or misshapen.
    """
    wanted = {name: shape for name, (shape, _) in wanted.items()}
    if config.fp8_block:
        rows, columns = config.fp8_block
        wanted |= {
            f"{name}_scale_inv": (-(-shape[0] // rows), -(-shape[1] // columns))
            for name, shape in wanted.items()
            if name in tensors and tensors[name].dtype.itemsize == 1
        }
    surplus = [
        name
        for name, tensor in tensors.items()
        if name not in wanted and not _may_be_there(name, tensor.shape, config)
    ]
    wrong = [f"missing    {name} {list(shape)}" for name, shape in wanted.items()
             if name not in tensors and not _may_be_absent(name, config)]  # fmt: skip
    wrong += [f"surplus    {name} {list(tensors[name].shape)}" for name in surplus]
    wrong += [
        f"misshapen  {name} {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if config.fp8_block is None:
        wrong += [
            f"in FP8     {name}, but config.json has no quantization_config"
            for name in wanted
            if name in tensors and tensors[name].dtype.itemsize == 1
        ]
    if wrong:
        shown = "\n  ".join(sorted(wrong)[:40])
        more = f"\n  and {len(wrong) - 40} more" if len(wrong) > 40 else ""
        raise ValueError(
            f"the checkpoint does not fit its config.json; {len(wrong)} tensors are wrong:"
            f"\n  {shown}{more}"
        )


def _may_be_there(name, shape, config):
    """Whether a checkpoint may have this tensor although decoding does not need it.

    That is so for constants, a tied head, layers that predict further tokens, matrices of zero
    experts, what the family calls unneeded, and tensors without elements (transformers saves those
    of zero shared experts).
    """
    name = name.removeprefix(config.tensor_prefix)
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    extra = layer and 0 <= int(layer[1]) - config.layers < config.extra_layers
    expert = re.search(r"\.experts\.(\d+)\.(gate|up)_proj\.weight$", name)
    zero = expert and 0 <= int(expert[1]) - config.experts < config.zero_experts
    tied = config.tied and name == "lm_head.weight"
    unneeded = config.unneeded and re.match(config.unneeded, name)
    constant = name.endswith("rotary_emb.inv_freq")
    return bool(extra or zero or tied or unneeded or constant or 0 in shape)


def _may_be_absent(name, config):
    """Whether zeros are meant if a checkpoint does not have this tensor."""
    return config.router_bias_optional and name.endswith(ROUTER_BIAS)

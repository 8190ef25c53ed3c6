"""Says where each tensor of a Hugging Face checkpoint goes, and checks that all are there."""

import dataclasses
import re


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
             if name not in tensors]  # fmt: skip
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

    That is so for constants, a tied head, layers that predict further tokens, and tensors without
    elements (transformers saves those of zero shared experts).
    """
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    extra = layer and 0 <= int(layer[1]) - config.layers < config.extra_layers
    tied_head = config.tied and name == "lm_head.weight"
    return extra or name.endswith("rotary_emb.inv_freq") or tied_head or 0 in shape

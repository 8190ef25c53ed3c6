"""The fields of a ModelConfig that families share, from transformers' configuration object.

A key that changes what transformers' model computes, and that ours does not compute, is refused by
name.
"""

import math

from .config import Yarn


def common(hf):
    """All fields of a ModelConfig but those about experts, checked."""
    if hf.is_heterogeneous:  # before others, because its keys cannot be read then
        raise ValueError("config.json: per_layer_config gives layers other values; not supported")
    heads = size(hf, "num_attention_heads")
    require(hf, "hidden_act", "silu")
    require(hf, "attention_bias", False)
    require(hf, "num_key_value_heads", heads)
    require(hf, "head_dim", size(hf, "qk_rope_head_dim"))  # the width that transformers rotates
    _require_plain_causal_attention(hf)
    return {
        "vocab": size(hf, "vocab_size"),
        "width": size(hf, "hidden_size"),
        "layers": size(hf, "num_hidden_layers"),
        "heads": heads,
        "q_lora_rank": None if hf.q_lora_rank is None else size(hf, "q_lora_rank"),
        "kv_lora_rank": size(hf, "kv_lora_rank"),
        "nope_dim": size(hf, "qk_nope_head_dim"),
        "rope_dim": size(hf, "qk_rope_head_dim"),
        "value_dim": size(hf, "v_head_dim"),
        "mlp_width": size(hf, "intermediate_size"),
        "norm_eps": hf.rms_norm_eps,
        **rope(hf),
        "tied": bool(hf.tie_word_embeddings),
        "eos": tokens(hf.eos_token_id),
        "max_positions": hf.max_position_embeddings,
        "fp8_block": fp8_block(getattr(hf, "quantization_config", None)),
        "extra_layers": getattr(hf, "num_nextn_predict_layers", None) or 0,
    }


def _require_plain_causal_attention(hf):
    """Refuses keys that transformers' masks and caches heed, in whichever model they are."""
    require(hf, "is_causal", True)
    require(hf, "sliding_window", None)
    require(hf, "attention_chunk_size", None)
    for kind in getattr(hf, "layer_types", None) or ():
        require({"layer_types": kind}, "layer_types", "full_attention")


def experts(hf, topk_method, groups, normalize, dense=None):
    """The fields about experts: {} if no layer has any.

    Args:
      hf: transformers' configuration object.
      topk_method: how a token's experts are chosen, as in ModelConfig.
      groups: whether they are chosen within groups.
      normalize: whether the weights of a token's experts are normalized.
      dense: the layers without experts; None for the first first_k_dense_replace.
    """
    # transformers' classes ignore it; DeepSeek's own code does not.
    require(hf, "moe_layer_freq", 1)
    dense_layers = size(hf, "first_k_dense_replace", least=0) if dense is None else 0
    if dense_layers >= hf.num_hidden_layers or len(dense or ()) == hf.num_hidden_layers:
        return {}
    count, per_token = size(hf, "n_routed_experts"), size(hf, "num_experts_per_tok")
    groups, kept = (size(hf, "n_group"), size(hf, "topk_group")) if groups else (1, 1)
    if count % groups:
        raise ValueError(f"config.json: n_group {groups} does not divide n_routed_experts {count}")
    if kept > groups:
        raise ValueError(f"config.json: topk_group is {kept}, more than n_group {groups}")
    eligible = count // groups * kept
    if per_token > eligible:
        raise ValueError(
            f"config.json: num_experts_per_tok is {per_token}, but topk_group leaves {eligible} "
            f"of the {count} experts to choose from"
        )
    return {
        "expert_width": size(hf, "moe_intermediate_size"),
        "experts": count,
        "experts_per_token": per_token,
        "shared_experts": size(hf, "n_shared_experts", least=0),
        "dense_layers": dense_layers,
        "dense_at": dense or (),
        "topk_method": topk_method,
        "groups": groups,
        "groups_per_token": kept,
        "normalize_routing": normalize,
        "routing_scale": float(hf.routed_scaling_factor),
    }


def dense_of_layer_types(hf):
    """The layers that mlp_layer_types calls dense."""
    types, layers = hf.mlp_layer_types, size(hf, "num_hidden_layers")
    if len(types) != layers or not {*types} <= {"dense", "sparse"}:
        raise ValueError(
            f"config.json: mlp_layer_types is {types!r}; it must be 'dense' or 'sparse' for each "
            f"of the {layers} layers"
        )
    dense = tuple(i for i, kind in enumerate(types) if kind == "dense")
    first = getattr(hf, "first_k_dense_replace", None)
    if first is not None and dense != tuple(range(size(hf, "first_k_dense_replace", least=0))):
        raise ValueError(
            f"config.json: first_k_dense_replace is {first}, but mlp_layer_types says that the "
            f"dense layers are {list(dense)}"
        )
    return dense


def tokens(value):
    """The value of eos_token_id as a tuple: it may be a token, a list of tokens, or null."""
    found = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if not all(isinstance(token, int) for token in found):
        raise ValueError(f"eos_token_id is {value!r}; it must be a token or a list of tokens")
    return found


def rope(hf):
    """The fields about rotary positions."""
    hf.standardize_rope_params()  # a model does so too, and then sees keys beside rope_parameters
    found = hf.rope_parameters
    require(found, "rope_type", "default", "yarn")
    require(found, "partial_rotary_factor", 1.0, None)
    theta = _number(found, "rope_theta")
    if found["rope_type"] == "default":
        return {"rope_theta": theta}
    factor, length = _number(found, "factor"), _number(found, "original_max_position_embeddings")

    def magnitude(mscale):
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    mscale, mscale_all_dim = found.get("mscale"), found.get("mscale_all_dim")
    rotation = found.get("attention_factor")
    if rotation is None:
        both = mscale and mscale_all_dim
        rotation = magnitude(mscale) / magnitude(mscale_all_dim) if both else magnitude(1)
    yarn = Yarn(
        factor=factor,
        original_length=length,
        beta_fast=found.get("beta_fast") or 32.0,
        beta_slow=found.get("beta_slow") or 1.0,
        truncate=bool(found.get("truncate", True)),
        rotation_scale=float(rotation),
        softmax_scale=magnitude(mscale_all_dim) ** 2 if mscale_all_dim else 1.0,
    )
    return {"rope_theta": theta, "yarn": yarn}


def fp8_block(quantization):
    """The block size of FP8 matrices; None for a checkpoint without quantization."""
    if not quantization:
        return None
    require({"quant_method": None} | quantization, "quant_method", "fp8")
    block = quantization.get("weight_block_size")
    sizes = isinstance(block, list | tuple) and [x for x in block if isinstance(x, int) and x > 0]
    if not sizes or len(sizes) != 2 or len(block) != 2:
        raise ValueError(f"config.json: weight_block_size must be two sizes, got {block!r}")
    return tuple(block)


def require(hf, key, *allowed):
    """Raises ValueError if the key is there and its value is not one of those allowed."""
    get = hf.get if isinstance(hf, dict) else lambda key, default: getattr(hf, key, default)
    value = get(key, allowed[0])
    if value not in allowed:
        expected = " or ".join(repr(one) for one in allowed)
        raise ValueError(f"config.json: {key} is {value!r}; supported: {expected}")


def size(hf, key, least=1):
    """The value of a key that must be an integer of at least `least`."""
    value = getattr(hf, key)
    if not isinstance(value, int) or value < least:
        raise ValueError(
            f"config.json: {key} is {value!r}; it must be an integer of at least {least}"
        )
    return value


def _number(rope, key):
    value = rope.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"config.json: {key} is {value!r}; it must be a number above 0")
    return float(value)

"""The families of models: how a config.json becomes a ModelConfig, by its model_type.

To add a family, write a function that takes transformers' configuration object and returns a
ModelConfig, and add it to FAMILIES. docs/models.md says what else is needed.

transformers reads config.json and generation_config.json: so a key that is absent has the default
of its class, and older names of a key mean what they mean there. What we read besides is a
model_type that transformers has no class for. A key that changes what transformers' model computes,
and that ours does not compute, is refused by name. Code that comes with a checkpoint is never run.
"""

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .config import ModelConfig, Yarn

TRANSFORMERS = "5.24"  # the release that tests compare with; pyproject.toml pins it


@dataclasses.dataclass(frozen=True)
class Family:
    """One model_type."""

    models: str  # the released ones
    read: Callable[[Any], ModelConfig]  # from transformers' configuration object
    compared_with: str  # transformers' class that gives the logits and tokens in tests
    config_class: str | None = None  # transformers' class, if it has none for this model_type


def read(source):
    """The ModelConfig of a config.json, as a dict, or of the folder with that file."""
    folder = None
    if not isinstance(source, dict):
        folder = Path(source)
        source = _read_json(folder / "config.json")
    name = source.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(
            f"config.json: model_type is {name!r}; supported are {', '.join(sorted(FAMILIES))}"
        )
    hf = _configuration(name, source)
    if folder is None:
        return FAMILIES[name].read(hf)
    return _with_generation_config(FAMILIES[name].read(hf), folder)


def _configuration(name, contents):
    """transformers' configuration object. Only transformers' own classes are used."""
    import transformers  # imported here, because ModelConfig.named does without it

    if FAMILIES[name].config_class:
        cls = getattr(transformers, FAMILIES[name].config_class)
    else:
        cls = transformers.CONFIG_MAPPING[name]
    try:
        return cls.from_dict(copy.deepcopy(contents))  # which changes the dict
    except Exception as error:  # the class's checks raise errors of many kinds, on several lines
        raise ValueError(f"config.json: {' '.join(str(error).split())}") from error


def _with_generation_config(config, folder):
    """The config with the tokens of generation_config.json, if that file names any."""
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").exists():
        return config
    found = GenerationConfig.from_dict(_read_json(folder / "generation_config.json"))
    return dataclasses.replace(
        config,
        bos=config.bos if found.bos_token_id is None else found.bos_token_id,
        eos=config.eos if found.eos_token_id is None else _tokens(found.eos_token_id),
    )


def _read_json(path):
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}: name a folder from Hugging Face")
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must have an object with keys, got {found!r:.80}")
    return found


def _tokens(value):
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)


# -------------------- Families


def _deepseek_v2(hf):
    # transformers ignores it, and DeepSeek's own code then leaves routed_scaling_factor out.
    require(hf, "norm_topk_prob", False, None)
    require(hf, "rope_interleave", True, None)  # transformers' class ignores it
    require(hf, "mlp_bias", False)
    require(hf, "scoring_func", "softmax")
    require(hf, "topk_method", "greedy", "group_limited_greedy")
    # n_group may be there with "greedy", which ignores it.
    groups = hf.topk_method != "greedy"
    return ModelConfig(**common(hf), **experts(hf, hf.topk_method, groups, normalize=False))


def _deepseek_v3(hf):
    require(hf, "scoring_func", "sigmoid")
    require(hf, "topk_method", "noaux_tc")
    return ModelConfig(
        **common(hf),
        **experts(hf, "noaux_tc", groups=True, normalize=bool(hf.norm_topk_prob)),
        rope_interleave=bool(hf.rope_interleave),
    )


FAMILIES: dict[str, Family] = {
    "deepseek_v2": Family("DeepSeek-V2, V2-Lite", _deepseek_v2, "DeepseekV2ForCausalLM"),
    "deepseek_v3": Family("DeepSeek-V3, R1, V3.1", _deepseek_v3, "DeepseekV3ForCausalLM"),
    # Its folder has a class of its own, which says that the layers are those of DeepSeek-V3.
    "kimi_k2": Family("Kimi-K2", _deepseek_v3, "DeepseekV3ForCausalLM", "DeepseekV3Config"),
}


# -------------------- What families share


def common(hf):
    """All fields of a ModelConfig but those about experts, checked."""
    heads = size(hf, "num_attention_heads")
    require(hf, "hidden_act", "silu")
    require(hf, "attention_bias", False)
    require(hf, "num_key_value_heads", heads)
    require(hf, "head_dim", size(hf, "qk_rope_head_dim"))  # the width that transformers rotates
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
        "bos": hf.bos_token_id,
        "eos": _tokens(hf.eos_token_id),
        "max_positions": hf.max_position_embeddings,
        "fp8_block": fp8_block(getattr(hf, "quantization_config", None)),
        "extra_layers": getattr(hf, "num_nextn_predict_layers", None) or 0,
    }


def experts(hf, topk_method, groups, normalize):
    """The fields about experts: {} if no layer has any.

    Args:
      hf: transformers' configuration object.
      topk_method: how a token's experts are chosen, as in ModelConfig.
      groups: whether they are chosen within groups.
      normalize: whether the weights of a token's experts are normalized.
    """
    # transformers' classes ignore it; DeepSeek's own code does not.
    require(hf, "moe_layer_freq", 1)
    dense_layers = hf.first_k_dense_replace or 0
    if dense_layers >= hf.num_hidden_layers:
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
        "shared_experts": hf.n_shared_experts,
        "dense_layers": dense_layers,
        "topk_method": topk_method,
        "groups": groups,
        "groups_per_token": kept,
        "normalize_routing": normalize,
        "routing_scale": float(hf.routed_scaling_factor),
    }


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
    require(quantization, "quant_method", "fp8")
    block = quantization.get("weight_block_size")
    if not (isinstance(block, list | tuple) and len(block) == 2):
        raise ValueError(f"config.json: weight_block_size must be two sizes, got {block!r}")
    return tuple(block)


def require(hf, key, *allowed):
    """Raises ValueError if the key is there and its value is not one of those allowed."""
    get = hf.get if isinstance(hf, dict) else lambda key, default: getattr(hf, key, default)
    value = get(key, allowed[0])
    if value not in allowed:
        expected = " or ".join(repr(one) for one in allowed)
        raise ValueError(f"config.json: {key} is {value!r}; supported: {expected}")


def size(hf, key):
    """The value of a key that must be an integer of at least 1."""
    value = getattr(hf, key)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"config.json: {key} is {value!r}; it must be an integer of at least 1")
    return value


def _number(rope, key):
    value = rope.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"config.json: {key} is {value!r}; it must be a number above 0")
    return float(value)

"""The families of models: how a config.json becomes a ModelConfig, by its model_type.

To add a family, write a function that takes transformers' configuration object and returns a
ModelConfig, and add it to FAMILIES. docs/models.md says what else is needed.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from .config import ModelConfig
from .fields import common, dense_of_layer_types, experts, fp8_block, require, size, tokens

TRANSFORMERS = "5.24"  # the release that tests compare with; pyproject.toml pins it


@dataclasses.dataclass(frozen=True)
class Family:
    """One model_type."""

    models: str  # the released ones
    read: Callable[[Any], ModelConfig]  # from transformers' configuration object
    compared_with: str  # transformers' class that gives the logits and tokens in tests
    config_class: str | None = None  # transformers' class, if it has none for this model_type


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


def _deepseek_v3(hf, dense=None):
    require(hf, "scoring_func", "sigmoid")
    require(hf, "topk_method", "noaux_tc")
    return ModelConfig(
        **common(hf),
        **experts(hf, "noaux_tc", groups=True, normalize=bool(hf.norm_topk_prob), dense=dense),
        rope_interleave=bool(hf.rope_interleave),
    )


def _glm4_moe_lite(hf):
    return _deepseek_v3(hf, dense_of_layer_types(hf))


def _axk1(hf):
    return dataclasses.replace(
        _glm4_moe_lite(hf),
        mlp_out_norm=True,
        router_bias_optional=True,
        # The released checkpoints have this norm in dense layers too, where it is not used.
        unneeded=r"model\.layers\.\d+\.post_mlp_layernorm\.weight",
    )


def _youtu(hf):
    require(hf, "mlp_bias", False)
    return ModelConfig(**common(hf), rope_interleave=bool(hf.rope_interleave))


def _kimi_k25(hf):
    """The language model. Images need the rest, which is not read."""
    require(hf.text_config, "model_type", "deepseek_v3")
    config = _deepseek_v3(hf.text_config)
    return dataclasses.replace(
        config,
        tied=bool(hf.tie_word_embeddings),
        eos=tokens(getattr(hf, "eos_token_id", None)) or config.eos,
        fp8_block=fp8_block(getattr(hf, "quantization_config", None)) or config.fp8_block,
        tensor_prefix="language_model.",
        unneeded=r"(model\.)?(vision_tower|mm_projector)\.",
    )


def _longcat_flash(hf):
    # transformers' class computes with these values, whatever config.json says.
    require(hf, "attention_method", "MLA")
    require(hf, "mla_scale_q_lora", True)
    require(hf, "mla_scale_kv_lora", True)
    require(hf, "norm_topk_prob", False)
    require(hf, "rope_interleave", True, None)
    require(hf, "router_bias", False)
    require(hf, "zero_expert_type", "identity")
    require(hf, "qk_head_dim", hf.qk_nope_head_dim + hf.qk_rope_head_dim)
    count, per_token = size(hf, "n_routed_experts"), size(hf, "moe_topk")
    zero = size(hf, "zero_expert_num", least=0)
    if per_token > count + zero:
        raise ValueError(
            f"config.json: moe_topk is {per_token}, but n_routed_experts and zero_expert_num give "
            f"{count + zero} experts to choose from"
        )
    return ModelConfig(
        **common(hf),
        expert_width=size(hf, "expert_ffn_hidden_size"),
        experts=count,
        experts_per_token=per_token,
        topk_method="noaux_tc",
        routing_scale=float(hf.routed_scaling_factor),
        paired_layers=True,
        zero_experts=zero,
        softmax_scores=True,
        query_scale=(hf.hidden_size / size(hf, "q_lora_rank")) ** 0.5,
        latent_scale=(hf.hidden_size / size(hf, "kv_lora_rank")) ** 0.5,
        unneeded=r"model\.mtp\.",  # it predicts more tokens
    )


FAMILIES: dict[str, Family] = {
    "deepseek_v2": Family("DeepSeek-V2, V2-Lite", _deepseek_v2, "DeepseekV2ForCausalLM"),
    "deepseek_v3": Family("DeepSeek-V3, R1, V3.1", _deepseek_v3, "DeepseekV3ForCausalLM"),
    # Its folder has a class of its own, which says that the layers are those of DeepSeek-V3.
    "kimi_k2": Family("Kimi-K2", _deepseek_v3, "DeepseekV3ForCausalLM", "DeepseekV3Config"),
    "kimi_k25": Family(
        "Kimi-K2.5 and K2.6, text only", _kimi_k25, "Kimi_K25ForConditionalGeneration"
    ),
    "glm4_moe_lite": Family("GLM-4.7-Flash", _glm4_moe_lite, "Glm4MoeLiteForCausalLM"),
    "sarvam_mla": Family("Sarvam-105B", _deepseek_v3, "DeepseekV3ForCausalLM"),
    "youtu": Family("Youtu-LLM", _youtu, "YoutuForCausalLM"),
    "axk1": Family("A.X-K1", _axk1, "AXK1ForCausalLM"),
    "longcat_flash": Family("LongCat-Flash", _longcat_flash, "LongcatFlashForCausalLM"),
}

REFUSED = {
    "kimi_linear": "three of four layers are linear attention, which keeps one state for each "
    "sequence and no cache of tokens",
}

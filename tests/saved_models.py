"""Small models of every family, saved by transformers, for the tests of examples/models."""

import json
import os

import jax.numpy as jnp
import pytest

if os.environ.get("JAX_FLASHMLA_REQUIRE_TRANSFORMERS") != "1":
    for package in ("torch", "transformers", "tqdm", "tokenizers"):
        pytest.importorskip(package)

import torch
import transformers
from safetensors.torch import load_file, save_file

from examples.models.config import ModelConfig
from examples.models.weights import load_weights

torch.set_num_threads(1)  # jax has threads of its own

YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,  # not equal to mscale, so that the rotation is scaled too
}
DENSE = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24,
    "v_head_dim": 20,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
EXPERTS = {
    "moe_intermediate_size": 48,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
SIZES = DENSE | EXPERTS | {"first_k_dense_replace": 1}
LAYER_TYPES = DENSE | EXPERTS
PAIRED = {key: value for key, value in DENSE.items() if "inter" not in key and "layers" not in key}
PAIRED |= {
    "num_layers": 1,  # each is two of ours
    "ffn_hidden_size": 96,
    "expert_ffn_hidden_size": 48,
    "n_routed_experts": 12,
    "zero_expert_num": 3,
    "moe_topk": 4,
    "head_dim": 16,
    "routed_scaling_factor": 1.5,
}
GROUPS = {"n_group": 4, "topk_group": 2}
TIED = {"tie_word_embeddings": True}
HALVES = {"rope_interleave": False}
HEADS_20 = {"num_attention_heads": 20, "num_key_value_heads": 20}

# {name: (transformers' configuration class, its arguments)}
CASES = {
    "v2": (
        "DeepseekV2Config",
        SIZES
        | GROUPS
        | {
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 4.0,
            "rope_scaling": YARN,
        },
    ),
    "v2-lite": (
        "DeepseekV2Config",
        SIZES | {"q_lora_rank": None, "n_shared_experts": 2, "rope_scaling": YARN},
    ),
    "v2-tied": ("DeepseekV2Config", SIZES | TIED | {"first_k_dense_replace": 0}),
    "v3": ("DeepseekV3Config", SIZES | GROUPS | {"rope_scaling": YARN}),
    "v3-halves": ("DeepseekV3Config", SIZES | GROUPS | HALVES | {"norm_topk_prob": False}),
    # Transformers has no class for it. Its layers are those of DeepSeek-V3, without groups.
    "kimi-k2": (
        "DeepseekV3Config",
        SIZES
        | {
            "n_routed_experts": 12,
            "rope_theta": 50000.0,
            "rope_scaling": {**YARN, "beta_fast": 1, "mscale_all_dim": 1.0},
            "routed_scaling_factor": 2.827,
        },
    ),
    "kimi-k2.5": ("Kimi_K25Config", SIZES | {"rope_scaling": YARN}),
    "kimi-k2.5-tied": ("Kimi_K25Config", SIZES | GROUPS | TIED | {"n_shared_experts": 2}),
    "glm": ("Glm4MoeLiteConfig", LAYER_TYPES | HEADS_20),
    "glm-other": (
        "Glm4MoeLiteConfig",
        LAYER_TYPES
        | GROUPS
        | TIED
        | HALVES
        | {
            "mlp_layer_types": ["sparse", "dense"],
            "q_lora_rank": None,
            "n_shared_experts": 2,
            "rope_scaling": YARN,
        },
    ),
    "sarvam": ("SarvamMLAConfig", SIZES | {"q_lora_rank": None}),
    "sarvam-other": ("SarvamMLAConfig", SIZES | GROUPS | TIED | {"rope_scaling": YARN}),
    "youtu": ("YoutuConfig", DENSE | TIED | {"rope_theta": 1e6}),
    "youtu-other": ("YoutuConfig", DENSE | HALVES | {"q_lora_rank": None, "rope_scaling": YARN}),
    "axk1": ("AXK1Config", LAYER_TYPES | GROUPS | {"rope_scaling": YARN}),
    "axk1-other": (
        "AXK1Config",
        LAYER_TYPES | TIED | HALVES | {"mlp_layer_types": ["sparse", "dense"]},
    ),
    "longcat": ("LongcatFlashConfig", PAIRED | {"rope_scaling": YARN}),
    "longcat-other": ("LongcatFlashConfig", PAIRED | TIED | {"zero_expert_num": 2, "moe_topk": 2}),
}


def make_model(name, seed=0):
    """Transformers' model of a case, with random weights."""
    config_class, arguments = CASES[name]
    if config_class == "Kimi_K25Config":
        tied = arguments["tie_word_embeddings"]
        vision = {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8}
        config = transformers.Kimi_K25Config(
            text_config=arguments | {"model_type": "deepseek_v3", "tie_word_embeddings": not tied},
            vision_config=vision | {"num_attention_heads": 2},
            tie_word_embeddings=tied,  # of the two only this one counts
        )
        model = transformers.Kimi_K25ForConditionalGeneration(config)
    else:
        config = getattr(transformers, config_class)(**arguments)
        model = transformers.AutoModelForCausalLM.from_config(config)
    randomize(model, seed)
    return model.eval()


def randomize(model, seed):
    """Sets weights that give large logits, and softmaxes and routing that are far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        normal = torch.randn(x.shape, generator=generator)
        if name.endswith("inv_freq"):
            continue
        if "norm" in name:
            x.data = 1 + 0.3 * normal
        elif "e_score_correction_bias" in name:
            x.data = 0.1 * normal - 1  # so that experts are chosen among negative numbers
        else:
            x.data = 1.5 * normal * (x.shape[-1] ** -0.5)


def rewrite_config(folder, changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite_tensors(folder, target, change):
    """Copies a folder's tensors into one file without an index, after `change` has changed them."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    change(tensors)
    save_file(tensors, target / "model.safetensors")


def load(folder, **options):
    """(ModelConfig, float32 weights) of a folder."""
    config = ModelConfig.from_hf(folder)
    return config, load_weights(folder, config, jnp.float32, progress=False, **options)

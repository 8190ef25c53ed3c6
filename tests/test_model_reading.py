"""What examples/models reads from config.json and generation_config.json.

It needs no PyTorch. test_model_rope.py compares what this gives with transformers' modules.
"""

import json
import os
import re
import tomllib
from pathlib import Path

import pytest

if os.environ.get("JAX_FLASHMLA_REQUIRE_TRANSFORMERS") != "1":
    pytest.importorskip("transformers")

import transformers

from examples.models.config import PRESETS, ModelConfig
from examples.models.families import FAMILIES, REFUSED, TRANSFORMERS

ROOT = Path(__file__).parents[1]
TINY = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 512,
}
V2, V3 = TINY | {"model_type": "deepseek_v2"}, TINY | {"model_type": "deepseek_v3"}
YARN = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}


# -------------------- The table of families


def test_the_table_of_the_docs_is_that_of_the_code():
    page = (ROOT / "docs" / "models.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| `(\w+)` \|$", page, re.MULTILINE)
    assert rows == [(name, one.models, one.compared_with) for name, one in FAMILIES.items()]
    assert f"transformers {TRANSFORMERS}" in page


def test_transformers_is_pinned_to_what_was_compared_with():
    assert transformers.__version__.startswith(f"{TRANSFORMERS}.")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"][
        "optional-dependencies"
    ]
    assert f"transformers=={TRANSFORMERS}.*" in extras["examples"]


@pytest.mark.parametrize("name", FAMILIES)
def test_classes_of_the_table_exist(name):
    family = FAMILIES[name]
    if family.config_class:
        assert name not in transformers.CONFIG_MAPPING, "transformers has its own class now"
        assert hasattr(transformers, family.config_class)
    assert hasattr(transformers, family.compared_with)


# -------------------- config.json

# As published, without keys that only matter in training.
_BOTH = {
    "hidden_act": "silu", "kv_lora_rank": 512, "moe_layer_freq": 1, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "v_head_dim": 128,
}  # fmt: skip
_V2 = _BOTH | {
    "model_type": "deepseek_v2", "bos_token_id": 100000, "eos_token_id": 100001,
    "first_k_dense_replace": 1, "max_position_embeddings": 163840, "n_shared_experts": 2,
    "norm_topk_prob": False, "num_experts_per_tok": 6, "rope_theta": 10000,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707,
        "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096, "type": "yarn"},
    "scoring_func": "softmax", "vocab_size": 102400,
}  # fmt: skip
_V3 = _BOTH | {
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "q_lora_rank": 1536, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
        "weight_block_size": [128, 128]},
}  # fmt: skip
PUBLISHED = {
    "deepseek-v2-lite": _V2 | {
        "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
        "n_group": 1, "n_routed_experts": 64, "num_attention_heads": 16, "num_hidden_layers": 27,
        "num_key_value_heads": 16, "q_lora_rank": None, "routed_scaling_factor": 1.0,
        "topk_group": 1, "topk_method": "greedy",
    },
    "deepseek-v2": _V2 | {
        "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536,
        "n_group": 8, "n_routed_experts": 160, "num_attention_heads": 128, "num_hidden_layers": 60,
        "num_key_value_heads": 128, "q_lora_rank": 1536, "routed_scaling_factor": 16.0,
        "topk_group": 3, "topk_method": "group_limited_greedy",
    },
    "deepseek-v3": _V3 | {
        "model_type": "deepseek_v3", "bos_token_id": 0, "eos_token_id": 1,
        "first_k_dense_replace": 3, "max_position_embeddings": 163840, "n_group": 8,
        "n_routed_experts": 256, "num_attention_heads": 128, "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1, "rope_theta": 10000, "routed_scaling_factor": 2.5,
        "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0,
            "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"},
        "topk_group": 4, "vocab_size": 129280,
    },
    "kimi-k2": _V3 | {
        "model_type": "kimi_k2", "bos_token_id": 163584, "eos_token_id": 163585,
        "first_k_dense_replace": 1, "max_position_embeddings": 131072, "n_group": 1,
        "n_routed_experts": 384, "num_attention_heads": 64, "num_key_value_heads": 64,
        "num_nextn_predict_layers": 0, "rope_theta": 50000.0, "routed_scaling_factor": 2.827,
        "rope_scaling": {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0,
            "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"},
        "topk_group": 1, "vocab_size": 163840,
    },
}  # fmt: skip
OF_THE_CHECKPOINT = ("eos", "fp8_block", "extra_layers")  # random weights need none of these


@pytest.mark.parametrize("name", PRESETS)
def test_published_configurations_are_the_named_ones(name):
    config = ModelConfig.from_hf(PUBLISHED[name])
    assert config.eos == (PUBLISHED[name]["eos_token_id"],)
    assert config.fp8_block == (None if "v2" in name else (128, 128))
    assert config.extra_layers == (name == "deepseek-v3")
    differ = [
        field
        for field, value in vars(config).items()
        if value != getattr(PRESETS[name], field) and field not in OF_THE_CHECKPOINT
    ]
    assert differ == []


def test_absent_keys_have_the_defaults_of_transformers():
    config = ModelConfig.from_hf({"model_type": "deepseek_v3", "n_routed_experts": 64})
    assert (config.groups, config.groups_per_token, config.routing_scale) == (8, 4, 2.5)
    assert (config.kv_lora_rank, config.value_dim, config.vocab) == (512, 128, 129280)
    assert (config.experts, config.normalize_routing, config.topk_method) == (64, True, "noaux_tc")
    config = ModelConfig.from_hf(V2)
    assert (config.groups, config.routing_scale, config.topk_method) == (1, 1.0, "greedy")
    assert (config.normalize_routing, config.shared_experts) == (False, 2)


def test_the_outer_keys_of_kimi_k25_come_first():
    text = TINY | {"model_type": "kimi_k2", "eos_token_id": 5, "tie_word_embeddings": False}
    config = ModelConfig.from_hf({"model_type": "kimi_k25", "text_config": text})
    assert (config.eos, config.tied, config.width) == ((5,), True, 64)  # True: the class's default
    outer = {"eos_token_id": [6, 7], "tie_word_embeddings": False}
    config = ModelConfig.from_hf({"model_type": "kimi_k25", "text_config": text} | outer)
    assert (config.eos, config.tied) == ((6, 7), False)


@pytest.mark.parametrize(("value", "expected"), [(True, True), (False, False), (None, False)])
def test_rope_interleave_null_is_false(value, expected):
    assert ModelConfig.from_hf(V3).rope_interleave
    assert ModelConfig.from_hf(V3 | {"rope_interleave": value}).rope_interleave is expected


def test_reading_leaves_the_dict_as_it_was():
    given = V3 | {"rope_scaling": dict(YARN)}
    ModelConfig.from_hf(given)
    assert given == V3 | {"rope_scaling": YARN}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topk_method": "sinkhorn"}, "topk_method is 'sinkhorn'; supported: 'noaux_tc'"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2; supported: 4"),
        ({"head_dim": 32}, "head_dim is 32; supported: 16"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ({"n_group": 3}, "n_group 3 does not divide n_routed_experts 8"),
        ({"n_group": None}, "n_group is None; it must be an integer"),
        ({"n_group": 2, "topk_group": 4}, "topk_group is 4, more than n_group 2"),
        ({"n_group": 4, "topk_group": 1, "num_experts_per_tok": 5},
         "num_experts_per_tok is 5, but topk_group leaves 2"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok is None; it must be an integer"),
        ({"vocab_size": None}, "vocab_size"),
        ({"vocab_size": "96"}, "vocab_size"),
        ({"kv_lora_rank": 0}, "kv_lora_rank is 0; it must be an integer of at least 1"),
        ({"v_head_dim": None}, "v_head_dim is None"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"rope_scaling": {"type": "longer", "factor": 2.0}}, "rope_type is 'longer'"),
        ({"rope_scaling": {"type": "yarn"}}, "factor"),
        ({"rope_scaling": YARN | {"factor": None}}, "factor is None; it must be a number"),
        ({"rope_scaling": YARN | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_theta": None}, "rope_theta is None; it must be a number"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method is 'awq'"),
        ({"quantization_config": {"weight_block_size": [64, 64]}}, "quant_method is None"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size .* None"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, None]}},
         r"weight_block_size .* \[64, None\]"),
        ({"first_k_dense_replace": None}, "first_k_dense_replace is None"),
        ({"model_type": "deepseek_v2", "norm_topk_prob": True}, "norm_topk_prob is True"),
        ({"model_type": "deepseek_v2", "rope_interleave": False}, "rope_interleave is False"),
        ({"model_type": "deepseek_v2", "mlp_bias": True}, "mlp_bias is True"),
        ({"model_type": "deepseek_v2", "topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'"),
        ({"model_type": "deepseek_v2", "scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'"),
        ({"model_type": "deepseek_v2", "num_experts_per_tok": None}, "num_experts_per_tok is None"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}") as error:
        ModelConfig.from_hf(V3 | {"n_group": 1, "topk_group": 1} | changes)
    assert "\n" not in str(error.value)


EVERYWHERE = (
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"attention_bias": True}, "attention_bias is True"),
    ({"num_key_value_heads": 1}, "num_key_value_heads is 1"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
    # transformers' masks and caches heed these, in whichever model they are.
    ({"is_causal": False}, "is_causal is False"),
    ({"is_causal": None}, "is_causal is None"),
    ({"sliding_window": 8}, "sliding_window is 8"),
    ({"attention_chunk_size": 8}, "attention_chunk_size is 8"),
    ({"layer_types": ["full_attention", "sliding_attention"], "num_hidden_layers": 2},
     "layer_types is 'sliding_attention'"),
    ({"per_layer_config": {"1": {"rms_norm_eps": 0.5}}}, "per_layer_config"),
    ({"quantization_config": {"quant_method": "compressed-tensors"}}, "quant_method is 'compr"),
)  # fmt: skip
OF_ONE_FAMILY = {
    "youtu": [({"mlp_bias": True}, "mlp_bias is True")],
    "glm4_moe_lite": [
        ({"mlp_layer_types": ["dense", "other"], "num_hidden_layers": 2}, "mlp_layer_types is"),
        ({"mlp_layer_types": ["dense"] * 3}, "mlp_layer_types is .* each of the 47 layers"),
        ({"first_k_dense_replace": 2}, "first_k_dense_replace is 2, but mlp_layer_types"),
        ({"first_k_dense_replace": "1"}, "first_k_dense_replace is '1'"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
    ],
    "axk1": [({"mlp_layer_types": ["sparse"]}, "mlp_layer_types is .* each of the 61 layers")],
    "longcat_flash": [
        ({"attention_method": "MHA"}, "attention_method is 'MHA'"),
        ({"mla_scale_q_lora": False}, "mla_scale_q_lora is False"),
        ({"mla_scale_kv_lora": False}, "mla_scale_kv_lora is False"),
        ({"norm_topk_prob": True}, "norm_topk_prob is True"),
        ({"router_bias": True}, "router_bias is True"),
        ({"zero_expert_type": "copy"}, "zero_expert_type is 'copy'"),
        ({"qk_head_dim": 96}, "qk_head_dim is 96"),
        ({"rope_interleave": False}, "rope_interleave is False"),
        ({"zero_expert_num": -1}, "zero_expert_num is -1"),
        ({"head_dim": 128}, "head_dim is 128; supported: 64"),
        ({"moe_topk": 900}, "moe_topk is 900, but .* give 768 experts"),
    ],
    "kimi_k25": [
        ({"text_config": {"model_type": "llama"}}, "model_type is 'llama'"),
        ({"quantization_config": {"quant_method": "int4"}}, "quant_method is 'int4'"),
    ],
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_refuses_what_it_does_not_compute(name):
    def text(changes):
        return {"text_config": changes} if name == "kimi_k25" else changes

    common = [(text(changes), message) for changes, message in EVERYWHERE]
    for changes, message in [*common, *OF_ONE_FAMILY.get(name, [])]:
        with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
            ModelConfig.from_hf({"model_type": name} | changes)


def test_layers_without_experts():
    def dense(**contents):
        config = ModelConfig.from_hf(contents)
        return [layer for layer in range(config.layers) if not config.has_experts(layer)]

    assert dense(model_type="deepseek_v3") == [0, 1, 2]
    assert dense(model_type="deepseek_v3", num_hidden_layers=2) == [0, 1]
    assert dense(model_type="youtu") == list(range(32))
    assert dense(model_type="axk1", num_hidden_layers=5, moe_layer_freq=2) == [0, 1, 3]
    types = ["sparse", "dense", "sparse"]
    assert dense(model_type="glm4_moe_lite", num_hidden_layers=3, mlp_layer_types=types) == [1]


@pytest.mark.parametrize("name", ["llama", None, ["deepseek_v3"], "kimi_linear"])
def test_an_unknown_model_type(name):
    with pytest.raises(ValueError, match=r"model_type ") as error:
        ModelConfig.from_hf(TINY | {"model_type": name})
    message = str(error.value)
    assert repr(name) in message
    assert message.endswith(REFUSED.get(str(name), ", ".join(sorted(FAMILIES))))
    assert "\n" not in message


# -------------------- Folders


def write(folder, name="config.json", **contents):
    (folder / name).write_text(json.dumps(contents))


def test_generation_config_names_the_tokens_that_end_a_text(tmp_path):
    write(tmp_path, **V3, eos_token_id=6)
    assert ModelConfig.from_hf(tmp_path).eos == (6,)
    write(tmp_path, "generation_config.json", eos_token_id=[7, 8])
    assert ModelConfig.from_hf(tmp_path).eos == (7, 8)
    write(tmp_path, "generation_config.json", eos_token_id=9)
    assert ModelConfig.from_hf(str(tmp_path)).eos == (9,)
    write(tmp_path, "generation_config.json", bos_token_id=3)
    assert ModelConfig.from_hf(tmp_path).eos == (6,)


def test_what_is_not_used_of_generation_config_is_told(tmp_path, recwarn):
    write(tmp_path, **V3)
    drawing = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}  # options of the command
    write(tmp_path, "generation_config.json", eos_token_id=7, **drawing)
    ModelConfig.from_hf(tmp_path)
    assert not recwarn
    changed = {"repetition_penalty": 1.1, "suppress_tokens": [5]}
    write(tmp_path, "generation_config.json", eos_token_id=7, **changed)
    told = r"^generation_config.json: not used here: repetition_penalty 1.1, suppress_tokens \[5\]$"
    with pytest.warns(UserWarning, match=told):
        assert ModelConfig.from_hf(tmp_path).eos == (7,)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"eos_token_id": ["</s>"]}, r"eos_token_id is \['</s>'\]; it must be a token"),
        ({"max_new_tokens": -4}, ".*max_new_tokens"),  # what transformers refuses
    ],
)
def test_a_generation_config_that_cannot_be_used(contents, message, tmp_path):
    write(tmp_path, **V3)
    write(tmp_path, "generation_config.json", **contents)
    with pytest.raises(ValueError, match=rf"^generation_config\.json: {message}") as error:
        ModelConfig.from_hf(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_configuration_that_is_no_object(name, tmp_path):
    write(tmp_path, **V3)
    for text, message in (('{"model_type": ', "is not JSON"), ("[1, 2]", "must have an object")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path / name))} {message}"):
            ModelConfig.from_hf(tmp_path)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no .*nowhere/config\.json: name a folder"):
        ModelConfig.from_hf(tmp_path / "nowhere")


@pytest.mark.parametrize("model_type", [*FAMILIES, "other"])
def test_code_in_the_folder_is_not_run(model_type, tmp_path):
    contents = TINY | {"model_type": model_type, "auto_map": {"AutoConfig": "stray.Config"}}
    if model_type in FAMILIES and not FAMILIES[model_type].config_class:
        contents = {key: contents[key] for key in ("model_type", "auto_map")}
    write(tmp_path, **contents)
    ran = tmp_path / "ran"
    (tmp_path / "stray.py").write_text(f"open({str(ran)!r}, 'w')\nraise SystemExit('ran')\n")
    if model_type in FAMILIES:
        if model_type != "deepseek_v2":  # whose class has no default of num_experts_per_tok
            assert ModelConfig.from_hf(tmp_path).layers > 0
    else:
        with pytest.raises(ValueError, match="model_type is 'other'"):
            ModelConfig.from_hf(tmp_path)
    assert not ran.exists()

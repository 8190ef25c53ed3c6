"""The rotary positions of examples/models beside those of transformers' modules, in PyTorch."""

import importlib
import json
import os

import numpy as np
import pytest

if os.environ.get("JAX_FLASHMLA_REQUIRE_TRANSFORMERS") != "1":
    for package in ("torch", "transformers"):
        pytest.importorskip(package)

import transformers
from test_model_reading import TINY, YARN

from examples.models.config import ModelConfig
from examples.models.rope import frequencies


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_theta": 500.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 700.0}, "rope_theta": 500.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 700.0}, "rope_scaling": YARN},
        {"rope_parameters": {**YARN, "rope_type": "default"}},
        {"rope_scaling": YARN, "rope_theta": 500},
        {"rope_scaling": YARN | {"mscale": 0.7}},
        {"rope_scaling": YARN | {"mscale_all_dim": 0.7}},
        {"rope_scaling": YARN | {"mscale": 0, "mscale_all_dim": 0.7}},
        {"rope_scaling": YARN | {"mscale": 1.3, "mscale_all_dim": 0.7}},
        {"rope_scaling": YARN | {"attention_factor": 1.5, "mscale_all_dim": 0.7}},
        {"rope_scaling": YARN | {"factor": 0.5, "mscale": 1.3}},
        {"rope_scaling": YARN | {"beta_fast": 4, "beta_slow": 2}},
        {"rope_scaling": YARN | {"beta_fast": 1, "beta_slow": 1}},
        {"rope_scaling": YARN | {"beta_fast": 1, "beta_slow": 32}},
        {"rope_scaling": YARN | {"original_max_position_embeddings": 4}},
        {"rope_scaling": YARN | {"beta_fast": 4, "truncate": False}},
        {"rope_scaling": YARN | {"beta_fast": 4, "truncate": None}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 99},
        {"rope_scaling": YARN, "original_max_position_embeddings": 99},
    ],
    ids=str,
)
def test_rotary_positions_are_those_of_transformers(family, changes):
    contents = TINY | {"model_type": family} | changes
    config = ModelConfig.from_hf(contents)

    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    prefix = {"deepseek_v2": "DeepseekV2", "deepseek_v3": "DeepseekV3"}[family]
    theirs = transformers.CONFIG_MAPPING[family].from_dict(json.loads(json.dumps(contents)))
    rotary = getattr(modeling, f"{prefix}RotaryEmbedding")(theirs)
    attention = getattr(modeling, f"{prefix}Attention")(theirs, layer_idx=0)

    np.testing.assert_allclose(frequencies(config), rotary.inv_freq.numpy(), rtol=1e-6)
    size = config.yarn.rotation_scale if config.yarn else 1.0
    assert size == pytest.approx(rotary.attention_scaling)
    assert config.softmax_scale == pytest.approx(attention.scaling)

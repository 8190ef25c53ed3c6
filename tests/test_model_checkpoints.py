"""Tests how examples/models reads the files of a checkpoint."""

import functools
import shutil

import jax
import numpy as np
import pytest
from saved_models import load, make_model, rewrite_config, rewrite_tensors, torch

from examples.models.parallel import Layout
from examples.models.weights import Leaf, leaves

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small DeepSeek-V3 in several files."""
    folder = tmp_path_factory.mktemp("v3")
    make_model("v3").save_pretrained(folder, max_shard_size="100KB")
    return folder


def save_as_one_file(folder, target, change):
    rewrite_tensors(folder, target, change)
    shutil.copy(folder / "config.json", target)


def test_one_file_gives_the_same_weights_as_several(folder, tmp_path):
    assert len(list(folder.glob("*.safetensors"))) > 3
    save_as_one_file(folder, tmp_path, lambda tensors: None)
    jax.tree.map(np.testing.assert_array_equal, load(folder)[1], load(tmp_path)[1])


def test_weights_have_the_sharding_of_the_layout(folder):
    layout = Layout.over("tp", jax.devices("cpu")[:2])
    config, params = load(folder, place=layout.place)
    is_leaf = {"is_leaf": lambda x: isinstance(x, Leaf)}
    expected = jax.tree.map(layout.place, leaves(config), **is_leaf)
    assert jax.tree.map(lambda x: x.sharding.spec, params) == jax.tree.map(
        lambda sharding: sharding.spec, expected
    )
    assert params["layers"][1]["experts_down"].addressable_shards[1].data.shape == (8, 24, 64)
    jax.tree.map(np.testing.assert_array_equal, params, load(folder)[1])


def test_wrong_tensors_are_listed(folder, tmp_path):
    def change(tensors):
        tensors["model.layers.1.mlp.experts.3.stray.weight"] = tensors.pop(
            "model.layers.1.mlp.experts.3.up_proj.weight"
        )
        tensors["model.norm.weight"] = torch.ones(63)
        # Allowed: a tensor of the layer that predicts one more token, and a constant.
        tensors["model.layers.2.eh_proj.weight"] = torch.ones(2, 2)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        # Not allowed: there is only one such layer.
        tensors["model.layers.3.eh_proj.weight"] = torch.ones(2, 2)

    save_as_one_file(folder, tmp_path, change)
    with pytest.raises(ValueError, match="4 tensors are wrong") as error:
        load(tmp_path)
    assert [line.split() for line in str(error.value).splitlines()[1:]] == [
        ["misshapen", "model.norm.weight", "[63],", "expected", "[64]"],
        ["missing", "model.layers.1.mlp.experts.3.up_proj.weight", "[48,", "64]"],
        ["surplus", "model.layers.1.mlp.experts.3.stray.weight", "[48,", "64]"],
        ["surplus", "model.layers.3.eh_proj.weight", "[2,", "2]"],
    ]


def test_a_tied_head_that_differs_is_refused(folder, tmp_path):
    """Transformers uses such a head, whatever config.json says."""
    save_as_one_file(folder, tmp_path, lambda tensors: None)
    rewrite_config(tmp_path, {"tie_word_embeddings": True})
    with pytest.raises(
        ValueError, match=r"lm_head\.weight differs .* tie_word_embeddings to false"
    ):
        load(tmp_path)

    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    rewrite_tensors(folder, tmp_path, change)
    assert "head" not in load(tmp_path)[1]


def test_a_folder_without_weights(folder, tmp_path):
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="safetensors"):
        load(tmp_path)


FP8_BLOCK = (40, 24)  # divides no axis, so the last blocks are smaller


def quantize(weight):
    """(FP8 values, a scale for each block), as in the published DeepSeek-V3."""
    rows, columns = (-(-n // size) for n, size in zip(weight.shape, FP8_BLOCK, strict=True))
    scale = torch.zeros(rows, columns)
    values = torch.zeros(weight.shape)
    for i in range(rows):
        for j in range(columns):
            block = np.s_[
                i * FP8_BLOCK[0] : (i + 1) * FP8_BLOCK[0], j * FP8_BLOCK[1] : (j + 1) * FP8_BLOCK[1]
            ]
            scale[i, j] = weight[block].abs().max() / 448
            values[block] = weight[block] / scale[i, j]
    return values.to(torch.float8_e4m3fn), scale


def dequantize(values, scale):
    """The values times their scales, with numpy, element by element."""
    row, column = np.indices(values.shape)
    scale = scale.numpy()[row // FP8_BLOCK[0], column // FP8_BLOCK[1]]
    return torch.from_numpy(values.float().numpy() * scale)


def test_fp8_blocks(folder, tmp_path):
    quantized = [tmp_path / "fp8", tmp_path / "plain"]

    def change(tensors, keep_fp8):
        for name in list(tensors):
            if "experts" in name or name.endswith("b_proj.weight"):
                values, scale = quantize(tensors[name])
                tensors[name] = values if keep_fp8 else dequantize(values, scale)
                if keep_fp8:
                    tensors[f"{name}_scale_inv"] = scale

    for path, keep_fp8 in zip(quantized, (True, False), strict=True):
        path.mkdir()
        save_as_one_file(folder, path, functools.partial(change, keep_fp8=keep_fp8))
    with pytest.raises(ValueError, match=r"in FP8 .*kv_b_proj\.weight"):
        load(quantized[0])
    quantization = {"quant_method": "fp8", "weight_block_size": list(FP8_BLOCK)}
    rewrite_config(quantized[0], {"quantization_config": quantization})
    (_, fp8), (_, plain) = map(load, quantized)
    jax.tree.map(np.testing.assert_array_equal, fp8, plain)
    before = load(folder)[1]["layers"][1]["key_up"]
    after = fp8["layers"][1]["key_up"]
    assert 1e-3 < np.linalg.norm(after - before) / np.linalg.norm(before) < 0.05

"""Compares examples/models with the models of transformers, on the CPU in float32.

The two share only the checkpoint's files. Transformers writes them, and has attention without
absorption or pages, routing and rotary positions of its own.
"""

import functools
import json
import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

if os.environ.get("JAX_FLASHMLA_REQUIRE_TRANSFORMERS") != "1":
    for package in ("torch", "transformers", "tqdm", "tokenizers"):
        pytest.importorskip(package)

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
)

from examples.models import generate
from examples.models.config import ModelConfig
from examples.models.decoding import Decoder, allocate
from examples.models.model import forward, init_cache
from examples.models.parallel import Layout
from examples.models.weights import Leaf, leaves, load_weights

torch.set_num_threads(1)  # jax has threads of its own
pytestmark = pytest.mark.usefixtures("quick_compile")

PAGE, CHUNK, STEPS = 16, 32, 64
# At the ends of pages and chunks. With STEPS all go past the 64 tokens that YaRN extends.
PROMPT_LENGTHS = (70, 1, 15, 16, 17, 32, 33, 47)
TOLERANCE = 1e-4

YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,  # not equal to mscale, so that the rotation is scaled too
}
SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24,
    "v_head_dim": 20,
    "max_position_embeddings": 256,
    "eos_token_id": None,
}
GROUPS = {"n_group": 4, "topk_group": 2}

# {name: (changes to SIZES, changes to config.json after transformers wrote it)}
V2 = {
    "v2": (
        {**GROUPS, "topk_method": "group_limited_greedy", "routed_scaling_factor": 4.0,
         "rope_scaling": YARN}, {},
    ),
    "v2-lite": ({"q_lora_rank": None, "n_shared_experts": 2, "rope_scaling": YARN}, {}),
    "v2-tied": ({"tie_word_embeddings": True, "first_k_dense_replace": 0}, {}),
}  # fmt: skip
V3 = {
    "v3": ({**GROUPS, "rope_scaling": YARN}, {}),
    "v3-halves": ({**GROUPS, "rope_interleave": False, "norm_topk_prob": False}, {}),
    # Transformers has no class for it. Its layers are those of DeepSeek-V3, without groups.
    "kimi-k2": (
        {"n_group": 1, "topk_group": 1, "n_routed_experts": 12, "rope_theta": 50000.0,
         "rope_scaling": {**YARN, "beta_fast": 1, "mscale_all_dim": 1.0},
         "routed_scaling_factor": 2.827},
        {"model_type": "kimi_k2"},
    ),
}  # fmt: skip


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


@pytest.fixture(scope="module")
def model(request, tmp_path_factory):
    """(transformers' model, the folder it was saved to).

    The folder has float32 weights, and our model runs in float32. Transformers' model runs in
    float64, because in float32 its logits are wrong by up to 7e-5 and ours by 5e-5. On some CPUs
    these errors would add up to more than the tolerance.
    """
    name = request.param
    changes, rewritten = (V2 | V3)[name]
    config, cls = (
        (DeepseekV2Config, DeepseekV2ForCausalLM)
        if name in V2
        else (DeepseekV3Config, DeepseekV3ForCausalLM)
    )
    theirs = cls(config(**SIZES | changes)).eval()
    randomize(theirs, seed=len(name))
    folder = tmp_path_factory.mktemp(name)
    theirs.save_pretrained(folder, max_shard_size="100KB")
    rewrite_config(folder, rewritten)
    theirs.set_experts_implementation("eager")  # the other implementations do not take float64
    return theirs.double(), folder


def rewrite_config(folder, changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


every_model = pytest.mark.parametrize("model", [*V2, *V3], indirect=True)


def load(folder, **options):
    config = ModelConfig.from_hf(folder)
    return config, load_weights(folder, config, jnp.float32, progress=False, **options)


def make_prompts(vocab, lengths=PROMPT_LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, length).tolist() for length in lengths]


@functools.partial(
    jax.jit,
    static_argnames="config",
    donate_argnames="cache",
)
def step(params, config, cache, tokens, table, lengths, new):
    return forward(params, config, cache, tokens, table, lengths, new, all_logits=True)


def our_logits(params, config, prompts, steps):
    """Reads prompts in chunks, then decodes greedily: (tokens, logits of all of them) by sequence.

    All sequences start in the first chunk. So shorter sequences have columns of padding in their
    last chunk, and no new token in the chunks after it.
    """
    lengths = np.array([len(prompt) for prompt in prompts])
    table, pages = allocate(lengths + steps, PAGE)
    # Pages from the last one down. The last slot of the last page is where slot -1 of the next
    # layer would be if -1 were not kept, and the first sequence uses that page.
    table = np.where(table < 0, -1, pages - 1 - table)
    cache = init_cache(config, pages, PAGE, jnp.float32).at[:].set(jnp.nan)
    found = [[] for _ in prompts]

    def run(tokens, ends, new):
        nonlocal cache
        args = (tokens, table, ends, new)
        logits, cache = step(params, config, cache, *(np.asarray(x, np.int32) for x in args))
        for i, count in enumerate(new):
            found[i].extend(np.asarray(logits[i, tokens.shape[1] - count :]))

    for start in range(0, lengths.max(), CHUNK):
        new = np.clip(lengths - start, 0, CHUNK)
        tokens = np.full((len(prompts), CHUNK), 7)
        for row, prompt, count in zip(tokens, prompts, new, strict=True):
            row[CHUNK - count :] = prompt[start : start + count]
        run(tokens, np.where(new > 0, start + new, 0), new)
    sequences = [list(prompt) for prompt in prompts]
    for i in range(steps):
        for sequence, logits in zip(sequences, found, strict=True):
            sequence.append(int(np.argmax(logits[-1])))
        tokens = np.array([[sequence[-1]] for sequence in sequences])
        run(tokens, lengths + i + 1, np.ones_like(lengths))
    return sequences, [np.array(logits) for logits in found]


def their_logits(model, sequence):
    with torch.no_grad():
        return model(torch.tensor([sequence])).logits[0].numpy()


@every_model
def test_logits_and_greedy_tokens(model):
    theirs, folder = model
    config, params = load(folder)
    prompts = make_prompts(config.vocab)
    sequences, ours = our_logits(params, config, prompts, STEPS)
    for prompt, sequence, logits in zip(prompts, sequences, ours, strict=True):
        expected = their_logits(theirs, sequence)
        assert np.abs(expected).max() > 1  # or the tolerance would be too loose
        np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)
        greedy = np.argmax(expected[len(prompt) - 1 : -1], axis=-1)
        assert sequence[len(prompt) :] == greedy.tolist()


@pytest.mark.parametrize("model", ["kimi-k2"], indirect=True)
def test_one_sequence(model):
    """A step has one token. Then the experts' weights are copied."""
    theirs, folder = model
    config, params = load(folder)
    assert 3 * config.experts_per_token <= config.experts
    (sequence,), (logits,) = our_logits(params, config, [[11]], 20)
    np.testing.assert_allclose(logits, their_logits(theirs, sequence), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("model", ["v2-lite", "kimi-k2"], indirect=True)
def test_decoder(model):
    """The loop on the device gives the tokens of transformers' loop, and stops at the same one."""
    theirs, folder = model
    config, params = load(folder)
    prompts, expected = make_prompts(config.vocab, (3, 40, 17), seed=2), []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        answer = theirs.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=20,
            do_sample=False,
            pad_token_id=0,
        )
        expected.append(answer[0, len(prompt) :].tolist())
    end = expected[1][7]  # the second sequence ends here or before
    decoder = Decoder(params, config, chunk=16, eos=[end, 1000])
    state = decoder.start(3, [len(p) + 20 for p in prompts], page_block_size=PAGE)
    state = decoder.prefill(state, prompts)
    first, state = decoder.decode(state, 10)
    second, _ = decoder.decode(state, 10)
    for tokens, row in zip(np.concatenate([first, second], axis=1), expected, strict=True):
        length = row.index(end) + 1 if end in row else len(row)
        assert tokens.tolist() == row[:length] + [-1] * (20 - length)


def save_tokenizer(folder, vocab):
    """Saves a tokenizer in which token i is the word w<i>."""
    words = WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("slots", [[], ["--slots", "2"]], ids=["together", "slots"])
@pytest.mark.parametrize("model", ["v2-lite"], indirect=True)
def test_command(model, slots, capsys):
    theirs, folder = model
    save_tokenizer(folder, theirs.config.vocab_size)
    expected = []
    for prompt in ([1, 5, 6, 7], [1, 8]):  # token 1 starts every text
        expected.append(list(prompt))
        for _ in range(11):
            expected[-1].append(int(np.argmax(their_logits(theirs, expected[-1])[-1])))
        expected[-1] = " ".join(f"w{token}" for token in expected[-1][len(prompt) :])
    command = ["--model", str(folder), "--prompt", "w5 w6 w7", "--prompt", "w8", "--chunk", "16"]
    assert generate.main([*command, "--max-tokens", "11", "--batch", "3", *slots]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{expected[0]}\n\n--- w8\n{expected[1]}\n"
    said = r"2 at a time, generated [\d.]+ tokens/s" if slots else r"/s, [\d.]+ ms a step"
    assert re.search(rf"3 sequences on 1 x cpu: .*{said}", shown.err)


# -------------------- Checkpoints


v3 = pytest.mark.parametrize("model", ["v3"], indirect=True)


def save_as_one_file(folder, target, change):
    """Copies the model into one file without an index, after `change` has changed its tensors."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    change(tensors)
    shutil.copy(folder / "config.json", target)
    save_file(tensors, target / "model.safetensors")


@v3
def test_one_file_gives_the_same_weights_as_several(model, tmp_path):
    _, folder = model
    assert len(list(folder.glob("*.safetensors"))) > 3
    save_as_one_file(folder, tmp_path, lambda tensors: None)
    jax.tree.map(np.testing.assert_array_equal, load(folder)[1], load(tmp_path)[1])


@v3
def test_weights_have_the_sharding_of_the_layout(model):
    layout = Layout.over("tp", jax.devices("cpu")[:2])
    config, params = load(model[1], place=layout.place)
    is_leaf = {"is_leaf": lambda x: isinstance(x, Leaf)}
    expected = jax.tree.map(layout.place, leaves(config), **is_leaf)
    assert jax.tree.map(lambda x: x.sharding.spec, params) == jax.tree.map(
        lambda sharding: sharding.spec, expected
    )
    assert params["layers"][1]["experts_down"].addressable_shards[1].data.shape == (8, 24, 64)
    jax.tree.map(np.testing.assert_array_equal, params, load(model[1])[1])


@v3
def test_wrong_tensors_are_listed(model, tmp_path):
    def change(tensors):
        tensors["model.layers.1.mlp.experts.3.stray.weight"] = tensors.pop(
            "model.layers.1.mlp.experts.3.up_proj.weight"
        )
        tensors["model.norm.weight"] = torch.ones(63)
        # Allowed: a tensor of the layer that predicts one more token, and a constant.
        tensors["model.layers.3.eh_proj.weight"] = torch.ones(2, 2)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        # Not allowed: there is only one such layer.
        tensors["model.layers.4.eh_proj.weight"] = torch.ones(2, 2)

    save_as_one_file(model[1], tmp_path, change)
    with pytest.raises(ValueError, match="4 tensors are wrong") as error:
        load(tmp_path)
    assert [line.split() for line in str(error.value).splitlines()[1:]] == [
        ["misshapen", "model.norm.weight", "[63],", "expected", "[64]"],
        ["missing", "model.layers.1.mlp.experts.3.up_proj.weight", "[48,", "64]"],
        ["surplus", "model.layers.1.mlp.experts.3.stray.weight", "[48,", "64]"],
        ["surplus", "model.layers.4.eh_proj.weight", "[2,", "2]"],
    ]


@v3
def test_a_folder_without_weights(model, tmp_path):
    shutil.copy(model[1] / "config.json", tmp_path)
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


@v3
def test_fp8_blocks(model, tmp_path):
    _, folder = model
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

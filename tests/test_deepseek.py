"""examples/deepseek against transformers' models of the same weights, on the CPU in float32.

The two share the checkpoint's files and nothing else: its writer, attention without absorption or
pages, routing and rotary positions are theirs.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
)

from examples.deepseek.config import ModelConfig
from examples.deepseek.decoding import Decoder, allocate
from examples.deepseek.model import forward, init_cache
from examples.deepseek.weights import load_weights

PAGE, CHUNK, STEPS = 16, 32, 64
# Around the ends of pages and chunks; with the steps, past the 64 tokens before YaRN.
PROMPT_LENGTHS = (1, 15, 16, 17, 32, 33, 47, 70)
TOLERANCE = 1e-4

YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,  # unlike mscale: then the rotation is scaled as well
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

# {name: (what differs from SIZES, what config.json says that transformers does not)}
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
    # Not a class of its own in transformers: DeepSeek-V3's layers, without groups.
    "kimi-k2": (
        {"n_group": 1, "topk_group": 1, "n_routed_experts": 12, "rope_theta": 50000.0,
         "rope_scaling": {**YARN, "mscale_all_dim": 1.0}, "routed_scaling_factor": 2.827},
        {"model_type": "kimi_k2"},
    ),
}  # fmt: skip


def randomize(model, seed):
    """Weights with which logits are far from 0, softmaxes and routing far from even."""
    generator = torch.Generator().manual_seed(seed)
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        normal = torch.randn(x.shape, generator=generator)
        if name.endswith("inv_freq"):
            continue
        if "norm" in name:
            x.data = 1 + 0.3 * normal
        elif "e_score_correction_bias" in name:
            x.data = 0.1 * normal
        else:
            x.data = 1.5 * normal * (x.shape[-1] ** -0.5)


@pytest.fixture(scope="module")
def model(request, tmp_path_factory):
    """(transformers' model, the folder it was saved to)."""
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
    return theirs, folder


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


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def step(params, config, cache, tokens, table, lengths, new):
    return forward(params, config, cache, tokens, table, lengths, new, all_logits=True)


def our_logits(params, config, prompts, steps):
    """Chunks of the prompts, then greedy steps: (the tokens, all their logits) of each sequence.

    Every sequence is read from its start in chunks of its own length, so that columns of padding
    stand in the shorter ones, and slots without a token where a sequence has ended.
    """
    lengths = np.array([len(prompt) for prompt in prompts])
    table, pages = allocate(lengths + steps, PAGE)
    table = np.random.default_rng(1).permutation(pages)[table] * (table >= 0) - (table < 0)
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
        assert np.abs(expected).max() > 1  # or the bound would mean little
        np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)
        greedy = np.argmax(expected[len(prompt) - 1 : -1], axis=-1)
        assert sequence[len(prompt) :] == greedy.tolist()


@every_model
def test_decoder(model):
    """The loop on the device gives the tokens that transformers' own generation gives."""
    theirs, folder = model
    config, params = load(folder)
    prompts = make_prompts(config.vocab, (3, 40, 17), seed=2)
    expected = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        mask = torch.ones_like(tokens)
        answer = theirs.generate(
            tokens, attention_mask=mask, max_new_tokens=40, do_sample=False, pad_token_id=0
        )
        expected.append(answer[0, len(prompt) :].tolist())
    decoder = Decoder(params, config, chunk=16)
    state = decoder.start(3, [len(p) + 40 for p in prompts], page_block_size=PAGE)
    state = decoder.prefill(state, prompts)
    first, state = decoder.decode(state, 15)
    second, _ = decoder.decode(state, 25)
    np.testing.assert_array_equal(np.concatenate([first, second], axis=1), expected)

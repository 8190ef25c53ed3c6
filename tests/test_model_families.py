"""Compares examples/models with the models of transformers, on the CPU in float32.

The two share only the checkpoint's files. Transformers writes them, and has attention without
absorption or pages, routing and rotary positions of its own.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from saved_models import CASES, YARN, load, make_model, rewrite_config, rewrite_tensors, torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from examples.models import generate
from examples.models.decoding import Decoder, allocate
from examples.models.families import FAMILIES
from examples.models.model import forward, init_cache
from examples.models.parallel import Layout

pytestmark = pytest.mark.usefixtures("quick_compile")

PAGE, CHUNK, STEPS = 16, 32, 64
# At the ends of pages and chunks. With STEPS all go past the 64 tokens that YaRN extends.
PROMPT_LENGTHS = (70, 1, 15, 16, 17, 32, 33, 47)
TOLERANCE = 1e-4  # of the largest logit
CLEAR = 1e-3  # a smaller gap between the two largest logits does not decide which token it is


# -------------------- Folders as they are published, where transformers saves something else


def publish_kimi_k25(tensors):
    for name in [name for name in tensors if ".model.blocks." in name]:
        tensors[name.replace("blocks", "layers")] = tensors.pop(name)


def publish_glm(tensors):
    tensors["model.layers.2.eh_proj.weight"] = torch.ones(2, 2)


def publish_axk1(tensors):
    """Without the router's bias, and with the norm after the MLP in dense layers too."""
    for name in [name for name in tensors if "e_score_correction_bias" in name]:
        assert not tensors.pop(name).any()
    assert "model.layers.1.post_mlp_layernorm.weight" not in tensors
    tensors["model.layers.1.post_mlp_layernorm.weight"] = torch.ones(64)


def publish_longcat(tensors):
    """Without matrices of the experts that return their input, and with a layer for more tokens."""
    surplus = re.compile(r".*\.experts\.1[2-4]\.(gate|up)_proj\.weight")
    for name in [name for name in tensors if surplus.fullmatch(name)]:
        del tensors[name]
    tensors["model.mtp.norm.weight"] = torch.ones(64)


# As Sarvam's own code reads it. Its "deepseek_yarn" is YaRN, and its head_dim that of the cache.
SARVAM = {
    "head_dim": 48,
    "q_head_dim": 40,
    "rope_parameters": None,
    "rope_scaling": {**YARN, "type": "deepseek_yarn"},
    "rope_theta": 10000.0,
}

# {name: (changes to config.json, changes to the tensors)}
PUBLISHED = {
    "kimi-k2": ({"model_type": "kimi_k2"}, lambda tensors: None),
    "kimi-k2.5": ({}, publish_kimi_k25),
    "glm": ({"num_nextn_predict_layers": 1}, publish_glm),
    "axk1-other": ({}, publish_axk1),
    "longcat": ({}, publish_longcat),
    "sarvam-other": (SARVAM, lambda tensors: None),
}


@pytest.fixture(scope="module")
def model(request, tmp_path_factory):
    """(transformers' model, the folder it was saved to).

    The folder has float32 weights, and our model runs in float32. Transformers' model runs in
    float64, because in float32 its logits are wrong by up to 7e-5 and ours by 5e-5. On some CPUs
    these errors would add up to more than the tolerance.
    """
    name = request.param
    theirs, folder = make_model(name, seed=len(name)), tmp_path_factory.mktemp(name)
    if name == "axk1-other":
        for buffer, x in theirs.named_buffers():
            if "e_score_correction_bias" in buffer:
                x.data = torch.zeros_like(x)
    theirs.save_pretrained(folder, max_shard_size="100KB")
    if name in PUBLISHED:
        changes, change = PUBLISHED[name]
        saved, folder = folder, tmp_path_factory.mktemp(f"{name}-published")
        (folder / "config.json").write_bytes((saved / "config.json").read_bytes())
        rewrite_config(folder, changes)
        rewrite_tensors(saved, folder, change)
    if any("experts" in part for part, _ in theirs.named_modules()) and "longcat" not in name:
        theirs.set_experts_implementation("eager")  # the other ones do not take float64
    return theirs.double(), folder


every_model = pytest.mark.parametrize("model", CASES, indirect=True)


def make_prompts(vocab, lengths=PROMPT_LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, length).tolist() for length in lengths]


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def read_chunk(params, config, cache, tokens, table, lengths, new):
    return forward(params, config, cache, tokens, table, lengths, new, all_logits=True)


@functools.partial(jax.jit, static_argnames=("config", "steps"))
def decode(params, config, cache, token, table, lengths, steps):
    """(tokens [steps, b] from `token` on, the logits after each)."""

    def step(carry, _):
        cache, token, lengths = carry
        args = token[:, None], table, lengths + 1, jnp.ones_like(lengths)
        logits, cache = forward(params, config, cache, *args)
        return (cache, jnp.argmax(logits, -1).astype(jnp.int32), lengths + 1), (token, logits)

    return jax.lax.scan(step, (cache, token, lengths), length=steps)[1]


def our_logits(params, config, prompts, steps):
    """Reads prompts in chunks, then decodes greedily: (tokens, logits of all of them) by sequence.

    All sequences start in the first chunk. So shorter sequences have columns of padding in their
    last chunk, and no new token in the chunks after it.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    table, pages = allocate(lengths + steps, PAGE)
    # Pages from the last one down. The last slot of the last page is where slot -1 of the next
    # layer would be if -1 were not kept, and the first sequence uses that page.
    table = np.where(table < 0, -1, pages - 1 - table).astype(np.int32)
    cache = init_cache(config, pages, PAGE, jnp.float32).at[:].set(jnp.nan)
    found = [[] for _ in prompts]
    for start in range(0, lengths.max(), CHUNK):
        new = np.clip(lengths - start, 0, CHUNK)
        tokens = np.full((len(prompts), CHUNK), 7, np.int32)
        for row, prompt, count in zip(tokens, prompts, new, strict=True):
            row[CHUNK - count :] = prompt[start : start + count]
        ends = np.where(new > 0, start + new, 0).astype(np.int32)
        logits, cache = read_chunk(params, config, cache, tokens, table, ends, new)
        for i, count in enumerate(new):
            found[i].extend(np.asarray(logits[i, CHUNK - count :]))
    first = np.array([np.argmax(logits[-1]) for logits in found], np.int32)
    tokens, logits = map(np.array, decode(params, config, cache, first, table, lengths, steps))
    return (
        [[*prompt, *tokens[:, i].tolist()] for i, prompt in enumerate(prompts)],
        [np.concatenate([before, logits[:, i]]) for i, before in enumerate(found)],
    )


def their_logits(model, sequence):
    with torch.no_grad():
        return model(torch.tensor([sequence])).logits[0].numpy()


def assert_close(actual, expected):
    largest = np.abs(expected).max()
    assert largest > 1  # random weights, but not nearly equal logits
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE * largest)


@every_model
def test_logits_and_greedy_tokens(model):
    theirs, folder = model
    config, params = load(folder)
    prompts = make_prompts(config.vocab)
    sequences, ours = our_logits(params, config, prompts, STEPS)
    compared = 0
    for prompt, sequence, logits in zip(prompts, sequences, ours, strict=True):
        expected = their_logits(theirs, sequence)
        assert_close(logits, expected)
        expected = expected[len(prompt) - 1 : -1]
        second, first = np.sort(expected, axis=-1)[:, -2:].T
        clear = first - second > CLEAR
        compared += clear.sum()
        tokens = np.array(sequence[len(prompt) :])
        np.testing.assert_array_equal(tokens[clear], np.argmax(expected, axis=-1)[clear])
    assert compared > 0.98 * len(prompts) * STEPS


def test_every_family_is_compared():
    model_types = {"kimi-k2": "kimi_k2"}
    for name in CASES.keys() - model_types.keys():
        theirs = make_model(name)
        model_types[name] = theirs.config.model_type
        assert FAMILIES[model_types[name]].compared_with == type(theirs).__name__
    assert {*model_types.values()} == FAMILIES.keys()


@pytest.mark.parametrize("model", ["kimi-k2", "longcat"], indirect=True)
def test_one_sequence(model):
    """A step has one token. Then the experts' weights are copied."""
    theirs, folder = model
    config, params = load(folder)
    assert 3 * config.experts_per_token <= config.experts
    (sequence,), (logits,) = our_logits(params, config, [[11]], 20)
    assert_close(logits, their_logits(theirs, sequence))


# On two devices the norm of A.X-K1's experts must come after the sum over devices, and what
# LongCat's zero experts add must not be summed.
@pytest.mark.parametrize(
    ("model", "kind"), [("v2-lite", None), ("axk1", "tp"), ("longcat", "tp")], indirect=["model"]
)
def test_decoder(model, kind):
    """The loop on the device gives the tokens of transformers' loop, and stops at the same one."""
    theirs, folder = model
    layout = Layout.over(kind, jax.devices("cpu")[:2])
    config, params = load(folder, place=layout.place)
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
    decoder = Decoder(params, config, layout=layout, chunk=16, eos=[end, 1000])
    state = decoder.start(3, [len(p) + 20 for p in prompts], page_block_size=PAGE)
    state = decoder.prefill(state, prompts)
    first, state = decoder.decode(state, 10)
    second, _ = decoder.decode(state, 10)
    for tokens, row in zip(np.concatenate([first, second], axis=1), expected, strict=True):
        length = row.index(end) + 1 if end in row else len(row)
        assert tokens.tolist() == row[:length] + [-1] * (20 - length)


def save_tokenizer(folder, vocab):
    """Saves a tokenizer in which token i is the word w<i>, and w1 starts every text."""
    words = WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="w1 $A", special_tokens=[("w1", 1)])
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

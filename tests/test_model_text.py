"""Text of examples/models: Kimi's tokenizer against tiktoken, and streams of text."""

import base64
import functools
import os
from types import SimpleNamespace

import numpy as np
import pytest

if os.environ.get("JAX_FLASHMLA_REQUIRE_TRANSFORMERS") != "1":
    for package in ("transformers", "tqdm", "tiktoken", "jinja2"):
        pytest.importorskip(package)

import tiktoken
from tiny_model import (
    BYTES,
    CONFIG,
    byte_ids,
    byte_name,
    bytes_tokenizer,
    replace,
    write_tokenizer,
    write_weights,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from examples.models import generate
from examples.models.text import Numbers, Stream, Text

# -------------------- Kimi's tokenizer

KIMI_SPLIT = "|".join(
    [
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
KIMI_TEXT = (
    "Hello, world! 中文English混合 HTTPServer's It'S we'LL x==--->\n\n\t  y 1234567 ١٢٣\r\n"
    "naïve ǅ ʰ が カー 日本語のテキスト e\u0301 \N{GRINNING FACE}\u200d \u3000 -- ---- aaaaaaa   "
)


CONFIG_CODE = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}


@pytest.fixture
def kimi(tmp_path):
    """(a folder as Kimi-K2 is published, tiktoken's encoding of the same file)."""
    # Merges that run over the places where a text must be split, to see whether it is.
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        [KIMI_TEXT] * 5, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet)
    )
    to_byte = {c: bytes([i]) for i, c in enumerate(map(byte_name, range(256)))}
    ranks = {b"".join(map(to_byte.get, token)): rank for token, rank in trained.get_vocab().items()}
    (tmp_path / "tiktoken.model").write_bytes(
        b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    )
    first = len(ranks)
    names = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 4: "<|tool|>", 7: "[PAD]"}
    settings = {
        "tokenizer_class": "TikTokenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "added_tokens_decoder": {
            str(first + i): {"content": name, "special": name != "<|tool|>", "normalized": False}
            for i, name in names.items()
        },
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "additional_special_tokens": ["<|im_end|>"],
    }
    replace(tmp_path / "tokenizer_config.json", settings)
    replace(tmp_path / "tokenization_kimi.py", "raise RuntimeError('the code was run')")
    replace(tmp_path / "configuration_deepseek.py", "raise RuntimeError('the code was run')")
    replace(tmp_path / "chat_template.jinja", "{{ messages[0].content }}<|im_end|>")
    config = {"model_type": "kimi_k2", "vocab_size": first + 8, "auto_map": CONFIG_CODE}
    replace(tmp_path / "config.json", CONFIG | config)
    names = {i: names.get(i, f"<|reserved_token_{first + i}|>") for i in range(8)}
    special = {name: first + i for i, name in names.items()}
    return tmp_path, tiktoken.Encoding(
        "kimi", pat_str=KIMI_SPLIT, mergeable_ranks=ranks, special_tokens=special
    )


def test_kimi_tokens_are_those_of_tiktoken(kimi):
    folder, expected = kimi
    text = Text(folder)
    rng = np.random.default_rng(0)
    samples = [KIMI_TEXT, *("".join(rng.permutation(list(KIMI_TEXT))) for _ in range(200))]
    for sample in samples:
        tokens = text.encode(sample)
        assert tokens == expected.encode_ordinary(sample)
        assert text.decode(tokens) == sample
    # Without Kimi's rule of splitting the tokens differ.
    whole = tiktoken.Encoding(
        "other", pat_str=r"(?s).+", mergeable_ranks=expected._mergeable_ranks, special_tokens={}
    )
    assert text.encode(KIMI_TEXT) != whole.encode(KIMI_TEXT)


def test_kimi_special_tokens(kimi):
    folder, expected = kimi
    text = Text(folder)
    marked = "[BOS]a<|tool|>b<|im_end|>"
    tokens = text.encode(marked)
    assert tokens == expected.encode(marked, allowed_special="all")
    assert text.chat("a") == expected.encode("a<|im_end|>", allowed_special="all")
    assert text.decode(tokens) == "a<|tool|>b"  # the others are special
    assert text.decode([expected.n_vocab - 3, *tokens[1:2]]) == "a"  # a reserved one


@pytest.mark.usefixtures("quick_compile")
def test_the_command_runs_a_folder_as_kimi_is_published(kimi, capsys):
    folder, expected = kimi
    write_weights(folder)
    arguments = ["--model", str(folder), "--prompt", "Hello 中文", "--max-tokens", "9"]
    assert generate.main([*arguments, "--chat"]) == 0
    text = capsys.readouterr().out
    ids = expected.encode("Hello 中文<|im_end|>", allowed_special="all")
    arguments[2:4] = "--prompt-ids", ",".join(map(str, ids))
    assert generate.main(arguments) == 0
    answer = [int(token) for token in capsys.readouterr().out.split()]
    assert len(answer) == 9
    assert text == f"{Text(folder).decode(answer)}\n"


# -------------------- tokenizer.json


@pytest.fixture
def folder(tmp_path):
    replace(tmp_path / "config.json", CONFIG)
    write_tokenizer(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizerFast", "Mine"])
def test_a_class_does_not_change_what_tokenizer_json_says(folder, name):
    """Not even one that comes with the checkpoint, which is not run."""
    by_digit = bytes_tokenizer()
    by_digit.model = models.BPE({byte_name(i): i for i in range(BYTES)} | {"12": 260}, [("1", "2")])
    by_digit.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    replace(folder / "tokenizer.json", by_digit.to_str())
    settings = {"tokenizer_class": name, "bos_token": "<bos>"}
    if name == "Mine":
        settings["auto_map"] = {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}
        replace(folder / "mine.py", "raise RuntimeError('the code was run')")
    replace(folder / "tokenizer_config.json", settings)
    assert Text(folder).encode("a 12 é") == byte_ids("a 12 é")


# -------------------- Streams


def all_kinds_of_text(folder):
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<s>": 2}, unk_token="a"))
    words.add_special_tokens(["<s>"])
    pieces = Tokenizer(
        models.BPE(
            {"\u2581a": 0, "b": 1, "<s>": 2, "<0xC3>": 3, "<0xA9>": 4, "\u2581": 5},
            [],
            byte_fallback=True,
        )
    )
    pieces.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    pieces.add_special_tokens(["<s>"])
    return Text(folder), *(
        SimpleNamespace(decode=functools.partial(one.decode, skip_special_tokens=True))
        for one in (words, pieces)
    )


def test_streams_lose_nothing(folder):
    rng = np.random.default_rng(0)
    by_bytes, words, pieces = all_kinds_of_text(folder)
    letters = "aé中\N{GRINNING FACE}\N{REPLACEMENT CHARACTER} \n"
    answers = [(Numbers(), [3, 1, 2])]
    for _ in range(100):
        text = "".join(rng.choice(list(letters), 12))
        answers.append((by_bytes, by_bytes.encode(text)[rng.integers(5) : -rng.integers(1, 5)]))
        answers.append((by_bytes, rng.integers(0, BYTES + 8, 12).tolist()))
        answers.append((words, rng.integers(0, 3, 12).tolist()))
        answers.append((pieces, [x for i in rng.choice([0, 1, 2, 5, 34], 9) for x in
                                 ((3, 4) if i == 34 else (int(i),))]))  # fmt: skip
    for text, answer in answers:
        stream, shown = Stream(text), []
        for begin in range(0, len(answer), 3):
            shown.append(stream.add(answer[begin : begin + 3]))
        shown.append(stream.end())
        assert "".join(shown) == text.decode(answer)


def test_a_stream_shows_whole_characters_at_once(folder):
    text = Text(folder)
    stream = Stream(text)
    tokens = text.encode("wo\N{GRINNING FACE}r")[1:]
    assert [stream.add([token]) for token in tokens] == [
        "w",
        "o",
        "",
        "",
        "",
        "\N{GRINNING FACE}",
        "r",
    ]
    assert stream.add(tokens[:4]) == "wo"
    assert stream.end() == "\N{REPLACEMENT CHARACTER}"

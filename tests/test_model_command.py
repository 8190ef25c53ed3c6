"""The command of examples/models: its options, tokenizers, streams and errors."""

import base64
import contextlib
import functools
import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

if os.environ.get("JAX_FLASHMLA_REQUIRE_TRANSFORMERS") != "1":
    for package in ("transformers", "tqdm", "tiktoken", "jinja2"):
        pytest.importorskip(package)

import tiktoken
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from examples.models import generate
from examples.models.arguments import parse_args
from examples.models.checkpoint import checkpoint_tensors
from examples.models.config import ModelConfig
from examples.models.text import Numbers, Stream, Text

pytestmark = pytest.mark.usefixtures("quick_compile")

BYTES = 256  # the tokenizer's tokens 0 to 255 are bytes, in tokenizers' order
BOS, USER, ANSWER, TOOL = range(BYTES, BYTES + 4)
SPECIAL = {"<bos>": BOS, "<user>": USER, "<answer>": ANSWER}
CHAT = (
    "{% for m in messages %}<bos><user>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<answer>{% endif %}"
)
CONFIG = {
    "model_type": "deepseek_v3",
    "vocab_size": BYTES + 8,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "intermediate_size": 32,
    "n_routed_experts": 8,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 64,
    "bos_token_id": BOS,
    "eos_token_id": None,
}


def bytes_tokenizer():
    """Each byte is a token, so most answers of random weights are not UTF-8."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name) for name in SPECIAL])
    tokenizer.add_tokens([AddedToken("<tool>")])
    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    return tokenizer


def write_tokenizer(folder, settings=()):
    bytes_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<bos>", "chat_template": CHAT, **dict(settings)}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with random weights."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    write_tokenizer(folder)
    rng = np.random.default_rng(0)
    save_file(
        {
            name: rng.normal(1 if "norm" in name else 0, 0.4, shape).astype(np.float32)
            for name, (shape, _) in checkpoint_tensors(ModelConfig.from_hf(folder)).items()
        },
        folder / "model.safetensors",
    )
    return folder


@pytest.fixture
def changed(folder, tmp_path):
    """A folder that is like `folder`, to change."""
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def replace(path, contents):
    path.unlink(missing_ok=True)
    path.write_text(contents if isinstance(contents, str) else json.dumps(contents))


def byte_ids(text, begin=(BOS,)):
    """The tokens of ASCII letters, by hand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [*begin, *(alphabet.index(c) for c in text)]


# -------------------- Answers


def answer(capsys, *arguments):
    assert generate.main([*map(str, arguments), "--max-tokens", "13"]) == 0
    shown = capsys.readouterr()
    assert "error" not in shown.err
    return shown.out


PROMPTS = ["--prompt-ids", ",".join(map(str, byte_ids("abc"))), "--prompt-ids", "3"]


@pytest.fixture
def answers(folder):
    return answers_of(folder)


@functools.cache
def answers_of(folder):
    """The answers to PROMPTS, as lists of tokens in decimal."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert generate.main(["--model", str(folder), *PROMPTS, "--max-tokens", "13"]) == 0
    first, second = out.getvalue().split("--- 3\n")
    assert len(first.split()) == len(second.split()) == 13
    return first.split(), second.split()


def test_text_is_the_text_of_the_same_tokens(folder, answers, capsys):
    """The answer is not UTF-8. No character of it is lost when it is streamed."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    expected = tokenizer.decode(list(map(int, answers[0])), skip_special_tokens=True)
    assert "\N{REPLACEMENT CHARACTER}" in expected
    assert answer(capsys, "--model", folder, "--prompt", "abc") == f"{expected}\n"


@pytest.mark.parametrize("slots", [[], ["--slots", 1]], ids=["together", "slots"])
def test_generation_config_ends_answers(changed, answers, slots, capsys):
    """With its list of tokens, one of which the vocabulary does not have."""
    end = answers[0][5]
    (changed / "generation_config.json").write_text(json.dumps({"eos_token_id": [999, int(end)]}))
    found = answer(capsys, "--model", changed, *PROMPTS, *slots).split("--- 3\n")
    assert [part.split() for part in found] == [
        tokens[: tokens.index(end) + 1] if end in tokens else tokens for tokens in answers
    ]


def test_drawn_answers_of_one_prompt_are_all_shown(folder, capsys):
    shown = answer(capsys, "--model", folder, "--prompt-ids", "1", "--batch", 3, "--temperature", 1)
    assert len({tuple(part.split()) for part in shown.split("--- 1\n")}) == 3


def test_as_a_user_runs_it(folder):
    """In a process of its own, without PyTorch."""
    code = "import sys; sys.modules['torch'] = None; from examples.models import generate; "
    code += f"sys.exit(generate.main({['--model', str(folder), '--prompt', 'a', '--chat']!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", check=True
    )
    assert len(done.stdout) > 10
    lines = [line for line in done.stderr.splitlines() if line and "weights:" not in line]
    assert len(lines) == 2  # the warning: the answer passes max_position_embeddings
    assert "may get 132 tokens, but the model was made for at most 64" in lines[0]
    assert "1 sequences on 1 x cpu" in lines[1]


# -------------------- Prompts


def prompts_of(folder, *arguments):
    args = parse_args(["--model", str(folder), *map(str, arguments)])
    return generate.read_prompts(args, ModelConfig.from_hf(args.model))[1]


def test_prompts_come_from_arguments_files_and_standard_input(folder, tmp_path, monkeypatch):
    whole, by_line = tmp_path / "whole", tmp_path / "lines"
    whole.write_bytes(b"a\r\n\nb\n")
    by_line.write_bytes(b"c\n\nd\n")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"e")))
    files = ["--prompt-file", whole, "--prompt-lines", by_line, "--prompt-file", "-"]
    found = prompts_of(folder, "--prompt", "x", *files, "--batch", 6)
    texts = [
        "x",
        "a\N{LATIN CAPITAL LETTER C WITH DOT ABOVE}\N{LATIN CAPITAL LETTER C WITH DOT ABOVE}b",
    ]
    assert found == [byte_ids(text) for text in [*texts, "c", "d", "e", "x"]]


def test_bos_is_where_the_tokenizer_puts_it(changed):
    assert prompts_of(changed, "--prompt", "a") == [byte_ids("a")]
    assert prompts_of(changed, "--prompt", "a", "--chat") == [[*byte_ids("a", (BOS, USER)), ANSWER]]
    bare = bytes_tokenizer()
    bare.post_processor = None
    replace(changed / "tokenizer.json", bare.to_str())
    assert prompts_of(changed, "--prompt", "a") == [byte_ids("a", ())]
    # DeepSeek's folders say it in this file alone.
    settings = {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True}
    replace(changed / "tokenizer_config.json", {**settings, "bos_token": "<bos>"})
    assert prompts_of(changed, "--prompt", "a") == [byte_ids("a")]


def test_long_sequences_are_warned_of(folder, capsys):
    for ids, warned in ((54, False), (55, True)):
        prompts_of(folder, "--prompt-ids", "1 " * ids, "--max-tokens", 10)
        assert ("at most 64 (max_position_embeddings)" in capsys.readouterr().err) == warned


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
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "tokenization_kimi.py").write_text("raise RuntimeError('the code was run')")
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}<|im_end|>")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "kimi_k2"}))
    names = {i: names.get(i, f"<|reserved_token_{first + i}|>") for i in range(8)}
    special = {name: first + i for i, name in names.items()}
    return tmp_path, tiktoken.Encoding(
        "kimi", pat_str=KIMI_SPLIT, mergeable_ranks=ranks, special_tokens=special
    )


def byte_name(byte):
    """How byte-level tokenizers write a byte: as a character that can be printed."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte if byte in shown else 256 + sorted({*range(256)} - {*shown}).index(byte))


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


# -------------------- Errors


def test_errors_are_one_line(folder, changed, capsys, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    good = ["--model", folder, "--prompt-ids", "1"]
    bare, code, broken = (tmp_path_factory.mktemp(name) for name in ("bare", "code", "broken"))
    for path in (bare, code, broken):
        replace(path / "config.json", CONFIG)
    replace(broken / "tokenizer.json", '{"model": 3}')
    auto_map = {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}, "tokenizer_class": "Mine"}
    replace(code / "tokenizer.model", "x")
    replace(code / "tokenizer_config.json", auto_map)
    replace(code / "mine.py", "raise RuntimeError('the code was run')")
    replace(changed / "tokenizer_config.json", {"bos_token": "<bos>"})
    for arguments, message in (
        (["--model", empty, "--prompt", "a"], f"{empty}/config.json"),
        (["--model", bare, "--prompt", "a"], "there is no tokenizer.json, tokenizer.model or"),
        (["--model", bare, "--prompt-ids", "1"], f"{bare}"),
        (["--model", broken, "--prompt", "a"], f"the tokenizer in {broken} cannot be read"),
        (["--model", code, "--prompt", "a"], "is 'Mine', Python code that came with"),
        (["--model", changed, "--prompt", "a", "--chat"], "has no chat template for --chat"),
        (["--model", folder, "--prompt-ids", "1,264"], "prompt 0[1] must be from 0 to 263"),
        ([*good, "--dtype", "bfloat16"], "--dtype bfloat16: XLA lacks some"),
        ([*good, "--implementation", "cuda"], "--implementation cuda: there is no GPU"),
        ([*good, "--parallel", "dp"], "dp over 8 devices: batch is 1"),
        (["--random-weights", "gpt"], "'gpt'"),
    ):
        assert generate.main([*map(str, arguments)]) == 1
        shown = capsys.readouterr()
        said = [line for line in shown.err.splitlines() if not line.startswith("warning: a seq")]
        assert len(said) == 1, shown.err
        assert said[0].startswith("error: ")
        assert message in said[0]
        assert not shown.out
        with pytest.raises(Exception, match=r"\w"):
            generate.main([*map(str, arguments), "--debug"])
        capsys.readouterr()


def test_code_of_a_folder_with_tokenizer_json_is_not_run(changed):
    auto_map = {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}
    replace(changed / "tokenizer_config.json", {"auto_map": auto_map, "bos_token": "<bos>"})
    replace(changed / "mine.py", "raise RuntimeError('the code was run')")
    assert prompts_of(changed, "--prompt", "a") == [byte_ids("a")]


M, R, P = ["--model", "x"], ["--random-weights", "x"], ["--prompt", "a"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (M, "--model needs a --prompt"),
        ([*M, *P, "--layers", "1"], "--layers is for --random-weights"),
        ([*M, *P, "--prompt-tokens", "4"], "--prompt-tokens is for the random prompts"),
        ([*R, "--prompt-ids", "1", "--prompt-tokens", "4"], "--prompt-tokens is for the random"),
        ([*M, *P, "--prompt-ids", "1"], "--prompt-ids cannot be mixed with text"),
        ([*M, "--prompt-ids", "1", "--chat"], "--chat needs prompts that are text"),
        ([*R, "--chat"], "--chat needs prompts that are text"),
        ([*R, *P], "--random-weights has no tokenizer"),
        ([*M, *P, *P, "--batch", "1"], "--batch 1 is less than the 2 prompts"),
        ([*R, "--slots", "2", "--parallel", "dp"], "--slots needs one pool"),
        ([*M, *P, "--top-p", "0.5"], "--top-p needs a --temperature above 0"),
        ([*R, "--top-p", "0.5"], "--top-p needs a --temperature above 0"),
        ([*M, *P, "--seed", "1"], "--seed has no effect"),
        ([*R, "--slots", "0"], "--slots: must be at least 1, got 0"),
        ([*R, "--temperature", "nan"], "--temperature: must be a number of at least 0, got nan"),
        ([*R, "--temperature", "hot"], "--temperature: invalid"),
        ([*R, "--temperature", "1", "--top-p", "1.5"], "--top-p: must be from 0 to 1, got 1.5"),
        ([*R, "--seed", "-1"], "--seed: must be at least 0, got -1"),
        ([*R, "--seed", "4294967296"], "--seed: must be at most 4294967295"),
        ([*M, "--prompt-ids", "1,x"], "--prompt-ids: invalid"),
        ([*M, "--prompt-ids", ","], "--prompt-ids: needs at least one token"),
        ([*M, "--prompt-file", "/none"], "--prompt-file: cannot read /none"),
        ([*M, "--prompt-lines", os.devnull], "there is no text in /dev/null"),
        ([*M, *P, "--max-token", "1"], "unrecognized arguments"),
    ],
)
def test_arguments_that_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        generate.main(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1

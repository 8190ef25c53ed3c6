"""The command of examples/models: its options, prompts, answers and errors."""

import contextlib
import functools
import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

if os.environ.get("JAX_FLASHMLA_REQUIRE_TRANSFORMERS") != "1":
    for package in ("transformers", "tqdm", "tiktoken", "jinja2"):
        pytest.importorskip(package)

from tiny_model import (
    ANSWER,
    BOS,
    CONFIG,
    USER,
    byte_ids,
    bytes_tokenizer,
    replace,
    write_tokenizer,
    write_weights,
)
from transformers import PreTrainedTokenizerFast

from examples.models import generate
from examples.models.arguments import parse_args
from examples.models.config import ModelConfig

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with random weights."""
    folder = tmp_path_factory.mktemp("model")
    replace(folder / "config.json", CONFIG)
    write_tokenizer(folder)
    write_weights(folder)
    return folder


@pytest.fixture
def changed(folder, tmp_path):
    """A folder that is like `folder`, to change."""
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


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
    assert found == [byte_ids(text) for text in ("x", "a\n\nb", "c", "d", "e", "x")]


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
        (["--model", code, "--prompt", "a"], "is 'Mine', whose code is not part of"),
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
        ([*R, "--max-tokens", "9999999999"], "--max-tokens: must be at most 2147483647"),
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

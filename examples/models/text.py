"""Text to tokens and back, by the tokenizer in a model's folder.

transformers reads the tokenizer. It never runs code that comes with a checkpoint, and it needs no
PyTorch. What is our own: Kimi's tokenizer, which transformers knows only as the checkpoint's code,
and the stream of text, because transformers' streamer holds a whole word back.
"""

import json
from pathlib import Path

FILES = ("tokenizer.json", "tokenizer.model", "tiktoken.model")


class Text:
    """The tokenizer of a folder.

    Raises:
      FileNotFoundError: the folder has none of FILES.
      ValueError: the tokenizer is code that came with the checkpoint, or a file cannot be read.
    """

    def __init__(self, folder):
        self._folder = Path(folder)
        if not any((self._folder / name).exists() for name in FILES):
            raise FileNotFoundError(
                f"there is no {', '.join(FILES[:-1])} or {FILES[-1]} in {folder}; "
                "without a tokenizer, give --prompt-ids"
            )
        self._tokenizer = _open_tokenizer(self._folder)

    def encode(self, text):
        """The tokens of a text, with those that the tokenizer puts around it, such as bos."""
        return self._tokenizer.encode(text)

    def chat(self, text):
        """The tokens of a conversation that has one message, and begins the answer to it."""
        if self._tokenizer.chat_template is None:
            raise ValueError(f"the tokenizer in {self._folder} has no chat template for --chat")
        return self._tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )

    def decode(self, tokens):
        """The text of tokens, without special ones. An incomplete character is U+FFFD."""
        # clean_up changes spaces before punctuation, in words that are already printed too.
        return self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


class Numbers:
    """Tokens as numbers, where there is no tokenizer."""

    def decode(self, tokens):
        return "".join(f"{token} " for token in tokens)


class Stream:
    """The text of tokens that come bit by bit, in whole characters.

    All that `add` and `end` return is, put together, the text of all tokens. A token may end inside
    a character; then its text comes with the tokens that complete it, or at the end.

    Only the newest tokens are decoded: those whose text has not been returned, after some tokens
    before them. Those are needed because decoders drop the space before the first word.
    """

    def __init__(self, text):
        self._decode = text.decode
        self._tokens = []
        self._returned = 0  # how many of these tokens have been returned as text

    def add(self, tokens):
        """The text that more tokens complete."""
        return "".join(map(self._add_one, tokens))

    def end(self):
        """The rest: an incomplete character."""
        return self._rest()

    def _add_one(self, token):
        self._tokens.append(token)
        rest = self._rest()
        if not rest or rest.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        del self._tokens[: self._returned]
        self._returned = len(self._tokens)
        return rest

    def _rest(self):
        before = self._decode(self._tokens[: self._returned])
        return self._decode(self._tokens)[len(before) :]


# -------------------- Opening a tokenizer


def _open_tokenizer(folder):
    import transformers  # imported here, because random weights need only jax

    transformers.logging.set_verbosity_error()  # it has advice about tokenizer_config.json
    path = folder / "tokenizer_config.json"
    try:
        settings = json.loads(path.read_text("utf-8")) if path.exists() else {}
        options = {"local_files_only": True, "trust_remote_code": False}
        # DeepSeek's folders say here that bos is added. Beside a tokenizer.json that does not say
        # so, transformers 5 ignores it, and transformers 4, which they were made for, did not.
        if settings.get("add_bos_token"):
            options |= {key: bool(settings.get(key)) for key in ("add_bos_token", "add_eos_token")}
        # AutoTokenizer would build some tokenizers anew, as the class in tokenizer_config.json
        # splits words. That may differ from tokenizer.json, and can be the checkpoint's own code.
        if (folder / "tokenizer.json").exists():
            return transformers.PreTrainedTokenizerFast.from_pretrained(folder, **options)
        is_tiktoken = (folder / "tiktoken.model").exists()
        if is_tiktoken and settings.get("tokenizer_class") == "TikTokenTokenizer":
            return _kimi_tokenizer(folder, settings)
        if not is_tiktoken and "AutoTokenizer" not in (settings.get("auto_map") or {}):
            return transformers.AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # the tokenizers library raises nothing more precise
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the tokenizer in {folder} cannot be read: {reason}") from error
    raise ValueError(
        f"the tokenizer in {folder} is {settings.get('tokenizer_class')!r}, whose code is not part "
        "of transformers and is not run; a tokenizer.json is needed"
    )


# Where Kimi's tokenizer splits a text before it merges bytes. The checkpoint has this only as code.
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_BEFORE, _AFTER = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
KIMI_WORDS = "|".join(
    (
        r"[\p{Han}]+",
        f"{_BEFORE}{_UPPER}*{_LOWER}+{_AFTER}",
        f"{_BEFORE}{_UPPER}+{_LOWER}*{_AFTER}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def _kimi_tokenizer(folder, settings):
    """The tokenizer of Kimi-K2 and its relatives, from tiktoken.model and tokenizer_config.json.

    transformers would read tiktoken.model too, but it would split words as another model does and
    hide the tokens around calls of tools.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    tokenizer = TikTokenConverter(str(folder / "tiktoken.model"), pattern=KIMI_WORDS).converted()
    if "added_tokens_decoder" not in settings:
        raise ValueError("tokenizer_config.json has no added_tokens_decoder")
    named = {int(i): token for i, token in settings["added_tokens_decoder"].items()}
    for i in range(tokenizer.get_vocab_size(), max(named, default=-1) + 1):
        token = named.get(i, {"content": f"<|reserved_token_{i}|>", "special": True})
        add = tokenizer.add_special_tokens if token["special"] else tokenizer.add_tokens
        add([AddedToken(token["content"], normalized=False, special=token["special"])])
    kept = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template")
    settings = {key: settings[key] for key in kept if key in settings}
    template = folder / "chat_template.jinja"
    if template.exists():
        settings["chat_template"] = template.read_text("utf-8")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)

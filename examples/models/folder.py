"""Reads the configuration of a Hugging Face folder with transformers.

So a key that is absent has the default of its class, and older names of a key mean what they mean
there. What we read besides is a model_type that transformers has no class for. Code that comes with
a checkpoint is never run.
"""

import copy
import dataclasses
import json
import warnings
from pathlib import Path

from .families import FAMILIES, REFUSED
from .fields import tokens

# Keys of generation_config.json that change the tokens which transformers picks.
NOT_USED = (
    "bad_words_ids", "begin_suppress_tokens", "exponential_decay_length_penalty",
    "forced_bos_token_id", "forced_eos_token_id", "min_length", "min_new_tokens",
    "no_repeat_ngram_size", "num_beams", "penalty_alpha", "repetition_penalty", "sequence_bias",
    "suppress_tokens",
)  # fmt: skip


def read(source):
    """The ModelConfig of a config.json, as a dict, or of the folder with that file."""
    folder = None
    if not isinstance(source, dict):
        folder = Path(source)
        source = _read_json(folder / "config.json")
    name = source.get("model_type")
    known = name if isinstance(name, str) else None
    if known in REFUSED:
        raise ValueError(f"config.json: model_type {name!r} is not supported: {REFUSED[name]}")
    if known not in FAMILIES:
        raise ValueError(
            f"config.json: model_type is {name!r}; supported are {', '.join(sorted(FAMILIES))}"
        )
    hf = _configuration(name, source)
    if folder is None:
        return FAMILIES[name].read(hf)
    return _with_generation_config(FAMILIES[name].read(hf), folder)


def _configuration(name, contents):
    """transformers' configuration object. Only transformers' own classes are used."""
    import transformers  # imported here, because ModelConfig.named does without it

    if FAMILIES[name].config_class:
        cls = getattr(transformers, FAMILIES[name].config_class)
    else:
        cls = transformers.CONFIG_MAPPING[name]
    try:
        return cls.from_dict(copy.deepcopy(contents))  # which changes the dict
    except Exception as error:  # the class's checks raise errors of many kinds, on several lines
        raise ValueError(f"config.json: {' '.join(str(error).split())}") from error


def _with_generation_config(config, folder):
    """The config with the tokens that end a text of generation_config.json, if it names any.

    Warns of what it says besides that would change the tokens picked.
    """
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").exists():
        return config
    contents = _read_json(folder / "generation_config.json")
    try:
        given, default = GenerationConfig.from_dict(contents), GenerationConfig()
        eos = given.eos_token_id
        ignored = [k for k in NOT_USED if getattr(given, k, None) != getattr(default, k, None)]
        if ignored:
            names = ", ".join(f"{name} {getattr(given, name)}" for name in ignored)
            warnings.warn(f"generation_config.json: not used here: {names}", stacklevel=2)
        return config if eos is None else dataclasses.replace(config, eos=tokens(eos))
    except Exception as error:  # as above
        raise ValueError(f"generation_config.json: {' '.join(str(error).split())}") from error


def _read_json(path):
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}: name a folder from Hugging Face")
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must have an object with keys, got {found!r:.80}")
    return found

"""A folder with a small model and a tokenizer, as transformers would save it, without PyTorch."""

import json

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from examples.models.checkpoint import checkpoint_tensors
from examples.models.config import ModelConfig

BYTES = 256  # tokens 0 to 255 are bytes
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


def byte_name(byte):
    """How byte-level tokenizers write a byte: as a character that can be printed."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte if byte in shown else 256 + sorted({*range(256)} - {*shown}).index(byte))


def byte_ids(text, begin=(BOS,)):
    return [*begin, *text.encode()]


def bytes_tokenizer():
    """Each byte is a token, so most answers of random weights are not UTF-8."""
    tokenizer = Tokenizer(models.BPE({byte_name(i): i for i in range(BYTES)}, []))
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


def write_weights(folder):
    rng = np.random.default_rng(0)
    save_file(
        {
            name: rng.normal(1 if "norm" in name else 0, 0.4, shape).astype(np.float32)
            for name, (shape, _) in checkpoint_tensors(ModelConfig.from_hf(folder)).items()
        },
        folder / "model.safetensors",
    )


def replace(path, contents):
    """Writes a file, in place of a link too."""
    path.unlink(missing_ok=True)
    path.write_text(contents if isinstance(contents, str) else json.dumps(contents), "utf-8")

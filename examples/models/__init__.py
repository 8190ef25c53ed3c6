"""Decoders of the DeepSeek family and its relatives in JAX, on jax_flashmla.

config.py         a model's dimensions and rules
families.py       the table of families: how the config.json of each becomes a ModelConfig
fields.py         what families share in that, and what is refused
folder.py         reads config.json and generation_config.json with transformers
rope.py           rotary positions, with YaRN
model.py          one forward pass over a paged cache, for prefill and decode
checkpoint.py     where each tensor of a checkpoint goes, and whether all are there
shards.py         the tensors in a folder of safetensors
weights.py        the parameters: loaded from such a folder, or random
sampling.py       chooses the next token from logits
decoding.py       a fixed batch: prompts in chunks, then a loop of steps on the device
parallel.py       several devices
block_manager.py  hands out pages, shares them, takes them back
request.py        what a user submits, and what is refused
batching.py       continuous batching: requests join and leave between steps
text.py           tokenizers: text to tokens and back, as a whole or bit by bit
arguments.py      the options of the command
generate.py       the command: python -m examples.models.generate --help

block_manager.py, request.py and batching.py work with any model.
"""

import os

# Without PyTorch, transformers would say at each start that its models need it. We use only its
# configurations and tokenizers.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

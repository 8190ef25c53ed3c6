"""A decoder of the DeepSeek family (V2, V2-Lite, V3, R1, Kimi-K2) in JAX, on jax_flashmla.

config.py         a model's dimensions and rules
families.py       the table of model types: how each one's config.json is read
rope.py           rotary positions, with YaRN
model.py          one forward pass over a paged cache, for prefill and decode
checkpoint.py     where each tensor of a checkpoint goes, and whether all are there
shards.py         the tensors in a folder of safetensors
weights.py        the parameters: loaded from such a folder, or random
sampling.py       chooses the next token from logits
decoding.py       a fixed batch: prompts in chunks, then a loop of steps on the device
parallel.py       several devices
block_manager.py  hands out pages, shares them, takes them back
batching.py       continuous batching: requests join and leave between steps
generate.py       the command: python -m examples.models.generate --help

batching.py and block_manager.py work with any model.
"""

import os

# Without PyTorch, transformers would say at each start that its models need it. We use only its
# configurations and tokenizers.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

"""A decoder of the DeepSeek family (V2, V2-Lite, V3, R1, Kimi-K2) in plain JAX on jax_flashmla.

config.py         what a model is made of, from its config.json
rope.py           rotary positions, with YaRN
model.py          one forward pass over a paged cache: prefill and decode
checkpoint.py     a folder of safetensors: what lies in it, what should
weights.py        the parameters, loaded from such a folder or random
sampling.py       the next token from its logits
decoding.py       prompts in chunks, then a loop of steps on the device: a batch known beforehand
parallel.py       the same on several devices
block_manager.py  pages that are handed out, shared, and taken back
batching.py       requests that join and leave between steps; for any model, as is block_manager.py
generate.py       the command: python -m examples.deepseek.generate --help
"""

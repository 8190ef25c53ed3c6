"""The dimensions and rules of a model. families.py reads them from a Hugging Face folder."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN (https://arxiv.org/abs/2309.00071), for positions past the trained length."""

    factor: float
    original_length: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # whether the pairs between which it interpolates are whole numbers
    rotation_scale: float = 1.0  # of cosine and sine
    softmax_scale: float = 1.0  # on top of the usual scale


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The dimensions and rules of a model. Hashable: a static argument of jitted functions."""

    vocab: int
    width: int  # of the residual stream
    layers: int
    heads: int
    q_lora_rank: int | None  # None: no down projection of queries
    kv_lora_rank: int  # the latent part of a cache entry
    nope_dim: int  # query/key width of a head without positions
    rope_dim: int  # the part with positions
    value_dim: int
    mlp_width: int  # of dense layers
    expert_width: int = 0
    experts: int = 0  # routed ones; 0: every layer is dense
    experts_per_token: int = 0
    shared_experts: int = 0
    dense_layers: int = 0  # the first layers, which have no experts
    topk_method: str = "greedy"  # or group_limited_greedy, or noaux_tc
    groups: int = 1
    groups_per_token: int = 1
    normalize_routing: bool = False  # the weights of a token's experts sum to routing_scale
    routing_scale: float = 1.0
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_interleave: bool = True  # pairs of adjacent columns rotate, else a column of each half
    yarn: Yarn | None = None
    tied: bool = False  # the head is the embedding
    eos: tuple[int, ...] = ()
    fp8_block: tuple[int, int] | None = None  # block size of the checkpoint's FP8 matrices
    extra_layers: int = 0  # layers after the model's in the checkpoint; they predict more tokens
    max_positions: int | None = None  # the longest sequence that the model was made for
    # What some families have beside DeepSeek's.
    dense_at: tuple[int, ...] = ()  # more layers without experts
    paired_layers: bool = False  # all layers have an MLP; experts of an even one add after the next
    zero_experts: int = 0  # experts after the others that return their input
    softmax_scores: bool = False  # with noaux_tc: scores are a softmax, not sigmoids
    mlp_out_norm: bool = False  # a norm of what the experts return
    query_scale: float = 1.0  # of the normed query of rank q_lora_rank
    latent_scale: float = 1.0  # of the normed latent
    router_bias_optional: bool = False  # a checkpoint without the router's bias means zeros
    tensor_prefix: str = ""  # of tensors' names
    unneeded: str | None = None  # a pattern of the names of tensors that decoding does not need

    @property
    def entry_dim(self):
        """Columns of a cache entry, the op's d_k. Its head_dim_v is kv_lora_rank."""
        return self.kv_lora_rank + self.rope_dim

    @property
    def softmax_scale(self):
        """Depends on the width of a head before absorption, and on YaRN."""
        scale = (self.nope_dim + self.rope_dim) ** -0.5
        return scale * (self.yarn.softmax_scale if self.yarn else 1.0)

    def has_experts(self, layer):
        if self.paired_layers:
            return self.experts > 0 and layer % 2 == 0
        dense = layer < self.dense_layers or layer in self.dense_at
        return self.experts > 0 and not dense

    def has_mlp(self, layer):
        return self.paired_layers or not self.has_experts(layer)

    @classmethod
    def from_hf(cls, source):
        """Reads a Hugging Face configuration, with transformers.

        Args:
          source: the contents of a config.json as a dict, or the folder with that file. In a folder
            generation_config.json is read too.

        Raises:
          FileNotFoundError: the folder has no config.json.
          ValueError: a key has a value that is not supported here.
        """
        from .folder import read  # imported here, because families.py imports this class

        return read(source)

    @classmethod
    def named(cls, name, layers=None):
        """The dimensions of a released model, one of PRESETS, for random weights.

        Args:
          name: a key of PRESETS.
          layers: number of layers, by default all.
        """
        if name not in PRESETS:
            raise ValueError(f"the model must be one of {', '.join(PRESETS)}, got {name!r}")
        config = PRESETS[name]
        return config if layers is None else dataclasses.replace(config, layers=layers)


def _deepseek(mscale, factor, beta_fast=32.0, **fields):
    """The fields that these models share. Their mscale and mscale_all_dim are equal."""
    softmax_scale = (0.1 * mscale * math.log(factor) + 1.0) ** 2
    yarn = Yarn(factor, 4096.0, beta_fast, softmax_scale=softmax_scale)
    head = {"kv_lora_rank": 512, "nope_dim": 128, "rope_dim": 64, "value_dim": 128}
    return ModelConfig(**head, yarn=yarn, **fields)


# Without tokens that end a text: with random weights they mean nothing.
PRESETS = {
    "deepseek-v2-lite": _deepseek(
        0.707, 40.0, vocab=102400, width=2048, layers=27, heads=16, q_lora_rank=None,
        mlp_width=10944, expert_width=1408, experts=64, experts_per_token=6, shared_experts=2,
        dense_layers=1, max_positions=163840,
    ),
    "deepseek-v2": _deepseek(
        0.707, 40.0, vocab=102400, width=5120, layers=60, heads=128, q_lora_rank=1536,
        mlp_width=12288, expert_width=1536, experts=160, experts_per_token=6, shared_experts=2,
        dense_layers=1, topk_method="group_limited_greedy", groups=8, groups_per_token=3,
        routing_scale=16.0, max_positions=163840,
    ),
    "deepseek-v3": _deepseek(
        1.0, 40.0, vocab=129280, width=7168, layers=61, heads=128, q_lora_rank=1536,
        mlp_width=18432, expert_width=2048, experts=256, experts_per_token=8, shared_experts=1,
        dense_layers=3, topk_method="noaux_tc", groups=8, groups_per_token=4,
        normalize_routing=True, routing_scale=2.5, max_positions=163840,
    ),
    "kimi-k2": _deepseek(
        1.0, 32.0, beta_fast=1.0, vocab=163840, width=7168, layers=61, heads=64, q_lora_rank=1536,
        mlp_width=18432, expert_width=2048, experts=384, experts_per_token=8, shared_experts=1,
        dense_layers=1, topk_method="noaux_tc", normalize_routing=True, routing_scale=2.827,
        rope_theta=50000.0, max_positions=131072,
    ),
}  # fmt: skip

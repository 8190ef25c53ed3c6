"""The dimensions and rules of a DeepSeek-family model, from its Hugging Face config.json."""

import dataclasses
import json
import math
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN (https://arxiv.org/abs/2309.00071), for positions past the trained length."""

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def magnitude(self, mscale):
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0


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
    moe_layer_freq: int = 1  # after them, a layer has experts if its index is a multiple of this
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
    bos: int | None = None
    eos: tuple[int, ...] = ()
    fp8_block: tuple[int, int] | None = None  # block size of the checkpoint's FP8 matrices
    extra_layers: int = 0  # layers after the model's in the checkpoint; they predict more tokens

    @property
    def entry_dim(self):
        """Columns of a cache entry, the op's d_k. Its head_dim_v is kv_lora_rank."""
        return self.kv_lora_rank + self.rope_dim

    @property
    def softmax_scale(self):
        """Depends on the width of a head before absorption, and on YaRN."""
        scale = (self.nope_dim + self.rope_dim) ** -0.5
        return scale * (self.yarn.magnitude(self.yarn.mscale_all_dim) ** 2 if self.yarn else 1.0)

    def has_experts(self, layer):
        late = layer >= self.dense_layers and layer % self.moe_layer_freq == 0
        return self.experts > 0 and late

    @classmethod
    def from_hf(cls, source):
        """Reads a Hugging Face configuration.

        Args:
          source: the contents of a config.json as a dict, or the folder with that file.

        Raises:
          ValueError: a key has a value that is not supported here.
        """
        if not isinstance(source, dict):
            source = json.loads((Path(source) / "config.json").read_text("utf-8"))
        return _from_hf(source)

    @classmethod
    def named(cls, name, layers=None):
        """The dimensions of a released model, one of PRESETS, for random weights.

        Args:
          name: a key of PRESETS.
          layers: number of layers, by default all.
        """
        if name not in PRESETS:
            raise ValueError(f"the model must be one of {', '.join(PRESETS)}, got {name!r}")
        config = cls.from_hf(PRESETS[name])
        return config if layers is None else dataclasses.replace(config, layers=layers)


# The values of keys that a config.json may leave out.
_DEFAULTS = {
    "deepseek_v2": {"topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False},
    "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True},
}
_DEFAULTS["kimi_k2"] = _DEFAULTS["deepseek_v3"]

_SCORING = {"greedy": "softmax", "group_limited_greedy": "softmax", "noaux_tc": "sigmoid"}


def _from_hf(hf):
    _require(hf, "model_type", tuple(_DEFAULTS))
    hf = {**_DEFAULTS[hf["model_type"]], **hf}
    _require(hf, "topk_method", tuple(_SCORING))
    _require(hf, "scoring_func", (_SCORING[hf["topk_method"]],))
    _require(hf, "hidden_act", ("silu",))
    _require(hf, "attention_bias", (False, None))
    _require(hf, "mlp_bias", (False, None))
    _require(hf, "num_key_value_heads", (hf["num_attention_heads"], None))
    if hf["model_type"] == "deepseek_v2":
        # Implementations differ in how it combines with routed_scaling_factor.
        _require(hf, "norm_topk_prob", (False, None))
        _require(hf, "rope_interleave", (True, None))
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    eos = hf.get("eos_token_id")
    return ModelConfig(
        vocab=hf["vocab_size"],
        width=hf["hidden_size"],
        layers=hf["num_hidden_layers"],
        heads=hf["num_attention_heads"],
        q_lora_rank=hf.get("q_lora_rank"),
        kv_lora_rank=hf["kv_lora_rank"],
        nope_dim=hf["qk_nope_head_dim"],
        rope_dim=hf["qk_rope_head_dim"],
        value_dim=hf["v_head_dim"],
        mlp_width=hf["intermediate_size"],
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope_theta=float(hf.get("rope_theta") or rope.get("rope_theta") or 10000.0),
        rope_interleave=hf.get("rope_interleave") is not False,
        yarn=_yarn(rope),
        tied=bool(hf.get("tie_word_embeddings")),
        bos=hf.get("bos_token_id"),
        eos=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        fp8_block=_fp8_block(hf.get("quantization_config")),
        extra_layers=hf.get("num_nextn_predict_layers") or 0,
        **_experts(hf),
    )


def _experts(hf):
    experts = hf.get("n_routed_experts") or 0
    if not experts:
        return {}
    groups = hf.get("n_group") or 1
    if hf["topk_method"] == "greedy":
        groups = 1  # n_group may be there, but this method ignores it
    if experts % groups:
        raise ValueError(
            f"config.json: n_group {groups} does not divide n_routed_experts {experts}"
        )
    groups_per_token = min(hf.get("topk_group") or 1, groups)
    per_token, eligible = hf["num_experts_per_tok"], experts // groups * groups_per_token
    if per_token > eligible:
        raise ValueError(
            f"config.json: num_experts_per_tok is {per_token}, but topk_group leaves {eligible} "
            f"of the {experts} experts to choose from"
        )
    return {
        "expert_width": hf["moe_intermediate_size"],
        "experts": experts,
        "experts_per_token": per_token,
        "shared_experts": hf.get("n_shared_experts") or 0,
        "dense_layers": hf.get("first_k_dense_replace") or 0,
        "moe_layer_freq": hf.get("moe_layer_freq") or 1,
        "topk_method": hf["topk_method"],
        "groups": groups,
        "groups_per_token": groups_per_token,
        "normalize_routing": bool(hf["norm_topk_prob"]),
        "routing_scale": float(hf.get("routed_scaling_factor") or 1.0),
    }


def _yarn(rope):
    kind = rope.get("rope_type", rope.get("type", "default"))
    _require({"rope_scaling type": kind}, "rope_scaling type", ("yarn", "default"))
    _require(rope, "attention_factor", (None,))
    _require(rope, "truncate", (None, True))
    _require(rope, "partial_rotary_factor", (None, 1.0))
    if kind == "default":
        return None
    return Yarn(
        factor=float(rope["factor"]),
        original_length=rope["original_max_position_embeddings"],
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        mscale=float(rope.get("mscale") or 1),
        mscale_all_dim=float(rope.get("mscale_all_dim") or 0),
    )


def _fp8_block(quantization):
    if not quantization:
        return None
    _require(quantization, "quant_method", ("fp8",))
    block = quantization.get("weight_block_size")
    if not (isinstance(block, list | tuple) and len(block) == 2):
        raise ValueError(f"config.json: weight_block_size must be two sizes, got {block!r}")
    return tuple(block)


def _require(hf, key, allowed):
    """Raises ValueError if the value is not allowed. Only model_type must be present."""
    value = hf.get(key, None if key == "model_type" else allowed[0])
    if value not in allowed:
        expected = " or ".join(repr(one) for one in allowed)
        raise ValueError(f"config.json: {key} is {value!r}; supported: {expected}")


def _preset(model_type, mscale, factor, beta_fast=32, **keys):
    yarn = {
        "type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": 4096,
        "beta_fast": beta_fast,
        "beta_slow": 1,
        "mscale": mscale,
        "mscale_all_dim": mscale,
    }
    head = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128}
    return {"model_type": model_type, "rope_scaling": yarn, **head, "v_head_dim": 128, **keys}


PRESETS = {
    "deepseek-v2-lite": _preset(
        "deepseek_v2", 0.707, 40, vocab_size=102400, hidden_size=2048, intermediate_size=10944,
        moe_intermediate_size=1408, num_hidden_layers=27, num_attention_heads=16,
        n_shared_experts=2, n_routed_experts=64, num_experts_per_tok=6, first_k_dense_replace=1,
    ),
    "deepseek-v2": _preset(
        "deepseek_v2", 0.707, 40, vocab_size=102400, hidden_size=5120, intermediate_size=12288,
        moe_intermediate_size=1536, num_hidden_layers=60, num_attention_heads=128,
        q_lora_rank=1536, n_shared_experts=2, n_routed_experts=160, num_experts_per_tok=6,
        first_k_dense_replace=1, topk_method="group_limited_greedy", n_group=8, topk_group=3,
        routed_scaling_factor=16.0,
    ),
    "deepseek-v3": _preset(
        "deepseek_v3", 1.0, 40, vocab_size=129280, hidden_size=7168, intermediate_size=18432,
        moe_intermediate_size=2048, num_hidden_layers=61, num_attention_heads=128,
        q_lora_rank=1536, n_shared_experts=1, n_routed_experts=256, num_experts_per_tok=8,
        first_k_dense_replace=3, n_group=8, topk_group=4, routed_scaling_factor=2.5,
    ),
    "kimi-k2": _preset(
        "kimi_k2", 1.0, 32, beta_fast=1, vocab_size=163840, hidden_size=7168,
        intermediate_size=18432, moe_intermediate_size=2048, num_hidden_layers=61,
        num_attention_heads=64, q_lora_rank=1536, n_shared_experts=1, n_routed_experts=384,
        num_experts_per_tok=8, first_k_dense_replace=1, n_group=1, topk_group=1,
        routed_scaling_factor=2.827, rope_theta=50000.0,
    ),
}  # fmt: skip

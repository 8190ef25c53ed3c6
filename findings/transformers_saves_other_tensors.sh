#!/usr/bin/env bash
# transformers' save_pretrained gives tensors of Kimi-K2.5 other names than the published ones, and writes matrices
# of LongCat-Flash that the model does not use.
#
# Versions   transformers 5.24.0, torch 2.13.0 (CPU), safetensors 0.8.0 (run here). Linux, x86-64, 2026-12-01.
# Behaviour  Kimi-K2.5: the layers of the language model, "language_model.model.layers.0" in the published folder,
#            are saved as "language_model.model.blocks.0". transformers renames "blocks" of the vision tower to
#            "layers" when it reads, and undoes that for every "layers" when it writes.
#            transformers reads that back. Programs that look for the published names do not find them.
#            LongCat-Flash: gate_proj and up_proj of the zero experts are saved, which return their input and
#            need no matrices. A folder without them is refused: "Reinit due to size mismatch".
# Expected   The published names, which transformers reads as well. No matrices of zero experts.
# Way out    Rename "language_model.model.blocks." after saving, and ignore the matrices of zero experts.
#
# Output seen:
#   kimi_k25: language_model.model.blocks.0.input_layernorm.weight
#   longcat_flash, 3 experts and 2 zero experts: gate_proj of 5, down_proj of 3
#   without those of zero experts: RuntimeError
#   as stated
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "transformers==${TRANSFORMERS_VERSION:-5.24.0}" "torch==2.13.0" \
  "safetensors==0.8.0"

cat > "$folder/show.py" << 'END'
import sys

import transformers
from safetensors.torch import load_file, save_file

transformers.logging.set_verbosity_error()
SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "vocab_size": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def saved(model, name):
    model.save_pretrained(f"{sys.argv[1]}/{name}")
    return load_file(f"{sys.argv[1]}/{name}/model.safetensors")


text = SIZES | {"model_type": "deepseek_v3", "num_key_value_heads": 2, "intermediate_size": 16}
vision = {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8, "num_attention_heads": 2}
config = transformers.Kimi_K25Config(
    text_config=text | {"num_hidden_layers": 1, "first_k_dense_replace": 1}, vision_config=vision
)
tensors = saved(transformers.Kimi_K25ForConditionalGeneration(config), "kimi")
norm = next(name for name in tensors if name.endswith("0.input_layernorm.weight"))
print(f"kimi_k25: {norm}")

config = transformers.LongcatFlashConfig(
    **SIZES, num_layers=1, ffn_hidden_size=16, expert_ffn_hidden_size=8, n_routed_experts=3,
    zero_expert_num=2, moe_topk=2, head_dim=8,
)
tensors = saved(transformers.LongcatFlashForCausalLM(config), "longcat")
gates, downs = (
    sum(".experts." in name and kind in name for name in tensors)
    for kind in ("gate_proj", "down_proj")
)
print(f"longcat_flash, 3 experts and 2 zero experts: gate_proj of {gates}, down_proj of {downs}")

kept = {n: x for n, x in tensors.items() if ".experts.3." not in n and ".experts.4." not in n}
save_file(kept, f"{sys.argv[1]}/longcat/model.safetensors", {"format": "pt"})
try:
    transformers.LongcatFlashForCausalLM.from_pretrained(f"{sys.argv[1]}/longcat")
    refused = "read"
except RuntimeError as error:
    refused = type(error).__name__
print(f"without those of zero experts: {refused}")
as_stated = refused == "RuntimeError" and ".blocks.0." in norm and (gates, downs) == (5, 3)
print("as stated" if as_stated else "CHANGED: the finding no longer holds")
raise SystemExit(not as_stated)
END
"$folder/venv/bin/python" "$folder/show.py" "$folder" 2> "$folder/log" || { cat "$folder/log"; exit 1; }

"""SEAL's whole life on a miniature of every causal language model in Transformers.

``python tests/sweep.py MODEL_TYPE`` checks one architecture, ``python tests/sweep.py`` checks all and writes
docs/architectures.md.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.update(AXOLOTL_DO_NOT_TRACK="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
from paths import ROOT, TINY
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from axolotl_plugins.seal import SealConfig, SealLayer

TABLE = ROOT / "docs/architectures.md"
TIMEOUT = 60  # seconds per architecture
LARGEST = 1_000_000  # parameters

# Keys of all configs -> the value in a miniature. Where a config lacks a key nothing is set.
SHRUNK = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "hidden_dim", "emb_dim",
                     "dim_model", "hidden_size_per_layer_input", "lru_width", "attention_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim",
                     "moe_intermediate_size", "shared_expert_intermediate_size", "mlp_hidden_size", "dim_ff",
                     "ffn_hidden_size", "intermediate_size_mlp", "moe_shared_expert_intermediate_size", "expert_ffn_hidden_size",
                     "shared_intermediate_size", "dense_intermediate_size", "d_inner", "num_feed_forward"), 48),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
                     "encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads",
                     "kv_n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "v_head_dim", "d_kv", "kv_channels", "attention_head_dim", "swa_head_dim",
                     "swa_v_head_dim", "attention_head_size"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "rotary_dim", "index_head_dim"), 4),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "embedding_rank", "lora_rank"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
                     "num_decoder_layers", "num_encoder_layers"), 4),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "top_k_experts", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"), 1024),
    **dict.fromkeys(("sliding_window", "attention_window_size", "window_size"), 128),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "linear_num_value_heads", "linear_num_key_heads", "index_n_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "linear_key_head_dim", "linear_value_head_dim", "mamba_headdim"), 16),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 8),
    **dict.fromkeys(("mamba_d_ssm",), 64),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("num_nextn_predict_layers",), 0),
    **dict.fromkeys(("pad_token_id",), 0),
    **dict.fromkeys(("bos_token_id",), 1),
    **dict.fromkeys(("eos_token_id",), 2),
    "num_kv_shared_layers": 0,
    "first_k_dense_replace": 1,
    "is_decoder": True,
    "vocab_size_per_layer_input": 512,
}  # fmt: skip


def shrink(config: Any, vocab_size: int) -> dict[str, Any]:
    """Return the keys of a default config that make it a miniature, nested configs included."""
    keys: dict[str, Any] = {}
    for name in vars(config) | dict.fromkeys(getattr(config, "attribute_map", {})):
        value = getattr(config, name, None)
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            keys[name] = shrink(value, vocab_size)
        elif name == "vocab_size":
            keys[name] = vocab_size
        elif name in SHRUNK and not isinstance(value, dict):
            keys[name] = SHRUNK[name]
    return keys

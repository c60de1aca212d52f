"""Random-weight models with real architectures, small enough to train in a test."""

from __future__ import annotations

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 97
COMMON = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
          "eos_token_id": 2}  # fmt: skip

# name -> (model_type, config on top of COMMON, channels of one layer's attention output)
MINIATURES: dict[str, tuple[str, dict, int]] = {
    "llama_mha": ("llama", {"num_key_value_heads": 4}, 32),
    "llama_gqa": ("llama", {"num_key_value_heads": 2, "head_dim": 16}, 64),
    "llama_bias_tied": ("llama", {"num_key_value_heads": 4, "attention_bias": True, "tie_word_embeddings": True}, 32),
    "mistral": ("mistral", {"num_key_value_heads": 2, "sliding_window": 16}, 32),
    "qwen2": ("qwen2", {"num_key_value_heads": 4}, 32),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 16}, 64),
    "gemma": ("gemma", {"num_key_value_heads": 1, "head_dim": 16}, 64),
    "phi3": ("phi3", {"num_key_value_heads": 2}, 32),
    "gpt_neox": ("gpt_neox", {}, 32),
    "gpt2": ("gpt2", {"n_positions": 64}, 32),
}


def build(name: str, dtype: torch.dtype = torch.float32, **settings: object) -> PreTrainedModel:
    """The miniature called ``name``, seeded, in evaluation mode, with biases that are not zero."""
    model_type, extra, _ = MINIATURES[name]
    config = CONFIG_MAPPING[model_type](**{**COMMON, **extra, **settings}, dtype=dtype)
    config.num_hidden_layers = 2
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.dim() == 2:
                parameter.mul_(4)  # make attention matter: at the usual 0.02 every logit is all but the same
    return model


def token_ids(batch: int = 2, length: int = 24, seed: int = 1) -> torch.Tensor:
    """Random ids of shape (batch, length), none of them special."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def train(
    model: torch.nn.Module, parameters: list[torch.nn.Parameter], steps: int = 20, lr: float = 2e-2
) -> list[float]:
    """Plain AdamW steps on random text; returns the losses."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    losses = []
    for step in range(steps):
        ids = token_ids(seed=step)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses

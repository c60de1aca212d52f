"""Finds a model's attention outputs and wraps them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, ClassVar

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import SealConfig
from .layer import SealLayer, projection_shape

# Attention output projections of the Transformers library: Llama, Mistral, Qwen, Gemma, Phi-3 and most others; OPT;
# Phi; GPT-NeoX; Falcon and Bloom; GPT-2; GPT-J and MPT; GPT-Neo; InternLM.
ATTENTION_OUTPUTS = (
    "self_attn.o_proj",
    "self_attn.out_proj",
    "self_attn.dense",
    "attention.dense",
    "self_attention.dense",
    "attn.c_proj",
    "attn.out_proj",
    "attn.attention.out_proj",
    "attention.wo",
)


def layer_index(name: str) -> int | None:
    """The decoder layer that a module's name belongs to: its first numbered part."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


def _projections(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every Linear and Conv1D with its name, wrapped ones under the wrapper's name."""
    for name, module in model.named_modules():
        if isinstance(module, SealLayer) or (
            isinstance(module, nn.Linear | Conv1D) and not name.endswith("base_layer")
        ):
            yield name, module


def find_attention_outputs(model: nn.Module) -> list[str]:
    """Name endings of the model's attention output projections, such as ``["self_attn.o_proj"]``.

    Raises:
        ValueError: none is known; the message lists the candidates.
    """
    names = [name for name, _ in _projections(model)]
    found = [ending for ending in ATTENTION_OUTPUTS if any(name.endswith("." + ending) for name in names)]
    if not found:
        parts = (name.split(".") for name in names)
        inside = {".".join(p[-2:]) for p in parts if any("att" in part.lower() for part in p[:-1])}
        raise ValueError(
            f"cannot find the attention output projection of {type(model).__name__}: give its name as target_modules; "
            f"candidates: {', '.join(sorted(inside)) or 'none (no Linear inside a module named like attention)'}"
        )
    return found


def num_query_heads(model_config: dict) -> int:
    """Query heads per layer, from a Transformers config as a dict.

    Raises:
        ValueError: the config has no such field.
    """
    config = model_config.get("text_config") or model_config
    for field in ("num_attention_heads", "n_head", "n_heads", "num_heads"):
        if isinstance(config.get(field), int):
            return config[field]
    raise ValueError("the model's config does not say how many query heads a layer has: give it as num_heads")


class SealModel(BaseTuner):
    """PEFT tuner of SEAL: scales of attention outputs are the only trainable parameters (paper section 4.2)."""

    prefix: str = "seal_"
    tuner_layer_cls = SealLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    @staticmethod
    def _check_target_module_exists(peft_config: SealConfig, key: str) -> bool:
        """Whether the module named ``key`` is to be scaled."""
        if peft_config.layers is not None and layer_index(key) not in peft_config.layers:
            return False
        return any(key == ending or key.endswith("." + ending) for ending in peft_config.target_modules or ())

    def _prepare_adapter_config(self, peft_config: SealConfig, model_config: dict) -> SealConfig:
        """Read the number of heads; the modules are found in ``_prepare_model``, which sees the model."""
        if peft_config.num_heads is None:
            peft_config.num_heads = num_query_heads(model_config)
        return peft_config

    def _prepare_model(self, peft_config: SealConfig, model: nn.Module) -> None:
        """Find the modules and check that all of them can be scaled, before any is touched."""
        if peft_config.target_modules is None:
            peft_config.target_modules = find_attention_outputs(model)
        targets = [
            (name, module)
            for name, module in _projections(model)
            if self._check_target_module_exists(peft_config, name)
        ]
        layers = {layer_index(name) for name, _ in targets}
        missing = set(peft_config.layers or ()) - layers
        if not targets or missing:
            every = sorted({index for name, _ in _projections(model) if (index := layer_index(name)) is not None})
            where = f"layers {sorted(missing)}" if missing else "the model"
            raise ValueError(
                f"no module named like {peft_config.target_modules} in {where}: "
                f"the model has layers {every[0] if every else 'none'} to {every[-1] if every else 'none'}, "
                f"and its attention outputs are {find_attention_outputs(model)}"
            )
        heads = peft_config.num_heads
        assert heads is not None  # see _prepare_adapter_config
        for name, module in targets:
            channels = module.in_features if isinstance(module, SealLayer) else projection_shape(module)[0]
            if channels % heads:
                raise ValueError(
                    f"{name} reads {channels} channels, which {heads} heads do not divide: "
                    "give num_heads, or other target_modules"
                )

    def _create_and_replace(
        self, peft_config: SealConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str, **_: Any,
    ) -> None:  # fmt: skip
        """Wrap one projection, or give one that is wrapped already a further adapter."""
        if isinstance(target, SealLayer):
            target.update_layer(adapter_name, peft_config)
            return
        if isinstance(target, BaseTunerLayer):
            raise ValueError(f"{current_key} carries an adapter of another kind: merge that one first")
        heads = peft_config.num_heads
        assert heads is not None
        layer = SealLayer(target, adapter_name, peft_config, heads)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

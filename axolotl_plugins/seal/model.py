"""PEFT tuner of SEAL: finds a model's attention output projections and wraps them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils import register_peft_method
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import SealConfig, peft_type
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
    """Return the decoder layer of a module, the first numbered part of its name, or None."""
    match = re.search(r"\.(\d+)\.", name)
    return int(match[1]) if match else None


def _projections(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every Linear and Conv1D with its name, or its wrapper where there is one."""
    for name, module in model.named_modules():
        if isinstance(module, SealLayer) or (
            isinstance(module, nn.Linear | Conv1D) and not name.endswith("base_layer")
        ):
            yield name, module


def find_attention_outputs(model: nn.Module) -> list[str]:
    """Return name suffixes of the model's attention output projections, such as ``["self_attn.o_proj"]``.

    Raises:
        ValueError: no module has a name in ``ATTENTION_OUTPUTS``; the message lists candidates.
    """
    names = [name for name, _ in _projections(model)]
    suffixes = [suffix for suffix in ATTENTION_OUTPUTS if any(name.endswith("." + suffix) for name in names)]
    if not suffixes:
        parts = (name.split(".") for name in names)
        candidates = {".".join(p[-2:]) for p in parts if any("att" in part.lower() for part in p[:-1])}
        raise ValueError(
            f"cannot find the attention output projection of {type(model).__name__}: set its name as target_modules; "
            f"candidates: {', '.join(sorted(candidates)) or 'none (no Linear inside a module named like attention)'}"
        )
    return suffixes


def num_query_heads(model_config: dict) -> int:
    """Return the query heads per layer from a Transformers config as a dict.

    Raises:
        ValueError: the config has no field for it.
    """
    config = model_config.get("text_config") or model_config
    for field in ("num_attention_heads", "n_head", "n_heads", "num_heads"):
        if isinstance(config.get(field), int):
            return config[field]
    raise ValueError("the model's config has no number of query heads: set num_heads")


class SealModel(BaseTuner):
    """PEFT tuner of SEAL: the scales of attention outputs are the only trainable parameters (paper section 4.2)."""

    prefix: str = "seal_"
    tuner_layer_cls = SealLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    @staticmethod
    def _check_target_module_exists(peft_config: SealConfig, key: str) -> bool | re.Match[str] | None:
        """Return whether to scale the module named ``key``."""
        layers = peft_config.layers_to_transform
        if isinstance(layers, list) and layer_index(key) not in layers:
            return False
        # Without the layers: PEFT finds no index in the names of a model without head, such as `layers.0.self_attn`.
        names = SimpleNamespace(target_modules=peft_config.target_modules, exclude_modules=peft_config.exclude_modules)
        return check_target_module_exists(names, key)

    def _prepare_adapter_config(self, peft_config: SealConfig, model_config: dict) -> SealConfig:
        """Set the number of heads; ``_prepare_model`` sets the modules because it has access to the model."""
        if peft_config.num_heads is None:
            peft_config.num_heads = num_query_heads(model_config)
        return peft_config

    def _prepare_model(self, peft_config: SealConfig, model: nn.Module) -> None:
        """Set the target modules and check that all of them can be scaled, before any is replaced.

        Raises:
            ValueError: no module matches, or a module's channels are not divisible by the number of heads.
        """
        if peft_config.target_modules is None:
            peft_config.target_modules = find_attention_outputs(model)
        targets = [
            (name, module)
            for name, module in _projections(model)
            if self._check_target_module_exists(peft_config, name)
        ]
        layers = {layer_index(name) for name, _ in targets}
        selected = peft_config.layers_to_transform
        missing = set(selected) - layers if isinstance(selected, list) else set()
        if not targets or missing:
            indices = sorted({index for name, _ in _projections(model) if (index := layer_index(name)) is not None})
            where = f"layers {sorted(missing)}" if missing else "the model"
            excluded = f" outside exclude_modules {peft_config.exclude_modules}" if peft_config.exclude_modules else ""
            raise ValueError(
                f"no module matches target_modules {peft_config.target_modules}{excluded} in {where}: "
                f"the model has layers {indices[0] if indices else 'none'} to {indices[-1] if indices else 'none'}, "
                f"and its attention outputs are {find_attention_outputs(model)}"
            )
        heads = peft_config.num_heads
        assert heads is not None  # see _prepare_adapter_config
        for name, module in targets:
            channels = module.in_features if isinstance(module, SealLayer) else projection_shape(module)[0]
            if channels % heads:
                raise ValueError(
                    f"{name} has {channels} input channels, which is not divisible by {heads} heads: "
                    "set num_heads, or other target_modules"
                )

    def _create_and_replace(
        self, peft_config: SealConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str, **_: Any,
    ) -> None:  # fmt: skip
        """Wrap a projection, or add an adapter to a projection that is already wrapped."""
        if isinstance(target, SealLayer):
            target.update_layer(adapter_name, peft_config)
            return
        if isinstance(target, BaseTunerLayer):
            raise ValueError(f"{current_key} already has an adapter of another PEFT method: merge that adapter first")
        heads = peft_config.num_heads
        assert heads is not None
        layer = SealLayer(target, adapter_name, peft_config, heads)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


if peft_type() not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name="seal", config_cls=SealConfig, model_cls=SealModel)

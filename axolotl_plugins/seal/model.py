"""PEFT tuner of SEAL: finds a model's attention output projections and what else to scale, and wraps them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils import register_peft_method
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .config import SealConfig, peft_type
from .layer import SealLayer
from .placements import Site, features, find_sites

# Attention output projections in the Transformers library, and some of the models that have them.
ATTENTION_OUTPUTS = (
    "self_attn.o_proj",  # Llama, Mistral, Qwen, Gemma, Phi-3 and most others
    "self_attn.out_proj",  # OPT
    "self_attn.dense",  # Phi
    "self_attn.0.o_proj",  # LongCat, with two attention modules in a layer
    "self_attn.1.o_proj",
    "self_attn.o_proj.linear",  # Moshi
    "attention.dense",  # GPT-NeoX
    "attention.output.dense",  # BERT
    "self_attention.dense",  # Falcon, Bloom
    "self_attention.attention_out",  # CPM-Ant
    "multi_head_attention.dense",  # CTRL
    "attn.c_proj",  # GPT-2
    "attn.out_proj",  # GPT-J, MPT
    "attn.Wo",  # ModernBERT
    "attn.attention.out_proj",  # GPT-Neo
    "attention.wo",  # InternLM
    "mixer.o_proj",  # Nemotron-H
    "temporal_block.o_proj",  # RecurrentGemma
)


def layer_index(name: str) -> int | None:
    """Return the decoder layer of a module, the first numbered part of its name, or None."""
    match = re.search(r"\.(\d+)\.", name)
    return int(match[1]) if match else None


def text_modules(model: Any) -> set[nn.Module]:
    """Return the modules of a model's text decoder, without towers that read images or sound."""
    if not isinstance(model, PreTrainedModel):
        return set(model.modules())
    decoder = model.get_decoder()
    modules = set((decoder if isinstance(decoder, PreTrainedModel) else model).modules())  # ModernBERT's is its head
    for part in model.modules():
        if part is not model and isinstance(part, PreTrainedModel) and "text" not in part.input_modalities:
            modules -= set(part.modules())
    return modules


def _projections(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every Linear and Conv1D of the text decoder with its name, or its wrapper where there is one."""
    modules = text_modules(model)
    for name, module in model.named_modules():
        if module in modules and (
            isinstance(module, SealLayer)
            or (isinstance(module, nn.Linear | Conv1D) and not name.endswith("base_layer"))
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


def num_query_heads(attention: nn.Module, channels: int, config: dict) -> int:
    """Return the query heads of an attention module.

    Args:
        attention: contains the output projection.
        channels: input channels of the output projection, all heads concatenated.
        config: Transformers config of the model, as a dict.

    Raises:
        ValueError: neither the module nor the config has a field for it.
    """
    # The module's own sizes come first: in some models they differ by layer, in others values are of another size.
    for field in ("v_head_dim", "head_dim", "head_size"):
        size = getattr(attention, field, None)
        if isinstance(size, int) and size > 0 and channels % size == 0:
            return channels // size
    config = config.get("text_config") or config
    for field in ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"):
        if isinstance(config.get(field), int):
            return config[field]
    raise ValueError("the model's config has no number of query heads: set num_heads")


def is_selected(config: SealConfig, name: str) -> bool:
    """Return whether a configuration selects the attention output projection of this name."""
    layers = config.layers_to_transform
    if isinstance(layers, list) and layer_index(name) not in layers:
        return False
    # Without the layers: PEFT finds no index in the names of a model without head, such as `layers.0.self_attn`.
    names = SimpleNamespace(target_modules=config.target_modules, exclude_modules=config.exclude_modules)
    return bool(check_target_module_exists(names, name))


class SealModel(BaseTuner):
    """PEFT tuner of SEAL: scales, by default of attention outputs, are all that is trainable (paper section 4.2)."""

    prefix: str = "seal_"
    tuner_layer_cls = SealLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _check_target_module_exists(self, peft_config: SealConfig, key: str) -> bool:
        """Return whether to scale the module named ``key``."""
        return key in self._sites

    def _prepare_adapter_config(self, peft_config: SealConfig, model_config: dict) -> SealConfig:
        """Keep the model's config; ``_prepare_model`` sets modules and heads because it has access to the model."""
        self._model_config = model_config
        return peft_config

    def _prepare_model(self, peft_config: SealConfig, model: nn.Module) -> None:
        """Set the target modules and check that all of them can be scaled, before any is replaced.

        Raises:
            ValueError: no module matches, or a module's channels are not divisible by the number of heads.
        """
        if peft_config.target_modules is None:
            peft_config.target_modules = find_attention_outputs(model)
        projections = dict(_projections(model))
        names = [name for name in projections if is_selected(peft_config, name)]
        layers = {layer_index(name) for name in names}
        selected = peft_config.layers_to_transform
        missing = set(selected) - layers if isinstance(selected, list) else set()
        if not names or missing:
            indices = sorted({index for name in projections if (index := layer_index(name)) is not None})
            where = f"layers {sorted(missing)}" if missing else "the model"
            excluded = f" outside exclude_modules {peft_config.exclude_modules}" if peft_config.exclude_modules else ""
            raise ValueError(
                f"no module matches target_modules {peft_config.target_modules}{excluded} in {where}: "
                f"the model has layers {indices[0] if indices else 'none'} to {indices[-1] if indices else 'none'}, "
                f"and its attention outputs are {find_attention_outputs(model)}"
            )
        heads = {name: self._query_heads(peft_config, model, name, projections[name]) for name in names}
        outputs = {name: Site((("attention_output", heads[name]),), features(projections[name])[0]) for name in names}
        sites = find_sites(model, outputs, peft_config.placements)
        excludes: Any = SimpleNamespace(target_modules=peft_config.exclude_modules or [], exclude_modules=None)
        self._sites = {name: site for name, site in sites.items() if not check_target_module_exists(excludes, name)}
        if not self._sites:
            raise ValueError(f"exclude_modules: {peft_config.exclude_modules} leaves no module to scale")
        if len(numbers := set(heads.values())) == 1:
            peft_config.num_heads = numbers.pop()

    def _query_heads(self, peft_config: SealConfig, model: nn.Module, name: str, projection: nn.Module) -> int:
        """Return the query heads whose outputs a projection takes.

        Raises:
            ValueError: its input channels are not divisible by their number.
        """
        channels = features(projection)[0]
        attention = model.get_submodule(name.rpartition(".")[0])
        heads = peft_config.num_heads or num_query_heads(attention, channels, self._model_config)
        if channels % heads:
            raise ValueError(
                f"{name} has {channels} input channels, which is not divisible by {heads} heads: "
                "set num_heads, or other target_modules"
            )
        return heads

    def _create_and_replace(
        self, peft_config: SealConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str, **_: Any,
    ) -> None:  # fmt: skip
        """Wrap a projection, or add an adapter to a projection that is already wrapped."""
        site = self._sites[current_key]
        if isinstance(target, SealLayer):
            if target.site != site:
                raise ValueError(f"{current_key}: another adapter scales other channels of it: use a model for each")
            target.update_layer(adapter_name, peft_config)
            return
        if isinstance(target, BaseTunerLayer):
            raise ValueError(f"{current_key} already has an adapter of another PEFT method: merge that adapter first")
        layer = SealLayer(target, adapter_name, peft_config, site)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self) -> None:
        """Raise ValueError if layers share a weight, which would be scaled once for each of them."""
        super()._check_merge_allowed()
        owners: dict[int, str] = {}
        for name, layer in self.named_modules():
            if isinstance(layer, SealLayer):
                owner = owners.setdefault(id(layer.get_base_layer().weight), name)
                if owner != name:
                    raise ValueError(f"{owner} and {name} share one weight, which cannot be merged: use the adapter")

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Let each row of a batch have the adapter that the argument ``adapter_names`` of a call names for it.

        Raises:
            ValueError: an adapter does not exist, or the model is in training mode, where activations may be
                recomputed after the call.
        """
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names: call the model in evaluation mode (`model.eval()`)")
        if unknown := set(names) - {"__base__", *self.peft_config}:
            raise ValueError(f"adapter_names: there is no adapter {min(unknown)!r}: found {sorted(self.peft_config)}")
        beams = kwargs.get("num_beams") or 1
        layers = [module for module in self.modules() if isinstance(module, SealLayer)]
        try:
            for layer in layers:
                layer.row_adapters = [name for name in names for _ in range(beams)]
            yield
        finally:
            for layer in layers:
                layer.row_adapters = None


if peft_type() not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name="seal", config_cls=SealConfig, model_cls=SealModel)

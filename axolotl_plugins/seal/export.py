"""Export of a SEAL adapter as a stock PEFT adapter, for programs without this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, get_peft_model
from safetensors.torch import save_file

from axolotl_plugins.common.io import check_output, written_whole

from . import provenance
from .config import SealConfig
from .layer import SealLayer
from .model_loading import load
from .scales import saved_tensors


def export_ia3(adapter: Path, out: Path, *, trust_remote_code: bool = False) -> None:
    """Write the scales as an IA3 adapter, whose feed-forward form scales a projection's input as SEAL-C does.

    Args:
        adapter: folder of a SEAL adapter; the scale of a head is repeated over its channels.
        out: folder to write; must not exist.
        trust_remote_code: run code that comes with the base model.

    Raises:
        ValueError: ``adapter`` is not a SEAL adapter, scales the output of a norm, which IA3 does not support, or
            ``out`` exists.
    """
    scales = saved_tensors(adapter)  # raises if the folder is not a SEAL adapter
    check_output(out, folder=True)
    config = SealConfig.from_pretrained(str(adapter))
    options: dict[str, Any] = {"needs_template": False, "default_window": 1}  # neither matters
    model = load(adapter, weights=False, trust_remote_code=trust_remote_code, **options).model
    layers = dict(get_peft_model(model, config).named_modules())  # on the meta device
    tensors, modules, inputs = {}, [], []
    for name, scale in scales.items():
        module = name.removesuffix(".seal_scale")
        layer = layers.get(module)
        size = layer.seal_scale["default"].numel() if isinstance(layer, SealLayer) else 0
        if not isinstance(layer, SealLayer) or len(scale) != size:
            raise ValueError(f"{adapter}: found {len(scale)} scales of {name}, the model has {size}: it belongs to "
                             "another model or configuration")  # fmt: skip
        if layer.site.gain:
            raise ValueError(f"{adapter}: scales the output of {module}, a norm, which IA3 does not support: merge it")
        factor = layer.of_features(torch.from_numpy(scale).repeat_interleave(layer.site.channels // size))
        tensors[f"{module}.ia3_l"] = (factor[:, None] if layer.site.of_output else factor[None]).contiguous()
        modules.append(module.removeprefix("base_model.model."))
        if not layer.site.of_output:
            inputs.append(modules[-1])
    ia3_config = IA3Config(
        base_model_name_or_path=config.base_model_name_or_path, task_type="CAUSAL_LM", inference_mode=True,
        target_modules=modules, feedforward_modules=inputs,
    )  # fmt: skip
    with written_whole(out) as partial:
        partial.mkdir()
        ia3_config.save_pretrained(str(partial))
        save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        provenance.copy(adapter, partial)

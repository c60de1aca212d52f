"""SEAL as a PEFT tuner: ``get_peft_model(model, SealConfig(granularity="head"))``.

Importing this package registers the tuner with PEFT and needs PyTorch, Transformers, PEFT and safetensors only;
``SealPlugin`` needs Axolotl.
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from .config import Granularity, SealConfig, peft_type
from .layer import SealLayer
from .model import SealModel, find_attention_outputs

__all__ = ["Granularity", "SealConfig", "SealLayer", "SealModel", "find_attention_outputs"]

if peft_type() not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name="seal", config_cls=SealConfig, model_cls=SealModel)


def __getattr__(name: str) -> object:
    """Return ``SealPlugin``, imported on access because it needs Axolotl."""
    if name == "SealPlugin":
        from .plugin import SealPlugin

        return SealPlugin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

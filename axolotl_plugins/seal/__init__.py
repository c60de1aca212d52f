"""SEAL as a PEFT tuner: ``get_peft_model(model, SealConfig(granularity="head"))``.

The tuner needs PyTorch, Transformers, PEFT and safetensors only, ``SealPlugin`` needs Axolotl. Both are imported on
access, so that command lines print their help at once. Importing ``SealConfig`` registers the tuner with PEFT.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

Granularity = Literal["head", "channel"]
Placement = Literal["attention_output", "query", "value", "mlp"]

if TYPE_CHECKING:
    from .config import SealConfig
    from .layer import SealLayer
    from .model import SealModel, find_attention_outputs
    from .plugin import SealPlugin

__all__ = ["Granularity", "Placement", "SealConfig", "SealLayer", "SealModel", "SealPlugin", "find_attention_outputs"]


def __getattr__(name: str) -> Any:
    """Return an object of ``__all__``, imported on access."""
    if name in __all__:
        return getattr(import_module(".plugin" if name == "SealPlugin" else ".model", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if "peft" in sys.modules:  # nothing to save: register the tuner at once
    import_module(".model", __name__)

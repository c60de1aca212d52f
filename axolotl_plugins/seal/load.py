"""Loading a model whichever way it is named: hub id, model folder, or adapter folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import axolotl_plugins.self_extend  # noqa: F401 - its RoPE type
from data_gen.generate import read_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Loaded:
    """A model ready to use.

    Attributes:
        name: as it was asked for.
        model: in evaluation mode, with the adapter applied if there is one.
        tokenizer: with a chat template.
        base: hub id or folder of the base model.
        method: ``base``, ``SEAL-H``, ``SEAL-C``, ``LoRA``, ``DoRA`` or the adapter's PEFT type.
        window: most tokens the model declares to take.
    """

    name: str
    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    base: str
    method: str
    window: int


def is_adapter(name: str | Path) -> bool:
    """Whether a folder holds an adapter."""
    return (Path(name) / "adapter_config.json").is_file()


def method_name(config: PeftConfig) -> str:
    """What the paper calls an adapter."""
    if config.peft_type.value == "LORA":
        return "DoRA" if config.use_dora else "LoRA"
    return {"head": "SEAL-H", "channel": "SEAL-C"}.get(getattr(config, "granularity", ""), str(config.peft_type.value))


def with_adapter(loaded: Loaded, config: PeftConfig) -> Loaded:
    """The same model with a new, untrained adapter of any PEFT method.

    Raises:
        ValueError: the adapter does not fit the model.
    """
    return replace(loaded, model=get_peft_model(loaded.model, config).eval(), method=method_name(config))


def load(
    name: str | Path, *, dtype: torch.dtype | str = "auto", chat_template: str | None = None,
    trust_remote_code: bool = False, weights: bool = True,
) -> Loaded:  # fmt: skip
    """Load a model for inference.

    Args:
        name: hub id, model folder, or adapter folder (its base model is loaded and the adapter applied; a
            ``config.json`` beside the adapter, such as Axolotl writes, overrides the base model's).
        dtype: of the base model's weights; ``"auto"`` keeps the checkpoint's.
        chat_template: a jinja file, for base models whose tokenizer comes without a template.
        trust_remote_code: run code that comes with the checkpoint.
        weights: without them the model is a shape alone, and an adapter is not applied: for models that are served.

    Raises:
        ValueError: something is missing or does not fit; the message is one line.
    """
    name = str(name)
    base = name
    trust = {"trust_remote_code": trust_remote_code}
    try:
        adapter = PeftConfig.from_pretrained(name) if is_adapter(name) else None
        if adapter is not None:
            base = adapter.base_model_name_or_path or ""
            if not base:
                raise ValueError("adapter_config.json does not say what its base model is")
        source = name if adapter is not None and (Path(name) / "config.json").is_file() else base
        config = AutoConfig.from_pretrained(source, **trust)
        if weights:
            kinds = {"dtype": dtype, "use_safetensors": True}
            model = AutoModelForCausalLM.from_pretrained(base, config=config, **kinds, **trust)
        else:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, **trust)
        if adapter is not None and weights:
            model = PeftModel.from_pretrained(model, name)
        own = adapter is None or (Path(name) / "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(name if own else base, **trust)
    except (OSError, ValueError, RuntimeError, KeyError, StrictDataclassError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"cannot load {name}: {text[:400] or type(error).__name__}") from error
    if chat_template is not None:
        tokenizer.chat_template = read_template(chat_template)
    if not tokenizer.chat_template:
        raise ValueError(f"{name}: its tokenizer has no chat template: name one with --chat-template")
    window = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not window:
        raise ValueError(f"{name}: its config does not say how long a context it takes (max_position_embeddings)")
    return Loaded(name, model.eval(), tokenizer, base, method_name(adapter) if adapter else "base", window)

"""Loading a model whichever way it is named: hub id, model folder, or adapter folder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

import axolotl_plugins.self_extend  # noqa: F401 - its RoPE type
from axolotl_plugins.common.console import first_line
from axolotl_plugins.common.io import load_json
from axolotl_plugins.common.tokenizer import check_template, load_tokenizer, read_template

from .provenance import seen_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Broken files make the libraries raise almost anything, ImportError where a quantised model lacks its library.
BROKEN = (
    OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError, StrictDataclassError,
    SafetensorError,
)  # fmt: skip
RECORD = "seal_merge.json"  # in a merged folder: what ``merge.merge`` returns


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to use.

    Attributes:
        name: as it was asked for.
        model: in evaluation mode, with the adapter applied if there is one.
        tokenizer: with a chat template.
        base: hub id or folder of the base model, also of a merged folder.
        method: ``base``, ``SEAL-H``, ``SEAL-C``, ``LoRA``, ``DoRA`` or the adapter's PEFT type; a merged folder's too.
        window: most tokens the model declares to take.
        trained_on: hashes of the texts it was tuned on, see ``provenance``; None where they are not known.
    """

    name: str
    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    base: str
    method: str
    window: int
    trained_on: frozenset[str] | None = None

    @property
    def short_window(self) -> int | None:
        """Longest text, in tokens, with the RoPE frequencies of short texts (LongRoPE); None with one set for all.

        Raises:
            ValueError: the frequencies depend on the texts that were read before.
        """
        ropes = getattr(self.model.config.get_text_config(), "rope_parameters", None) or {}
        for rope in (ropes, *(kind for kind in ropes.values() if isinstance(kind, dict))):
            if rope.get("rope_type") == "dynamic":
                raise ValueError(
                    f"{self.base}: RoPE of the type dynamic keeps the frequencies of the longest text so far, so that "
                    "results would depend on their order: give it fixed ones, `rope_type: default` and a higher "
                    "`rope_theta`"
                )
            if rope.get("rope_type") == "longrope":
                return rope["original_max_position_embeddings"]
        return None

    def check_room(self, prompt: int, answer: int) -> None:
        """See that a prompt and its answer fit into the window, on one side of ``short_window``.

        Keys are kept as they were turned when the prompt was read; queries turned otherwise do not match them.

        Args:
            prompt: its length in tokens.
            answer: most tokens of an answer.

        Raises:
            ValueError: they do not; the message names the numbers.
        """
        if prompt + answer > self.window:
            raise ValueError(
                f"a prompt of {prompt} tokens and {answer} tokens of answer do not fit into the model's window "
                f"of {self.window}: ask for shorter --lengths, or take a model with a longer window"
            )
        if (short := self.short_window) and prompt <= short < prompt + answer:
            raise ValueError(
                f"a prompt of {prompt} tokens and {answer} tokens of answer lie on both sides of {short} tokens, where "
                f"the model's RoPE frequencies change: ask for lengths of at most {short - answer}, or at least "
                f"{short + answer}"
            )


def is_adapter(name: str | Path) -> bool:
    """Whether a folder holds an adapter."""
    return (Path(name) / "adapter_config.json").is_file()


def method_name(config: PeftConfig) -> str:
    """What the paper calls an adapter."""
    if config.peft_type.value == "LORA":
        return "DoRA" if config.use_dora else "LoRA"
    return {"head": "SEAL-H", "channel": "SEAL-C"}.get(getattr(config, "granularity", ""), str(config.peft_type.value))


def apply_adapter(model: PreTrainedModel, folder: Path, *, trainable: bool = False) -> PeftModel:
    """Wrap a model with a saved adapter, whose file must hold all its tensors and no others: PEFT does not look.

    Raises:
        ValueError: a tensor is missing, not known, or holds values that are no numbers; the message names it.
    """
    adapter_file(folder)
    model = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    check_tensors(folder, model)
    return model


def adapter_file(folder: Path) -> Path:
    """Where a saved adapter's tensors are.

    Raises:
        ValueError: there are none, or they are cut off.
    """
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise ValueError(f"{folder}: holds no {file.name}: copy the whole folder again, or tune again")
    try:
        with safe_open(file, "pt"):
            return file
    except SafetensorError as error:
        raise ValueError(f"{file}: not whole ({first_line(error)}): copy it again, or tune again") from None


def check_tensors(folder: Path, model: PeftModel, adapter_name: str = "default") -> None:
    """See that a saved adapter is the one that a model was given.

    Raises:
        ValueError: see ``apply_adapter``.
    """
    file = adapter_file(folder)
    saved, expected = load_file(file), get_peft_model_state_dict(model, adapter_name=adapter_name)
    for what, names in (("lacks", expected.keys() - saved.keys()), ("also holds", saved.keys() - expected.keys())):
        if names:
            raise ValueError(f"{file}: {what} {min(names)}: it is not whole, or of another model or configuration")
    if bad := [name for name, tensor in saved.items() if not torch.isfinite(tensor).all()]:
        raise ValueError(f"{file}: {bad[0]} holds values that are no numbers: tune again at a lower learning rate")


def load_weights(base: str, config: Any, dtype: torch.dtype | str, trust_remote_code: bool) -> PreTrainedModel:
    """A base model whose checkpoint is whole.

    Raises:
        ValueError: a tensor is missing, or the checkpoint is quantised in an unknown way; Transformers only warns.
    """
    model, found = AutoModelForCausalLM.from_pretrained(
        base, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if found["missing_keys"]:
        raise ValueError(f"{base} lacks {min(found['missing_keys'])}: it is not whole, or its config is another's")
    if getattr(config, "quantization_config", None) and getattr(model, "hf_quantizer", None) is None:
        raise ValueError(f"{base} says that it is quantised in a way that is not known: its weights are no model's")
    return model


def cannot_load(name: str, error: BaseException) -> ValueError:
    """What is said of a model or an adapter whose files a library could not read, in one line."""
    text = " ".join(str(error).split())
    if found := re.search(r"size mismatch for (\S+): .*? shape torch.Size\((.*?)\) .*? torch.Size\((.*?)\)", text):
        text = "size mismatch: {} has the shape {}, the model's {}: it is of another model or configuration".format(
            *found.groups()
        )
    return ValueError(f"cannot load {name}: {text[:400] or type(error).__name__}")


def check_name(name: str) -> None:
    """See that the name of a folder is not taken for that of a repository on the hub.

    Raises:
        ValueError: it is a file's, or there is no such folder where there are others.
    """
    path = Path(name)
    if path.is_file():
        raise ValueError(f"{name}: is a file, expected a model's or an adapter's folder, or a hub id")
    local = path.is_absolute() or name.startswith(".") or (len(path.parts) > 1 and path.parent.is_dir())
    if local and not path.exists():
        raise ValueError(f"{name}: there is no such folder")


def with_adapter(loaded: LoadedModel, config: PeftConfig) -> LoadedModel:
    """The same model with a new, untrained adapter of any PEFT method.

    Raises:
        ValueError: the adapter does not fit the model.
    """
    return replace(loaded, model=get_peft_model(loaded.model, config).eval(), method=method_name(config))


def load(
    name: str | Path, *, dtype: torch.dtype | str = "auto", chat_template: str | None = None,
    trust_remote_code: bool = False, weights: bool = True, model_config: dict[str, Any] | None = None,
) -> LoadedModel:  # fmt: skip
    """Load a model for inference.

    Args:
        name: hub id, model folder, or adapter folder (its base model is loaded and the adapter applied; a
            ``config.json`` beside the adapter, such as Axolotl writes, overrides the base model's).
        dtype: of the base model's weights; ``"auto"`` keeps the checkpoint's.
        chat_template: a jinja file, for base models whose tokenizer comes without a template.
        trust_remote_code: run code that comes with the checkpoint.
        model_config: keys of the model's config to set, as a recipe's ``model_config``.
        weights: without them the model is a shape alone, and an adapter is not applied: for models that are served.

    Raises:
        ValueError: something is missing or does not fit; the message is one line.
    """
    name = str(name)
    base = name
    check_name(name)
    trust = {"trust_remote_code": trust_remote_code}
    try:
        adapter = PeftConfig.from_pretrained(name) if is_adapter(name) else None
        if adapter is not None:
            base = adapter.base_model_name_or_path or ""
            if not base:
                raise ValueError("adapter_config.json does not say what its base model is")
        source = name if adapter is not None and (Path(name) / "config.json").is_file() else base
        config = AutoConfig.from_pretrained(source, **trust, **(model_config or {}))
        if source != base and hasattr(config, "quantization_config"):
            # How training held the base's weights is not part of the model: scores and merges are of those weights.
            del config.quantization_config
        if weights:
            model = load_weights(base, config, dtype, trust_remote_code)
        else:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, **trust)
            if (Path(name) / "generation_config.json").is_file():  # it may list more ends of an answer
                model.generation_config = GenerationConfig.from_pretrained(name)
        if adapter is not None and weights:
            model = apply_adapter(model, Path(name))
        own = adapter is None or (Path(name) / "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(name if own else base, **trust)
    except BROKEN as error:
        raise cannot_load(name, error) from error
    if chat_template is not None:
        tokenizer.chat_template = read_template(chat_template)
    check_template(tokenizer, name)
    window = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not window:
        raise ValueError(f"{name}: its config does not say how long a context it takes (max_position_embeddings)")
    method = method_name(adapter) if adapter else "base"
    if (record := Path(name) / RECORD).is_file():
        merged = load_json(record)
        if not (isinstance(merged, dict) and {"base", "method"} <= merged.keys()):
            raise ValueError(f"{record}: does not say what was merged (base, method): merge again")
        base, method = str(merged["base"]), str(merged["method"])
    return LoadedModel(name, model.eval(), tokenizer, base, method, window, seen_texts(Path(name)))


def load_each(
    adapters: dict[str, str], *, chat_template: str | None = None, trust_remote_code: bool = False
) -> Iterator[LoadedModel]:
    """Adapters of one base model, which is loaded once: a model is good until the next one is asked for.

    All are put on it before the first one is given, so that whatever is wrong with one is found before time is spent.

    Args:
        adapters: name -> adapter folder.
        chat_template: see ``load``.
        trust_remote_code: see ``load``.

    Raises:
        ValueError: one is no adapter, or they are not adapters of one and the same base model.
    """
    configs: dict[str, PeftConfig] = {}
    shapes: list[dict[str, Any]] = []
    said = ("_name_or_path", "dtype", "transformers_version", "use_cache")  # of the file, not of the model
    for folder in adapters.values():
        if not is_adapter(folder):
            raise ValueError(f"adapter: {folder} has no adapter_config.json: name the folder that training wrote")
        try:
            configs[folder] = PeftConfig.from_pretrained(folder)
        except BROKEN as error:
            raise cannot_load(folder, error) from error
        base, first = (configs[one].base_model_name_or_path for one in (folder, next(iter(configs))))
        if base != first:
            raise ValueError(f"adapter: {folder} is of {base}, the first one of {first}: score it on its own")
        source = folder if (Path(folder) / "config.json").is_file() else base
        config = AutoConfig.from_pretrained(source).to_dict()
        shapes.append({key: value for key, value in config.items() if key not in said})
        if differing := [key for key in {**shapes[0], **shapes[-1]} if shapes[0].get(key) != shapes[-1].get(key)]:
            raise ValueError(f"adapter: {folder} has another {differing[0]} than the first one: score it on its own")
    first, *others = adapters.values()
    for folder in others:
        adapter_file(Path(folder))
    shared = load(first, chat_template=chat_template, trust_remote_code=trust_remote_code)
    model = shared.model
    assert isinstance(model, PeftModel)
    each = {"default": shared}
    for number, folder in enumerate(others, 2):
        name = f"adapter_{number}"
        try:
            model.load_adapter(folder, adapter_name=name)
        except BROKEN as error:
            raise cannot_load(folder, error) from error
        check_tensors(Path(folder), model, name)
        tokenizer = shared.tokenizer
        if (Path(folder) / "tokenizer_config.json").is_file():
            tokenizer = load_tokenizer(folder, chat_template)
        each[name] = replace(
            shared, name=folder, tokenizer=tokenizer, method=method_name(configs[folder]),
            trained_on=seen_texts(Path(folder)),
        )  # fmt: skip
    for name, loaded in each.items():
        model.set_adapter(name, inference_mode=True)
        yield loaded

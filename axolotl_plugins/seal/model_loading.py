"""Load a model for inference from a hub id, a model folder or an adapter folder."""

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
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

import axolotl_plugins.self_extend  # noqa: F401 - registers its RoPE type
from axolotl_plugins.common.console import first_line
from axolotl_plugins.common.io import load_json
from axolotl_plugins.common.tokenizer import set_template
from axolotl_plugins.common.window import context_window, read_config, ropes

from .model import SealModel  # noqa: F401 - registers the tuner with PEFT
from .provenance import base_model, seen_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What the libraries raise for corrupt files; ImportError for a quantised model without its library.
BROKEN = (
    OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError, StrictDataclassError,
    SafetensorError,
)  # fmt: skip
RECORD = "seal_merge.json"  # in a merged folder, see ``merge.merge``
# Keys of a config that depend on how it was written, not on the model; a copy has its original's code.
WRITER_KEYS = {
    "_name_or_path", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache", "quantization_config",
}  # fmt: skip


@dataclass(frozen=True)
class LoadedModel:
    """A model for inference with its tokenizer.

    Attributes:
        name: the argument of ``load``.
        model: in evaluation mode, with the adapter applied if there is one.
        tokenizer: with a chat template.
        base: hub id or folder of the base model, also for a merged folder.
        method: ``base``, ``SEAL-H``, ``SEAL-C``, ``LoRA``, ``DoRA`` or a PEFT type (see ``method_name``); also for a
            merged folder.
        window: context window in tokens, from the config.
        trained_on: hashes of the texts it was tuned on, see ``provenance``; None if unknown.
        trust_remote_code: whether it was loaded with code from the checkpoint.
    """

    name: str
    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    base: str
    method: str
    window: int
    trained_on: frozenset[str] | None = None
    trust_remote_code: bool = False

    @property
    def dtype(self) -> str | None:
        """Return the dtype of the weights that answer, such as ``bfloat16``; None if a server has them."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def short_window(self) -> int | None:
        """Maximum length, in tokens, with the RoPE frequencies of short texts (LongRoPE); None for other RoPE types.

        Raises:
            ValueError: RoPE is of type ``dynamic``, whose frequencies depend on earlier inputs.
        """
        for rope in ropes(self.model.config):
            if rope.get("rope_type") == "dynamic":
                raise ValueError(
                    f"{self.base}: RoPE of the type dynamic keeps the frequencies of the longest input so far, so that "
                    "results depend on the order of inputs: set fixed frequencies by `rope_type: default` and a higher "
                    "`rope_theta`"
                )
            if rope.get("rope_type") == "longrope":
                return rope["original_max_position_embeddings"]
        return None

    def check_lengths(self, lengths: list[int] | None) -> None:
        """Raise ValueError if samples of these lengths do not fit into the window."""
        if lengths and max(lengths) > self.window:
            raise ValueError(f"lengths: {max(lengths)} tokens do not fit into the model's window of {self.window}")

    def check_room(self, prompt: int, answer: int) -> None:
        """Raise ValueError unless a prompt and answer, in tokens, fit the window and do not cross ``short_window``.

        Cached keys have the RoPE frequencies of the prefill, which queries with other frequencies do not match.
        """
        if prompt + answer > self.window:
            raise ValueError(
                f"a prompt of {prompt} tokens and {answer} tokens of answer do not fit into the model's window "
                f"of {self.window}: use shorter --lengths (of published cases --lines), or a model with a longer window"
            )
        if (short := self.short_window) and prompt <= short < prompt + answer:
            raise ValueError(
                f"a prompt of {prompt} tokens and {answer} tokens of answer cross {short} tokens, where the model's "
                f"RoPE frequencies change: use lengths of at most {short - answer}, or at least {short + answer}"
            )


def is_adapter(name: str | Path) -> bool:
    """Return whether a folder contains an adapter."""
    return (Path(name) / "adapter_config.json").is_file()


def check_adapter(folder: Path) -> None:
    """Raise ValueError if a folder contains no adapter; the message tells a merged model from other folders."""
    if (folder / RECORD).is_file():
        raise ValueError(f"{folder}: is a merged model, expected an adapter folder")
    if not is_adapter(folder):
        raise ValueError(f"{folder}: not an adapter folder (it has no adapter_config.json)")


def method_name(config: PeftConfig) -> str:
    """Return the paper's name of an adapter's method, with placements beyond the paper, or its PEFT type."""
    if config.peft_type.value == "LORA":
        return "DoRA" if config.use_dora else "LoRA"
    if config.peft_type.value != "SEAL":
        return str(config.peft_type.value)
    name = {"head": "SEAL-H", "channel": "SEAL-C"}[config.granularity]
    return name if config.placements == ["attention_output"] else f"{name} ({', '.join(config.placements)})"


def apply_adapter(model: PreTrainedModel, folder: Path, *, trainable: bool = False) -> PeftModel:
    """Wrap a model with a saved adapter, and check the adapter's tensors, which PEFT does not.

    Raises:
        ValueError: a tensor is missing, unexpected or non-finite; the message names it.
    """
    adapter_file(folder)
    model = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    check_tensors(folder, model)
    return model


def adapter_file(folder: Path) -> Path:
    """Return the path of a saved adapter's tensors.

    Raises:
        ValueError: the file is missing, truncated or corrupt.
    """
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise ValueError(f"{folder}: has no {file.name}: copy the folder again, or train again")
    try:
        with safe_open(file, "pt"):
            return file
    except SafetensorError as error:
        raise ValueError(f"{file}: truncated or corrupt ({first_line(error)}): copy it again, or train again") from None


def check_tensors(folder: Path, model: PeftModel, adapter_name: str = "default") -> None:
    """Raise ValueError unless an adapter file has the tensors of an adapter of a model, with finite values."""
    file = adapter_file(folder)
    saved, expected = load_file(file), get_peft_model_state_dict(model, adapter_name=adapter_name)
    missing, unexpected = expected.keys() - saved.keys(), saved.keys() - expected.keys()
    for problem, names in (("lacks", missing), ("has the unexpected tensor", unexpected)):
        if names:
            raise ValueError(f"{file}: {problem} {min(names)}: it belongs to another model or configuration")
    if bad := [name for name, tensor in saved.items() if not torch.isfinite(tensor).all()]:
        raise ValueError(f"{file}: {bad[0]} has non-finite values: train again at a lower learning rate")


def load_weights(
    base: str, config: Any, dtype: torch.dtype | str, trust_remote_code: bool, on_cpu: bool
) -> PreTrainedModel:
    """Load a base model whose checkpoint is complete, onto the accelerators if there are any.

    Raises:
        ValueError: a tensor is missing, or the quantisation method is unknown; Transformers only warns.
    """
    model, info = AutoModelForCausalLM.from_pretrained(
        base, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True,
        trust_remote_code=trust_remote_code,
        device_map="auto" if torch.accelerator.is_available() and not on_cpu else None,
    )  # fmt: skip
    if info["missing_keys"]:
        raise ValueError(f"{base} lacks {min(info['missing_keys'])}: the checkpoint is incomplete or its config wrong")
    if getattr(config, "quantization_config", None) and getattr(model, "hf_quantizer", None) is None:
        raise ValueError(f"{base}: the quantization_config of its config.json is of an unknown method")
    return model


def meta_model(name: str, base: str, config: Any, **trust: bool) -> PreTrainedModel:
    """Build a model on the meta device, with the generation config of its folder, and code of its base's if it may."""
    config.name_or_path = base
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **trust)
    if (Path(name) / "generation_config.json").is_file():  # may list more EOS tokens
        model.generation_config = GenerationConfig.from_pretrained(name)
    return model


def cannot_load(name: str, error: BaseException) -> ValueError:
    """Return the one-line error for a model or an adapter that a library could not load."""
    text = " ".join(str(error).split())
    if match := re.search(r"size mismatch for (\S+): .*? shape torch.Size\((.*?)\) .*? torch.Size\((.*?)\)", text):
        text = "size mismatch: {} has shape {}, the model's {}: it belongs to another model or configuration".format(
            *match.groups()
        )
    return ValueError(f"cannot load {name}: {text[:400] or type(error).__name__}")


def check_name(name: str) -> None:
    """Raise ValueError if a name is the path of a file or of a missing folder, which would be taken for a hub id."""
    path = Path(name)
    if path.is_file():
        raise ValueError(f"{name}: is a file, expected a model's or an adapter's folder, or a hub id")
    local = path.is_absolute() or name.startswith(".") or (len(path.parts) > 1 and path.parent.is_dir())
    if local and not path.exists():
        raise ValueError(f"{name}: there is no such folder")


def with_adapter(loaded: LoadedModel, config: PeftConfig) -> LoadedModel:
    """Add a new, untrained adapter of any PEFT method to a model.

    Raises:
        ValueError: the adapter's configuration does not match the model.
    """
    return replace(loaded, model=get_peft_model(loaded.model, config).eval(), method=method_name(config))


def load(
    name: str | Path, *, dtype: torch.dtype | str = "auto", chat_template: str | None = None,
    trust_remote_code: bool = False, weights: bool = True, model_config: dict[str, Any] | None = None,
    template_arguments: dict[str, Any] | None = None, needs_template: bool = True, default_window: int | None = None,
    on_cpu: bool = False,
) -> LoadedModel:  # fmt: skip
    """Load a model for inference.

    Args:
        name: hub id, model folder, or adapter folder (its base model is loaded and the adapter applied; a
            ``config.json`` beside the adapter, such as Axolotl writes, overrides the base model's).
        dtype: dtype of the base model's weights; ``"auto"`` is the base checkpoint's, whatever an adapter was tuned in.
        chat_template: a Jinja file, for base models whose tokenizer has no template.
        trust_remote_code: run code from the checkpoint.
        weights: load the weights; without them the model is on the meta device and an adapter is not applied, for
            models served by another process.
        model_config: keys of the model's config to override, as a recipe's ``model_config``.
        template_arguments: see ``axolotl_plugins.common.tokenizer.with_arguments``; adapters carry those of training.
        needs_template: refuse a tokenizer without a chat template.
        default_window: context window where the config states none.
        on_cpu: load onto the CPU; otherwise accelerators get the layers, as ``device_map="auto"`` places them.

    Raises:
        ValueError: a file is missing, corrupt or does not match the model; the message is one line.
    """
    name = str(name)
    check_name(name)
    base = base_model(name) if is_adapter(name) else name
    trust = {"trust_remote_code": trust_remote_code}
    try:
        adapter = PeftConfig.from_pretrained(name) if is_adapter(name) else None
        source = name if adapter is not None and (Path(name) / "config.json").is_file() else base
        config = read_config(source, model_config, **trust)
        if source != base:
            # Quantisation during training is not part of the model: evaluate and merge on the base model's weights.
            original = read_config(base, trust_remote_code=trust_remote_code)
            config.dtype = original.dtype
            vars(config).pop("quantization_config", None)
            if quantised := getattr(original, "quantization_config", None):
                config.quantization_config = quantised
        model: PreTrainedModel | PeftModel
        if weights:
            model = load_weights(base, config, dtype, trust_remote_code, on_cpu)
            model = model if adapter is None else apply_adapter(model, Path(name))
        else:
            model = meta_model(name, base, config, **trust)
        has_tokenizer = adapter is None or (Path(name) / "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(name if has_tokenizer else base, **trust)
    except BROKEN as error:
        raise cannot_load(name, error) from error
    if needs_template or chat_template or tokenizer.chat_template:
        set_template(tokenizer, name, chat_template, template_arguments)
    window = context_window(config, name, default_window)
    method = method_name(adapter) if adapter else "base"
    if (Path(name) / RECORD).is_file():
        base, method = merged_from(Path(name) / RECORD)
    return LoadedModel(name, model.eval(), tokenizer, base, method, window, seen_texts(Path(name)),
                       trust_remote_code)  # fmt: skip


def merged_from(file: Path) -> tuple[str, str]:
    """Return the base model and the method that the record of a merge names.

    Raises:
        ValueError: it names none.
    """
    record = load_json(file)
    if not (isinstance(record, dict) and {"base", "method"} <= record.keys()):
        raise ValueError(f"{file}: must record base and method of the merge: merge again")
    return str(record["base"]), str(record["method"])


def load_each(adapters: dict[str, str], **options: Any) -> Iterator[LoadedModel]:
    """Load adapters of one base model, which is loaded once; yield each activated adapter until the next.

    All adapters are loaded before the first is yielded, so that errors are raised before anything is scored.

    Args:
        adapters: name -> adapter folder.
        options: of ``load``.

    Raises:
        ValueError: a folder is not an adapter, or the adapters differ in their base model or its config.
    """
    empty: list[LoadedModel] = []
    for folder in adapters.values():
        check_adapter(Path(folder))
        if empty and (base := base_model(folder)) != (first := empty[0].base):
            raise ValueError(f"adapter: {folder} is of {base}, the first one of {first}: evaluate it on its own")
        adapter_file(Path(folder))
        empty.append(load(folder, **{**options, "weights": False}))
        expected, config = (loaded.model.config.to_dict() for loaded in (empty[0], empty[-1]))
        for key in sorted((expected.keys() | config.keys()) - WRITER_KEYS):
            if expected.get(key) != config.get(key):
                raise ValueError(f"adapter: {folder} has another {key} than the first one: evaluate it on its own")
    model = load(empty[0].name, **options).model
    assert isinstance(model, PeftModel)
    names = ["default", *(f"adapter_{number}" for number in range(2, len(empty) + 1))]
    for name, loaded in zip(names[1:], empty[1:], strict=True):
        try:
            model.load_adapter(loaded.name, adapter_name=name)
        except BROKEN as error:
            raise cannot_load(loaded.name, error) from error
        check_tensors(Path(loaded.name), model, name)
    for name, loaded in zip(names, empty, strict=True):
        model.set_adapter(name, inference_mode=True)
        yield replace(loaded, model=model)

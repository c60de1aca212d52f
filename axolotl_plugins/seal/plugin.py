"""Axolotl plugin of SEAL: ``plugins: [axolotl_plugins.seal.SealPlugin]``, ``adapter: seal`` and a ``seal:`` block."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from axolotl.common.const import DEFAULT_DATASET_PREPARED_PATH
from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from axolotl_plugins.common.console import first_line, in_rust, out_of_memory, stop
from axolotl_plugins.common.io import write_text
from axolotl_plugins.common.window import read_config, stated_window

from . import provenance
from .args import parse_block
from .config import SealConfig
from .context_parallel import check_processes
from .model_loading import apply_adapter
from .trainer import AnswerTrainer, SealTrainer
from .training_files import check_files, generate_files, prepare_template, remove_incomplete
from .validation import check_keys, check_liger_runs, check_paths, check_recipe, check_targets


def print_one_line(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Print an uncaught error: one line if memory ran out or a file cannot be written, else the traceback."""
    if out_of_memory(error):
        print("\nseal: out of memory: set `gradient_checkpointing: true`, then `activation_offloading: hidden_states`; "
              "`seal recipe cost RECIPE` prints how long samples can be", file=sys.stderr)  # fmt: skip
    elif in_rust(error) or (isinstance(error, OSError) and error.errno is not None):
        print(f"\nseal: {first_line(error)}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def prepare_window(cfg: dict[str, Any]) -> None:
    """Check that samples fit into the model's window, and give Axolotl a condensed RoPE in a form that it applies.

    Raises:
        ValueError: the config cannot be loaded, or ``sequence_len`` exceeds the window, which Axolotl would raise to it
            without a change of RoPE.
    """
    name = cfg.get("base_model_config") or cfg.get("base_model") or ""
    changes = dict(cfg.get("model_config") or {})
    config = read_config(name, changes, trust_remote_code=cfg.get("trust_remote_code") is True)
    text = config.get_text_config()
    if getattr(text, "rope_condense_ratio", None):
        cfg["model_config"] = changes | {
            key: getattr(text, key) for key in ("rope_parameters", "max_position_embeddings")
        }
    if (window := stated_window(config)) and cfg["sequence_len"] > window:
        raise ValueError(
            f"sequence_len: found {cfg['sequence_len']}, but the window of {name} is {window} tokens: lower it, or "
            "stretch the window by `model_config:` (docs/add-a-model.md)"
        )


def quantise_for_seal() -> None:
    """Patch Axolotl's model loader to apply ``load_in_8bit`` and ``load_in_4bit`` with ``adapter: seal``.

    Axolotl quantises for LoRA and QLoRA only and silently loads full precision for any other adapter. A plugin's first
    hook, ``pre_model_load``, comes after that and gets no loader; ``model_kwargs`` of a recipe would work, but without
    what the loader sets by type of model (Jamba, Falcon-H1, Nemotron-H, Qwen2-MoE), dtype and ``bnb_config_kwargs``.
    """
    from axolotl.loaders.model import ModelLoader

    original = ModelLoader._set_quantization_config
    if original.__name__ == "set_quantization_config":
        return

    def set_quantization_config(self: ModelLoader) -> None:
        adapter = self.cfg.adapter
        if adapter == "seal":
            self.cfg.adapter = "qlora" if self.cfg.load_in_4bit else "lora"
        try:
            original(self)
        finally:
            self.cfg.adapter = adapter

    ModelLoader._set_quantization_config = set_quantization_config


@contextmanager
def in_one_line() -> Iterator[None]:
    """Make a decorated hook raise SystemExit with one line for an invalid recipe, adapter, model or file."""
    try:
        yield
    except (ValueError, OSError) as error:
        stop(error)


class SealPlugin(BasePlugin):
    """Train, evaluate, run and merge SEAL adapters with Axolotl's own commands."""

    # Axolotl's schema drops `inference` from the settings before the model is loaded, so `register` stores it.
    inference = False
    training_data: dict[str, Any] | None = None
    num_embeddings = 0  # of the base model, before Axolotl resizes them to the tokenizer

    def get_input_args(self) -> str:
        """Return the schema of the ``seal:`` block."""
        return "axolotl_plugins.seal.args.SealArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """Register ``adapter: seal``."""
        return [AdapterCapabilities(name="seal")]

    @in_one_line()
    def register(self, cfg: dict[str, Any]) -> None:
        """Check the recipe and generate its data before Axolotl loads anything."""
        check_keys(cfg)
        block = check_recipe(cfg)
        check_paths(cfg)
        self.inference = bool(cfg.get("inference"))
        quantise_for_seal()
        sys.excepthook = print_one_line
        datasets = cfg.get("datasets") or []
        template = cfg.get("chat_template_jinja")
        if block.data or any(dataset.get("type") == "chat_template" for dataset in datasets):
            prepare_template(cfg)
        prepare_window(cfg)
        if not (cfg.get("inference") or cfg.get("merge_lora")):
            check_targets(cfg, block)
            generate_files(cfg, block, template)
            check_files(cfg)
            remove_incomplete(Path(cfg.get("dataset_prepared_path") or DEFAULT_DATASET_PREPARED_PATH))
            self.training_data = provenance.record(datasets)
            self.training_data["chat_template_kwargs"] = cfg.get("chat_template_kwargs")

    @in_one_line()
    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        """Correct the device map and batch size in the last hook before devices are assigned; load no dataset.

        Axolotl assigns a GPU to each process of a distributed run even without GPUs, and computes the number of steps
        as if processes that share samples had samples of their own.
        """
        size = parse_block(cfg.seal).context_parallel
        check_processes(size if preprocess else cfg.world_size, size)
        cfg.batch_size = max(1, cfg.batch_size // size)
        if cfg.world_size != 1 and not torch.accelerator.is_available():
            cfg.device_map = None

    def get_trainer_cls(self, cfg: Any) -> type[AnswerTrainer]:
        """Return the trainer of SEAL or of the baselines."""
        return SealTrainer if cfg.adapter == "seal" else AnswerTrainer

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        """Disable mixed precision where the recipe has `bf16: false`, even with `bfloat16: true` (dtype of weights).

        Axolotl enables mixed precision for either, which rounds sharded scales at every step.
        """
        return {} if cfg.bf16 else {"bf16": False}

    @in_one_line()
    def post_trainer_create(self, cfg: Any, trainer: AnswerTrainer) -> None:
        """Pass the record of the training data to the trainer, and set up context parallelism."""
        trainer.training_data = self.training_data
        if not torch.accelerator.is_available():
            check_liger_runs(cfg)
        if (size := parse_block(cfg.seal).context_parallel) > 1:
            trainer.share_samples(size)

    def post_model_build(self, cfg: Any, model: PreTrainedModel) -> None:
        """Store the base model's number of embeddings."""
        self.num_embeddings = model.get_input_embeddings().num_embeddings

    def post_train(self, cfg: Any, model: PeftModel) -> None:
        """Replace the trainer's model card by the adapter's."""
        folder = Path(cfg.output_dir)
        # Axolotl calls this hook twice, first before the adapter is saved.
        saved = (folder / "adapter_model.safetensors").is_file()
        if cfg.adapter == "seal" and saved and int(os.environ.get("LOCAL_RANK", "0")) == 0:
            from .model_card import card

            write_text(folder / "README.md", card(folder))

    @in_one_line()
    def load_adapter(
        self, model: PreTrainedModel, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[PeftModel | None, PeftConfig] | None:
        """Wrap the model with new scales, or with the adapter in ``lora_model_dir``."""
        if cfg.adapter != "seal":
            return None
        block = parse_block(cfg.seal)
        config = SealConfig(**block.adapter_settings(), task_type="CAUSAL_LM", base_model_name_or_path=cfg.base_model)
        if config_only:
            return None, config
        if (cfg.load_in_8bit or cfg.load_in_4bit) and not getattr(model, "is_quantized", False):
            raise ValueError(
                "load_in_8bit, load_in_4bit: the base model was not quantised: set them false, or check bitsandbytes"
            )
        if (resized := model.get_input_embeddings().num_embeddings) > self.num_embeddings:
            raise ValueError(
                f"{cfg.base_model}: has {self.num_embeddings} embeddings, fewer than its tokenizer has tokens; Axolotl "
                f"resized them to {resized} with random values, which an adapter does not save: call "
                f"`model.resize_token_embeddings({resized})` and save the model first"
            )
        if not cfg.lora_model_dir:
            if self.inference:
                raise ValueError("inference with `adapter: seal` needs the adapter: add --lora-model-dir=FOLDER")
            peft_model = get_peft_model(model, config)
        else:
            saved = PeftConfig.from_pretrained(cfg.lora_model_dir)
            if not isinstance(saved, SealConfig):
                raise ValueError(f"{cfg.lora_model_dir}: found a {saved.peft_type} adapter, expected a SEAL adapter")
            if saved.granularity != block.granularity:
                raise ValueError(
                    f"{cfg.lora_model_dir}: found granularity {saved.granularity}, the recipe has {block.granularity}"
                )
            if saved.placements != config.placements:
                raise ValueError(
                    f"{cfg.lora_model_dir}: found placements {saved.placements}, the recipe has {config.placements}: "
                    "set `seal: placements:` to the adapter's"
                )
            peft_model = apply_adapter(model, Path(cfg.lora_model_dir), trainable=not self.inference)
        peft_model.print_trainable_parameters()
        return peft_model, config

"""Axolotl's side of SEAL: ``plugins: [axolotl_plugins.seal.SealPlugin]``, ``adapter: seal``, a ``seal:`` block."""

from __future__ import annotations

import difflib
import math
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml
from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from axolotl_plugins.common.console import first_line, in_rust, out_of_memory, stop
from axolotl_plugins.common.io import check_output, load_json, read_rows, write_text
from axolotl_plugins.common.tokenizer import load_tokenizer
from data_gen.dataset import Request, remark, write

from . import provenance
from .args import SealArgs, SealBlock, parse_block
from .config import SealConfig
from .context_parallel import check_processes
from .model_loading import apply_adapter
from .trainer import AnswerTrainer, SealTrainer


def check_keys(cfg: dict[str, Any]) -> None:
    """Refuse keys that Axolotl does not know: it would drop them without a word.

    Args:
        cfg: the recipe; where it says what file it comes from, that file counts, without command line overrides.

    Raises:
        ValueError: a key, or one of a chat dataset, is not known.
    """
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.schemas.config import AxolotlInputConfig
    from axolotl.utils.schemas.datasets import SFTDataset

    if file := cfg.get("axolotl_config_path"):
        cfg = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    schemas = [AxolotlInputConfig, SealArgs]
    for name in PluginManager.get_instance().get_input_args():
        module, _, schema = name.rpartition(".")
        schemas.append(getattr(import_module(module), schema))
    names = {name for schema in schemas for name in schema.model_fields}
    names |= {field.alias for schema in schemas for field in schema.model_fields.values() if field.alias}
    places = [("", cfg, names)]
    for number, dataset in enumerate(cfg.get("datasets") or []):
        if isinstance(dataset, dict) and dataset.get("type") == "chat_template":
            places.append((f"datasets.{number}.", dataset, set(SFTDataset.model_fields)))
    for place, found, known in places:
        for key in found:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                hint = f"; is {place}{close[0]} meant?" if close else ": remove it"
                raise ValueError(f"{place}{key}: Axolotl has no such setting{hint}")


def check_recipe(cfg: dict[str, Any]) -> SealBlock:
    """Refuse settings under which a run would look fine and be worthless.

    Args:
        cfg: the recipe as written, command line overrides included.

    Returns:
        The ``seal:`` block.

    Raises:
        ValueError: what is wrong and how to mend it, in one line.
    """
    block = parse_block(cfg.get("seal"))
    if cfg.get("adapter") == "seal":
        if block.granularity is None:
            raise ValueError("seal.granularity: missing: add `granularity: head` (SEAL-H) or `channel` (SEAL-C)")
        if cfg.get("weight_decay"):
            raise ValueError(
                f"weight_decay: found {cfg['weight_decay']}, which would pull the scales to 0: set `weight_decay: 0`"
            )
        if cfg.get("merge_method") != "legacy":
            raise ValueError("merge_method: set `merge_method: legacy`; Axolotl's default method knows LoRA alone")
        check_sharding(cfg)
    for key in ("context_parallel_size", "sequence_parallel_degree"):
        if (size := cfg.get(key) or 1) > 1:
            raise ValueError(f"{key}: under it devices without a part of the answer have no loss to learn from: set "
                             f"`seal: context_parallel: {size}` instead")  # fmt: skip
    if block.context_parallel > 1:
        for key, least in (("micro_batch_size", 1), ("val_set_size", 0), ("test_datasets", []),
                           ("tensor_parallel_size", 1)):  # fmt: skip
            if (value := cfg.get(key)) not in (None, least):
                raise ValueError(f"{key}: found {value!r}, but seal.context_parallel spreads one training sample at a "
                                 "time over processes: leave it out")  # fmt: skip
    try:
        rate = float(cfg.get("learning_rate", "missing"))
    except (TypeError, ValueError):
        rate = math.nan
    if not 0 < rate < math.inf:
        raise ValueError(
            f"learning_rate: found {cfg.get('learning_rate')!r}, expected a number above 0; the paper's lie between "
            "5e-3 and 5e-2"
        )
    for key in ("num_epochs", "micro_batch_size", "gradient_accumulation_steps"):
        if (number := cfg.get(key)) is not None and not (isinstance(number, (int, float)) and number > 0):
            raise ValueError(f"{key}: found {number!r}, expected a number above 0")
    if cfg.get("seed") is None:
        raise ValueError("seed: missing: without one every run shuffles the samples differently; add `seed: 42`")
    if cfg.get("excess_length_strategy") != "raise":
        raise ValueError(
            f"excess_length_strategy: found {cfg.get('excess_length_strategy')!r}, under which samples longer than "
            "sequence_len are dropped or lose their answer without an error: set `excess_length_strategy: raise`"
        )
    window = cfg.get("sequence_len")
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"sequence_len: found {window!r}, expected a number of tokens")
    if cfg.get("sample_packing"):
        raise ValueError("sample_packing: packs samples into one sequence, so that fewer steps are made: set it false")
    if cfg.get("pad_to_sequence_len"):
        raise ValueError("pad_to_sequence_len: pads every sample to sequence_len: set it false")
    flash = "flash" in str(cfg.get("attn_implementation")) or cfg.get("flash_attention")
    if cfg.get("pad_to_multiple_of") != 1 and not (flash and block.context_parallel == 1):
        raise ValueError(
            "pad_to_multiple_of: padding makes attention build a mask of sequence_len x sequence_len "
            "(1 GiB at 32K): set `pad_to_multiple_of: 1`"
        )
    return block


def check_sharding(cfg: dict[str, Any]) -> None:
    """Refuse ways of spreading a model over devices under which scales are rounded or have no gradient.

    bfloat16 numbers near 1 are 2^-8 to 2^-7 apart, about as much as a step of training.

    Raises:
        ValueError: what is wrong and how to mend it, in one line.
    """
    if fsdp := cfg.get("fsdp_config"):
        version = cfg.get("fsdp_version") or fsdp.get("fsdp_version") or fsdp.get("version")
        if str(version) != "2":
            raise ValueError(
                f"fsdp_version: found {version}, which flattens scales into weights: set `fsdp_version: 2`"
            )
        if cfg.get("bf16") or cfg.get("fp16") or fsdp.get("mixed_precision_policy"):
            raise ValueError(
                "fsdp_config: mixed precision rounds the scales of every step: set `bf16: false` and `bfloat16: true`, "
                "which leaves scales in float32 beside weights in bfloat16, and no mixed_precision_policy"
            )
    if not (deepspeed := cfg.get("deepspeed")):
        return
    settings = deepspeed if isinstance(deepspeed, dict) else load_json(Path(deepspeed))
    for kind in ("bf16", "fp16"):
        enabled = (settings.get(kind) or {}).get("enabled", False)
        if enabled is True or (enabled == "auto" and cfg.get(kind)):
            raise ValueError(
                f"deepspeed: {kind}.enabled rounds the scales to 16 bits: set it false there, and `{kind}: false` here"
            )
    stage = (settings.get("zero_optimization") or {}).get("stage", 0)
    # Axolotl's own default is reentrant.
    reentrant = (cfg.get("gradient_checkpointing_kwargs") or {}).get("use_reentrant", True)
    if stage == 3 and cfg.get("gradient_checkpointing") and not reentrant:
        raise ValueError(
            "gradient_checkpointing_kwargs: under ZeRO-3 activations formed again meet weights that were given back: "
            "set `use_reentrant: true`"
        )


def check_folders(cfg: dict[str, Any]) -> None:
    """See that an adapter can be written, and a checkpoint gone on from, before an older adapter is removed.

    Raises:
        ValueError: one is not; in one line.
    """
    if folder := cfg.get("output_dir"):
        check_output(Path(folder) / "adapter_config.json")
    resumed = cfg.get("resume_from_checkpoint")
    if isinstance(resumed, str) and not (Path(resumed) / "trainer_state.json").is_file():
        raise ValueError(f"resume_from_checkpoint: found {resumed!r}, expected a folder that training saved, such as "
                         f"{Path(cfg.get('output_dir') or 'outputs') / 'checkpoint-25'}")  # fmt: skip


def say_in_one_line(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """What Python does with an error that nobody caught: a full disk or memory is one line, all else shown as ever."""
    if out_of_memory(error):
        print("\nseal: out of memory: set `gradient_checkpointing: true`, then `activation_offloading: hidden_states`; "
              "`python -m recipes cost RECIPE` says how long samples can be", file=sys.stderr)  # fmt: skip
    elif in_rust(error) or (isinstance(error, OSError) and error.errno is not None):
        print(f"\nseal: {first_line(error)}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def prepare_data(cfg: dict[str, Any], block: SealBlock) -> None:
    """Make the recipe's dataset files, or check that they are those that the recipe describes.

    Raises:
        ValueError: a file differs from the recipe, or the recipe's data cannot be made.
    """
    if block.data is None:
        return
    datasets = cfg.get("datasets") or []
    paths = [Path(dataset["path"]) for dataset in datasets if dataset.get("path")]
    if len(datasets) != len(block.data) or len(set(paths)) != len(block.data):
        raise ValueError(
            f"seal.data: describes {len(block.data)} file{'s' if len(block.data) > 1 else ''}, so `datasets` must have "
            f"as many entries, each with a `path` of its own; found {len(datasets)}"
        )
    from filelock import FileLock

    template = cfg.get("chat_template_jinja") if cfg.get("chat_template") == "jinja" else None
    tokenizer = load_tokenizer(cfg.get("tokenizer_config") or cfg.get("base_model") or "", template)
    for data, out in zip(block.data, paths, strict=True):
        check_output(out)
        request = Request(**data.model_dump(), split="train")
        if request.tokens and (longest := request.token_range()[1]) > cfg["sequence_len"]:
            raise ValueError(
                f"seal.data.tokens: found {request.tokens!r}, expected at most {cfg['sequence_len']} (sequence_len): "
                f"raise sequence_len to {longest}, or ask for shorter samples"
            )
        out.parent.mkdir(parents=True, exist_ok=True)
        # Every process of a distributed run comes here; the first one makes the file.
        with FileLock(out.with_name(f".{out.name}.lock")):
            made = write(request, tokenizer, out, chat_template=template)
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            done = "made" if made else "already there"
            more = remark(row for _, row in read_rows(out))
            print(f"seal: {out}: {data.samples} samples of {data.task} {done}{more}")


def quantise_for_seal() -> None:
    """Let ``load_in_8bit`` and ``load_in_4bit`` mean for SEAL what they mean for LoRA and QLoRA.

    Axolotl quantises for those two adapters alone, and would load full precision for any other without a word.
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


class SealPlugin(BasePlugin):
    """Trains, evaluates, serves and merges SEAL adapters with Axolotl's own commands."""

    # Axolotl's schema drops `inference` from the settings before the model is loaded, so it is kept from before.
    serving = False
    training_data: dict[str, Any] | None = None
    embeddings = 0  # of the base model, before Axolotl adds any for tokens that it lacks

    def get_input_args(self) -> str:
        """The schema of the ``seal:`` block."""
        return "axolotl_plugins.seal.args.SealArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """Makes ``adapter: seal`` known."""
        return [AdapterCapabilities(name="seal")]

    def register(self, cfg: dict[str, Any]) -> None:
        """Check the recipe and see to its data before Axolotl spends time on anything.

        Raises:
            SystemExit: with one line that says what is wrong.
        """
        try:
            check_keys(cfg)
            block = check_recipe(cfg)
            check_folders(cfg)
            self.serving = bool(cfg.get("inference"))
            quantise_for_seal()
            sys.excepthook = say_in_one_line
            if not (cfg.get("inference") or cfg.get("merge_lora")):
                prepare_data(cfg, block)
                self.training_data = provenance.record(cfg.get("datasets") or [])
        except (ValueError, OSError) as error:
            stop("seal", error)

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        """Leave the datasets to Axolotl; this is the last hook before models are placed on devices.

        Of several processes without a GPU, Axolotl would place each on the GPU of its number; and of those that share
        samples it would count each as one that has its own, and make fewer steps.
        """
        size = parse_block(cfg.seal).context_parallel
        try:
            check_processes(size if preprocess else cfg.world_size, size)
        except ValueError as error:
            stop("seal", error)
        cfg.batch_size = max(1, cfg.batch_size // size)
        if cfg.world_size != 1 and not torch.accelerator.is_available():
            cfg.device_map = None

    def get_trainer_cls(self, cfg: Any) -> type[AnswerTrainer]:
        """The trainer of scales, or that of the baselines."""
        return SealTrainer if cfg.adapter == "seal" else AnswerTrainer

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        """`bf16: false` means no mixed precision, even with `bfloat16: true`, which is about the weights.

        Axolotl takes either for mixed precision, under which sharded scales are rounded at every step.
        """
        return {} if cfg.bf16 else {"bf16": False}

    def post_trainer_create(self, cfg: Any, trainer: AnswerTrainer) -> None:
        """Hand over what adapters are to say about their data, and let processes share samples where they are to.

        Raises:
            SystemExit: with one line that says why they cannot.
        """
        trainer.training_data = self.training_data
        if (size := parse_block(cfg.seal).context_parallel) > 1:
            try:
                trainer.share_samples(size)
            except ValueError as error:
                stop("seal", error)

    def post_model_build(self, cfg: Any, model: PreTrainedModel) -> None:
        """Keep how many tokens the base model knows."""
        self.embeddings = model.get_input_embeddings().num_embeddings

    def post_train(self, cfg: Any, model: PeftModel) -> None:
        """Put a card of the adapter in the place of the trainer's, which knows nothing of SEAL."""
        folder = Path(cfg.output_dir)
        # Axolotl calls this twice, the first time before the adapter is saved.
        saved = (folder / "adapter_model.safetensors").is_file()
        if cfg.adapter == "seal" and saved and int(os.environ.get("LOCAL_RANK", "0")) == 0:
            from .model_card import card

            write_text(folder / "README.md", card(folder, folder))

    def load_adapter(
        self, model: PreTrainedModel, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[PeftModel | None, PeftConfig] | None:
        """Wrap the model with new scales, or with those of ``lora_model_dir``.

        Raises:
            SystemExit: with one line that says what is wrong.
        """
        if cfg.adapter != "seal":
            return None
        try:
            return self._load_adapter(model, cfg, config_only)
        except (ValueError, OSError) as error:
            stop("seal", error)

    def _load_adapter(self, model: PreTrainedModel, cfg: Any, config_only: bool) -> tuple[PeftModel | None, PeftConfig]:
        block = parse_block(cfg.seal)
        config = SealConfig(
            granularity=block.granularity or "channel",
            target_modules=block.target_modules,
            layers=block.layers,
            num_heads=block.num_heads,
            task_type="CAUSAL_LM",
            base_model_name_or_path=cfg.base_model,
        )
        if config_only:
            return None, config
        if (cfg.load_in_8bit or cfg.load_in_4bit) and not getattr(model, "is_quantized", False):
            raise ValueError("load_in_8bit, load_in_4bit: the base model was loaded in full precision all the same")
        if (found := model.get_input_embeddings().num_embeddings) > self.embeddings:
            raise ValueError(
                f"{cfg.base_model}: has {self.embeddings} embeddings, fewer than its tokenizer has tokens; Axolotl "
                f"made them {found}, at random, which no adapter carries: call its `resize_token_embeddings({found})` "
                "and save it first"
            )
        if not cfg.lora_model_dir:
            if self.serving:
                raise ValueError("inference with `adapter: seal` needs the adapter: add --lora-model-dir=FOLDER")
            peft_model = get_peft_model(model, config)
        else:
            saved = PeftConfig.from_pretrained(cfg.lora_model_dir)
            if not isinstance(saved, SealConfig):
                raise ValueError(f"{cfg.lora_model_dir}: found a {saved.peft_type} adapter, expected a SEAL adapter")
            if saved.granularity != block.granularity:
                raise ValueError(
                    f"{cfg.lora_model_dir}: its granularity is {saved.granularity}, the recipe's {block.granularity}"
                )
            peft_model = apply_adapter(model, Path(cfg.lora_model_dir), trainable=not self.serving)
        peft_model.print_trainable_parameters()
        return peft_model, config

"""Checks of an Axolotl recipe before training: unknown keys, and settings that would ruin a run.

``check_recipe`` raises the first problem that a topic's function yields: one line that says what to change.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from axolotl_plugins.common.io import check_output, load_json
from axolotl_plugins.common.schema import nearest

from .args import SealArgs, SealBlock, parse_block


def check_recipe(cfg: dict[str, Any]) -> SealBlock:
    """Return the ``seal:`` block of a recipe, command line overrides included.

    Raises:
        ValueError: a setting would spoil the run without an error; the message is one line and says how to fix it.
    """
    block = parse_block(cfg.get("seal"))
    for topic in (adapter, sharding, context_parallel, recomputation, kernels, optimisation, sequences):
        for problem in topic(cfg, block):
            raise ValueError(problem)
    return block


def check_keys(cfg: dict[str, Any]) -> None:
    """Raise ValueError on keys of a recipe or a chat dataset that are unknown to Axolotl, which drops them silently.

    Where the recipe names the file it was read from, the file is checked: it has no command line overrides and none of
    Axolotl's defaults.
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
    mappings = [("", cfg, names)]
    for number, dataset in enumerate(cfg.get("datasets") or []):
        if isinstance(dataset, dict) and dataset.get("type") == "chat_template":
            mappings.append((f"datasets.{number}.", dataset, set(SFTDataset.model_fields)))
    for prefix, mapping, valid in mappings:
        for key in mapping:
            if key not in valid:
                close = nearest(key, valid)
                hint = f"; is {prefix}{close} meant?" if close else ": remove it"
                raise ValueError(f"{prefix}{key}: Axolotl has no such setting{hint}")


def check_paths(cfg: dict[str, Any]) -> None:
    """Raise ValueError if the output folder is not writable or the checkpoint to resume from does not exist."""
    if folder := cfg.get("output_dir"):
        check_output(Path(folder) / "adapter_config.json")
    checkpoint = cfg.get("resume_from_checkpoint")
    if isinstance(checkpoint, str) and not (Path(checkpoint) / "trainer_state.json").is_file():
        raise ValueError(
            f"resume_from_checkpoint: found {checkpoint!r}, expected a folder that training saved, such as "
            f"{Path(cfg.get('output_dir') or 'outputs') / 'checkpoint-25'}"
        )


def check_targets(cfg: dict[str, Any], block: SealBlock) -> None:
    """Raise ValueError if no module of the base model matches the adapter's settings, or not their number of heads.

    A base model that Transformers cannot build from its config is left to Axolotl.
    """
    if cfg.get("adapter") != "seal":
        return
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from axolotl_plugins.common.window import read_config

    from .config import SealConfig
    from .model_loading import BROKEN

    trust = {"trust_remote_code": bool(cfg.get("trust_remote_code"))}
    try:
        config = read_config(cfg.get("base_model_config") or cfg["base_model"], cfg.get("model_config"), **trust)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **trust)
    except BROKEN:
        return
    get_peft_model(model, SealConfig(**block.adapter_settings(), task_type="CAUSAL_LM"))


def check_liger_runs(cfg: Any) -> None:
    """Raise ValueError if kernels of Liger are to run without a GPU."""
    if used := [key for key in ("liger_rms_norm", "liger_rope", "liger_glu_activation") if cfg.get(key)]:
        raise ValueError(f"{', '.join(used)}: Liger's kernels need a GPU, and none was found: set them false")


def adapter(cfg: dict[str, Any], block: SealBlock) -> Iterator[str]:
    """Yield what SEAL needs and the recipe lacks; Axolotl's own merge method supports LoRA only."""
    if cfg.get("adapter") != "seal":
        return
    if block.granularity is None:
        yield "seal.granularity: missing: add `granularity: head` (SEAL-H) or `channel` (SEAL-C)"
    if cfg.get("weight_decay"):
        yield f"weight_decay: found {cfg['weight_decay']}, which would pull the scales to 0: set `weight_decay: 0`"
    if cfg.get("merge_method") != "legacy":
        yield "merge_method: set `merge_method: legacy`; Axolotl's default method supports LoRA only"


def sharding(cfg: dict[str, Any], block: SealBlock) -> Iterator[str]:
    """Yield settings of FSDP and DeepSpeed that flatten scales into weights, round them or break recomputation.

    bfloat16 values near 1 are 2^-8 to 2^-7 apart, about the size of a training step.
    """
    if cfg.get("adapter") != "seal":
        return
    if fsdp := cfg.get("fsdp_config"):
        version = cfg.get("fsdp_version") or fsdp.get("fsdp_version") or fsdp.get("version")
        if str(version) != "2":
            yield f"fsdp_version: found {version}, which flattens scales into weights: set `fsdp_version: 2`"
        if cfg.get("bf16") or cfg.get("fp16") or fsdp.get("mixed_precision_policy"):
            yield (
                "fsdp_config: mixed precision rounds the scales at every step: set `bf16: false` and `bfloat16: true`, "
                "which keeps scales in float32 beside weights in bfloat16, and no mixed_precision_policy"
            )
    if deepspeed := cfg.get("deepspeed"):
        settings = deepspeed if isinstance(deepspeed, dict) else load_json(Path(deepspeed))
        for dtype in ("bf16", "fp16"):
            enabled = (settings.get(dtype) or {}).get("enabled", False)
            if enabled is True or (enabled == "auto" and cfg.get(dtype)):
                yield (
                    f"deepspeed: {dtype}.enabled rounds the scales to 16 bits: set it false there, and `{dtype}: "
                    "false` in the recipe"
                )
        stage = (settings.get("zero_optimization") or {}).get("stage", 0)
        # Axolotl's default is reentrant.
        reentrant = (cfg.get("gradient_checkpointing_kwargs") or {}).get("use_reentrant", True)
        if stage == 3 and cfg.get("gradient_checkpointing") and not reentrant:
            yield (
                "gradient_checkpointing_kwargs: non-reentrant recomputation runs after ZeRO-3 has freed the weights: "
                "set `use_reentrant: true`"
            )


def context_parallel(cfg: dict[str, Any], block: SealBlock) -> Iterator[str]:
    """Yield Axolotl's own context parallelism, and settings that do not work with samples shared by processes."""
    for key in ("context_parallel_size", "sequence_parallel_degree"):
        if (size := cfg.get(key) or 1) > 1:
            yield (
                f"{key}: found {size}, under which ranks without answer tokens have a NaN loss: set "
                f"`seal: context_parallel: {size}` instead"
            )
    if block.context_parallel > 1:
        defaults = {"micro_batch_size": 1, "val_set_size": 0, "test_datasets": [], "tensor_parallel_size": 1}
        for key, default in defaults.items():
            if (value := cfg.get(key)) not in (None, default):
                yield (
                    f"{key}: found {value!r}, but seal.context_parallel shards one training sample at a time across "
                    "processes: remove it"
                )


def recomputation(cfg: dict[str, Any], block: SealBlock) -> Iterator[str]:
    """Yield settings of recomputation and of offloading that Axolotl ignores, or that need another one."""
    options = cfg.get("gradient_checkpointing_kwargs") or {}
    every, offload = options.get("every_n_layers", 1), cfg.get("activation_offloading")
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        yield f"gradient_checkpointing_kwargs.every_n_layers: found {every!r}, expected 1 or more"
    selective = cfg.get("selective_checkpointing")
    used = {"gradient_checkpointing_kwargs.every_n_layers": every > 1, "selective_checkpointing": bool(selective)}
    for key in (key for key, is_used in used.items() if is_used):
        if not cfg.get("gradient_checkpointing"):
            yield f"{key}: nothing is recomputed: set `gradient_checkpointing: true`, or remove it"
        if options.get("use_reentrant") is not False:
            yield f"{key}: needs `gradient_checkpointing_kwargs: use_reentrant: false`"
        if offload and offload != "hidden_states":
            yield (
                f"{key}: has no effect with `activation_offloading: {str(offload).lower()}`, which stores every "
                "activation in host memory: set `activation_offloading: hidden_states`, or remove it"
            )
    if selective and any("self_extend" in str(plugin) for plugin in cfg.get("plugins") or []):
        yield "selective_checkpointing: has no effect on Self-Extend's attention: remove it"
    if selective and block.context_parallel > 1:
        yield "selective_checkpointing: cannot store the attention of seal.context_parallel: remove it"


def kernels(cfg: dict[str, Any], block: SealBlock) -> Iterator[str]:
    """Yield losses from fused kernels, which take all tokens, and ``torch.compile``."""
    fused = "liger_fused_linear_cross_entropy" if cfg.get("liger_fused_linear_cross_entropy") else ""
    if fused or any("CutCrossEntropy" in str(plugin) for plugin in cfg.get("plugins") or []):
        yield (
            f"{fused or 'CutCrossEntropyPlugin'}: logits are computed for answers only, which leaves it "
            "nothing to save: remove it"
        )
    if cfg.get("torch_compile"):
        yield (
            "torch_compile: makes Transformers build a mask of T x T (1 GiB at 32K), which no fast attention kernel "
            "takes: remove it"
        )


def optimisation(cfg: dict[str, Any], block: SealBlock) -> Iterator[str]:
    """Yield a learning rate, batch size or number of epochs that is not positive, and a missing seed."""
    try:
        rate = float(cfg.get("learning_rate", "missing"))
    except (TypeError, ValueError):
        rate = math.nan
    if not 0 < rate < math.inf:
        yield (
            f"learning_rate: found {cfg.get('learning_rate')!r}, expected a number above 0; the paper's are 5e-3 to "
            "5e-2"
        )
    for key in ("num_epochs", "micro_batch_size", "gradient_accumulation_steps"):
        if (number := cfg.get(key)) is not None and not (isinstance(number, (int, float)) and number > 0):
            yield f"{key}: found {number!r}, expected a number above 0"
    if cfg.get("seed") is None:
        yield "seed: missing: without a seed every run shuffles the samples differently; add `seed: 42`"


def sequences(cfg: dict[str, Any], block: SealBlock) -> Iterator[str]:
    """Yield settings under which samples are dropped, truncated, packed or padded."""
    if cfg.get("excess_length_strategy") != "raise":
        yield (
            f"excess_length_strategy: found {cfg.get('excess_length_strategy')!r}, under which samples longer than "
            "sequence_len are dropped, or truncated without their answer: set `excess_length_strategy: raise`"
        )
    length = cfg.get("sequence_len")
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        yield f"sequence_len: found {length!r}, expected a number of tokens"
    if cfg.get("sample_packing"):
        yield "sample_packing: found true, which reduces the number of steps: set it false"
    if cfg.get("pad_to_sequence_len"):
        yield "pad_to_sequence_len: found true, which pads every sample to sequence_len: set it false"
    flash = "flash" in str(cfg.get("attn_implementation")) or cfg.get("flash_attention")
    if cfg.get("pad_to_multiple_of") != 1 and not (flash and block.context_parallel == 1):
        yield (
            "pad_to_multiple_of: padding makes attention allocate a mask of sequence_len x sequence_len "
            "(1 GiB at 32K): set `pad_to_multiple_of: 1`"
        )

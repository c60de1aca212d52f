"""Trainers for Axolotl: logits for answers only, scales in the logs, and no adapter saved from a failed run."""

from __future__ import annotations

import inspect
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.data_loader import BatchSamplerShard
from axolotl.core.trainers import AxolotlTrainer
from axolotl.utils.logging import get_logger
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader

from axolotl_plugins.common.console import stop

from . import provenance
from .answer_logits import answers_only, next_labels, no_embedding_gradients
from .context_parallel import ContextParallel
from .layer import SealLayer
from .scales import scale_matrix, summary

LOG = get_logger(__name__)


def check_trainable(model: nn.Module) -> None:
    """Raise ValueError unless the scales are the only trainable parameters."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if others := [name for name in names if ".seal_scale." not in name]:
        raise ValueError(
            f"{len(others)} parameters other than scales are trainable, such as {others[0]}: remove "
            "`unfrozen_parameters` and `lora_modules_to_save` from the recipe"
        )
    if not names:
        raise ValueError("no scale is trainable: load the adapter for training")


def check_gradients(model: nn.Module) -> None:
    """Raise ValueError if a wrapped module's scale has no gradient, or the gradients of all are zero."""
    scales = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if idle := [name for name, scale in scales.items() if scale.grad is None]:
        raise ValueError(
            f"{len(idle)} of {len(scales)} wrapped modules have no gradient, such as "
            f"{idle[0].split('.seal_scale')[0]}: exclude them by `seal: exclude_modules:`"
        )
    if not any(scale.grad is not None and scale.grad.any() for scale in scales.values()):
        raise ValueError(
            "the gradient of every scale is zero, so the loss does not depend on what is scaled: lower the learning "
            "rate, or check the base model"
        )


def check_scales(model: nn.Module) -> None:
    """Raise ValueError if a scale is non-finite; the message names the module."""
    for name, module in model.named_modules():
        scale = module.active_scale() if isinstance(module, SealLayer) else None
        if scale is not None and not torch.isfinite(scale).all():
            raise ValueError(f"the scales of {name} are non-finite: lower the learning rate")


def abort(error: BaseException) -> NoReturn:
    """Exit with an error on a new line, below a progress bar."""
    print(file=sys.stderr)
    stop(error)


def interrupted(*_: object) -> NoReturn:
    """Exit on SIGINT without saving; Axolotl would save a partly trained adapter as if it were complete."""
    abort(KeyboardInterrupt("interrupted: no adapter was saved; resume with `--resume-from-checkpoint`"))


def token_range(dataset: Any) -> list[int] | None:
    """Return the least and the greatest number of tokens of a tokenized dataset's samples; None if it is streamed."""
    columns = getattr(dataset, "column_names", None)
    if not columns or "input_ids" not in columns or not hasattr(dataset, "data"):
        return None
    from pyarrow.compute import list_value_length, min_max

    return list(min_max(list_value_length(dataset.data.column("input_ids"))).as_py().values())


class AnswerTrainer(AxolotlTrainer):
    """Axolotl's trainer with logits for answer tokens only, for SEAL and its baselines."""

    # Whether the model's forward takes ``logits_to_keep``; None before the first step.
    keeps_logits: bool | None = None
    # See ``provenance.record``.
    training_data: dict[str, Any] | None = None
    context_parallel: ContextParallel | None = None

    def share_samples(self, size: int) -> None:
        """Shard every sample across ``size`` processes.

        Raises:
            ValueError: the number of processes, the model or the loss does not allow it.
        """
        if self.label_smoother is not None:
            raise ValueError("seal.context_parallel: does not support label smoothing: remove label_smoothing_factor")
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        self.context_parallel = ContextParallel(size)
        self.context_parallel.prepare(base)

    def get_train_dataloader(self) -> DataLoader:
        """Build the data loader so that processes that share samples read the same ones."""
        loader = super().get_train_dataloader()
        if self.context_parallel and self.accelerator.num_processes > 1:  # DeepSpeed without GPUs: 1
            shard = loader.batch_sampler
            if not isinstance(shard, BatchSamplerShard):
                abort(ValueError("seal.context_parallel: every process must read the data itself: remove streaming, "
                                 "dispatch_batches and split_batches"))  # fmt: skip
            shard.num_processes //= self.context_parallel.size
            shard.process_index //= self.context_parallel.size
        return loader

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, print the time of a step, and write the training data's record; Axolotl saves the adapter next."""
        if self.args.should_save:
            # Axolotl has written the new configuration already: an older run's scales would seem to belong to it.
            (Path(self.args.output_dir) / "adapter_model.safetensors").unlink(missing_ok=True)
        signal.signal(signal.SIGINT, interrupted)
        result = super().train(*args, **kwargs)
        self.before_saving(Path(self.args.output_dir))
        if self.args.should_save and not kwargs.get("resume_from_checkpoint"):  # earlier steps are counted, not timed
            seconds, steps = result.metrics["train_runtime"], max(1, self.state.global_step)
            print(f"seal: {steps} steps in {seconds:.0f} s, {seconds / steps:.2f} s each")
        return result

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Save the adapter of a checkpoint with the record of its training data."""
        self.before_saving(Path(output_dir or self.args.output_dir))
        super().save_model(output_dir, *args, **kwargs)

    def before_saving(self, folder: Path) -> None:
        """Write the record of the training data into the folder of an adapter."""
        if self.training_data is not None and self.args.should_save:
            provenance.save({**self.training_data, "tokens": token_range(self.train_dataset)}, folder)

    def reentrant(self) -> bool:
        """Return whether checkpointing or offloading may need the embeddings' output to require gradients."""
        args = self.args
        if args.gradient_checkpointing:
            return (args.gradient_checkpointing_kwargs or {}).get("use_reentrant", True)
        return bool(args.activation_offloading)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss from the answers' logits only where the model's forward takes ``logits_to_keep``."""
        if self.keeps_logits is None:
            base = self.accelerator.unwrap_model(model, keep_torch_compile=False)
            base = base.get_base_model() if isinstance(base, PeftModel) else base
            if not self.reentrant():  # here, because Transformers registers its hook when training begins
                no_embedding_gradients(base)
            has_argument = "logits_to_keep" in inspect.signature(base.forward).parameters
            self.keeps_logits = has_argument and self.label_smoother is None
            if not self.keeps_logits:
                LOG.info(f"seal: {type(base).__name__} computes the logits of all tokens, not of the answers only")
        if (self.keeps_logits or self.context_parallel) and "labels" in inputs:
            try:
                if self.context_parallel:
                    inputs = self.context_parallel.share({**inputs, "shift_labels": next_labels(inputs["labels"])})
                if self.keeps_logits:
                    inputs = answers_only(inputs)
            except ValueError as error:
                abort(error)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        # Each process has its shard's part of the loss; gradients are averaged, not summed, over processes.
        return loss * self.context_parallel.size if self.context_parallel else loss


class SealTrainer(AnswerTrainer):
    """Train scales; abort instead of saving untrained or non-finite ones."""

    checked = False

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run one step, and check the loss and the gradients."""
        has_gradients = not (self.is_deepspeed_enabled or self.is_fsdp_enabled)  # those shard or free `.grad`
        try:
            if not self.checked:
                check_trainable(model)
            loss = super().training_step(model, *args, **kwargs)
            if not torch.isfinite(loss):
                raise ValueError(f"the loss is {loss.item()} at step {self.state.global_step + 1}: lower the "
                                 f"learning rate ({self.args.learning_rate:g})")  # fmt: skip
            if has_gradients and loss > 0:
                check_gradients(model)
        except ValueError as error:
            abort(error)
        self.checked = True
        return loss

    def before_saving(self, folder: Path) -> None:
        """Refuse to save untrained or non-finite scales."""
        try:
            if self.state.global_step == 0:
                raise ValueError("no step was run: check num_epochs, max_steps and the number of samples")
            check_scales(self.model)
        except ValueError as error:
            abort(error)
        super().before_saving(folder)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log a summary of the scales."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if "loss" in logs and isinstance(model, PeftModel):
            placements = model.active_peft_config.placements
            for placement in placements:
                prefix = f"seal/{placement}/" if len(placements) > 1 else "seal/"
                values = summary(scale_matrix(model, placement))
                logs = {**logs, **{prefix + key: value for key, value in values.items()}}
        super().log(logs, *args, **kwargs)

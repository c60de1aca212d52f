"""Axolotl's trainer for SEAL: logits for answers alone, scales in the logs, and a stop where a run goes wrong."""

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
    """See that scales, and nothing else, will be trained.

    Raises:
        ValueError: something else is trainable, or nothing is.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if others := [name for name in names if ".seal_scale." not in name]:
        raise ValueError(
            f"{len(others)} parameters other than scales would be trained, such as {others[0]}: remove "
            "`unfrozen_parameters` and `lora_modules_to_save` from the recipe"
        )
    if not names:
        raise ValueError("no scale would be trained: the adapter was loaded for inference")


def check_gradients(model: nn.Module) -> None:
    """See that every scale had a part in the loss.

    Raises:
        ValueError: a wrapped module never ran, or all gradients are zero.
    """
    scales = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if idle := [name for name, scale in scales.items() if scale.grad is None]:
        raise ValueError(
            f"{len(idle)} of {len(scales)} wrapped modules had no part in the loss, such as "
            f"{idle[0].split('.seal_scale')[0]}: name others by `seal: target_modules:`"
        )
    if not any(scale.grad is not None and scale.grad.any() for scale in scales.values()):
        raise ValueError(
            "the gradient of every scale is zero, so the answers do not depend on the attention outputs (any more): "
            "lower the learning rate, or look at the base model"
        )


def check_scales(model: nn.Module) -> None:
    """See that all scales are numbers.

    Raises:
        ValueError: one is not.
    """
    for name, module in model.named_modules():
        scale = module.active_scale() if isinstance(module, SealLayer) else None
        if scale is not None and not torch.isfinite(scale).all():
            raise ValueError(f"the scales of {name} are no longer finite: lower the learning rate")


def give_up(error: BaseException) -> NoReturn:
    """Exit with a line of its own: a progress bar may stand on the present one."""
    print(file=sys.stderr)
    stop("seal", error)


def interrupted(*_: object) -> NoReturn:
    """What an interrupt does: Axolotl would save the adapter as it is, which would pass for one that is done."""
    give_up(
        KeyboardInterrupt("interrupted: no adapter was written; `--resume-from-checkpoint` goes on from a checkpoint")
    )


class AnswerTrainer(AxolotlTrainer):
    """Axolotl's trainer, computing no logits but those of answers; for SEAL and its baselines alike."""

    # Whether the model can compute some positions' logits alone; None until it was looked at.
    keeps_logits: bool | None = None
    # What ``provenance.record`` says about the data.
    training_data: dict[str, Any] | None = None
    # The processes that share a sample, if any do.
    shared: ContextParallel | None = None

    def share_samples(self, size: int) -> None:
        """Spread every sample over ``size`` processes.

        Raises:
            ValueError: there are not as many, or the model or its loss cannot be spread.
        """
        if self.label_smoother is not None:
            raise ValueError("seal.context_parallel: the loss has no parts: set no label_smoothing_factor")
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        self.shared = ContextParallel(size)
        self.shared.prepare(base)

    def get_train_dataloader(self) -> DataLoader:
        """Give processes that share a sample the same one."""
        loader = super().get_train_dataloader()
        if self.shared and self.accelerator.num_processes > 1:  # DeepSpeed without GPUs has none for each process
            shard = loader.batch_sampler
            if not isinstance(shard, BatchSamplerShard):
                give_up(ValueError("seal.context_parallel: needs data that each process reads: set no streaming, "
                                   "dispatch_batches or split_batches"))  # fmt: skip
            shard.num_processes //= self.shared.size
            shard.process_index //= self.shared.size
        return loader

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; Axolotl saves the adapter next, beside the record of its data."""
        if self.args.should_save:
            # The configuration beside it is the new run's already: an older run's weights would pass for its result.
            (Path(self.args.output_dir) / "adapter_model.safetensors").unlink(missing_ok=True)
        signal.signal(signal.SIGINT, interrupted)
        result = super().train(*args, **kwargs)
        self.before_saving(Path(self.args.output_dir))
        return result

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint's adapter."""
        self.before_saving(Path(output_dir or self.args.output_dir))
        super().save_model(output_dir, *args, **kwargs)

    def before_saving(self, folder: Path) -> None:
        """Put the record of the data where an adapter will be."""
        if self.training_data is not None and self.args.should_save:
            provenance.save(self.training_data, folder)

    def reentrant(self) -> bool:
        """Whether activations are formed again, or kept elsewhere, in a way that may need the embeddings' gradients."""
        args = self.args
        if args.gradient_checkpointing:
            return (args.gradient_checkpointing_kwargs or {}).get("use_reentrant", True)
        return bool(args.activation_offloading)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss, from the answers' logits alone where the model's forward can be asked for them."""
        if self.keeps_logits is None:
            base = self.accelerator.unwrap_model(model)
            base = base.get_base_model() if isinstance(base, PeftModel) else base
            if not self.reentrant():  # here, for Transformers asks for them when training begins
                no_embedding_gradients(base)
            known = "logits_to_keep" in inspect.signature(base.forward).parameters
            self.keeps_logits = known and self.label_smoother is None
            if not self.keeps_logits:
                LOG.info(f"seal: {type(base).__name__} computes the logits of all tokens, not of the answers alone")
        if (self.keeps_logits or self.shared) and "labels" in inputs:
            try:
                if self.shared:
                    inputs = self.shared.share({**inputs, "shift_labels": next_labels(inputs["labels"])})
                if self.keeps_logits:
                    inputs = answers_only(inputs)
            except ValueError as error:
                give_up(error)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        # Of each process's part of the loss, the mean over all processes will be taken.
        return loss * self.shared.size if self.shared else loss


class SealTrainer(AnswerTrainer):
    """Trains scales; stops, before an adapter is written, where a run would end in one that is worth nothing."""

    checked = False

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One step, with a look at the loss and at the gradients."""
        whole = not (self.is_deepspeed_enabled or self.is_fsdp_enabled)  # those keep gradients elsewhere
        try:
            if not self.checked:
                check_trainable(model)
            loss = super().training_step(model, *args, **kwargs)
            if not torch.isfinite(loss):
                raise ValueError(f"the loss is {loss.item()} at step {self.state.global_step + 1}: lower the "
                                 f"learning rate ({self.args.learning_rate:g})")  # fmt: skip
            if whole and loss > 0:
                check_gradients(model)
        except ValueError as error:
            give_up(error)
        self.checked = True
        return loss

    def before_saving(self, folder: Path) -> None:
        """Let no adapter be written that learned nothing, or whose scales are no numbers."""
        try:
            if self.state.global_step == 0:
                raise ValueError("not one step was made: look at num_epochs, max_steps and the number of samples")
            check_scales(self.model)
        except ValueError as error:
            give_up(error)
        super().before_saving(folder)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add a summary of the scales to what all loggers are given."""
        model = self.accelerator.unwrap_model(self.model)
        if "loss" in logs and isinstance(model, PeftModel):
            logs = {**logs, **{f"seal/{key}": value for key, value in summary(scale_matrix(model)).items()}}
        super().log(logs, *args, **kwargs)

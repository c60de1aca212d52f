"""Axolotl's trainer for SEAL: logits for answers alone, scales in the logs, and a stop where a run goes wrong."""

from __future__ import annotations

import inspect
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from axolotl.core.trainers import AxolotlTrainer
from axolotl.utils.logging import get_logger
from peft import PeftModel
from torch import nn

from data_gen.console import stop

from . import provenance
from .layer import SealLayer
from .scales import scale_matrix, summary

LOG = get_logger(__name__)
IGNORED = -100  # label of tokens that are not learned


def answers_only(inputs: dict[str, Any]) -> dict[str, Any]:
    """Ask a causal language model for the logits that its loss needs and no others.

    At T tokens and a vocabulary of V all logits take T x V float32 numbers, those of an answer a thousandth of that.

    Args:
        inputs: ``labels`` of shape (B, T), -100 where a token is not learned, and whatever else the model takes.

    Returns:
        The same with ``logits_to_keep`` (positions that predict a token with a label in any row) and
        ``shift_labels`` (the labels of what they predict), which Transformers' losses know.

    Raises:
        ValueError: no token has a label.
    """
    shifted = F.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED)
    keep = (shifted != IGNORED).any(0).nonzero()[:, 0]
    if not len(keep):
        raise ValueError(
            "a sample has no answer to learn from: its last turn is empty, or `roles_to_train` or `train_on_inputs` "
            "leaves nothing over"
        )
    return {**inputs, "logits_to_keep": keep, "shift_labels": shifted[:, keep]}


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

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss, from the answers' logits alone where the model's forward can be asked for them."""
        if self.keeps_logits is None:
            base = self.accelerator.unwrap_model(model)
            base = base.get_base_model() if isinstance(base, PeftModel) else base
            # Context parallelism cuts labels and positions apart by itself.
            parallel = getattr(self.accelerator, "parallelism_config", None)
            split = parallel is not None and (parallel.cp_enabled or parallel.sp_enabled)
            known = "logits_to_keep" in inspect.signature(base.forward).parameters
            self.keeps_logits = known and not split and self.label_smoother is None
            if not self.keeps_logits:
                LOG.info(f"seal: {type(base).__name__} computes the logits of all tokens, not of the answers alone")
        if self.keeps_logits and "labels" in inputs:
            try:
                inputs = answers_only(inputs)
            except ValueError as error:
                give_up(error)
        return super().compute_loss(model, inputs, *args, **kwargs)


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

"""Make a recipe for a model that is not of the paper, from its config and tokenizer alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axolotl_plugins.common.console import first_line
from axolotl_plugins.common.window import context_window, read_config
from recipes.tools.estimate import Shape
from recipes.tools.methods import METHODS
from recipes.tools.render import FOLDER, TASKS, TEMPLATES, Recipe, rate, read_matrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAPER_WINDOW_SHARE = (31, 32)  # of the window that the longest training sample takes: 31K of 32K


def recipe_for(
    base: str, task: str, method: str, tokens: str | None = None, chat_template: str | None = None,
    out: Path | None = None, gpu: bool | None = None, window: int | None = None,
    template_arguments: dict[str, Any] | None = None,
) -> tuple[str, str]:  # fmt: skip
    """Render a recipe, and return it with the names of the modules that it scales.

    Args:
        base: hub id or folder of the model.
        task: a key of ``TASKS``.
        method: a key of ``METHODS``.
        tokens: longest training sample, as ``"31000"``, or a range, as ``"8000:31000"``.
        chat_template: name of a chat template in recipes/templates.
        out: file that the recipe is for; it is not written.
        gpu: whether the recipe is for a GPU; None checks this machine.
        window: context window in tokens, for a model whose config states none.
        template_arguments: variables of the chat template, see ``axolotl_plugins.common.tokenizer.with_arguments``.

    Raises:
        ValueError: SEAL cannot wrap the model, it has no chat template, or an option is invalid.
    """
    import torch

    from axolotl_plugins.common.tokenizer import load_tokenizer
    from axolotl_plugins.seal import find_attention_outputs

    for option, value, expected in (("task", task, TASKS), ("method", method, METHODS)):
        if value not in expected:
            raise ValueError(f"{option}: found {value!r}, expected one of {', '.join(expected)}")
    tokenizer = load_tokenizer(base, str(template_file(chat_template)) if chat_template else None, template_arguments)
    changes = {"max_position_embeddings": window} if window else {}
    model = meta_model(base, changes)
    modules = find_attention_outputs(model)
    if (embeddings := model.get_input_embeddings().num_embeddings) < len(tokenizer):
        raise ValueError(f"{base}: has {embeddings} embeddings, fewer than its tokenizer has tokens: call the model's "
                         f"`resize_token_embeddings({len(tokenizer)})` and save it")  # fmt: skip
    window, lengths = sample_lengths(model, base, task, tokens)
    entry: dict[str, Any] = {
        "name": base, "base_model": base, "window": window, "tokens": lengths, "model_config": changes,
        "gpu": torch.cuda.is_available() if gpu is None else gpu, "template": chat_template,
        "template_arguments": template_arguments,
    }  # fmt: skip
    out = out or FOLDER.relative_to(FOLDER.parent) / f"{Path(base).name.lower().replace('.', '_')}_{task}_{method}.yml"
    if not re.fullmatch(r"\w[\w.+-]*\.ya?ml", out.name):  # it is part of names in the recipe as well
        raise ValueError(f"out: found the name {out.name!r}, expected letters, digits and any of . _ + -, then .yml")
    recipe = Recipe(
        out, entry, task, method, rate=rate(read_matrix()["rates"], "", task, method), shape=shape_of(model),
        shows="not a model of the paper; its rate is that of the task",
    )  # fmt: skip
    return recipe.text, ", ".join(modules)


def template_file(name: str) -> Path:
    """Return the file of a chat template in recipes/templates.

    Raises:
        ValueError: there is none of that name.
    """
    names = sorted(file.stem for file in TEMPLATES.glob("*.jinja") if not file.stem.endswith(".yml"))
    if name not in names:
        raise ValueError(f"chat-template: found {name!r}, expected one of {', '.join(names)}")
    return TEMPLATES / f"{name}.jinja"


def meta_model(base: str, changes: dict[str, Any] | None = None) -> PreTrainedModel:
    """Build a model on the meta device, without weights; ``changes`` override keys of its config.

    Raises:
        ValueError: its config cannot be loaded.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = read_config(base, changes)
    try:
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise ValueError(f"cannot build the model of {base!r}: {first_line(error)}") from error
    model.tie_weights()  # moving to the meta device untied them
    return model


def sample_lengths(model: PreTrainedModel, base: str, task: str, tokens: str | None) -> tuple[int, int | str]:
    """Return a model's window and the length, or range of lengths, of training samples, in tokens.

    Raises:
        ValueError: the config has no window, or the samples do not fit.
    """
    from data_gen.dataset import Request

    try:
        window = context_window(model.config, base)
    except ValueError as error:
        raise ValueError(f"{error}; or give --window N, which becomes part of the recipe") from None
    share, whole = PAPER_WINDOW_SHARE
    low, high = Request(task, tokens or str(window * share // whole)).token_range()
    if high >= window:
        raise ValueError(f"tokens: {high} do not fit into the window of {window}: ask for at most {window - 1}")
    return window, f"{low}:{high}" if tokens and ":" in tokens else high


def shape_of(model: PreTrainedModel) -> Shape | None:
    """Return the shape that costs depend on, None unless it accounts for the model's weights, as in a Llama."""
    try:
        shape = Shape.of(model.config.get_text_config().to_dict())
    except KeyError:
        return None
    return shape if abs(shape.parameters / model.num_parameters() - 1) < 0.02 else None

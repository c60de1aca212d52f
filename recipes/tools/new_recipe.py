"""Make a recipe for a model that is not of the paper, from its config and tokenizer alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axolotl_plugins.common.console import first_line
from axolotl_plugins.common.window import context_window, read_config
from data_gen.dataset import Request, generate
from data_gen.tasks import resolve_task
from eval.cli_options import split_names
from recipes.tools.cost import CARDS, Shape
from recipes.tools.methods import METHODS
from recipes.tools.render import CARD, FOLDER, TEMPLATES, OwnData, Recipe, rate, read_matrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLES = 50  # of training (paper section 4.1)
PAPER_WINDOW_SHARE = (31, 32)  # of the window that the longest training sample takes: 31K of 32K


def recipe_for(
    base: str, task: str, method: str, tokens: str | None = None, chat_template: str | None = None,
    out: Path | None = None, gpu: bool | None = None, card: int = CARD, window: int | None = None,
    template_arguments: dict[str, Any] | None = None, data: Path | None = None, trust_remote_code: bool = False,
) -> tuple[str, str]:  # fmt: skip
    """Render a recipe, and return it with the names of the modules that it scales.

    Args:
        base: hub id or folder of the model.
        task: see ``resolve_task``; several with commas between are mixed; of no matter with ``data``.
        method: a key of ``METHODS``.
        tokens: longest training sample, as ``"31000"``, or a range, as ``"8000:31000"``.
        chat_template: name of a chat template in recipes/templates.
        out: file that the recipe is for; it is not written.
        gpu: whether the recipe is for a GPU; None checks this machine.
        card: memory of that GPU in GiB, a key of ``CARDS``.
        window: context window in tokens, for a model whose config states none.
        template_arguments: variables of the chat template, see ``axolotl_plugins.common.tokenizer.with_arguments``.
        data: JSON lines file of chats to train on instead of a task's samples.
        trust_remote_code: run code from the checkpoint; so does the recipe.

    Raises:
        ValueError: SEAL cannot wrap the model, it has no chat template, an option is invalid, or a sample is too long.
    """
    import torch

    from axolotl_plugins.common.tokenizer import load_tokenizer
    from axolotl_plugins.seal import find_attention_outputs
    from axolotl_plugins.seal.training_rows import chat_lengths

    parts = split_names(task)
    check_options(parts, method, card)
    task = ",".join(parts)
    name = data.stem if data else "_".join(resolve_task(part).name for part in parts)
    out = out or FOLDER.relative_to(FOLDER.parent) / f"{Path(base).name.lower().replace('.', '_')}_{name}_{method}.yml"
    if not re.fullmatch(r"\w[\w.+-]*\.ya?ml", out.name):  # it is part of names in the recipe as well
        raise ValueError(f"out: found the name {out.name!r}, expected letters, digits and any of . _ + -, then .yml")
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    template = str(template_file(chat_template)) if chat_template else None
    tokenizer = load_tokenizer(base, template, template_arguments, **trust)
    own = OwnData(str(data), tuple(chat_lengths(data, {}, tokenizer).values())) if data else None
    changes = {"max_position_embeddings": window} if window else {}
    model = meta_model(base, changes, **trust)
    modules = find_attention_outputs(model)
    entry = model_entry(model, base, len(tokenizer), own)
    entry |= {
        "gpu": torch.cuda.is_available() if gpu is None else gpu, "template": chat_template, "model_config": changes,
        "template_arguments": template_arguments, **trust,
    }  # fmt: skip
    entry["tokens"] = None if own else sample_lengths(entry["window"], parts[0], tokens)
    rates = read_matrix()["rates"]
    known = not own and task in rates
    recipe = Recipe(
        out, entry, task, method, rate=rate(rates, "", task if known else "line", method), shape=shape_of(model),
        shows=shows(own, known), card=card, own=own,
        samples=len(own.lengths) if own else SAMPLES // len(parts) * len(parts),
    )  # fmt: skip
    if not own:
        check_shortest(recipe, tokenizer)
    return recipe.text, ", ".join(modules)


def check_options(tasks: list[str], method: str, card: int) -> None:
    """Raise ValueError if a method or card is unknown, or if tasks repeat or are too many to share the samples."""
    for option, value, expected in (("method", method, METHODS), ("card", card, CARDS)):
        if value not in expected:
            raise ValueError(f"{option}: found {value!r}, expected one of {', '.join(map(str, expected))}")
    if len(set(tasks)) < len(tasks) or len(tasks) > SAMPLES // 2:
        raise ValueError(f"task: found {','.join(tasks)!r}, expected at most {SAMPLES // 2} tasks, each once")


def model_entry(model: PreTrainedModel, base: str, vocabulary: int, own: OwnData | None) -> dict[str, Any]:
    """Return what a recipe depends on of its model, as an entry of ``models`` in ``matrix.yml``.

    Raises:
        ValueError: its tokenizer has more tokens than it has embeddings, or its window is unknown or too short.
    """
    if (embeddings := model.get_input_embeddings().num_embeddings) < vocabulary:
        raise ValueError(f"{base}: has {embeddings} embeddings, fewer than its tokenizer has tokens: call the model's "
                         f"`resize_token_embeddings({vocabulary})` and save it")  # fmt: skip
    config = model.config.get_text_config()
    try:
        window = context_window(config, base)
    except ValueError as error:
        raise ValueError(f"{error}; or give --window N, which becomes part of the recipe") from None
    if own and max(own.lengths) > window:
        raise ValueError(f"{own.path}: its longest sample has {max(own.lengths)} tokens, more than the model's window "
                         f"of {window}: shorten or remove it")  # fmt: skip
    return {"name": base, "base_model": base, "window": window, "type": config.model_type,
            "window_attention": getattr(config, "sliding_window", None)}  # fmt: skip


def shows(own: OwnData | None, known: bool) -> str:
    """Return the end of a recipe's title: what it trains on and what its rate comes from."""
    if known:
        return "not a model of the paper; its rate is that of the task"
    rate_note = "its rate is that of line retrieval, others may suit better (`seal probe sweep`)"
    return f"samples of {min(own.lengths):,} to {max(own.lengths):,} tokens; {rate_note}" if own else rate_note


def check_shortest(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError, with the shortest possible sample, if a recipe asks for shorter ones than its task has."""
    for part in recipe.data_parts():
        if "data" not in resolve_task(part["task"]).options:  # LongBench's passages are fetched, and cut to any length
            low = str(part["tokens"]).partition(":")[0]
            list(generate(Request(part["task"], low, samples=2), tokenizer))


def template_file(name: str) -> Path:
    """Return the file of a chat template in recipes/templates.

    Raises:
        ValueError: there is none of that name.
    """
    names = sorted(file.stem for file in TEMPLATES.glob("*.jinja") if not file.stem.endswith((".yml", ".md")))
    if name not in names:
        raise ValueError(f"chat-template: found {name!r}, expected one of {', '.join(names)}")
    return TEMPLATES / f"{name}.jinja"


def meta_model(base: str, changes: dict[str, Any] | None = None, **trust: bool) -> PreTrainedModel:
    """Build a model on the meta device, without weights; ``changes`` override keys of its config.

    ``trust`` may be ``trust_remote_code``.

    Raises:
        ValueError: its config cannot be loaded.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = read_config(base, changes, **trust)
    try:
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config, **trust)
    except ValueError as error:
        raise ValueError(f"cannot build the model of {base!r}: {first_line(error)}") from error
    model.tie_weights()  # moving to the meta device untied them
    return model


def sample_lengths(window: int, task: str, tokens: str | None) -> int | str:
    """Return the length, or range of lengths, of training samples, in tokens.

    Raises:
        ValueError: it is invalid, or does not fit into the model's window.
    """
    share, whole = PAPER_WINDOW_SHARE
    low, high = Request(task, tokens or str(window * share // whole)).token_range()
    if high >= window:
        raise ValueError(f"tokens: {high} do not fit into the window of {window}: ask for at most {window - 1}")
    return f"{low}:{high}" if tokens and ":" in tokens else high


def shape_of(model: PreTrainedModel) -> Shape | None:
    """Return the shape that costs depend on, None unless it accounts for the model's weights, as in a Llama."""
    try:
        shape = Shape.of(model.config.get_text_config().to_dict())
    except KeyError:
        return None
    return shape if abs(shape.parameters / model.num_parameters() - 1) < 0.02 else None

"""Options that commands share, and how their values are parsed."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from axolotl_plugins.common.io import load_yaml
from axolotl_plugins.common.tokenizer import parse_arguments
from data_gen.file_task import MAX_NEW_TOKENS, METRIC
from data_gen.metrics import METRICS

BatchSize = Annotated[
    int | None, typer.Option(help="Prompts decoded together; default: as many as memory allows, 32 at most.")
]

OWN_TASK = "a file of samples (.jsonl), a description (.yml), or module:object"
Metric = Annotated[
    str | None,
    typer.Option(help=f"For files of samples: {', '.join(METRICS)}, or module:function; default: {METRIC}."),
]
MaxNewTokens = Annotated[
    int | None, typer.Option(help=f"For files of samples: longest response; default: {MAX_NEW_TOKENS} tokens.")
]

ChatTemplate = Annotated[
    str | None, typer.Option(help="Jinja file, for base models without a template: see recipes/templates.")
]
TemplateArguments = Annotated[
    str | None,
    typer.Option(help="Variables of a base model's chat template as JSON, such as '{\"enable_thinking\": false}'; "
                 "adapters carry those of training."),
]  # fmt: skip
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Of all models' weights; default: the first base checkpoint's."),
]

TrustRemoteCode = Annotated[bool, typer.Option(help="Run code that comes with the checkpoint.")]


def load_options(chat_template: str | None, chat_template_kwargs: str | None, **options: Any) -> dict[str, Any]:
    """Return options of ``load`` from those of a command.

    Raises:
        ValueError: the template's arguments are not a JSON object.
    """
    return {"chat_template": chat_template, "template_arguments": parse_arguments(chat_template_kwargs), **options}


def parse_adapters(values: list[str]) -> dict[str, str]:
    """Return adapter folders by name, from values such as ``NAME=FOLDER``.

    Raises:
        ValueError: a value has another form, a name occurs twice, or cannot be part of a file name.
    """
    folders = dict(value.split("=", 1) for value in values if "=" in value)
    if len(folders) != len(values) or not all(folders.values()):
        raise ValueError(f"adapter: found {' '.join(values)!r}, expected NAME=FOLDER, every name once")
    for name in folders:
        if not re.fullmatch(r"\w[\w .+-]{0,59}", name):
            raise ValueError(f"adapter: found the name {name[:80]!r}, expected at most 60 letters, digits, blanks and "
                             "any of . _ + -, a letter or digit first")  # fmt: skip
    return folders


def split_names(text: str) -> list[str]:
    """Return the names in a list with commas between, without the blanks around them."""
    return [name.strip() for name in text.split(",")]


def parse_names(text: str, names: Collection[str], option: str) -> list[str]:
    """Return those of ``names`` in a list such as ``line,vt``, in its order; all of them if it is empty.

    Raises:
        ValueError: a name is unknown.
    """
    chosen = [name for name in split_names(text) if name]
    if unknown := [name for name in chosen if name not in names]:
        raise ValueError(f"{option}: found {unknown[0]!r}, expected some of {', '.join(names)}")
    return chosen or list(names)


def parse_numbers(text: str, option: str, kind: type = int, zero: bool = False) -> list[Any]:
    """Return the numbers in a list such as ``512,1024``.

    Raises:
        ValueError: the text has another form, or a number is not finite and positive (or ``zero``, if that is valid).
    """
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option}: found {text!r}, expected numbers with commas between") from None
    if not all(0 < number < math.inf or (zero and number == 0) for number in numbers):
        least = "from 0" if zero else "above 0"
        raise ValueError(f"{option}: found {text!r}, expected numbers {least} (16000, not 16,000)")
    return numbers


def parse_lengths(text: str) -> list[int] | None:
    """Return the distinct lengths in a list such as ``1024,512``, the shortest first; None if the text is empty.

    Raises:
        ValueError: see ``parse_numbers``.
    """
    return sorted(set(parse_numbers(text, "lengths"))) if text else None


def parse_heads(text: str) -> list[tuple[int, int]]:
    """Return layers and heads from a list such as ``L1H18,L13H16``.

    Raises:
        ValueError: the text has another form.
    """
    matches = [re.fullmatch(r"L(\d+)H(\d+)", part) for part in split_names(text)]
    if not all(matches):
        raise ValueError(f"heads: found {text!r}, expected names such as L1H18,L13H16 (layer and head, from 0)")
    return [(int(match[1]), int(match[2])) for match in matches if match]


def read_model_config(recipe: Path) -> dict[str, Any]:
    """Return the ``model_config`` of a recipe.

    Raises:
        ValueError: it has none.
    """
    changes = load_yaml(recipe).get("model_config")
    if not isinstance(changes, dict):
        raise ValueError(f"model-config: {recipe} has no `model_config:` with settings under it")
    return changes

"""Read chats to train on; report a row that cannot be trained on by file, line and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axolotl_plugins.common.console import first_line
from axolotl_plugins.common.io import check_file, read_rows
from axolotl_plugins.common.tokenizer import Messages, count_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What Axolotl takes other names of roles for.
ROLES = {"human": "user", "gpt": "assistant"}
# Keys of a prompt and its answer in other formats.
PAIRS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"), ("question", "answer"),
         ("input", "output"))  # fmt: skip
SHAREGPT = "`message_property_mappings: {role: from, content: value}`"


def conversion(file: Path, row: Mapping[str, Any]) -> str:
    """Return what to do about a row whose chat is not where it is expected; empty if it is of no known format."""
    for key, turns in row.items():
        if isinstance(turns, list) and turns and isinstance(turns[0], dict):
            mapping = f" and {SHAREGPT}" if "from" in turns[0] else ""
            return f": set `field_messages: {key}`{mapping} in the recipe's entry of `datasets`"
    for prompt, answer in PAIRS:
        if prompt in row and answer in row:
            turns = f'{{role: "user", content: .{prompt}}}, {{role: "assistant", content: .{answer}}}'
            return f", not {prompt} and {answer}: convert it with jq -c '{{messages: [{turns}]}}' {file}"
    return ', as in {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}'


def read_chat(file: Path, number: int, row: Mapping[str, Any], dataset: Mapping[str, Any]) -> Messages:
    """Return the chat in a row, the line of that number in a file.

    The entry of the recipe's ``datasets`` may name other keys than ``messages``, role and content.

    Raises:
        ValueError: it is not a chat that ends with the assistant's answer; the message names file and line.
    """
    where, field = f"{file}, line {number}", dataset.get("field_messages") or "messages"
    turns = row.get(field)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns) or not turns:
        raise ValueError(f"{where}: found no chat, expected a list of turns under {field!r}{conversion(file, row)}")
    mapping = dataset.get("message_property_mappings") or {}
    role, content = (mapping.get(key) or dataset.get(f"message_field_{key}") or key for key in ("role", "content"))
    if role not in turns[-1]:
        known = "from" in turns[-1] and role == "role"
        hint = f"set {SHAREGPT} in the recipe's entry of `datasets`" if known else f"found {', '.join(turns[-1])}"
        raise ValueError(f"{where}: the last turn has no {role!r}: {hint}")
    names = {name: target for target, listed in (dataset.get("roles") or {}).items() for name in listed} or ROLES
    messages = [
        {"role": names.get(turn.get(role), turn.get(role)), "content": turn.get(content) or ""} for turn in turns
    ]
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"{where}: the last turn is the {messages[-1]['role']}'s, expected the assistant's answer")
    if not str(messages[-1]["content"]).strip():
        raise ValueError(f"{where}: the last turn is empty, expected the assistant's answer")
    if len(messages) < 2:
        raise ValueError(f"{where}: found an answer alone, expected a prompt before it")
    if dataset.get("message_field_training") != "training" and any(turn.get("training") is False for turn in turns):
        raise ValueError(f"{where}: a turn says `training: false`, which Axolotl reads only with "
                         "`message_field_training: training` in the recipe's `datasets`")  # fmt: skip
    return messages


def chat_lengths(file: Path, dataset: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[int, int]:
    """Return the length in tokens of every chat of a JSON lines file, by the number of its line.

    Raises:
        ValueError: the file is missing or empty, a row is not a chat, or the chat template refuses it.
    """
    from jinja2 import TemplateError

    check_file(file)
    lengths = {}
    for number, row in read_rows(file):
        chat = read_chat(file, number, row, dataset)
        try:
            lengths[number] = count_tokens(tokenizer, chat)
        except (TemplateError, TypeError) as error:
            raise ValueError(f"{file}, line {number}: the chat template refuses it ({first_line(error)})") from None
    if not lengths:
        raise ValueError(f"{file}: has no samples: remove it, or set another path")
    return lengths

"""Load tokenizers and count the tokens of chats."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from axolotl_plugins.common.console import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]


def as_messages(prompt: str, answer: str) -> Messages:
    """Return a prompt and its answer as a chat."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def load_tokenizer(name: str, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Args:
        name: folder or hub id.
        chat_template: Jinja file, or the template itself, for tokenizers without one.

    Raises:
        ValueError: the tokenizer cannot be loaded, or has no chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer: cannot load {name!r} as a folder or hub id ({first_line(error)})") from error
    if chat_template is not None:
        tokenizer.chat_template = read_template(chat_template)
    check_template(tokenizer, name)
    return tokenizer


def read_template(template: str) -> str:
    """Return a chat template: the text itself, or the content of the file it names.

    Raises:
        ValueError: the file cannot be read.
    """
    if "{" in template:
        return template
    try:
        return Path(template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"chat-template: cannot read {template} ({first_line(error)})") from error


def check_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Check that a tokenizer can render a chat.

    Raises:
        ValueError: it has no chat template, or an invalid one.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ValueError(
            f"tokenizer: {name!r} has no chat template: name one with --chat-template, in a recipe as "
            "`chat_template: jinja` with `chat_template_jinja`"
        )
    try:
        tokenizer.apply_chat_template(as_messages("a", "b"), tokenize=False)
    except TemplateError as error:
        raise ValueError(f"chat-template: {name!r} has an invalid one ({first_line(error)}): correct it") from None


def count_tokens(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> int:
    """Return the length of a chat in tokens, chat template included."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return len(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))
    # The fast path skips character offsets, which take two thirds of the time.
    backend.no_truncation()
    backend.no_padding()
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return len(backend.encode_batch_fast([text], add_special_tokens=False)[0])

"""Load tokenizers and count the tokens of chats."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axolotl_plugins.common.console import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]


def as_messages(prompt: str, answer: str) -> Messages:
    """Return a prompt and its answer as a chat."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def load_tokenizer(
    name: str, chat_template: str | None = None, template_arguments: dict[str, Any] | None = None, *,
    fallback: str | None = None, trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:  # fmt: skip
    """Load the tokenizer of a model.

    Args:
        name: folder or hub id.
        chat_template: Jinja file, or the template itself, for tokenizers without one.
        template_arguments: see ``with_arguments``.
        fallback: template of a tokenizer that has none.
        trust_remote_code: run code from the checkpoint.

    Raises:
        ValueError: the tokenizer cannot be loaded, or see ``set_template``.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer: cannot load {name!r} as a folder or hub id ({first_line(error)})") from error
    if chat_template is None and not tokenizer.chat_template:
        chat_template = fallback
    set_template(tokenizer, name, chat_template, template_arguments)
    return tokenizer


def set_template(
    tokenizer: PreTrainedTokenizerBase, name: str, chat_template: str | None = None,
    template_arguments: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Give the tokenizer of a named model the one chat template that training and scoring use, and check it.

    Arguments are those of ``load_tokenizer``; without a template the tokenizer keeps its own, of several ``default``.

    Raises:
        ValueError: there is no template, or none of several is ``default``; or see ``with_arguments`` and
            ``check_template``.
    """
    template = tokenizer.chat_template if chat_template is None else read_template(chat_template)
    if isinstance(template, dict):
        if "default" not in template:
            raise ValueError(f"tokenizer: {name!r} has chat templates named {', '.join(sorted(template))}, but no "
                             "`default`: name a file with one by --chat-template")  # fmt: skip
        template = template["default"]
    tokenizer.chat_template = with_arguments(template, template_arguments) if template_arguments else template
    check_template(tokenizer, name)


def parse_arguments(text: str | None) -> dict[str, Any] | None:
    """Read template arguments from JSON, such as ``{"enable_thinking": false}``; None stays None.

    Raises:
        ValueError: the text is not a JSON object.
    """
    if text is None:
        return None
    try:
        arguments = json.loads(text)
    except json.JSONDecodeError:
        arguments = None
    if not isinstance(arguments, dict):
        raise ValueError(
            f"chat-template-kwargs: found {text!r}, expected JSON such as '{{\"enable_thinking\": false}}'"
        )
    return arguments


def with_arguments(template: str | None, arguments: dict[str, Any]) -> str:
    """Return a chat template that sets variables first, as if they were passed whenever it is rendered.

    So every program that renders chats with the template, an inference server too, renders them alike.

    Args:
        template: Jinja text.
        arguments: JSON values by name, as Axolotl's ``chat_template_kwargs``.

    Raises:
        ValueError: the template does not read a variable of that name.
    """
    template = template or ""
    for name in arguments:
        if not name.isidentifier() or not re.search(rf"\b{name}\b", template) or name in ("messages", "bos_token"):
            raise ValueError(f"chat-template-kwargs: the chat template reads no variable {name!r}: remove it")
    # Later assignments win, so those of an earlier call come first. A line of its own leaves the template's first line
    # what it was: renderers drop the newline behind a block.
    header = re.match(r"(?:\{% set \w+ = [^\n]* %\}\n)*", template)
    assert header is not None
    lines = "".join(f"{{% set {name} = {value!r} %}}\n" for name, value in arguments.items())
    if header[0].endswith(lines):  # set already
        return template
    return template[: header.end()] + lines + template[header.end() :]


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
    """Check that a tokenizer renders chats with all their text, and the same prompt for training and for scoring.

    Raises:
        ValueError: it has no chat template, an invalid one, or one that drops a message's text; or see
            ``encode_chat``.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ValueError(
            f"tokenizer: {name!r} has no chat template: name one with --chat-template, in a recipe as "
            "`chat_template: jinja` with `chat_template_jinja`"
        )
    chat = as_messages("Which number is hidden?", "The number is 7391.")
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        if missing := [turn["role"] for turn in chat if turn["content"] not in text]:
            raise ValueError(
                f"chat-template: that of {name!r} drops the text of the {missing[0]}'s messages (some expect a list of "
                "parts instead of a text): name another with --chat-template"
            )
        encode_chat(tokenizer, chat)
        prompt = render_prompt(tokenizer, chat[:-1])
        if not text[len(prompt) :].lstrip().startswith(chat[-1]["content"]):
            raise different_prompts(text, prompt, chat[-1]["content"])
    except (TemplateError, TypeError) as error:
        raise ValueError(f"chat-template: {name!r} has an invalid one ({first_line(error)}): correct it") from None


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages, prefix: str = "") -> str:
    """Render a chat up to where the model goes on.

    Args:
        tokenizer: with a chat template.
        messages: the last one is the user's.
        prefix: beginning of the model's answer.
    """
    if prefix:
        messages = [*messages, {"role": "assistant", "content": prefix}]
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=not prefix, continue_final_message=bool(prefix)
    )


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[list[int], int]:
    """Tokenize a chat that ends with an answer.

    Returns:
        Its ids, and the index of the first token after the prompt, rendered as for scoring.

    Raises:
        ValueError: the prompt is not a prefix of the chat, so that training and scoring would see different ones.
    """
    text, prompt = tokenizer.apply_chat_template(messages, tokenize=False), render_prompt(tokenizer, messages[:-1])
    ids, prompt_ids = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, prompt))
    if ids[: len(prompt_ids)] != prompt_ids:
        raise different_prompts(text, prompt, messages[-1]["content"])
    return ids, len(prompt_ids)


def different_prompts(text: str, prompt: str, answer: str) -> ValueError:
    """Return the error for a chat, rendered with its answer, in which something else than the prompt precedes it."""
    pairs = enumerate(zip(text, prompt, strict=False))
    rest = text[next((place for place, pair in pairs if pair[0] != pair[1]), len(prompt)) :]
    tokens_differ = text.startswith(prompt) and rest.lstrip().startswith(answer)
    difference = "has other tokens there, joined with the answer's" if tokens_differ else f"goes on with {rest[:40]!r}"
    return ValueError(
        f"chat-template: its generation prompt ends in {prompt[-20:]!r}, where the same chat with its answer "
        f"{difference}, so that training and scoring would see different prompts: set template arguments, if it has "
        "any, by --chat-template-kwargs '{\"enable_thinking\": false}' (in a recipe `chat_template_kwargs`), or name "
        "another template"
    )


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

"""Draw samples of a task, sized in the model's own tokens, and write them with a manifest."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import random
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axolotl_plugins.common.console import first_line
from axolotl_plugins.common.io import write_text, written_whole
from axolotl_plugins.common.tokenizer import Messages, as_messages, count_tokens
from data_gen.file_task import select
from data_gen.tasks import LengthBudget, Request, Task, in_split, resolve_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def generate(request: Request, tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Any]]:
    """Draw the samples of a request.

    A sample depends on the task, split, seed, length and its own index alone, not on how many samples or which other
    lengths are requested. A random length is drawn with its sample.

    Yields:
        ``messages`` (user, assistant, before them those of a worked example), then ``task``, ``split``, ``seed``,
        ``index``, ``tokens`` (length of the chat with its template), and what ``Task.sample`` returns but the prompt.

    Raises:
        ValueError: no sample fits into the length, or the task has nothing to draw.
    """
    task = resolve_task(request.task)
    if task.sample is None:
        raise ValueError(f"task: {task.name} has nothing to draw: name a task or a description")
    for index in range(request.samples):
        length = request.tokens if request.tokens is not None else f"{request.lines} lines"
        rng = random.Random(f"{task.name}/{request.split}/{request.seed}/{length}/{index}")
        count = functools.lru_cache(maxsize=64)(
            lambda prompt, answer, example=None: count_tokens(tokenizer, as_chat(prompt, answer, example))
        )
        budget = LengthBudget(
            tokens=rng.randint(*request.token_range()) if request.tokens is not None else 0,
            count=count,
            accept=lambda answer: in_split(request.split, answer),
            encode=lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
            decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        )
        sample = task.sample(request, rng, index, budget)
        prompt, example = sample.pop("prompt"), sample.pop("example", None)
        yield {
            "messages": as_chat(prompt, sample["answer"], example),
            "task": task.name,
            "split": request.split,
            "seed": request.seed,
            "index": index,
            "tokens": count(prompt, sample["answer"], example),
            **sample,
        }


def as_chat(prompt: str, answer: str, example: tuple[str, str] | None) -> Messages:
    """Return a chat; ``training: false`` excludes an earlier answer from the loss (``message_field_training``)."""
    if example is None:
        return as_messages(prompt, answer)
    shown, reply = as_messages(*example)
    return [shown, {**reply, "training": False}, *as_messages(prompt, answer)]


class WordTokenizer:
    """Words in the place of tokens, to preview a task without a model."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[str]]:
        """Return the words of a text."""
        return {"input_ids": text.split()}

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> list[str]:
        """Return the words of a chat."""
        return [word for message in messages for word in message["content"].split()]

    def decode(self, words: list[str], **_: Any) -> str:
        """Return the text of words."""
        return " ".join(words)


def preview(request: Request, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Return the first sample of a request as text: prompt, answer, and what the answer is scored by.

    Raises:
        ValueError: see ``generate``.
    """
    sample = next(generate(request, tokenizer or WordTokenizer()))
    task, unit = resolve_task(request.task), "tokens" if tokenizer else "words"
    *turns, answer = (message["content"] for message in sample["messages"])
    references = json.dumps(sample["references"], ensure_ascii=False)
    prompt = "\n\n".join(turns)
    return (
        f"--- prompt\n{prompt}\n--- answer\n{answer}\n--- {task.title}: {sample['tokens']} {unit}, {request.split} "
        f"split, references {references}"
    )


def manifest_path(out: Path) -> Path:
    """Return the path of a data file's manifest, beside it."""
    return out.with_name(out.name + ".manifest.json")


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of what tokenization depends on: vocabulary, rules and chat template."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        backend.no_truncation()  # which is state: of the tokenizer's file, or of the last call
        backend.no_padding()
    rules = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256((rules + str(tokenizer.chat_template)).encode()).hexdigest()


CACHE: dict[tuple[Request, str], list[dict[str, Any]]] = {}


def draw(request: Request, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Return the samples of ``generate``, cached in the process for several models with one tokenizer."""
    key = (request, tokenizer_hash(tokenizer))
    if key not in CACHE:
        CACHE[key] = list(generate(request, tokenizer))
    return CACHE[key]


def samples_by_length(
    task: Task, tokenizer: PreTrainedTokenizerBase, lengths: list[int] | None, samples: int | None = None, *,
    drawn: Callable[[Request, PreTrainedTokenizerBase], Iterable[dict[str, Any]]] = generate, **options: Any,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Yield samples of a task with the ``length`` that their scores are grouped by.

    Args:
        task: draws the samples, or has them all.
        tokenizer: counts tokens.
        lengths: longest samples, in tokens; None only for a file's samples, see ``data_gen.file_task.select``.
        samples: of each length; None draws 50, and takes all of a file.
        drawn: ``generate`` or ``draw``.
        options: other fields of ``Request``, which a file's samples do not depend on.

    Raises:
        ValueError: see ``generate`` and ``data_gen.file_task.select``; or no length is given.
    """
    if task.rows is not None:
        yield from select(task.rows(tokenizer), lengths, samples)
        return
    if not lengths:
        raise ValueError(f"lengths: missing: name the longest samples of {task.name}, in tokens")
    for length in lengths:
        request = Request(task.key, str(length), samples=samples or Request.samples, **options)
        for row in drawn(request, tokenizer):
            yield {"length": length, **row}


def describe(request: Request, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return everything that the bytes of a data file depend on."""
    task = resolve_task(request.task)
    return {
        **{key: value for key, value in asdict(request).items() if value is not None},
        "task": task.name,
        **task.sources(request),
        "tokenizer": tokenizer_hash(tokenizer),
        "wonderwords": version("wonderwords"),
    }


def command_of(
    request: Request, tokenizer: str, chat_template: str | None, template_arguments: dict[str, Any] | None, out: Path
) -> str:
    """Return the command that writes a data file."""
    arguments = json.dumps(template_arguments) if template_arguments else None
    options = {"tokenizer": tokenizer, "chat-template": chat_template, "chat-template-kwargs": arguments,
               **asdict(request), "out": out}  # fmt: skip
    pairs = [
        [f"--{key.replace('_', '-')}", str(value)]
        for key, value in options.items()
        if key != "task" and value is not None
    ]
    return shlex.join(["seal", "data", request.task, *itertools.chain(*pairs)])


def write(
    request: Request, tokenizer: PreTrainedTokenizerBase, out: Path, *, chat_template: str | None = None,
    template_arguments: dict[str, Any] | None = None, progress: Callable[[int], object] = lambda n: n,
) -> bool:  # fmt: skip
    """Write a request's samples to ``out`` as JSON lines, then their manifest, whose presence means complete.

    Args:
        request: the samples.
        tokenizer: counts tokens.
        out: the file; written atomically.
        chat_template: where the tokenizer's template was read from, for the command in the manifest.
        template_arguments: that the template holds, see ``with_arguments``, for the command as well.
        progress: called with the number of samples written.

    Returns:
        False if the file exists already, complete and equal to what would be written.

    Raises:
        ValueError: ``out`` holds other data than requested; the message names the difference.
    """
    expected = describe(request, tokenizer)
    if manifest_path(out).exists():
        check(out, expected)
        return False
    digest = hashlib.sha256()
    with written_whole(out) as partial:
        with partial.open("wb") as file:
            for done, sample in enumerate(generate(request, tokenizer), 1):
                row = (json.dumps(sample, ensure_ascii=False) + "\n").encode()
                digest.update(row)
                file.write(row)
                progress(done)
        # A file without a manifest comes from a run interrupted at this point, or from elsewhere.
        if out.exists() and out.read_bytes() != partial.read_bytes():
            raise ValueError(
                f"{out}: exists, was not generated by this command, and would be replaced: name another file; in a "
                "recipe, remove `seal: data` to train on it"
            )
    manifest = {
        "command": command_of(request, tokenizer.name_or_path, chat_template, template_arguments, out),
        **expected,
        "sha256": digest.hexdigest(),
    }
    write_text(manifest_path(out), json.dumps(manifest, indent=2) + "\n")
    return True


def remark(rows: Iterable[dict[str, Any]]) -> str:
    """Return a warning about samples for the user, as " (...)", or an empty string."""
    if repeats := max((row.get("haystack_repeats", 0) for row in rows), default=0):
        return f" (the haystack is shorter than the samples: it is repeated up to {repeats} times)"
    return ""


def check(out: Path, expected: dict[str, Any]) -> None:
    """Raise ValueError, with the difference, unless a data file is unchanged and its manifest as expected."""
    path = manifest_path(out)
    try:
        manifest = json.loads(path.read_text())
        digest = manifest.pop("sha256")
        manifest.pop("command", None)  # its paths depend on the working directory
        content = out.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{out}: missing although {path.name} is there: delete the manifest") from error
    except (json.JSONDecodeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not a manifest ({first_line(error)}): delete it and {out.name}") from error
    for key in sorted(expected.keys() | manifest.keys()):
        if expected.get(key) != manifest.get(key):
            raise ValueError(
                f"{out}: was made with {key} {manifest.get(key)!r}, but {expected.get(key)!r} is requested: "
                "delete the file and its manifest, or name another file"
            )
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(f"{out}: was modified after it was written (its hash is not the manifest's): delete both")

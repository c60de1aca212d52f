"""Tasks whose samples are the rows of a file: the user's own, or LongEval's published cases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axolotl_plugins.common.console import first_line
from axolotl_plugins.common.io import file_hash, read_rows
from axolotl_plugins.common.tokenizer import as_messages, count_tokens
from data_gen.metrics import resolve_metric
from data_gen.tasks.task import TASKS, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

METRIC = "contains"
MAX_NEW_TOKENS = 100


def file_task(file: Path, metric: str | None = None, max_new_tokens: int | None = None) -> Task:
    """Return the task of scoring the rows of a JSON lines file; see ``read_sample`` for what a row has.

    Args:
        file: ends in ``.jsonl``.
        metric: see ``resolve_metric``; None is ``METRIC``.
        max_new_tokens: longest response; None is ``MAX_NEW_TOKENS``.

    Raises:
        ValueError: there is no such file or metric, or a row is no sample; the message names the line.
    """
    metric, max_new_tokens = metric or METRIC, MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens
    score = resolve_metric(metric)
    if max_new_tokens < 1:
        raise ValueError(f"max-new-tokens: found {max_new_tokens}, expected at least 1")
    if not file.is_file():
        raise ValueError(f"task: there is no file {file}")
    samples: list[dict[str, Any]] = []
    for number, row in read_rows(file):
        try:
            sample = read_sample(row)
            answers = [sample["answer"], *sample["references"]]
            if not max(score(answer, sample["references"]) for answer in answers):
                raise ValueError(f"its own answer scores 0 by the metric {metric}: choose another --metric")
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {first_line(error)}") from None
        samples.append({**sample, "index": len(samples)})
    if not samples:
        raise ValueError(f"{file}: has no samples")
    if len({sample["length"] is None for sample in samples}) > 1:
        raise ValueError(f"{file}: some rows have a length and others none: give it to all or to none")
    return Task(
        name=str(file), title=str(file), description=f"the samples of {file}", source=str(file),
        shortest=1, metric=score, max_new_tokens=max_new_tokens, spec=str(file),
        identity={"file_sha256": file_hash(file), "metric": metric, "max_new_tokens": max_new_tokens},
        rows=lambda tokenizer: count_each(samples, tokenizer),
    )  # fmt: skip


def read_sample(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as a sample.

    Args:
        row: ``messages``, whose last turn is the reference answer; or a ``prompt`` and ``references``. Optionally
            ``references`` (correct answers), ``prefix`` (of the assistant's turn, given to the model) and ``length``
            (that scores are grouped by, else by the length in tokens).

    Returns:
        ``messages``, ``answer``, ``references``, ``prefix`` and ``length`` (None if the row has none).

    Raises:
        ValueError: the row has another form.
    """
    messages, references = row.get("messages"), row.get("references")
    if isinstance(references, str | int | float):
        references = [references]
    if references is not None and (not isinstance(references, list) or not references):
        raise ValueError(f"references: found {str(references)[:60]!r}, expected a list of correct answers")
    references = [str(reference).strip() for reference in references or []]
    if messages is None:
        if not isinstance(row.get("prompt"), str) or not references:
            raise ValueError("expected `messages`, or `prompt` and `references`; found " + ", ".join(row))
        messages = as_messages(row["prompt"], str(row.get("answer") or references[0]))
    check_turns(messages)
    length, prefix = row.get("length"), row.get("prefix", "")
    if length is not None and (type(length) is not int or length < 1):
        raise ValueError(f"length: found {length!r}, expected a whole number above 0")
    if not isinstance(prefix, str):
        raise ValueError(f"prefix: found {prefix!r}, expected text")
    answer = messages[-1]["content"]
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in messages]
    return {"messages": turns, "answer": answer, "references": references or [answer.strip()], "prefix": prefix,
            "length": length}  # fmt: skip


def check_turns(messages: Any) -> None:
    """Raise ValueError unless a chat consists of texts and ends with a question and its answer."""
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        raise ValueError(f"messages: found {str(messages)[:60]!r}, expected a list of turns")
    for number, turn in enumerate(messages, 1):
        if not isinstance(turn.get("role"), str) or not str(turn.get("content") or "").strip():
            raise ValueError(f"messages: turn {number} is {str(turn)[:60]!r}, expected `role` and `content`")
        if not isinstance(turn["content"], str):
            raise ValueError(f"messages: turn {number} has a content that is not text")
    roles = [turn["role"] for turn in messages]
    if roles[-2:] != ["user", "assistant"]:
        raise ValueError(f"messages: the turns are of {', '.join(roles) or 'nobody'}, expected the last to be an "
                         "assistant's, which is the reference answer to a user's")  # fmt: skip


def count_each(samples: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Return samples with ``tokens``, the length of each chat.

    Raises:
        ValueError: the chat template refuses a chat, for example one with a system turn.
    """
    from jinja2 import TemplateError

    try:
        return [{**sample, "tokens": count_tokens(tokenizer, sample["messages"])} for sample in samples]
    except TemplateError as error:
        raise ValueError(f"messages: the model's chat template refuses a sample ({first_line(error)})") from None


def select(rows: list[dict[str, Any]], lengths: list[int] | None, samples: int | None) -> Iterator[dict[str, Any]]:
    """Yield samples in the order of their lengths.

    Args:
        rows: see ``count_each``; without a ``length``, they get the first of ``lengths`` that is not below their
            ``tokens``, by default the next power of two.
        lengths: to yield; None yields all.
        samples: at most, of each length; None yields all.

    Raises:
        ValueError: there is no sample of a length, or a sample is longer than all of them.
    """
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        tokens, length = row["tokens"], row["length"]
        if length is None:
            bounds = lengths or [1 << (tokens - 1).bit_length()]
            if tokens > max(bounds):
                raise ValueError(
                    f"lengths: a sample has {tokens} tokens, expected at most {max(bounds)}: add a longer one"
                )
            length = min(bound for bound in bounds if bound >= tokens)
        groups.setdefault(length, []).append({**row, "length": length})
    for length in sorted(lengths or groups):
        if length not in groups:
            others = ", ".join(map(str, sorted(groups)))
            raise ValueError(f"lengths: no sample belongs to {length}, only to {others}: leave it out")
        yield from groups[length][:samples]


def longeval_cases(folder: Path, lines: list[int] | None = None) -> Task:
    """Return the line task on LongEval's published cases (``*_lines.jsonl``) of all or some numbers of lines.

    Raises:
        ValueError: there are no such files, one of ``lines`` is missing, or a row is not a case of LongEval.
    """
    files = {int("0" + file.name.split("_")[0]): file for file in folder.glob("*_lines.jsonl")}
    if not files:
        raise ValueError(f"cases: no *_lines.jsonl in {str(folder)!r}: name the folder with LongEval's line cases")
    if missing := set(lines or ()) - files.keys():
        raise ValueError(f"lines: {folder} has no {min(missing)}_lines.jsonl, only those of "
                         f"{', '.join(map(str, sorted(files)))} lines")  # fmt: skip
    counts = sorted(lines or files)
    samples = []
    for file in (files[count] for count in counts):
        for index, (number, case) in enumerate(read_rows(file)):
            try:
                row = {"prompt": str(case["prompt"]), "references": int(case["expected_number"]),
                       "length": int(case["num_lines"])}  # fmt: skip
                samples.append({**read_sample(row), "index": index})
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}, line {number}: not a case of LongEval's ({error!r})") from None
    return replace(TASKS["line"], rows=lambda tokenizer: count_each(samples, tokenizer),
                   identity={"cases": str(folder), "lines": ",".join(map(str, counts))})  # fmt: skip

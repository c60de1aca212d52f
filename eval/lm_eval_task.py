"""Build lm-eval's tasks from the registry: documents, prompts and scores."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

from axolotl_plugins.common.io import read_rows
from axolotl_plugins.common.tokenizer import count_tokens, load_tokenizer
from data_gen.dataset import Request, draw
from eval.metrics import METRICS
from eval.scoring import generation_settings, prompt_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def documents(
    *, tokenizer: str, requests: list[dict[str, Any]], examples: dict[str, Any] | None = None,
    cases: dict[str, Any] | None = None, chat_template: str | None = None, **_: Any,
) -> dict[str, Dataset]:  # fmt: skip
    """Return the test samples as lm-eval's documents.

    Args:
        tokenizer: folder or hub id.
        requests: fields of the ``Request`` of each length.
        examples: fields of the ``Request`` of worked examples, put before every prompt in the same turn (paper
            section 8).
        cases: arguments of ``read_cases``, whose samples come first.
        chat_template: see ``load_tokenizer``.
    """
    loaded = load_tokenizer(tokenizer, chat_template)
    shown = "".join(
        "\n".join(message["content"] for message in row["messages"]) + "\n\n"
        for row in (draw(Request(**examples), loaded) if examples else ())
    )
    rows = list(read_cases(**cases, tokenizer=loaded)) if cases else []
    rows += [
        {"length": int(request["tokens"]), **row} for request in requests for row in draw(Request(**request), loaded)
    ]
    return {"test": Dataset.from_list([{**row, "prompt": prompt_text(loaded, row, shown)} for row in rows])}


def case_files(folder: str, lines: list[int] | None) -> list[Path]:
    """Return the files of LongEval's line cases (``*_lines.jsonl``) in a folder, by number of lines.

    Args:
        folder: of the files.
        lines: numbers of lines to take; None takes all.

    Raises:
        ValueError: there are no such files, or one that ``lines`` asks for is missing.
    """
    files = {int("0" + file.name.split("_")[0]): file for file in Path(folder).glob("*_lines.jsonl")}
    if not files:
        raise ValueError(f"cases: no *_lines.jsonl in {folder!r}: name the folder with LongEval's line cases")
    if missing := set(lines or ()) - files.keys():
        raise ValueError(f"lines: {folder} has no {min(missing)}_lines.jsonl, only those of "
                         f"{', '.join(map(str, sorted(files)))} lines")  # fmt: skip
    return [files[count] for count in sorted(lines or files)]


def read_cases(
    folder: str, samples: int, lines: list[int] | None, tokenizer: PreTrainedTokenizerBase, longest: int
) -> Iterator[dict[str, Any]]:
    """Yield LongEval's published line cases unchanged; their length is the number of lines.

    Args:
        folder: see ``case_files``.
        samples: at most, of each file.
        lines: see ``case_files``.
        tokenizer: counts tokens.
        longest: most tokens of a prompt.

    Raises:
        ValueError: see ``case_files``; or a row is not a case of LongEval, or too long.
    """
    for file in case_files(folder, lines):
        for index, (row, case) in enumerate(islice(read_rows(file), samples)):
            try:
                number, length = int(case["expected_number"]), int(case["num_lines"])
                messages = [{"role": "user", "content": str(case["prompt"])}]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}, line {row}: not a case of LongEval's ({error!r})") from None
            if (tokens := count_tokens(tokenizer, messages)) > longest:
                raise ValueError(
                    f"{file}: a case of {tokens} tokens does not fit into the model's window with its answer "
                    f"({longest} are left for prompts): choose shorter files by --lines"
                )
            yield {
                "task": "line",
                "length": length,
                "index": index,
                "tokens": tokens,
                "messages": messages,
                "answer": str(number),
                "references": [str(number)],
            }


def prompt(document: dict[str, Any]) -> str:
    """Return the rendered prompt."""
    return document["prompt"]


def target(document: dict[str, Any]) -> str:
    """Return the assistant's turn of the training sample."""
    return document["answer"]


def score(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Compute the score of a response, in [0, 1]."""
    return {"score": METRICS[document["task"]](results[0], document["references"])}


def lm_eval_task(task: str, **arguments: Any) -> ConfigurableTask:
    """Build lm-eval's task ``seal_TASK``.

    Args:
        task: a key of ``METRICS``.
        arguments: of ``documents``.
    """
    return ConfigurableTask(config={
        "task": f"seal_{task}", "custom_dataset": documents, "test_split": "test", "output_type": "generate_until",
        "doc_to_text": prompt, "doc_to_target": target, "process_results": score,
        "num_fewshot": 0, "generation_kwargs": {"do_sample": False, **generation_settings(task)},
        "metric_list": [{"metric": "score", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0, **arguments},
    })  # fmt: skip

"""``seal data TASK ...``: write training and test data as chats in JSON lines."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from axolotl_plugins.common.console import run
from axolotl_plugins.common.io import check_output, read_rows, write_text
from axolotl_plugins.common.tokenizer import load_tokenizer, parse_arguments
from data_gen.dataset import Request, remark, write
from data_gen.dataset import preview as sample_text
from data_gen.needles import collect
from data_gen.openai_client import KEY
from data_gen.tasks import TASKS, resolve_task, tasks_with

EXAMPLE = "seal data line --tokenizer models/smollm2-135m --tokens 2048 --samples 50 --out data/line.jsonl"


def users(option: str) -> str:
    """Name the tasks that accept an option."""
    return ", ".join(tasks_with(option))


TaskName = Annotated[
    str,
    typer.Argument(
        help=f"Task to draw: {', '.join(TASKS)}, a description (.yml) or module:object; or needles, to train niah with."
    ),
]
Out = Annotated[Path | None, typer.Option(help="JSON lines file to write, with its manifest beside it; required.")]
Tokenizer = Annotated[str | None, typer.Option(help="Model whose tokenizer and chat template count: folder or hub id.")]
ChatTemplate = Annotated[
    str | None, typer.Option(help="Jinja file, for tokenizers without a template: see recipes/templates.")
]
Tokens = Annotated[
    str | None, typer.Option(help="Longest sample, chat template and answer included: N, or N:M to draw it.")
]
Lines = Annotated[int | None, typer.Option(help=f"For {users('lines')}: lines in the record, instead of --tokens.")]
Haystack = Annotated[
    str | None,
    typer.Option(help=f"For {users('haystack')}: folder of text files, or essays (hub); default: built-in prose."),
]
Needles = Annotated[
    str | None, typer.Option(help=f"For {users('needles')}: training needles; default: the paper's ten.")
]
Depths = Annotated[
    int | None,
    typer.Option(help=f"For test samples of {users('depths')}: depths from 0 to 100 per cent; default: ten."),
]
RulerVersion = Annotated[
    int | None,
    typer.Option(help=f"For {users('ruler_version')}: 2024 (the paper's) or 2025, as NVIDIA's program was then."),
]
ChatTemplateKwargs = Annotated[
    str | None, typer.Option(help="Variables of the chat template as JSON, such as '{\"enable_thinking\": false}'.")
]
BaseUrl = Annotated[
    str | None, typer.Option(help="For needles: an OpenAI-compatible endpoint, such as http://localhost:8000/v1.")
]
Preview = Annotated[
    bool, typer.Option("--preview", help="Print the first sample instead; without --tokenizer, tokens are words.")
]
Model = Annotated[str | None, typer.Option(help="For needles: the model to query; OPENAI_API_KEY is its key.")]


def main(
    task: TaskName,
    out: Out = None, tokenizer: Tokenizer = None, chat_template: ChatTemplate = None, tokens: Tokens = None,
    lines: Lines = None,
    samples: Annotated[int, typer.Option(help="How many samples, or needles.")] = 50,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    split: Annotated[Literal["train", "test"], typer.Option(help="The two never share a sample.")] = "train",
    haystack: Haystack = None, needles: Needles = None, depths: Depths = None,
    data: Annotated[str | None, typer.Option(help=f"For {users('data')}: a local file instead of the hub's.")] = None,
    ruler_version: RulerVersion = None, chat_template_kwargs: ChatTemplateKwargs = None, base_url: BaseUrl = None,
    model: Model = None, preview: Preview = False,
) -> None:  # fmt: skip
    """Write samples in the format of a benchmark, with answers, as chats to train on or to score.

    A file that already holds the requested samples is kept.
    """
    from rich.progress import Progress

    options: dict[str, Any] = {
        "lines": lines, "seed": seed, "split": split, "haystack": haystack, "needles": needles, "depths": depths,
        "data": data, "ruler_version": ruler_version,
    }  # fmt: skip
    arguments = parse_arguments(chat_template_kwargs)
    if preview:
        shortest = resolve_task(task).shortest // (1 if tokenizer else 2)
        tokens = tokens or (None if lines else str(max(150, shortest)))
        loaded = load_tokenizer(tokenizer, chat_template, arguments) if tokenizer else None
        print(sample_text(Request(task, tokens, samples=1, **options), loaded))
        return
    if out is None:
        raise ValueError("out: missing: name the file to write by --out, or print a sample by --preview")
    check_output(out)
    with Progress(transient=True) as progress:
        bar = progress.add_task(task, total=samples)
        update = lambda done: progress.update(bar, completed=done)  # noqa: E731
        if task == "needles":
            if not base_url or not model:
                raise ValueError("needles: give --base-url and --model of the endpoint to query")
            pairs = collect(samples, base_url, model, os.environ.get(KEY), progress=update)
            write_text(out, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
            written = True
        else:
            request = Request(task, tokens, samples=samples, **options)
            if tokenizer is None:
                raise ValueError("tokenizer: missing: name the model whose tokenizer counts the tokens of samples")
            loaded = load_tokenizer(tokenizer, chat_template, arguments)
            written = write(request, loaded, out, chat_template=chat_template, template_arguments=arguments,
                            progress=update)  # fmt: skip
    warning = remark(row for _, row in read_rows(out))
    print(f"{out}: {samples} samples of {task}{warning}" + ("" if written else " (already there)"))


app = typer.Typer(add_completion=False)
app.command(epilog=f"Example: {EXAMPLE}")(main)


if __name__ == "__main__":
    # Tokenizers need no PyTorch; hiding it saves the four seconds in which Transformers would import it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    sys.modules["torch"] = None  # type: ignore[assignment]
    run(app, "python -m data_gen")

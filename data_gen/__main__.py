"""``python -m data_gen TASK ...``: write training and test data as chats in JSON lines."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from axolotl_plugins.common.console import quiet_libraries, stop
from axolotl_plugins.common.console import run as run_app
from axolotl_plugins.common.io import check_output, read_rows
from axolotl_plugins.common.tokenizer import load_tokenizer, parse_arguments
from data_gen.dataset import Request, remark, write
from data_gen.needles import collect
from data_gen.needles import write as write_needles
from data_gen.openai_client import KEY
from data_gen.tasks import TASKS, tasks_with

EXAMPLE = "python -m data_gen line --tokenizer models/smollm2-135m --tokens 2048 --samples 50 --out data/line.jsonl"


def users(option: str) -> str:
    """Name the tasks that accept an option."""
    return " and ".join(tasks_with(option))


RulerVersion = Annotated[
    int | None,
    typer.Option(help=f"For {users('ruler_version')}: 2024 (the paper's) or 2025, as NVIDIA's program was then."),
]
TemplateArguments = Annotated[
    str | None, typer.Option(help="Variables of the chat template as JSON, such as '{\"enable_thinking\": false}'.")
]


def main(
    task: Annotated[str, typer.Argument(help=f"Task to draw: {', '.join(TASKS)}; or needles, to train niah with.")],
    out: Annotated[Path, typer.Option(help="JSON lines file to write, with its manifest beside it.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="Model whose tokenizer and chat template count: folder or hub id.")
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="Jinja file, for tokenizers without a template: see recipes/templates.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Longest sample, chat template and answer included: N, or N:M to draw it.")
    ] = None,
    lines: Annotated[
        int | None, typer.Option(help=f"For {users('lines')}: lines in the record, instead of --tokens.")
    ] = None,
    samples: Annotated[int, typer.Option(help="How many samples, or needles.")] = 50,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    split: Annotated[Literal["train", "test"], typer.Option(help="The two never share a sample.")] = "train",
    haystack: Annotated[
        str | None,
        typer.Option(help=f"For {users('haystack')}: folder of text files, or essays (hub); default: built-in prose."),
    ] = None,
    needles: Annotated[
        str | None, typer.Option(help=f"For {users('needles')}: training needles; default: the paper's ten.")
    ] = None,
    depths: Annotated[
        int | None,
        typer.Option(help=f"For test samples of {users('depths')}: depths from 0 to 100 per cent; default: ten."),
    ] = None,
    data: Annotated[str | None, typer.Option(help=f"For {users('data')}: a local file instead of the hub's.")] = None,
    ruler_version: RulerVersion = None,
    chat_template_kwargs: TemplateArguments = None,
    base_url: Annotated[
        str | None, typer.Option(help="For needles: an OpenAI-compatible endpoint, such as http://localhost:8000/v1.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="For needles: the model to query; OPENAI_API_KEY is its key.")
    ] = None,
) -> None:
    """Write samples in the format of a benchmark, with answers, as chats to train on or to score.

    A file that already holds the requested samples is kept.
    """
    from rich.progress import Progress

    quiet_libraries()
    try:
        check_output(out)
        with Progress(transient=True) as progress:
            bar = progress.add_task(task, total=samples)
            update = lambda done: progress.update(bar, completed=done)  # noqa: E731
            if task == "needles":
                if not base_url or not model:
                    raise ValueError("needles: give --base-url and --model of the endpoint to query")
                write_needles(collect(samples, base_url, model, os.environ.get(KEY), progress=update), out)
                written = True
            else:
                request = Request(task, tokens, lines, samples, seed, split, haystack, needles, depths, data,
                                  ruler_version)  # fmt: skip
                if tokenizer is None:
                    raise ValueError("tokenizer: missing: name the model whose tokenizer counts the tokens of samples")
                arguments = parse_arguments(chat_template_kwargs)
                loaded = load_tokenizer(tokenizer, chat_template, arguments)
                written = write(request, loaded, out, chat_template=chat_template, template_arguments=arguments,
                                progress=update)  # fmt: skip
    except (ValueError, OSError) as error:
        stop("data_gen", error)
    warning = remark(row for _, row in read_rows(out))
    print(f"{out}: {samples} samples of {task}{warning}" + ("" if written else " (already there)"))


app = typer.Typer(add_completion=False)
app.command(epilog=f"Example: {EXAMPLE}")(main)


if __name__ == "__main__":
    # Tokenizers need no PyTorch; hiding it saves the four seconds in which Transformers would import it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    sys.modules["torch"] = None  # type: ignore[assignment]
    run_app(app, "python -m data_gen")

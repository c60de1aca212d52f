"""``python -m data_gen TASK ...``: training and test data as chats in JSON lines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from data_gen.console import quiet_libraries, stop
from data_gen.generate import TASKS, Request, load_tokenizer, write

EXAMPLE = "python -m data_gen line --tokenizer recipes/tiny --tokens 1900 --samples 50 --seed 0 --out data/line.jsonl"


def main(
    task: Annotated[str, typer.Argument(help=f"What to make: {', '.join(TASKS)}.")],
    tokenizer: Annotated[str, typer.Option(help="Model whose tokenizer and chat template measure: folder or hub id.")],
    out: Annotated[Path, typer.Option(help="The JSON lines file to write; its manifest lies beside it.")],
    tokens: Annotated[
        str | None, typer.Option(help="Longest sample, chat template and answer included: N, or N:M to draw it.")
    ] = None,
    lines: Annotated[int | None, typer.Option(help="Lines in the record, instead of --tokens.")] = None,
    samples: Annotated[int, typer.Option(help="How many samples.")] = 50,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    split: Annotated[Literal["train", "test"], typer.Option(help="The two can never share a sample.")] = "train",
) -> None:
    """Write samples in the format of a benchmark, with answers, as chats to train on or to score.

    A file that is there already and is what would be written is left alone.
    """
    from rich.progress import Progress

    quiet_libraries()
    try:
        request = Request(task, tokens, lines, samples, seed, split)
        with Progress(transient=True) as progress:
            bar = progress.add_task(f"{task} samples", total=samples)
            written = write(
                request, load_tokenizer(tokenizer), out, progress=lambda done: progress.update(bar, completed=done)
            )
    except (ValueError, OSError) as error:
        stop("data_gen", error)
    print(f"{out}: {samples} samples of {task}" + ("" if written else " (already there)"))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command(epilog=f"Example: {EXAMPLE}")(main)
    app(prog_name="python -m data_gen")

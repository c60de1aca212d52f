"""``python -m eval run``: scores of a model over lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from data_gen.console import quiet_libraries, stop

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def main() -> None:
    """Score models on the tasks they are tuned for."""


@app.command(epilog="Example: python -m eval run --model outputs/tiny_line_sealc --lengths 512,1024,1900 --samples 100")
def run(
    model: Annotated[str, typer.Option(help="Hub id, merged folder, or SEAL adapter folder.")],
    task: Annotated[str, typer.Option(help="What to score: line.")] = "line",
    lengths: Annotated[
        str, typer.Option(help="Longest samples in tokens, as 512,1024; default: the paper's shares of the window.")
    ] = "",
    samples: Annotated[int, typer.Option(help="Samples per length; the paper has 50.")] = 50,
    seed: Annotated[int, typer.Option(help="Seed of the test samples.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Prompts generated together.")] = 1,
    out: Annotated[str, typer.Option(help="Result file; default results/TASK_MODEL.json. A PNG lies beside it.")] = "",
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the checkpoint.")] = False,
) -> None:
    """Score a model over lengths, and write a table, a JSON file and a picture."""
    quiet_libraries()
    from eval.run import run as score
    from eval.run import save

    try:
        if samples < 1:
            raise ValueError(f"samples: found {samples}, expected at least 1")
        try:
            wanted = [int(length) for length in lengths.split(",")] if lengths else None
        except ValueError:
            raise ValueError(f"lengths: found {lengths!r}, expected whole numbers such as 512,1024") from None
        result = score(
            model, task, lengths=wanted, samples=samples, seed=seed, batch_size=batch_size,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        path = Path(out) if out else Path("results") / f"{task}_{model.strip('/').replace('/', '_')}.json"
        save(result, path)
    except (ValueError, OSError) as error:
        stop("eval", error)
    from eval.table import print_scores

    print_scores([result])
    print(f"{path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    app(prog_name="python -m eval")

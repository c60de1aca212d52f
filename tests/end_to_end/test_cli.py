"""``seal``: every command's help and example, what help may import, and that the commands are the programs' own."""

from __future__ import annotations

import shlex
import subprocess
import sys
from importlib.metadata import version

import click
import pytest
from packaging.version import Version
from paths import ROOT

from recipes.cli import PROGRAMS, app, load_command

COMMANDS = {
    "recipe", "data", "eval", "report", "probe", "merge", "verify", "export", "combine", "push", "settings", "study",
}  # fmt: skip
HEAVY = {"torch", "transformers", "peft", "datasets", "lm_eval", "axolotl", "matplotlib", "scipy"}


def call(*arguments: str, program: str = "recipes.cli") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", program, *arguments], cwd=ROOT, capture_output=True, text=True
    )


def imported(done: subprocess.CompletedProcess[str]) -> set[str]:
    """The packages that a quiet command imported."""
    lines = done.stderr.splitlines()
    assert all(line.startswith("import time:") for line in lines), "prints to stderr"
    return {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}


def leaves(command: click.Command, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], click.Command]]:
    """All commands that have no subcommands, with the words that call them."""
    if not isinstance(command, click.Group):
        return [(path, command)]
    return [leaf for name, child in command.commands.items() for leaf in leaves(child, (*path, name))]


LEAVES = [leaf for name in PROGRAMS for leaf in leaves(load_command(name), ("seal", name))]


def test_help_lists_every_command():
    help_text = call("--help").stdout
    assert set(PROGRAMS) == COMMANDS == set(app.list_commands(click.Context(app)))
    assert all(f"│ {name} " in help_text and program.help in help_text for name, program in PROGRAMS.items())
    assert "Example: seal recipe new" in help_text


@pytest.mark.parametrize("arguments", [(), ("data",), ("eval",), ("probe", "heads"), ("merge",), ("recipe", "new"),
                                       ("study", "run")])  # fmt: skip
def test_help_is_quiet_and_imports_no_model_library(arguments):
    done = call(*arguments, "--help")
    assert done.returncode == 0 and f"Usage: seal {' '.join(arguments)}".rstrip() in done.stdout
    assert "typer" in imported(done) and not imported(done) & HEAVY


@pytest.mark.parametrize("program", ["axolotl_plugins.seal", "data_gen", "eval", "recipes"])
def test_help_of_each_program_is_quiet_and_imports_no_model_library(program):
    done = call("--help", program=program)
    assert f"Usage: python -m {program}" in done.stdout and not imported(done) & HEAVY


@pytest.mark.parametrize(("path", "command"), LEAVES, ids=[" ".join(path) for path, _ in LEAVES])
def test_every_command_has_an_example_that_its_own_parser_takes(path, command):
    words = shlex.split(command.epilog.removeprefix("Example: "))
    assert tuple(words[: len(path)]) == path
    context = command.make_context(" ".join(path), words[len(path) :])
    assert all(value is not None for name, value in context.params.items() if required(command, name))


@pytest.mark.skipif(Version(version("click")) >= Version("8.5"), reason="Typer 0.25 loses the help of arguments")
@pytest.mark.parametrize(("path", "command"), LEAVES, ids=[" ".join(path) for path, _ in LEAVES])
def test_every_option_and_argument_is_described(path, command):
    assert all(parameter.help for parameter in command.params)


def required(command: click.Command, name: str) -> bool:
    return next(parameter.required for parameter in command.params if parameter.name == name)


def test_recipe_has_the_commands_of_its_program():
    recipe = {path[2] for path, _ in LEAVES if path[1] == "recipe"}
    assert recipe >= {"new", "write", "fetch", "cost", "params"}


def test_an_unknown_command_and_a_missing_argument_are_one_line_each():
    for arguments, message in [
        (("marge",), "seal: No such command 'marge'. Did you mean 'merge'? (see `seal --help`)"),
        (("merge",), "seal: Missing argument 'ADAPTER'. (see `seal merge --help`)"),
    ]:
        done = call(*arguments)
        assert done.returncode == 1 and not done.stdout
        assert [line for line in done.stderr.splitlines() if not line.startswith("import time:")] == [message]


def test_data_is_the_same_program_and_imports_no_torch(tmp_path):
    arguments = ["line", "--tokenizer", str(ROOT / "tests/fixtures/tiny"), "--tokens", "300", "--samples", "2"]
    done = call("data", *arguments, "--out", str(tmp_path / "seal.jsonl"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert not any(line.endswith("| torch") for line in done.stderr.splitlines())
    module = [sys.executable, "-m", "data_gen", *arguments, "--out", str(tmp_path / "module.jsonl")]
    subprocess.run(module, cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "seal.jsonl").read_bytes() == (tmp_path / "module.jsonl").read_bytes()


def test_settings_print_nothing_but_the_settings():
    done = call("settings")
    assert "seal.granularity: " in done.stdout and "seal.data.task: " in done.stdout
    assert not imported(done) & HEAVY


def test_a_missing_extra_is_one_line_that_names_it():
    code = "import sys; sys.modules['matplotlib'] = None; from recipes.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "report"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "seal: matplotlib is not installed: pip install -e '.[eval]'\n"


def test_make_lists_a_dozen_targets_and_help_all_the_rest():
    lists = []
    for goal in ([], ["help-all"]):
        command = ["make", "--no-print-directory", *goal]  # `make test` makes this a make inside another
        output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        lists.append({line.split()[1] for line in output.splitlines()})
    assert len(lists[0]) <= 12 and lists[0] < lists[1]
    assert {"setup", "demo", "test", "train", "data", "eval", "merge", "lint", "help"} <= lists[0]
    assert {"bench", "chaos", "lock", "recipes-smoke", "docs"} <= lists[1] - lists[0]

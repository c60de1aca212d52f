"""One command for every row of the paper's Tables 1 to 3 and Figures 5, 6, 7, 9 and 10: ``docs/rows.md``."""

from __future__ import annotations

import re
from typing import Any

import yaml

from recipes.matrix import FOLDER, METHODS, read_matrix, recipe_name

DOCS = FOLDER.parent / "docs" / "rows.md"
TABLES = (1, 2, 3)
FIGURES = (5, 6, 7, 9, 10)
TITLES = {"base": "no adapter", "one-shot": "one example in the prompt"}
SAMPLES = {"niah": 10, "vt": 200, "cwe": 200, "fwe": 200}  # per length; 50 for lines, as `eval run` does anyway


def score(task: str, lengths: list[int], model: dict[str, Any], adapter: str | None, *, shots: int = 0) -> str:
    """The command that scores an adapter, or a base model if there is none."""
    command = f"python -m eval run --model {adapter or model['base_model']} --task {task}"
    if not adapter and "template" in model:
        command += f" --chat-template recipes/templates/{model['template']}.jinja"
    command += f" --lengths {','.join(map(str, lengths))}"
    if task in SAMPLES:
        command += f" --samples {SAMPLES[task]}"
    if task == "niah":
        command += " --haystack essays"
    return command + (f" --shots {shots}" if shots else "")


def lengths_of(row: dict[str, Any], scores: list[dict[str, Any]]) -> list[int]:
    """Tokens that a row is scored at: those of all tables that have the same model and task, so that once is enough.

    What has an example in its prompt is scored by itself, at its own.
    """
    same = [one for one in scores if (one["model"], one["task"]) == (row["model"], row["task"])]
    if row["method"] == "one-shot":
        same = [row]
    unit = 1000 if row["task"] == "line" else 1024  # RULER counts tokens in powers of two
    return [n * unit for n in sorted({n for one in same if one["table"] in TABLES for n in one["by_length"]})]


def line(name: str, method: str, recipe: str | None, scoring: str) -> str:
    """A row of markdown."""
    tuning = f"`accelerate launch -m axolotl.cli.train recipes/{recipe}.yml`" if recipe else ""
    return f"| {name} | {method} | {tuning} | `{scoring}` |\n"


def table(number: int, matrix: dict[str, Any], scores: list[dict[str, Any]]) -> str:
    """The rows of one of the paper's tables, at the lengths that it prints."""
    models = {model["base_model"]: key for key, model in matrix["models"].items() if "model_config" not in model}
    by_title = {title.split()[-1].strip("()"): method for method, title in METHODS.items()}
    text = ""
    for row in scores:
        if row["table"] != number:
            continue
        key, method = models[row["model"]], row["method"]
        model = matrix["models"][key]
        lengths = lengths_of(row, scores)
        recipe = recipe_name(key, row["task"], by_title[method]) if method in by_title else None
        shots = 1 if method == "one-shot" else 0
        scoring = score(row["task"], lengths, model, f"outputs/{recipe}" if recipe else None, shots=shots)
        text += line(f"{model['name']}, {row['task']}", TITLES.get(method, method), recipe, scoring)
    return text


def figure(number: int, matrix: dict[str, Any], scores: list[dict[str, Any]]) -> str:
    """The lines or maps of one of the paper's figures."""
    text = ""
    for row in matrix["recipes"]:
        if not re.search(rf"Figure {number}\b", row["shows"]):
            continue
        for key in row["models"]:
            model = matrix["models"][key]
            for task in row["tasks"]:
                longest = model["tokens"]
                lengths = [n for n in range(4000, longest, 4000) if longest - n > 1000] + [longest]
                for printed in scores:  # lines are scored where a table has them
                    if (printed["table"], printed["task"], printed["model"]) == (1, task, model["base_model"]):
                        lengths = lengths_of(printed, scores)
                bare = score(task, lengths, model, None)
                if "model_config" in model:
                    bare += f" --model-config recipes/{recipe_name(key, task, row['methods'][0], row)}.yml"
                if "samples" not in row:
                    text += line(model["name"], TITLES["base"], None, bare)
                for method in row["methods"]:
                    recipe = recipe_name(key, task, method, row)
                    title = METHODS[method] + (f", {row['samples']} samples" if "samples" in row else "")
                    text += line(model["name"], title, recipe, score(task, lengths, model, f"outputs/{recipe}"))
    return text


def write_rows() -> str:
    """The text of ``docs/rows.md``."""
    matrix = read_matrix()
    scores = yaml.safe_load((FOLDER.parent / "eval" / "paper.yml").read_text())["scores"]
    parts = [(f"Table {number}", table(number, matrix, scores)) for number in TABLES]
    parts += [(f"Figure {number}", figure(number, matrix, scores)) for number in FIGURES]
    head = "| model | method | tune | score |\n|---|---|---|---|\n"
    return INTRODUCTION + "".join(f"\n## {title}\n\n{head}{rows}" for title, rows in parts)


INTRODUCTION = """# Every row of the paper's tables and figures

Written by `make recipes`; [paper.md](paper.md) says how to read the commands. Rows that appear in two places are tuned
and scored once.
"""

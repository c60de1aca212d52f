"""Write the table of recipes/README.md: the file, memory and time of every recipe."""

from __future__ import annotations

from recipes.tools.estimate import CARDS
from recipes.tools.methods import METHODS
from recipes.tools.render import FOLDER, TASKS, Recipe, device_name, in_minutes, measurement

README = FOLDER / "README.md"
MARK = "<!-- Written by `seal recipe write`; edits below this line are lost. -->\n"


def readme(recipes: list[Recipe]) -> str:
    """Return recipes/README.md with its table replaced.

    Raises:
        ValueError: the line above the table is missing.
    """
    head, mark, _ = README.read_text().partition(MARK)
    if not mark:
        raise ValueError(f"{README}: the line above its table is missing: {MARK.strip()}")
    return head + MARK + table(recipes)


def table(recipes: list[Recipe]) -> str:
    """Return one markdown row per recipe, ordered by model, task and method."""
    models, tasks, methods = (list(dict.fromkeys(names)) for names in zip(
        *((recipe.model["name"], recipe.task, recipe.method) for recipe in recipes), strict=True))  # fmt: skip
    rows = sorted(recipes, key=lambda r: (models.index(r.model["name"]), tasks.index(r.task), methods.index(r.method)))
    lines = ["", "| model | task | method | recipe | GiB | time |", "|---|---|---|---|---:|---|"]
    for recipe in rows:
        link, titles = f"[{recipe.file.name}]({recipe.file.name})", ", ".join(TASKS[task] for task in recipe.tasks)
        cells = (recipe.model["name"], titles, METHODS[recipe.method], link, memory(recipe), time(recipe))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def memory(recipe: Recipe) -> str:
    """Return the measured peak memory in GiB, else the estimate."""
    assert recipe.cost is not None
    if not recipe.gpu:
        return f"{recipe.cost.cpu_gib:.0f}"
    row = measurement(recipe)
    return f"{row['peak_gib']:.0f} measured" if row else f"{recipe.cost.gib:.0f}"


def time(recipe: Recipe) -> str:
    """Return the estimated minutes on the recipe's card or two CPU cores, and the measured ones."""
    assert recipe.cost is not None
    if not recipe.gpu:
        return f"{recipe.cost.cpu_minutes} minutes on two CPU cores"
    devices, gpu = recipe.context_parallel_size, CARDS[recipe.card]
    text = f"{in_minutes(recipe.cost.seconds(gpu))} on {devices if devices > 1 else 'one'} {gpu.upper()}"
    if row := measurement(recipe):
        seconds = row["seconds"] * recipe.samples * recipe.epochs
        text += f"; {in_minutes(seconds)} measured on one {device_name(row)}"
    return text

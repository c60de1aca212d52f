"""Write the table of recipes/README.md: the file, memory and time of every recipe."""

from __future__ import annotations

from recipes.tools.methods import METHODS
from recipes.tools.render import FOLDER, TASKS, Recipe, measured_minutes

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
    lines = ["", "| model | task | method | recipe | GiB | minutes |", "|---|---|---|---|---:|---|"]
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
    return f"{recipe.measured['gib']} measured" if recipe.measured else f"{recipe.cost.gib:.0f}"


def time(recipe: Recipe) -> str:
    """Return the estimated minutes on an A100 or two CPU cores, and the measured ones on an H200."""
    assert recipe.cost is not None
    if not recipe.gpu:
        return f"{recipe.cost.cpu_minutes} on two CPU cores"
    fast, slow = recipe.cost.minutes("a100")
    devices = recipe.context_parallel_size
    text = f"{fast:.0f} to {slow:.0f} on {devices if devices > 1 else 'one'} A100"
    return f"{text}; {measured_minutes(recipe):.0f} measured on one H200" if recipe.measured else text

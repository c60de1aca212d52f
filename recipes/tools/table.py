"""Write the table of recipes/README.md: the file, memory and time of every recipe."""

from __future__ import annotations

from recipes.tools.render import FOLDER, Recipe, environment

README = FOLDER / "README.md"
MARK = "<!-- Written by `seal recipe write`; edits below this line are lost. -->\n"


def readme(recipes: list[Recipe]) -> str:
    """Return recipes/README.md with its table replaced: a row per recipe, ordered by model, task and method.

    Raises:
        ValueError: the line above the table is missing.
    """
    head, mark, _ = README.read_text().partition(MARK)
    if not mark:
        raise ValueError(f"{README}: the line above its table is missing: {MARK.strip()}")
    models, tasks, methods = (list(dict.fromkeys(names)) for names in zip(
        *((recipe.model["name"], recipe.task, recipe.method) for recipe in recipes), strict=True))  # fmt: skip
    rows = sorted(recipes, key=lambda r: (models.index(r.model["name"]), tasks.index(r.task), methods.index(r.method)))
    return head + MARK + environment().get_template("readme.md.jinja").render(recipes=rows)

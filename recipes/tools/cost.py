"""Describe the memory and time of a recipe on one GPU (``python -m recipes cost``)."""

from __future__ import annotations

from pathlib import Path

from axolotl_plugins.common.io import load_yaml
from axolotl_plugins.common.window import read_config
from recipes.tools.estimate import (
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
from recipes.tools.render import read_matrix


def shape_for(base_model: str) -> Shape:
    """Return the shape of a model: that in ``matrix.yml``, else from its config.

    Raises:
        ValueError: the config cannot be loaded, or lacks a size that costs depend on.
    """
    matrix = read_matrix()
    names = {model["base_model"]: model["shape"] for model in matrix["models"].values()}
    if base_model in names:
        return Shape.of(matrix["shapes"][names[base_model]])
    try:
        return Shape.of(read_config(base_model).to_dict())
    except KeyError as error:
        raise ValueError(f"{base_model}: its config has no {error}, so its cost cannot be estimated") from None


def cost_lines(file: Path, gpu: str) -> list[str]:
    """Return the lines that ``python -m recipes cost`` prints.

    Raises:
        ValueError: the recipe does not describe its data, its model's shape is unknown, or so is the GPU.
    """
    from axolotl_plugins.seal.args import parse_block

    if gpu not in GPUS:
        raise ValueError(f"gpu: found {gpu!r}, expected one of {', '.join(GPUS)}")
    settings = load_yaml(file)
    if "base_model" not in settings:
        raise ValueError(f"{file}: not a recipe: it names no base_model")
    parse_block(settings.get("seal"))  # before anything is fetched
    shape = shape_for(settings["base_model"])
    try:
        cost = recipe_cost(settings, shape)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    minutes, gib = cost.minutes(gpu), GPUS[gpu][2]
    devices = cost.memory.context_parallel_size
    several, of_each = (f"{devices} x ", " of each") if devices > 1 else ("", "")
    lines = [
        f"{settings['base_model']}: {shape.parameters / 1e9:.2f} B parameters, {cost.tokens} tokens at most",
        f"useful work: {cost.flop:.3g} FLOP; activations are {'' if cost.memory.recompute else 'not '}recomputed",
        f"time on {several}{gpu}: {minutes[0]:.1f} minutes at {GOOD_SHARE:.0%} of its peak, {minutes[1]:.1f} at the "
        f"{PAPER_SHARE:.0%} that the paper's 40 minutes on an A100 come to",
    ]
    if cost.memory == MemoryConfig(element=4, recompute=cost.memory.recompute):
        lines.append(f"on two CPU cores: {cost.cpu_minutes} minutes at {CPU_FLOPS / 1e9:.0f} GFLOP/s, "
                     f"about {cost.cpu_gib:.0f} GiB")  # fmt: skip
    longest = [f"{card} GiB {longest_sample(shape, CARD_SHARE * card, cost.memory)} tokens" for card in CARDS]
    return [
        *lines,
        f"memory{of_each}: about {cost.gib:.0f} GiB of {gib}" + ("" if cost.gib < gib else ": it will not fit"),
        f"longest sample that fits, by memory: {', '.join(longest)}",
    ]

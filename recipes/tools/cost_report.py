"""Describe the memory and time of a recipe on one GPU (``seal recipe cost``)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from axolotl_plugins.common.io import load_yaml
from axolotl_plugins.common.window import read_config
from recipes.tools.cost import (
    CARD_SHARE,
    CARDS,
    CPU_FLOPS,
    GPUS,
    Cost,
    Shape,
    StepConfig,
    fastest,
    longest_sample,
    recipe_cost,
    step_seconds,
    training_bytes,
)  # fmt: skip
from recipes.tools.render import in_minutes, read_matrix


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
    """Return the lines that ``seal recipe cost`` prints.

    Raises:
        ValueError: the recipe does not describe its data, its model's shape is unknown, or so is the GPU.
    """
    from axolotl_plugins.seal.args import parse_block
    from axolotl_plugins.seal.training_files import file_lengths

    if gpu not in GPUS:
        raise ValueError(f"gpu: found {gpu!r}, expected one of {', '.join(GPUS)}")
    settings = load_yaml(file)
    if "base_model" not in settings:
        raise ValueError(f"{file}: not a recipe: it names no base_model")
    block = parse_block(settings.get("seal"))  # before anything is fetched
    shape = shape_for(settings["base_model"])
    try:
        own = [] if block.data else [length for _, lengths in file_lengths(settings) for length in lengths.values()]
        cost = recipe_cost(settings, shape, own)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    step, devices, seconds = cost.step, cost.step.context_parallel_size, cost.seconds(gpu)
    several, of_each = (f"{devices} x ", " of each") if devices > 1 else ("", "")
    samples = sum(number for number, _ in cost.steps)
    lines = [
        f"{settings['base_model']}: {shape.parameters / 1e9:.2f} B parameters, {cost.tokens} tokens at most",
        f"useful work: {cost.flop:.3g} FLOP; setting: {step.name}",
        f"time on {several}{gpu}: {in_minutes(seconds)}, {seconds / samples:.1f} s a sample",
    ]
    if step == StepConfig(element=4, recompute=step.recompute):
        lines.append(f"on two CPU cores: {cost.cpu_minutes} minutes at {CPU_FLOPS / 1e9:.0f} GFLOP/s, "
                     f"about {cost.cpu_gib:.0f} GiB")  # fmt: skip
    longest = [f"{card} GiB {longest_sample(shape, CARD_SHARE * card, step)} tokens" for card in CARDS]
    fits = "" if cost.gib < GPUS[gpu].gib else ": it will not fit"
    lines += [
        f"memory{of_each}: about {cost.gib:.0f} GiB of {GPUS[gpu].gib}{fits}",
        f"longest sample that fits, by memory: {', '.join(longest)}",
    ]
    return lines + (card_lines(cost) if step.element == 2 and devices == 1 else [])


def card_lines(cost: Cost) -> list[str]:
    """Return the fastest setting for the longest sample by card, with Liger's kernels, one line each."""
    lines = ["fastest setting of the longest sample by card (--card of `seal recipe new`):"]
    for card, gpu in CARDS.items():
        try:
            step = fastest(cost.shape, cost.tokens, card, replace(cost.step, liger=True), gpu)
        except ValueError:
            lines.append(f"  {card} GiB: nothing fits")
            continue
        gib = training_bytes(cost.shape, cost.tokens, step=step) / 2**30
        lines.append(f"  {card} GiB ({gpu}): {step.name}{' in 8 bits' * (step.quantised == 1)}, {gib:.0f} GiB, "
                     f"{step_seconds(cost.shape, cost.tokens, step, gpu):.1f} s a sample")  # fmt: skip
    return lines

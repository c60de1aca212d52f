"""``python -m eval probe``: the probes' commands. Each writes a JSON file and, beside it, a picture."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from axolotl_plugins.common.console import quiet_libraries, stop
from axolotl_plugins.common.io import check_output, load_json, write_text
from eval.result_cache import journal_file

if TYPE_CHECKING:
    from axolotl_plugins.seal.model_loading import LoadedModel

app = typer.Typer(no_args_is_help=True, help="Which heads and channels matter, and why SEAL works.")

Model = Annotated[str, typer.Option(help="Hub id, merged folder, or SEAL adapter folder.")]
Task = Annotated[str, typer.Option(help="line, niah, vt, cwe or fwe.")]
Lengths = Annotated[str, typer.Option(help="Longest samples in tokens: a middle and a long one, as 16000,31000.")]
Samples = Annotated[int, typer.Option(help="Samples per length, from the training split: test samples stay unseen.")]
Template = Annotated[str | None, typer.Option(help="Jinja file, for base models without a chat template.")]
Out = Annotated[Path, typer.Option(help="Result file; a PNG lies beside it.")]
Recipe = Annotated[Path, typer.Option(help="A SEAL recipe that describes its data.")]
BatchSize = Annotated[
    int | None, typer.Option(help="Prompts decoded together; default: as many as memory allows, 32 at most.")
]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Stop with one line where something is wrong with what was asked for."""
    quiet_libraries()
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        stop("probe", error)


def adapters_named(adapters: list[str]) -> dict[str, str]:
    """Folders by name.

    Raises:
        ValueError: one is not NAME=FOLDER, a name is there twice, or cannot be part of a file's.
    """
    folders = dict(part.split("=", 1) for part in adapters if "=" in part)
    if len(folders) != len(adapters) or not all(folders.values()):
        raise ValueError(f"adapter: found {' '.join(adapters)!r}, expected NAME=FOLDER, every name once")
    for name in folders:
        if not re.fullmatch(r"\w[\w .+-]{0,59}", name):
            raise ValueError(f"adapter: found the name {name[:80]!r}, expected at most 60 letters, digits, blanks and "
                             "any of . _ + -, a letter or digit first")  # fmt: skip
    return folders


def numbers(text: str, what: str, kind: type = int) -> list[Any]:
    """A list such as 512,1024.

    Raises:
        ValueError: it is none.
    """
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{what}: found {text!r}, expected numbers with commas between") from None
    if not all(0 < number < math.inf for number in found):
        raise ValueError(f"{what}: found {text!r}, expected numbers above 0 (16000, not 16,000)")
    return found


def head_names(text: str) -> list[tuple[int, int]]:
    """Layers and heads from a list such as L1H18,L13H16.

    Raises:
        ValueError: it is none.
    """
    found = [re.fullmatch(r"L(\d+)H(\d+)", part) for part in text.split(",")]
    if not all(found):
        raise ValueError(f"heads: found {text!r}, expected names such as L1H18,L13H16 (layer and head, from 0)")
    return [(int(match[1]), int(match[2])) for match in found if match]


def same_model(one: str, other: str) -> bool:
    """Whether two names are those of one folder, or of one repository on the hub."""
    return Path(one).resolve() == Path(other).resolve()


def read_map(file: Path, model: str) -> dict[str, Any]:
    """A map of a model that `heads` or `gradient` wrote.

    Raises:
        ValueError: it is none, or of another model.
    """
    try:
        found = load_json(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read as a map ({error})") from None
    if not isinstance(found, dict) or found.get("kind") not in ("removal", "gradient") or found.get("unit") != "head":
        raise ValueError(f"{file}: not a map of heads: make one with `python -m eval probe heads`")
    if not same_model(str(found.get("model")), model):
        raise ValueError(f"{file}: a map of {found.get('model')}, expected one of {model}: make it with "
                         f"`python -m eval probe heads --model {model}`")  # fmt: skip
    return found


def finish(found: dict[str, Any], out: Path, *journals: Path) -> None:
    """Write a result with its picture; its journals are no longer needed."""
    from eval.plots import save_figure
    from eval.probe.plots import DRAW

    save_figure(DRAW[found["kind"]](found), out.with_suffix(".png"))
    write_text(out, json.dumps(found, indent=1) + "\n")
    for journal in journals:
        journal.unlink(missing_ok=True)
    print(f"{out} and {out.with_suffix('.png')}")


@app.command(epilog="Example: python -m eval probe heads --model models/smollm2-135m --lengths 512,2048 --samples 50")
def heads(
    model: Model, lengths: Lengths, task: Task = "line", samples: Samples = 50,
    batch: Annotated[int, typer.Option(help="Heads that go through the model together; more need more memory.")] = 8,
    chat_template: Template = None, out: Out = Path("results/probes/heads.json"),
) -> None:  # fmt: skip
    """Remove every head, one at a time, and score the answers (Figure 2b). Interrupted, the same command goes on."""
    with one_line_errors():
        from axolotl_plugins.seal.model_loading import load
        from eval.probe.head_importance import changes, removal_map

        wanted = numbers(lengths, "lengths")
        journal = journal_file(out, model, "heads", task, wanted, samples, chat_template)
        loaded = load(model, chat_template=chat_template)
        found = removal_map(loaded, task, wanted, samples=samples, batch=batch, journal=journal)
        print_extremes(found, changes(found, wanted[-1]), f"change of the score at {wanted[-1]} tokens")
        finish(found, out, journal)


@app.command(epilog="Example: python -m eval probe channels --model models/smollm2-135m --heads L9H4 --lengths 2048")
def channels(
    model: Model, lengths: Lengths,
    heads: Annotated[str, typer.Option(help="Heads whose channels are removed one by one, as L1H18,L13H16.")],
    task: Task = "line", samples: Samples = 20,
    batch: Annotated[int, typer.Option(help="Channels that go through the model together.")] = 8,
    chat_template: Template = None, out: Out = Path("results/probes/channels.json"),
) -> None:  # fmt: skip
    """Remove every channel of some heads, one at a time (Figure 2d)."""
    with one_line_errors():
        from axolotl_plugins.seal.model_loading import load
        from eval.probe.head_importance import removal_map

        wanted, chosen = numbers(lengths, "lengths"), head_names(heads)
        journal = journal_file(out, model, "channels", task, wanted, samples, chosen, chat_template)
        loaded = load(model, chat_template=chat_template)
        found = removal_map(loaded, task, wanted, samples=samples, heads=chosen, batch=batch, journal=journal)
        finish(found, out, journal)


@app.command(
    epilog="Example: python -m eval probe gradient --model models/smollm2-135m --lengths 512,2048 --samples 50"
)
def gradient(
    model: Model, lengths: Lengths, task: Task = "line", samples: Samples = 50,
    points: Annotated[
        str, typer.Option(help="Common scales of all heads at which gradients are taken; each costs one more pass.")
    ] = "1",
    compare: Annotated[Path | None, typer.Option(help="Map of `heads` to compare with (Spearman).")] = None,
    chat_template: Template = None, out: Out = Path("results/probes/gradient.json"),
) -> None:  # fmt: skip
    """Predict what removing every head does, from one pass forward and one backward per prompt."""
    with one_line_errors():
        from axolotl_plugins.seal.model_loading import load
        from eval.probe.head_importance import agreement, changes, gradient_map

        wanted, at = numbers(lengths, "lengths"), numbers(points, "points", float)
        exact = read_map(compare, model) if compare else None
        journal = journal_file(out, model, "gradient", task, wanted, samples, at, chat_template)
        loaded = load(model, chat_template=chat_template)
        found = gradient_map(loaded, task, wanted, samples=samples, points=tuple(at), journal=journal)
        if exact is not None:
            found["spearman"] = agreement(exact, found)
            found["speedup"] = exact["seconds"] / max(found["seconds"], 1e-9)
            print(f"Spearman's correlation with {compare}: {found['spearman']}; {found['speedup']:.0f} times faster")
        print_extremes(
            found, changes(found, wanted[-1]), f"predicted change of the log-probability at {wanted[-1]} tokens"
        )
        finish(found, out, journal)


@app.command(
    epilog="Example: python -m eval probe quadrants --model models/smollm2-135m --from results/probes/heads.json"
)
def quadrants(
    model: Model,
    source: Annotated[Path, typer.Option("--from", help="Map of `heads` or `gradient` at two lengths.")],
    down: Annotated[float, typer.Option(help="Scale of heads whose removal helps at both lengths.")] = 0.9,
    up: Annotated[float, typer.Option(help="Scale of heads whose removal hurts at both lengths.")] = 1.1,
    lengths: Annotated[str, typer.Option(help="Longest test samples in tokens; default: the paper's shares.")] = "",
    samples: Annotated[int, typer.Option(help="Test samples per length.")] = 50,
    batch_size: BatchSize = None, chat_template: Template = None,
    adapters: Annotated[Path, typer.Option(help="Folder for the SEAL-H adapters.")] = Path("outputs/quadrants"),
    out: Out = Path("results/probes/quadrants.json"),
) -> None:  # fmt: skip
    """Scale heads by their quadrant in a map, training nothing, and score all lengths (Figure 2c)."""
    with one_line_errors():
        from axolotl_plugins.seal.model_loading import load
        from eval.probe.quadrants import KINDS, quadrant_scales, save_scales
        from eval.run import default_lengths, run

        if not (0 < down < math.inf and 0 < up < math.inf):
            raise ValueError(f"down, up: found {down:g} and {up:g}, expected scales above 0")
        found = read_map(source, model)
        loaded = load(model, chat_template=chat_template)
        wanted = numbers(lengths, "lengths") if lengths else default_lengths(loaded.window)
        journals = {
            name: journal_file(out, model, "quadrants", found, down, up, chat_template, name)
            for name in ("base", *KINDS)
        }  # fmt: skip
        folders: dict[str, Path] = {}
        for name in KINDS:
            try:
                scales = quadrant_scales(found, name, down, up)
            except ValueError as error:
                print(f"{name}: {error}")
                continue
            # Of another model, map or pair of scales in another folder.
            made_of = hashlib.sha256(repr((model, found, down, up)).encode()).hexdigest()[:8]
            folders[name] = adapters / f"{name.lower().replace(', ', '_').replace(' ', '_')}_{made_of}"
            if not folders[name].exists():
                save_scales(load(model, chat_template=chat_template), scales, folders[name])
        if not folders:
            raise ValueError(f"{source}: no head helps or hurts at both lengths, so there is nothing to scale")

        def scores(name: str, folder: str | Path) -> dict[str, float]:
            each = load(folder, chat_template=chat_template)
            result = run(each, found["task"], lengths=wanted, samples=samples, batch_size=batch_size,
                         journal=journals[name])  # fmt: skip
            return {str(score["length"]): score["score"] for score in result["scores"]}

        result: dict[str, Any] = {
            "kind": "quadrants", "model": model, "base_model": loaded.base, "task": found["task"], "map": str(source),
            "down": down, "up": up, "samples": samples, "scores": {"base": scores("base", model)},
            "adapters": {name: str(folder) for name, folder in folders.items()},
        }  # fmt: skip
        for name, folder in folders.items():
            result["scores"][name] = scores(name, folder)
        finish(result, out, *journals.values())


@app.command(
    epilog="Example: python -m eval probe direct --model models/smollm2-135m --adapter outputs/smollm2_line_sealc "
    "--length 2048"
)
def direct(
    model: Annotated[str, typer.Option(help="The base model: hub id or folder.")],
    adapter: Annotated[list[str], typer.Option(help="SEAL adapter folder; give it again for a second one.")],
    length: Annotated[int, typer.Option(help="Longest sample, in tokens.")],
    task: Task = "line",
    find: Annotated[
        int, typer.Option(help="Samples to search for one that the base gets wrong and every adapter right.")
    ] = 100,
    normalised: Annotated[
        bool, typer.Option(help="Fold the final norm in, so that effects add up to the logit; the paper leaves it out.")
    ] = False,
    chat_template: Template = None, out: Out = Path("results/probes/direct.json"),
) -> None:  # fmt: skip
    """What every head and MLP adds to the right and the wrong token where the answers part (Figure 4)."""
    with one_line_errors():
        from axolotl_plugins.seal.model_loading import load
        from eval.probe.hooks import wrapped
        from eval.probe.logit_attribution import compare_models

        check_output(out)
        models = [load(name, chat_template=chat_template) for name in (model, *adapter)]
        for each in models:
            wrapped(each.model)
        finish(compare_models(models, task, length, find, normalised), out)


@app.command(
    epilog="Example: python -m eval probe transfer --model BASE --adapter line=outputs/a --adapter vt=outputs/b"
)
def transfer(
    model: Annotated[str, typer.Option(help="The base model: hub id or folder.")],
    adapter: Annotated[list[str], typer.Option(help="NAME=FOLDER of a tuned adapter; once for each.")],
    tasks: Annotated[str, typer.Option(help="What each is scored on.")] = "vt,cwe,fwe",
    lengths: Annotated[str, typer.Option(help="Longest test samples in tokens; default: the paper's shares.")] = "",
    samples: Annotated[int, typer.Option(help="Test samples per length.")] = 50,
    batch_size: BatchSize = None, chat_template: Template = None, out: Out = Path("results/probes/transfer.json"),
) -> None:  # fmt: skip
    """Score every adapter on every task: gain over the range of the base model's scores (equation 2, Figure 8)."""
    with one_line_errors():
        from axolotl_plugins.seal.model_loading import load_each
        from axolotl_plugins.seal.provenance import seen_texts
        from eval.metrics import METRICS
        from eval.probe.transfer import by_length, matrix
        from eval.run import default_lengths, run

        folders = adapters_named(adapter)
        if "base" in folders:
            raise ValueError("adapter: found the name 'base', which is --model's: give it another")
        if unknown := [task for task in tasks.split(",") if task not in METRICS]:
            raise ValueError(f"tasks: found {unknown[0]!r}, expected some of {','.join(METRICS)}")
        check_output(out)
        journals = []

        def scores(name: str, loaded: LoadedModel) -> dict[str, Any]:
            wanted = numbers(lengths, "lengths") if lengths else default_lengths(loaded.window)
            found = {}
            for task in tasks.split(","):
                journals.append(journal_file(out, loaded.name, name, task, wanted, samples, chat_template))
                found[task] = run(loaded, task, lengths=wanted, samples=samples, batch_size=batch_size,
                                  journal=journals[-1])  # fmt: skip
            return found

        base: dict[str, Any] = {}
        results: dict[str, dict[str, Any]] = {}
        for name, loaded in zip(folders, load_each(folders, chat_template=chat_template), strict=True):
            if not same_model(loaded.base, model):
                raise ValueError(
                    f"adapter: {loaded.name} is of {loaded.base}, expected one of {model}: name its --model"
                )
            if not base:
                untuned = replace(loaded, name=model, method="base", trained_on=seen_texts(Path(model)))
                with loaded.model.disable_adapter():
                    base = scores("base", untuned)
            results[name] = scores(name, loaded)
        found = {
            "kind": "transfer", "model": model, "base_model": model, "samples": samples, "adapters": folders,
            "scores": {name: {task: by_length(one) for task, one in rows.items()}
                       for name, rows in {"base": base, **results}.items()},
            "transferability": matrix(base, results),
        }  # fmt: skip
        finish(found, out, *journals)


@app.command(
    epilog="Example: python -m eval probe sweep --recipe recipes/smollm2_line_sealh.yml --rates 0.01 --lengths 2048"
)
def sweep(
    recipe: Recipe, lengths: Annotated[str, typer.Option(help="Longest validation samples, in tokens.")],
    rates: Annotated[str, typer.Option(help="Learning rates.")] = "0.005,0.01,0.02,0.03",
    samples: Annotated[str, typer.Option(help="Numbers of samples.")] = "50",
    epochs: Annotated[str, typer.Option(help="Passes over the samples.")] = "1",
    seeds: Annotated[str, typer.Option(help="Seeds of data and order.")] = "1",
    validation: Annotated[int, typer.Option(help="Validation samples per length, freshly drawn: no test data.")] = 50,
    batch_size: BatchSize = None, out: Out = Path("results/probes/sweep.json"),
) -> None:  # fmt: skip
    """Tune with every rate and number of samples, score on fresh validation data, name the best (Table 7, Figure 9)."""
    with one_line_errors():
        from eval.probe import captions
        from eval.probe.sweep import read_recipe
        from eval.probe.sweep import sweep as run_sweep

        grid: dict[str, Any] = {"rates": numbers(rates, "rates", float), "samples": numbers(samples, "samples"),
                "epochs": numbers(epochs, "epochs"), "seeds": numbers(seeds, "seeds"),
                "lengths": numbers(lengths, "lengths"), "validation": validation}  # fmt: skip
        settings = read_recipe(recipe)
        journal = journal_file(out, settings["base_model"], "sweep", recipe.read_text(), grid["lengths"], validation)
        found = run_sweep(settings, **grid, batch_size=batch_size, journal=journal)
        for cell in found["cells"]:
            print(f"rate {cell['rate']:g}, {cell['samples']} samples, {cell['epochs']} epochs, seed {cell['seed']}: "
                  f"{cell['mean']:.3f}")  # fmt: skip
        print(captions.sweep(found))
        finish(found, out, journal)


@app.command(epilog="Example: python -m eval probe controls --recipe recipes/smollm2_line_sealc.yml --lengths 512,2048")
def controls(
    recipe: Recipe, lengths: Annotated[str, typer.Option(help="Longest validation samples, in tokens.")],
    seeds: Annotated[str, typer.Option(help="Seeds of data, order and shuffling.")] = "1,2,3",
    validation: Annotated[int, typer.Option(help="Validation samples per length.")] = 50,
    batch_size: BatchSize = None, out: Out = Path("results/probes/controls.json"),
) -> None:  # fmt: skip
    """Shuffled scales and scales tuned on wrong answers must not help: the gain is in the right heads and answers."""
    with one_line_errors():
        from eval.probe.sweep import controls as run_controls
        from eval.probe.sweep import read_recipe

        settings, wanted = read_recipe(recipe), numbers(lengths, "lengths")
        journal = journal_file(out, settings["base_model"], "controls", recipe.read_text(), wanted, validation)
        found = run_controls(settings, seeds=numbers(seeds, "seeds"), lengths=wanted, validation=validation,
                             batch_size=batch_size, journal=journal)  # fmt: skip
        finish(found, out, journal)


@app.command(
    epilog="Example: python -m eval probe inspect --adapter outputs/smollm2_line_sealc --map results/probes/heads.json"
)
def inspect(
    adapter: Annotated[Path, typer.Option(help="SEAL adapter folder.")],
    against: Annotated[Path | None, typer.Option("--map", help="Map of `heads`, to see its quadrants' scales.")] = None,
    out: Out = Path("results/probes/inspect.json"),
) -> None:  # fmt: skip
    """Where the learned scales went: heads raised and lowered most, spread of channels, overlap with a map."""
    with one_line_errors():
        import numpy as np

        from axolotl_plugins.seal.scales import saved_scales
        from eval.probe.head_importance import quadrants as quadrants_of

        check_output(out)
        values = saved_scales(adapter)
        mean, spread = values.mean(-1), values.std(-1)
        method = "SEAL-H" if values.shape[-1] == 1 else "SEAL-C"
        found: dict[str, Any] = {"kind": "scales", "model": str(adapter), "method": method, "mean": mean.tolist(),
                                 "spread": spread.tolist()}  # fmt: skip
        where = None
        if against is not None:
            base = load_json(adapter / "adapter_config.json")["base_model_name_or_path"]
            where = quadrants_of(read_map(against, base))
            if where.shape != mean.shape:
                raise ValueError(
                    f"{against}: of a model with {where.shape} layers and heads, the adapter has {mean.shape}"
                )
        print_extremes(found, mean, "mean scale")
        if where is not None:
            found["by_quadrant"] = {}
            for quadrant in (1, 2, 3, 4):
                if (mine := mean[where == quadrant]).size:
                    row = {"heads": mine.size, "lowered": int((mine < 1).sum()), "mean": float(np.mean(mine))}
                    found["by_quadrant"][str(quadrant)] = row
            for quadrant, row in found["by_quadrant"].items():
                print(
                    f"quadrant {quadrant}: {row['heads']} heads, {row['lowered']} lowered, mean scale {row['mean']:.3f}"
                )
        finish(found, out)


def print_extremes(found: dict[str, Any], values: Any, what: str, count: int = 5) -> None:
    """The heads with the greatest and the least values, shape (layers, heads)."""
    from rich.console import Console
    from rich.table import Table

    order = [divmod(int(flat), values.shape[1]) for flat in values.ravel().argsort()]
    table = Table(title=f"{found['model']}: {what}")
    for title in ("highest", "", "lowest", ""):
        table.add_column(title)
    for (low_layer, low_head), (high_layer, high_head) in list(zip(order, order[::-1], strict=True))[:count]:
        table.add_row(f"L{high_layer}H{high_head}", f"{values[high_layer, high_head]:+.3f}", f"L{low_layer}H{low_head}",
                      f"{values[low_layer, low_head]:+.3f}")  # fmt: skip
    Console().print(table)

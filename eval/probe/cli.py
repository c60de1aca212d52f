"""``seal probe``: the probes' commands. Each writes a JSON file and, beside it, a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from axolotl_plugins.common.environment import origin
from axolotl_plugins.common.io import check_output, write_text
from data_gen.tasks import Request, Task
from eval.cli_options import (
    OWN_TASK,
    BatchSize,
    ChatTemplate,
    Dtype,
    MaxNewTokens,
    Metric,
    TemplateArguments,
    TrustRemoteCode,
    load_options,
    parse_adapters,
    parse_heads,
    parse_lengths,
    parse_numbers,
)
from eval.results import title_of
from eval.resume import journal_file
from eval.spec import METRICS as SCORED
from eval.spec import EvalSpec, resolve_tasks, scored_task

if TYPE_CHECKING:
    from eval.probe.head_importance import MapRun

app = typer.Typer(no_args_is_help=True, help="Which heads and channels matter, and why SEAL works.")

Model = Annotated[str, typer.Option(help="Hub id, merged folder, or SEAL adapter folder.")]
Base = Annotated[str, typer.Option(help="The base model: hub id or folder.")]
TaskName = Annotated[str, typer.Option("--task", help=f"{', '.join(SCORED)}; or your own: {OWN_TASK}.")]
Lengths = Annotated[
    str,
    typer.Option(help="Longest samples in tokens: a middle and a long one, as 16000,31000; default, for a file only: "
                 "its rows' `length` or powers of two."),
]  # fmt: skip
TestLengths = Annotated[
    str, typer.Option(help="Longest test samples in tokens; default: the paper's fractions of the window.")
]
ValidationLengths = Annotated[
    str,
    typer.Option(help="Longest validation samples, in tokens; default: shortest and longest of the recipe's `tokens`, "
                 "and for a file as for `seal eval`."),
]  # fmt: skip
ValidationSamples = Annotated[
    str,
    typer.Option("--validation", help="Validation samples per length and task, disjoint from the test split, or a file "
                 "of them (.jsonl)."),
]  # fmt: skip
Samples = Annotated[
    int | None,
    typer.Option(min=1, help="Samples per length, from the training split, so that test samples stay unseen; default: "
                             "50, or all of a file."),
]  # fmt: skip
TestSamples = Annotated[int | None, typer.Option(min=1, help="Test samples per length; default: 50, or all of a file.")]
Out = Annotated[Path, typer.Option(help="Result file; a PNG lies beside it.")]
Score = Annotated[
    bool, typer.Option("--score/--no-score", help="Decode and score the answers, beside the log-probability of the "
                       "reference answer; without, a map takes a fraction of the time.")
]  # fmt: skip
Recipe = Annotated[Path, typer.Option(help="A SEAL recipe that describes its data.")]


def finish(result: dict[str, Any], out: Path, *journals: Path | None) -> None:
    """Write a result and where it comes from, with its plot, then remove its journals."""
    from eval.probe.probe_plots import DRAW
    from eval.score_plots import save_figure

    result = {**result, **origin()}
    save_figure(DRAW[result["kind"]](result), out.with_suffix(".png"))
    write_text(out, json.dumps(result, indent=1) + "\n")
    for journal in filter(None, journals):
        journal.unlink(missing_ok=True)
    print(f"{out} and {out.with_suffix('.png')}")


def read_task(task: str, metric: str | None, max_new_tokens: int | None, lengths: str) -> tuple[Task, list[int] | None]:
    """Return a task and the lengths to draw its samples at, before a model is loaded.

    Raises:
        ValueError: see ``scored_task``; or no lengths are given for a task whose samples are drawn.
    """
    own = scored_task(task, metric, max_new_tokens)
    if not lengths and own.rows is None:
        raise ValueError(f"lengths: missing: name the longest samples of {own.name}, in tokens, as 512,2048")
    return own, parse_lengths(lengths)


def start_map(
    kind: str, out: Path, model: str, task: tuple[Task, list[int] | None], samples: int | None, options: dict[str, Any],
    *identity: object, heads: Iterable[tuple[int, int]] = (),
) -> MapRun:  # fmt: skip
    """Load a model for a map, after lengths and heads were checked against its config.

    Args:
        kind: of the map.
        out: result file, beside which the map's values are cached.
        model: see ``load``.
        task: see ``read_task``.
        samples: per length.
        options: of ``load``.
        identity: what else determines the values.
        heads: layers and heads.

    Raises:
        ValueError: lengths or heads do not fit; or see ``load`` and ``MapRun``.
    """
    from axolotl_plugins.seal.model_loading import load
    from eval.probe.head_importance import MapRun, check_heads

    own, lengths = task
    journal = journal_file(out, model, kind, own.name, dict(own.identity), lengths, samples, *identity, options)
    empty = load(model, **options, weights=False)
    empty.check_lengths(lengths if own.rows is None else None)
    config = empty.model.config.get_text_config()
    check_heads(heads, config.num_hidden_layers, config.num_attention_heads)
    return MapRun(load(model, **options), own, lengths, samples=samples, journal=journal)


@app.command(epilog="Example: seal probe heads --model models/smollm2-135m --lengths 512,2048 --samples 50")
def heads(
    model: Model, lengths: Lengths = "", task: TaskName = "line", metric: Metric = None,
    max_new_tokens: MaxNewTokens = None, samples: Samples = None,
    batch: Annotated[int, typer.Option(min=1, help="Heads ablated in one batch; more need more memory.")] = 8,
    score: Score = True,
    dtype: Dtype = "auto", chat_template: ChatTemplate = None, chat_template_kwargs: TemplateArguments = None,
    trust_remote_code: TrustRemoteCode = False, out: Out = Path("results/probes/heads.json"),
) -> None:  # fmt: skip
    """Ablate every head, one at a time, and score the answers (Figure 2b). If interrupted, rerun it to resume."""
    from eval.probe.head_importance import ablation_map, changes

    options = load_options(chat_template, chat_template_kwargs, dtype=dtype, trust_remote_code=trust_remote_code)
    own = read_task(task, metric, max_new_tokens, lengths)
    probe = start_map("heads", out, model, own, samples, options, score)
    result = ablation_map(probe, batch=batch, score=score)
    longest, measure = result["lengths"][-1], "score" if score else "log-probability"
    print_extremes(model, changes(result, longest), f"change of the {measure} at {longest} tokens")
    finish(result, out, probe.cache.file)


@app.command(epilog="Example: seal probe channels --model models/smollm2-135m --heads L9H4 --lengths 2048")
def channels(
    model: Model,
    heads: Annotated[str, typer.Option(help="Heads whose channels are ablated one by one, as L1H18,L13H16.")],
    lengths: Lengths = "", task: TaskName = "line", metric: Metric = None, max_new_tokens: MaxNewTokens = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Samples per length; default: 20, or all of a file.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Channels ablated in one batch.")] = 8, score: Score = True,
    dtype: Dtype = "auto", chat_template: ChatTemplate = None, chat_template_kwargs: TemplateArguments = None,
    trust_remote_code: TrustRemoteCode = False, out: Out = Path("results/probes/channels.json"),
) -> None:  # fmt: skip
    """Ablate every channel of some heads, one at a time (Figure 2d)."""
    from eval.probe.head_importance import ablation_map

    own = read_task(task, metric, max_new_tokens, lengths)
    chosen = parse_heads(heads)
    if samples is None and own[0].rows is None:
        samples = 20
    options = load_options(chat_template, chat_template_kwargs, dtype=dtype, trust_remote_code=trust_remote_code)
    probe = start_map("channels", out, model, own, samples, options, score, chosen, heads=chosen)
    finish(ablation_map(probe, heads=chosen, batch=batch, score=score), out, probe.cache.file)


@app.command(epilog="Example: seal probe gradient --model models/smollm2-135m --lengths 512,2048 --samples 50")
def gradient(
    model: Model, lengths: Lengths = "", task: TaskName = "line", metric: Metric = None,
    max_new_tokens: MaxNewTokens = None, samples: Samples = None,
    points: Annotated[
        str, typer.Option(help="Common scales of a group's heads at which gradients are taken; each costs one pass.")
    ] = "1",
    groups: Annotated[
        int, typer.Option(min=1, help="Random groups of heads, each scaled with all others at 1; each costs one pass.")
    ] = 1,
    compare: Annotated[Path | None, typer.Option(help="Map of `heads` to compare with (Spearman).")] = None,
    dtype: Dtype = "auto", chat_template: ChatTemplate = None, chat_template_kwargs: TemplateArguments = None,
    trust_remote_code: TrustRemoteCode = False, out: Out = Path("results/probes/gradient.json"),
) -> None:  # fmt: skip
    """Predict the effect of ablating every head, from one forward and one backward pass per prompt."""
    from eval.probe.head_importance import agreement, changes, check_comparable, gradient_map, read_map

    own, scales = read_task(task, metric, max_new_tokens, lengths), parse_numbers(points, "points", float)
    exact = read_map(compare, model) if compare else None
    if exact:
        check_comparable(exact, *own, samples)
    options = load_options(chat_template, chat_template_kwargs, dtype=dtype, trust_remote_code=trust_remote_code)
    probe = start_map("gradient", out, model, own, samples, options, scales, groups)
    result = gradient_map(probe, points=tuple(scales), groups=groups)
    if exact is not None:
        result["spearman"] = agreement(exact, result)
        result["speedup"] = exact["seconds"] / max(result["seconds"], 0.1)
        print(f"Spearman's correlation with {compare}: {result['spearman']}; {result['speedup']:.0f} times faster")
    longest = result["lengths"][-1]
    print_extremes(model, changes(result, longest), f"predicted change of the log-probability at {longest} tokens")
    finish(result, out, probe.cache.file)


@app.command(epilog="Example: seal probe quadrants --model models/smollm2-135m --from results/probes/heads.json")
def quadrants(
    model: Model,
    source: Annotated[Path, typer.Option("--from", help="Map of `heads` or `gradient` at two lengths.")],
    down: Annotated[float, typer.Option(help="Scale of heads whose ablation helps at both lengths.")] = 0.9,
    up: Annotated[float, typer.Option(help="Scale of heads whose ablation hurts at both lengths.")] = 1.1,
    random: Annotated[int, typer.Option(min=0, help="Controls: the same scales on randomly chosen heads.")] = 0,
    task: Annotated[str, typer.Option(help=f"Default: the map's. Or another, or your own: {OWN_TASK}.")] = "",
    metric: Metric = None, max_new_tokens: MaxNewTokens = None, lengths: TestLengths = "", samples: TestSamples = None,
    batch_size: BatchSize = None, dtype: Dtype = "auto", chat_template: ChatTemplate = None,
    chat_template_kwargs: TemplateArguments = None, trust_remote_code: TrustRemoteCode = False,
    adapters: Annotated[Path, typer.Option(help="Folder for the SEAL-H adapters.")] = Path("outputs/quadrants"),
    out: Out = Path("results/probes/quadrants.json"),
) -> None:  # fmt: skip
    """Scale heads by their quadrant in a map, training nothing, and score all lengths (Figure 2c)."""
    from eval.probe.head_importance import read_map
    from eval.probe.quadrants import score_quadrants

    if not (0 < down < math.inf and 0 < up < math.inf):
        raise ValueError(f"down, up: found {down:g} and {up:g}, expected scales above 0")
    head_map = read_map(source, model)
    if not task and head_map["task"].endswith(".jsonl"):
        raise ValueError(f"task: missing: {source} is of {head_map['task']}; name a file of other samples to score")
    own = scored_task(task or head_map["task"], metric, max_new_tokens)
    result, journals = score_quadrants(
        model, head_map, own, down=down, up=up, random=random, adapters=adapters, out=out,
        options=load_options(chat_template, chat_template_kwargs, dtype=dtype, trust_remote_code=trust_remote_code),
        lengths=parse_lengths(lengths), samples=samples, batch_size=batch_size,
    )  # fmt: skip
    finish({**result, "map": str(source)}, out, *journals)


@app.command(
    epilog="Example: seal probe direct --model models/smollm2-135m --adapter outputs/smollm2_line_sealc --length 2048"
)
def direct(
    model: Base,
    adapter: Annotated[list[str], typer.Option(help="SEAL adapter folder; repeat it for more.")],
    length: Annotated[
        int | None, typer.Option(help="Longest sample, in tokens; default, for a file only: all its samples.")
    ] = None,
    task: TaskName = "line", metric: Metric = None, max_new_tokens: MaxNewTokens = None,
    find: Annotated[
        int, typer.Option(help="Samples to search for one that the base gets wrong and every adapter right.")
    ] = 100,
    normalised: Annotated[
        bool, typer.Option(help="Apply the final norm, so that effects sum to the logit; the paper omits it.")
    ] = False,
    dtype: Dtype = "auto", chat_template: ChatTemplate = None, chat_template_kwargs: TemplateArguments = None,
    trust_remote_code: TrustRemoteCode = False, out: Out = Path("results/probes/direct.json"),
) -> None:  # fmt: skip
    """Attribute the right and the wrong token's logits to heads and MLPs where answers diverge (Figure 4)."""
    from axolotl_plugins.seal.model_loading import load
    from eval.probe.hooks import wrap
    from eval.probe.logit_attribution import compare_models
    from eval.results import check_base

    check_output(out)
    own, _ = read_task(task, metric, max_new_tokens, str(length or ""))
    options = load_options(chat_template, chat_template_kwargs, dtype=dtype, trust_remote_code=trust_remote_code)
    models = [load(name, **options) for name in (model, *adapter)]
    for loaded in models:
        check_base(loaded, model)
        wrap(loaded.model)
    finish(compare_models(models, own, length, find, normalised), out)


@app.command(epilog="Example: seal probe transfer --model BASE --adapter line=outputs/a --adapter vt=outputs/b")
def transfer(
    model: Base,
    adapter: Annotated[list[str], typer.Option(help="NAME=FOLDER of a tuned adapter; once for each.")],
    tasks: Annotated[str, typer.Option(help="Tasks to score each adapter on, or files of samples.")] = "vt,cwe,fwe",
    metric: Metric = None, max_new_tokens: MaxNewTokens = None, lengths: TestLengths = "", samples: TestSamples = None,
    batch_size: BatchSize = None, dtype: Dtype = "auto", chat_template: ChatTemplate = None,
    chat_template_kwargs: TemplateArguments = None, trust_remote_code: TrustRemoteCode = False,
    out: Out = Path("results/probes/transfer.json"),
) -> None:  # fmt: skip
    """Score every adapter on every task: gain over the range of the base model's scores (equation 2, Figure 8)."""
    from eval.probe.transfer import score_transfer

    folders = parse_adapters(adapter)
    if "base" in folders:
        raise ValueError("adapter: found the name 'base', which is --model's: give it another")
    own = [*map(scored_task, resolve_tasks(tasks, EvalSpec(), metric=metric, max_new_tokens=max_new_tokens))]
    check_output(out)
    result, journals = score_transfer(
        model, folders, own, out=out,
        options=load_options(chat_template, chat_template_kwargs, dtype=dtype, trust_remote_code=trust_remote_code),
        lengths=parse_lengths(lengths), samples=samples, batch_size=batch_size,
    )  # fmt: skip
    finish(result, out, *journals)


@app.command(epilog="Example: seal probe sweep --recipe recipes/smollm2_line_sealh.yml --rates 0.01 --lengths 2048")
def sweep(
    recipe: Recipe, lengths: ValidationLengths = "",
    rates: Annotated[str, typer.Option(help="Learning rates.")] = "0.005,0.01,0.02,0.03",
    samples: Annotated[str, typer.Option(help="Numbers of samples; default: the recipe's.")] = "",
    epochs: Annotated[str, typer.Option(help="Passes over the samples.")] = "1",
    seeds: Annotated[str, typer.Option(help="Seeds of data and order.")] = "1",
    validation: ValidationSamples = "50", metric: Metric = None, max_new_tokens: MaxNewTokens = None,
    batch_size: BatchSize = None, dtype: Dtype = "auto", out: Out = Path("results/probes/sweep.json"),
) -> None:  # fmt: skip
    """Tune with every rate and number of samples, score on validation data, print the best (Table 7, Figure 9)."""
    from eval.probe.captions import sweep as caption
    from eval.probe.sweep import read_recipe
    from eval.probe.sweep import sweep as run_sweep

    grid: dict[str, Any] = {
        "rates": parse_numbers(rates, "rates", float),
        "samples": parse_numbers(samples, "samples") if samples else None,
        "epochs": parse_numbers(epochs, "epochs"), "seeds": parse_numbers(seeds, "seeds"),
    }  # fmt: skip
    settings = read_recipe(recipe) | {"dtype": dtype}
    held_out, token_lengths = read_validation(validation, metric, max_new_tokens, lengths, settings["requests"])
    journal = sweep_journal(out, "sweep", settings, recipe, held_out, token_lengths)
    result = run_sweep(settings, **grid, lengths=token_lengths, validation=held_out, batch_size=batch_size,
                       journal=journal)  # fmt: skip
    print_sweep(result)
    print(caption(result))
    finish(result, out, journal)


def read_validation(
    validation: str, metric: str | None, max_new_tokens: int | None, lengths: str, requests: list[Request]
) -> tuple[int | Task, list[int] | None]:
    """Return a number of validation samples, or the task of a file of them, and their lengths.

    Raises:
        ValueError: it is neither; or no lengths are given for samples that are drawn, and none are in the requests.
    """
    if not validation.isdecimal():
        try:
            return read_task(validation, metric, max_new_tokens, lengths)
        except ValueError as error:
            raise ValueError(f"validation: expected a number of samples or a file of them: {error}") from None
    if metric or max_new_tokens:
        raise ValueError("metric, max-new-tokens: only for a file of samples as --validation: leave them out")
    (count,) = parse_numbers(validation, "validation")
    if lengths:
        return count, parse_lengths(lengths)
    ranges = [request.token_range() for request in requests if request.tokens]
    if len(ranges) < len(requests):
        raise ValueError("lengths: missing: name the longest validation samples, in tokens, as 512,2048")
    # Of a mixture, lengths that all its tasks are trained at, if there are any.
    return count, sorted({max(low for low, _ in ranges), min(high for _, high in ranges)}) if ranges else None


def sweep_journal(
    out: Path, kind: str, settings: dict[str, Any], recipe: Path, held_out: int | Task, lengths: list[int] | None
) -> Path:
    """Return the file that caches scores of a recipe's scales on validation samples."""
    samples = held_out if isinstance(held_out, int) else (held_out.name, dict(held_out.identity))
    data = [dict(scored_task(request.task).identity) for request in settings["requests"]]
    return journal_file(out, settings["base_model"], kind, recipe.read_text(), settings["rows"], data,
                        settings["chat_template"], settings["dtype"], lengths, samples)  # fmt: skip


def print_sweep(result: dict[str, Any]) -> None:
    """Print scores by length, and least and greatest scales, of every combination of a sweep."""
    from rich.console import Console
    from rich.table import Table

    table = Table("rate", "samples", "epochs", "seed", title=f"{title_of(result)}: mean validation score")
    for length in (*result["lengths"], "mean"):
        table.add_column(str(length), justify="right")
    table.add_column("scales")
    base = list(result["base"].values())
    table.add_row("base", "", "", "", *(f"{score:.3f}" for score in (*base, sum(base) / len(base))), "1")
    for cell in result["cells"]:
        low, high = cell["scales"]
        scores = (f"{score:.3f}" for score in (*cell["scores"].values(), cell["mean"]))
        remark = " far from 1" if cell["unsound"] else ""
        table.add_row(f"{cell['rate']:g}", str(cell["samples"]), str(cell["epochs"]), str(cell["seed"]), *scores,
                      f"{low:.3g} to {high:.3g}{remark}")  # fmt: skip
    Console().print(table)


@app.command(epilog="Example: seal probe controls --recipe recipes/smollm2_line_sealc.yml --lengths 512,2048")
def controls(
    recipe: Recipe, lengths: ValidationLengths = "",
    seeds: Annotated[str, typer.Option(help="Seeds of data, order and shuffling.")] = "1,2,3",
    validation: ValidationSamples = "50", metric: Metric = None, max_new_tokens: MaxNewTokens = None,
    batch_size: BatchSize = None, dtype: Dtype = "auto", out: Out = Path("results/probes/controls.json"),
) -> None:  # fmt: skip
    """Score shuffled scales and scales tuned on wrong answers, which must not help if the gain is real."""
    from eval.probe.sweep import controls as run_controls
    from eval.probe.sweep import read_recipe

    settings = read_recipe(recipe) | {"dtype": dtype}
    held_out, token_lengths = read_validation(validation, metric, max_new_tokens, lengths, settings["requests"])
    journal = sweep_journal(out, "controls", settings, recipe, held_out, token_lengths)
    result = run_controls(settings, seeds=parse_numbers(seeds, "seeds"), lengths=token_lengths,
                          validation=held_out, batch_size=batch_size, journal=journal)  # fmt: skip
    finish(result, out, journal)


@app.command(epilog="Example: seal probe inspect --adapter outputs/smollm2_line_sealc --map results/probes/heads.json")
def inspect(
    adapter: Annotated[Path, typer.Option(help="SEAL adapter folder.")],
    against: Annotated[Path | None, typer.Option("--map", help="Map of `heads`, for scales by its quadrants.")] = None,
    out: Out = Path("results/probes/inspect.json"),
) -> None:
    """Show an adapter's scales: heads raised and lowered most, standard deviation over channels, overlap with a map."""
    import numpy as np

    from eval.probe.quadrants import scale_map

    check_output(out)
    result = scale_map(adapter, against)
    print_extremes(str(adapter), np.array(result["mean"]), "mean scale")
    for quadrant, row in result.get("by_quadrant", {}).items():
        print(f"quadrant {quadrant}: {row['heads']} heads, {row['lowered']} lowered, mean scale {row['mean']:.3f}")
    for length, correlation in result.get("spearman", {}).items():
        print(f"Spearman's correlation of scale and effect of ablation at {length} tokens: {correlation:.2f}")
    finish(result, out)


def print_extremes(model: str, values: Any, quantity: str) -> None:
    """Print the five heads with the greatest and the five with the least values, shape (layers, heads)."""
    from rich.console import Console
    from rich.table import Table

    order = [divmod(int(flat), values.shape[1]) for flat in values.ravel().argsort()]
    table = Table(title=f"{model}: {quantity}")
    for title in ("highest", "", "lowest", ""):
        table.add_column(title)
    for (low_layer, low_head), (high_layer, high_head) in list(zip(order, order[::-1], strict=True))[:5]:
        table.add_row(f"L{high_layer}H{high_head}", f"{values[high_layer, high_head]:+.3f}", f"L{low_layer}H{low_head}",
                      f"{values[low_layer, low_head]:+.3f}")  # fmt: skip
    Console().print(table)

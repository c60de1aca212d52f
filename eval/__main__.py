"""``python -m eval run``: scores of a model over lengths."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from axolotl_plugins.common.console import quiet_libraries, stop
from axolotl_plugins.common.console import run as run_app
from axolotl_plugins.common.io import load_yaml, write_text
from data_gen.dataset import remark
from data_gen.tasks import tasks_of, tasks_with
from eval.metrics import METRICS
from eval.probe.cli import adapters_named, numbers
from eval.probe.cli import app as probe
from eval.result_cache import check_replaced, journal_file, result_file, result_name

app = typer.Typer(add_completion=False, no_args_is_help=True)
app.add_typer(probe, name="probe")


@app.callback()
def main() -> None:
    """Score models on the tasks they are tuned for."""


SEAL_TASKS = tuple(METRICS)
LM_EVAL_TASKS = ("longbench", "mmlu")
# Options that only some tasks know.
OPTIONS = {
    **{option: tasks_with(option) for option in ("cases", "haystack", "depths")},
    "data": LM_EVAL_TASKS,
    "lengths": SEAL_TASKS,
    "shots": SEAL_TASKS,
}
GROUPS = {"ruler": tasks_of("ruler"), "all": (*SEAL_TASKS, *LM_EVAL_TASKS)}


def tasks_named(task: str, given: dict[str, Any]) -> tuple[str, ...]:
    """The tasks that a name stands for.

    Args:
        task: of one, or of a group of them.
        given: values of ``OPTIONS``, falsy where they were left out.

    Raises:
        ValueError: there is no such task, or none of them knows an option that was given.
    """
    tasks = GROUPS.get(task, (task,))
    if unknown := [name for name in tasks if name not in SEAL_TASKS + LM_EVAL_TASKS]:
        raise ValueError(
            f"task: found {unknown[0]!r}, expected one of {', '.join((*SEAL_TASKS, *LM_EVAL_TASKS, *GROUPS))}"
        )
    if given["data"] and len(tasks) > 1:
        raise ValueError("data: holds one benchmark, but several tasks are asked for: score them one by one")
    for option, knows in OPTIONS.items():
        if given[option] and not set(knows) & set(tasks):
            raise ValueError(f"{option}: {task} has no such option, only {' and '.join(knows)}")
    return tasks


def check_models(models: list[str], folders: dict[str, str], backend: str, model_config: Path | None) -> None:
    """What is scored must be said in one way, and be something that the backend can answer for.

    Raises:
        ValueError: it is not.
    """
    if bool(models) == bool(folders):
        raise ValueError("model: name one by --model, or adapters of one base by --adapter NAME=FOLDER")
    if folders and backend == "vllm":
        raise ValueError("backend: vllm serves merged models: name one by --model")
    if folders and model_config:
        raise ValueError("model-config: adapters bring their own: leave it out")
    if len(models) > 1 and backend == "vllm":
        raise ValueError("backend: vllm's server has one model: name one")


@app.command(
    epilog="Example: python -m eval run --model outputs/smollm2_line_sealc --lengths 512,1024,2048 --samples 100"
)
def run(
    model: Annotated[
        list[str] | None,
        typer.Option(help="Hub id, merged folder, or SEAL adapter folder; once for each where several are scored."),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FOLDER, once for each of several adapters of one base model, which is loaded once."),
    ] = None,
    task: Annotated[
        str,
        typer.Option(help=f"What to score: {', '.join((*SEAL_TASKS, *LM_EVAL_TASKS))}; ruler for its three, or all."),
    ] = "line",
    lengths: Annotated[
        str, typer.Option(help="Longest samples in tokens, as 512,2048; default: the paper's shares of the window.")
    ] = "",
    samples: Annotated[
        int | None,
        typer.Option(help="Samples per length, the paper's 50 if left out; for longbench and mmlu at most, or all."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="No more than so many samples of each length or set, for a first look.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the test samples.")] = 0,
    shots: Annotated[int, typer.Option(help="Worked examples before every prompt; the paper compares with one.")] = 0,
    shot_tokens: Annotated[int, typer.Option(help="Longest example, in tokens.")] = 1000,
    haystack: Annotated[
        str | None, typer.Option(help="For niah: folder of text files, or essays (hub); default: built-in prose.")
    ] = None,
    depths: Annotated[
        int | None, typer.Option(help="For niah: rows of the grid, from 0 to 100 per cent; default: ten.")
    ] = None,
    cases: Annotated[
        str | None, typer.Option(help="Folder of LongEval's published line cases, scored instead of samples of ours.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="For longbench or mmlu: folder with its files, instead of the hub.")
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="Jinja file, for base models without a template: see recipes/templates.")
    ] = None,
    model_config: Annotated[
        Path | None,
        typer.Option(help="A recipe whose `model_config` is to hold for a base model too: NTK, Self-Extend."),
    ] = None,
    backend: Annotated[
        Literal["hf", "vllm"], typer.Option(help="What answers: Transformers, or vLLM's server with a merged model.")
    ] = "hf",
    base_url: Annotated[
        str, typer.Option(help="For vllm: address of its endpoint; `vllm serve MODEL` starts it.")
    ] = "http://localhost:8000/v1",
    batch_size: Annotated[
        int | None, typer.Option(help="Prompts decoded together; default: as many as memory allows, 32 at most.")
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            help="Result file, ending in .json, or folder for TASK_MODEL.json, where _1shot and the like follow. "
            "A PNG lies beside it."
        ),
    ] = Path("results"),
    allow_contamination: Annotated[
        bool, typer.Option(help="Also score samples that the model was tuned on; the result says how many.")
    ] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the checkpoint.")] = False,
) -> None:
    """Score a model, and write a table, a JSON file and a picture."""
    quiet_libraries()
    given = {
        "cases": cases, "haystack": haystack, "depths": depths, "data": data, "lengths": lengths, "shots": shots,
    }  # fmt: skip
    counts = {"samples": samples, "limit": limit, "shot-tokens": shot_tokens, "batch-size": batch_size}
    try:
        tasks = tasks_named(task, given)
        for option, count, least in [*((name, count, 1) for name, count in counts.items()), ("shots", shots, 0)]:
            if count is not None and count < least:
                raise ValueError(f"{option}: found {count}, expected at least {least}")
        folders = adapters_named(adapter or [])
        check_models(model or [], folders, backend, model_config)
        # What is scored in another way has a file of its own.
        way = (f"_{shots}shot" if shots else "") + (f"_{model_config.stem}" if model_config else "")
        names = [name + way for name in folders or map(result_name, model or ())]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"model: {min(twice)} is named twice")
        one_file = out.suffix == ".json"
        if one_file and (results_asked := len(names) * len(tasks)) > 1:
            raise ValueError(f"out: {out} is one file, but {results_asked} results are asked for: name a folder")
        wanted = list(dict.fromkeys(numbers(lengths, "lengths"))) if lengths else None
        from axolotl_plugins.seal.model_loading import LoadedModel, check_name, load, load_each
        from eval import benchmarks
        from eval import run as ours
        from eval.table import print_scores, print_sets
        from eval.vllm_backend import connect

        options: dict[str, Any] = {"chat_template": chat_template, "trust_remote_code": trust_remote_code}
        changes = None
        if model_config:
            changes = load_yaml(model_config).get("model_config")
            if not isinstance(changes, dict):
                raise ValueError(f"model-config: {model_config} has no `model_config:` with settings under it")
        for named in model or ():
            check_name(named)
        models: Iterable[LoadedModel] = load_each(folders, **options)
        if model:
            models = (load(named, **options, model_config=changes, weights=backend == "hf") for named in model)
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in tasks}
        asked: dict[str, Any]
        journals: list[Path] = []
        most = [count for count in (samples, limit) if count is not None]
        for title, one in zip(names, models, strict=True):
            loaded = connect(one, base_url) if backend == "vllm" else one
            for name in tasks:
                path = out if one_file else result_file(out, name, title)
                journal = journal_file(path, loaded.name, backend, changes, chat_template)
                if name in LM_EVAL_TASKS:
                    asked = {"data": data, "limit": min(most, default=None)}
                else:
                    asked = {
                        "lengths": None if cases else wanted or ours.default_lengths(loaded.window),
                        "samples": min([samples or 50, *most]), "seed": seed, "shots": shots,
                        "shot_tokens": shot_tokens, "haystack": haystack if name in OPTIONS["haystack"] else None,
                        "depths": depths if name in OPTIONS["depths"] else None,
                        "cases": cases if name in OPTIONS["cases"] else None,
                    }  # fmt: skip
                check_replaced(path, asked)
                if name in LM_EVAL_TASKS:
                    result = benchmarks.run_benchmark(loaded, name, **asked, batch_size=batch_size, journal=journal)
                    write_text(path, json.dumps(result | {"asked": asked}, indent=1) + "\n")
                    print_sets(result)
                    print(path)
                else:
                    if not cases:
                        at = ", ".join(map(str, asked["lengths"]))
                        print(f"{name}: {asked['samples']} samples at each of {at} tokens")
                    result = ours.run(
                        loaded, name, **asked, batch_size=batch_size, journal=journal,
                        allow_contamination=allow_contamination,
                    )  # fmt: skip
                    ours.save(result | {"asked": asked}, path)
                    results[name].append(result)
                    print_scores([result])
                    print(f"{path} and {path.with_suffix('.png')}{remark(result['responses'])}")
                journals.append(journal)
        for journal in journals:  # not before all are done: what is killed does not score the first ones again
            journal.unlink(missing_ok=True)
        for together in results.values():
            if len(together) > 1:
                print_scores(together, names)
    except (ValueError, OSError) as error:
        stop("eval", error)


@app.command(epilog="Example: python -m eval report --results results --out results/report.html")
def report(
    results: Annotated[Path, typer.Option(help="Folder with the JSON files of `run`.")] = Path("results"),
    out: Annotated[Path, typer.Option(help="The page to write; it holds its pictures and needs no network.")] = Path(
        "results/report.html"
    ),
) -> None:
    """Gather results into one page: scores by length, needle grids, learned scales, beside the paper's numbers."""
    quiet_libraries()
    from eval.report import write_report

    try:
        count = write_report(results, out)
    except (ValueError, OSError) as error:
        stop("eval", error)
    print(f"{out}: {count} results")


if __name__ == "__main__":
    run_app(app, "python -m eval")

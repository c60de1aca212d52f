"""``seal eval``, ``report``, ``probe`` and ``push``, or ``python -m eval``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from axolotl_plugins.common.console import run as run_app
from axolotl_plugins.common.io import check_output
from data_gen.dataset import remark
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
    parse_lengths,
    parse_numbers,
    read_model_config,
)
from eval.probe.cli import app as probe
from eval.resume import result_file, result_name
from eval.spec import LM_EVAL_TASKS, SEAL_TASKS, EvalSpec, resolve_tasks

if TYPE_CHECKING:
    from axolotl_plugins.seal.model_loading import LoadedModel
    from eval.results import Result

app = typer.Typer(add_completion=False, no_args_is_help=True)
app.add_typer(probe, name="probe")

Models = Annotated[
    list[str] | None,
    typer.Option(help="Hub id, merged folder, or SEAL adapter folder; repeat it to score several."),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(help="NAME=FOLDER, once for each of several adapters of one base, which is loaded once."),
]
TaskName = Annotated[
    str,
    typer.Option("--task", help=f"What to score: {', '.join((*SEAL_TASKS, *LM_EVAL_TASKS))}; ruler for its three, all; "
                 f"or your own: {OWN_TASK}."),
]  # fmt: skip
Lengths = Annotated[
    str,
    typer.Option(help="Longest samples in tokens, as 512,2048; default: the paper's fractions of the window; of a "
                 "file, its rows' `length` or powers of two."),
]  # fmt: skip
Samples = Annotated[
    int | None,
    typer.Option(
        help="Samples per length, by default the paper's 50; for a file, longbench and mmlu at most, by default all."
    ),
]
Limit = Annotated[int | None, typer.Option(help="At most so many samples of each length or set, for a first look.")]
Seed = Annotated[int, typer.Option(help="Seed of the test samples.")]
Shots = Annotated[int, typer.Option(help="Worked examples before every prompt; the paper compares with one.")]
ShotTokens = Annotated[int, typer.Option(help="Longest example, in tokens.")]
Haystack = Annotated[
    str | None, typer.Option(help="For niah: folder of text files, or essays (hub); default: built-in prose.")
]
Depths = Annotated[int | None, typer.Option(help="For niah: rows of the grid, from 0 to 100 per cent; default: ten.")]
Cases = Annotated[
    str | None, typer.Option(help="Folder of LongEval's published line cases, scored instead of generated samples.")
]
Lines = Annotated[str, typer.Option(help="Files of --cases to score, by their number of lines, as 200,300.")]
RulerVersion = Annotated[
    int | None,
    typer.Option(help="For RULER's tasks: 2024 (the paper's) or 2025, text and steps as in NVIDIA's program then."),
]
Data = Annotated[str | None, typer.Option(help="For longbench or mmlu: folder with its files, instead of the hub.")]
ModelConfig = Annotated[
    Path | None, typer.Option(help="A recipe whose `model_config` applies to a base model too: NTK, Self-Extend.")
]
Backend = Annotated[
    Literal["hf", "vllm"], typer.Option(help="Answer with Transformers, or with vLLM's server of a merged model.")
]
BaseUrl = Annotated[str, typer.Option(help="For vllm: URL of its endpoint; `vllm serve MODEL` starts it.")]
Out = Annotated[
    Path,
    typer.Option(
        help="Result file, ending in .json, or folder for TASK_MODEL.json, where _1shot and the like follow. "
        "A PNG lies beside it."
    ),
]
AllowContamination = Annotated[
    bool, typer.Option(help="Also score samples that the model was tuned on; the result states how many.")
]


@app.callback()
def main() -> None:
    """Score models on the tasks they are tuned for."""


@app.command(epilog="Example: seal eval --model outputs/smollm2_line_sealc --lengths 512,1024,2048 --samples 100")
def run(
    model: Models = None, adapter: Adapters = None, task: TaskName = "line", metric: Metric = None,
    max_new_tokens: MaxNewTokens = None, lengths: Lengths = "", samples: Samples = None, limit: Limit = None,
    seed: Seed = 0, shots: Shots = 0, shot_tokens: ShotTokens = 1000, haystack: Haystack = None, depths: Depths = None,
    cases: Cases = None, lines: Lines = "", ruler_version: RulerVersion = None, data: Data = None,
    chat_template: ChatTemplate = None, chat_template_kwargs: TemplateArguments = None,
    model_config: ModelConfig = None, backend: Backend = "hf", base_url: BaseUrl = "http://localhost:8000/v1",
    dtype: Dtype = "auto", batch_size: BatchSize = None, out: Out = Path("results"),
    allow_contamination: AllowContamination = False, trust_remote_code: TrustRemoteCode = False,
) -> None:  # fmt: skip
    """Score a model, and write a table, a JSON file and a plot."""
    from eval.evaluate import evaluate, stored_results

    spec = EvalSpec(
        lengths=parse_lengths(lengths), samples=samples,
        limit=limit, seed=seed, shots=shots, shot_tokens=shot_tokens, haystack=haystack, depths=depths,
        ruler_version=ruler_version, data=data, batch_size=batch_size, allow_contamination=allow_contamination,
    )  # fmt: skip
    tasks = resolve_tasks(task, spec, metric=metric, max_new_tokens=max_new_tokens, cases=cases,
                          lines=parse_numbers(lines, "lines") if lines else None)  # fmt: skip
    names = [task.name for task in tasks]
    models, folders = model or [], parse_adapters(adapter or [])
    check_models(models, folders, backend, dtype, model_config)
    outputs = output_files(list(folders) or [result_name(name) for name in models], names, out, shots, model_config)
    options = load_options(chat_template, chat_template_kwargs, trust_remote_code=trust_remote_code,
                           model_config=read_model_config(model_config) if model_config else None)  # fmt: skip
    # With several models the first one's dtype is that of all.
    key = (backend, options, models[:1] if dtype == "auto" else dtype)
    results = stored_results(list(folders.values()) or models, tasks, spec, outputs.values(), key, print_result)
    if results:
        print("scored before; remove the result files to score again")
    else:
        if data:
            from eval.benchmarks import task_configs

            task_configs(names[0], data)
        drawn = spec.lengths if any(task.rows is None for task in tasks) else None
        check_before_loading(models or folders.values(), drawn, outputs, **options)
        results = evaluate(
            load_models(models, folders, base_url if backend == "vllm" else None, dtype=dtype, **options),
            tasks, spec, outputs=outputs.values(), cache_key=key, on_start=print_start, on_result=print_result,
        )  # fmt: skip
    print_comparisons(results, names, list(outputs), out)


def check_models(
    models: list[str], folders: dict[str, str], backend: str, dtype: str, model_config: Path | None
) -> None:
    """Check that models are named in one way, which the backend supports.

    Raises:
        ValueError: they are not.
    """
    if bool(models) == bool(folders):
        raise ValueError("model: name one by --model, or adapters of one base by --adapter NAME=FOLDER")
    if folders and backend == "vllm":
        raise ValueError("backend: vllm serves merged models: name one by --model")
    if dtype != "auto" and backend == "vllm":
        raise ValueError("dtype: vllm's server has its own: leave it out, and start `vllm serve` with another")
    if folders and model_config:
        raise ValueError("model-config: adapters bring their own: leave it out")
    if len(models) > 1 and backend == "vllm":
        raise ValueError("backend: vllm's server has one model: name one")


def check_before_loading(
    names: Iterable[str], lengths: list[int] | None, outputs: dict[str, dict[str, Path]], **options: Any
) -> None:
    """Check every model but its weights, by options of ``load``, and every output, before time is spent on any.

    Raises:
        ValueError: a model is missing or cannot be loaded, its window is shorter than the lengths of samples that are
            drawn, or an output cannot be written.
    """
    from axolotl_plugins.seal.model_loading import load

    for files in outputs.values():
        for file in files.values():
            check_output(file)
    for name in names:
        load(name, weights=False, **options).check_lengths(lengths)


def output_files(
    names: list[str], tasks: list[str], out: Path, shots: int, model_config: Path | None
) -> dict[str, dict[str, Path]]:
    """Return result files by model and task; a model's name gets a suffix for shots and config.

    Raises:
        ValueError: two models have the same name, or ``out`` is one file for several results.
    """
    suffix = (f"_{shots}shot" if shots else "") + (f"_{model_config.stem}" if model_config else "")
    names = [name + suffix for name in names]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"model: {min(repeated)} is named twice")
    one_file = out.suffix == ".json"
    if one_file and (count := len(names) * len(tasks)) > 1:
        raise ValueError(f"out: {out} is one file, but {count} results are asked for: name a folder")
    return {name: {task: out if one_file else result_file(out, task, name) for task in tasks} for name in names}


def load_models(
    models: list[str], folders: dict[str, str], server: str | None, *, dtype: str = "auto", **options: Any
) -> Iterator[LoadedModel]:
    """Load models, or adapters of one base model, one after the other, all in one dtype, by options of ``load``.

    The dtype ``auto`` is the first base checkpoint's. With the URL of a vLLM server no weights are loaded.

    Raises:
        ValueError: when its turn comes, see ``load`` and ``connect``.
    """
    from axolotl_plugins.seal.model_loading import load, load_each

    if folders:
        yield from load_each(folders, dtype=dtype, **options)
    for name in models:
        if server is not None:
            from eval.vllm_backend import connect

            yield connect(load(name, weights=False, **options), server)
        else:
            loaded = load(name, dtype=dtype, **options)
            dtype = str(loaded.dtype)
            yield loaded
            del loaded


def print_start(task: str, options: dict[str, Any]) -> None:
    """Print how many samples are scored at which lengths."""
    if options.get("lengths"):
        count = options["samples"] or "all"
        print(f"{task}: {count} samples at each of {', '.join(map(str, options['lengths']))} tokens")


def print_result(result: Result, path: Path | None) -> None:
    """Print a result and the files that hold it."""
    from eval.result_tables import print_scores, print_sets
    from eval.results import BenchmarkResult

    assert path is not None
    if isinstance(result, BenchmarkResult):
        print_sets(result)
        print(path)
    else:
        print_scores([result])
        print(f"{path} and {path.with_suffix('.png')}{remark(result.responses)}")


def print_comparisons(results: list[Result], tasks: list[str], names: list[str], folder: Path) -> None:
    """Print and draw the scores of several models side by side, a table and a picture per task."""
    from eval.result_tables import print_scores
    from eval.results import EvalResult
    from eval.score_plots import accuracy_by_length

    for task in tasks:
        rows = [result for result in results if isinstance(result, EvalResult) and result.task == task]
        if len(rows) > 1:
            print_scores(rows, names)
            accuracy_by_length(rows, picture := result_file(folder, task, "models").with_suffix(".png"))
            print(picture)


@app.command(epilog="Example: seal report --results results --out results/report.html")
def report(
    results: Annotated[Path, typer.Option(help="Folder with the JSON files of `run`.")] = Path("results"),
    out: Annotated[Path, typer.Option(help="The page to write, with its figures embedded.")] = Path(
        "results/report.html"
    ),
) -> None:
    """Gather results into one page: scores by length, needle grids, scales, beside the paper's numbers."""
    from eval.report import write_report

    count = write_report(results, out)
    print(f"{out}: {count} results")


@app.command(epilog="Example: seal push outputs/smollm2_line_sealc me/smollm2-sealc --private")
def push(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    repository: Annotated[str | None, typer.Argument(help="Hub id; without it, only the card is written.")] = None,
    results: Annotated[Path, typer.Option(help="Folder with results of `seal eval`.")] = Path("results"),
    private: Annotated[bool, typer.Option(help="Make a new repository private.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the card and the files to upload; write and upload nothing.")
    ] = False,
) -> None:
    """Write a model card (method, data, scores and the paper's) into an adapter's folder, and upload the folder."""
    from axolotl_plugins.common.io import write_text
    from axolotl_plugins.seal.model_card import card, uploaded_files
    from axolotl_plugins.seal.model_card import push as upload
    from eval.result_tables import score_tables

    scores = score_tables(results, str(adapter))
    if dry_run:
        print(card(adapter, scores))
        files = sorted({"README.md", *(str(file.relative_to(adapter)) for file in uploaded_files(adapter))})
        print(f"{repository or adapter}: would have {', '.join(files)}")
    elif repository is None:
        write_text(adapter / "README.md", card(adapter, scores))
        print(adapter / "README.md")
    else:
        print(upload(adapter, repository, scores, private=private))


if __name__ == "__main__":
    run_app(app, "python -m eval")

"""Score lm-eval's own tasks that the paper reports: LongBench's document QA (Table 6) and MMLU (section 5.2)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager, get_task_dict

from axolotl_plugins.common.console import first_line
from axolotl_plugins.common.tokenizer import as_messages, count_tokens
from axolotl_plugins.seal.model_loading import LoadedModel
from data_gen.tasks.longbench import formatted_prompt
from eval.results import BenchmarkResult, SetScore
from eval.score_by_length import harness_for
from eval.vllm_backend import Served

LONGBENCH = (
    "multifieldqa_en", "multifieldqa_zh", "narrativeqa", "qasper", "hotpotqa", "2wikimqa", "musique", "dureader",
)  # fmt: skip
SHOTS = {"longbench": 0, "mmlu": 5}
# Variants of MMLU in lm-eval, whose names share its prefix.
MMLU_VARIANTS = tuple(
    f"mmlu_{kind}" for kind in ("flan", "continuation", "generative", "llama", "pro", "prox", "redux")
)


def task_configs(group: str, data: str | None) -> list[dict[str, Any]]:
    """Return the configs of a group's lm-eval tasks, read from the hub or from local files.

    Args:
        group: ``longbench`` or ``mmlu``.
        data: folder with LongBench's ``NAME.jsonl`` or with a copy of ``cais/mmlu`` (``SUBJECT/test-*.parquet``).

    Raises:
        ValueError: the folder lacks a file.
    """
    if group == "longbench":
        configs = []
        for name in LONGBENCH:
            config: dict[str, Any] = {"task": f"longbench_{name}"}
            if data is not None:
                file = Path(data) / f"{name}.jsonl"
                if not file.is_file():
                    raise ValueError(f"data: {file} is missing: name the folder with LongBench's jsonl files")
                files = {"data_files": {"test": str(file)}}
                config |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": files}
                # LongBench's own files have another name for the question than lm-eval.
                config["process_docs"] = lambda rows: (
                    rows if "question" in rows.column_names else rows.rename_column("input", "question")
                )
            configs.append(config)
        return configs
    names = [name for name in TaskManager().all_subtasks if name.startswith("mmlu_")]
    names = [name for name in names if not name.startswith(MMLU_VARIANTS)]
    if data is None:
        return [{"task": name} for name in names]
    configs = []
    for name in names:
        folder = Path(data) / name.removeprefix("mmlu_")
        if folder.is_dir():
            parts = {split: str(folder / f"{split}-*.parquet") for split in ("test", "dev")}
            local: dict[str, Any] = {"dataset_path": "parquet", "dataset_name": None}
            configs.append({"task": name, **local, "dataset_kwargs": {"data_files": parts}})
    if not configs:
        raise ValueError(f"data: no subject of MMLU in {data}: name a copy of cais/mmlu")
    return configs


def longbench_prompts(task: Any, loaded: LoadedModel, budget: int) -> list[int]:
    """Make a task render LongBench's prompts whatever the source, and truncate them in the middle as LongBench does.

    The chat template is applied afterwards. LongBench's own program leaves LongChat 31,500 tokens
    (``model2maxlen.json``); here ``budget`` tokens stay.

    Returns:
        A list to which the full length of every truncated prompt will be appended.
    """
    doc_to_text, truncated = task.doc_to_text, []

    def shortened(document: dict[str, Any], *arguments: Any) -> str:
        text = formatted_prompt(document) or doc_to_text(document, *arguments)
        ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) <= budget:
            return text
        truncated.append(len(ids))
        decode = lambda part: loaded.tokenizer.decode(part, skip_special_tokens=True)  # noqa: E731
        return decode(ids[: budget // 2]) + decode(ids[-(budget // 2) :])

    task.doc_to_text = shortened
    return truncated


def run_benchmark(
    loaded: LoadedModel, group: str, *, data: str | None = None, limit: int | None = None,
    batch_size: int | None = None, journal: Path | None = None,
) -> BenchmarkResult:  # fmt: skip
    """Score a model on a group of lm-eval's tasks: ``longbench`` or ``mmlu``.

    ``data`` is that of ``task_configs``, ``limit`` (None: all) of each set, other arguments as in ``harness_for``.

    Raises:
        ValueError: see ``task_configs``; or MMLU is requested from a server.
    """
    if group == "mmlu" and isinstance(loaded, Served):
        raise ValueError("backend: mmlu compares probabilities, which a server does not return for prompts: use hf")
    configs = task_configs(group, data)
    try:
        tasks = get_task_dict(configs, TaskManager())
    except Exception as error:  # the libraries below raise a dozen types for one cause
        source = f"read from {data}" if data else "fetched from the hub: name a folder with --data"
        raise ValueError(f"data: {group} cannot be {source} ({first_line(error)})") from error
    harness = harness_for(loaded, batch_size, journal, add_bos_token=group != "longbench")
    truncated = {}
    for name, task in tasks.items():
        if group == "longbench":
            template = count_tokens(loaded.tokenizer, as_messages("", ""))
            budget = loaded.window - template - task.config.generation_kwargs["max_gen_toks"]
            # Eight tokens spare: the joined halves may tokenize differently.
            truncated[name] = longbench_prompts(task, loaded, budget - 8)
    output = simple_evaluate(
        model=harness, tasks=list(tasks.values()), apply_chat_template=group == "longbench", limit=limit,
        num_fewshot=SHOTS[group],
        bootstrap_iters=1,  # any number but 0: standard errors of means are closed-form
    )  # fmt: skip
    sets = [set_score(output, group, name, len(truncated.get(name, []))) for name in tasks]
    return BenchmarkResult(
        model=loaded.name, base=loaded.base, method=loaded.method, task=group, window=loaded.window,
        dtype=loaded.dtype, sets=sets, mean=round(sum(row.score for row in sets) / len(sets), 4),
    )  # fmt: skip


def set_score(output: dict[str, Any], group: str, name: str, truncated: int) -> SetScore:
    """Return the score of one set in per cent, from lm-eval's output."""
    metric = "score" if group == "longbench" else "acc"  # both in [0, 1]
    values = output["results"][name]
    score, error = 100 * values[f"{metric},none"], values.get(f"{metric}_stderr,none")
    margin = 196 * error if isinstance(error, float) and not math.isnan(error) else None
    return SetScore(
        name=name.removeprefix(f"{group}_"), count=output["n-samples"][name]["effective"], score=round(score, 4),
        low=None if margin is None else round(max(0.0, score - margin), 2),
        high=None if margin is None else round(min(100.0, score + margin), 2),
        cut=truncated,
    )  # fmt: skip

"""lm-eval's own tasks that the paper reports: LongBench's document QA (Table 6) and MMLU (section 5.2)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager, get_task_dict

from axolotl_plugins.common.console import first_line
from axolotl_plugins.common.tokenizer import as_messages, count_tokens
from axolotl_plugins.seal.model_loading import LoadedModel
from eval.run import harness_for
from eval.vllm_backend import Served

LONGBENCH = (
    "multifieldqa_en", "multifieldqa_zh", "narrativeqa", "qasper", "hotpotqa", "2wikimqa", "musique", "dureader",
)  # fmt: skip
SHOTS = {"longbench": 0, "mmlu": 5}
# MMLU's many other wordings in lm-eval have names that begin alike.
OTHER_WORDINGS = tuple(
    f"mmlu_{kind}" for kind in ("flan", "continuation", "generative", "llama", "pro", "prox", "redux")
)


def with_question(rows: Dataset) -> Dataset:
    """LongBench's own files call ``input`` what lm-eval's copy calls a question."""
    return rows.rename_column("input", "question") if "question" not in rows.column_names else rows


def task_configs(group: str, data: str | None) -> list[dict[str, Any]]:
    """lm-eval's tasks of a group, from the hub or from local files.

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
                config["process_docs"] = with_question
            configs.append(config)
        return configs
    names = [name for name in TaskManager().all_subtasks if name.startswith("mmlu_")]
    names = [name for name in names if not name.startswith(OTHER_WORDINGS)]
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


def cut_in_the_middle(task: Any, loaded: LoadedModel, room: int) -> list[int]:
    """Make a task shorten prompts as LongBench does: tokens go from the middle, before the chat template comes on.

    Its own program leaves LongChat 31,500 tokens (``model2maxlen.json``); here whatever fits into the window stays.

    Args:
        task: an lm-eval task, which is changed.
        loaded: whose tokenizer counts.
        room: most tokens of a prompt.

    Returns:
        A list that will hold the full length of every prompt that was cut.
    """
    plain, cut = task.doc_to_text, []

    def shortened(document: dict[str, Any], *arguments: Any) -> str:
        text = plain(document, *arguments)
        ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) <= room:
            return text
        cut.append(len(ids))
        decode = lambda part: loaded.tokenizer.decode(part, skip_special_tokens=True)  # noqa: E731
        return decode(ids[: room // 2]) + decode(ids[-(room // 2) :])

    task.doc_to_text = shortened
    return cut


def run_benchmark(
    loaded: LoadedModel, group: str, *, data: str | None = None, limit: int | None = None,
    batch_size: int | None = None, journal: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Score a model on a group of lm-eval's tasks.

    Args:
        loaded: the model with its tokenizer.
        group: ``longbench`` or ``mmlu``.
        data: see ``task_configs``.
        limit: samples of each set; None means all.
        batch_size: prompts decoded together; None takes what memory allows.
        journal: see ``eval.run.run``.

    Returns:
        ``model``, ``base``, ``method``, ``task``, ``window``; ``sets``, one entry per set with ``name``, ``count``,
        ``score`` in per cent, its 95 % interval ``low`` and ``high`` where lm-eval knows the error, and ``cut`` (how
        many prompts were shortened in the middle); and ``mean``.

    Raises:
        ValueError: see ``task_configs``; or a server is asked for MMLU.
    """
    if group == "mmlu" and isinstance(loaded, Served):
        raise ValueError("backend: mmlu compares probabilities, which a server does not give of prompts: use hf")
    configs = task_configs(group, data)
    try:
        tasks = get_task_dict(configs, TaskManager())
    except Exception as error:  # the libraries below raise a dozen kinds for one cause
        where = f"read from {data}" if data else "fetched from the hub: name a folder with --data"
        raise ValueError(f"data: {group} cannot be {where} ({first_line(error)})") from error
    harness = harness_for(loaded, batch_size, journal, add_bos_token=group != "longbench")
    cut = {}
    for name, task in tasks.items():
        if group == "longbench":
            frame = count_tokens(loaded.tokenizer, as_messages("", ""))
            room = loaded.window - frame - task.config.generation_kwargs["max_gen_toks"]
            # Cut ends may join into other tokens.
            cut[name] = cut_in_the_middle(task, loaded, room - 8)
    results = simple_evaluate(
        model=harness, tasks=list(tasks.values()), apply_chat_template=group == "longbench", limit=limit,
        num_fewshot=SHOTS[group],
        bootstrap_iters=1,  # any number but 0: errors of means are computed, not drawn
    )  # fmt: skip
    metric = "score" if group == "longbench" else "acc"  # both in [0, 1]
    sets = []
    for name in tasks:
        found, count = results["results"][name], results["n-samples"][name]["effective"]
        score = 100 * found[f"{metric},none"]
        deviation = found.get(f"{metric}_stderr,none")
        spread = 196 * deviation if isinstance(deviation, float) and not math.isnan(deviation) else None
        sets.append({
            "name": name.removeprefix(f"{group}_"),
            "count": count,
            "score": round(score, 4),
            "low": None if spread is None else round(max(0.0, score - spread), 2),
            "high": None if spread is None else round(min(100.0, score + spread), 2),
            "cut": len(cut.get(name, [])),
        })  # fmt: skip
    return {
        "model": loaded.name,
        "base": loaded.base,
        "method": loaded.method,
        "task": group,
        "window": loaded.window,
        "sets": sets,
        "mean": round(sum(row["score"] for row in sets) / len(sets), 4),
    }

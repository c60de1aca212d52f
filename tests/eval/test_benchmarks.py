"""LongBench and MMLU through lm-eval's own tasks, from local files."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset
from paths import FIXTURES, TINY
from typer.testing import CliRunner

from axolotl_plugins.seal.model_loading import load
from eval import generation
from eval.__main__ import app
from eval.benchmarks import LONGBENCH, run_benchmark
from eval.lm_eval_model import Harness

QUESTION = "What does the garden keep?"


@pytest.fixture
def longbench(tmp_path):
    """The eight sets in LongBench's own form: one short sample, one that is longer than the window."""
    for name in LONGBENCH:
        rows = [
            {"context": "The garden keeps a letter. " * n, "input": QUESTION, "answers": ["a letter"],
             "length": n, "dataset": name, "language": "en", "all_classes": None, "_id": str(n)}
            for n in (3, 900)
        ]  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_longbench_is_truncated_in_the_middle_and_states_so(longbench, monkeypatch):
    prompts, budgets = [], set()
    loaded = load(TINY)
    answer_all, generate = Harness.answer_all, generation.generate_answers

    def ask(harness, requests, quiet):
        prompts.extend(harness.tok_encode(request.args[0]) for request in requests)
        answer_all(harness, requests, quiet)

    def record_budget(model, ids, **settings):
        budgets.add(settings["max_new_tokens"])
        return generate(model, ids, **settings)

    monkeypatch.setattr(Harness, "answer_all", ask)
    monkeypatch.setattr("eval.lm_eval_model.generate_answers", record_budget)
    result = run_benchmark(loaded, "longbench", data=str(longbench))
    assert [row.name for row in result.sets] == list(LONGBENCH)
    assert all((row.count, row.cut) == (2, 1) for row in result.sets)
    assert all(0 <= row.score <= 100 for row in result.sets)
    assert len(prompts) == 16 and max(map(len, prompts)) < 2048
    assert budgets == {32, 64, 128}  # each set has its own
    longest = loaded.tokenizer.decode(max(prompts, key=len))
    assert QUESTION in longest and longest.startswith("<s><|user|>")
    (longbench / "qasper.jsonl").unlink()
    with pytest.raises(ValueError, match=r"qasper.jsonl is missing"):
        run_benchmark(loaded, "longbench", data=str(longbench))


ORIGINALS = [json.loads(row) for row in (FIXTURES / "longbench.jsonl").read_text().splitlines()]


def test_longbench_is_asked_and_scored_as_by_its_own_programs():
    """Prompts and over 50 scores of each metric, recorded from THUDM/LongBench's files."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.longbench import metrics
    from lm_eval.utils import apply_template

    manager = TaskManager()
    for row in (row for row in ORIGINALS if "set" in row):
        config = manager._get_config(f"longbench_{row['set']}")
        assert apply_template(config["doc_to_text"], row) == row["prompt"]
    score = {
        "qa_f1_score": metrics.get_qa_f1_with_score,
        "qa_f1_zh_score": metrics.get_qa_f1_zh_with_score,
        "rouge_zh_score": metrics.get_rouge_zh_with_score,
    }
    for metric, function in score.items():
        rows = [row for row in ORIGINALS if row.get("metric") == metric]
        assert len(rows) > 50 and len({row["score"] for row in rows}) > 5
        for row in rows:
            assert function(row, [row["response"]])["score"] == pytest.approx(row["score"])


# Rows of LongBench's own files, as the script behind the hub's formatted copy writes them, and the original's prompts.
FORMATTED = [json.loads(row) for row in (FIXTURES / "longbench_formatted.jsonl").read_text().splitlines()]


def test_longbench_has_the_originals_prompts_from_either_source(tmp_path, monkeypatch):
    prompts, sets = {}, {row["set"]: row for row in FORMATTED if row["set"] in LONGBENCH}
    assert set(sets) == set(LONGBENCH)

    monkeypatch.setattr(Harness, "generate_until", lambda harness, requests, **_: [
        prompts.setdefault(request.doc["dataset"], []).append(request.args[0]) or "a letter" for request in requests
    ])  # fmt: skip
    loaded = load(TINY)
    for source in ("original", "formatted"):
        folder = tmp_path / source
        folder.mkdir()
        for name, row in sets.items():
            (folder / f"{name}.jsonl").write_text(json.dumps(row[source]) + "\n")
        assert run_benchmark(loaded, "longbench", data=str(folder)).mean == 100
    for name, row in sets.items():
        expected = f"<s><|user|>{row['prompt']}<|assistant|>"
        assert prompts[name] == [expected, expected], name


def test_longbench_is_scored_in_per_cent_as_the_paper_does(longbench, monkeypatch):
    """A model that always says the answer has 100."""
    monkeypatch.setattr(Harness, "generate_until", lambda harness, requests, **_: ["a letter"] * len(requests))
    result = run_benchmark(load(TINY), "longbench", data=str(longbench))
    assert result.mean == 100 and {row.score for row in result.sets} == {100}


def test_mmlu_is_scored_by_the_likelihood_of_letters_with_five_examples(tmp_path):
    rows = {"question": ["Which?"] * 6, "subject": ["s"] * 6, "choices": [["a", "b", "c", "d"]] * 6,
            "answer": [0, 1, 2, 3, 0, 1]}  # fmt: skip
    for subject in ("astronomy", "virology"):
        for split in ("test", "dev"):
            Dataset.from_dict(rows).to_parquet(tmp_path / subject / f"{split}-00000-of-00001.parquet")
    result = run_benchmark(load(TINY), "mmlu", data=str(tmp_path), limit=4)
    assert [(row.name, row.count) for row in result.sets] == [("astronomy", 4), ("virology", 4)]
    assert all(row.low <= row.score <= row.high for row in result.sets)
    assert result.mean == pytest.approx(sum(row.score for row in result.sets) / 2)
    with pytest.raises(ValueError, match="no subject of MMLU in"):
        run_benchmark(load(TINY), "mmlu", data=str(tmp_path / "nothing"))


@pytest.mark.parametrize(("task", "message"), [("mmlu", "data: no subject of MMLU in"),
                                               ("longbench", "multifieldqa_en.jsonl is missing")])  # fmt: skip
def test_a_folder_without_a_benchmarks_files_is_refused_before_a_model_is_loaded(task, message, tmp_path, monkeypatch):
    monkeypatch.setattr("axolotl_plugins.seal.model_loading.load", lambda *a, **k: pytest.fail("loaded"))
    command = ["run", "--model", str(TINY), "--task", task, "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, command)
    assert message in str(result.exception)

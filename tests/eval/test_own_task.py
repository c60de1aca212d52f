"""A file of samples is a task of eval and probes: same scores as the task that drew it, resumed, contamination seen."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from paths import ROOT, TINY

from axolotl_plugins.common.tokenizer import as_messages
from axolotl_plugins.seal.model_loading import load
from axolotl_plugins.seal.provenance import text_hash
from data_gen.dataset import Request, draw, generate
from data_gen.file_task import file_task
from data_gen.tasks import resolve_task
from eval.evaluate import evaluate
from eval.lm_eval_model import Harness, lm_eval_task
from eval.probe.head_importance import PROBE_SEED, MapRun, gradient_map
from eval.probe.logit_attribution import compare_models
from eval.probe.sweep import read_recipe, sweep
from eval.result_tables import score_tables
from eval.results import read_results
from eval.score_by_length import score_by_length
from eval.score_samples import prompt_ids, score_samples
from eval.spec import EvalSpec, resolve_tasks

LENGTHS = [512, 900, 1500]


@pytest.fixture(scope="module")
def loaded():
    return load(TINY)


@pytest.fixture(scope="module")
def file(loaded, tmp_path_factory):
    """Test samples of the line task as a user would have them: chats, and nothing else."""
    path = tmp_path_factory.mktemp("own") / "test.jsonl"
    rows = [{"messages": row["messages"]} for length in LENGTHS
            for row in draw(Request("line", str(length), samples=4, split="test"), loaded.tokenizer)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_file_scores_as_the_task_that_drew_it(loaded, file):
    line = score_by_length(loaded, "line", lengths=LENGTHS, samples=4)
    own = score_by_length(loaded, file_task(file, "last_integer"), lengths=LENGTHS)
    assert [(row.length, row.score, row.count, row.low, row.high) for row in own.scores] == [
        (row.length, row.score, row.count, row.low, row.high) for row in line.scores
    ]
    assert [row["response"] for row in own.responses] == [row["response"] for row in line.responses]
    assert 0 < line.mean.score < 1 and own.mean == line.mean
    powers = score_by_length(loaded, file_task(file, "last_integer"))
    assert [(row.length, row.count) for row in powers.scores] == [(512, 4), (1024, 4), (2048, 4)]


def test_the_command_line_scores_a_file_and_resumes(file, tmp_path):
    command = [sys.executable, "-m", "eval", "run", "--model", str(TINY), "--task", str(file), "--metric",
               "last_integer", "--max-new-tokens", "30", "--samples", "2", "--out", str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (result,) = read_results(tmp_path)
    assert result.task == str(file) and result.asked["metric"] == "last_integer" and len(result.responses) == 6
    assert all(path.suffix in (".json", ".png") for path in tmp_path.iterdir()) and len(list(tmp_path.iterdir())) == 2
    section = score_tables(tmp_path, str(TINY))[0]
    assert section.startswith(f"### {file}") and "| 2,048 |" in section
    other = subprocess.run(
        [*command[:-4], "--metric", "exact", *command[-2:]], cwd=ROOT, capture_output=True, text=True
    )
    assert "holds a result of other samples (samples: 2, now None)" in other.stderr


def test_of_several_tasks_only_files_of_samples_get_a_metric(file):
    line, own = resolve_tasks(f"line, {file}", EvalSpec(), metric="exact", max_new_tokens=7)
    assert line == resolve_task("line") and own.identity["metric"] == "exact" and own.max_new_tokens == 7
    with pytest.raises(ValueError, match="metric: line has its own; only a file of samples"):
        resolve_tasks("line,vt", EvalSpec(), metric="exact")


def test_an_interrupted_run_on_a_file_resumes(loaded, file, tmp_path):
    task, journal = file_task(file, "last_integer"), tmp_path / "journal"
    whole = score_by_length(loaded, task, samples=1, journal=journal)
    rows = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(rows[0] + rows[1][:20])
    assert score_by_length(loaded, task, samples=1, journal=journal) == whole
    assert sorted(journal.read_bytes().splitlines(keepends=True)) == sorted(rows)


def test_a_result_of_another_file_or_metric_is_not_replaced(loaded, file, tmp_path):
    def score(path, metric):
        task = file_task(path, metric, 5)
        return evaluate([loaded], [task], EvalSpec(limit=1), outputs=[{task.name: tmp_path / "result.json"}])

    score(file, "last_integer")
    with pytest.raises(ValueError, match=r"other samples \(metric: 'last_integer', now 'contains'\)"):
        score(file, "contains")
    changed = tmp_path / "test.jsonl"
    changed.write_text(file.read_text() + "\n")
    with pytest.raises(ValueError, match=r"other samples \(file_sha256"):
        score(changed, "last_integer")


def test_a_result_is_scored_again_once_the_users_metric_has_changed(loaded, file, tmp_path, monkeypatch):
    def score():
        task = file_task(file, "changing_metric:score", 5)
        spec, outputs = EvalSpec(samples=1), [{str(file): tmp_path / "result.json"}]
        (result,) = evaluate([loaded], [task], spec, outputs=outputs, on_start=lambda *_: starts.append(task))
        return result.mean.score, len(starts)

    starts: list[object] = []
    module = tmp_path / "changing_metric.py"
    monkeypatch.syspath_prepend(tmp_path)
    module.write_text("def score(response, references):\n    return 1.0\n")
    assert [score(), score()] == [(1.0, 1), (1.0, 1)]
    module.write_text("def score(response, references):\n    return 1.0 if response in references else 0.25\n")
    monkeypatch.delitem(sys.modules, "changing_metric")
    assert score()[1] == 2


def test_samples_that_were_trained_on_are_refused(loaded, file):
    task = file_task(file, "last_integer", 5)
    prompt = json.loads(file.read_text().splitlines()[0])["messages"][0]["content"]
    tuned = replace(loaded, trained_on=frozenset([text_hash(prompt)]))
    with pytest.raises(ValueError, match="1 of 3 samples are in the model's training data"):
        score_by_length(tuned, task, samples=1)
    assert score_by_length(tuned, task, samples=1, allow_contamination=True).contaminated == 1


def test_earlier_turns_reach_the_model_and_are_no_contamination(loaded, tmp_path):
    turns = [*as_messages("Be brief.", "Hi."), *as_messages("How warm is it?", "It has 57 degrees.")]
    path = tmp_path / "chat.jsonl"
    system = [{"role": "system", "content": "Be brief."}, *turns]
    path.write_text(json.dumps({"messages": system}) + "\n")
    with pytest.raises(ValueError, match=r"chat template refuses a sample \(this template knows the roles user"):
        score_by_length(loaded, file_task(path))
    path.write_text(json.dumps({"messages": turns, "references": [57], "prefix": "It has"}) + "\n")
    task = file_task(path, "last_integer", 5)
    (sample,) = task.rows(loaded.tokenizer)
    harness = Harness(pretrained=loaded.model, tokenizer=loaded.tokenizer, add_bos_token=False)
    lm_task = lm_eval_task(task, [{**sample, "length": 1}], loaded.tokenizer)
    lm_task.build_all_requests()
    ids = harness.tok_encode(lm_task.instances[0].args[0])
    assert ids == prompt_ids(loaded.tokenizer, sample)
    assert ids == loaded.tokenizer.apply_chat_template(turns, return_dict=False)[: len(ids)]
    text = loaded.tokenizer.decode(ids)
    assert "Be brief." in text and text.endswith("It has")
    tuned = replace(loaded, trained_on=frozenset(map(text_hash, ("Be brief.", "Hi."))))
    assert score_by_length(tuned, task).contaminated == 0
    assert score_samples(loaded.model, loaded.tokenizer, task, [{**sample, "length": 1}])[0]["tokens"] == len(
        loaded.tokenizer.apply_chat_template(turns, return_dict=False)
    )


def test_probes_of_a_file_are_those_of_its_task(loaded, tmp_path):
    path = tmp_path / "probe.jsonl"
    requests = [Request("line", str(length), samples=2, seed=PROBE_SEED) for length in (256, 512)]
    rows = [row for request in requests for row in generate(request, loaded.tokenizer)]
    path.write_text("".join(json.dumps({"messages": row["messages"]}) + "\n" for row in rows))
    own = gradient_map(MapRun(loaded, file_task(path, "last_integer")))
    line = gradient_map(MapRun(loaded, "line", [256, 512], samples=2))
    assert own["change"] == line["change"] and own["lengths"] == [256, 512] and own["samples"] == 2
    assert own["task"] == str(path)
    with pytest.raises(ValueError, match="search more with --find"):
        compare_models([loaded, loaded], file_task(path, "last_integer"), None, 1, False)


def recipe_of(folder, name):
    """A recipe of SEAL-H on a file of the user's own chats."""
    recipe = folder / "recipe.yml"
    recipe.write_text(
        f"base_model: {TINY}\nadapter: seal\nseal: {{granularity: head}}\nlearning_rate: 0.01\nnum_epochs: 1\n"
        f"datasets: [{{path: {folder / name}, type: chat_template}}]\n"
    )
    return recipe


def test_a_rate_is_chosen_by_the_score_on_a_file(loaded, file, tmp_path):
    rows = draw(Request("line", "300", samples=5, split="train"), loaded.tokenizer)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"messages": row["messages"]}) + "\n" for row in rows))
    short = "".join(file.read_text().splitlines(keepends=True)[:4])
    (tmp_path / "validation.jsonl").write_text(short)
    out = tmp_path / "sweep.json"
    command = [sys.executable, "-m", "eval", "probe", "sweep", "--recipe", str(recipe_of(tmp_path, "train.jsonl")),
               "--validation", str(tmp_path / "validation.jsonl"), "--metric", "last_integer", "--max-new-tokens", "30",
               "--rates", "0.01,1", "--out", str(out)]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_text())
    sound, broken = result["cells"]
    assert result["lengths"] == [512] and result["validation_samples"] == 4 and result["base"] == {"512": 1.0}
    assert (sound["samples"], sound["mean"], sound["unsound"]) == (5, 1.0, False)
    assert broken["mean"] < 1 and broken["unsound"] and result["best"]["rate"] == 0.01
    assert (
        "far from 1" in done.stdout and "Warning: scales far from 1" in done.stdout and "at the rates 1." in done.stdout
    )
    assert "prefer a lower rate" not in done.stdout


def test_what_a_sweep_on_own_data_refuses(loaded, file, tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(file.read_text().splitlines(keepends=True)[:3]))
    recipe = read_recipe(recipe_of(tmp_path, "train.jsonl"))
    grid = {"rates": [0.01], "epochs": [1], "seeds": [1], "lengths": None}
    with pytest.raises(ValueError, match="validation: missing: name a file of samples"):
        sweep(recipe, **grid, samples=None, validation=50)
    task = file_task(tmp_path / "train.jsonl", "last_integer", 20)
    with pytest.raises(ValueError, match="samples: the recipe's file has 3, 4 are asked for"):
        sweep(recipe, **grid, samples=[4], validation=task)
    with pytest.raises(ValueError, match=r"train\.jsonl has a sample of the training data"):
        sweep(recipe, **grid, samples=[2], validation=task)
    (tmp_path / "train.jsonl").write_text('{"text": "no chat"}\n')
    with pytest.raises(ValueError, match=r"train\.jsonl, line 1: expected `messages`"):
        read_recipe(recipe_of(tmp_path, "train.jsonl"))

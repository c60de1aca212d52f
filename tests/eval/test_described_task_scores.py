"""A description is a task of eval, probes, sweep, transfer and report."""

from __future__ import annotations

import json

import pytest
import yaml
from paths import ROOT, TINY
from peft import get_peft_model

from axolotl_plugins.common.console import run as run_app
from axolotl_plugins.seal import SealConfig
from axolotl_plugins.seal.model_loading import load
from data_gen.dataset import Request, generate
from data_gen.tasks import resolve_task
from eval.__main__ import app
from eval.evaluate import evaluate
from eval.probe.head_importance import PROBE_SEED, MapRun, gradient_map
from eval.probe.probe_plots import scatter
from eval.probe.sweep import read_recipe, sweep, training_data
from eval.probe.transfer import score_transfer
from eval.score_by_length import score_by_length
from eval.spec import EvalSpec
from recipes.tools.new_recipe import recipe_for

SPEC = str(ROOT / "data_gen/examples/key_value.yml")


@pytest.fixture(scope="module")
def loaded():
    return load(TINY)


def test_scores_are_of_test_samples_by_the_descriptions_metric(loaded, tmp_path):
    (result,) = evaluate([loaded], [SPEC], EvalSpec(lengths=[250, 500], samples=3), outputs=[{}])
    expected = [row["references"] for length in ("250", "500")
                for row in generate(Request(SPEC, length, samples=3, split="test"), loaded.tokenizer)]  # fmt: skip
    assert [row["references"] for row in result.responses] == expected
    task = resolve_task(SPEC)
    assert [row["score"] for row in result.responses] == [
        task.metric(row["response"], row["references"]) for row in result.responses
    ]
    assert result.task == "key_value" and [row.length for row in result.scores] == [250, 500]


def test_the_commands_score_it_and_report_it(tmp_path):
    command = ["run", "--model", str(TINY), "--task", SPEC, "--lengths", "250", "--samples", "2", "--out"]
    run_app(app, "python -m eval", [*command, str(tmp_path / "r.json")])
    result = json.loads((tmp_path / "r.json").read_text())
    assert len(result["asked"]["description_sha256"]) == 64 and len(result["responses"]) == 2
    run_app(app, "python -m eval", ["report", "--results", str(tmp_path), "--out", str(tmp_path / "page.html")])
    assert "<h3>Key-value lookup</h3>" in (tmp_path / "page.html").read_text()


def test_a_mixture_is_made_swept_and_scored_by_the_mean_over_its_tasks(loaded, tmp_path, capsys):
    file, out = tmp_path / "mine.yml", tmp_path / "sweep.json"
    text, _ = recipe_for(str(TINY), f"{SPEC}, line", "sealh", "280:300", out=file, gpu=False)
    recipe = yaml.safe_load(text)
    assert [part["task"] for part in recipe["seal"]["data"]] == [SPEC, "line"]
    assert [part["path"] for part in recipe["datasets"]] == ["data/mine_key_value.jsonl", "data/mine_line.jsonl"]
    for part in recipe["seal"]["data"]:
        assert part["samples"] == 25
        part["samples"] = 2
    file.write_text(yaml.safe_dump(recipe))
    command = ["probe", "sweep", "--recipe", str(file), "--rates", "0.01", "--validation", "2", "--out", str(out)]
    run_app(app, "python -m eval", command)
    result = json.loads(out.read_text())
    assert result["lengths"] == [280, 300] and result["cells"][0]["samples"] == 4
    assert "Key-value lookup + Line retrieval: mean validation score" in " ".join(capsys.readouterr().out.split())
    options = {"lengths": [280, 300], "samples": 2, "seed": PROBE_SEED, "split": "train"}
    key_value, line = (score_by_length(loaded, name, **options).by_length() for name in (SPEC, "line"))
    assert result["base"] == {str(length): (key_value[length] + line[length]) / 2 for length in (280, 300)}
    chats, _ = training_data(read_recipe(file), loaded.tokenizer, 2, seed=0)
    assert ["configuration store" in chat[0]["content"] for chat in chats] == [True, False]
    command = ["run", "--model", str(TINY), "--task", f"{SPEC},line", "--lengths", "280", "--samples", "1"]
    run_app(app, "python -m eval", [*command, "--out", str(tmp_path / "scores")])
    assert {file.name.partition("_")[0] for file in (tmp_path / "scores").glob("*.json")} == {"key", "line"}


def test_probes_sweep_and_transfer_take_it(loaded, tmp_path):
    task = resolve_task(SPEC)
    found = gradient_map(MapRun(loaded, task, [250], samples=1))
    assert resolve_task(found["task"]).name == "key_value" and found["lengths"] == [250]
    assert scatter({**found, "lengths": [250]}).axes[0].get_title().startswith("Key-value lookup, 1 samples")

    text, _ = recipe_for(str(TINY), SPEC, "sealh", "250:300", out=tmp_path / "mine.yml", gpu=False)
    recipe = yaml.safe_load(text)
    recipe["seal"]["data"]["samples"] = 2
    (tmp_path / "mine.yml").write_text(yaml.safe_dump(recipe))
    grid = {"rates": [0.01], "samples": None, "epochs": [1], "seeds": [1], "lengths": [250], "validation": 2}
    (cell,) = sweep(read_recipe(tmp_path / "mine.yml"), **grid)["cells"]
    assert 0 <= cell["mean"] <= 1

    get_peft_model(load(TINY).model, SealConfig(granularity="head")).save_pretrained(tmp_path / "adapter")
    settings = {"samples": 1, "batch_size": None, "options": {}, "out": tmp_path / "t.json"}
    adapters = {"a": str(tmp_path / "adapter")}  # with scales of 1
    transferred, _ = score_transfer(str(TINY), adapters, [task], lengths=[250, 400], **settings)
    assert transferred["scores"]["a"] == transferred["scores"]["base"]
    assert transferred["scores"]["a"].keys() == {"key_value"}
    assert transferred["transferability"]["a"]["key_value"] in (None, 0)
    with pytest.raises(ValueError, match=r"^lengths: found 250 alone, expected several"):
        score_transfer(str(TINY), adapters, [task], lengths=[250], **settings)

"""The study end to end at toy size: cells, rates, resuming, the clock, and a machine without the heavy libraries."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from paths import ROOT, TINY

from axolotl_plugins.common.io import write_text
from axolotl_plugins.common.window import read_config
from axolotl_plugins.seal.model_loading import load
from axolotl_plugins.seal.provenance import text_hash
from eval import score_samples
from eval.cli_options import read_model_config
from eval.controls import seal_layers
from recipes.study import make_settings
from recipes.tools import study_results
from recipes.tools.study_cells import (
    FACTOR,
    RATES,
    UNTUNED,
    Cell,
    Settings,
    Workbench,
    adapter_folder,
    capped,
    choose_rate,
    data_file,
    data_requests,
    example_request,
    plan,
    read_samples,
    scaled_attention,
    scored_requests,
    training_requests,
    write_cell,
    write_samples,
)

OPTIONS = [
    "--tasks", "line,vt", "--methods", "base,SEAL-H", "--lengths", "900", "--train-tokens", "line=300:400,vt=900",
    "--samples", "2", "--validation-samples", "1", "--tune-samples", "2", "--seeds", "0",
]  # fmt: skip
BLOCKED = ("lm_eval", "datasets", "axolotl", "wonderwords", "rouge_score", "nltk", "gguf", "bitsandbytes", "git")
BLOCKER = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"blocked: {{name}}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def study(*arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{path}:{ROOT}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "recipes.study", *arguments], capture_output=True, text=True, env=environment
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A whole study, run where heavy libraries cannot be imported, from samples that were drawn before."""
    out, blocker = tmp_path_factory.mktemp("study"), tmp_path_factory.mktemp("blocker")
    (blocker / "sitecustomize.py").write_text(BLOCKER)
    options = ["--model", str(TINY), "--out", str(out), *OPTIONS]
    drawn = study("data", *options)
    assert drawn.returncode == 0, drawn.stderr
    assert "wonderwords" in study("data", *options[:-2], "--seeds", "7", path=str(blocker)).stderr  # the blocker blocks
    run = study("run", *options, "--device", "cpu", path=str(blocker))
    assert run.returncode == 0, run.stderr
    return out


def cells(out: Path) -> dict[str, dict]:
    return {file.name: json.loads(file.read_text()) for file in sorted((out / "cells").iterdir())}


def without_times(result: dict) -> dict:
    return {key: value for key, value in result.items() if not key.endswith("_seconds") and key != "commit"}


def test_every_cell_is_tuned_and_scored(finished):
    results = cells(finished)
    assert len(results) == 2 * (1 + len(RATES["SEAL-H"]) + 1)  # of each task: base, all rates, the chosen one
    for result in results.values():
        tuned = result["method"] == "SEAL-H"
        assert [(row["length"], row["count"]) for row in result["scores"]] == [
            (900, 2 if result["purpose"] == "test" else 1)
        ]
        assert len(result.get("losses", ())) == 2 * tuned and result.get("parameters", 0) == 12 * tuned
        assert ("responses" in result) == (result["purpose"] == "test")
        assert ("general" in result) == (result["purpose"] == "test" and tuned)
        assert result["device"] == "cpu" and result["dtype"] == "float32"


def test_the_rate_is_the_best_of_validation(finished):
    for task in ("line", "vt"):
        tried = [r for r in cells(finished).values() if r["task"] == task and r["purpose"] == "validation"]
        (tested,) = (
            r for r in cells(finished).values() if (r["task"], r["method"], r["purpose"]) == (task, "SEAL-H", "test")
        )
        assert tested["rate"] == choose_rate(tried)
    scored = lambda rate, score: {"rate": rate, "scores": [{"score": score}]}  # noqa: E731
    assert choose_rate([scored(0.05, 0.5), scored(0.02, 0.5), scored(0.01, 0.4)]) == 0.02  # of equals the smallest
    assert choose_rate([scored(0.01, 0.0), {"rate": 0.001, "scores": []}]) == 0.01  # what failed is never chosen


def test_a_second_run_does_nothing_and_a_deleted_cell_comes_back_the_same(finished):
    options = ["run", "--model", str(TINY), "--out", str(finished), *OPTIONS, "--device", "cpu"]
    before = {file: file.stat().st_mtime_ns for file in (finished / "cells").iterdir()}
    result = cells(finished)
    (deleted,) = (finished / "cells").glob("line_SEAL-H_test_*")
    deleted.unlink()
    again = study(*options)
    assert again.returncode == 0 and again.stdout.endswith("1 cells done now\n"), again.stdout + again.stderr
    assert without_times(cells(finished)[deleted.name]) == without_times(result[deleted.name])
    assert {file for file, changed in before.items() if file.stat().st_mtime_ns != changed} == {deleted}
    start = time.monotonic()
    assert study(*options).stdout.endswith("0 cells done now\n")
    assert time.monotonic() - start < 60


def test_other_settings_are_refused_in_the_same_folder(finished):
    options = ["run", "--model", str(TINY), "--out", str(finished), *OPTIONS, "--device", "cpu", "--samples", "3"]
    again = study(*options)
    assert again.returncode == 1 and "was started with samples 2, found 3" in again.stderr
    assert len(again.stderr.strip().splitlines()) == 1


def test_the_clock_stops_it_without_half_files(finished, tmp_path):
    (tmp_path / "data").symlink_to(finished / "data")
    options = ["--model", str(TINY), "--out", str(tmp_path), *OPTIONS, "--device", "cpu"]
    run = study("run", *options, "--minutes", "0.05")
    assert run.returncode == 0 and "more are open: run the same command again" in run.stdout, run.stdout + run.stderr
    assert not list(tmp_path.rglob("*.partial")) and len(list(tmp_path.glob("cells/*"))) < 10


def test_collect_makes_a_result_with_pictures_and_tables(finished, tmp_path):
    result = tmp_path / "toy.json"
    collected = study("collect", "--out", str(finished), "--result", str(result))
    assert collected.returncode == 0, collected.stderr
    gathered = json.loads(result.read_text())
    assert [(row["task"], row["method"]) for row in gathered["rows"]] == [
        ("line", "base"), ("line", "SEAL-H"), ("vt", "base"), ("vt", "SEAL-H"),
    ]  # fmt: skip
    assert gathered["device"] == "cpu" and len(gathered["rates"]) == 2 and len(gathered["general"]) == 2
    command = shlex.split(gathered["command"])[2:]  # one that has the same settings and cells
    assert command[command.index("--model") + 1] == str(TINY)
    again = study(*command, "--out", str(finished), "--device", "cpu")
    assert again.stdout.endswith("0 cells done now\n"), again.stdout + again.stderr
    assert all(score["low"] <= score["score"] <= score["high"] for row in gathered["rows"] for score in row["scores"])
    assert {file.name for file in tmp_path.glob("*.png")} == {"toy_tasks.png", "toy_general.png"}
    assert "| SEAL-H | 12 |" in collected.stdout
    empty = study("collect", "--out", str(tmp_path), "--result", str(result))
    assert empty.returncode == 1 and "no results" in empty.stderr


def test_adapters_are_written_with_card_and_training_data(finished, tmp_path):
    from axolotl_plugins.seal.model_loading import load

    written = study("adapters", "--model", str(TINY), "--out", str(finished), "--to", str(tmp_path))
    assert written.stdout.split() == [str(tmp_path / "line_sealh"), str(tmp_path / "vt_sealh")], written.stderr
    loaded = load(tmp_path / "line_sealh")
    settings = Settings(**json.loads((finished / "settings.json").read_text()))
    (tested,) = (finished / "cells").glob("line_SEAL-H_test_*")
    cell = Cell(**{key: json.loads(tested.read_text())[key] for key in ("task", "method", "purpose", "seed", "rate")})
    (wanted,) = training_requests(settings, cell)
    rows = read_samples(wanted, loaded.tokenizer, finished / "data")
    assert all(text_hash(row["messages"][0]["content"]) in loaded.trained_on for row in rows)
    scales = [layer.seal_scale["default"] for layer in seal_layers(loaded.model)]
    assert len(scales) == 3 and not any((scale == 1).any() for scale in scales)
    readme = (tmp_path / "line_sealh" / "README.md").read_text()
    assert "task line, tokens 300:400, samples 2, seed 0" in readme and f"Learning rate {cell.rate:g}" in readme
    assert f"| SEAL-H | {json.loads(tested.read_text())['scores'][0]['score']:.2f} |" in readme
    other = tmp_path / "other"
    shutil.copytree(TINY, other)
    (other / "model.safetensors").write_bytes(b"other")
    refused = study("adapters", "--model", str(other), "--out", str(finished), "--to", str(tmp_path / "a"))
    assert refused.returncode == 1 and "is not the one that" in refused.stderr and not (tmp_path / "a").exists()


def test_a_method_with_the_rate_of_another_is_collected(finished, tmp_path):
    write_text(tmp_path / "settings.json", (finished / "settings.json").read_text())
    (tuned,) = (finished / "cells").glob("line_SEAL-H_test_*")
    for method, purpose, rate in [("LoRA", "validation", 1e-3), ("DoRA", "test", 1e-3), ("DoRA", "test", 2e-4)]:
        cell = Cell("line", method, purpose, 0, rate)
        write_cell(tmp_path, cell, {**json.loads(tuned.read_text()), **asdict(cell)})
    rows = study_results.gather(tmp_path, None)["rows"]
    assert [(row["method"], row["rate"]) for row in rows] == [("DoRA", 1e-3)]


def test_rates_never_see_test_samples():
    train, lengths = capped(None)
    settings = Settings("", 8192, "float32", 100, 30, 50, 1000, "prose", train, lengths)
    for cell in plan(list(lengths), ["SEAL-H", "LoRA"], [0]):
        scored = scored_requests(settings, cell).values()
        assert {request.split for request in scored} == {"train" if cell.purpose == "validation" else "test"}
        (tuned,) = training_requests(settings, cell)
        assert tuned.split == "train"
        assert tuned.seed not in {request.seed for request in scored} or cell.purpose == "test"


def test_the_plan_is_ordered_and_complete():
    cells = plan(["line", "vt"], ["base", "SEAL-H", "LoRA", "SEAL-H shuffled"], [0, 1])
    assert len(set(cells)) == len(cells) == 2 * (1 + len(RATES["SEAL-H"]) + 2 + len(RATES["LoRA"]) + 2 + 2)
    order = [(cell.method, cell.purpose, cell.seed) for cell in cells if cell.task == "line"]
    assert (
        order[0] == ("base", "test", 0)
        and order[1 + len(RATES["SEAL-H"])] == ("SEAL-H", "test", 0)
        and order[-1] == ("SEAL-H shuffled", "test", 1)
    )
    assert (
        Cell("line", "SEAL-H shuffled", "test").tuned_as == "SEAL-H"
        and Cell("line", "one-shot", "test").tuned_as is None
    )


def test_sizes_and_mixtures_take_the_first_samples_of_every_source():
    train, lengths = capped(1024)
    settings = Settings("", 8192, "float32", 100, 30, 50, 1000, "prose", train, lengths)
    counts = {"SEAL-C": 50, "SEAL-C with 5 samples": 5, "SEAL-C with 100 samples": 100, "SEAL-C from vt": 50,
              "SEAL-C from mixture": 10, "SEAL-C from full mixture": 50}  # fmt: skip
    for method, count in counts.items():
        cell = Cell("line", method, "test", rate=0.1)
        requests = training_requests(settings, cell)
        assert cell.samples_per_source(settings.tune_samples) == count
        assert [request.samples for request in requests] == [max(50, count)] * (5 if "mixture" in method else 1)
        assert cell.tuned_as == cell.rated_as == "SEAL-C"
    names = {Cell("line", method, "test", rate=0.1).tuned_cell.file_name for method in counts}
    assert len(names) == len(counts) and " " not in "".join(names)  # each has an adapter of its own


def test_an_attention_factor_is_that_of_rope():
    """YaRN with a factor of 1 changes nothing but the attention factor."""
    default = {"rope_type": "default", "rope_theta": read_config(str(TINY)).rope_parameters["rope_theta"]}
    yarn = {**default, "rope_type": "yarn", "factor": 1.0, "attention_factor": 1.2,
            "original_max_position_embeddings": 8192}  # fmt: skip
    ids = torch.tensor([[5, 300, 301, 302, 17, 40]])
    plain = load(TINY, model_config={"rope_parameters": default}).model
    expected = load(TINY, model_config={"rope_parameters": yarn}).model(ids).logits
    base = plain(ids).logits
    with scaled_attention(plain, 1.2):
        torch.testing.assert_close(plain(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(plain(ids).logits, base) and (base - expected).abs().max() > 0.01
    bench = Workbench.__new__(Workbench)
    bench.model, bench.settings = plain, Settings("", 8192, "float32", 1, 1, 2, 10, "prose", *capped(None))
    bench.score = lambda model, cell: {"logits": model(ids).logits}
    scored = {rate: bench.run(Cell("line", FACTOR, "test", rate=rate))["logits"] for rate in (1.0, 1.2)}
    torch.testing.assert_close(scored[1.2], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(scored[1.0], base) and torch.equal(bench.run(Cell("line", "base", "test"))["logits"], base)
    with pytest.raises(ValueError, match="no attention with `q_proj`"), scaled_attention(torch.nn.Linear(1, 1), 1.1):
        pass
    cells = plan(["line"], [FACTOR], [0, 1])
    assert [cell.rate for cell in cells] == [*RATES[FACTOR], None] and {cell.seed for cell in cells} == {0}


def test_lengths_of_single_tasks():
    settings = make_settings(TINY, ["vt"], 512, "vt=128/64/64", "", dtype="float32", samples=1, validation_samples=1,
                             tune_samples=2, shot_tokens=10, haystack="prose")  # fmt: skip
    assert settings.lengths["vt"] == [64, 128] and settings.lengths["line"] == [512]


@pytest.mark.parametrize("rope", [
    {"rope_type": "default", "rope_theta": 1e5},
    {"rope_type": "self_extend", "rope_theta": 1e4, "group_size": 4, "neighbor_window": 64},
])  # fmt: skip
def test_a_stretched_window_is_tuned_and_scored(rope, tmp_path):
    recipe = tmp_path / "stretched.yml"
    recipe.write_text(json.dumps({"model_config": {"max_position_embeddings": 4096, "rope_parameters": rope}}))
    options = ["--model", str(TINY), "--out", str(tmp_path / "s"), "--tasks", "line", "--methods", "base,SEAL-H",
               "--train-tokens", "line=300", "--lengths", "2600", "--samples", "1", "--validation-samples", "1",
               "--tune-samples", "2", "--seeds", "0"]  # fmt: skip
    assert "do not fit into the window of 2048" in study("run", *options).stderr
    done = study("run", *options, "--model-config", str(recipe))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "s" / "settings.json").read_text())["window"] == 4096
    tested = [cell for cell in cells(tmp_path / "s").values() if cell["purpose"] == "test"]
    assert {cell["method"] for cell in tested} == {"base", "SEAL-H"}
    assert all(cell["scores"][0]["tokens"] > 2500 for cell in tested)


def test_prompts_fit_into_the_window():
    train, lengths = capped(None)
    settings = Settings("", 8192, "float32", 100, 30, 50, 1000, "prose", train, lengths)
    for task in lengths:
        requests = scored_requests(settings, Cell(task, "one-shot", "test"))
        assert requests[7680].tokens == "6680" and requests[4096].tokens == "4096"
    train, lengths = capped(2048)
    assert train["line"] == "512:2048" and train["niah"] == "2048" and lengths["cwe"] == [2048]


def test_tuning_and_controls_differ_and_leave_the_model_as_it_was(finished):
    settings = Settings(**json.loads((finished / "settings.json").read_text()))
    bench = Workbench(TINY, "cpu", settings, finished / "data")
    ids = torch.tensor([[5, 6, 7, 8]])
    scales = {}
    before = bench.model(ids).logits

    score = Workbench.score

    def keep(self, model, cell):
        scales[cell.method] = torch.cat([layer.seal_scale["default"].detach().clone() for layer in seal_layers(model)])
        return score(self, model, cell)

    bench.score = keep.__get__(bench)
    for method in ("SEAL-H", "SEAL-H shuffled", "SEAL-H wrong answers"):
        bench.run(Cell("line", method, "validation", 0, 0.02))
        torch.testing.assert_close(bench.model(ids).logits, before, rtol=0, atol=0)
    tuned, shuffled, wrong = scales.values()
    assert not torch.equal(tuned, torch.ones_like(tuned)) and not torch.equal(tuned, wrong)
    assert not torch.equal(tuned, shuffled) and torch.equal(tuned.sort().values, shuffled.sort().values)


def test_an_adapter_is_tuned_once_for_all_cells_that_score_it(finished, tmp_path, monkeypatch):
    shutil.copytree(finished / "data", tmp_path / "data")
    bench = Workbench(TINY, "cpu", Settings(**json.loads((finished / "settings.json").read_text())), tmp_path / "data")
    scales, tuned = [], []
    tune, score = Workbench.tune, Workbench.score
    bench.tune = lambda model, cell: tuned.append(cell) or tune(bench, model, cell)

    def keep(model, cell):
        scales.append(torch.cat([layer.seal_scale["default"].detach().clone() for layer in seal_layers(model)]))
        return score(bench, model, cell)

    bench.score = keep
    cells = [Cell("line", "SEAL-H", "test", 0, 0.02), Cell("vt", "SEAL-H from line", "test", 0, 0.02),
             Cell("line", "SEAL-H shuffled", "test", 0, 0.02)]  # fmt: skip
    results = [bench.run(cell) for cell in cells]
    assert tuned == cells[:1] and all(result["losses"] == results[0]["losses"] for result in results)
    assert torch.equal(scales[0], scales[1]) and not torch.equal(scales[0], torch.ones(12))
    assert not torch.equal(scales[0], scales[2]) and torch.equal(scales[0].sort().values, scales[2].sort().values)
    bench.run(Cell("line", "SEAL-H at 0.5", "test", 0, 0.02))
    torch.testing.assert_close(scales[3] - 1, (scales[0] - 1) / 2)
    shown = Cell("line", "SEAL-H one-shot", "test", 0, 0.02)
    for wanted in data_requests(bench.settings, [shown]):
        if not (file := data_file(tmp_path / "data", wanted)).exists():
            write_samples(wanted, TINY, file)
    examples = []
    plain = score_samples.score_samples
    monkeypatch.setattr(
        score_samples,
        "score_samples",
        lambda *args, **options: examples.append(options["shown"]) or plain(*args, **options),
    )
    result = bench.run(shown)
    assert torch.equal(scales[4], scales[0]) and "general" not in result and "general" in results[0]
    (example,) = examples
    row = read_samples(example_request(bench.settings, "line"), bench.tokenizer, bench.data)[0]
    assert row["messages"][0]["content"] in example and row["messages"][-1]["content"] in example
    bench.run(Cell("line", "SEAL-H wrong answers", "test", 0, 0.02))
    bench.run(Cell("line", "SEAL-H", "test", 0, 0.05))
    assert len(tuned) == 3


PARAMETERS = {"LoRA": 12288, "DoRA": 13824, "query": 384, "query-H": 12, "query+output": 768, "mlp": 960}


@pytest.mark.parametrize("method", PARAMETERS)
def test_other_methods_run_and_are_taken_off_again(method, finished):
    settings = Settings(**json.loads((finished / "settings.json").read_text()))
    result = Workbench(TINY, "cpu", settings, finished / "data").run(Cell("line", method, "validation", 0, 1e-3))
    assert len(result["losses"]) == 2 and result["parameters"] == PARAMETERS[method]


def test_a_stored_adapter_of_another_method_is_refused(finished, tmp_path):
    settings = Settings(**json.loads((finished / "settings.json").read_text()))
    shutil.copytree(finished / "data", tmp_path / "data")
    bench = Workbench(TINY, "cpu", settings, tmp_path / "data")
    cells = [Cell("line", method, "test", 0, 1e-2) for method in ("query", "SEAL-C")]
    bench.run(cells[0])
    adapter_folder(tmp_path, cells[0]).rename(adapter_folder(tmp_path, cells[1]))
    with pytest.raises(ValueError, match="it belongs to another model or configuration"):
        bench.run(cells[1])


def test_a_loss_that_is_not_finite_fails_the_cell_alone(finished):
    settings = Settings(**json.loads((finished / "settings.json").read_text()))
    bench = Workbench(TINY, "cpu", settings, finished / "data")
    norm = bench.model.model.norm.weight
    whole = norm.data.clone()
    norm.data[0] = float("nan")
    result = bench.run(Cell("line", "SEAL-H", "validation", 0, 1e-2))
    assert result["scores"] == [] and "lower lr (0.01)" in result["failed"]
    norm.data = whole
    assert bench.run(Cell("line", "SEAL-H", "validation", 0, 1e-2))["scores"]


def test_broken_samples_are_named(finished, tmp_path):
    from axolotl_plugins.common.tokenizer import load_tokenizer

    settings = Settings(**json.loads((finished / "settings.json").read_text()))
    (wanted, *_) = data_requests(settings, plan(["line"], ["base"], [0]))
    file = data_file(tmp_path, wanted)
    content = data_file(finished / "data", wanted).read_bytes()
    tokenizer = load_tokenizer(str(TINY))
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="corrupt"):
        read_samples(wanted, tokenizer, tmp_path)
    file.write_bytes(content)
    assert len(read_samples(wanted, tokenizer, tmp_path)) == 2


def test_general_ability_is_that_of_plain_arithmetic():
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from axolotl_plugins.common.tokenizer import load_tokenizer
    from axolotl_plugins.seal import SealConfig
    from eval.controls import seal_layers
    from eval.general_ability import general_ability

    tokenizer = load_tokenizer(str(TINY))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(TINY), SealConfig(granularity="head"))
    texts = ["The record is over. Tell me the number.", "Below is a record of lines."]
    same = general_ability(model, tokenizer, texts, [])
    assert same["ratio"] == pytest.approx(1, abs=1e-5) and same["kl"] == pytest.approx(0, abs=1e-5)
    generator = random.Random(0)
    for layer in seal_layers(model):
        layer.seal_scale["default"].data += torch.tensor([generator.uniform(-0.5, 0.5) for _ in range(4)])
    losses, bases, divergence, count = 0.0, 0.0, 0.0, 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            tuned = model(ids).logits[0, :-1].log_softmax(-1)
            with model.disable_adapter():
                base = model(ids).logits[0, :-1].log_softmax(-1)
        target = ids[0, 1:, None]
        losses -= tuned.gather(1, target).sum().item()
        bases -= base.gather(1, target).sum().item()
        divergence += (base.exp() * (base - tuned)).sum().item()
        count += len(target)
    moved = general_ability(model, tokenizer, texts, [])
    assert (
        moved["tokens"] == count and moved["kl"] == pytest.approx(divergence / count, rel=1e-3) and moved["kl"] > 1e-4
    )
    assert moved["ratio"] == pytest.approx(torch.tensor((losses - bases) / count).exp().item(), rel=1e-4)


def test_every_rated_method_is_tuned_as_itself():
    for method in RATES:
        cell = Cell("line", method, "test")
        assert cell.rated_as == method and cell.tuned_as == (None if method in UNTUNED else method)


def test_pictures_know_every_method():
    from eval.score_plots import COLOURS

    assert {method for methods in study_results.PLOTS.values() for method in methods} <= COLOURS.keys()


@pytest.mark.parametrize("base", [True, False])
def test_weighted_scales_are_drawn_where_their_perplexity_is_known(base, tmp_path):
    def row(method, score, seed=1):
        scores = [{"length": 900, "tokens": 890, "count": 2, "score": score, "low": 0.0, "high": 1.0}]
        return {"task": "line", "method": method, "seed": seed, "rate": 0.02, "scores": scores}

    rows = [row("SEAL-C", 0.9), row("SEAL-C at 0.5", 0.8), row("SEAL-C at 0.75", 0.7), *[row("base", 0.1, 0)] * base]
    moved = [{"task": "line", "method": method, "seed": 1, "ratio": ratio, "kl": 0.1}
             for method, ratio in (("SEAL-C", 1.2), ("SEAL-C at 0.5", 1.1))]  # fmt: skip
    study_results.save({"rows": rows, "general": moved, "rates": []}, tmp_path / "r.json")
    assert (tmp_path / "r_weights.png").exists() == base


def test_transfers_and_sizes_are_drawn(tmp_path):
    import matplotlib.pyplot as plt

    def row(task, method, score, size=50):
        scores = [{"length": 900, "tokens": 890, "count": 2, "score": score, "low": 0.0, "high": 1.0}]
        return {"task": task, "method": method, "seed": 0, "rate": 0.02, "losses": [1.0] * size, "scores": scores}

    rows = [row("line", "base", 0.1, 0), row("vt", "base", 0.2, 0), row("line", "SEAL-C", 0.9),
            row("vt", "SEAL-C", 0.8), row("vt", "SEAL-C from line", 0.3), row("line", "SEAL-C from vt", 0.0),
            row("line", "SEAL-C from mixture", 0.5), row("line", "SEAL-C with 5 samples", 0.4, 5)]  # fmt: skip
    study_results.save({"rows": rows, "general": [], "rates": []}, tmp_path / "r.json")
    assert (tmp_path / "r_transfer.png").exists() and (tmp_path / "r_samples.png").exists()
    _, (transfer, samples) = plt.subplots(1, 2)
    study_results.draw_transfer(transfer, "SEAL-C", {"rows": rows})
    assert [label.get_text() for label in transfer.get_yticklabels()] == ["base", "line", "vt", "mixture"]
    cells = {(text.get_position()[1], text.get_position()[0]): text.get_text() for text in transfer.texts}
    assert cells == {(0, 0): "0.10", (0, 1): "0.20", (1, 0): "0.90", (1, 1): "0.30", (2, 0): "0.00", (2, 1): "0.80",
                     (3, 0): "0.50"}  # fmt: skip
    study_results.draw_samples(samples, "SEAL-C", {"rows": rows})
    (line,) = samples.get_lines()  # of variable tracking there is one size only
    assert line.get_xydata().tolist() == [[0, 0.1], [5, 0.4], [50, 0.9]]
    alone = [
        row("line", "base", 0.1, 0),
        row("line", "SEAL-C from mixture", 0.5),
        row("vt", "SEAL-C from mixture", 0.5),
    ]
    for rows in (alone, alone[1:]):  # without the method itself, and without the base
        study_results.save({"rows": rows, "general": [], "rates": []}, tmp_path / f"{len(rows)}.json")
    assert (tmp_path / "3_transfer.png").exists() and not (tmp_path / "2_transfer.png").exists()


def test_longest_training_lengths_are_capped_and_drawn(tmp_path):
    import matplotlib.pyplot as plt

    methods = ["SEAL-C", *(f"SEAL-C up to {cap} tokens" for cap in (256, 512, 1024, 2048))]
    train = capped(None, {"line": "300:1500"})[0]
    cells = {cell.method: cell for cell in plan(["line"], methods, [0], train) if cell.purpose == "test"}
    assert list(cells) == ["SEAL-C", "SEAL-C up to 512 tokens", "SEAL-C up to 1024 tokens"]  # others shorten nothing
    lengths = capped(None)[1]
    settings = Settings("", 8192, "float32", 100, 30, 50, 1000, "prose", train, lengths)
    drawn = [training_requests(settings, cell)[0] for cell in cells.values()]
    assert [request.tokens for request in drawn] == ["300:1500", "300:512", "300:1024"]
    assert len({cell.tuned_cell.file_name for cell in cells.values()}) == 3  # each has an adapter of its own
    assert {cell.rated_as for cell in cells.values()} == {"SEAL-C"}
    only = plan(["niah"], ["SEAL-C up to 7680 tokens", "SEAL-C up to 1024 tokens"], [0], train)
    assert not [cell for cell in only if cell.purpose == "test"]  # needles have one length

    def row(method, scores):
        rows = [{"length": at, "tokens": at, "count": 2, "score": score, "low": 0.0, "high": 1.0}
                for at, score in zip((512, 1024), scores, strict=True)]  # fmt: skip
        return {"task": "line", "method": method, "seed": 0, "rate": 0.02, "losses": [1.0], "scores": rows}

    rows = [row("base", (0.1, 0.0)), row("SEAL-C", (0.9, 0.8)), row("SEAL-C up to 512 tokens", (0.7, 0.3))]
    gathered = {"rows": rows, "general": [], "rates": [], "settings": {"train": train}}
    study_results.save(gathered, tmp_path / "r.json")
    assert (tmp_path / "r_lengths.png").exists()
    _, axes = plt.subplots()
    study_results.draw_caps(axes, "SEAL-C", gathered)
    assert {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()} == {
        "line, tested at 512": [[512, 0.7], [1500, 0.9]], "line, tested at 1,024": [[512, 0.3], [1500, 0.8]]
    }  # fmt: skip


def test_recorded_commands_run_the_tested_cells_and_no_others():
    tested = [("line", "base", 0), ("line", "SEAL-C", 0), ("line", "SEAL-C", 1), ("vt", "SEAL-C", 0), ("vt", "base", 0),
              ("line", "SEAL-C from vt", 0), ("line", "LoRA", 0), ("vt", "LoRA", 0)]  # fmt: skip
    settings = Settings("", 8192, "float32", 2, 1, 2, 10, "prose", *capped(900, {"line": "300:400"}))
    rows = [dict(zip(("task", "method", "seed"), cell, strict=True)) for cell in tested]
    planned = []
    for part in study_results.command(asdict(settings), rows).split(" && "):
        words = shlex.split(part)
        tasks, methods, seeds = (words[words.index(f"--{key}") + 1].split(",") for key in ("tasks", "methods", "seeds"))
        planned += [cell for cell in plan(tasks, methods, [*map(int, seeds)]) if cell.purpose == "test"]
        assert "--lengths line=512/900,vt=900" in part and "--train-tokens line=300:400,vt=900" in part
    assert sorted((cell.task, cell.method, cell.seed) for cell in planned) == sorted(tested)


def test_the_recorded_command_of_a_stretched_model_writes_its_model_config(tmp_path):
    config = {"rope_parameters": {"rope_type": "default", "rope_theta": 418294}}
    settings = Settings("", 8192, "float32", 2, 1, 2, 10, "prose", *capped(900), config)
    row = {"task": "line", "method": "base", "seed": 0}
    first, run = study_results.command(asdict(settings), [row]).split(" && ")
    subprocess.run(first, shell=True, cwd=tmp_path, check=True)
    assert read_model_config(tmp_path / run.split("--model-config ")[1]) == config


def test_a_model_config_of_other_shapes_ends_with_its_reason(tmp_path):
    (tmp_path / "config.yml").write_text("model_config: {intermediate_size: 100}\n")
    tried = study("run", "--model", str(TINY), "--out", str(tmp_path / "s"), "--tasks", "line", "--methods", "base",
                  "--lengths", "900", "--samples", "1", "--model-config", str(tmp_path / "config.yml"))  # fmt: skip
    assert tried.returncode == 1 and "Traceback" not in tried.stderr
    assert "cannot be loaded with the model_config, whose shapes must be those of the weights" in tried.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_one_line_before_anything_is_drawn(tmp_path):
    tried = study("run", "--model", str(TINY), "--longest", "900", "--out", str(tmp_path / "s"), "--device", "cuda")
    assert tried.returncode == 1 and tried.stderr.startswith("seal: device: PyTorch finds no CUDA GPU")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(("options", "message"), [
    (["--tasks", "niah", "--methods", "SEAL-C up to 512 tokens"], "applies to none of the tasks niah"),
    (["--lengths", "line=256,line=300"], "names a task twice"),
    (["--methods", "SEAL-C from mixture", "--tune-samples", "12"], "name a multiple of 5"),
])  # fmt: skip
def test_bad_options_start_no_study(options, message, tmp_path):
    tried = study("run", "--model", str(TINY), "--longest", "900", "--out", str(tmp_path / "s"), *options)
    assert tried.returncode and message in tried.stderr and not (tmp_path / "s").exists()

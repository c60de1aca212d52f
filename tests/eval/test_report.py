"""The report: every number and picture in one page, the paper's beside them, nothing of a response executed."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections import defaultdict
from dataclasses import replace
from statistics import mean

import numpy as np
import pytest
import torch
import yaml
from markupsafe import escape
from paths import ROOT, TINY
from peft import get_peft_model

from axolotl_plugins.seal import SealConfig
from axolotl_plugins.seal.model_loading import load
from axolotl_plugins.seal.scales import saved_scales, scale_matrix
from eval.paper import LONGCHAT, paper_value
from eval.report import grid, rate_table, study_table, write_report
from eval.results import EvalResult, from_json
from eval.score_plots import labels

PAPER = yaml.safe_load((ROOT / "eval" / "paper.yml").read_text())


def values(task="line", method="base", model="m", base=LONGCHAT, response="ok", score=0.5, shots=0):
    """The JSON of a result."""
    lengths = (9000, 31000)
    responses = [
        {"length": length, "index": i, "depth": depth, "references": ["1"], "response": response, "score": score}
        for length in lengths for i, depth in enumerate((0, 50, 100))
    ]  # fmt: skip
    row = {"tokens": 8995.0, "count": 3, "score": score, "low": 0.1, "high": 0.9}
    scores = [{"length": length, **row} for length in lengths]
    depths = [{"length": length, "depth": depth, **row} for length in lengths for depth in (0, 50, 100)]
    return {"model": model, "base": base, "method": method, "task": task, "window": 16384, "seed": 0, "shots": shots,
            "scores": scores, "depths": depths, "mean": row, "responses": responses}  # fmt: skip


def result(**settings) -> EvalResult:
    return from_json(values(**settings))


def test_page_shows_scores_beside_the_papers_and_escapes_responses(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(values(response="<script>alert(1)</script>")))
    (tmp_path / "b.json").write_text(json.dumps(values(method="SEAL-C", score=0.25)))
    (tmp_path / "c.json").write_text(json.dumps(values(task="niah")))
    (tmp_path / "other.json").write_text(json.dumps({"not": "a result"}))
    assert write_report(tmp_path, tmp_path / "report.html") == 3
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    assert "paper 0.32, table 1" in page and "paper 0.88, table 1" in page and "0.25" in page
    assert page.count("data:image/png;base64,") >= 3
    assert not re.findall(r'(?:src|href)="(?!data:)', page)  # nothing from the network


def test_results_that_differ_in_model_or_shots_are_not_drawn_as_seeds_of_one(tmp_path):
    assert labels([result(), result(shots=1)]) == ["base", "one-shot"]
    assert labels([result(method="SEAL-C", model=name) for name in ("a", "a_merged")]) == [
        "SEAL-C, a", "SEAL-C, a_merged"
    ]  # fmt: skip
    longer, shorter = (values(method="SEAL-C", model=name) for name in ("a", "a_merged"))
    shorter["scores"] = shorter["scores"][:1]
    (tmp_path / "0.json").write_text(json.dumps(longer))
    (tmp_path / "1.json").write_text(json.dumps(shorter))
    assert write_report(tmp_path, tmp_path / "r.html") == 2


def test_papers_numbers_are_found_by_model_task_method_and_length():
    tuned = result(method="SEAL-C")
    assert paper_value(tuned, 31000) == (0.88, 1) and paper_value(tuned, 31744) == (0.88, 1)
    assert paper_value(tuned, 30500) is None
    published = replace(tuned, asked={"cases": "testcases"})  # lengths are lines
    assert paper_value(published, 1350) == (0.88, 1) and paper_value(published, 400) == (0.98, 1)
    assert paper_value(published, 31000) is None
    assert paper_value(replace(tuned, base="another/model"), 31000) is None
    assert paper_value(replace(tuned, method="base", shots=1), 28000) == (0.5, 3)
    assert paper_value(replace(tuned, method="DoRA"), 30000) == (0.86, 3)
    assert paper_value(replace(tuned, task="cwe"), 32768) == (pytest.approx(0.937), 2)


def test_papers_tables_are_complete():
    rows = PAPER["scores"]
    assert [sum(row["table"] == table for row in rows) for table in (1, 2, 3)] == [15, 27, 12]
    assert all(len(row["by_length"]) == 6 for row in rows if row["table"] != 2)
    assert len(PAPER["learning_rate_by_samples"]) == 4 and len(PAPER["parameters"]) == 6
    single, multi = (
        ("multifieldqa_en", "multifieldqa_zh", "narrativeqa", "qasper"),
        ("hotpotqa", "2wikimqa", "musique", "dureader"),
    )
    for scores in PAPER["longbench"].values():
        assert np.mean([scores[name] for name in single]) == pytest.approx(scores["single"], abs=0.01)
        assert np.mean([scores[name] for name in multi]) == pytest.approx(scores["multi"], abs=0.01)
    for methods in PAPER["parameters"].values():
        for thousands, ratio in methods.values():
            assert ratio == pytest.approx(thousands / methods["LoRA"][0], abs=6e-5)


def test_grid_is_depth_by_length():
    needles = result(task="niah")
    depth_scores = [replace(row, score=row.depth / 100 if row.length == 9000 else 1.0) for row in needles.depths]
    scores, depths, lengths = grid(replace(needles, depths=depth_scores))
    assert depths == [0, 50, 100] and lengths == [9000, 31000]
    np.testing.assert_allclose(scores, [[0, 1], [0.5, 1], [1, 1]])


def test_saved_scales_are_those_of_the_model(tmp_path):
    model = get_peft_model(load(TINY).model, SealConfig(granularity="channel"))
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(1, 0.1)
    model.save_pretrained(tmp_path)
    live = scale_matrix(model)
    np.testing.assert_allclose(saved_scales(tmp_path), np.stack([live[layer].numpy() for layer in sorted(live)]))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match="found a LORA adapter"):
        saved_scales(tmp_path)


def test_page_shows_studies_and_the_demo(tmp_path):
    for name in ("demo", "smollm2", "bench_gpu"):
        shutil.copy(ROOT / "results" / f"{name}.json", tmp_path)
    assert write_report(tmp_path, tmp_path / "report.html") == 2  # a benchmark of speed is no result
    page = (tmp_path / "report.html").read_text()
    study, demo = (json.loads((ROOT / "results" / f"{name}.json").read_text()) for name in ("smollm2", "demo"))
    assert "<h2>smollm2.json</h2>" in page and "Variable tracking" in page
    assert f"<code>{escape(study['command'])}</code>" in page and "<code>make demo</code>" in page
    assert f"<small>{study['date']}" in page
    shown = re.findall(r"<td>(\d\.\d\d)<small>", page)
    means = defaultdict(list)
    for row in study["rows"]:
        for score in row["scores"]:
            means[row["task"], row["method"], score["length"]].append(score["score"])
    expected = [score["score"] for scores in demo["scores"].values() for score in scores] + list(
        map(mean, means.values())
    )
    assert sorted(map(float, shown)) == pytest.approx(sorted(expected), abs=0.0051)
    assert page.count("data:image/png;base64,") == len({row["task"] for row in study["rows"]}) + 1 + len(demo["scales"])
    assert all(escape(prompt["answers"]["SEAL-C"]) in page for prompt in demo["prompts"])


@pytest.mark.filterwarnings("error:constrained_layout:UserWarning")
def test_every_figure_of_the_repositorys_results_is_on_the_page(tmp_path):
    results = ROOT / "results"
    write_report(results, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    files = [*results.glob("*.png"), *results.glob("probes/*.png")]
    drawn = {file.stem for file in files if file.with_suffix(".json").exists()}
    assert {"demo", "smollm2_line_direct"} <= drawn and len(files) > len(drawn) + 4
    for file in files:
        assert (base64.b64encode(file.read_bytes()).decode() in page) == (file.stem not in drawn), file
    headings = re.findall("<h[23]>([^<]*)", page)
    assert headings[headings.index("Other figures") :].count("Figure: bench memory") == 1
    assert headings.index("smollm2.json") < headings.index("Figure: placements") < headings.index("Other figures")
    controls = headings[headings.index("smollm2_controls.json") :]
    assert "Figure: weights" in controls[: controls.index("smollm2_transfer.json")]


def test_results_in_subfolders_stand_apart_with_their_commands(tmp_path):
    made = {"command": "seal eval --task line", "date": "2026-01-02", "commit": "abc", "machine": "CPU"}
    (tmp_path / "a.json").write_text(json.dumps(values()))
    for name in ("unseen", "merged"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "b.json").write_text(json.dumps(values(method="SEAL-C") | {"origin": made}))
    (tmp_path / "merged" / "config.json").write_text("{}")  # a model's folder
    assert write_report(tmp_path, tmp_path / "report.html") == 2
    page = (tmp_path / "report.html").read_text()
    assert re.findall("<h2>([^<]*)", page) == [LONGCHAT, f"{LONGCHAT}, unseen"]
    assert "<code>seal eval --task line</code><small>2026-01-02, abc, CPU</small>" in page


def test_studies_are_means_over_seeds():
    score = {"length": 512, "tokens": 500.0, "count": 50, "low": 0.1, "high": 0.9}
    runs = [{"task": "vt", "method": "SEAL-H", "scores": [score | {"score": value}]} for value in (0.2, 0.6)]
    (row,) = study_table(runs)["rows"]
    assert row["cells"] == [{"score": pytest.approx(0.4), "count": 100, "low": None, "high": None, "paper": None}]


@pytest.mark.parametrize(("content", "message"), [
    (None, "holds no results"), ("{", "not JSON"), ('{"kind": "removal"}', "unknown kind 'removal'"),
])  # fmt: skip
def test_nothing_to_report(content, message, tmp_path):
    (tmp_path / "probes").mkdir()
    if content:
        (tmp_path / ("probes" if "kind" in content else ".") / "a.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_page_shows_probes_with_their_numbers(tmp_path):
    head_map = {"kind": "ablation", "unit": "head", "model": "m", "task": "line", "samples": 20, "seconds": 12.0,
             "lengths": [512, 1448], "base": {"score": {"512": 0.9, "1448": 0.6}},
             "change": {"score": {"512": [[0.1, -0.2], [-0.3, 0.0]],
                                  "1448": [[0.05, 0.15], [-0.25, 0.1]]}}}  # fmt: skip
    (tmp_path / "probes").mkdir()
    (tmp_path / "probes" / "heads.json").write_text(json.dumps(head_map))
    assert write_report(tmp_path, tmp_path / "report.html") == 1
    page = (tmp_path / "report.html").read_text()
    assert "1 in quadrant 1, 1 in quadrant 2, 1 in quadrant 3, 0 in quadrant 4" in page
    assert "L0H1 +0.15 and L1H0 -0.25" in page and "0.90 at 512, 0.60 at 1448" in page
    assert page.count("data:image/png;base64,") == 1


def test_a_sweep_stands_beside_table_7(tmp_path):
    over_seeds = [
        {"rate": rate, "samples": count, "epochs": epochs, "mean": mean}
        for rate, count, epochs, mean in ((0.01, 10, 5, 0.3), (0.01, 50, 1, 0.4), (0.02, 50, 1, 0.6))
    ]
    sweep = {"kind": "sweep", "model": "m", "base_model": LONGCHAT, "method": "SEAL-H", "task": "line", "seeds": [0, 1],
             "lengths": [31000], "validation_samples": 20, "over_seeds": over_seeds, "best": over_seeds[2]}  # fmt: skip
    shown = rate_table(sweep)
    assert shown["columns"] == ["10 samples × 5", "50 samples"]
    by_rate = {row["name"]: row["cells"] for row in shown["rows"]}
    assert [cell and (round(cell["score"], 2), cell["count"], cell["paper"]) for cell in by_rate["0.01"]] == [
        (0.3, 40, None), (0.4, 40, (0.78, 7))
    ]  # fmt: skip
    assert by_rate["0.02"][0] is None and by_rate["0.02"][1]["paper"] == (0.82, 7)
    assert all(cell is None or cell["paper"] is None
               for row in rate_table(sweep | {"base_model": "m"})["rows"] for cell in row["cells"])  # fmt: skip
    (tmp_path / "probes").mkdir()
    (tmp_path / "probes" / "sweep.json").write_text(json.dumps(sweep))
    write_report(tmp_path, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "learning rate" in page and "paper 0.82, table 7" in page

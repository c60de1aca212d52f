"""Scores: LongEval's parsing, lm-eval as harness, prompts equal to the training text, results as JSON."""

from __future__ import annotations

import gc
import json
import math
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from paths import FIXTURES, TINY
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_plugins.common.console import run as run_app
from axolotl_plugins.seal import SealConfig
from axolotl_plugins.seal.model_loading import load, load_each
from data_gen.dataset import Request, generate
from data_gen.file_task import longeval_cases
from data_gen.metrics import last_integer
from data_gen.tasks import niah, resolve_task
from eval.__main__ import app
from eval.cli_options import parse_heads, parse_lengths
from eval.confidence import wilson
from eval.evaluate import evaluate
from eval.lm_eval_model import Harness, Responses
from eval.results import from_json, read_results, to_json
from eval.resume import result_name
from eval.score_by_length import mean_scores, score_by_length
from eval.score_plots import labels
from eval.spec import METRICS, EvalSpec, default_lengths, resolve_tasks


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("The <REGISTER_CONTENT> in line odd-shrimp is 24819.", 24819),
        ('The <REGISTER_CONTENT> in line verdant-efficiency is "24856".', 24856),
        ("24819 is right, not 5.", 5),
        ("12,345", 345),
        ("-7", 7),
        ("007", 7),
        ("no number", None),
        ("", None),
        ("line 3: 17\n", 17),
    ],
)
def test_last_integer(response, expected):
    assert last_integer(response) == expected


ORIGINALS = [json.loads(row) for row in (FIXTURES / "scores.jsonl").read_text().splitlines()]


def test_scores_are_those_of_the_original_programs():
    """Over 50 responses each, recorded from LongEval's parsing, RULER's string_match_all and NIAH's ROUGE-1 recall."""
    rows = {task: [row for row in ORIGINALS if row["task"] == task] for task in ("line", "vt", "niah")}
    assert all(len(found) > 50 for found in rows.values())
    for row in rows["line"]:
        assert last_integer(row["response"]) == row["parsed"]
    for row in rows["vt"]:
        assert round(100 * METRICS["vt"](row["response"], row["references"]), 2) == row["score"]
    for row in rows["niah"]:
        assert 100 * METRICS["niah"](row["response"], [niah.TEST_REFERENCE]) == pytest.approx(row["score"])
    assert len({row["score"] for row in rows["niah"]}) >= 10 and len({row["score"] for row in rows["vt"]}) > 2


ROUGE = [
    # The paper's wrong and right answers (section 5.3) and what it gives them, then what is left out of the formula.
    ("eat a sandwich and sit in Dolores Park on a sunny day", 1.0),
    ("The best thing to do in San Francisco is EAT a sandwich, and sit in dolores park on a sunny day!", 1.0),
    ("Go to the top of the hill at Lands End and look out at the city.", 0.0833),
    ("eating sandwiches", 2 / 12),
    ("", 0.0),
    ("日本語 🙂", 0.0),
    ("a a a a", 2 / 12),
]


@pytest.mark.parametrize(("response", "expected"), ROUGE)
def test_needles_are_scored_by_recall_of_words(response, expected):
    assert METRICS["niah"](response, [niah.TEST_REFERENCE]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("response", "expected"),
    [("ABCDE vwxyz", 1.0), ("abcde", 0.5), ("", 0.0), ("ABCD E", 0.0), ("xABCDEx ABCDE", 0.5), ("Ábcde", 0.0)],
)
def test_ruler_is_scored_by_the_share_of_references_found(response, expected):
    assert METRICS["vt"](response, ["ABCDE", "VWXYZ"]) == expected


def test_wilson_brackets_the_share_as_in_the_textbook():
    low, high = wilson(0.5, 10)
    assert (round(low, 4), round(high, 4)) == (0.2366, 0.7634)
    for count in (1, 50, 200):
        for correct in (0, count // 2, count):
            low, high = wilson(correct / count, count)
            assert 0 <= low <= correct / count <= high <= 1 and not math.isclose(low, high)


def test_scores_are_summed_up_by_length_by_depth_and_over_all():
    rows = [
        {"length": length, "depth": depth, "tokens": length - 4, "score": score}
        for length, depth, score in ((500, 0, 1.0), (500, 100, 0.0), (900, 0, 0.5), (500, 0, 0.5), (900, 100, 0.5))
    ]
    by_length, by_depth, (mean,) = (mean_scores(rows, *keys) for keys in (["length"], ["length", "depth"], []))
    assert [(row.length, row.count, row.score) for row in by_length] == [(500, 3, 0.5), (900, 2, 0.5)]
    assert [(row.length, row.depth, row.count, row.score) for row in by_depth] == [
        (500, 0, 2, 0.75), (500, 100, 1, 0.0), (900, 0, 1, 0.5), (900, 100, 1, 0.5)
    ]  # fmt: skip
    assert (mean.count, mean.score, mean.tokens, mean.length) == (5, 0.5, 656, None)
    assert all(row.low <= row.score <= row.high for row in (*by_length, *by_depth, mean))
    assert mean.high - mean.low < by_depth[0].high - by_depth[0].low


def test_default_lengths_are_the_papers_shares_of_the_window():
    assert default_lengths(32768) == [9216, 14336, 19456, 23552, 28672, 31744]
    assert max(default_lengths(2048)) <= 2048 - 128


def run_eval(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "eval", "run", *arguments], cwd=cwd, capture_output=True, text=True, timeout=600
    )


def test_the_small_model_and_an_adapter_of_it_are_scored_by_the_command(tmp_path):
    tuned(tmp_path / "tenth", "head", 0.1)
    done = run_eval(
        "--model", str(TINY), "--model", "tenth", "--lengths", "260,400", "--samples", "9", "--limit", "6",
        "--batch-size", "4", "--out", "scores", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    files = [f"line_{result_name(str(TINY))}", "line_tenth"]
    made = {f"{file}.{kind}" for file in files for kind in ("json", "png")}
    assert {file.name for file in (tmp_path / "scores").iterdir()} == {*made, "line_models.png"}
    result, other = (json.loads((tmp_path / "scores" / f"{file}.json").read_text()) for file in files)
    assert (tmp_path / "scores" / "line_tenth.png").read_bytes().startswith(b"\x89PNG")
    assert other["method"] == "SEAL-H" and other["mean"]["score"] < result["mean"]["score"]
    same = [[(row["index"], row["references"]) for row in rows["responses"]] for rows in (result, other)]
    assert same[0] == same[1]
    assert result["method"] == "base" and [score["count"] for score in result["scores"]] == [6, 6]
    assert result["mean"]["count"] == 12
    assert result["mean"]["score"] == pytest.approx(sum(score["score"] for score in result["scores"]) / 2)
    # Answers come from the model: it knows short records, and each response names the line it was asked for.
    assert result["scores"][0]["score"] >= 0.8
    for row in result["responses"]:
        assert row["score"] == (last_integer(row["response"]) == int(row["references"][0]))
    # The test samples are those of the generator, from the split that training never sees.
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    drawn = [s["references"] for s in generate(Request("line", "260", samples=6, split="test"), tokenizer)]
    assert [row["references"] for row in result["responses"] if row["length"] == 260] == drawn


def test_lines_that_the_model_knows_score_and_those_that_it_loses_do_not():
    short, long = score_by_length(load(TINY), "line", lengths=[256, 1960], samples=20).by_length().values()
    assert short >= 0.9 and long <= 0.7


def tuned(folder: Path, grain: str, value: float, base: str = str(TINY)) -> str:
    """A SEAL adapter of the small model whose scales are all ``value``."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(TINY), SealConfig(granularity=grain))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "seal_scale" in name:
                parameter.fill_(value)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder)
    return str(folder)


def other_shapes(folder: Path) -> str:
    """An adapter whose scales have another shape than the model's."""
    tuned(folder, "head", 1.0)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: torch.ones(5) for name in tensors}, folder / "adapter_model.safetensors")
    return str(folder)


def test_results_are_the_same_after_a_round_trip_through_json(tmp_path):
    outputs = [{task: tmp_path / f"{task}.json" for task in ("line", "niah")}]
    spec = EvalSpec(lengths=[400], samples=3)
    results = evaluate([load(TINY)], ["line", "niah"], spec, outputs=outputs)
    assert read_results(tmp_path) == results and [result.task for result in results] == ["line", "niah"]
    assert evaluate([load(TINY)], ["line", "niah"], spec) == results  # without files
    line, niah = (json.loads(file.read_text()) for file in outputs[0].values())
    assert list(line) == ["model", "base", "method", "task", "title", "window", "dtype", "seed", "shots",
                          "contaminated", "scores", "depths", "mean", "responses", "asked", "fingerprint",
                          "origin"]  # fmt: skip
    assert list(line["origin"]) == ["command", "date", "commit", "machine"]
    assert list(line["scores"][0]) == ["length", "tokens", "count", "score", "low", "high"]
    assert list(line["mean"]) == ["tokens", "count", "score", "low", "high"] and line["asked"]["samples"] == 3
    assert [row["depth"] for row in niah["depths"]] == [row.depth for row in results[1].depths] != []
    assert to_json(from_json(niah | {"unknown": 1})) == niah
    del line["mean"]
    (tmp_path / "line.json").write_text(json.dumps(line))
    with pytest.raises(ValueError, match=r"line\.json: incomplete result .*mean.*: score the model again"):
        read_results(tmp_path)


def test_base_adapter_and_merged_model_are_scored_in_one_dtype(tmp_path):
    from eval.__main__ import load_models

    half = tmp_path / "half"
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16)
    for saved in (model, AutoTokenizer.from_pretrained(TINY)):
        saved.save_pretrained(half)
    adapter = Path(tuned(tmp_path / "adapter", "head", 1.1, str(half)))
    model.config.dtype = torch.float32  # as training in float32 writes it beside the adapter
    model.config.save_pretrained(adapter)
    assert load(adapter).dtype == load(half).dtype == "bfloat16" and load(TINY).dtype == "float32"
    assert next(load_each({"a": str(adapter)}, dtype="float32")).dtype == "float32"

    def dtypes(*names, dtype="auto"):
        return [loaded.dtype for loaded in load_models([str(name) for name in names], {}, None, dtype=dtype)]

    assert dtypes(half, adapter, TINY) == ["bfloat16"] * 3 and dtypes(TINY, half) == ["float32"] * 2
    assert dtypes(half, adapter, dtype="float16") == ["float16"] * 2
    results = [
        score_by_length(load(half, dtype=dtype), "line", lengths=[260], samples=1) for dtype in ("auto", "float32")
    ]
    assert [result.dtype for result in results] == ["bfloat16", "float32"]
    assert labels(results) == ["base, bfloat16", "base, float32"] and labels(results[:1]) == ["base"]


def test_a_result_is_not_lost_to_one_of_other_samples_or_of_another_model(tmp_path):
    def score(samples: int, model: str = str(TINY), **options: str) -> None:
        wanted = ["--lengths", "260", "--samples", str(samples), "--out", str(tmp_path / "r.json")]
        more = [part for name, value in options.items() for part in (f"--{name}", value)]
        run_app(app, "python -m eval", ["run", "--model", model, *wanted, *more])

    score(2)
    first = (tmp_path / "r.json").read_bytes()
    with pytest.raises(SystemExit, match=r"r\.json: holds a result of other samples \(samples: 2, now 3\): move"):
        score(3)
    with pytest.raises(SystemExit, match=r"r\.json: holds a result of .*/tiny, not of .*/tuned: move it"):
        score(2, tuned(tmp_path / "tuned", "head", 0.5))
    with pytest.raises(SystemExit, match=r"r\.json: holds a result of line, not of vt: move it"):
        score(2, task="vt", lengths="900")
    assert (tmp_path / "r.json").read_bytes() == first
    score(2)
    assert (tmp_path / "r.json").read_bytes() == first
    score(2, f"{TINY}/../{TINY.name}")  # the same model
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"r\.json: is no result of this command"):
        score(2)


def test_a_finished_evaluation_is_read_and_not_run_again(tmp_path, monkeypatch, capsys):
    model = tmp_path / "model"
    shutil.copytree(TINY, model)

    def score(*more: str) -> dict[str, float]:
        command = ["run", "--model", str(model), "--lengths", "260", "--samples", "2", "--out", str(tmp_path / "out")]
        run_app(app, "python -m eval", [*command, *more])
        path = next((tmp_path / "out").glob("*.json"))
        return {"inode": path.stat().st_ino, "score": json.loads(path.read_text())["mean"]["score"]}

    first = score()
    printed = capsys.readouterr().out
    assert not list((tmp_path / "out").glob(".*"))  # no cache is left
    with monkeypatch.context() as patch:
        patch.setattr("axolotl_plugins.seal.model_loading.load", None)
        assert score("--batch-size", "1") == first
    again = capsys.readouterr().out
    assert again.endswith("scored before; remove the result files to score again\n")
    assert again.splitlines()[:-1] == printed.splitlines()[1:]  # without the line before scoring
    (model / "generation_config.json").touch()  # another model now
    assert score()["inode"] != first["inode"]


def test_several_adapters_share_one_base_and_score_as_they_do_alone(tmp_path):
    folders = {"tenth": tuned(tmp_path / "a", "head", 0.1), "none": tuned(tmp_path / "b", "channel", 1.0)}
    options = {"lengths": [300], "samples": 4}
    alone = {name: score_by_length(load(folder), "line", **options) for name, folder in folders.items()}
    together = {}
    models = set()
    for name, loaded in zip(folders, load_each(folders), strict=True):
        models.add(id(loaded.model))
        together[name] = score_by_length(loaded, "line", **options)
    assert len(models) == 1 and together == alone
    assert alone["tenth"].responses != alone["none"].responses
    assert [result.method for result in together.values()] == ["SEAL-H", "SEAL-C"]
    for other, message in ((tuned(tmp_path / "c", "head", 1.0, "elsewhere"), "is of elsewhere, "),
                           (str(TINY), "has no adapter_config.json"),
                           (other_shapes(tmp_path / "d"), "cannot load .*size mismatch")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            next(load_each({"a": folders["tenth"], "b": other}))


def test_a_recipes_model_config_holds_for_a_base_model(tmp_path):
    rope = {"rope_type": "self_extend", "rope_theta": 10000.0, "group_size": 2, "neighbor_window": 512}
    changes = {"max_position_embeddings": 4096, "rope_parameters": rope}
    loaded = load(TINY, model_config=changes)
    assert loaded.window == 4096 and loaded.model.config.rope_parameters["group_size"] == 2
    assert loaded.model.config._attn_implementation == "self_extend" and load(TINY).window == 2048


@pytest.mark.parametrize(
    ("task", "version"), [("line", None), ("niah", None), ("vt", None), ("cwe", None), ("fwe", None), ("cwe", 2025)]
)
def test_prompt_ids_are_the_first_of_the_training_ids(task, version):
    """Also where the prompt goes on into the assistant's turn."""
    from eval.lm_eval_model import lm_eval_task

    loaded = load(TINY)
    harness = Harness(pretrained=loaded.model, tokenizer=loaded.tokenizer, add_bos_token=False)
    request = Request(task, "1900", samples=2, ruler_version=version)
    samples = list(generate(request, loaded.tokenizer))
    lm_task = lm_eval_task(resolve_task(task), samples, loaded.tokenizer)
    lm_task.build_all_requests()
    for instance, sample in zip(lm_task.instances, samples, strict=True):
        ids, mask = harness.tok_batch_encode([instance.args[0]])
        prompt = ids[0].tolist()
        training = loaded.tokenizer.apply_chat_template(sample["messages"], return_dict=False)
        assert prompt == training[: len(prompt)] and bool(mask.all())
        assert prompt.count(loaded.tokenizer.bos_token_id) == 1
        rest = loaded.tokenizer.decode(training[len(prompt) :])
        assert rest.removesuffix("</s>").strip() == sample["answer"].removeprefix(sample.get("prefix", "")).strip()


def test_an_example_with_its_answer_comes_before_the_prompt(monkeypatch):
    prompts = []
    key = Responses.key
    monkeypatch.setattr(Responses, "key", staticmethod(lambda request: prompts.append(request[0]) or key(request)))
    loaded = load(TINY)
    plain = score_by_length(loaded, "line", lengths=[300], samples=2)
    without = list(dict.fromkeys(prompts))
    prompts.clear()
    shown = score_by_length(loaded, "line", lengths=[300], samples=2, shots=1, shot_tokens=300)
    assert shown.shots == 1 and [row["references"] for row in shown.responses] == [
        row["references"] for row in plain.responses
    ]
    first = next(generate(Request("line", "300", samples=1), loaded.tokenizer))["messages"]
    start = "<s><|user|>"
    example = f"{start}{first[0]['content']}\n{first[1]['content']}\n\n"
    assert len(without) == 2 and all(prompt.startswith(start) for prompt in without)
    assert list(dict.fromkeys(prompts)) == [example + prompt.removeprefix(start) for prompt in without]


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [([400], {"cases": "c"}, "lengths: published cases have their own: choose files by --lines"),
     (None, {"lines": [200]}, "lines: choose files of --cases, which is not given")],
)  # fmt: skip
def test_lengths_are_chosen_in_one_way(lengths, options, message):
    with pytest.raises(ValueError, match=message):
        resolve_tasks("line", EvalSpec(lengths=lengths), **options)


def test_blanks_between_names_do_not_matter():
    assert [task.name for task in resolve_tasks("line, vt ,cwe", EvalSpec())] == ["line", "vt", "cwe"]
    assert parse_heads("L1H18, L13H16") == [(1, 18), (13, 16)]


def test_lengths_are_in_order_and_distinct():
    assert parse_lengths("1024,512,1024") == [512, 1024] and parse_lengths("") is None
    with pytest.raises(ValueError, match="task: found ''"):
        resolve_tasks("line,", EvalSpec())


def test_an_adapter_is_scored_with_the_text_of_ruler_that_it_was_tuned_on(tmp_path):
    folder = Path(tuned(tmp_path / "adapter", "head", 1.0))
    files = [{"path": "d", "sha256": "0", "manifest": {"task": "vt", "ruler_version": 2024}}]
    (folder / "training_data.json").write_text(json.dumps({"files": files, "unread": [], "texts": []}))
    with pytest.raises(ValueError, match="was tuned on vt of RULER 2024: add --ruler-version 2024"):
        score_by_length(load(folder), "vt", lengths=[1500], samples=1)
    for task, version in (("vt", 2024), ("vt", 2025), ("fwe", None)):
        assert score_by_length(load(folder), task, lengths=[1500], samples=1, ruler_version=version).mean.count == 1


def test_a_run_that_was_cut_off_goes_on_and_ends_the_same(tmp_path, monkeypatch):
    journal, loaded = tmp_path / "journal", load(TINY)
    options = {"lengths": [260, 400], "samples": 3, "journal": journal}
    uninterrupted = score_by_length(loaded, "line", **options)
    rows = journal.read_bytes().splitlines(keepends=True)
    assert len(rows) == 6
    journal.write_bytes(b"".join(rows[:4]) + rows[4][:20])  # interrupted within the fifth
    answered = []
    add = Responses.add_partial
    monkeypatch.setattr(Responses, "add_partial", lambda *args: answered.append(args) or add(*args))
    assert score_by_length(loaded, "line", **options) == uninterrupted
    assert len(answered) == 2 and sorted(journal.read_bytes().splitlines(keepends=True)) == sorted(rows)


def test_longevals_own_cases_are_scored_as_they_are(tmp_path):
    sample = next(generate(Request("line", "300", samples=1), load(TINY).tokenizer))
    case = {"prompt": sample["messages"][0]["content"] + " ", "expected_number": sample["number"], "num_lines": 200}
    (tmp_path / "200_lines.jsonl").write_text(json.dumps(case) + "\n")
    (tmp_path / "30_lines.jsonl").write_text(json.dumps(case | {"num_lines": 30}) + "\n" * 1)
    result = score_by_length(load(TINY), longeval_cases(tmp_path))
    assert [score.length for score in result.scores] == [30, 200]
    assert result.responses[0]["references"] == [str(sample["number"])]
    assert [score.length for score in score_by_length(load(TINY), longeval_cases(tmp_path, [200])).scores] == [200]
    with pytest.raises(ValueError, match=r"has no 300_lines\.jsonl, only those of 30, 200 lines"):
        longeval_cases(tmp_path, [200, 300])
    long = next(generate(Request("line", "2000", samples=1), load(TINY).tokenizer))["messages"][0]["content"]
    (tmp_path / "680_lines.jsonl").write_text(json.dumps(case | {"prompt": long, "num_lines": 680}) + "\n")
    with pytest.raises(
        ValueError, match=r"a prompt of \d+ tokens .* use shorter --lengths \(of published cases --lines\)"
    ):
        score_by_length(load(TINY), longeval_cases(tmp_path))
    assert len(score_by_length(load(TINY), longeval_cases(tmp_path, [200, 30])).scores) == 2
    (tmp_path / "30_lines.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(ValueError, match=r"30_lines.jsonl, line 1: not a case of LongEval's"):
        longeval_cases(tmp_path)


def test_a_model_is_freed_before_the_next_is_loaded():
    """Two models of a card's size do not fit into it."""
    models = []

    def one_by_one():
        for _ in range(2):
            gc.collect()
            assert all(model() is None for model in models)
            loaded = load(TINY)
            models.append(weakref.ref(loaded.model))
            yield loaded
            del loaded

    evaluate(one_by_one(), ["line"], EvalSpec(lengths=[200], samples=1))
    assert len(models) == 2

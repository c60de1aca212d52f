"""Recipes for checkpoints with thinking templates, condensed RoPE and earlier exchanges, through Axolotl itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from axolotl_runs import launch, refusal, run, write_recipe
from datasets import load_from_disk
from paths import TINY
from transformers import AutoTokenizer

from axolotl_plugins.common.tokenizer import load_tokenizer
from axolotl_plugins.seal.merge import merge
from axolotl_plugins.seal.model_loading import load
from axolotl_plugins.seal.training_files import prepare_template, recipe_tokenizer
from eval.score_by_length import score_by_length as score
from eval.score_samples import prompt_ids
from recipes.tools.new_recipe import recipe_for

OWN = (TINY / "chat_template.jinja").read_text()
PROMPT = "{% if add_generation_prompt %}<|assistant|>"
# As R1-Distill's and QwQ's, and as Qwen3's.
THINKS = OWN.replace(PROMPT, PROMPT + "<think>\n")
SWITCHED = OWN.replace("<|assistant|>{% generation %}", "<|assistant|><think>\n\n</think>\n\n{% generation %}").replace(
    PROMPT,
    PROMPT + "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}",
)


def model_with(folder: Path, template: str = OWN, **config: object) -> str:
    """The tiny model with another template, and other keys of its config.json; None removes one."""
    shutil.copytree(TINY, folder)
    (folder / "chat_template.jinja").write_text(template)
    changed = json.loads((folder / "config.json").read_text()) | config
    changed = {key: value for key, value in changed.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(changed))
    return str(folder)


def prepared(folder: Path) -> list[dict]:
    """The token ids and labels that Axolotl prepared."""
    done = run(folder, "axolotl.cli.preprocess", "recipe.yml")
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = {file.parent for file in (folder / "data/prepared").rglob("dataset_info.json")}
    return list(load_from_disk(str(path)))


def generated(folder: Path) -> list[dict]:
    """The samples of the recipe's data file."""
    return [json.loads(row) for row in (folder / "data/tiny_line.jsonl").read_text().splitlines()]


def learned(row: dict) -> list[int]:
    """The ids with a loss."""
    return [label for label in row["labels"] if label != -100]


def test_a_template_that_opens_thinking_is_refused_everywhere(tmp_path):
    base = model_with(tmp_path / "base", THINKS)
    write_recipe(tmp_path, base_model=base)
    different = "training and scoring would see different prompts"
    assert different in refusal(launch(tmp_path))
    for use in (load, load_tokenizer, lambda name: recipe_for(name, "line", "sealc", gpu=False)):
        with pytest.raises(ValueError, match=different):
            use(base)


def test_template_arguments_hold_for_data_training_and_scoring(tmp_path):
    base, arguments = model_with(tmp_path / "base", SWITCHED), {"enable_thinking": False}
    with pytest.raises(ValueError, match="chat_template_kwargs"):
        load(base)
    text, _ = recipe_for(base, "line", "sealc", tokens="300:500", gpu=False, template_arguments=arguments)
    assert yaml.safe_load(text)["chat_template_kwargs"] == arguments
    write_recipe(tmp_path, base_model=base, chat_template_kwargs=arguments)
    tokenizer = load_tokenizer(base, None, arguments)
    prepared_rows, rows = sorted(prepared(tmp_path), key=lambda row: row["input_ids"]), generated(tmp_path)
    for row, sample in zip(prepared_rows, sorted(rows, key=lambda row: prompt_ids(tokenizer, row)), strict=True):
        prompt = prompt_ids(tokenizer, sample)
        assert tokenizer.decode(prompt).endswith("<think>\n\n</think>\n\n")
        assert row["input_ids"][: len(prompt)] == prompt and sample["tokens"] == len(row["input_ids"])
        assert learned(row) == row["input_ids"][len(prompt) :]
    done = launch(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    adapter = load(tmp_path / "out")  # without arguments
    assert prompt_ids(adapter.tokenizer, rows[0]) == prompt_ids(tokenizer, rows[0])
    assert json.loads((tmp_path / "out/training_data.json").read_text())["chat_template_kwargs"] == arguments
    manifest = json.loads((tmp_path / "data/tiny_line.jsonl.manifest.json").read_text())
    assert "--chat-template-kwargs" in manifest["command"] and "enable_thinking" in manifest["command"]
    assert score(adapter, "line", lengths=[300], samples=2).mean.count == 2
    merge(tmp_path / "out", tmp_path / "merged", report=lambda line: None)
    assert prompt_ids(load(tmp_path / "merged").tokenizer, rows[0]) == prompt_ids(tokenizer, rows[0])


@pytest.mark.parametrize(
    ("has_template", "recipe", "start"),
    [(True, {}, "<s><|user|>"), (True, {"chat_template": "tokenizer_default_fallback_chatml"}, "<s><|user|>"),
     (False, {"chat_template": "tokenizer_default_fallback_chatml"}, "<|im_start|>user"),
     (True, {"chat_template": "chatml"}, "<|im_start|>user")],
)  # fmt: skip
def test_data_is_counted_with_the_template_that_axolotl_uses(has_template, recipe, start, tmp_path):
    base = Path(model_with(tmp_path / "base"))
    if not has_template:
        (base / "chat_template.jinja").unlink()
    cfg = {"base_model": str(base), **recipe}
    chat = [{"role": "user", "content": "?"}]
    prepare_template(cfg)
    assert recipe_tokenizer(cfg, {}).apply_chat_template(chat, tokenize=False).startswith(start)
    assert cfg["chat_template"] == ("chatml" if recipe.get("chat_template") == "chatml" else "jinja")


def test_a_condensed_rope_is_trained_within_its_window(tmp_path):
    """LongChat's form: a short window and a ratio, which Transformers alone would ignore."""
    base = model_with(tmp_path / "base", max_position_embeddings=256, rope_condense_ratio=8, rope_parameters=None)
    recipe = write_recipe(tmp_path, base_model=base, sequence_len=4096)
    message = refusal(launch(tmp_path))
    assert "sequence_len: found 4096, but the window of" in message and "is 2048 tokens" in message
    data = recipe["seal"] | {"data": recipe["seal"]["data"] | {"tokens": 1000, "samples": 2}}
    write_recipe(tmp_path, base_model=base, sequence_len=1024, seal=data, max_steps=1)
    done = launch(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = load(tmp_path / "out")
    assert loaded.window == load(base).window == 2048
    assert loaded.model.config.rope_parameters == load(base).model.config.rope_parameters
    assert loaded.model.config.rope_parameters["factor"] == 8


def test_a_worked_exchange_is_not_learned(tmp_path):
    """RULER's example of common words, an earlier exchange of the chat."""
    recipe = write_recipe(tmp_path, sequence_len=2048)
    data = recipe["seal"] | {"data": {"task": "cwe", "tokens": 2000, "samples": 2, "ruler_version": 2025}}
    write_recipe(tmp_path, sequence_len=2048, seal=data)
    assert "only with `message_field_training: training`" in refusal(
        run(tmp_path, "axolotl.cli.preprocess", "recipe.yml")
    )
    datasets = [recipe["datasets"][0] | {"message_field_training": "training"}]
    write_recipe(tmp_path, sequence_len=2048, seal=data, datasets=datasets)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    prepared_rows, rows = prepared(tmp_path), generated(tmp_path)
    answers = {row["messages"][-1]["content"] + "</s>" for row in rows}
    assert {tokenizer.decode(learned(row)) for row in prepared_rows} == answers and len(answers) == 2
    prompts = [prompt_ids(tokenizer, row) for row in rows]
    assert all(any(row["input_ids"][: len(prompt)] == prompt for prompt in prompts) for row in prepared_rows)

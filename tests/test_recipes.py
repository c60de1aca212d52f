"""Every recipe: not drifted from its source, each key known to Axolotl or to us, its header true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from axolotl_plugins.seal.args import SealArgs
from axolotl_plugins.seal.plugin import check_recipe
from data_gen.generate import Request
from recipes.__main__ import count_parameters, recipe_for
from recipes.matrix import all_recipes

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "recipes").glob("*_*.yml"))
TEXTS = all_recipes()
FIVE = ("longchat7b", "mistral7b", "vicuna7b", "longchat13b", "vicuna13b")
RULER_MODELS = ("llama31_8b", "mistral7b", "longchat7b")


def test_recipes_are_what_the_matrix_says():
    written = {file.stem: file.read_text() for file in FILES}
    assert written == TEXTS, "run `make recipes`"


def test_the_papers_set_is_whole():
    for model in FIVE:
        for task in ("line", "niah"):
            assert {f"{model}_{task}_{method}" for method in ("sealh", "sealc", "seall", "seald")} <= TEXTS.keys()
    for model in RULER_MODELS:
        for task in ("vt", "cwe", "fwe"):
            assert {f"{model}_{task}_{method}" for method in ("sealh", "sealc")} <= TEXTS.keys()
    assert {"longchat7b_line_sealh_10x5", "longchat7b_line_sealh_25x2", "llama2_7b_ntk_niah_sealc"} <= TEXTS.keys()


def rate(name: str) -> float:
    return yaml.safe_load(TEXTS[name])["learning_rate"]


def test_rates_are_the_papers():
    """Tables 4 and 5, and section 9."""
    assert [rate(f"{m}_line_sealh") for m in FIVE] == [0.01, 0.01, 0.01, 0.02, 0.02]
    assert {rate(f"{m}_line_sealc") for m in FIVE} == {0.02} and {rate(f"{m}_niah_sealh") for m in FIVE} == {0.04}
    assert [rate(f"{m}_niah_sealc") for m in ("longchat7b", "mistral7b", "vicuna7b")] == [0.05, 0.04, 0.05]
    ruler = {task: [rate(f"{m}_{task}_sealc") for m in RULER_MODELS] for task in ("vt", "cwe", "fwe")}
    assert ruler == {"vt": [0.01, 0.01, 0.02], "cwe": [0.01, 0.01, 0.01], "fwe": [0.005, 0.02, 0.01]}
    assert {rate(f"{m}_{t}_sealh") for m in RULER_MODELS for t in ruler} == {0.01}
    assert (rate("longchat7b_line_seall"), rate("longchat7b_line_seald")) == (0.0002, 0.0002)


@pytest.fixture(scope="module")
def known_keys():
    from axolotl.utils.schemas.config import AxolotlInputConfig

    fields = {}
    for name, field in AxolotlInputConfig.model_fields.items():
        fields[name] = field
        if field.alias:
            fields[field.alias] = field
    return fields


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_recipe_is_sound(file, known_keys):
    """Axolotl drops unknown keys without a word, so that a typo would go unnoticed."""
    from axolotl.utils.schemas.datasets import SFTDataset

    text = file.read_text()
    assert text.startswith(f"# accelerate launch -m axolotl.cli.train recipes/{file.name}\n#\n# SEAL-")
    cfg = yaml.safe_load(text)
    assert not re.findall(r"^\w+:\s*$\n(?=\S|\Z)", text, re.MULTILINE), "an empty key"
    assert cfg.keys() - known_keys.keys() == {"seal"}
    assert all(dataset.keys() <= SFTDataset.model_fields.keys() for dataset in cfg["datasets"])
    block = SealArgs(seal=cfg["seal"]).seal
    check_recipe(cfg)
    requests = [Request(**data.model_dump(), split="train") for data in block.data]
    assert all(request.token_range()[1] < cfg["sequence_len"] for request in requests)
    assert cfg["output_dir"] == f"outputs/{file.stem}"
    if template := cfg.get("chat_template_jinja"):
        assert (ROOT / template).is_file() and cfg["chat_template"] == "jinja"
    if file.stem.endswith(("seall", "seald")):
        assert cfg["adapter"] == "lora" and cfg["lora_r"] == 4 and cfg["peft_use_dora"] == file.stem.endswith("seald")


def test_no_two_recipes_write_different_data_to_one_file():
    seen = {}
    for file in FILES:
        cfg = yaml.safe_load(file.read_text())
        for dataset, data in zip(cfg["datasets"], SealArgs(seal=cfg["seal"]).seal.data, strict=True):
            described = (cfg["base_model"], data)
            assert seen.setdefault(dataset["path"], described) == described


def test_parameters_are_those_of_table_8():
    paper = yaml.safe_load((ROOT / "eval" / "paper.yml").read_text())["parameters"]
    names = {"sealh": "SEAL-H", "sealc": "SEAL-C", "seall": "SEAL-L", "seald": "SEAL-D"}
    counts = count_parameters()
    assert len(paper) == 6
    for model, printed in paper.items():
        assert {names[method]: round(count / 1000, 1) for method, count in counts[model].items()} == printed


def test_vicuna_template_is_fastchats():
    """Recorded from FastChat 0.2.36, ``get_conv_template("vicuna_v1.1")``, two turns and an open third."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "recipes" / "tiny")
    tokenizer.chat_template = (ROOT / "recipes" / "templates" / "vicuna_v1.1.jinja").read_text()
    chat = [("user", "Hello!"), ("assistant", "Hi there."), ("user", "How are you?")]
    rendered = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in chat], tokenize=False, add_generation_prompt=True
    )
    assert rendered == "<s>" + (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: Hello! ASSISTANT: Hi there.</s>USER: How are you? "
        "ASSISTANT:"
    )


def test_a_recipe_for_the_small_model_and_what_cannot_be_tuned(tmp_path):
    tiny = str(ROOT / "recipes" / "tiny")
    text, found = recipe_for(tiny, "line", "sealh", None, None, "mine")
    cfg = yaml.safe_load(text)
    assert text.startswith("# accelerate launch -m axolotl.cli.train recipes/mine.yml") and "o_proj" in found
    assert (cfg["base_model"], cfg["seal"]["data"]["tokens"], cfg["sequence_len"]) == (tiny, 1984, 2048)
    check_recipe(cfg)
    for arguments, message in (
        ((tiny, "lines", "sealc", None, None), "task: found 'lines'"),
        ((tiny, "line", "seal", None, None), "method: found 'seal'"),
        ((tiny, "line", "sealc", 5000, None), "tokens: 5000 do not fit into the window of 2048"),
        ((tiny, "line", "sealc", None, "nope"), "chat-template: found 'nope', expected one of vicuna_v1.1"),
        ((str(tmp_path), "line", "sealc", None, None), "cannot load"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe_for(*arguments, None)

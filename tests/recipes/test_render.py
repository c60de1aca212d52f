"""Every recipe: equal to what matrix.yml renders, each key known to Axolotl or the plugin, its header true."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import get_args

import pytest
import yaml
from paths import FIXTURES, ROOT, TINY
from pydantic import AliasChoices, BaseModel
from transformers import AutoTokenizer, LlamaConfig
from typer.main import get_command
from typer.testing import CliRunner

from axolotl_plugins.seal.args import SealArgs
from axolotl_plugins.seal.validation import check_recipe
from data_gen.dataset import Request, generate
from eval.__main__ import app as eval_app
from recipes.__main__ import app
from recipes.tools.cost import Shape, recipe_cost
from recipes.tools.methods import METHODS, count_parameters
from recipes.tools.new_recipe import recipe_for
from recipes.tools.render import README, Recipe, matrix_recipes, measurement, read_matrix, readme

TEXTS = {recipe.name: recipe.text for recipe in matrix_recipes()}
REPRODUCE = ROOT / "docs" / "reproduce.md"
# A user's own recipes may lie beside them.
FILES = sorted(
    file for file in (ROOT / "recipes").glob("*.yml") if file.stem.startswith(tuple(read_matrix()["models"]))
)
FIVE = ("longchat7b", "mistral7b", "vicuna7b", "longchat13b", "vicuna13b")
RULER_MODELS = ("llama31_8b", "mistral7b", "longchat7b")


def test_recipes_are_what_the_matrix_says():
    written = {file.stem: file.read_text() for file in FILES}
    assert written == TEXTS, "run `make recipes`"


def test_the_table_of_the_readme_is_what_write_makes():
    """One row per recipe, under prose that a user may edit."""
    text = README.read_text()
    assert text == readme(matrix_recipes()), "run `seal recipe write`"
    rows = [row for row in text.splitlines() if re.search(r"\| \[(\w+)\.yml\]\(\1\.yml\) \|", row)]
    assert sorted(re.findall(r"\((\w+)\.yml\)", "".join(rows))) == sorted(TEXTS) and len(rows) == len(TEXTS)
    row = next(row for row in rows if "(longchat7b_niah_sealc.yml)" in row)
    assert "| 64 measured | 2.8 minutes on one H100; 2.7 minutes measured on one H200 |" in row
    assert "| 11 | 97 minutes on two CPU cores |" in next(row for row in rows if "(smollm2_niah_sealc.yml)" in row)


def test_a_readme_without_its_mark_is_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.tools.render.README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text("mine\n")
    with pytest.raises(ValueError, match="the line above its table is missing"):
        readme(matrix_recipes())


def test_measured_steps_are_those_of_the_recipes_own_setting():
    """Not of another, of other lengths or of another method."""
    measured = {recipe.name for recipe in matrix_recipes() if measurement(recipe)}
    assert {"longchat7b_line_sealc", "longchat7b_niah_sealh"} <= measured
    assert not {"llama31_8b_128k_line_sealc_cp8", "longchat7b_vt_sealc", "mistral7b_line_sealc",
                "longchat7b_line_seall"} & measured  # fmt: skip
    header = " ".join(TEXTS["longchat7b_line_sealc"].replace("#", "").split())
    assert "one H200 (docs/performance.md): 3.2 s a sample and 64.5 GiB, so 2.7 minutes" in header


def chosen(name: str) -> dict:
    """What a recipe says about recomputation."""
    keys = ("gradient_checkpointing", "selective_checkpointing", "activation_offloading", "liger_rope")
    cfg = yaml.safe_load(TEXTS[name])
    every = (cfg.get("gradient_checkpointing_kwargs") or {}).get("every_n_layers")
    return {key: cfg[key] for key in keys if key in cfg} | ({"every": every} if every else {})


def test_recipes_spend_the_memory_of_their_card():
    full, selective = {"gradient_checkpointing": True}, {"selective_checkpointing": True, "liger_rope": True}
    assert chosen("longchat7b_line_sealc") == full | selective | {"every": 2}
    assert chosen("longchat7b_line_seall") == full | selective
    assert chosen("vicuna7b_line_sealh") == {"gradient_checkpointing": False, "liger_rope": True}
    assert chosen("llama31_8b_128k_line_sealc") == full | selective | {"activation_offloading": "hidden_states"}
    # No choice where attention is another, or several devices share the work.
    for name in ("llama2_7b_selfextend_line_sealc", "llama31_8b_128k_line_sealc_cp8", "longchat13b_line_sealc_zero3"):
        assert chosen(name) == full, name


def test_a_recipe_for_another_card_says_what_it_costs(tmp_path):
    """Of the same model: with 24 GiB, layer inputs and attention outputs in host memory."""
    entry = read_matrix()["models"]["longchat7b"] | {"type": "llama"}
    made = Recipe(Path("recipes/x.yml"), entry, "line", "sealc", rate=0.02, shows="a test",
                  shape=Shape.of(read_matrix()["shapes"]["llama2_7b"]), card=24)  # fmt: skip
    cfg, text = yaml.safe_load(made.text), " ".join(made.text.replace("#", "").split())
    assert cfg["selective_checkpointing"] == {"offload": True} and cfg["activation_offloading"] == "hidden_states"
    assert "about 18 GiB and 18 minutes on one RTX4090, 21.6 s a sample, computed from shapes" in text
    assert "keeps layer inputs and attention outputs in host memory (15 GiB)" in text and "Measured" not in text
    check_recipe(cfg)
    with pytest.raises(ValueError, match="card: found 40, expected one of 24, 48, 80, 141"):
        recipe_for(str(TINY), "line", "sealc", gpu=True, card=40)


def test_layers_with_a_sliding_window_keep_flash_attention(tmp_path):
    small = shutil.copytree(TINY, tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"model_type": "mistral", "sliding_window": 256,
                                                            "architectures": ["MistralForCausalLM"]}))  # fmt: skip
    cfg = yaml.safe_load(recipe_for(str(small), "line", "sealc", gpu=True)[0])
    assert cfg["attn_implementation"] == "flash_attention_2" and "selective_checkpointing" not in cfg
    assert cfg["gradient_checkpointing"] is True


def test_commands_of_the_reproduction_exist():
    """Files, options, and each table and figure that the recipes reproduce."""
    text = REPRODUCE.read_text()
    options = {option for parameter in get_command(eval_app).commands["run"].params for option in parameter.opts}
    commands = re.findall(r"seal eval [^`\n]+", text)
    assert len(commands) >= 7
    for command in commands:
        assert set(re.findall(r" (--[a-z-]+)", command)) <= options, command
    for path in re.findall(r"recipes/[\w./]+\.(?:yml|jinja)", text.replace("recipes/NAME.yml", "")):
        assert (ROOT / path).is_file(), path
    for name in re.findall(r"outputs/(\w+)", text):
        assert name in TEXTS or name == "NAME", name
    shown = {place for row in read_matrix()["recipes"] for place in re.findall(r"(?:Table|Figure) \d+", row["shows"])}
    assert shown - {"Table 8"} <= set(re.findall(r"(?:Table|Figure) \d+", text)) and "seal recipe params" in text


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


class OnceLoader(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error; PyYAML takes the last one."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"given twice: {keys}"
        return super().construct_mapping(node, deep)


def models_in(annotation) -> list[type[BaseModel]]:
    """Schemas that a field may hold, however deep in unions and lists."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]


def unknown_keys(settings, schema: type[BaseModel]) -> set[str]:
    """Keys in ``settings``, at any depth, that a schema has no field for."""
    fields = {}
    for name, field in schema.model_fields.items():
        alias = field.validation_alias
        for key in (name, field.alias, *(alias.choices if isinstance(alias, AliasChoices) else ())):
            fields[key] = field
    found = {key for key in settings if key not in fields}
    for key in settings.keys() & fields.keys():
        schemas = models_in(fields[key].annotation)
        for part in settings[key] if isinstance(settings[key], list) else [settings[key]]:
            if isinstance(part, dict) and schemas:
                tries = [unknown_keys(part, one) for one in schemas]
                found |= {f"{key}.{name}" for name in min(tries, key=len)}
    return found


def empty_keys(value, place="") -> list[str]:
    """Places without a value."""
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [found for key, part in items for found in empty_keys(part, f"{place}.{key}")]
    return [place] if value in (None, "", {}, []) else []


@pytest.fixture(scope="module")
def schema():
    """Axolotl's own, with what our plugin adds to it, as Axolotl merges them."""
    from axolotl.integrations.base import PluginManager
    from axolotl.integrations.config import merge_input_args

    manager = PluginManager.get_instance()
    before = manager.plugins.copy()
    manager.register("axolotl_plugins.seal.SealPlugin")
    manager.register("axolotl.integrations.liger.LigerPlugin")
    yield merge_input_args()[1]
    manager.plugins = before


def test_unknown_keys_are_found_at_any_depth(schema):
    recipe = yaml.safe_load(TEXTS["longchat7b_line_sealc"])
    recipe["wandb_projekt"] = "x"
    recipe["datasets"][0]["rolls_to_train"] = []
    recipe["seal"]["data"]["token"] = 1
    assert unknown_keys(recipe, schema) == {"wandb_projekt", "datasets.rolls_to_train", "seal.data.token"}
    assert empty_keys({"a": {"b": None}, "c": [{"d": ""}], "e": 0, "f": False}) == [".a.b", ".c.0.d"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_recipe_is_sound(file, schema):
    """Axolotl drops unknown keys without a word, so that a typo would go unnoticed."""
    text = file.read_text()
    assert text.startswith(f"# accelerate launch -m axolotl.cli.train recipes/{file.name}\n#\n# ")
    assert re.search(r"^# Takes .* GiB.* (computed|measured)", text, re.MULTILINE)
    cfg = yaml.load(text, OnceLoader)
    assert not empty_keys(cfg) and not unknown_keys(cfg, schema)
    assert cfg.get("model_config", {}).keys() <= LlamaConfig().to_dict().keys()
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
    counts = count_parameters(read_matrix())
    assert len(paper) == 6
    for model, printed in paper.items():
        lora = counts[model]["seall"]
        assert printed == {
            METHODS[method]: [round(count / 1000, 1), pytest.approx(count / lora, abs=1e-4)]
            for method, count in counts[model].items()
        }


@pytest.mark.parametrize("case", json.loads((FIXTURES / "vicuna.json").read_text()))
def test_vicuna_template_is_fastchats(case):
    """Recorded from FastChat 0.2.36, ``get_conv_template("vicuna_v1.1").get_prompt()``, which leaves out ``<s>``."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = (ROOT / "recipes" / "templates" / "vicuna_v1.1.jinja").read_text()
    open_turn = case["messages"][-1]["role"] == "user"
    rendered = tokenizer.apply_chat_template(case["messages"], tokenize=False, add_generation_prompt=open_turn)
    assert rendered == "<s>" + case["prompt"]


OWN = ("mistral_v1", "llama3")  # what the tokenizers of Mistral-7B-Instruct-v0.2 and Llama-3.1 bring, as Axolotl has it


@pytest.mark.parametrize("template", ["vicuna_v1.1", *OWN, "tiny"])
def test_axolotl_trains_on_the_ids_that_the_model_is_asked_with(template):
    from axolotl.prompt_strategies.chat_template import load
    from axolotl.utils.chat_templates import get_chat_template
    from axolotl.utils.dict import DictDefault

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    if template in OWN:
        tokenizer.chat_template = get_chat_template(template)
    elif template != "tiny":
        tokenizer.chat_template = (ROOT / "recipes" / "templates" / f"{template}.jinja").read_text()
    cfg = {"chat_template": "tokenizer_default", "train_on_inputs": False, "sequence_len": 2048}
    strategy = load(tokenizer, DictDefault(cfg), {"type": "chat_template", "roles_to_train": ["assistant"]})
    sample = next(generate(Request("line", "400", samples=1), tokenizer))
    row = strategy.tokenize_prompt({"messages": sample["messages"]})
    ids, labels = list(row["input_ids"]), list(row["labels"])
    assert ids == tokenizer.apply_chat_template(sample["messages"], return_dict=False)
    # As eval asks: the text of the template, encoded without another beginning.
    text = tokenizer.apply_chat_template(sample["messages"][:1], tokenize=False, add_generation_prompt=True)
    asked = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[: len(asked)] == asked and ids.count(tokenizer.bos_token_id) <= 1
    learned = [id_ for id_, label in zip(ids, labels, strict=True) if label != -100]
    assert labels[: len(asked)] == [-100] * len(asked) and learned
    assert tokenizer.decode(learned, skip_special_tokens=True).strip().startswith(sample["answer"])


def test_a_recipe_for_the_small_model_and_what_cannot_be_tuned(tmp_path):
    tiny = str(TINY)
    text, found = recipe_for(tiny, "line", "sealh", out=tmp_path / "mine.yml", gpu=True)
    cfg = yaml.safe_load(text)
    assert text.startswith(f"# accelerate launch -m axolotl.cli.train {tmp_path}/mine.yml") and "o_proj" in found
    assert "# Takes about 0.03 GiB and less than a minute on one H100" in text and cfg["output_dir"] == "outputs/mine"
    assert (cfg["base_model"], cfg["seal"]["data"]["tokens"], cfg["sequence_len"]) == (tiny, 1984, 2048)
    check_recipe(cfg)
    small = shutil.copytree(tiny, tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    for arguments, message in (
        ((str(small), "line", "sealc"), "has 100 embeddings, fewer than its tokenizer has tokens"),
        ((tiny, "line", "sealc", "0"), "tokens: found '0', expected N or N:M with 0 < N <= M"),
        ((tiny, "line", "sealc", "900:300"), "tokens: found '900:300', expected N or N:M with 0 < N <= M"),
        ((tiny, "line", "sealc", "300:"), "tokens: found '300:', expected N or N:M"),
        ((tiny, "line", "sealc", "300:2048"), "tokens: 2048 do not fit into the window of 2048"),
        ((tiny, "lines", "sealc"), "task: found 'lines'"),
        ((tiny, "line, vt, line", "sealc"), "task: found 'line,vt,line', expected at most 25 tasks, each once"),
        ((tiny, "line", "seal"), "method: found 'seal'"),
        ((tiny, "line", "sealc", "5000"), "tokens: 5000 do not fit into the window of 2048"),
        ((tiny, "line", "sealc", None, "nope"), "chat-template: found 'nope', expected one of vicuna_v1.1$"),
        ((tiny, "line", "sealc", None, "recipe.yml"), "chat-template: found 'recipe.yml'"),
        ((str(tmp_path), "line", "sealc"), "cannot load"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe_for(*arguments)


def test_a_recipe_for_a_file_of_chats(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    rows = list(generate(Request("line", "250:500", samples=7), tokenizer))
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps({"messages": row["messages"]}) + "\n" for row in rows))
    out, longest = tmp_path / "mine.yml", max(row["tokens"] for row in rows)
    command = ["new", str(TINY), "--data", str(file), "--method", "sealh", "--no-gpu", "--out", str(out)]
    assert CliRunner().invoke(app, command).exit_code == 0
    text = out.read_text()
    cfg = yaml.safe_load(text)
    assert cfg["datasets"][0]["path"] == str(file) and cfg["sequence_len"] == longest
    assert cfg["seal"] == {"granularity": "head"} and cfg["learning_rate"] == 0.01
    header = " ".join(line.lstrip("# ") for line in text.split("\n\n")[0].splitlines())
    assert f"SEAL-H on {TINY}, {file}: samples of {min(row['tokens'] for row in rows)} to {longest} tokens" in header
    assert "Trains on 7 samples, 1 epoch." in header and "a minute on two CPU cores" in header
    assert "line retrieval, others may suit better" in header and "Table" not in header
    check_recipe(cfg)
    cost = CliRunner().invoke(app, ["cost", str(out)])
    assert cost.exit_code == 0 and f"{longest} tokens at most" in cost.output
    lora, _ = recipe_for(str(TINY), "line", "seall", out=out, gpu=True, data=file)
    assert "seal" not in yaml.safe_load(lora) and "on one H100" in lora
    long = next(generate(Request("line", "2300", samples=1), tokenizer))
    for row, message in (
        (
            {"messages": long["messages"]},
            r"train\.jsonl: its longest sample has \d+ tokens, more than the model's",
        ),
        ({"prompt": "a", "completion": "b"}, r"train\.jsonl, line 8: found no chat, .* convert it with"),
    ):
        file.write_text("".join(json.dumps({"messages": row["messages"]}) + "\n" for row in rows) + json.dumps(row))
        with pytest.raises(ValueError, match=message):
            recipe_for(str(TINY), "line", "sealc", out=out, gpu=False, data=file)
    both = CliRunner().invoke(app, ["new", str(TINY), "--data", str(file), "--task", "line"])
    assert both.exit_code and "leave out --task and --tokens" in str(both.exception)


def test_a_recipe_for_a_described_task(tmp_path):
    spec = str(ROOT / "data_gen/examples/table.yml")
    text, _ = recipe_for(str(TINY), spec, "sealc", "300:600", out=tmp_path / "mine.yml", gpu=False)
    cfg = yaml.safe_load(text)
    assert cfg["seal"]["data"]["task"] == spec and cfg["datasets"][0]["path"] == "data/mine.jsonl"
    assert cfg["learning_rate"] == 0.02 and "table rows: its rate is that of line retrieval" in text
    check_recipe(cfg)


def test_a_range_shorter_than_a_sample_is_refused(tmp_path):
    for task, tokens, message in (
        ("line", "100:900", "tokens: 100 is too short for line retrieval, whose shortest sample has"),
        ("vt", "400", "tokens: 200 is too short for vt"),
        (str(ROOT / "data_gen/examples/tickets.yml"), "200", "tokens: 200 is too short for tickets"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe_for(str(TINY), task, "sealc", tokens, out=tmp_path / "mine.yml", gpu=False)


def test_a_recipe_for_a_cpu_and_a_range_of_lengths(tmp_path):
    out = tmp_path / "mine.yml"
    command = ["new", str(TINY), "--task", "vt", "--tokens", "0900:1800", "--no-gpu", "--out", str(out)]
    assert CliRunner().invoke(app, command).exit_code == 0
    text = out.read_text()
    assert '    tokens: "900:1800" #' in text and yaml.safe_load(text)["seal"]["data"]["tokens"] == "900:1800"
    assert (
        "# Takes about 1 GiB, and a minute on two CPU cores (with OMP_NUM_THREADS=2, or accelerate takes one)" in text
        and "A100" not in text
    )
    assert "gradient_checkpointing: false" in text and "attn_implementation: sdpa" in text
    # A single length of RULER's tasks is the end of a range.
    text, _ = recipe_for(str(TINY), "vt", "sealc", "1800", out=out, gpu=False)
    assert yaml.safe_load(text)["seal"]["data"]["tokens"] == "900:1800"


def test_recipes_for_cpus_fit_into_their_memory_and_state_the_measured_rate():
    """50 steps of 1,024 tokens took 5.3 minutes; a step of 7,680 took 11.0 GiB."""
    matrix = read_matrix()
    shape, entry = Shape.of(matrix["shapes"]["smollm2"]), matrix["models"]["smollm2"]
    measured = entry | {"tokens": 1024}
    text = Recipe(Path("recipes/x.yml"), measured, "line", "sealc", rate=0.05, shows="a test", shape=shape).text
    assert "and 5 minutes on two CPU cores" in text and "89 GFLOP/s" in " ".join(text.replace("#", "").split())
    assert "# Takes about 11 GiB, and 97 minutes" in TEXTS["smollm2_niah_sealc"]
    # A window of eight times the length: activations of all layers are no longer held at once.
    for tokens, recompute in ((7680, False), (60000, True)):
        longer = entry | {"tokens": tokens, "window": 65536}
        made = Recipe(Path("recipes/x.yml"), longer, "line", "sealc", rate=0.05, shows="", shape=shape)
        settings = yaml.safe_load(made.text)
        assert settings["gradient_checkpointing"] is recompute
        assert settings.get("gradient_checkpointing_kwargs") == ({"use_reentrant": False} if recompute else None)
        assert recipe_cost(settings, shape).cpu_gib < 16
    for name in TEXTS:
        if name.startswith("smollm2"):
            assert recipe_cost(yaml.safe_load(TEXTS[name]), shape).cpu_gib < 16


def test_the_small_models_recipes_are_whole():
    tasks, methods = ("line", "niah", "vt", "cwe", "fwe"), ("sealh", "sealc", "seall", "seald")
    names = {f"smollm2_{task}_{method}" for task in tasks for method in methods}
    names |= {f"smollm2_{mixture}_{method}" for mixture in ("multi", "demo") for method in ("sealh", "sealc")}
    assert {name for name in TEXTS if name.startswith("smollm2")} == names
    lengths = {"line": "512:7680", "niah": 7680, "vt": "1024:7680", "cwe": "2560:7680", "fwe": "1024:7680"}
    for task in tasks:
        data = yaml.safe_load(TEXTS[f"smollm2_{task}_sealc"])["seal"]["data"]
        assert data["tokens"] == lengths[task] and data.get("haystack") == ("prose" if task == "niah" else None)
    parts = yaml.safe_load(TEXTS["smollm2_multi_sealh"])["seal"]["data"]
    assert [(part["task"], part["tokens"], part["samples"]) for part in parts] == [
        (task, lengths[task], 10) for task in tasks
    ]


def test_a_mixture_has_a_file_of_data_for_each_of_its_tasks(schema):
    model = {"name": "a model", "base_model": str(TINY), "window": 2048, "tokens": "256:1960", "gpu": False}
    text = Recipe(Path("mixed_multi_sealc.yml"), model, "multi", "sealc", rate=0.01, shows="a mixture", shape=None).text
    cfg = yaml.load(text, OnceLoader)
    parts = SealArgs(seal=cfg["seal"]).seal.data
    assert "line retrieval + needle in a haystack + RULER's variable tracking + RULER's" in text
    assert all(len(line) <= 118 for line in text.splitlines() if line.startswith("#"))
    tasks = ("line", "niah", "vt", "cwe", "fwe")
    assert [(part.task, part.tokens, part.samples) for part in parts] == [(task, "256:1960", 10) for task in tasks]
    assert [dataset["path"] for dataset in cfg["datasets"]] == [f"data/mixed_multi_{task}.jsonl" for task in tasks]
    assert not unknown_keys(cfg, schema)
    check_recipe(cfg)


def test_no_command_of_the_docs_asks_for_other_samples_under_the_name_of_a_result():
    """Each is scored once, whatever tables it is in."""
    options_by_result: dict[tuple[str, ...], set[frozenset[tuple[str, str]]]] = {}
    for command in re.findall(r"seal eval [^`\n]+", REPRODUCE.read_text()):
        options = dict(re.findall(r"--(\S+) (\S+)", command))
        name = tuple(options.pop(key, "") for key in ("model", "task", "shots", "model-config", "out"))
        options.pop("chat-template", None)
        options_by_result.setdefault(name, set()).add(frozenset(options.items()))
    assert len(options_by_result) >= 7
    assert not {name: options for name, options in options_by_result.items() if len(options) > 1}

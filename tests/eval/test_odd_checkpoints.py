"""Checkpoints that state window, RoPE, chat template or ends of turns otherwise: loaded, tuned, merged and scored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from paths import TINY
from peft import get_peft_model
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from axolotl_plugins.common.window import read_config
from axolotl_plugins.seal import SealConfig
from axolotl_plugins.seal.merge import merge, verify
from axolotl_plugins.seal.model_loading import load
from axolotl_plugins.seal.tune import tune
from data_gen.dataset import Request, generate
from eval.generation import stop_ids
from eval.score_by_length import score_by_length
from eval.score_samples import score_samples
from recipes.tools.new_recipe import recipe_for

SHAPES = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
              "initializer_range": 0.2},
    "bloom": {"hidden_size": 32, "n_head": 4, "n_layer": 2, "initializer_range": 0.2},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "initializer_range": 0.2},
}  # fmt: skip


def save(folder: Path, model_type: str, **config: object) -> str:
    """A random-weight miniature with the tiny model's tokenizer; its config.json holds the keys as they are given."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    torch.manual_seed(0)
    shape = {
        **SHAPES[model_type],
        "vocab_size": len(tokenizer),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**shape, "model_type": model_type, "dtype": "float32", **config}))
    return str(folder)


def tuned(base: str, folder: Path, tokens: str = "300:400") -> Path:
    """A SEAL-C adapter, tuned without Axolotl as README shows."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    plain = AutoModelForCausalLM.from_pretrained(base, config=read_config(base))
    model = get_peft_model(plain, SealConfig(granularity="channel"))
    chats = [row["messages"] for row in generate(Request("line", tokens, samples=2), tokenizer)]
    tune(model, chats, tokenizer, lr=2e-2)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder)
    return folder


def logits(model: torch.nn.Module, length: int) -> torch.Tensor:
    """Of random tokens."""
    ids = torch.randint(5, 2000, (1, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_vicunas_stretched_window_is_scored_and_tuned(tmp_path):
    vicuna = {
        "max_position_embeddings": 512,
        "max_sequence_length": 2048,
        "rope_scaling": {"type": "linear", "factor": 4.0},
    }
    base = save(tmp_path / "base", "llama", **vicuna)
    loaded = load(base)
    assert loaded.window == 2048 and loaded.model.config.rope_parameters["factor"] == 4
    assert score_by_length(loaded, "line", lengths=[1900], samples=2).window == 2048
    samples = [{"length": 1900, **row} for row in generate(Request("line", "1900", samples=1), loaded.tokenizer)]
    assert len(score_samples(loaded.model, loaded.tokenizer, "line", samples)) == 1
    text, _ = recipe_for(base, "line", "sealc", gpu=False)
    assert "sequence_len: 2048" in text and "tokens: 1984" in text
    with pytest.raises(ValueError, match="lengths: 2100 tokens do not fit into the model's window of 2048"):
        score_by_length(loaded, "line", lengths=[2100])


def test_a_condensed_rope_is_applied_in_tuning_merging_and_scoring(tmp_path):
    """As LongChat's own program reads it: positions are divided by the ratio."""
    base = save(tmp_path / "base", "llama", max_position_embeddings=256, rope_condense_ratio=8)
    loaded = load(base)
    assert loaded.window == 2048
    ignored = AutoModelForCausalLM.from_pretrained(base)
    linear = AutoConfig.from_pretrained(base)
    linear.rope_parameters = {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}
    expected = logits(AutoModelForCausalLM.from_pretrained(base, config=linear), 300)
    assert torch.equal(logits(loaded.model, 300), expected)
    assert (logits(ignored, 300) - expected).abs().max() > 1e-2
    chats = [row["messages"] for row in generate(Request("line", "900", samples=1), loaded.tokenizer)]
    with pytest.raises(ValueError, match="rope_condense_ratio: Transformers ignores it"):
        tune(get_peft_model(ignored, SealConfig(granularity="head")), chats, loaded.tokenizer, lr=1e-2)
    adapter = tuned(base, tmp_path / "adapter", "900:1000")
    merge(adapter, tmp_path / "merged", report=lambda line: None)
    verify(tmp_path / "merged", report=lambda line: None)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(merged, 300) - logits(load(adapter).model, 300)).abs().max() < 1e-4
    assert load(tmp_path / "merged").window == load(adapter).window == 2048
    text, _ = recipe_for(base, "line", "sealc", gpu=False)
    assert "sequence_len: 2048" in text


def test_tuning_beyond_the_window_is_refused(tmp_path):
    loaded = load(save(tmp_path / "base", "llama", max_position_embeddings=512))
    chats = [row["messages"] for row in generate(Request("line", "600", samples=1), loaded.tokenizer)]
    with pytest.raises(ValueError, match=r"a chat of \d+ tokens does not fit into the model's window of 512"):
        tune(get_peft_model(loaded.model, SealConfig(granularity="head")), chats, loaded.tokenizer, lr=1e-2)


@pytest.mark.parametrize(("model_type", "key"), [("bloom", "seq_length"), ("mpt", "max_seq_len")])
def test_models_with_alibi_are_tuned_merged_and_scored(model_type, key, tmp_path):
    base = save(tmp_path / "base", model_type, **{key: 1024})
    adapter = tuned(base, tmp_path / "adapter")
    merge(adapter, tmp_path / "merged", report=lambda line: None)
    for model in (base, adapter, tmp_path / "merged"):
        loaded = load(model)
        assert loaded.window == 1024
        assert score_by_length(loaded, "line", lengths=[300], samples=2).mean.count == 2
    assert "sequence_len: 1024" in recipe_for(base, "line", "sealc", gpu=False)[0]


def test_without_a_stated_window_an_option_states_it(tmp_path):
    base = save(tmp_path / "base", "bloom")
    adapter = tuned(base, tmp_path / "adapter")
    merge(adapter, tmp_path / "merged", report=lambda line: None)  # needs no window
    for model in (base, adapter, tmp_path / "merged"):
        with pytest.raises(ValueError, match=r"states no context window .*by --model-config"):
            load(model)
        stated = load(model, model_config={"max_position_embeddings": 700})
        assert score_by_length(stated, "line", lengths=[300, 600], samples=1).window == 700
    with pytest.raises(ValueError, match="or give --window N"):
        recipe_for(base, "line", "sealc", gpu=False)
    text, _ = recipe_for(base, "line", "sealc", gpu=False, window=700)
    assert "model_config:\n  max_position_embeddings: 700" in text and "sequence_len: 700" in text


def copy_of(folder: Path, remove: tuple[str, ...] = (), **files: dict) -> Path:
    """The tiny model with keys of its JSON files changed, or removed from tokenizer_config.json."""
    shutil.copytree(TINY, folder)
    for name, keys in files.items():
        file = folder / f"{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    file = folder / "tokenizer_config.json"
    file.write_text(
        json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key not in remove})
    )
    if "chat_template" in files.get("tokenizer_config", {}):
        (folder / "chat_template.jinja").unlink()
    return folder


def expected_responses() -> list[dict]:
    return score_by_length(load(TINY), "line", lengths=[256], samples=8).responses


@pytest.mark.parametrize(
    "missing", [("eos_token",), ("eos_token", "pad_token"), ("eos_token", "bos_token", "pad_token")]
)
def test_a_tokenizer_without_an_end_is_scored(missing, tmp_path):
    """The ends are those of config.json; the template writes the tokens as text, as Qwen's without bos does."""
    template = (TINY / "chat_template.jinja").read_text().replace("eos_token", "'</s>'").replace("bos_token", "'<s>'")
    model = copy_of(
        tmp_path / "model", missing, config={"eos_token_id": [2, 7]}, generation_config={"eos_token_id": None},
        tokenizer_config={"chat_template": template},
    )  # fmt: skip
    loaded = load(model)
    assert loaded.tokenizer.eos_token is None and stop_ids(loaded.model, loaded.tokenizer) == {2, 7}
    for batch in (1, None):
        assert (
            score_by_length(loaded, "line", lengths=[256], samples=8, batch_size=batch).responses
            == expected_responses()
        )
    samples = [{"length": 256, **row} for row in generate(Request("line", 256, samples=2), loaded.tokenizer)]
    assert score_samples(loaded.model, loaded.tokenizer, "line", samples)[0]["score"] == 1


def test_named_templates_are_scored_with_default(tmp_path):
    named = [{"name": "tool_use", "template": "{{ tools }}"},
             {"name": "default", "template": (TINY / "chat_template.jinja").read_text()}]  # fmt: skip
    loaded = load(copy_of(tmp_path / "model", tokenizer_config={"chat_template": named}))
    assert score_by_length(loaded, "line", lengths=[256], samples=8).responses == expected_responses()


def test_a_penalty_of_the_generation_config_changes_no_answer(tmp_path):
    loaded = load(copy_of(tmp_path / "model", generation_config={"repetition_penalty": 1.2}))
    for batch in (1, 2):
        assert (
            score_by_length(loaded, "line", lengths=[256], samples=8, batch_size=batch).responses
            == expected_responses()
        )


GENERATION = {"stop_strings": ["in line"], "suppress_tokens": [500, 600], "max_length": 20, "num_beams": 3,
              "no_repeat_ngram_size": 2, "min_new_tokens": 15, "forced_eos_token_id": 2, "do_sample": True,
              "temperature": 2.0, "use_cache": False}  # fmt: skip


def edit(file: Path, **keys: object) -> None:
    """Set keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def test_settings_for_other_programs_change_no_answer(tmp_path):
    """Generation settings, no cache, padded embeddings, and a tokenizer with stored truncation and padding."""
    odd = tmp_path / "odd"
    shutil.copytree(TINY, odd)
    model = AutoModelForCausalLM.from_pretrained(odd)
    model.resize_token_embeddings(8256)
    model.save_pretrained(odd)
    edit(odd / "config.json", use_cache=False)
    edit(odd / "generation_config.json", **GENERATION)
    edit(odd / "tokenizer_config.json", model_max_length=100)
    tokenizer = AutoTokenizer.from_pretrained(odd)
    tokenizer(["one", "one two"], padding="max_length", truncation=True, max_length=64)
    tokenizer.save_pretrained(odd)
    assert json.loads((odd / "tokenizer.json").read_text())["truncation"]["max_length"] == 64
    for size in (1, 2):
        results = [
            score_by_length(load(name), "line", lengths=[300], samples=3, batch_size=size) for name in (TINY, odd)
        ]
        assert results[0].responses == results[1].responses and results[0].mean.score > 0

"""The small base model: its tokenizer, the text it was trained on, its stretch, and that training it works."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from data_gen import line
from data_gen.generate import as_messages
from recipes.tiny_model import (
    Records,
    accuracy,
    build_model,
    build_tokenizer,
    curriculum,
    lengthen,
    ntk_theta,
    pretrain,
)  # fmt: skip

TINY = Path(__file__).parent.parent / "recipes" / "tiny"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


def test_shipped_tokenizer_is_the_one_that_is_built(tokenizer):
    built = build_tokenizer()
    assert built.get_vocab() == tokenizer.get_vocab() and built.chat_template == tokenizer.chat_template


@pytest.mark.parametrize(
    "text", ["line a-b: REGISTER_CONTENT is <17>\n", "Hé, VAR X1 = 12345;  こんにちは\n\n\tx ", "🙂"]
)
def test_any_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_words_are_single_tokens_and_digits_stand_alone(tokenizer):
    adjectives, nouns = line.words()
    plain = [word for word in nouns if word.isalpha()]
    assert len(plain) > 6000
    assert all(len(tokenizer(f"-{noun}:")["input_ids"]) == 3 for noun in plain)
    assert all(len(tokenizer(f" {word}")["input_ids"]) == 1 for word in adjectives if word.isalpha())
    assert len(tokenizer("40779")["input_ids"]) == 5


def test_last_stage_trains_on_the_very_text_of_data_gen(tokenizer):
    records = Records(tokenizer, seed=0)
    stage = dataclasses.replace(curriculum(32)[-1], questions=1)
    for _ in range(20):
        ids, weights = records.record(stage, 7, stage.digits)
        text = tokenizer.decode(ids)
        lines = re.findall(r"^line (.+): REGISTER_CONTENT is <(\d+)>$", text, re.MULTILINE)
        key = re.findall(r"in line (.+)\? I need", text)[0]
        drawn = line.render([(k, int(n)) for k, n in lines], [k for k, _ in lines].index(key))
        chat = as_messages(drawn["prompt"], drawn["answer"])
        assert ids == tokenizer.apply_chat_template(chat, return_dict=False)
        learned = tokenizer.decode([i for i, weight in zip(ids, weights, strict=True) if weight])
        assert learned == drawn["answer"] + tokenizer.eos_token


def test_needle_batches_ask_for_a_hidden_sentence(tokenizer):
    ids, weights = Records(tokenizer, seed=0).needles(6, 400)
    for row, weight in zip(ids, weights, strict=True):
        text = tokenizer.decode(row[row != tokenizer.pad_token_id])
        prompt, answer = text.split("<|assistant|>")
        needle = answer.removesuffix(tokenizer.eos_token)
        assert f"\n{needle}\n" in prompt and re.fullmatch(r"The .+ is .+\.", needle)
        assert tokenizer.decode(row[weight > 0]) == answer
        assert prompt.endswith(f"Question: What is the {needle[4:].split(' is ')[0]}?\nAnswer:")


def test_ntk_is_bloc97s():
    """theta * s^(d / (d - 2)): 40889.94 for Llama-2 (d = 128) and s = 4, as in the recipes."""
    assert ntk_theta(10_000.0, 4, 128) == pytest.approx(40889.94, abs=0.01)


def test_training_is_seeded_and_learns():
    """The first phase, shrunk until it takes seconds: twice the same weights, and the loss it stops at is reached."""

    def train():
        tokenizer = build_tokenizer()
        torch.manual_seed(0)
        model = build_model(tokenizer, 1, 1)
        drawn = model.get_input_embeddings().weight.clone()
        with pytest.raises(RuntimeError, match="after 30 steps: try another --seed"):
            pretrain(model, Records(tokenizer, 0), curriculum(8), lr=2e-3, tokens=1024, polish=1, max_steps=30)
        lengthen(
            model,
            Records(tokenizer, 1),
            factor=4,
            window=512,
            steps=4,
            lines=4,
            needles=0.5,
            lr=1e-3,
            tokens=256,
        )
        assert model.config.rope_parameters["factor"] == 4 and model.config.max_position_embeddings == 512
        assert torch.equal(model.get_input_embeddings().weight, drawn)  # embeddings stay as they are drawn
        return model.state_dict()

    one, two = train(), train()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_shipped_model_knows_short_records_and_loses_long_ones(tokenizer):
    model = LlamaForCausalLM.from_pretrained(TINY)
    assert model.config.max_position_embeddings == 2048
    folders = (TINY, TINY.with_name("tiny_short"))
    assert sum(path.stat().st_size for folder in folders for path in folder.iterdir()) <= 20e6
    assert accuracy(model, tokenizer, 256, 30) >= 0.8
    assert accuracy(model, tokenizer, 1900, 30) <= 0.3


def test_the_short_and_the_long_model_have_the_embeddings_of_one_seed():
    """Same embeddings, left as they were drawn; nothing of it was trained beyond its window."""
    short, long = (LlamaForCausalLM.from_pretrained(folder) for folder in (TINY.with_name("tiny_short"), TINY))
    assert torch.equal(short.get_input_embeddings().weight, long.get_input_embeddings().weight)
    assert not torch.equal(short.model.layers[0].self_attn.q_proj.weight, long.model.layers[0].self_attn.q_proj.weight)
    assert short.config.rope_parameters["rope_type"] == "default" and short.config.max_position_embeddings == 1024

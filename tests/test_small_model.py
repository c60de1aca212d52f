"""The small base model: its tokenizer, the text it was trained on, its stretch, and that training it works."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from data_gen import line, niah
from data_gen.generate import as_messages
from recipes.demo import LENGTHS
from recipes.tiny_model import (
    LONG_FACTOR,
    ROPE_THETA,
    TRAINED_WINDOW,
    WINDOW,
    Records,
    accuracy,
    build_model,
    build_tokenizer,
    curriculum,
    ntk_theta,
    pretrain,
    stretch,
)
from recipes.tiny_tasks import Draws, teach

TINY = Path(__file__).parent.parent / "recipes" / "tiny"
TASKS = TINY.with_name("tiny_tasks")


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
        drawn = line.render(lines, [k for k, _ in lines].index(key))
        chat = as_messages(drawn["prompt"], drawn["answer"])
        assert ids == tokenizer.apply_chat_template(chat, return_dict=False)
        learned = tokenizer.decode([i for i, weight in zip(ids, weights, strict=True) if weight])
        assert learned == drawn["answer"] + tokenizer.eos_token


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
        options = {"lr": 2e-3, "tokens": 1024}
        with pytest.raises(RuntimeError, match="after 30 steps: try another --seed"):
            pretrain(model, Records(tokenizer, 0), curriculum(8), polish=1, max_steps=30, **options)
        assert torch.equal(model.get_input_embeddings().weight, drawn)  # embeddings stay as they are drawn
        return model.state_dict()

    one, two = train(), train()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_last_steps_train_at_the_last_stage(monkeypatch):
    """The loop from its last stage on, with a copying phase that is over at once."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model, records, drawn = build_model(tokenizer, 1, 1), Records(tokenizer, 0), []
    batch = records.batch
    monkeypatch.setattr(records, "pool", lambda stage: [])
    monkeypatch.setattr(records, "batch", lambda stage, tokens: drawn.append(stage) or batch(stage, tokens))
    monkeypatch.setattr(records, "rotations", lambda *_: batch(curriculum(2)[-1], 256))
    before = model.model.layers[0].self_attn.q_proj.weight.clone()
    log = pretrain(model, records, curriculum(2)[-1:], lr=2e-3, tokens=256, polish=6, max_steps=6)
    assert log[-1]["stage"] == "polished" and log[-1]["step"] == 6
    assert set(drawn) == {curriculum(2)[-1]}
    assert not torch.equal(model.model.layers[0].self_attn.q_proj.weight, before)


def test_beyond_the_trained_window_frequencies_are_those_of_ntk():
    """Cosines of the stretched config are the plain ones up to the window, those of a raised RoPE base beyond."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig.from_pretrained(TINY)
    assert config.rope_parameters["rope_type"] == "longrope" and config.max_position_embeddings == WINDOW == 2048
    again = LlamaConfig.from_pretrained(TINY)
    stretch(again, LONG_FACTOR)
    assert again.rope_parameters == config.rope_parameters

    def turn(parameters, length):
        config.rope_parameters = parameters
        return LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])[0]

    plain = {"rope_type": "default", "rope_theta": ROPE_THETA}
    raised = {"rope_type": "default", "rope_theta": ntk_theta(ROPE_THETA, LONG_FACTOR, 32)}
    torch.testing.assert_close(turn(again.rope_parameters, TRAINED_WINDOW), turn(plain, TRAINED_WINDOW))
    torch.testing.assert_close(
        turn(again.rope_parameters, TRAINED_WINDOW + 1), turn(raised, TRAINED_WINDOW + 1), atol=1e-4, rtol=0
    )
    assert (turn(raised, TRAINED_WINDOW + 1) - turn(plain, TRAINED_WINDOW + 1)).abs().max() > 0.5


def test_shipped_model_knows_short_records_and_loses_long_ones(tokenizer):
    model = LlamaForCausalLM.from_pretrained(TINY)
    assert sum(path.stat().st_size for folder in (TINY, TASKS) for path in folder.iterdir()) <= 20e6
    assert accuracy(model, tokenizer, LENGTHS[0], 30) >= 0.9
    assert accuracy(model, tokenizer, LENGTHS[-1], 30) <= 0.6


def test_the_lessons_of_three_tasks_are_the_very_texts_of_data_gen(tokenizer):
    """Each row is the chat of its prompt and answer; no sentence of the needle task itself is among the needles."""
    draws = Draws(tokenizer, 0, 512)
    kept = {pair["needle"] for pair in (niah.TEST_NEEDLE, *niah.needles(niah.NEEDLES))}
    shapes = {"niah": r"<book>(.*)</book>\nBased on", "vt": r"^Memorize and track (.*)Memorize and track"}
    for task, shape in shapes.items():
        ids, weights, _ = draws.batch(task)
        for row, weight in zip(ids.tolist(), weights.tolist(), strict=True):
            length = len(row) - row[::-1].index(tokenizer.eos_token_id)
            turns = tokenizer.decode(row[:length]).removeprefix("<s><|user|>").removesuffix("</s>")
            prompt, answer = turns.split("<|assistant|>")
            assert row[:length] == tokenizer.apply_chat_template(as_messages(prompt, answer), return_dict=False)
            assert re.search(shape, prompt, re.DOTALL)
            learned = tokenizer.decode([i for i, one in zip(row, weight, strict=True) if one])
            if task == "niah":
                assert learned == answer + "</s>" and f"\n{answer}\n" in prompt and answer not in kept
            else:
                assert re.fullmatch(r"( [A-Z]{5}){5}</s>", learned) and answer.endswith(learned.removesuffix("</s>"))


def test_lessons_change_all_but_the_embeddings(tokenizer):
    model = LlamaForCausalLM.from_pretrained(TINY)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    teach(model, Draws(tokenizer, 0, 256), steps=6, lr=1e-3)
    unchanged = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])}
    assert unchanged == {"model.embed_tokens.weight", "lm_head.weight"}


def test_the_model_of_three_tasks_knows_them():
    tokenizer, model = AutoTokenizer.from_pretrained(TASKS), LlamaForCausalLM.from_pretrained(TASKS)
    for task, tokens, least in (("line", 256, 0.8), ("niah", 256, 0.9), ("niah", 1960, 0.9), ("vt", 896, 0.05)):
        assert accuracy(model, tokenizer, tokens, 30, task) >= least, task
    assert accuracy(model, tokenizer, LENGTHS[-1], 30) <= 0.2

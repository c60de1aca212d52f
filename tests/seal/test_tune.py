"""Tuning without Axolotl: the loss is that of the answer, the loop is plain AdamW, and nothing else moves."""

from __future__ import annotations

import json
import random

import pytest
import torch
from axolotl_runs import launch, write_recipe
from paths import TINY
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoTokenizer

from axolotl_plugins.seal import SealConfig
from axolotl_plugins.seal.model_loading import load
from axolotl_plugins.seal.tune import answer_loss, encode, tune
from data_gen.dataset import Request, generate


@pytest.fixture(scope="module")
def chats():
    tokenizer = load(TINY).tokenizer
    return [row["messages"] for row in generate(Request("line", "300:600", samples=6), tokenizer)], tokenizer


def test_loss_is_that_of_the_answer_alone(chats):
    samples, tokenizer = chats
    model = load(TINY).model
    ids, start = encode(samples[0], tokenizer)
    assert tokenizer.decode(ids[0, start:]) == samples[0][1]["content"] + tokenizer.eos_token
    labels = torch.where(torch.arange(ids.shape[1]) >= start, ids, -100)
    with torch.no_grad():
        assert answer_loss(model, ids, start).item() == pytest.approx(model(ids, labels=labels).loss.item(), abs=1e-5)


def test_tuning_is_adamw_over_shuffled_samples(chats):
    samples, tokenizer = chats
    model = get_peft_model(load(TINY).model, SealConfig(granularity="head"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = tune(model, samples, tokenizer, lr=1e-2, seed=3)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all("seal_scale" in name for name in moved) and len(losses) == 6

    naive = get_peft_model(load(TINY).model, SealConfig(granularity="head"))
    scales = [p for p in naive.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(scales, lr=1e-2, weight_decay=0.0)
    expected = []
    for chat in random.Random(3).sample(samples, len(samples)):
        ids, start = encode(chat, tokenizer)
        loss = naive(input_ids=ids, labels=torch.where(torch.arange(ids.shape[1]) >= start, ids, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(scales, 1.0)
        optimizer.step()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, abs=1e-4)
    again = [p for p in model.parameters() if p.requires_grad]
    for one, two in zip(again, scales, strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=0)


@pytest.mark.parametrize("granularity", ["head", "channel"])
def test_axolotl_and_tune_end_in_the_same_scales(granularity, tmp_path):
    data = {"task": "line", "tokens": "300:500", "samples": 8}
    recipe = write_recipe(tmp_path, max_steps=None, curriculum_sampling=True, shuffle_merged_datasets=False,
                          seal={"granularity": granularity, "data": data})  # fmt: skip
    done = launch(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    trained = load_file(tmp_path / "out" / "adapter_model.safetensors")

    in_file = [json.loads(row)["messages"] for row in (tmp_path / "data/tiny_line.jsonl").read_text().splitlines()]
    # Axolotl read the file from its first line; these chats are in that order once `tune` has shuffled them.
    chats = [None] * len(in_file)
    for place, chat in zip(random.Random(0).sample(range(len(in_file)), len(in_file)), in_file, strict=True):
        chats[place] = chat
    model = get_peft_model(load(TINY).model, SealConfig(granularity=granularity))
    tune(model, chats, load(TINY).tokenizer, lr=recipe["learning_rate"], epochs=recipe["num_epochs"], seed=0)
    tuned = {name.replace(".default", ""): p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == tuned.keys() and all((scale - 1).abs().max() > 0.05 for scale in trained.values())
    for name, scale in trained.items():
        torch.testing.assert_close(scale, tuned[name], atol=1e-6, rtol=0)


def test_a_chat_ends_at_the_token_that_ends_its_last_turn():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    # As ChatML, with a line break behind every turn.
    turns = "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{{ eos_token }}\n{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}<assistant>{% endif %}"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]
    ids, start = encode(chat, tokenizer)
    assert tokenizer.decode(ids[0, start:]) == "b c" + tokenizer.eos_token


def test_other_methods_are_tuned_as_well(chats):
    samples, tokenizer = chats
    model = get_peft_model(load(TINY).model, LoraConfig(r=4, target_modules=["q_proj", "o_proj"]))
    assert len(tune(model, samples[:2], tokenizer, lr=2e-4, epochs=2)) == 4


def test_what_cannot_be_tuned_is_an_error(chats):
    samples, tokenizer = chats
    loaded = load(TINY).model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        tune(loaded, samples, tokenizer, lr=1e-2)
    model = get_peft_model(load(TINY).model, SealConfig())
    with pytest.raises(FloatingPointError, match="lower lr"):
        tune(model, samples, tokenizer, lr=1e37)


@pytest.mark.parametrize(
    ("samples", "settings", "message"),
    [
        ([], {}, "found 0 chats"),
        (None, {"epochs": 0}, "and 0 epochs"),
        (None, {"lr": float("inf")}, "lr: found inf"),
        (None, {"lr": 0.0}, "lr: found 0.0"),
        (["one text"], {}, "found 'one text', expected a list of turns"),
        ([[{"role": "user", "content": "a"}]], {}, "expected a list of turns that ends with an answer"),
        ([[{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]], {}, "is empty"),
        ([[{"role": "user", "content": "a"}, {"role": "assistant"}]], {}, "is empty"),
    ],
)
def test_what_teaches_nothing_is_an_error(samples, settings, message, chats):
    model = get_peft_model(load(TINY).model, SealConfig())
    with pytest.raises(ValueError, match=message):
        tune(model, chats[0] if samples is None else samples, chats[1], **{"lr": 1e-2} | settings)

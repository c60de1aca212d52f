"""What a recipe's data files must be before a model is loaded: the plugin's one line for each mistake."""

from __future__ import annotations

import json
import os
import re
import threading

import pytest
import yaml
from axolotl_runs import write_recipe
from paths import TINY
from transformers import AutoTokenizer

from axolotl_plugins.common.tokenizer import count_tokens
from axolotl_plugins.seal import training_files
from axolotl_plugins.seal.training_files import remove_incomplete
from axolotl_plugins.seal.training_rows import chat_lengths, read_chat
from data_gen.dataset import manifest_path

HEAD = {"granularity": "head"}
TURNS = [{"role": "user", "content": "What is in line 3?"}, {"role": "assistant", "content": "It is 7."}]
CHAT = {"messages": TURNS}
SHAREGPT = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    return tmp_path


def register(folder) -> dict:
    """Call the plugin as Axolotl does, and return the record of the training data."""
    from axolotl.utils.dict import DictDefault

    from axolotl_plugins.seal import SealPlugin

    plugin = SealPlugin()
    plugin.register(DictDefault(yaml.safe_load((folder / "recipe.yml").read_text())))
    return plugin.training_data


def refusal(folder) -> str:
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        register(folder)
    assert stopped.value.code.startswith("seal: ") and "\n" not in stopped.value.code
    assert sorted(folder.rglob("*")) == before
    return stopped.value.code


def dataset(path: str, **settings: object) -> list[dict]:
    return [{"path": path, "ds_type": "json", "type": "chat_template", "roles_to_train": ["assistant"], **settings}]


def write_rows(file, *rows: dict) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_missing_file_names_its_nearest_neighbour(folder):
    write_rows(folder / "data/train.jsonl", CHAT)
    write_recipe(folder, seal=HEAD, datasets=dataset("data/trian.jsonl"))
    assert "data/trian.jsonl: no such file; is data/train.jsonl meant?" in refusal(folder)
    write_recipe(folder, seal=HEAD, datasets=dataset("elsewhere/t.jsonl"))
    assert "elsewhere/t.jsonl: no such file; there is none like it in elsewhere" in refusal(folder)
    write_recipe(folder, seal=HEAD, datasets=dataset("data/train.jsonl"), test_datasets=dataset("data/tset.jsonl"))
    assert "data/tset.jsonl: no such file" in refusal(folder)


def test_a_mistyped_path_generates_nothing(folder):
    """With `seal: data` left in the recipe."""
    write_rows(folder / "data/logs_train.jsonl", CHAT)
    write_recipe(folder, datasets=dataset("data/logs_trian.jsonl"))
    assert "is data/logs_train.jsonl meant, which was not generated?" in refusal(folder)
    write_recipe(folder, datasets=dataset("date/logs_train.jsonl"))
    said = refusal(folder)
    assert "date/logs_train.jsonl: no such file" in said and "set the path data/logs_train.jsonl" in said
    assert "remove `seal: data`" in said


def test_a_file_of_the_users_is_not_replaced(folder):
    write_rows(folder / "data/mine.jsonl", CHAT)
    write_recipe(folder, datasets=dataset("data/mine.jsonl"))
    said = refusal_with_lock(folder)
    assert "data/mine.jsonl: exists, was not generated" in said and "remove `seal: data` to train on it" in said
    write_recipe(folder, seal=HEAD, datasets=dataset("data/mine.jsonl"))
    assert register(folder)["files"][0]["path"] == "data/mine.jsonl"


def refusal_with_lock(folder) -> str:
    with pytest.raises(SystemExit) as stopped:
        register(folder)
    assert json.loads((folder / "data/mine.jsonl").read_text()) == CHAT
    return stopped.value.code


def test_data_of_a_description_is_generated(folder):
    (folder / "logs.yml").write_text(
        'record: "{id}: {number}\\n"\nquestion: "Number of {id}?"\nanswer: "{id} has {number}."\n'
        'references: ["{number}"]\nfields:\n  id: {type: code, pattern: "n-###", unique: true}\n'
        "  number: {type: integer, range: [1, 999]}\n"
    )
    write_recipe(folder, seal=HEAD | {"data": {"task": "logs.yml", "tokens": "100:300", "samples": 3}},
                 datasets=dataset("data/logs.jsonl"))  # fmt: skip
    assert register(folder)["files"][0]["manifest"]["task"] == "logs"
    rows = [json.loads(row) for row in (folder / "data/logs.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and all(row["task"] == "logs" and 60 < row["tokens"] <= 300 for row in rows)
    assert manifest_path(folder / "data/logs.jsonl").is_file()


def test_a_sample_over_sequence_len_is_named_with_the_value_to_set(folder):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    long, longer = ({"messages": [TURNS[0], {"role": "assistant", "content": "seven " * n}]} for n in (60, 90))
    tokens = [count_tokens(tokenizer, chat["messages"]) for chat in (long, longer)]
    write_rows(folder / "data/train.jsonl", CHAT, long, longer)
    write_recipe(folder, seal=HEAD, datasets=dataset("data/train.jsonl"), sequence_len=50)
    said = refusal(folder)
    assert f"data/train.jsonl, line 2: has {tokens[0]} tokens, but sequence_len is 50" in said
    assert f"set `sequence_len: {tokens[1]}`" in said
    write_recipe(folder, seal=HEAD, datasets=dataset("data/train.jsonl"), sequence_len=tokens[1])
    assert register(folder)["texts"]


def test_the_recipes_own_template_counts(folder):
    write_rows(folder / "data/train.jsonl", CHAT)
    template = "{{ 'turn ' * 100 }}" + (TINY / "chat_template.jinja").read_text()
    settings = {"chat_template": "jinja", "chat_template_jinja": template}
    write_recipe(folder, seal=HEAD, datasets=dataset("data/train.jsonl"), sequence_len=80, **settings)
    assert "line 1: has " in refusal(folder)
    write_recipe(folder, seal=HEAD, datasets=dataset("data/train.jsonl", chat_template="nonesuch"))
    assert "nonesuch" in refusal(folder)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": TURNS[:1]}, "the last turn is the user's, expected the assistant's answer"),
        ({"messages": TURNS[1:]}, "found an answer alone, expected a prompt before it"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": " "}]}, "the last turn is empty"),
        (SHAREGPT, "set `field_messages: conversations` and `message_property_mappings: {role: from, content: value}`"),
        ({"messages": SHAREGPT["conversations"]}, "set `message_property_mappings: {role: from, content: value}`"),
        ({"messages": [{"text": "a"}]}, "the last turn has no 'role': found text"),
        ({"chat": TURNS}, "set `field_messages: chat` in the recipe's entry of `datasets`"),
        ({"prompt": "a", "completion": "b"}, "not prompt and completion: convert it with jq -c '{messages: [{role:"),
        ({"instruction": "a", "output": "b"}, 'content: .instruction}, {role: "assistant", content: .output}]}'),
        ({"text": "a"}, 'as in {"messages": [{"role": "user"'),
    ],
)
def test_rows_that_cannot_be_trained_on(row, message, folder):
    write_rows(folder / "data/train.jsonl", *[CHAT] * 3, row)
    write_recipe(folder, seal=HEAD, datasets=dataset("data/train.jsonl"))
    said = refusal(folder)
    assert "data/train.jsonl, line 4: " in said and message in said


def test_the_advice_works(folder):
    """A ShareGPT file with the settings that the message names is read as a chat."""
    settings = {"field_messages": "conversations", "message_property_mappings": {"role": "from", "content": "value"}}
    expected = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert read_chat(folder / "x", 1, SHAREGPT, settings) == expected
    write_rows(folder / "data/train.jsonl", SHAREGPT)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    lengths = chat_lengths(folder / "data/train.jsonl", settings, tokenizer)
    assert lengths == {1: count_tokens(tokenizer, expected)}
    write_recipe(folder, seal=HEAD, datasets=dataset("data/train.jsonl", **settings))
    assert register(folder)["texts"]


def test_an_unknown_key_of_the_data_names_the_nearest(folder):
    recipe = write_recipe(folder)
    recipe["seal"]["data"]["sample"] = 3
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe))
    assert re.search(r"seal\.data\.sample: no such setting; is samples meant\?", refusal(folder))


def test_prepared_data_that_was_cut_short_is_removed(tmp_path, monkeypatch):
    """Not another run's in progress, for which it waits, and not what is complete."""
    monkeypatch.setattr(training_files, "RECENT", 1.0)
    states = ("cut", "just cut", "written", "complete")
    names = {state: character * 32 for state, character in zip(states, "abcd", strict=True)}
    for name in (*names.values(), "folder of the user's"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data-00000-of-00001.arrow").write_bytes(b"")
    (tmp_path / names["complete"] / "state.json").write_text("{}")
    for state in ("cut", "complete"):
        os.utime(tmp_path / names[state], (0, 0))
    other_run = threading.Timer(0.5, (tmp_path / names["written"] / "state.json").write_text, ["{}"])
    other_run.start()
    remove_incomplete(tmp_path)
    other_run.join()
    assert {path.name for path in tmp_path.iterdir()} == {names["written"], names["complete"], "folder of the user's"}
    remove_incomplete(tmp_path / "missing")

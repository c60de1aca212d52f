"""Adapters know what they were trained on, and are not scored on it unless the result says so."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from paths import TINY

from axolotl_plugins.seal import provenance
from axolotl_plugins.seal.model_loading import load
from data_gen.dataset import Request, generate, write
from eval.score_by_length import score_by_length


@pytest.fixture(scope="module")
def loaded():
    return load(TINY)


@pytest.mark.parametrize("shape", ["messages", "conversations", "alpaca"])
def test_samples_that_were_trained_on_are_refused_unless_the_result_says_so(loaded, shape, tmp_path):
    """Whatever the data's format: here two test samples got into the training data."""
    rows = [row["messages"] for row in generate(Request("line", "260", samples=2, split="test"), loaded.tokenizer)]
    rows = {
        "messages": [{"messages": row} for row in rows],
        "conversations": [
            {"conversations": [{"from": turn["role"], "value": turn["content"]} for turn in row]} for row in rows
        ],
        "alpaca": [{"instruction": row[0]["content"] + " \n", "output": row[1]["content"]} for row in rows],
    }[shape]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    provenance.save(provenance.record([{"path": str(file)}]), tmp_path)
    tuned = replace(loaded, trained_on=provenance.seen_texts(tmp_path))
    with pytest.raises(ValueError, match=r"^2 of 3 samples are in the model's training data: .*--allow-contamination"):
        score_by_length(tuned, "line", lengths=[260], samples=3)
    allowed = score_by_length(tuned, "line", lengths=[260], samples=3, allow_contamination=True)
    assert allowed.contaminated == 2
    clean = score_by_length(loaded, "line", lengths=[260], samples=3)
    assert clean.contaminated is None and clean.responses == allowed.responses
    assert score_by_length(tuned, "line", lengths=[260], samples=3, seed=1).contaminated == 0


def test_record_holds_the_datas_manifest_and_hash(loaded, tmp_path):
    file = tmp_path / "data.jsonl"
    write(Request("vt", "900", samples=2), loaded.tokenizer, file)
    found = provenance.record([{"path": str(file), "type": "chat_template"}, {"path": "some/hub-dataset"}])
    manifest = json.loads((tmp_path / "data.jsonl.manifest.json").read_text())
    (entry,) = found["files"]
    shown = entry.pop("example")
    assert entry == {"path": str(file), "sha256": manifest["sha256"], "samples": 2, "manifest": manifest}
    assert shown["answer"].startswith("Answer: ") and "characters left out" in shown["prompt"]
    assert found["unread"] == ["some/hub-dataset"]
    provenance.save(found, tmp_path)
    assert provenance.seen_texts(tmp_path) is None, "data that was not read may hold anything"
    assert provenance.seen_texts(TINY) is None
    provenance.save({**found, "unread": []}, tmp_path)
    first = next(generate(Request("vt", "900", samples=1), loaded.tokenizer))["messages"][0]["content"]
    assert provenance.text_hash(first) in provenance.seen_texts(tmp_path)
    for broken in ("{", "[]", '{"texts": 3, "unread": []}'):
        (tmp_path / provenance.FILE).write_text(broken)
        with pytest.raises(ValueError, match=r"training_data\.json: not a record of training data"):
            provenance.seen_texts(tmp_path)


@pytest.mark.parametrize(("bad", "message"), [("{oops", "not JSON"), ("[1]", r"found '\[1\]', expected a JSON object")])
def test_a_bad_row_is_named_by_its_line(bad, message, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text("{}\n" * 36 + bad + "\n{}\n")
    with pytest.raises(ValueError, match=rf"data\.jsonl, line 37: .*{message}"):
        provenance.record([{"path": str(file)}])


def test_files_that_hold_no_samples(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_bytes(b"\n")
    with pytest.raises(ValueError, match="has no samples"):
        provenance.record([{"path": str(file)}])
    file.write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(ValueError, match="not UTF-8 text"):
        provenance.record([{"path": str(file)}])

"""Properties of any input: generators, metrics, manifests, journals, records of training data."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paths import TINY
from transformers import AutoTokenizer

from axolotl_plugins.common.tokenizer import count_tokens
from axolotl_plugins.seal.provenance import text_hash, texts
from data_gen.dataset import Request, check, describe, generate, in_split, write
from data_gen.metrics import last_integer
from eval.confidence import wilson
from eval.resume import Journal
from eval.spec import METRICS

TOKENIZER = AutoTokenizer.from_pretrained(TINY)
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")

TASKS = ("line", "niah", "vt", "cwe", "fwe")
REQUESTS = st.builds(
    Request,
    task=st.sampled_from(TASKS),
    tokens=st.integers(2000, 2200),  # the shortest samples of cwe have up to 1,750
    samples=st.integers(1, 2),
    seed=st.integers(0, 10**6),
    split=st.sampled_from(["train", "test"]),
)


@settings(max_examples=25)
@given(REQUESTS)
def test_samples_keep_length_split_and_answer(request):
    samples = list(generate(request, TOKENIZER))
    assert samples == list(generate(request, TOKENIZER)) and len(samples) == request.samples
    for sample in samples:
        prompt, answer = (message["content"] for message in sample["messages"])
        assert count_tokens(TOKENIZER, sample["messages"]) == sample["tokens"] <= int(request.tokens)
        assert json.loads(json.dumps(sample)) == sample
        assert all(reference.lower() in prompt.lower() for reference in sample["references"])
        assert METRICS[request.task](answer, sample["references"]) == 1.0
        if request.task == "line":
            assert in_split(request.split, answer)


@settings(max_examples=200)
@given(st.sampled_from(TASKS), st.text(), st.lists(st.integers(0, 10**6).map(str), min_size=1, max_size=4))
def test_scores_are_shares_and_the_answer_itself_is_right(task, response, references):
    score = METRICS[task]
    assert 0 <= score(response, references) <= 1
    if task == "line":
        assert score(f"{response} {references[0]}", references) == 1
        assert (last_integer(response) is None) == (not any(letter.isdecimal() for letter in response))
    else:
        assert score(" ".join(references), references) == 1


@settings(max_examples=200)
@given(st.integers(1, 500), st.data())
def test_intervals_hold_their_share_and_shrink(count, data):
    share = data.draw(st.integers(0, count)) / count
    low, high = wilson(share, count)
    assert 0 <= low <= share <= high <= 1
    wider = wilson(share, count * 4)
    assert wider[1] - wider[0] < high - low and math.isfinite(low + high)


@settings(max_examples=10)
@given(st.integers(0, 10**6), st.data())
def test_a_manifest_notices_any_change(seed, data):
    request = Request("line", "300", samples=2, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "d.jsonl"
        assert write(request, TOKENIZER, out)
        wanted = describe(request, TOKENIZER)
        check(out, wanted)
        content = bytearray(out.read_bytes())
        offset = data.draw(st.integers(0, len(content) - 1))
        content[offset] ^= data.draw(st.integers(1, 255))
        out.write_bytes(content)
        with pytest.raises(ValueError, match="was modified after it was written"):
            check(out, wanted)
        key = data.draw(st.sampled_from(sorted(wanted)))
        with pytest.raises(ValueError, match=f"was made with {key} "):
            check(out, wanted | {key: "other"})


@settings(max_examples=100)
@given(st.lists(st.tuples(st.text(max_size=20), st.text(max_size=20) | st.floats(allow_nan=False))), st.data())
def test_a_journal_keeps_what_was_whole(entries, data):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "journal"
        journal = Journal(file)
        for key, value in entries:
            journal.add(key, value)
        assert Journal(file).values == dict(entries)
        if entries:
            content = file.read_bytes()
            cut = data.draw(st.integers(0, len(content)))
            file.write_bytes(content[:cut])
            assert Journal(file).values == dict(entries[: content[:cut].count(b"\n")])


LEAVES = st.text(max_size=10)
ROWS = st.recursive(
    LEAVES | st.none() | st.integers(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200)
@given(ROWS, LEAVES)
def test_every_text_of_a_row_is_found(row, text):
    assert text in set(texts([row, {"deep": [{"er": text}]}]))
    assert list(texts({"a": row, "b": [row]})) == list(texts(row)) * 2


@settings(max_examples=200)
@given(st.lists(st.text(min_size=1, max_size=8).filter(lambda word: not any(c.isspace() for c in word)), min_size=1))
def test_white_space_does_not_hide_a_text(words):
    assert text_hash(" ".join(words)) == text_hash("\n" + "  ".join(words) + "\t")
    assert text_hash(" ".join(words)) != text_hash(" ".join([*words, "x"]))

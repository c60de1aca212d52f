"""Tasks from a file: which rows are samples, what their metrics give, and how they are grouped by length."""

from __future__ import annotations

import json

import pytest
from paths import TINY

from axolotl_plugins.common.tokenizer import as_messages, count_tokens, load_tokenizer
from data_gen.dataset import Request, generate, samples_by_length
from data_gen.file_task import file_task
from data_gen.metrics import METRICS, resolve_metric
from data_gen.tasks import TASKS, resolve_task


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(("metric", "response", "references", "score"), [
    ("contains", "It is BLUE.", ["blue"], 1), ("contains", "blue", ["blue", "red"], 0.5), ("contains", "", ["a"], 0),
    ("last_integer", "line 3: 57.5", ["The temp is 57.5."], 1), ("last_integer", "no number", ["7"], 0),
    ("last_integer", "no number", ["none"], 0), ("exact", " a  b\n", ["x", "a b"], 1), ("exact", "A b", ["a b"], 0),
    ("rouge1", "the cats", ["a cat"], 0.5), ("rouge1", "a dog", ["a cat", "a dog"], 1),
    ("f1", "A cat, a dog!", ["a cat"], 2 / 3), ("f1", "", ["a"], 0),
])  # fmt: skip
def test_metrics(metric, response, references, score):
    assert resolve_metric(metric)(response, references) == pytest.approx(score)


def test_a_metric_is_a_function_of_the_users(tmp_path, monkeypatch):
    (tmp_path / "my_metric.py").write_text(
        "def first(response, references):\n    return response[:1] == 'a'\nmany = []\n"
    )
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "t.jsonl", [{"prompt": "say a", "references": "abc"}])
    assert file_task(file, "my_metric:first").score("axe", []) == 1
    for spec, message in [("f2", "expected one of contains, .* or module:function"), ("my_metric:many", "is a list"),
                          ("my_metric:second", "cannot import my_metric:second")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            file_task(file, spec)


ROW = {"prompt": "How warm?", "references": ["57.5"]}
CHAT = as_messages("How warm?", "57.5")


@pytest.mark.parametrize(("row", "message"), [
    ({"text": "x"}, "expected `messages`, or `prompt` and `references`; found text"),
    ({"prompt": "How warm?"}, "expected `messages`"),
    ({**ROW, "references": []}, "expected a list of correct answers"),
    ({**ROW, "references": ["warm"]}, "its own answer scores 0 by the metric last_integer"),
    ({**ROW, "length": "long"}, "length: found 'long'"),
    ({**ROW, "length": 5}, "some rows have a length and others none"),
    ({**ROW, "prefix": 5}, "prefix: found 5"),
    ({"messages": CHAT[:1]}, "the turns are of user, expected the last to be an assistant's"),
    ({"messages": []}, "the turns are of nobody"),
    ({"messages": "chat"}, "found 'chat', expected a list of turns"),
    ({"messages": [{"from": "human", "value": "x"}]}, "turn 1 is .*expected `role` and `content`"),
    ({"messages": [CHAT[0], {"role": "assistant", "content": " "}]}, "turn 2 is .*expected"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}, CHAT[1]]}, "turn 1 has a content that is not text"),
])  # fmt: skip
def test_a_row_that_is_no_sample_is_named(tmp_path, row, message):
    file = write(tmp_path / "test.jsonl", [ROW, row])
    with pytest.raises(ValueError, match=message) as error:
        file_task(file, "last_integer")
    assert "\n" not in str(error.value) and "test.jsonl" in str(error.value)


def test_what_else_is_no_task(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    for arguments, message in [(("empty.jsonl",), "has no samples"), (("none.jsonl",), "there is no file"),
                               (("line.txt",), "expected one of line, .*module:object"),
                               (("os:path",), "os:path is a module, expected a data_gen.tasks.Task"),
                               (("line", "exact"), "metric: line has its own"),
                               (("line", None, 5), "max-new-tokens: line has its own")]:  # fmt: skip
        spec = arguments[0] if ":" in arguments[0] or arguments[0] == "line" else str(tmp_path / arguments[0])
        with pytest.raises(ValueError, match=message):
            resolve_task(spec, *arguments[1:])
    with pytest.raises(ValueError, match="max-new-tokens: found 0"):
        file_task(write(tmp_path / "t.jsonl", [ROW]), max_new_tokens=0)


def test_a_python_object_is_a_task_that_draws_the_same(tmp_path, monkeypatch):
    code = (
        "from dataclasses import replace\nfrom data_gen.tasks import TASKS\nmine = replace(TASKS['line'], title='x')\n"
    )
    (tmp_path / "my_tasks.py").write_text(code + "line = TASKS['line']\n")
    monkeypatch.chdir(tmp_path)
    task, tokenizer = resolve_task("my_tasks:mine"), load_tokenizer(str(TINY))
    assert task.key == "my_tasks:mine" and resolve_task("my_tasks:line") is TASKS["line"]
    assert list(generate(Request(task.key, "300", samples=2), tokenizer)) == list(
        generate(Request("line", "300", samples=2), tokenizer)
    )


def test_samples_are_grouped_by_their_own_tokens_or_by_their_length(tmp_path):
    tokenizer = load_tokenizer(str(TINY))
    rows = [{"prompt": "x " * count, "references": "7"} for count in (5, 40, 100, 101)]
    task = file_task(write(tmp_path / "t.jsonl", rows))
    by_length = [(row["length"], row["index"], row["tokens"]) for row in samples_by_length(task, tokenizer, None)]
    for length, index, tokens in by_length:
        assert tokens == count_tokens(tokenizer, as_messages(rows[index]["prompt"], "7"))
        assert length & (length - 1) == 0 and length // 2 < tokens <= length  # the next power of two
    middle, longest = by_length[1][2], by_length[-1][2]

    def groups(lengths, samples=None, task=task):
        return [(row["length"], row["index"]) for row in samples_by_length(task, tokenizer, lengths, samples)]

    assert groups([longest, middle]) == [(middle, 0), (middle, 1), (longest, 2), (longest, 3)]
    assert groups([longest, middle], 1) == [(middle, 0), (longest, 2)]
    with pytest.raises(ValueError, match=f"a sample has {by_length[2][2]} tokens, expected at most {middle}"):
        groups([middle])
    with pytest.raises(ValueError, match=f"no sample belongs to 3, only to {longest}: leave it out"):
        groups([3, longest])
    named = file_task(write(tmp_path / "n.jsonl", [{**row, "length": 9 - i} for i, row in enumerate(rows)]))
    assert groups(None, task=named) == [(6, 3), (7, 2), (8, 1), (9, 0)] and groups([7], task=named) == [(7, 2)]


def test_every_metric_has_a_name_that_the_command_line_lists():
    assert set(METRICS) == {"contains", "last_integer", "exact", "rouge1", "f1"}

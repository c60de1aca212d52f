"""Tasks from descriptions: the built-in line task, examples, generators, tables, filler, and refusals."""

from __future__ import annotations

import json
import random
import re
import shutil
from datetime import datetime
from itertools import islice

import pytest
import yaml
from paths import ROOT, TINY
from transformers import AutoTokenizer
from wonderwords import RandomWord

from axolotl_plugins.common.tokenizer import count_tokens
from data_gen.__main__ import app
from data_gen.dataset import Request, generate, manifest_path, write
from data_gen.described_task import Description, read_description
from data_gen.tasks import in_split, resolve_task

EXAMPLES = sorted((ROOT / "data_gen/examples").glob("*.yml"))
SENSORS = {
    "title": "Sensor log",
    "header": "Here is a log.\n",
    "record": "{time} | {sensor} | temp={temp}\n",
    "fields": {
        "time": {"type": "date", "range": ["2026-03-14", "2026-03-15"], "format": "%Y-%m-%d %H:%M"},
        "sensor": {"type": "code", "pattern": "sensor-####", "unique": True},
        "temp": {"type": "decimal", "range": [-5, 40], "places": 1},
    },
    "question": "What is the temp of {sensor}?",
    "answer": "The temp of {sensor} is {temp}.",
    "references": ["{temp}"],
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture
def describe(tmp_path):
    """Write a description that differs from the sensors' in some settings (None removes one)."""

    def write_yaml(**changes: object) -> str:
        settings = {key: value for key, value in {**SENSORS, **changes}.items() if value is not None}
        (tmp_path / "sensors.yml").write_text(yaml.safe_dump(settings, sort_keys=False))
        return str(tmp_path / "sensors.yml")

    return write_yaml


def prompts(spec: str, tokenizer, **options: object) -> list[dict]:
    return list(generate(Request(spec, **{"tokens": 600, "samples": 6, **options}), tokenizer))


def longeval_sample(rng: random.Random, count: int, accept) -> dict:
    """A record of so many lines as LongEval draws it, written out."""
    position = rng.random()
    key_rng, number_rng = (random.Random(rng.getrandbits(64)) for _ in range(2))
    adjectives, nouns = (
        sorted({word.strip() for word in RandomWord().filter(include_categories=[category])})
        for category in ("adjective", "noun")
    )
    keys: dict[str, None] = {}
    while len(keys) < count:
        key_rng.shuffle(adjectives)
        key_rng.shuffle(nouns)
        keys.update(dict.fromkeys(f"{adjective}-{noun}" for adjective, noun in zip(adjectives, nouns, strict=False)))
    lines = []
    for key in list(keys)[:count]:
        answer = ""
        while not answer or not accept(answer):
            number = number_rng.randint(1, 50_000)
            answer = f"The <REGISTER_CONTENT> in line {key} is {number}."
        lines.append((f"line {key}: REGISTER_CONTENT is <{number}>\n", key, number, answer))
    _, key, number, answer = lines[int(position * count)]
    return {"text": "".join(line[0] for line in lines), "answer": answer, "references": [str(number)], "key": key,
            "number": number, "line": int(position * count), "lines": count}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "length"),
    [({"tokens": 900}, "900"), ({"lines": 1500}, "1500 lines"), ({"tokens": 700, "split": "test"}, "700")],
)
def test_the_line_task_is_a_description_with_longevals_bytes(options, length, tokenizer):
    request = Request("line", samples=4, seed=3, **options)
    for index, row in enumerate(generate(request, tokenizer)):
        rng = random.Random(f"line/{request.split}/3/{length}/{index}")
        if request.tokens:
            rng.randint(*request.token_range())
        expected = longeval_sample(rng, row["lines"], lambda answer: in_split(request.split, answer))
        body = row["messages"][0]["content"].split("Now the record start:\n\n")[1].split("\nNow the record is over")[0]
        assert body == expected.pop("text") and row["messages"][1]["content"] == row["answer"]
        assert expected == {key: row[key] for key in expected}


def test_samples_fit_their_length_and_splits_share_no_answer(describe, tokenizer):
    spec = describe()
    answers = {}
    for split in ("train", "test"):
        rows = prompts(spec, tokenizer, split=split, samples=20)
        answers[split] = {row["answer"] for row in rows}
        for row in rows:
            assert count_tokens(tokenizer, row["messages"]) == row["tokens"] <= 600 < row["tokens"] + 60
            lines = re.findall(r"^(.*) \| (sensor-\d{4}) \| temp=(-?\d+\.\d)$", row["messages"][0]["content"], re.M)
            assert len(lines) == row["lines"] > 3 and len({sensor for _, sensor, _ in lines}) == len(lines)
            time, sensor, temp = lines[row["line"]]
            assert (sensor, temp) == (row["sensor"], row["temp"]) and row["references"] == [temp]
            assert datetime(2026, 3, 14) <= datetime.strptime(time, "%Y-%m-%d %H:%M") < datetime(2026, 3, 16)
            assert row["messages"][0]["content"].endswith(f"\nWhat is the temp of {sensor}?")
            assert -5 <= float(temp) <= 40 and row["answer"] == f"The temp of {sensor} is {temp}."
            assert row["task"] == "sensors"
    assert len(answers["train"]) > 15 and not answers["train"] & answers["test"]
    assert prompts(spec, tokenizer) == prompts(spec, tokenizer, samples=9)[:6] != prompts(spec, tokenizer, seed=1)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda file: file.stem)
def test_examples_are_drawn_and_score_their_own_answers_alone(example, tokenizer):
    task = resolve_task(str(example))
    rows = prompts(str(example), tokenizer, tokens=1900)
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        assert 1600 < row["tokens"] <= 1900 and task.metric(row["answer"], row["references"]) == 1
        assert task.metric(other["answer"], row["references"]) < 1
        assert row["messages"][0]["content"].count(str(row["references"][0])) >= 1


def test_a_table_gives_its_rows_to_one_split_each(tmp_path, describe, tokenizer):
    rows = [(f"s-{number}", f"{number % 7}.{number % 10}") for number in range(80)]
    (tmp_path / "rows.csv").write_text("Sensor name,temp\n" + "".join(f'"{a}",{b}\n' for a, b in rows))
    templates = {"record": "{Sensor name}: {temp}\n", "question": "Temp of {Sensor name}?",
                 "answer": "{Sensor name} has {temp}."}  # fmt: skip
    spec = describe(fields=None, table="rows.csv", **templates)
    seen = {}
    for split in ("train", "test"):
        drawn = prompts(spec, tokenizer, split=split, samples=10, tokens=200)
        listed = [re.findall(r"^(s-\d+): (.*)$", row["messages"][0]["content"], re.M) for row in drawn]
        assert all(len(set(lines)) == len(lines) > 3 and set(lines) <= set(rows) for lines in listed)
        seen[split] = {pair for lines in listed for pair in lines}
    assert not seen["train"] & seen["test"] and len(seen["train"]) > 20
    with pytest.raises(ValueError, match=r"rows\.csv has too few rows for samples of this length"):
        prompts(spec, tokenizer, tokens=1500)
    (tmp_path / "rows.csv").write_text("Sensor name,temp\na,1\na,2\n")
    with pytest.raises(ValueError, match=r"question: rows 1 and 2 of rows\.csv could both answer 'Temp of a"):
        resolve_task(describe(fields=None, table="rows.csv", source="another", **templates))


def test_a_tables_rows_and_columns(tmp_path, describe, tokenizer):
    """Columns of any name are read from any kind of table; those that samples have themselves stay theirs."""
    rows = [{"index": f"n-{number}", "length": number * 3} for number in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, mark in (("rows.tsv", "\t"), ("semicolons.csv", ";")):
        (tmp_path / name).write_text(f"index{mark}length\n" + "".join(f"n-{n}{mark}{n * 3}\n" for n in range(60)))
    templates = {"record": "{index} is {length} long\n", "question": "How long is {index}?", "references": ["{length}"],
                 "answer": "{index} is {length} long.", "fields": None}  # fmt: skip
    tables = ("rows.jsonl", "rows.tsv", "semicolons.csv")
    drawn = [prompts(describe(table=table, **templates), tokenizer, tokens=200) for table in tables]
    assert drawn[0] == drawn[1] == drawn[2]
    for index, row in enumerate(drawn[0]):
        assert row["index"] == index and "length" not in row
        assert f"n-{int(row['references'][0]) // 3} is {row['references'][0]} long" in row["messages"][0]["content"]
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]) + '\n{"index": "n-1"}\n')
    with pytest.raises(ValueError, match=r"table: row 2 of .*rows\.jsonl has index, the first index, length"):
        resolve_task(describe(table="rows.jsonl", source="b", **templates))
    (tmp_path / "rows.csv").write_text("index,length\na,1,2\n")
    with pytest.raises(ValueError, match=r"rows\.csv, line 2: expected 2 columns"):
        resolve_task(describe(table="rows.csv", **templates))
    (tmp_path / "rows.csv").write_text("index,length\né,1\n", encoding="latin-1")
    with pytest.raises(ValueError, match=r"table: .*rows\.csv is not UTF-8 text: export it"):
        resolve_task(describe(table="rows.csv", source="c", **templates))
    with pytest.raises(ValueError, match=r"rows\.csv is a table: name it by `table:` in a description"):
        resolve_task(str(tmp_path / "rows.csv"))
    both = templates | {"fields": {"length": {"type": "integer", "range": [1, 2]}}}
    with pytest.raises(ValueError, match=r"fields\.length: rows\.tsv has a column of that name"):
        resolve_task(describe(table="rows.tsv", **both))


def test_filler_surrounds_a_fixed_number_of_records(tmp_path, describe, tokenizer):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("First sentence here. Second one!\nThird, is it? ")
    for filler in ({"lines": ["Nothing to see."]}, {"folder": "notes"}, {}):
        positions = set()
        for row in prompts(describe(records=2, filler=filler), tokenizer, samples=12):
            body = row["messages"][0]["content"].split("\n")[1:-2]
            records = [number for number, line in enumerate(body) if "| temp=" in line]
            positions.update(round(number / len(body), 1) for number in records)
            assert row["lines"] == len(records) == 2 < len(body) and 550 < row["tokens"] <= 600
            if "folder" in filler:
                sentences = ["First sentence here.", "Second one!", "Third, is it?"]
                others = [line for number, line in enumerate(body) if number not in records]
                start = sentences.index(others[0])
                assert others == [sentences[(start + step) % 3] for step in range(len(others))]
        assert len(positions) > 5


@pytest.mark.parametrize(
    ("field", "pattern"),
    [
        ({"type": "integer", "range": [7, 9]}, "[789]"),
        ({"type": "choice", "of": ["a", "b"]}, "[ab]"),
        ({"type": "code", "pattern": "x-#?"}, r"x-\d[A-Z]"),
        ({"type": "words", "of": ["verb", "noun"], "separator": "+"}, r"[^+]+\+[^+]+"),
        ({"type": "text", "sentences": 2}, r"[^.]+\. [^.]+\."),
        ({"type": "date", "range": ["2026-02-28", "2026-03-01"]}, "2026-0(2-28|3-01)"),
    ],
)
def test_generators(field, pattern, tmp_path):
    generator = Description(**{**SENSORS, "name": "x", "fields": {"a": field}}).fields["a"]
    values = [str(value) for value in islice(generator.values(random.Random(0), tmp_path), 100)]
    assert all(re.fullmatch(pattern, value) for value in values) and len(set(values)) > 1
    assert values == [str(value) for value in islice(generator.values(random.Random(0), tmp_path), 100)]


FIELDS = SENSORS["fields"]
REFUSED = [
    ({"fotter": "x"}, "fotter: no such setting; is footer meant?"),
    (
        {"fields": FIELDS | {"temp": FIELDS["temp"] | {"place": 2}}},
        "fields.temp.place: no such setting; is places",
    ),
    ({"fields": FIELDS | {"temp": {"type": "intger"}}}, "fields.temp: found the type 'intger', expected one of"),
    (
        {"fields": FIELDS | {"temp": FIELDS["temp"] | {"range": [4, 1]}}},
        "fields.temp.range: found 4.0 to 1.0",
    ),
    ({"fields": FIELDS | {"temp": {"type": "choice", "of": [True, False]}}}, "fields.temp.of.0"),
    ({"question": None}, "question: missing"),
    ({"question": "What is {tempp}?"}, "question: no such field as {tempp}; is temp meant?"),
    ({"question": "What is {?"}, "is not a template"),
    ({"question": "Which temp at {time}?"}, "question: several records could answer it: name a field in it that has"),
    ({"record": "{sensor}\n"}, "record: lacks {temp}"),
    ({"answer": "It is warm."}, "answer: names no field"),
    ({"records": 3}, "`records` (a fixed number) and `filler` (lines around them) belong together"),
    ({"metric": "exact"}, "metric: by exact, the task's own answer"),
    ({"metric": "last_integer"}, "metric: last_integer compares digits alone, but a reference is"),
    ({"metric": "contain"}, "metric: found 'contain', expected one of contains"),
    ({"name": "vt"}, "name: 'vt' is a built-in task's"),
    ({"table": "rows.cvs"}, "rows.cvs: no such file; is"),
    (
        {"fields": FIELDS | {"temp": {"type": "choice", "of": ["a", "b"]}}, "answer": "It is {temp}."},
        "answer: there are only 2 different ones, expected 20 or more",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_a_wrong_description_is_one_line_that_names_file_and_setting(changes, message, describe, tmp_path):
    (tmp_path / "rows.csv").touch()
    spec = describe(**changes)
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        resolve_task(spec)
    assert str(refused.value).startswith(f"{spec}: ") and "\n" not in str(refused.value)


def test_fields_that_run_out_of_values_are_an_error_not_a_loop(describe, tokenizer):
    few = FIELDS | {"sensor": {"type": "code", "pattern": "s-##", "unique": True}}
    with pytest.raises(ValueError, match=r"fields\.sensor: has no more than 100 unique values"):
        prompts(describe(fields=few), tokenizer, tokens=None, lines=101)


def test_the_command_writes_a_manifest_with_the_descriptions_hash(tmp_path, describe, tokenizer):
    spec, out = describe(), tmp_path / "out.jsonl"
    request = Request(spec, "300:400", samples=3)
    assert write(request, tokenizer, out) and not write(request, tokenizer, out)
    manifest = json.loads(manifest_path(out).read_text())
    assert manifest["task"] == "sensors" and len(manifest["description_sha256"]) == 64
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.copy(spec, moved)
    assert not write(Request(str(moved / "sensors.yml"), "300:400", samples=3), tokenizer, out)
    describe(max_new_tokens=9)  # no matter of the data
    assert not write(request, tokenizer, out)
    describe(header="Another log.\n")
    with pytest.raises(ValueError, match="was made with description_sha256"):
        write(request, tokenizer, out)


def test_preview_prints_a_sample_and_needs_no_model(describe, capsys, tmp_path):
    app([describe(), "--preview"], standalone_mode=False)
    text = capsys.readouterr().out
    assert text.startswith("--- prompt\nHere is a log.\n") and "--- Sensor log: " in text and " words, train" in text
    app(
        [describe(), "--preview", "--tokens", "300", "--split", "test", "--tokenizer", str(TINY)], standalone_mode=False
    )
    assert " tokens, test split, references " in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["sensors.yml"]


def test_a_description_is_read_again_when_it_changes(describe):
    assert resolve_task(describe()).max_new_tokens == 50
    assert resolve_task(describe(max_new_tokens=7)).max_new_tokens == 7
    assert read_description(ROOT / "data_gen/tasks/line.yml").name == "line"

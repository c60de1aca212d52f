"""Line retrieval data: LongEval's text, exact lengths, reproducible bytes, disjoint splits; manifests."""

from __future__ import annotations

import ast
import itertools
import json
import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT, TINY
from transformers import AutoTokenizer

from axolotl_plugins.common.io import read_rows
from axolotl_plugins.common.tokenizer import count_tokens, load_tokenizer
from data_gen.dataset import Request, draw, generate, in_split, manifest_path, tokenizer_hash, write
from data_gen.described_task import Records, read_description, render, unique, words
from data_gen.fit_length import largest

LINE = read_description(ROOT / "data_gen/tasks/line.yml")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


def test_a_tokenizers_hash_ignores_stored_truncation_and_earlier_calls(tokenizer, tmp_path):
    own = AutoTokenizer.from_pretrained(TINY)
    expected = tokenizer_hash(own)
    own(["one", "one two"], padding="max_length", truncation=True, max_length=4)
    own.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"]["max_length"] == 4
    assert tokenizer_hash(AutoTokenizer.from_pretrained(tmp_path)) == tokenizer_hash(own) == expected


def data_gen(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "data_gen", *arguments], capture_output=True, text=True, cwd=cwd, timeout=120
    )


def render_lines(pairs: list[tuple[str, int]], line: int) -> dict:
    records = [{"key": key, "number": number} for key, number in pairs]
    return render(LINE, "".join(LINE.record.format(**record) for record in records), records, line)


def test_text_is_longevals():
    """The literal text of LongEval's generator with these values, and the paper's answer (appendix B.1)."""
    drawn = render_lines([("torpid-kid", 2416), ("able-jeans", 6782)], 1)
    assert drawn["prompt"] == (
        "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
        "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its "
        "corresponding <REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding "
        "<REGISTER_CONTENT> of a certain line index. Now the record start:\n\n"
        "line torpid-kid: REGISTER_CONTENT is <2416>\n"
        "line able-jeans: REGISTER_CONTENT is <6782>\n"
        "\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line able-jeans? I need the number."
    )
    assert drawn["answer"] == "The <REGISTER_CONTENT> in line able-jeans is 6782."
    assert (drawn["line"], drawn["lines"], drawn["key"], drawn["number"]) == (1, 2, "able-jeans", 6782)


@pytest.mark.skipif("LONGEVAL_CASES" not in os.environ, reason="LONGEVAL_CASES names no folder of LongEval's cases")
def test_rendering_reproduces_longevals_own_cases():
    files = sorted(Path(os.environ["LONGEVAL_CASES"]).glob("*_lines.jsonl"))
    assert files
    for file in files:
        for row in map(json.loads, file.read_text().splitlines()):
            lines = re.findall(r"^line (.+): REGISTER_CONTENT is <(\d+)>$", row["prompt"], re.MULTILINE)
            drawn = render_lines([(key, int(number)) for key, number in lines], row["random_idx"][1])
            assert drawn["prompt"] == row["prompt"].rstrip(" ")  # the published files end in a space
            assert drawn["number"] == row["expected_number"]


@pytest.mark.parametrize("tokens", [235, 300, 999, 1900, 8000])
def test_length_is_never_over_and_at_most_a_line_short(tokenizer, tokens):
    for sample in generate(Request("line", str(tokens), samples=8), tokenizer):
        length = count_tokens(tokenizer, sample["messages"])
        assert length == sample["tokens"] <= tokens
        prompt = sample["messages"][0]["content"]
        longest_line = LINE.record.format(key="absolute-contact lens", number=50000)
        assert tokens - length < len(tokenizer(longest_line)["input_ids"])
        assert prompt.count("\nline ") == sample["lines"]
        assert f"line {sample['key']}: REGISTER_CONTENT is <{sample['number']}>\n" in prompt


def test_lengths_of_a_range_spread_over_it(tokenizer):
    lengths = [sample["tokens"] for sample in generate(Request("line", "300:1900", samples=30), tokenizer)]
    assert min(lengths) < 700 and max(lengths) > 1500 and max(lengths) <= 1900


def test_numbers_and_positions_spread(tokenizer):
    samples = list(generate(Request("line", lines=20, samples=200), tokenizer))
    assert {sample["line"] for sample in samples} == set(range(20))
    numbers = [sample["number"] for sample in samples]
    assert min(numbers) >= 1 and max(numbers) <= 50_000
    assert 20_000 < sum(numbers) / len(numbers) < 30_000
    keys = [re.findall(r"^line (.+): ", s["messages"][0]["content"], re.MULTILINE) for s in samples]
    assert all(len(set(column)) == 20 for column in keys)


def test_a_sample_depends_on_its_index_alone(tokenizer):
    few = list(generate(Request("line", "400", samples=3), tokenizer))
    many = list(generate(Request("line", "400", samples=6), tokenizer))
    assert few == many[:3]
    assert few != list(generate(Request("line", "400", samples=3, seed=1), tokenizer))


def test_splits_never_meet():
    """A bit of the answer's hash decides the split; 10,000 draws of a tiny task agree."""
    answers = {"train": set(), "test": set()}
    for split, split_answers in answers.items():
        for index in range(10_000):
            rng = random.Random(f"{split}{index}")
            records = Records(LINE, ROOT, [], rng, lambda answer, split=split: in_split(split, answer))
            split_answers.add(LINE.answer.format(**records.first(1)[0]))
    assert len(answers["train"]) > 9_900 and not answers["train"] & answers["test"]
    # The rule separates any answers, however few can be drawn.
    answers = [str(number) for number in range(1000)]
    assert all(in_split("train", answer) != in_split("test", answer) for answer in answers)
    assert 400 < sum(in_split("train", answer) for answer in answers) < 600


def test_more_lines_than_adjectives():
    field = LINE.fields["key"]
    keys = list(itertools.islice(unique("key", field.values(random.Random(0), ROOT), field.unique), 3000))
    assert len(set(keys)) == 3000
    adjectives = len(words("adjective"))
    assert len({key.split("-")[0] for key in keys[:adjectives]}) > 0.98 * adjectives


@pytest.mark.parametrize("answer", [1, 2, 3, 17, 100, 1023])
@pytest.mark.parametrize("bend", [1.0, 0.5, 2.0, 3.0])
def test_largest_is_the_largest_and_takes_few_trials(answer, bend):
    """Also if lengths grow nonlinearly or in steps."""
    trials = []

    def length(n):
        trials.append(n)
        return 7 + int(3 * n**bend)

    assert length(largest(length, length(answer), what="it")) == length(answer)
    assert len(trials) < 30
    trials.clear()
    assert largest(lambda n: 100 + 20 * n, 100 + 20 * answer + 3, what="it") == answer


def test_largest_raises_if_nothing_fits():
    with pytest.raises(ValueError, match="9 is too short for it, whose shortest sample has 10"):
        largest(lambda n: 9 + n, 9, what="it")


def test_same_command_same_bytes_and_nothing_done_twice(tmp_path):
    arguments = ["line", "--tokenizer", str(TINY), "--tokens", "400", "--samples", "4", "--out"]
    for name in ("one.jsonl", "two.jsonl"):
        assert data_gen(*arguments, name, cwd=tmp_path).returncode == 0
    first, second = (tmp_path / name for name in ("one.jsonl", "two.jsonl"))
    assert first.read_bytes() == second.read_bytes()
    modified = first.stat().st_mtime_ns
    again = data_gen(*arguments, "one.jsonl", cwd=tmp_path)
    assert again.returncode == 0 and "already there" in again.stdout
    assert first.stat().st_mtime_ns == modified
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "one.jsonl", "one.jsonl.manifest.json", "two.jsonl", "two.jsonl.manifest.json"
    ]  # fmt: skip

    # The manifest's command reproduces both files.
    manifest = manifest_path(first).read_bytes()
    command = shlex.split(json.loads(manifest)["command"])
    assert command[:2] == ["seal", "data"]
    first.unlink()
    manifest_path(first).unlink()
    assert data_gen(*command[2:], cwd=tmp_path).returncode == 0
    assert first.read_bytes() == second.read_bytes() and manifest_path(first).read_bytes() == manifest


def test_a_file_without_its_manifest_is_completed(tmp_path, tokenizer):
    request, out = Request("line", "400", samples=3), tmp_path / "x.jsonl"
    write(request, tokenizer, out)
    wanted = out.read_bytes(), manifest_path(out).read_bytes()
    manifest_path(out).unlink()
    assert write(request, tokenizer, out)
    assert (out.read_bytes(), manifest_path(out).read_bytes()) == wanted


def test_a_file_that_is_not_what_is_asked_for_is_an_error(tmp_path, tokenizer):
    out = tmp_path / "x.jsonl"
    write(Request("line", "400", samples=3), tokenizer, out)
    with pytest.raises(ValueError, match="samples 3, but 4 is requested"):
        write(Request("line", "400", samples=4), tokenizer, out)
    with pytest.raises(ValueError, match="seed 0, but 1"):
        write(Request("line", "400", samples=3, seed=1), tokenizer, out)
    out.write_text(out.read_text().replace("REGISTER", "register", 1))
    with pytest.raises(ValueError, match="was modified after it was written"):
        write(Request("line", "400", samples=3), tokenizer, out)
    manifest_path(out).unlink()
    with pytest.raises(ValueError, match="was not generated by this command"):
        write(Request("line", "400", samples=3), tokenizer, out)


def test_lines_end_at_line_breaks_alone(tmp_path):
    """JSON does not escape Unicode's line separators; they do not separate rows."""
    rows = [{"text": f"a{sign}b"} for sign in ("\u2028", "\u2029", "\u0085", "\x0b")]
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert [row for _, row in read_rows(file)] == rows


def test_a_tokenizer_without_template_is_refused(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        load_tokenizer(str(tmp_path))


def test_samples_are_drawn_once_in_a_process(tokenizer):
    request = Request("line", "400", samples=3, seed=7)
    first = draw(request, tokenizer)
    assert first == list(generate(request, tokenizer)) and draw(request, tokenizer) is first
    other = AutoTokenizer.from_pretrained(TINY)
    assert draw(request, other) is first
    other.chat_template += " "  # other tokens
    assert draw(request, other) is not first


def imported(package: Path) -> set[str]:
    """Names of all modules that a package's files import, at any depth of their code."""
    names = set()
    for node in (node for file in package.rglob("*.py") for node in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return names


def test_imports_run_one_way():
    """What all packages share imports none of them, and data generation nothing but that."""
    own = re.compile(r"(axolotl_plugins|data_gen|eval|recipes)\b")
    shared = {name for name in imported(ROOT / "axolotl_plugins" / "common") if own.match(name)}
    assert shared and all(name.startswith("axolotl_plugins.common.") for name in shared)
    allowed = ("data_gen.", "axolotl_plugins.common.")
    assert all(name.startswith(allowed) for name in imported(ROOT / "data_gen") if own.match(name))
    assert len((ROOT / "axolotl_plugins" / "__init__.py").read_text().splitlines()) == 1  # a docstring alone

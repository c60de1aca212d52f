"""Needles and RULER's tasks: the originals' text, exact lengths, disjoint splits, bytes; LongBench's truncation."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter

import bench_data as bench
import pytest
from paths import FIXTURES, TINY
from transformers import AutoTokenizer

from axolotl_plugins.common.tokenizer import count_tokens, load_tokenizer
from data_gen.dataset import Request, generate, in_split, remark, write
from data_gen.metrics import string_match_all
from data_gen.tasks import TASKS, cwe, fwe, longbench, niah, register, ruler_niah, vt

# Samples that NVIDIA's own programs wrote for 1,500 tokens.
ORIGINALS = [json.loads(row) for row in (FIXTURES / "ruler.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


def originals(task):
    return [row for row in ORIGINALS if row["task"] == task]


def parse_chain(text):
    """Names, value, positions and number of noises of one variable tracking prompt."""
    names, positions, noises, value = [], [], 0, None
    for sentence in text.split("\n\n", 1)[1].split("\nQuestion:")[0].split("\n"):
        if match := re.match(r"VAR (\w+) = (.*)", sentence):
            names.append(match[1])
            positions.append(noises)
            value = value or match[2].strip()
        else:
            noises += 1
    return names, value, positions, noises


@pytest.mark.parametrize("row", originals("vt"))
def test_variable_tracking_is_nvidias_byte_for_byte(row):
    example, main = row["input"].split(vt.PROMPT.split("\n")[0])[1:]
    prompt, prefix = vt.render(*parse_chain(main))
    assert vt.render_example(*parse_chain(example)) + prompt == row["input"]
    assert prefix == row["answer_prefix"] and parse_chain(main)[0] == row["outputs"]


def entries(text):
    return re.findall(r"\d+\. (.*?)(?= \d+\. |\n|$)", text)


@pytest.mark.parametrize("row", originals("cwe"))
def test_common_words_are_nvidias_byte_for_byte(row):
    example, main = row["input"].split("\n" + cwe.PROMPT.split("\n")[0])
    example_words, answer, words = (
        entries(example.split("\n")[1]),
        entries(example.split("list are: ")[1]),
        entries(main),
    )
    shown = "".join(cwe.render_example(example_words, answer))
    rebuilt = shown + "\n" + cwe.PROMPT.format(context=cwe.numbered(words))
    assert rebuilt == row["input"] and row["answer_prefix"] == cwe.PREFIX
    (common, other), (count, example_common, example_other) = cwe.SHORT
    assert set(Counter(words).values()) == {common, other}
    assert all(Counter(words)[word] == common for word in row["outputs"])
    assert set(Counter(example_words).values()) == {example_common, example_other} and len(set(example_words)) == count


@pytest.mark.parametrize("row", originals("fwe"))
def test_frequent_words_are_nvidias_byte_for_byte(row):
    body = row["input"][len(fwe.PROMPT.split("{context}")[0]) :].split("\nQuestion")[0]
    assert fwe.PROMPT.format(context=body) == row["input"] and row["answer_prefix"] == fwe.PREFIX
    counts = Counter(body.split(" "))
    size = (row["tokens"] - fwe.MAX_NEW_TOKENS) // 50
    possible = [[n for n in fwe.frequencies(total, size) if n] for total in range(1, 3000)]
    assert [n for _, n in counts.most_common()] in possible
    assert [word for word, _ in counts.most_common(4)] == ["...", *row["outputs"]]


NEEDLE_ORIGINALS = [json.loads(row) for row in (FIXTURES / "ruler_niah.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("row", NEEDLE_ORIGINALS, ids=lambda row: row["task"])
def test_rulers_needles_are_nvidias_byte_for_byte(row):
    """The original's own samples, from a haystack of prose; needles, their places and keys are read off them."""
    variant = ruler_niah.VARIANTS[row["task"]]
    body = row["input"].split("afterwards.\n")[1].split("\nWhat ")[0]
    needle = re.compile(r"One of the special magic \w+ for \S+ is: \S+?\.(?= |\n|$)")
    queries = re.split(r", and |, ", row["input"].rsplit(" for ", 1)[1].split(" mentioned")[0])
    count = variant.num_keys * variant.values
    if variant.haystack == "essay":
        needles = needle.findall(body)
        parts = needle.split(body)
        sentences = [re.findall(r"[^.\s][^.]*(?:\.|$)", part) for part in parts]
        cuts = [sum(map(len, sentences[: place + 1])) for place in range(count)]
        total = sum(map(len, sentences))
        depths = [next(d for d in ruler_niah.DEPTHS if int(total * (d / 100)) == cut) for cut in cuts]
        text = re.sub(r" +", " ", needle.sub("", body)).strip()
        context = ruler_niah.hide_in_text(text, needles, depths)
    else:
        lines = body.split("\n")
        asked = [place for place, line in enumerate(lines) if f" for {queries[0]} is: " in line]
        rest = [line for place, line in enumerate(lines) if place not in asked]
        context = ruler_niah.hide_in_lines(rest, [lines[place] for place in asked], asked)
    assert ruler_niah.render(variant, context, queries) == (row["input"], row["answer_prefix"])
    assert len(row["outputs"]) == variant.values * variant.queries
    assert all(f" for {queries[0 if variant.queries == 1 else n]} is: {value}." in body
               for n, value in enumerate(row["outputs"]))  # fmt: skip


@pytest.mark.parametrize("task", ruler_niah.VARIANTS)
def test_rulers_needles_are_hidden_once_and_answer_the_question(task, tokenizer):
    variant = ruler_niah.VARIANTS[task]
    for drawn in generate(Request(task, "900", samples=2, split="test"), tokenizer):
        prompt = drawn["messages"][0]["content"]
        values = [value for key in drawn["keys"] for value in re.findall(rf" for {key} is: (\S+)\.", prompt)]
        assert sorted(values) == sorted(drawn["references"]) and len(values) == variant.values * variant.queries
        assert string_match_all(drawn["messages"][1]["content"], drawn["references"]) == 1
        assert string_match_all(drawn["messages"][1]["content"], ["7654321", *drawn["references"]]) < 1


# Samples that NVIDIA's programs of 2024 and 2025 wrote with the template ``[INST] {task_template} [/INST]``.
VERSIONS = [json.loads(row) for row in (FIXTURES / "ruler_versions.jsonl").read_text().splitlines()]


def versions(task):
    return [row for row in VERSIONS if row["task"] == task]


def parse_lines_2024(text):
    """The arguments of ``vt.render`` for the text of 2024, in which assignments stand before the noise of a line."""
    text = re.split(r"following text\.\s+", text, maxsplit=1)[1].split("Question:")[0]
    names, positions, value = [], [], None
    for match in re.finditer(r"VAR (\w+) = (?:VAR )?(\w+)", text):
        names.append(match[1])
        positions.append(text[: match.start()].count(vt.NOISE))
        value = value or match[2]
    return names, value, positions, text.count(vt.NOISE)


@pytest.mark.parametrize("row", versions("vt"))
def test_variable_tracking_is_nvidias_of_both_years(row):
    example, main = row["input"].split("Memorize and track")[1:]
    parse = parse_lines_2024 if row["version"] == 2024 else parse_chain
    prompt, prefix = vt.render(*parse(main), row["version"])
    assert f"[INST] {vt.render_example(*parse(example), row['version'])}{prompt} [/INST]{prefix}" == row["input"]
    assert ("assgined" in prefix) == (row["version"] == 2024)
    assert parse(main)[0] == row["outputs"]


@pytest.mark.parametrize("row", versions("cwe"))
def test_common_words_are_nvidias_of_both_years(row):
    """Example and task are two turns of a chat."""
    example, main = row["input"].split("\n[INST] ")
    shown, words = entries(example.split("\n")[1]), entries(main)
    answer = entries(example.split("list are:")[1])
    prompt, reply = cwe.render_example(shown, answer, row["version"])
    assert f"[INST] {prompt} [/INST]{reply}" == example
    assert cwe.PROMPT.format(context=cwe.numbered(words)) + f" [/INST]{cwe.PREFIX}" == main
    if row["version"] == 2024:
        assert len(set(words)) % cwe.STEP_2024 == 0


@pytest.mark.parametrize("row", versions("fwe"))
def test_frequent_words_have_nvidias_vocabulary_and_steps_of_both_years(row):
    body = row["input"].split("coded words. ")[1].split("\nQuestion")[0]
    assert f"[INST] {fwe.PROMPT.format(context=body)} [/INST]{fwe.PREFIX}" == row["input"]
    length = row["tokens"] - (0 if row["version"] == 2024 else fwe.MAX_NEW_TOKENS)
    counts = [n for _, n in Counter(body.split(" ")).most_common()]
    size, step = length // 50, length // 32
    possible = [[n for n in fwe.frequencies(length // 6 + k * step, size) if n] for k in range(30)]
    assert counts in possible


@pytest.mark.parametrize("version", [2024, 2025])
@pytest.mark.parametrize("task", ["vt", "cwe", "fwe"])
def test_samples_of_a_version_have_its_text_and_steps(task, version, tokenizer):
    tokens = 9000 if task == "cwe" else 4200
    requests = [Request(task, tokens, samples=2, split="test", ruler_version=year) for year in (version, None)]
    samples, plain = (list(generate(request, tokenizer)) for request in requests)
    for sample, unversioned in zip(samples, plain, strict=True):
        text = sample["messages"][-2]["content"]
        assert sample["tokens"] == count_tokens(tokenizer, sample["messages"]) <= tokens
        assert sample["references"] == unversioned["references"] or task == "fwe"
        if task == "vt":
            parse = parse_lines_2024 if version == 2024 else parse_chain
            example, main = text.split("Memorize and track")[1:]
            assert vt.render_example(*parse(example), version) + vt.render(*parse(main), version)[0] == text
            assert sample["noises"] % 10 == 0 or version == 2025
            assert ("assgined" in sample["prefix"]) == (version == 2024)
        elif task == "cwe":
            shown, reply, prompt, _ = sample["messages"]
            assert [turn["role"] for turn in sample["messages"]] == ["user", "assistant"] * 2
            assert reply["training"] is False and reply["content"].startswith(cwe.PREFIX.strip())
            assert ("are:1. " in reply["content"]) == (version == 2024)
            example = entries(shown["content"].split("\n")[1]), entries(reply["content"].split("are:")[1])
            assert cwe.render_example(*example, version) == (shown["content"], " " + reply["content"])
            assert prompt["content"] == cwe.PROMPT.format(context=cwe.numbered(entries(prompt["content"])))
            assert sample["words"] % 10 == 0 or version == 2025
        else:
            length = 4200 - (0 if version == 2024 else 50)
            assert (sample["words"] - length // 6) % (length // 32) == 0
            assert sample["words"] < unversioned["words"]


def test_common_words_use_all_of_their_words_and_refuse_longer_samples(tokenizer):
    longest = Request("cwe", "338000", samples=1, split="test", ruler_version=2024)
    assert [sample["words"] for sample in generate(longest, tokenizer)] == [8100]
    with pytest.raises(ValueError, match="needs more than wonderwords' 8166 words"):
        next(iter(generate(dataclasses.replace(longest, tokens="350000"), tokenizer)))


def test_a_version_of_ruler_is_one_of_rulers():
    for arguments, message in (
        ({"task": "line", "ruler_version": 2024}, "ruler_version: line has no such option"),
        ({"task": "vt", "ruler_version": 2023}, "found 2023, expected 2024 or 2025"),
    ):
        with pytest.raises(ValueError, match=message):
            Request(tokens="4096", **arguments)


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    """The tokenizer that the bench measures with, saved and loaded again as a model's is."""
    folder = tmp_path_factory.mktemp("mistral")
    bench.mistral_tokenizer().save_pretrained(folder)
    bench.write_passages(folder / "passages.jsonl", 3000, 4)
    return load_tokenizer(str(folder)), folder / "passages.jsonl"


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_drawn_with_mistrals_tokenizer(task, mistral):
    tokenizer, passages = mistral
    assert len(tokenizer) == 32_000 and tokenizer.is_fast
    data = str(passages) if task == "longbench" else None
    for sample in generate(Request(task, "3000", samples=2, data=data), tokenizer):
        ids = tokenizer.apply_chat_template(sample["messages"], return_dict=False)
        assert len(ids) == sample["tokens"] == count_tokens(tokenizer, sample["messages"])
        assert 2800 < sample["tokens"] <= 3000 and ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.slow
def test_bench_prints_a_row_for_every_task(capsys):
    bench.main(["--tokens", "3000", "--samples", "1"])
    rows = capsys.readouterr().out.splitlines()
    assert [row.split("`")[1] for row in rows[2:]] == list(TASKS)


@pytest.mark.parametrize("task", ["niah", "vt", "cwe", "fwe"])
@pytest.mark.parametrize("tokens", [2000, 8000])
def test_samples_keep_their_length_and_their_split(tokenizer, task, tokens):
    answers = {}
    for split in ("train", "test"):
        samples = list(generate(Request(task, str(tokens), samples=4, split=split), tokenizer))
        answers[split] = {" ".join(sample["references"]) for sample in samples}
        for sample in samples:
            prompt, answer = (message["content"] for message in sample["messages"])
            assert sample["tokens"] == count_tokens(tokenizer, sample["messages"]) <= tokens
            assert tokens - sample["tokens"] < (TASKS[task].max_new_tokens if TASKS[task].group else 20) + 0.04 * tokens
            if TASKS[task].group == "ruler":
                assert answer.startswith(sample["prefix"]) and sample["budget"] == TASKS[task].max_new_tokens
                assert all(reference in answer for reference in sample["references"])
                prefilled = [{"role": "user", "content": prompt}, {"role": "assistant", "content": sample["prefix"]}]
                total = count_tokens(tokenizer, prefilled) - 1 + sample["budget"]  # less the end of the turn
                assert total <= tokens
    assert not answers["train"] & answers["test"]


def test_answers_of_ruler_are_what_the_text_says(tokenizer):
    chain = next(generate(Request("vt", "1500", samples=1), tokenizer))
    names, value, _, _ = parse_chain(chain["messages"][0]["content"].split(vt.PROMPT.split("\n")[0])[-1])
    assert names == chain["references"] and value == chain["value"]
    common = next(generate(Request("cwe", "8000", samples=1), tokenizer))
    text = common["messages"][0]["content"].split("\nQuestion")[1].split("most often.\n")[-1]
    counts = Counter(entries(text))
    assert {word for word, n in counts.items() if n == 30} == set(common["references"]) and set(counts.values()) == {
        3,
        30,
    }
    frequent = next(generate(Request("fwe", "5000", samples=1), tokenizer))
    counts = Counter(re.findall(r"\b[a-z]{6}\b", frequent["messages"][0]["content"].split("words. ")[1].split("\n")[0]))
    assert [word for word, _ in counts.most_common(3)] == frequent["references"]


def test_needle_prompt_is_the_originals():
    assert niah.PROMPT.format(context="C", question="Q?") == (
        "<book>C</book>\nBased on the content of the book, Question: Q?\nAnswer:"
    )
    # The literal default of the original program.
    assert niah.insert("One. Two. Three.", niah.TEST_NEEDLE["needle"], 100).endswith(
        "\nThe best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day.\n"
    )
    assert niah.TEST_NEEDLE["needle"].endswith(niah.TEST_REFERENCE + ".")


@pytest.mark.parametrize(
    ("depth", "expected"),
    [(0, "\nN\nOne 1.5. Two b. Three."), (50, "One 1.5.\nN\n Two b. Three."), (100, "One 1.5. Two b. Three.\nN\n")],
)
def test_needle_stands_at_a_sentence_end(depth, expected):
    assert niah.insert("One 1.5. Two b. Three.", "N", depth) == expected


def test_test_needles_step_through_the_depths_in_one_haystack(tokenizer):
    grid = [list(generate(Request("niah", n, samples=12, split="test"), tokenizer)) for n in ("600", "900")]
    for row in grid:
        assert [s["depth"] for s in row[:10]] == [0, 11, 22, 33, 44, 56, 67, 78, 89, 100] and row[10]["depth"] == 0
    coarse = generate(Request("niah", "600", samples=6, split="test", depths=5), tokenizer)
    assert [s["depth"] for s in coarse] == [0, 25, 50, 75, 100, 0]
    text = [s["messages"][0]["content"].replace(f"\n{niah.TEST_NEEDLE['needle']}\n", "") for row in grid for s in row]
    books = [re.search(r"<book>(.*)</book>", t, re.DOTALL)[1] for t in text]
    longest = max(books[12:22], key=len)
    assert all(longest.startswith(book) for book in books[:10] + books[12:22])
    assert not books[10].startswith(books[0][:40])


def test_training_needles_are_the_papers_and_never_the_test_needle(tmp_path, tokenizer):
    assert len(niah.needles(niah.NEEDLES)) == 10
    answers = {s["answer"] for s in generate(Request("niah", "700", samples=40), tokenizer)}
    assert len(answers) >= 8 and answers <= {pair["needle"] for pair in niah.needles(niah.NEEDLES)}
    bad = tmp_path / "needles.jsonl"
    bad.write_text(json.dumps({**niah.TEST_NEEDLE, "needle": niah.TEST_NEEDLE["needle"].upper()}) + "\n")
    with pytest.raises(ValueError, match=r"needles.jsonl, line 1: this is the test needle"):
        next(generate(Request("niah", "700", samples=1, needles=str(bad)), tokenizer))


def test_haystack_of_a_folder_repeats_with_a_warning(tmp_path, tokenizer):
    (tmp_path / "b.txt").write_text("Second essay here. It ends.")
    (tmp_path / "a.txt").write_text("First essay here. It goes on.\n")
    (tmp_path / "c.md").write_text("not read")
    sample = next(generate(Request("niah", "600", samples=1, split="test", haystack=str(tmp_path)), tokenizer))
    text = sample["messages"][0]["content"]
    assert text.count("First essay here.") > 3 and text.index("First essay") < text.index("Second essay")
    assert sample["haystack_repeats"] >= 3 and "not read" not in text
    for name, haystack, warning in (("a", str(tmp_path), "it is repeated up to"), ("b", None, "")):
        write(Request("niah", "600", samples=2, haystack=haystack), tokenizer, tmp_path / name)
        remarked = remark(map(json.loads, (tmp_path / name).read_text().splitlines()))
        assert warning in remarked and bool(remarked) == bool(warning)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no \\*.txt in"), ("", "are empty"), (b"\xff\xfe\x00", "as UTF-8 text")],
)
def test_haystacks_that_cannot_be_read(content, message, tmp_path, tokenizer):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        next(generate(Request("niah", "600", samples=1, haystack=str(tmp_path)), tokenizer))


def test_longbench_takes_the_longest_and_truncates_the_middle(tmp_path, tokenizer):
    rows = [
        {"input": f"Question {i}?", "context": " ".join(f"w{i}x{n}" for n in range(60 * i)), "answers": [f"a{i}", "b"],
         "length": 60 * i}
        for i in range(1, 6)
    ]  # fmt: skip
    data = tmp_path / "triviaqa_e.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = list(generate(Request("longbench", "900", samples=5, data=str(data)), tokenizer))
    assert [s["references"][0] for s in samples] == ["a5", "a4", "a3", "a2", "a1"]
    assert samples[0]["truncated"] and not samples[-1]["truncated"]
    assert samples[-1]["messages"][0]["content"] == longbench.PROMPT.format(**rows[0])
    for sample in samples:
        assert sample["tokens"] <= 900
        text = sample["messages"][0]["content"]
        if sample["truncated"]:
            row = rows[int(sample["references"][0][1:]) - 1]
            full = tokenizer(longbench.PROMPT.format(**row), add_special_tokens=False)["input_ids"]
            half = (len(tokenizer(text, add_special_tokens=False)["input_ids"])) // 2
            assert text.startswith(tokenizer.decode(full[: half - 2])) and text.endswith(
                tokenizer.decode(full[-half + 2 :])
            )
            assert sample["full_tokens"] > 900 >= sample["tokens"] > 890
    with pytest.raises(ValueError, match="has 5 rows, sample 6 is requested"):
        list(generate(Request("longbench", "900", samples=6, data=str(data)), tokenizer))
    data.write_text(data.read_text() + "{oops\n")
    longbench.longest.cache_clear()
    with pytest.raises(ValueError, match="line 6: not JSON"):
        list(generate(Request("longbench", "900", samples=1, data=str(data)), tokenizer))


@pytest.mark.parametrize("source", ["original", "formatted"])
def test_longbench_trains_on_the_originals_prompts_from_either_source(source, tmp_path, tokenizer):
    rows = [json.loads(row) for row in (FIXTURES / "longbench_formatted.jsonl").read_text().splitlines()]
    row = next(row for row in rows if row["set"] == "triviaqa_e")
    (tmp_path / "data.jsonl").write_text(json.dumps(row[source]) + "\n")
    sample = next(generate(Request("longbench", "900", samples=1, data=str(tmp_path / "data.jsonl")), tokenizer))
    assert sample["messages"][0]["content"] == row["prompt"] and sample["answer"] == "a letter"


def test_what_cannot_be_asked_for():
    for arguments, message in (
        ({"task": "line", "tokens": "400", "haystack": "x"}, "haystack: line has no such option"),
        ({"task": "niah", "lines": 3}, "lines: niah has no such option"),
        ({"task": "line", "tokens": "400", "depths": 5}, "depths: line has no such option"),
        ({"task": "niah", "tokens": "400", "split": "test", "depths": 1}, "depths: found 1, expected at least 2"),
        ({"task": "niah", "tokens": "400", "depths": 5}, "depths: found 5, expected at least 2, and only for test"),
        ({"task": "longbench", "tokens": "400", "split": "test"}, "split: longbench samples are for training"),
    ):
        with pytest.raises(ValueError, match=message):
            Request(**arguments)


@pytest.mark.parametrize("task", ["niah", "vt", "cwe", "fwe"])
def test_a_length_that_is_too_short_is_one_clear_error(task, tokenizer):
    with pytest.raises(ValueError, match="tokens: 60 is too short for"):
        next(generate(Request(task, "60", samples=1), tokenizer))


def test_a_template_that_drops_the_text_ends_the_search(tokenizer):
    """Samples of every size then have one length, so that no size is too long."""
    deaf = AutoTokenizer.from_pretrained(TINY)
    deaf.chat_template = (
        "{% for m in messages %}{% for part in m.content | selectattr('type', 'equalto', 'text') %}{{ part.text }}"
        "{% endfor %}{% endfor %}<s>"
    )
    for task in ("line", "niah", "vt", "fwe"):
        with pytest.raises(ValueError, match="the chat template drops the text"):
            next(generate(Request(task, 600, samples=1), deaf))


def test_splits_of_names_halve_them():
    assert 400 < sum(in_split("train", f"A{n} B C D E") for n in range(1000)) < 600


# SHA-256, shortened, of three samples each; generated data must not change.
REQUESTS = {
    "line": {"tokens": "300:900"}, "line lines": {"lines": 20}, "line test": {"tokens": 600, "split": "test"},
    "niah": {"tokens": 900}, "niah test": {"tokens": 900, "split": "test", "depths": 3},
    "vt": {"tokens": 1500}, "vt test": {"tokens": 1500, "split": "test"},
    "cwe": {"tokens": 2600}, "cwe test": {"tokens": 7000, "split": "test"},
    "fwe": {"tokens": 2500}, "fwe test": {"tokens": "1500:2500", "split": "test"},
    "longbench": {"tokens": 3000},
    **{name: {"tokens": 900} for name in ruler_niah.VARIANTS},
}  # fmt: skip
HASHES = {
    "line": "625fe9b49c411073",
    "line lines": "11ee58c015ab00bc",
    "line test": "159ea354e3e536b0",
    "niah": "3cb0233f9cdda602",
    "niah test": "47daed4546200f27",
    "vt": "41e15a1d11e22189",
    "vt test": "9cd2ded3a7329f6d",
    "cwe": "067c2c164c3e96f3",
    "cwe test": "ffa97163761a9809",
    "fwe": "cf8ce18071cbff5f",
    "fwe test": "da6e200c2ce93386",
    "longbench": "4d29b46df7061879",
    "niah_single_1": "158fcc1d1cd7ef73",
    "niah_single_2": "1a75df4be18b99ae",
    "niah_single_3": "1562eb1284e8344d",
    "niah_multikey_1": "3b5374e1a1b8255d",
    "niah_multikey_2": "7f3d327c14e44bc6",
    "niah_multikey_3": "330bd4e75ef838d4",
    "niah_multivalue": "73da42a14f84f815",
    "niah_multiquery": "157655e9a50b6cff",
}


@pytest.mark.parametrize("name", REQUESTS)
def test_bytes_of_samples_never_change(name, tokenizer, tmp_path):
    task, options = name.split()[0], dict(REQUESTS[name])
    if task == "longbench":
        options["data"] = str(tmp_path / "passages.jsonl")
        bench.write_passages(tmp_path / "passages.jsonl", 3000, 4)
    rows = list(generate(Request(task, samples=3, seed=5, **options), tokenizer))
    assert hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()[:16] == HASHES[name]


def test_bytes_are_recorded_for_every_task():
    assert {name.split()[0] for name in REQUESTS} == set(TASKS) and set(HASHES) == set(REQUESTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "vt"}, "'vt' is registered already"),
        ({"name": "new", "options": ("line",)}, "unknown option 'line'"),
        ({"name": "new", "max_new_tokens": None}, "needs max_new_tokens"),
        ({"name": "new", "splits": ("train",)}, "needs max_new_tokens and a test split"),
    ],
)
def test_incomplete_tasks_are_not_registered(change, message):
    with pytest.raises(ValueError, match=message):
        register(dataclasses.replace(TASKS["vt"], **change))
    assert "new" not in TASKS

"""Read a task from a description: a YAML file with the prompt's parts and how to draw the values in them.

A description's prompt is its ``header``, records in the format of ``record``, a ``footer`` and a ``question`` for one
of the records. The values of a record's fields are drawn (``fields``) or read from the rows of a file (``table``).
Samples are sized by the number of records, or, around a fixed number of records, by the lines of ``filler``.
docs/own-task.md explains the settings; ``data_gen/tasks/line.yml`` and ``data_gen/examples`` hold descriptions.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import io
import itertools
import json
import random
import re
import string
from collections.abc import Callable, Iterator
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, StrictInt, StrictStr, ValidationError, model_validator

from axolotl_plugins.common.io import check_file, load_yaml, read_rows
from axolotl_plugins.common.schema import Strict, first_error, nearest
from data_gen.fit_length import LengthBudget
from data_gen.metrics import resolve_metric

if TYPE_CHECKING:  # at run time this would be a circle: importing the tasks reads the built-in description
    from data_gen.tasks.task import Request, Task

# Draws in a row without a new unique value, or an answer of the split, after which there seem to be none.
MAX_DRAWS = 10_000
# Records drawn to check a description, and how many of their answers must differ: a split gets a half of the answers.
CHECKED, FEWEST_ANSWERS = 200, 20
# Keys of samples that mean something elsewhere; a record's other values are saved with its sample.
RESERVED = ("prompt", "answer", "references", "prefix", "example", "messages", "task", "split", "seed", "index",
            "tokens", "line", "lines", "length", "depth", "haystack_repeats")  # fmt: skip
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")

Values = Iterator[int | str]


def ascending(bounds: tuple[Any, Any]) -> tuple[Any, Any]:
    """Check that the first of two bounds is not above the second."""
    if bounds[0] > bounds[1]:
        raise ValueError(f"found {bounds[0]} to {bounds[1]}, expected the lower bound first")
    return bounds


class Drawn(Strict):
    """Values of a field; ``unique`` ones never repeat within a sample."""

    unique: bool = False


class Integer(Drawn):
    """Integers, both bounds included; a template may pad them, as in ``{number:05d}``."""

    type: Literal["integer"]
    range: Annotated[tuple[int, int], AfterValidator(ascending)]

    def values(self, rng: random.Random, folder: Path) -> Values:
        """Yield random values."""
        while True:
            yield rng.randint(*self.range)


class Decimal(Drawn):
    """Decimal numbers with so many ``places``."""

    type: Literal["decimal"]
    range: Annotated[tuple[float, float], AfterValidator(ascending)]
    places: Annotated[int, Field(ge=1, le=12)] = 1

    def values(self, rng: random.Random, folder: Path) -> Values:
        """Yield random values."""
        low, high = (round(bound * 10**self.places) for bound in self.range)
        while True:
            yield f"{rng.randint(low, high) / 10**self.places:.{self.places}f}"


class Date(Drawn):
    """Times within a range of days, by the minute, in a ``format`` of ``strftime``."""

    type: Literal["date"]
    range: Annotated[tuple[date, date], AfterValidator(ascending)]
    format: str = "%Y-%m-%d"

    def values(self, rng: random.Random, folder: Path) -> Values:
        """Yield random values."""
        first = datetime.combine(self.range[0], datetime.min.time())
        minutes = ((self.range[1] - self.range[0]).days + 1) * 24 * 60
        while True:
            yield (first + timedelta(minutes=rng.randrange(minutes))).strftime(self.format)


class Choice(Drawn):
    """One of listed values."""

    type: Literal["choice"]
    of: Annotated[list[StrictInt | StrictStr], Field(min_length=1)]

    def values(self, rng: random.Random, folder: Path) -> Values:
        """Yield random values."""
        while True:
            yield rng.choice(self.of)


class Code(Drawn):
    """A pattern in which ``#`` stands for a digit and ``?`` for a capital letter."""

    type: Literal["code"]
    pattern: str

    def values(self, rng: random.Random, folder: Path) -> Values:
        """Yield random values."""
        pools = [{"#": string.digits, "?": string.ascii_uppercase}.get(sign, sign) for sign in self.pattern]
        while True:
            yield "".join(rng.choice(pool) for pool in pools)


class Words(Drawn):
    """English words of the wonderwords lists, joined; none repeats before its list is used up, as in LongEval."""

    type: Literal["words"]
    of: Annotated[list[Literal["adjective", "noun", "verb"]], Field(min_length=1)]
    separator: str = "-"

    def values(self, rng: random.Random, folder: Path) -> Values:
        """Yield random values."""
        lists = [list(words(category)) for category in self.of]
        while True:
            for column in lists:
                rng.shuffle(column)
            yield from map(self.separator.join, zip(*lists, strict=False))


class Text(Drawn):
    """Consecutive sentences of the ``*.txt`` files in ``folder``, or of meaningless built-in prose."""

    type: Literal["text"]
    sentences: Annotated[int, Field(ge=1)] = 1
    folder: str | None = None

    def values(self, rng: random.Random, folder: Path) -> Values:
        """Yield random values."""
        while True:
            yield " ".join(itertools.islice(sentences(rng, folder / self.folder if self.folder else None),
                                            self.sentences))  # fmt: skip


Generator = Annotated[Integer | Decimal | Date | Choice | Code | Words | Text, Field(discriminator="type")]
TYPES = ("integer", "decimal", "date", "choice", "code", "words", "text")


class Filler(Strict):
    """Lines around a fixed number of records: listed ones, or sentences as in ``Text``."""

    lines: Annotated[list[str], Field(min_length=1)] | None = None
    folder: str | None = None

    def values(self, rng: random.Random, folder: Path) -> Iterator[str]:
        """Yield random lines, or consecutive sentences."""
        while self.lines:
            yield rng.choice(self.lines)
        yield from sentences(rng, folder / self.folder if self.folder else None)


@functools.cache
def words(category: str) -> list[str]:
    """Return the words of one of wonderwords' categories, sorted so that equal seeds give equal words everywhere."""
    from wonderwords import RandomWord

    return sorted({word.strip() for word in RandomWord().filter(include_categories=[category])})


@functools.cache
def folder_sentences(folder: Path) -> list[str]:
    """Return the sentences of a folder's ``*.txt`` files, white space normalised."""
    from data_gen.tasks.niah import read

    return [" ".join(sentence.split()) for sentence in SENTENCE_END.split(read(str(folder)).strip())]


def sentences(rng: random.Random, folder: Path | None) -> Iterator[str]:
    """Yield sentences without end: of a folder's files from a random one on, in a circle, or random prose."""
    from data_gen.tasks.niah import prose

    if folder:
        listed = folder_sentences(folder)
        start = rng.randrange(len(listed))
        yield from itertools.cycle(listed[start:] + listed[:start])
    while True:
        yield prose(rng, 1).strip()


def names_in(template: str) -> set[str]:
    """Return the names of the fields of a template.

    Raises:
        ValueError: the template is invalid.
    """
    try:
        return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ValueError(f"{template!r} is not a template ({error}): write {{{{ and }}}} for braces") from None


class Description(Strict):
    """The settings of a task; ``record``, ``question``, ``answer`` and ``references`` are templates with {fields}."""

    name: Annotated[str, Field(pattern=r"^\w[\w-]*$")]
    title: str | None = None
    source: str = "own task"
    header: str = ""
    record: str
    footer: str = "\n"
    question: str
    answer: str
    references: Annotated[list[str], Field(min_length=1)]
    fields: dict[str, Generator] = Field(default_factory=dict)
    table: str | None = None
    records: Annotated[int, Field(ge=1)] | None = None
    filler: Filler | None = None
    metric: str = "contains"
    max_new_tokens: Annotated[int, Field(ge=1)] = 50
    stop: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def check_records(self) -> Description:
        """Check that something grows with the length."""
        if (self.records is None) != (self.filler is None):
            raise ValueError("`records` (a fixed number) and `filler` (lines around them) belong together: set both, "
                             "or neither to draw as many records as fit")  # fmt: skip
        return self

    def check_names(self, columns: list[str]) -> None:
        """Raise ValueError unless the templates name fields or columns, and the question is for one record."""
        if both := set(self.fields) & set(columns):
            raise ValueError(f"fields.{min(both)}: {self.table} has a column of that name: choose another")
        names = [name for name in (*self.fields, *columns) if not set(name) & set(".[]{}!:")]
        templates = {"record": self.record, "question": self.question, "answer": self.answer}
        templates |= {f"references.{number}": text for number, text in enumerate(self.references)}
        for key, template in templates.items():
            for name in sorted(names_in(template) - set(names)):
                close = nearest(name, names)
                hint = f"is {close} meant?" if close else f"expected some of {', '.join(names)}"
                raise ValueError(f"{key}: no such field as {{{name}}}; {hint}")
        if missing := names_in(self.question + self.answer + "".join(self.references)) - names_in(self.record):
            raise ValueError(f"record: lacks {{{min(missing)}}}, which question, answer or references name")
        if not names_in(self.answer):
            raise ValueError("answer: names no field, so it would be the same in every sample")
        named = names_in(self.question)
        if self.records != 1 and not (named & set(columns)) and not any(self.fields[name].unique for name in named):
            raise ValueError("question: several records could answer it: name a field in it that has `unique: true`")


class Records:
    """Endless records and filler lines: those of a sample are the first ones.

    Attributes:
        position: of the requested record among a sample's, as a fraction in [0, 1).
    """

    def __init__(
        self, description: Description, folder: Path, rows: list[dict[str, str]], rng: random.Random,
        accept: Callable[[str], bool],
    ) -> None:  # fmt: skip
        """Seed the record; values are drawn until ``accept`` is true of each record's answer."""
        self.description, self.accept = description, accept
        self.position = rng.random()
        self.drawn: list[dict[str, int | str]] = []
        # A generator each, so that values do not depend on how many are drawn at once.
        self.streams = {name: unique(name, field.values(random.Random(rng.getrandbits(64)), folder), field.unique)
                        for name, field in description.fields.items()}  # fmt: skip
        self.rows = iter(random.Random(rng.getrandbits(64)).sample(rows, len(rows)))
        self.table_length = len(rows)
        if description.filler:
            self.places = sorted(rng.random() for _ in range(description.records or 0))
            self.filler = description.filler.values(random.Random(rng.getrandbits(64)), folder)
            self.filler_lines: list[str] = []
        # Only these are drawn again for an answer of the split, or all if all are unique.
        self.again = [name for name in description.fields
                      if name in names_in(description.answer) and not description.fields[name].unique]  # fmt: skip

    def draw(self) -> dict[str, int | str]:
        """Draw a record.

        Raises:
            ValueError: the table has no more rows, or a field no more unique values.
        """
        row: dict[str, int | str] = {}
        if self.table_length:
            row |= next(self.rows, {})
            if not row:
                raise ValueError(f"table: {self.description.table} has too few rows for samples of this length, as a "
                                 "split gets about a half of its rows: ask for fewer tokens, or add rows")  # fmt: skip
        return row | {name: next(stream) for name, stream in self.streams.items()}

    def first(self, count: int) -> list[dict[str, int | str]]:
        """Return the first ``count`` records.

        Raises:
            ValueError: see ``draw``; or no answer belongs to the split.
        """
        while len(self.drawn) < count:
            record = self.draw()
            for _ in range(MAX_DRAWS):
                if self.accept(self.description.answer.format(**record)):
                    break
                record = record | {name: next(self.streams[name]) for name in self.again} if self.again else self.draw()
            else:
                raise ValueError(f"answer: no more answers of the split in {MAX_DRAWS} draws: let fields have more "
                                 "values")  # fmt: skip
            self.drawn.append(record)
        return self.drawn[:count]

    def text(self, size: int) -> tuple[str, list[dict[str, int | str]]]:
        """Return the text between header and footer, and its records.

        Args:
            size: number of records, or of filler lines around a fixed number of records.
        """
        template, filler = self.description.record, self.description.filler
        if filler is None:
            records = self.first(size)
            return "".join(template.format(**record) for record in records), records
        records = self.first(self.description.records or 1)
        while len(self.filler_lines) < size:
            self.filler_lines.append(next(self.filler) + "\n")
        lines = self.filler_lines[:size]
        for number, (place, record) in enumerate(zip(self.places, records, strict=True)):
            lines.insert(int(place * (size + 1)) + number, template.format(**record))
        return "".join(lines), records

    def sample(self, size: int) -> dict[str, Any]:
        """Return a sample of so many records or filler lines."""
        text, records = self.text(size)
        return render(self.description, text, records, int(self.position * len(records)))


def unique(name: str, values: Values, only: bool) -> Values:
    """Yield values, without repetition if ``only``.

    Raises:
        ValueError: no more values seem to be there.
    """
    seen: set[int | str] = set()
    repeats = 0
    for value in values:
        if only and value in seen:
            repeats += 1
            if repeats > MAX_DRAWS:
                raise ValueError(f"fields.{name}: has no more than {len(seen)} unique values, too few for samples of "
                                 "this length: ask for fewer tokens, or allow more values")  # fmt: skip
            continue
        repeats = 0
        if only:
            seen.add(value)
        yield value


def read_table(file: Path) -> list[dict[str, str]]:
    """Read the rows of a table: JSON lines, or a header and rows with commas, semicolons or tabs between columns.

    Raises:
        ValueError: the file is missing, is not UTF-8, has no rows, or a row of another number of columns.
    """
    check_file(file)
    if file.suffix == ".jsonl":
        rows = [{key: str(value) for key, value in row.items()} for _, row in read_rows(file)]
    else:
        try:
            text = file.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError(f"table: {file} is not UTF-8 text: export it as CSV in UTF-8") from None
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=text.partition("\n")[0].count))
        rows = []
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"{file}, line {reader.line_num}: expected {len(reader.fieldnames or ())} columns "
                                 "as in the first line")  # fmt: skip
            rows.append(row)
    if not rows:
        raise ValueError(f"table: {file} has no rows")
    for number, row in enumerate(rows, 1):
        if row.keys() != rows[0].keys():
            raise ValueError(f"table: row {number} of {file} has {', '.join(row)}, the first {', '.join(rows[0])}")
    return rows


def render(description: Description, text: str, records: list[dict[str, int | str]], line: int) -> dict[str, Any]:
    """Return a sample: the text between header and footer, and a question for one of its records.

    Returns:
        ``prompt``, ``answer`` and ``references``, the record's values, ``line`` and ``lines``, the number of records.
    """
    asked = records[line]
    return {
        "prompt": description.header + text + description.footer + description.question.format(**asked),
        "answer": description.answer.format(**asked),
        "references": [reference.format(**asked) for reference in description.references],
        **{name: value for name, value in asked.items() if name not in RESERVED},
        "line": line,
        "lines": len(records),
    }


def check_answers(description: Description, records: Records, metric: Callable[[str, list[str]], float]) -> None:
    """Raise ValueError unless answers are right by the metric, and differ enough to split training and test samples."""
    answers = set()
    with contextlib.suppress(ValueError):  # there may be fewer
        records.first(CHECKED)
    for record in records.drawn:
        answer = description.answer.format(**record)
        references = [reference.format(**record) for reference in description.references]
        if not metric(answer, references) > 0:
            raise ValueError(f"metric: by {description.metric}, the task's own answer {answer!r} scores 0 for the "
                             f"references {references}: choose another metric, or correct the templates")  # fmt: skip
        if description.metric == "last_integer" and not all(reference.isdecimal() for reference in references):
            raise ValueError(f"metric: last_integer compares digits alone, but a reference is {references[0]!r}: "
                             "choose contains")  # fmt: skip
        answers.add(answer)
    if len(answers) < FEWEST_ANSWERS:
        raise ValueError(f"answer: there are only {len(answers)} different ones, expected {FEWEST_ANSWERS} or more, as "
                         "training and test samples share none: name a unique field in it, as in 'The temp of {sensor} "
                         "is {temp}.', or let fields have more values")  # fmt: skip


def check_questions(description: Description, rows: list[dict[str, str]]) -> None:
    """Raise ValueError if two rows of a table have the same question."""
    names = names_in(description.question)
    if description.records == 1 or any(name in description.fields for name in names):
        return
    numbers: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        question = description.question.format(**row)
        if (first := numbers.setdefault(question, number)) != number:
            raise ValueError(f"question: rows {first} and {number} of {description.table} could both answer "
                             f"{question!r}: name a column that tells them apart, or remove one")  # fmt: skip


def read_description(path: Path) -> Description:
    """Read a description, whose name is that of its file if it has no other.

    Raises:
        ValueError: it is invalid.
    """
    return Description(**{"name": re.sub(r"\W+", "_", path.stem), **load_yaml(path, "task")})


def load_description(path: str | Path) -> Task:
    """Read and check a description, and return its task.

    Raises:
        ValueError: it is missing or invalid; the message names file and setting.
    """
    path = Path(path)
    check_file(path)
    try:
        return check_description(path.absolute(), path.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{path}: {first_error(error, TYPES)}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix(f'{path.absolute()}: ')}") from None


@functools.lru_cache
def check_description(path: Path, content: bytes) -> Task:
    """Check the description in a file, once for each ``content``; its other files are relative to its folder.

    Raises:
        ValueError: it is invalid.
    """
    from data_gen.tasks import TASKS

    description = read_description(path)
    if description.name in TASKS and path.parent != Path(__file__).parent / "tasks":
        raise ValueError(f"name: {description.name!r} is a built-in task's: choose another")
    rows = read_table(path.parent / description.table) if description.table else []
    description.check_names(list(rows[0]) if rows else [])
    check_questions(description, rows)
    metric = resolve_metric(description.metric)
    records = lambda: Records(description, path.parent, rows, random.Random(0), lambda answer: True)  # noqa: E731
    check_answers(description, records(), metric)
    smallest = records().sample(1)
    shortest = len(smallest["prompt"] + smallest["answer"]) // 2
    return task_of(description, path.parent, rows, metric, shortest)


def built_in(path: Path, shortest: int) -> Task:
    """Return the task of a description of this package, whose check is left to its tests: no word list is read."""
    description = read_description(path)
    return task_of(description, path.parent, [], resolve_metric(description.metric), shortest)


def task_of(
    description: Description, folder: Path, rows: list[dict[str, str]], metric: Callable[[str, list[str]], float],
    shortest: int,
) -> Task:  # fmt: skip
    """Return the task of a description; for ``shortest`` see ``Task``."""
    from data_gen.tasks.task import Task

    def sample(request: Request, rng: random.Random, index: int, budget: LengthBudget) -> dict[str, Any]:
        records = Records(description, folder, rows, rng, budget.accept)
        return records.sample(request.lines) if request.lines else budget.fill(records.sample, title.lower())

    def digest(without: set[str]) -> dict[str, str]:
        texts = [part.folder for part in (*description.fields.values(), description.filler)
                 if isinstance(part, Text | Filler) and part.folder]  # fmt: skip
        settings = description.model_dump(mode="json", exclude=without)
        content = json.dumps([settings, rows, [folder_sentences(folder / text) for text in texts]])
        return {"description_sha256": hashlib.sha256(content.encode()).hexdigest()}

    title = description.title or description.name
    return Task(
        name=description.name, title=title, description=title[0].lower() + title[1:], source=description.source,
        sample=sample, shortest=shortest, metric=metric,
        max_new_tokens=description.max_new_tokens, stop=tuple(description.stop), options=("lines",),
        sources=lambda request: digest({"title", "source", "metric", "max_new_tokens", "stop"}),  # not in the data
        identity=digest(set()),
    )  # fmt: skip

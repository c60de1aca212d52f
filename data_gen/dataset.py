"""TaskSampler samples of a task, sizes them in the model's own tokens, and writes them with a manifest."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import random
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from data_gen import line_retrieval, longbench, niah, ruler
from data_gen.console import first_line
from data_gen.fit_length import LengthBudget
from data_gen.io import write_text, written_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "test"]
Messages = list[dict[str, str]]
# task -> function that draws one sample: prompt, the whole assistant's turn as answer, and key facts
TASKS: dict[str, Callable[[Request, random.Random, int, LengthBudget], dict[str, Any]]] = {
    "line": line_retrieval.sample,
    "niah": niah.sample,
    "vt": ruler.vt,
    "cwe": ruler.cwe,
    "fwe": ruler.fwe,
    "longbench": longbench.sample,
}
# Options that only some tasks know.
OPTIONS = {"lines": ["line"], "haystack": ["niah"], "needles": ["niah"], "depths": ["niah"], "data": ["longbench"]}


@dataclass(frozen=True)
class Request:
    """What is asked for; equal requests give equal bytes.

    Attributes:
        task: a name in ``TASKS``.
        tokens: longest sample, as ``"31000"``, or a range ``"8000:31000"`` that lengths are drawn from.
        lines: number of lines instead, for the line task.
        samples: how many.
        seed: of everything random.
        split: samples of ``train`` and ``test`` can never coincide, see ``in_split``.
        haystack: for niah, a folder of text files, ``essays`` (from the hub) or ``prose`` (built in, the default).
        needles: for niah, a file of training needles; by default the paper's ten.
        depths: for niah, how many depths from 0 to 100 per cent test samples walk through; by default ten.
        data: for longbench, a local file instead of the hub's.

    Raises:
        ValueError: a field has no meaning.
    """

    task: str
    tokens: str | int | None = None
    lines: int | None = None
    samples: int = 50
    seed: int = 0
    split: Split = "train"
    haystack: str | None = None
    needles: str | None = None
    depths: int | None = None
    data: str | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        if self.task not in TASKS:
            raise ValueError(f"task: found {self.task!r}, expected one of {', '.join(TASKS)}")
        if self.split not in get_args(Split):
            raise ValueError(f"split: found {self.split!r}, expected train or test")
        if self.samples < 1:
            raise ValueError(f"samples: found {self.samples}, expected at least 1")
        for option, tasks in OPTIONS.items():
            if getattr(self, option) is not None and self.task not in tasks:
                raise ValueError(f"{option}: {self.task} has no such option, only {' and '.join(tasks)}")
        if self.task == "longbench" and self.split == "test":
            raise ValueError(
                "split: longbench samples are for training; score with `python -m eval run --task longbench`"
            )
        if self.depths is not None and (self.depths < 2 or self.split == "train"):
            raise ValueError(f"depths: found {self.depths}, expected at least 2, and only for test samples")
        if (self.tokens is None) == (self.lines is None):
            raise ValueError("give the length either as tokens or as lines")
        if self.lines is not None and self.lines < 1:
            raise ValueError(f"lines: found {self.lines}, expected at least 1")
        if self.tokens is not None:
            object.__setattr__(self, "tokens", str(self.tokens))
            self.token_range()

    def token_range(self) -> tuple[int, int]:
        """Shortest and longest length to draw, in tokens."""
        found = re.fullmatch(r"(\d+)(?::(\d+))?", str(self.tokens))
        low, high = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 0 < low <= high:
            raise ValueError(f"tokens: found {self.tokens!r}, expected N or N:M with 0 < N <= M, such as 8000:31000")
        return low, high


def in_split(split: Split, answer: str) -> bool:
    """Whether an answer belongs to a split: one bit of its SHA-256 decides.

    So no answer, and therefore no sample, of one split can ever be drawn in the other, whatever seed and length.
    """
    return (hashlib.sha256(answer.encode()).digest()[0] & 1) == (split == "test")


def as_messages(prompt: str, answer: str) -> Messages:
    """A sample as the chat that is trained on."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def load_tokenizer(name: str, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Args:
        name: a folder or a hub id.
        chat_template: a jinja file, or the template itself, for tokenizers that come without one.

    Raises:
        ValueError: it cannot be loaded, or has no chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer: cannot load {name!r} as a folder or hub id ({first_line(error)})") from error
    if chat_template is not None:
        tokenizer.chat_template = read_template(chat_template)
    check_template(tokenizer, name)
    return tokenizer


def read_template(template: str) -> str:
    """A chat template from its file, or as it is written.

    Raises:
        ValueError: the name of a file that is not there.
    """
    if "{" in template:
        return template
    try:
        return Path(template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"chat-template: cannot read {template} ({first_line(error)})") from error


def check_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """See that a tokenizer can write a chat.

    Raises:
        ValueError: it has no chat template, or one that is none.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ValueError(
            f"tokenizer: {name!r} has no chat template: name one with --chat-template, in a recipe as "
            "`chat_template: jinja` with `chat_template_jinja`"
        )
    try:
        tokenizer.apply_chat_template(as_messages("a", "b"), tokenize=False)
    except TemplateError as error:
        raise ValueError(f"chat-template: that of {name!r} writes no chat ({first_line(error)}): mend it") from None


def count_tokens(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> int:
    """Length of a chat in tokens, chat template included."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return len(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))
    # The same tokens without their places in the text, which take a third of the time.
    backend.no_truncation()
    backend.no_padding()
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return len(backend.encode_batch_fast([text], add_special_tokens=False)[0])


def generate(request: Request, tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Any]]:
    """Draw the samples of a request, one after the other.

    A sample depends on the task, split, seed, length and its own index alone: asking for fewer samples or other
    lengths changes none. A random length is part of the index's draw.

    Yields:
        ``messages`` (user, assistant), then ``task``, ``split``, ``seed``, ``index``, ``tokens`` (length of the whole
        chat with its template), and the task's key facts, ``answer`` among them.

    Raises:
        ValueError: the task does not fit into the length.
    """
    for index in range(request.samples):
        length = request.tokens if request.tokens is not None else f"{request.lines} lines"
        rng = random.Random(f"{request.task}/{request.split}/{request.seed}/{length}/{index}")
        count = functools.lru_cache(maxsize=64)(
            lambda prompt, answer: count_tokens(tokenizer, as_messages(prompt, answer))
        )
        room = LengthBudget(
            tokens=rng.randint(*request.token_range()) if request.tokens is not None else 0,
            count=count,
            accept=lambda answer: in_split(request.split, answer),
            encode=lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
            decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        )
        drawn = TASKS[request.task](request, rng, index, room)
        prompt = drawn.pop("prompt")
        yield {
            "messages": as_messages(prompt, drawn["answer"]),
            "task": request.task,
            "split": request.split,
            "seed": request.seed,
            "index": index,
            "tokens": count(prompt, drawn["answer"]),
            **drawn,
        }


def manifest_path(out: Path) -> Path:
    """Where the manifest of a data file lies: beside it."""
    return out.with_name(out.name + ".manifest.json")


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over what decides a chat's tokens: vocabulary, rules and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256((rules + str(tokenizer.chat_template)).encode()).hexdigest()


DRAWN: dict[tuple[Request, str], list[dict[str, Any]]] = {}


def draw(request: Request, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """``generate``, but drawn only once in a process, for several models that are asked the same."""
    key = (request, tokenizer_hash(tokenizer))
    if key not in DRAWN:
        DRAWN[key] = list(generate(request, tokenizer))
    return DRAWN[key]


def describe(request: Request, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """All that the bytes of a data file depend on."""
    return {
        **{key: value for key, value in asdict(request).items() if value is not None},
        **(niah.sources(request) if request.task == "niah" else {}),
        **(longbench.sources(request) if request.task == "longbench" else {}),
        "tokenizer": tokenizer_hash(tokenizer),
        "wonderwords": version("wonderwords"),
    }


def command_of(request: Request, tokenizer: str, chat_template: str | None, out: Path) -> str:
    """The command that writes a data file."""
    options = {"tokenizer": tokenizer, "chat-template": chat_template, **asdict(request), "out": out}
    named = [[f"--{key}", str(value)] for key, value in options.items() if key != "task" and value is not None]
    return shlex.join(["python", "-m", "data_gen", request.task, *itertools.chain(*named)])


def write(
    request: Request, tokenizer: PreTrainedTokenizerBase, out: Path, *, chat_template: str | None = None,
    progress: Callable[[int], object] = lambda n: n,
) -> bool:  # fmt: skip
    """Write a request's samples to ``out`` as JSON lines, and their manifest last: its presence means complete.

    Args:
        request: what to draw.
        tokenizer: measures the samples.
        out: the file; nothing is left of it if anything goes wrong.
        chat_template: what the tokenizer's template was read from, for the command that the manifest keeps.
        progress: called with the number of samples done.

    Returns:
        False if the file was there already, complete and equal to what would be written.

    Raises:
        ValueError: ``out`` holds other data than is asked for; the message names the difference.
    """
    wanted = describe(request, tokenizer)
    if manifest_path(out).exists():
        check(out, wanted)
        return False
    digest = hashlib.sha256()
    with written_whole(out) as partial:
        with partial.open("wb") as file:
            for done, sample in enumerate(generate(request, tokenizer), 1):
                row = (json.dumps(sample, ensure_ascii=False) + "\n").encode()
                digest.update(row)
                file.write(row)
                progress(done)
        # A file without its manifest is either a run that was cut off just here, or not ours.
        if out.exists() and out.read_bytes() != partial.read_bytes():
            raise ValueError(f"{out}: holds other data and has no {manifest_path(out).name}: move it away")
    manifest = {
        "command": command_of(request, tokenizer.name_or_path, chat_template, out),
        **wanted,
        "sha256": digest.hexdigest(),
    }
    write_text(manifest_path(out), json.dumps(manifest, indent=2) + "\n")
    return True


def remark(rows: Iterable[dict[str, Any]]) -> str:
    """What a user should know of samples: " (...)", or nothing."""
    if again := max((row.get("haystack_repeats", 0) for row in rows), default=0):
        return f" (the haystack is shorter than the samples: it begins again up to {again} times)"
    return ""


def check(out: Path, wanted: dict[str, Any]) -> None:
    """Compare a data file with what is wanted of it.

    Raises:
        ValueError: the file is missing, was changed, or was made otherwise; the message names the difference.
    """
    path = manifest_path(out)
    try:
        found = json.loads(path.read_text())
        digest = found.pop("sha256")
        found.pop("command", None)  # which names files by other paths where it was given elsewhere
        content = out.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{out}: missing although {path.name} is there: delete the manifest") from error
    except (json.JSONDecodeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not a manifest ({first_line(error)}): delete it and {out.name}") from error
    for key in sorted(wanted.keys() | found.keys()):
        if wanted.get(key) != found.get(key):
            raise ValueError(
                f"{out}: was made with {key} {found.get(key)!r}, but {wanted.get(key)!r} is asked for: "
                "delete the file and its manifest, or name another file"
            )
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(f"{out}: was changed after it was made (its hash is not the manifest's): delete both")

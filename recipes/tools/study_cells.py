"""Cells of the study: the model that each tunes and scores, and its samples.

A cell is one task and method with one learning rate and seed. It is deterministic: on the same type of device it gives
the same result again.
"""

from __future__ import annotations

import gc
import gzip
import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock

from axolotl_plugins.common.io import load_json, read_rows, write_text, written_whole
from axolotl_plugins.common.tokenizer import Messages, count_tokens, load_tokenizer
from data_gen.dataset import Request, generate

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Purpose = Literal["validation", "test"]

# Lengths of training samples (paper sections 4.1 and 5, appendix B.3) and test samples in tokens; in order of priority.
TRAIN_TOKENS = {"line": "512:7680", "vt": "1024:7680", "niah": "7680", "fwe": "1024:7680", "cwe": "2560:7680"}
TEST_LENGTHS = {
    "line": (512, 1024, 2048, 4096, 7680),
    "vt": (1024, 2048, 4096, 7680),
    "niah": (1024, 2048, 4096, 7680),
    "fwe": (1024, 2048, 4096, 7680),
    "cwe": (2560, 4096, 7680),
}
TASKS = tuple(TEST_LENGTHS)
FACTOR = "attention_factor"  # RoPE's: a method that tunes nothing
# Candidate learning rates; the paper's are 1e-2 and 2e-2 for SEAL on lines, and 2e-4 for LoRA and DoRA (section 9).
# Those of FACTOR are factors of RoPE's cosines and sines, so that attention logits change by their square.
RATES = {
    "SEAL-H": (1e-2, 2e-2, 5e-2, 1e-1),
    "SEAL-C": (1e-2, 2e-2, 5e-2, 1e-1),
    "LoRA": (2e-4, 1e-3, 3e-3),
    "query": (1e-2, 2e-2, 5e-2, 1e-1),  # scales per channel in the placements of the name
    "query+output": (1e-2, 2e-2, 5e-2),
    "value": (1e-2, 2e-2, 5e-2, 1e-1),
    "mlp": (1e-2, 2e-2, 5e-2, 1e-1),
    "query-H": (1e-2, 2e-2, 5e-2, 1e-1),  # a factor of each head's attention logits
    "IA3": (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2),  # as PEFT ships it: keys, values and the input of down_proj
    "LayerNorm": (2e-4, 5e-4, 1e-3, 5e-3, 2e-2),  # the gains of all norms
    "VeRA": (3e-3, 1e-2, 3e-2),
    FACTOR: (0.9, 1.0, 1.05, 1.1, 1.2, 1.3),
}
RATE_OF = {"DoRA": "LoRA"}  # a method that uses the rate chosen for another
UNTUNED = ("base", "one-shot", FACTOR)
SHOWN = ("SEAL-H one-shot", "SEAL-C one-shot")  # adapters of plain prompts, asked with a worked example
CONTROLS = ("SEAL-H shuffled", "SEAL-C shuffled", "SEAL-H wrong answers", "SEAL-C wrong answers")
PLACEMENTS: dict[str, dict[str, Any]] = {  # settings of ``SealConfig``
    "query": {"placements": ["query"]}, "query+output": {"placements": ["attention_output", "query"]},
    "value": {"placements": ["value"]}, "mlp": {"placements": ["mlp"]},
    "query-H": {"placements": ["query"], "granularity": "head"},
}  # fmt: skip
BASELINES = ("IA3", "LayerNorm", "VeRA")
WEIGHTED = tuple(f"{method} at {weight}" for method in ("SEAL-H", "SEAL-C") for weight in (0.25, 0.5, 0.75))
MIXTURES = ("mixture", "full mixture")  # of all tasks: as many samples in all as of one task, or as many of each
TRANSFERS = tuple(f"{method} from {source}" for method in ("SEAL-H", "SEAL-C") for source in (*TASKS, *MIXTURES))
SIZES = (5, 10, 25, 100)  # of training samples, beside the usual number
SIZED = tuple(f"{method} with {size} samples" for method in ("SEAL-H", "SEAL-C", "LoRA") for size in SIZES)
CAPS = (256, 512, 1024, 2048, 4096)  # of the length of training samples, in tokens
CAPPED = tuple(f"{method} up to {cap} tokens" for method in ("SEAL-H", "SEAL-C", "LoRA") for cap in CAPS)
METHODS = (
    *UNTUNED, "SEAL-H", "SEAL-C", "LoRA", "DoRA", *SHOWN, *WEIGHTED, *SIZED, *CAPPED, *CONTROLS, *PLACEMENTS,
    *BASELINES, *TRANSFERS,
)  # fmt: skip
VALIDATION_LENGTHS = 3  # the longest ones of a task
VALIDATION_SEED = 9000  # of training-split samples that no cell is tuned on
ANSWER_ROOM = 128  # tokens of the window reserved for answers; the longest has 120
BATCH_TOKENS = 1 << 18  # of prompts decoded together on a GPU: 6 GiB of KV cache for SmolLM2-135M in bfloat16


@dataclass(frozen=True)
class Settings:
    """Settings of all cells of a study; equal settings and cells give equal samples.

    Attributes:
        model: SHA-256 of the model's weights.
        window: of the model, in tokens.
        dtype: of its weights.
        samples: test samples per length.
        validation_samples: per length.
        tune_samples: training samples of every cell.
        shot_tokens: longest worked example, in tokens.
        haystack: of needles, see ``data_gen.dataset.Request``.
        train: task -> length or range of training samples, in tokens.
        lengths: task -> lengths of test samples, in tokens.
        model_config: keys of the model's config to override, such as for NTK or Self-Extend.
        name: the model's folder, for the record; equal weights in another folder are the same model.
    """

    model: str
    window: int
    dtype: str
    samples: int
    validation_samples: int
    tune_samples: int
    shot_tokens: int
    haystack: str
    train: dict[str, str]
    lengths: dict[str, list[int]]
    model_config: dict[str, Any] | None = None
    name: str = ""


@dataclass(frozen=True)
class Cell:
    """One model that is scored on one task.

    Attributes:
        task: a key of ``TEST_LENGTHS``; what is scored, and tuned on unless the method names another source.
        method: one of ``METHODS``.
        purpose: ``validation`` chooses a learning rate, ``test`` is reported.
        seed: of training samples, their order, new weights and controls.
        rate: learning rate, or the factor of ``FACTOR``; None if nothing is tuned, or until validation has chosen it.
    """

    task: str
    method: str
    purpose: Purpose
    seed: int = 0
    rate: float | None = None

    @property
    def tuned_as(self) -> str | None:
        """The tuning method, without the control's change; None if nothing is tuned."""
        return None if self.method in UNTUNED else self.method.split(" ")[0]

    @property
    def shows_example(self) -> bool:
        """Whether prompts start with a worked example."""
        return self.method.endswith("one-shot")

    @property
    def sources(self) -> tuple[str, ...]:
        """The tasks that the cell is tuned on."""
        source = self.method.partition(" from ")[2] or self.task
        return TASKS if source in MIXTURES else (source,)

    def samples_per_source(self, usual: int) -> int:
        """Return how many training samples of each source the cell is tuned on; ``usual`` is a study's number."""
        if self.method in SIZED:
            return int(self.method.split(" ")[2])
        return usual // len(self.sources) if self.method.endswith(f"from {MIXTURES[0]}") else usual

    def train_tokens(self, usual: str) -> str:
        """Return the length or range of the cell's training samples in tokens; ``usual`` is a study's of the task."""
        return at_most(int(self.method.split(" ")[3]), usual) if self.method in CAPPED else usual

    @property
    def rated_as(self) -> str | None:
        """The method whose validation chooses the learning rate; None if there is none to choose."""
        if self.method == FACTOR:
            return FACTOR
        return None if self.tuned_as is None else RATE_OF.get(self.tuned_as, self.tuned_as)

    @property
    def tuned_cell(self) -> Cell:
        """The cell with the same adapter: of another task, or before its scales are shuffled or weighted."""
        if self.method.endswith("wrong answers") or self.method in (*SIZED, *CAPPED):
            return self
        source = self.method.partition(" from ")[2] or self.task
        return replace(self, task=source, method=self.tuned_as or self.method)

    @property
    def file_name(self) -> str:
        """File name of the result in the folder of cells."""
        rate = "" if self.rate is None else f"_{self.rate:g}"
        return f"{self.task}_{self.method}_{self.purpose}_{self.seed}{rate}.json".replace(" ", "-")

    def file(self, study: Path) -> Path:
        """Return the file of the result in the folder of a study."""
        return study / "cells" / self.file_name

    def __str__(self) -> str:
        """Return the cell's name for progress lines."""
        rate = "" if self.rate is None else f" rate {self.rate:g}"
        return f"{self.task} {self.method} {self.purpose} seed {self.seed}{rate}"


def at_most(limit: int, tokens: str) -> str:
    """Cap a length or range of lengths such as ``512:2048``."""
    low, high = (min(bound, limit) for bound in bounds(tokens))
    return str(high) if low == high else f"{low}:{high}"


def bounds(tokens: str) -> tuple[int, int]:
    """Return the least and the greatest of a length or range of lengths; raise ValueError if it is invalid."""
    return Request("line", tokens).token_range()


def capped(longest: int | None, tasks: dict[str, str] | None = None) -> tuple[dict[str, str], dict[str, list[int]]]:
    """Return training ranges, with those of ``tasks`` in the place of the usual, and test lengths, capped at tokens.

    Raises:
        ValueError: a range is invalid.
    """
    limit = longest or max(map(max, TEST_LENGTHS.values()))
    lengths = {task: sorted({min(n, limit) for n in values}) for task, values in TEST_LENGTHS.items()}
    train = {}
    for task, text in {**TRAIN_TOKENS, **(tasks or {})}.items():
        try:
            train[task] = at_most(limit, text)
        except ValueError as error:
            raise ValueError(f"train-{error}") from None
    return train, lengths


def shortens(method: str, usual: str) -> bool:
    """Return whether a method's cap lies within a range of training lengths; True for methods without a cap."""
    low, high = bounds(usual)
    return method not in CAPPED or low <= int(method.split(" ")[3]) < high


def validation_cells(task: str, method: str) -> list[Cell]:
    """Return the cells that choose the rate of a method, one in ``RATES``, for a task."""
    return [Cell(task, method, "validation", 0, rate) for rate in RATES[method]]


def plan(tasks: list[str], methods: list[str], seeds: list[int], train: dict[str, str] = TRAIN_TOKENS) -> list[Cell]:
    """Return all cells in order of priority, those of validation before the tests that use their rates.

    Args:
        tasks: some of ``TASKS``.
        methods: some of ``METHODS``; a cap on training lengths applies to the tasks whose range it shortens.
        seeds: of training samples; learning rates are chosen under seed 0.
        train: task -> length or range of training samples, in tokens.
    """
    first, others = seeds[:1], seeds[1:]
    seal = ("SEAL-H", "SEAL-C")
    placements = tuple(method for method in PLACEMENTS if method != "query")
    stages: list[tuple[tuple[str, ...], list[int]]] = [
        (("base",), first), (seal, first), (("LoRA",), first), (("query",), first),
        (("one-shot", "DoRA", *SHOWN), first), (tuple(f"SEAL-C from {mixture}" for mixture in MIXTURES), first),
        *(((*seal, "LoRA", "query"), [seed]) for seed in others), (TRANSFERS, first), (WEIGHTED, first),
        (SIZED, first), (CAPPED, first), (placements, first), (CONTROLS, first), ((*BASELINES, FACTOR), first),
        (("DoRA", *SHOWN, *WEIGHTED, *SIZED, *CAPPED, *placements, *BASELINES, *CONTROLS, *TRANSFERS), others),
    ]  # fmt: skip
    cells: list[Cell] = []
    for stage, of_seeds in stages:
        tested = [
            Cell(task, method, "test") for task in TASKS if task in tasks for method in stage
            if method in methods and not method.endswith(f" from {task}") and shortens(method, train[task])
        ]  # fmt: skip
        for cell in tested:
            for source in cell.sources if cell.rated_as else ():
                cells += validation_cells(source, str(cell.rated_as))
        cells += [replace(cell, seed=seed) for cell in tested for seed in of_seeds]
    return list(dict.fromkeys(cells))


def mean_score(result: dict[str, Any]) -> float:
    """Return a cell's mean score over lengths; -1 if tuning failed."""
    scores = [row["score"] for row in result["scores"]]
    return sum(scores) / len(scores) if scores else -1.0


def choose_rate(results: list[dict[str, Any]]) -> float:
    """Return the learning rate with the best mean validation score, the smallest of equals."""
    return max(results, key=lambda result: (mean_score(result), -result["rate"]))["rate"]


# --- samples ---------------------------------------------------------------------------------------------------------


def request(settings: Settings, task: str, tokens: str | int, samples: int, seed: int, split: str) -> Request:
    """Return the request for samples of a task."""
    haystack = settings.haystack if task == "niah" else None
    return Request(task, tokens, samples=samples, seed=seed, split=split, haystack=haystack)  # type: ignore[arg-type]


def training_requests(settings: Settings, cell: Cell) -> list[Request]:
    """Return the requests for a cell's training samples, of which it may use the first ones, by source."""
    samples = max(settings.tune_samples, cell.samples_per_source(settings.tune_samples))
    return [
        request(settings, task, cell.train_tokens(settings.train[task]), samples, cell.seed, "train")
        for task in cell.sources
    ]


def example_request(settings: Settings, task: str) -> Request:
    """Return the request for the worked example of a one-shot prompt."""
    return request(settings, task, settings.shot_tokens, 1, 0, "train")


def scored_requests(settings: Settings, cell: Cell) -> dict[int, Request]:
    """Return by length the requests for the samples that a cell is scored on.

    A one-shot prompt that would exceed the window gets a shorter sample, so that it has the stated length including
    its example (paper section 8).
    """
    lengths = settings.lengths[cell.task]
    if cell.purpose == "validation":
        return {
            length: request(settings, cell.task, length, settings.validation_samples, VALIDATION_SEED, "train")
            for length in lengths[-VALIDATION_LENGTHS:]
        }
    example = settings.shot_tokens if cell.shows_example else 0
    return {
        length: request(
            settings, cell.task, length - example * (length + example + ANSWER_ROOM > settings.window),
            settings.samples, 0, "test",
        )
        for length in lengths
    }  # fmt: skip


def data_requests(settings: Settings, cells: list[Cell]) -> list[Request]:
    """Return every request of the cells once, in their order."""
    requests: list[Request] = []
    for cell in cells:
        if cell.tuned_as:
            requests += training_requests(settings, cell)
        if cell.shows_example:
            requests.append(example_request(settings, cell.task))
        requests += scored_requests(settings, cell).values()
    return list(dict.fromkeys(requests))


def data_file(folder: Path, request: Request) -> Path:
    """Return the file of a request's samples, named after everything that they depend on except the tokenizer."""
    haystack = f"_{Path(request.haystack).name}" if request.haystack else ""
    tokens = str(request.tokens).replace(":", "-")
    return folder / f"{request.task}_{request.split}_{tokens}_{request.samples}_{request.seed}{haystack}.jsonl.gz"


def write_samples(wanted: Request, model: Path, out: Path) -> None:
    """Draw the samples of a request, sized in a model's tokens, into a compressed file; equal requests, equal bytes."""
    rows = generate(wanted, load_tokenizer(str(model)))
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with written_whole(out) as partial:
        partial.write_bytes(gzip.compress(text.encode(), mtime=0))


def read_samples(wanted: Request, tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[dict[str, Any]]:
    """Read the samples of a request.

    Raises:
        ValueError: the file is corrupt, or holds samples of another request or tokenizer.
    """
    file = data_file(folder, wanted)
    try:
        rows = [json.loads(line) for line in gzip.decompress(file.read_bytes()).decode().splitlines()]
        matches = len(rows) == wanted.samples and all(
            (row["task"], row["split"], row["seed"]) == (wanted.task, wanted.split, wanted.seed) for row in rows
        )
        matches = matches and count_tokens(tokenizer, rows[0]["messages"]) == rows[0]["tokens"]
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: corrupt ({error}): delete it, it is drawn again") from None
    if not matches:
        raise ValueError(f"{file}: holds samples of another request or tokenizer: delete it, it is drawn again")
    return rows


# --- running a cell --------------------------------------------------------------------------------------------------


def adapter_config(method: str) -> Any:
    """Return the PEFT configuration of a tuned method."""
    from peft import IA3Config, LNTuningConfig, VeraConfig

    from axolotl_plugins.seal import SealConfig
    from recipes.tools.methods import KEYS, PROJECTIONS, peft_config

    if method in PLACEMENTS:
        return SealConfig(**PLACEMENTS[method])
    if method == "IA3":
        return IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    if method == "LayerNorm":
        return LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm", "norm"])
    if method == "VeRA":
        return VeraConfig(r=64, target_modules=list(PROJECTIONS))
    return peft_config(KEYS[method])


@contextmanager
def scaled_attention(model: torch.nn.Module, factor: float) -> Iterator[None]:
    """Scale a model's attention logits by the square of a factor, as ``attention_factor`` of RoPE does to all channels.

    Raises:
        ValueError: the model has no attention layers of the usual names.
    """
    layers: list[Any] = [
        module for module in model.modules() if hasattr(module, "q_proj") and hasattr(module, "scaling")
    ]
    if not layers:
        raise ValueError(
            "attention_factor: the model has no attention with `q_proj` and `scaling`: leave the method out"
        )
    scalings = [layer.scaling for layer in layers]
    for layer, scaling in zip(layers, scalings, strict=True):
        layer.scaling = scaling * factor**2
    try:
        yield
    finally:
        for layer, scaling in zip(layers, scalings, strict=True):
            layer.scaling = scaling


class Workbench:
    """A model that is loaded once and tuned repeatedly, each time from the same weights.

    Attributes:
        model: the base model, without an adapter between cells.
        tokenizer: of the model.
        settings: of the study.
        data: folder of samples.
    """

    def __init__(self, model: Path, device: str, settings: Settings, data: Path) -> None:
        """Load the model."""
        from axolotl_plugins.seal.model_loading import load

        self.settings, self.data = settings, data
        loaded = load(model, dtype=settings.dtype, model_config=settings.model_config, on_cpu=True)
        self.tokenizer = loaded.tokenizer
        self.model: PreTrainedModel = loaded.model.to(device).requires_grad_(False)
        self.names = set(self.model.state_dict())
        watched = [name for name in self.model.state_dict() if name.endswith(("q_proj.weight", "o_proj.weight"))]
        self.watched = {name: self.model.state_dict()[name].clone() for name in watched}

    def run(self, cell: Cell) -> dict[str, Any]:
        """Tune and score one cell, then restore the model.

        Returns:
            The cell's fields with ``scores`` (``length``, ``tokens``, ``count``, ``score``), ``responses`` (of test
            cells), ``losses``, ``parameters`` (trainable), ``trained_tokens``, ``seconds`` (``tuning``, ``scoring``),
            ``general`` (see ``eval.general_ability``; of tuned test cells) and the machine.
        """
        import torch

        result: dict[str, Any] = {**asdict(cell), "scores": [], **self.machine()}
        if not cell.tuned_as:
            with scaled_attention(self.model, cell.rate) if cell.rate else nullcontext():
                return result | self.score(self.model, cell)
        from peft import get_peft_model

        from eval.controls import shuffle_heads, weight_scales
        from eval.general_ability import TEXTS, general_ability

        torch.manual_seed(cell.seed)  # initialises low-rank weights
        peft_model = get_peft_model(self.model, adapter_config(cell.tuned_as))
        try:
            result |= self.tune_once(peft_model, cell) if cell.purpose == "test" else self.tune(peft_model, cell)
            if "failed" not in result:
                if cell.method.endswith("shuffled"):
                    shuffle_heads(peft_model, random.Random(cell.seed))
                if cell.method in WEIGHTED:
                    weight_scales(peft_model, float(cell.method.split(" at ")[1]))
                result |= self.score(peft_model.base_model.model, cell)
                if cell.purpose == "test" and cell.method not in (*CONTROLS, *SHOWN) and cell.task in cell.sources:
                    rows = [row for _, row in read_rows(TEXTS)]
                    parts = ([row[key] for row in rows if key in row] for key in ("text", "messages"))
                    result["general"] = general_ability(peft_model, self.tokenizer, *parts)
        finally:
            self.model = peft_model.unload()
            del peft_model
            self.check_unchanged()
        return result

    def machine(self) -> dict[str, Any]:
        """Return the device, dtype and library versions that results depend on."""
        import peft
        import torch
        import transformers

        device = self.model.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        versions = {library.__name__: library.__version__ for library in (torch, transformers, peft)}
        return {"device": name, "dtype": self.settings.dtype, "versions": versions}

    def tune_once(self, model: PeftModel, cell: Cell) -> dict[str, Any]:
        """Load the adapter of a test cell if another cell has tuned it; else tune it and store it.

        Of several processes one tunes an adapter, the others wait for it.

        Raises:
            ValueError: the stored adapter is of another method or model.
        """
        from peft import load_peft_weights, set_peft_model_state_dict

        from axolotl_plugins.seal.model_loading import check_tensors

        folder = adapter_folder(self.data.parent, cell.tuned_cell)
        record, locks = folder / "tuning.json", self.data.parent / "locks"
        locks.mkdir(exist_ok=True)
        with FileLock(locks / f"{folder.name}.adapter"):
            if record.exists():
                check_tensors(folder, model)
                set_peft_model_state_dict(model, load_peft_weights(str(folder), device=str(model.device)))
                return load_json(record)
            result = self.tune(model, cell)
            if "failed" not in result:
                model.save_pretrained(folder)
                write_text(record, json.dumps(result) + "\n")  # written last: the folder is complete
            return result

    def tune(self, model: PeftModel, cell: Cell) -> dict[str, Any]:
        """Tune the adapter of a cell; a non-finite loss fails the cell, not the study."""
        from axolotl_plugins.seal.tune import tune
        from eval.controls import wrong_answers

        assert cell.rate is not None
        samples = cell.samples_per_source(self.settings.tune_samples)
        rows = [
            row
            for request in training_requests(self.settings, cell)
            for row in read_samples(request, self.tokenizer, self.data)[:samples]
        ]
        chats: list[Messages] = [row["messages"] for row in rows]
        if cell.method.endswith("wrong answers"):
            chats = wrong_answers(chats, random.Random(cell.seed))
        start = time.perf_counter()
        result: dict[str, Any] = {
            "parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
            "trained_tokens": sum(row["tokens"] for row in rows),
        }
        try:
            losses = tune(model, chats, self.tokenizer, lr=cell.rate, seed=cell.seed)
        except FloatingPointError as error:
            return result | {"failed": str(error)}
        model.zero_grad(set_to_none=True)
        free_memory()
        seconds = time.perf_counter() - start
        return result | {"losses": [round(loss, 4) for loss in losses], "tuning_seconds": round(seconds, 1)}

    def score(self, model: torch.nn.Module, cell: Cell) -> dict[str, Any]:
        """Score the model of a cell over all lengths."""
        from eval.score_samples import score_samples

        model.eval()
        shown = ""
        if cell.shows_example:
            example = read_samples(example_request(self.settings, cell.task), self.tokenizer, self.data)[0]
            shown = "\n".join(message["content"] for message in example["messages"]) + "\n\n"
        start = time.perf_counter()
        scores, responses = [], []
        for length, wanted in scored_requests(self.settings, cell).items():
            samples = [{**row, "length": length} for row in read_samples(wanted, self.tokenizer, self.data)]
            batch = max(1, BATCH_TOKENS // length) if self.model.device.type == "cuda" else 8
            rows = score_samples(model, self.tokenizer, cell.task, samples, batch_size=batch, shown=shown)
            mean = {key: sum(row[key] for row in rows) / len(rows) for key in ("tokens", "score")}
            scores.append(
                {"length": length, "tokens": round(mean["tokens"], 1), "count": len(rows), "score": mean["score"]}
            )
            responses += [{key: row[key] for key in ("length", "index", "score", "response")} for row in rows]
            free_memory()
        result = {"scores": scores, "scoring_seconds": round(time.perf_counter() - start, 1)}
        return result | ({"responses": responses} if cell.purpose == "test" else {})

    def check_unchanged(self) -> None:
        """Check that no adapter is left and that attention weights are unchanged, bit for bit."""
        import torch

        if hasattr(self.model, "peft_config"):
            del self.model.peft_config  # else PEFT treats the model as still wrapped
        free_memory()
        state = self.model.state_dict()
        assert set(state) == self.names, "an adapter was left in the model"
        changed = [name for name, tensor in self.watched.items() if not torch.equal(state[name], tensor)]
        assert not changed, f"tuning changed the base model: {changed[0]}"


def free_memory() -> None:
    """Release unused GPU memory for the other workers."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- files of a study ------------------------------------------------------------------------------------------------


def read_cell(folder: Path, cell: Cell) -> dict[str, Any] | None:
    """Read a cell's result; None if it is not done."""
    return load_json(cell.file(folder)) if cell.file(folder).exists() else None


def adapter_folder(folder: Path, cell: Cell) -> Path:
    """Return the folder of a cell's adapter."""
    return folder / "adapters" / Path(cell.file_name).stem


def write_cell(folder: Path, cell: Cell, result: dict[str, Any]) -> None:
    """Write a cell's result."""
    write_text(cell.file(folder), json.dumps(result, ensure_ascii=False) + "\n")


def store_settings(folder: Path, settings: Settings) -> None:
    """Write the settings of a study; raise ValueError, with the first difference, if other settings are stored."""
    file, requested = folder / "settings.json", asdict(settings)
    if not file.exists():
        write_text(file, json.dumps(requested, indent=1) + "\n")
        return
    stored = load_json(file)
    for key in sorted((requested.keys() | stored.keys()) - {"name"}):
        if requested.get(key) != stored.get(key):
            raise ValueError(
                f"{folder}: was started with {key} {stored.get(key)!r}, found {requested.get(key)!r}: name "
                "another folder by --out, or use the same options"
            )

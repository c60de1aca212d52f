"""Prepare the files of a recipe's ``datasets`` before a model is loaded: generate missing ones, check all."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axolotl_plugins.common.io import check_file, check_output, read_rows, remove
from axolotl_plugins.common.schema import nearest
from axolotl_plugins.common.tokenizer import load_tokenizer
from data_gen.dataset import Request, manifest_path, remark, write

from .args import SealBlock
from .training_rows import chat_lengths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Files are generated in folders of this name alone, so that a mistyped path elsewhere is an error.
GENERATED = "data"
RECENT = 5.0  # seconds
FILES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".gz", ".zst")


def chat_template(cfg: dict[str, Any], dataset: dict[str, Any]) -> str | None:
    """Return the chat template that Axolotl renders a dataset with, as text or file; None for the tokenizer's own.

    Raises:
        ValueError: Axolotl has no such template.
    """
    settings = dataset if dataset.get("chat_template") else cfg
    name = str(settings.get("chat_template") or "tokenizer_default")
    if name.startswith("tokenizer_default"):
        return None
    if name == "jinja":
        return settings.get("chat_template_jinja")
    from axolotl.utils.chat_templates import get_chat_template

    return get_chat_template(name)


def recipe_tokenizer(cfg: dict[str, Any], dataset: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a recipe, with the chat template of one of its datasets.

    Raises:
        ValueError: it cannot be loaded, or has no chat template.
    """
    from axolotl.utils.chat_templates import get_chat_template

    fallback = str(cfg.get("chat_template")).partition("tokenizer_default_fallback_")[2]
    return load_tokenizer(
        cfg.get("tokenizer_config") or cfg.get("base_model") or "", chat_template(cfg, dataset),
        cfg.get("chat_template_kwargs"), fallback=get_chat_template(fallback) if fallback else None,
        trust_remote_code=cfg.get("trust_remote_code") is True,
    )  # fmt: skip


def prepare_template(cfg: dict[str, Any]) -> None:
    """Give Axolotl the chat template of a recipe's tokenizer to take as it is, template arguments included.

    So the adapter's folder gets the template that its samples were rendered with, and scoring needs no arguments.

    Raises:
        ValueError: see ``axolotl_plugins.common.tokenizer.set_template``.
    """
    tokenizer = recipe_tokenizer(cfg, {})
    if chat_template(cfg, {}) is None or cfg.get("chat_template_kwargs"):
        cfg["chat_template"], cfg["chat_template_jinja"] = "jinja", tokenizer.chat_template


def check_generated_path(out: Path) -> None:
    """Raise ValueError unless a missing file is one to generate, not a mistyped one.

    The message names the nearest file that was not generated.
    """
    if out.absolute().parent.name != GENERATED:
        try:
            check_file(out)
        except ValueError as error:
            raise ValueError(
                f"{error} (to generate it from `seal: data`, set the path {GENERATED}/{out.name}; to train on a "
                "file of your own, remove `seal: data`)"
            ) from None
    own = {file.stem: file for file in out.parent.glob(f"*{out.suffix}") if not manifest_path(file).exists()}
    if close := nearest(out.stem, own):
        raise ValueError(
            f"{out}: no such file; is {own[close]} meant, which was not generated? Then correct the path and remove "
            "`seal: data`; to generate, name another file"
        )


def generate_files(cfg: dict[str, Any], block: SealBlock, template: str | None) -> None:
    """Generate the dataset files of a recipe after ``prepare_template``, or check that existing files match the recipe.

    The manifest's command has ``template``, the recipe's own ``chat_template_jinja``.

    Raises:
        ValueError: a file does not match the recipe, or the recipe's data cannot be generated.
    """
    if block.data is None:
        return
    datasets = cfg.get("datasets") or []
    paths = [Path(dataset["path"]) for dataset in datasets if dataset.get("path")]
    if len(datasets) != len(block.data) or len(set(paths)) != len(block.data):
        raise ValueError(
            f"seal.data: describes {len(block.data)} file{'s' if len(block.data) > 1 else ''}, so `datasets` must have "
            f"as many entries, each with its own `path`; found {len(datasets)}"
        )
    from filelock import FileLock

    tokenizer = recipe_tokenizer(cfg, datasets[0])
    for data, out in zip(block.data, paths, strict=True):
        check_output(out)
        request = Request(**data.model_dump(), split="train")
        if request.tokens and (longest := request.token_range()[1]) > cfg["sequence_len"]:
            raise ValueError(
                f"seal.data.tokens: found {request.tokens!r}, expected at most {cfg['sequence_len']} (sequence_len): "
                f"raise sequence_len to {longest}, or lower tokens"
            )
        if not (out.exists() or manifest_path(out).exists()):
            check_generated_path(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        # Every process of a distributed run gets here; the first one writes the file.
        with FileLock(out.with_name(f".{out.name}.lock")):
            written = write(request, tokenizer, out, chat_template=template,
                            template_arguments=cfg.get("chat_template_kwargs"))  # fmt: skip
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            status = "generated" if written else "already exist"
            note = remark(row for _, row in read_rows(out))
            print(f"seal: {out}: {data.samples} samples of {data.task} {status}{note}")


def remove_incomplete(prepared: Path) -> None:
    """Remove prepared datasets that an interrupted run left incomplete: Axolotl takes them for complete and fails.

    One that changed in the last seconds may be another run's in progress: wait until it is complete or stays as it is.
    """
    if int(os.environ.get("LOCAL_RANK", "0")) != 0:
        return  # the first process of a run checks before it writes
    for folder in prepared.glob("[0-9a-f]" * 32):
        while folder.is_dir() and not any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
            if abs(time.time() - folder.stat().st_mtime) > RECENT:
                remove(folder)
            else:
                time.sleep(0.1)


def file_lengths(cfg: dict[str, Any]) -> Iterator[tuple[Path, dict[int, int]]]:
    """Yield each local JSON lines file of chats of a recipe with the length in tokens of every line.

    Raises:
        ValueError: a local file is missing, or a row cannot be trained on; the message names file and line.
    """
    for dataset in [*(cfg.get("datasets") or []), *(cfg.get("test_datasets") or [])]:
        file = Path(str(dataset.get("path")))
        if file.suffix in FILES and not file.is_dir():
            check_file(file)
        if file.suffix == ".jsonl" and file.is_file() and dataset.get("type") == "chat_template":
            yield file, chat_lengths(file, dataset, recipe_tokenizer(cfg, dataset))


def check_files(cfg: dict[str, Any]) -> None:
    """Raise ValueError if a chat is longer than ``sequence_len``, or see ``file_lengths``."""
    for file, lengths in file_lengths(cfg):
        for number, length in lengths.items():
            if length > cfg["sequence_len"]:
                raise ValueError(
                    f"{file}, line {number}: has {length} tokens, but sequence_len is {cfg['sequence_len']}: set "
                    f"`sequence_len: {max(lengths.values())}` (the longest sample), or shorten it"
                )

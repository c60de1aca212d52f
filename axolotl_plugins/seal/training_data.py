"""Prepare the files of a recipe's ``datasets`` before a model is loaded: generate missing ones, check all."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

from axolotl_plugins.common.io import check_file, check_output, read_rows
from axolotl_plugins.common.tokenizer import load_tokenizer, read_template
from data_gen.dataset import Request, manifest_path, remark, write

from .args import SealBlock
from .chats import chat_lengths

# Files are generated in folders of this name alone, so that a mistyped path elsewhere is an error.
GENERATED = "data"
FILES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".gz", ".zst")


def chat_template(cfg: dict[str, Any], dataset: dict[str, Any]) -> str | None:
    """Return the chat template that Axolotl renders a dataset with, as text or file; None for the tokenizer's own.

    Raises:
        ValueError: Axolotl has no such template.
    """
    from axolotl.utils.chat_templates import get_chat_template
    from axolotl.utils.chat_templates.base import extract_chat_template_args

    name, jinja = extract_chat_template_args(cfg, dataset)
    if str(name).startswith("tokenizer_default"):
        return None
    return jinja if name == "jinja" else get_chat_template(str(name))


def check_generated_path(out: Path) -> None:
    """Raise unless a missing file is one to generate, not a mistyped one.

    Raises:
        ValueError: see above; the message names the nearest file that was not generated.
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
    if close := difflib.get_close_matches(out.stem, own, n=1):
        raise ValueError(
            f"{out}: no such file; is {own[close[0]]} meant, which was not generated? Then correct the path and remove "
            "`seal: data`; to generate, name another file"
        )


def generate_files(cfg: dict[str, Any], block: SealBlock) -> None:
    """Generate the recipe's dataset files, or check that existing files match the recipe.

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

    template = chat_template(cfg, datasets[0])
    tokenizer = load_tokenizer(cfg.get("tokenizer_config") or cfg.get("base_model") or "", template)
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
            written = write(request, tokenizer, out, chat_template=cfg.get("chat_template_jinja"))
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            status = "generated" if written else "already exist"
            note = remark(row for _, row in read_rows(out))
            print(f"seal: {out}: {data.samples} samples of {data.task} {status}{note}")


def check_files(cfg: dict[str, Any]) -> None:
    """Raise if a local file of the recipe's datasets is missing, or a chat in it cannot be trained on.

    Raises:
        ValueError: see above; the message names file and line, and for a chat longer than ``sequence_len`` the value
            that fits all.
    """
    for dataset in [*(cfg.get("datasets") or []), *(cfg.get("test_datasets") or [])]:
        file = Path(str(dataset.get("path")))
        if file.suffix in FILES and not file.is_dir():
            check_file(file)
        if file.suffix != ".jsonl" or not file.is_file() or dataset.get("type") != "chat_template":
            continue
        template = chat_template(cfg, dataset)
        tokenizer = load_tokenizer(cfg.get("tokenizer_config") or cfg.get("base_model") or "",
                                   read_template(template) if template else None)  # fmt: skip
        lengths = chat_lengths(file, dataset, tokenizer)
        limit = cfg["sequence_len"]
        for number, length in lengths.items():
            if length > limit:
                raise ValueError(
                    f"{file}, line {number}: has {length} tokens, but sequence_len is {limit}: set "
                    f"`sequence_len: {max(lengths.values())}` (the longest sample), or shorten it"
                )

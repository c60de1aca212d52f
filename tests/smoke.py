"""Launch recipes for two steps on random-weight miniatures of their models (``make recipes-smoke``).

A miniature has its model's architecture, number of heads, ratio of query to key heads and RoPE, with two layers and
narrow heads. All other settings of a recipe are unchanged, except those that need a GPU or the hub.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import yaml

from axolotl_plugins.common.console import quiet_libraries, stop
from axolotl_plugins.common.io import remove, write_text
from data_gen.tasks import TASKS
from recipes.tools.render import FOLDER, matrix_recipes, read_matrix

ROOT = FOLDER.parent
TOKENIZER = ROOT / "tests" / "fixtures" / "tiny"
HEAD = 8  # channels
LAYERS = 2
WINDOW = 16384
SAMPLES = 2
# Tokens of short samples of each task; lines are longer than Self-Extend's neighbour window.
TOKENS = {name: task.shortest for name, task in TASKS.items()} | {"line": 1200}
# RoPE of the published models, from their config.json; the others have transformers' default.
ROPE: dict[str, dict[str, Any]] = {
    "longchat7b": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
    "longchat13b": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
    "vicuna7b": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "vicuna13b": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "smollm2": {"rope_type": "default", "rope_theta": 100000.0},
    "mistral7b": {"rope_type": "default", "rope_theta": 1000000.0},
    "llama31_8b": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                   "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
}  # fmt: skip


def model_of(name: str) -> str:
    """Return the key of ``models`` in ``matrix.yml`` that a recipe's name begins with.

    Raises:
        ValueError: there is none.
    """
    models = [model for model in read_matrix()["models"] if name.startswith(f"{model}_")]
    if not models:
        raise ValueError(f"{name}: not a recipe of matrix.yml")
    return max(models, key=len)


def build_miniature(model: str, folder: Path) -> None:
    """Save a random-weight miniature of a model of the matrix, with the tokenizer of the tests' model."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

    matrix = read_matrix()
    shape = dict(matrix["shapes"][matrix["models"][model]["shape"]])
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    width = HEAD * shape["num_attention_heads"]
    shape |= {
        "vocab_size": len(tokenizer), "hidden_size": width, "num_hidden_layers": LAYERS,
        "intermediate_size": width * shape["intermediate_size"] // shape["hidden_size"],
        "max_position_embeddings": WINDOW, "pad_token_id": tokenizer.pad_token_id, "eos_token_id":
        tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id, "initializer_range": 0.1,
    }  # fmt: skip
    if model in ROPE:
        shape["rope_parameters"] = ROPE[model]
    if shape["model_type"] == "mistral":
        shape["sliding_window"] = None  # as in Mistral-7B-Instruct-v0.2
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG_MAPPING[shape.pop("model_type")](**shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_passages(file: Path) -> None:
    """Write a file in LongBench's format, for machines without its data."""
    rows = [
        {"input": f"Question: What is number {n}?\nAnswer:", "context": f"Passage {n}: number {n} is {n * n}. " * 60,
         "answers": [str(n * n)], "length": 400}
        for n in range(SAMPLES)
    ]  # fmt: skip
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))


def shrink(recipe: dict[str, Any], miniature: Path, work: Path) -> dict[str, Any]:
    """Shrink a recipe's model, samples and steps, and remove settings that need a GPU or the hub.

    Args:
        recipe: content of its file.
        miniature: folder of the model to train instead.
        work: folder for all files of the run.
    """
    small = json.loads(json.dumps(recipe))
    name = Path(recipe["output_dir"]).name
    small |= {
        "base_model": str(miniature), "sequence_len": WINDOW, "max_steps": SAMPLES, "bf16": False,
        "output_dir": str(work / name), "dataset_prepared_path": str(work / "prepared"),
    }  # fmt: skip
    for key in ("bfloat16", "fsdp_version", "fsdp_config", "deepspeed", "tf32"):  # need GPUs
        small.pop(key, None)
    small["seal"].pop("context_parallel", None)
    for key in ("liger_rms_norm", "liger_rope", "liger_glu_activation"):
        small.pop(key, None)
    small["plugins"] = [plugin for plugin in small["plugins"] if "liger" not in plugin]
    if "model_config" in small:
        small["model_config"]["max_position_embeddings"] = WINDOW
    data, datasets = small["seal"]["data"], small["datasets"]
    for part, dataset in zip(data if isinstance(data, list) else [data], datasets, strict=True):
        part |= {"tokens": TOKENS[part["task"]], "samples": SAMPLES}
        if part["task"] == "niah":
            part["haystack"] = "prose"
        if part["task"] == "longbench":
            part["data"] = str(work / "passages.jsonl")
        dataset["path"] = str(work / "data" / Path(dataset["path"]).name)
    return small


def prepare(names: list[str], work: Path) -> dict[str, Path]:
    """Write miniatures and shrunk recipes, and return the file of each recipe.

    Raises:
        ValueError: a name is not in the matrix.
    """
    build_passages(work / "passages.jsonl")
    files = {}
    for name in names:
        model = model_of(name)
        miniature = work / "models" / model
        if not (miniature / "tokenizer_config.json").exists():
            build_miniature(model, miniature)
        recipe = yaml.safe_load((ROOT / "recipes" / f"{name}.yml").read_text())
        files[name] = work / "recipes" / f"{name}.yml"
        write_text(files[name], yaml.safe_dump(shrink(recipe, miniature, work), sort_keys=False))
    return files


def trained(adapter: Path) -> int:
    """Count the trained parameters of an adapter.

    Args:
        adapter: folder that a run wrote.

    Raises:
        ValueError: a tensor is non-finite or unchanged.
    """
    import torch
    from safetensors.torch import load_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        initial = {"seal_scale": 1, "lora_B": 0}  # LoRA's A and DoRA's magnitudes are initialised with other values
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{adapter}: {name} is not finite")
        if any(part in name and not (tensor != value).any() for part, value in initial.items()):
            raise ValueError(f"{adapter}: {name} was not trained")
    return sum(tensor.numel() for tensor in tensors.values())


def train(recipe: Path, adapter: Path) -> float:
    """Launch one recipe unless its adapter exists; return the seconds that the run took.

    The output goes to ``ADAPTER.log``, the seconds to ``ADAPTER.seconds``, which marks the run as complete.

    Raises:
        RuntimeError: the run failed; the message ends with the last lines of its output.
    """
    complete, log = (adapter.with_name(f"{adapter.name}.{kind}") for kind in ("seconds", "log"))
    if complete.exists():
        return float(complete.read_text())
    remove(adapter)
    command = [sys.executable, "-m", "accelerate.commands.launch", "-m", "axolotl.cli.train", str(recipe)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    start = time.monotonic()
    with log.open("w") as file:
        status = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
    if status or not (adapter / "adapter_model.safetensors").exists():
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"{adapter.name}: failed with exit status {status}; the last lines of {log}:\n{tail}")
    seconds = time.monotonic() - start
    write_text(complete, f"{seconds:.1f}\n")
    return seconds


def train_all(recipes: dict[str, Path], work: Path, jobs: int) -> dict[str, float]:
    """Launch recipes, ``jobs`` at a time, with a progress bar, and return the seconds of each.

    Raises:
        RuntimeError: a run failed; runs that had not started are cancelled.
    """
    from tqdm import tqdm

    with ThreadPoolExecutor(jobs) as pool:
        runs = {pool.submit(train, file, work / name): name for name, file in recipes.items()}
        try:
            return {runs[run]: run.result() for run in tqdm(as_completed(runs), "recipes", len(runs))}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def smoke(names: list[str], jobs: int) -> None:
    """Launch recipes by the command in their headers, and print a table.

    Args:
        names: of recipes in the matrix; empty means all.
        jobs: concurrent runs.

    Raises:
        ValueError: a name is unknown, or a run trained nothing.
        RuntimeError: a run failed.
    """
    from rich.console import Console
    from rich.table import Table

    os.chdir(ROOT)
    texts = {recipe.name: recipe.text for recipe in matrix_recipes()}
    names = names or sorted(texts)
    if unknown := [name for name in names if name not in texts]:
        raise ValueError(f"recipe: found {unknown[0]!r}, expected a name in recipes, such as {min(texts)}")
    # The folder's name changes with the recipes and everything that a run depends on, so that stale runs are repeated.
    digest = hashlib.sha256(repr(sorted(texts.items())).encode())
    digest.update(Path(__file__).read_bytes())
    for folder in ("axolotl_plugins", "data_gen", "recipes", TOKENIZER):
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file() and path.suffix not in (".pyc", ".yml"):
                digest.update(path.read_bytes())
    work = Path("outputs/smoke") / digest.hexdigest()[:12]
    seconds = train_all(prepare(names, work), work, jobs)
    table = Table("recipe", "parameters", "seconds", title=f"{SAMPLES} steps on random-weight miniatures")
    for name in names:
        count = trained(work / name)
        table.add_row(name, str(count), f"{seconds[name]:.0f}")
    Console().print(table)


def main() -> None:
    """Parse the command line and launch the recipes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="recipes; default: all of matrix.yml")
    parser.add_argument("--jobs", type=int, default=2, help="concurrent runs")
    options = parser.parse_args()
    quiet_libraries()
    try:
        smoke(options.names, options.jobs)
    except (ValueError, RuntimeError, OSError) as error:
        stop(error)


if __name__ == "__main__":
    main()

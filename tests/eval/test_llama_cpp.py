"""A merged model answers in llama.cpp, converted by llama.cpp's own program, as this project scores it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paths import ROOT
from transformers import AutoTokenizer

from axolotl_plugins.seal.merge import merge
from axolotl_plugins.seal.model_loading import load
from data_gen.dataset import Request, generate
from eval.generation import generate_answers, stop_ids
from recipes.tools.fetch_smollm2 import mark_byte_level

PACKAGE = "llama-cpp-python==0.3.36"  # its source has llama.cpp's converter and library
ADAPTER = ROOT / "results/adapters/smollm2-135m/line_sealc"
ANSWER_TOKENS = 30
ANSWER = f"""
import json, sys
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=1280, n_threads=1, verbose=False)
options = {{"temperature": 0.0, "repeat_penalty": 1.0, "max_tokens": {ANSWER_TOKENS}}}
for messages in json.load(sys.stdin):
    print(json.dumps(model.create_chat_completion(messages, **options)["choices"][0]["message"]["content"]))
"""


def build(folder: Path) -> None:
    """Download the package's source, and build llama.cpp's library alone, in one job."""
    pip = [sys.executable, "-m", "pip", "--no-input", "-q"]
    package = PACKAGE.split("==")[0]
    download = [*pip, "download", "--no-deps", "--no-binary", package, "--dest", folder, PACKAGE]
    source = folder / "source"
    left_out = [f"-DLLAMA_BUILD_{part}=OFF" for part in ("COMMON", "EXAMPLES", "SERVER", "TESTS", "TOOLS")]
    configure = ["cmake", "-S", source / "vendor/llama.cpp", "-B", folder / "build", "-DCMAKE_BUILD_TYPE=Release"]
    subprocess.run(download, check=True, capture_output=True)
    source.mkdir()
    archive = next(folder.glob("*.tar.gz"))
    subprocess.run(["tar", "-xf", archive, "-C", source, "--strip-components=1"], check=True, capture_output=True)
    dependency = [*pip, "install", "--no-deps", "--target", source, "diskcache"]
    for command in (
        dependency,
        [*configure, "-DLLAMA_CURL=OFF", *left_out],
        ["cmake", "--build", folder / "build", "--target", "llama", "--parallel", "1"],
    ):
        subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(scope="module")
def llama_cpp() -> Path:
    """The folder that ``LLAMA_CPP`` names, or outputs/llama_cpp, built if missing (15 minutes)."""
    folder = Path(os.environ.get("LLAMA_CPP") or ROOT / "outputs/llama_cpp")
    if not any(folder.glob("build/bin/libllama.*")):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            build(folder)
        except (OSError, subprocess.CalledProcessError) as error:
            shutil.rmtree(folder)
            pytest.skip(f"llama.cpp cannot be built here: {error}")
    return folder


def scored_answers(name: Path, chats: list) -> list[str]:
    """Answers as `seal eval` decodes them."""
    loaded = load(name, dtype=torch.float32)
    prompts = [loaded.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
               for chat in chats]  # fmt: skip
    ends = stop_ids(loaded.model, loaded.tokenizer)
    answers = generate_answers(loaded.model, prompts, max_new_tokens=ANSWER_TOKENS, stop=ends)
    return [loaded.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]


@pytest.mark.slow
def test_a_merged_model_answers_in_llama_cpp_as_it_is_scored(llama_cpp, smollm2, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # the adapter names its base relative to it
    merge(ADAPTER, tmp_path / "merged", report=lambda _: None)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    mark_byte_level(tokenizer)  # as `seal recipe fetch` does since this test
    tokenizer.save_pretrained(tmp_path / "merged")
    converter = llama_cpp / "source/vendor/llama.cpp/convert_hf_to_gguf.py"
    options = ["--outtype", "f32", "--outfile", tmp_path / "merged.gguf"]
    subprocess.run([sys.executable, converter, tmp_path / "merged", *options], check=True, capture_output=True)
    rows = generate(Request("line", "1000", samples=3, split="test"), load(ADAPTER).tokenizer)
    chats = [row["messages"][:-1] for row in rows]
    libraries = {"LLAMA_CPP_LIB_PATH": str(llama_cpp / "build/bin"), "PYTHONPATH": str(llama_cpp / "source")}
    done = subprocess.run(
        [sys.executable, "-c", ANSWER, tmp_path / "merged.gguf"],
        input=json.dumps(chats), env={**os.environ, **libraries}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    tuned, base = scored_answers(ADAPTER, chats), scored_answers(smollm2, chats)
    assert answers == tuned != base

"""README and docs: their targets, paths, tests, figures and error messages exist."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from paths import ROOT, TINY

from data_gen.described_task import TYPES, Description

README = (ROOT / "README.md").read_text()
DOCS = {file.name: file.read_text() for file in (ROOT / "docs").glob("*.md") if file.name != "log.md"}  # a history


def test_make_targets_of_the_readme_exist():
    listed = subprocess.run(["make", "help-all"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = set(re.findall(r"^  make (\S+)", listed, re.MULTILINE))
    assert {"setup", "test", "train", "data", "eval", "merge", "lint", "help"} <= targets
    assert set(re.findall(r"`?make ([a-z-]+)", README)) <= targets


def test_paths_of_the_readme_exist():
    tree = README[README.index("## Layout") :].split("```")[1]
    folder = ROOT
    for line in tree.strip().splitlines():
        names = re.findall(r"[\w.]+/(?:[\w.]+/)*|[\w]+\.py", line.split("   ")[0] if line[0] != " " else line.strip())
        if line[0] != " ":
            folder = ROOT / names[0]
            assert folder.is_dir(), folder
        else:
            for name in re.match(r"\s+((?:[\w.]+(?:/|\.py)\s+)+)", line)[1].split():
                assert (folder / name).exists(), folder / name
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        path, _, heading = link.partition("#")
        assert (ROOT / path).exists(), link
        if heading:
            titles = re.findall(r"^#+ (.*)", (ROOT / path).read_text(), re.M)
            assert heading in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], link


@pytest.mark.parametrize("name", DOCS)
def test_links_and_tests_that_a_document_names_exist(name):
    for link in re.findall(r"\]\((?!http|#)([^)#]+)", DOCS[name]):
        assert (ROOT / "docs" / link).exists(), link
    defined = "".join(file.read_text() for file in (ROOT / "tests").rglob("*.py"))
    for test in set(re.findall(r"`(test_\w+)`", DOCS[name])):
        assert f"def {test}(" in defined, test


def messages() -> str:
    """Every string of the product, values of f-strings left out."""
    parts = [(ROOT / "Makefile").read_text()]
    for package in ("axolotl_plugins", "data_gen", "eval", "recipes"):
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts.append(
                        "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                    )
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    parts.append(node.value)
    return "\n".join(parts)


def test_messages_of_the_troubleshooting_page_are_raised():
    product, quoted = messages(), []
    for row in DOCS["troubleshooting.md"].splitlines():
        if row.startswith("| `"):
            cell = row.split(" | ")[0].replace("`axolotl merge-lora`", "\0")
            quoted += [text.replace("\0", "`axolotl merge-lora`") for text in re.findall(r"`([^`]+)`", cell)]
    assert len(quoted) > 40
    for text in quoted:
        for part in text.split("…"):
            assert part.strip() in product, text


def test_bench_figures_of_the_performance_page_are_those_of_the_result():
    rows = json.loads((ROOT / "results" / "bench_gpu.json").read_text())["rows"]
    for row in rows:
        seconds = f"{row['seconds']:.2f}" if row["seconds"] > 10 else f"{row['seconds']:.3f}"
        pattern = (
            rf"`{re.escape(row['setting'])}` \| {seconds} \| \S+ \| {row['share']:.0%} \| {row['peak_gib']:.1f} \|"
        )
        assert re.search(pattern.replace("%", " %"), DOCS["performance.md"]), pattern


def test_the_readmes_figures_are_those_of_the_results():
    study = json.loads((ROOT / "results" / "smollm2.json").read_text())
    rows = [(row.split(" | ")[0].strip("| ").split(",")[0], re.findall(r"\d\.\d\d", row))
            for row in README.splitlines() if re.match(r"\| (base|SEAL|LoRA)", row)]  # fmt: skip
    assert [method for method, _ in rows] == ["base", "SEAL-H", "SEAL-C", "LoRA", "base", "SEAL-H", "SEAL-C"]
    for method, printed in rows[:4]:
        runs = [row["scores"] for row in study["rows"] if (row["task"], row["method"]) == ("line", method)]
        means = [sum(score["score"] for score in scores) / len(runs) for scores in zip(*runs, strict=True)]
        assert printed == [f"{mean:.2f}" for mean in means], method
    demo = json.loads((ROOT / "results" / "demo.json").read_text())["scores"]
    for method, printed in rows[4:]:
        assert printed[:3] == [f"{score['score']:.2f}" for score in demo[method]], method


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    from axolotl_plugins.seal.model_loading import load
    from data_gen.dataset import Request, generate

    loaded = load(TINY)
    samples = generate(Request("line", "300", samples=2), loaded.tokenizer)
    scope = {"model": loaded.model, "tokenizer": loaded.tokenizer, "chats": [row["messages"] for row in samples]}
    monkeypatch.chdir(tmp_path)
    exec(README.split("```python\n")[1].split("```")[0], scope)
    assert load(tmp_path / "outputs/mine").method == "SEAL-H"
    scales = [parameter for parameter in scope["model"].parameters() if parameter.requires_grad]
    assert sum(scale.numel() for scale in scales) == 12 and all((scale != 1).all() for scale in scales)


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom_and_its_model_learns(smollm2, monkeypatch):
    monkeypatch.chdir(ROOT / "docs")  # as Jupyter does
    cells = json.loads((ROOT / "docs/quickstart.ipynb").read_text())["cells"]
    scope: dict[str, object] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), scope)
    assert scope["after"].mean.score > scope["before"].mean.score + 0.3
    assert (scope["out"] / "merged" / "model.safetensors").is_file()


def random_model(model_type: str, folder: Path) -> str:
    """A random-weight model with a tokenizer of its kind: Qwen2's trained on samples, else the small model's."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, Qwen2Tokenizer

    from data_gen.dataset import Request, generate

    small = tokenizer = AutoTokenizer.from_pretrained(TINY)
    if model_type == "qwen2":
        samples = generate(Request("line", "1900", samples=20), small)
        texts = [row["messages"][0]["content"] for row in samples]
        tokenizer = Qwen2Tokenizer(vocab={}, merges=[]).train_new_from_iterator(texts, 2000)
        tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": ["<|user|>", "<|assistant|>"]})
        tokenizer.chat_template = small.chat_template
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, initializer_range=0.1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_own_task_page_shows_the_description_and_every_setting():
    page, fields = DOCS["own-task.md"], set(Description.model_fields)
    shown = page.split("```yaml\n")[1].split("```")[0]
    assert (ROOT / "data_gen/examples/sensors.yml").read_text().split("\n", 1)[1] == shown
    settings, types = (
        part.split("\n\n")[0] for part in page.split("|---|---|\n")[1:2] + page.split("|---|---|---|\n")[1:]
    )
    listed = {name for row in settings.splitlines() for name in re.findall(r"`(\w+)`", row.split(" | ")[0])}
    assert listed == fields
    for row in types.splitlines():
        name, examples, _ = (cell.strip(" |") for cell in row.split(" | "))
        field = yaml.safe_load("{" + ", ".join(re.findall(r"`([^`]+)`", examples)) + "}")
        field.pop("folder", None)
        settings = {"record": "{a}", "question": "", "answer": "{a}", "references": ["{a}"], "name": "x"}
        Description(**settings, fields={"a": {"type": name.strip("`"), **field}})
    assert len(types.splitlines()) == len(TYPES)


def toy(text: str, model: str = str(TINY)) -> str:
    """Commands or code of a page at toy size, with its files relative to the root."""
    for old, new in {"models/smollm2-135m": model, "512:1024": "900:1000", "256:512": "260:300",
                     "256,512,1024": "260,300", "256,512": "260,300", "0.01,0.02,0.05": "0.01", "--validation 10":
                     "--validation 1",
                     "256, 512, 1024": "260, 300", "--samples 20": "--samples 2",
                     "--samples 12": "--samples 2", "samples=20": "samples=2", "--tokens 1024": "--tokens 900",
                     "samples=50": "samples=3", "data_gen/examples": f"{ROOT}/data_gen/examples"}.items():  # fmt: skip
        text = text.replace(old, new)
    return text


def test_the_own_task_pages_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(toy(DOCS["own-task.md"].split("```python\n")[1].split("```")[0]), {})
    assert "outputs/sensors_python_merged {260: " in capsys.readouterr().out
    assert (tmp_path / "outputs/sensors_python_merged/model.safetensors").is_file()


@pytest.mark.slow
def test_the_own_task_pages_commands_work_as_a_new_user_types_them(tmp_path, monkeypatch, capsys):
    """Commands of `seal` share this process, which imports PyTorch once."""
    from axolotl_plugins.common.console import run
    from recipes.cli import app

    blocks = re.findall(r"```bash\n(.*?)```", DOCS["own-task.md"], re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    card = ""
    for line in "".join(blocks).splitlines():
        if line.startswith("seal "):
            run(app, "seal", shlex.split(toy(line))[1:])
            card = capsys.readouterr().out if "seal push" in line else card
        else:
            done = subprocess.run(line, shell=True, capture_output=True, text=True)
            assert done.returncode == 0, line + done.stdout[-2000:] + done.stderr[-3000:]
    made = {file.name for file in (tmp_path / "results/sensors").rglob("*")}
    assert {"sensors_models.png", "sweep.png", "gradient.png", "report.html"} <= made
    assert "| base model |" in card and "### Sensor log" in card
    assert len(list((tmp_path / "results/both").glob("*.json"))) == 4
    assert json.loads((tmp_path / "results/tickets.json").read_text())["scores"]
    assert yaml.safe_load((tmp_path / "recipes/tickets.yml").read_text())["sequence_len"] <= 1000


@pytest.mark.slow
@pytest.mark.parametrize("base", ["tiny", "qwen2", "gpt_neox"])
def test_the_readmes_four_lines_work_as_a_new_user_types_them(base, tmp_path):
    lines = README[README.index("## Your model") :].split("```bash\n")[1].split("```")[0].strip().splitlines()
    assert len(lines) == 4
    model = str(TINY) if base == "tiny" else random_model(base, tmp_path / "model")
    binaries = Path(sys.executable).parent
    swaps = {"Qwen/Qwen2.5-7B-Instruct": model, "8000,16000,31000": "256,300 SAMPLES=2", "31000": "300",
             "make ": f"make -f {ROOT}/Makefile -o .venv/.installed BIN={binaries} "}  # fmt: skip
    environment = {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
                   "OMP_NUM_THREADS": "1", "AXOLOTL_DO_NOT_TRACK": "1"}  # fmt: skip
    (tmp_path / "recipes").mkdir()
    for line in lines:
        for old, new in swaps.items():
            line = line.replace(old, new)
        done = subprocess.run(line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, line + done.stdout[-2000:] + done.stderr[-3000:]
    assert (tmp_path / "outputs/mine_merged/model.safetensors").is_file()
    assert list((tmp_path / "results").glob("line_*.png"))

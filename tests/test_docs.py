"""What the README promises exists."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_make_targets_of_the_readme_exist():
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = set(re.findall(r"^  make (\S+)", listed, re.MULTILINE))
    assert {"setup", "demo", "test", "train", "data", "eval", "merge", "lint", "help"} <= targets
    assert set(re.findall(r"`?make ([a-z-]+)", README)) <= targets


def test_paths_of_the_readme_exist():
    tree = README[README.index("## What is where") :].split("```")[1]
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
        assert (ROOT / link).exists(), link


def test_the_readmes_python_runs():
    from axolotl_plugins.seal.load import load
    from data_gen.generate import Request, generate

    loaded = load(ROOT / "recipes" / "tiny")
    samples = generate(Request("line", "300", samples=2), loaded.tokenizer)
    scope = {"model": loaded.model, "tokenizer": loaded.tokenizer, "chats": [row["messages"] for row in samples]}
    exec(README.split("```python\n")[1].split("```")[0], scope)
    scales = [parameter for parameter in scope["model"].parameters() if parameter.requires_grad]
    assert sum(scale.numel() for scale in scales) == 12 and all((scale != 1).all() for scale in scales)

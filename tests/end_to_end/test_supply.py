"""What comes from outside is data: no code, no shell, no secrets, no end of bytes, and a known set of packages."""

from __future__ import annotations

import ast
import re
from importlib.metadata import requires

import pytest
from packaging.requirements import Requirement
from paths import ROOT

from axolotl_plugins.common.io import load_json

PACKAGES = ("axolotl_plugins", "data_gen", "eval", "recipes")
SOURCES = sorted(file for name in PACKAGES for file in (ROOT / name).rglob("*.py"))
CALLS = [
    (file, node)
    for file in SOURCES
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    if isinstance(node, ast.Call)
]
# What runs code that a file or a string holds.
FORBIDDEN = re.compile(r"(os\.(system|popen)|eval|exec|pickle\.\w+|marshal\.\w+|yaml\.(load|unsafe_load|full_load))$")


def keywords(call: ast.Call) -> dict[str, ast.expr]:
    return {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}


def test_no_shell_and_nothing_that_runs_what_it_reads():
    assert len(CALLS) > 1000
    for file, call in CALLS:
        assert not FORBIDDEN.match(ast.unparse(call.func)), f"{file}:{call.lineno}"
        assert "shell" not in keywords(call), f"{file}:{call.lineno}"
        if ast.unparse(call.func) == "torch.load":
            assert ast.unparse(keywords(call)["weights_only"]) == "True", f"{file}:{call.lineno}"


def test_weights_are_read_from_safetensors_alone():
    found = [(file, call) for file, call in CALLS if ast.unparse(call.func) == "AutoModelForCausalLM.from_pretrained"]
    assert len(found) >= 3
    for file, call in found:
        assert ast.unparse(keywords(call).get("use_safetensors", ast.Constant(None))) == "True", f"{file}:{call.lineno}"


def test_a_checkpoints_own_code_runs_only_when_asked_for():
    from eval.__main__ import run

    for file, call in CALLS:
        value = keywords(call).get("trust_remote_code")
        assert not isinstance(value, ast.Constant) or value.value is False, f"{file}:{call.lineno}"
    assert run.__kwdefaults__ is None and run.__defaults__[-1] is False  # the command's option, its last one


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not JSON"), (b'{"a": "\xe9"}', "not JSON"), ('{"a": ' + "[" * 100_000, "not JSON")],
)
def test_json_that_cannot_be_read_is_named(content, message, tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"a\.json: {message}"):
        load_json(file)


def test_json_has_a_largest_size(tmp_path):
    file = tmp_path / "a.json"
    with file.open("wb") as out:
        out.truncate(300 << 20)  # of which nothing is on the disk
    with pytest.raises(ValueError, match=r"a\.json: has 314572800 bytes, expected at most 268435456"):
        load_json(file)


LOCK = dict(row.split("==") for row in (ROOT / "requirements.lock").read_text().splitlines() if not row.startswith("#"))


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_lock_file_pins_every_dependency_within_its_bounds():
    locked = {plain(name): version for name, version in LOCK.items()}
    assert len(locked) == len(LOCK) > 100
    assert all(re.fullmatch(r"[\w.]+", version) for version in LOCK.values()), "one exact version each, no places"
    wanted = [Requirement(text) for text in requires("seal-recipes") or ()]
    extras = [{"extra": name} for name in ("", "axolotl", "eval", "gguf", "dev")]  # what `make setup` installs
    wanted = [one for one in wanted if one.marker is None or any(map(one.marker.evaluate, extras))]
    assert {"axolotl", "torch", "lm-eval", "gguf", "pytest"} <= {plain(requirement.name) for requirement in wanted}
    for requirement in wanted:
        assert requirement.specifier.contains(locked[plain(requirement.name)], prereleases=True), requirement

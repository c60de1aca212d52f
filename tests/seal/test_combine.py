"""Combined adapters: between the base model and the tuned one, and sums of what several change."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from paths import ROOT, TINY

from axolotl_plugins.seal import provenance
from axolotl_plugins.seal.combine import combine
from axolotl_plugins.seal.model_card import card
from axolotl_plugins.seal.model_loading import load
from axolotl_plugins.seal.scales import saved_tensors
from eval.probe.quadrants import save_scales

ZOO = ROOT / "results/adapters/smollm2-135m"


def test_scales_add_up_and_both_records_are_kept(tmp_path):
    first, second = ZOO / "vt_sealc", ZOO / "line_sealc"
    combine([first, second], [0.5, -0.25], tmp_path / "both")
    before, other, combined = (saved_tensors(folder) for folder in (first, second, tmp_path / "both"))
    assert combined.keys() == before.keys() and len(combined) == 30
    for name, scales in combined.items():
        assert scales.dtype == np.float32
        np.testing.assert_allclose(scales - 1, 0.5 * (before[name] - 1) - 0.25 * (other[name] - 1), atol=1e-6)
    texts = provenance.seen_texts(tmp_path / "both")
    assert texts == provenance.seen_texts(first) | provenance.seen_texts(second) and len(texts) >= 100
    assert not (tmp_path / "both" / "README.md").exists()  # the card is of the first adapter alone
    text = card(tmp_path / "both")
    assert f"- 0.5 of the adapter {first}\n" in text and f"- -0.25 of the adapter {second}\n" in text
    assert "weighted combination" in text and "weighted combination" not in card(first)
    (tmp_path / "unknown").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "unknown" / name).write_bytes((first / name).read_bytes())
    combine([second, tmp_path / "unknown"], [1, 1], tmp_path / "of_unknown")
    assert provenance.seen_texts(tmp_path / "of_unknown") is None
    assert f"- 1 of the adapter {tmp_path}/unknown\n" in card(tmp_path / "of_unknown")


def test_half_an_adapter_is_a_model_between_base_and_tuned(tmp_path):
    save_scales(load(TINY), np.linspace(0.5, 1.5, 12).reshape(3, 4), tmp_path / "adapter")
    ids = torch.arange(3, 40)[None]
    logits = {}
    with torch.no_grad():
        logits["base"] = load(TINY).model(ids).logits
        for weight in (0, 0.5, 1):
            combine([tmp_path / "adapter"], [weight], tmp_path / str(weight))
            logits[weight] = load(tmp_path / str(weight)).model(ids).logits
        tuned = load(tmp_path / "adapter").model(ids).logits
    torch.testing.assert_close(logits[0], logits["base"], rtol=0, atol=0)
    torch.testing.assert_close(logits[1], tuned, rtol=0, atol=0)
    half, whole = ((logits[weight] - logits["base"]).norm() for weight in (0.5, 1))
    assert 0 < half < whole


@pytest.mark.parametrize(
    ("folders", "weights", "message"),
    [
        (["vt_sealc", "vt_sealh"], [1, 1], "vt_sealh: has other layers or another granularity than"),
        (["vt_sealc", "other"], [1, 1], "other: is of elsewhere, the first adapter of"),
        (["vt_sealc"], [1, 1], "weights: found .*expected a number for each of 1 adapters"),
        (["vt_sealc"], [float("nan")], "weights: found"),
        (["vt_sealc"], [1e39], "weights: .*give non-finite scales"),
        (["vt_sealc", "stretched"], [1, 1], "stretched: was tuned with another config.json or chat template than"),
        (["vt_sealc", "corrupt"], [1, 1], "corrupt.*training_data.json: not a record of training data"),
        (["list"], [1], "list: .*no mapping"),
        ([""], [1], "smollm2-135m: not an adapter folder"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(folders, weights, message, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (other / name).write_bytes((ZOO / "vt_sealc" / name).read_bytes())
    changes = {"stretched": ("config.json", '{"max_position_embeddings": 9}'), "corrupt": ("training_data.json", "[]"),
               "list": ("adapter_config.json", "[1]")}  # fmt: skip
    for name, (file, content) in changes.items():
        shutil.copytree(ZOO / "vt_sealc", tmp_path / name)
        (tmp_path / name / file).write_text(content)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "elsewhere"}))
    with pytest.raises(ValueError, match=message):
        made = [tmp_path / name if name and (tmp_path / name).exists() else ZOO / name for name in folders]
        combine(made, weights, tmp_path / "out")
    assert not (tmp_path / "out").exists()

"""The adapters in this repository, scored again."""

from __future__ import annotations

import json

import pytest
from paths import ROOT

ADAPTERS = ROOT / "results" / "adapters" / "smollm2-135m"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tokens"), [("vt_sealc", 1024), ("vt_sealh", 1024), ("line_sealc", 512), ("mixture_sealc", 1024)]
)
def test_a_shared_adapter_has_its_stated_score(smollm2, name, tokens):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from axolotl_plugins.common.tokenizer import load_tokenizer
    from data_gen.dataset import Request, generate
    from eval.score_samples import score_samples

    source, _, key = name.partition("_")
    mixture = source == "mixture"
    task = "vt" if mixture else source
    study = json.loads((ROOT / "results" / ("smollm2_transfer.json" if mixture else "smollm2.json")).read_text())
    tuned_as = {"sealc": "SEAL-C", "sealh": "SEAL-H"}[key] + " from full mixture" * mixture
    stated = {
        method: next(row for row in study["rows"] if (row["task"], row["method"]) == (task, method))["scores"]
        for method in ("base", tuned_as)
    }
    base, tuned = (next(s["score"] for s in scores if s["length"] == tokens) for scores in stated.values())
    tokenizer = load_tokenizer(str(smollm2))
    samples = generate(Request(task, tokens, samples=20, seed=7, split="test"), tokenizer)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(smollm2), ADAPTERS / name).eval()
    rows = score_samples(model.base_model.model, tokenizer, task, [{**row, "length": tokens} for row in samples])
    score = sum(row["score"] for row in rows) / len(rows)
    assert abs(score - tuned) < 0.25 and score > base + 0.15  # other samples: 20 of them are within 0.22 of a score

"""Training-free SEAL: scales set from a map of heads (paper section 3.2, Figure 2c)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from axolotl_plugins.common.io import written_whole
from axolotl_plugins.seal.model_loading import LoadedModel
from eval.probe.head_importance import quadrants
from eval.probe.hooks import blocks, wrapped

# The paper's three settings: heads of the first quadrant down, of the third up, and both.
KINDS = {"Q1 down": (1,), "Q3 up": (3,), "Q1 down, Q3 up": (1, 3)}


def quadrant_scales(found: dict[str, Any], kind: str, down: float, up: float) -> np.ndarray:
    """Scales of shape (layers, heads) for one of ``KINDS``: ``down`` in the first quadrant, ``up`` in the third.

    Raises:
        ValueError: no head of the map lies in the quadrants asked for.
    """
    where = quadrants(found)
    chosen = KINDS[kind]
    if not np.isin(where, chosen).any():
        raise ValueError(f"map: no head lies in quadrant {' or '.join(map(str, chosen))}, so there is nothing to scale")
    return np.select([(where == place) & (place in chosen) for place in (1, 3)], [down, up], 1.0)


def save_scales(loaded: LoadedModel, scales: np.ndarray, out: Path) -> None:
    """Write scales as an ordinary SEAL-H adapter folder, with the tokenizer; the folder must not exist.

    Args:
        loaded: the base model.
        scales: shape (layers, heads).
        out: the folder; it appears whole or not at all.

    Raises:
        ValueError: the folder exists, or the scales do not fit the model.
    """
    if out.exists():
        raise ValueError(f"{out}: exists already: delete it or name another folder with --adapters")
    model = wrapped(loaded.model)
    found = blocks(model)
    if scales.shape != (len(found), found[0].heads):
        raise ValueError(
            f"scales: of shape {scales.shape}, expected {(len(found), found[0].heads)} (layers, heads of the model)"
        )
    with torch.no_grad():
        for block, row in zip(found, scales, strict=True):
            block.projection.seal_scale["default"].copy_(torch.tensor(row))
    with written_whole(out) as partial:
        model.save_pretrained(partial)
        loaded.tokenizer.save_pretrained(partial)

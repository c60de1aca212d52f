"""Scales of an adapter by layer and head, and where they lie in a head importance map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from axolotl_plugins.common.io import load_json
from axolotl_plugins.seal.scales import saved_scales
from eval.probe.head_importance import head_quadrants, read_map


def scale_map(adapter: Path, map_file: Path | None = None) -> dict[str, Any]:
    """Return the mean and standard deviation of each head's scales.

    Args:
        adapter: folder of a SEAL adapter.
        map_file: of the base model, see ``head_importance.read_map``.

    Returns:
        ``mean`` and ``spread``, of shape (layers, heads); with a map also ``by_quadrant``: the number of ``heads``, how
        many were ``lowered``, and their ``mean`` scale.

    Raises:
        ValueError: the folder is not a SEAL adapter, or the map is of another model.
    """
    values = saved_scales(adapter)
    mean = values.mean(-1)
    config = load_json(adapter / "adapter_config.json")
    result: dict[str, Any] = {
        "kind": "scales", "model": str(adapter), "method": f"SEAL-{config['granularity'][0].upper()}",
        "mean": mean.tolist(), "spread": values.std(-1).tolist(),
    }  # fmt: skip
    if map_file is not None:
        quadrants = head_quadrants(read_map(map_file, config["base_model_name_or_path"]))
        if quadrants.shape != mean.shape:
            raise ValueError(
                f"{map_file}: of a model with {quadrants.shape} layers and heads, the adapter has {mean.shape}"
            )
        result["by_quadrant"] = {
            str(number): {
                "heads": int((quadrants == number).sum()),
                "lowered": int((mean[quadrants == number] < 1).sum()),
                "mean": float(np.mean(mean[quadrants == number])),
            }
            for number in (1, 2, 3, 4)
            if (quadrants == number).any()
        }
    return result

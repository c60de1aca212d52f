"""Scales by quadrant of a head importance map: set without training (section 3.2, Figure 2c), or an adapter's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from axolotl_plugins.common.io import written_whole
from axolotl_plugins.seal import SealConfig
from axolotl_plugins.seal.model_loading import LoadedModel, load, method_name
from axolotl_plugins.seal.provenance import base_model
from axolotl_plugins.seal.scales import saved_scales
from data_gen.tasks import Task
from eval.probe.head_importance import changes, head_quadrants, read_map, spearman
from eval.probe.hooks import decoder_blocks, wrap
from eval.resume import fingerprint, journal_file
from eval.score_by_length import score_by_length

# The paper's three settings: heads of the first quadrant down, of the third up, and both.
BOTH = "Q1 down, Q3 up"
KINDS = {"Q1 down": (1,), "Q3 up": (3,), BOTH: (1, 3)}

RANDOM = "random heads"  # all draws of the control together


def runs_by_setting(result: dict[str, Any]) -> dict[str, list[dict[str, float]]]:
    """Return the scores by length of a result's runs, one for each setting but for the draws of ``RANDOM``."""
    runs: dict[str, list[dict[str, float]]] = {}
    for name, scores in result["scores"].items():
        runs.setdefault(RANDOM if name.startswith("random ") else name, []).append(scores)
    return runs


def quadrant_scales(head_map: dict[str, Any], kind: str, down: float, up: float, seed: int | None = None) -> np.ndarray:
    """Return scales of shape (layers, heads) for one of ``KINDS``: ``down`` in quadrant 1, ``up`` in quadrant 3.

    A seed permutes them over all layers and heads, as a control.

    Raises:
        ValueError: no head of the map lies in these quadrants.
    """
    quadrants, scaled = head_quadrants(head_map), KINDS[kind]
    if not np.isin(quadrants, scaled).any():
        raise ValueError(f"map: no head lies in quadrant {' or '.join(map(str, scaled))}, so there is nothing to scale")
    scales = np.select([(quadrants == number) & (number in scaled) for number in (1, 3)], [down, up], 1.0)
    return scales if seed is None else np.random.default_rng(seed).permutation(scales.ravel()).reshape(scales.shape)


def save_scales(loaded: LoadedModel, scales: np.ndarray, out: Path) -> None:
    """Write scales of shape (layers, heads) as an ordinary SEAL-H adapter folder, atomically, with the tokenizer.

    Raises:
        ValueError: the folder exists, the model has an adapter, or the scales do not fit the model.
    """
    if out.exists():
        raise ValueError(f"{out}: exists already: delete it or name another folder with --adapters")
    if isinstance(loaded.model, PeftModel):
        raise ValueError(f"model: {loaded.name} is a {loaded.method} adapter, whose scales would be replaced: name the "
                         "base model, or merge the adapter first")  # fmt: skip
    model = wrap(loaded.model)
    blocks = decoder_blocks(model)
    if scales.shape != (len(blocks), blocks[0].heads):
        raise ValueError(
            f"scales: of shape {scales.shape}, expected {(len(blocks), blocks[0].heads)} (layers, heads of the model)"
        )
    with torch.no_grad():
        for block, row in zip(blocks, scales, strict=True):
            block.projection.seal_scale["default"].copy_(torch.tensor(row))
    with written_whole(out) as partial:
        model.save_pretrained(partial)
        loaded.tokenizer.save_pretrained(partial)


def save_quadrant_adapters(
    model: str, head_map: dict[str, Any], down: float, up: float, random: int, folder: Path, options: dict[str, Any]
) -> dict[str, Path]:
    """Write an adapter for each of ``KINDS`` whose quadrants hold a head, unless it exists; return their folders.

    As controls, ``random`` more have the scales of both quadrants permuted over all layers and heads.
    """
    # Names depend on the model, how it is loaded, the map and both scales.
    digest = fingerprint(model, head_map, down, up, options)[:8]
    adapters: dict[str, Path] = {}
    kinds: dict[str, tuple[str, int | None]] = {kind: (kind, None) for kind in KINDS}
    for name, (kind, seed) in (kinds | {f"random {seed}": (BOTH, seed) for seed in range(random)}).items():
        try:
            scales = quadrant_scales(head_map, kind, down, up, seed)
        except ValueError as error:
            print(f"{name}: {error}")
            continue
        adapters[name] = folder / f"{name.lower().replace(', ', '_').replace(' ', '_')}_{digest}"
        if not adapters[name].exists():
            save_scales(load(model, **options), scales, adapters[name])
    return adapters


def score_quadrants(
    model: str, head_map: dict[str, Any], task: Task, *, down: float, up: float, random: int, adapters: Path,
    out: Path, options: dict[str, Any], **spec: Any,
) -> tuple[dict[str, Any], list[Path]]:  # fmt: skip
    """Score a model with its heads scaled by quadrant.

    Args:
        model: hub id or folder of the base model.
        head_map: see ``head_importance.read_map``.
        task: to score.
        down: scale of heads in quadrant 1.
        up: scale of heads in quadrant 3.
        random: number of controls: the same scales on randomly chosen heads.
        adapters: folder for the adapters.
        out: result file, beside which responses are cached.
        options: of ``load``.
        spec: of ``EvalSpec``.

    Returns:
        The result, and the files that cache its responses.

    Raises:
        ValueError: no head lies in quadrant 1 or 3; or see ``score_by_length``.
    """
    loaded = load(model, **options)
    folders = save_quadrant_adapters(model, head_map, down, up, random, adapters, options)
    if not folders:
        raise ValueError("map: no head helps or hurts at both lengths, so there is nothing to scale")
    scores, journals = {}, []
    models: dict[str, str | Path] = {"base": model, **folders}
    for name, folder in models.items():
        identity = (model, "quadrants", head_map, dict(task.identity), down, up, options, name)
        journals.append(journal_file(out, *identity))
        result = score_by_length(load(folder, **options), task, journal=journals[-1], **spec)
        scores[name] = {str(length): score for length, score in result.by_length().items()}
    return {
        "kind": "quadrants", "model": model, "base_model": loaded.base, "dtype": loaded.dtype, "task": task.name,
        "title": task.title,
        "down": down, "up": up, "samples": max(score.count for score in result.scores), "scores": scores,
        "adapters": {name: str(folder) for name, folder in folders.items()},
    }, journals  # fmt: skip


def scale_map(adapter: Path, map_file: Path | None = None) -> dict[str, Any]:
    """Return the mean and standard deviation of each head's scales in an adapter, and where they lie in a map.

    Returns:
        ``mean`` and ``spread``, of shape (layers, heads); with a map also ``by_quadrant``: the number of ``heads``, how
        many were ``lowered``, and their ``mean`` scale; and ``spearman``, by length the correlation of mean scales with
        the change from ablation.

    Raises:
        ValueError: the folder is not a SEAL adapter, or the map is of another model.
    """
    values = saved_scales(adapter)
    mean = values.mean(-1)
    result: dict[str, Any] = {
        "kind": "scales", "model": str(adapter), "method": method_name(SealConfig.from_pretrained(str(adapter))),
        "mean": mean.tolist(), "spread": values.std(-1).tolist(),
    }  # fmt: skip
    if map_file is not None:
        head_map = read_map(map_file, base_model(adapter))
        quadrants = head_quadrants(head_map)
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
        result["spearman"] = {
            str(length): spearman(mean, changes(head_map, length)) for length in head_map["lengths"]
            if np.ptp(mean)  # else it is not defined
        }  # fmt: skip
    return result

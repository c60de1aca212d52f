"""The context window and the RoPE of a model, however its config states them."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from axolotl_plugins.common.console import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Of Llama and most others; of MPT; of Bloom and ChatGLM. Transformers maps GPT-2's n_positions and others to the first.
WINDOW_KEYS = ("max_position_embeddings", "max_seq_len", "seq_length")


def read_config(name: str, changes: dict[str, Any] | None = None, **options: Any) -> PreTrainedConfig:
    """Load a model's config, with a condensed RoPE in the form that Transformers applies.

    Args:
        name: hub id or folder.
        changes: keys to override or to add, as a recipe's ``model_config``.
        options: of ``AutoConfig.from_pretrained``.

    Raises:
        ValueError: the config cannot be loaded, or a key to add is a misspelt one of its.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    changes = changes or {}
    try:
        config = AutoConfig.from_pretrained(name, **options, **changes)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, StrictDataclassError) as error:
        reason = first_line(error)
        if "trust_remote_code" in str(error):
            reason = (
                "it has code of its own, which only --trust-remote-code (in a recipe `trust_remote_code: true`) runs"
            )
        raise ValueError(f"cannot load the config of {name!r}: {reason}") from error
    known = config.to_dict().keys() | config.attribute_map.keys()
    for key in sorted(changes.keys() - known):  # Transformers ignores changes of keys that a config lacks
        if close := difflib.get_close_matches(key, known, n=1, cutoff=0.9):
            raise ValueError(f"model_config: {key}: {name} has no such setting; is {close[0]} meant?")
        setattr(config, key, changes[key])
    if linear := condensed(config):
        for key, value in linear.items():
            setattr(config.get_text_config(), key, value)
    return config


def ropes(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """Return the RoPE settings of a config: one per kind of layer where they differ, none without RoPE."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return [kind for kind in rope.values() if isinstance(kind, dict)] or [rope]


def condensed(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the config keys for LongChat's ``rope_condense_ratio``: positions divided by it, so linear scaling.

    Transformers ignores the ratio, which LongChat's own program reads. Empty without one, or if it is read already.
    """
    text = config.get_text_config()
    ratio, rope = getattr(text, "rope_condense_ratio", None) or 1, ropes(config)[0]
    if ratio == 1 or rope.get("rope_type", "default") != "default":
        return {}
    window = int(text.max_position_embeddings * ratio)
    scaling = {"rope_type": "linear", "factor": float(ratio), "rope_theta": rope["rope_theta"]}
    return {"rope_parameters": scaling, "max_position_embeddings": window}


def stated_window(config: PreTrainedConfig) -> int | None:
    """Return a model's context window in tokens, or None if its config states none (ALiBi, recurrent models).

    A scaled RoPE stretches the window that the model was pretrained with, which Vicuna-16K's config states beside the
    stretched one (``max_sequence_length``), and YaRN's and others' as ``original_max_position_embeddings``. Without
    either, ``max_position_embeddings`` is the stretched one, as in LongChat-32K.
    """
    text = config.get_text_config()
    windows = [int(getattr(text, key, None) or 0) for key in WINDOW_KEYS]
    windows = [next((window for window in windows if window > 0), 0)]
    for rope in ropes(config):
        original = rope.get("original_max_position_embeddings") or 0
        if rope.get("rope_type") == "self_extend":
            if original:  # the farthest key in groups must stay within the original window
                group, near = rope["group_size"], rope["neighbor_window"]
                return int((original - near + near // group) * group)
        elif rope.get("rope_type", "default") != "default":
            windows += [int(original * (rope.get("factor") or 1)), int(getattr(text, "max_sequence_length", None) or 0)]
    return max(windows) or None


def context_window(config: PreTrainedConfig, name: str, default: int | None = None) -> int:
    """Return the context window of a named model in tokens, or a default where its config states none.

    Raises:
        ValueError: the config states none, and there is no default.
    """
    if window := stated_window(config) or default:
        return window
    raise ValueError(
        f"{name}: its config states no context window ({', '.join(WINDOW_KEYS)}): state it there, or as `model_config: "
        "{max_position_embeddings: N}` in the recipe, which scoring reads by --model-config"
    )

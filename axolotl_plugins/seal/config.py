"""Configuration of a SEAL adapter: what to scale in which layers, per head or per channel."""

from __future__ import annotations

import re
from dataclasses import InitVar, dataclass, field
from typing import Any, get_args

from peft import PeftConfig
from peft.utils.peft_types import PeftType

from . import Granularity, Placement


def peft_type() -> PeftType:
    """Return ``PeftType.SEAL``, adding it to the enumeration on first use (PEFT has no public way to do so)."""
    if "SEAL" not in PeftType.__members__:
        member = str.__new__(PeftType, "SEAL")
        member._name_, member._value_ = "SEAL", "SEAL"
        type.__setattr__(PeftType, "SEAL", member)
        PeftType._member_map_["SEAL"] = member
        PeftType._member_names_.append("SEAL")
        PeftType._value2member_map_["SEAL"] = member
    return PeftType("SEAL")


def check_names(field_name: str, names: object) -> str | list[str] | None:
    """Return module names with lists sorted.

    Raises:
        ValueError: ``names`` is neither a regular expression, a list of strings, nor None.
    """
    if names is None:
        return None
    if isinstance(names, str):
        try:
            re.compile(names)
        except re.error as error:
            raise ValueError(f"{field_name}: {names!r} is not a regular expression ({error})") from None
        return names
    if not isinstance(names, list | tuple | set) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{field_name}: found {names!r}, expected a list of module names or a regular expression")
    return sorted(names)


def check_placements(placements: object, granularity: Granularity) -> list[Placement]:
    """Return placements as a list, in the order of ``Placement``.

    Raises:
        ValueError: there is none, one is unknown, or the granularity does not allow it.
    """
    known = get_args(Placement)
    found = [placements] if isinstance(placements, str) else placements
    if not isinstance(found, list | tuple | set) or not found or not all(each in known for each in found):
        raise ValueError(f"placements: found {placements!r}, expected a list of {', '.join(known)}")
    if granularity == "head" and "mlp" in found:
        raise ValueError("placements: the MLP has no heads: leave out `mlp`, or set granularity to 'channel'")
    return [each for each in known if each in found]


@dataclass
class SealConfig(PeftConfig):
    """Configuration of SEAL (arXiv 2501.15225, section 4.2).

    Attributes:
        granularity: ``"head"`` trains one scale per head of what is scaled (SEAL-H; of values per key-value head),
            ``"channel"`` one per channel (SEAL-C).
        placements: what is scaled: ``"attention_output"`` (the paper), and beyond the paper, in the same attention
            modules and layers, ``"query"`` (per head a factor of its attention logits), ``"value"`` and ``"mlp"`` (the
            input of the MLP's output projection, per channel only).
        target_modules: attention output projections, whose *input* is scaled: a list of name suffixes, or a regular
            expression for the full name; ``None`` detects them. The other placements are found beside them.
        exclude_modules: modules not to scale, in the same two forms; of an attention output also what is beside it.
        layers_to_transform: index or indices of the decoder layers to scale; ``None`` means all. Not with a regular
            expression as ``target_modules``, which can select layers itself.
        num_heads: query heads per layer; ``None`` reads it from each module, or the model's config.
        layers: former name of ``layers_to_transform``, as in adapters saved by earlier versions; never saved.

    Raises:
        ValueError: a field is invalid.
    """

    granularity: Granularity = field(default="channel", metadata={"help": "`head` (SEAL-H) or `channel` (SEAL-C)."})
    placements: list[Placement] = field(
        default_factory=lambda: ["attention_output"],
        metadata={"help": "What to scale: `attention_output` (the paper), `query`, `value`, `mlp`."},
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Attention output projections: name suffixes or a regular expression; None detects them."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules not to scale: name suffixes or a regular expression."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Decoder layers to scale; None means all."}
    )
    num_heads: int | None = field(default=None, metadata={"help": "Query heads per layer; None reads the model."})
    layers: InitVar[list[int] | None] = None

    def __post_init__(self, layers: list[int] | None) -> None:
        """Validate the fields and normalise their types."""
        super().__post_init__()
        self.peft_type = peft_type()
        if self.granularity not in get_args(Granularity):
            raise ValueError(f"granularity: found {self.granularity!r}, expected 'head' (SEAL-H) or 'channel' (SEAL-C)")
        self.placements = check_placements(self.placements, self.granularity)
        self.target_modules = check_names("target_modules", self.target_modules)
        self.exclude_modules = check_names("exclude_modules", self.exclude_modules)
        if layers is not None:
            if self.layers_to_transform is not None:
                raise ValueError("layers is the former name of layers_to_transform: set only layers_to_transform")
            self.layers_to_transform = layers
        if self.layers_to_transform is not None:
            self._normalise_layers()

    def _normalise_layers(self) -> None:
        """Validate ``layers_to_transform`` and make it a sorted list."""
        indices: Any = self.layers_to_transform
        if not isinstance(indices, list | tuple | set):
            indices = [indices]
        if not indices or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in indices):
            raise ValueError(
                f"layers_to_transform: found {self.layers_to_transform!r}, expected an index, or a non-empty list of "
                "indices from 0, or None"
            )
        if isinstance(self.target_modules, str):
            raise ValueError(
                "layers_to_transform: has no effect on a regular expression in target_modules: select the layers in "
                "the expression, or give target_modules as a list"
            )
        self.layers_to_transform = sorted(set(indices))

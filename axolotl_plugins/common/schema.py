"""Validate settings with pydantic; report the first error in one line, an unknown key with the nearest valid one."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError


def nearest(name: object, names: Iterable[str]) -> str | None:
    """Return the nearest of ``names``, None if none is near."""
    return next(iter(difflib.get_close_matches(str(name), list(names), n=1)), None)


class Strict(BaseModel):
    """Settings whose unknown keys are errors that name the nearest valid key."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def refuse_unknown_keys(cls, settings: Any) -> Any:
        """Raise on the first unknown key."""
        for key in settings if isinstance(settings, dict) else ():
            if key not in cls.model_fields:
                close = nearest(key, cls.model_fields)
                hint = f"is {close} meant?" if close else f"expected one of {', '.join(cls.model_fields)}"
                raise PydanticCustomError("unknown_key", "no such setting; {hint}", {"key": key, "hint": hint})
        return settings


def first_error(error: ValidationError, hidden: Collection[object] = ()) -> str:
    """Return the first of pydantic's errors as ``KEY: MESSAGE``, without the parts of the key in ``hidden``."""
    first = error.errors()[0]
    context = first.get("ctx", {})
    location = [*first["loc"], *([context["key"]] if first["type"] == "unknown_key" else [])]
    if first["type"] == "unknown_key":
        message = first["msg"]
    elif first["type"] == "missing":
        message = "missing"
    elif first["type"] == "value_error":
        message = str(context["error"])
    elif first["type"] == "union_tag_invalid":
        message = f"found the type {context['tag']!r}, expected one of {context['expected_tags']}"
    else:
        message = f"found {first['input']!r}: {first['msg']}"
    key = ".".join(str(part) for part in location if part not in hidden)
    return f"{key}: {message}" if key else message

"""Import an object that a user names as ``module:object``."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

from axolotl_plugins.common.console import first_line


def import_object(spec: str, option: str) -> Any:
    """Return the object that ``module:object`` names; the module may lie in the working directory.

    Raises:
        ValueError: the module cannot be imported, or has no such object.
    """
    module, _, name = spec.partition(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does, which the `seal` command does not
    try:
        return getattr(import_module(module), name)
    except Exception as error:  # whatever the user's module raises
        raise ValueError(f"{option}: cannot import {spec} ({type(error).__name__}: {first_line(error)})") from error

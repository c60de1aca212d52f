"""How the command line tools speak: errors in one line, and no chatter of libraries."""

from __future__ import annotations

import logging
import os
import sys
from typing import NoReturn


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def stop(program: str, error: BaseException) -> NoReturn:
    """Exit with status 1 and one line that says what is wrong."""
    sys.exit(f"{program}: {first_line(error)}")


def quiet_libraries() -> None:
    """Keep libraries from printing what a user can do nothing about; call it before they are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # torchao reports kernels that were built for other machines, torch an enumeration that torchao registers, lm-eval
    # that its tasks could be given other arguments.
    for name in ("torchao", "torch.utils._pytree", "lm_eval"):
        logging.getLogger(name).setLevel(logging.ERROR)

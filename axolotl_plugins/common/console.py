"""Report errors of command lines in one line, and silence libraries."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from typer import Typer


INTERRUPTED = 130  # exit status of shells after SIGINT


def first_line(error: BaseException) -> str:
    """Return the first line of an error message; for a file error, the file and the reason."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def in_rust(error: BaseException) -> bool:
    """Return whether a Rust library (tokenizers, safetensors) failed to write a file: it raises no OSError."""
    return "(os error " in str(error)


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error is out of memory: Python's, a GPU's, or PyTorch's on a CPU."""
    messages = ("out of memory", "allocate memory")  # PyTorch raises RuntimeError; checking its type would import torch
    return isinstance(error, MemoryError) or any(message in str(error) for message in messages)


def stop(error: BaseException) -> NoReturn:
    """Exit with status 1 and the error in one line, which begins with ``seal:`` in every program."""
    if out_of_memory(error):
        sys.exit("seal: out of memory: ask for less at once (shorter samples, a smaller batch)")
    sys.exit(f"seal: {first_line(error)}")


def run(app: Typer, program: str, arguments: list[str] | None = None) -> None:
    """Run a command line app with quiet libraries; report wrong input and out of memory in one line.

    Errors of values, numbers and files are taken for the user's input, as their messages are written for users.

    Args:
        app: the commands.
        program: how it is called, such as ``python -m eval``.
        arguments: defaults to those of the process.
    """
    from click import Abort, ClickException
    from click.exceptions import NoArgsIsHelpError
    from safetensors import SafetensorError

    quiet_libraries()
    try:
        code = app(arguments, prog_name=program, standalone_mode=False)
    except NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except Abort:
        code = INTERRUPTED
    except ClickException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else program
        stop(ValueError(f"{error.format_message()} (see `{command} --help`)"))
    except (ValueError, FloatingPointError, OSError, SafetensorError) as error:
        stop(error)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        stop(error)
    if code == INTERRUPTED:
        print("seal: interrupted: nothing is half-written, call it again", file=sys.stderr)
    if isinstance(code, int) and code:
        sys.exit(code)


def quiet_libraries() -> None:
    """Set libraries up for a command line, before their import; silence messages that a user cannot act on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("MPLBACKEND", "Agg")  # plots are files, also where there is a display
    # torchao logs kernels built for other machines, torch an enum that torchao registers, lm-eval that tasks take other
    # arguments, bitsandbytes a missing kernel that is not called, Transformers each dequantised model.
    for name in ("torchao", "torch.utils._pytree", "lm_eval", "bitsandbytes.backends.cpu.ops",
                 "transformers.integrations.bitsandbytes"):  # fmt: skip
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "Skipping publisher trust check", UserWarning)

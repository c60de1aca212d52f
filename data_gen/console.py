"""How the command line tools speak: errors in one line, and no chatter of libraries."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from typer import Typer


INTERRUPTED = 130  # exit status, as a shell gives it


def first_line(error: BaseException) -> str:
    """The first line of an error's text; of a file's, the file and what is wrong with it."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def in_rust(error: BaseException) -> bool:
    """Whether a file could not be written by a library in Rust (tokenizers, weights), whose errors are no OSError."""
    return "(os error " in str(error)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory gave out: Python's, a GPU's, or PyTorch's on a CPU."""
    said = ("out of memory", "allocate memory")  # PyTorch's errors are RuntimeErrors; it is not imported for this
    return isinstance(error, MemoryError) or any(words in str(error) for words in said)


def stop(program: str, error: BaseException) -> NoReturn:
    """Exit with status 1 and one line that says what is wrong."""
    if out_of_memory(error):
        sys.exit(f"{program}: out of memory: ask for less at once (shorter samples, a smaller batch)")
    sys.exit(f"{program}: {first_line(error)}")


def run(app: Typer, program: str, arguments: list[str] | None = None) -> None:
    """Run a command line; what is wrong with its options is one line too.

    Args:
        app: the commands; when they run out of memory, that is one line.
        program: as it is called, such as ``python -m eval``.
        arguments: None takes those of the process.
    """
    from click import Abort, ClickException
    from click.exceptions import NoArgsIsHelpError

    try:
        code = app(arguments, prog_name=program, standalone_mode=False)
    except NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except Abort:
        code = INTERRUPTED
    except ClickException as error:
        context = getattr(error, "ctx", None)
        help_of = context.command_path if context else program
        stop(program.split()[-1], ValueError(f"{error.format_message()} (see `{help_of} --help`)"))
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        stop(program.split()[-1], error)
    if code == INTERRUPTED:
        print(f"{program.split()[-1]}: interrupted: nothing is half-written, call it again", file=sys.stderr)
    if isinstance(code, int) and code:
        sys.exit(code)


def quiet_libraries() -> None:
    """Keep libraries from printing what a user can do nothing about; call it before they are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # torchao reports kernels that were built for other machines, torch an enumeration that torchao registers, lm-eval
    # that its tasks could be given other arguments, bitsandbytes that a kernel which nothing here calls is not at hand.
    for name in ("torchao", "torch.utils._pytree", "lm_eval", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "Skipping publisher trust check", UserWarning)

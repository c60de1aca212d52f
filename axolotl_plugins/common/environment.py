"""Where a figure comes from: the machine, the commit of the code, the date and the command."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path


def machine() -> str:
    """Return this machine's processor, number of cores and version of torch."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, torch {version('torch')}"


def current_commit() -> str | None:
    """Return the commit of the code, with a plus if files differ from it; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def origin() -> dict[str, str | None]:
    """Return the running command, the date, the commit and the machine, as results of probes record them."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"command": command, "date": date.today().isoformat(), "commit": current_commit(), "machine": machine()}

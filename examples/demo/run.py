"""Runs a command of the demo as a person would, and lets nothing of it stay behind."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path


class Failed(Exception):
    """The demo can't go on; the message says why."""


def run(words: list[str], *, read: bool = False) -> str:
    """Print a command and run it, with the programs of this Python's environment.

    Args:
        words: the program's name and its arguments.
        read: return what it writes to its standard output, which is then shown at its end.

    Raises:
        Failed: its exit code is not 0.
    """
    print(f"$ {shlex.join(words)}", flush=True)
    program = Path(sys.executable).with_name(words[0])
    if not program.is_file():
        raise Failed(f"{program} is missing; `make demo` installs it, or `pip install -e .` in this environment")
    # A session of its own: one signal then ends the command and the ranks that it has started.
    process = subprocess.Popen(
        [program, *words[1:]], start_new_session=True, stdout=subprocess.PIPE if read else None, text=True
    )
    done = False
    try:
        written, _ = process.communicate()
        done = process.returncode == 0
    finally:
        if not done:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if read:
        print(written, end="", flush=True)
    if not done:
        raise Failed(f"`{shlex.join(words)}` ended with exit code {process.returncode}; it says why above")
    return written or ""

"""Stacks of all threads of a process: Python's own, and py-spy's where it is installed."""

from __future__ import annotations

import faulthandler
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from types import FrameType

import torch

_TORCH = os.path.dirname(torch.__file__) + os.sep


def of_this_process() -> str:
    """By :mod:`faulthandler`, which needs no cooperation of the threads."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def of_another(pid: int, seconds: float = 3) -> str:
    """Of a process on this host that can't answer itself, as one that is stopped; empty without py-spy."""
    program = shutil.which("py-spy") or shutil.which("py-spy", path=os.path.dirname(sys.executable))
    if program is None:
        return ""
    try:
        told = subprocess.run(
            [program, "dump", "--nonblocking", "--pid", str(pid)], capture_output=True, text=True, timeout=seconds
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return told.stdout


def innermost(thread: int) -> str:
    """File, line and function in which a thread is."""
    frame = sys._current_frames().get(thread)
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}" if frame else "?"


def is_in_collective(thread: int) -> bool:
    """Whether it waits for other ranks, as far as Python's stack tells: it is inside of torch's distributed code, or in
    a backward pass, where collectives are started too."""
    return any(_is_collective(frame) for frame in _frames(thread))


def is_in_torch(thread: int) -> bool:
    """Whether its innermost Python frame is torch's."""
    return any(frame.f_code.co_filename.startswith(_TORCH) for frame in list(_frames(thread))[:1])


def _frames(thread: int) -> Iterator[FrameType]:
    frame = sys._current_frames().get(thread)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_collective(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith((_TORCH + "distributed", _TORCH + "autograd"))

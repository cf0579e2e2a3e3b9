"""What a rank of ``bharat launch`` does between its fork and its end: it waits for orders, then runs a script.

A rank may be forked long before it is needed. Until its orders come it has done nothing: no file, no thread but the one
that ends it with the launcher, no variable of an attempt.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import json
import logging
import multiprocessing
import os
import runpy
import sys
import threading
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.util import _exit_function  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any

from lightning_bharat.cluster import heartbeat, last_words
from lightning_bharat.cluster.connections import is_lost_connection
from lightning_bharat.cluster.rank_main import STACKS, STACKS_SIGNAL, end_with_parent

HEARTBEAT = "heartbeat"


@dataclass(frozen=True)
class Script:
    """What is to be run.

    Attributes:
        name: a file, or with ``module`` what follows ``python -m``.
        arguments: the words after it.
        module: whether ``name`` is a module.
        program: what ``sys.argv[0]`` says; by default the file.
    """

    name: str
    arguments: tuple[str, ...] = ()
    module: bool = False
    program: str = ""

    def run(self) -> None:
        """As ``python`` would run it, in this process."""
        sys.argv = [self.program or self.name, *self.arguments]
        if self.module:
            sys.path.insert(0, os.getcwd())
            runpy.run_module(self.name, run_name="__main__", alter_sys=not self.program)
        else:
            sys.path.insert(0, str(Path(self.name).absolute().parent))
            runpy.run_path(self.name, run_name="__main__")


@dataclass(frozen=True)
class Orders:
    """All that a waiting rank has to know.

    Attributes:
        script: what to run.
        environment: all variables.
        working: the working directory.
        folder: where its heartbeat and stacks are written.
        stdout, stderr: files for its streams; empty: those of the launcher.
    """

    script: Script
    environment: Mapping[str, str]
    working: str
    folder: str
    stdout: str = ""
    stderr: str = ""

    def to_bytes(self) -> bytes:
        """As they are sent."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, sent: bytes) -> Orders:
        """As they are received."""
        fields = json.loads(sent)
        script = fields.pop("script")
        return cls(Script(**{**script, "arguments": tuple(script["arguments"])}), **fields)


def main(channel: Connection) -> None:
    """Wait for orders, carry them out, and send how it ended through ``channel`` if an exception did it."""
    gc.freeze()  # garbage is not looked for in all that the server imported
    os.setpgrp()  # the rank leads a group: its loader's workers can be ended with it
    threading.Thread(target=end_with_parent, daemon=True).start()
    atexit._clear()  # what the server's imports have registered is the server's
    try:
        orders = Orders.from_bytes(channel.recv_bytes())
    except EOFError:  # never needed
        os._exit(0)
    last_words.begin(channel)
    try:
        _prepare(orders)
        orders.script.run()
    except SystemExit as error:
        if code := _exit_code(error):
            last_words.say("SystemExit", str(error.code))
        _leave(code)
    except BaseException as error:
        _say(error)
        _leave(1)
    _leave(0)


def _prepare(orders: Orders) -> None:
    os.environ.clear()
    os.environ.update(orders.environment)
    os.chdir(orders.working)
    for stream, path in ((1, orders.stdout), (2, orders.stderr)):
        if path:
            target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(target, stream)
            os.close(target)
    # Line by line, also into a file or pipe: what a killed rank said last is what one wants to read.
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - open as long as the process
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    stacks = open(Path(orders.folder, STACKS), "w")  # noqa: SIM115
    faulthandler.register(STACKS_SIGNAL, file=stacks, all_threads=True)
    faulthandler.enable(file=2)  # native code that crashes says where
    heartbeat.begin(Path(orders.folder, HEARTBEAT))
    # A loader in this rank starts its workers as in any other process, and not by the launcher's server.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    import torch

    torch.set_num_threads(int(orders.environment.get("OMP_NUM_THREADS", 1)))


def _exit_code(error: SystemExit) -> int:
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    print(error.code, file=sys.stderr)
    return 1


def _say(error: BaseException) -> None:
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    sys.excepthook(type(error), error, error.__traceback__)
    with suppress(Exception):  # torchelastic's error file, where its users look for it
        get_error_handler().record_exception(error)
    first: Any = getattr(error, "first", None)  # of a PeerError: the error of the rank that failed first
    trace = "".join(traceback.format_exception(error))[-20_000:]
    last_words.say(type(error).__qualname__, str(error), trace, first is not None or is_lost_connection(error))


def _leave(code: int) -> None:
    """End as a process of ``python`` does, but wait for no thread of a process group that may be half dead."""
    if code == 0:
        threading._shutdown()  # type: ignore[attr-defined] # threads that are no daemons
        atexit._run_exitfuncs()  # loggers write their last lines there
        _exit_function()
        logging.shutdown()
    for child in multiprocessing.active_children():  # they hold copies of our connections, for whose end peers wait
        child.kill()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)

"""What a warm rank does between its fork and its end; runs in the rank's own process."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection, wait
from typing import Any

# Asks a rank for its stacks. SIGQUIT means that to a JVM as well, and neither Lightning nor Slurm use it.
STACKS_SIGNAL = signal.SIGQUIT
STACKS = "stacks"  # the file that they go to, in the rank's folder; it is there from the rank's first moment on


_channel: Connection | None = None
_one_question = threading.Lock()


def ask(question: Any) -> Any:
    """Send ``question`` to the process that started this rank, and wait for what it answers.

    Raises:
        RuntimeError: this process is no rank of a job.
        EOFError: that process has ended.
    """
    if _channel is None:
        raise RuntimeError("this process is no rank of a warm job: nobody answers")
    with _one_question:
        _channel.send_bytes(pickle.dumps(("ask", question)))
        return pickle.loads(_channel.recv_bytes())  # our own parent's bytes, through a pipe


def main(channel: Connection, call: bytes, environment: dict[str, str], folder: str, output: str) -> None:
    """Run the pickled ``(function, args, kwargs)`` and send how it ended through ``channel``.

    A rank that returned waits for the word to leave: rank 0 hosts the store, so none may leave while others work.
    """
    gc.freeze()  # garbage is not looked for in all that the server imported: half a million objects, on pages it shares
    os.setpgrp()  # the rank leads a group: its loader's workers can be ended with it
    global _channel
    _channel = channel
    _write_to(output)
    stacks = open(os.path.join(folder, STACKS), "w")  # noqa: SIM115 - open as long as the process
    faulthandler.register(STACKS_SIGNAL, file=stacks, all_threads=True)
    faulthandler.enable(file=2)  # native code that crashes says where
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ.clear()
    os.environ.update(environment)
    # A loader in this rank starts its workers as in any other process, and not by our server.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    try:
        import torch

        torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", 1)))
        function, args, kwargs = pickle.loads(call)  # our own parent's bytes, through a pipe
        answer = pickle.dumps(("value", function(*args, **kwargs)))
    except BaseException as error:
        _end_by(error, channel)
    _send(channel, answer)
    channel.poll(None)


def _end_by(error: BaseException, channel: Connection) -> None:
    """End as Python ends by an exception that nobody caught."""
    code = _exit_code(error)
    if code == 0:
        _send(channel, pickle.dumps(("value", None)))
    else:
        sys.excepthook(type(error), error, error.__traceback__)
        _send(channel, pickle.dumps(("error", (type(error).__qualname__, str(error), traceback.format_exc()))))
    for child in multiprocessing.active_children():  # they hold copies of our connections, for whose end peers wait
        child.kill()
    # Not sys.exit, where a half-dead process group may keep threads and finalizers waiting.
    os._exit(code)


def _exit_code(error: BaseException) -> int:
    if not isinstance(error, SystemExit):
        return 1
    return error.code if isinstance(error.code, int) else int(error.code is not None)


def _send(channel: Connection, answer: bytes) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    channel.send_bytes(answer)


def _write_to(path: str) -> None:
    """Let stdout and stderr, also those of C++ code, go to one file."""
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(target, number)
    os.close(target)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - line-buffered, in order with stderr
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115


def end_with_parent() -> None:
    """A thread's work. No orphans: whoever started the job is gone, so nobody reads what this rank would find."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.killpg(0, signal.SIGKILL)

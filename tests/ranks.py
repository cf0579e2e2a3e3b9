"""How tests start ranks: :func:`run_ranks` (forked warm, a fraction of a second) and :func:`fresh_ranks`.

See README.md in this folder.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning_bharat.cluster.outcome import RankOutcome, RanksFailed
from lightning_bharat.cluster.warm import WarmServer
from lightning_bharat.cluster.warm_job import free_port, rank_environment

__all__ = ["RanksFailed", "fresh_ranks", "run_ranks", "server", "torchrun"]

REPOSITORY = Path(__file__).parents[1]

# One for the whole session. What most ranks import; each costs its import once.
server = WarmServer(
    preload=(
        "torch",
        "torch.distributed.fsdp",
        "torch.distributed.checkpoint",
        "torch.distributed.tensor.parallel",
        "torch.distributed.pipelining",
        "torch.testing",
        "lightning.pytorch",
        "lightning.pytorch.demos.boring_classes",
        "pytest",
        "transformers.models.llama.modeling_llama",
        "transformers.models.qwen3.modeling_qwen3",
        "transformers.models.gpt2.modeling_gpt2",
        "lightning_bharat.cluster.rank_main",
        "lightning_bharat.cluster.warm",
        "lightning_bharat.tuning.trial_run",
        "tests.ranks",
    )
)


def run_ranks(
    function: Callable,
    ranks: int,
    *args: Any,
    timeout: float = 30,
    grace: float = 10,
    env: Mapping[str, str] | None = None,
) -> list[Any]:
    """Call ``function(*args)`` on ``ranks`` gloo ranks and return what each returned (anything that can be pickled).

    ``function`` is defined at the top level of a test module. The process group is not made: a ``Trainer`` does it, or
    ``dist.init_process_group("gloo")``.

    Raises:
        RanksFailed: with the traceback, the stacks after a time-out, and the last output of every rank.
    """
    return server.run(function, ranks, *args, timeout=timeout, grace=grace, env=env)


def fresh_ranks(
    command: Sequence[str], ranks: int = 1, timeout: float = 120, env: Mapping[str, str] | None = None
) -> list[RankOutcome]:
    """Start ``python *command`` in fresh processes, for what a fork can't show: an import, a launcher, a signal.

    With ``ranks > 1`` each process has torchelastic's variables; with one it has none, and may start its own ranks by
    ``devices=n``. Never raises for what happens in them: look at ``exit_code``, ``output``, ``seconds`` and
    ``timed_out``.
    """
    port, began = free_port(), time.monotonic()
    base = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "PYTHONFAULTHANDLER": "1"}
    base |= {"GLOO_SOCKET_IFNAME": "lo", **(env or {})}
    outputs = [tempfile.TemporaryFile("w+") for _ in range(ranks)]  # noqa: SIM115 - a pipe could fill and block
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            env={**base, **(rank_environment(rank, ranks, port) if ranks > 1 else {})},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        for rank, output in enumerate(outputs)
    ]
    outcomes = [RankOutcome(rank) for rank in range(ranks)]
    try:
        _follow(processes, outcomes, began, timeout)
    finally:
        for process in processes:
            with suppress(ProcessLookupError):  # what it started and left behind
                os.killpg(process.pid, signal.SIGKILL)
    for outcome, output in zip(outcomes, outputs, strict=True):
        output.seek(0)
        outcome.output = output.read()
        output.close()
    return outcomes


def _follow(processes: list[subprocess.Popen], outcomes: list[RankOutcome], began: float, timeout: float) -> None:
    """Wait until all have ended; when time is up, abort the rest, whose faulthandler then writes their stacks."""
    running = dict(zip(processes, outcomes, strict=True))
    while running:
        seconds = time.monotonic() - began
        for process in [process for process in running if process.poll() is not None]:
            outcome = running.pop(process)
            outcome.exit_code, outcome.seconds = process.returncode, seconds
        if seconds > timeout:
            for process, outcome in running.items():
                outcome.timed_out, outcome.seconds = True, seconds
                process.send_signal(signal.SIGABRT)
                process.wait()
            return
        time.sleep(0.02)


def torchrun(script: Sequence[str], ranks: int, timeout: float = 120, **kwargs: Any) -> RankOutcome:
    """Start ``script`` (a path and its arguments) on ``ranks`` ranks by torchrun; its exit code, output and seconds."""
    launcher = ["-m", "torch.distributed.run", f"--master-port={free_port()}", f"--nproc-per-node={ranks}"]
    return fresh_ranks([*launcher, *script], timeout=timeout, **kwargs)[0]

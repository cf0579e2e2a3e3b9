"""The two sides of `benchmarks.tuning`: `tune` in this process, and processes of plain Optuna. Both stay warm."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import optuna
from optuna.distributions import FloatDistribution

from benchmarks.tuned_task import HIGH, LOW, MOMENTS, config, quiet
from lightning_bharat.tuning import SearchSpace, tune
from lightning_bharat.tuning.slots import usable_cores

ROOT = Path(__file__).parents[1]


class Ours:
    """Studies of `tune` in this process, whose server stays warm.

    Args:
        folder: for them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._numbers = folder, count()

    def run(self, trials: int, epochs: int, workers: int) -> Path:
        """The moments of a study."""
        folder = self._folder / f"ours-{next(self._numbers)}"
        folder.mkdir()
        os.environ[MOMENTS] = str(folder / "moments")
        self.tune(folder, trials, epochs, workers)
        return folder / "moments"

    def tune(self, folder: Path, trials: int, epochs: int, workers: int) -> None:
        """A study in ``folder``."""
        space = SearchSpace({"model.lr": FloatDistribution(LOW, HIGH, log=True)})
        path = config(self._folder, epochs)
        found = tune(path, space, n_trials=trials, workers=workers, seed=0, folder=folder, say=lambda line: None)
        if any(trial.state != optuna.trial.TrialState.COMPLETE for trial in found.trials):
            raise RuntimeError(f"a trial has failed: {[trial.user_attrs.get('end') for trial in found.trials]}")


class Peers:
    """Processes of plain Optuna.

    Args:
        cores: of each; ``None``: any.
        folder: for their moments.
    """

    def __init__(self, cores: Sequence[int | None], folder: Path) -> None:
        self._cores, self._folder, self._numbers = cores, folder, count()
        threads = max(1, len(usable_cores()) // len(cores))  # as many as ours has
        how: dict[str, Any] = {"cwd": ROOT, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        how["env"] = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-m", "benchmarks.tuned_peer"]
        self._processes = [subprocess.Popen(command, **how) for _ in cores]

    def run(self, trials: int, epochs: int) -> Path:
        """The moments of a study in each process, with ``trials`` in all."""
        path = self._folder / f"peers-{len(self._cores)}-{next(self._numbers)}"
        for core, process in zip(self._cores, self._processes, strict=True):
            each = {"core": core, "trials": trials // len(self._cores), "epochs": epochs, "seed": core or 0}
            process.stdin.write(json.dumps({**each, "moments": str(path)}) + "\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
        for process in self._processes:
            if process.stdout.readline() != "done\n":  # type: ignore[union-attr]
                raise RuntimeError("a process of plain Optuna has ended; its output is above")
        return path

    def close(self) -> None:
        """End them."""
        for process in self._processes:
            process.communicate()


def main() -> None:
    """Ours in a process that has imported nothing, two trials at a time."""
    parser = argparse.ArgumentParser("python -m benchmarks.tuned_sides", description=main.__doc__)
    parser.add_argument("--trials", type=int, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    given = parser.parse_args()
    quiet()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with TemporaryDirectory() as folder:
        Ours(Path(folder)).tune(Path(folder), given.trials, given.epochs, 2)


if __name__ == "__main__":
    main()

"""Plain Optuna in one warm process, for `benchmarks.tuning`: it waits for orders, a line of JSON each, on stdin.

    {"core": 0, "trials": 11, "epochs": 0, "seed": 1, "moments": "FILE"}      ->      done

A study in memory with the same sampler: nothing is written, and all that a process has done once it need not do again.
"""

from __future__ import annotations

import json
import os
import sys
from functools import wraps
from typing import Any

import optuna
from optuna.samplers import TPESampler

from benchmarks.tuned_task import HIGH, LOW, MOMENTS, fit, note, quiet


def watch() -> None:
    """Note when any study of this process asks, and when it tells."""
    for name in ("ask", "tell"):
        setattr(optuna.Study, name, _noted(name, getattr(optuna.Study, name)))


def _noted(name: str, call: Any) -> Any:
    @wraps(call)
    def noted(*args: Any, **kwargs: Any) -> Any:
        note(name)
        try:
            return call(*args, **kwargs)
        finally:
            if name == "tell":
                note("told")

    return noted


def study(trials: int, epochs: int, seed: int) -> None:
    """One after another, as ``study.optimize`` does."""
    study = optuna.create_study(sampler=TPESampler(seed=seed))
    for _ in range(trials):
        trial = study.ask()
        study.tell(trial, fit(trial.suggest_float("lr", LOW, HIGH, log=True), epochs))


def main() -> None:
    """Until stdin ends."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    quiet()
    watch()
    for line in sys.stdin:
        orders = json.loads(line)
        os.environ[MOMENTS] = orders["moments"]
        if orders["core"] is not None:
            os.sched_setaffinity(0, {orders["core"]})
        study(orders["trials"], orders["epochs"], orders["seed"])
        print("done", flush=True)


if __name__ == "__main__":
    main()

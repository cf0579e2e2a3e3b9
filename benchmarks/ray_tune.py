"""Ray Tune's side of `benchmarks.tuning`: the same fits, two at a time. It runs in an environment that has Ray.

It imports nothing of ours but the task. Ray is used as in its documentation: a function trainable, Optuna's search and
one core a trial.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray import tune
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.optuna import OptunaSearch

from benchmarks.tuned_task import HIGH, LOW, fit, quiet


def trial(config: dict[str, Any], epochs: int) -> None:
    """In a worker of Ray's."""
    quiet()
    tune.report({"val_loss": fit(config["lr"], epochs)})


def main() -> None:
    """From a start with nothing imported to the last trial's end."""
    parser = argparse.ArgumentParser("python -m benchmarks.ray_tune", description=__doc__)
    parser.add_argument("--trials", type=int, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    given = parser.parse_args()
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200_000_000)
    search = ConcurrencyLimiter(OptunaSearch(seed=0), max_concurrent=2)
    how = tune.TuneConfig(metric="val_loss", mode="min", num_samples=given.trials, search_alg=search)
    with TemporaryDirectory() as folder:
        tuner = tune.Tuner(
            tune.with_resources(partial(trial, epochs=given.epochs), {"cpu": 1}),
            param_space={"lr": tune.loguniform(LOW, HIGH)},
            tune_config=how,
            run_config=tune.RunConfig(storage_path=folder, verbose=0),
        )
        found = tuner.fit()
    if found.num_errors or len(found) != given.trials:
        raise SystemExit(f"{found.num_errors} of {len(found)} trials have failed")
    ray.shutdown()


if __name__ == "__main__":
    main()

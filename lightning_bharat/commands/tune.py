"""``bharat tune``: a search over the options of a LightningCLI project, which stays as it is."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.cli import LightningArgumentParser

from lightning_bharat.commands.inspection import quiet
from lightning_bharat.commands.project import BAD_PROJECT
from lightning_bharat.commands.signature import say_error

_DESCRIPTION = """\
Search for the best options of a LightningCLI project, under whatever strategy its config names.

Every option of `bharat fit` works here too. The space names those that are searched; each trial is a fit in processes
of its own, and the study is kept in runs/NAME: the same command again, also after a kill, goes on with it, and on
another host that sees the same storage it joins in.

Example:
    bharat tune --config config.yaml --space space.yaml --n_trials 20 --data.batch_size 4
    bharat tune --config config.yaml --space space.yaml --sampler gp --pruner asha --workers 2
    bharat tune --config config.yaml --space space.yaml --points points.csv --transfer runs/earlier
    bharat tune --config config.yaml --space space.yaml --population.size 4 --population.interval 2 --workers 4
"""


def main(words: list[str]) -> int:
    """Run ``bharat tune``: 0 where the study has a best trial, 1 where it has none, 2 for bad input."""
    try:
        import optuna

        from lightning_bharat.tuning.errors import StorageError
        from lightning_bharat.tuning.run import tune
        from lightning_bharat.tuning.same_error import SameError
        from lightning_bharat.tuning.study_config import StudyCLI, StudyConfig
    except ModuleNotFoundError as error:
        say_error("bharat tune", f"{error}; install what tuning needs: pip install 'lightning-bharat[tune]'")
        return 2
    quiet()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        cli = StudyCLI(words, "bharat tune", _DESCRIPTION, _add)
        options = cli.own_options()
        study = tune(StudyConfig(cli, options["seed"] or 0), **options)
    except (*BAD_PROJECT, StorageError, ValueError, OSError) as error:
        say_error("bharat tune", error)
        return 2
    except SameError as error:
        say_error("bharat tune", error)
        return 1
    return 0 if any(trial.values for trial in study.get_trials(deepcopy=False)) else 1


def _add(parser: LightningArgumentParser) -> None:
    from lightning_bharat.tuning.run import tune

    parser.add_argument("--space", type=Path, required=True, help="YAML file of the options that are searched.")
    parser.add_argument("--points", type=str, help="CSV of points to try first; or an earlier study's folder.")
    parser.add_argument("--transfer", nargs="+", type=str, help="Folders of earlier studies to learn from.")
    skip: set[str | int] = {"target", "space", "ranks", "args", "say", "points", "transfer"}
    parser.add_function_arguments(tune, skip=skip, as_group=False)

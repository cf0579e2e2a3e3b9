"""The loggers of a study's trials, grouped by the study where a person did not group them.

This is done in the config, before loggers are built: Comet's makes its run as it is built, and a logger's place can't
be changed afterwards by anything public. So the trial's config says where it logs, and no tracker is imported here.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any


def group_loggers(config: Any, study: str, trial: int) -> Any:
    """A trial's config with its loggers under the study's name.

    - TensorBoard and CSV: ``name`` is the study and ``version`` the trial, so that trials at the same time do not take
      the same ``version_0``.
    - Weights & Biases: ``group`` is the study; MLflow: ``experiment_name`` and tags; Comet: tags; LitLogger: metadata.
      Each run is named after study and trial.

    What a person set stays. Lightning's default logger (``true``) writes into the trial's own folder already.

    Args:
        config: a project's parsed config, a ``Namespace`` or a ``dict``, with ``trainer`` in it. It is not changed.
        study: its name.
        trial: its number.

    Returns:
        The changed copy.
    """
    config = copy.deepcopy(config)
    trainer = config.get("trainer")
    loggers = trainer.get("logger") if trainer is not None else None
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if logger is not None and hasattr(logger, "get") and isinstance(logger.get("class_path"), str):
            _group(logger, study, trial)
    return config


def _group(logger: Any, study: str, trial: int) -> None:
    kind = _class(logger["class_path"])
    known = next((base.__name__ for base in kind.__mro__ if base.__name__ in _WANTED), None) if kind else None
    if known is None:
        return
    assert kind is not None
    for name, value in _WANTED[known](study, f"trial_{trial:04d}").items():
        _set(logger, kind, name, value)


_WANTED: dict[str, Any] = {
    "TensorBoardLogger": lambda study, trial: {"name": study, "version": trial},
    "CSVLogger": lambda study, trial: {"name": study, "version": trial},
    "WandbLogger": lambda study, trial: {"group": study, "name": f"{study}/{trial}"},
    "MLFlowLogger": lambda study, trial: {
        "experiment_name": study,
        "run_name": trial,
        "tags": {"study": study, "trial": trial},
    },
    "CometLogger": lambda study, trial: {"name": f"{study}/{trial}", "tags": [study]},
    "LitLogger": lambda study, trial: {"name": f"{study}-{trial}", "metadata": {"study": study, "trial": trial}},
}


def _set(logger: Any, kind: type, name: str, value: Any) -> None:
    """Set an argument that is as it would be if a person had said nothing."""
    arguments, rest = _arguments(kind)
    given = logger.get("init_args")
    if name in arguments or (given is not None and name in given):
        if given is None:
            given = logger["init_args"] = {}
        default = arguments.get(name)
        if given.get(name) in (None, default):
            given[name] = value
    elif rest:  # jsonargparse can't see what these are passed to, and keeps them apart
        others = logger.get("dict_kwargs")
        if others is None:
            others = logger["dict_kwargs"] = {}
        if others.get(name) is None:
            others[name] = value


def _arguments(kind: type) -> tuple[Mapping[str, Any], bool]:
    """Arguments of a class with their defaults, through the classes that it passes ``**kwargs`` on to.

    Returns:
        Also whether there are still such at the end.
    """
    found: dict[str, Any] = {}
    for base in kind.__mro__:
        if "__init__" not in vars(base) or base is object:
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        found = {p.name: None if p.default is p.empty else p.default for p in parameters} | found
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return found, False
    return found, True


def _class(path: str) -> type | None:
    """The logger's class; ``None``: there is none, which is said where it is built."""
    if "." not in path:
        path = f"lightning.pytorch.loggers.{path}"  # as jsonargparse finds a subclass by its bare name
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name, None)
    except ImportError:
        return None
    return found if isinstance(found, type) else None

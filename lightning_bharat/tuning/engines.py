"""Engines by name: what starts the ranks of trials."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from multiprocessing.spawn import _check_not_importing_main  # type: ignore[attr-defined]
from typing import Any

from lightning_bharat.commands.project import BadInput
from lightning_bharat.tuning.engine import Engine, Objective, WarmEngine
from lightning_bharat.tuning.options import check, named
from lightning_bharat.tuning.slots import Slot
from lightning_bharat.tuning.trial_run import Orders


def make_engine(
    engine: str | Mapping[str, Any],
    objective: Objective | None,
    ranks: Callable[[Orders, Slot], int],
    on_cpu: bool,
    say: Callable[[str], None],
) -> Engine:
    """What starts a study's trials.

    Args:
        engine: ``"warm"``: this host; ``"ray"``: a Ray cluster, or a dict of that name and options of
            :class:`~lightning_bharat.tuning.ray_engine.RayEngine`
            (``{"name": "ray", "address": "auto", "num_cpus": 4, "num_gpus": 1}``).
        objective: a person's function; ``None``: a trial is a fit of the study's config.
        ranks: of a trial, by its values and what it has.
        on_cpu: whether trials use no other device.
        say: told where trials run, if that is not here.

    Raises:
        BadInput: Ray is not installed; a trial's process asks while it imports the script that has started it.
        TypeError: neither a name nor a mapping.
        ValueError: an unknown name or option.
    """
    name, options = named("engine", engine, {"warm": WarmEngine, "ray": None})
    if name == "warm":
        _refuse_in_import()
        check("engine", name, WarmEngine, options, ("objective", "ranks", "on_cpu"))
        return WarmEngine(objective, ranks, on_cpu)
    try:
        from lightning_bharat.tuning.ray_engine import RayEngine
    except ModuleNotFoundError as error:
        raise BadInput(f"engine={engine!r}: {error}; install Ray: pip install 'lightning-bharat[ray]'") from error
    check("engine", name, RayEngine, options, ("objective", "ranks", "on_cpu", "say"))
    return RayEngine(objective, ranks, on_cpu, say, **options)


def _refuse_in_import() -> None:
    try:
        _check_not_importing_main()
    except RuntimeError as error:
        raise BadInput(
            "a trial's processes import the script that calls tune, and so it was called again; write the call under "
            '`if __name__ == "__main__":`'
        ) from error

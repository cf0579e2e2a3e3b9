"""The trial that this process works on, for what a config builds: a callback there can't be given it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_bharat.tuning.remote_trial import RemoteTrial

_trial: RemoteTrial | None = None


def trial() -> RemoteTrial | None:
    """The trial of ``bharat tune`` or :func:`~lightning_bharat.tuning.tune` that this process is a rank of, if any."""
    return _trial


def set_trial(of_this_process: RemoteTrial | None) -> None:
    """Say which trial it is."""
    global _trial
    _trial = of_this_process

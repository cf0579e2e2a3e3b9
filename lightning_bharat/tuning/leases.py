"""Who runs which trial, so that the trials of a controller that died are found and those of one that lives are not.

Kept in the study itself, so for every storage and every host: each controller has a lease in the study's system
attributes and marks its trials with the lease's name.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from types import TracebackType
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from lightning_bharat.tuning._optuna import storage_of, study_id, trial_id
from lightning_bharat.tuning.process import ProcessId

SECONDS = 60.0
_LEASE = "bharat:lease:"  # in the study, with the lease's name behind it
RUN_BY = "bharat:run_by"  # in a trial: the lease's name
_LOOKS = 3  # that must have found nothing new: one look after a long pause of this process says nothing


@dataclass
class _Watch:
    """How long something stayed as it is while this process was looking."""

    seen: Any = None
    last: float = 0.0
    still: float = 0.0  # seconds

    def look(self, value: Any, now: float, seconds: float) -> bool:
        """Whether ``value`` stayed the same for ``seconds`` of this host's own clock."""
        if value != self.seen:
            self.seen, self.still = value, 0.0
        else:
            self.still += min(now - self.last, seconds / _LOOKS)
        self.last = now
        return self.still >= seconds


@dataclass
class Leases:
    """This controller's lease on its trials, and a watch on the other controllers' leases.

    A controller on this host is dead when its process is (its id, start and boot are in the lease), and only then. One
    that can't be seen from here (another host, another container) is dead when its lease was not renewed for as many
    seconds as it says. Clocks of two hosts are never compared: each watches by its own clock whether the other's
    number of renewals changes.

    Use it as a context manager, in the thread that asks for trials and tells them.

    Args:
        study: The study.
        seconds: After how many seconds without a renewal others take this controller for dead.
        clock: Seconds that only go forward.
    """

    study: optuna.Study
    seconds: float = SECONDS
    clock: Callable[[], float] = time.monotonic
    name: str = field(default_factory=lambda: uuid.uuid4().hex[:12], init=False)
    _beats: int = field(default=0, init=False)
    _renewed: float = field(default=0.0, init=False)
    _watches: dict[str, _Watch] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise ValueError(f"seconds={self.seconds}: a lease holds for more than 0 seconds. Write e.g. {SECONDS}")
        self._write()

    def __enter__(self) -> Leases:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def take(self, trial: optuna.Trial | FrozenTrial) -> bool:
        """Mark a trial that was just asked for as this controller's.

        Returns:
            False if another controller has ended it meanwhile, as this one stood still for too long: don't run it.
        """
        try:
            storage_of(self.study).set_trial_system_attr(trial_id(trial), RUN_BY, self.name)
        except optuna.exceptions.UpdateFinishedTrialError:
            return False
        return True

    def renew(self) -> None:
        """Say that this controller lives; writes only when a third of the lease is over, so call it in every turn."""
        if self.clock() - self._renewed > self.seconds / _LOOKS:
            self._write()

    def release(self) -> None:
        """Say that this controller runs nothing any more: trials that it left running are orphans at once."""
        self._write(ended=True)

    def orphans(self) -> list[FrozenTrial]:
        """Running trials whose controller is dead. Call it again and again: other hosts are known only by watching."""
        dead, others_live = self._judge()
        found = []
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            name = trial.system_attrs.get(RUN_BY)
            if name in dead or (name is None and self._was_left(trial, others_live)):
                found.append(trial)
        return found

    def _judge(self) -> tuple[set[str], float]:
        """The dead controllers, and the longest lease of those that live beside this one, 0 without any."""
        dead, others_live = set(), 0.0
        for key, lease in storage_of(self.study).get_study_system_attrs(study_id(self.study)).items():
            name = key.removeprefix(_LEASE)
            if not key.startswith(_LEASE) or name == self.name:
                continue
            if self._is_dead(name, lease):
                dead.add(name)
            else:
                others_live = max(others_live, float(lease["seconds"]))
        return dead, others_live

    def _is_dead(self, name: str, lease: dict[str, Any]) -> bool:
        if lease["ended"]:
            return True
        process = ProcessId.read(lease["process"])
        if process and process.can_be_seen():
            return process.is_dead()
        return self._watch(name).look(lease["beats"], self.clock(), lease["seconds"])

    def _was_left(self, trial: FrozenTrial, others_live: float) -> bool:
        """Whether a trial that nobody marked was asked for by one that died: another may be about to mark it."""
        return not others_live or self._watch(f"trial {trial.number}").look(None, self.clock(), others_live)

    def _watch(self, name: str) -> _Watch:
        return self._watches.setdefault(name, _Watch(seen=self))

    def _write(self, ended: bool = False) -> None:
        self._beats += 1
        lease: dict[str, Any] = {
            "process": ProcessId.own().as_dict(),
            "beats": self._beats,
            "seconds": self.seconds,
            "ended": ended,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),  # for people
        }
        storage_of(self.study).set_study_system_attr(study_id(self.study), _LEASE + self.name, lease)
        self._renewed = self.clock()

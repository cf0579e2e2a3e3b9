"""The controller of a study on this host: it alone asks and tells, and follows the trials that it has started."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from optuna import Study, Trial
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from lightning_bharat.tuning._optuna import storage_of, trial_id
from lightning_bharat.tuning.budget import Budget
from lightning_bharat.tuning.desk import TrialDesk
from lightning_bharat.tuning.engine import Engine, Job
from lightning_bharat.tuning.idle_cores import cores_of
from lightning_bharat.tuning.interrupts import Interrupts
from lightning_bharat.tuning.leases import Leases
from lightning_bharat.tuning.limits import set_constraints
from lightning_bharat.tuning.proposals import Proposals
from lightning_bharat.tuning.record import code_version
from lightning_bharat.tuning.resumed import checkpoint_of
from lightning_bharat.tuning.retry import RETRY_OF, copy_reports, mend, retry, withdraw
from lightning_bharat.tuning.same_error import ErrorsInARow
from lightning_bharat.tuning.slots import Slot
from lightning_bharat.tuning.trial_run import CONFIG, Orders
from lightning_bharat.tuning.verdict import Verdict, verdict
from lightning_bharat.tuning.work import Work

_ADOPT = 1.0  # seconds between two looks for trials whose controllers are gone


@dataclass
class Running:
    """A trial that has been started.

    Attributes:
        trial: Optuna's.
        job: its ranks.
        slot: what they have.
        where: they run, as far as it was known at the start.
        began: seconds of the monotonic clock.
    """

    trial: Trial
    job: Job
    slot: Slot
    where: Mapping[str, Any]
    began: float = field(default_factory=time.monotonic)


class Controller:
    """Runs trials until there are enough.

    Args:
        study: Optuna's; its storage is written by controllers alone.
        engine: starts the ranks of trials.
        slots: one trial at a time runs in each.
        work: what trials do.
        proposals: gives the values of a trial.
        budget: says when there are enough.
        leases: tell the study's other controllers which trials are ours.
        say: told of each end, in one line.
    """

    def __init__(
        self,
        study: Study,
        engine: Engine,
        slots: Sequence[Slot],
        work: Work,
        proposals: Proposals,
        budget: Budget,
        leases: Leases,
        say: Callable[[str], None] = print,
    ) -> None:
        self._study, self._engine, self._work = study, engine, work
        self._proposals, self._budget, self._leases, self._say = proposals, budget, leases, say
        self._free = list(slots)
        self._running: list[Running] = []
        self._adopted = -math.inf
        self._awaited = False
        self._code = code_version()
        self._errors = ErrorsInARow(work.same_errors)

    def run(self) -> None:
        """Until the budget is spent, or a person interrupts.

        Trials that run elsewhere are waited for: if their controller dies, they are retried here. A first Ctrl-C lets
        the running trials end; a second one, or SIGTERM, kills them: they are retried when the study goes on.

        Raises:
            SameError: trials one after another ended by the same error.
        """
        with self._leases, Interrupts(self._say) as interrupts:
            try:
                while not interrupts.now:
                    waits = False
                    if not interrupts.after_trials:
                        self._adopt()
                        waits = self._fill() or self._awaits_others()
                    if not self._running and not waits:
                        break
                    self._look()
            finally:
                self._stop()

    def _fill(self) -> bool:
        """Start trials; whether the next one has to wait for others, which may run elsewhere."""
        while self._free and self._budget.open(self._study):
            trial = self._proposals.next(self._study)
            if trial is None:
                return True
            if not withdraw(self._study, trial) and self._leases.take(trial):
                self._start(trial)
        return False

    def _awaits_others(self) -> bool:
        """Whether this controller has nothing to do, and others that may die have."""
        others = 0 if self._running else self._budget.hangs_on(self._study)
        if others and not self._awaited:
            self._say(f"waiting for trials that run elsewhere ({others}); Ctrl-C leaves them to their controllers")
        self._awaited = bool(others)
        return self._awaited

    def _start(self, trial: Trial) -> None:
        slot = self._free.pop(0)
        folder = self._work.trial_folder(trial.number)
        orders = Orders(
            study=self._study.study_name,
            number=trial.number,
            folder=folder,
            cores=slot.cores,
            params=trial.params if self._work.config else {},
            user_attrs=trial.user_attrs,
            config=self._work.config or Path(),
            monitors=self._work.monitors,
            ckpt_path=self._go_on(trial),
            prune=self._work.prune,
            idle_cores=self._work.idle_cores,
            generation=self._proposals.generation(trial),
        )
        folder.mkdir(parents=True, exist_ok=True)
        desk = TrialDesk(trial, partial(self._resumed, trial), partial(self._cores, trial, slot))
        job = self._engine.start(orders, slot, desk.hear)
        where = self._engine.where(job, slot)
        config = f"{folder.relative_to(self._work.folder)}/{CONFIG}" if self._work.config else None
        for key, value in {"where": where, "seed": self._work.seed, "code": self._code, "config": config}.items():
            trial.set_user_attr(key, value)
        self._running.append(Running(trial, job, slot, where))

    def _go_on(self, trial: Trial) -> str | None:
        """The checkpoint from which a retried trial goes on."""
        number = trial.user_attrs.get(RETRY_OF)
        found = checkpoint_of(self._work.trial_folder(number), self._say) if number is not None else None
        return str(found) if found else None

    def _resumed(self, trial: Trial, reports: int) -> None:
        """What the retried trial had reported before its checkpoint is reported again."""
        number = trial.user_attrs.get(RETRY_OF)
        if number is not None:
            old = next(one for one in self._study.get_trials(deepcopy=False) if one.number == number)
            copy_reports(old, trial, reports - 1)

    def _cores(self, trial: Trial, slot: Slot) -> tuple[int, ...]:
        return cores_of(trial, slot, self._free, [running.trial.number for running in self._running])

    def _look(self) -> None:
        """Wait until a trial has something to say; end those that are over."""
        ready = wait([one for running in self._running for one in running.job.waitables], timeout=1.0)
        if not self._running:  # the next trial waits for others, which run elsewhere
            time.sleep(_ADOPT / 4)
        for running in list(self._running):
            if ready:
                running.job.look(0)
            if running.job.over:
                self._end(running, verdict(running.job.finish()))
        self._leases.renew()

    def _end(self, running: Running, how: Verdict) -> None:
        self._running.remove(running)
        self._free.insert(0, running.slot)
        trial = running.trial
        record = {**how.record, "seconds": time.monotonic() - running.began}
        if (where := self._engine.where(running.job, running.slot)) != running.where:
            record["where"] = where
        try:
            how = self._limited(trial, how, record)
            self._book(trial, how, record)
        except UpdateFinishedTrialError:
            self._say(f"trial {trial.number}: another controller took this one for dead, and has ended it")
            return
        self._proposals.trial_ended(self._study)
        self._say(f"trial {trial.number}: {how.in_words}")
        self._errors.trial_ended(how, self._work.trial_folder(trial.number))

    def _limited(self, trial: Trial, how: Verdict, record: Mapping[str, Any]) -> Verdict:
        """Tell the study how the trial keeps its limits; one that did not measure what is limited has failed."""
        if how.state == TrialState.FAIL and not how.memory:
            return how
        try:
            set_constraints(trial, self._work.limits, {**record, **how.metrics}, out_of_memory=how.memory)
        except ValueError as error:
            return Verdict(TrialState.FAIL, f"error: {error}", error="ValueError")
        return how

    def _book(self, trial: Trial, how: Verdict, record: Mapping[str, Any]) -> None:
        for key, value in record.items():
            trial.set_user_attr(key, value)
        if how.machine:
            retry(self._study, self._frozen(trial), how.end, self._work.max_retries)
            return
        trial.set_user_attr("end", how.end)
        self._study.tell(trial, list(how.values) or None, state=how.state)

    def _adopt(self) -> None:
        """End the trials of controllers that are gone; they are retried, by whoever is the first to see it."""
        if time.monotonic() - self._adopted < _ADOPT:
            return
        mend(self._study)
        for orphan in self._leases.orphans():
            if retry(self._study, orphan, "killed: its controller has ended", self._work.max_retries):
                self._say(f"trial {orphan.number}: its controller has ended, and it is retried")
        self._adopted = time.monotonic()

    def _stop(self) -> None:
        """Kill what runs; it is retried when the study goes on, however often that was."""
        while self._running:
            running = self._running.pop()
            running.job.finish()
            retry(self._study, self._frozen(running.trial), "killed: the study was interrupted", sys.maxsize)
        self._engine.close()

    def _frozen(self, trial: Trial) -> FrozenTrial:
        return storage_of(self._study).get_trial(trial_id(trial))

"""What has been logged and counted in an epoch that is not over, for a run that goes on in the middle of it.

Lightning does not save what ``self.log`` has added up, nor the last values that callbacks and schedulers look at, and
states of torchmetrics are in no ``state_dict`` unless they are made persistent: after a resume an epoch's mean would be
that of its rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torchmetrics import Metric

from lightning_bharat.checkpoints.told import Told
from lightning_bharat.plan.layout import Layout
from lightning_bharat.strategies import _lightning_logged, _lightning_resume, _torchmetrics

KEY = "lightning_bharat_unfinished"


class Unfinished:
    """In the layout that saved it each rank goes on with what was its own; in another one all go on with their share of
    what was logged, and metrics begin anew."""

    def __init__(self) -> None:
        self._saved: dict[str, Any] | None = None
        self._before_validation: dict[str, Any] | None = None

    def with_state(self, checkpoint: dict[str, Any], trainer: Any, layout: Layout) -> dict[str, Any]:
        """Lightning's dict with what all ranks have."""
        begun = self._before_validation if _lightning_resume.in_validation(trainer) else None
        own = {
            "logged": _lightning_logged.logged(trainer),
            "last": _lightning_logged.last_values(trainer),
            "metrics": _states(trainer.lightning_module) if begun is None else begun,
        }
        return {**checkpoint, KEY: Told(own, lambda of_ranks: {"layout": asdict(layout), "of_ranks": of_ranks})}

    def read(self, checkpoint: Mapping[str, Any], layout: Layout, rank: int) -> None:
        """Remember what the run goes on with."""
        saved = checkpoint.get(KEY)
        if saved is None:
            return
        if saved["layout"] == asdict(layout):
            self._saved = saved["of_ranks"][rank]
            return
        before, of_ranks = Layout(**saved["layout"]), saved["of_ranks"]
        of_data = [of_ranks[before.rank(data=i)] for i in range(before.data)]
        logged = _lightning_logged.shared_out([own["logged"] for own in of_data], layout.data)
        self._saved = {"logged": logged, "last": of_data[0]["last"], "metrics": {}}

    def run_starts(self, trainer: Any) -> None:
        """Lightning has cleared what it had."""
        if self._saved is not None:
            _lightning_logged.put_last_values(trainer, self._saved["last"])
            _lightning_resume.end_epoch(trainer)

    def epoch_goes_on(self, trainer: Any, batches: int) -> None:
        """The next batch follows ``batches`` of this epoch."""
        if self._saved is not None and batches > 0:
            _lightning_logged.put_logged(trainer, self._saved["logged"])
            parts = dict(trainer.lightning_module.named_modules())
            for name, (states, updates) in self._saved["metrics"].items():
                _torchmetrics.take_up(parts[name], states, updates)
        self._saved = None

    def validation_begins(self, trainer: Any) -> None:
        """What is saved in it is saved as of now, for it is run anew."""
        self._before_validation = _states(trainer.lightning_module)


def _states(module: Any) -> dict[str, Any]:
    found = {name: part for name, part in module.named_modules() if isinstance(part, Metric)}
    return {
        name: (states, _torchmetrics.updates(metric))
        for name, metric in found.items()
        if (states := _torchmetrics.unsaved(metric))
    }

"""Trainings that share one start of ranks, each compared with plain Lightning on one process.

A second training in the same ranks takes half of the time of the first: torch knows its operators' shapes by then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tests.modules import Result, assert_equal, fit
from tests.ranks import run_ranks

_WHOLE: dict[str, Result] = {}  # of one process, by what was asked for: groups ask for the same


@dataclass(frozen=True)
class Run:
    """A training by ``tests.modules.fit``. All of it can be pickled.

    Args:
        module: a name, or what makes a module.
        strategy: arguments of the HybridStrategy; ``None`` is one plain process.
        options: what ``fit`` takes besides.
        whole: what ``fit`` takes on one process instead of ``options``.
    """

    module: Callable[[], Any] | str
    strategy: Mapping[str, Any] | None
    options: Mapping[str, Any] = field(default_factory=dict)
    whole: Mapping[str, Any] | None = None

    @property
    def on_one_process(self) -> Run:
        return Run(self.module, None, self.options if self.whole is None else self.whole)


class Together:
    """Runs on ``ranks`` ranks, which are started once, when the first of the runs is asked for.

    Args:
        runs: by name. All of them should take no more than half a minute: the first test waits for all.
        timeout: seconds for all of them.
    """

    def __init__(self, ranks: int, runs: Mapping[str, Run], timeout: float = 90) -> None:
        self.ranks, self.runs, self.timeout = ranks, runs, timeout

    def check(self, name: str, tolerance: float = 1e-9) -> list[Result]:
        """Compare what each rank found in a run with one process, and return it."""
        results = self.found(name)
        for result in results:
            assert_equal(result, self.whole(name), tolerance)
        return results

    def found(self, name: str) -> list[Result]:
        """What each rank found in a run."""
        return [of_rank[name] for of_rank in self._found]

    def whole(self, name: str) -> Result:
        """What one process found in it."""
        asked = {other: run.on_one_process for other, run in self.runs.items()}
        missing = {repr(run): run for run in asked.values() if repr(run) not in _WHOLE}
        if missing:
            _WHOLE.update(run_ranks(_train, 1, missing, timeout=self.timeout)[0])
        return _WHOLE[repr(asked[name])]

    @cached_property
    def _found(self) -> list[dict[str, Result]]:
        return run_ranks(_train, self.ranks, self.runs, timeout=self.timeout)


def _train(runs: Mapping[str, Run]) -> dict[str, Result]:
    results = {}
    for name, run in runs.items():
        print(f"fit {name}", flush=True)  # the last that is printed is the one that failed
        results[name] = fit(run.module, run.strategy, **run.options)  # type: ignore[arg-type]
    return results

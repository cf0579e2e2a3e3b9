"""How a fit that was pruned ends in ``TrialPruned``, and how what ranks have reported reaches the process that has the
trial."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch.trainer.states import TrainerState, TrainerStatus


class LastWord(TrainerState):
    """A trainer's state that acts once, when all of a run's hooks have been called.

    A callback's last hook is ``teardown``: what it raises there keeps the callbacks, the module and the loggers behind
    it from theirs. And where the ranks are children of the process that called ``fit``, no hook is called in that one
    at all; all that it gets from them is this state, with a few results.

    Args:
        state: what it is otherwise.
        act: called when the run has finished.
        bring: a function of a module and its arguments, called where this state arrives in another process.
    """

    def __init__(
        self,
        state: TrainerState,
        act: Callable[[LastWord], None],
        bring: tuple[Callable[..., None], tuple[Any, ...]] | None = None,
    ) -> None:
        super().__init__(state.status, state.fn, state.stage)
        self._act: Callable[[LastWord], None] | None = act
        self._bring = bring

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        act = vars(self).get("_act")
        if name == "status" and value == TrainerStatus.FINISHED and act is not None:
            self._act = None
            act(self)

    def cancel(self) -> None:
        """Be an ordinary state again."""
        self._act = self._bring = None

    def __deepcopy__(self, memo: dict[int, Any]) -> LastWord:
        return self  # Lightning copies what it sends to the other process

    def __reduce__(self) -> tuple[Callable[..., TrainerState], tuple[Any, ...]]:
        return _arrive, (self.status, self.fn, self.stage, self._bring)


def _arrive(
    status: Any, fn: Any, stage: Any, bring: tuple[Callable[..., None], tuple[Any, ...]] | None
) -> TrainerState:
    if bring is not None:
        function, args = bring
        function(*args)
    return TrainerState(status, fn, stage)

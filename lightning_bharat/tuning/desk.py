"""The controller's end of a trial's pipes: rank 0's questions go to Optuna's trial, the other ranks get its answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from optuna import Trial

from lightning_bharat.tuning.suggest import suggest

Question = tuple[str, tuple[Any, ...]]
# What was raised, or None, and what is answered.
Reply = tuple[Exception | None, Any]

# Told by rank 0 alone, so that no other rank has a question to match them.
_TOLD = ("report", "note_resumed", "set_user_attr", "set_constraint")


class TrialDesk:
    """Answers the ranks of one trial.

    Args:
        trial: Optuna's, of the controller's study.
        resumed: called when the ranks go on from a checkpoint, with the number of reports before it.
        cores: called for the cores that the trial is to have.
    """

    def __init__(
        self,
        trial: Trial,
        resumed: Callable[[int], None] = lambda reports: None,
        cores: Callable[[], tuple[int, ...]] = tuple,
    ) -> None:
        self._trial, self._resumed, self._cores = trial, resumed, cores
        self._asked: list[tuple[Question, Reply]] = []  # by rank 0, what others may ask too
        self._next: dict[int, int] = {}  # of other ranks: how many of them they have been given
        self._waiting: dict[int, Question] = {}
        self._closed = False

    def hear(self, rank: int, question: Question) -> list[tuple[int, Reply]]:
        """The answers that can be given now, each with the rank that waits for it."""
        if rank != 0:
            self._waiting[rank] = question
            return self._of_others()
        if question[0] == "end":  # what others wait for now will never come
            self._closed = True
            return [(0, (None, None)), *self._of_others()]
        reply = self._reply(*question)
        if question[0] not in _TOLD:
            self._asked.append((question, reply))
        return [(0, reply), *self._of_others()]

    def _of_others(self) -> list[tuple[int, Reply]]:
        given = []
        for rank, question in list(self._waiting.items()):
            at = self._next.get(rank, 0)
            if at < len(self._asked):
                first, reply = self._asked[at]
                self._next[rank] = at + 1
                given.append((rank, reply if _same(question, first) else (_differ(rank, question, first), None)))
            elif self._closed:
                given.append((rank, (_differ(rank, question, None), None)))
            else:
                continue
            del self._waiting[rank]
        return given

    def _reply(self, what: str, args: tuple[Any, ...]) -> Reply:
        try:
            return None, self._do(what, *args)
        except Exception as error:  # it is the ranks' error: all of them raise it
            return error, None

    def _do(self, what: str, *args: Any) -> Any:
        match what:
            case "suggest":
                return suggest(self._trial, *args)
            case "should_prune":
                return self._trial.should_prune()
            case "cores":
                return self._cores()
            case "report":
                self._trial.report(*args)
            case "note_resumed":
                self._resumed(*args)
            case "set_user_attr":
                self._trial.set_user_attr(*args)
            case "set_constraint":
                self._trial.set_constraint(*args)
            case _:
                raise ValueError(f"{what!r} is nothing that a trial can be asked")


def _same(one: Question, other: Question) -> bool:
    return one == other


def _differ(rank: int, question: Question, first: Question | None) -> ValueError:
    asked = f"asked for {_in_words(first)}" if first else "has ended"
    return ValueError(
        f"the ranks of a trial must ask the same in the same order: rank {rank} asks for {_in_words(question)} where "
        f"rank 0 {asked}"
    )


def _in_words(question: Question) -> str:
    what, args = question
    return f"{what}({', '.join(map(repr, args))})"

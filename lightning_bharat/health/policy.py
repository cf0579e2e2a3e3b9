"""What happens next when something is found: a policy for each kind of fault."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ACTIONS = ("ignore", "log", "skip", "rollback", "restart", "leave_node")  # later ones are stronger
_ALWAYS = ("ignore", "log", "restart")


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
        default: what is done without a policy of the user's.
        more: what can be done besides ignoring, logging and restarting.
    """

    default: str
    more: tuple[str, ...] = ()

    @property
    def actions(self) -> tuple[str, ...]:
        """What can be done, in order of strength."""
        return tuple(action for action in ACTIONS if action in _ALWAYS or action in self.more)


KINDS = {
    "nan": Kind("skip", ("skip", "rollback")),
    "spike": Kind("log", ("skip", "rollback")),
    "leak": Kind("log", ("leave_node",)),
    "out_of_memory": Kind("log"),
    "hang": Kind("restart", ("leave_node",)),
    "silent": Kind("restart", ("leave_node",)),
    "straggler": Kind("log", ("leave_node",)),
    "link": Kind("log", ("leave_node",)),
    "device": Kind("log", ("leave_node",)),
    "disk": Kind("log", ("leave_node",)),
    "host_memory": Kind("log", ("leave_node",)),
    "corruption": Kind("restart", ("leave_node",)),
    "data": Kind("skip", ("skip",)),
    "loader": Kind("log"),
    "drift": Kind("log"),
}


class Policy:
    """Kind of fault → action.

    Args:
        given: the user's, over the defaults.

    Raises:
        ValueError: a kind or an action that there is not, or an action that can't be done for that kind.
    """

    def __init__(self, given: Mapping[str, str] | None = None) -> None:
        for kind, action in (given or {}).items():
            if kind not in KINDS:
                raise ValueError(f"policy: there is no kind of fault {kind!r}; write one of {', '.join(KINDS)}")
            if action not in KINDS[kind].actions:
                raise ValueError(
                    f"policy[{kind!r}]={action!r} can't be done; write one of {', '.join(KINDS[kind].actions)}"
                )
        self._actions = {kind: entry.default for kind, entry in KINDS.items()} | dict(given or {})

    def __getitem__(self, kind: str) -> str:
        return self._actions[kind]

    def uses(self, action: str) -> list[str]:
        """The kinds for which ``action`` is done."""
        return [kind for kind, chosen in self._actions.items() if chosen == action]

    def wants(self, *kinds: str) -> bool:
        """Whether one of ``kinds`` is looked for."""
        return any(self._actions[kind] != "ignore" for kind in kinds)


def strongest(actions: list[str]) -> str:
    """The one that is done where several things are found at once."""
    return max(actions, key=ACTIONS.index, default="ignore")

"""The error that ends a run: what the ranks tell each other of it, and how it is printed once."""

from __future__ import annotations

import sys
import traceback
from dataclasses import dataclass
from types import TracebackType

_LONGEST_TRACEBACK = 20_000  # characters that go through the store


@dataclass(frozen=True)
class FirstError:
    """The error of the first rank that failed.

    Attributes:
        rank: where it happened.
        name: that rank's name, like ``"rank 5 (data 2, tensor 1)"``.
        kind: the exception's type by name; empty for a rank that is gone without a word.
        message: the exception's text, or how the rank seems to have ended.
        traceback: as text; empty for a rank that is gone.
    """

    rank: int
    name: str
    kind: str
    message: str
    traceback: str = ""

    @classmethod
    def of(cls, error: BaseException, rank: int, name: str) -> FirstError:
        """Describe ``error``, raised on ``rank``."""
        text = "".join(traceback.format_exception(error))[-_LONGEST_TRACEBACK:]
        return cls(rank, name, type(error).__qualname__, str(error), text)

    @property
    def is_gone(self) -> bool:
        """Whether that rank's process ended without a word."""
        return not self.kind

    def is_like(self, error: BaseException) -> bool:
        """Whether ``error`` says the same, as when all ranks refuse one thing."""
        return (self.kind, self.message) == (type(error).__qualname__, str(error))

    def __str__(self) -> str:
        return (
            f"{self.name} raised {self.kind}: {self.message}" if self.kind else f"{self.name} is gone: {self.message}"
        )


class PeerError(RuntimeError):
    """This rank ends because another one failed.

    Attributes:
        first: the other rank's error.
    """

    def __init__(self, first: FirstError, here: str = "this rank") -> None:
        super().__init__(first, here)
        self.first = first
        self.here = here

    def __str__(self) -> str:
        return str(self.first)

    @property
    def line(self) -> str:
        """For the log of this rank: why it ends, without the words that the other rank prints."""
        if self.first.is_gone:
            return f"{self.here} ends: {self.first}"
        return f"{self.here} ends: {self.first.name} raised {self.first.kind} and prints it"


# Exceptions that another rank prints, with that rank's; by identity, since not every exception can be hashed.
_printed_elsewhere: dict[int, tuple[BaseException, PeerError]] = {}


def leave_printing_to(error: BaseException, peer: PeerError) -> None:
    """Let ``sys.excepthook`` say ``peer``'s one line where it would print ``error`` once more."""
    _printed_elsewhere[id(error)] = (error, peer)


def print_once() -> None:
    """Let ``sys.excepthook`` give one line instead of a traceback for what another rank prints."""
    if getattr(sys.excepthook, "prints_once", False):
        return
    former = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        _, peer = _printed_elsewhere.get(id(error), (error, error))
        if isinstance(peer, PeerError):
            print(peer.line, file=sys.stderr, flush=True)
        else:
            former(kind, error, trace)

    hook.prints_once = True  # type: ignore[attr-defined]
    sys.excepthook = hook

"""The parser of ``bharat fit``, without its sister commands and without what is parsed.

It knows nothing of a project until it parses, so the process server can build one that all its forks find ready: that
takes longer than to parse with it.
"""

from __future__ import annotations

from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from lightning_bharat.commands.inspection import InspectionCLI

_ready: list[LightningArgumentParser] = []


class _Parser(InspectionCLI):
    def __init__(self) -> None:
        super().__init__("bharat fit", "", [])

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Nothing yet, and no seed is set."""
        self.config = Namespace(seed_everything=False)


def build() -> None:
    """Have one ready, for this process or its forks."""
    _ready.append(_Parser().parser)


def take() -> LightningArgumentParser:
    """The one that is ready, else a new one. Each is taken once: who parses with it may add to it."""
    if not _ready:
        build()
    return _ready.pop()

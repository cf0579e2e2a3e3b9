"""A project's strategy with the sizes of another layout."""

from __future__ import annotations

from lightning_bharat.commands.inspection import InspectionCLI
from lightning_bharat.plan.layout import Layout
from lightning_bharat.strategies.hybrid import HybridStrategy
from lightning_bharat.strategies.options import sizes


def sized_strategy(cli: InspectionCLI, layout: Layout) -> HybridStrategy:
    """The project's strategy, if it is ours, with the sizes of ``layout``."""
    given = cli.config.trainer.get("strategy")
    kind = given.get("class_path", "") if hasattr(given, "get") else ""
    options = dict(given.get("init_args") or {}) if kind.rpartition(".")[2] == "HybridStrategy" else {}
    return HybridStrategy(**{**options, **sizes(layout), "compile": False})

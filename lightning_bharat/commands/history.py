"""What `bharat checkpoint history` runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from lightning_bharat import events
from lightning_bharat.reports.history import History
from lightning_bharat.reports.history_text import as_html, as_text


def history(run: Path, *, format: Literal["text", "html", "json"] = "text") -> None:
    """Print what happened to a run: starts, saves, failures with their cause, time lost, goodput.

    Example:
        bharat checkpoint history runs/1 --format html > history.html

    Args:
        run: the run's folder: its Trainer's default_root_dir, or the --run of bharat launch.
        format: text; html: one page, which needs no network; json: for programs.
    """
    if not (run / events.EVENTS).is_file():
        raise FileNotFoundError(
            f"{run} has no {events.EVENTS}; write the folder of a run: its Trainer's default_root_dir, or the --run of "
            "bharat launch"
        )
    found = History.of(events.read(run))
    if format == "json":
        print(json.dumps({"run": str(run), **found.as_dict()}, indent=2))
    elif format == "html":
        print(as_html(found, f"History of {run}"))
    else:
        print(as_text(found))
